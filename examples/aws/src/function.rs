//! The process of one invocation: a function as it would run in Lambda, with one of the layers.

use std::path::Path;

use aws_durable_execution_sdk as durable;
use lambda_runtime::service_fn;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tokio::task::spawn_blocking;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{Engine, RedbBackend, WorkflowContextStorage};

use crate::functions::{self, ORDER};
use crate::{Result, Way, pipe};

/// The first argument of such a process.
pub const ARGUMENT: &str = "function";

pub fn run(way: Way, dir: &Path) -> Result<()> {
    let builder = WorkflowContextStorage::builder().engine(Engine::AwsDurable);
    let storage = match way {
        Way::Plain => None,
        Way::Redb => {
            let file = RedbBackend::open(dir.join("contexts.redb"))?;
            Some(builder.backend(file).build()?)
        }
        Way::Derived => {
            let derived = builder.durable_root(true).derived_trace_ids(true);
            Some(derived.build()?)
        }
    };

    let mut provider =
        SdkTracerProvider::builder().with_simple_exporter(pipe::Exporter(pipe::name_of));
    if let Some(storage) = &storage {
        let sampler = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
        provider = provider
            .with_id_generator(storage.id_generator())
            .with_sampler(storage.sampler(sampler));
    }
    let tracer = provider.build().tracer("aws-example");
    let registry = tracing_subscriber::registry().with(LevelFilter::INFO);
    match &storage {
        None => registry
            .with(tracing_opentelemetry::layer().with_tracer(tracer))
            .init(),
        Some(storage) => registry.with(storage.layer(tracer)).init(),
    }

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(storage))
}

/// Answers invocations until the process is killed.
async fn serve(storage: Option<WorkflowContextStorage>) -> Result<()> {
    let is_order = std::env::var("AWS_LAMBDA_FUNCTION_NAME")? == ORDER;
    let ending = storage.clone();
    let handler = move |input: String, ctx: durable::DurableContext| {
        let storage = ending.clone();
        async move {
            let arn = ctx.execution_arn().to_owned();
            let result = match is_order {
                true => functions::order(input, ctx).await,
                false => functions::receipt(input, ctx).await,
            };
            // Reached at the end of the execution alone: a handler that is suspended is dropped.
            if let Some(storage) = storage {
                let status = if result.is_ok() {
                    "completed"
                } else {
                    "failed"
                };
                storage.complete(&arn, status)?;
            }
            result
        }
    };
    let durable = durable::wrap(handler, durable::Options::default());
    lambda_runtime::run(service_fn(move |event| {
        let (invocation, storage) = (durable(event), storage.clone());
        async move {
            let response = invocation.await;
            // The environment may be frozen or end as soon as the response is there.
            if let Some(storage) = storage {
                spawn_blocking(move || storage.flush()).await??;
            }
            response
        }
    }))
    .await
}
