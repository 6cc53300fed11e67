//! Deferred starts: the state machine of spans that are held until their instance is known.
//!
//! A span starts when it is first entered, and once it has started its parent cannot change. Two kinds of span are
//! entered before anybody knows their instance: those that declare an instance id without a value, and engine spans that
//! never have one. The inner layer is not told that such a span was entered until it is released, outermost first: by
//! its id, by its first child, or by its last exit or close.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use opentelemetry::Context as OtelContext;
use opentelemetry::trace::{TraceContextExt as _, Tracer};
use tracing::dispatcher::{self, WeakDispatch};
use tracing::{Dispatch, Event, Metadata, Subscriber, span};
use tracing_subscriber::Layer as _;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::WorkflowContextLayer;
use super::pending::{Awaits, Pending};
use crate::fields::callsite::{Callsite, Role};
use crate::fields::identity::Identity;
use crate::tracer::handoff::{self, HeldSpan, StorageId};

/// The cause by which a held span starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Started {
    Released,
    Left,
    Closed,
}

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
        attrs: &span::Attributes<'_>,
        id: &span::Id,
        ctx: Context<'_, S>,
    ) {
        let create = || self.inner.on_new_span(attrs, id, ctx.clone());
        let Callsite { role, declares } = self.callsite(attrs.metadata());
        let create = || match role {
            Role::Ordinary => create(),
            Role::Tagged | Role::Engine => handoff::marking(create),
        };
        let identity = || self.shared.fields.identify(|visitor| attrs.record(visitor));
        match attrs.parent() {
            // The parent is held on another thread, or was not entered at all: creating a child starts it.
            Some(parent) if !self.pending_spans.holds(parent) && self.set_free(parent, &ctx) => {
                handoff::starting(|| {
                    handoff::adopting(StorageId::new(&self.shared), identity(), create)
                });
            }
            Some(parent) => {
                if self.pending_spans.holds(parent) {
                    self.release(Some(parent), identity(), &ctx);
                }
                create();
            }
            None if attrs.is_contextual() && handoff::is_any_held() => {
                let identity = identity();
                self.release(None, identity.clone(), &ctx);
                // If the parent could not be started by force, the inner layer starts it just now.
                handoff::adopting(StorageId::new(&self.shared), identity, create);
            }
            None => create(),
        }
        let awaits = match declares.id {
            true => self.shared.fields.awaits(declares, attrs),
            false => declares,
        };
        let awaits_what = match role {
            Role::Ordinary => return,
            Role::Tagged | Role::Engine if awaits.id => Awaits::Id,
            Role::Engine if identity().is_none() => Awaits::Child,
            Role::Tagged | Role::Engine if self.activation.is_on() => return,
            Role::Tagged | Role::Engine => Awaits::Nothing,
        };
        if let Some(span) = ctx.span(id) {
            span.extensions_mut()
                .replace(Pending::new(awaits_what, awaits.run));
            self.pending_spans.add(id);
        }
    }

    /// Enters a span that may be pending, or is inside a held span.
    #[inline(never)]
    pub(super) fn enter(&self, id: &span::Id, ctx: Context<'_, S>) {
        if self.dispatch.get().is_none() {
            self.dispatch();
        }
        // If entering starts nothing, the inner layer may be told, for the timings.
        let heard = self.activation.is_off();
        let hold = self.pending(id, &ctx, |pending| {
            let hold = !pending.is_free.load(Relaxed);
            if hold && pending.count_once() {
                self.shared.counters.deferred.add();
            }
            if hold && !heard {
                pending.enter();
            }
            hold
        });
        if hold == Some(true) && self.pending_spans.hold(id, heard) {
            if heard {
                self.inner.on_enter(id, ctx);
            }
            return;
        }
        // Contexts are a stack: held spans beneath must be attached first.
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
    pub(super) fn exit(&self, id: &span::Id, ctx: Context<'_, S>) {
        let Some(held) = self.pending_spans.take(id).filter(|held| !held.is_heard) else {
            self.inner.on_exit(id, ctx.clone());
            self.pending(id, &ctx, Pending::resume);
            return;
        };
        let stays_held = self.pending(id, &ctx, |pending| {
            pending.leave();
            pending.awaits == Awaits::Child && !pending.is_free.load(Relaxed)
        });
        if stays_held != Some(true) {
            self.start(&held, Started::Left, None, &ctx);
            self.inner.on_exit(id, ctx.clone());
            self.pending(id, &ctx, Pending::resume);
        }
    }

    #[inline(never)]
    pub(super) fn record(&self, id: &span::Id, values: &span::Record<'_>, ctx: Context<'_, S>) {
        self.inner.on_record(id, values, ctx.clone());
        let recorded = self.shared.fields.recorded(values);
        let knows_all = self.pending(id, &ctx, |pending| pending.learn(recorded.id, recorded.run));
        if knows_all == Some(true) && self.set_free(id, &ctx) && self.pending_spans.holds(id) {
            // The span itself reads its ids from its attributes; those beneath join it.
            let identity = self
                .shared
                .fields
                .identify(|visitor| values.record(visitor));
            self.release(Some(id), identity, &ctx);
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
        } else if self.set_free(&id, ctx) {
            handoff::starting(|| self.start_by_force(&id, Duration::ZERO, ctx));
        }
    }

    #[inline(never)]
    pub(super) fn close(&self, id: &span::Id, ctx: &Context<'_, S>) {
        let unstarted = self.pending(id, ctx, |pending| {
            pending.was_held() && !pending.is_free.load(Relaxed)
        });
        if unstarted == Some(true) && self.pending_spans.hold(id, self.activation.is_off()) {
            // Entered and exited once in the inner layer, for the timings and the end time.
            if let Some(held) = self.pending_spans.take(id) {
                self.start(&held, Started::Closed, None, ctx);
                if !held.is_heard {
                    self.inner.on_exit(id, ctx.clone());
                }
            }
        }
        if unstarted.is_some() {
            self.pending_spans.remove(id);
        }
    }

    /// Tells the inner layer of the held spans, outermost first, up to a span or all of them.
    fn release(&self, up_to: Option<&span::Id>, identity: Option<Identity>, ctx: &Context<'_, S>) {
        while let Some(held) = self.pending_spans.take_outermost() {
            self.start(&held, Started::Released, identity.clone(), ctx);
            if up_to.is_some_and(|last| *last == held.id && !self.pending_spans.holds(last)) {
                break;
            }
        }
    }

    fn start(
        &self,
        held: &HeldSpan,
        by: Started,
        identity: Option<Identity>,
        ctx: &Context<'_, S>,
    ) {
        let id = &held.id;
        let time = self.pending(id, ctx, |pending| {
            pending.is_free.store(true, Relaxed);
            if by == Started::Released {
                pending.leave();
            }
            pending.take_held()
        });
        let time = time.unwrap_or_default();
        let start = || {
            let enter = || self.inner.on_enter(id, ctx.clone());
            if !held.is_heard && self.activation.observe(enter) {
                OtelContext::map_current(|cx| handoff::tell_held_time(&cx.span(), time));
            } else if by == Started::Left {
                // Entering starts nothing, as was just observed: the id may still come in time.
                self.pending(id, ctx, |pending| {
                    pending.give_back(time);
                    pending.is_free.store(false, Relaxed);
                });
            } else {
                self.start_by_force(id, time, ctx);
            }
        };
        handoff::starting(|| handoff::adopting(StorageId::new(&self.shared), identity, start));
    }

    /// Starts a span whose entering did not start it.
    fn start_by_force(&self, id: &span::Id, held: Duration, ctx: &Context<'_, S>) {
        if !self.activation.is_off() {
            return;
        }
        match self.dispatch() {
            Some(dispatch) => {
                if let Some(cx) = tracing_opentelemetry::get_otel_context(id, &dispatch) {
                    handoff::tell_held_time(&cx.span(), held);
                }
            }
            None => self
                .shared
                .warnings
                .unreachable(ctx.metadata(id).map_or("", Metadata::name)),
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
                    let _ = self.dispatch.set(dispatch.downgrade());
                }
            });
            known()
        })
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

    /// Makes the span one that is not held when it is entered. Returns `true` if it would have been.
    fn set_free(&self, id: &span::Id, ctx: &Context<'_, S>) -> bool {
        self.pending(id, ctx, |pending| !pending.is_free.swap(true, Relaxed)) == Some(true)
    }
}
