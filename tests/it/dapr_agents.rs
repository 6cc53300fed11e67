//! Agents in Python, by the real dapr-agents and `python/shared_context_storage.py`, share their contexts with Rust workers.
//!
//! `scripts/dapr-agents` installs the package, which takes minutes, and runs these tests.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::support::*;
use redis::Commands as _;
use serde_json::{Value, json};
use tracing_workflow_context::{
    Form, PostgresBackend, RedisBackend, WorkflowContext, WorkflowContextStorage,
};

/// The process that runs `tests/agent.py`. One for all tests, which take turns: the package takes seconds to be imported.
struct Process {
    commands: ChildStdin,
    replies: Receiver<String>,
}

impl Process {
    fn start() -> Self {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = directory.join("target/dapr-agents-venv/bin/python");
        assert!(
            python.exists(),
            "{} is missing: scripts/dapr-agents makes it",
            python.display()
        );
        // It ends with its input, and so with this process.
        let mut process = Command::new(python)
            .arg(directory.join("tests/agent.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python can be run");
        let commands = process.stdin.take().expect("it is piped");
        let lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        let (sender, replies) = channel();
        thread::spawn(move || {
            let mut lines = lines.map_while(Result::ok);
            let _ = lines.try_for_each(|line| sender.send(line));
            let _ = process.wait();
        });
        // On a busy machine it takes minutes.
        let ready = replies.recv_timeout(10 * PATIENCE).expect("it starts");
        assert_eq!(ready, "ready");
        Self { commands, replies }
    }
}

/// An agent, as long as it lives the only one.
struct Agent(MutexGuard<'static, Process>);

impl Agent {
    /// Starts an agent with these arguments of `python/shared_context_storage.py`, or with dapr-agents alone.
    fn start(settings: &Value) -> Self {
        static PROCESS: LazyLock<Mutex<Process>> = LazyLock::new(|| Mutex::new(Process::start()));
        let mut agent = Self(PROCESS.lock().unwrap_or_else(PoisonError::into_inner));
        agent.send("install", settings);
        agent
    }

    #[track_caller]
    fn send(&mut self, command: &str, argument: &Value) -> Value {
        writeln!(self.0.commands, "{}", json!([command, argument])).expect("it reads");
        let reply = self.0.replies.recv_timeout(PATIENCE);
        serde_json::from_str(&reply.expect("an answer")).expect("JSON")
    }

    #[track_caller]
    fn ask(&mut self, command: &str, id: &str) -> Value {
        self.send(command, &id.into())
    }

    fn errors(&mut self) -> u64 {
        self.ask("stats", "")["backend_errors"]
            .as_u64()
            .expect("a number")
    }
}

/// The server that agents and workers share.
enum Store {
    Redis(RedisServer),
    Postgres(PostgresServer),
}

impl Store {
    fn url(&self) -> String {
        match self {
            Self::Redis(server) => server.url(),
            Self::Postgres(server) => server.url(),
        }
    }

    fn agent(&self) -> Agent {
        Agent::start(&json!({ "url": self.url(), "budget": PATIENCE.as_secs() }))
    }

    fn worker(&self) -> Worker {
        let storage = match self {
            Self::Redis(server) => patient(redis(server).with_form(Form::Json)).build(),
            Self::Postgres(server) => patient(postgres(server).with_form(Form::Json)).build(),
        };
        ready(storage.expect("sound settings"))
    }

    fn freeze(&self) {
        match self {
            Self::Redis(server) => server.freeze(),
            Self::Postgres(server) => server.freeze(),
        }
    }

    fn thaw(&self) {
        match self {
            Self::Redis(server) => server.thaw(),
            Self::Postgres(server) => server.thaw(),
        }
    }
}

fn redis(server: &RedisServer) -> RedisBackend {
    let backend = RedisBackend::connect(&server.url()).expect("a URL");
    backend
        .with_connect_timeout(PATIENCE)
        .with_response_timeout(PATIENCE)
}

fn postgres(server: &PostgresServer) -> PostgresBackend {
    let backend = PostgresBackend::connect(&server.url()).expect("a URL");
    backend.connect_timeout(PATIENCE).response_timeout(PATIENCE)
}

/// Returns a worker whose backend has its table.
fn ready(storage: WorkflowContextStorage) -> Worker {
    storage.store("the first", context(1)).unwrap();
    storage.flush().unwrap();
    Worker::with_storage(storage)
}

fn for_each_store(test: impl Fn(&Store)) {
    labelled("Redis", || test(&Store::Redis(RedisServer::start())));
    labelled("PostgreSQL", || {
        test(&Store::Postgres(PostgresServer::start()));
    });
}

fn step(worker: &Worker, id: &str) -> opentelemetry_sdk::trace::SpanData {
    worker.run(|| tracing::info_span!("step", workflow.instance_id = %id).in_scope(|| {}));
    worker.spans().pop().expect("a span")
}

fn ids(context: &WorkflowContext) -> String {
    format!("{}-{}", context.trace_id(), context.span_id())
}

#[track_caller]
fn stored(worker: &Worker, id: &str) -> WorkflowContext {
    worker.storage.flush().unwrap();
    worker.storage.get(id).unwrap().expect("it is stored")
}

#[test]
#[ignore = "run by scripts/dapr-agents"]
fn a_span_continues_what_an_agent_stores() {
    for_each_store(|store| {
        let (mut agent, worker) = (store.agent(), store.worker());
        let agents = agent.ask("schedule", "order-42");
        let span = step(&worker, "order-42");
        let trace_id = span.span_context.trace_id();
        assert_eq!(agents, format!("{trace_id}-{}", span.parent_span_id));
        assert!(!stored(&worker, "order-42").is_resumed());
        assert_eq!(worker.storage.stats().malformed, 0);
        assert_eq!(agent.errors(), 0);
    });
}

#[test]
#[ignore = "run by scripts/dapr-agents"]
fn an_agent_continues_what_a_span_records() {
    for_each_store(|store| {
        let (mut agent, worker) = (store.agent(), store.worker());
        step(&worker, "order-42");
        let recorded = ids(&stored(&worker, "order-42"));
        let task = agent.ask("task", "order-42");
        assert_eq!(task["parent"], recorded);
        assert_eq!(task["restored"], recorded);
        assert_eq!(task["stored"]["instance_id"], "order-42");

        let with_state = WorkflowContext::parse(PARENT, "vendor=1").unwrap();
        worker.storage.store("order-43", with_state).unwrap();
        worker.storage.flush().unwrap();
        let task = agent.ask("task", "order-43");
        assert_eq!(task["stored"]["traceparent"], PARENT);
        assert_eq!(task["stored"]["tracestate"], "vendor=1");
        assert_eq!(agent.ask("task", "order-44")["stored"], Value::Null);
        assert_eq!(agent.errors(), 0);
    });
}

/// dapr-agents stores it by another key than the one it asks for.
#[test]
#[ignore = "run by scripts/dapr-agents"]
fn dapr_agents_alone_never_finds_a_resumed_context() {
    let mut agent = Agent::start(&Value::Null);
    agent.ask("resume", "order-42");
    assert_eq!(agent.ask("task", "order-42")["stored"], Value::Null);
    agent.ask("schedule", "order-42");
    assert_ne!(agent.ask("task", "order-42")["stored"], Value::Null);
}

#[test]
#[ignore = "run by scripts/dapr-agents"]
fn a_resumed_context_is_found_by_both_within_the_stored_trace() {
    for_each_store(|store| {
        let (mut agent, worker) = (store.agent(), store.worker());
        step(&worker, "order-42");
        let before = stored(&worker, "order-42");
        let resumed = agent.ask("resume", "order-42");
        let resumed = resumed["traceparent"].as_str().expect("text").to_owned();
        let after = WorkflowContext::parse(&resumed, "").unwrap();
        assert_eq!(after.trace_id(), before.trace_id());
        assert_ne!(after.span_id(), before.span_id());
        let task = agent.ask("task", "order-42");
        assert_eq!(task["parent"], ids(&after));
        assert_eq!(task["stored"]["resumed"], true);
        // A worker that did not know it before.
        let later = store.worker();
        assert_eq!(step(&later, "order-42").parent_span_id, after.span_id());
        assert!(stored(&later, "order-42").is_resumed());

        let ours = worker
            .storage
            .create_resumed("order-43", Some("Clerk"))
            .unwrap();
        worker.storage.flush().unwrap();
        let task = agent.ask("task", "order-43");
        assert_eq!(task["parent"], ids(&ours));
        assert_eq!(task["stored"]["resumed"], true);
        assert_eq!(agent.errors(), 0);
    });
}

#[test]
#[ignore = "run by scripts/dapr-agents"]
fn the_first_writer_wins_until_it_is_cleaned_up() {
    for_each_store(|store| {
        let (mut agent, worker) = (store.agent(), store.worker());
        step(&worker, "ours");
        let ours = ids(&stored(&worker, "ours"));
        agent.ask("schedule", "ours");
        assert_eq!(agent.ask("task", "ours")["parent"], ours);

        let theirs = agent.ask("schedule", "theirs");
        assert_ne!(agent.ask("schedule", "theirs"), theirs);
        assert_eq!(agent.ask("task", "theirs")["parent"], theirs);
        assert_eq!(ids(&stored(&worker, "theirs")), theirs);

        agent.ask("cleanup", "theirs");
        assert_eq!(store.worker().storage.get("theirs").unwrap(), None);
        assert_eq!(agent.ask("task", "theirs")["stored"], Value::Null);
        assert_eq!(agent.errors(), 0);
    });
}

#[test]
#[ignore = "run by scripts/dapr-agents"]
fn the_server_expires_what_an_agent_stores() {
    for_each_store(|store| {
        // Which makes the table.
        let _worker = store.worker();
        let (mut agent, day) = (store.agent(), 24 * 3600);
        agent.ask("schedule", "order-42");
        match store {
            Store::Redis(server) => {
                let client = redis::Client::open(server.url()).expect("a URL");
                let mut server = client.get_connection().expect("the server is up");
                let key = "workflow-context:{order-42}";
                let left: i64 = server.ttl(key).unwrap();
                assert!((1..=day).contains(&left), "{left}");
                let _: i64 = server.pexpire_at(key, 1).unwrap();
            }
            Store::Postgres(server) => {
                let row = "FROM workflow_contexts WHERE id = sha256('order-42')";
                let left = format!("SELECT extract(epoch FROM expires_at - now())::int8 {row}");
                let left: i64 = server.sql(&left).parse().expect("a number");
                assert!((1..=day).contains(&left), "{left}");
                server.sql(
                    "UPDATE workflow_contexts SET expires_at = now() WHERE id = sha256('order-42')",
                );
            }
        }
        assert_eq!(agent.ask("task", "order-42")["stored"], Value::Null);
        // What has expired is no first writer.
        let again = agent.ask("schedule", "order-42");
        assert_eq!(agent.ask("task", "order-42")["parent"], again);
        assert_eq!(agent.errors(), 0);
    });
}

#[test]
#[ignore = "run by scripts/dapr-agents"]
fn names_are_those_of_the_worker_whatever_is_in_them() {
    let namespace = "shop{1}\u{1d}\u{1e}\u{1f}";
    let id = "order}\u{1f}{4\u{1e}2\u{1d}ü__";
    let check = |settings: Value, worker: &dyn Fn(&str) -> Worker| {
        let mut agent = Agent::start(&settings);
        let (ours, other) = (worker(namespace), worker("other"));
        let agents = agent.ask("schedule", id);
        assert_eq!(ids(&stored(&ours, id)), agents);
        assert_eq!(other.storage.get(id).unwrap(), None);
        ours.storage.store("order-43", context(7)).unwrap();
        // Flushed, before the agent asks for it.
        let recorded = ids(&stored(&ours, "order-43"));
        assert_eq!(agent.ask("task", "order-43")["parent"], recorded);
        assert_eq!(agent.errors(), 0);
    };
    let server = RedisServer::start();
    let prefix = "wf\u{1e}\u{1f}{:";
    check(
        json!({ "url": server.url(), "namespace": namespace, "prefix": prefix, "budget": PATIENCE.as_secs() }),
        &|namespace| {
            let backend = redis(&server).with_form(Form::Json).with_key_prefix(prefix);
            ready(patient(backend).namespace(namespace).build().unwrap())
        },
    );
    let server = PostgresServer::start();
    check(
        json!({ "url": server.url(), "namespace": namespace, "table": "public.\"a table\"", "budget": PATIENCE.as_secs() }),
        &|namespace| {
            let backend = postgres(&server).with_form(Form::Json).table("a table");
            ready(patient(backend).namespace(namespace).build().unwrap())
        },
    );
}

#[test]
#[ignore = "run by scripts/dapr-agents"]
fn a_server_that_hangs_or_is_of_no_use_costs_the_agent_continuity_only() {
    for_each_store(|store| {
        let worker = store.worker();
        let mut agent = Agent::start(&json!({ "url": store.url(), "budget": 0.5 }));
        store.freeze();
        let agents = agent.ask("schedule", "order-42");
        assert_eq!(agent.ask("task", "order-42")["parent"], agents);
        agent.ask("resume", "order-42");
        agent.ask("cleanup", "order-42");
        assert_eq!(agent.ask("task", "order-42")["stored"], Value::Null);
        assert!(agent.errors() > 0);
        store.thaw();
        // What hung has been answered by then, and the server is asked again.
        wait_until("a context that an agent stores", || {
            agent.ask("schedule", "order-43");
            worker.storage.get("order-43").unwrap().is_some()
        });
    });
    let mut agent = Agent::start(&json!({ "url": "redis://127.0.0.1:1/" }));
    let agents = agent.ask("schedule", "order-42");
    assert_eq!(agent.ask("task", "order-42")["parent"], agents);
    assert!(agent.errors() > 0);
    drop(agent);

    // The form that Python does not read.
    let server = RedisServer::start();
    let worker = ready(patient(redis(&server)).build().unwrap());
    step(&worker, "order-42");
    worker.storage.flush().unwrap();
    let mut agent = Agent::start(&json!({ "url": server.url(), "budget": PATIENCE.as_secs() }));
    assert_eq!(agent.ask("task", "order-42")["stored"], Value::Null);
    assert_eq!(agent.errors(), 1);
}
