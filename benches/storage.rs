//! The storage beside the maps that a program would use in its place, on one thread.
#![allow(missing_docs, reason = "criterion's macros declare functions")]

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main};
use dashmap::DashMap;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

const SIZES: [usize; 2] = [1_000, 100_000];

/// Ids between two looks at the clock, where each operation needs an id of its own.
const BATCH: usize = 1_000;

trait Map: Default {
    const NAME: &str;

    fn get(&self, id: &str) -> Option<WorkflowContext>;
    fn store(&self, id: &str, context: WorkflowContext);
    fn remove(&self, id: &str) -> bool;
}

impl Map for WorkflowContextStorage {
    const NAME: &str = "ours";

    fn get(&self, id: &str) -> Option<WorkflowContext> {
        self.get(id).expect("a good id")
    }

    fn store(&self, id: &str, context: WorkflowContext) {
        self.store(id, context).expect("a good id");
    }

    fn remove(&self, id: &str) -> bool {
        self.cleanup(id).expect("a good id")
    }
}

impl Map for DashMap<String, WorkflowContext> {
    const NAME: &str = "DashMap";

    fn get(&self, id: &str) -> Option<WorkflowContext> {
        self.get(id).map(|context| context.clone())
    }

    fn store(&self, id: &str, context: WorkflowContext) {
        self.insert(id.to_owned(), context);
    }

    fn remove(&self, id: &str) -> bool {
        self.remove(id).is_some()
    }
}

impl Map for Mutex<HashMap<String, WorkflowContext>> {
    const NAME: &str = "Mutex<HashMap>";

    fn get(&self, id: &str) -> Option<WorkflowContext> {
        self.lock().unwrap().get(id).cloned()
    }

    fn store(&self, id: &str, context: WorkflowContext) {
        self.lock().unwrap().insert(id.to_owned(), context);
    }

    fn remove(&self, id: &str) -> bool {
        self.lock().unwrap().remove(id).is_some()
    }
}

impl Map for RwLock<HashMap<String, WorkflowContext>> {
    const NAME: &str = "RwLock<HashMap>";

    fn get(&self, id: &str) -> Option<WorkflowContext> {
        self.read().unwrap().get(id).cloned()
    }

    fn store(&self, id: &str, context: WorkflowContext) {
        self.write().unwrap().insert(id.to_owned(), context);
    }

    fn remove(&self, id: &str) -> bool {
        self.write().unwrap().remove(id).is_some()
    }
}

/// Ids of 36 bytes.
fn ids(kind: u32, count: usize) -> Vec<String> {
    let id = |n| format!("{kind:08x}-0000-4000-8000-{n:012x}");
    (0..count).map(id).collect()
}

/// The same in an order that neither the map nor the heap has; the step is prime to all sizes.
fn scattered(ids: &[String]) -> Vec<String> {
    let step = |n: usize| ids[n * 7_919 % ids.len()].clone();
    (0..ids.len()).map(step).collect()
}

