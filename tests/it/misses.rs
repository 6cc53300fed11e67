//! A worker that misses what the backend has: because it is still connecting, answers late, or was not asked in time. It
//! records a context of its own, and agrees with the others as soon as it learns of theirs.

use std::cell::RefCell;
use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::{TraceContextExt as _, TraceId};
use proptest::prelude::*;
use tracing::info_span;
use tracing_workflow_context::backend::{Record, StorageBackend as _};
use tracing_workflow_context::{
    Absence, MemoryBackend, WorkflowContextStorage, WorkflowContextStorageBuilder,
};

use crate::support::*;

const ID: &str = "order-42";

/// The lookups of these tests that time out wait this long.
const SHORT: Duration = Duration::from_millis(5);

fn worker_on(backend: &ControlledBackend) -> Worker {
    Worker::with_storage(patient(backend.clone()).build().unwrap())
}

fn short(backend: &ControlledBackend) -> WorkflowContextStorageBuilder {
    patient(backend.clone())
        .lookup_budget(SHORT)
        .connect_budget(Duration::ZERO)
}

/// Returns a connection whose lookups find nothing.
fn missing(backend: &MemoryBackend) -> ControlledBackend {
    let controlled = ControlledBackend::over(backend.clone());
    controlled.set(Call::Get, Behaviour::Misses);
    controlled
}

fn tags(run: Option<&str>) -> Tags<'_> {
    let tags = Tags::instance(ID);
    run.map_or(tags, |run| tags.run(run))
}

fn kept(backend: &MemoryBackend, run: Option<&str>) -> Option<Record> {
    let of_run = |run| format!("{ID}\u{1f}{run}");
    let key = run.map_or(ID.to_owned(), of_run);
    backend.get(&key).unwrap()
}

/// A span of the OpenTelemetry API that is dropped without `end` is not updated at its end.
fn end(opened: Opened) {
    opened.otel_context().span().end();
}

// The first connection.

#[test]
fn a_first_lookup_waits_for_the_first_connection() {
    let backend = MemoryBackend::new();
    let first = worker_on(&ControlledBackend::over(backend.clone()));
    first.step("first", tags(None));
    first.storage.flush().unwrap();

    let controlled = ControlledBackend::over(backend);
    controlled.set(Call::Connect, Behaviour::Blocks);
    let storage = patient(controlled.clone())
        .lookup_budget(SHORT)
        .connect_budget(PATIENCE);
    let worker = Worker::with_storage(storage.build().unwrap());
    controlled.await_blocked(Call::Connect);
    thread::scope(|scope| {
        let step = scope.spawn(|| {
            let start = Instant::now();
            // Asks for the run and for the instance.
            worker.run(|| worker.step("second", tags(Some("run"))));
            start.elapsed()
        });
        // Longer than the budget of any other lookup.
        thread::sleep(4 * SHORT);
        controlled.set(Call::Connect, Behaviour::Works);
        step.join().unwrap();
    });
    assert_continues(&worker.span("second"), &first.span("first").span_context);
    let stats = worker.storage.stats();
    assert_eq!((stats.lookup_timeouts, stats.conflicts), (0, 0));
}

#[test]
fn by_default_one_span_waits_250_ms_for_a_dead_backend_and_two_50_ms() {
    let controlled = ControlledBackend::new();
    controlled.set_all(Behaviour::Blocks);
    let storage = WorkflowContextStorage::builder().backend(controlled.clone());
    let worker = Worker::with_storage(storage.build().unwrap());
    controlled.await_blocked(Call::Connect);
    let waits = [0, 1, 2].map(|n: usize| {
        let start = Instant::now();
        worker.step("step", Tags::instance(&n.to_string()).run("run"));
        start.elapsed()
    });
    assert!(waits[0] >= Duration::from_millis(250), "{waits:?}");
    let others = &waits[1..];
    assert!(
        others.iter().all(|wait| *wait >= Duration::from_millis(50)),
        "{waits:?}"
    );
    // However busy the machine is, one of two is not preempted for that long.
    assert!(
        others.iter().min() < Some(&Duration::from_millis(250)),
        "{waits:?}"
    );
    assert_eq!(worker.storage.stats().lookup_timeouts, 3);
    let start = Instant::now();
    (3..1_000).for_each(|n| worker.step("step", Tags::instance(&n.to_string())));
    // One lookup more at the end of each pause, which begins with 50 ms at least and is doubled each time.
    let tries = 1 + (start.elapsed().as_millis() as f64 / 50.0 + 1.0).log2() as u64;
    let timeouts = worker.storage.stats().lookup_timeouts;
    assert!(
        timeouts <= 3 + tries,
        "{timeouts} after {:?}",
        start.elapsed()
    );
    controlled.set_all(Behaviour::Works);
}

