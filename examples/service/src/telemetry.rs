//! The subscriber of a process: the plain OpenTelemetry layer, or this crate's in its place. Nothing else in this service knows
//! which of them it is.
//!
//! Where the spans go is told by OpenTelemetry's variables: `OTEL_EXPORTER_OTLP_ENDPOINT` (by default <http://localhost:4318>),
//! `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_SCHEDULE_DELAY` and so on.

use opentelemetry::global;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, TracerProviderBuilder};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::WorkflowContextStorage;

use crate::Result;

/// Sets up what most services have.
pub(crate) fn plain(service: &'static str) -> Result<SdkTracerProvider> {
    let provider = exporting(service)?.build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer(service));
    tracing_subscriber::registry()
        .with(layer)
        .with(LevelFilter::INFO)
        .init();
    Ok(provider)
}

/// Sets up the same with one trace for each workflow, and a span for the whole of it.
pub(crate) fn with_workflows(service: &'static str) -> Result<SdkTracerProvider> {
    let storage = WorkflowContextStorage::builder()
        .durable_root(true)
        .build()?;
    let sampler = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
    let provider = exporting(service)?
        .with_id_generator(storage.id_generator())
        .with_sampler(storage.sampler(sampler))
        .build();
    let layer = storage.layer(provider.tracer(service));
    tracing_subscriber::registry()
        .with(layer)
        .with(LevelFilter::INFO)
        .init();
    Ok(provider)
}

fn exporting(service: &'static str) -> Result<TracerProviderBuilder> {
    global::set_text_map_propagator(TraceContextPropagator::new());
    let exporter = SpanExporter::builder().with_http().build()?;
    Ok(SdkTracerProvider::builder()
        .with_resource(Resource::builder().with_service_name(service).build())
        .with_batch_exporter(exporter))
}
