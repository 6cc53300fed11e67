//! Where a span starts: its parent is chosen, links are added, and its context is recorded.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use opentelemetry::baggage::{BaggageExt as _, KeyValueMetadata};
use opentelemetry::trace::{
    Link, Span, SpanBuilder, SpanContext, Status, TraceContextExt as _, Tracer,
};
use opentelemetry::{Context, KeyValue};

use crate::context::WorkflowContext;
use crate::deferral;
use crate::explain::{Outcome, Recorder};
use crate::fields::{self, Identity, Names};
use crate::placement::{Arrival, More, Parent, Placement, Recording};
use crate::policy::{Continuation, Relation};
use crate::replay::{self, Replay, StandIn};
use crate::scoped;
use crate::storage::beyond::Overruled;
use crate::storage::core::Core;

/// Counts the traces of an instance, on the first span of each but the first.
const GENERATION: &str = "workflow.generation";

/// Seconds from the recording of a context to its first use in another process.
const RESUMED_AFTER: &str = "workflow.resumed_after";

/// A tracer that starts the spans of a workflow instance in the instance's trace.
///
/// It decorates any other tracer and is made by [`WorkflowContextStorage::tracer`]; the layer has one of its
/// own. A span whose attributes at its start name no instance is left as it is.
///
/// [`WorkflowContextStorage::tracer`]: crate::WorkflowContextStorage::tracer
pub struct WorkflowTracer<T> {
    inner: Arc<T>,
    core: Arc<Core>,
    origin: Origin,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The layer has looked at each span's callsite, and marked those that matter.
    Layer,
    /// Any span may matter.
    Api,
}

/// A span of a [`WorkflowTracer`]: the inner tracer's span, or a stand-in that exports nothing because the
/// code it would tell of has run before.
///
/// Both look the same from outside. A stand-in has the span context of the instance's recorded span, so that
/// whatever is injected or started from it attaches there.
pub struct WorkflowSpan<S>(Kind<S>);

enum Kind<S> {
    Live {
        span: S,
        watch: Option<Watch>,
    },
    /// Boxed, so that an ordinary span is hardly larger than the inner one: it is moved several times.
    StandIn(Box<StandIn>),
}

thread_local! {
    /// The layer is creating a span that declares a reserved field, or may be adopted.
    static MARKED: Cell<bool> = const { Cell::new(false) };
}

/// Has the span builder marked that the inner layer asks for within `create`.
pub(crate) fn marking<R>(create: impl FnOnce() -> R) -> R {
    scoped::with(&MARKED, true, create)
}

/// An empty list of links costs nothing and tells `build_with_context` to read the attributes, which for each
/// ordinary span would cost more than all else that this crate does to it.
fn mark(builder: &mut SpanBuilder) {
    builder.links.get_or_insert_default();
}

/// Answers `true` also for an ordinary span with several links, which only costs a little. With one,
/// tracing-opentelemetry makes a list of just that capacity, to which the mark's empty list never grows.
#[inline]
fn is_marked(builder: &SpanBuilder) -> bool {
    builder
        .links
        .as_ref()
        .is_some_and(|links| links.capacity() != 1)
}

impl<T> WorkflowTracer<T> {
    pub(crate) fn for_layer(inner: Arc<T>, core: Arc<Core>) -> Self {
        Self {
            inner,
            core,
            origin: Origin::Layer,
        }
    }

    pub(crate) fn for_api(inner: Arc<T>, core: Arc<Core>) -> Self {
        Self {
            inner,
            core,
            origin: Origin::Api,
        }
    }
}

impl<T> Tracer for WorkflowTracer<T>
where
    T: Tracer,
{
    type Span = WorkflowSpan<T::Span>;

    #[inline]
    fn span_builder<N>(&self, name: N) -> SpanBuilder
    where
        N: Into<Cow<'static, str>>,
    {
        if self.origin != Origin::Layer || !MARKED.get() {
            return self.inner.span_builder(name);
        }
        // The parent has started by now: what is opened while the fields are printed is nobody's child yet.
        deferral::end_adoption();
        let mut builder = self.inner.span_builder(name);
        mark(&mut builder);
        builder
    }

    #[inline]
    fn build_with_context(&self, builder: SpanBuilder, parent: &Context) -> Self::Span {
        if self.origin == Origin::Api || is_marked(&builder) {
            self.build_marked(builder, parent)
        } else if self.core.stand_ins.are_none() {
            self.plain(builder, parent)
        } else {
            self.build_where_some_replay(builder, parent)
        }
    }
}

