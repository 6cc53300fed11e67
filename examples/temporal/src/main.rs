//! One Temporal workflow, traced twice: by the plain OpenTelemetry layer, then by
//! `tracing-workflow-context`.
//!
//! Each time one worker process is killed in the middle of the workflow and another takes over.

mod order;
mod pipe;
mod server;
mod worker;

use crate::{pipe::Message, server::Shift};
use anyhow::{Context as _, Result, bail, ensure};
use opentelemetry::trace::SpanId;
use opentelemetry_sdk::trace::SpanData;
use std::{
    collections::HashMap,
    env,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};
use tracing_workflow_context::testing::TraceForest;

/// The layers to compare, as the first argument of a worker process.
const PLAIN: &str = "plain";
const OURS: &str = "tracing-workflow-context";

/// The workers, as its second argument; the third is the context carried to the replacement.
const KILLED: &str = "killed";
const REPLACEMENT: &str = "replacement";

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => compare(),
        [layer, KILLED] => worker::run(layer, Shift::Killed, None),
        [layer, REPLACEMENT] => worker::run(layer, Shift::Replacement, None),
        [layer, REPLACEMENT, context] => worker::run(layer, Shift::Replacement, Some(context)),
        _ => bail!("usage: cargo run -p temporal-example"),
    }
}

fn compare() -> Result<()> {
    let plain = trace_one_order(PLAIN)?;
    println!("---- {PLAIN}\n\n{plain}\n");
    let ours = trace_one_order(OURS)?;
    println!("---- {OURS}\n\n{ours}\n");

    println!("plain: {} / with {OURS}: {}", counts(&plain), counts(&ours));
    ensure!(ours.trace_count() == 1, "expected 1 trace");
    ensure!(
        ours.span_count() == plain.span_count(),
        "expected the same spans from both layers"
    );
    Ok(())
}

fn counts(forest: &TraceForest) -> String {
    let traces = forest.trace_count();
    let s = if traces == 1 { "" } else { "s" };
    format!("{traces} trace{s}, {} spans", forest.span_count())
}

fn trace_one_order(layer: &str) -> Result<TraceForest> {
    let mut spans = Vec::new();
    let context = supervise(layer, KILLED, None, &mut spans)?;
    supervise(layer, REPLACEMENT, context, &mut spans)?;
    Ok(TraceForest::from_spans(&of_the_instance(&spans)))
}

/// Runs one worker process to its end, which for the first one is `SIGKILL`.
///
/// Adds its spans to `spans`, and returns the context of the workflow that it reported.
fn supervise(
    layer: &str,
    worker: &str,
    carried: Option<String>,
    spans: &mut Vec<SpanData>,
) -> Result<Option<String>> {
    let mut process = Command::new(env::current_exe()?)
        .args([layer, worker])
        .args(carried)
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = process.stdout.take().context("stdout is piped")?;

    let mut hanging = None;
    for line in BufReader::new(stdout).lines() {
        match serde_json::from_str(&line?)? {
            Message::Span(span) => spans.push(span.try_into()?),
            Message::Hanging { context } => hanging = Some(context),
        }
        // Only the charge is killed. What else is open at that moment, and therefore lost, would
        // be a matter of luck: the workflow may just be on its way out of the cache.
        if hanging.is_some() && workflow_runs(spans) == server::TASKS_BEFORE_THE_KILL {
            process.kill()?;
            break;
        }
    }
    let status = process.wait()?;
    let ended_as_it_should = match worker {
        KILLED => status.code().is_none(),
        _ => status.success(),
    };
    ensure!(
        ended_as_it_should,
        "the {worker} worker ended with {status}"
    );
    Ok(hanging.flatten())
}

fn workflow_runs(spans: &[SpanData]) -> usize {
    let of_workflow = |span: &&SpanData| span.name.starts_with("RunWorkflow");
    spans.iter().filter(of_workflow).count()
}

/// Leaves out the spans in which the core polls for work and reports it, as they belong to no
/// instance, but none that opens inside the code of one.
fn of_the_instance(spans: &[SpanData]) -> Vec<SpanData> {
    let by_id = spans
        .iter()
        .map(|s| (s.span_context.span_id(), s))
        .collect();
    let inside = spans.iter().filter(|span| !is_the_cores(span, &by_id));
    inside.cloned().collect()
}

fn is_the_cores(span: &SpanData, by_id: &HashMap<SpanId, &SpanData>) -> bool {
    let mut attributes = span.attributes.iter();
    let from_core = attributes.any(|attribute| {
        attribute.key.as_str() == "target"
            && attribute.value.as_str().starts_with("temporalio_sdk_core")
    });
    let parent = by_id.get(&span.parent_span_id);
    from_core && parent.is_none_or(|parent| is_the_cores(parent, by_id))
}
