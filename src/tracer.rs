//! The tracer: where a span starts. Its parent is [decided](crate::decision), links are added, its context is recorded.

pub(crate) mod handoff;
pub(crate) mod held_parents;
pub(crate) mod layers;
pub(crate) mod live_ids;
mod lost;
mod mark;
mod provider;
mod recording;
pub(crate) mod replay;
pub(crate) mod replays;
pub(crate) mod rooted;
pub(crate) mod shared_traces;
mod span;
mod special;
mod watch;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::baggage::{BaggageExt as _, KeyValueMetadata};
use opentelemetry::trace::{
    Link, Span as _, SpanBuilder, SpanContext, TraceContextExt as _, Tracer,
};
use opentelemetry::{Context, KeyValue};

pub use self::provider::WorkflowTracerProvider;
pub use self::span::WorkflowSpan;

use self::handoff::{Adoption, Mark, Marking};
use self::mark::{is_marked, mark, mark_with, take_mark};
use self::recording::Recording;
use self::rooted::enter_root;
use self::watch::{Joined, Memo, Unnamed, Watch, link_unless_in_trace, relation_attribute};
use crate::cache::Key;
use crate::cache::entry::Entry;
use crate::context::WorkflowContext;
use crate::decision::relation::Relation;
use crate::decision::{Arrival, Decision, Links, Moment, Parent, Record, decide};
use crate::explain::trail::{Event, Outcome};
use crate::fields::identity::{Identity, Names};
use crate::fields::value::EndStatus;
use crate::fields::{self, Scope};
use crate::storage::shared::Shared;

/// Seconds from the recording of a context to its first use in another process.
const RESUMED_AFTER: &str = "workflow.resumed_after";

/// How long a span waits for another thread that is opening the next trace of its instance. After that it stays in the
/// old one: telemetry never waits without a bound.
const ROLL_PATIENCE: Duration = Duration::from_millis(1);

/// A tracer that starts the spans of a workflow instance in the instance's trace.
///
/// It decorates any other tracer and is made by [`WorkflowContextStorage::tracer`]; the layer has one of its
/// own. A span whose attributes at its start name no instance is left as it is.
///
/// [`WorkflowContextStorage::tracer`]: crate::WorkflowContextStorage::tracer
pub struct WorkflowTracer<T> {
    inner: Arc<T>,
    shared: Arc<Shared>,
    origin: Origin,
}

/// Where the spans of a tracer come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// The layer, which has looked at each span's callsite, and marked the builders of those that matter.
    Layer,
    /// The OpenTelemetry API: any span may matter.
    Api,
}

impl<T> WorkflowTracer<T> {
    pub(crate) fn for_layer(inner: Arc<T>, shared: Arc<Shared>) -> Self {
        Self {
            inner,
            shared,
            origin: Origin::Layer,
        }
    }

    pub(crate) fn for_api(inner: Arc<T>, shared: Arc<Shared>) -> Self {
        Self {
            inner,
            shared,
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
        match handoff::marks() {
            Marking::No => self.inner.span_builder(name),
            marking => self.marked_builder(name.into(), marking),
        }
    }

    #[inline]
    fn build_with_context(&self, builder: SpanBuilder, parent: &Context) -> Self::Span {
        let is_marked = self.origin == Origin::Api || is_marked(&builder);
        if is_marked || !self.shared.stand_ins.is_empty() {
            self.build_other(builder, parent, is_marked)
        } else {
            self.build_ordinary(builder, parent)
        }
    }
}

/// The part of a start beside the placement.
struct Plan<'a> {
    /// The hash of the instance's id.
    instance: u64,
    /// The rank of the field that named it.
    rank: u16,
    /// Set if the hash is not enough.
    identity: Option<Box<Identity>>,
    memo: Option<Box<Memo>>,
    /// Boxed, since most spans are not recorded.
    recording: Option<Box<Recording<'a>>>,
    /// A reserved field may still be recorded on the span.
    awaits: bool,
    /// On whose spans the names count that may still be recorded.
    scope: Scope,
    /// The terminal status that the span has from the start.
    told_end: Option<EndStatus>,
}

