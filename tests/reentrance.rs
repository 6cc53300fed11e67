//! Ids, samplers and span processors that open tagged spans from within the layer; a binary of its own, because it sets
//! the global subscriber.
//!
//! Most programs have a global subscriber. With a scoped one, tracing disables spans that are opened while another one is
//! created.

#[allow(
    dead_code,
    unused_imports,
    reason = "`it` uses all of it, this binary a part"
)]
mod support;

use std::cell::Cell;
use std::fmt;
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use opentelemetry::trace::{Link, SpanKind, TraceContextExt as _, TraceId};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    Sampler, SamplingResult, SdkTracerProvider, ShouldSample, Span as SdkSpan, SpanData,
    SpanProcessor,
};
use support::*;
use tracing::field::{Empty, Value, display};
use tracing::{Dispatch, Span, dispatcher, info, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::WorkflowContextStorage;

/// Set for the process that runs all tests without context activation.
const WITHOUT_ACTIVATION: &str = "TEST_WITHOUT_CONTEXT_ACTIVATION";

fn with_activation() -> bool {
    std::env::var_os(WITHOUT_ACTIVATION).is_none()
}

static WORKER: LazyLock<Mutex<Worker>> = LazyLock::new(|| {
    let provider = SdkTracerProvider::builder()
        .with_sampler(Hooked)
        .with_span_processor(Hooked);
    let storage = WorkflowContextStorage::builder().adopt_spans(["engine"]);
    let worker = Worker::assembled(
        provider,
        storage.build().unwrap(),
        with_activation(),
        |ours| Dispatch::new(tracing_subscriber::registry().with(ours)),
    );
    dispatcher::set_global_default(worker.dispatch.clone()).expect("the only one");
    Mutex::new(worker)
});

/// Runs tests one after the other, each on a worker without stored contexts and exported spans.
fn with_worker(scenario: impl FnOnce(&Worker)) {
    let worker = WORKER.lock().unwrap_or_else(PoisonError::into_inner);
    worker.exporter.reset();
    for id in worker.storage.instance_ids() {
        worker.storage.cleanup(&id).unwrap();
    }
    let _drawing = DrawnOnPanic(&worker, format!("context activation {}", with_activation()));
    scenario(&worker);
    assert_context_stack_is_empty();
}

#[test]
fn without_context_activation_all_tests_pass_too() {
    if with_activation() {
        let mut tests = Command::new(std::env::current_exe().unwrap());
        let output = tests.env(WITHOUT_ACTIVATION, "1").output().unwrap();
        let report = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{report}");
    }
}

fn created(id: &dyn Value) {
    info_span!("tagged", workflow.instance_id = id).in_scope(inner);
}

fn recorded(id: &dyn Value) {
    let span = info_span!("tagged", workflow.instance_id = Empty).entered();
    span.record("workflow.instance_id", id);
    inner();
}

fn recorded_late(id: &dyn Value) {
    let span = info_span!("tagged", workflow.instance_id = Empty).entered();
    inner();
    span.record("workflow.instance_id", id);
}

fn below_engine(id: &dyn Value) {
    info_span!("engine").in_scope(|| created(id));
}

const WAYS: [fn(&dyn Value); 4] = [created, recorded, recorded_late, below_engine];

fn inner() {
    info_span!("inner").in_scope(|| info!("inside"));
}

/// Asserts that each instance is stored, and that its spans are in its trace, or linked to it if they lost the race to
/// be recorded.
fn assert_instances(worker: &Worker, expected: [&'static str; 2]) {
    worker.forest().assert_no_orphans().assert_no_duplicates();
    let mut ids = worker.storage.instance_ids();
    ids.sort();
    assert_eq!(ids, expected);
    for id in expected {
        let stored = worker.stored_trace(id);
        for span in worker.spans() {
            let tagged = attribute(&span, "workflow.instance_id") == Some(id.into());
            let is_linked = || {
                span.links
                    .iter()
                    .any(|l| l.span_context.trace_id() == stored)
            };
            let joined = span.span_context.trace_id() == stored || is_linked();
            assert!(!tagged || joined, "{} of {id} is elsewhere", span.name);
        }
    }
}

/// An id that opens, enters and records spans while it is formatted, with ids of its kind within them.
struct Reentrant {
    depth: u64,
    elsewhere: Span,
}

impl Reentrant {
    fn new(depth: u64) -> Self {
        let elsewhere = info_span!(parent: None, "elsewhere", workflow.instance_id = "elsewhere");
        Self { depth, elsewhere }
    }
}

impl fmt::Display for Reentrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Span::current().record("colour", "red");
        Span::current().in_scope(|| info!("inside"));
        self.elsewhere.in_scope(|| {
            for way in WAYS {
                way(&"elsewhere");
                if let Some(depth) = self.depth.checked_sub(1) {
                    way(&display(Self::new(depth)));
                }
            }
        });
        write!(f, "reentrant")
    }
}

