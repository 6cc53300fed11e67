//! The vocabulary of the checks: a backend whose failures end the check, sample records, and the failing of a rule.

use std::fmt;
use std::sync::{Arc, Barrier, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::{SpanId, TraceFlags, TraceId};

use crate::backend::{BackendError, Record, StorageBackend, Write, WriteOutcome};
use crate::context::WorkflowContext;
use crate::tracestate::Tracestate;

/// The longest time until an expired record is gone, by clocks of servers too.
pub(super) const EXPIRY_PATIENCE: Duration = Duration::from_millis(1500);

/// A backend may round times to the second.
const ROUNDING: Duration = Duration::from_secs(1);

pub(super) const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A backend whose failures end the check.
pub(super) struct Checked<B>(pub(super) Arc<B>);

impl<B> Clone for Checked<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: StorageBackend> Checked<B> {
    /// Returns the record that each write found.
    #[track_caller]
    pub(super) fn write(&self, writes: &[Write]) -> Vec<Option<Record>> {
        let outcomes = succeeded("write", self.0.write(writes));
        rule(
            outcomes.len() == writes.len(),
            "`write` returns one outcome for each write",
            format_args!("{} outcomes for {} writes", outcomes.len(), writes.len()),
        );
        let found = |(write, outcome): (&Write, WriteOutcome)| match outcome {
            WriteOutcome::Done => None,
            WriteOutcome::Existing(record) => {
                rule(
                    matches!(write, Write::PutIfAbsent(..)),
                    "`write` returns `Existing` for a `PutIfAbsent` only",
                    format_args!("{record:?} for {write:?}"),
                );
                Some(record)
            }
            WriteOutcome::Unreadable => {
                rule(
                    false,
                    "`write` decodes what `write` has stored",
                    format_args!("{write:?} found something else"),
                );
                None
            }
            WriteOutcome::Failed(error) => succeeded("write", Err(error)),
        };
        writes.iter().zip(outcomes).map(found).collect()
    }

    #[track_caller]
    pub(super) fn put(&self, key: &str, record: &Record) {
        self.write(&[Write::Put(key.to_owned(), record.clone())]);
    }

    #[track_caller]
    pub(super) fn put_if_absent(&self, key: &str, record: &Record) -> Option<Record> {
        let put = Write::PutIfAbsent(key.to_owned(), record.clone());
        self.write(&[put]).remove(0)
    }

    #[track_caller]
    pub(super) fn get(&self, key: &str) -> Option<Record> {
        succeeded("get", self.0.get(key))
    }

    /// Reads all these keys at once.
    #[track_caller]
    pub(super) fn get_many(&self, keys: &[&str]) -> Vec<Option<Record>> {
        let keys: Vec<_> = keys.iter().map(|key| (*key).to_owned()).collect();
        succeeded("get_many", self.0.get_many(&keys))
    }

    #[track_caller]
    pub(super) fn flush(&self) {
        succeeded("flush", self.0.flush());
    }

    #[track_caller]
    pub(super) fn keys(&self) -> Vec<String> {
        let mut keys = Vec::new();
        let visit = &mut |key: &str, _| keys.push(key.to_owned());
        succeeded("scan", self.0.scan(visit));
        keys.sort_unstable();
        keys
    }

    #[track_caller]
    pub(super) fn holds(&self, key: &str, expected: &Record, sentence: &str) {
        let found = self.get(key);
        let same = found.as_ref().is_some_and(|found| alike(found, expected));
        rule(
            same,
            sentence,
            format_args!("{key:?} has {found:?}, expected {expected:?}"),
        );
    }

    #[track_caller]
    pub(super) fn has_none(&self, key: &str, sentence: &str) {
        let found = self.get(key);
        rule(
            found.is_none(),
            sentence,
            format_args!("{key:?} has {found:?}, expected no record"),
        );
    }

    #[track_caller]
    pub(super) fn scan_is(&self, expected: &[&str], sentence: &str) {
        let keys = self.keys();
        rule(
            keys == expected,
            sentence,
            format_args!("`scan` visits {keys:?}, expected {expected:?}"),
        );
    }

    /// Waits until the key is gone, for as long as the contract allows.
    #[track_caller]
    pub(super) fn loses(&self, key: &str, expires_at: SystemTime, sentence: &str) {
        let until_then = expires_at.duration_since(SystemTime::now());
        let deadline = Instant::now() + until_then.unwrap_or_default() + EXPIRY_PATIENCE;
        while Instant::now() < deadline && (self.get(key).is_some() || !self.keys().is_empty()) {
            thread::sleep(Duration::from_millis(5));
        }
        self.has_none(key, sentence);
        self.scan_is(&[], sentence);
    }

    pub(super) fn has_read_nothing_malformed(&self) {
        let malformed = self.0.malformed();
        rule(
            malformed == 0,
            "`malformed` counts values that could not be decoded, and nothing else",
            format_args!("it is {malformed}, although this backend wrote all values"),
        );
    }
}

/// Creates a record with that span id.
pub(super) fn record(span: u64) -> Record {
    let flags = TraceFlags::SAMPLED;
    let context = context(7, span, flags, "", false);
    Record::new(context, in_a_month())
}

pub(super) fn span_of(record: &Record) -> u64 {
    u64::from_be_bytes(record.context.span_id().to_bytes())
}

pub(super) fn context(
    trace: u128,
    span: u64,
    flags: TraceFlags,
    state: &str,
    resumed: bool,
) -> WorkflowContext {
    let (trace, span) = (TraceId::from(trace), SpanId::from(span));
    let state = Tracestate::parse(&[state]);
    WorkflowContext::from_parts(trace, span, flags, state, beginning(), resumed)
        .expect("no id is zero")
}

/// Returns one moment in all calls, so that equal records can be created for comparison.
pub(super) fn beginning() -> SystemTime {
    static BEGINNING: OnceLock<SystemTime> = OnceLock::new();
    *BEGINNING.get_or_init(SystemTime::now)
}

pub(super) fn in_a_month() -> SystemTime {
    beginning() + 30 * DAY
}

/// Returns `true` if two records are equal but for the rounding of times.
pub(super) fn alike(found: &Record, expected: &Record) -> bool {
    let near = |one: SystemTime, other: SystemTime| {
        let apart = one.duration_since(other);
        apart.unwrap_or_else(|error| error.duration()) <= ROUNDING
    };
    let exact = |record: &Record| {
        let context = &record.context;
        let carried = (
            context.traceparent(),
            context.tracestate(),
            context.is_resumed(),
        );
        (carried, record.run_id.clone(), record.generation)
    };
    exact(found) == exact(expected)
        && near(found.context.recorded_at(), expected.context.recorded_at())
        && near(found.expires_at, expected.expires_at)
}

#[track_caller]
pub(super) fn succeeded<R>(call: &str, result: Result<R, BackendError>) -> R {
    result.unwrap_or_else(|error| {
        panic!("this backend breaks the contract of StorageBackend: `{call}` must succeed while the backend is checked: {error}")
    })
}

#[track_caller]
pub(super) fn rule(kept: bool, sentence: &str, found: fmt::Arguments<'_>) {
    assert!(
        kept,
        "this backend breaks the contract of StorageBackend: {sentence}: {found}"
    );
}

/// Runs on several threads that start together, each with its number from 0.
pub(super) fn at_once<R: Send>(threads: usize, run: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let (start, run) = (&Barrier::new(threads), &run);
    thread::scope(|scope| {
        let start_one = |thread| {
            scope.spawn(move || {
                start.wait();
                run(thread)
            })
        };
        let threads: Vec<_> = (0..threads).map(start_one).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, R>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}
