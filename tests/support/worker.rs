//! One helper sets up a storage and its layer, runs a closure, and returns what was exported.

use std::sync::{Mutex, OnceLock};
use std::thread;

use opentelemetry::trace::{SpanContext, TraceId, TracerProvider as _};
use opentelemetry_sdk::trace::{
    InMemorySpanExporter, Sampler, SdkTracer, SdkTracerProvider, ShouldSample, SpanData,
    SpanProcessor, TracerProviderBuilder,
};
use tracing::instrument::WithSubscriber as _;
use tracing::{Dispatch, Subscriber};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_workflow_context::backend::StorageBackend;
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{
    WorkflowContextLayer, WorkflowContextStorage, WorkflowContextStorageBuilder, WorkflowTracer,
};

use super::{PATIENCE, assert_context_stack_is_empty, span_context, wait_until};

/// A worker process in miniature: a storage, its layer in a subscriber, and an exporter in memory.
pub(crate) struct Worker {
    pub(crate) storage: WorkflowContextStorage,
    pub(crate) dispatch: Dispatch,
    pub(super) via: Via,
    /// Made when first used: a storage resumes workflows with the tracer it gave out last.
    pub(super) api: OnceLock<WorkflowTracer<SdkTracer>>,
    pub(crate) provider: SdkTracerProvider,
    pub(crate) exporter: InMemorySpanExporter,
}

/// The way in which [`Worker::open`] makes spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    Layer,
    LayerWithoutActivation,
    /// The OpenTelemetry API.
    Api,
}

pub(crate) const VIAS: [Via; 3] = [Via::Layer, Via::LayerWithoutActivation, Via::Api];

/// Runs a test for each way to make spans; a failure says for which.
pub(crate) fn for_each_via(test: impl Fn(Via)) {
    for via in VIAS {
        labelled(&format!("spans made via {via:?}"), || test(via));
    }
}

/// Runs a test on a new worker for each way to make spans, within the worker's subscriber.
pub(crate) fn for_each_worker(make: impl Fn() -> WorkflowContextStorage, test: impl Fn(&Worker)) {
    for_each_via(|via| {
        let worker = Worker::via(via, make());
        worker.run(|| test(&worker));
    });
}

/// The thread or task on which code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    SameThread,
    OtherThread,
    Tokio,
}

pub(crate) const PLACES: [Place; 3] = [Place::SameThread, Place::OtherThread, Place::Tokio];

/// Runs a test in every place with and without context activation, on a new worker each time. A failure says where
/// it happened, and draws what was exported.
pub(crate) fn everywhere(make: impl Fn() -> WorkflowContextStorage, test: impl Fn(&Worker, Place)) {
    for place in PLACES {
        for (worker, activation) in both_activations(&make).iter().zip(["with", "without"]) {
            let _drawing = DrawnOnPanic(worker, format!("{place:?}, {activation} activation"));
            test(worker, place);
        }
    }
}

/// Returns a worker with context activation, and one without.
pub(crate) fn both_activations(make: impl Fn() -> WorkflowContextStorage) -> [Worker; 2] {
    [true, false].map(|on| Worker::with_sampler(make(), on, default_sampler()))
}

/// Prints the label if the closure panics.
pub(crate) fn labelled<R>(label: &str, run: impl FnOnce() -> R) -> R {
    struct Label<'a>(&'a str);
    impl Drop for Label<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                eprintln!("... with {}", self.0);
            }
        }
    }
    let _label = Label(label);
    run()
}

/// Draws what the worker exported, below a label, if the test fails while this lives.
pub(crate) struct DrawnOnPanic<'a>(pub(crate) &'a Worker, pub(crate) String);

impl Drop for DrawnOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}:\n{}", self.1, self.0.forest());
        }
    }
}

/// Returns a builder for a storage whose lookups wait for the backend as long as they need to.
pub(crate) fn patient(backend: impl StorageBackend) -> WorkflowContextStorageBuilder {
    WorkflowContextStorage::builder()
        .backend(backend)
        .lookup_budget(PATIENCE)
}

/// The SDK's default: only spans without a parent are decided on.
fn default_sampler() -> Sampler {
    Sampler::ParentBased(Box::new(Sampler::AlwaysOn))
}

impl Worker {
    pub(crate) fn new() -> Self {
        Self::with_storage(WorkflowContextStorage::new())
    }

    pub(crate) fn with_storage(storage: WorkflowContextStorage) -> Self {
        Self::via(Via::Layer, storage)
    }

    pub(crate) fn via(via: Via, storage: WorkflowContextStorage) -> Self {
        Self::via_with_sampler(via, storage, default_sampler())
    }

    pub(crate) fn via_with_sampler(
        via: Via,
        storage: WorkflowContextStorage,
        sampler: impl ShouldSample + 'static,
    ) -> Self {
        let activation = via != Via::LayerWithoutActivation;
        let worker = Self::with_sampler(storage, activation, sampler);
        Self { via, ..worker }
    }

    pub(crate) fn with_sampler(
        storage: WorkflowContextStorage,
        context_activation: bool,
        sampler: impl ShouldSample + 'static,
    ) -> Self {
        let provider = SdkTracerProvider::builder().with_sampler(sampler);
        Self::assembled(provider, storage, context_activation, alone)
    }