impl<T> WorkflowTracer<T>
where
    T: Tracer,
{
    #[inline]
    fn marked_builder(&self, name: Cow<'static, str>, marking: Marking) -> SpanBuilder {
        let mut builder = self.inner.span_builder(name);
        if self.origin == Origin::Layer {
            // The parent has started by now: a span opened while the fields are formatted must not be adopted.
            handoff::end_adoption();
            match marking {
                Marking::With(mark) => mark_with(&mut builder, mark),
                Marking::Plain | Marking::No => {
                    mark(&mut builder);
                }
            }
        }
        builder
    }

    #[inline]
    fn build_ordinary(&self, builder: SpanBuilder, parent: &Context) -> WorkflowSpan<T::Span> {
        WorkflowSpan::start(&*self.inner, builder, parent, &self.shared)
    }

    /// A span that may name its instance, or be beneath a replayed one. One function for both keeps the way of ordinary spans
    /// short: each call copies the builder.
    #[inline(never)]
    fn build_other(
        &self,
        mut builder: SpanBuilder,
        parent: &Context,
        is_marked: bool,
    ) -> WorkflowSpan<T::Span> {
        if !is_marked {
            return self.build_beneath_replay(builder, parent, Mark::NONE);
        }
        #[cfg(test)]
        tests::MARKED.set(tests::MARKED.get() + 1);
        match (self.origin, take_mark(&mut builder)) {
            (Origin::Layer, None) => self.build_tagged(builder, parent, None, Mark::NONE),
            (Origin::Layer, Some(mark)) => self.build_carrying(builder, parent, mark),
            (Origin::Api, _) => self.build_api(builder, parent),
        }
    }

    /// A span that most probably names its instance, and nothing else. Inlined twice, since nearly all spans carry no mark:
    /// that saves 40 instructions of a hit.
    #[inline(always)]
    fn build_tagged(
        &self,
        builder: SpanBuilder,
        parent: &Context,
        adopted: Option<Adoption>,
        mark: Mark,
    ) -> WorkflowSpan<T::Span> {
        let shared = &self.shared;
        let is_special = adopted.is_some()
            || mark.may_be_replayed
            || builder.events.is_some()
            || !shared.stand_ins.is_empty()
            || (mark.awaits && shared.fields.has_scopes())
            || parent.is_telemetry_suppressed();
        let attributes = builder.attributes.as_deref().unwrap_or_default();
        if is_special {
            return self.build_special(builder, parent, adopted, mark);
        }
        match shared.fields.only_id(attributes) {
            // Fast path: only the instance id is present.
            Some((id, rank)) => {
                let names = Names::from_id(&id);
                let key = shared.key(names.instance_id, names.run_id);
                let decision = self.place(key, None, parent, Moment::Start);
                self.diagnose(&decision, parent);
                let mut plan = self.plan(&builder, key, rank, names, None, &decision);
                plan.awaits = mark.awaits;
                self.start(builder, parent, &decision, plan)
            }
            None => self.build_with_run(builder, parent, mark),
        }
    }

    /// A span that most probably names its instance and its run, and nothing else.
    #[inline(never)]
    fn build_with_run(
        &self,
        builder: SpanBuilder,
        parent: &Context,
        mark: Mark,
    ) -> WorkflowSpan<T::Span> {
        let attributes = builder.attributes.as_deref().unwrap_or_default();
        match self.shared.fields.only_ids(attributes) {
            Some(ids) => {
                let names = ids.names();
                let key = self.shared.key(names.instance_id, names.run_id);
                let decision = self.place(key, None, parent, Moment::Start);
                self.diagnose(&decision, parent);
                let mut plan = self.plan(&builder, key, ids.rank, names, None, &decision);
                plan.awaits = mark.awaits;
                self.start(builder, parent, &decision, plan)
            }
            None => self.build_special(builder, parent, None, mark),
        }
    }

    /// Looks the instance up and decides where the span starts.
    #[inline]
    fn place(
        &self,
        key: Key<'_>,
        parent_instance_id: Option<&str>,
        parent: &Context,
        moment: Moment,
    ) -> Decision {
        let shared = &*self.shared;
        let natural = parent.span();
        let arrival = Arrival {
            moment,
            run_id: key.run_id,
            natural: Some(natural.span_context()).filter(|natural| natural.is_valid()),
            is_polled: !shared.poller_traces.is_empty()
                && (shared.poller_traces).contains(natural.span_context().trace_id()),
            parent_instance: None,
            stops_waiting: false,
        };
        // Read before the shard is locked: a clock may be anybody's code.
        let now = (shared.policy.bounds.max_age).map(|_| shared.clock.now());
        let decision = look_up_and_decide(shared, key, &arrival, now);
        if decision.wait || (decision.is_first() && parent_instance_id.is_some()) {
            return decide_again(shared, key, parent_instance_id, arrival, decision, now);
        }
        decision
    }

    /// Inlined by force: the values of nearly all plans are known where they are made, which saves 60 instructions of a hit.
    #[inline(always)]
    fn plan(
        &self,
        builder: &SpanBuilder,
        key: Key<'_>,
        rank: u16,
        names: Names<'_>,
        unnamed: Option<Box<Unnamed>>,
        decision: &Decision,
    ) -> Plan<'_> {
        let shared = &*self.shared;
        let keeps_identity = shared.keeps_identities || unnamed.is_some() || names.run_id.is_some();
        let completes = keeps_identity && shared.fields.is_completing(builder);
        let has_memo = completes || unnamed.is_some();
        Plan {
            instance: key.hash,
            rank,
            identity: keeps_identity.then(|| names.to_boxed_identity()),
            memo: has_memo.then(|| Memo::new(unnamed, completes)),
            recording: (decision.record != Record::No)
                .then(|| Recording::new(&self.shared, builder, key, decision)),
            awaits: false,
            scope: Scope::NONE,
            told_end: None,
        }
    }

    /// Counts a first span in its natural parent's trace: many of them are a sign that this is a poller's.
    #[inline]
    fn diagnose(&self, decision: &Decision, parent: &Context) {
        if decision.is_first() && decision.parent == Parent::Natural {
            self.count_in_trace(parent);
        }
    }

    #[inline(never)]
    fn count_in_trace(&self, parent: &Context) {
        let natural = parent.span();
        let trace = natural.span_context().trace_id();
        if !natural.span_context().is_valid() {
            return;
        }
        // A child workflow without a parent id, opened directly in a span of its parent.
        let is_child = handoff::ask_whether_tagged(|| {
            natural.is_recording();
        });
        if !is_child && self.shared.shared_traces.add(trace) {
            self.shared.counters.shared_traces.add();
            let span = natural.span_context().span_id();
            let outermost = shared_traces::outermost_span();
            self.shared.warnings.shared_trace(trace, span, outermost);
        }
    }

    /// Starts the span as decided, and records it.
    ///
    /// Not inlined: the arguments would be copied, and the span be made somewhere else than where it is to be.
    #[inline(never)]
    fn start(
        &self,
        mut builder: SpanBuilder,
        parent: &Context,
        decision: &Decision,
        plan: Plan<'_>,
    ) -> WorkflowSpan<T::Span> {
        let shared = &self.shared;
        let Plan {
            instance,
            rank,
            identity,
            memo,
            mut recording,
            awaits,
            scope,
            told_end,
        } = plan;
        let natural = parent.span();
        let natural = natural.span_context();
        let mut added_links = 0;
        let is_generation = matches!(decision.record, Record::Generation(_));
        if decision.links != Links::default() || is_generation || decision.announce {
            added_links = self.annotate(&mut builder, decision, natural);
        }
        let unnamed = memo.as_ref().and_then(|memo| memo.unnamed());
        if let Some((unnamed, joined)) = unnamed.zip(identity.as_deref()) {
            shared.counters.adopted.add();
            if let Some(id) = unnamed.id_to_give_at_start(&shared.fields, joined) {
                builder.attributes.get_or_insert_default().push(id);
            }
        }
        let chosen = match (decision.parent, &decision.stored) {
            (Parent::Natural, _) => None,
            (Parent::Stored, Some(stored)) => {
                Some(parent.with_remote_span_context(stored.to_span_context()))
            }
            (Parent::Nothing | Parent::Stored, _) => Some(without_span(parent)),
        };
        let name = builder.name.clone();
        let parent = chosen.as_ref().unwrap_or(parent);
        let rooted = shared.roots.is_some().then(|| {
            let (tracer, recording) = (&*self.inner, &mut recording);
            enter_root(
                tracer,
                shared,
                &mut builder,
                added_links,
                identity.as_deref(),
                recording,
                parent,
            )
        });
        let beneath_root = rooted.as_ref().and_then(|rooted| rooted.parent.as_ref());
        let parent = beneath_root.unwrap_or(parent);
        let mut started = WorkflowSpan::start(&*self.inner, builder, parent, shared);
        let joined = identity.map_or(Joined::Hash(instance), Joined::Identity);
        let watch = || Watch::new(shared, joined, rank, memo, awaits, scope);
        if let Some((span, watch)) = started.watch(watch) {
            let mut outcome = match recording {
                None => decision.outcome,
                Some(recording) => self
                    .record(span, watch, *recording, parent)
                    .unwrap_or(decision.outcome),
            };
            if let Some(rooted) = rooted {
                outcome = rooted.outcome.unwrap_or(outcome);
                watch.enter_root(*rooted);
            }
            let (own, after_end) = (span.span_context(), decision.after_end);
            shared.note_decision(instance, name, own, natural, outcome, after_end);
            watch.complete_if(told_end);
        }
        started
    }

    /// Records a started span. Returns what became of it, if that is not what was decided.
    #[inline(never)]
    fn record(
        &self,
        span: &mut T::Span,
        watch: &mut Watch,
        recording: Recording<'_>,
        parent: &Context,
    ) -> Option<Outcome> {
        let now = self.shared.clock.now();
        let mut context = WorkflowContext::from_span(span.span_context(), now)?;
        context.take_whole_state_of(parent);
        match recording.finish(context, None) {
            Ok(late_winner) => {
                watch.expect_late_winner(late_winner);
                None
            }
            Err(winner) => {
                link_unless_in_trace(span, &winner, Relation::Late);
                Some(Outcome::LostRace)
            }
        }
    }

    /// Adds the links and the attributes of a span that does not simply continue its instance's trace. Returns the number of
    /// links.
    #[inline(never)]
    fn annotate(
        &self,
        builder: &mut SpanBuilder,
        decision: &Decision,
        natural: &SpanContext,
    ) -> usize {
        let stored = decision.stored.as_ref();
        let attributes = builder.attributes.get_or_insert_default();
        if let Some(stored) = stored.filter(|_| decision.announce) {
            let age = self.shared.clock.now().duration_since(stored.recorded_at());
            attributes.push(KeyValue::new(fields::RESUMED, true));
            let age = age.unwrap_or_default().as_secs_f64();
            attributes.push(KeyValue::new(RESUMED_AFTER, age));
        }
        if let Record::Generation(generation) = decision.record {
            attributes.push(KeyValue::new(fields::GENERATION, i64::from(generation)));
        }
        let Links {
            to_natural,
            to_stored,
        } = decision.links;
        let to_stored =
            (to_stored.zip(stored)).map(|(why, stored)| (stored.to_span_context(), why));
        let to_natural = to_natural.map(|why| (natural.clone(), why));
        let mut added = 0;
        for (target, why) in to_stored.into_iter().chain(to_natural) {
            let link = Link::new(target, vec![relation_attribute(why)], 0);
            builder.links.get_or_insert_default().push(link);
            added += 1;
        }
        added
    }
}

