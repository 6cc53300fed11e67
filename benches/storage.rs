//! The storage beside what a program would use in its place: maps, and caches with a bound and a time to live.
//!
//! `cargo bench --bench storage [-- [--csv <file>] [<case>...]]`, the cases being `hit`, `miss`, `overwrite`,
//! `insert`, `remove`, `mixed` and `evict`.

#![allow(clippy::print_stdout, reason = "the terminal is where the numbers go")]
#![allow(clippy::ptr_arg, reason = "mini-moka finds nothing by &str")]

#[path = "support/report.rs"]
mod report;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::hint::black_box;
use std::ops::AddAssign;
use std::sync::{Barrier, Mutex, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use dashmap::DashMap;
use report::{Bench, Case, by_turns};
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

const SIZES: [usize; 3] = [1_000, 100_000, 1_000_000];

/// Operations of a round, on all threads together; twice as many where there is more than one.
const OPERATIONS: usize = 100_000;

const ROUNDS: usize = 11;

/// Ids that are inserted or removed between two looks at the clock, where the map has as many.
const BATCH: usize = 10_000;

/// A mixed load stores once in so many operations.
const STORES: usize = 10;

/// Of everything that expires.
const TIME_TO_LIVE: Duration = Duration::from_secs(24 * 60 * 60);

fn main() {
    let mut bench = Bench::from_arguments("storage");
    let sizes = bench.unless_test(&SIZES[..], &SIZES[..1]);
    for &size in sizes {
        all(&mut bench, size);
    }
    if bench.wants("evict") {
        evict(&mut bench, sizes[sizes.len() / 2]);
    }
}

/// Everything but evictions, of maps that hold that many instances and have room for more.
fn all(bench: &mut Bench, size: usize) {
    use Operation::*;
    let cases = [
        (Hit, &[1, 2, 8][..]),
        (Miss, &[1]),
        (Overwrite, &[1]),
        (Insert, &[1]),
        (Remove, &[1]),
        (Mixed, &[1, 2, 8]),
    ];
    if !cases.iter().any(|(case, _)| bench.wants(case.name())) {
        return;
    }
    let ids = Ids::new(size);
    let mut subjects = subjects(4 * size);
    for subject in &subjects {
        // In an order that neither the map nor the heap has.
        subject.fill(&ids.stored);
    }
    for (operation, threads) in cases {
        let mut able: Vec<_> = subjects.iter_mut().filter(|s| s.can(operation)).collect();
        for &threads in threads {
            if bench.wants(operation.name()) {
                let (rounds, count) = bench.unless_test((ROUNDS, OPERATIONS), (1, 1_000));
                let count = count * threads.min(2) / threads;
                let mut begin = 0;
                let run = |subject: &mut &mut Box<dyn Subject>| {
                    begin.add_assign(count);
                    subject.run(operation, &ids, begin, count, threads)
                };
                let results = by_turns(rounds, &mut able, |s| s.name().into(), run);
                let what = operation.name();
                let case = Case {
                    what,
                    size,
                    threads,
                };
                bench.tell(case, "ns", "DashMap", &results);
            }
        }
    }
}

/// Insertions into what is full.
fn evict(bench: &mut Bench, size: usize) {
    let mut subjects: Vec<_> = subjects(size)
        .into_iter()
        .filter(|subject| subject.is_bounded())
        .collect();
    let ids = Ids::new(size);
    for subject in &subjects {
        subject.fill(&ids.stored);
    }
    let (rounds, count) = bench.unless_test((ROUNDS, OPERATIONS), (1, 1_000));
    let mut kind = 10;
    let run = |subject: &mut Box<dyn Subject>| {
        // Nobody has ever seen them.
        kind += 1;
        subject.fill(&scattered(&numbered(kind, count)))
    };
    let results = by_turns(rounds, &mut subjects, |s| s.name().into(), run);
    let case = Case {
        what: "evict",
        size,
        threads: 1,
    };
    bench.tell(case, "ns", "quick_cache", &results);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Hit,
    Miss,
    Overwrite,
    Insert,
    Remove,
    /// Nine hits and an overwrite.
    Mixed,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Overwrite => "overwrite",
            Self::Insert => "insert",
            Self::Remove => "remove",
            Self::Mixed => "mixed",
        }
    }
}

