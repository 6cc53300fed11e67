//! Orders through DBOS on a real PostgreSQL, by two processes of which the first is killed: traced by the plain OpenTelemetry
//! layer, then by `tracing-workflow-context`. `scripts/engine-dbos` starts the server and runs this.

mod orders;
mod pipe;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use opentelemetry_sdk::trace::SpanData;
use tracing_workflow_context::testing::TraceForest;

use crate::orders::{IN_REQUEST, all_orders};

/// The layers to compare, as an argument of a worker process.
const PLAIN: &str = "plain";
const OURS: &str = "tracing-workflow-context";

/// The first worker is killed in an order, the second one recovers that.
const FIRST: &str = "first";
const SECOND: &str = "second";

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [url] => {
            let dir = tempfile::tempdir()?;
            let plain = run(url, PLAIN, dir.path())?;
            let ours = run(url, OURS, dir.path())?;
            println!("plain: {plain} / with {OURS}: {ours}");
            Ok(())
        }
        [url, layer, part, dir] => worker::run(url, layer, part, Path::new(dir)),
        _ => Err("usage: scripts/engine-dbos".into()),
    }
}

/// Runs both workers with one layer. Returns the counts.
fn run(url: &str, layer: &str, dir: &Path) -> Result<String> {
    let mut spans = run_worker(url, layer, FIRST, dir)?;
    spans.extend(run_worker(url, layer, SECOND, dir)?);
    check(layer, spans)
}

/// Runs a worker process until it is done or wants to be killed. Returns the spans that it exported.
fn run_worker(url: &str, layer: &str, part: &str, dir: &Path) -> Result<Vec<SpanData>> {
    let mut worker = Command::new(std::env::current_exe()?)
        .args([url, layer, part])
        .arg(dir)
        .stdout(Stdio::piped())
        .spawn()?;
    let (mut spans, mut was_killed) = (Vec::new(), false);
    let stdout = worker.stdout.take().ok_or("the worker has no stdout")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        if let Some(span) = line.strip_prefix(pipe::SPAN) {
            spans.push(pipe::from_line(span)?);
        } else if line == pipe::KILL_ME {
            worker.kill()?; // SIGKILL, on Unix
            was_killed = true;
        } else {
            println!("{line}");
        }
    }
    let status = worker.wait()?;
    ensure(
        was_killed == (part == FIRST),
        format!("{part}: expected the first worker alone to be killed"),
    )?;
    ensure(
        was_killed || status.success(),
        format!("the {part} worker with {layer} failed: {status}"),
    )?;
    Ok(spans)
}

/// Draws the traces in which a workflow ran, and compares them with what is expected.
fn check(layer: &str, spans: Vec<SpanData>) -> Result<String> {
    // Of a workflow whose span died with its worker, the second one's is there.
    let mut traces_of: BTreeMap<String, BTreeSet<Trace>> = BTreeMap::new();
    for span in &spans {
        if let Some(id) = span.name.strip_prefix("workflow ") {
            traces_of
                .entry(id.to_owned())
                .or_default()
                .insert(trace_of(span));
        }
    }
    let shown: BTreeSet<_> = traces_of.values().flatten().copied().collect();
    let spans: Vec<_> = spans
        .into_iter()
        .filter(|span| shown.contains(&trace_of(span)))
        .collect();
    let forest = TraceForest::from_spans(&spans);
    println!("With {layer}:\n\n{forest}\n");

    let orders = all_orders();
    let mut workflows_in: BTreeMap<Trace, BTreeSet<&str>> = BTreeMap::new();
    for (id, traces) in &traces_of {
        for trace in traces {
            // A child that is run directly is named after its parent, and belongs to it.
            let order = id.strip_suffix("-pack").unwrap_or(id);
            workflows_in.entry(*trace).or_default().insert(order);
        }
    }
    let most = workflows_in
        .values()
        .map(BTreeSet::len)
        .max()
        .unwrap_or_default();
    let counts = format!(
        "{} traces, {} spans, up to {most} workflows in one",
        forest.trace_count(),
        forest.span_count()
    );
    ensure(
        traces_of.len() == 3 * orders.len(),
        "expected each order with its two children".into(),
    )?;
    if layer == PLAIN {
        ensure(
            most > 1,
            "expected the plain layer to mix the orders of a queue".into(),
        )?;
        return Ok(counts);
    }
    for (id, traces) in &traces_of {
        ensure(traces.len() == 1, format!("expected one trace for {id}"))?;
        let parent = id.strip_suffix("-pack").map(|order| &traces_of[order]);
        ensure(
            parent.is_none_or(|parent| parent == traces),
            format!("expected {id} in its order's trace"),
        )?;
    }
    ensure(
        most == 1,
        "expected no trace with two workflows that do not call each other".into(),
    )?;
    ensure(
        workflows_in.len() == 2 * orders.len(),
        "expected one trace for each order and each mail".into(),
    )?;
    let request = forest.find("request").map(trace_of);
    ensure(
        request == traces_of[IN_REQUEST].first().copied(),
        "expected the order in the request's trace".into(),
    )?;
    let attempts = spans
        .iter()
        .filter(|span| span.name == "step charge")
        .count();
    ensure(
        attempts == 2 * orders.len(),
        format!("expected two attempts to charge each order, not {attempts} in all"),
    )?;
    Ok(counts)
}

/// The bytes of a trace id, which has no order.
type Trace = [u8; 16];

fn trace_of(span: &SpanData) -> Trace {
    span.span_context.trace_id().to_bytes()
}

fn ensure(holds: bool, otherwise: String) -> Result<()> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}
