//! Stand-ins: the spans of code that has run before. They export nothing, and new work attaches to what was recorded.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use opentelemetry::trace::{SpanContext, TraceContextExt as _};
use opentelemetry::{Context, KeyValue};

use super::handoff::{self, ReplayFlag, StorageId};
use crate::context::WorkflowContext;
use crate::decision::{Arrival, Decision, Moment, decide};
use crate::fields::identity::Identity;
use crate::storage::shared::Shared;

/// Stands for the recorded span of an instance while code is re-executed.
pub(crate) struct StandIn {
    shared: Arc<Shared>,
    context: SpanContext,
    identity: Option<Identity>,
    replay: Replay,
    /// Attributes must reach it, so that it learns when the replay is over.
    observes: bool,
}

/// One re-execution: what it opens beneath is replayed too, until the code says that it has caught up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Replay {
    is_over: ReplayFlag,
}

impl Replay {
    /// Returns the replay that the parent stands in for, if it is a stand-in of this storage.
    #[inline]
    pub(super) fn beneath(shared: &Arc<Shared>, parent: &Context) -> Option<Self> {
        if shared.stand_ins.is_empty() {
            return None;
        }
        let span = parent.span();
        if !shared.stand_ins.contains(span.span_context().span_id()) {
            return None;
        }
        let ask = || {
            span.is_recording();
        };
        let is_over = handoff::ask_for_replay(StorageId::new(shared), ask)?;
        Some(Self { is_over })
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Relaxed)
    }
}

/// The stand-ins of all storages of this process.
static STAND_INS: AtomicUsize = AtomicUsize::new(0);

/// Returns `false` if there is certainly no stand-in.
#[inline]
pub(super) fn is_any() -> bool {
    STAND_INS.load(Relaxed) != 0
}

impl StandIn {
    /// Creates a stand-in for the instance's recorded span; if nothing is recorded, or no instance named, for the parent.
    pub(super) fn new(
        shared: &Arc<Shared>,
        identity: Option<Identity>,
        replay: Replay,
        span_name: Cow<'static, str>,
        parent: &Context,
        observes: bool,
    ) -> Self {
        let natural = parent.span();
        let natural = natural.span_context();
        let decision = identity
            .as_ref()
            .map(|identity| decide_replay(shared, identity, natural));
        let recorded = decision.and_then(|(hash, decision)| {
            let context = (decision.stored.as_ref()).map(WorkflowContext::to_span_context);
            let shown = context.as_ref().unwrap_or(natural);
            shared.note_decision(hash, span_name, shown, natural, decision.outcome, false);
            context
        });
        let context = recorded.unwrap_or_else(|| natural.clone());
        shared.counters.replayed.add();
        STAND_INS.fetch_add(1, Relaxed);
        shared.stand_ins.add(context.span_id());
        Self {
            shared: shared.clone(),
            context,
            identity,
            replay,
            observes,
        }
    }

    pub(super) fn context(&self) -> &SpanContext {
        &self.context
    }

    pub(super) fn is_recording(&self) -> bool {
        handoff::answer_replay(StorageId::new(&self.shared), &self.replay.is_over);
        self.observes
    }

    pub(super) fn observe(&mut self, attribute: &KeyValue) {
        let tag = self.shared.fields.tag_of(std::slice::from_ref(attribute));
        if let Some(replaying) = tag.replaying {
            self.replay.is_over.store(!replaying, Relaxed);
        }
        if tag.terminal {
            self.complete();
        }
    }

    pub(super) fn observe_event(&self, attributes: &[KeyValue]) {
        self.drop_events(1);
        if self.shared.fields.tag_of(attributes).terminal {
            self.complete();
        }
    }

    /// Completes the instance: its end counts, however often it is told.
    pub(super) fn complete(&self) {
        if let Some(identity) = &self.identity {
            self.shared.complete(identity);
        }
    }

    pub(super) fn drop_events(&self, count: usize) {
        self.shared.counters.replayed_events.add_many(count as u64);
    }

    pub(super) fn end(&mut self) {
        self.observes = false;
    }
}

fn decide_replay(shared: &Shared, identity: &Identity, natural: &SpanContext) -> (u64, Decision) {
    let run_id = identity.run_id.as_deref();
    let key = shared.key(&identity.instance_id, run_id);
    let arrival = Arrival {
        moment: Moment::Replay,
        run_id,
        natural: Some(natural).filter(|natural| natural.is_valid()),
        is_polled: false,
        parent_instance: None,
        stops_waiting: false,
    };
    let decide = |entry: Option<&_>| decide(&arrival, entry, &shared.policy, None);
    (key.hash, shared.tier.look_up(key, decide))
}

impl Drop for StandIn {
    fn drop(&mut self) {
        STAND_INS.fetch_sub(1, Relaxed);
        self.shared.stand_ins.remove(self.context.span_id());
    }
}

impl fmt::Debug for StandIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StandIn")
            .field("context", &self.context)
            .finish_non_exhaustive()
    }
}
