//! redb, Redis and PostgreSQL beside each other: what recording costs, what a miss waits for, and how long it takes until
//! another worker goes on.

use std::hint::black_box;
use std::path::Path;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Dispatch, dispatcher, info_span};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{
    PostgresBackend, RedbBackend, RedisBackend, WorkflowContextStorage,
    WorkflowContextStorageBuilder,
};

#[allow(
    dead_code,
    unused_imports,
    reason = "the tests use all of it, this bench a part"
)]
#[path = "../../tests/support/mod.rs"]
pub(crate) mod support;
use support::{PATIENCE, PostgresServer, RedisServer, Server as _, patient};

use crate::report::{Bench, Case, by_turns};
use crate::{Times, context, id};

const ROUNDS: usize = 15;

/// How many instances are stored between two flushes.
const STORED: usize = 5_000;

/// How many instances are asked for, or handed over, in a round: each of them waits for the server.
const ASKED: usize = 200;

/// Where the workers of a fleet keep their contexts.
struct Store {
    name: &'static str,
    open: Box<dyn Fn() -> Worker>,
    /// Two at once, unless it is a file, which one process at a time has.
    workers: Vec<Worker>,
    recorded: usize,
}

pub(crate) struct Worker {
    storage: WorkflowContextStorage,
    dispatch: Dispatch,
}

/// Compares them in one run. The servers are on this machine, with data of their own; PostgreSQL syncs to the disk as it
/// does by default, and so does redb, Redis does not.
pub(crate) fn servers(bench: &mut Bench, directory: &Path) {
    let redis = RedisServer::start();
    let postgres = PostgresServer::start_with(&["fsync=on", "full_page_writes=on"]);
    let file = directory.join("servers");
    let redis_url = redis.url();
    let [url, again] = [0, 1].map(|_| postgres.url());
    let mut stores = [
        Store::new("redb", 1, move || {
            Worker::new(patient(RedbBackend::open(&file).expect("a file")))
        }),
        Store::new("Redis", 2, move || {
            Worker::new(patient(on_redis(&redis_url)))
        }),
        Store::new("PostgreSQL", 2, move || Worker::new(patient(on(&url)))),
        Store::new("PostgreSQL, unlogged", 2, move || {
            Worker::new(patient(on(&again).unlogged(true).table("unlogged")))
        }),
    ];
    let rounds = bench.unless_test(ROUNDS, 1);
    for (what, run) in [
        ("store", Store::store as fn(&mut Store) -> f64),
        ("store until it is written", Store::store_and_flush),
        ("lookup on a miss", Store::miss),
        ("first span", Store::first_span),
        ("two workers handing over", Store::hand_over),
    ] {
        let name = |store: &Store| store.name.to_owned();
        let results = by_turns(rounds, &mut stores, name, run);
        let case = Case {
            what,
            size: 0,
            threads: 1,
        };
        bench.tell(case, "us", "PostgreSQL", &results);
    }
}

// Where the machine is busy, a group may take longer than the default, and is to be measured nevertheless.
pub(crate) fn on(url: &str) -> PostgresBackend {
    let backend = PostgresBackend::connect(url).expect("a URL");
    backend.response_timeout(PATIENCE)
}

pub(crate) fn on_redis(url: &str) -> RedisBackend {
    let backend = RedisBackend::connect(url).expect("a URL");
    backend.with_response_timeout(PATIENCE)
}

impl Store {
    fn new(name: &'static str, workers: usize, open: impl Fn() -> Worker + 'static) -> Self {
        Self {
            name,
            workers: (0..workers).map(|_| open()).collect(),
            open: Box::new(open),
            recorded: 0,
        }
    }

    /// Returns new ids.
    fn ids(&mut self, number: usize) -> Vec<String> {
        let begin = self.recorded;
        self.recorded += number;
        (begin..self.recorded).map(id).collect()
    }

    fn store(&mut self) -> f64 {
        let ids = self.ids(STORED);
        let worker = &self.workers[0];
        let times = Times::of(|| ids.iter().for_each(|id| worker.store(id)));
        worker.flush();
        worker.forget(&ids);
        microseconds(&times, STORED)
    }

    fn store_and_flush(&mut self) -> f64 {
        let ids = self.ids(STORED);
        let worker = &self.workers[0];
        let times = Times::of(|| {
            ids.iter().for_each(|id| worker.store(id));
            worker.flush();
        });
        worker.forget(&ids);
        microseconds(&times, STORED)
    }

    fn miss(&mut self) -> f64 {
        let ids = self.ids(ASKED);
        let storage = &self.workers[0].storage;
        let times = Times::of(|| {
            for id in &ids {
                let found = storage.get(black_box(id)).expect("the server works");
                assert!(found.is_none());
            }
        });
        microseconds(&times, ASKED)
    }

    /// It is looked up, and missing, before it is recorded.
    fn first_span(&mut self) -> f64 {
        let ids = self.ids(ASKED);
        let worker = &self.workers[0];
        let times = Times::of(|| ids.iter().for_each(|id| worker.span(id)));
        worker.flush();
        worker.forget(&ids);
        microseconds(&times, ASKED)
    }

    /// One worker's first span of an instance, its flush, and another worker's span that continues it.
    fn hand_over(&mut self) -> f64 {
        let number = if self.workers.len() > 1 { ASKED } else { 10 };
        let ids = self.ids(number);
        let times = Times::of(|| ids.iter().for_each(|id| self.hand_over_one(id)));
        self.workers[0].forget(&ids);
        microseconds(&times, number)
    }

    fn hand_over_one(&mut self, id: &str) {
        self.workers[0].span(id);
        self.workers[0].flush();
        let trace = self.workers[0].trace(id);
        match self.workers.len() {
            1 => {
                self.workers.clear();
                self.workers.push((self.open)());
            }
            _ => self.workers.swap(0, 1),
        }
        self.workers[0].span(id);
        assert_eq!(self.workers[0].trace(id), trace, "{}", self.name);
    }
}

impl Worker {
    pub(crate) fn new(builder: WorkflowContextStorageBuilder) -> Self {
        let storage = builder.build().expect("sound settings");
        let layer = storage.layer(SdkTracerProvider::builder().build().tracer("bench"));
        Self {
            dispatch: Dispatch::new(tracing_subscriber::registry().with(layer)),
            storage,
        }
    }

    fn store(&self, id: &str) {
        let stored = self.storage.store(black_box(id), context());
        stored.expect("a valid id");
    }

    pub(crate) fn span(&self, id: &str) {
        dispatcher::with_default(&self.dispatch, || {
            info_span!("step", workflow.instance_id = %black_box(id)).in_scope(|| {});
        });
    }

    pub(crate) fn flush(&self) {
        self.storage.flush().expect("the server works");
    }

    pub(crate) fn trace(&self, id: &str) -> Option<String> {
        let found = self.storage.get(id).expect("a valid id");
        found.map(|found| found.trace_id().to_string())
    }

    fn forget(&self, ids: &[String]) {
        for id in ids {
            self.storage.cleanup(id).expect("a valid id");
        }
        self.flush();
    }
}

pub(crate) fn microseconds(times: &Times, number: usize) -> f64 {
    times.wall / number as f64 / 1e3
}
