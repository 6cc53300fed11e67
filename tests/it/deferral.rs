//! Spans whose start is deferred until their instance is known: they join its trace, and other code does not notice.

use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{self, Poll, Waker};
use std::time::{Duration, Instant};

use opentelemetry::baggage::BaggageExt as _;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanId, TraceContextExt as _, Tracer as _,
};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SpanData, SpanProcessor};
use tracing::field::{Empty, debug, display};
use tracing::instrument::WithSubscriber as _;
use tracing::{Instrument as _, Span, info, info_span, instrument};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_workflow_context::{
    Continuation, Engine, Relation, WorkflowContext, WorkflowContextStorage,
};

use crate::support::*;

mod adoption;
mod engines;
mod late_ids;
mod plain;
mod robustness;
mod timings;
mod visibility;

const ID: &str = "workflow.instance_id";

/// How long the tests of timings keep a span busy.
const BUSY: Duration = Duration::from_millis(2);

fn adopting() -> WorkflowContextStorage {
    let builder = WorkflowContextStorage::builder().adopt_spans(["my_engine_handler"]);
    builder.build().expect("valid settings")
}

fn knowing(engine: Engine) -> WorkflowContextStorage {
    let builder = WorkflowContextStorage::builder().engine(engine);
    builder.build().expect("valid settings")
}

/// Runs a scenario with and without context activation, each on a new worker and on one that has seen spans before.
fn in_both_modes(scenario: impl Fn(&Worker)) {
    in_both_modes_of(adopting, scenario);
}

fn in_both_modes_of(make: impl Fn() -> WorkflowContextStorage, scenario: impl Fn(&Worker)) {
    for seen_before in [false, true] {
        for (worker, activation) in both_activations(&make).iter().zip(["with", "without"]) {
            let age = if seen_before { "used" } else { "new" };
            let _drawing = DrawnOnPanic(worker, format!("{age} worker {activation} activation"));
            worker.run(|| {
                if seen_before {
                    tagged("seen before", "another instance").in_scope(|| ());
                }
                scenario(worker);
            });
        }
    }
}

/// Returns a worker, and the names of its spans in the order in which they start.
fn noting_starts(activation: bool) -> (Worker, Arc<Mutex<Vec<String>>>) {
    let starts = Arc::new(Mutex::new(Vec::new()));
    let noted = starts.clone();
    let sampler = Hooked(move |name: &str| noted.lock().unwrap().push(name.to_owned()));
    (
        Worker::with_sampler(adopting(), activation, sampler),
        starts,
    )
}

/// Runs a scenario with context activation, which is the default.
fn with_activation(scenario: impl Fn(&Worker)) {
    let worker = Worker::with_storage(adopting());
    let _drawing = DrawnOnPanic(&worker, "with activation".into());
    worker.run(|| scenario(&worker));
}

fn elsewhere<R: Send>(worker: &Worker, run: impl FnOnce() -> R + Send) -> R {
    worker.run_in(Place::OtherThread, run)
}

/// A span that declares an instance id and does not have one yet.
fn awaiting(name: &str) -> Span {
    info_span!("awaiting", otel.name = name, workflow.instance_id = Empty)
}

/// A span as an engine opens it around user code.
fn engine(name: &str) -> Span {
    info_span!("my_engine_handler", otel.name = name)
}

fn tagged(name: &str, id: &str) -> Span {
    info_span!("tagged", otel.name = name, workflow.instance_id = id)
}

fn ordinary(name: &str) -> Span {
    info_span!("ordinary", otel.name = name)
}

/// An ordinary span that is opened, entered and closed.
fn step(name: &str) {
    ordinary(name).in_scope(|| ());
}

/// A tagged span that is opened, entered and closed.
fn tagged_step(name: &str, id: &str) {
    tagged(name, id).in_scope(|| ());
}

/// Stores the instance by its first span.
fn stored_first(worker: &Worker, id: &str) -> SpanContext {
    let name = format!("first of {id}");
    tagged_step(&name, id);
    worker.span(&name).span_context
}

/// Returns the current span of OpenTelemetry.
fn current() -> SpanContext {
    Context::map_current(|cx| cx.span().span_context().clone())
}

/// Records the id on the span that this thread is in.
fn record_id(id: &str) {
    Span::current().record(ID, id);
}

fn poll<F: Future>(task: Pin<&mut F>) -> Poll<F::Output> {
    task.poll(&mut task::Context::from_waker(Waker::noop()))
}

/// Returns the headers that a client would send with a request.
fn headers(cx: &Context) -> HashMap<String, String> {
    let mut headers = HashMap::new();
    TraceContextPropagator::new().inject_context(cx, &mut headers);
    headers
}

fn traceparent(span: &SpanData) -> String {
    let cx = &span.span_context;
    format!("00-{}-{}-01", cx.trace_id(), cx.span_id())
}

#[track_caller]
fn assert_id(span: &SpanData, id: &str) {
    let attribute = attribute(span, ID);
    assert_eq!(
        attribute,
        Some(Value::from(id.to_owned())),
        "{ID} of {}",
        span.name
    );
}

#[track_caller]
fn assert_linked(span: &SpanData, relation: &str, target: &SpanContext) {
    let (found, linked) = link(span);
    assert_eq!(found, relation, "the relation of {}'s link", span.name);
    assert_same_span(&linked, target);
}

#[track_caller]
fn assert_unlinked(span: &SpanData) {
    assert!(
        span.links.is_empty(),
        "links of {}: {:?}",
        span.name,
        span.links
    );
}

/// Asserts that the span continues the stored context, and has no link.
#[track_caller]
fn assert_joined(span: &SpanData, stored: &SpanContext) {
    assert_continues(span, stored);
    assert_unlinked(span);
}

/// Asserts that the span is a root without link or instance id.
#[track_caller]
fn assert_unchanged_root(span: &SpanData) {
    assert_root(span);
    assert_unlinked(span);
    assert_eq!(attribute(span, ID), None, "{ID} of {}", span.name);
}

#[instrument(skip_all, fields(workflow.instance_id = Empty))]
fn learns_its_id(id: &str) {
    record_id(id);
    step("child");
}

#[instrument(skip_all, fields(workflow.instance_id = Empty))]
async fn learns_its_id_in_the_first_poll(id: &str) {
    record_id(id);
    step("child in the first poll");
    tokio::task::yield_now().await;
    step("child in the second poll");
}

#[instrument(skip_all, fields(workflow.instance_id = Empty))]
async fn learns_its_id_in_the_second_poll(id: &str) {
    tokio::task::yield_now().await;
    record_id(id);
    step("child");
}
