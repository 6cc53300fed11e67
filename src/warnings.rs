//! Rate-limited warnings: one for each cause, then at most one a minute with the number of occurrences since.
//!
//! A span starts while OpenTelemetry holds locks, and the subscriber of an event that is dispatched there could wait for
//! them. A warning is therefore only noted there, and logged by the ticking thread, which is inside no span.

use std::error::Error as _;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry::{SpanId, TraceId};

use crate::backend::BackendError;
use crate::clock::{self, OnTick, ticks};
use crate::error::MAX_INSTANCE_ID_BYTES;
use crate::lock::lock;

/// The target of every log line of this crate.
pub(crate) const LOG_TARGET: &str = env!("CARGO_PKG_NAME");

/// The time between two warnings of one cause.
const PAUSE: Duration = Duration::from_secs(60);

/// The number of characters shown of a refused id, and of an error.
const SHOWN_CHARS: usize = 64;
const SHOWN_CHARS_OF_ERROR: usize = 300;

#[derive(Debug, Default)]
pub(crate) struct Warnings {
    oversized: Cause,
    unreachable: Cause,
    backend_failed: Cause,
    shared_trace: Cause,
    panicked: Cause,
    durable_root_off: Cause,
    nobody_tells_the_end: Cause,
}

#[derive(Debug, Default)]
struct Cause {
    /// Occurrences since the last warning.
    times: AtomicU64,
    /// The tick before which no warning is logged.
    not_before: AtomicU32,
    /// The details of the first occurrence since the last warning.
    details: Mutex<String>,
}

impl Warnings {
    /// Creates the warnings of a storage. They are logged only if they are enabled, that is with the system clock: a clock
    /// of the caller's own does not tick.
    pub(crate) fn new(enabled: bool) -> Arc<Self> {
        let warnings = Arc::new(Self::default());
        if enabled {
            let weak = Arc::downgrade(&warnings);
            clock::subscribe(weak);
        }
        warnings
    }

    /// Notes a span whose instance id is too long.
    pub(crate) fn oversized(&self, id: &str) {
        self.oversized.note(|| {
            let shown: String = id.chars().take(SHOWN_CHARS).collect();
            format!("{} bytes, beginning with {shown:?}", id.len())
        });
    }

    /// Notes a span that could not be started when it was entered, because the layer does not know its subscriber.
    pub(crate) fn unreachable(&self, span_name: &str) {
        self.unreachable.note(|| format!("span {span_name:?}"));
    }

    /// Notes a trace that many instances share: a span in it, and the outermost one around it if that is known.
    pub(crate) fn shared_trace(&self, trace: TraceId, span: SpanId, outermost: Option<&str>) {
        self.shared_trace.note(|| match outermost {
            Some(name) => format!("most probably {name:?}, of trace {trace}"),
            None => format!("trace {trace}, span {span}"),
        });
    }

    /// Notes a panic that was caught.
    pub(crate) fn panicked(&self, when: &str) {
        self.panicked.note(|| when.to_owned());
    }

    /// Notes that durable roots are off, since that line is missing in the set-up of the tracer provider.
    pub(crate) fn durable_root_off(&self, missing: &str) {
        self.durable_root_off.note(|| missing.to_owned());
    }

    /// Notes that so many workflows were begun or abandoned, and that nobody has ever told the end of one.
    pub(crate) fn nobody_tells_the_end(&self, count: u64) {
        self.nobody_tells_the_end.note_times(count, String::new);
    }

    /// Notes a failure of the backend.
    pub(crate) fn backend_failed(&self, error: &BackendError) {
        self.backend_failed.note(|| {
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
    fn note(&self, details: impl FnOnce() -> String) {
        self.note_times(1, details);
    }

    fn note_times(&self, times: u64, details: impl FnOnce() -> String) {
        // The details are formatted only if they will be logged.
        if self.times.fetch_add(times, Relaxed) == 0 {
            *lock(&self.details) = details();
        }
    }

    /// Returns the occurrences since the last warning and the details of the first one, if a warning is due.
    fn take(&self, now: u32) -> Option<(u64, String)> {
        if self.times.load(Relaxed) == 0 || now < self.not_before.load(Relaxed) {
            return None;
        }
        self.not_before
            .store(now.saturating_add(ticks(PAUSE)), Relaxed);
        let details = std::mem::take(&mut *lock(&self.details));
        Some((self.times.swap(0, Relaxed), details))
    }
}

impl OnTick for Warnings {
    fn on_tick(&self, now: u32) {
        if let Some((times, details)) = self.oversized.take(now) {
            tracing::warn!(
                target: LOG_TARGET,
                times,
                "instance id exceeds {MAX_INSTANCE_ID_BYTES} bytes; span ignored: {details}"
            );
        }
        if let Some((times, details)) = self.backend_failed.take(now) {
            tracing::warn!(
                target: LOG_TARGET,
                times,
                "storage backend failed; an instance may be split into several traces: {details}"
            );
        }
        if let Some((times, details)) = self.shared_trace.take(now) {
            tracing::warn!(
                target: LOG_TARGET,
                times,
                "more than 16 workflow instances share one trace: name the span in which the worker waits for work in \
                 poller_spans: {details}"
            );
        }
        if let Some((times, details)) = self.panicked.take(now) {
            tracing::warn!(
                target: LOG_TARGET,
                times,
                "a sampler, id generator, span processor or exporter panicked when {details}; the span is not exported"
            );
        }
        if let Some((_, details)) = self.durable_root_off.take(now) {
            tracing::warn!(
                target: LOG_TARGET,
                "durable_root is set, but the tracer provider lacks {details}; workflows get no span of their own"
            );
        }
        if let Some((times, _)) = self.nobody_tells_the_end.take(now) {
            tracing::warn!(
                target: LOG_TARGET,
                times,
                "workflows have spans of their own that were never ended: tell the end by workflow.status, a span in \
                 completing_spans, complete or cleanup"
            );
        }
        if let Some((times, details)) = self.unreachable.take(now) {
            tracing::warn!(
                target: LOG_TARGET,
                times,
                "without context activation a tagged span is recorded only when it closes, because the layer cannot \
                 find its subscriber; pass the layer without Option or reload around it, or make the subscriber the \
                 thread's default: {details}"
            );
        }
    }
}
