//! What a backend costs the thread that records, what redb costs behind it, what a new process waits for, and how redb,
//! Redis and PostgreSQL compare.
//!
//! `cargo bench --bench backends --all-features [-- [--csv <file>] [--instances <n>] [<case>...]]`, the cases being
//! `record`, `write`, `restart`, `servers` and `clients`. `--instances` is how many the file has that is opened again. The last
//! two start a Redis and a PostgreSQL server of their own on loopback, as the tests do.

#![allow(clippy::print_stdout, reason = "the terminal is where the numbers go")]

#[path = "support/clients.rs"]
mod clients;
#[path = "support/report.rs"]
mod report;
#[path = "support/servers.rs"]
mod servers;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use report::{Bench, Case, Subject, by_turns};
use tracing::{Dispatch, dispatcher, info_span};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::backend::{Record, StorageBackend, Write};
use tracing_workflow_context::{
    MemoryBackend, RedbBackend, RedbSync, WorkflowContext, WorkflowContextStorage,
};

/// How many instances are recorded between two flushes: less than what waits for the writer at most.
const BATCH: usize = 5_000;

const ROUNDS: usize = 61;

/// How many instances a file has that is opened again.
const INSTANCES: usize = 1_000_000;

/// As redb's user would open it who knows what it is for.
const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");

fn main() {
    let mut bench = Bench::from_arguments("backends");
    let directory = Directory::new();
    if bench.wants("record") {
        record(&mut bench, &directory);
    }
    if bench.wants("write") {
        write(&mut bench, &directory);
    }
    if bench.wants("restart") {
        restart(&mut bench, &directory);
    }
    if bench.wants("servers") {
        servers::servers(&mut bench, &directory.0);
    }
    if bench.wants("clients") {
        clients::clients(&mut bench);
    }
}

/// What the calling thread pays for an instance: by the clock, and of the processor, which the writer behind it may
/// have to share.
fn record(bench: &mut Bench, directory: &Directory) {
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
            "redb eventually",
            builder()
                .backend(open("eventual", RedbSync::Eventual))
                .build(),
        ),
    ];
    let mut stages = storages.map(|(name, storage)| {
        let storage = storage.expect("valid settings");
        let tracer = SdkTracerProvider::builder().build().tracer("bench");
        let layer = storage.layer(tracer);
        let dispatch = Dispatch::new(tracing_subscriber::registry().with(layer));
        (name, storage, dispatch)
    });
    let names = stages.each_ref().map(|(name, ..)| *name);
    let cases = ["store", "first span", "later span"];
    let mut measured = cases.map(|_| names.map(|name| [Subject::new(name), Subject::new(name)]));
    for round in 0..bench.unless_test(ROUNDS, 1) {
        let ids: Vec<_> = (0..BATCH).map(|n| id(round * BATCH + n)).collect();
        for turn in 0..stages.len() {
            let at = (round + turn) % stages.len();
            let (_, storage, dispatch) = &mut stages[at];
            let context = context();
            let mut time = |case: usize, run: &dyn Fn(&String)| {
                let times = Times::of(|| ids.iter().for_each(|id| run(black_box(id))));
                let [wall, processor] = &mut measured[case][at];
                wall.rounds.push(times.wall / BATCH as f64);
                processor.rounds.push(times.processor / BATCH as f64);
                storage.flush().expect("the backend works");
            };
            let clear = || {
                let clean = |id: &String| assert!(storage.cleanup(id).expect("valid ids"));
                ids.iter().for_each(clean);
                storage.flush().expect("the backend works");
            };
            time(0, &|id| {
                storage.store(id, context.clone()).expect("valid ids");
            });
            clear();
            let step = |id: &String| info_span!("step", workflow.instance_id = %id).in_scope(|| {});
            dispatcher::with_default(dispatch, || {
                time(1, &step);
                time(2, &step);
            });
            clear();
        }
    }
    for (what, measured) in cases.iter().zip(measured) {
        let case = |what| Case {
            what,
            size: 0,
            threads: 1,
        };
        let [wall, processor] = [0, 1].map(|kind| {
            let of_kind = |subjects: &[Subject; 2]| subjects[kind].clone();
            measured.iter().map(of_kind).collect::<Vec<_>>()
        });
        bench.tell(case(what), "ns", names[0], &wall);
        let what = format!("{what} processor time");
        bench.tell(case(&what), "ns", names[0], &processor);
    }
}

/// What a group costs, of one write and of many.
fn write(bench: &mut Bench, directory: &Directory) {
    for sync in [RedbSync::Group, RedbSync::TwoPhase, RedbSync::Eventual] {
        let backend = RedbBackend::open_with(directory.0.join(format!("{sync:?} writes")), sync);
        let backend = backend.expect("a new file");
        let mut written = 0;
        let run = |size: &mut usize| {
            let put = |n| Write::Put(id(written + n), Record::new(context(), in_an_hour()));
            let writes: Vec<_> = (0..*size).map(put).collect();
            written += *size;
            let times = Times::of(|| drop(backend.write(&writes).expect("the disk works")));
            times.wall / *size as f64 / 1e3
        };
        let name = |size: &usize| format!("in groups of {size}");
        let rounds = bench.unless_test(ROUNDS, 1);
        let results = by_turns(rounds, &mut [1, 10, 100, 1_000], name, run);
        let what = format!("write {sync:?}");
        let case = Case {
            what: &what,
            size: 0,
            threads: 1,
        };
        bench.tell(case, "us", "in groups of 1000", &results);
    }
}

