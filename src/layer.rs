//! The Layer: delegates every callback to the OpenTelemetry layer, and adds what only a layer can see.

use std::any::TypeId;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use opentelemetry::Context as OtelContext;
use opentelemetry::trace::{TraceContextExt as _, Tracer};
use tracing::dispatcher::{self, WeakDispatch};
use tracing::subscriber::Interest;
use tracing::{Dispatch, Event, Metadata, Subscriber, span};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use crate::deferral::{self, Deferral, Held, Kind, Pending};
use crate::fields::{Callsite, Callsites, Identity, Role};
use crate::storage::core::Core;
use crate::tracer::{self, WorkflowTracer};

/// The OpenTelemetry layer, extended by what keeps a workflow instance in one trace.
///
/// Made by [`WorkflowContextStorage::layer`](crate::WorkflowContextStorage::layer). It stands where the
/// OpenTelemetry layer stood, composes like any layer, and is found by
/// [`OpenTelemetrySpanExt`](tracing_opentelemetry::OpenTelemetrySpanExt) and
/// [`get_otel_context`](tracing_opentelemetry::get_otel_context) as that one is. A subscriber can have one
/// OpenTelemetry layer only, this one included: tracing-opentelemetry keeps one set of data a span.
pub struct WorkflowContextLayer<S, T> {
    inner: OpenTelemetryLayer<S, WorkflowTracer<T>>,
    core: Arc<Core>,
    callsites: Callsites,
    deferral: Deferral,
    activation: Activation,
    dispatch: OnceLock<WeakDispatch>,
}

/// Why a span starts that was held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Started {
    Released,
    Left,
    Closed,
}

/// Whether the inner layer starts a span when it is entered: its setting of context activation, which it
/// does not tell and which is therefore observed on the first span that makes a difference.
#[derive(Debug, Default)]
struct Activation(AtomicU8);

impl Activation {
    const UNKNOWN: u8 = 0;
    const ON: u8 = 1;
    const OFF: u8 = 2;

    fn is_on(&self) -> bool {
        self.0.load(Relaxed) == Self::ON
    }

    fn is_off(&self) -> bool {
        self.0.load(Relaxed) == Self::OFF
    }

    /// Enters a span by `enter`, and learns from what that does to the current OpenTelemetry context; `true`
    /// where the span became the current one.
    fn observe(&self, enter: impl FnOnce()) -> bool {
        if self.0.load(Relaxed) != Self::UNKNOWN {
            enter();
            return self.is_on();
        }
        // On top of a context without a span, whatever is current then was attached by the inner layer.
        let blank = OtelContext::new().attach();
        enter();
        let became_current = OtelContext::map_current(|cx| cx.has_active_span());
        drop(blank);
        self.0
            .store(if became_current { Self::ON } else { Self::OFF }, Relaxed);
        became_current
    }
}