impl<T> WorkflowTracer<T>
where
    T: Tracer,
{
    #[inline]
    fn plain(&self, builder: SpanBuilder, parent: &Context) -> WorkflowSpan<T::Span> {
        WorkflowSpan(Kind::Live {
            span: self.inner.build_with_context(builder, parent),
            watch: None,
        })
    }

    /// An ordinary span, which may be beneath a replayed one.
    #[inline(never)]
    fn build_where_some_replay(
        &self,
        builder: SpanBuilder,
        parent: &Context,
    ) -> WorkflowSpan<T::Span> {
        match Replay::beneath(&self.core, parent) {
            Some(replay) if !replay.is_over() => self.stand_in(None, replay, builder, parent),
            Some(_) => self.plain(builder, &past_replay(parent)),
            None => self.plain(builder, parent),
        }
    }

    #[inline(never)]
    fn build_marked(&self, builder: SpanBuilder, parent: &Context) -> WorkflowSpan<T::Span> {
        let core = &self.core;
        let adopted = match self.origin {
            Origin::Layer => deferral::take_adoption(core),
            Origin::Api => None,
        };
        let is_special = adopted.is_some()
            || builder.events.is_some()
            || !core.stand_ins.are_none()
            || parent.is_telemetry_suppressed();
        let attributes = builder.attributes.as_deref().unwrap_or_default();
        match core.fields.only_id(attributes).filter(|_| !is_special) {
            // Nearly always. It goes the way of all others, with most forks behind it.
            Some(id) => {
                let names = Names::of(&id);
                let instance = core.memory.hash(&id);
                let mut placement = self.place(names, instance, parent, false);
                let memo = self.memo(names, None);
                self.start(builder, parent, &mut placement, instance, memo, false)
            }
            None => self.build_special(builder, parent, adopted),
        }
    }

    #[inline(never)]
    fn build_special(
        &self,
        builder: SpanBuilder,
        parent: &Context,
        adopted: Option<Identity>,
    ) -> WorkflowSpan<T::Span> {
        let core = &self.core;
        if parent.is_telemetry_suppressed() {
            return self.plain(builder, parent);
        }
        let tag = core.tag_of(builder.attributes.as_deref().unwrap_or_default());
        let events = builder.events.as_deref();
        let terminal = tag.terminal || events.is_some_and(|e| core.fields.any_terminal(e));
        let beneath = Replay::beneath(core, parent);
        let past_replay = beneath.as_ref().map(|_| past_replay(parent));
        let replay = match tag.replaying {
            Some(replaying) => replaying.then(Replay::default),
            None => beneath.filter(|replay| !replay.is_over()),
        };
        if let Some(replay) = replay {
            let identity = tag.names().map(Names::to_identity).or(adopted);
            let stand_in = self.stand_in(identity, replay, builder, parent);
            if let (true, Kind::StandIn(stand_in)) = (terminal, &stand_in.0) {
                stand_in.complete();
            }
            return stand_in;
        }
        let in_replay = past_replay.is_some();
        let parent = past_replay.as_deref().unwrap_or(parent);
        let own = tag.names();
        // Who has not named itself may do so yet, and be recorded late.
        let unnamed = own.is_none().then(|| {
            Box::new(Unnamed {
                run_id: tag.run_id.as_deref().map(Box::from),
                recorder: Recorder::of(&builder),
            })
        });
        match own.or(adopted.as_ref().map(Identity::names)) {
            None => WorkflowSpan(Kind::Live {
                span: self.inner.build_with_context(builder, parent),
                watch: Some(self.watch(None, Some(Memo::new(None, unnamed)))),
            }),
            Some(names) => {
                let instance = core.memory.hash(names.instance_id);
                let mut placement = self.place(names, instance, parent, in_replay);
                let memo = self.memo(names, unnamed);
                self.start(builder, parent, &mut placement, instance, memo, terminal)
            }
        }
    }

    #[inline]
    fn place(
        &self,
        names: Names<'_>,
        instance: u64,
        parent: &Context,
        in_replay: bool,
    ) -> Placement<'_> {
        let natural = parent.span();
        let arrival = Arrival {
            names,
            hash: instance,
            natural: Some(natural.span_context()).filter(|natural| natural.is_valid()),
            in_replay,
        };
        Placement::of(arrival, &self.core)
    }

    /// What the span has to remember but the hash of its instance.
    #[inline]
    fn memo(&self, names: Names<'_>, unnamed: Option<Box<Unnamed>>) -> Option<Box<Memo>> {
        let is_needed = unnamed.is_some() || names.run_id.is_some() || self.core.has_backend();
        is_needed.then(|| Memo::new(Some(names), unnamed))
    }

    /// Not inlined: what is passed would be copied, and the span be made somewhere else than where it is to be.
    #[inline(never)]
    fn start(
        &self,
        mut builder: SpanBuilder,
        parent: &Context,
        placement: &mut Placement<'_>,
        instance: u64,
        memo: Option<Box<Memo>>,
        terminal: bool,
    ) -> WorkflowSpan<T::Span> {
        let core = &self.core;
        let mut more = placement.more.take();
        let recorder = (more.as_mut()).and_then(|more| self.prepare(&mut builder, more));
        if let Some(id) = memo.as_ref().and_then(|memo| memo.adopted_id()) {
            core.counters.adopted.add();
            let id = KeyValue::new(core.fields.primary_instance_id(), id);
            builder.attributes.get_or_insert_default().push(id);
        }
        let chosen = match (placement.parent, &placement.stored) {
            (Parent::Natural, _) => None,
            (Parent::Stored, Some(stored)) => {
                Some(parent.with_remote_span_context(stored.to_span_context()))
            }
            (Parent::None | Parent::Stored, _) => Some(without_span(parent)),
        };
        let name = builder.name.clone();
        let chosen = chosen.as_ref().unwrap_or(parent);
        let mut started = WorkflowSpan(Kind::Live {
            span: self.inner.build_with_context(builder, chosen),
            watch: Some(self.watch(Some(instance), memo)),
        });
        let Kind::Live {
            span,
            watch: Some(watch),
        } = &mut started.0
        else {
            return started;
        };
        let outcome = match more {
            None => placement.outcome,
            Some(more) => self
                .record(span, watch, *more, recorder)
                .unwrap_or(placement.outcome),
        };
        let natural = parent.span();
        let natural = natural.span_context();
        core.decided(instance, name, span.span_context(), natural, outcome);
        watch.complete_if(terminal);
        started
    }

    /// What became of it, where that is not what was planned.
    #[inline(never)]
    fn record(
        &self,
        span: &mut T::Span,
        watch: &mut Watch,
        more: More<'_>,
        recorder: Option<Recorder>,
    ) -> Option<Outcome> {
        let (recording, recorder) = (more.record?, recorder?);
        let context = WorkflowContext::of_span(span.span_context(), self.core.clock.now())?;
        match recording.finish(context, recorder) {
            Ok(overruled) => {
                watch.expect(overruled);
                None
            }
            Err(winner) => {
                link_unless_in_trace(span, &winner);
                Some(Outcome::LostRace)
            }
        }
    }

    /// Adds what an exception among spans tells; who records it, if it is to be recorded.
    #[inline(never)]
    fn prepare(&self, builder: &mut SpanBuilder, more: &mut More<'_>) -> Option<Recorder> {
        let recorder = more.record.as_ref().map(|_| Recorder::of(builder));
        let attributes = builder.attributes.get_or_insert_default();
        if let Some(recorded_at) = more.resumed {
            let age = self.core.clock.now().duration_since(recorded_at);
            attributes.push(KeyValue::new(fields::RESUMED, true));
            let age = age.unwrap_or_default().as_secs_f64();
            attributes.push(KeyValue::new(RESUMED_AFTER, age));
        }
        if let Some(generation) = more.record.as_ref().and_then(Recording::generation) {
            attributes.push(KeyValue::new(GENERATION, i64::from(generation)));
        }
        if let Some((target, relation)) = more.link.take() {
            let link = Link::new(target, vec![relation_attribute(relation)], 0);
            builder.links.get_or_insert_default().push(link);
        }
        recorder
    }

    #[inline]
    fn watch(&self, instance: Option<u64>, memo: Option<Box<Memo>>) -> Watch {
        Watch {
            core: self.core.clone(),
            instance,
            memo,
            observes: self.origin == Origin::Layer,
        }
    }

    fn stand_in(
        &self,
        identity: Option<Identity>,
        replay: Replay,
        builder: SpanBuilder,
        parent: &Context,
    ) -> WorkflowSpan<T::Span> {
        let observes = self.origin == Origin::Layer;
        let stand_in = StandIn::new(&self.core, identity, replay, builder.name, parent, observes);
        stand_in.drop_events(builder.events.map_or(0, |events| events.len()));
        WorkflowSpan(Kind::StandIn(Box::new(stand_in)))
    }
}

