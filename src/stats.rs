//! The counters of a storage, and the snapshot of them that users read.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A snapshot of a storage's counters. Every counter only grows; `stored_instances` also shrinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Instances held in memory now.
    pub stored_instances: u64,
    /// Lookups, by spans and by `get`, that found a context.
    pub hits: u64,
    /// Lookups that found none. The first span of every instance is one.
    pub misses: u64,
    /// Ids recorded on a span after it had started, when only a link was possible: an instance id, a second one, a run id, a
    /// parent instance id.
    pub late: u64,
    /// Instances removed from memory because they were idle or completed for too long.
    pub expired: u64,
    /// Instances removed from memory because there were more than `max_instances`.
    pub evicted: u64,
    /// Values of the backend that could not be decoded, such as those of a newer version. They are treated as missing, and left
    /// alone.
    pub malformed: u64,
    /// Writes dropped because too many were waiting for the backend, or because a value that cannot be decoded was in their
    /// place.
    pub dropped_writes: u64,
    /// Records that had expired before a backend that [loads all of them](crate::backend::StorageBackend::warms_up) was opened.
    /// Many of them may be a sign of a clock that was set forward.
    pub expired_at_open: u64,
    /// Backend calls that failed.
    pub backend_errors: u64,
    /// Lookups, by spans and by calls, that the backend did not answer within the `lookup_budget`; each is a miss if
    /// nothing else was found, and its answer is followed when it comes. Lookups skipped because the circuit is open are not counted.
    pub lookup_timeouts: u64,
    /// Ids that were refused because they are longer than [`MAX_INSTANCE_ID_BYTES`](crate::MAX_INSTANCE_ID_BYTES).
    pub oversized: u64,
    /// Spans that lost the race to be the recorded one, or whose lookup had not been answered in time: their instances follow
    /// the winner, and they are linked to it if they still live when it is known.
    pub conflicts: u64,
    /// Records that the backend had lost, and that were given back from memory.
    pub given_back: u64,
    /// Times at which the instances in memory were to be compared with the backend, and it had not answered for all of them
    /// since the time before: it is away or too slow. If that lasts, records of instances in use expire there.
    pub overdue_refreshes: u64,
    /// Spans that were not exported because they are replays.
    pub replayed: u64,
    /// Events dropped together with a replayed span, those included that no real span has taken after the replay.
    pub replayed_events: u64,
    /// Spans whose start was deferred until their instance was known.
    pub deferred: u64,
    /// Spans without an id of their own that joined the instance of their first child.
    pub adopted: u64,
    /// Traces that more than 16 instances share although none is known as another one's child: the trace of a poller that
    /// [`poller_spans`](crate::WorkflowContextStorageBuilder::poller_spans) does not name.
    pub shared_traces: u64,
    /// Panics of a sampler, id generator, span processor or exporter that were caught while a span started or ended. The
    /// span is not exported.
    pub panics: u64,
    /// Own spans of workflows that this process has exported.
    pub exported_roots: u64,
    /// Own spans of workflows that nobody can export any more: no tracer was left to export one, its provider lacks the
    /// two pieces, or too many were forgotten at once.
    pub lost_roots: u64,
}

/// The counters that spans increment. Those of the cache and of the backend are kept there.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) late: Counter,
    pub(crate) oversized: Counter,
    pub(crate) conflicts: Counter,
    pub(crate) given_back: Counter,
    pub(crate) overdue_refreshes: Counter,
    pub(crate) replayed: Counter,
    pub(crate) replayed_events: Counter,
    pub(crate) deferred: Counter,
    pub(crate) adopted: Counter,
    pub(crate) shared_traces: Counter,
    pub(crate) panics: Counter,
    pub(crate) exported_roots: Counter,
    pub(crate) lost_roots: Counter,
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub(crate) fn add(&self) {
        self.add_many(1);
    }

    #[inline]
    pub(crate) fn add_many(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Tells the last registration of metrics from those before: a meter forgets no callback.
#[cfg(feature = "metrics")]
#[derive(Debug, Default)]
pub(crate) struct Registrations(AtomicU64);

#[cfg(feature = "metrics")]
impl Registrations {
    pub(crate) fn begin(&self) -> u64 {
        self.0.fetch_add(1, Relaxed) + 1
    }

    pub(crate) fn is_last(&self, registration: u64) -> bool {
        self.0.load(Relaxed) == registration
    }
}