impl<T> fmt::Debug for WorkflowTracer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkflowTracer")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

#[inline]
fn look_up_and_decide(
    shared: &Shared,
    key: Key<'_>,
    arrival: &Arrival<'_>,
    now: Option<SystemTime>,
) -> Decision {
    // The closure would copy the whole key.
    let run_id = key.run_id;
    shared.tier.look_up(key, |entry: Option<&Entry>| {
        let decision = decide(arrival, entry, &shared.policy, now);
        if let Some(run) = entry.and_then(|entry| entry.run(run_id)) {
            decision.mark(run);
        }
        decision
    })
}

/// Waits for another thread that opens the next trace; looks up the parent instance of a first span.
#[cold]
fn decide_again(
    shared: &Shared,
    key: Key<'_>,
    parent_instance_id: Option<&str>,
    mut arrival: Arrival<'_>,
    mut decision: Decision,
    now: Option<SystemTime>,
) -> Decision {
    let since = Instant::now();
    while decision.wait {
        thread::yield_now();
        arrival.stops_waiting = since.elapsed() > ROLL_PATIENCE;
        decision = look_up_and_decide(shared, key, &arrival, now);
    }
    if let Some(id) = parent_instance_id.filter(|_| decision.is_first()) {
        let parent_instance = shared.tier.peek_within(id);
        if parent_instance.is_none() {
            shared.note(key.hash, || Event::UnknownParent(id.into()));
        }
        let arrival = Arrival {
            parent_instance: parent_instance.as_ref(),
            ..arrival
        };
        decision = decide(&arrival, None, &shared.policy, now);
    }
    decision
}

