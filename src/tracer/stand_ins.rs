//! The span ids that stand-ins of one storage have at this moment.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use dashmap::DashMap;
use opentelemetry::SpanId;

/// Counts the live stand-ins by span id.
///
/// A new span asks its parent whether it is a stand-in only if the parent's id is in here: asking locks the parent,
/// which the start of an ordinary span must not do.
#[derive(Debug, Default)]
pub(crate) struct StandIns {
    total: AtomicUsize,
    spans: DashMap<SpanId, usize>,
}

impl StandIns {
    pub(crate) fn add(&self, span: SpanId) {
        self.total.fetch_add(1, Relaxed);
        *self.spans.entry(span).or_default() += 1;
    }

    pub(crate) fn remove(&self, span: SpanId) {
        self.spans.entry(span).and_modify(|count| *count -= 1);
        self.spans.remove_if(&span, |_, count| *count == 0);
        self.total.fetch_sub(1, Relaxed);
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.total.load(Relaxed) == 0
    }

    pub(crate) fn contains(&self, span: SpanId) -> bool {
        self.spans.contains_key(&span)
    }
}
