//! One test for every way to make a span: by the layer in either activation mode, and by the OpenTelemetry API.

use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use opentelemetry::trace::{
    Link, SpanBuilder, SpanContext, SpanId, SpanKind, TraceContextExt as _, TraceId, Tracer as _,
};
use opentelemetry::{Context, ContextGuard, KeyValue};
use opentelemetry_sdk::trace::{
    Sampler, SamplingDecision, SamplingResult, SdkTracer, ShouldSample, SpanData,
};
use tracing::Dispatch;
use tracing::dispatcher::with_default;
use tracing::info_span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage, WorkflowTracer};

use super::{ManualClock, Worker, assert_child, attribute};

/// Who makes the spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    Layer,
    LayerWithoutActivation,
    Api,
}

pub const VIAS: [Via; 3] = [Via::Layer, Via::LayerWithoutActivation, Via::Api];

/// A worker on which all spans are made in one way, unless a test asks for another.
pub struct Stage {
    worker: Worker,
    via: Via,
    api: WorkflowTracer<SdkTracer>,
}

/// What a span says of its instance.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tags<'a> {
    instance_id: Option<&'a str>,
    run_id: Option<&'a str>,
    parent_instance_id: Option<&'a str>,
    replaying: Option<bool>,
    to_come: bool,
}

/// Nothing: an ordinary span.
pub const UNTAGGED: Tags<'static> = Tags {
    instance_id: None,
    run_id: None,
    parent_instance_id: None,
    replaying: None,
    to_come: false,
};

/// An open span; it ends when the last clone is dropped.
#[derive(Clone)]
pub struct Opened(Kind);

#[derive(Clone)]
enum Kind {
    Layer(tracing::Span),
    Api(Context),
}

/// The span is the current one of this thread while it lives.
#[allow(dead_code, reason = "both are held for their end")]
pub enum Entered<'a> {
    Layer(tracing::span::Entered<'a>),
    Api(ContextGuard),
}

/// Runs a test in each way, and names the way where it fails.
pub fn on_every_stage(make: impl Fn() -> WorkflowContextStorage, test: impl Fn(&Stage)) {
    for via in VIAS {
        labelled(&format!("spans made via {via:?}"), || {
            let stage = Stage::new(make(), via);
            stage.run(|| test(&stage));
        });
    }
}

