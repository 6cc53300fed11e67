//! The binary form of a [`Record`], for backends that store bytes.
//!
//! Version 1; all numbers are little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 1 | 1, the version |
//! | 8 | `expires_at`, in nanoseconds since 1970 |
//! | 8 | `recorded_at`, in nanoseconds since 1970 |
//! | 16 | trace id |
//! | 8 | span id |
//! | 4 | generation |
//! | 1 | trace flags |
//! | 1 | 1 if resumed, plus 2 if there is a run id, plus 4 if there is a tracestate, plus 8 if there is a root span |
//! | 4 + n | the length of the run id, and the run id, if there is one |
//! | 4 + n | the length of the tracestate, and the tracestate, if there is one |
//! | n | the root span, if there is one |
//!
//! A root span:
//!
//! | bytes | content |
//! |---|---|
//! | 8 | span id |
//! | 8 | span id of its parent, or zero |
//! | 8 | `started_at`, in nanoseconds since 1970 |
//! | 8 | `last_end`, in nanoseconds since 1970 |
//! | 8 | number of spans |
//! | 4 + n | the length of the name, and the name |
//! | 1 | number of links |
//! | each 16 + 8 + 1 + 4 + n | trace id, span id, flags and relation of a link |
//!
//! The encoding is canonical: a record that [`decode`] returns encodes to the same bytes again, and all other bytes are
//! malformed. Times before 1970 and after 2554 are clamped.

use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

use crate::backend::{Record, RootSpan};
use crate::context::{WorkflowContext, since_epoch};
use crate::tracestate::Tracestate;

const VERSION: u8 = 1;

/// Length without the run id and the tracestate.
const FIXED: usize = 47;

const RESUMED: u8 = 1;
const HAS_RUN_ID: u8 = 2;
const HAS_TRACE_STATE: u8 = 4;
const HAS_ROOT: u8 = 8;