/// Ids of 36 bytes, in orders that neither a map nor the heap has.
struct Ids {
    stored: Vec<String>,
    /// The same.
    asked: Vec<String>,
    absent: Vec<String>,
    batch: Vec<String>,
}

impl Ids {
    fn new(size: usize) -> Self {
        let stored = numbered(1, size);
        Self {
            asked: scattered(&stored),
            absent: scattered(&numbered(2, size)),
            batch: scattered(&numbered(3, size.min(BATCH))),
            stored,
        }
    }
}

fn numbered(kind: u32, count: usize) -> Vec<String> {
    let id = |n| format!("{kind:08x}-0000-4000-8000-{n:012x}");
    (0..count).map(id).collect()
}

/// The step is prime to all sizes.
fn scattered(ids: &[String]) -> Vec<String> {
    let step = |n: usize| ids[n * 7_919 % ids.len()].clone();
    (0..ids.len()).map(step).collect()
}

fn context() -> WorkflowContext {
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    WorkflowContext::parse(traceparent, "").expect("well formed")
}

/// All that are compared, with a bound where they can have one.
fn subjects(bound: usize) -> Vec<Box<dyn Subject>> {
    let ours = WorkflowContextStorage::builder()
        .max_instances(bound)
        .idle_ttl(TIME_TO_LIVE);
    let moka = moka::sync::Cache::builder()
        .max_capacity(bound as u64)
        .time_to_live(TIME_TO_LIVE);
    let mini_moka = mini_moka::sync::Cache::builder()
        .max_capacity(bound as u64)
        .time_to_live(TIME_TO_LIVE);
    vec![
        Box::new(ours.build().expect("good settings")),
        Box::new(DashMap::<String, WorkflowContext>::new()),
        Box::new(DashMap::<
            String,
            WorkflowContext,
            foldhash::fast::RandomState,
        >::default()),
        Box::new(quick_cache::sync::Cache::<String, Expiring>::new(bound)),
        Box::new(moka.build() as moka::sync::Cache<String, WorkflowContext>),
        Box::new(mini_moka.build() as mini_moka::sync::Cache<String, WorkflowContext>),
        Box::new(papaya::HashMap::<String, WorkflowContext>::new()),
        Box::new(Mutex::<HashMap<String, WorkflowContext>>::default()),
        Box::new(RwLock::<HashMap<String, WorkflowContext>>::default()),
        Box::new(Floor::new(bound / 4)),
    ]
}

trait Map: Sync {
    const NAME: &str;
    const IS_BOUNDED: bool = false;
    /// Nothing can be stored in it.
    const IS_READ_ONLY: bool = false;

    fn get(&self, id: &String) -> Option<WorkflowContext>;
    fn store(&self, id: &str, context: WorkflowContext);
    fn remove(&self, id: &String);
}

/// A [`Map`] of which the type no longer matters; nanoseconds of one operation are answered.
trait Subject {
    fn name(&self) -> &'static str;
    fn is_bounded(&self) -> bool;
    fn can(&self, operation: Operation) -> bool;
    fn fill(&self, ids: &[String]) -> f64;
    fn run(
        &self,
        operation: Operation,
        ids: &Ids,
        begin: usize,
        count: usize,
        threads: usize,
    ) -> f64;
}

impl<M: Map> Subject for M {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn is_bounded(&self) -> bool {
        Self::IS_BOUNDED
    }

    fn can(&self, operation: Operation) -> bool {
        operation == Operation::Hit || !Self::IS_READ_ONLY
    }

    fn fill(&self, ids: &[String]) -> f64 {
        let context = context();
        let start = Instant::now();
        ids.iter().for_each(|id| self.store(id, context.clone()));
        each(start.elapsed(), ids.len())
    }

