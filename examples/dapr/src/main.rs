//! One order through dapr-durabletask, whose feature `opentelemetry` makes spans with good parents: does this crate's
//! layer bring the rest into their trace, and does it leave every good parent alone?
//!
//! `dapr-example <a python that has durabletask>`; `scripts/engine-dapr` sets that up.

mod order;
mod sidecar;

use std::error::Error;
use std::path::Path;

use opentelemetry::global;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use tokio::runtime;
use tracing::dispatcher::{self, Dispatch};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{Engine, WorkflowContextStorage};

use crate::sidecar::Sidecar;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const ORDER: &str = "order-42";

fn main() -> Result<()> {
    let python = std::env::args_os()
        .nth(1)
        .ok_or("usage: dapr-example <a python that has durabletask>")?;
    let python = Path::new(&python);

    let plain = trace_one_order(python, set_up_plain)?;
    println!("With the plain OpenTelemetry layer:\n\n{plain}\n");
    let ours = trace_one_order(python, set_up_ours)?;
    println!("With the layer of tracing-workflow-context:\n\n{ours}\n");

    println!(
        "plain: {} / with tracing-workflow-context: {}",
        summary(&plain),
        summary(&ours)
    );
    check(&plain, &ours)
}

/// What an application does without this crate.
fn set_up_plain(provider: &SdkTracerProvider) -> Result<Dispatch> {
    global::set_tracer_provider(provider.clone());
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("dapr-example"));
    let registry = tracing_subscriber::registry().with(LevelFilter::INFO);
    Ok(registry.with(layer).into())
}

/// What it does with this crate: one storage, and it is behind both ways by which spans are made.
fn set_up_ours(provider: &SdkTracerProvider) -> Result<Dispatch> {
    let storage = WorkflowContextStorage::builder()
        .engine(Engine::Dapr)
        .build()?;
    // The engine makes its spans by a tracer of the global provider, past every `tracing` layer.
    global::set_tracer_provider(storage.tracer_provider(provider.clone()));
    let layer = storage.layer(provider.tracer("dapr-example"));
    let registry = tracing_subscriber::registry().with(LevelFilter::INFO);
    Ok(registry.with(layer).into())
}

/// A sidecar, a worker and an order of its own for each set-up.
fn trace_one_order(
    python: &Path,
    set_up: impl FnOnce(&SdkTracerProvider) -> Result<Dispatch>,
) -> Result<TraceForest> {
    let sidecar = Sidecar::start(python)?;
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let subscriber = set_up(&provider)?;

    // A process has but one global subscriber, and here are two in turn: each is the default of its runtime's threads,
    // from their start to their end.
    let of_threads = subscriber.clone();
    let runtime = runtime::Builder::new_multi_thread()
        .enable_all()
        .on_thread_start(move || std::mem::forget(dispatcher::set_default(&of_threads)))
        .build()?;
    dispatcher::with_default(&subscriber, || {
        runtime.block_on(order::run(&sidecar.address, ORDER))
    })?;
    drop(runtime);

    provider.force_flush()?;
    Ok(TraceForest::from_spans(&exporter.get_finished_spans()?))
}

fn summary(forest: &TraceForest) -> String {
    let (traces, spans) = (forest.trace_count(), forest.span_count());
    let s = if traces == 1 { "" } else { "s" };
    format!("{traces} trace{s}, {spans} spans")
}

fn check(plain: &TraceForest, ours: &TraceForest) -> Result<()> {
    // Else there is nothing to keep, and the rest proves nothing.
    for engine_span in [
        "orchestration||order",
        "activity||reserve_stock",
        "activity||charge_card",
    ] {
        if parent(plain, plain.find(engine_span)) != Some("create_orchestration||order") {
            return Err(format!("{engine_span} was given no parent by the engine").into());
        }
    }
    if ours.count_by_name() != plain.count_by_name() {
        return Err("the two runs are not of the same spans".into());
    }
    if ours.trace_count() != 1 {
        return Err(format!("one order, {} traces", ours.trace_count()).into());
    }
    for span in ours.spans() {
        let good = parent(plain, plain.find(&span.name));
        let now = parent(ours, Some(span));
        if let Some(good) = good.filter(|_| now != good) {
            let now = now.unwrap_or("none");
            return Err(format!("{} had the parent {good}, now {now}", span.name).into());
        }
        if !span.links.is_empty() {
            return Err(format!("{} did not keep its place: it has a link", span.name).into());
        }
    }
    Ok(())
}

/// Spans of one name all have parents of one name here, which therefore stands for the parent.
fn parent<'a>(forest: &'a TraceForest, span: Option<&SpanData>) -> Option<&'a str> {
    span.and_then(|span| forest.parent_of(span))
        .map(|parent| parent.name.as_ref())
}

#[cfg(test)]
mod tests {
    use dapr_durabletask::otel;
    use opentelemetry::Context;
    use opentelemetry::trace::TraceContextExt;

    use super::*;

    /// By the functions with which the engine opens its spans, so without a sidecar.
    #[test]
    fn engine_spans_name_their_instance_and_keep_their_parents() {
        let exporter = InMemorySpanExporter::default();
        let inner = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .build();
        let storage = WorkflowContextStorage::builder()
            .engine(Engine::Dapr)
            .build()
            .unwrap();
        global::set_tracer_provider(storage.tracer_provider(inner));
        let (nowhere, id) = (Context::new(), "order-42");

        let created = otel::start_create_orchestration_span(&nowhere, "order", id);
        let stored = storage
            .get(id)
            .unwrap()
            .expect("the first span is recorded");
        assert_eq!(stored.span_id(), created.span().span_context().span_id());

        let sent = otel::trace_context_from_span_context(created.span().span_context());
        let received = otel::context_from_trace_context(sent.as_ref());
        let turn = otel::start_orchestration_span(&received, "order", id);
        let good_parent = otel::start_activity_span(&turn, "charge_card", id, 0);
        let no_parent = otel::start_activity_span(&nowhere, "ship", id, 1);
        for cx in [no_parent, good_parent, turn, created] {
            otel::end_span(&cx);
        }

        let forest = TraceForest::from_spans(&exporter.get_finished_spans().unwrap());
        forest.assert_one_trace().assert_no_orphans();
        for (span, parent) in [
            ("orchestration||order", "create_orchestration||order"),
            ("activity||charge_card", "orchestration||order"),
            ("activity||ship", "create_orchestration||order"),
        ] {
            let found = forest.find(span).and_then(|span| forest.parent_of(span));
            assert_eq!(found, forest.find(parent), "{span} in\n\n{forest}");
        }
    }
}
