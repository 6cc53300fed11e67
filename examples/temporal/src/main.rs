//! An order through Temporal: a client and two worker processes, the first of which is killed. Traced by the plain OpenTelemetry
//! layer, then by `tracing-workflow-context`, by fields alone and by the interceptor of `tagging.rs`.
//! `scripts/engine-temporal` gets the servers and runs this.

mod client;
mod expected;
mod order;
mod pipe;
mod servers;
mod tagging;
mod worker;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context as _, Result, bail, ensure};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData};
use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{
    Continuation, Engine, RedisBackend, Relation, WorkflowContextStorage,
};

use crate::expected::check;
use crate::order::{FIELDS, Fields};
use crate::servers::Server;

/// A whole order, with a busy machine in mind.
const PATIENCE: Duration = Duration::from_secs(120);

/// The killed worker has told of all that ended before, once it has been silent for this long.
const SILENCE: Duration = Duration::from_millis(500);

/// The ways to trace the order.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// The plain OpenTelemetry layer; nothing is added to the code.
    Plain,
    /// This crate, and the workflow's id on the spans of workflows and handlers.
    IdAlone,
    /// This crate, and all its fields there.
    AllFields,
    /// This crate and its interceptor; nothing is added to the code.
    Interceptor,
    /// The same, and a new run stays in the trace of the one before.
    OneTrace,
}

impl Way {
    const ALL: [Self; 5] = [
        Self::Plain,
        Self::IdAlone,
        Self::AllFields,
        Self::Interceptor,
        Self::OneTrace,
    ];

    /// As an argument of a process, and as a title.
    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain layer",
            Self::IdAlone => "the id alone",
            Self::AllFields => "all fields",
            Self::Interceptor => "interceptor",
            Self::OneTrace => "interceptor, new runs in the trace",
        }
    }

    fn fields(self) -> Fields {
        match self {
            Self::Plain | Self::Interceptor | Self::OneTrace => Fields::None,
            Self::IdAlone => Fields::Id,
            Self::AllFields => Fields::All,
        }
    }

    /// Before and after.
    fn is_drawn(self) -> bool {
        matches!(self, Self::Plain | Self::Interceptor)
    }

    fn has_interceptor(self) -> bool {
        matches!(self, Self::Interceptor | Self::OneTrace)
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let [part @ ("client" | "worker"), way, temporal, redis] = args[..] {
        let way = Way::ALL.into_iter().find(|it| it.name() == way);
        return be(part, way.context("no such way")?, temporal, redis);
    }
    let [temporal_test_server, ref ways @ ..] = args[..] else {
        bail!("usage: scripts/engine-temporal");
    };
    let mut counts = Vec::new();
    for way in Way::ALL {
        if !ways.is_empty() && !ways.contains(&way.name()) {
            continue;
        }
        eprintln!("engine-temporal: an order with: {}", way.name());
        counts.push(check(way, &run(way, temporal_test_server)?)?);
    }
    for counts in counts {
        println!("{counts}");
    }
    Ok(())
}

/// The client or a worker.
#[tokio::main]
async fn be(part: &str, way: Way, temporal: &str, redis: &str) -> Result<()> {
    FIELDS.get_or_init(|| way.fields());
    let mut storage = WorkflowContextStorage::builder()
        .engine(Engine::Temporal)
        .backend(RedisBackend::connect(redis)?);
    if way == Way::OneTrace {
        storage = storage.relation(Relation::NewRun, Continuation::ParentAndLink);
    }
    let storage = storage.build()?;
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(pipe::Exporter(pipe::name_of))
        .build();
    let tracer = provider.tracer("temporal-example");
    let layer = match way {
        Way::Plain => tracing_opentelemetry::layer().with_tracer(tracer).boxed(),
        _ => storage.layer(tracer).boxed(),
    };
    // The spans in which the SDK's core polls and reports belong to no workflow.
    let filter = Targets::new().with_default(Level::INFO);
    let filter = filter.with_target("temporalio_sdk_core", None::<Level>);
    tracing_subscriber::registry()
        .with(filter)
        .with(layer)
        .init();

    match part {
        "client" => client::place_order(temporal, &storage).await,
        _ => worker::work(temporal, way.has_interceptor()).await,
    }
}

/// Runs an order by its three processes, and returns the spans that they exported.
fn run(way: Way, temporal_test_server: &str) -> Result<Vec<SpanData>> {
    let (temporal, redis) = (Server::temporal(temporal_test_server)?, Server::redis()?);
    let (temporal, redis) = (temporal.url("http"), redis.url("redis"));
    let (lines, told) = mpsc::channel();
    let start = |part| Process::start(&[part, way.name(), &temporal, &redis], lines.clone());

    let mut spans = Vec::new();
    let mut first = start("worker")?;
    let client = start("client")?;
    await_line(&told, pipe::KILL_ME, &mut spans)?;
    while let Ok(line) = told.recv_timeout(SILENCE) {
        read(&line, &mut spans)?;
    }
    first.0.kill()?; // SIGKILL, on Unix
    let status = first.end()?;
    ensure!(status.code().is_none(), "the first worker ended: {status}");
    let second = start("worker")?;
    for (part, mut process) in [("client", client), ("second worker", second)] {
        let status = process.end()?;
        ensure!(status.success(), "the {part} failed: {status}");
    }
    drop(lines);
    for line in told {
        read(&line, &mut spans)?;
    }
    Ok(spans)
}

/// Reads what the processes tell until that line comes.
fn await_line(told: &Receiver<String>, awaited: &str, spans: &mut Vec<SpanData>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match told.recv_timeout(left) {
            Ok(line) if line == awaited => return Ok(()),
            Ok(line) => read(&line, spans)?,
            Err(RecvTimeoutError::Timeout) => bail!("no worker said: {awaited}"),
            Err(RecvTimeoutError::Disconnected) => bail!("all processes ended"),
        }
    }
}

fn read(line: &str, spans: &mut Vec<SpanData>) -> Result<()> {
    match line.strip_prefix(pipe::SPAN) {
        Some(span) => spans.push(pipe::from_line(span).map_err(anyhow::Error::msg)?),
        None => println!("{line}"),
    }
    Ok(())
}

/// A process of this program, whose lines are passed on. It ends with this.
struct Process(Child);

impl Process {
    fn start(args: &[&str], lines: Sender<String>) -> Result<Self> {
        let mut process = Command::new(env::current_exe()?)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = process.stdout.take().context("stdout is piped")?;
        let process = Self(process);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(process)
    }

    /// Tells it to end, and waits for that.
    fn end(&mut self) -> Result<ExitStatus> {
        drop(self.0.stdin.take());
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "a process does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
