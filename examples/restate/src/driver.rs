//! Starts the server and the workers, kills the first worker of each order, and looks at the spans that are left.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use opentelemetry_sdk::trace::SpanData;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tracing_workflow_context::testing::TraceForest;

use crate::worker::Layer;
use crate::{Mode, Result, server_trace, spans};

/// The bound of every single wait. A whole order takes about six seconds.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) async fn run(server: &Path, mode: Mode) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let directory = std::env::temp_dir().join(format!("restate-example-{}", std::process::id()));
    fs::create_dir(&directory)?;

    // Leaving a branch drops the child processes, and a dropped one is killed.
    let outcome = tokio::select! {
        outcome = compare(server, &directory), if mode == Mode::OwnTrace => outcome,
        outcome = server_trace::compare(server, &directory), if mode == Mode::ServerTrace => outcome,
        _ = interrupt.recv() => Err("interrupted".into()),
        _ = terminate.recv() => Err("terminated".into()),
    };
    match outcome {
        Ok(()) => Ok(fs::remove_dir_all(directory)?),
        Err(error) => Err(format!("{error}; logs and spans are in {}", directory.display()).into()),
    }
}

async fn compare(server: &Path, directory: &Path) -> Result<()> {
    let server = Server::start(server, directory, None).await?;
    let plain = one_order(&server, Layer::Plain, directory, None).await?;
    let plain = TraceForest::from_spans(&plain);
    println!("With the plain OpenTelemetry layer:\n\n{plain}\n");
    let ours = one_order(&server, Layer::WorkflowContext, directory, None).await?;
    let ours = TraceForest::from_spans(&ours);
    println!("With the layer of tracing-workflow-context:\n\n{ours}\n");
    server.stop().await?;

    println!(
        "plain: {} / with tracing-workflow-context: {}",
        summary(&plain),
        summary(&ours)
    );
    match ours.trace_count() {
        1 => Ok(()),
        traces => Err(format!("one order, {traces} traces").into()),
    }
}

pub(crate) fn summary(forest: &TraceForest) -> String {
    let (traces, spans) = (forest.trace_count(), forest.span_count());
    format!(
        "{traces} {}, {spans} spans",
        if traces == 1 { "trace" } else { "traces" }
    )
}

/// One instance, placed with that `traceparent`, and all spans its two workers exported.
pub(crate) async fn one_order(
    server: &Server,
    layer: Layer,
    directory: &Path,
    traceparent: Option<String>,
) -> Result<Vec<SpanData>> {
    let directory = directory.join(layer.name());
    fs::create_dir(&directory)?;
    let [port] = free_ports()?;

    let mut first = start_worker(layer, 1, port, &directory).await?;
    server.register(port).await?;
    let order = format!("order-{}", layer.name());
    let item = json!("a book").to_string();
    let result = tokio::spawn(post(server.order_url(&order), item, traceparent));

    // The first attempt ended in the first sleep, suspended. The second is killed in the second sleep, before it ends.
    let exported = spans::file(&directory, 1);
    until("charge_card on the first worker", async || {
        Ok(spans::read(&exported)?
            .iter()
            .any(|span| span.name == "charge_card"))
    })
    .await?;
    // Time for the server to note the step as done; less than it waits before it suspends.
    sleep(Duration::from_millis(300)).await;
    first.kill().await?; // SIGKILL: nothing is flushed

    let mut second = start_worker(layer, 2, port, &directory).await?;
    result.await??;
    // The result is there before the engine's span has ended. With its input closed the worker ends in good order.
    drop(second.stdin.take());
    let status = timeout(PATIENCE, second.wait()).await??;
    if !status.success() {
        return Err(format!("the second worker: {status}").into());
    }

    let (before, after) = (
        spans::read(&exported)?,
        spans::read(&spans::file(&directory, 2))?,
    );
    if after.is_empty() {
        return Err("the second worker exported nothing".into());
    }
    Ok([before, after].concat())
}

async fn start_worker(layer: Layer, number: u32, port: u16, directory: &Path) -> Result<Child> {
    let mut worker = Command::new(std::env::current_exe()?)
        .args([
            "worker",
            layer.name(),
            &number.to_string(),
            &port.to_string(),
        ])
        .arg(directory)
        .stdin(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    until("the worker's port", async || {
        still_running(&mut worker)?;
        Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .is_ok())
    })
    .await?;
    Ok(worker)
}

