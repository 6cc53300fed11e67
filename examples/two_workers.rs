//! Worker processes take turns with one workflow, know nothing of each other but a Redis server, a PostgreSQL database or
//! a file, and leave one trace.
//!
//! `cargo run --features postgres,redb,redis,testing --example two_workers [<store>]`, with a store such as
//! `redis://127.0.0.1:6379/`, `postgres://user@127.0.0.1/database` or `contexts.redb`.
//!
//! Without one it starts a `redis-server` of its own on a free port, and ends it again.

#![allow(
    clippy::print_stdout,
    reason = "the terminal is where it shows what it does"
)]

mod support;

use std::io::{BufRead, BufReader, Lines, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData};
use tracing_workflow_context::{
    PostgresBackend, RedbBackend, RedisBackend, WorkflowContextStorage,
};

use support::{Result, draw, from_line, print_spans, run_step, trace_through};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["worker", store] => work(store),
        [store] => hand_out_steps(store, &format!("order-{}", std::process::id())),
        [] => {
            let server = Server::start()?;
            hand_out_steps(&server.url, "order-42")
        }
        _ => Err("usage: two_workers [<URL or file>]".into()),
    }
}

/// What an engine does: it gives each step to some worker, with nothing but the id of the workflow.
fn hand_out_steps(store: &str, order: &str) -> Result<()> {
    let mut workers = [None, None];
    let mut spans = Vec::new();
    for (at, step) in [
        (0, "reserve_stock"),
        (1, "charge_card"),
        (0, "ship"),
        (1, "send_bill"),
    ] {
        let mut worker = match workers[at].take() {
            Some(worker) => worker,
            None => Worker::start(store)?,
        };
        println!("process {}: {step}", worker.process.id());
        worker.run(step, order)?;
        // One process at a time has a file.
        match is_file(store) {
            true => spans.extend(worker.finish()?),
            false => workers[at] = Some(worker),
        }
    }
    for worker in workers.into_iter().flatten() {
        spans.extend(worker.finish()?);
    }
    draw(&spans);
    Ok(())
}

/// A worker process: runs the steps that it reads, and writes its spans in the end.
fn work(store: &str) -> Result<()> {
    let builder = WorkflowContextStorage::builder();
    let builder = match store.split_once("://") {
        None => builder.backend(RedbBackend::open(store)?),
        Some(("postgres" | "postgresql", _)) => builder.backend(PostgresBackend::connect(store)?),
        Some(_) => builder.backend(RedisBackend::connect(store)?),
    };
    let storage = builder.build()?;
    let exporter = trace_through(SdkTracerProvider::builder(), &storage);

    for task in std::io::stdin().lines() {
        let task = task?;
        let (step, order) = task.split_once(' ').ok_or("a step and an order")?;
        run_step(step, order);
        // Before anybody else may get the next step.
        storage.flush()?;
        println!("done");
    }
    print_spans(&exporter)
}

fn is_file(store: &str) -> bool {
    !store.contains("://")
}

struct Worker {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Worker {
    fn start(store: &str) -> Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["worker", store])
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
        let spans = self.lines.map(|line| Ok(from_line(&line?)?)).collect();
        self.process.wait()?;
        spans
    }
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
