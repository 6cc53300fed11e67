//! The spans that this crate opens itself, and the tracers that they go through: those of resumed agents, and the own spans
//! of workflows.

use std::mem;
use std::sync::{Arc, Mutex, Weak};
use std::time::SystemTime;

use opentelemetry::trace::{Span as _, SpanBuilder, SpanContext, Status, Tracer};
use opentelemetry::{Context, KeyValue, SpanId, global};

use crate::fields;
use crate::lock::lock;

/// The instrumentation scope of spans that this crate opens itself.
const SCOPE: &str = env!("CARGO_PKG_NAME");

/// The name of an agent without one, as in dapr-agents.
const DEFAULT_AGENT: &str = "DurableAgent";

/// The tracers that were given to `layer`, `tracer` or made by a provider, oldest first, not kept alive. The last one that
/// lives is used, so that a short-lived one does not take the place of the layer's for good.
#[derive(Default)]
pub(crate) struct Tracers(Mutex<Vec<Weak<dyn OpenAndEnd + Send + Sync>>>);

/// The end of a span that is opened and ended at once.
pub(crate) struct End {
    pub(crate) status: Status,
    /// `None` stands for the time of the call.
    pub(crate) at: Option<SystemTime>,
    /// If it does not get this id, it is not exported.
    pub(crate) span_id: Option<SpanId>,
}

impl Tracers {
    /// The most tracers that are remembered.
    const MAX: usize = 16;

    pub(crate) fn add<T>(&self, tracer: T) -> Arc<T>
    where
        T: Tracer + Send + Sync + 'static,
        T::Span: Send + Sync + 'static,
    {
        let tracer = Arc::new(tracer);
        let weak: Weak<dyn OpenAndEnd + Send + Sync> =
            Arc::downgrade(&(tracer.clone() as Arc<dyn OpenAndEnd + Send + Sync>));
        let mut tracers = lock(&self.0);
        tracers.retain(|tracer| tracer.strong_count() > 0);
        // The oldest are the likeliest to live on, the layer's among them.
        tracers.truncate(Self::MAX - 1);
        tracers.push(weak);
        drop(tracers);
        tracer
    }

    /// Opens and ends the span of a resumed agent. Returns its context if it recorded.
    pub(crate) fn export_agent(
        &self,
        instance_id: &str,
        agent_name: Option<&str>,
        parent: &Context,
    ) -> Option<SpanContext> {
        let agent = agent_or_default(agent_name);
        let span = SpanBuilder::from_name(agent_span_name(agent_name)).with_attributes([
            KeyValue::new("openinference.span.kind", "AGENT"),
            KeyValue::new(fields::INSTANCE_ID, instance_id.to_owned()),
            KeyValue::new(fields::RESUMED, true),
            KeyValue::new(fields::AGENT_NAME, agent.to_owned()),
            KeyValue::new(fields::GEN_AI_AGENT_NAME, agent.to_owned()),
        ]);
        let end = End {
            status: Status::Unset,
            at: None,
            span_id: None,
        };
        self.export(span, parent, end)
    }

    /// Opens and ends a span. Returns its context if it recorded. No lock is held meanwhile.
    pub(crate) fn export(
        &self,
        span: SpanBuilder,
        parent: &Context,
        end: End,
    ) -> Option<SpanContext> {
        self.with(|tracer| tracer.open_and_end(span, parent, end))
    }

    /// Calls `run` with the tracer that is to be used. No lock is held meanwhile.
    pub(crate) fn with<R>(&self, run: impl FnOnce(&dyn OpenAndEnd) -> R) -> R {
        let ours = lock(&self.0).iter().rev().find_map(Weak::upgrade);
        match ours {
            Some(tracer) => run(&*tracer),
            None => run(&global::tracer(SCOPE)),
        }
    }
}

fn agent_or_default(name: Option<&str>) -> &str {
    name.filter(|name| !name.is_empty())
        .unwrap_or(DEFAULT_AGENT)
}

/// Returns the name of the span of a resumed agent.
pub(crate) fn agent_span_name(agent_name: Option<&str>) -> String {
    format!("{}.ToolCallingWorkflow", agent_or_default(agent_name))
}

/// The two things needed of a tracer, without its type.
pub(crate) trait OpenAndEnd {
    /// Opens and ends a span. Returns its context if it recorded.
    fn open_and_end(&self, span: SpanBuilder, parent: &Context, end: End) -> Option<SpanContext>;

    /// Opens a span that is never exported, for its context.
    fn probe(&self, span: SpanBuilder, parent: &Context) -> SpanContext;
}

impl<T: Tracer> OpenAndEnd for T {
    fn probe(&self, span: SpanBuilder, parent: &Context) -> SpanContext {
        let span = self.build_with_context(span, parent);
        let context = span.span_context().clone();
        if span.is_recording() {
            // To drop it would export it.
            mem::forget(span);
        }
        context
    }

    fn open_and_end(&self, span: SpanBuilder, parent: &Context, end: End) -> Option<SpanContext> {
        let mut span = self.build_with_context(span, parent);
        let context = span.is_recording().then(|| span.span_context().clone());
        let has_id = |id| context.as_ref().is_some_and(|own| own.span_id() == id);
        if end.span_id.is_some_and(|id| !has_id(id)) {
            // To drop it would export it.
            mem::forget(span);
            return None;
        }
        span.set_status(end.status);
        match end.at {
            Some(at) => span.end_with_timestamp(at),
            None => span.end(),
        }
        context
    }
}
