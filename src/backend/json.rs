//! The JSON form of a [`Record`], which is the object that dapr-agents keeps, for workers in other languages.
//!
//! | member | value |
//! |---|---|
//! | `traceparent` | text, as in the header; the only required member |
//! | `tracestate` | text or null |
//! | `instance_id` | text; written, but not read: the key has it |
//! | `resumed` | a boolean |
//! | `debug_info` | text; written, but not read |
//! | `run_id` | text or null |
//! | `generation` | a positive integer |
//! | `recorded_at`, `expires_at` | seconds since 1970, as `time.time()` returns them |
//! | `root` | null, or an object that describes the instance's own span: |
//! | `root.span_id`, `root.parent_span_id` | 16 lower-case hexadecimal digits; there may be no parent |
//! | `root.name` | text |
//! | `root.started_at`, `root.last_end` | seconds since 1970 |
//! | `root.spans` | the number of spans that have ended |
//! | `root.links` | objects with a `traceparent` and a `relation` |
//!
//! A member of another type makes the value malformed; members with other names are ignored.

use std::time::{Duration, SystemTime};

use opentelemetry::SpanId;
use opentelemetry::trace::SpanContext;
use serde_json::{Map, Value, json};

use crate::backend::{Record, RootSpan};
use crate::context::WorkflowContext;

const WRITER: &str = concat!(
    "recorded by ",
    env!("CARGO_PKG_NAME"),
    " ",
    env!("CARGO_PKG_VERSION")
);

/// Time to live of a value without an expiry, in it or on the server.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) fn encode(instance_id: &str, record: &Record) -> Vec<u8> {
    let context = &record.context;
    let tracestate = Some(context.tracestate()).filter(|state| !state.is_empty());
    let mut object = json!({
        "traceparent": context.traceparent(),
        "tracestate": tracestate,
        "instance_id": instance_id,
        "resumed": context.is_resumed(),
        "debug_info": WRITER,
        "run_id": record.run_id,
        "generation": record.generation,
        "recorded_at": seconds(context.recorded_at()),
        "expires_at": seconds(record.expires_at),
    });
    if let (Some(root), Some(object)) = (&record.root, object.as_object_mut()) {
        object.insert("root".to_owned(), encode_root(root));
    }
    object.to_string().into_bytes()
}

fn encode_root(root: &RootSpan) -> Value {
    let link = |(to, relation): &(SpanContext, String)| {
        let to = WorkflowContext::try_from(to).ok()?;
        Some(json!({ "traceparent": to.traceparent(), "relation": relation }))
    };
    json!({
        "span_id": root.span_id.to_string(),
        "parent_span_id": root.parent_span_id.map(|id| id.to_string()),
        "name": root.name,
        "started_at": seconds(root.started_at),
        "last_end": seconds(root.last_end),
        "spans": root.spans,
        "links": root.links.iter().filter_map(link).collect::<Vec<_>>(),
    })
}

fn decode_root(root: &Map<String, Value>) -> Option<Box<RootSpan>> {
    // `from_hex` takes fewer digits, capitals and a sign.
    let is_digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let id = |text: &str| {
        let is_id = text.len() == 16 && text.bytes().all(is_digit);
        let id = SpanId::from_hex(text).ok();
        id.filter(|id| is_id && *id != SpanId::INVALID)
    };
    let parent = match member(root, "parent_span_id", Value::as_str)? {
        None => None,
        Some(parent) => Some(id(parent)?),
    };
    let link = |link: &Value| {
        let to = WorkflowContext::parse(link.get("traceparent")?.as_str()?, "").ok()?;
        let relation = link.get("relation")?.as_str()?.to_owned();
        Some((to.to_span_context(), relation))
    };
    let started_at = time(root.get("started_at")?)?;
    let links = member(root, "links", Value::as_array)?;
    let links = links.into_iter().flatten().map(link);
    Some(Box::new(RootSpan {
        parent_span_id: parent,
        last_end: member(root, "last_end", time)?.unwrap_or(started_at),
        spans: member(root, "spans", Value::as_u64)?.unwrap_or_default(),
        links: links.collect::<Option<_>>()?,
        ..RootSpan::new(
            id(root.get("span_id")?.as_str()?)?,
            root.get("name")?.as_str()?,
            started_at,
        )
    }))
}

