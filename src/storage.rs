//! The storage handle: the explicit API, and the constructors of the layer and the tracer.

mod agent;
pub(crate) mod builder;
pub(crate) mod global;
mod refresh;
pub(crate) mod remote;
pub(crate) mod shared;
pub(crate) mod tier;

use std::fmt;
use std::sync::Arc;

use opentelemetry::Context;
use opentelemetry::trace::Tracer;
use tracing::Subscriber;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::registry::LookupSpan;

use crate::context::WorkflowContext;
use crate::error::{CreateResumedError, StorageError};
use crate::explain::Explanation;
use crate::layer::WorkflowContextLayer;
use crate::stats::Stats;
use crate::tracer::WorkflowTracer;
use crate::warnings::LOG_TARGET;
use shared::Shared;

/// One trace context per workflow instance, and what is needed to use it: the layer and the tracer.
///
/// A handle: clones are cheap and share everything. Dropping the last one, the layers and tracers made from
/// it included, forgets what was stored in memory.
///
/// ```
/// use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};
///
/// let storage = WorkflowContextStorage::new();
/// let cx = WorkflowContext::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "")?;
/// storage.store("order-42", cx.clone())?;
/// assert_eq!(storage.get("order-42")?, Some(cx));
/// assert!(storage.cleanup("order-42")?);
/// assert_eq!(storage.get("order-42")?, None);
/// assert_eq!((storage.stats().hits, storage.stats().misses), (1, 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct WorkflowContextStorage {
    pub(crate) shared: Arc<Shared>,
}

impl WorkflowContextStorage {
    /// The layer that stands where `tracing_opentelemetry::layer().with_tracer(tracer)` stood.
    ///
    /// `tracer` is also what [`create_resumed`](Self::create_resumed) uses from now on.
    pub fn layer<S, T>(&self, tracer: T) -> WorkflowContextLayer<S, T>
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
        T: Tracer + Send + Sync + 'static,
        T::Span: Send + Sync + 'static,
    {
        self.layer_with(tracer, |otel| otel)
    }

    /// As [`layer`](Self::layer), with the OpenTelemetry layer's own settings.
    ///
    /// ```
    /// # use opentelemetry::trace::noop::NoopTracer;
    /// # use tracing_subscriber::prelude::*;
    /// # let storage = tracing_workflow_context::WorkflowContextStorage::new();
    /// # let tracer = NoopTracer::new();
    /// let layer = storage.layer_with(tracer, |otel| otel.with_location(false).with_threads(false));
    /// let subscriber = tracing_subscriber::registry().with(layer);
    /// # drop(subscriber);
    /// ```
    pub fn layer_with<S, T, F>(&self, tracer: T, settings: F) -> WorkflowContextLayer<S, T>
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
        T: Tracer + Send + Sync + 'static,
        T::Span: Send + Sync + 'static,
        F: FnOnce(
            OpenTelemetryLayer<S, WorkflowTracer<T>>,
        ) -> OpenTelemetryLayer<S, WorkflowTracer<T>>,
    {
        let tracer =
            WorkflowTracer::for_layer(self.shared.agent_tracer.set(tracer), self.shared.clone());
        let otel = settings(OpenTelemetryLayer::new(tracer));
        WorkflowContextLayer::new(otel, self.shared.clone())
    }

    /// A tracer for spans that are made through the OpenTelemetry API alone.
    ///
    /// A span whose attributes name an instance is recorded and re-parented as one of the layer is. `tracer`
    /// is also what [`create_resumed`](Self::create_resumed) uses from now on.
    pub fn tracer<T>(&self, tracer: T) -> WorkflowTracer<T>
    where
        T: Tracer + Send + Sync + 'static,
        T::Span: Send + Sync + 'static,
    {
        WorkflowTracer::for_api(self.shared.agent_tracer.set(tracer), self.shared.clone())
    }

    /// Stores the context of an instance; the last write wins, over what a span recorded too.
    ///
    /// Locks one shard of memory for the time of the write.
    ///
    /// # Errors
    ///
    /// [`StorageError::InvalidInstanceId`] where the id is empty or too long.
    pub fn store(&self, instance_id: &str, context: WorkflowContext) -> Result<(), StorageError> {
        self.shared.check(instance_id)?;
        self.shared.tier.store(instance_id, context);
        Ok(())
    }