#[test]
fn a_failing_first_connection_is_counted_and_waited_for_no_longer() {
    let controlled = ControlledBackend::new();
    controlled.set(Call::Connect, Behaviour::Fails);
    let worker = worker_on(&controlled);
    worker.step("step", tags(None));
    let stats = worker.storage.stats();
    assert_eq!((stats.backend_errors, stats.lookup_timeouts), (1, 0));
    assert_eq!(controlled.calls(Call::Connect), 1);
}

// Answers that come too late.

/// Waits until the answers to all lookups so far have been dealt with: they are given in turn.
fn await_answers(worker: &Worker) {
    let timeouts = || worker.storage.stats().lookup_timeouts;
    let is_down = || worker.storage.explain("unseen").reason() == Some(Absence::BackendDown);
    let mut number = 0;
    wait_until("a lookup is answered in time", || {
        let before = timeouts();
        number += 1;
        worker.storage.get(&format!("unknown {number}")).unwrap();
        timeouts() == before && !is_down()
    });
}

#[test]
fn an_instance_follows_an_answer_that_comes_too_late() {
    for_each_via(|via| {
        for (first_run, run) in [
            (None, None),
            (None, Some("1")),
            (Some("1"), Some("1")),
            (Some("1"), None),
        ] {
            labelled(&format!("{first_run:?}, {run:?}"), || {
                let backend = MemoryBackend::new();
                let a = worker_on(&ControlledBackend::over(backend.clone()));
                a.step("first", tags(first_run));
                a.storage.flush().unwrap();
                let first = a.span("first").span_context;

                let controlled = ControlledBackend::over(backend.clone());
                let b = Worker::via(via, short(&controlled).build().unwrap());
                // Nothing is learned from the claims until later.
                controlled.set(Call::Get, Behaviour::Blocks);
                controlled.set(Call::Write, Behaviour::Blocks);
                let second = b.open("second", tags(run));
                second.start();
                assert_ne!(b.stored_trace(ID), first.trace_id());
                assert_eq!(b.storage.stats().conflicts, 0);
                controlled.set(Call::Get, Behaviour::Works);
                wait_until("the instance follows", || {
                    b.stored(ID).span_id() == first.span_id()
                });
                b.step("later", tags(run));
                assert_continues(&b.span("later"), &first);
                assert_eq!(b.storage.stats().conflicts, 1);

                controlled.set(Call::Write, Behaviour::Works);
                b.storage.flush().unwrap();
                end(second);
                let (relation, target) = link(&b.span("second"));
                assert_eq!(relation, "late");
                assert_same_span(&target, &first);
                assert_eq!(b.storage.stats().conflicts, 1);
                let named = first_run.or(run);
                for run in [None, named] {
                    let kept = kept(&backend, run).unwrap();
                    assert_eq!(kept.context.span_id(), first.span_id());
                    assert_eq!(kept.run_id.as_deref(), named);
                }
            });
        }
    });
}

