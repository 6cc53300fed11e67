//! Spans under load while their backend fails, and how late they start.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use tracing_workflow_context::WorkflowContextStorage;
use tracing_workflow_context::backend::StorageBackend;

use super::{PARENT, PATIENCE, Worker, record, wait_until};

const BUDGET: Duration = Duration::from_millis(5);

/// The tolerance above the budget for the start of a span.
const MORE: Duration = Duration::from_millis(1);

/// Durations, without the time that the thread was runnable but waited for a core, which depends on the machine.
#[derive(Default)]
struct Times(Mutex<Vec<Duration>>);

impl Times {
    fn time<R>(&self, run: impl FnOnce() -> R) -> R {
        let (ready_before, start) = (runnable_but_waiting(), Instant::now());
        let result = run();
        let took = start.elapsed();
        let ready = runnable_but_waiting().saturating_sub(ready_before);
        self.0.lock().unwrap().push(took.saturating_sub(ready));
        result
    }

    /// Returns by how much each exceeds the limit, the shortest first.
    fn beyond(&self, limit: Duration) -> Vec<Duration> {
        let times = self.0.lock().unwrap();
        let mut beyond: Vec<_> = times
            .iter()
            .map(|took| took.saturating_sub(limit))
            .collect();
        beyond.sort();
        beyond
    }
}

/// Returns how long this thread was runnable but waited for a core, or zero where the kernel does not say: only the
/// comparison with the reference threads remains then.
fn runnable_but_waiting() -> Duration {
    let found = std::fs::read_to_string("/proc/thread-self/schedstat");
    let nanoseconds = found
        .ok()
        .and_then(|found| found.split(' ').nth(1)?.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}

fn quantile(sorted: &[Duration], part: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * part) as usize]
}

/// A worker with spans on several threads; for reference, a worker without a backend and a thread that waits for the
/// budget in the same way show which delays the backend did not cause.
pub(crate) struct Load {
    pub(crate) worker: Worker,
    alone: Worker,
    starts: Times,
    starts_alone: Times,
    waits_alone: Times,
    /// The latest instance of each thread.
    last: [Mutex<String>; 2],
    pub(crate) over: AtomicBool,
}

impl Load {
    pub(crate) fn new(backend: impl StorageBackend) -> Self {
        let storage = WorkflowContextStorage::builder()
            .backend(backend)
            .lookup_budget(BUDGET)
            .connect_budget(Duration::ZERO);
        Self {
            worker: Worker::with_storage(storage.build().expect("sound settings")),
            alone: Worker::new(),
            starts: Times::default(),
            starts_alone: Times::default(),
            waits_alone: Times::default(),
            last: Default::default(),
            over: AtomicBool::new(false),
        }
    }

    pub(crate) fn run(&self, thread: usize) {
        for number in 0.. {
            if self.over.load(Relaxed) {
                break;
            }
            let id = format!("{thread} {number}");
            for (worker, starts) in [
                (&self.worker, &self.starts),
                (&self.alone, &self.starts_alone),
            ] {
                worker.run(|| {
                    // The first one misses, the second one hits.
                    for _ in 0..2 {
                        drop(starts.time(|| {
                            tracing::info_span!("step", workflow.instance_id = %id).entered()
                        }));
                    }
                });
            }
            *self.last[thread].lock().unwrap() = id;
            thread::sleep(Duration::from_micros(500));
        }
    }

    pub(crate) fn wait_alone(&self) {
        let (_nobody, answer) = sync_channel::<()>(1);
        while !self.over.load(Relaxed) {
            let _ = self.waits_alone.time(|| answer.recv_timeout(BUDGET));
        }
    }

