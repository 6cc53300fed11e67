//! Lost spans: those whose sampler, id generator or processor has panicked when they started.

use std::sync::Arc;

use opentelemetry::trace::{SpanContext, TraceContextExt as _};
use opentelemetry::{Context, SpanId};

use super::live_ids::Live;
use crate::storage::shared::Shared;

/// Takes the place of a lost span. It exports nothing, and what starts beneath has the parent of the lost span.
pub(crate) struct Lost {
    parent: SpanContext,
    /// As beneath a stand-in: a parent-based sampler takes no span for a root whose parent is invalid.
    _stand_in: Live<Shared, SpanId>,
}

impl Lost {
    pub(super) fn new(shared: &Arc<Shared>, parent: &Context) -> Self {
        let parent = parent.span().span_context().clone();
        shared.count_panic_at_start();
        Self {
            _stand_in: Live::new(shared, |shared| &shared.stand_ins, parent.span_id()),
            parent,
        }
    }

    pub(super) fn context(&self) -> &SpanContext {
        &self.parent
    }
}
