//! The Layer's callbacks. Each is handed on to the OpenTelemetry layer; spans that may be held go through
//! [deferral](self::deferral).
//!
//! No parent is chosen here. The inner layer calls our tracer when a span really starts (`tracer.rs`), and that asks
//! [`decide`](crate::decision::decide) in `decision.rs`, which holds the whole table.

mod activation;
mod deferral;
pub(crate) mod log_filter;
mod pending;

use std::any::TypeId;
use std::fmt;
use std::sync::{Arc, OnceLock};

use opentelemetry::trace::Tracer;
use tracing::dispatcher::WeakDispatch;
use tracing::subscriber::Interest;
use tracing::{Dispatch, Event, Metadata, Subscriber, span};
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use self::activation::Activation;
use self::pending::PendingSpans;
use crate::fields::ReservedFields;
use crate::fields::callsite::{Callsite, Callsites, Role};
use crate::storage::shared::Shared;
use crate::tracer::{WorkflowTracer, handoff};

/// The OpenTelemetry layer, extended by what keeps a workflow instance in one trace.
///
/// Made by [`WorkflowContextStorage::layer`](crate::WorkflowContextStorage::layer). It stands where the
/// OpenTelemetry layer stood, composes like any layer, and is found by
/// [`OpenTelemetrySpanExt`](tracing_opentelemetry::OpenTelemetrySpanExt) and
/// [`get_otel_context`](tracing_opentelemetry::get_otel_context) as that one is. A subscriber can have one
/// OpenTelemetry layer only, this one included: tracing-opentelemetry keeps one set of data a span.
pub struct WorkflowContextLayer<S, T> {
    inner: OpenTelemetryLayer<S, WorkflowTracer<T>>,
    shared: Arc<Shared>,
    callsites: Callsites,
    pending_spans: PendingSpans,
    activation: Activation,
    dispatch: OnceLock<WeakDispatch>,
}

impl<S, T> WorkflowContextLayer<S, T>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    T: Tracer + Send + Sync + 'static,
    T::Span: Send + Sync + 'static,
{
    pub(crate) fn new(
        inner: OpenTelemetryLayer<S, WorkflowTracer<T>>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            inner,
            shared,
            callsites: Callsites::new(),
            pending_spans: PendingSpans::new(),
            activation: Activation::default(),
            dispatch: OnceLock::new(),
        }
    }

    #[inline]
    fn callsite(&self, metadata: &'static Metadata<'static>) -> Callsite {
        let fields = &self.shared.fields;
        (self.callsites).get(metadata, |metadata| fields.callsite(metadata))
    }

    /// Returns `true` for a tagged span whose fields have all their values, and which has nothing to do with replays or with
    /// held spans.
    #[inline]
    fn is_plain(&self, callsite: Callsite, attrs: &span::Attributes<'_>) -> bool {
        callsite.role() == Role::Tagged
            && !callsite.declares().has_replay()
            && self.shared.replays.is_idle()
            && attrs.is_contextual()
            && !handoff::is_any_held()
            && self.activation.is_on()
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
        self.know_dispatch(subscriber);
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
        let is_idle = self.pending_spans.is_idle() && self.shared.replays.is_idle();
        let callsite = self.callsite(attrs.metadata());
        if is_idle && callsite.role() == Role::Ordinary {
            return self.inner.on_new_span(attrs, id, ctx);
        }
        let awaits = self.shared.fields.awaits(callsite, attrs);
        if awaits == ReservedFields::NONE && self.is_plain(callsite, attrs) {
            handoff::marking(None, || self.inner.on_new_span(attrs, id, ctx));
        } else {
            self.new_span(callsite, awaits, attrs, id, ctx);
        }
    }

    #[inline]
    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, ctx: Context<'_, S>) {
        if self.pending_spans.is_idle() || !self.pending_spans.may_be_pending(id) {
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
        if !self.pending_spans.is_idle() {
            self.count_event(event, &ctx);
        }
        self.inner.on_event(event, ctx);
    }

    #[inline]
    fn on_enter(&self, id: &span::Id, ctx: Context<'_, S>) {
        if self.pending_spans.is_idle() || !self.pending_spans.concerns(id) {
            self.inner.on_enter(id, ctx);
        } else {
            self.enter(id, ctx);
        }
    }

    #[inline]
    fn on_exit(&self, id: &span::Id, ctx: Context<'_, S>) {
        if self.pending_spans.is_idle() || !self.pending_spans.concerns(id) {
            self.inner.on_exit(id, ctx);
        } else {
            self.exit(id, ctx);
        }
    }

    #[inline]
    fn on_close(&self, id: span::Id, ctx: Context<'_, S>) {
        if self.pending_spans.is_idle() || !self.pending_spans.may_be_pending(&id) {
            self.inner.on_close(id, ctx);
        } else {
            self.close(id, ctx);
        }
        if handoff::take_panic() {
            self.shared.count_panic_at_end();
        }
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