#[test]
fn a_late_answer_is_found_by_the_next_lookup() {
    let backend = MemoryBackend::new();
    let a = worker_on(&ControlledBackend::over(backend.clone()));
    a.storage.store(ID, context(1)).unwrap();
    a.storage.flush().unwrap();
    let controlled = ControlledBackend::over(backend);
    let b = Worker::with_storage(short(&controlled).build().unwrap());
    controlled.set(Call::Get, Behaviour::Blocks);
    assert_eq!(b.storage.get(ID).unwrap(), None);
    controlled.set(Call::Get, Behaviour::Works);
    wait_until("it is in memory", || b.storage.instance_ids() == [ID]);
    assert_eq!(
        b.storage.get(ID).unwrap().unwrap().span_id(),
        context(1).span_id()
    );
}

#[test]
fn a_late_answer_changes_nothing_that_was_decided_since() {
    type Decide = fn(&Worker);
    let decisions: [(&str, Decide); 4] = [
        ("a call stored a context", |worker| {
            worker.storage.store(ID, context(7)).unwrap()
        }),
        ("a call removed the instance", |worker| {
            assert!(worker.storage.cleanup(ID).is_ok())
        }),
        ("the next generation began", |worker| {
            worker.step("first", tags(None));
            worker.step("fills it", tags(None));
            worker.step("next", tags(None));
        }),
        ("another run began", |worker| {
            worker.step("first", tags(Some("1")));
            worker.step("next", tags(Some("2")));
        }),
    ];
    for (what, decide) in decisions {
        labelled(what, || {
            let backend = MemoryBackend::new();
            let a = worker_on(&ControlledBackend::over(backend.clone()));
            a.step("old", tags(Some("old")));
            a.storage.flush().unwrap();
            let controlled = ControlledBackend::over(backend);
            let b = Worker::with_storage(short(&controlled).max_spans(2).build().unwrap());
            controlled.set(Call::Get, Behaviour::Blocks);
            controlled.set(Call::Write, Behaviour::Blocks);
            b.storage.get(ID).unwrap();
            decide(&b);
            let decided = b.storage.get(ID).unwrap();
            controlled.set(Call::Get, Behaviour::Works);
            await_answers(&b);
            assert_eq!(b.storage.get(ID).unwrap(), decided);
            controlled.set(Call::Write, Behaviour::Works);
            b.storage.flush().unwrap();
            assert_eq!(b.storage.get(ID).unwrap(), decided);
        });
    }
}

// The record of a run meets that of its instance.

/// The workers that come after the one that missed: each knows the backend only.
fn later(backend: &MemoryBackend, run: &str) -> Worker {
    let worker = worker_on(&ControlledBackend::over(backend.clone()));
    worker.step("later", tags(Some(run)));
    worker
}

#[test]
fn a_run_follows_the_record_of_its_instance_without_a_run() {
    for_each_via(|via| {
        for stored_by_a_call in [false, true] {
            let backend = MemoryBackend::new();
            let client = worker_on(&ControlledBackend::over(backend.clone()));
            match stored_by_a_call {
                true => client.storage.store(ID, context(1)).unwrap(),
                false => client.step("client", tags(None)),
            }
            client.storage.flush().unwrap();
            let first = client.stored(ID);

            let storage = patient(missing(&backend)).build().unwrap();
            let worker = Worker::via(via, storage);
            let step = worker.open("step", tags(Some("1")));
            step.start();
            worker.storage.flush().unwrap();
            assert_same_span(&worker.stored(ID), &first);
            worker.step("later", tags(Some("1")));
            assert_continues(&worker.span("later"), &first);
            end(step);
            let (relation, target) = link(&worker.span("step"));
            assert_eq!(relation, "late");
            assert_same_span(&target, &first);
            assert_eq!(worker.storage.stats().conflicts, 1);

            for run in [None, Some("1")] {
                let kept = kept(&backend, run).unwrap();
                assert_eq!(kept.context.span_id(), first.span_id());
                assert_eq!(kept.run_id.as_deref(), Some("1"));
            }
            assert_continues(&later(&backend, "1").span("later"), &first);
            let next = later(&backend, "2").span("later");
            assert_eq!(links(&next), [("new_run".to_owned(), ids(&first))]);
        }
    });
}

