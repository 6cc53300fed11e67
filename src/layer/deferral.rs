//! Deferred starts: the state machine of spans that are held until their instance is known.
//!
//! A span starts when it is first entered, and once it has started its parent cannot change. Two kinds of span are
//! entered before anybody knows their instance: those that declare an instance id without a value, and engine spans that
//! never have one. The inner layer is not told that such a span was entered until it is released, outermost first: by
//! its id, by its first child, or by its 129th event. Exits do not release it, since a handler may await before it
//! records its id: what is still held when it closes starts then. `Span::context()` starts it too, behind our back.

use opentelemetry::Context as OtelContext;
use opentelemetry::baggage::BaggageExt as _;
use opentelemetry::trace::{TraceContextExt as _, Tracer};
use tracing::dispatcher::{self, WeakDispatch};
use tracing::{Dispatch, Event, Metadata, Subscriber, span};
use tracing_subscriber::Layer as _;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::WorkflowContextLayer;
use super::pending::{Awaits, Learnt, Pending, WaitsNoMore};
use crate::fields::callsite::{Callsite, Role};
use crate::fields::identity::Identity;
use crate::fields::{Owner, ReservedFields, Scope};
use crate::tracer::handoff::{self, Adoption, HeldSpan, Mark, StartNumber, StorageId};
use crate::tracer::held_parents::inside_held;
use crate::tracer::replay::Numbered;
use crate::tracer::with_baggage_of;