pub(super) fn decode(bytes: &[u8]) -> Option<Record> {
    let object: Map<String, Value> = serde_json::from_slice(bytes).ok()?;
    let traceparent = object.get("traceparent")?.as_str()?;
    let tracestate = member(&object, "tracestate", Value::as_str)?;
    let resumed = member(&object, "resumed", Value::as_bool)?;
    let run_id = member(&object, "run_id", Value::as_str)?;
    let generation = member(&object, "generation", Value::as_u64)?;
    let recorded_at = member(&object, "recorded_at", time)?;
    let expires_at = member(&object, "expires_at", time)?;
    let root = match member(&object, "root", Value::as_object)? {
        None => None,
        Some(root) => Some(decode_root(root)?),
    };

    let mut context = WorkflowContext::parse(traceparent, tracestate.unwrap_or_default()).ok()?;
    if let Some(recorded_at) = recorded_at {
        context = context.with_recorded_at(recorded_at);
    }
    if resumed == Some(true) {
        context = context.into_resumed();
    }
    Some(Record {
        context,
        run_id: run_id.map(str::to_owned),
        generation: u32::try_from(generation.unwrap_or(1))
            .ok()
            .filter(|&it| it > 0)?,
        expires_at: expires_at.unwrap_or_else(|| SystemTime::now() + DEFAULT_TTL),
        root,
    })
}

/// Reads an optional member. Returns `None` if it is of another type.
fn member<'a, T>(
    object: &'a Map<String, Value>,
    name: &str,
    read: impl FnOnce(&'a Value) -> Option<T>,
) -> Option<Option<T>> {
    match object.get(name) {
        None | Some(Value::Null) => Some(None),
        Some(value) => read(value).map(Some),
    }
}

fn seconds(time: SystemTime) -> f64 {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH);
    since_epoch.unwrap_or_default().as_secs_f64()
}

fn time(seconds: &Value) -> Option<SystemTime> {
    let since_epoch = Duration::try_from_secs_f64(seconds.as_f64()?).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(since_epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn decoded(text: &str) -> Option<Record> {
        decode(text.as_bytes())
    }

    #[test]
    fn a_record_is_decoded_as_it_was_encoded() {
        let moment = |s| SystemTime::UNIX_EPOCH + Duration::from_secs(s);
        for (tracestate, run_id) in [("", None), ("a=1,b=\"\\", Some("run\u{1f}\n\"ü"))] {
            let context = WorkflowContext::parse(PARENT, tracestate).expect("well formed");
            let record = Record {
                context: context
                    .with_recorded_at(moment(1_800_000_000))
                    .into_resumed(),
                run_id: run_id.map(str::to_owned),
                generation: 7,
                expires_at: moment(1_900_000_000),
                root: run_id.map(|name| {
                    let root = RootSpan::new(SpanId::from(7), name, moment(1_800_000_000));
                    let link = WorkflowContext::parse(PARENT, "").expect("well formed");
                    Box::new(RootSpan {
                        parent_span_id: Some(SpanId::from(9)),
                        last_end: moment(1_800_000_009),
                        spans: 3,
                        links: vec![(link.to_span_context(), "new_run".to_owned())],
                        ..root
                    })
                }),
            };
            assert_eq!(decode(&encode("id", &record)), Some(record));
        }
    }

    #[test]
    fn an_object_of_dapr_agents_is_read() {
        let record = decoded(&format!(
            r#"{{"traceparent": "{PARENT}", "tracestate": null, "instance_id": "order-42",
                "resumed": true, "debug_info": "New trace", "other": [1, {{}}]}}"#
        ))
        .expect("all that is needed is there");
        assert_eq!(record.context.traceparent(), PARENT);
        assert_eq!((record.run_id, record.generation), (None, 1));
        assert!(record.context.is_resumed());
        assert!(record.expires_at > SystemTime::now() + DEFAULT_TTL / 2);

        let least = decoded(&format!(r#"{{"traceparent":"{PARENT}"}}"#));
        assert!(!least.expect("enough").context.is_resumed());
    }

    #[test]
    fn a_malformed_object_is_none() {
        let with = |members: &str| format!(r#"{{"traceparent":"{PARENT}",{members}}}"#);
        let wrong = [
            String::new(),
            "{".to_owned(),
            "{}".to_owned(),
            "[]".to_owned(),
            r#"{"traceparent":null,"error":"no tracer"}"#.to_owned(),
            r#"{"traceparent":"00-0-0-0"}"#.to_owned(),
            with(r#""tracestate":1"#),
            with(r#""resumed":"yes""#),
            with(r#""run_id":{}"#),
            with(r#""generation":0"#),
            with(r#""generation":4294967296"#),
            with(r#""generation":1.5"#),
            with(r#""recorded_at":-1"#),
            with(r#""expires_at":1e300"#),
            with(r#""expires_at":"tomorrow""#),
            with(r#""root":[]"#),
            with(r#""root":{"name":"order","started_at":1}"#),
            with(r#""root":{"name":"order","started_at":1,"span_id":"0"}"#),
            with(r#""root":{"name":"order","started_at":1,"span_id":"1"}"#),
            with(r#""root":{"name":"order","started_at":1,"span_id":"B7AD6B7169203331"}"#),
            format!("{}{}", with(r#""resumed":true"#), "x"),
            "{\"a\":".repeat(100_000),
        ];
        for text in wrong {
            assert_eq!(decoded(&text), None, "{:.80}", text);
        }
    }
}
