//! What the handle, the layer and the tracers of one storage share.

use std::borrow::Cow;
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Span as _, SpanBuilder, SpanContext, Tracer};
use opentelemetry::{Context, KeyValue, SpanId, global};

use super::beyond::{Beyond, Overruled};
use super::memory::{Conflict, Followed, Memory, Run};
use super::{SCOPE, Stats};
use crate::clock::Clock;
use crate::context::WorkflowContext;
use crate::error::{BackendError, InvalidInstanceId};
use crate::explain::{Decision, Event, Explanation, Outcome, Recorder};
use crate::fields::{Fields, Identity, Tag};
use crate::policy::Policy;
use crate::warnings::Warnings;

/// What the handle, the layer and the tracers of one storage share.
pub(crate) struct Core {
    pub(crate) fields: Fields,
    pub(crate) policy: Policy,
    pub(crate) bounds: Bounds,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) memory: Arc<Memory>,
    pub(super) beyond: Option<Beyond>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) stand_ins: StandIns,
    pub(crate) warnings: Arc<Warnings>,
    pub(super) recorders: Recorders,
    pub(super) tracer: RwLock<Option<Weak<dyn AgentTracer>>>,
    #[cfg(feature = "metrics")]
    pub(crate) registrations: crate::metrics::Registrations,
}

impl Core {
    /// The latest context of an instance, asked of the backend where memory has none; not counted.
    pub(crate) fn peek(&self, id: &str) -> Option<WorkflowContext> {
        self.memory.latest(id).or_else(|| {
            self.beyond.as_ref()?.fetch(id, None);
            self.memory.latest(id)
        })
    }

    /// The same for the parent instance of a span that is starting, within what is left of its budget.
    pub(crate) fn peek_parent(&self, id: &str) -> Option<WorkflowContext> {
        self.memory.latest(id).or_else(|| {
            self.beyond.as_ref()?.fetch_too(id, None);
            self.memory.latest(id)
        })
    }

    /// Asks the backend for what a span needs to know and memory does not have.
    #[inline]
    pub(crate) fn prepare(&self, id: &str, run_id: Option<&str>) {
        if let Some(beyond) = &self.beyond {
            beyond.fetch_unless_missed(id, run_id);
        }
    }

    /// Records the context of a span, unless another was faster. Where there is a backend that may still know
    /// better, it tells so through what is answered.
    pub(crate) fn record(
        &self,
        id: &str,
        run_id: Option<&str>,
        follows: Option<Followed>,
        context: WorkflowContext,
        recorder: Recorder,
    ) -> Result<Option<Overruled>, WorkflowContext> {
        let recorder = self.recorders.number(recorder);
        let followed = follows.as_ref().map(Followed::span_id);
        let hash = self.memory.hash(id);
        let recorded = self
            .memory
            .record(hash, id, run_id, follows, context.clone(), recorder);
        match (recorded, &self.beyond) {
            (Err(Conflict { winner }), _) => {
                self.counters.conflicts.add();
                Err(winner)
            }
            (Ok(_), None) => Ok(None),
            (Ok(generation), Some(beyond)) => {
                let counters = &self.counters;
                Ok(beyond.publish(id, run_id, generation, followed, context, counters))
            }
        }
    }

    pub(super) fn store(&self, id: &str, context: WorkflowContext) {
        let Some(beyond) = &self.beyond else {
            self.memory.replace(id, context);
            return;
        };
        let replaced = self.memory.replace(id, context.clone());
        beyond.forget_runs(id, replaced);
        beyond.put(id, context);
    }

    pub(super) fn get(&self, id: &str) -> Option<WorkflowContext> {
        if let Some(beyond) = self.beyond.as_ref().filter(|_| !self.memory.has(id, None)) {
            beyond.fetch(id, None);
        }
        let hash = self.memory.hash(id);
        self.memory.look_up(hash, id, None, |instance| {
            instance.map(|instance| instance.latest().context())
        })
    }

