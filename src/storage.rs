//! The storage handle: the explicit API, and the constructors of the layer and the tracer.

pub(crate) mod builder;
mod claim;
pub(crate) mod global;
mod late;
mod lifetimes;
mod refresh;
pub(crate) mod remote;
pub(crate) mod shared;
pub(crate) mod tier;

use std::fmt;
use std::sync::Arc;

use opentelemetry::Context;
use opentelemetry::trace::{Tracer, TracerProvider};
#[cfg(feature = "durable-root")]
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, ShouldSample};
use tracing::Subscriber;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::layer::Filter;
use tracing_subscriber::registry::LookupSpan;

use crate::context::WorkflowContext;
use crate::error::{CreateResumedError, InvalidInstanceId, StorageError};
use crate::explain::Explanation;
use crate::fields::value::{EndStatus, is_plain};
use crate::layer::WorkflowContextLayer;
use crate::layer::log_filter::LogFilter;
use crate::own_spans::agent_span_name;
#[cfg(feature = "durable-root")]
use crate::root::ids::{WorkflowIdGenerator, WorkflowSampler};
use crate::stats::Stats;
use crate::tracer::rooted::record_root;
use crate::tracer::{WorkflowTracer, WorkflowTracerProvider};
use crate::warnings::LOG_TARGET;
use shared::Shared;

