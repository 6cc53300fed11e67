//! Measures the load of a fleet on its server: commands, bytes and space of a workflow.
//!
//! `scripts/scale` runs it with servers of its own. By hand, with an empty server:
//! `cargo run --release --features postgres,redis --example scale redis://127.0.0.1:6379/`, or with
//! `postgres://user@127.0.0.1:5432/database`, without a password and options.
#![allow(clippy::print_stdout, reason = "it prints its results")]

use std::error::Error;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::trace::{Span as _, SpanBuilder, Tracer as _, TracerProvider as _};
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_workflow_context::{PostgresBackend, RedisBackend, WorkflowContextStorage};

const WORKERS: usize = 8;
const WORKFLOWS: usize = 20_000;
/// Later steps of a workflow, each on another worker: in this worst case, no worker has seen the workflow before.
const STEPS: usize = 4;
/// The fleet that the results are scaled to.
const FLEET_WORKFLOWS_PER_DAY: f64 = 100e6;
const FLEET_WORKERS: f64 = 10_000.0;
/// How often as many workflows come and go, to see what a table grows to.
const CHURNS: usize = 10;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let url = std::env::args()
        .nth(1)
        .ok_or("usage: scale redis://127.0.0.1:6379/ | postgres://127.0.0.1/ [direct]")?;
    match url.starts_with("redis") {
        true => measure(
            &mut OnRedis(redis::Client::open(&*url)?.get_connection()?),
            &url,
        ),
        false => {
            let mut server = OnPostgres::new(&url)?;
            let url = server.bytes.url.clone();
            measure(&mut server, &url)?;
            churn(&mut server, &url)
        }
    }
}

fn storage(url: &str, completed_grace: Duration) -> Result<WorkflowContextStorage> {
    let builder = WorkflowContextStorage::builder()
        .lookup_budget(Duration::from_secs(1))
        .completed_grace(completed_grace);
    let builder = match url.starts_with("redis") {
        true => builder.backend(RedisBackend::connect(url)?),
        false => {
            let direct = std::env::args().any(|word| word == "direct");
            builder.backend(PostgresBackend::connect(url)?.direct(direct))
        }
    };
    Ok(builder.build()?)
}

fn measure(server: &mut impl Server, url: &str) -> Result<()> {
    let provider = SdkTracerProvider::builder().build();
    let storages: Vec<_> = (0..WORKERS)
        .map(|_| storage(url, Duration::from_secs(300)))
        .collect::<Result<_>>()?;
    storages.iter().try_for_each(|storage| storage.flush())?;
    let step = |worker: usize, workflow: usize, name: &'static str| {
        let tracer = storages[worker].tracer(provider.tracer("scale"));
        let id = KeyValue::new("workflow.instance_id", uuid_like(workflow));
        let span = SpanBuilder::from_name(name).with_attributes([id]);
        tracer.build(span)
    };

    let before = server.usage()?;
    let start = Instant::now();
    for workflow in 0..WORKFLOWS {
        step(workflow % WORKERS, workflow, "first").end();
    }
    storages.iter().try_for_each(|storage| storage.flush())?;
    let recorded = server.usage()?;
    for workflow in 0..WORKFLOWS {
        for later in 1..=STEPS {
            let mut span = step((workflow + later) % WORKERS, workflow, "later");
            if later == STEPS {
                span.set_attribute(KeyValue::new("workflow.status", "completed"));
            }
            span.end();
        }
    }
    storages.iter().try_for_each(|storage| storage.flush())?;
    let seconds = start.elapsed().as_secs_f64();
    let hits: u64 = storages.iter().map(|storage| storage.stats().hits).sum();
    assert_eq!(
        hits,
        (WORKFLOWS * STEPS) as u64,
        "each later step found its workflow"
    );
    // With its connections closed, a PostgreSQL server has counted everything.
    drop(storages);
    let done = server.usage()?;
    let per = |now: f64, then: f64| (now - then) / WORKFLOWS as f64;
    let commands = per(done.commands, before.commands);
    let received = per(done.received, before.received);
    let sent = per(done.sent, before.sent);
    let memory = per(recorded.space, before.space);
    let per_second = FLEET_WORKFLOWS_PER_DAY / (24.0 * 60.0 * 60.0);
    println!(
        "{WORKFLOWS} workflows of {} steps on {WORKERS} workers in {seconds:.1} s",
        STEPS + 1
    );
    println!("commands of a workflow           {commands:8.1}");
    println!("bytes to the server of a workflow  {received:6.0}");
    println!("bytes from the server              {sent:6.0}");
    println!("space of the server, an instance   {memory:6.0} bytes");
    println!(
        "commands a second, measured here {:8.0}",
        commands * WORKFLOWS as f64 / seconds
    );
    println!("100 million workflows a day are {per_second:.0} a second:");
    println!(
        "  commands a second              {:8.0}",
        commands * per_second
    );
    println!(
        "  network, MB a second           {:8.2}",
        (received + sent) * per_second / 1e6
    );
    println!(
        "  space, GB, all kept for a day  {:8.1}",
        memory * FLEET_WORKFLOWS_PER_DAY / 1e9
    );
    println!(
        "  commands a second of a worker  {:8.2}",
        commands * per_second / FLEET_WORKERS
    );
    Ok(())
}

