//! A worker process is killed with a workflow under way; the next one goes on from the file that it left, and they
//! leave one trace.
//!
//! `cargo run --features redb,testing --example restart`

#![allow(
    clippy::print_stdout,
    reason = "the terminal is where it shows what it does"
)]

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState, TracerProvider as _,
};
use opentelemetry_sdk::trace::{
    InMemorySpanExporter, SdkTracerProvider, SpanData, SpanEvents, SpanLinks,
};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{RedbBackend, WorkflowContextStorage};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

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
    for steps in [["reserve_stock", "charge_card"], ["ship", "send_bill"]] {
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
    let forest = TraceForest::from_spans(&spans);
    println!("\n{forest}");
    forest.assert_one_trace();
    Ok(())
}

/// A worker process: takes its steps, and is killed then.
fn work(path: &Path, steps: &[&str]) -> Result<()> {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let storage = WorkflowContextStorage::builder()
        .backend(RedbBackend::open(path)?)
        .build()?;
    tracing_subscriber::registry()
        .with(storage.layer(provider.tracer("restart")))
        .init();

    steps.iter().for_each(|step| run_step(step, "order-42"));
    // From here on nothing can be lost.
    storage.flush()?;
    for span in exporter.get_finished_spans()? {
        println!("{}", to_line(&span)?);
    }
    println!("flushed");
    // Until it is killed, or nobody is left who could.
    std::io::stdin().lines().for_each(drop);
    Ok(())
}

#[tracing::instrument(fields(workflow.instance_id = %order))]
fn run_step(step: &str, order: &str) {
    call_service(step);
}

#[tracing::instrument]
fn call_service(step: &str) {
    std::thread::sleep(Duration::from_millis(1));
}

fn to_line(span: &SpanData) -> Result<String> {
    let since_epoch = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH);
    let step = span.attributes.iter().find(|it| it.key.as_str() == "step");
    let step = step.map(|it| it.value.to_string()).unwrap_or_default();
    Ok(format!(
        "{} {} {} {} {} {}({step})",
        span.span_context.trace_id(),
        span.span_context.span_id(),
        span.parent_span_id,
        since_epoch(span.start_time)?.as_nanos(),
        since_epoch(span.end_time)?.as_nanos(),
        span.name,
    ))
}

fn from_line(line: &str) -> Result<SpanData> {
    let [trace, span, parent, start, end, name] = line.split(' ').collect::<Vec<_>>()[..] else {
        return Err(format!("no span: {line}").into());
    };
    let time = |text: &str| -> Result<SystemTime> {
        Ok(SystemTime::UNIX_EPOCH + Duration::from_nanos(text.parse()?))
    };
    Ok(SpanData {
        span_context: SpanContext::new(
            TraceId::from_hex(trace)?,
            SpanId::from_hex(span)?,
            TraceFlags::SAMPLED,
            true,
            TraceState::NONE,
        ),
        parent_span_id: SpanId::from_hex(parent)?,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.to_owned().into(),
        start_time: time(start)?,
        end_time: time(end)?,
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: Default::default(),
    })
}