/// Only without a span, not with an invalid one, does a parent-based sampler take the new span for a root.
fn without_span(parent: &Context) -> Context {
    with_baggage_of(Context::new(), parent)
}

/// Returns a context with the baggage of another one, if that has any.
pub(crate) fn with_baggage_of(cx: Context, other: &Context) -> Context {
    let baggage = other.baggage();
    if baggage.is_empty() {
        return cx;
    }
    let entries = baggage.iter().map(|(key, (value, metadata))| {
        KeyValueMetadata::new(key.clone(), value.clone(), metadata.clone())
    });
    cx.with_baggage(entries)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing::info_span;
    use tracing_subscriber::prelude::*;

    use crate::WorkflowContextStorage;

    thread_local! {
        /// The spans of this thread whose attributes were read.
        pub(super) static MARKED: Cell<u32> = const { Cell::new(0) };
    }

    /// Fails where another version of tracing-opentelemetry keeps builders or links in another way.
    #[test]
    fn the_attributes_of_ordinary_spans_are_not_read() {
        let provider = SdkTracerProvider::builder().build();
        let storage = WorkflowContextStorage::new();
        let layer = storage.layer(provider.tracer("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let marked = |open: &dyn Fn() -> tracing::Span| {
                let before = MARKED.get();
                open().in_scope(|| ());
                MARKED.get() - before
            };
            assert_eq!(marked(&|| info_span!("ordinary")), 0);
            assert_eq!(marked(&|| info_span!("ordinary", order = 1)), 0);
            let linked = || {
                let span = info_span!("ordinary");
                span.follows_from(info_span!("other").id());
                span
            };
            assert_eq!(marked(&linked), 0, "one link");
            let tagged = || info_span!("tagged", workflow.instance_id = "order-42");
            assert_eq!(marked(&tagged), 1);
            let beneath = || {
                let _tagged = tagged().entered();
                info_span!("ordinary")
            };
            assert_eq!(marked(&beneath), 1, "the tagged one alone");
            let replay = info_span!("replay", workflow.replaying = true).entered();
            assert_eq!(marked(&|| info_span!("ordinary")), 1, "in a replay");
            drop(replay);
            assert!(storage.shared.replays.is_idle());
            assert_eq!(marked(&|| info_span!("ordinary")), 0, "after it");
        });
    }
}