/// Formats an id as long as those of engines.
fn uuid_like(n: usize) -> String {
    format!("{n:08x}-0000-4000-8000-{n:012x}")
}

/// Figures of a server.
struct Usage {
    /// Redis commands, or PostgreSQL transactions.
    commands: f64,
    received: f64,
    sent: f64,
    /// Memory, or bytes on disk.
    space: f64,
}

trait Server {
    fn usage(&mut self) -> Result<Usage>;
}

struct OnRedis(redis::Connection);

impl Server for OnRedis {
    fn usage(&mut self) -> Result<Usage> {
        let info: redis::InfoDict = redis::cmd("INFO").arg("everything").query(&mut self.0)?;
        let figure = |name| {
            info.get::<f64>(name)
                .ok_or_else(|| format!("no {name} in INFO"))
        };
        Ok(Usage {
            commands: figure("total_commands_processed")?,
            received: figure("total_net_input_bytes")?,
            sent: figure("total_net_output_bytes")?,
            space: figure("used_memory")?,
        })
    }
}

struct OnPostgres {
    runtime: tokio::runtime::Runtime,
    client: tokio_postgres::Client,
    bytes: CountingProxy,
}

impl OnPostgres {
    fn new(url: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let (client, connection) =
            runtime.block_on(tokio_postgres::connect(url, tokio_postgres::NoTls))?;
        runtime.spawn(connection);
        let bytes = CountingProxy::start(url)?;
        Ok(Self {
            runtime,
            client,
            bytes,
        })
    }

    fn figure(&self, sql: &str) -> Result<f64> {
        let sql = format!("SELECT ({sql})::float8");
        Ok(self
            .runtime
            .block_on(self.client.query_one(&sql, &[]))?
            .get(0))
    }

    fn space(&self) -> Result<f64> {
        self.figure("pg_total_relation_size('workflow_contexts')")
    }
}

impl Server for OnPostgres {
    fn usage(&mut self) -> Result<Usage> {
        // Idle connections report what they did after a second.
        thread::sleep(Duration::from_millis(1500));
        let commands = "SELECT xact_commit + xact_rollback FROM pg_stat_database \
            WHERE datname = current_database()";
        Ok(Usage {
            commands: self.figure(commands)?,
            received: self.bytes.to_server.load(Relaxed) as f64,
            sent: self.bytes.from_server.load(Relaxed) as f64,
            space: self.space()?,
        })
    }
}

/// Lets workflows come and go, each forgotten a second after its end, and tells what the table grew to.
fn churn(server: &mut OnPostgres, url: &str) -> Result<()> {
    let storage = storage(url, Duration::from_secs(1))?;
    let provider = SdkTracerProvider::builder().build();
    let tracer = storage.tracer(provider.tracer("scale"));
    server
        .runtime
        .block_on(server.client.batch_execute("TRUNCATE workflow_contexts"))?;
    let mut largest = 0.0_f64;
    for round in 1..=CHURNS {
        for workflow in 0..WORKFLOWS {
            let id = KeyValue::new(
                "workflow.instance_id",
                uuid_like(round * WORKFLOWS + workflow),
            );
            let mut span = tracer.build(SpanBuilder::from_name("only").with_attributes([id]));
            span.set_attribute(KeyValue::new("workflow.status", "completed"));
        }
        storage.flush()?;
        largest = largest.max(server.space()?);
        if round % 5 == 0 {
            let rows = server.figure("SELECT count(*) FROM workflow_contexts")?;
            println!(
                "after {:7} workflows came and went {rows:6.0} rows and {:5.1} MB on disk, at most {:5.1} MB",
                round * WORKFLOWS,
                server.space()? / 1e6,
                largest / 1e6
            );
        }
    }
    let moved = |column: &str| {
        server.figure(&format!(
            "SELECT {column} FROM pg_stat_user_tables WHERE relname = 'workflow_contexts'"
        ))
    };
    thread::sleep(Duration::from_secs(2));
    println!(
        "of {} moves of an expiry {} wrote to the index",
        moved("n_tup_upd")?,
        moved("n_tup_upd - n_tup_hot_upd")?
    );
    Ok(())
}

/// A proxy before a server, which counts the bytes, since PostgreSQL does not.
struct CountingProxy {
    /// The URL of the server, with the port of the proxy.
    url: String,
    to_server: Arc<AtomicU64>,
    from_server: Arc<AtomicU64>,
}

impl CountingProxy {
    fn start(url: &str) -> Result<Self> {
        let config: tokio_postgres::Config = url.parse()?;
        let port = config.get_ports().first().copied().unwrap_or(5432);
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let proxy = Self {
            url: url.replace(
                &format!(":{port}/"),
                &format!(":{}/", listener.local_addr()?.port()),
            ),
            to_server: Arc::default(),
            from_server: Arc::default(),
        };
        let counts = (proxy.to_server.clone(), proxy.from_server.clone());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else {
                    return;
                };
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                if let (Ok(to_client), Ok(from_server)) = (client.try_clone(), server.try_clone()) {
                    let (to, from) = counts.clone();
                    thread::spawn(move || forward(client, server, &to));
                    thread::spawn(move || forward(from_server, to_client, &from));
                }
            }
        });
        Ok(proxy)
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, count: &AtomicU64) {
    let mut buffer = [0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        count.fetch_add(read as u64, Relaxed);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
