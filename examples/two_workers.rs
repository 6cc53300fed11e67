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

mod support;

use std::io::{BufRead, BufReader, Lines, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use opentelemetry_sdk::trace::SpanData;
use tracing_workflow_context::{RedisBackend, WorkflowContextStorage};

use support::{Result, draw, from_line, print_spans, run_step, trace_with};

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
    draw(&spans);
    Ok(())
}

/// A worker process: runs the steps that it reads, and writes its spans in the end.
fn work(url: &str) -> Result<()> {
    let storage = WorkflowContextStorage::builder()
        .backend(RedisBackend::connect(url)?)
        .build()?;
    let exporter = trace_with(&storage);

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
