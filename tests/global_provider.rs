//! A decorated tracer provider as the process-wide one; a binary of its own, because it is set once for all tests.
#[allow(
    dead_code,
    unused_imports,
    reason = "`it` uses all of it, this binary a part"
)]
mod support;
use support::*;

use opentelemetry::trace::{SpanBuilder, Tracer as _};
use opentelemetry::{Context, KeyValue, global};
use tracing_workflow_context::WorkflowContextStorage;

#[test]
fn spans_of_the_global_tracers_join_their_instances() {
    let worker = Worker::new();
    let open = |tracer: &'static str, name: &'static str, id: &'static str| {
        let id = KeyValue::new("workflow.instance_id", id);
        let builder = SpanBuilder::from_name(name).with_attributes([id]);
        drop(global::tracer(tracer).build_with_context(builder, &Context::new()));
    };
    global::set_tracer_provider(worker.storage.tracer_provider(worker.provider.clone()));
    open("engine", "turn", "order-42");
    open("client", "call", "order-42");
    worker.run(|| {
        tracing::info_span!("step", workflow.instance_id = "order-42").in_scope(|| {});
    });
    let turn = worker.span("turn");
    assert_continues(&worker.span("call"), &turn.span_context);
    assert_continues(&worker.span("step"), &turn.span_context);
    assert_eq!(turn.instrumentation_scope.name(), "engine");

    // The global provider, as it is now, decorated for another storage, which has no tracer beside it.
    global::set_tracer_provider(worker.provider.clone());
    let other = WorkflowContextStorage::new();
    global::set_tracer_provider(other.tracer_provider(global::tracer_provider()));
    open("engine", "other turn", "order-7");
    let resumed = other.create_resumed("order-7", Some("Planner")).unwrap();
    open("client", "other call", "order-7");
    let planner = worker.span("Planner.ToolCallingWorkflow");
    assert_continues(&planner, &worker.span("other turn").span_context);
    assert_eq!(planner.span_context.span_id(), resumed.span_id());
    assert_continues(&worker.span("other call"), &planner.span_context);
    let alone = other.create_resumed("new", Some("Alone")).unwrap();
    assert_root(&worker.span("Alone.ToolCallingWorkflow"));
    assert_eq!(other.get("new").unwrap(), Some(alone));
}
