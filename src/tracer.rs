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
use crate::fields::{self, Identity, Tag};
use crate::placement::{Arrival, Parent, Placement};
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

/// What is rare is boxed, so that an ordinary span is hardly larger than the inner one: it is moved several times.
enum Kind<S> {
    Plain(S),
    Watched(Box<Watched<S>>),
    StandIn(Box<StandIn>),
}

/// A span on which what is recorded later may still concern its instance.
struct Watched<S> {
    span: S,
    watch: Watch,
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
        let mut builder = self.inner.span_builder(name);
        if self.origin == Origin::Layer && MARKED.get() {
            mark(&mut builder);
            // The parent has started by now: what is opened while the fields are printed is nobody's child yet.
            deferral::end_adoption();
        }
        builder
    }

    #[inline]
    fn build_with_context(&self, builder: SpanBuilder, parent: &Context) -> Self::Span {
        if self.origin == Origin::Api || is_marked(&builder) {
            self.build_marked(builder, parent)
        } else if self.core.stand_ins.are_none() {
            WorkflowSpan(Kind::Plain(self.inner.build_with_context(builder, parent)))
        } else {
            self.build_where_some_replay(builder, parent)
        }
    }
}

impl<T> WorkflowTracer<T>
where
    T: Tracer,
{
    /// An ordinary span, which may be beneath a replayed one.
    #[inline(never)]
    fn build_where_some_replay(
        &self,
        builder: SpanBuilder,
        parent: &Context,
    ) -> WorkflowSpan<T::Span> {
        match Replay::beneath(&self.core, parent) {
            Some(replay) if !replay.is_over() => self.stand_in(None, replay, builder, parent),
            Some(_) => {
                let parent = past_replay(parent);
                WorkflowSpan(Kind::Plain(self.inner.build_with_context(builder, &parent)))
            }
            None => WorkflowSpan(Kind::Plain(self.inner.build_with_context(builder, parent))),
        }
    }

    #[inline(never)]
    fn build_marked(&self, mut builder: SpanBuilder, parent: &Context) -> WorkflowSpan<T::Span> {
        let core = &self.core;
        let adopted = match self.origin {
            Origin::Layer => deferral::take_adoption(core),
            Origin::Api => None,
        };
        if parent.is_telemetry_suppressed() {
            return WorkflowSpan(Kind::Plain(self.inner.build_with_context(builder, parent)));
        }
        let tag = core.tag_of(builder.attributes.as_deref().unwrap_or_default());
        let events = builder.events.as_deref().unwrap_or_default();
        let terminal = tag.terminal || core.fields.any_terminal(events);
        let beneath = Replay::beneath(core, parent);
        let past_replay = beneath.as_ref().map(|_| past_replay(parent));
        let replay = match tag.replaying {
            Some(replaying) => replaying.then(Replay::default),
            None => beneath.filter(|replay| !replay.is_over()),
        };
        let own = identity_of(&tag);
        let run_id = tag.run_id.as_deref().map(Box::from);
        if let Some(replay) = replay {
            let stand_in = self.stand_in(own.or(adopted), replay, builder, parent);
            if let (true, Kind::StandIn(stand_in)) = (terminal, &stand_in.0) {
                stand_in.complete();
            }
            return stand_in;
        }
        let parent = past_replay.as_deref().unwrap_or(parent);
        if let (None, Some(adopted)) = (&own, &adopted) {
            core.counters.adopted.add();
            let name = core.fields.primary_instance_id();
            let id = KeyValue::new(name, adopted.instance_id.to_string());
            builder.attributes.get_or_insert_default().push(id);
        }
        let adopted_only = own.is_none();
        // Asked for only where the span may yet be recorded late: it costs a string.
        let recorder = match adopted_only {
            true => Recorder::of(&builder),
            false => Recorder::default(),
        };
        let Some(identity) = own.or(adopted) else {
            let span = self.inner.build_with_context(builder, parent);
            return self.watched(
                span,
                Known {
                    run_id,
                    recorder,
                    ..Known::default()
                },
            );
        };
        let (span, overruled) = self.place(builder, parent, past_replay.is_some(), &identity);
        if terminal {
            core.complete(&identity);
        }
        let identity = Some(identity);
        self.watched(
            span,
            Known {
                identity,
                adopted: adopted_only,
                overruled,
                recorder,
                run_id: None,
            },
        )
    }

    fn place(
        &self,
        mut builder: SpanBuilder,
        parent: &Context,
        in_replay: bool,
        identity: &Identity,
    ) -> (T::Span, Option<Overruled>) {
        let natural = parent.span();
        let natural = Some(natural.span_context()).filter(|natural| natural.is_valid());
        let arrival = Arrival {
            instance_id: &identity.instance_id,
            run_id: identity.run_id.as_deref(),
            parent_instance_id: identity.parent_instance_id.as_deref(),
            natural,
            in_replay,
        };
        let placement = Placement::of(arrival, &self.core);
        let attributes = builder.attributes.get_or_insert_default();
        if let Some(context) = &placement.resumed {
            let age = self
                .core
                .clock
                .now()
                .duration_since(context.recorded_at())
                .unwrap_or_default();
            attributes.push(KeyValue::new(fields::RESUMED, true));
            attributes.push(KeyValue::new(RESUMED_AFTER, age.as_secs_f64()));
        }
        if let Some(generation) = placement
            .record
            .as_ref()
            .and_then(|record| record.generation())
        {
            attributes.push(KeyValue::new(GENERATION, i64::from(generation)));
        }
        if let Some((target, relation)) = placement.link {
            let link = Link::new(target, vec![relation_attribute(relation)], 0);
            builder.links.get_or_insert_default().push(link);
        }
        let chosen = match placement.parent {
            Parent::Natural => None,
            Parent::None => Some(without_span(parent)),
            Parent::Stored(stored) => {
                Some(parent.with_remote_span_context(stored.to_span_context()))
            }
        };
        let name = builder.name.clone();
        let recorder = placement.record.as_ref().map(|_| Recorder::of(&builder));
        let mut span = self
            .inner
            .build_with_context(builder, chosen.as_ref().unwrap_or(parent));
        let mut outcome = placement.outcome;
        let mut overruled = None;
        if let (Some(recording), Some(recorder)) = (placement.record, recorder) {
            let context = WorkflowContext::of_span(span.span_context(), self.core.clock.now());
            match context.map(|context| recording.finish(context, recorder)) {
                Some(Err(winner)) => {
                    link_unless_in_trace(&mut span, &winner);
                    outcome = Outcome::LostRace;
                }
                Some(Ok(may_be)) => overruled = may_be,
                None => {}
            }
        }
        self.core
            .decided(identity, name, span.span_context(), natural, outcome);
        (span, overruled)
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

    fn watched(&self, span: T::Span, known: Known) -> WorkflowSpan<T::Span> {
        let observes = self.origin == Origin::Layer && span.span_context().is_valid();
        let watch = Watch {
            core: self.core.clone(),
            known,
            held: 0,
            observes,
        };
        WorkflowSpan(Kind::Watched(Box::new(Watched { span, watch })))
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
            Kind::Plain(span) => Some(span),
            Kind::Watched(watched) => Some(&mut watched.span),
            Kind::StandIn(_) => None,
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
            Kind::Plain(span) => span.add_event_with_timestamp(name, timestamp, attributes),
            Kind::Watched(watched) => {
                let Watched { span, watch } = &mut **watched;
                watch.observe_event(&attributes);
                span.add_event_with_timestamp(name, timestamp, attributes);
            }
            Kind::StandIn(stand_in) => stand_in.observe_event(&attributes),
        }
    }

    #[inline]
    fn span_context(&self) -> &SpanContext {
        match &self.0 {
            Kind::Plain(span) => span.span_context(),
            Kind::Watched(watched) => watched.span.span_context(),
            Kind::StandIn(stand_in) => stand_in.context(),
        }
    }

    /// `true` also for an unsampled span of the layer whose reserved fields are still read: those are kept,
    /// and OpenTelemetry hands attributes to recording spans only.
    #[inline]
    fn is_recording(&self) -> bool {
        match &self.0 {
            Kind::Plain(span) => span.is_recording(),
            Kind::Watched(watched) => watched.span.is_recording() || watched.watch.observes,
            Kind::StandIn(stand_in) => stand_in.is_recording(),
        }
    }

    #[inline]
    fn set_attribute(&mut self, attribute: KeyValue) {
        match &mut self.0 {
            Kind::Plain(span) => span.set_attribute(attribute),
            Kind::Watched(watched) => {
                let Watched { span, watch } = &mut **watched;
                if let Some(attribute) = watch.observe(span, attribute) {
                    span.set_attribute(attribute);
                }
            }
            Kind::StandIn(stand_in) => stand_in.observe(&attribute),
        }
    }

    #[inline]
    fn set_attributes(&mut self, attributes: impl IntoIterator<Item = KeyValue>) {
        match &mut self.0 {
            Kind::Plain(span) => span.set_attributes(attributes),
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
            Kind::Plain(span) if !replay::any() => span.end_with_timestamp(timestamp),
            Kind::Plain(span) => replay::without_asking(|| span.end_with_timestamp(timestamp)),
            Kind::Watched(watched) => {
                let Watched { span, watch } = &mut **watched;
                watch.observes = false;
                if let Some(winner) = watch
                    .known
                    .overruled
                    .as_ref()
                    .and_then(|winner| winner.get())
                {
                    link_unless_in_trace(span, winner);
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
            Kind::Plain(span) => f.debug_tuple("WorkflowSpan").field(span).finish(),
            Kind::Watched(watched) => f.debug_tuple("WorkflowSpan").field(&watched.span).finish(),
            Kind::StandIn(stand_in) => f.debug_tuple("WorkflowSpan").field(stand_in).finish(),
        }
    }
}

/// What is still to be learnt from a span that has started.
struct Watch {
    core: Arc<Core>,
    known: Known,
    /// Nanoseconds that the span was entered while its start was held back.
    held: i64,
    /// Its attributes are read whether it records or not.
    observes: bool,
}

#[derive(Default)]
struct Known {
    /// `None` while nobody has named the instance.
    identity: Option<Identity>,
    /// It is its first child's.
    adopted: bool,
    /// A run whose instance is not known yet.
    run_id: Option<Box<str>>,
    /// Where it was recorded, and a backend may still say that another process was first.
    overruled: Option<Overruled>,
    recorder: Recorder,
}

impl Watch {
    /// Answers what is left for the span itself.
    fn observe<S: Span>(&mut self, span: &mut S, mut attribute: KeyValue) -> Option<KeyValue> {
        if deferral::correct_timing(&mut attribute, &mut self.held) {
            return Some(attribute).filter(|a| a.key.as_str() != deferral::HELD);
        }
        let tag = self.core.tag_of(std::slice::from_ref(&attribute));
        if let Some(identity) = identity_of(&tag) {
            let known = self.known.identity.as_ref().map(|known| &known.instance_id);
            // The first id counts; one that a span was only adopted into gives way to its own.
            if known.is_none() || self.known.adopted {
                let is_new = known != Some(&identity.instance_id);
                self.known.adopted = false;
                if is_new {
                    let run_id = self.known.run_id.take();
                    self.join_late(span, Identity { run_id, ..identity });
                }
            }
        } else if let Some(run_id) = &tag.run_id {
            self.known.run_id = Some((**run_id).into());
        }
        self.complete_if(tag.terminal);
        Some(attribute)
    }

    fn observe_event(&self, attributes: &[KeyValue]) {
        self.complete_if(self.core.fields.tag_of(attributes).terminal);
    }

    fn complete_if(&self, terminal: bool) {
        if let (true, Some(identity)) = (terminal, &self.known.identity) {
            self.core.complete(identity);
        }
    }

    /// The parent can no longer change: a link, or the span is the first of its instance.
    fn join_late<S: Span>(&mut self, span: &mut S, identity: Identity) {
        let core = &self.core;
        let (id, run_id) = (&*identity.instance_id, identity.run_id.as_deref());
        core.counters.late.add();
        core.prepare(id, run_id);
        let stored = core.look(id, |instance| {
            instance
                .and_then(|i| i.run(run_id))
                .map(|run| run.context.clone())
        });
        let context = span.span_context();
        let own = WorkflowContext::of_span(context, core.clock.now());
        let stored = stored.or_else(|| {
            let recorded = core.record(id, run_id, None, own?, self.known.recorder.clone());
            recorded
                .map(|overruled| self.known.overruled = overruled)
                .err()
        });
        let continuation = core.policy.of(Relation::Late);
        let outcome = match stored {
            Some(_) => Outcome::Related(Relation::Late, continuation),
            None => Outcome::Recorded,
        };
        let name = self.known.recorder.span_name.clone();
        core.decided(&identity, name, context, None, outcome);
        if let (Some(stored), Continuation::Link) = (stored, continuation) {
            link_unless_in_trace(span, &stored);
        }
        self.known.identity = Some(identity);
    }
}

fn identity_of(tag: &Tag<'_>) -> Option<Identity> {
    Some(Identity {
        instance_id: tag.instance_id.as_deref()?.into(),
        run_id: tag.run_id.as_deref().map(Box::from),
        parent_instance_id: tag.parent_instance_id.as_deref().map(Box::from),
    })
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