pub(super) fn encode(record: &Record) -> Vec<u8> {
    let Record {
        context,
        run_id,
        generation,
        expires_at,
        root,
    } = record;
    let state = Some(context.tracestate()).filter(|state| !state.is_empty());
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    let flags = flag(context.is_resumed(), RESUMED)
        | flag(run_id.is_some(), HAS_RUN_ID)
        | flag(state.is_some(), HAS_TRACE_STATE)
        | flag(root.is_some(), HAS_ROOT);
    let texts = [run_id.as_deref(), state.as_deref()];
    let len = |text: &Option<&str>| text.map_or(0, |text| 4 + text.len());

    let mut bytes = Vec::with_capacity(FIXED + texts.iter().map(len).sum::<usize>());
    bytes.push(VERSION);
    bytes.extend(since_epoch(*expires_at).to_le_bytes());
    bytes.extend(since_epoch(context.recorded_at()).to_le_bytes());
    bytes.extend(context.trace_id().to_bytes());
    bytes.extend(context.span_id().to_bytes());
    bytes.extend(generation.to_le_bytes());
    bytes.extend([context.flags().to_u8(), flags]);
    for text in texts.into_iter().flatten() {
        put_text(&mut bytes, text);
    }
    if let Some(root) = root {
        put_root(&mut bytes, root);
    }
    bytes
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    // Far below 4 GiB: ids, tracestates and names are bounded.
    bytes.extend((text.len() as u32).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn put_root(bytes: &mut Vec<u8>, root: &RootSpan) {
    bytes.extend(root.span_id.to_bytes());
    let parent = root.parent_span_id.unwrap_or(SpanId::INVALID);
    bytes.extend(parent.to_bytes());
    bytes.extend(since_epoch(root.started_at).to_le_bytes());
    bytes.extend(since_epoch(root.last_end).to_le_bytes());
    bytes.extend(root.spans.to_le_bytes());
    put_text(bytes, &root.name);
    let links = &root.links[..root.links.len().min(usize::from(u8::MAX))];
    bytes.push(links.len() as u8);
    for (to, relation) in links {
        bytes.extend(to.trace_id().to_bytes());
        bytes.extend(to.span_id().to_bytes());
        bytes.push(to.trace_flags().to_u8());
        put_text(bytes, relation);
    }
}

/// Decodes a record, whose context is marked as remote. Returns `None` for bytes that [`encode`] does not write.
pub(super) fn decode(bytes: &[u8]) -> Option<Record> {
    let mut bytes = Bytes(bytes);
    if bytes.take()? != [VERSION] {
        return None;
    }
    let expires_at = time(u64::from_le_bytes(bytes.take()?));
    let recorded_at = time(u64::from_le_bytes(bytes.take()?));
    let trace_id = TraceId::from_bytes(bytes.take()?);
    let span_id = SpanId::from_bytes(bytes.take()?);
    let generation = u32::from_le_bytes(bytes.take()?);
    let [trace_flags, flags] = bytes.take()?;
    if flags & !(RESUMED | HAS_RUN_ID | HAS_TRACE_STATE | HAS_ROOT) != 0 {
        return None;
    }
    let run_id = match flags & HAS_RUN_ID {
        0 => None,
        _ => Some(bytes.text()?.to_owned()),
    };
    let state = match flags & HAS_TRACE_STATE {
        0 => None,
        _ => Some(trace_state(bytes.text()?)?),
    };
    let root = match flags & HAS_ROOT {
        0 => None,
        _ => Some(Box::new(bytes.root()?)),
    };
    if !bytes.0.is_empty() {
        return None;
    }
    let context = WorkflowContext::from_parts(
        trace_id,
        span_id,
        TraceFlags::new(trace_flags),
        state,
        recorded_at,
        flags & RESUMED != 0,
    )?;
    // The other form has no generation 0 either.
    (context.flags().to_u8() == trace_flags && generation > 0).then_some(Record {
        context,
        run_id,
        generation,
        expires_at,
        root,
    })
}

/// Decodes the expiry of a record alone. Returns `None` for another version.
#[cfg(any(test, feature = "redb"))]
pub(super) fn expires_at(bytes: &[u8]) -> Option<SystemTime> {
    let mut bytes = Bytes(bytes);
    (bytes.take()? == [VERSION]).then_some(())?;
    bytes.take().map(|ns| time(u64::from_le_bytes(ns)))
}

fn trace_state(text: &str) -> Option<Tracestate> {
    let state = Tracestate::parse(&[text])?;
    (state.header() == text).then_some(state)
}

fn time(nanoseconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds)
}

/// The bytes that are still to be read.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn text(&mut self) -> Option<&str> {
        let len = usize::try_from(u32::from_le_bytes(self.take()?)).ok()?;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        std::str::from_utf8(text).ok()
    }

    fn root(&mut self) -> Option<RootSpan> {
        let span_id = SpanId::from_bytes(self.take()?);
        let parent = SpanId::from_bytes(self.take()?);
        let started_at = time(u64::from_le_bytes(self.take()?));
        let last_end = time(u64::from_le_bytes(self.take()?));
        let spans = u64::from_le_bytes(self.take()?);
        let name = self.text()?.to_owned();
        let [count] = self.take()?;
        let mut links = Vec::new();
        for _ in 0..count {
            let trace_id = TraceId::from_bytes(self.take()?);
            let span_id = SpanId::from_bytes(self.take()?);
            let [flags] = self.take()?;
            let relation = self.text()?.to_owned();
            let flags = TraceFlags::new(flags);
            let to = SpanContext::new(trace_id, span_id, flags, true, TraceState::NONE);
            links.push((to.is_valid().then_some(to)?, relation));
        }
        (span_id != SpanId::INVALID).then_some(RootSpan {
            span_id,
            parent_span_id: (parent != SpanId::INVALID).then_some(parent),
            name,
            started_at,
            last_end,
            spans,
            links,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn context() -> impl Strategy<Value = WorkflowContext> {
        let member = "[a-z][a-z0-9_*/@-]{0,20}=[!-+--<>-~]{1,20}";
        let members = prop::collection::vec(member, 0..5);
        let ids = (1..=u128::MAX, 1..=u64::MAX, 0..4u8);
        (ids, members, any::<u64>(), any::<bool>()).prop_map(
            |((trace, span, flags), members, recorded_at, resumed)| {
                WorkflowContext::from_parts(
                    trace.into(),
                    span.into(),
                    TraceFlags::new(flags),
                    Tracestate::parse(&[&members.join(",")]),
                    time(recorded_at),
                    resumed,
                )
                .expect("no id is zero")
            },
        )
    }

    fn record() -> impl Strategy<Value = Record> {
        let run_id = prop::option::of(".{0,40}");
        let root = prop::option::of(root().prop_map(Box::new));
        (context(), run_id, 1..=u32::MAX, any::<u64>(), root).prop_map(
            |(context, run_id, generation, expires_at, root)| Record {
                context,
                run_id,
                generation,
                expires_at: time(expires_at),
                root,
            },
        )
    }

    fn root() -> impl Strategy<Value = RootSpan> {
        let ids = (1..=u64::MAX, prop::option::of(1..=u64::MAX));
        let numbers = (any::<u64>(), any::<u64>(), any::<u64>());
        let links = prop::collection::vec((context(), "[a-z_]{0,9}"), 0..3);
        (ids, numbers, ".{0,20}", links).prop_map(|((span, parent), numbers, name, links)| {
            let link = |(to, relation): (WorkflowContext, String)| {
                let to = to.to_span_context();
                let ids = (to.trace_id(), to.span_id(), to.trace_flags());
                let to = SpanContext::new(ids.0, ids.1, ids.2, true, TraceState::NONE);
                (to, relation)
            };
            RootSpan {
                parent_span_id: parent.map(SpanId::from),
                last_end: time(numbers.1),
                spans: numbers.2,
                links: links.into_iter().map(link).collect(),
                ..RootSpan::new(SpanId::from(span), name, time(numbers.0))
            }
        })
    }

    fn plain() -> Record {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = WorkflowContext::parse(parent, "").expect("well formed");
        Record::new(context, time(1_800_000_000_000_000_000))
    }

    proptest! {
        #[test]
        fn a_record_is_decoded_as_it_was_encoded(record in record()) {
            let bytes = encode(&record);
            let decoded = decode(&bytes).expect("just encoded");
            prop_assert!(decoded.context.is_remote());
            prop_assert_eq!(&decoded, &record);
            prop_assert_eq!(expires_at(&bytes), Some(record.expires_at));
        }

        #[test]
        fn any_bytes_are_one_record_or_none(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            if let Some(record) = decode(&bytes) {
                prop_assert_eq!(encode(&record), bytes);
            }
        }

        /// One wrong byte in a valid record: random bytes are hardly ever that close to one.
        #[test]
        fn a_damaged_record_is_another_one_or_none(
            record in record(),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let mut bytes = encode(&record);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Some(record) = decode(&bytes) {
                prop_assert_eq!(encode(&record), bytes);
            }
        }

        #[test]
        fn a_truncated_or_extended_record_is_none(record in record(), more in any::<u8>()) {
            let mut bytes = encode(&record);
            for len in 0..bytes.len() {
                prop_assert!(decode(&bytes[..len]).is_none(), "{} of {}", len, bytes.len());
            }
            bytes.push(more);
            prop_assert!(decode(&bytes).is_none());
        }
    }

    #[test]
    fn a_typical_record_is_small() {
        let encoded = encode(&plain());
        assert_eq!(encoded.len(), FIXED);
        const { assert!(FIXED <= 64) };
    }

    #[test]
    fn each_kind_of_malformed_record_is_none() {
        let plain = plain();
        let with = |at: usize, bytes: &[u8]| {
            let mut encoded = encode(&plain);
            encoded[at..at + bytes.len()].copy_from_slice(bytes);
            encoded
        };
        let with_text = |flag: u8, len: usize, text: &[u8]| {
            let mut encoded = with(46, &[flag]);
            encoded.extend((len as u32).to_le_bytes());
            encoded.extend(text);
            encoded
        };
        let with_run_id = |len, text| with_text(HAS_RUN_ID, len, text);
        let with_trace_state = |text: &str| with_text(HAS_TRACE_STATE, text.len(), text.as_bytes());
        assert_eq!(decode(&with(0, &[VERSION])).as_ref(), Some(&plain));
        assert!(decode(&with_run_id(3, b"run")).is_some());
        assert!(decode(&with_trace_state("a=1,b=2")).is_some());
        assert!(decode(&with_trace_state("a=1,a=2,t@-x=1")).is_some());

        let wrong = [
            ("nothing", Vec::new()),
            ("version 0", with(0, &[0])),
            ("a newer version", with(0, &[2])),
            ("a zero trace id", with(17, &[0; 16])),
            ("a zero span id", with(33, &[0; 8])),
            ("generation 0", with(41, &[0; 4])),
            ("an undefined trace flag", with(45, &[4])),
            ("an undefined flag", with(46, &[16])),
            ("a missing root span", with(46, &[HAS_ROOT])),
            ("a missing run id", with(46, &[HAS_RUN_ID])),
            ("a run id that is too short", with_run_id(4, b"run")),
            ("a run id that is too long", with_run_id(2, b"run")),
            ("a run id of 4 GiB", with_run_id(u32::MAX as usize, b"run")),
            ("a run id that is not UTF-8", with_run_id(3, b"r\xffn")),
            ("an empty tracestate", with_trace_state("")),
            ("a tracestate with blanks", with_trace_state("a=1, b=2")),
            ("a tracestate without a value", with_trace_state("a=")),
        ];
        for (kind, bytes) in wrong {
            assert_eq!(decode(&bytes), None, "{kind}");
        }
    }

    #[test]
    fn the_longest_tracestate_is_kept() {
        let member = |n| format!("{n:a>256}={}", "v".repeat(256));
        let state = (10..42).map(member).collect::<Vec<_>>().join(",");
        let context = plain().context.to_span_context();
        let context = WorkflowContext::from_parts(
            context.trace_id(),
            context.span_id(),
            context.trace_flags(),
            Tracestate::parse(&[&state]),
            SystemTime::UNIX_EPOCH,
            false,
        )
        .expect("no id is zero");
        let record = Record { context, ..plain() };
        assert_eq!(record.context.tracestate().len(), state.len());
        assert_eq!(decode(&encode(&record)), Some(record));
    }
}
