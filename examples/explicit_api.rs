//! The explicit calls: hand a context over by yourself, and resume a workflow whose first process is gone.
//!
//! `cargo run --features testing --example explicit_api`

use std::collections::HashMap;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();

    let storage = WorkflowContextStorage::new();
    let layer = storage.layer(provider.tracer("explicit_api"));
    tracing_subscriber::registry().with(layer).init();

    // The client that starts the workflow stores its own span, and could send it along as headers.
    let mut headers = HashMap::new();
    let client = tracing::info_span!("start_workflow").in_scope(WorkflowContext::current);
    let client = client.ok_or("no span is current")?;
    client.inject(&mut headers);
    storage.store("order-42", client)?;

    // A worker that knows the id only: `to_otel` goes wherever OpenTelemetry takes a context.
    let cx = storage.get("order-42")?.ok_or("nothing is stored")?;
    let span = tracing::info_span!("by_hand");
    span.set_parent(cx.to_otel())?;
    span.in_scope(|| tracing::info!("working"));
    drop(span);

    // Another process got the headers, and resumes the agent that was interrupted.
    let worker = WorkflowContextStorage::new();
    let tracer = worker.tracer(provider.tracer("worker"));
    worker.store("order-42", WorkflowContext::extract(&headers)?)?;
    let resumed = worker.create_resumed("order-42", Some("Planner"))?;
    assert!(resumed.is_resumed());
    drop(tracer);

    println!(
        "{}\n",
        TraceForest::from_spans(&exporter.get_finished_spans()?)
    );
    println!("worker: {:?}", worker.stats());
    assert!(storage.cleanup("order-42")?);
    TraceForest::from_spans(&exporter.get_finished_spans()?).assert_one_trace();
    Ok(())
}