#[test]
fn a_run_follows_the_record_of_its_instance_with_the_same_run() {
    let backend = MemoryBackend::new();
    let a = worker_on(&ControlledBackend::over(backend.clone()));
    a.step("first", tags(Some("1")));
    a.storage.flush().unwrap();
    let b = worker_on(&missing(&backend));
    b.step("second", tags(Some("1")));
    b.storage.flush().unwrap();
    b.step("later", tags(Some("1")));
    assert_continues(&b.span("later"), &a.span("first").span_context);
    assert_eq!(b.storage.stats().conflicts, 1);
}

#[test]
fn a_new_run_is_linked_to_the_one_that_it_did_not_know() {
    let backend = MemoryBackend::new();
    let a = worker_on(&ControlledBackend::over(backend.clone()));
    a.step("first", tags(Some("1")));
    a.storage.flush().unwrap();
    let first = a.span("first").span_context;
    let b = worker_on(&missing(&backend));
    let second = b.open("second", tags(Some("2")));
    second.start();
    b.storage.flush().unwrap();
    b.step("later", tags(Some("2")));
    end(second);
    let second = b.span("second");
    assert_root(&second);
    assert_eq!(links(&second), [("late".to_owned(), ids(&first))]);
    assert_continues(&b.span("later"), &second.span_context);
    assert_eq!(b.storage.stats().conflicts, 0);
    let latest = kept(&backend, None).unwrap();
    assert_eq!(latest.run_id.as_deref(), Some("2"));
    assert_continues(&later(&backend, "1").span("later"), &first);
    assert_continues(&later(&backend, "2").span("later"), &second.span_context);
}

#[test]
fn a_record_without_a_run_follows_that_of_a_run() {
    let backend = MemoryBackend::new();
    let a = worker_on(&ControlledBackend::over(backend.clone()));
    a.step("first", tags(Some("1")));
    a.storage.flush().unwrap();
    let first = a.span("first").span_context;
    let b = worker_on(&missing(&backend));
    b.step("client", tags(None));
    b.storage.flush().unwrap();
    assert_same_span(&b.stored(ID), &first);
    b.step("of run 1", tags(Some("1")));
    assert_continues(&b.span("of run 1"), &first);
    b.step("of run 2", tags(Some("2")));
    assert_eq!(
        links(&b.span("of run 2")),
        [("new_run".to_owned(), ids(&first))]
    );
}

#[test]
fn the_run_that_asks_first_is_told_to_the_other_workers() {
    let backend = MemoryBackend::new();
    let a = worker_on(&ControlledBackend::over(backend.clone()));
    a.step("client", tags(None));
    a.step("step", tags(Some("1")));
    a.storage.flush().unwrap();
    let client = a.span("client").span_context;
    assert_continues(&a.span("step"), &client);
    for run in [None, Some("1")] {
        assert_eq!(kept(&backend, run).unwrap().run_id.as_deref(), Some("1"));
    }
    let next = later(&backend, "2").span("later");
    assert_eq!(links(&next), [("new_run".to_owned(), ids(&client))]);
    assert_continues(&later(&backend, "1").span("later"), &client);
    assert_eq!(a.storage.stats().conflicts, 0);
}

#[test]
fn with_write_through_a_run_meets_the_record_of_its_instance_before_it_goes_on() {
    let backend = MemoryBackend::new();
    let client = worker_on(&ControlledBackend::over(backend.clone()));
    client.step("client", tags(None));
    client.storage.flush().unwrap();
    let first = client.span("client").span_context;
    let storage = patient(missing(&backend)).write_through(true);
    let worker = Worker::with_storage(storage.build().unwrap());
    worker.step("step", tags(Some("1")));
    assert_same_span(&worker.stored(ID), &first);
    assert_same_span(&link(&worker.span("step")).1, &first);
    for run in [None, Some("1")] {
        assert_eq!(kept(&backend, run).unwrap().run_id.as_deref(), Some("1"));
    }
}