impl<S, T> WorkflowContextLayer<S, T>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    T: Tracer + Send + Sync + 'static,
    T::Span: Send + Sync + 'static,
{
    /// Creates a span that declares a reserved field, may be adopted, or opens inside a held span.
    #[inline(never)]
    pub(super) fn new_span(
        &self,
        callsite: Callsite,
        awaits: ReservedFields,
        attrs: &span::Attributes<'_>,
        id: &span::Id,
        ctx: Context<'_, S>,
    ) {
        let (role, declares) = (callsite.role(), callsite.declares());
        let may_be_held =
            (awaits.has_id() || role == Role::Engine) && !self.shared.fields.is_observing(attrs);
        let nested = self.nested(attrs, &ctx);
        let attrs = nested.as_ref().unwrap_or(attrs);
        let mark = Mark {
            awaits: role != Role::Ordinary
                && (awaits != ReservedFields::NONE || declares.has_replay()),
            ..self.mark(role, may_be_held, declares.has_replay(), attrs, &ctx)
        };
        let number = mark.number;
        let identity = || self.shared.fields.ids_of(attrs).identity();
        let may_wait = may_be_held && (awaits.has_id() || identity().is_none());
        let is_inside_held = may_wait && self.note_held_parent(attrs, number, &ctx);
        // Without activation, and as long as that is unknown, creating a contextual span starts the current one.
        let as_root = (is_inside_held && !self.activation.is_on())
            .then(|| span::Attributes::new_root(attrs.metadata(), attrs.values()));
        let created = as_root.as_ref().unwrap_or(attrs);
        let create = || self.inner.on_new_span(created, id, ctx.clone());
        let create = || match role {
            Role::Ordinary if number == 0 => create(),
            _ => handoff::marking(Some(mark).filter(|mark| *mark != Mark::NONE), create),
        };
        match attrs.parent() {
            // The parent is held on another thread, or was not entered at all: creating a child starts it.
            Some(parent) if !self.pending_spans.holds(parent) => {
                match self.set_free(parent, &ctx) {
                    Some(held) => self.start_held(&held, identity(), &ctx, create),
                    None => create(),
                }
            }
            Some(parent) => {
                if self.pending_spans.holds(parent) {
                    self.release(Some(parent), identity(), &ctx);
                }
                create();
            }
            // Held as its parent is, and released with it.
            None if is_inside_held => inside_held(number, create),
            None if attrs.is_contextual() && handoff::is_any_held() => {
                let identity = identity();
                let attached = OtelContext::current();
                self.release(None, identity.clone(), &ctx);
                // If the parent could not be started by force, the inner layer starts it just now.
                let adoption = self.adoption(identity, true);
                let create = || handoff::adopting(adoption, create);
                // A stand-in is told by the span itself, which that would hide.
                match self.activation.is_on() && self.shared.stand_ins.is_empty() {
                    true => within_released(attached, create),
                    false => create(),
                }
            }
            None => create(),
        }
        if mark.may_be_replayed {
            if let Some(span) = ctx.span(id) {
                let numbered = Numbered::new(&self.shared, number);
                span.extensions_mut().replace(numbered);
            }
        }
        let awaits_what = match role {
            Role::Ordinary | Role::Poller if !mark.may_be_replayed => return,
            Role::Tagged | Role::Engine if may_wait => Awaits::Identity(awaits.to_wait_for()),
            _ if self.activation.is_on() => return,
            // To be replayed or not is decided when it is entered, with activation or without.
            _ => Awaits::Nothing,
        };
        if let Some(span) = ctx.span(id) {
            let pending = Pending::new(awaits_what, number);
            if may_wait && declares.has_more_than_id() {
                pending.note(self.shared.fields.ids_of(attrs));
            }
            span.extensions_mut().replace(pending);
            self.pending_spans.add(id);
        }
    }

    /// Returns the attributes of an engine's span that is created without a parent and belongs into the current span. If that
    /// is another instance's, the span continues its own all the same.
    fn nested<'a>(
        &self,
        attrs: &'a span::Attributes<'a>,
        ctx: &Context<'_, S>,
    ) -> Option<span::Attributes<'a>> {
        let is_nested = attrs.is_root() && self.shared.fields.is_nested(attrs.metadata());
        let current = is_nested.then(|| ctx.lookup_current()).flatten()?.id();
        let (metadata, values) = (attrs.metadata(), attrs.values());
        Some(span::Attributes::child_of(current, metadata, values))
    }

    /// Returns what the builder of a new span carries: a number if it may be held, be beneath a replay, or begin one.
    #[inline]
    fn mark(
        &self,
        role: Role,
        may_be_held: bool,
        declares_replay: bool,
        attrs: &span::Attributes<'_>,
        ctx: &Context<'_, S>,
    ) -> Mark {
        let (beneath, may_be_beneath) = match self.shared.replays.is_idle() {
            true => (0, false),
            false => {
                let beneath = Self::number_of_parent(attrs, ctx);
                (beneath, beneath != 0 || !self.shared.stand_ins.is_empty())
            }
        };
        let may_be_replayed = declares_replay || may_be_beneath;
        if !may_be_held && !may_be_replayed {
            return Mark::NONE;
        }
        Mark {
            number: handoff::next_number(),
            beneath,
            may_be_held,
            may_be_replayed,
            is_ordinary: role == Role::Ordinary,
            awaits: false,
        }
    }

    #[inline(never)]
    fn number_of_parent(attrs: &span::Attributes<'_>, ctx: &Context<'_, S>) -> StartNumber {
        let parent = match attrs.parent() {
            Some(parent) => ctx.span(parent),
            None if attrs.is_contextual() => ctx.lookup_current(),
            None => None,
        };
        let number = parent.and_then(|parent| {
            let extensions = parent.extensions();
            extensions.get::<Numbered>().map(|found| found.number)
        });
        number.unwrap_or(0)
    }

    /// Enters a span that may be pending, or is inside a held span.
    #[inline(never)]
    pub(super) fn enter(&self, id: &span::Id, ctx: Context<'_, S>) {
        if self.dispatch.get().is_none() {
            self.dispatch();
        }
        // If entering starts nothing, the inner layer may be told, for the timings.
        let heard = self.activation.is_off();
        let entered = self.pending(id, &ctx, |pending| {
            // `Span::context()` has started it.
            if self.shared.started.contains(pending.number) {
                pending.set_free();
            }
            pending.enter()
        });
        if let Some((true, true)) = entered {
            self.shared.counters.deferred.add();
        }
        if matches!(entered, Some((true, _))) && self.pending_spans.hold(id, heard) {
            if heard {
                self.inner.on_enter(id, ctx);
            }
            return;
        }
        // Contexts are a stack: held spans beneath must be attached first.
        let identity = self.identity_of_entered(id, &ctx);
        self.release(None, identity, &ctx);
        if entered.is_some() {
            self.activation
                .observe(|| self.inner.on_enter(id, ctx.clone()));
            self.start_if_entering_does_not(id, &ctx);
        } else {
            self.inner.on_enter(id, ctx);
        }
    }

    /// Returns the run of a span that is entered inside held spans of engines, which never name one: what they run belongs
    /// to it, though it was opened elsewhere. Without a run id a span does not know its instance well enough to tell.
    fn identity_of_entered(&self, id: &span::Id, ctx: &Context<'_, S>) -> Option<Identity> {
        let held = self.pending_spans.held();
        let names_itself = |id| self.pending(id, ctx, Pending::may_name_itself) != Some(false);
        if held.is_empty() || held.iter().any(names_itself) {
            return None;
        }
        // An ordinary span names nothing, and must not be started early to be asked.
        let role = self.callsite(ctx.metadata(id)?).role();
        if !matches!(role, Role::Tagged | Role::Engine) {
            return None;
        }
        let storage = StorageId::new(&self.shared);
        let mut identity = None;
        self.with_started(id, ctx, |cx| {
            let ask = || {
                cx.span().is_recording();
            };
            identity = handoff::ask_for_identity(storage, ask);
        });
        identity.filter(|identity| identity.run_id.is_some())
    }

    #[inline(never)]
    pub(super) fn exit(&self, id: &span::Id, ctx: Context<'_, S>) {
        let held = self.pending_spans.take(id);
        let is_told = held.is_none_or(|held| held.is_heard);
        if is_told {
            self.inner.on_exit(id, ctx.clone());
        }
        self.pending(id, &ctx, |pending| pending.leave(is_told));
    }

    #[inline(never)]
    pub(super) fn record(&self, id: &span::Id, values: &span::Record<'_>, ctx: Context<'_, S>) {
        self.inner.on_record(id, values, ctx.clone());
        let owner = ctx
            .metadata(id)
            .map_or(Owner::Scope(Scope::NONE), |metadata| {
                Owner::Target(metadata.target())
            });
        let recorded = self.shared.fields.recorded(owner, values);
        let ids = || (self.shared.fields).ids(owner, |visitor| values.record(visitor));
        let waited = match self.pending(id, &ctx, |pending| pending.learn(recorded)) {
            Some(Learnt::All(waited)) => waited,
            Some(Learnt::Some) if recorded != ReservedFields::NONE => {
                let ids = ids();
                self.pending(id, &ctx, |pending| pending.note(ids));
                return;
            }
            _ => return,
        };
        let number = waited.number;
        // The span itself reads its ids from its attributes; those around it join it.
        let identity = || {
            let Some(mut known) = waited.ids else {
                return ids().identity();
            };
            known.add(ids());
            known.identity()
        };
        let parent = self.shared.held_parents.of(number);
        if parent.is_none() && self.pending_spans.holds_alone(id) {
            // Nothing is around it that could join it.
            self.release(Some(id), None, &ctx);
        } else if self.pending_spans.holds(id) {
            self.release(Some(id), identity(), &ctx);
        } else if let Some(parent) = parent {
            if self.pending_spans.holds(&parent) {
                self.release(Some(&parent), identity(), &ctx);
            } else if let Some(waited) = self.set_free(&parent, &ctx) {
                let start = || self.with_started(&parent, &ctx, |_| ());
                self.start_held(&waited, identity(), &ctx, start);
            }
        }
    }

    /// Counts an event of a held span, which starts undecided before it has more than it may: the inner layer buffers
    /// them without a bound.
    #[inline(never)]
    pub(super) fn count_event(&self, event: &Event<'_>, ctx: &Context<'_, S>) {
        // The span that is current on this thread is held only if it is on this thread's stack. While a span starts it
        // is not, and its extensions are locked.
        let id = match event.parent() {
            Some(parent) => Some(parent.clone()),
            None if event.is_contextual() && handoff::is_any_held() => (ctx.lookup_current())
                .map(|span| span.id())
                .filter(|id| self.pending_spans.holds(id)),
            None => None,
        };
        let Some(id) = id.filter(|id| self.pending_spans.may_be_pending(id)) else {
            return;
        };
        if self.pending(&id, ctx, Pending::has_too_many_events) != Some(true) {
            return;
        }
        if self.pending_spans.holds(&id) {
            self.release(Some(&id), None, ctx);
        } else if self.set_free(&id, ctx).is_some() {
            handoff::starting(|| self.with_started(&id, ctx, |_| ()));
        }
    }

    #[inline(never)]
    pub(super) fn close(&self, id: span::Id, ctx: Context<'_, S>) {
        let pending = self.pending(&id, &ctx, |pending| {
            (pending.set_free(), pending.number, pending.held_times())
        });
        let Some((is_held, number, times)) = pending else {
            self.inner.on_close(id, ctx);
            return;
        };
        self.pending_spans.remove(&id);
        handoff::starting(|| {
            if is_held && times.is_some() {
                self.with_started(&id, &ctx, |_| ());
            }
            // The inner layer was not told of each entry and exit: its times are replaced by those it would have.
            handoff::closing(times, || self.inner.on_close(id, ctx));
        });
        if self.shared.started.contains(number) {
            self.shared.started.remove(number);
        }
        self.shared.held_parents.remove(number);
    }

    /// Tells the inner layer of the held spans, outermost first, up to a span or all of them.
    fn release(&self, up_to: Option<&span::Id>, identity: Option<Identity>, ctx: &Context<'_, S>) {
        while let Some(held) = self.pending_spans.take_outermost() {
            let is_last = |last: &span::Id| *last == held.id && !self.pending_spans.holds(last);
            let is_last = up_to.is_some_and(is_last);
            let named = (!is_last).then(|| self.named_inside(up_to, ctx)).flatten();
            self.start(&held, named.or_else(|| identity.clone()), ctx);
            if is_last {
                break;
            }
        }
    }

    /// Returns the identity of the outermost held span, up to the given one, that has one and waits for more.
    fn named_inside(&self, up_to: Option<&span::Id>, ctx: &Context<'_, S>) -> Option<Identity> {
        let mut held = self.pending_spans.held();
        if let Some(last) = up_to.and_then(|last| held.iter().rposition(|id| id == last)) {
            held.truncate(last + 1);
        }
        let mut identities =
            (held.iter()).filter_map(|id| self.pending(id, ctx, Pending::held_identity)?);
        identities.next()
    }

    fn start(&self, held: &HeldSpan, identity: Option<Identity>, ctx: &Context<'_, S>) {
        let id = &held.id;
        let start = || {
            let enter = || self.inner.on_enter(id, ctx.clone());
            if held.is_heard || !self.activation.observe(enter) {
                self.start_if_entering_does_not(id, ctx);
            }
        };
        match self.pending(id, ctx, |pending| {
            pending.set_free();
            WaitsNoMore::new(pending)
        }) {
            Some(waited) => self.start_held(&waited, identity, ctx, start),
            None => handoff::starting(start),
        }
    }

    /// Runs `start`, which starts a span that waits no more, after its held parents. Each is offered the identity of the next
    /// one inside it that has one, or else the given one.
    fn start_held(
        &self,
        waited: &WaitsNoMore,
        identity: Option<Identity>,
        ctx: &Context<'_, S>,
        start: impl FnOnce(),
    ) {
        let mut parents = Vec::new();
        let mut number = waited.number;
        let mut offer = waited.identity().or_else(|| identity.clone());
        while let Some(parent) = self.shared.held_parents.of(number) {
            let Some(waited) = self.set_free(&parent, ctx) else {
                break;
            };
            number = waited.number;
            let next_offer = waited.identity().or_else(|| offer.clone());
            parents.push((parent, waited, std::mem::replace(&mut offer, next_offer)));
        }
        for (parent, waited, offer) in parents.into_iter().rev() {
            let adoption = self.adoption(offer, waited.may_name_itself);
            let start = || self.with_started(&parent, ctx, |_| ());
            handoff::starting(|| handoff::adopting(adoption, start));
        }
        let adoption = self.adoption(identity, waited.may_name_itself);
        handoff::starting(|| handoff::adopting(adoption, start));
    }

    fn adoption(&self, identity: Option<Identity>, may_name_itself: bool) -> Option<Adoption> {
        Some(Adoption {
            storage: StorageId::new(&self.shared),
            identity: identity?,
            may_name_itself,
        })
    }

    /// Notes the held span that is the parent of a new span that waits too. Returns `false` if there is none.
    fn note_held_parent(
        &self,
        attrs: &span::Attributes<'_>,
        number: StartNumber,
        ctx: &Context<'_, S>,
    ) -> bool {
        if !attrs.is_contextual() || !handoff::may_hold_more() {
            return false;
        }
        let current = ctx.lookup_current().map(|span| span.id());
        let held = current.filter(|id| self.pending_spans.holds(id));
        let (Some(parent), Some(dispatch)) = (held, self.dispatch.get()) else {
            return false;
        };
        (self.shared.held_parents).add(number, dispatch.clone(), parent);
        true
    }

    fn start_if_entering_does_not(&self, id: &span::Id, ctx: &Context<'_, S>) {
        if self.activation.is_off() {
            self.with_started(id, ctx, |_| ());
        }
    }

    /// Starts a span by force, unless it has started, and looks at its context.
    fn with_started(&self, id: &span::Id, ctx: &Context<'_, S>, look: impl FnOnce(&OtelContext)) {
        if let Some(dispatch) = self.dispatch() {
            if let Some(cx) = tracing_opentelemetry::get_otel_context(id, &dispatch) {
                look(&cx);
            }
        } else if self.activation.is_on() {
            self.inner.on_enter(id, ctx.clone());
            OtelContext::map_current(look);
            self.inner.on_exit(id, ctx.clone());
        } else {
            self.shared
                .warnings
                .unreachable(ctx.metadata(id).map_or("", Metadata::name));
        }
    }

    /// Returns the dispatch that this very layer belongs to: asking another one about our span would panic.
    ///
    /// `Option` and `reload` around a layer do not pass on `on_register_dispatch`. The thread's default dispatch is
    /// a second source, but not while a span is created, so it is read whenever a pending span is entered.
    fn dispatch(&self) -> Option<Dispatch> {
        let known = || self.dispatch.get().and_then(WeakDispatch::upgrade);
        known().or_else(|| {
            dispatcher::get_default(|dispatch| {
                let ours = dispatch.downcast_ref::<Self>();
                if ours.is_some_and(|ours| std::ptr::eq(ours, self)) {
                    self.know_dispatch(dispatch);
                }
            });
            known()
        })
    }

    pub(super) fn know_dispatch(&self, dispatch: &Dispatch) {
        if self.dispatch.set(dispatch.downgrade()).is_ok() {
            let layer = self.pending_spans.layer();
            self.shared.layers.add(layer, dispatch.downgrade());
        }
    }

    /// Looks at a pending span; `None` if it is not one.
    fn pending<R>(
        &self,
        id: &span::Id,
        ctx: &Context<'_, S>,
        look: impl FnOnce(&Pending) -> R,
    ) -> Option<R> {
        if !self.pending_spans.may_be_pending(id) {
            return None;
        }
        let span = ctx.span(id)?;
        let extensions = span.extensions();
        extensions.get::<Pending>().map(look)
    }

    /// Makes the span one that is not held when it is entered; `None` if it would not have been.
    fn set_free(&self, id: &span::Id, ctx: &Context<'_, S>) -> Option<WaitsNoMore> {
        let waited = |pending: &Pending| pending.set_free().then(|| WaitsNoMore::new(pending));
        self.pending(id, ctx, waited)?
    }
}

/// Creates a span directly inside the span that was just released, and is current now. What was attached inside that one while it
/// was held, such as baggage, lies beneath it on the stack of contexts: the new span sees it all the same.
fn within_released(attached: OtelContext, create: impl FnOnce()) {
    let released = OtelContext::current();
    let mut cx = attached.with_remote_span_context(released.span().span_context().clone());
    if cx.baggage().is_empty() {
        cx = with_baggage_of(cx, &released);
    }
    let _attached = cx.attach();
    create();
}
