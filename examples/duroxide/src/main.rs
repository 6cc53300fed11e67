//! Two duroxide workflows, each traced twice: by the plain OpenTelemetry layer, then by
//! `tracing-workflow-context`.
//!
//! ```text
//! cargo run -p duroxide-example
//! ```

mod order;
mod parcels;
mod pipe;
mod worker;

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use opentelemetry_sdk::trace::SpanData;
use tracing_workflow_context::testing::TraceForest;

/// The layers to compare, as the second argument of a worker process; the first is the workflow.
const PLAIN: &str = "plain";
const OURS: &str = "tracing-workflow-context";

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {
            let dir = tempfile::tempdir()?; // removed when dropped, together with the SQLite files
            compare_orders(dir.path())?;
            compare_parcels(dir.path())
        }
        [workflow, layer, database] => worker::run(workflow, layer, Path::new(database)),
        _ => Err("usage: cargo run -p duroxide-example".into()),
    }
}

/// One process for each layer.
fn compare_orders(dir: &Path) -> Result<()> {
    let plain = run_worker(order::NAME, PLAIN, dir)?.forest();
    println!("{plain}\n");
    let ours = run_worker(order::NAME, OURS, dir)?.forest();
    println!("{ours}\n");

    print_counts(&plain, &ours);
    println!();
    ours.assert_one_trace().assert_rooted();
    Ok(())
}

/// Two processes for each layer, as the first is killed.
fn compare_parcels(dir: &Path) -> Result<()> {
    let (plain, _) = kill_and_resume(PLAIN, dir)?;
    let (ours, [before, after]) = kill_and_resume(OURS, dir)?;
    println!("{ours}\n");

    print_counts(&plain, &ours);
    ensure_exported_once(&ours)?;
    ensure(before > 0 && after > 0, "expected replays in both workers")?;
    // The plain layer exports a span for each turn, save the one that was killed.
    let turns = plain.count_by_name()["order"];
    println!(
        "replay: {turns} turns, 1 crash: {} spans exported once each, \
         {before} + {after} replayed spans exported never",
        ours.span_count()
    );
    Ok(())
}

/// The spans of both workers, and how many each of them replayed.
fn kill_and_resume(layer: &str, dir: &Path) -> Result<(TraceForest, [u64; 2])> {
    let mut first = run_worker(parcels::NAME, layer, dir)?;
    ensure(first.was_killed, "expected the first worker to be killed")?;
    println!("  killed\n");
    let second = run_worker(parcels::NAME, layer, dir)?;

    first.spans.extend(second.spans);
    Ok((first.forest(), [first.replayed, second.replayed]))
}

/// The orchestrator, its steps and their activities: each is there once, the last two beneath the first.
fn ensure_exported_once(forest: &TraceForest) -> Result<()> {
    forest
        .assert_one_trace()
        .assert_no_orphans()
        .assert_no_duplicates();

    let steps = (1..=parcels::STEPS).flat_map(|n| [format!("step {n}"), format!("activity {n}")]);
    let expected: BTreeMap<_, _> = steps
        .chain(["order".to_owned()])
        .map(|name| (name, 1))
        .collect();
    let counts = forest.count_by_name();
    ensure(counts == expected, "expected each span once")?;

    let order = forest.find("order");
    let mut others = forest.spans().filter(|span| Some(*span) != order);
    ensure(
        others.all(|span| forest.parent_of(span) == order),
        "expected all steps and activities beneath the first turn's span",
    )
}

fn print_counts(plain: &TraceForest, ours: &TraceForest) {
    let counts = |forest: &TraceForest| {
        let (traces, spans) = (forest.trace_count(), forest.span_count());
        let s = if traces == 1 { "" } else { "s" };
        format!("{traces} trace{s}, {spans} spans")
    };
    println!("plain: {} / with {OURS}: {}", counts(plain), counts(ours));
}

fn ensure(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

/// What a worker has told.
#[derive(Default)]
struct Report {
    spans: Vec<SpanData>,
    replayed: u64,
    was_killed: bool,
}

impl Report {
    fn forest(&self) -> TraceForest {
        TraceForest::from_spans(&self.spans)
    }
}

/// Runs a worker process until it is done or wants to be killed.
///
/// There is one for each run: duroxide spawns its tasks on many threads, so the subscriber has to be the global one,
/// and that can be set only once.
fn run_worker(workflow: &str, layer: &str, dir: &Path) -> Result<Report> {
    let mut worker = Command::new(std::env::current_exe()?)
        .args([workflow, layer])
        .arg(dir.join(format!("{workflow}-{layer}.db")))
        .stdout(Stdio::piped())
        .spawn()?;

    let mut report = Report::default();
    let stdout = worker.stdout.take().ok_or("the worker has no stdout")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        if let Some(span) = line.strip_prefix(pipe::SPAN) {
            report.spans.push(pipe::from_line(span)?);
        } else if let Some(count) = line.strip_prefix(pipe::REPLAYED) {
            report.replayed = count.parse()?;
        } else if line == pipe::KILL_ME {
            worker.kill()?; // SIGKILL, on Unix
            report.was_killed = true;
        } else {
            println!("{line}");
        }
    }

    let status = worker.wait()?;
    if status.success() || report.was_killed {
        Ok(report)
    } else {
        Err(format!("{workflow} with the layer {layer} failed: {status}").into())
    }
}
