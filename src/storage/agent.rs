//! The span of a resumed agent, which `create_resumed` opens and ends, and the tracer that it goes through.

use std::sync::{Arc, Mutex, Weak};

use opentelemetry::trace::{Span as _, SpanBuilder, SpanContext, Tracer};
use opentelemetry::{Context, KeyValue, global};

use crate::fields;
use crate::lock::lock;

/// The instrumentation scope of spans that this crate opens itself.
const SCOPE: &str = env!("CARGO_PKG_NAME");

/// The name of an agent without one, as in dapr-agents.
const DEFAULT_AGENT: &str = "DurableAgent";

/// The tracers that were given to `layer`, `tracer` or made by a provider, oldest first, not kept alive. The last one that
/// lives is used, so that a short-lived one does not take the place of the layer's for good.
#[derive(Default)]
pub(super) struct AgentTracers(Mutex<Vec<Weak<dyn EndAtOnce>>>);

impl AgentTracers {
    /// The most tracers that are remembered.
    const MAX: usize = 16;

    pub(super) fn add<T>(&self, tracer: T) -> Arc<T>
    where
        T: Tracer + Send + Sync + 'static,
        T::Span: Send + Sync + 'static,
    {
        let tracer = Arc::new(tracer);
        let weak: Weak<dyn EndAtOnce> = Arc::downgrade(&(tracer.clone() as Arc<dyn EndAtOnce>));
        let mut tracers = lock(&self.0);
        tracers.retain(|tracer| tracer.strong_count() > 0);
        // The oldest are the likeliest to live on, the layer's among them.
        tracers.truncate(Self::MAX - 1);
        tracers.push(weak);
        drop(tracers);
        tracer
    }

    /// Opens and ends the span of a resumed agent. Returns its context if it recorded. No lock is held meanwhile.
    pub(super) fn end_at_once(
        &self,
        instance_id: &str,
        agent_name: Option<&str>,
        parent: &Context,
    ) -> Option<SpanContext> {
        let agent = agent_name
            .filter(|name| !name.is_empty())
            .unwrap_or(DEFAULT_AGENT);
        let span =
            SpanBuilder::from_name(format!("{agent}.ToolCallingWorkflow")).with_attributes([
                KeyValue::new("openinference.span.kind", "AGENT"),
                KeyValue::new(fields::INSTANCE_ID, instance_id.to_owned()),
                KeyValue::new(fields::RESUMED, true),
                KeyValue::new(fields::AGENT_NAME, agent.to_owned()),
                KeyValue::new(fields::GEN_AI_AGENT_NAME, agent.to_owned()),
            ]);
        let ours = lock(&self.0).iter().rev().find_map(Weak::upgrade);
        match ours {
            Some(tracer) => tracer.end_at_once(span, parent),
            None => global::tracer(SCOPE).end_at_once(span, parent),
        }
    }
}

/// The one thing needed of a tracer, without its type.
trait EndAtOnce: Send + Sync {
    fn end_at_once(&self, span: SpanBuilder, parent: &Context) -> Option<SpanContext>;
}

impl<T> EndAtOnce for T
where
    T: Tracer + Send + Sync,
{
    fn end_at_once(&self, span: SpanBuilder, parent: &Context) -> Option<SpanContext> {
        let mut span = self.build_with_context(span, parent);
        let context = span.is_recording().then(|| span.span_context().clone());
        span.end();
        context
    }
}