/// The write of a new run is queued while an older one's is under way.
#[test]
fn what_follows_from_a_claim_does_not_undo_a_newer_one() {
    let backend = MemoryBackend::new();
    let controlled = missing(&backend);
    let worker = worker_on(&controlled);
    controlled.set(Call::Write, Behaviour::Blocks);
    worker.step("1", tags(Some("1")));
    controlled.await_blocked(Call::Write);
    for run in ["2", "3", "4"] {
        worker.step(run, tags(Some(run)));
    }
    controlled.set(Call::Write, Behaviour::Works);
    worker.storage.flush().unwrap();
    assert_eq!(kept(&backend, None).unwrap().run_id.as_deref(), Some("4"));
    for run in ["1", "2", "3", "4"] {
        let kept = kept(&backend, Some(run)).unwrap();
        assert_eq!(
            kept.context.span_id(),
            worker.span(run).span_context.span_id()
        );
    }
    assert_eq!(worker.storage.stats().conflicts, 0);
}

/// All of it is queued, and written at once.
#[test]
fn what_follows_from_a_claim_does_not_outlive_its_run() {
    const GRACE: Duration = Duration::from_secs(60);
    for older_run in [false, true] {
        let backend = MemoryBackend::new();
        let controlled = ControlledBackend::over(backend.clone());
        let storage = patient(controlled.clone()).completed_grace(GRACE);
        let worker = Worker::with_storage(storage.build().unwrap());
        let end = |run| {
            worker.run(|| {
                let status = "completed";
                info_span!(
                    "step",
                    workflow.instance_id = ID,
                    workflow.run_id = run,
                    workflow.status = status
                )
                .in_scope(|| ());
            });
        };
        if older_run {
            worker.step("older", tags(Some("older")));
            worker.storage.flush().unwrap();
        }
        let in_flight = || {
            controlled.set(Call::Write, Behaviour::Blocks);
            worker.storage.store("another", context(1)).unwrap();
            controlled.await_blocked(Call::Write);
        };
        in_flight();
        end("1");
        controlled.set(Call::Write, Behaviour::Works);
        worker.storage.flush().unwrap();
        for run in [None, Some("1")] {
            let kept = kept(&backend, run).unwrap();
            assert_eq!(kept.run_id.as_deref(), Some("1"));
            assert!(
                kept.expires_at <= SystemTime::now() + GRACE,
                "{run:?}: {kept:?}"
            );
        }
        in_flight();
        end("2");
        worker.storage.cleanup(ID).unwrap();
        controlled.set(Call::Write, Behaviour::Works);
        worker.storage.flush().unwrap();
        for run in [None, Some("1"), Some("2")] {
            assert_eq!(kept(&backend, run), None, "{run:?}");
        }
    }
}

// Any order.

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A worker opens a span. The backend answers as told.
    Span {
        worker: usize,
        run: Option<&'static str>,
        answer: Behaviour,
    },
    Flush(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let run = prop::sample::select(vec![None, Some("1"), Some("2")]);
    let answer = prop::sample::select(vec![Behaviour::Works, Behaviour::Misses, Behaviour::Blocks]);
    prop_oneof![
        3 => (0..3_usize, run, answer).prop_map(|(worker, run, answer)| Step::Span { worker, run, answer }),
        1 => (0..3_usize).prop_map(Step::Flush),
    ]
}

/// A worker whose writes reach the backend when it is flushed, not before.
struct Flushed {
    worker: Worker,
    connection: ControlledBackend,
    opened: RefCell<Vec<Opened>>,
}

impl Flushed {
    fn new(backend: &MemoryBackend) -> Self {
        let connection = ControlledBackend::over(backend.clone());
        connection.set(Call::Write, Behaviour::Blocks);
        let storage = short(&connection).build().unwrap();
        Self {
            worker: Worker::with_storage(storage),
            connection,
            opened: RefCell::default(),
        }
    }

    /// Opens a span that stays open, and returns its trace.
    fn open(&self, run: Option<&str>, answer: Behaviour) -> TraceId {
        self.connection.set(Call::Get, answer);
        let name = format!("run {}", run.unwrap_or_default());
        let opened = self.worker.open(&name, tags(run));
        opened.start();
        let trace = opened.span_context().trace_id();
        self.opened.borrow_mut().push(opened);
        self.connection.set(Call::Get, Behaviour::Works);
        trace
    }

