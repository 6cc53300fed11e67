//! Stand-ins: the spans of code that has run before. They export nothing, and new work attaches to what was recorded.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use opentelemetry::trace::{Event, SpanContext, TraceContextExt as _};
use opentelemetry::{Context, KeyValue, Value};

use super::handoff::{self, Mark, StartNumber, StorageId};
use super::replays::{Replay, Standing};
use crate::context::WorkflowContext;
use crate::decision::{Arrival, Decision, Moment, decide};
use crate::fields::identity::Identity;
use crate::fields::value::EndStatus;
use crate::fields::{Owner, Scope};
use crate::storage::shared::Shared;

/// Stands for the recorded span of an instance while code is re-executed.
pub(crate) struct StandIn {
    shared: Arc<Shared>,
    context: SpanContext,
    identity: Option<Identity>,
    replay: Replay,
    /// The number by which its children in `tracing` find it; zero if it has none.
    number: StartNumber,
    /// Attributes must reach it, so that it learns when the replay is over.
    observes: bool,
}

/// The replay that a new span is beneath.
pub(super) struct Beneath {
    pub(super) replay: Replay,
    /// Set if only its parent in `tracing` is replayed, since another context was attached or set by hand: the span context
    /// that this parent stands for.
    apart: Option<SpanContext>,
}

impl Beneath {
    /// Finds the replay that a span is beneath by its parent in OpenTelemetry; else by its parent in `tracing`, which has
    /// that number, unless new work of the replay is in between.
    #[inline]
    pub(super) fn find(shared: &Arc<Shared>, mark: Mark, parent: &Context) -> Option<Self> {
        if shared.stand_ins.is_empty() && mark.beneath == 0 {
            return None;
        }
        Self::look(shared, mark, parent)
    }

    #[inline(never)]
    fn look(shared: &Arc<Shared>, mark: Mark, parent: &Context) -> Option<Self> {
        if let Some(replay) = ask(shared, parent) {
            let apart = None;
            return Some(Self { replay, apart });
        }
        let Standing {
            replay, context, ..
        } = shared.replays.get(mark.beneath)?;
        if !replay.is_over() && is_new_work(shared, parent) {
            return None;
        }
        Some(Self {
            replay,
            apart: Some(context),
        })
    }

    /// Returns the span context that a stand-in beneath stands for, if nothing is recorded of it.
    pub(super) fn context(&self, parent: &Context) -> SpanContext {
        let by_parent = || parent.span().span_context().clone();
        self.apart.clone().unwrap_or_else(by_parent)
    }

    /// Returns `true` if the parent in OpenTelemetry is the one that is replayed.
    pub(super) fn is_by_parent(&self) -> bool {
        self.apart.is_none()
    }
}

/// Returns the replay beneath the parent, if that is a stand-in of this storage, or a real span that says so.
fn ask(shared: &Arc<Shared>, parent: &Context) -> Option<Replay> {
    let span = parent.span();
    if !shared.stand_ins.contains(span.span_context().span_id()) {
        return None;
    }
    handoff::ask_for_replay(StorageId::new(shared), || {
        span.is_recording();
    })
}

/// Returns `true` if the parent is a real span that was opened inside a replay through the OpenTelemetry API: `tracing` does
/// not know that it is in between. A context that was stored is remote.
pub(super) fn is_new_work(shared: &Shared, parent: &Context) -> bool {
    let span = parent.span();
    let context = span.span_context();
    !context.is_remote() && shared.new_work.contains(context.span_id())
}

/// The number of an open span of `tracing` that may be beneath a replay, or begin one. Kept in the span's extensions.
pub(crate) struct Numbered {
    shared: Arc<Shared>,
    pub(crate) number: StartNumber,
}

impl Numbered {
    pub(crate) fn new(shared: &Arc<Shared>, number: StartNumber) -> Self {
        shared.replays.open();
        Self {
            shared: shared.clone(),
            number,
        }
    }

    pub(crate) fn is_of(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.shared, shared)
    }
}

impl Drop for Numbered {
    fn drop(&mut self) {
        self.shared.replays.close();
    }
}

