//! The steps of the workflow of the examples of several processes, and the handing over of their spans.

mod line;

use std::error::Error;
use std::thread::sleep;
use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SpanData, TracerProviderBuilder};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::WorkflowContextStorage;
use tracing_workflow_context::testing::TraceForest;

pub(crate) use self::line::from_line;
use self::line::{to_line, value};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Sets up the subscriber of a worker. The exporter returned collects its spans.
pub(crate) fn trace_through(
    provider: TracerProviderBuilder,
    storage: &WorkflowContextStorage,
) -> InMemorySpanExporter {
    let exporter = InMemorySpanExporter::default();
    let provider = provider.with_simple_exporter(exporter.clone()).build();
    tracing_subscriber::registry()
        .with(storage.layer(provider.tracer("worker")))
        .init();
    exporter
}

#[tracing::instrument(fields(workflow.instance_id = %order, workflow.name = "order"))]
pub(crate) fn run_step(step: &str, order: &str) {
    call_service(step);
}

#[tracing::instrument]
fn call_service(step: &str) {
    sleep(Duration::from_millis(1));
}

/// Prints the spans that `exporter` collected, one a line.
pub(crate) fn print_spans(exporter: &InMemorySpanExporter) -> Result<()> {
    for span in exporter.get_finished_spans()? {
        let name = match value(&span, "step") {
            Some(step) => format!("{}({step})", span.name),
            None => span.name.to_string(),
        };
        println!("{}", to_line(&span, &name));
    }
    Ok(())
}

/// Draws the spans of all workers, and fails if they are more than one trace.
pub(crate) fn draw(spans: &[SpanData]) {
    let forest = TraceForest::from_spans(spans);
    println!("\n{forest}");
    forest.assert_one_trace();
}
