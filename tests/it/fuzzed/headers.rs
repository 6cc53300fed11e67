//! Headers, read by the crate and by a second reader that follows the text of the specification word by word.

use std::collections::HashMap;
use std::sync::OnceLock;

use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing_workflow_context::{ParseContextError, WorkflowContext, WorkflowContextStorage};

/// A carrier in which a header may be there several times.
struct Carrier<'a> {
    traceparents: Vec<&'a str>,
    tracestates: Vec<&'a str>,
}

impl Extractor for Carrier<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.get_all(key)?.first().copied()
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }

    fn get_all(&self, key: &str) -> Option<Vec<&str>> {
        match key {
            "traceparent" => Some(self.traceparents.clone()),
            "tracestate" => Some(self.tracestates.clone()),
            _ => None,
        }
    }
}

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// Each line of the input is a `traceparent` header.
pub(crate) fn traceparent(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let carrier = Carrier {
        traceparents: text.split('\n').collect(),
        tracestates: Vec::new(),
    };
    let extracted = WorkflowContext::extract(&carrier);
    if carrier.traceparents.len() > 1 {
        assert_eq!(extracted, Err(ParseContextError::Duplicate));
    }
    for value in &carrier.traceparents {
        let parsed = WorkflowContext::parse(value, "");
        let expected = read_traceparent(value);
        let found = parsed.as_ref().ok().map(|cx| {
            let flags = cx.to_otel().span().span_context().trace_flags();
            let (trace, span) = (cx.trace_id().to_bytes(), cx.span_id().to_bytes());
            (
                u128::from_be_bytes(trace),
                u64::from_be_bytes(span),
                flags.to_u8(),
            )
        });
        assert_eq!(found, expected, "{value:?}");
        let Ok(cx) = parsed else {
            continue;
        };
        let sent = cx.traceparent();
        let (trace, span, flags) = expected.expect("equal to it");
        assert_eq!(sent, format!("00-{trace:032x}-{span:016x}-{flags:02x}"));
        let again = WorkflowContext::parse(&sent, "").expect("what was sent is read");
        assert_eq!(again.traceparent(), sent);
        // The SDK agrees on whatever goes out.
        let headers = HashMap::from([("traceparent".to_owned(), sent)]);
        let theirs = TraceContextPropagator::new().extract(&headers);
        let theirs = theirs.span().span_context().clone();
        assert_eq!(theirs.trace_id(), cx.trace_id());
        assert_eq!(theirs.span_id(), cx.span_id());
        assert_eq!(theirs.is_sampled(), cx.is_sampled());
    }
}

/// "traceparent Header", "Versioning of traceparent": the trace id, the span id and the known flags.
pub(super) fn read_traceparent(value: &str) -> Option<(u128, u64, u8)> {
    let fields: Vec<_> = value.trim_matches([' ', '\t']).splitn(5, '-').collect();
    let ([version, trace, span, flags] | [version, trace, span, flags, _]) = fields[..] else {
        return None;
    };
    let is_known = version == "00";
    if (is_known && fields.len() != 4) || version == "ff" {
        return None;
    }
    let hex = |text: &str, digits: usize| {
        let all = text.chars().all(|c| "0123456789abcdef".contains(c));
        let number = u128::from_str_radix(text, 16).ok();
        number.filter(|_| all && text.len() == digits)
    };
    hex(version, 2)?;
    let trace = hex(trace, 32).filter(|id| *id != 0)?;
    let span = hex(span, 16).filter(|id| *id != 0)?;
    let flags = hex(flags, 2)? as u8;
    Some((trace, span as u64, flags & 3))
}

