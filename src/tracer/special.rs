//! The starts of spans that are more than a tagged span with its id: held, adopted, replayed, made by the API, or with
//! further reserved fields.

use std::borrow::Cow;

use opentelemetry::Context;
use opentelemetry::trace::{Span as _, SpanBuilder, SpanContext, TraceContextExt as _, Tracer};

use super::handoff::{self, Adoption, Mark, StorageId};
use super::replay::{self, Beneath, StandIn};
use super::replays::Replay;
use super::span::{Unexported, WorkflowSpan};
use super::watch::{Joined, Memo, Unnamed, Watch};
use super::{Origin, WorkflowTracer, without_span};
use crate::decision::{Decision, Moment};
use crate::explain::author::Author;
use crate::explain::trail::{Event, SpanNote};
use crate::fields::identity::{Identity, Names};
use crate::fields::{Owner, Scope};
use crate::root::ids;

impl<T> WorkflowTracer<T>
where
    T: Tracer,
{
    /// A span of the layer whose builder carries a mark.
    #[inline(never)]
    pub(super) fn build_carrying(
        &self,
        builder: SpanBuilder,
        parent: &Context,
        mark: Mark,
    ) -> WorkflowSpan<T::Span> {
        if mark.is_ordinary {
            return self.build_beneath_replay(builder, parent, mark);
        }
        if !mark.may_be_held {
            return self.build_tagged(builder, parent, None, mark);
        }
        let adopted = handoff::take_adoption(StorageId::new(&self.shared));
        let beneath_held = self.start_noted(mark, parent);
        let parent = beneath_held.as_ref().unwrap_or(parent);
        self.build_tagged(builder, parent, adopted, mark)
    }

    /// A span of the OpenTelemetry API.
    #[inline(never)]
    pub(super) fn build_api(
        &self,
        builder: SpanBuilder,
        parent: &Context,
    ) -> WorkflowSpan<T::Span> {
        if ids::is_asked() {
            // This crate's own, which has gone through a decorated global provider.
            return self.build_ordinary(builder, parent);
        }
        let beneath_held = self.start_held(&builder, parent);
        let parent = beneath_held.as_ref().unwrap_or(parent);
        self.build_tagged(builder, parent, None, Mark::NONE)
    }

    /// An ordinary span, which may be beneath a replayed one.
    #[inline(never)]
    pub(super) fn build_beneath_replay(
        &self,
        mut builder: SpanBuilder,
        parent: &Context,
        mark: Mark,
    ) -> WorkflowSpan<T::Span> {
        match Beneath::find(&self.shared, mark, parent) {
            Some(beneath) if !beneath.replay.is_over() => {
                let natural = beneath.context(parent);
                let stand_in = self.stand_in(None, beneath.replay, builder, &natural, mark);
                WorkflowSpan::unexported(Unexported::StandIn(stand_in))
            }
            beneath => {
                if let Some(beneath) = beneath {
                    beneath.replay.give_events(&mut builder.events);
                }
                self.build_ordinary(builder, &past_stand_in(parent))
            }
        }
    }

    /// Notes the start of a span that may be held, unless the layer starts it. Returns the context beneath its parent if that
    /// was held when the span was created.
    #[inline(never)]
    fn start_noted(&self, mark: Mark, given: &Context) -> Option<Context> {
        if !handoff::is_starting() {
            self.shared.started.add(mark.number);
        }
        self.shared.held_parents.beneath(mark.number, given)
    }

    /// Starts the held spans of this thread, outermost first, for a span of the OpenTelemetry API that opens inside them,
    /// and offers them its instance. Returns the context beneath the innermost of them.
    #[inline(never)]
    fn start_held(&self, builder: &SpanBuilder, given: &Context) -> Option<Context> {
        if !handoff::is_any_held() {
            return None;
        }
        let attributes = builder.attributes.as_deref().unwrap_or_default();
        let owner = Owner::Attributes(attributes);
        let tag = self.shared.fields.tag_of(attributes, owner);
        let identity = tag.names()?.to_identity();
        let ids = |cx: &Context| {
            let span = cx.span();
            (
                span.span_context().trace_id(),
                span.span_context().span_id(),
            )
        };
        // A parent of the caller's own choice is not the current one.
        if Context::map_current(ids) != ids(given) {
            return None;
        }
        let mut innermost = None;
        for (layer, id) in handoff::held_spans() {
            let Some(dispatch) = self.shared.layers.dispatch_of(layer) else {
                continue;
            };
            let offer = Adoption {
                storage: StorageId::new(&self.shared),
                identity: identity.clone(),
                may_name_itself: true,
            };
            let start = || tracing_opentelemetry::get_otel_context(&id, &dispatch);
            let started = handoff::behind_the_layer(|| handoff::adopting(Some(offer), start));
            innermost = started.or(innermost);
        }
        let span = innermost?.span().span_context().clone();
        Some(given.with_remote_span_context(span))
    }

    #[inline(never)]
    pub(super) fn build_special(
        &self,
        mut builder: SpanBuilder,
        parent: &Context,
        adopted: Option<Adoption>,
        mark: Mark,
    ) -> WorkflowSpan<T::Span> {
        let shared = &self.shared;
        if parent.is_telemetry_suppressed() {
            return self.build_ordinary(builder, parent);
        }
        let attributes = builder.attributes.as_deref().unwrap_or_default();
        let owner = Owner::Attributes(attributes);
        let tag = shared.tag_of(attributes, owner);
        let scope = match mark.awaits {
            true => shared.fields.scope_of(owner),
            false => Scope::NONE,
        };
        let may_name_itself = adopted.as_ref().is_some_and(|offer| offer.may_name_itself);
        let is_observing = tag.is_observing();
        let adopted = (adopted.filter(|_| !is_observing)).map(|offer| offer.identity);
        let events = builder.events.as_deref();
        let told_end = (tag.end)
            .or_else(|| shared.fields.end_in(events.unwrap_or_default()))
            .filter(|_| !is_observing);
        let replays_beneath = tag.replaying_children == Some(true);
        // An engine that runs code again in several real spans, one inside the other, has a flag for each.
        let has_own_flag = tag.replaying_children.is_some();
        let beneath = Beneath::find(shared, mark, parent)
            .filter(|beneath| !has_own_flag || !beneath.replay.is_beneath_real());
        let under = (beneath.as_ref()).filter(|beneath| !beneath.replay.is_over());
        let replay = match tag.replaying {
            Some(replaying) => replaying.then(|| Replay::new(&shared.counters)),
            None => under.map(|beneath| beneath.replay.clone()),
        };
        if let Some(replay) = replay {
            let natural = match under {
                Some(beneath) => beneath.context(parent),
                None => parent.span().span_context().clone(),
            };
            let identity = tag.names().map(Names::to_identity).or(adopted);
            let stand_in = self.stand_in(identity, replay, builder, &natural, mark);
            if let Some(status) = told_end {
                stand_in.complete(status);
            }
            return WorkflowSpan::unexported(Unexported::StandIn(stand_in));
        }
        let moment = match &beneath {
            Some(beneath) if beneath.is_by_parent() => Moment::StartAfterReplay,
            _ => Moment::Start,
        };
        // A span that the layer makes is found by its children in `tracing`.
        let is_new_work = self.origin == Origin::Api
            && (beneath.is_some() || replay::is_new_work(shared, parent));
        let parent = match shared.stand_ins.is_empty() {
            true => Cow::Borrowed(parent),
            false => past_stand_in(parent),
        };
        let parent = &*parent;
        let own = tag.names();
        // A span that has not named itself may still do so, and be recorded late.
        let unnamed = own.is_none().then(|| {
            Box::new(Unnamed {
                run_id: tag.run_id.as_deref().map(Box::from),
                parent_instance_id: tag.parent_instance_id.as_deref().map(Box::from),
                owes_id: may_name_itself,
                is_observing,
                author: Author::from_span(&builder),
                told_end,
            })
        });
        if let Some(beneath) = beneath {
            beneath.replay.give_events(&mut builder.events);
        }
        let observed = tag.observed().map(|names| {
            let key = shared.key(names.instance_id, names.run_id);
            (key.hash, self.place(key, None, parent, Moment::Observe))
        });
        let mut started = match own.or(adopted.as_ref().map(Identity::names)) {
            None if is_observing => {
                let memo = Memo::new(unnamed, false);
                self.start_observing(builder, parent, observed, memo, mark)
            }
            None => {
                let is_poller = shared.fields.is_poller(&builder);
                let memo = Memo::new(unnamed, shared.fields.is_completing(&builder));
                let mut started = WorkflowSpan::start(&*self.inner, builder, parent, shared);
                let joined = Joined::Nothing;
                let watch = || Watch::new(shared, joined, u16::MAX, Some(memo), mark.awaits, scope);
                if let Some((span, watch)) = started.watch(watch).filter(|_| is_poller) {
                    watch.set_poller(span.span_context().trace_id());
                }
                started
            }
            Some(names) => {
                let key = shared.key(names.instance_id, names.run_id);
                let decision = self.place(key, names.parent_instance_id, parent, moment);
                if names.parent_instance_id.is_none() {
                    self.diagnose(&decision, parent);
                }
                let rank = tag.rank();
                let mut plan = self.plan(&builder, key, rank, names, unnamed, &decision);
                (plan.awaits, plan.scope, plan.told_end) = (mark.awaits, scope, told_end);
                self.start(builder, parent, &decision, plan)
            }
        };
        if let Some((span, watch)) = started.watched() {
            watch.note_number(mark);
            if is_new_work {
                watch.set_new_work(span.span_context());
            }
            watch.replay_beneath(span.span_context(), replays_beneath);
        }
        started
    }

    /// Starts a span that only looks at an instance: it keeps its parent, and gets a link at most.
    fn start_observing(
        &self,
        mut builder: SpanBuilder,
        parent: &Context,
        observed: Option<(u64, Decision)>,
        memo: Box<Memo>,
        mark: Mark,
    ) -> WorkflowSpan<T::Span> {
        let shared = &self.shared;
        let natural = parent.span().span_context().clone();
        if let Some((_, decision)) = &observed {
            self.annotate(&mut builder, decision, &natural);
        }
        let name = builder.name.clone();
        let mut started = WorkflowSpan::start(&*self.inner, builder, parent, shared);
        let (joined, scope) = (Joined::Nothing, Scope::NONE);
        let watch = || Watch::new(shared, joined, u16::MAX, Some(memo), mark.awaits, scope);
        if let (Some((span, _)), Some((instance, decision))) = (started.watch(watch), observed) {
            let note = SpanNote {
                span_name: name,
                span: span.span_context().into(),
                natural: (&natural).into(),
                outcome: decision.outcome,
                after_end: false,
            };
            shared.note(instance, || Event::Started(note));
        }
        started
    }

    fn stand_in(
        &self,
        identity: Option<Identity>,
        replay: Replay,
        builder: SpanBuilder,
        natural: &SpanContext,
        mark: Mark,
    ) -> StandIn {
        let observes = self.origin == Origin::Layer;
        let stand_in = StandIn::new(
            &self.shared,
            identity,
            replay,
            builder.name,
            natural,
            mark.number,
            observes,
        );
        stand_in.drop_events(builder.events.map_or(0, |events| events.len()));
        stand_in
    }
}

/// Work past a replay attaches to the recorded span; if nothing is recorded, to nothing. Work beneath a lost span attaches to
/// that one's parent.
fn past_stand_in(parent: &Context) -> Cow<'_, Context> {
    if parent.span().span_context().is_valid() {
        Cow::Borrowed(parent)
    } else {
        Cow::Owned(without_span(parent))
    }
}