#[test]
fn an_id_may_open_spans_while_it_is_formatted() {
    for way in WAYS {
        with_worker(|worker| {
            way(&display(Reentrant::new(2)));
            assert_instances(worker, ["elsewhere", "reentrant"]);
        });
    }
}

/// An id that records another id on its span while it is formatted.
struct Forestalled;

impl fmt::Display for Forestalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Span::current().record("workflow.instance_id", "inner");
        write!(f, "outer")
    }
}

#[test]
fn an_id_recorded_while_another_is_formatted_takes_precedence() {
    for way in [recorded, recorded_late] {
        with_worker(|worker| {
            way(&display(Forestalled));
            worker.forest().assert_one_trace().assert_no_orphans();
            assert_same_span(&worker.stored("inner"), &worker.span("tagged").span_context);
        });
    }
}

/// An id that opens a span that could be adopted while it is formatted.
struct Bystander;

impl fmt::Display for Bystander {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        info_span!(parent: None, "bystander", workflow.status = "running").in_scope(|| {});
        write!(f, "order")
    }
}

#[test]
fn a_span_opened_while_an_id_is_formatted_does_not_join_its_instance() {
    with_worker(|worker| {
        let engine = info_span!("engine");
        // Starts the span, so that it cannot be adopted any more.
        assert!(engine.context().has_active_span());
        let id = display(Bystander);
        info_span!(parent: &engine, "tagged", workflow.instance_id = id).in_scope(|| {});
        drop(engine);
        let spans = worker.spans();
        let mut bystanders = spans
            .iter()
            .filter(|span| span.name == "bystander")
            .peekable();
        assert!(bystanders.peek().is_some());
        for bystander in bystanders {
            assert_eq!(attribute(bystander, "workflow.instance_id"), None);
            assert_root(bystander);
        }
    });
}

/// The callback of the SDK that opens spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hook {
    ShouldSample,
    OnStart,
    OnEnd,
}

/// The parent of these spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    /// Without a parent.
    Apart,
    /// Below the current span.
    Nested,
}

thread_local! {
    static ACTIVE_HOOK: Cell<Option<(Hook, Where)>> = const { Cell::new(None) };
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Opens spans of the same and of another instance, to a bounded depth.
fn run_hook(hook: Hook) {
    let (meddling, depth) = (ACTIVE_HOOK.get(), DEPTH.get());
    let place = match meddling {
        Some((at, place)) if at == hook && depth < 2 => place,
        _ => return,
    };
    DEPTH.set(depth + 1);
    for id in ["order", "meddler"] {
        match place {
            Where::Apart => {
                let span = info_span!(parent: None, "apart", workflow.instance_id = id);
                span.in_scope(|| info!("inside"));
                let span = info_span!(parent: None, "apart", workflow.instance_id = Empty);
                span.record("workflow.instance_id", id);
            }
            Where::Nested => {
                created(&id);
                recorded(&id);
            }
        }
    }
    DEPTH.set(depth);
}

#[derive(Clone, Debug)]
struct Hooked;

impl ShouldSample for Hooked {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        run_hook(Hook::ShouldSample);
        Sampler::AlwaysOn.should_sample(parent, trace_id, name, kind, attributes, links)
    }
}

impl SpanProcessor for Hooked {
    fn on_start(&self, _: &mut SdkSpan, _: &Context) {
        run_hook(Hook::OnStart);
    }

    fn on_end(&self, _: SpanData) {
        run_hook(Hook::OnEnd);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

fn assert_hook_is_harmless(hook: Hook, place: Where) {
    for way in WAYS {
        with_worker(|worker| {
            ACTIVE_HOOK.set(Some((hook, place)));
            way(&"order");
            way(&"order");
            ACTIVE_HOOK.set(None);
            assert_instances(worker, ["meddler", "order"]);
        });
    }
}

#[test]
fn a_sampler_may_open_spans() {
    assert_hook_is_harmless(Hook::ShouldSample, Where::Apart);
}

#[test]
fn a_span_processor_may_open_spans_when_one_starts() {
    assert_hook_is_harmless(Hook::OnStart, Where::Apart);
}

/// In tracing-subscriber's registry, children of an open span would keep it from closing.
#[test]
fn a_span_processor_may_open_spans_when_one_ends() {
    assert_hook_is_harmless(Hook::OnEnd, Where::Apart);
}

/// Without context activation, tracing-opentelemetry holds the lock of the current span.
#[test]
fn with_context_activation_a_sampler_may_open_spans_below_the_current_one() {
    if with_activation() {
        assert_hook_is_harmless(Hook::ShouldSample, Where::Nested);
        assert_hook_is_harmless(Hook::OnStart, Where::Nested);
    }
}