impl<S, T> WorkflowContextLayer<S, T>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    T: Tracer + Send + Sync + 'static,
    T::Span: Send + Sync + 'static,
{
    pub(crate) fn new(inner: OpenTelemetryLayer<S, WorkflowTracer<T>>, core: Arc<Core>) -> Self {
        Self {
            inner,
            core,
            callsites: Callsites::new(),
            deferral: Deferral::new(),
            activation: Activation::default(),
            dispatch: OnceLock::new(),
        }
    }

    /// A span that declares a reserved field, may be adopted, or opens where others are held back.
    #[inline(never)]
    fn new_span(&self, attrs: &span::Attributes<'_>, id: &span::Id, ctx: Context<'_, S>) {
        let create = || self.inner.on_new_span(attrs, id, ctx.clone());
        let Callsite { role, declares } = (self.callsites).get(attrs.metadata(), &self.core.fields);
        let create = || match role {
            Role::Ordinary => create(),
            Role::Tagged | Role::Engine => tracer::marking(create),
        };
        let identity = || self.core.fields.identify(|visitor| attrs.record(visitor));
        match attrs.parent() {
            // Held on another thread, or not entered at all: creating a child starts it.
            Some(parent) if !self.deferral.holds(parent) && self.settle(parent, &ctx) => {
                deferral::starting(|| deferral::adopting(&self.core, identity(), create));
            }
            Some(parent) => {
                if self.deferral.holds(parent) {
                    self.release(Some(parent), identity(), &ctx);
                }
                create();
            }
            None if attrs.is_contextual() && deferral::any_held() => {
                let identity = identity();
                self.release(None, identity.clone(), &ctx);
                // Where it could not be started by force, the inner layer starts the parent just now.
                deferral::adopting(&self.core, identity, create);
            }
            None => create(),
        }
        let awaits = match declares.id {
            true => self.core.fields.awaits(declares, attrs),
            false => declares,
        };
        let kind = match role {
            Role::Ordinary => return,
            Role::Tagged | Role::Engine if awaits.id => Kind::AwaitsId,
            Role::Engine if identity().is_none() => Kind::Engine,
            Role::Tagged | Role::Engine if self.activation.is_on() => return,
            Role::Tagged | Role::Engine => Kind::Named,
        };
        if let Some(span) = ctx.span(id) {
            span.extensions_mut()
                .replace(Pending::new(kind, awaits.run));
            self.deferral.add_pending(id);
        }
    }

    /// A span that may be pending, or is entered where others are held back.
    #[inline(never)]
    fn enter(&self, id: &span::Id, ctx: Context<'_, S>) {
        if self.dispatch.get().is_none() {
            self.dispatch();
        }
        // Where entering starts nothing the inner layer may hear of it, for the timings.
        let heard = self.activation.is_off();
        let hold = self.pending(id, &ctx, |pending| {
            let hold = !pending.settled.load(Relaxed);
            if hold && pending.count() {
                self.core.counters.deferred.add();
            }
            if hold && !heard {
                pending.enter();
            }
            hold
        });
        if hold == Some(true) && self.deferral.hold(id, heard) {
            if heard {
                self.inner.on_enter(id, ctx);
            }
            return;
        }
        // Contexts are a stack: what is held beneath must be there first.
        self.release(None, None, &ctx);
        if hold.is_some() {
            self.activation
                .observe(|| self.inner.on_enter(id, ctx.clone()));
            self.start_by_force(id, Duration::ZERO, &ctx);
        } else {
            self.inner.on_enter(id, ctx);
        }
    }

    #[inline(never)]
    fn exit(&self, id: &span::Id, ctx: Context<'_, S>) {
        let Some(held) = self.deferral.take(id).filter(|held| !held.heard) else {
            self.inner.on_exit(id, ctx.clone());
            self.pending(id, &ctx, Pending::resume);
            return;
        };
        let stays_held = self.pending(id, &ctx, |pending| {
            pending.leave();
            pending.kind == Kind::Engine && !pending.settled.load(Relaxed)
        });
        if stays_held != Some(true) {
            self.start(&held, Started::Left, None, &ctx);
            self.inner.on_exit(id, ctx.clone());
            self.pending(id, &ctx, Pending::resume);
        }
    }

    #[inline(never)]
    fn record(&self, id: &span::Id, values: &span::Record<'_>, ctx: Context<'_, S>) {
        self.inner.on_record(id, values, ctx.clone());
        let recorded = self.core.fields.recorded(values);
        let knows_all = self.pending(id, &ctx, |pending| pending.learn(recorded.id, recorded.run));
        if knows_all == Some(true) && self.settle(id, &ctx) && self.deferral.holds(id) {
            // The span itself reads its ids from its attributes; those beneath join it.
            let identity = self.core.fields.identify(|visitor| values.record(visitor));
            self.release(Some(id), identity, &ctx);
        }
    }

    #[inline(never)]
    fn close(&self, id: &span::Id, ctx: &Context<'_, S>) {
        let unstarted = self.pending(id, ctx, |pending| {
            pending.was_held() && !pending.settled.load(Relaxed)
        });
        if unstarted == Some(true) && self.deferral.hold(id, self.activation.is_off()) {
            // Once through the inner layer, for the timings and the end time.
            if let Some(held) = self.deferral.take(id) {
                self.start(&held, Started::Closed, None, ctx);
                if !held.heard {
                    self.inner.on_exit(id, ctx.clone());
                }
            }
        }
        if unstarted.is_some() {
            self.deferral.remove_pending(id);
        }
    }

    /// Lets the inner layer hear of what was entered, outermost first, up to a span or all of it.
    fn release(&self, up_to: Option<&span::Id>, identity: Option<Identity>, ctx: &Context<'_, S>) {
        while let Some(held) = self.deferral.take_outermost() {
            self.start(&held, Started::Released, identity.clone(), ctx);
            if up_to.is_some_and(|last| *last == held.span && !self.deferral.holds(last)) {
                break;
            }
        }
    }

    fn start(&self, held: &Held, by: Started, identity: Option<Identity>, ctx: &Context<'_, S>) {
        let id = &held.span;
        let time = self.pending(id, ctx, |pending| {
            pending.settled.store(true, Relaxed);
            if by == Started::Released {
                pending.leave();
            }
            pending.take_held()
        });
        let time = time.unwrap_or_default();
        let start = || {
            let enter = || self.inner.on_enter(id, ctx.clone());
            if !held.heard && self.activation.observe(enter) {
                OtelContext::map_current(|cx| deferral::tell_held(&cx.span(), time));
            } else if by == Started::Left {
                // Entering starts nothing, as was just learnt: the id may still come in time.
                self.pending(id, ctx, |pending| {
                    pending.give_back(time);
                    pending.settled.store(false, Relaxed);
                });
            } else {
                self.start_by_force(id, time, ctx);
            }
        };
        deferral::starting(|| deferral::adopting(&self.core, identity, start));
    }

    /// Starts a span that was entered, where entering did not.
    fn start_by_force(&self, id: &span::Id, held: Duration, ctx: &Context<'_, S>) {
        if !self.activation.is_off() {
            return;
        }
        match self.dispatch() {
            Some(dispatch) => {
                if let Some(cx) = tracing_opentelemetry::get_otel_context(id, &dispatch) {
                    deferral::tell_held(&cx.span(), held);
                }
            }
            None => self
                .core
                .warnings
                .unreachable(ctx.metadata(id).map_or("", Metadata::name)),
        }
    }

    /// The dispatch that this very layer belongs to: asking another about our span would panic.
    ///
    /// `Option` and `reload` around a layer do not pass on that the dispatch was registered. The thread's default
    /// tells as well, but not while a span is created, so it is asked for whenever a pending span is entered.
    fn dispatch(&self) -> Option<Dispatch> {
        let known = || self.dispatch.get().and_then(WeakDispatch::upgrade);
        known().or_else(|| {
            dispatcher::get_default(|dispatch| {
                let ours = dispatch.downcast_ref::<Self>();
                if ours.is_some_and(|ours| std::ptr::eq(ours, self)) {
                    let _ = self.dispatch.set(dispatch.downgrade());
                }
            });
            known()
        })
    }

    /// Looks at a pending span; `None` where it is not one.
    fn pending<R>(
        &self,
        id: &span::Id,
        ctx: &Context<'_, S>,
        look: impl FnOnce(&Pending) -> R,
    ) -> Option<R> {
        if !self.deferral.may_be_pending(id) {
            return None;
        }
        let span = ctx.span(id)?;
        let extensions = span.extensions();
        extensions.get::<Pending>().map(look)
    }

    /// The span is no longer held back when it is entered; `true` where it would have been.
    fn settle(&self, id: &span::Id, ctx: &Context<'_, S>) -> bool {
        self.pending(id, ctx, |pending| !pending.settled.swap(true, Relaxed)) == Some(true)
    }
}

