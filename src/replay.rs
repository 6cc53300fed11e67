//! Spans of code that has run before: nothing is exported, and new work attaches to what was recorded.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use opentelemetry::trace::{SpanContext, TraceContextExt as _};
use opentelemetry::{Context, KeyValue};

use crate::explain::Outcome;
use crate::fields::Identity;
use crate::scoped;
use crate::storage::core::Core;
use crate::storage::memory::Instance;

/// Stands for the recorded span of an instance while code is re-executed.
pub(crate) struct StandIn {
    core: Arc<Core>,
    context: SpanContext,
    identity: Option<Identity>,
    replay: Replay,
    /// Its attributes must reach it, so that it can learn when the replay is over.
    observes: bool,
}

/// One re-execution: what it opens beneath is replayed too, until the code says that it has caught up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Replay {
    is_over: Arc<AtomicBool>,
}

thread_local! {
    /// The storage whose stand-in is looked for, by its address, while a span is asked whether it is one.
    static ASKING: Cell<Option<usize>> = const { Cell::new(None) };
    static ANSWER: RefCell<Option<Replay>> = const { RefCell::new(None) };
    /// Asking would lock a span that this thread has locked.
    static MUST_NOT_ASK: Cell<bool> = const { Cell::new(false) };
}

impl Replay {
    /// The replay that the parent stands in for, if it is a stand-in of this storage.
    ///
    /// OpenTelemetry hides the type of the span in a context, and a stand-in's ids are those of a real span. But
    /// its `is_recording` is our code, and calling it changes nothing on anybody else's span.
    #[inline]
    pub(crate) fn beneath(core: &Arc<Core>, parent: &Context) -> Option<Self> {
        if core.stand_ins.are_none() {
            return None;
        }
        Self::ask(core, parent)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.is_over.load(Relaxed)
    }

    fn ask(core: &Arc<Core>, parent: &Context) -> Option<Self> {
        let span = parent.span();
        if MUST_NOT_ASK.get() || !core.stand_ins.include(span.span_context().span_id()) {
            return None;
        }
        scoped::with(&ASKING, Some(Arc::as_ptr(core).addr()), || {
            span.is_recording()
        });
        ANSWER.try_with(|answer| answer.take()).ok()?
    }
}

/// Stand-ins of all storages of this process.
static STAND_INS: AtomicUsize = AtomicUsize::new(0);

/// Whether there may be any stand-in at all.
#[inline]
pub(crate) fn any() -> bool {
    STAND_INS.load(Relaxed) != 0
}

/// Runs code that may start spans beneath one that OpenTelemetry has locked on this thread.
pub(crate) fn without_asking<R>(run: impl FnOnce() -> R) -> R {
    scoped::with(&MUST_NOT_ASK, true, run)
}

impl StandIn {
    /// For the instance's recorded span; where nothing is recorded, or no instance is named, for the parent.
    pub(crate) fn new(
        core: &Arc<Core>,
        identity: Option<Identity>,
        replay: Replay,
        span_name: Cow<'static, str>,
        parent: &Context,
        observes: bool,
    ) -> Self {
        let instance = identity.as_ref().map(|i| core.memory.hash(&i.instance_id));
        let recorded = identity
            .as_ref()
            .zip(instance)
            .and_then(|(identity, hash)| {
                let (id, run_id) = (&*identity.instance_id, identity.run_id.as_deref());
                core.prepare(id, run_id);
                let look = |found: Option<&Instance>| Some(found?.run(run_id)?.context());
                core.memory.look_up(hash, id, run_id, look)
            });
        let context = recorded.map_or_else(
            || parent.span().span_context().clone(),
            |recorded| recorded.to_span_context(),
        );
        core.counters.replayed.add();
        if let Some(instance) = instance {
            let natural = parent.span();
            let natural = natural.span_context();
            core.decided(instance, span_name, &context, natural, Outcome::Replayed);
        }
        STAND_INS.fetch_add(1, Relaxed);
        core.stand_ins.enter(context.span_id());
        Self {
            core: core.clone(),
            context,
            identity,
            replay,
            observes,
        }
    }

    pub(crate) fn context(&self) -> &SpanContext {
        &self.context
    }

    /// Answers the question above too.
    pub(crate) fn is_recording(&self) -> bool {
        if ASKING.get() == Some(Arc::as_ptr(&self.core).addr()) {
            let answer = self.replay.clone();
            let _ = ANSWER.try_with(|cell| cell.replace(Some(answer)));
        }
        self.observes
    }

    pub(crate) fn observe(&mut self, attribute: &KeyValue) {
        let tag = self.core.fields.tag_of(std::slice::from_ref(attribute));
        if let Some(replaying) = tag.replaying {
            self.replay.is_over.store(!replaying, Relaxed);
        }
        if tag.terminal {
            self.complete();
        }
    }

    pub(crate) fn observe_event(&self, attributes: &[KeyValue]) {
        self.drop_events(1);
        if self.core.fields.tag_of(attributes).terminal {
            self.complete();
        }
    }

    /// The end of a workflow counts, however often it is told.
    pub(crate) fn complete(&self) {
        if let Some(identity) = &self.identity {
            self.core.complete(identity);
        }
    }

    pub(crate) fn drop_events(&self, count: usize) {
        self.core.counters.replayed_events.add_many(count as u64);
    }

    pub(crate) fn end(&mut self) {
        self.observes = false;
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        STAND_INS.fetch_sub(1, Relaxed);
        self.core.stand_ins.leave(self.context.span_id());
    }
}

impl std::fmt::Debug for StandIn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StandIn")
            .field("context", &self.context)
            .finish_non_exhaustive()
    }
}