fn context() -> WorkflowContext {
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    WorkflowContext::parse(traceparent, "").expect("well formed")
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// One operation on one map that holds `known`.
type Operation<M> = fn(&mut Group<'_>, &M, &[String]);

fn hit<M: Map>(group: &mut Group<'_>, map: &M, known: &[String]) {
    let mut ids = known.iter().cycle();
    group.bench_function(M::NAME, |b| {
        b.iter(|| map.get(ids.next().expect("endless")))
    });
}

fn miss<M: Map>(group: &mut Group<'_>, map: &M, known: &[String]) {
    let absent = ids(2, known.len());
    let mut ids = absent.iter().cycle();
    group.bench_function(M::NAME, |b| {
        b.iter(|| map.get(ids.next().expect("endless")))
    });
}

fn overwrite<M: Map>(group: &mut Group<'_>, map: &M, known: &[String]) {
    let (mut ids, context) = (known.iter().cycle(), context());
    group.bench_function(M::NAME, |b| {
        b.iter(|| map.store(ids.next().expect("endless"), context.clone()));
    });
}

fn insert<M: Map>(group: &mut Group<'_>, map: &M, _: &[String]) {
    let store = |id: &String| map.store(id, context());
    let remove = |id: &String| assert!(map.remove(id));
    in_batches::<M>(group, |_| {}, store, remove);
}

fn cleanup<M: Map>(group: &mut Group<'_>, map: &M, _: &[String]) {
    let store = |id: &String| map.store(id, context());
    let remove = |id: &String| assert!(map.remove(id));
    in_batches::<M>(group, store, remove, |_| {});
}

/// Measures `operation` alone.
fn in_batches<M: Map>(
    group: &mut Group<'_>,
    before: impl Fn(&String),
    operation: impl Fn(&String),
    after: impl Fn(&String),
) {
    let ids = ids(3, BATCH);
    group.bench_function(M::NAME, |bencher| {
        bencher.iter_custom(|count| {
            let (mut left, mut elapsed) = (count as usize, Duration::ZERO);
            while left > 0 {
                let batch = &ids[..left.min(BATCH)];
                batch.iter().for_each(&before);
                let start = Instant::now();
                batch.iter().for_each(|id| operation(black_box(id)));
                elapsed += start.elapsed();
                batch.iter().for_each(&after);
                left -= batch.len();
            }
            elapsed
        });
    });
}

fn with<M: Map>(group: &mut Group<'_>, size: usize, operation: Operation<M>) {
    let (map, known) = (M::default(), ids(1, size));
    known.iter().for_each(|id| map.store(id, context()));
    operation(group, &map, &scattered(&known));
}

macro_rules! compare {
    ($criterion:expr, $($operation:ident),+) => {$(
        for size in SIZES {
            let name = format!("storage/{} of {size}", stringify!($operation));
            let mut group = $criterion.benchmark_group(name);
            group.measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300));
            with::<WorkflowContextStorage>(&mut group, size, $operation);
            with::<DashMap<_, _>>(&mut group, size, $operation);
            with::<Mutex<HashMap<_, _>>>(&mut group, size, $operation);
            with::<RwLock<HashMap<_, _>>>(&mut group, size, $operation);
            group.finish();
        }
    )+};
}

fn storage(criterion: &mut Criterion) {
    compare!(criterion, hit, miss, overwrite, insert, cleanup);
}

/// Insertions that each evict another instance, and beside the median the longest of them: what a span may have to
/// wait for at the worst.
fn evict(criterion: &mut Criterion) {
    for size in SIZES {
        let builder = WorkflowContextStorage::builder().max_instances(size);
        let storage = builder.build().expect("good settings");
        let mut ids = (0..).map(|n: u64| format!("{n:08x}-0000-4000-8000-{n:012x}"));
        let mut store = || {
            let (id, context) = (ids.next().expect("endless"), context());
            let start = Instant::now();
            storage.store(&id, context).expect("a good id");
            start.elapsed()
        };
        for _ in 0..size {
            store();
        }

        let mut pauses = Vec::new();
        let mut group = criterion.benchmark_group(format!("storage/evict of {size}"));
        group
            .measurement_time(Duration::from_secs(1))
            .warm_up_time(Duration::from_millis(300));
        group.bench_function("ours", |bencher| {
            bencher.iter_custom(|count| {
                let begin = pauses.len();
                pauses.extend((0..count).map(|_| store()));
                pauses[begin..].iter().sum()
            });
        });
        group.finish();
        pauses.sort_unstable();
        if let Some(longest) = pauses.last() {
            let (count, median) = (pauses.len(), pauses[pauses.len() / 2]);
            println!(
                "storage/evict of {size}: the longest of {count} took {longest:?}, the median {median:?}"
            );
        }
    }
}

criterion_group!(benches, storage, evict);
criterion_main!(benches);