impl<T> fmt::Debug for WorkflowTracer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkflowTracer")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

impl<S> WorkflowSpan<S> {
    /// The inner tracer's span, where it is not stood in for.
    #[inline]
    fn inner(&mut self) -> Option<&mut S> {
        match &mut self.0 {
            Kind::Live { span, .. } => Some(span),
            Kind::StandIn(_) => None,
        }
    }
}

impl<S: Span> WorkflowSpan<S> {
    #[inline(never)]
    fn set_watched(&mut self, mut attribute: KeyValue) {
        match &mut self.0 {
            Kind::Live { span, watch } => {
                let watch = watch.as_mut();
                if watch.is_none_or(|watch| watch.observe(span, &mut attribute)) {
                    span.set_attribute(attribute);
                }
            }
            Kind::StandIn(stand_in) => stand_in.observe(&attribute),
        }
    }
}

impl<S: Span> Span for WorkflowSpan<S> {
    #[inline]
    fn add_event_with_timestamp<T>(
        &mut self,
        name: T,
        timestamp: SystemTime,
        attributes: Vec<KeyValue>,
    ) where
        T: Into<Cow<'static, str>>,
    {
        match &mut self.0 {
            Kind::Live { span, watch } => {
                if let Some(watch) = watch {
                    watch.observe_event(&attributes);
                }
                span.add_event_with_timestamp(name, timestamp, attributes);
            }
            Kind::StandIn(stand_in) => stand_in.observe_event(&attributes),
        }
    }

