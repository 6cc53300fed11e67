//! The span of the tracer: the inner span, watched for reserved fields that are recorded later, or a stand-in.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use opentelemetry::trace::{Event, Span, SpanBuilder, SpanContext, Status, Tracer};
use opentelemetry::{Context, KeyValue};

use super::handoff;
use super::lost::Lost;
use super::replay::{self, StandIn};
use super::watch::Watch;
use crate::caught::caught;
use crate::storage::shared::Shared;

/// A span of a [`WorkflowTracer`](crate::WorkflowTracer): the inner tracer's span, or a stand-in that exports nothing
/// because its code has run before.
///
/// Both look the same from outside. A stand-in has the span context of the instance's recorded span, so that
/// whatever is injected or started from it attaches there.
pub struct WorkflowSpan<S: Span> {
    pub(super) state: State<S>,
    has_ended: bool,
}

pub(super) enum State<S> {
    Live {
        span: S,
        watch: Option<Watch>,
    },
    /// Boxed, so that an ordinary span is hardly larger than the inner one: it is moved several times.
    Unexported(Box<Unexported>),
}

/// A span that exports nothing.
pub(super) enum Unexported {
    StandIn(StandIn),
    Lost(Lost),
}

impl Unexported {
    fn context(&self) -> &SpanContext {
        match self {
            Self::StandIn(stand_in) => stand_in.context(),
            Self::Lost(lost) => lost.context(),
        }
    }

    fn is_recording(&self) -> bool {
        match self {
            Self::StandIn(stand_in) => stand_in.is_recording(),
            Self::Lost(_) => false,
        }
    }

    fn observe(&mut self, attribute: &KeyValue) {
        if let Self::StandIn(stand_in) = self {
            stand_in.observe(attribute);
        }
    }

    fn end(&mut self) {
        if let Self::StandIn(stand_in) = self {
            stand_in.end();
        }
    }
}

impl<S: Span> WorkflowSpan<S> {
    /// Starts a span, or a lost one if the tracer panics. That panic must not unwind further: tracing-opentelemetry holds a
    /// lock, and panics wherever it is poisoned, in a destructor too.
    #[inline]
    pub(super) fn start<T: Tracer<Span = S>>(
        tracer: &T,
        builder: SpanBuilder,
        parent: &Context,
        shared: &Arc<Shared>,
    ) -> Self {
        let start = || {
            Self::new(State::Live {
                span: tracer.build_with_context(builder, parent),
                watch: None,
            })
        };
        caught(start).unwrap_or_else(|| Self::lost(shared, parent))
    }

    #[cold]
    fn lost(shared: &Arc<Shared>, parent: &Context) -> Self {
        Self::unexported(Unexported::Lost(Lost::new(shared, parent)))
    }

    /// Watches the span that has just started; `None` if it is lost.
    #[inline]
    pub(super) fn watch(&mut self, new: impl FnOnce() -> Watch) -> Option<(&mut S, &mut Watch)> {
        match &mut self.state {
            State::Live { span, watch } => Some((span, watch.insert(new()))),
            State::Unexported(_) => None,
        }
    }

    pub(super) fn unexported(span: Unexported) -> Self {
        Self::new(State::Unexported(Box::new(span)))
    }

    #[inline]
    fn new(state: State<S>) -> Self {
        Self {
            state,
            has_ended: false,
        }
    }

    #[inline]
    pub(super) fn watched(&mut self) -> Option<(&mut S, &mut Watch)> {
        match &mut self.state {
            State::Live { span, watch } => Some((span, watch.as_mut()?)),
            State::Unexported(_) => None,
        }
    }

    #[inline]
    fn inner(&mut self) -> Option<&mut S> {
        match &mut self.state {
            State::Live { span, .. } => Some(span),
            State::Unexported(_) => None,
        }
    }

    #[inline(never)]
    fn is_watched_recording(&self) -> bool {
        match &self.state {
            State::Live { span, watch } => {
                let awaits = watch.as_ref().is_some_and(Watch::answer);
                span.is_recording() || (awaits && span.span_context().is_valid())
            }
            State::Unexported(span) => span.is_recording(),
        }
    }

