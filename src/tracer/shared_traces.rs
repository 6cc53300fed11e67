//! Self-diagnosis: traces that several instances share because a poller's span is the parent of their first spans.

use std::collections::HashMap;
use std::sync::Mutex;

use opentelemetry::TraceId;
use tracing::dispatcher;
use tracing_subscriber::Registry;
use tracing_subscriber::registry::LookupSpan as _;

use crate::lock::lock;

/// More instances than this in one trace, none of them known as another one's child, are taken for a poller's.
const MANY: u32 = 16;

/// Traces that are counted at once. When they are too many, counting begins anew.
const TRACES: usize = 1024;

/// Counts the instances whose first span kept a natural parent, by trace.
#[derive(Debug, Default)]
pub(crate) struct SharedTraces(Mutex<HashMap<TraceId, u32>>);

impl SharedTraces {
    /// Counts one more instance. Returns `true` once for each trace: when there are too many for a request's.
    pub(crate) fn add(&self, trace: TraceId) -> bool {
        let mut counts = lock(&self.0);
        if counts.len() >= TRACES && !counts.contains_key(&trace) {
            counts.retain(|_, count| *count > MANY);
            if counts.len() >= TRACES {
                counts.clear();
            }
        }
        let count = counts.entry(trace).or_default();
        *count = count.saturating_add(1);
        *count == MANY + 1
    }

    pub(crate) fn contains(&self, trace: TraceId) -> bool {
        lock(&self.0).get(&trace).is_some_and(|count| *count > MANY)
    }
}

/// Returns the name of the outermost span that this thread is in, which is most probably the poller, if the subscriber is one
/// over a [`Registry`]. The innermost one is the span that starts.
pub(super) fn outermost_span() -> Option<&'static str> {
    dispatcher::get_default(|dispatch| {
        let registry = dispatch.downcast_ref::<Registry>()?;
        let starting = registry.span(dispatch.current_span().id()?)?;
        let outermost = starting.parent()?.scope().last()?;
        Some(outermost.name())
    })
}