    /// The context of the latest run of an instance. A miss is normal, and counted.
    ///
    /// Locks one shard of memory for the time of the lookup.
    ///
    /// # Errors
    ///
    /// [`StorageError::InvalidInstanceId`] where the id is empty or too long.
    pub fn get(&self, instance_id: &str) -> Result<Option<WorkflowContext>, StorageError> {
        self.shared.check(instance_id)?;
        let found = self.shared.tier.get(instance_id);
        if found.is_none() {
            tracing::debug!(target: LOG_TARGET, instance_id = ?instance_id, "no context is stored for this workflow instance");
        }
        Ok(found)
    }

    /// Forgets an instance with all its runs; `true` where something was stored.
    ///
    /// Locks one shard of memory for the time of the removal.
    ///
    /// # Errors
    ///
    /// [`StorageError::InvalidInstanceId`] where the id is empty or too long.
    pub fn cleanup(&self, instance_id: &str) -> Result<bool, StorageError> {
        self.shared.check(instance_id)?;
        Ok(self.shared.tier.cleanup(instance_id))
    }

    /// Opens and ends the span of a resumed agent, and stores its context, marked resumed.
    ///
    /// The span is called `{agent_name or DurableAgent}.ToolCallingWorkflow` and carries
    /// `openinference.span.kind = AGENT`, `workflow.instance_id`, `workflow.resumed = true` and `agent.name`.
    /// What is stored for the instance becomes its parent; without it, it is the root of a new trace. The
    /// tracer is the one last given to [`layer`](Self::layer) or [`tracer`](Self::tracer) while that lives,
    /// else the global tracer provider's. No lock is held while the span is made.
    ///
    /// # Errors
    ///
    /// [`CreateResumedError::NoRecordingSpan`] where no span that records could be made, the errors of
    /// [`store`](Self::store) otherwise. Nothing is stored then.
    pub fn create_resumed(
        &self,
        instance_id: &str,
        agent_name: Option<&str>,
    ) -> Result<WorkflowContext, CreateResumedError> {
        self.shared.check(instance_id)?;
        let stored = self.shared.tier.peek(instance_id);
        let parent = stored.map_or_else(Context::new, |stored| stored.to_otel());
        let span = (self.shared.agent_tracer).end_at_once(instance_id, agent_name, &parent);
        let context = span
            .and_then(|span| WorkflowContext::of_span(&span, self.shared.clock.now()))
            .ok_or(CreateResumedError::NoRecordingSpan)?
            .into_resumed();
        self.store(instance_id, context.clone())?;
        Ok(context)
    }

    /// The counters, each read on its own: a total over several may be off by what happens meanwhile.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// The ids of all instances in memory, in no order: a snapshot that other threads may already have changed.
    ///
    /// Locks one shard of memory after the other, for 128 ids at a time.
    #[must_use]
    pub fn instance_ids(&self) -> Vec<String> {
        self.shared.tier.cache().ids().collect()
    }

    /// The ids of all instances in memory, in no order, fetched 128 at a time. An instance that is there all the
    /// while is shown; one may be shown twice while others are removed.
    ///
    /// Locks one shard of memory while a page is fetched, and none between.
    pub fn iter_instance_ids(&self) -> impl Iterator<Item = String> + '_ {
        self.shared.tier.cache().ids()
    }

    /// What is recorded for the instance, by whom, and why its last spans went where they did; where nothing is
    /// recorded, the reason as far as it is known.
    ///
    /// ```
    /// # let storage = tracing_workflow_context::WorkflowContextStorage::new();
    /// let explanation = storage.explain("order-42");
    /// assert!(!explanation.is_recorded());
    /// assert!(explanation.to_string().contains("never seen"));
    /// ```
    #[must_use]
    pub fn explain(&self, instance_id: &str) -> Explanation {
        self.shared.explain(instance_id)
    }

    /// Waits until everything that was stored so far has reached the backend. In memory it always has.
    ///
    /// # Errors
    ///
    /// [`StorageError::Backend`] where the backend failed.
    pub fn flush(&self) -> Result<(), StorageError> {
        Ok(self.shared.tier.flush()?)
    }
}

impl fmt::Debug for WorkflowContextStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkflowContextStorage")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