impl<S, T> Layer<S> for WorkflowContextLayer<S, T>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    T: Tracer + Send + Sync + 'static,
    T::Span: Send + Sync + 'static,
{
    #[inline]
    fn on_register_dispatch(&self, subscriber: &Dispatch) {
        let _ = self.dispatch.set(subscriber.downgrade());
        self.inner.on_register_dispatch(subscriber);
    }

    #[inline]
    fn on_layer(&mut self, subscriber: &mut S) {
        self.inner.on_layer(subscriber);
    }

    #[inline]
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        self.inner.register_callsite(metadata)
    }

    #[inline]
    fn enabled(&self, metadata: &Metadata<'_>, ctx: Context<'_, S>) -> bool {
        self.inner.enabled(metadata, ctx)
    }

    #[inline]
    fn event_enabled(&self, event: &Event<'_>, ctx: Context<'_, S>) -> bool {
        self.inner.event_enabled(event, ctx)
    }

    #[inline]
    fn on_new_span(&self, attrs: &span::Attributes<'_>, id: &span::Id, ctx: Context<'_, S>) {
        if self.deferral.is_idle() && self.callsites.are_ordinary(attrs.metadata()) {
            self.inner.on_new_span(attrs, id, ctx);
        } else {
            self.new_span(attrs, id, ctx);
        }
    }

    #[inline]
    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, ctx: Context<'_, S>) {
        if self.deferral.is_idle() || !self.deferral.may_be_pending(id) {
            self.inner.on_record(id, values, ctx);
        } else {
            self.record(id, values, ctx);
        }
    }

    #[inline]
    fn on_follows_from(&self, id: &span::Id, follows: &span::Id, ctx: Context<'_, S>) {
        self.inner.on_follows_from(id, follows, ctx);
    }

    #[inline]
    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        self.inner.on_event(event, ctx);
    }

    #[inline]
    fn on_enter(&self, id: &span::Id, ctx: Context<'_, S>) {
        if self.deferral.is_idle() || !self.deferral.concerns(id) {
            self.inner.on_enter(id, ctx);
        } else {
            self.enter(id, ctx);
        }
    }

    #[inline]
    fn on_exit(&self, id: &span::Id, ctx: Context<'_, S>) {
        if self.deferral.is_idle() || !self.deferral.concerns(id) {
            self.inner.on_exit(id, ctx);
        } else {
            self.exit(id, ctx);
        }
    }

    #[inline]
    fn on_close(&self, id: span::Id, ctx: Context<'_, S>) {
        if !self.deferral.is_idle() && self.deferral.may_be_pending(&id) {
            self.close(&id, &ctx);
        }
        self.inner.on_close(id, ctx);
    }

    #[inline]
    fn on_id_change(&self, old: &span::Id, new: &span::Id, ctx: Context<'_, S>) {
        self.inner.on_id_change(old, new, ctx);
    }

    // SAFETY: each answer is a pointer to `self`, or the inner layer's own under its own contract, and the inner
    // layer lives as long as `self`. `OpenTelemetrySpanExt` finds the inner layer in no other way.
    #[allow(unsafe_code, reason = "a layer is found by its type in no other way")]
    unsafe fn downcast_raw(&self, id: TypeId) -> Option<*const ()> {
        match id {
            id if id == TypeId::of::<Self>() => Some(std::ptr::from_ref(self).cast()),
            id => unsafe { self.inner.downcast_raw(id) },
        }
    }
}

impl<S, T> fmt::Debug for WorkflowContextLayer<S, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkflowContextLayer")
            .field("activation", &self.activation)
            .finish_non_exhaustive()
    }
}