    pub(crate) fn with_processor(
        storage: WorkflowContextStorage,
        context_activation: bool,
        processor: impl SpanProcessor + 'static,
    ) -> Self {
        let provider = SdkTracerProvider::builder().with_span_processor(processor);
        Self::assembled(provider, storage, context_activation, alone)
    }

    /// A worker whose layer the caller puts into a subscriber.
    pub(crate) fn stacked<S>(
        storage: WorkflowContextStorage,
        context_activation: bool,
        stack: impl FnOnce(WorkflowContextLayer<S, SdkTracer>) -> Dispatch,
    ) -> Self
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
    {
        let provider = SdkTracerProvider::builder();
        Self::assembled(provider, storage, context_activation, stack)
    }

    /// A worker with the caller's tracer provider, whose layer the caller puts into a subscriber.
    pub(crate) fn assembled<S>(
        provider: TracerProviderBuilder,
        storage: WorkflowContextStorage,
        context_activation: bool,
        stack: impl FnOnce(WorkflowContextLayer<S, SdkTracer>) -> Dispatch,
    ) -> Self
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
    {
        let exporter = InMemorySpanExporter::default();
        let provider = provider.with_simple_exporter(exporter.clone()).build();
        let dispatch = stack(storage.layer_with(provider.tracer("test"), |otel| {
            otel.with_context_activation(context_activation)
        }));
        let via = match context_activation {
            true => Via::Layer,
            false => Via::LayerWithoutActivation,
        };
        Self {
            storage,
            dispatch,
            via,
            api: OnceLock::new(),
            provider,
            exporter,
        }
    }

    /// Drops the worker, and waits until its subscriber is gone: whenever another test registers a callsite or a subscriber,
    /// `tracing` holds all subscribers for a moment.
    pub(crate) fn close(self) {
        let subscriber = self.dispatch.downgrade();
        drop(self);
        wait_until("the subscriber is gone", || subscriber.upgrade().is_none());
    }

    /// Makes spans in that way.
    pub(crate) fn made_by(self, via: Via) -> Self {
        Self { via, ..self }
    }

    pub(crate) fn tracer(&self) -> SdkTracer {
        self.provider.tracer("test")
    }

    /// Runs the closure within this worker's subscriber, on this thread.
    pub(crate) fn run<R>(&self, run: impl FnOnce() -> R) -> R {
        let result = tracing::dispatcher::with_default(&self.dispatch, run);
        assert_context_stack_is_empty();
        result
    }

    /// Runs the closure within this worker's subscriber, in that place.
    pub(crate) fn run_in<R: Send>(&self, place: Place, run: impl FnOnce() -> R + Send) -> R {
        match place {
            Place::SameThread => self.run(run),
            Place::OtherThread => thread::scope(|scope| {
                scope
                    .spawn(|| self.run(run))
                    .join()
                    .expect("the code under test panicked")
            }),
            Place::Tokio => {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .build();
                let runtime = runtime.expect("a runtime");
                let run = Mutex::new(Some(run));
                thread::scope(|scope| {
                    let handle = runtime.handle();
                    let task = async {
                        tokio::task::yield_now().await;
                        let run = run.lock().unwrap().take().expect("polled once");
                        run()
                    };
                    let task = task.with_subscriber(self.dispatch.clone());
                    scope
                        .spawn(move || handle.block_on(task))
                        .join()
                        .expect("the code under test panicked")
                })
            }
        }
    }

    /// Returns the spans that were exported so far, in the order in which they ended.
    pub(crate) fn spans(&self) -> Vec<SpanData> {
        self.exporter
            .get_finished_spans()
            .expect("the exporter is up")
    }

    pub(crate) fn forest(&self) -> TraceForest {
        TraceForest::from_spans(&self.spans())
    }

    /// Returns the only exported span of that name.
    #[track_caller]
    pub(crate) fn span(&self, name: &str) -> SpanData {
        let mut named: Vec<_> = self
            .spans()
            .into_iter()
            .filter(|span| span.name == name)
            .collect();
        assert_eq!(named.len(), 1, "spans named {name} in\n{}", self.forest());
        named.remove(0)
    }

    /// Returns the trace of the only exported span of that name.
    #[track_caller]
    pub(crate) fn trace_of(&self, name: &str) -> TraceId {
        self.span(name).span_context.trace_id()
    }

    /// Returns the names of the exported spans, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .spans()
            .iter()
            .map(|span| span.name.to_string())
            .collect();
        names.sort();
        names
    }

    /// Returns the context that is stored for the instance, as its spans see it.
    #[track_caller]
    pub(crate) fn stored(&self, id: &str) -> SpanContext {
        let stored = self.storage.get(id).unwrap();
        span_context(&stored.expect("a stored context"))
    }

    /// Returns the trace that is stored for the instance.
    #[track_caller]
    pub(crate) fn stored_trace(&self, id: &str) -> TraceId {
        self.stored(id).trace_id()
    }
}

/// Puts a layer into a subscriber without other layers.
fn alone(layer: WorkflowContextLayer<tracing_subscriber::Registry, SdkTracer>) -> Dispatch {
    Dispatch::new(tracing_subscriber::registry().with(layer))
}