    fn run(
        &self,
        operation: Operation,
        ids: &Ids,
        begin: usize,
        count: usize,
        threads: usize,
    ) -> f64 {
        let get = |id: &String| drop(black_box(self.get(black_box(id))));
        let context = context();
        let store = |id: &String| self.store(black_box(id), context.clone());
        let remove = |id: &String| self.remove(black_box(id));
        let crowd = |run: &(dyn Fn(usize) + Sync)| {
            let begin = |thread| begin + thread * ids.asked.len() / threads;
            crowd(threads, &|thread| run(begin(thread)))
        };
        let elapsed = match operation {
            Operation::Hit => crowd(&|begin| around(&ids.asked, begin, count, get)),
            Operation::Miss => crowd(&|begin| around(&ids.absent, begin, count, get)),
            Operation::Overwrite => crowd(&|begin| around(&ids.asked, begin, count, store)),
            Operation::Mixed => crowd(&|begin| {
                let mut operations = 0_usize;
                around(&ids.asked, begin, count, |id| {
                    operations += 1;
                    match operations % STORES {
                        0 => store(id),
                        _ => get(id),
                    }
                });
            }),
            Operation::Insert => in_batches(&ids.batch, count, |_| {}, store, remove),
            Operation::Remove => in_batches(&ids.batch, count, store, remove, |_| {}),
        };
        each(elapsed, count * threads)
    }
}

fn each(elapsed: Duration, count: usize) -> f64 {
    elapsed.as_secs_f64() * 1e9 / count as f64
}

/// From when the first thread begins until the last one is done.
fn crowd(threads: usize, run: &(dyn Fn(usize) + Sync)) -> Duration {
    let ready = Barrier::new(threads);
    let timed = &|thread| {
        ready.wait();
        let start = Instant::now();
        run(thread);
        (start, Instant::now())
    };
    let times: Vec<_> = thread::scope(|scope| {
        let spawn = |thread| scope.spawn(move || timed(thread));
        let others: Vec<_> = (1..threads).map(spawn).collect();
        let own = timed(0);
        let others = others.into_iter().map(|thread| thread.join());
        let others = others.map(|times| times.expect("maps do not panic"));
        std::iter::once(own).chain(others).collect()
    });
    let begin = times.iter().map(|(start, _)| *start).min();
    let end = times.iter().map(|(_, end)| *end).max();
    begin
        .zip(end)
        .map_or(Duration::ZERO, |(begin, end)| end - begin)
}

/// Goes around the ids from some place, without a look at the place for each of them.
fn around(ids: &[String], begin: usize, count: usize, mut operation: impl FnMut(&String)) {
    let (mut place, mut left) = (begin % ids.len(), count);
    while left > 0 {
        let some = &ids[place..ids.len().min(place + left)];
        some.iter().for_each(&mut operation);
        left -= some.len();
        place = 0;
    }
}

/// Measures `operation` alone.
fn in_batches(
    ids: &[String],
    count: usize,
    before: impl Fn(&String),
    operation: impl Fn(&String),
    after: impl Fn(&String),
) -> Duration {
    let (mut left, mut elapsed) = (count, Duration::ZERO);
    while left > 0 {
        let batch = &ids[..left.min(ids.len())];
        batch.iter().for_each(&before);
        let start = Instant::now();
        batch.iter().for_each(&operation);
        elapsed += start.elapsed();
        batch.iter().for_each(&after);
        left -= batch.len();
    }
    elapsed
}

impl Map for WorkflowContextStorage {
    const NAME: &str = "ours";
    const IS_BOUNDED: bool = true;

    fn get(&self, id: &String) -> Option<WorkflowContext> {
        self.get(id).expect("a good id")
    }

    fn store(&self, id: &str, context: WorkflowContext) {
        self.store(id, context).expect("a good id");
    }

    fn remove(&self, id: &String) {
        self.cleanup(id).expect("a good id");
    }
}

/// The hasher of a DashMap, which makes half of its speed.
trait Hashes: BuildHasher + Clone + Send + Sync {
    const MAP: &str;
}

impl Hashes for RandomState {
    const MAP: &str = "DashMap";
}

impl Hashes for foldhash::fast::RandomState {
    const MAP: &str = "DashMap with foldhash";
}

impl<S: Hashes> Map for DashMap<String, WorkflowContext, S> {
    const NAME: &str = S::MAP;

