//! A process with the real Temporal worker in it.

use crate::{
    OURS, PLAIN,
    order::{Order, OrderActivities},
    pipe::{self, Message, PipeExporter},
    server::{self, DONE, ORDER, Shift},
};
use anyhow::{Context as _, Result, bail};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::{sync::Arc, time::Duration};
use temporalio_client::ClientOptions;
use temporalio_sdk::{Worker, WorkerOptions};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{Engine, WorkflowContext, WorkflowContextStorage};

/// Nothing here takes a second; a worker that is neither done nor killed by then is stuck.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main]
pub async fn run(layer: &str, shift: Shift, carried: Option<&str>) -> Result<()> {
    let storage = WorkflowContextStorage::builder()
        .engine(Engine::Temporal)
        .build()?;
    if let Some(context) = carried {
        storage.store(ORDER, WorkflowContext::parse(context, "")?)?;
    }
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(PipeExporter)
        .build();
    let tracer = provider.tracer("temporal-example");
    // The whole difference between the two runs. No filter: every span of the SDK comes by.
    let layer = match layer {
        PLAIN => tracing_opentelemetry::layer().with_tracer(tracer).boxed(),
        OURS => storage.layer(tracer).boxed(),
        unknown => bail!("no such layer: {unknown}"),
    };
    tracing_subscriber::registry().with(layer).init();

    let hanging = Arc::new(Notify::new());
    let (answers, mut answered) = watch::channel(0);
    let core = Arc::new(server::worker(shift, answers)?);
    let client = ClientOptions::new(core.get_config().namespace.clone()).build();
    let options = WorkerOptions::new(core.get_config().task_queue.clone())
        .register_workflow::<Order>()?
        .register_activities(OrderActivities {
            hanging: hanging.clone(),
        })
        .build();
    let mut worker = Worker::new_from_core_options(core, client, options)?;

    let shut_down = worker.shutdown_handle();
    let work = async { worker.run().await.context("the worker failed") };
    let watch = async {
        tokio::select! {
            () = hanging.notified() => {
                let context = storage.get(ORDER)?.map(|context| context.traceparent());
                pipe::send(&Message::Hanging { context });
            }
            done = answered.wait_for(|answers| *answers == DONE) => {
                done.context("the mocked server is gone")?;
                shut_down();
            }
        }
        Ok(())
    };
    timeout(PATIENCE, async { tokio::try_join!(work, watch) })
        .await
        .context("stuck")??;
    Ok(())
}
