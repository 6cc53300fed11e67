//! What the examples of several processes share: the steps of their workflow, and spans as lines of text, by which a
//! worker hands them over to the process that draws them.

use std::error::Error;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use opentelemetry::KeyValue;
use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState, TracerProvider as _,
};
use opentelemetry_sdk::trace::{
    InMemorySpanExporter, SpanData, SpanEvents, SpanLinks, TracerProviderBuilder,
};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::WorkflowContextStorage;
use tracing_workflow_context::testing::TraceForest;

/// The attributes of a workflow's own span that are drawn: its outcome, and the number of its spans.
const OWN: [&str; 2] = ["workflow.status", "workflow.spans"];

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
        println!("{}", to_line(&span)?);
    }
    Ok(())
}

/// Draws the spans of all workers, and fails if they are more than one trace.
pub(crate) fn draw(spans: &[SpanData]) {
    let forest = TraceForest::from_spans(spans);
    println!("\n{forest}");
    forest.assert_one_trace();
}

fn to_line(span: &SpanData) -> Result<String> {
    let since_epoch = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH);
    let attribute = |name: &str| {
        let mut attributes = span.attributes.iter();
        let found = attributes.find(|it| it.key.as_str() == name);
        found.map(|it| it.value.to_string())
    };
    let name = match attribute("step") {
        Some(step) => format!("{}({step})", span.name),
        None => span.name.to_string(),
    };
    Ok(format!(
        "{} {} {} {} {} {} {name}",
        span.span_context.trace_id(),
        span.span_context.span_id(),
        span.parent_span_id,
        since_epoch(span.start_time)?.as_nanos(),
        since_epoch(span.end_time)?.as_nanos(),
        OWN.map(|name| attribute(name).unwrap_or_else(|| "-".to_owned()))
            .join(","),
    ))
}

/// Reads a span that `print_spans` has printed.
pub(crate) fn from_line(line: &str) -> Result<SpanData> {
    let [trace, span, parent, start, end, own, name] = line.split(' ').collect::<Vec<_>>()[..]
    else {
        return Err(format!("no span: {line}").into());
    };
    let time = |text: &str| -> Result<SystemTime> {
        Ok(SystemTime::UNIX_EPOCH + Duration::from_nanos(text.parse()?))
    };
    Ok(SpanData {
        span_context: SpanContext::new(
            TraceId::from_hex(trace)?,
            SpanId::from_hex(span)?,
            TraceFlags::SAMPLED,
            true,
            TraceState::NONE,
        ),
        parent_span_id: SpanId::from_hex(parent)?,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.to_owned().into(),
        start_time: time(start)?,
        end_time: time(end)?,
        attributes: OWN
            .into_iter()
            .zip(own.split(','))
            .filter(|(_, value)| *value != "-")
            .map(|(name, value)| KeyValue::new(name, value.to_owned()))
            .collect(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: Default::default(),
    })
}
