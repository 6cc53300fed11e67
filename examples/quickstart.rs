//! The smallest set-up: a workflow that is run in three executions is one trace, and one span from its start to its end.
//!
//! `cargo run -p quickstart` in a checkout, `cargo run --example quickstart --features durable-root,testing` in the published crate.

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{InMemorySpanExporter, Sampler, SdkTracerProvider};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::WorkflowContextStorage;
use tracing_workflow_context::testing::TraceForest;

#[tracing::instrument(fields(workflow.instance_id = %order, workflow.name = "order"))]
fn reserve_stock(order: &str) {
    tracing::info!("reserved");
}

#[tracing::instrument(fields(workflow.instance_id = %order))]
fn charge_card(order: &str) {
    ask_bank();
}

#[tracing::instrument]
fn ask_bank() {}

#[tracing::instrument(fields(workflow.instance_id = %order))]
fn ship(order: &str) {}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let storage = WorkflowContextStorage::builder()
        .durable_root(true)
        .build()?;
    let exporter = InMemorySpanExporter::default();
    // The id generator and the sampler are for the workflow's own span alone.
    let sampler = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
    let provider = SdkTracerProvider::builder()
        .with_id_generator(storage.id_generator())
        .with_sampler(storage.sampler(sampler))
        .with_simple_exporter(exporter.clone())
        .build();
    let tracer = provider.tracer("quickstart");
    tracing_subscriber::registry()
        .with(storage.layer(tracer))
        .init();

    // An engine would run each step in another task, thread or process, and hand over nothing but the id.
    reserve_stock("order-42");
    std::thread::spawn(|| charge_card("order-42"))
        .join()
        .map_err(|_| "the worker thread panicked")?;
    ship("order-42");
    storage.complete("order-42", "completed")?;

    let forest = TraceForest::from_spans(&exporter.get_finished_spans()?);
    println!("{forest}");
    forest.assert_one_trace().assert_rooted();
    Ok(())
}
