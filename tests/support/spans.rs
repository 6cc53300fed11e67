//! One interface to tagged spans, made by the layer or through the OpenTelemetry API.

use std::thread;

use opentelemetry::trace::{SpanBuilder, SpanContext, TraceContextExt as _, Tracer as _};
use opentelemetry::{Context, ContextGuard, KeyValue};
use tracing::Dispatch;
use tracing::dispatcher::with_default;
use tracing::info_span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::{Via, Worker};

/// The tags of a span.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tags<'a> {
    instance_id: Option<&'a str>,
    run_id: Option<&'a str>,
    parent_instance_id: Option<&'a str>,
    replaying: Option<bool>,
    awaits_id: bool,
}

/// The tags of an ordinary span: none.
pub(crate) const UNTAGGED: Tags<'static> = Tags {
    instance_id: None,
    run_id: None,
    parent_instance_id: None,
    replaying: None,
    awaits_id: false,
};

/// An open span; it ends when the last clone is dropped.
#[derive(Clone)]
pub(crate) struct Opened(OpenSpan);

#[derive(Clone)]
enum OpenSpan {
    Layer(tracing::Span),
    Api(Context),
}

/// A span stays the current one of this thread while this lives.
#[allow(dead_code, reason = "held for the effect of dropping it")]
pub(crate) enum Entered<'a> {
    Layer(tracing::span::Entered<'a>),
    Api(ContextGuard),
}

impl Worker {
    /// The way in which [`open`](Self::open) makes spans.
    pub(crate) fn made_via(&self) -> Via {
        self.via
    }

    /// Opens a span beneath the current one.
    pub(crate) fn open(&self, name: &str, tags: Tags<'_>) -> Opened {
        self.open_via(self.via, name, tags)
    }

    pub(crate) fn open_via(&self, via: Via, name: &str, tags: Tags<'_>) -> Opened {
        if via == Via::Api {
            return self.open_api(name, tags, &Context::current());
        }
        Opened::by_layer(with_default(&self.dispatch, || match tags {
            Tags {
                instance_id: None,
                awaits_id: false,
                replaying: None,
                ..
            } => {
                info_span!("untagged", otel.name = name)
            }
            Tags {
                instance_id: None,
                awaits_id: false,
                replaying: Some(replaying),
                ..
            } => {
                info_span!("replay", otel.name = name, workflow.replaying = replaying)
            }
            _ => info_span!(
                "tagged",
                otel.name = name,
                workflow.instance_id = tags.instance_id,
                workflow.run_id = tags.run_id,
                workflow.parent_instance_id = tags.parent_instance_id,
                workflow.replaying = tags.replaying,
            ),
        }))
    }

    /// Opens a span with `parent: None`, whatever is current.
    pub(crate) fn open_root(&self, name: &str, instance_id: &str) -> Opened {
        if self.via == Via::Api {
            return self.open_api(name, Tags::instance(instance_id), &Context::new());
        }
        Opened::by_layer(with_default(
            &self.dispatch,
            || info_span!(parent: None, "root", otel.name = name, workflow.instance_id = instance_id),
        ))
    }

    fn open_api(&self, name: &str, tags: Tags<'_>, parent: &Context) -> Opened {
        let ids = [
            ("workflow.instance_id", tags.instance_id),
            ("workflow.run_id", tags.run_id),
            ("workflow.parent_instance_id", tags.parent_instance_id),
        ];
        let ids = ids
            .into_iter()
            .filter_map(|(key, id)| Some(KeyValue::new(key, id?.to_owned())));
        let replaying = tags
            .replaying
            .map(|flag| KeyValue::new("workflow.replaying", flag));
        let builder = SpanBuilder::from_name(name.to_owned()).with_attributes(ids.chain(replaying));
        let tracer = self.api.get_or_init(|| self.storage.tracer(self.tracer()));
        let span = tracer.build_with_context(builder, parent);
        Opened(OpenSpan::Api(parent.with_span(span)))
    }

    /// Runs inside a new span.
    pub(crate) fn within<R>(&self, name: &str, tags: Tags<'_>, run: impl FnOnce() -> R) -> R {
        self.open(name, tags).inside(run)
    }