/// The first byte bounds what a storage keeps, each further line is a `tracestate` header.
pub(crate) fn tracestate(data: &[u8]) {
    let (most, data) = match data {
        [most, rest @ ..] => (usize::from(*most) * 4, rest),
        [] => (0, data),
    };
    let text = String::from_utf8_lossy(data);
    let carrier = Carrier {
        traceparents: vec![PARENT],
        tracestates: text.split('\n').collect(),
    };
    let cx = WorkflowContext::extract(&carrier).expect("a tracestate costs no trace");
    let expected = read_tracestate(&carrier.tracestates);
    let members = expected.unwrap_or_default();
    let header = |members: &[(String, String)]| {
        let members = members.iter().map(|(key, value)| format!("{key}={value}"));
        members.collect::<Vec<_>>().join(",")
    };
    assert_eq!(cx.tracestate(), header(&members));

    let mut sent = HashMap::new();
    cx.inject(&mut sent);
    assert!(
        sent.values()
            .all(|value| !value.contains(['\r', '\n', '\0']))
    );
    let received = WorkflowContext::extract(&sent).expect("just written");
    assert_eq!(received.tracestate(), cx.tracestate());

    // OpenTelemetry's type has a part of it, in its order.
    let otel = cx.to_otel().span().span_context().trace_state().header();
    let mut left = members.iter();
    for member in otel.split(',').filter(|member| !member.is_empty()) {
        let is_there = left.any(|(key, value)| *member == format!("{key}={value}"));
        assert!(is_there, "{member:?} is not in {otel:?}");
    }

    // What a storage keeps is bounded, and whole members of it.
    let storage = STORAGES[most / 4].get_or_init(|| {
        let storage = WorkflowContextStorage::builder()
            .max_trace_state(most)
            .max_instances(1)
            .recent_decisions(0)
            .clock(std::sync::Arc::new(Now));
        storage.build().expect("sound settings")
    });
    storage.store("id", cx.clone()).expect("a sound id");
    let kept = storage.get("id").expect("a sound id").expect("just stored");
    assert!(
        kept.tracestate().len() <= most,
        "{} of {most}",
        kept.tracestate()
    );
    let mut all = members.iter();
    let kept_members = read_tracestate(&[&kept.tracestate()]).unwrap_or_default();
    assert!(kept_members.iter().all(|member| all.any(|it| it == member)));
    if cx.tracestate().len() <= most {
        assert_eq!(kept.tracestate(), cx.tracestate());
    }
}

/// One for each bound: to build them again would take most of the time.
static STORAGES: [OnceLock<WorkflowContextStorage>; 256] = [const { OnceLock::new() }; 256];

/// A clock that does not tick: no thread is started for a storage.
#[derive(Debug)]
pub(super) struct Now;

impl tracing_workflow_context::Clock for Now {
    fn now(&self) -> std::time::SystemTime {
        std::time::SystemTime::now()
    }
}

/// "tracestate Header Field Values", "Key", "Value": the members, or `None` if the list is to be dropped.
pub(super) fn read_tracestate(values: &[&str]) -> Option<Vec<(String, String)>> {
    // The crate's own bound; a comma joins two headers.
    let length: usize = values.iter().map(|value| value.len() + 1).sum();
    if length > 32 * 1024 {
        return None;
    }
    let mut members = Vec::new();
    for member in values.join(",").split(',') {
        let member = member.trim_matches([' ', '\t']);
        if member.is_empty() {
            continue;
        }
        let (key, value) = member.split_once('=')?;
        let first = key.chars().next()?;
        let lower = 'a'..='z';
        let is_key = (lower.contains(&first) || first.is_ascii_digit())
            && key.chars().count() <= 256
            && key
                .chars()
                .all(|c| lower.contains(&c) || c.is_ascii_digit() || "_-*/@".contains(c));
        let is_value = !value.is_empty()
            && value.chars().count() <= 256
            && !value.ends_with(' ')
            && value
                .chars()
                .all(|c| matches!(c, '\x20'..='\x7e') && c != ',' && c != '=');
        if !is_key || !is_value {
            return None;
        }
        members.push((key.to_owned(), value.to_owned()));
    }
    (members.len() <= 32).then_some(members)
}