    fn get(&self, id: &String) -> Option<WorkflowContext> {
        self.get(id).map(|context| context.clone())
    }

    fn store(&self, id: &str, context: WorkflowContext) {
        self.insert(id.to_owned(), context);
    }

    fn remove(&self, id: &String) {
        self.remove(id);
    }
}

/// quick_cache knows no time, so that its user keeps it beside the value.
#[derive(Clone)]
struct Expiring {
    context: WorkflowContext,
    until: Instant,
}

impl Map for quick_cache::sync::Cache<String, Expiring> {
    const NAME: &str = "quick_cache";
    const IS_BOUNDED: bool = true;

    fn get(&self, id: &String) -> Option<WorkflowContext> {
        let found = self.get(id)?;
        (found.until > Instant::now()).then_some(found.context)
    }

    fn store(&self, id: &str, context: WorkflowContext) {
        let until = Instant::now() + TIME_TO_LIVE;
        self.insert(id.to_owned(), Expiring { context, until });
    }

    fn remove(&self, id: &String) {
        self.remove(id);
    }
}

/// The two of one family, which are used alike.
macro_rules! moka {
    ($cache:ty, $name:literal) => {
        impl Map for $cache {
            const NAME: &str = $name;
            const IS_BOUNDED: bool = true;

            fn get(&self, id: &String) -> Option<WorkflowContext> {
                self.get(id)
            }

            fn store(&self, id: &str, context: WorkflowContext) {
                self.insert(id.to_owned(), context);
            }

            fn remove(&self, id: &String) {
                self.invalidate(id);
            }
        }
    };
}

moka!(moka::sync::Cache<String, WorkflowContext>, "moka");
moka!(mini_moka::sync::Cache<String, WorkflowContext>, "mini-moka");

impl Map for papaya::HashMap<String, WorkflowContext> {
    const NAME: &str = "papaya";

    fn get(&self, id: &String) -> Option<WorkflowContext> {
        self.pin().get(id).cloned()
    }

    fn store(&self, id: &str, context: WorkflowContext) {
        self.pin().insert(id.to_owned(), context);
    }

    fn remove(&self, id: &String) {
        self.pin().remove(id);
    }
}

impl Map for Mutex<HashMap<String, WorkflowContext>> {
    const NAME: &str = "Mutex<HashMap>";

    fn get(&self, id: &String) -> Option<WorkflowContext> {
        self.lock().unwrap().get(id).cloned()
    }

    fn store(&self, id: &str, context: WorkflowContext) {
        self.lock().unwrap().insert(id.to_owned(), context);
    }

    fn remove(&self, id: &String) {
        self.lock().unwrap().remove(id);
    }
}

impl Map for RwLock<HashMap<String, WorkflowContext>> {
    const NAME: &str = "RwLock<HashMap>";

    fn get(&self, id: &String) -> Option<WorkflowContext> {
        self.read().unwrap().get(id).cloned()
    }

    fn store(&self, id: &str, context: WorkflowContext) {
        self.write().unwrap().insert(id.to_owned(), context);
    }

    fn remove(&self, id: &String) {
        self.write().unwrap().remove(id);
    }
}

/// What no map goes below: the id is hashed, and the value copied out of the one place where it can be. There is
/// nothing to tell whether it is the right one.
struct Floor {
    hasher: foldhash::fast::RandomState,
    values: Vec<WorkflowContext>,
}

impl Floor {
    fn new(size: usize) -> Self {
        Self {
            hasher: foldhash::fast::RandomState::default(),
            values: (0..size).map(|_| context()).collect(),
        }
    }
}

impl Map for Floor {
    const NAME: &str = "floor";
    const IS_READ_ONLY: bool = true;

    fn get(&self, id: &String) -> Option<WorkflowContext> {
        let hash = u128::from(self.hasher.hash_one(id.as_str()));
        let place = (hash * self.values.len() as u128) >> 64;
        self.values.get(place as usize).cloned()
    }

    fn store(&self, _: &str, _: WorkflowContext) {}

    fn remove(&self, _: &String) {}
}