    /// Opens a span, enters and closes it.
    pub(crate) fn step(&self, name: &str, tags: Tags<'_>) {
        self.within(name, tags, || ());
    }

    /// As [`step`](Self::step), on a thread of its own.
    pub(crate) fn step_elsewhere(&self, name: &str, tags: Tags<'_>) {
        thread::scope(|scope| {
            let step = scope.spawn(|| self.run(|| self.step(name, tags)));
            step.join().expect("the step panicked");
        });
    }
}

impl<'a> Tags<'a> {
    pub(crate) fn instance(instance_id: &'a str) -> Self {
        Self {
            instance_id: Some(instance_id),
            ..UNTAGGED
        }
    }

    /// Declares the id, to be recorded later.
    pub(crate) fn awaiting_id() -> Self {
        Self {
            awaits_id: true,
            ..UNTAGGED
        }
    }

    pub(crate) fn run(self, run_id: &'a str) -> Self {
        Self {
            run_id: Some(run_id),
            ..self
        }
    }

    pub(crate) fn child_of(self, parent_instance_id: &'a str) -> Self {
        Self {
            parent_instance_id: Some(parent_instance_id),
            ..self
        }
    }

    pub(crate) fn replaying(self, replaying: bool) -> Self {
        Self {
            replaying: Some(replaying),
            ..self
        }
    }
}

impl Opened {
    fn by_layer(span: tracing::Span) -> Self {
        Self(OpenSpan::Layer(span))
    }

    pub(crate) fn enter(&self) -> Entered<'_> {
        match &self.0 {
            OpenSpan::Layer(span) => Entered::Layer(span.enter()),
            OpenSpan::Api(context) => Entered::Api(context.clone().attach()),
        }
    }

    pub(crate) fn inside<R>(&self, run: impl FnOnce() -> R) -> R {
        let run = || {
            let _entered = self.enter();
            run()
        };
        match self.dispatch() {
            Some(dispatch) => with_default(&dispatch, run),
            None => run(),
        }
    }

    fn dispatch(&self) -> Option<Dispatch> {
        match &self.0 {
            OpenSpan::Layer(span) => span.with_subscriber(|(_, dispatch)| dispatch.clone()),
            OpenSpan::Api(_) => None,
        }
    }

    /// Returns the span of `tracing`.
    #[track_caller]
    pub(crate) fn tracing(&self) -> &tracing::Span {
        match &self.0 {
            OpenSpan::Layer(span) => span,
            OpenSpan::Api(_) => panic!("a span of the OpenTelemetry API"),
        }
    }

    pub(crate) fn record_instance_id(&self, id: &str) {
        self.record("workflow.instance_id", id.to_owned());
    }

    pub(crate) fn record_replaying(&self, replaying: bool) {
        self.record("workflow.replaying", replaying);
    }

    fn record<V>(&self, key: &'static str, value: V)
    where
        V: tracing::Value + Into<opentelemetry::Value>,
    {
        match &self.0 {
            OpenSpan::Layer(span) => {
                span.record(key, value);
            }
            OpenSpan::Api(context) => context.span().set_attribute(KeyValue::new(key, value)),
        }
    }

    /// Returns an OpenTelemetry context with this span, which starts the span if nothing has before.
    pub(crate) fn otel_context(&self) -> Context {
        match &self.0 {
            OpenSpan::Layer(span) => span.context(),
            OpenSpan::Api(context) => context.clone(),
        }
    }

    /// Starts the span by asking for its context.
    pub(crate) fn start(&self) {
        drop(self.otel_context());
    }

    pub(crate) fn span_context(&self) -> SpanContext {
        self.otel_context().span().span_context().clone()
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // The registry closes a span's parent through the default subscriber.
        let dispatch = self.dispatch();
        let span = std::mem::replace(&mut self.0, OpenSpan::Layer(tracing::Span::none()));
        match dispatch {
            Some(dispatch) => with_default(&dispatch, || drop(span)),
            None => drop(span),
        }
    }
}
