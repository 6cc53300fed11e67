//! A worker process: one layer, one workflow.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use duroxide::providers::sqlite::SqliteProvider;
use duroxide::runtime::registry::ActivityRegistry;
use duroxide::runtime::{OrchestrationStatus, Runtime, RuntimeOptions};
use duroxide::{Client, OrchestrationRegistry};
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

use crate::{OURS, PLAIN, Result, order, parcels, pipe};

const INSTANCE: &str = "order-42";

/// The step in which the first worker of the parcels is killed.
const KILLED_IN_STEP: u32 = 11;

/// Starts the workflow or, where the database is there already, goes on with it.
pub fn run(workflow: &str, layer: &str, database: &Path) -> Result<()> {
    // The order gets a span of its own, from its first turn to its end.
    let has_root = (workflow, layer) == (order::NAME, OURS);
    let storage = WorkflowContextStorage::builder().durable_root(has_root);
    let storage = storage.build()?;
    let mut provider =
        SdkTracerProvider::builder().with_simple_exporter(pipe::Exporter(pipe::name_of));
    if has_root {
        let root = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
        provider = provider
            .with_id_generator(storage.id_generator())
            .with_sampler(storage.sampler(root));
    }
    let provider = provider.build();
    let tracer = provider.tracer("duroxide-example");

    // Before duroxide starts, which otherwise installs a global subscriber of its own.
    let registry = tracing_subscriber::registry();
    match layer {
        PLAIN => registry
            .with(tracing_opentelemetry::layer().with_tracer(tracer))
            .init(),
        OURS => registry.with(storage.layer(tracer)).init(),
        _ => return Err(format!("unknown layer {layer}").into()),
    }

    let resumes = database.exists();
    let doing = if resumes { "resuming" } else { "running" };
    println!("== {layer}: {doing} {INSTANCE} ==");
    let (activities, orchestrations) = match workflow {
        order::NAME => (order::activities(), order::orchestrations()),
        parcels::NAME => {
            let carrier = database.with_extension("traceparent");
            if carrier.exists() {
                let traceparent = fs::read_to_string(&carrier)?;
                storage.store(INSTANCE, WorkflowContext::parse(&traceparent, "")?)?;
            }
            let on_new_step = save_and_get_killed(storage.clone(), carrier, resumes);
            let orchestrations = parcels::orchestrations(on_new_step);
            (parcels::activities(), orchestrations)
        }
        _ => return Err(format!("unknown workflow {workflow}").into()),
    };
    let start = (!resumes).then_some(workflow);
    let output = tokio::runtime::Runtime::new()?.block_on(run_workflow(
        database,
        activities,
        orchestrations,
        start,
    ))?;
    println!("  done: {output}\n");
    tell_replays(&storage);
    Ok(())
}

/// Puts the context of the instance into a file as soon as it is recorded, and later has the worker killed in the
/// middle of a turn, unless it is the one that resumes.
fn save_and_get_killed(
    storage: WorkflowContextStorage,
    carrier: PathBuf,
    resumes: bool,
) -> impl Fn(u32) + Clone {
    move |step| match step {
        1 => {
            // The plain layer stores none.
            if let Ok(Some(context)) = storage.get(INSTANCE) {
                fs::write(&carrier, context.traceparent()).expect("the directory is writable");
            }
        }
        KILLED_IN_STEP if !resumes => {
            tell_replays(&storage);
            println!("{}", pipe::KILL_ME);
            thread::sleep(Duration::from_secs(60));
        }
        _ => {}
    }
}

fn tell_replays(storage: &WorkflowContextStorage) {
    println!("{}{}", pipe::REPLAYED, storage.stats().replayed);
}

async fn run_workflow(
    database: &Path,
    activities: ActivityRegistry,
    orchestrations: OrchestrationRegistry,
    start: Option<&str>,
) -> Result<String> {
    let url = format!("sqlite:{}?mode=rwc", database.display());
    let store = Arc::new(SqliteProvider::new(&url, None).await?);
    // How long the turn of a killed worker stays locked. duroxide renews a lock each second, not more often.
    let options = RuntimeOptions {
        orchestrator_lock_timeout: Duration::from_secs(2),
        ..RuntimeOptions::default()
    };
    let runtime =
        Runtime::start_with_options(store.clone(), activities, orchestrations, options).await;
    let client = Client::new(store);
    if let Some(name) = start {
        client
            .start_orchestration(INSTANCE, name, "a red bicycle")
            .await?;
    }
    let output = wait_for(&client).await;
    runtime.shutdown(None).await;
    output
}

/// Waits for the end of the workflow and prints twice a second what it is doing.
async fn wait_for(client: &Client) -> Result<String> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(60) {
        tokio::time::sleep(Duration::from_millis(500)).await;
        match client.get_orchestration_status(INSTANCE).await? {
            OrchestrationStatus::Completed { output, .. } => return Ok(output),
            OrchestrationStatus::Failed { details, .. } => {
                return Err(details.display_message().into());
            }
            OrchestrationStatus::Running { custom_status, .. } => {
                let doing = custom_status.unwrap_or_default();
                println!("  {:.1} s  {doing}", start.elapsed().as_secs_f32());
            }
            OrchestrationStatus::NotFound => println!("  not started yet"),
        }
    }
    Err("the workflow has not finished within a minute".into())
}
