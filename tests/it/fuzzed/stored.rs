//! Both stored forms of a record, read by the crate, and by a second reader that follows the tables of their docs.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tracing_workflow_context::Form;
use tracing_workflow_context::backend::{Record, RootSpan};

use super::headers::{read_traceparent, read_tracestate};
use super::values::{read, write};

const HOUR: Duration = Duration::from_secs(3600);

/// The input is the value of a key.
pub(crate) fn stored(data: &[u8]) {
    let read_by_crate = read(data);
    let expected = match data.first() {
        Some(b'{') => read_json(data),
        _ => read_binary(data),
    };
    assert_eq!(
        read_by_crate.is_some(),
        expected.is_some(),
        "{:?}",
        String::from_utf8_lossy(data)
    );
    let (Some(found), Some(expected)) = (read_by_crate, expected) else {
        return;
    };
    let now = SystemTime::now();
    let is_close = |one: SystemTime, other: SystemTime, most| {
        let apart = one
            .duration_since(other)
            .unwrap_or_else(|error| error.duration());
        apart <= most
    };
    if is_close(expected.expires_at, now, HOUR) {
        return; // it may expire right now
    }
    assert_eq!(found.is_some(), expected.expires_at > now);
    let Some(found) = found else {
        return;
    };
    expected.assert_is(&found, data);

    // Written and read again, it is what it was.
    let written = write(Form::Binary, &found);
    if data.first() != Some(&b'{') {
        assert_eq!(written, data, "the form is canonical");
    }
    let links = found.root.as_ref().map_or(0, |root| root.links.len());
    if links <= 255 && written.len() <= 256 * 1024 {
        let again = read(&written).flatten().expect("just written");
        assert_eq!(again.context, found.context);
        assert_eq!(
            (&again.run_id, again.generation),
            (&found.run_id, found.generation)
        );
    }
    let in_json = write(Form::Json, &found);
    // Times as floating numbers lose up to half a microsecond of this century, and more of a later one.
    let again = read_json(&in_json).expect("what is written is well-formed");
    assert_eq!(again.ids, expected.ids);
    assert_eq!(
        (&again.run_id, again.generation),
        (&expected.run_id, expected.generation)
    );
    assert_eq!(again.tracestate, expected.tracestate);
}

/// A record as a second reader sees it.
struct Expected {
    ids: (u128, u64, u8),
    tracestate: String,
    resumed: bool,
    run_id: Option<String>,
    generation: u32,
    /// `None` if it is the time of reading.
    recorded_at: Option<SystemTime>,
    expires_at: SystemTime,
    root: Option<Root>,
}

struct Root {
    span_id: u64,
    parent: Option<u64>,
    name: String,
    started_at: SystemTime,
    last_end: SystemTime,
    spans: u64,
    links: Vec<((u128, u64, u8), String)>,
}

impl Expected {
    fn assert_is(&self, found: &Record, data: &[u8]) {
        let cx = &found.context;
        let what = String::from_utf8_lossy(data);
        assert_eq!(
            read_traceparent(&cx.traceparent()),
            Some(self.ids),
            "{what:?}"
        );
        assert_eq!(cx.tracestate(), self.tracestate);
        assert_eq!(cx.is_resumed(), self.resumed);
        assert_eq!(found.run_id, self.run_id);
        assert_eq!(found.generation, self.generation);
        if let Some(at) = self.recorded_at {
            let latest = UNIX_EPOCH + Duration::from_nanos(u64::MAX);
            assert_eq!(cx.recorded_at(), at.min(latest));
        }
        assert_eq!(found.root.is_some(), self.root.is_some());
        if let (Some(found), Some(root)) = (&found.root, &self.root) {
            root.assert_is(found);
        }
    }
}

impl Root {
    fn assert_is(&self, found: &RootSpan) {
        let id = |id: opentelemetry::SpanId| u64::from_be_bytes(id.to_bytes());
        assert_eq!(id(found.span_id), self.span_id);
        assert_eq!(found.parent_span_id.map(id), self.parent);
        assert_eq!(found.name, self.name);
        assert_eq!(found.started_at, self.started_at);
        assert_eq!(found.last_end, self.last_end);
        assert_eq!(found.spans, self.spans);
        let links = found.links.iter().map(|(to, relation)| {
            let trace = u128::from_be_bytes(to.trace_id().to_bytes());
            let ids = (trace, id(to.span_id()), to.trace_flags().to_u8());
            (ids, relation.clone())
        });
        assert_eq!(links.collect::<Vec<_>>(), self.links);
    }
}