    #[inline]
    fn span_context(&self) -> &SpanContext {
        match &self.0 {
            Kind::Live { span, .. } => span.span_context(),
            Kind::StandIn(stand_in) => stand_in.context(),
        }
    }

    /// `true` also for an unsampled span of the layer whose reserved fields are still read: those are kept,
    /// and OpenTelemetry hands attributes to recording spans only.
    #[inline]
    fn is_recording(&self) -> bool {
        match &self.0 {
            Kind::Live { span, watch } => {
                let observes = watch.as_ref().is_some_and(|watch| watch.observes);
                span.is_recording() || (observes && span.span_context().is_valid())
            }
            Kind::StandIn(stand_in) => stand_in.is_recording(),
        }
    }

    #[inline]
    fn set_attribute(&mut self, attribute: KeyValue) {
        // What is only handed on is not borrowed as mutable here: it would be copied.
        match &mut self.0 {
            Kind::Live { span, watch: None } => span.set_attribute(attribute),
            Kind::Live {
                span,
                watch: Some(watch),
            } if !watch.wants(&attribute) => span.set_attribute(attribute),
            _ => self.set_watched(attribute),
        }
    }

    #[inline]
    fn set_attributes(&mut self, attributes: impl IntoIterator<Item = KeyValue>) {
        match &mut self.0 {
            Kind::Live { span, watch: None } => span.set_attributes(attributes),
            _ => attributes
                .into_iter()
                .for_each(|attribute| self.set_attribute(attribute)),
        }
    }

    #[inline]
    fn set_status(&mut self, status: Status) {
        if let Some(span) = self.inner() {
            span.set_status(status);
        }
    }

