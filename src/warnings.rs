//! Warnings that help: once for each cause, then at most once a minute with the number of times meanwhile.
//!
//! A span starts while OpenTelemetry holds locks, and an event that is dispatched there could want them. So what
//! is to be said is noted, and said on the thread that counts the ticks, which is inside of no span.

use std::error::Error as _;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opentelemetry::{SpanId, TraceId};

use crate::backend::BackendError;
use crate::clock::{self, OnTick, ticks};
use crate::error::{InvalidInstanceId, MAX_INSTANCE_ID_BYTES};

/// The target of every log line of this crate.
pub(crate) const LOG_TARGET: &str = env!("CARGO_PKG_NAME");

const PAUSE: Duration = Duration::from_secs(60);

/// How much of a refused id is shown, and of an error.
const SHOWN_CHARS: usize = 64;
const SHOWN_CHARS_OF_ERROR: usize = 300;

#[derive(Debug, Default)]
pub(crate) struct Warnings {
    oversized: Cause,
    unreachable: Cause,
    refused: Cause,
    shared_trace: Cause,
}

#[derive(Debug, Default)]
struct Cause {
    times: AtomicU64,
    not_before: AtomicU32,
    last: Mutex<String>,
}

impl Warnings {
    /// With a clock of the caller's own nobody ticks, and nothing is said.
    pub(crate) fn new(spoken: bool) -> Arc<Self> {
        let warnings = Arc::new(Self::default());
        if spoken {
            let weak = Arc::downgrade(&warnings);
            clock::subscribe(weak);
        }
        warnings
    }

    /// A span's instance id was refused.
    pub(crate) fn oversized(&self, id: &str) {
        self.oversized.note(|| {
            let refused = InvalidInstanceId::TooLong { length: id.len() };
            let shown: String = id.chars().take(SHOWN_CHARS).collect();
            format!("{refused}, and begins with {shown:?}")
        });
    }

    /// A span could not be started when it was entered, because the layer does not know its own subscriber.
    pub(crate) fn unreachable(&self, span_name: &str) {
        self.unreachable.note(|| format!("span {span_name:?}"));
    }

    /// Many instances share one trace.
    pub(crate) fn shared_trace(&self, trace: TraceId, span: SpanId) {
        self.shared_trace
            .note(|| format!("trace {trace}, span {span}"));
    }

    /// The backend failed.
    pub(crate) fn backend_refused(&self, error: &BackendError) {
        self.refused.note(|| {
            let cause = error.source().map(|cause| format!(": {cause}"));
            let text = format!("{error}{}", cause.unwrap_or_default());
            text.chars()
                .take(SHOWN_CHARS_OF_ERROR)
                .flat_map(char::escape_debug)
                .collect()
        });
    }
}

impl Cause {
    fn note(&self, what: impl FnOnce() -> String) {
        // Only what will be said is worth its text.
        if self.times.fetch_add(1, Relaxed) == 0 {
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = what();
        }
    }

    /// How many times it was noted since it was said last, and what, if it may be said now.
    fn take(&self, now: u32) -> Option<(u64, String)> {
        if self.times.load(Relaxed) == 0 || now < self.not_before.load(Relaxed) {
            return None;
        }
        self.not_before
            .store(now.saturating_add(ticks(PAUSE)), Relaxed);
        let what = std::mem::take(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner));
        Some((self.times.swap(0, Relaxed), what))
    }
}

impl OnTick for Warnings {
    fn on_tick(&self, now: u32) {
        if let Some((times, what)) = self.oversized.take(now) {
            tracing::warn!(
                times,
                "a span was left alone, its instance id is no id of at most {MAX_INSTANCE_ID_BYTES} bytes: {what}"
            );
        }
        if let Some((times, what)) = self.refused.take(now) {
            tracing::warn!(
                times,
                "the storage backend failed, traces may fall apart: {what}"
            );
        }
        if let Some((times, what)) = self.shared_trace.take(now) {
            tracing::warn!(
                times,
                "more than 16 workflow instances share one trace: name the span in which the worker waits for work in \
                 poller_spans ({what})"
            );
        }
        if let Some((times, what)) = self.unreachable.take(now) {
            tracing::warn!(
                times,
                "without context activation a tagged span is recorded only when it closes, because the layer cannot \
                 reach the subscriber it is in (is it in an Option that is not the thread's default?): {what}"
            );
        }
    }
}
