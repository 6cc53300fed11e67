//! Spans as lines of text, by which a worker process hands them over to the process that draws them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{
    Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

/// The attributes of a workflow's own span that are drawn: its outcome, and the number of its spans.
const OWN: [&str; 2] = ["workflow.status", "workflow.spans"];

/// The attribute of a link that tells why it is there.
const RELATION: &str = "workflow.relation";

/// Returns the line of a span, with that name.
pub(crate) fn to_line(span: &SpanData, name: &str) -> String {
    let error = match &span.status {
        Status::Error { description } => description,
        _ => "",
    };
    [
        &*span.span_context.trace_id().to_string(),
        &*span.span_context.span_id().to_string(),
        &*span.parent_span_id.to_string(),
        &*since_epoch(span.start_time).to_string(),
        &*since_epoch(span.end_time).to_string(),
        error,
        &*OWN
            .map(|name| value(span, name).unwrap_or_default())
            .join(","),
        &*links_of(span),
        name,
    ]
    .join("\t")
}

/// Returns an attribute of a span as text.
pub(crate) fn value(span: &SpanData, name: &str) -> Option<String> {
    let mut attributes = span.attributes.iter();
    let found = attributes.find(|attribute| attribute.key.as_str() == name);
    found.map(|attribute| attribute.value.to_string())
}

/// Reads a span from its line.
pub(crate) fn from_line(line: &str) -> Result<SpanData, String> {
    read(line).ok_or_else(|| format!("not a span: {line}"))
}

fn read(line: &str) -> Option<SpanData> {
    let fields: Vec<_> = line.split('\t').collect();
    let [trace, span, parent, start, end, error, own, links, name] = fields[..] else {
        return None;
    };
    let time = |text: &str| Some(UNIX_EPOCH + Duration::from_nanos(text.parse().ok()?));
    Some(SpanData {
        span_context: context(trace, span)?,
        parent_span_id: SpanId::from_hex(parent).ok()?,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.to_owned().into(),
        start_time: time(start)?,
        end_time: time(end)?,
        attributes: OWN
            .into_iter()
            .zip(own.split(','))
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| KeyValue::new(name, value.to_owned()))
            .collect(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: read_links(links)?,
        status: match error {
            "" => Status::Unset,
            error => Status::error(error.to_owned()),
        },
        instrumentation_scope: InstrumentationScope::default(),
    })
}

/// Returns each link as its target and its relation.
fn links_of(span: &SpanData) -> String {
    let link = |link: &Link| {
        let mut attributes = link.attributes.iter();
        let relation = attributes.find(|attribute| attribute.key.as_str() == RELATION);
        let relation = relation.map_or_else(String::new, |it| it.value.to_string());
        let (trace, span) = (link.span_context.trace_id(), link.span_context.span_id());
        format!("{trace}:{span}:{relation}")
    };
    let links: Vec<_> = span.links.iter().map(link).collect();
    links.join(",")
}

fn read_links(links: &str) -> Option<SpanLinks> {
    let mut read = SpanLinks::default();
    for link in links.split(',').filter(|link| !link.is_empty()) {
        let (trace, rest) = link.split_once(':')?;
        let (span, relation) = rest.split_once(':')?;
        let relation = KeyValue::new(RELATION, relation.to_owned());
        let link = Link::new(context(trace, span)?, vec![relation], 0);
        read.links.push(link);
    }
    Some(read)
}

fn context(trace: &str, span: &str) -> Option<SpanContext> {
    Some(SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::SAMPLED, // only what was sampled is exported
        false,
        TraceState::NONE,
    ))
}

fn since_epoch(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos()
}