/// Says that what is opened beneath a real span is replayed, as long as that is so.
pub(super) struct ReplaysBeneath {
    shared: Arc<Shared>,
    number: StartNumber,
    standing: Standing,
    is_active: bool,
}

impl ReplaysBeneath {
    pub(super) fn new(shared: &Arc<Shared>, number: StartNumber, span: &SpanContext) -> Self {
        Self {
            shared: shared.clone(),
            number,
            standing: Standing {
                replay: Replay::beneath_real(&shared.counters),
                context: span.clone(),
                is_real: true,
            },
            is_active: false,
        }
    }

    pub(super) fn set(&mut self, replaying: bool) {
        self.standing.replay.set_over(!replaying);
        self.activate(replaying);
    }

    fn activate(&mut self, replaying: bool) {
        if self.is_active == replaying {
            return;
        }
        self.is_active = replaying;
        let (shared, id) = (&self.shared, self.standing.context.span_id());
        if replaying {
            shared.stand_ins.add(id);
            shared.replays.add(self.number, || self.standing.clone());
        } else {
            shared.replays.remove(self.number);
            shared.stand_ins.remove(id);
        }
    }

    /// Answers that what is opened beneath is replayed, if that is so and asked.
    pub(super) fn answer(&self) {
        if self.is_active {
            handoff::answer_replay(StorageId::new(&self.shared), &self.standing.replay);
        }
    }
}

impl Drop for ReplaysBeneath {
    /// The replay itself goes on in the stand-ins beneath.
    fn drop(&mut self) {
        self.activate(false);
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
    /// Creates a stand-in for the instance's recorded span; if nothing is recorded, or no instance named, for `natural`.
    pub(super) fn new(
        shared: &Arc<Shared>,
        identity: Option<Identity>,
        replay: Replay,
        span_name: Cow<'static, str>,
        natural: &SpanContext,
        number: StartNumber,
        observes: bool,
    ) -> Self {
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
        shared.replays.add(number, || Standing {
            replay: replay.clone(),
            context: context.clone(),
            is_real: false,
        });
        Self {
            shared: shared.clone(),
            context,
            identity,
            replay,
            number,
            observes,
        }
    }

    pub(super) fn context(&self) -> &SpanContext {
        &self.context
    }

    pub(super) fn is_recording(&self) -> bool {
        let storage = StorageId::new(&self.shared);
        handoff::answer_replay(storage, &self.replay);
        handoff::answer_identity(storage, self.identity.as_ref());
        self.observes
    }

    pub(super) fn observe(&mut self, attribute: &KeyValue) {
        // Neither field that counts here has a scope.
        let (attribute, owner) = (std::slice::from_ref(attribute), Owner::Scope(Scope::NONE));
        let tag = self.shared.fields.tag_of(attribute, owner);
        if let Some(replaying) = tag.replaying {
            self.replay.set_over(!replaying);
        }
        if let Some(status) = tag.end {
            self.complete(status);
        }
    }

    /// Keeps a warning or an error that is told after the end of the replay; drops and counts any other event.
    pub(super) fn observe_event(&self, event: Event) {
        if let Some(status) = self.shared.fields.end_of(&event.attributes) {
            self.complete(status);
        }
        if self.replay.is_over() && is_severe(&event) {
            self.replay.keep_event(event);
        } else {
            self.drop_events(1);
        }
    }

    /// Completes the instance: its end counts, however often it is told.
    pub(super) fn complete(&self, status: EndStatus) {
        if let Some(identity) = &self.identity {
            self.shared.complete(identity, status);
        }
    }

    pub(super) fn drop_events(&self, count: usize) {
        self.shared.counters.replayed_events.add_many(count as u64);
    }

    pub(super) fn end(&mut self) {
        self.observes = false;
    }
}

/// Reads the level that tracing-opentelemetry 0.34 sets as an attribute (src/layer.rs, `on_event`).
fn is_severe(event: &Event) -> bool {
    let mut attributes = event.attributes.iter();
    let level = attributes.find(|attribute| attribute.key.as_str() == "level");
    match level.map(|level| &level.value) {
        Some(Value::String(level)) => matches!(level.as_str(), "WARN" | "ERROR"),
        _ => false,
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
        self.shared.replays.remove(self.number);
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