    #[inline(never)]
    fn end_watched(&mut self, timestamp: SystemTime) {
        match &mut self.state {
            State::Live { span, watch } => {
                let last_exit = watch.as_mut().and_then(|watch| watch.end(span));
                let timestamp = last_exit.unwrap_or(timestamp);
                // An exporter may open spans beneath this one while OpenTelemetry has it locked.
                let end = || handoff::without_asking(|| span.end_with_timestamp(timestamp));
                match (caught(end), &watch) {
                    (Some(()), _) => {}
                    (None, Some(watch)) => watch.shared.count_panic_at_end(),
                    (None, None) => handoff::leave_panic(),
                }
                if let Some(within) = watch.as_mut().and_then(Watch::take_within) {
                    handoff::without_asking(|| within.end(timestamp));
                }
            }
            State::Unexported(span) => span.end(),
        }
    }

    #[inline(never)]
    fn set_watched(&mut self, attribute: KeyValue) {
        // An attribute that is only handed on is not borrowed mutably here: it would be copied.
        match &mut self.state {
            State::Live {
                span,
                watch: Some(watch),
            } if !watch.wants(&attribute) => span.set_attribute(attribute),
            _ => self.set_observed(attribute),
        }
    }

    #[inline(never)]
    fn set_observed(&mut self, mut attribute: KeyValue) {
        match &mut self.state {
            State::Live { span, watch } => {
                if let Some(watch) = watch {
                    watch.observe(span, &mut attribute);
                }
                span.set_attribute(attribute);
            }
            State::Unexported(span) => span.observe(&attribute),
        }
    }

    /// Ends a span that its owner has not ended.
    #[cold]
    fn end_dropped(&mut self) {
        self.end();
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
        match &mut self.state {
            State::Live { span, watch } => {
                if let Some(watch) = watch {
                    watch.observe_event(&attributes);
                }
                span.add_event_with_timestamp(name, timestamp, attributes);
            }
            State::Unexported(span) => {
                if let Unexported::StandIn(stand_in) = &mut **span {
                    stand_in.observe_event(Event::new(name, timestamp, attributes, 0));
                }
            }
        }
    }

    #[inline]
    fn span_context(&self) -> &SpanContext {
        match &self.state {
            State::Live { span, .. } => span.span_context(),
            State::Unexported(span) => span.context(),
        }
    }

    /// Returns `true` also for an unsampled span of the layer that declares a reserved field without a value: OpenTelemetry
    /// hands attributes to recording spans only.
    #[inline]
    fn is_recording(&self) -> bool {
        match &self.state {
            State::Live { span, watch: None } => span.is_recording(),
            _ => self.is_watched_recording(),
        }
    }

    #[inline]
    fn set_attribute(&mut self, attribute: KeyValue) {
        match &mut self.state {
            State::Live { span, watch: None } => span.set_attribute(attribute),
            _ => self.set_watched(attribute),
        }
    }

    #[inline]
    fn set_attributes(&mut self, attributes: impl IntoIterator<Item = KeyValue>) {
        match &mut self.state {
            State::Live { span, watch: None } => span.set_attributes(attributes),
            _ => attributes
                .into_iter()
                .for_each(|attribute| self.set_attribute(attribute)),
        }
    }

    #[inline]
    fn set_status(&mut self, status: Status) {
        if let (Status::Error { .. }, Some((_, watch))) = (&status, self.watched()) {
            watch.observe_failure();
        }
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
        self.has_ended = true;
        match &mut self.state {
            State::Live { span, watch: None } if !replay::is_any() => {
                if caught(|| span.end_with_timestamp(timestamp)).is_none() {
                    handoff::leave_panic();
                }
            }
            _ => self.end_watched(timestamp),
        }
    }
}

impl<S: Span> Drop for WorkflowSpan<S> {
    #[inline]
    fn drop(&mut self) {
        // The span of the SDK would end itself, and its processor might panic while the thread unwinds.
        if !self.has_ended {
            self.end_dropped();
        }
    }
}

impl<S: Span + fmt::Debug> fmt::Debug for WorkflowSpan<S> {
    #[inline]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut tuple = f.debug_tuple("WorkflowSpan");
        match &self.state {
            State::Live { span, .. } => tuple.field(span),
            State::Unexported(span) => tuple.field(span.context()),
        };
        tuple.finish()
    }
}
