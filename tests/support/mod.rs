//! One helper sets up, runs a closure and returns the evidence.
#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "a module of every test file, none of which uses all"
)]

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, TraceContextExt as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue, SpanId, TraceFlags, TraceId, Value};
use opentelemetry_sdk::trace::{
    InMemorySpanExporter, Sampler, SdkTracer, SdkTracerProvider, ShouldSample, SpanData,
};
use tracing::Dispatch;
use tracing::instrument::WithSubscriber as _;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{Clock, WorkflowContextStorage};

/// A worker: a storage, its layer in a subscriber, and what was exported.
pub struct Worker {
    pub storage: WorkflowContextStorage,
    pub provider: SdkTracerProvider,
    pub dispatch: Dispatch,
    exporter: InMemorySpanExporter,
}

/// Where code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    SameThread,
    OtherThread,
    Tokio,
}

pub const PLACES: [Place; 3] = [Place::SameThread, Place::OtherThread, Place::Tokio];

/// A worker with context activation, and one without.
pub fn both_activations(make: impl Fn() -> WorkflowContextStorage) -> [Worker; 2] {
    [true, false].map(|on| Worker::with(make(), on, Sampler::AlwaysOn))
}

impl Worker {
    pub fn new() -> Self {
        Self::of(WorkflowContextStorage::new())
    }

    pub fn of(storage: WorkflowContextStorage) -> Self {
        Self::with(storage, true, Sampler::AlwaysOn)
    }

    pub fn with(
        storage: WorkflowContextStorage,
        context_activation: bool,
        sampler: impl ShouldSample + 'static,
    ) -> Self {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .with_sampler(sampler)
            .build();
        let layer = storage.layer_with(provider.tracer("test"), |otel| {
            otel.with_context_activation(context_activation)
        });
        let dispatch = Dispatch::new(tracing_subscriber::registry().with(layer));
        Self {
            storage,
            provider,
            dispatch,
            exporter,
        }
    }

    pub fn tracer(&self) -> SdkTracer {
        self.provider.tracer("test")
    }

    /// Runs with this worker's subscriber, on this thread.
    pub fn run<R>(&self, run: impl FnOnce() -> R) -> R {
        let result = tracing::dispatcher::with_default(&self.dispatch, run);
        assert_context_stack_is_empty();
        result
    }

    /// Runs with this worker's subscriber, there.
    pub fn run_in<R: Send>(&self, place: Place, run: impl FnOnce() -> R + Send) -> R {
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
                        .expect("a panic")
                })
            }
        }
    }

    /// What was exported so far, in the order of ending.
    pub fn spans(&self) -> Vec<SpanData> {
        self.exporter
            .get_finished_spans()
            .expect("the exporter is up")
    }

    pub fn forest(&self) -> TraceForest {
        TraceForest::from_spans(&self.spans())
    }

    /// The one exported span of that name.
    #[track_caller]
    pub fn span(&self, name: &str) -> SpanData {
        let mut named: Vec<_> = self
            .spans()
            .into_iter()
            .filter(|span| span.name == name)
            .collect();
        assert_eq!(named.len(), 1, "spans named {name} in\n{}", self.forest());
        named.remove(0)
    }

    /// The trace that is stored for the instance.
    #[track_caller]
    pub fn stored_trace(&self, id: &str) -> TraceId {
        self.storage
            .get(id)
            .unwrap()
            .expect("a stored context")
            .trace_id()
    }
}

/// Whatever was entered was left again.
#[track_caller]
pub fn assert_context_stack_is_empty() {
    assert!(
        !Context::current().has_active_span(),
        "a context is still attached"
    );
}

/// A remote span context that no test span has.
pub fn remote(trace: u128, span: u64) -> SpanContext {
    SpanContext::new(
        TraceId::from(trace),
        SpanId::from(span),
        TraceFlags::SAMPLED,
        true,
        Default::default(),
    )
}

pub fn remote_context(trace: u128, span: u64) -> Context {
    Context::new().with_remote_span_context(remote(trace, span))
}

pub fn attribute(span: &SpanData, key: &str) -> Option<Value> {
    let found = span.attributes.iter().find(|kv| kv.key.as_str() == key);
    found.map(|KeyValue { value, .. }| value.clone())
}

/// The relation that a span's one link tells of, and its target.
#[track_caller]
pub fn link(span: &SpanData) -> (String, SpanContext) {
    assert_eq!(span.links.len(), 1, "links of {}", span.name);
    let link = &span.links[0];
    let relation = link
        .attributes
        .iter()
        .find(|kv| kv.key.as_str() == "workflow.relation");
    let relation = relation
        .expect("every link names its relation")
        .value
        .to_string();
    (relation, link.span_context.clone())
}

/// Time that passes when it is told to.
#[derive(Debug)]
pub struct ManualClock(Mutex<SystemTime>);

impl ManualClock {
    pub fn new() -> Arc<Self> {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        Arc::new(Self(Mutex::new(start)))
    }

    pub fn advance(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }
}

impl Clock for ManualClock {
    fn now(&self) -> SystemTime {
        *self.0.lock().unwrap()
    }
}