    #[inline]
    fn update_name<T>(&mut self, new_name: T)
    where
        T: Into<Cow<'static, str>>,
    {
        if let Some(span) = self.inner() {
            span.update_name(new_name);
        }
    }

    #[inline]
    fn add_link(&mut self, span_context: SpanContext, attributes: Vec<KeyValue>) {
        if let Some(span) = self.inner() {
            span.add_link(span_context, attributes);
        }
    }

    #[inline]
    fn end_with_timestamp(&mut self, timestamp: SystemTime) {
        match &mut self.0 {
            Kind::Live { span, watch: None } if !replay::any() => {
                span.end_with_timestamp(timestamp);
            }
            Kind::Live { span, watch } => {
                if let Some(watch) = watch {
                    watch.end(span);
                }
                // An exporter may open spans beneath this one while OpenTelemetry has it locked.
                replay::without_asking(|| span.end_with_timestamp(timestamp));
            }
            Kind::StandIn(stand_in) => stand_in.end(),
        }
    }
}

impl<S: fmt::Debug> fmt::Debug for WorkflowSpan<S> {
    #[inline]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Live { span, .. } => f.debug_tuple("WorkflowSpan").field(span).finish(),
            Kind::StandIn(stand_in) => f.debug_tuple("WorkflowSpan").field(stand_in).finish(),
        }
    }
}

/// What is still to be learnt from a span that has started, and what is known of it.
struct Watch {
    core: Arc<Core>,
    /// The hash of its instance's id, by which memory finds that; `None` while nobody has named it.
    instance: Option<u64>,
    memo: Option<Box<Memo>>,
    /// Its attributes are read whether it records or not.
    observes: bool,
}

/// What only some spans have to remember.
#[derive(Default)]
struct Memo {
    /// Where the hash does not do: for a run, or for a backend.
    identity: Option<Identity>,
    /// It has not named its instance itself. If it is known all the same it is its first child's.
    unnamed: Option<Box<Unnamed>>,
    /// Where it was recorded, and a backend may still say that another process was first.
    overruled: Option<Overruled>,
    /// Nanoseconds that the span was entered while its start was held back.
    held: i64,
}

/// A span that has not named its instance.
#[derive(Default)]
struct Unnamed {
    run_id: Option<Box<str>>,
    recorder: Recorder,
}

impl Memo {
    #[inline(never)]
    fn new(names: Option<Names<'_>>, unnamed: Option<Box<Unnamed>>) -> Box<Self> {
        Box::new(Self {
            identity: names.map(Names::to_identity),
            unnamed,
            ..Self::default()
        })
    }

    /// The id that was given to a span without one of its own.
    fn adopted_id(&self) -> Option<String> {
        let (Some(identity), Some(_)) = (&self.identity, &self.unnamed) else {
            return None;
        };
        Some(identity.instance_id.to_string())
    }
}

impl Watch {
    #[cold]
    fn memo(&mut self) -> &mut Memo {
        self.memo.get_or_insert_default()
    }

    fn expect(&mut self, overruled: Option<Overruled>) {
        if overruled.is_some() {
            self.memo().overruled = overruled;
        }
    }

    /// Whether an attribute may be one to be observed.
    #[inline]
    fn wants(&self, attribute: &KeyValue) -> bool {
        let name = attribute.key.as_str();
        self.core.fields.may_mean(name) || name.len() == deferral::HELD.len() || self.memo.is_some()
    }

    /// `false` where the attribute is not for the span itself.
    fn observe<S: Span>(&mut self, span: &mut S, attribute: &mut KeyValue) -> bool {
        if let Some(held) = deferral::held_time(attribute) {
            let memo = self.memo();
            memo.held = memo.held.saturating_add(held);
            return false;
        }
        if let Some(memo) = &self.memo {
            deferral::correct_timing(attribute, memo.held);
        }
        if self.core.fields.may_mean(attribute.key.as_str()) {
            self.read(span, attribute);
        }
        true
    }