// The table of `src/backend/codec.rs`.

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let bytes = self.0.get(..count)?;
        self.0 = &self.0[count..];
        Some(bytes)
    }

    /// A number of so many bytes, the lowest first.
    fn little(&mut self, bytes: usize) -> Option<u64> {
        let bytes = self.bytes(bytes)?.iter().rev();
        Some(bytes.fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// An id of so many bytes, the highest first.
    fn big(&mut self, bytes: usize) -> Option<u128> {
        let bytes = self.bytes(bytes)?.iter();
        Some(bytes.fold(0, |number, byte| number << 8 | u128::from(*byte)))
    }

    fn time(&mut self) -> Option<SystemTime> {
        Some(UNIX_EPOCH + Duration::from_nanos(self.little(8)?))
    }

    fn text(&mut self) -> Option<String> {
        let length = self.little(4)? as usize;
        String::from_utf8(self.bytes(length)?.to_owned()).ok()
    }
}

fn read_binary(data: &[u8]) -> Option<Expected> {
    let mut reader = Reader(data);
    if reader.little(1)? != 1 {
        return None;
    }
    let (expires_at, recorded_at) = (reader.time()?, reader.time()?);
    let (trace, span) = (reader.big(16)?, reader.big(8)? as u64);
    let generation = reader.little(4)? as u32;
    let (trace_flags, flags) = (reader.little(1)? as u8, reader.little(1)?);
    let run_id = if flags & 2 != 0 {
        Some(reader.text()?)
    } else {
        None
    };
    let state = if flags & 4 != 0 {
        Some(reader.text()?)
    } else {
        None
    };
    let root = if flags & 8 != 0 {
        Some(read_root(&mut reader)?)
    } else {
        None
    };
    let is_whole = reader.0.is_empty();
    let tracestate = state.clone().unwrap_or_default();
    if let Some(state) = &state {
        let members = read_tracestate(&[state])?;
        let members = members.iter().map(|(key, value)| format!("{key}={value}"));
        let is_canonical = members.collect::<Vec<_>>().join(",") == *state;
        if !is_canonical || state.is_empty() {
            return None;
        }
    }
    let is_sound =
        trace != 0 && span != 0 && generation != 0 && trace_flags < 4 && flags < 16 && is_whole;
    is_sound.then_some(Expected {
        ids: (trace, span, trace_flags),
        tracestate,
        resumed: flags & 1 != 0,
        run_id,
        generation,
        recorded_at: Some(recorded_at),
        expires_at,
        root,
    })
}

fn read_root(reader: &mut Reader<'_>) -> Option<Root> {
    let (span_id, parent) = (reader.big(8)? as u64, reader.big(8)? as u64);
    let (started_at, last_end) = (reader.time()?, reader.time()?);
    let (spans, name) = (reader.little(8)?, reader.text()?);
    let mut links = Vec::new();
    for _ in 0..reader.little(1)? {
        let (trace, span) = (reader.big(16)?, reader.big(8)? as u64);
        let flags = reader.little(1)? as u8;
        let relation = reader.text()?;
        if trace == 0 || span == 0 {
            return None;
        }
        links.push(((trace, span, flags), relation));
    }
    (span_id != 0).then_some(Root {
        span_id,
        parent: Some(parent).filter(|id| *id != 0),
        name,
        started_at,
        last_end,
        spans,
        links,
    })
}

// The table of `src/backend/json.rs`.

fn read_json(data: &[u8]) -> Option<Expected> {
    let value: Value = serde_json::from_slice(data).ok()?;
    value.as_object()?;
    let ids = read_traceparent(value["traceparent"].as_str()?)?;
    let state = optional(&value["tracestate"], Value::as_str)?.unwrap_or_default();
    let members = read_tracestate(&[state]).unwrap_or_default();
    let members = members.iter().map(|(key, value)| format!("{key}={value}"));
    let generation = optional(&value["generation"], Value::as_u64)?.unwrap_or(1);
    let tomorrow = SystemTime::now() + 24 * HOUR;
    Some(Expected {
        ids,
        tracestate: members.collect::<Vec<_>>().join(","),
        resumed: optional(&value["resumed"], Value::as_bool)?.unwrap_or(false),
        run_id: optional(&value["run_id"], Value::as_str)?.map(str::to_owned),
        generation: u32::try_from(generation).ok().filter(|it| *it > 0)?,
        recorded_at: optional(&value["recorded_at"], time)?,
        expires_at: optional(&value["expires_at"], time)?.unwrap_or(tomorrow),
        root: match &value["root"] {
            Value::Null => None,
            root => Some(read_json_root(root)?),
        },
    })
}

fn read_json_root(root: &Value) -> Option<Root> {
    root.as_object()?;
    // "16 lower-case hexadecimal digits"
    let id = |value: &Value| {
        let traceparent = format!("00-{:032x}-{}-00", 1, value.as_str()?);
        read_traceparent(&traceparent).map(|(_, span, _)| span)
    };
    let links = optional(&root["links"], Value::as_array)?;
    let links = links.into_iter().flatten().map(|link| {
        let to = read_traceparent(link.get("traceparent")?.as_str()?)?;
        Some((to, link.get("relation")?.as_str()?.to_owned()))
    });
    let started_at = time(&root["started_at"])?;
    Some(Root {
        span_id: id(&root["span_id"])?,
        parent: match &root["parent_span_id"] {
            Value::Null => None,
            parent => Some(id(parent)?),
        },
        name: root["name"].as_str()?.to_owned(),
        started_at,
        last_end: optional(&root["last_end"], time)?.unwrap_or(started_at),
        spans: optional(&root["spans"], Value::as_u64)?.unwrap_or(0),
        links: links.collect::<Option<_>>()?,
    })
}

/// `Some(None)` if a member is missing or null, `None` if it is of another type.
fn optional<'a, T>(value: &'a Value, read: impl Fn(&'a Value) -> Option<T>) -> Option<Option<T>> {
    match value {
        Value::Null => Some(None),
        value => read(value).map(Some),
    }
}

fn time(value: &Value) -> Option<SystemTime> {
    let seconds = value.as_f64().filter(|seconds| *seconds >= 0.0)?;
    UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(seconds).ok()?)
}