    /// Opens a span whose lookups are answered in time, however busy the machine is, and returns its trace.
    fn open_in_time(&self, run: &str) -> TraceId {
        let timeouts = || self.worker.storage.stats().lookup_timeouts;
        let mut trace = TraceId::INVALID;
        wait_until("a lookup is answered in time", || {
            let before = timeouts();
            trace = self.open(Some(run), Behaviour::Works);
            let is_in_time = timeouts() == before;
            if !is_in_time {
                self.flush()();
                await_answers(&self.worker);
            }
            is_in_time
        });
        trace
    }

    /// Returns what lets the writes through, for any thread.
    fn flush(&self) -> impl FnOnce() + Send + 'static {
        let (connection, storage) = (self.connection.clone(), self.worker.storage.clone());
        move || {
            connection.set(Call::Write, Behaviour::Works);
            storage.flush().unwrap();
            connection.set(Call::Write, Behaviour::Blocks);
        }
    }
}

impl Drop for Flushed {
    fn drop(&mut self) {
        self.connection.set_all(Behaviour::Works);
    }
}

/// Lets each worker see what the others wrote.
fn settle(workers: &[Flushed]) {
    for _ in 0..2 {
        let flushes = workers.iter().map(Flushed::flush);
        thread::scope(|scope| flushes.for_each(|flush| drop(scope.spawn(flush))));
    }
    workers
        .iter()
        .for_each(|worker| await_answers(&worker.worker));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is missed, and in whatever order it is written: a run is on one context in the end, for both workers and
    /// for a new one, and all traces of the instance are linked.
    #[test]
    fn workers_agree_on_each_run(steps in prop::collection::vec(step(), 1..16)) {
        let backend = MemoryBackend::new();
        let workers = [(); 3].map(|()| Flushed::new(&backend));
        let mut runs = HashSet::new();
        for step in steps {
            match step {
                Step::Span { worker, run, answer } => {
                    workers[worker].open(run, answer);
                    runs.extend(run);
                }
                Step::Flush(worker) => workers[worker].flush()(),
            }
        }
        settle(&workers);
        // A worker may take a record that it has for that of another run than the backend does, and learns of that.
        for (run, worker) in runs.iter().flat_map(|run| workers.iter().map(move |worker| (run, worker))) {
            worker.open_in_time(run);
        }
        settle(&workers);
        let new = Flushed::new(&backend);
        let all = || workers.iter().chain([&new]);
        for run in &runs {
            let traces: Vec<_> = all().map(|worker| worker.open_in_time(run)).collect();
            prop_assert!(traces.iter().all(|trace| *trace == traces[0]), "run {}: {:?}", run, traces);
        }
        if runs.len() < 2 {
            let traces: Vec<_> = workers.iter().filter_map(|flushed| flushed.worker.storage.get(ID).unwrap()).map(|cx| cx.trace_id()).collect();
            prop_assert!(traces.iter().all(|trace| *trace == traces[0]), "latest: {:?}", traces);
        }
        settle(&workers);
        all().for_each(|worker| worker.opened.borrow_mut().clear());
        let spans: Vec<_> = all().flat_map(|flushed| flushed.worker.spans()).collect();
        let mut linked: HashSet<TraceId> = spans.iter().take(1).map(|span| span.span_context.trace_id()).collect();
        loop {
            let before = linked.len();
            for span in &spans {
                let mut traces: Vec<_> = span.links.iter().map(|link| link.span_context.trace_id()).collect();
                traces.push(span.span_context.trace_id());
                if traces.iter().any(|trace| linked.contains(trace)) {
                    linked.extend(traces);
                }
            }
            if linked.len() == before {
                break;
            }
        }
        let apart = spans.iter().find(|span| !linked.contains(&span.span_context.trace_id()));
        prop_assert!(apart.is_none(), "{} is not linked", apart.unwrap().name);
    }
}
