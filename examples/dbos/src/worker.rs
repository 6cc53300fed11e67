//! A worker process: one layer, both workflows.

use std::path::Path;
use std::time::Duration;

use dbos::{Config, DBOS, Enqueue, QueueConflict, QueueOptions, StartOptions};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Instrument as _, Level, info_span};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{Engine, RedbBackend, WorkflowContextStorage};

use crate::orders::{IN_QUEUE, IN_REQUEST, QUEUE, all_orders, register};
use crate::{FIRST, PLAIN, Result, pipe};

pub fn run(url: &str, layer: &str, part: &str, dir: &Path) -> Result<()> {
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(pipe::Exporter(pipe::name_of))
        .build();
    let tracer = provider.tracer("dbos-example");
    let filter = Targets::new().with_targets(["dbos", "dbos_example"].map(|t| (t, Level::INFO)));
    let registry = tracing_subscriber::registry().with(filter);
    if layer == PLAIN {
        registry
            .with(tracing_opentelemetry::layer().with_tracer(tracer))
            .init();
    } else {
        let storage = WorkflowContextStorage::builder()
            .engine(Engine::Dbos)
            .backend(RedbBackend::open(dir.join("contexts.redb"))?)
            .build()?;
        registry.with(storage.layer(tracer)).init();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(work(url, layer, part))
}

async fn work(url: &str, layer: &str, part: &str) -> Result<()> {
    println!("== {layer}: {part} worker ==");
    // A schema for each layer, since workflows are known by their ids.
    let dbos = DBOS::new(Config {
        schema: format!("dbos_{}", &layer[..5]),
        app_version: Some("1".into()),
        ..Config::new("orders", url)
    });
    let order = register(&dbos, part == FIRST)?;
    dbos.launch().await?;
    let queue = QueueOptions {
        polling_interval: Duration::from_millis(100),
        ..QueueOptions::default()
    };
    dbos.register_queue(QUEUE, queue, QueueConflict::UpdateIfLatestVersion)
        .await?;
    if part == FIRST {
        let options = |id| StartOptions {
            workflow_id: Some(id),
            ..StartOptions::default()
        };
        let request = order.start_with(IN_REQUEST.into(), options(IN_REQUEST));
        let _ = request.instrument(info_span!("request")).await?;
        for id in IN_QUEUE {
            let queued = StartOptions {
                queue: Some(Enqueue::new(QUEUE)),
                ..options(id)
            };
            let _ = order.start_with(id.into(), queued).await?;
        }
    }
    let all = async {
        for id in all_orders() {
            dbos.retrieve_workflow::<(), crate::orders::BankIsBusy>(id)?
                .result()
                .await?;
            let mail = format!("{id}-mail");
            dbos.retrieve_workflow::<(), crate::orders::BankIsBusy>(&mail)?
                .result()
                .await?;
        }
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    };
    tokio::time::timeout(Duration::from_secs(60), all).await??;
    dbos.shutdown().await;
    Ok(())
}
