//! What stands in for Lambda: the Invoke API, which the emulator calls, and the Runtime API, which `lambda_runtime` polls. Each
//! invocation gets a process of its own, which is killed as soon as it asks for the next event.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{self, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use opentelemetry_sdk::trace::SpanData;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::emulator::{self, ACCOUNT, REGION};
use crate::{Result, Way, function, pipe};

/// How long an invocation may take, on a machine however busy.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Lambda {
    way: Way,
    dir: PathBuf,
    emulator_port: u16,
    /// The environments that may exist at once.
    environments: Semaphore,
    invocations: AtomicUsize,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    spans: Vec<SpanData>,
    failure: Option<String>,
}

impl Lambda {
    pub fn new(way: Way, dir: &Path, emulator_port: u16) -> Arc<Self> {
        // The file of a `RedbBackend` is open in one process at a time.
        let environments = if way == Way::Redb { 1 } else { 4 };
        Arc::new(Self {
            way,
            dir: dir.to_owned(),
            emulator_port,
            environments: Semaphore::new(environments),
            invocations: AtomicUsize::new(0),
            seen: Mutex::default(),
        })
    }

    /// Serves the Invoke API. Returns its port.
    pub async fn serve(self: &Arc<Self>) -> Result<u16> {
        let invoke =
            |State(lambda): State<Arc<Self>>,
             extract::Path(name): extract::Path<String>,
             event: Bytes| async move { lambda.invoke(&name, event).await };
        let router = Router::new()
            .route("/2015-03-31/functions/{name}/invocations", post(invoke))
            .with_state(self.clone());
        serve(router).await
    }

    pub fn invocations(&self) -> usize {
        self.invocations.load(Relaxed)
    }

    pub fn spans(&self) -> Vec<SpanData> {
        self.with_seen(|seen| seen.spans.clone())
    }

    /// Returns why an invocation failed, if one did.
    pub fn failure(&self) -> Option<String> {
        self.with_seen(|seen| seen.failure.clone())
    }

    fn with_seen<R>(&self, with: impl FnOnce(&mut Seen) -> R) -> R {
        with(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn invoke(&self, name: &str, event: Bytes) -> Response {
        let answer = match timeout(PATIENCE, self.run(name, event)).await {
            Ok(answer) => answer,
            Err(_) => Err("the function does not answer".into()),
        };
        answer.map_or_else(
            |error| {
                let error = format!("an invocation of {name} failed: {error}");
                self.with_seen(|seen| seen.failure = Some(error.clone()));
                (StatusCode::INTERNAL_SERVER_ERROR, error).into_response()
            },
            |payload| payload.into_response(),
        )
    }

    /// Runs one invocation in a process of its own.
    async fn run(&self, name: &str, event: Bytes) -> Result<Bytes> {
        let _environment = self.environments.acquire().await?;
        let number = self.invocations.fetch_add(1, Relaxed);
        // A qualifier may follow.
        let name = name.split(':').next().unwrap_or(name);
        let (told, mut tells) = mpsc::unbounded_channel();
        let runtime_port = serve(runtime_api(name, number, event, told)).await?;
        let mut process = self.start(name, runtime_port)?;
        let stdout = process.stdout.take().ok_or("the function has no stdout")?;
        let lines = tokio::spawn(lines_of(stdout));

        let mut answer = None;
        loop {
            let told = tokio::select! {
                told = tells.recv() => told.ok_or("the Runtime API is gone")?,
                status = process.wait() => return Err(format!("ended: {}", status?).into()),
            };
            match told {
                Told::Response(payload) => answer = Some(payload),
                Told::Error(error) => return Err(error.into()),
                Told::Idle => break,
            }
        }
        process.kill().await?; // SIGKILL, on Unix
        for line in lines.await?? {
            self.read(&line)?;
        }
        answer.ok_or_else(|| "no response".into())
    }

    fn start(&self, name: &str, runtime_port: u16) -> Result<Child> {
        let environment = [
            (
                "AWS_LAMBDA_RUNTIME_API",
                format!("127.0.0.1:{runtime_port}"),
            ),
            ("AWS_LAMBDA_FUNCTION_NAME", name.to_owned()),
            ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "128".to_owned()),
            ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST".to_owned()),
            (
                "AWS_ENDPOINT_URL_LAMBDA",
                format!("http://127.0.0.1:{}", self.emulator_port),
            ),
        ];
        let process = Command::new(std::env::current_exe()?)
            .args([function::ARGUMENT, self.way.name()])
            .arg(&self.dir)
            .env_clear()
            .envs(emulator::CREDENTIALS)
            .envs(environment)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        Ok(process)
    }

    fn read(&self, line: &str) -> Result<()> {
        if let Some(span) = line.strip_prefix(pipe::SPAN) {
            let span = pipe::from_line(span)?;
            self.with_seen(|seen| seen.spans.push(span));
        } else if let Some(id) = line.strip_prefix(pipe::CALLBACK) {
            let (port, id) = (self.emulator_port, id.to_owned());
            drop(spawn_blocking(move || emulator::approve(port, &id)));
        } else {
            println!("{line}");
        }
        Ok(())
    }
}

/// What a function tells the Runtime API.
enum Told {
    Response(Bytes),
    Error(String),
    /// It asks for the next event.
    Idle,
}

/// Returns the Runtime API of one process, which has one event.
fn runtime_api(
    name: &str,
    number: usize,
    event: Bytes,
    told: mpsc::UnboundedSender<Told>,
) -> Router {
    let deadline = SystemTime::now() + PATIENCE;
    let deadline = deadline.duration_since(UNIX_EPOCH).unwrap_or_default();
    let headers = [
        ("lambda-runtime-aws-request-id", format!("request-{number}")),
        (
            "lambda-runtime-deadline-ms",
            deadline.as_millis().to_string(),
        ),
        (
            "lambda-runtime-invoked-function-arn",
            format!("arn:aws:lambda:{REGION}:{ACCOUNT}:function:{name}"),
        ),
    ];
    let event = Arc::new(Mutex::new(Some((headers, event))));
    let tell = move |what| {
        // Nobody listens where the invocation has failed.
        let _ = told.send(what);
        StatusCode::ACCEPTED
    };
    let (asks, responds, fails) = (tell.clone(), tell.clone(), tell);
    let next = move || async move {
        let event = event.lock().unwrap_or_else(PoisonError::into_inner).take();
        match event {
            Some(event) => event.into_response(),
            None => {
                asks(Told::Idle);
                std::future::pending().await
            }
        }
    };
    let respond = move |payload: Bytes| async move { responds(Told::Response(payload)) };
    let fail = move |error: String| async move { fails(Told::Error(error)) };
    Router::new()
        .route("/2018-06-01/runtime/invocation/next", get(next))
        .route(
            "/2018-06-01/runtime/invocation/{id}/response",
            post(respond),
        )
        .route(
            "/2018-06-01/runtime/invocation/{id}/error",
            post(fail.clone()),
        )
        .route("/2018-06-01/runtime/init/error", post(fail))
}

/// Serves on a port that was free, and returns that.
async fn serve(router: Router) -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(axum::serve(listener, router).into_future());
    Ok(port)
}

async fn lines_of(stdout: impl AsyncRead + Unpin) -> Result<Vec<String>> {
    let mut lines = BufReader::new(stdout).lines();
    let mut all = Vec::new();
    while let Some(line) = lines.next_line().await? {
        all.push(line);
    }
    Ok(all)
}