    #[inline(never)]
    fn read<S: Span>(&mut self, span: &mut S, attribute: &KeyValue) {
        let core = self.core.clone();
        let tag = core.tag_of(std::slice::from_ref(attribute));
        // The first id counts; one that a span was only adopted into gives way to its own.
        let memo = self.memo.as_mut().filter(|memo| memo.unnamed.is_some());
        match (memo, tag.names(), &tag.run_id) {
            (Some(memo), Some(names), _) => {
                let unnamed = memo.unnamed.take().unwrap_or_default();
                let hash = core.memory.hash(names.instance_id);
                if self.instance != Some(hash) {
                    let run_id = unnamed.run_id.as_deref();
                    self.join_late(span, hash, Names { run_id, ..names }, unnamed.recorder);
                }
            }
            (Some(memo), None, Some(run_id)) => {
                if let Some(unnamed) = &mut memo.unnamed {
                    unnamed.run_id = Some((**run_id).into());
                }
            }
            _ => {}
        }
        self.complete_if(tag.terminal);
    }

    fn observe_event(&self, attributes: &[KeyValue]) {
        self.complete_if(self.core.fields.tag_of(attributes).terminal);
    }

    fn complete_if(&self, terminal: bool) {
        let identity = self.memo.as_ref().and_then(|memo| memo.identity.as_ref());
        match (terminal, identity, self.instance) {
            (false, ..) | (_, _, None) => {}
            (true, Some(identity), _) => self.core.complete(identity),
            (true, None, Some(instance)) => {
                self.core.memory.complete_hashed(instance);
            }
        }
    }

    /// The parent can no longer change: a link, or the span is the first of its instance.
    fn join_late<S: Span>(
        &mut self,
        span: &mut S,
        hash: u64,
        names: Names<'_>,
        recorder: Recorder,
    ) {
        let core = &self.core;
        let Names {
            instance_id: id,
            run_id,
            ..
        } = names;
        core.counters.late.add();
        core.prepare(id, run_id);
        let stored = core.memory.look_up(hash, id, run_id, |instance| {
            instance
                .and_then(|i| i.run(run_id))
                .map(|run| run.context())
        });
        let context = span.span_context();
        let own = WorkflowContext::of_span(context, core.clock.now());
        let name = recorder.span_name.clone();
        let mut overruled = None;
        let stored = stored.or_else(|| {
            let recorded = core.record(id, run_id, None, own?, recorder);
            recorded.map(|may_be| overruled = may_be).err()
        });
        let continuation = core.policy.of(Relation::Late);
        let outcome = match stored {
            Some(_) => Outcome::Related(Relation::Late, continuation),
            None => Outcome::Recorded,
        };
        core.decided(hash, name, context, &SpanContext::NONE, outcome);
        if let (Some(stored), Continuation::Link) = (stored, continuation) {
            link_unless_in_trace(span, &stored);
        }
        self.instance = Some(hash);
        self.memo().identity = Some(names.to_identity());
        self.expect(overruled);
    }

    fn end<S: Span>(&mut self, span: &mut S) {
        self.observes = false;
        let overruled = self.memo.as_ref().and_then(|memo| memo.overruled.as_ref());
        if let Some(winner) = overruled.and_then(|winner| winner.get()) {
            link_unless_in_trace(span, winner);
        }
    }
}

/// What is opened past a replay attaches to the recorded span; where nothing is recorded, to nothing.
fn past_replay(parent: &Context) -> Cow<'_, Context> {
    if parent.span().span_context().is_valid() {
        Cow::Borrowed(parent)
    } else {
        Cow::Owned(without_span(parent))
    }
}

/// Only without a span, not with an invalid one, does a sampler that heeds parents take the new one for a root.
fn without_span(parent: &Context) -> Context {
    let baggage = parent.baggage();
    if baggage.is_empty() {
        Context::new()
    } else {
        let entries = baggage.iter().map(|(key, (value, metadata))| {
            KeyValueMetadata::new(key.clone(), value.clone(), metadata.clone())
        });
        Context::new().with_baggage(entries)
    }
}

fn link_unless_in_trace<S: Span>(span: &mut S, stored: &WorkflowContext) {
    if span.span_context().trace_id() != stored.trace_id() {
        span.add_link(
            stored.to_span_context(),
            vec![relation_attribute(Relation::Late)],
        );
    }
}

fn relation_attribute(relation: Relation) -> KeyValue {
    KeyValue::new(fields::RELATION, relation.as_str())
}