/// Says what was tested where that fails.
pub fn labelled<R>(label: &str, run: impl FnOnce() -> R) -> R {
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

impl Stage {
    pub fn new(storage: WorkflowContextStorage, via: Via) -> Self {
        // The SDK's default, which a new root must ask as one without a parent.
        Self::with(
            storage,
            via,
            Sampler::ParentBased(Box::new(Sampler::AlwaysOn)),
        )
    }

    pub fn with(
        storage: WorkflowContextStorage,
        via: Via,
        sampler: impl ShouldSample + 'static,
    ) -> Self {
        let worker = Worker::with(storage, via != Via::LayerWithoutActivation, sampler);
        let api = worker.storage.tracer(worker.tracer());
        Self { worker, via, api }
    }

    pub fn via(&self) -> Via {
        self.via
    }

    /// Opens a span beneath the current one.
    pub fn open(&self, name: &str, tags: Tags<'_>) -> Opened {
        self.open_via(self.via, name, tags)
    }

    pub fn open_via(&self, via: Via, name: &str, tags: Tags<'_>) -> Opened {
        if via == Via::Api {
            return self.open_api(name, tags, &Context::current());
        }
        Opened::of(with_default(&self.dispatch, || match tags {
            Tags {
                instance_id: None,
                to_come: false,
                replaying: None,
                ..
            } => {
                info_span!("untagged", otel.name = name)
            }
            Tags {
                instance_id: None,
                to_come: false,
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

    /// Opens a span that is explicitly said to have no parent, whatever is current.
    pub fn open_root(&self, name: &str, instance_id: &str) -> Opened {
        if self.via == Via::Api {
            return self.open_api(name, Tags::of(instance_id), &Context::new());
        }
        Opened::of(with_default(
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
        Opened(Kind::Api(
            parent.with_span(self.api.build_with_context(builder, parent)),
        ))
    }

    /// Runs inside a new span.
    pub fn within<R>(&self, name: &str, tags: Tags<'_>, run: impl FnOnce() -> R) -> R {
        self.open(name, tags).inside(run)
    }

    /// A span inside which nothing happens.
    pub fn step(&self, name: &str, tags: Tags<'_>) {
        self.within(name, tags, || ());
    }

    /// As [`step`](Self::step), on a thread of its own.
    pub fn step_elsewhere(&self, name: &str, tags: Tags<'_>) {
        thread::scope(|scope| {
            let step = scope.spawn(|| self.run(|| self.step(name, tags)));
            step.join().expect("the step panicked");
        });
    }

    /// The trace of the exported span of that name.
    #[track_caller]
    pub fn trace_of(&self, name: &str) -> TraceId {
        self.span(name).span_context.trace_id()
    }

    /// The names of the exported spans, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .spans()
            .iter()
            .map(|span| span.name.to_string())
            .collect();
        names.sort();
        names
    }
}

impl Deref for Stage {
    type Target = Worker;

    fn deref(&self) -> &Worker {
        &self.worker
    }
}

impl<'a> Tags<'a> {
    pub fn of(instance_id: &'a str) -> Self {
        Self {
            instance_id: Some(instance_id),
            ..UNTAGGED
        }
    }

    /// The id is to be recorded later.
    pub fn to_come() -> Self {
        Self {
            to_come: true,
            ..UNTAGGED
        }
    }

    pub fn run(self, run_id: &'a str) -> Self {
        Self {
            run_id: Some(run_id),
            ..self
        }
    }

    pub fn child_of(self, parent_instance_id: &'a str) -> Self {
        Self {
            parent_instance_id: Some(parent_instance_id),
            ..self
        }
    }

    pub fn replaying(self, replaying: bool) -> Self {
        Self {
            replaying: Some(replaying),
            ..self
        }
    }
}

impl Opened {
    fn of(span: tracing::Span) -> Self {
        Self(Kind::Layer(span))
    }

    pub fn enter(&self) -> Entered<'_> {
        match &self.0 {
            Kind::Layer(span) => Entered::Layer(span.enter()),
            Kind::Api(context) => Entered::Api(context.clone().attach()),
        }
    }

    pub fn inside<R>(&self, run: impl FnOnce() -> R) -> R {
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
            Kind::Layer(span) => span.with_subscriber(|(_, dispatch)| dispatch.clone()),
            Kind::Api(_) => None,
        }
    }

    /// The span of `tracing`.
    #[track_caller]
    pub fn tracing(&self) -> &tracing::Span {
        match &self.0 {
            Kind::Layer(span) => span,
            Kind::Api(_) => panic!("a span of the OpenTelemetry API"),
        }
    }

    pub fn record_instance_id(&self, id: &str) {
        self.record("workflow.instance_id", id.to_owned());
    }

    pub fn record_replaying(&self, replaying: bool) {
        self.record("workflow.replaying", replaying);
    }

    fn record<V>(&self, key: &'static str, value: V)
    where
        V: tracing::Value + Into<opentelemetry::Value>,
    {
        match &self.0 {
            Kind::Layer(span) => {
                span.record(key, value);
            }
            Kind::Api(context) => context.span().set_attribute(KeyValue::new(key, value)),
        }
    }

    /// The OpenTelemetry context that has this span. It starts the span, if nothing has before.
    pub fn otel_context(&self) -> Context {
        match &self.0 {
            Kind::Layer(span) => span.context(),
            Kind::Api(context) => context.clone(),
        }
    }

    /// A span starts when it is entered, or left, or when somebody asks for its ids: a setting says which.
    pub fn start(&self) {
        drop(self.otel_context());
    }

    pub fn span_context(&self) -> SpanContext {
        self.otel_context().span().span_context().clone()
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // A span of the registry lets its parent go by the default subscriber.
        let dispatch = self.dispatch();
        let kind = std::mem::replace(&mut self.0, Kind::Layer(tracing::Span::none()));
        match dispatch {
            Some(dispatch) => with_default(&dispatch, || drop(kind)),
            None => drop(kind),
        }
    }
}

pub fn span_context(context: &WorkflowContext) -> SpanContext {
    context.to_otel().span().span_context().clone()
}

/// The span is the child of that context, and says rightly whether it is a remote one.
#[track_caller]
pub fn assert_child_of(span: &SpanData, parent: &SpanContext) {
    assert_child(span, parent, parent.is_remote());
}

/// Every link of the span: what relation it tells of, and to which span it leads.
#[track_caller]
pub fn links(span: &SpanData) -> Vec<(String, (TraceId, SpanId))> {
    let told = span.links.iter().map(|link| {
        let [relation] = &link.attributes[..] else {
            panic!(
                "a link of {} has the attributes {:?}",
                span.name, link.attributes
            );
        };
        assert_eq!(relation.key.as_str(), "workflow.relation");
        (relation.value.to_string(), ids(&link.span_context))
    });
    told.collect()
}

/// What tells two spans apart.
pub fn ids(context: &SpanContext) -> (TraceId, SpanId) {
    (context.trace_id(), context.span_id())
}

/// Which trace of its instance the span opened, where it is not the first.
pub fn generation(span: &SpanData) -> Option<i64> {
    attribute(span, "workflow.generation").map(|value| match value {
        opentelemetry::Value::I64(generation) => generation,
        other => panic!("{other:?} is no generation"),
    })
}

/// A sampler that takes every span, after it has shown its name to a hook.
#[derive(Clone)]
pub struct Hooked<F>(pub F);

impl<F> fmt::Debug for Hooked<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooked").finish_non_exhaustive()
    }
}

impl<F: Fn(&str) + Clone + Send + Sync + 'static> ShouldSample for Hooked<F> {
    fn should_sample(
        &self,
        _: Option<&Context>,
        _: TraceId,
        name: &str,
        _: &SpanKind,
        _: &[KeyValue],
        _: &[Link],
    ) -> SamplingResult {
        (self.0)(name);
        SamplingResult {
            decision: SamplingDecision::RecordAndSample,
            attributes: Vec::new(),
            trace_state: Default::default(),
        }
    }
}

/// A sampler that does as it was last told; nothing, at first.
#[derive(Clone, Debug, Default)]
pub struct Switch(Arc<AtomicBool>);

impl Switch {
    pub fn set(&self, takes: bool) {
        self.0.store(takes, Ordering::SeqCst);
    }
}

impl ShouldSample for Switch {
    fn should_sample(
        &self,
        context: Option<&Context>,
        trace: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let sampler = match self.0.load(Ordering::SeqCst) {
            true => Sampler::AlwaysOn,
            false => Sampler::AlwaysOff,
        };
        sampler.should_sample(context, trace, name, kind, attributes, links)
    }
}

impl ManualClock {
    pub fn rewind(&self, by: Duration) {
        *self.0.lock().unwrap() -= by;
    }
}

/// Where threads wait for each other; in vain for a minute at most, so that a test fails and does not hang.
#[derive(Debug, Default)]
pub struct Rendezvous(Mutex<usize>, Condvar);

impl Rendezvous {
    pub fn wait_for(&self, threads: usize) {
        let mut arrived = self.0.lock().unwrap();
        *arrived += 1;
        self.1.notify_all();
        let minute = Duration::from_secs(60);
        let arrived = self
            .1
            .wait_timeout_while(arrived, minute, |arrived| *arrived < threads);
        drop(arrived);
    }
}
