//! Measures the load of a fleet on its Redis server: commands, bytes and memory of a workflow.
//!
//! `scripts/scale` runs it with a server of its own. By hand, with an empty server:
//! `cargo run --release --features redis --example scale redis://127.0.0.1:6379/`
#![allow(clippy::print_stdout, reason = "it prints its results")]

use std::error::Error;
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::trace::{Span as _, SpanBuilder, Tracer as _, TracerProvider as _};
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_workflow_context::{RedisBackend, WorkflowContextStorage};

const WORKERS: usize = 8;
const WORKFLOWS: usize = 20_000;
/// Later steps of a workflow, each on another worker: in this worst case, no worker has seen the workflow before.
const STEPS: usize = 4;
/// The fleet that the results are scaled to.
const FLEET_WORKFLOWS_PER_DAY: f64 = 100e6;
const FLEET_WORKERS: f64 = 10_000.0;

fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::args()
        .nth(1)
        .ok_or("usage: scale redis://127.0.0.1:6379/")?;
    let mut server = redis::Client::open(url.as_str())?.get_connection()?;
    let provider = SdkTracerProvider::builder().build();
    let storages: Vec<_> = (0..WORKERS)
        .map(|_| {
            let backend = RedisBackend::connect(&url)?;
            let builder = WorkflowContextStorage::builder().backend(backend);
            Ok(builder.lookup_budget(Duration::from_secs(1)).build()?)
        })
        .collect::<Result<_, Box<dyn Error>>>()?;
    let step = |worker: usize, workflow: usize, name: &'static str| {
        let tracer = storages[worker].tracer(provider.tracer("scale"));
        let id = KeyValue::new("workflow.instance_id", uuid_like(workflow));
        let span = SpanBuilder::from_name(name).with_attributes([id]);
        tracer.build(span)
    };

    let before = Usage::from_server(&mut server)?;
    let start = Instant::now();
    for workflow in 0..WORKFLOWS {
        step(workflow % WORKERS, workflow, "first").end();
    }
    storages.iter().try_for_each(|storage| storage.flush())?;
    let recorded = Usage::from_server(&mut server)?;
    for workflow in 0..WORKFLOWS {
        for later in 1..=STEPS {
            let mut span = step((workflow + later) % WORKERS, workflow, "later");
            if later == STEPS {
                span.set_attribute(KeyValue::new("workflow.status", "completed"));
            }
            span.end();
        }
    }
    storages.iter().try_for_each(|storage| storage.flush())?;
    let seconds = start.elapsed().as_secs_f64();
    let done = Usage::from_server(&mut server)?;

    let hits: u64 = storages.iter().map(|storage| storage.stats().hits).sum();
    assert_eq!(
        hits,
        (WORKFLOWS * STEPS) as u64,
        "each later step found its workflow"
    );
    let per = |now: f64, then: f64| (now - then) / WORKFLOWS as f64;
    let commands = per(done.commands, before.commands);
    let received = per(done.received, before.received);
    let sent = per(done.sent, before.sent);
    let memory = per(recorded.memory, before.memory);
    let per_second = FLEET_WORKFLOWS_PER_DAY / (24.0 * 60.0 * 60.0);
    println!(
        "{WORKFLOWS} workflows of {} steps on {WORKERS} workers in {seconds:.1} s",
        STEPS + 1
    );
    println!("commands of a workflow           {commands:8.1}");
    println!("bytes to the server of a workflow  {received:6.0}");
    println!("bytes from the server              {sent:6.0}");
    println!("memory of the server, an instance  {memory:6.0} bytes");
    println!(
        "commands a second, measured here {:8.0}",
        commands * WORKFLOWS as f64 / seconds
    );
    println!("100 million workflows a day are {per_second:.0} a second:");
    println!(
        "  commands a second              {:8.0}",
        commands * per_second
    );
    println!(
        "  network, MB a second           {:8.2}",
        (received + sent) * per_second / 1e6
    );
    println!(
        "  memory, GB, all kept for a day {:8.1}",
        memory * FLEET_WORKFLOWS_PER_DAY / 1e9
    );
    println!(
        "  commands a second of a worker  {:8.2}",
        commands * per_second / FLEET_WORKERS
    );
    Ok(())
}

/// Formats an id as long as those of engines.
fn uuid_like(n: usize) -> String {
    format!("{n:08x}-0000-4000-8000-{n:012x}")
}

/// Figures of the server's `INFO`.
struct Usage {
    commands: f64,
    received: f64,
    sent: f64,
    memory: f64,
}

impl Usage {
    fn from_server(server: &mut redis::Connection) -> Result<Self, Box<dyn Error>> {
        let info: redis::InfoDict = redis::cmd("INFO").arg("everything").query(server)?;
        let figure = |name| {
            info.get::<f64>(name)
                .ok_or_else(|| format!("no {name} in INFO"))
        };
        Ok(Self {
            commands: figure("total_commands_processed")?,
            received: figure("total_net_input_bytes")?,
            sent: figure("total_net_output_bytes")?,
            memory: figure("used_memory")?,
        })
    }
}
