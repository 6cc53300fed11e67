//! A decorated tracer provider: spans of any of its tracers join their instances.

use crate::support::*;

use opentelemetry::trace::noop::NoopTracerProvider;
use opentelemetry::trace::{SpanBuilder, TraceContextExt as _, Tracer, TracerProvider};
use opentelemetry::{Context, InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::info_span;
use tracing_workflow_context::{WorkflowContextStorage, WorkflowTracerProvider};

const ID: &str = "order-42";

fn step(tracer: &impl Tracer, name: &'static str, parent: &Context) {
    let id = KeyValue::new("workflow.instance_id", ID);
    let builder = SpanBuilder::from_name(name).with_attributes([id]);
    drop(tracer.build_with_context(builder, parent));
}

#[test]
fn spans_of_all_tracers_of_a_provider_and_of_the_layer_are_in_one_trace() {
    for worker in both_activations(WorkflowContextStorage::new) {
        let provider = worker.storage.tracer_provider(worker.provider.clone());
        let scope = InstrumentationScope::builder("a").with_version("1").build();
        let (a, b) = (
            provider.tracer_with_scope(scope.clone()),
            provider.clone().tracer("b"),
        );
        step(&a, "first", &Context::new());
        step(&b, "second", &remote_context(1, 2));
        worker.run(|| info_span!("third", workflow.instance_id = ID).in_scope(|| {}));
        drop(b.start_with_context("untagged", &Context::new()));

        let first = worker.span("first").span_context;
        assert_same_span(&worker.stored(ID), &first);
        assert_continues(&worker.span("second"), &first);
        assert_continues(&worker.span("third"), &first);
        assert_ne!(worker.trace_of("untagged"), first.trace_id());
        assert_eq!(worker.span("first").instrumentation_scope, scope);
        assert_eq!(worker.span("second").instrumentation_scope.name(), "b");
    }
}

#[test]
fn create_resumed_uses_the_last_tracer_of_a_provider_while_it_lives() {
    let (worker, other) = (Worker::new(), Worker::new());
    let provider = worker.storage.tracer_provider(other.provider.clone());
    worker.storage.create_resumed("none is made", None).unwrap();
    let tracer = provider.tracer("agents");
    worker.storage.create_resumed("made", None).unwrap();
    drop(tracer);
    worker.storage.create_resumed("dropped", None).unwrap();

    assert_eq!(worker.spans().len(), 2);
    assert_eq!(other.spans()[0].instrumentation_scope.name(), "agents");
    assert_eq!(other.spans().len(), 1);
}

#[test]
fn a_provider_decorates_any_other() {
    fn is_usable_anywhere<T: Send + Sync + Clone + std::fmt::Debug + 'static>(_: &T) {}

    let storage = WorkflowContextStorage::new();
    let provider: WorkflowTracerProvider<NoopTracerProvider> =
        storage.tracer_provider(NoopTracerProvider::new());
    is_usable_anywhere(&provider);
    step(&provider.tracer("noop"), "step", &Context::new());
    assert_eq!(storage.instance_ids(), [""; 0]);

    // One that is decorated twice places a span once.
    let worker = Worker::new();
    let twice = worker.storage.tracer_provider(worker.provider.clone());
    let twice = worker.storage.tracer_provider(twice);
    step(&twice.tracer("twice"), "first", &Context::new());
    step(&twice.tracer("twice"), "second", &Context::new());
    let (first, second) = (worker.span("first"), worker.span("second"));
    assert_continues(&second, &first.span_context);
    assert!(first.links.is_empty() && second.links.is_empty());

    let global: WorkflowTracerProvider<opentelemetry::global::GlobalTracerProvider> =
        storage.tracer_provider(opentelemetry::global::tracer_provider());
    is_usable_anywhere(&global);
    let span = global.tracer("global").start("step");
    assert!(
        !Context::new()
            .with_span(span)
            .span()
            .span_context()
            .is_valid()
    );
    is_usable_anywhere(&storage.tracer_provider(SdkTracerProvider::builder().build()));
}