    /// Asserts that no span starts later than the budget plus the tolerance.
    pub(crate) fn assert_in_time(&self, what: &str) {
        let (beyond, spans) = (
            self.starts.beyond(BUDGET),
            self.starts.beyond(Duration::ZERO),
        );
        let alone = self.starts_alone.beyond(Duration::ZERO);
        let waits = self.waits_alone.beyond(BUDGET);
        let at = |sorted: &[Duration]| [0.5, 0.99, 0.999, 1.0].map(|part| quantile(sorted, part));
        eprintln!(
            "{what}, by their p50, p99, p99.9 and maximum: {} starts of spans took {:?}, beyond the budget {:?}; \
             without a backend they took {:?}, and who waited {} times for the budget alone, beyond it {:?}; {:?}",
            spans.len(),
            at(&spans),
            at(&beyond),
            at(&alone),
            waits.len(),
            at(&waits),
            self.worker.storage.stats()
        );
        // A busy machine wakes threads late that wait for nothing else.
        let as_late = MORE + quantile(&waits, 0.999);
        assert!(quantile(&beyond, 0.999) <= as_late, "{what}");
        // Delays that also occur without a backend, in one or two of 100,000 starts, are tolerated: one even if none occurred.
        let late = |sorted: &[Duration]| sorted.iter().filter(|beyond| **beyond > MORE).count();
        let noise = late(&alone) + late(&waits);
        let late = late(&beyond);
        assert!(
            late <= 1 + noise,
            "{what}: {late} of {} starts were late, {noise} without a backend",
            spans.len()
        );
    }

    /// Asserts that no span has waited for the backend itself, whose calls take that long when they fail. Where a whole
    /// server shares the cores of the test, more cannot be said of single starts.
    pub(crate) fn assert_never_waits_for(&self, timeout: Duration, what: &str) {
        let beyond = self.starts.beyond(timeout);
        let late = beyond.iter().filter(|beyond| !beyond.is_zero()).count();
        assert_eq!(
            late,
            0,
            "{what}: of {} starts, the last took {:?} more",
            beyond.len(),
            beyond.last()
        );
    }

    /// Waits until each thread has recorded many more instances; returns some of them.
    pub(crate) fn goes_on(&self) -> Vec<String> {
        let last = || {
            self.last
                .each_ref()
                .map(|last| last.lock().unwrap().clone())
        };
        let mut recorded = Vec::new();
        for _ in 0..100 {
            let before = last();
            wait_until("spans are started", || {
                let now = last();
                (0..2).all(|thread| now[thread] != before[thread])
            });
            recorded.extend(last());
        }
        recorded
    }

    pub(crate) fn errors(&self) -> u64 {
        self.worker.storage.stats().backend_errors
    }
}

/// Causes a failure of a backend under load, waits until it was noticed, and repairs it. Another worker has a backend
/// of its own.
pub(crate) fn under_load<B: StorageBackend>(
    what: &str,
    backend: impl StorageBackend,
    of_other: impl FnOnce() -> B,
    break_it: impl FnOnce(),
    mend_it: impl FnOnce(),
) -> Load {
    let owned = Load::new(backend);
    let load = &owned;
    let storage = &load.worker.storage;
    thread::scope(|scope| {
        // A failed assertion ends the load too.
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let over = Over(&load.over);
        for thread in 0..2 {
            scope.spawn(move || load.run(thread));
        }
        scope.spawn(|| load.wait_alone());
        load.goes_on();
        wait_until("the server is reached", || storage.flush().is_ok());

        let errors = load.errors();
        break_it();
        wait_until("the failure is counted", || load.errors() > errors);
        let recorded = load.goes_on();
        mend_it();

        // Without help, records made meanwhile reach the others, and theirs are found.
        wait_until("what was recorded is written", || storage.flush().is_ok());
        let other = WorkflowContextStorage::builder()
            .backend(of_other())
            .lookup_budget(PATIENCE)
            .build();
        let other = other.expect("sound settings");
        for id in &recorded {
            let trace = |storage: &WorkflowContextStorage| {
                storage.get(id).unwrap().map(|found| found.trace_id())
            };
            assert!(trace(storage).is_some());
            assert_eq!(trace(storage), trace(&other), "{id:?}");
        }
        let theirs = record(PARENT).context;
        other.store("theirs", theirs.clone()).unwrap();
        other.flush().unwrap();
        wait_until("what others record is found", || {
            storage.get("theirs").unwrap() == Some(theirs.clone())
        });
        load.goes_on();
        drop(over);
    });
    assert_eq!(
        storage.stats().dropped_writes,
        0,
        "{what}: few enough waited"
    );
    owned
}