pub(crate) struct Server {
    process: Child,
    ingress: String,
    admin: String,
}

impl Server {
    /// Starts it; with a URL, it exports its spans there.
    pub(crate) async fn start(
        binary: &Path,
        directory: &Path,
        traces: Option<&str>,
    ) -> Result<Self> {
        let [ingress, admin, node] = free_ports()?;
        let log = File::create(directory.join("server.log"))?;
        let mut command = Command::new(binary);
        if let Some(url) = traces {
            command.env("RESTATE_TRACING_ENDPOINT", url);
        }
        let process = command
            .args(["--no-logo", "--node-name", "example"])
            .env("RESTATE_BASE_DIR", directory.join("server"))
            // Loopback TCP only, no word to anybody, and straight to the workers.
            .env("RESTATE_BIND_IP", "127.0.0.1")
            .env("RESTATE_LISTEN_MODE", "tcp")
            .env("RESTATE_BIND_PORT", node.to_string())
            .env("RESTATE_INGRESS__BIND_PORT", ingress.to_string())
            .env("RESTATE_ADMIN__BIND_PORT", admin.to_string())
            .env("RESTATE_DISABLE_TELEMETRY", "true")
            .env("DO_NOT_TRACK", "1")
            .env_remove("HTTP_PROXY")
            // Less than the workflow's pauses: each of them suspends it.
            .env("RESTATE_WORKER__INVOKER__INACTIVITY_TIMEOUT", "1s")
            .env("RESTATE_DEFAULT_NUM_PARTITIONS", "1")
            .env("RESTATE_ROCKSDB_TOTAL_MEMORY_SIZE", "256MiB")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("{}: {error}", binary.display()))?;
        let mut server = Self {
            process,
            ingress: format!("http://127.0.0.1:{ingress}"),
            admin: format!("http://127.0.0.1:{admin}"),
        };
        for health in [
            format!("{}/health", server.admin),
            format!("{}/restate/health", server.ingress),
        ] {
            until("the server's health", async || {
                still_running(&mut server.process)?;
                Ok(get(health.clone()).await.is_ok())
            })
            .await?;
        }
        Ok(server)
    }

    /// Lets it end in good order, with its last spans exported.
    pub(crate) async fn stop(mut self) -> Result<()> {
        let id = self.process.id().and_then(|id| i32::try_from(id).ok());
        let id = id.and_then(Pid::from_raw).ok_or("the server has ended")?;
        kill_process(id, Signal::TERM)?;
        timeout(PATIENCE, self.process.wait()).await??;
        Ok(())
    }

    /// Tells the server of a new worker; from then on new orders go there.
    async fn register(&self, port: u16) -> Result<()> {
        let body = json!({ "uri": format!("http://127.0.0.1:{port}") });
        post(
            format!("{}/deployments", self.admin),
            body.to_string(),
            None,
        )
        .await
    }

    fn order_url(&self, order: &str) -> String {
        format!("{}/Order/{order}/run", self.ingress)
    }
}

async fn get(url: String) -> Result<()> {
    spawn_blocking(move || http().get(&url).call().map(drop)).await??;
    Ok(())
}

async fn post(url: String, body: String, traceparent: Option<String>) -> Result<()> {
    let request = move || {
        let mut request = http().post(&url).header("content-type", "application/json");
        if let Some(traceparent) = traceparent {
            request = request.header("traceparent", traceparent);
        }
        request
            .send(&body)
            .map(drop)
            .map_err(|error| format!("{url}: {error}"))
    };
    spawn_blocking(request).await??;
    Ok(())
}

fn http() -> ureq::Agent {
    let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE));
    config.proxy(None).build().into() // not the environment's: all is on loopback
}

async fn until(what: &str, mut condition: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let poll = async {
        while !condition().await? {
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    };
    timeout(PATIENCE, poll)
        .await
        .map_err(|_| format!("waited too long for {what}"))?
}

fn still_running(process: &mut Child) -> Result<()> {
    match process.try_wait()? {
        None => Ok(()),
        Some(status) => Err(format!("a process ended early: {status}").into()),
    }
}

/// Ports that are free now. Taken all at once, so that they differ.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut listeners = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}
