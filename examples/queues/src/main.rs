//! Two invoices through each of four job queues on one PostgreSQL, traced twice: by the plain OpenTelemetry layer, then by
//! `tracing-workflow-context`. `scripts/engine-queues` starts the server and runs this.

mod invoices;
mod queues;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::process::Command;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{Engine, WorkflowContextStorage};

use crate::invoices::NUMBERS;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The layers to compare, as an argument of a worker process.
const PLAIN: &str = "plain";
const OURS: &str = "tracing-workflow-context";

/// A job queue, and what is expected of it.
struct Queue {
    name: &'static str,
    engine: Engine,
    /// The name under which the span of one attempt is exported.
    attempt: &'static str,
    attempts_per_job: usize,
}

const QUEUES: [Queue; 4] = [
    Queue {
        name: "underway",
        engine: Engine::Underway,
        attempt: "execute",
        attempts_per_job: 3, // two steps, the first of which fails once
    },
    Queue {
        name: "graphile_worker",
        engine: Engine::GraphileWorker,
        attempt: "run_job",
        attempts_per_job: 2,
    },
    Queue {
        name: "apalis",
        engine: Engine::Apalis,
        attempt: "task",
        attempts_per_job: 2,
    },
    Queue {
        name: "awa",
        engine: Engine::Awa,
        attempt: "job.execute invoice",
        attempts_per_job: 2,
    },
];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [url] => QUEUES.iter().try_for_each(|queue| {
            run_worker(url, queue.name, PLAIN)?;
            run_worker(url, queue.name, OURS)
        }),
        [url, queue, layer] => {
            let queue = QUEUES.iter().find(|known| known.name == queue);
            work(url, queue.ok_or("no such queue")?, layer)
        }
        _ => Err("usage: scripts/engine-queues".into()),
    }
}

/// Runs a process for one queue and layer: the queues spawn tasks on many threads, so the subscriber has to be the global
/// one, and that can be set only once.
fn run_worker(url: &str, queue: &str, layer: &str) -> Result<()> {
    let worker = Command::new(std::env::current_exe()?)
        .args([url, queue, layer])
        .status()?;
    ensure(worker.success(), format!("{queue} with {layer} failed"))
}

fn work(url: &str, queue: &Queue, layer: &str) -> Result<()> {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let tracer = provider.tracer("queues-example");
    let filter = Targets::new()
        .with_targets(["queues_example", "underway", "graphile_worker"].map(|t| (t, Level::INFO)))
        .with_targets(["apalis", "awa_worker"].map(|t| (t, Level::DEBUG)));
    let registry = tracing_subscriber::registry().with(filter);
    if layer == PLAIN {
        registry
            .with(tracing_opentelemetry::layer().with_tracer(tracer))
            .init();
    } else {
        let storage = WorkflowContextStorage::builder()
            .engine(queue.engine)
            .build()?;
        registry.with(storage.layer(tracer)).init();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match queue.engine {
            Engine::Underway => queues::underway::run(url).await,
            Engine::GraphileWorker => queues::graphile::run(url).await,
            Engine::Apalis => queues::apalis::run(url).await,
            _ => queues::awa::run(url).await,
        }
    })?;
    drop(runtime);
    check(queue, layer, exporter.get_finished_spans()?)
}

/// Draws the traces in which a job ran, and compares them with what is expected.
fn check(queue: &Queue, layer: &str, spans: Vec<SpanData>) -> Result<()> {
    let attempts: Vec<_> = spans
        .iter()
        .filter(|span| span.name == queue.attempt)
        .collect();
    let of_attempts: BTreeSet<_> = attempts.iter().map(|span| trace_of(span)).collect();
    // The worker's looks into an empty queue have traces of their own.
    let shown: Vec<_> = spans
        .iter()
        .filter(|s| of_attempts.contains(&trace_of(s)))
        .cloned()
        .collect();
    let forest = TraceForest::from_spans(&shown);
    println!(
        "{} with {layer}: {} attempts in {} traces\n{forest}\n",
        queue.name,
        attempts.len(),
        of_attempts.len()
    );

    let expected = queue.attempts_per_job * NUMBERS.len();
    ensure(
        attempts.len() == expected,
        format!("expected {expected} attempts"),
    )?;
    let mut traces_of: BTreeMap<String, BTreeSet<Trace>> = BTreeMap::new();
    for span in forest.spans() {
        if let Some(number) = span
            .attributes
            .iter()
            .find(|kv| kv.key.as_str() == "invoice")
        {
            traces_of
                .entry(number.value.to_string())
                .or_default()
                .insert(trace_of(span));
        }
    }
    ensure(
        traces_of.len() == NUMBERS.len(),
        "expected spans of each invoice".into(),
    )?;
    if layer == PLAIN {
        let is_torn = traces_of.values().all(|traces| traces.len() > 1);
        return ensure(is_torn, "expected the plain layer to tear each job".into());
    }
    forest.assert_no_orphans().assert_no_duplicates();
    let is_whole = traces_of.values().all(|traces| traces.len() == 1);
    ensure(is_whole, "expected one trace for each job".into())?;
    let distinct: BTreeSet<_> = traces_of.values().flatten().collect();
    ensure(
        distinct.len() == NUMBERS.len(),
        "expected no trace with two jobs".into(),
    )?;
    ensure(
        of_attempts.len() == NUMBERS.len(),
        "expected one trace for each job".into(),
    )
}

/// The bytes of a trace id, which has no order.
type Trace = [u8; 16];

fn trace_of(span: &SpanData) -> Trace {
    span.span_context.trace_id().to_bytes()
}

fn ensure(holds: bool, otherwise: String) -> Result<()> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}