/// What a new process waits for, beside redb's own walk through all entries of the same file.
fn restart(bench: &mut Bench, directory: &Directory) {
    let instances = bench.option("--instances").map(str::parse);
    let instances = instances.map_or(INSTANCES, |n| n.expect("a number of instances"));
    let instances = bench.unless_test(instances, 1_000);
    let path = directory.0.join("restart");
    fill(&path, instances);
    let bytes = std::fs::metadata(&path).expect("a file").len() / instances as u64;
    if !bench.is_test() {
        println!("backends: the file takes {bytes} bytes an instance");
    }
    let run = |step: &mut Restart| step.run(&path, instances) / instances as f64;
    // Ten million take minutes as it is.
    let rounds = if instances > 2_000_000 { 3 } else { 5 };
    let rounds = bench.unless_test(rounds, 1);
    let results = by_turns(rounds, &mut Restart::all(), |step| step.name().into(), run);
    let case = Case {
        what: "restart",
        size: instances,
        threads: 1,
    };
    bench.tell(case, "ns", Restart::RawScan.name(), &results);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restart {
    /// redb opens the file, and checks what of it can be trusted.
    RawOpen,
    /// redb's own iterator, of which nothing is kept.
    RawScan,
    Open,
    /// All records, of which nothing is kept.
    Scan,
    /// All records, into the memory of a storage.
    Load,
}

impl Restart {
    fn all() -> [Self; 5] {
        [
            Self::RawOpen,
            Self::RawScan,
            Self::Open,
            Self::Scan,
            Self::Load,
        ]
    }

    fn name(self) -> &'static str {
        match self {
            Self::RawOpen => "redb opens and checks",
            Self::RawScan => "redb scans",
            Self::Open => "RedbBackend opens",
            Self::Scan => "RedbBackend scans",
            Self::Load => "a storage is built",
        }
    }

    fn run(self, path: &Path, instances: usize) -> f64 {
        let open = || RedbBackend::open(path).expect("a sound file");
        let raw_open = |checks| {
            let mut builder = Database::builder();
            builder.set_check_integrity_on_open(checks);
            builder.open(path).expect("a sound file")
        };
        // What is opened or built is let go of only when the time was taken.
        let (mut seen, mut backend, mut database, mut storage) = (0, None, None, None);
        let times = match self {
            Self::RawOpen => Times::of(|| database = Some(raw_open(true))),
            Self::Open => Times::of(|| backend = Some(open())),
            Self::RawScan => {
                let database = raw_open(false);
                Times::of(|| {
                    let transaction = database.begin_read().expect("a sound file");
                    let records = transaction.open_table(RECORDS).expect("a file of ours");
                    for entry in records.iter().expect("a sound file") {
                        let (key, value) = entry.expect("a sound file");
                        black_box((key.value(), value.value()));
                        seen += 1;
                    }
                })
            }
            Self::Scan => {
                let backend = open();
                Times::of(|| {
                    let see = &mut |key: &str, record| {
                        black_box((key, record));
                        seen += 1;
                    };
                    backend.scan(see).expect("a sound file");
                })
            }
            Self::Load => {
                let builder = WorkflowContextStorage::builder()
                    .max_instances(2 * instances)
                    .backend(open());
                Times::of(|| {
                    let built = storage.insert(builder.build().expect("valid settings"));
                    seen = built.stats().stored_instances as usize;
                })
            }
        };
        drop((backend, database, storage));
        let is_seen = matches!(self, Self::RawOpen | Self::Open) || seen == instances;
        assert!(is_seen, "{} saw {seen} of {instances}", self.name());
        times.wall
    }
}

/// Instances in an order that no file has, as they come; in large groups, and each in order, since that is faster and
/// leaves much the same.
fn fill(path: &Path, instances: usize) {
    let backend = RedbBackend::open_with(path, RedbSync::Eventual).expect("a new file");
    let group = 1_000_000;
    for begin in (0..instances).step_by(group) {
        let put = |n| Write::Put(id(n), Record::new(context(), in_an_hour()));
        let end = instances.min(begin + group);
        let mut writes: Vec<_> = (begin..end).map(put).collect();
        writes.sort_by(|one, other| one.key().cmp(other.key()));
        backend.write(&writes).expect("the disk works");
    }
    drop(backend);
    // The first opening makes the file as small as it goes.
    drop(RedbBackend::open(path).expect("a sound file"));
}

/// Nanoseconds.
struct Times {
    wall: f64,
    /// Of this thread alone; the same as by the clock where the system does not tell.
    processor: f64,
}

impl Times {
    fn of(run: impl FnOnce()) -> Self {
        let (start, processor) = (Instant::now(), processor_time());
        run();
        let end = processor_time();
        let wall = start.elapsed().as_secs_f64() * 1e9;
        let processor = processor.zip(end).map_or(wall, |(start, end)| end - start);
        Self { wall, processor }
    }
}

#[cfg(unix)]
fn processor_time() -> Option<f64> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Some(time.tv_sec as f64 * 1e9 + time.tv_nsec as f64)
}

#[cfg(not(unix))]
fn processor_time() -> Option<f64> {
    None
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
