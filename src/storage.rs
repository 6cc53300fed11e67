//! The storage handle.

pub(crate) mod backend;
mod backing;
pub(crate) mod beyond;
pub(crate) mod builder;
#[cfg(any(test, feature = "redb", feature = "redis"))]
#[cfg_attr(
    not(feature = "redb"),
    allow(dead_code, reason = "the look at the expiry alone is for redb")
)]
mod codec;
pub(crate) mod core;
pub(crate) mod memory;
pub(crate) mod memory_backend;
mod queue;
#[cfg(feature = "redb")]
pub(crate) mod redb;
#[cfg(feature = "redis")]
pub(crate) mod redis;

use std::fmt;
use std::sync::Arc;

use opentelemetry::trace::{SpanBuilder, Tracer};
use opentelemetry::{Context, KeyValue};
use tracing::Subscriber;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::registry::LookupSpan;

use crate::context::WorkflowContext;
use crate::error::{CreateResumedError, StorageError};

use crate::explain::Explanation;
use crate::fields;
use crate::layer::WorkflowContextLayer;
use crate::tracer::WorkflowTracer;
use builder::WorkflowContextStorageBuilder;
use core::Core;

/// The name of the instrumentation scope of spans that this crate opens itself.
const SCOPE: &str = env!("CARGO_PKG_NAME");

/// The span name of a resumed agent without a name, and its `agent.name`: dapr-agents' word.
const DEFAULT_AGENT: &str = "DurableAgent";

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
    pub(crate) core: Arc<Core>,
}

/// How a storage has fared since it was made. All counters only grow, but `stored_instances`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Instances that are in memory now.
    pub stored_instances: u64,
    /// Lookups, by spans and by `get`, that found a context.
    pub hits: u64,
    /// Lookups that found none. The first span of every instance is one.
    pub misses: u64,
    /// Ids that were recorded on a span after it had started, when only a link was left.
    pub late: u64,
    /// Instances that memory dropped because they were idle or completed for too long.
    pub expired: u64,
    /// Instances that memory dropped because there were more than `max_instances`.
    pub evicted: u64,
    /// Values of the backend that could not be decoded, and were treated as missing.
    pub malformed: u64,
    /// Writes that were dropped because too many waited for the backend.
    pub dropped_writes: u64,
    /// Calls of the backend that failed.
    pub backend_errors: u64,
    /// Lookups, by spans and by calls, that the backend did not answer within the `lookup_budget`, and that were counted
    /// as misses where nothing else was found. What is not asked at all, since the backend is left alone, is in none.
    pub lookup_timeouts: u64,
    /// Ids that were refused because they are longer than [`MAX_INSTANCE_ID_BYTES`](crate::MAX_INSTANCE_ID_BYTES).
    pub oversized: u64,
    /// Spans that lost the race for being the recorded one, and were linked to the winner.
    pub conflicts: u64,
    /// Spans that were not exported because they are replays.
    pub replayed: u64,
    /// Events that were dropped with a replayed span.
    pub replayed_events: u64,
    /// Spans whose start was held back until their instance was known.
    pub deferred: u64,
    /// Spans without an id of their own that joined the instance of their first child.
    pub adopted: u64,
}

impl Default for WorkflowContextStorage {
    fn default() -> Self {
        Self::new()
    }
}

impl WorkflowContextStorage {
    /// A storage in memory, with every setting at its default.
    #[must_use]
    pub fn new() -> Self {
        let storage = WorkflowContextStorageBuilder::default().finish();
        storage.expect("only a backend can fail, and the default has none")
    }

    /// Settings other than the defaults, tabulated at [`WorkflowContextStorageBuilder`].
    #[must_use = "a builder does nothing until build() is called"]
    pub fn builder() -> WorkflowContextStorageBuilder {
        WorkflowContextStorageBuilder::default()
    }

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
        let tracer = WorkflowTracer::for_layer(self.core.use_for_agents(tracer), self.core.clone());
        let otel = settings(OpenTelemetryLayer::new(tracer));
        WorkflowContextLayer::new(otel, self.core.clone())
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
        WorkflowTracer::for_api(self.core.use_for_agents(tracer), self.core.clone())
    }

    /// Stores the context of an instance; the last write wins, over what a span recorded too.
    ///
    /// Locks one shard of memory for the time of the write.
    ///
    /// # Errors
    ///
    /// [`StorageError::InvalidInstanceId`] where the id is empty or too long.
    pub fn store(&self, instance_id: &str, context: WorkflowContext) -> Result<(), StorageError> {
        self.core.check(instance_id)?;
        self.core.store(instance_id, context);
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
        self.core.check(instance_id)?;
        let found = self.core.get(instance_id);
        if found.is_none() {
            tracing::debug!(target: SCOPE, instance_id = ?instance_id, "no context is stored for this workflow instance");
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
        self.core.check(instance_id)?;
        Ok(self.core.cleanup(instance_id))
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
        self.core.check(instance_id)?;
        let agent = agent_name
            .filter(|name| !name.is_empty())
            .unwrap_or(DEFAULT_AGENT);
        let span =
            SpanBuilder::from_name(format!("{agent}.ToolCallingWorkflow")).with_attributes([
                KeyValue::new("openinference.span.kind", "AGENT"),
                KeyValue::new(fields::INSTANCE_ID, instance_id.to_owned()),
                KeyValue::new(fields::RESUMED, true),
                KeyValue::new(fields::AGENT_NAME, agent.to_owned()),
            ]);
        let stored = self.core.peek(instance_id);
        let parent = stored.map_or_else(Context::new, |stored| stored.to_otel());
        let ended = self.core.end_at_once(span, &parent);
        let context = ended
            .and_then(|span| WorkflowContext::of_span(&span, self.core.clock.now()))
            .ok_or(CreateResumedError::NoRecordingSpan)?
            .into_resumed();
        self.store(instance_id, context.clone())?;
        Ok(context)
    }

    /// The counters, each read on its own: a total over several may be off by what happens meanwhile.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.core.stats()
    }

    /// The ids of all instances in memory, in no order: a snapshot that other threads may already have changed.
    ///
    /// Locks one shard of memory after the other, for 128 ids at a time.
    #[must_use]
    pub fn instance_ids(&self) -> Vec<String> {
        self.core.memory.ids().collect()
    }

    /// The ids of all instances in memory, in no order, fetched 128 at a time. An instance that is there all the
    /// while is shown; one may be shown twice while others are removed.
    ///
    /// Locks one shard of memory while a page is fetched, and none between.
    pub fn iter_instance_ids(&self) -> impl Iterator<Item = String> + '_ {
        self.core.memory.ids()
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
        self.core.explain(instance_id)
    }

    /// Waits until everything that was stored so far has reached the backend. In memory it always has.
    ///
    /// # Errors
    ///
    /// [`StorageError::Backend`] where the backend failed.
    pub fn flush(&self) -> Result<(), StorageError> {
        Ok(self.core.flush()?)
    }
}

impl fmt::Debug for WorkflowContextStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkflowContextStorage")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
