//! Two worker processes take turns with one workflow, know nothing of each other but a Redis server, and leave one
//! trace.
//!
//! `cargo run --features redis,testing --example two_workers [redis://127.0.0.1:6379/]`
//!
//! Without a URL it starts a `redis-server` of its own on a free port, and ends it again.

#![allow(
    clippy::print_stdout,
    reason = "the terminal is where it shows what it does"
)]

use std::error::Error;
use std::io::{BufRead, BufReader, Lines, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState, TracerProvider as _,
};
use opentelemetry_sdk::trace::{
    InMemorySpanExporter, SdkTracerProvider, SpanData, SpanEvents, SpanLinks,
};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{RedisBackend, WorkflowContextStorage};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["worker", url] => work(url),
        [url] => hand_out_steps(url, &format!("order-{}", std::process::id())),
        [] => {
            let server = Server::start()?;
            hand_out_steps(&server.url, "order-42")
        }
        _ => Err("usage: two_workers [redis://127.0.0.1:6379/]".into()),
    }
}

/// What an engine does: it gives each step to some worker, with nothing but the id of the workflow.
fn hand_out_steps(url: &str, order: &str) -> Result<()> {
    let mut workers = [Worker::start(url)?, Worker::start(url)?];
    for (worker, step) in [
        (0, "reserve_stock"),
        (1, "charge_card"),
        (0, "ship"),
        (1, "send_bill"),
    ] {
        println!("process {}: {step}", workers[worker].process.id());
        workers[worker].run(step, order)?;
    }
    let mut spans = Vec::new();
    for worker in workers {
        spans.extend(worker.finish()?);
    }
    let forest = TraceForest::from_spans(&spans);
    println!("\n{forest}");
    forest.assert_one_trace();
    Ok(())
}

/// A worker process: runs the steps that it reads, and writes its spans in the end.
fn work(url: &str) -> Result<()> {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let storage = WorkflowContextStorage::builder()
        .backend(RedisBackend::connect(url)?)
        // The default is a few milliseconds. Here one trace matters more, however busy the machine is.
        .lookup_budget(Duration::from_secs(1))
        .build()?;
    tracing_subscriber::registry()
        .with(storage.layer(provider.tracer("two_workers")))
        .init();

    for task in std::io::stdin().lines() {
        let task = task?;
        let (step, order) = task.split_once(' ').ok_or("a step and an order")?;
        run_step(step, order);
        // Before anybody else may get the next step.
        storage.flush()?;
        println!("done");
    }
    for span in exporter.get_finished_spans()? {
        println!("{}", to_line(&span)?);
    }
    Ok(())
}

#[tracing::instrument(fields(workflow.instance_id = %order))]
fn run_step(step: &str, order: &str) {
    call_service(step);
}

#[tracing::instrument]
fn call_service(step: &str) {
    sleep(Duration::from_millis(1));
}

struct Worker {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Worker {
    fn start(url: &str) -> Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["worker", url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = process.stdout.take().ok_or("piped above")?;
        let lines = BufReader::new(stdout).lines();
        Ok(Self { process, lines })
    }

    fn run(&mut self, step: &str, order: &str) -> Result<()> {
        let stdin = self.process.stdin.as_mut().ok_or("piped above")?;
        writeln!(stdin, "{step} {order}")?;
        match self.lines.next().transpose()?.as_deref() {
            Some("done") => Ok(()),
            other => Err(format!("the worker answered {other:?}").into()),
        }
    }

    fn finish(mut self) -> Result<Vec<SpanData>> {
        drop(self.process.stdin.take());
        let spans = self.lines.map(|line| from_line(&line?)).collect();
        self.process.wait()?;
        spans
    }
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

/// A `redis-server` that ends with this.
struct Server {
    process: Child,
    url: String,
}

impl Server {
    fn start() -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let process = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            // It keeps nothing, and finds nothing.
            .args(["--save", "", "--dbfilename", "two_workers.rdb"])
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("redis-server: {error}; install it, or give a URL"))?;
        let server = Self {
            process,
            url: format!("redis://127.0.0.1:{port}/"),
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if Instant::now() > deadline {
                return Err("redis-server does not answer".into());
            }
            sleep(Duration::from_millis(10));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