/// Runs the scenario in every place with both modes of context activation, on a new worker each time. A failure
/// says where it happened, and draws what was exported.
pub fn everywhere(make: impl Fn() -> WorkflowContextStorage, scenario: impl Fn(&Worker, Place)) {
    for place in PLACES {
        for (worker, activation) in both_activations(&make).iter().zip(["with", "without"]) {
            let _drawing = DrawnOnPanic(worker, format!("{place:?}, {activation} activation"));
            scenario(worker, place);
        }
    }
}

/// Draws what the worker exported, if the test fails while this lives.
pub struct DrawnOnPanic<'a>(pub &'a Worker, pub String);

impl Drop for DrawnOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}:\n{}", self.1, self.0.forest());
        }
    }
}

impl Worker {
    /// What is stored for the instance, as its spans see it.
    #[track_caller]
    pub fn stored(&self, id: &str) -> SpanContext {
        let stored = self.storage.get(id).unwrap().expect("a stored context");
        stored.to_otel().span().span_context().clone()
    }
}

#[track_caller]
pub fn assert_same_span(one: &SpanContext, other: &SpanContext) {
    assert_eq!(
        (one.trace_id(), one.span_id()),
        (other.trace_id(), other.span_id())
    );
}

#[track_caller]
pub fn assert_root(span: &SpanData) {
    assert_eq!(
        span.parent_span_id,
        SpanId::INVALID,
        "the parent of {}",
        span.name
    );
}

/// The parent is a span of this process.
#[track_caller]
pub fn assert_nested(span: &SpanData, parent: &SpanData) {
    assert_child(span, &parent.span_context, false);
}

/// The parent is a context that came from elsewhere, as what is stored always did.
#[track_caller]
pub fn assert_continues(span: &SpanData, parent: &SpanContext) {
    assert_child(span, parent, true);
}

#[track_caller]
fn assert_child(span: &SpanData, parent: &SpanContext, is_remote: bool) {
    let got = (
        span.span_context.trace_id(),
        span.parent_span_id,
        span.parent_span_is_remote,
    );
    let expected = (parent.trace_id(), parent.span_id(), is_remote);
    assert_eq!(
        got, expected,
        "trace, parent and whether that is remote, of {}",
        span.name
    );
}

impl Worker {
    /// A worker whose layer is stacked into a subscriber by the caller.
    pub fn stacked<S>(
        storage: WorkflowContextStorage,
        context_activation: bool,
        stack: impl FnOnce(tracing_workflow_context::WorkflowContextLayer<S, SdkTracer>) -> Dispatch,
    ) -> Self
    where
        S: tracing::Subscriber + for<'span> tracing_subscriber::registry::LookupSpan<'span>,
    {
        Self::assembled(
            SdkTracerProvider::builder(),
            storage,
            context_activation,
            stack,
        )
    }

    /// Forgets what was stored and exported.
    pub fn forget(&self) {
        self.exporter.reset();
        for id in self.storage.instance_ids() {
            self.storage.cleanup(&id).unwrap();
        }
    }

    /// As `stacked`, with a tracer provider that the caller has begun to build.
    pub fn assembled<S>(
        provider: opentelemetry_sdk::trace::TracerProviderBuilder,
        storage: WorkflowContextStorage,
        context_activation: bool,
        stack: impl FnOnce(tracing_workflow_context::WorkflowContextLayer<S, SdkTracer>) -> Dispatch,
    ) -> Self
    where
        S: tracing::Subscriber + for<'span> tracing_subscriber::registry::LookupSpan<'span>,
    {
        let exporter = InMemorySpanExporter::default();
        let provider = provider.with_simple_exporter(exporter.clone()).build();
        let dispatch = stack(storage.layer_with(provider.tracer("test"), |otel| {
            otel.with_context_activation(context_activation)
        }));
        Self {
            storage,
            provider,
            dispatch,
            exporter,
        }
    }
}

mod stage;
pub use stage::*;

/// Runs on several threads that begin together, each with its number from 0.
pub fn at_once<R: Send>(threads: usize, run: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let (start, run) = (&std::sync::Barrier::new(threads), &run);
    thread::scope(|scope| {
        let start_one = |thread| {
            scope.spawn(move || {
                start.wait();
                run(thread)
            })
        };
        let threads: Vec<_> = (0..threads).map(start_one).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a thread panicked"))
            .collect()
    })
}

impl Worker {
    /// A worker whose ended spans are shown to a processor too.
    pub fn with_processor(
        storage: WorkflowContextStorage,
        context_activation: bool,
        processor: impl opentelemetry_sdk::trace::SpanProcessor + 'static,
    ) -> Self {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .with_span_processor(processor)
            .build();
        let layer = storage.layer_with(provider.tracer("test"), |otel| {
            otel.with_context_activation(context_activation)
        });
        let dispatch = Dispatch::new(tracing_subscriber::registry().with(layer));
        Self {
            storage,
            provider,
            dispatch,
            exporter,
        }
    }
}

mod files;
pub use files::*;

mod puppet;
pub use puppet::*;
