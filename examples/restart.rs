//! A worker process is killed with a workflow under way; the next one goes on from the file that it left, and so on: five
//! processes, four of them killed, leave one trace, whose root is the workflow's own span.
//!
//! `cargo run --features redb,durable-root,testing --example restart`

#![allow(
    clippy::print_stdout,
    reason = "the terminal is where it shows what it does"
)]

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{RedbBackend, WorkflowContextStorage};

use support::{Result, draw, from_line, print_spans, run_step, trace_through};

/// The step after which the workflow has ended.
const LAST: &str = "close";

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["worker", path, steps @ ..] => work(Path::new(path), steps),
        [] => kill_and_restart(),
        _ => Err("usage: restart".into()),
    }
}

fn kill_and_restart() -> Result<()> {
    let path = std::env::temp_dir().join(format!("restart-example-{}", std::process::id()));
    let mut spans = Vec::new();
    for steps in [
        ["reserve_stock", "charge_card"],
        ["pack", "print_label"],
        ["ship", "track"],
        ["deliver", "ask_for_review"],
        ["send_bill", LAST],
    ] {
        let mut process = Command::new(std::env::current_exe()?)
            .arg("worker")
            .arg(&path)
            .args(steps)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        println!("process {}: {}", process.id(), steps.join(", "));
        let stdout = process.stdout.take().ok_or("piped above")?;
        for line in BufReader::new(stdout).lines() {
            match &*line? {
                // It would go on, were it not for this: the kill that no process can do anything about.
                "flushed" => process.kill()?,
                line => spans.push(from_line(line)?),
            }
        }
        println!("process {}: killed ({})", process.id(), process.wait()?);
    }
    std::fs::remove_file(path)?;
    draw(&spans);
    TraceForest::from_spans(&spans).assert_rooted();
    Ok(())
}

/// A worker process: takes its steps, and is killed then.
fn work(path: &Path, steps: &[&str]) -> Result<()> {
    let storage = WorkflowContextStorage::builder()
        .backend(RedbBackend::open(path)?)
        .durable_root(true)
        .build()?;
    let provider = SdkTracerProvider::builder()
        .with_id_generator(storage.id_generator())
        .with_sampler(storage.sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn))));
    let exporter = trace_through(provider, &storage);

    steps.iter().for_each(|step| run_step(step, "order-42"));
    if steps.ends_with(&[LAST]) {
        storage.complete("order-42", "completed")?;
    }
    // From here on nothing can be lost.
    storage.flush()?;
    print_spans(&exporter)?;
    println!("flushed");
    // Until it is killed, or nobody is left who could.
    std::io::stdin().lines().for_each(drop);
    Ok(())
}
