//! The recording of a span: what is kept of it from the decision until it has a context of its own.

use std::sync::Arc;

use opentelemetry::trace::SpanBuilder;

use crate::cache::Key;
use crate::context::WorkflowContext;
use crate::decision::{Decision, Record};
use crate::explain::author::Author;
use crate::fields::identity::Identity;
use crate::root::open::OpenRoot;
use crate::storage::remote::LateWinner;
use crate::storage::shared::Shared;

/// The span's own context is to be recorded once it has one.
pub(super) struct Recording<'a> {
    shared: &'a Shared,
    hash: u64,
    identity: Identity,
    author: Author,
    /// The trace that this one follows, and its own number. This recording alone may do so.
    follows: Option<(WorkflowContext, u32)>,
}

impl<'a> Recording<'a> {
    #[inline(never)]
    pub(super) fn new(
        shared: &'a Shared,
        builder: &SpanBuilder,
        key: Key<'_>,
        decision: &Decision,
    ) -> Box<Self> {
        Box::new(Self {
            shared,
            hash: key.hash,
            identity: Identity {
                instance_id: key.id.into(),
                run_id: key.run_id.map(Box::from),
                parent_instance_id: None,
            },
            author: Author::from_span(builder),
            follows: match decision.record {
                Record::Generation(generation) => decision.stored.clone().map(|s| (s, generation)),
                Record::First | Record::No => None,
            },
        })
    }

    /// Records the context of the span that was started, unless another span was faster.
    pub(super) fn finish(
        mut self,
        context: WorkflowContext,
        root: Option<Arc<OpenRoot>>,
    ) -> Result<Option<LateWinner>, WorkflowContext> {
        let (follows, author) = (self.follows.take(), std::mem::take(&mut self.author));
        let follows = follows.as_ref().map(|(context, number)| (context, *number));
        self.shared
            .record(self.key(), follows, context, author, root)
    }

    /// Returns the number of the trace among those of its run.
    pub(super) fn generation(&self) -> u32 {
        self.follows
            .as_ref()
            .map_or(1, |(_, generation)| *generation)
    }

    pub(super) fn key(&self) -> Key<'_> {
        Key {
            hash: self.hash,
            id: &self.identity.instance_id,
            run_id: self.identity.run_id.as_deref(),
        }
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        // No span came of it, a panic in the sampler included: another thread may open the next trace.
        if self.follows.is_some() {
            self.shared.tier.cache().stop_rolling(self.key());
        }
    }
}