/// A storage of one trace context per workflow instance, and the source of the layer and the tracers that use it.
///
/// This is a handle: clones are cheap and share everything. When the last one is dropped, the layers and tracers made
/// from it included, the contexts in memory are gone.
///
/// Its calls read an id as it is read from a span: a string in quotes, which is how `?order` formats it, is the id without
/// them, `Some(..)` is what is in it, and `None` is no id, as the empty string is none.
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
    /// Creates the layer that replaces `tracing_opentelemetry::layer().with_tracer(tracer)`.
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

    /// Creates the layer as [`layer`](Self::layer) does, with settings of the OpenTelemetry layer.
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
            WorkflowTracer::for_layer(self.shared.share_tracer(tracer), self.shared.clone());
        let otel = settings(OpenTelemetryLayer::new(tracer));
        WorkflowContextLayer::new(otel, self.shared.clone())
    }

    /// Creates a tracer for spans that are made through the OpenTelemetry API alone.
    ///
    /// A span whose attributes name an instance is recorded and re-parented as one of the layer is. `tracer`
    /// is also what [`create_resumed`](Self::create_resumed) uses from now on.
    pub fn tracer<T>(&self, tracer: T) -> WorkflowTracer<T>
    where
        T: Tracer + Send + Sync + 'static,
        T::Span: Send + Sync + 'static,
    {
        WorkflowTracer::for_api(self.shared.share_tracer(tracer), self.shared.clone())
    }

    /// Creates a tracer provider each of whose tracers is one of [`tracer`](Self::tracer): for libraries that get theirs
    /// from `opentelemetry::global`, past every layer.
    ///
    /// The spans of a layer go through the tracer that the layer was given; give that one of the undecorated provider.
    ///
    /// ```
    /// use opentelemetry::global;
    /// use opentelemetry::trace::TracerProvider as _;
    /// use opentelemetry_sdk::trace::SdkTracerProvider;
    /// use tracing_subscriber::prelude::*;
    /// use tracing_workflow_context::WorkflowContextStorage;
    ///
    /// let provider = SdkTracerProvider::builder().build();
    /// let storage = WorkflowContextStorage::new();
    /// global::set_tracer_provider(storage.tracer_provider(provider.clone()));
    /// tracing_subscriber::registry().with(storage.layer(provider.tracer("orders"))).init();
    /// ```
    pub fn tracer_provider<P>(&self, provider: P) -> WorkflowTracerProvider<P>
    where
        P: TracerProvider,
        P::Tracer: Send + Sync + 'static,
        <P::Tracer as Tracer>::Span: Send + Sync + 'static,
    {
        WorkflowTracerProvider::new(provider, self.shared.clone())
    }

    /// Stores the context of an instance; the last write wins, over what a span recorded too.
    ///
    /// Locks one shard of memory for the time of the write.
    ///
    /// # Errors
    ///
    /// [`StorageError::InvalidInstanceId`] if the id is empty, `None`, or longer than 1,024 bytes.
    pub fn store(&self, instance_id: &str, context: WorkflowContext) -> Result<(), StorageError> {
        // Fast path: nearly every id is read as it is.
        if is_plain(instance_id) && InvalidInstanceId::check(instance_id).is_ok() {
            self.shared.tier.store(instance_id, context);
            return Ok(());
        }
        let instance_id = self.shared.read_id(instance_id)?;
        self.shared.tier.store(&instance_id, context);
        Ok(())
    }

    /// Returns the context of the latest run of an instance. A miss is normal, and counted.
    ///
    /// Locks one shard of memory for the time of the lookup.
    ///
    /// # Errors
    ///
    /// [`StorageError::InvalidInstanceId`] if the id is empty, `None`, or longer than 1,024 bytes.
    pub fn get(&self, instance_id: &str) -> Result<Option<WorkflowContext>, StorageError> {
        let instance_id = self.shared.read_id(instance_id)?;
        let found = self.shared.tier.get(&instance_id);
        if found.is_none() {
            tracing::debug!(target: LOG_TARGET, instance_id = ?instance_id, "no context is stored for this workflow instance");
        }
        Ok(found)
    }

    /// Removes an instance with all its runs. Returns `true` if something was stored.
    ///
    /// Locks one shard of memory for the time of the removal.
    ///
    /// # Errors
    ///
    /// [`StorageError::InvalidInstanceId`] if the id is empty, `None`, or longer than 1,024 bytes.
    pub fn cleanup(&self, instance_id: &str) -> Result<bool, StorageError> {
        let instance_id = self.shared.read_id(instance_id)?;
        Ok(self.shared.tier.cleanup(&instance_id))
    }

    /// Returns a per-layer filter that hides the events of replayed spans from a logging layer: what re-executed code tells
    /// once more. Events outside any replay, and in real spans, pass, as do all spans.
    ///
    /// Exported traces are without replays anyway; a layer that logs sees all events, since it does not ask this crate.
    /// Whether a span is replayed is known once it has started, so the subscriber needs the layer of this storage too.
    ///
    /// ```
    /// # use tracing_workflow_context::WorkflowContextStorage;
    /// use opentelemetry::trace::TracerProvider as _;
    /// use tracing_subscriber::Layer as _;
    /// use tracing_subscriber::prelude::*;
    ///
    /// # let tracer = opentelemetry_sdk::trace::SdkTracerProvider::builder().build().tracer("orders");
    /// let storage = WorkflowContextStorage::new();
    /// let subscriber = tracing_subscriber::registry()
    ///     .with(storage.layer(tracer))
    ///     .with(tracing_subscriber::fmt::layer().with_filter(storage.log_filter()));
    /// # drop(subscriber);
    /// ```
    #[must_use]
    pub fn log_filter<S>(&self) -> impl Filter<S> + Send + Sync + 'static + use<S>
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
    {
        LogFilter::new(self.shared.clone())
    }

    /// Tells the end of an instance, as a terminal `workflow.status` on one of its spans does: for engines that call back when
    /// a workflow has ended. Returns `true` if something was stored.
    ///
    /// `status` is one of `completed`, `failed`, `timed_out`, `terminated`, `canceled`, or another word that is read from
    /// spans. What is stored stays for the [`completed_grace`](crate::WorkflowContextStorageBuilder::completed_grace); with a durable
    /// root, the workflow's own span is exported.
    ///
    /// # Errors
    ///
    /// [`StorageError::InvalidInstanceId`] if the id is empty, `None`, or longer than 1,024 bytes, and
    /// [`StorageError::NoTerminalStatus`] if the status is none. Nothing is changed then.
    pub fn complete(&self, instance_id: &str, status: &str) -> Result<bool, StorageError> {
        let instance_id = self.shared.read_id(instance_id)?;
        let status = EndStatus::parse(status).ok_or(StorageError::NoTerminalStatus)?;
        Ok(self.shared.tier.complete_called(&instance_id, status))
    }

    /// Returns the id generator of [durable roots](crate::WorkflowContextStorageBuilder::durable_root), for
    /// `SdkTracerProvider::builder().with_id_generator(..)`: the SDK's random one, but for the ids of workflows' own spans.
    #[cfg(feature = "durable-root")]
    #[cfg_attr(docsrs, doc(cfg(feature = "durable-root")))]
    #[must_use]
    pub fn id_generator(&self) -> WorkflowIdGenerator {
        self.id_generator_over(RandomIdGenerator::default())
    }

    /// Returns the id generator of durable roots over another one than the SDK's random one.
    #[cfg(feature = "durable-root")]
    #[cfg_attr(docsrs, doc(cfg(feature = "durable-root")))]
    #[must_use]
    pub fn id_generator_over<G: IdGenerator>(&self, inner: G) -> WorkflowIdGenerator<G> {
        WorkflowIdGenerator::new(inner)
    }

    /// Returns the sampler of [durable roots](crate::WorkflowContextStorageBuilder::durable_root), for
    /// `SdkTracerProvider::builder().with_sampler(..)`: the one given, which is asked once for each workflow's own span.
    #[cfg(feature = "durable-root")]
    #[cfg_attr(docsrs, doc(cfg(feature = "durable-root")))]
    #[must_use]
    pub fn sampler(&self, inner: impl ShouldSample + 'static) -> WorkflowSampler {
        WorkflowSampler::new(inner)
    }

    /// Opens and ends the span of a resumed agent, and stores its context, marked resumed.
    ///
    /// The span is called `{agent_name or DurableAgent}.ToolCallingWorkflow` and carries
    /// `openinference.span.kind = AGENT`, `workflow.instance_id`, `workflow.resumed = true`, `agent.name` and
    /// `gen_ai.agent.name`. The context stored for the instance becomes its parent; without one it is the root of a new
    /// trace, or with a [durable root](crate::WorkflowContextStorageBuilder::durable_root) the first child of that, in the derived
    /// trace if ids are derived. Of the tracers given to [`layer`](Self::layer), [`tracer`](Self::tracer) and made by a
    /// [`tracer_provider`](Self::tracer_provider), it goes through the last one that lives; if there is none, through the
    /// global tracer provider's. No lock is held while the span is made.
    ///
    /// # Errors
    ///
    /// [`CreateResumedError::NoRecordingSpan`] if no recording span could be opened, else the errors of
    /// [`store`](Self::store). Nothing is stored then.
    pub fn create_resumed(
        &self,
        instance_id: &str,
        agent_name: Option<&str>,
    ) -> Result<WorkflowContext, CreateResumedError> {
        let instance_id = self.shared.read_id(instance_id)?;
        let stored = self.shared.tier.peek(&instance_id);
        let new_root = || record_root(&self.shared, &instance_id, &agent_span_name(agent_name));
        let parent = stored.or_else(new_root);
        let parent = parent.map_or_else(Context::new, |parent| parent.to_otel());
        let span = (self.shared.tracers).export_agent(&instance_id, agent_name, &parent);
        let mut context = span
            .and_then(|span| WorkflowContext::from_span(&span, self.shared.clock.now()))
            .ok_or(CreateResumedError::NoRecordingSpan)?
            .into_resumed();
        context.take_whole_state_of(&parent);
        self.shared.tier.store(&instance_id, context.clone());
        Ok(context)
    }

    /// Returns the counters. Each is read on its own, so a sum over several may be off by what happens meanwhile.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Returns the ids of all instances in memory, in no order: a snapshot that other threads may already have changed.
    ///
    /// Locks one shard of memory after the other, for 128 ids at a time.
    #[must_use]
    pub fn instance_ids(&self) -> Vec<String> {
        self.shared.tier.cache().ids().collect()
    }

    /// Iterates over the ids of all instances in memory, in no order, 128 at a time. An instance that stays is shown; it
    /// may be shown twice while others are removed.
    ///
    /// Locks one shard of memory while a page is fetched, and none between.
    pub fn iter_instance_ids(&self) -> impl Iterator<Item = String> + '_ {
        self.shared.tier.cache().ids()
    }

    /// Explains what is recorded for the instance, by which span, and why its last spans went where they did; if nothing
    /// is recorded, the reason as far as it is known.
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
    /// [`StorageError::Backend`] if the backend failed, and [`StorageError::NotWritten`] if writes since the last flush were
    /// dropped or are refused: with their numbers and the first cause.
    pub fn flush(&self) -> Result<(), StorageError> {
        self.shared.tier.flush()
    }
}

impl fmt::Debug for WorkflowContextStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkflowContextStorage")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
