//! What a backend costs the thread that records, and what redb costs behind it.
//!
//! The rounds of all that are compared take turns, so that what else the machine does weighs on each alike; what is
//! told is the median. Where the writer behind it has no core to itself, the best round tells more: what the calling
//! thread itself does.

#![allow(clippy::print_stdout, reason = "the terminal is where the numbers go")]

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Dispatch, dispatcher, info_span};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{
    MemoryBackend, Record, RedbBackend, RedbSync, StorageBackend, WorkflowContext,
    WorkflowContextStorage, Write,
};

/// How many instances are recorded between two flushes: less than what waits for the writer at most.
const BATCH: usize = 5_000;

const INSTANCES: usize = 100_000;

fn main() {
    // `cargo bench -- --test` only shows that it works.
    let once = std::env::args().any(|arg| arg == "--test");
    let rounds = if once { 1 } else { 101 };
    let directory = Directory::new();
    record(&directory, rounds);
    write(&directory, rounds);
    restart(&directory, if once { 1 } else { 7 });
}

/// What the calling thread pays for an instance that is new.
fn record(directory: &Directory, rounds: usize) {
    let open =
        |name, sync| RedbBackend::open_with(directory.0.join(name), sync).expect("a new file");
    let builder = WorkflowContextStorage::builder;
    let storages = [
        ("no backend", builder().build()),
        ("memory", builder().backend(MemoryBackend::new()).build()),
        (
            "redb",
            builder().backend(open("group", RedbSync::Group)).build(),
        ),
        (
            "redb, eventually",
            builder()
                .backend(open("eventual", RedbSync::Eventual))
                .build(),
        ),
    ];
    let storages = storages.map(|(name, storage)| (name, storage.expect("valid settings")));
    let dispatches = storages.each_ref().map(|(_, storage)| {
        let tracer = SdkTracerProvider::builder().build().tracer("bench");
        Dispatch::new(tracing_subscriber::registry().with(storage.layer(tracer)))
    });
    let mut stored = storages.each_ref().map(|(name, _)| Measured::new(name));
    let mut spans = storages.each_ref().map(|(name, _)| Measured::new(name));
    let mut hits = storages.each_ref().map(|(name, _)| Measured::new(name));
    for round in 0..rounds {
        let ids: Vec<_> = (0..BATCH).map(|n| id(round * BATCH + n)).collect();
        for (at, (_, storage)) in storages.iter().enumerate() {
            let context = context();
            stored[at].time(BATCH, || {
                for id in &ids {
                    storage
                        .store(black_box(id), context.clone())
                        .expect("valid ids");
                }
            });
            storage.flush().expect("the backend works");
            ids.iter()
                .for_each(|id| assert!(storage.cleanup(id).expect("valid ids")));
            storage.flush().expect("the backend works");
            let step = |id: &String| info_span!("step", workflow.instance_id = %id).in_scope(|| {});
            dispatcher::with_default(&dispatches[at], || {
                spans[at].time(BATCH, || ids.iter().for_each(step));
                storage.flush().expect("the backend works");
                hits[at].time(BATCH, || ids.iter().for_each(step));
            });
            ids.iter()
                .for_each(|id| assert!(storage.cleanup(id).expect("valid ids")));
            storage.flush().expect("the backend works");
        }
    }
    compare("store", stored);
    compare("the first span of an instance", spans);
    compare("a later span", hits);
}

/// What a group costs, of one write and of many.
fn write(directory: &Directory, rounds: usize) {
    for sync in [RedbSync::Group, RedbSync::Eventual] {
        let backend = RedbBackend::open_with(directory.0.join(format!("{sync:?} writes")), sync);
        let backend = backend.expect("a new file");
        let mut measured = [1, 10, 100, 1_000].map(|size| (size, Measured::new("")));
        for round in 0..rounds {
            for (size, measured) in &mut measured {
                let put =
                    |n| Write::Put(id(round * *size + n), Record::new(context(), in_an_hour()));
                let writes: Vec<_> = (0..*size).map(put).collect();
                measured.time(1, || drop(backend.write(&writes).expect("the disk works")));
            }
        }
        for (size, measured) in measured {
            let median = measured.median();
            let each = median / size as u32;
            println!(
                "redb, {sync:?}: a group of {size:>4} takes {median:>9.1?}, {each:>9.1?} each"
            );
        }
        let mut get = Measured::new("");
        for round in 0..rounds {
            let ids: Vec<_> = (0..100).map(|n| id(round * 7 + n)).collect();
            get.time(100, || {
                ids.iter().for_each(|id| drop(black_box(backend.get(id))))
            });
        }
        println!("redb, {sync:?}: a get takes {:.2?}", get.median());
    }
}

/// What a new process waits for.
fn restart(directory: &Directory, rounds: usize) {
    let path = directory.0.join("restart");
    let backend = RedbBackend::open_with(&path, RedbSync::Eventual).expect("a new file");
    for some in 0..INSTANCES / 1_000 {
        let put = |n| Write::Put(id(some * 1_000 + n), Record::new(context(), in_an_hour()));
        let writes: Vec<_> = (0..1_000).map(put).collect();
        backend.write(&writes).expect("the disk works");
    }
    drop(backend);
    let bytes = std::fs::metadata(&path).expect("a file").len() / INSTANCES as u64;
    let (mut opened, mut warm) = (Measured::new(""), Measured::new(""));
    for _ in 0..rounds {
        let mut backend = None;
        opened.time(1, || {
            backend = Some(RedbBackend::open(&path).expect("a sound file"))
        });
        warm.time(1, || {
            let builder =
                WorkflowContextStorage::builder().backend(backend.take().expect("opened"));
            let storage = builder.build().expect("valid settings");
            assert_eq!(storage.stats().stored_instances, INSTANCES as u64);
        });
    }
    println!(
        "redb: a file of {INSTANCES} instances, {bytes} bytes each, is opened and checked in {:.0?} and loaded in {:.0?}",
        opened.median(),
        warm.median()
    );
}

struct Measured {
    name: &'static str,
    rounds: Vec<Duration>,
}

impl Measured {
    fn new(name: &'static str) -> Self {
        let rounds = Vec::new();
        Self { name, rounds }
    }

    fn time(&mut self, times: usize, run: impl FnOnce()) {
        let start = Instant::now();
        run();
        self.rounds.push(start.elapsed() / times as u32);
    }

    fn median(&self) -> Duration {
        let mut rounds = self.rounds.clone();
        rounds.sort();
        rounds[rounds.len() / 2]
    }

    fn best(&self) -> Duration {
        self.rounds.iter().copied().min().unwrap_or_default()
    }
}

fn compare<const N: usize>(what: &str, measured: [Measured; N]) {
    let without = [measured[0].median(), measured[0].best()];
    for measured in measured {
        let [median, best] = [
            (measured.median(), without[0]),
            (measured.best(), without[1]),
        ]
        .map(|(with, without)| {
            let times = with.as_secs_f64() / without.as_secs_f64();
            format!("{:>5} ns ({times:.2} times)", with.as_nanos())
        });
        println!("{what}: {median}, at best {best}, with {}", measured.name);
    }
}

fn id(n: usize) -> String {
    // In an order that no map has.
    let scattered = (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16;
    format!("00000000-0000-4000-8000-{scattered:012x}")
}

fn context() -> WorkflowContext {
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    WorkflowContext::parse(parent, "").expect("well formed")
}

fn in_an_hour() -> SystemTime {
    SystemTime::now() + Duration::from_secs(3600)
}

/// Gone when it is dropped.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        let path =
            std::env::temp_dir().join(format!("workflow-context-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory for temporary files");
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
