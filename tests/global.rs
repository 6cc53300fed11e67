//! The process-wide storage and tracer provider; a binary of its own, because other tests must not share them.
#[allow(
    dead_code,
    unused_imports,
    reason = "`it` uses all of it, this binary a part"
)]
mod support;
use support::*;

use std::sync::OnceLock;

use opentelemetry::global;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
use tracing::info_span;
use tracing_workflow_context::{
    InvalidInstanceId, StorageError, WorkflowContext, WorkflowContextStorage,
    cleanup_workflow_context, get_context_storage_stats, get_workflow_context,
    store_workflow_context,
};

/// One test for the whole process-wide storage, so that no other test changes its counters.
#[test]
fn the_free_functions_act_on_the_process_wide_storage() {
    let context = WorkflowContext::try_from(&remote(7, 8)).unwrap();
    let storage = WorkflowContextStorage::global();
    assert_eq!(get_context_storage_stats(), storage.stats());
    assert_eq!(storage.stats().stored_instances, 0);

    assert_eq!(get_workflow_context("a").unwrap(), None);
    store_workflow_context("a", context.clone()).unwrap();
    assert_eq!(get_workflow_context("a").unwrap(), Some(context.clone()));
    assert_eq!(storage.get("a").unwrap(), Some(context.clone()));
    let stats = get_context_storage_stats();
    assert_eq!(
        (stats.stored_instances, stats.hits, stats.misses),
        (1, 2, 1)
    );
    assert!(cleanup_workflow_context("a").unwrap());
    assert!(!cleanup_workflow_context("a").unwrap());
    assert_eq!(storage.get("a").unwrap(), None);

    for refused in [
        store_workflow_context("", context.clone()).map(drop),
        get_workflow_context("").map(drop),
        cleanup_workflow_context("").map(drop),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(
            error,
            StorageError::InvalidInstanceId(InvalidInstanceId::Empty)
        ));
    }

    // Every thread and layer uses the same storage.
    let elsewhere = std::thread::spawn(WorkflowContextStorage::global)
        .join()
        .unwrap();
    assert!(std::ptr::eq(elsewhere, storage));
    let worker = Worker::with_storage(WorkflowContextStorage::global().clone());
    store_workflow_context("a", context).unwrap();
    worker.run(|| info_span!("step", workflow.instance_id = "a").in_scope(|| {}));
    worker.run(|| info_span!("step", workflow.instance_id = "b").in_scope(|| {}));
    assert_continues(&worker.spans()[0], &remote(7, 8));
    let recorded = get_workflow_context("b").unwrap().expect("was recorded");
    assert_eq!(
        recorded.trace_id(),
        worker.spans()[1].span_context.trace_id()
    );
}

#[test]
fn other_storages_are_independent_of_the_process_wide_one() {
    let context = WorkflowContext::try_from(&remote(7, 8)).unwrap();
    WorkflowContextStorage::new()
        .store("of another storage", context)
        .unwrap();

    let ids = WorkflowContextStorage::global().instance_ids();
    assert!(!ids.contains(&"of another storage".to_owned()));
}

#[test]
fn a_storage_without_a_tracer_resumes_with_the_global_tracer() {
    let exporter = globally_exported();
    let storage = WorkflowContextStorage::new();
    let resumed = storage
        .create_resumed("no tracer", Some("NoTracer"))
        .unwrap();

    assert_exported(exporter, "NoTracer", &resumed);
    assert_eq!(storage.get("no tracer").unwrap(), Some(resumed));
}

#[test]
fn the_layers_tracer_takes_precedence_over_the_global_one_until_the_layer_is_dropped() {
    let exporter = globally_exported();
    let worker = Worker::new();
    let storage = worker.storage.clone();
    let first = storage.create_resumed("layer", Some("Layer")).unwrap();
    let spans = worker.spans();
    worker.close();
    let second = storage.create_resumed("layer", Some("LayerGone")).unwrap();

    assert_eq!(spans.len(), 1);
    assert_eq!(spans[0].span_context.span_id(), first.span_id());
    let exported = exporter.get_finished_spans().unwrap();
    assert!(
        exported
            .iter()
            .all(|span| span.name != "Layer.ToolCallingWorkflow")
    );
    assert_exported(exporter, "LayerGone", &second);
    assert_eq!(first.trace_id(), second.trace_id());
}

#[track_caller]
fn assert_exported(exporter: &InMemorySpanExporter, agent: &str, resumed: &WorkflowContext) {
    let name = format!("{agent}.ToolCallingWorkflow");
    let spans = exporter.get_finished_spans().unwrap();
    let agents: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    assert_eq!(agents.len(), 1, "{spans:#?}");
    let ids = (resumed.trace_id(), resumed.span_id());
    assert_eq!(
        ids,
        (
            agents[0].span_context.trace_id(),
            agents[0].span_context.span_id()
        )
    );
    assert_eq!(
        attribute(agents[0], "agent.name"),
        Some(agent.to_owned().into())
    );
}

/// Returns the exporter of the global tracer provider, which is set on the first call.
fn globally_exported() -> &'static InMemorySpanExporter {
    static EXPORTER: OnceLock<InMemorySpanExporter> = OnceLock::new();
    EXPORTER.get_or_init(|| {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone());
        global::set_tracer_provider(provider.build());
        exporter
    })
}
