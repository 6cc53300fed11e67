//! Lost spans: those whose sampler, id generator or processor has panicked when they started.

use std::sync::Arc;

use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, TraceContextExt as _};

use crate::storage::shared::Shared;

/// Takes the place of a lost span. It exports nothing, and what starts beneath has the parent of the lost span.
pub(crate) struct Lost {
    shared: Arc<Shared>,
    parent: SpanContext,
}

impl Lost {
    #[cold]
    pub(super) fn new(shared: &Arc<Shared>, parent: &Context) -> Self {
        let parent = parent.span().span_context().clone();
        shared.count_panic_at_start();
        // As beneath a stand-in: a parent-based sampler takes no span for a root whose parent is invalid.
        shared.stand_ins.add(parent.span_id());
        Self {
            shared: shared.clone(),
            parent,
        }
    }

    pub(super) fn context(&self) -> &SpanContext {
        &self.parent
    }
}

impl Drop for Lost {
    fn drop(&mut self) {
        self.shared.stand_ins.remove(self.parent.span_id());
    }
}