    pub(super) fn cleanup(&self, id: &str) -> bool {
        let Some(beyond) = &self.beyond else {
            return self.memory.remove_instance(id).is_some();
        };
        if !self.memory.has(id, None) {
            beyond.fetch(id, None);
        }
        let removed = self.memory.remove_instance(id);
        let was_there = removed.is_some();
        beyond.forget_runs(id, removed.unwrap_or_default());
        beyond.remove(id);
        was_there
    }

    pub(super) fn flush(&self) -> Result<(), BackendError> {
        self.beyond.as_ref().map_or(Ok(()), Beyond::flush)
    }

    pub(super) fn explain(&self, id: &str) -> Explanation {
        let explanation = self.memory.explain(id, self.clock.now(), &self.recorders);
        explanation.with_backend_down(self.beyond.as_ref().is_some_and(Beyond::is_down))
    }

    /// Leaves a trace of what was decided for a span, for `explain`.
    #[inline]
    pub(crate) fn decided(
        &self,
        instance: u64,
        span_name: Cow<'static, str>,
        span: &SpanContext,
        natural: &SpanContext,
        outcome: Outcome,
    ) {
        let decision = Decision {
            span_name,
            span: span.into(),
            natural: natural.into(),
            outcome,
        };
        self.memory.note_hashed(instance, Event::Started(decision));
    }

    pub(crate) fn has_backend(&self) -> bool {
        self.beyond.is_some()
    }

    pub(crate) fn complete(&self, identity: &Identity) {
        let (id, run_id) = (&identity.instance_id, identity.run_id.as_deref());
        let completed = self.memory.complete(id, run_id);
        if let (true, Some(beyond)) = (completed, &self.beyond) {
            beyond.complete(id, run_id);
        }
    }

    /// What attributes say of an instance; what is too long to be an id is counted.
    #[inline]
    pub(crate) fn tag_of<'a>(&self, attributes: &'a [KeyValue]) -> Tag<'a> {
        let tag = self.fields.tag_of(attributes);
        if let Some(id) = &tag.oversized {
            self.counters.oversized.add();
            self.warnings.oversized(id);
        }
        tag
    }

    pub(super) fn check(&self, id: &str) -> Result<(), InvalidInstanceId> {
        let checked = InvalidInstanceId::check(id);
        if let Err(InvalidInstanceId::TooLong { .. }) = checked {
            self.counters.oversized.add();
        }
        checked
    }

    /// Remembers the tracer for `create_resumed`, without keeping it alive.
    pub(super) fn use_for_agents<T>(&self, tracer: T) -> Arc<T>
    where
        T: Tracer + Send + Sync + 'static,
        T::Span: Send + Sync + 'static,
    {
        let tracer = Arc::new(tracer);
        let weak: Weak<dyn AgentTracer> = Arc::downgrade(&(tracer.clone() as Arc<dyn AgentTracer>));
        *self.tracer.write().unwrap_or_else(PoisonError::into_inner) = Some(weak);
        tracer
    }

    /// Opens and ends a span; its context, if it recorded.
    pub(super) fn end_at_once(&self, span: SpanBuilder, parent: &Context) -> Option<SpanContext> {
        let ours = self
            .tracer
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match ours.and_then(|tracer| tracer.upgrade()) {
            Some(tracer) => tracer.end_at_once(span, parent),
            None => global::tracer(SCOPE).end_at_once(span, parent),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        let counters = &self.counters;
        let beyond = self.beyond.as_ref();
        let (hits, misses) = self.memory.hits_and_misses();
        Stats {
            stored_instances: self.memory.len() as u64,
            hits,
            misses,
            late: counters.late.get(),
            expired: self.memory.expired.get(),
            evicted: self.memory.evicted.get(),
            oversized: counters.oversized.get(),
            malformed: beyond.map_or(0, Beyond::malformed),
            dropped_writes: beyond.map_or(0, Beyond::dropped_writes),
            backend_errors: beyond.map_or(0, Beyond::errors),
            lookup_timeouts: beyond.map_or(0, Beyond::lookup_timeouts),
            conflicts: counters.conflicts.get(),
            replayed: counters.replayed.get(),
            replayed_events: counters.replayed_events.get(),
            deferred: counters.deferred.get(),
            adopted: counters.adopted.get(),
        }
    }
}

/// The limits of one trace.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounds {
    pub(crate) max_age: Option<Duration>,
    pub(crate) max_spans: Option<u64>,
}

impl Bounds {
    /// Counts one more span into the run's trace, unless that is full or too old.
    #[inline]
    pub(crate) fn are_passed(&self, run: &Run, now: Option<SystemTime>) -> bool {
        let age = now.and_then(|now| now.duration_since(run.recorded_at()).ok());
        self.max_age
            .is_some_and(|max| age.is_some_and(|age| age > max))
            || self.max_spans.is_some_and(|max| !run.admit(max))
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) late: Counter,
    pub(crate) oversized: Counter,
    pub(crate) conflicts: Counter,
    pub(crate) replayed: Counter,
    pub(crate) replayed_events: Counter,
    pub(crate) deferred: Counter,
    pub(crate) adopted: Counter,
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

/// The span ids for which replayed spans stand at this moment.
///
/// A new span asks its parent whether it is a replay only if the parent's id is in here: asking locks the
/// parent, which an ordinary span's start must not.
#[derive(Debug, Default)]
pub(crate) struct StandIns {
    total: AtomicUsize,
    spans: dashmap::DashMap<SpanId, usize>,
}

impl StandIns {
    pub(crate) fn enter(&self, span: SpanId) {
        self.total.fetch_add(1, Relaxed);
        *self.spans.entry(span).or_default() += 1;
    }

    pub(crate) fn leave(&self, span: SpanId) {
        self.spans.entry(span).and_modify(|count| *count -= 1);
        self.spans.remove_if(&span, |_, count| *count == 0);
        self.total.fetch_sub(1, Relaxed);
    }

    #[inline]
    pub(crate) fn are_none(&self) -> bool {
        self.total.load(Relaxed) == 0
    }

    pub(crate) fn include(&self, span: SpanId) -> bool {
        self.spans.contains_key(&span)
    }
}

/// Each combination of a span's name and target once, however many instances it records: they keep its number.
#[derive(Debug, Default)]
pub(super) struct Recorders {
    numbers: dashmap::DashMap<Recorder, NonZeroU16, foldhash::fast::RandomState>,
    last: AtomicU16,
}

impl Recorders {
    /// Names that are made at run time could be any number: past this many no more are kept.
    const MOST: u16 = 1024;

    fn number(&self, recorder: Recorder) -> Option<NonZeroU16> {
        if let Some(known) = self.numbers.get(&recorder) {
            return Some(*known);
        }
        let next = |last| (last < Self::MOST).then_some(last + 1);
        let last = self.last.fetch_update(Relaxed, Relaxed, next).ok()?;
        let new = NonZeroU16::MIN.saturating_add(last);
        // Another thread may have been faster: a number is then left out.
        Some(*self.numbers.entry(recorder).or_insert(new))
    }

    pub(super) fn get(&self, number: NonZeroU16) -> Option<Recorder> {
        let found = self.numbers.iter().find(|known| *known.value() == number);
        found.map(|known| known.key().clone())
    }
}

/// The one thing that `create_resumed` needs of a tracer, without its type.
pub(super) trait AgentTracer: Send + Sync {
    fn end_at_once(&self, span: SpanBuilder, parent: &Context) -> Option<SpanContext>;
}

impl<T> AgentTracer for T
where
    T: Tracer + Send + Sync,
{
    fn end_at_once(&self, span: SpanBuilder, parent: &Context) -> Option<SpanContext> {
        let mut span = self.build_with_context(span, parent);
        let context = span.is_recording().then(|| span.span_context().clone());
        span.end();
        context
    }
}
