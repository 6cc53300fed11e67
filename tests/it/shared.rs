//! Several workers on one backend, and one worker on a backend that fails, is slow, hangs or panics.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::{TraceContextExt as _, TraceId};
use tracing::info_span;
use tracing_workflow_context::backend::{
    BackendError, Record, StorageBackend, Write, WriteOutcome,
};
use tracing_workflow_context::{
    Absence, Clock, MemoryBackend, StorageError, WorkflowContext, WorkflowContextStorage,
};

use crate::support::*;

/// How much a span may exceed the budget on a busy machine.
const SLACK: Duration = Duration::from_millis(100);

const ID: &str = "order-42";

fn storage(backend: impl StorageBackend) -> WorkflowContextStorage {
    patient(backend).build().unwrap()
}

fn worker_on(backend: impl StorageBackend) -> Worker {
    Worker::with_storage(storage(backend))
}

/// Returns the backend's record for a key.
#[track_caller]
fn kept(backend: &impl StorageBackend, key: &str) -> Record {
    let record = backend.get(key).unwrap();
    record.unwrap_or_else(|| panic!("the backend has nothing under {key:?}"))
}

fn timed<R>(run: impl FnOnce() -> R) -> (Duration, R) {
    let start = Instant::now();
    let result = run();
    (start.elapsed(), result)
}

// Workers that share a backend.

#[test]
fn another_worker_continues_the_trace_after_a_flush() {
    for_each_via(|via| {
        let backend = MemoryBackend::new();
        let [a, b] = [(); 2].map(|()| Worker::via(via, storage(backend.clone())));
        a.step("first", Tags::instance(ID));
        a.storage.flush().unwrap();

        b.step("second", Tags::instance(ID));
        let first = a.span("first").span_context;
        assert_continues(&b.span("second"), &first);
        assert_eq!(b.storage.get(ID).unwrap(), a.storage.get(ID).unwrap());
    });
}

#[test]
fn a_context_stored_by_a_call_is_found_by_another_worker() {
    let backend = MemoryBackend::new();
    let [a, b] = [(); 2].map(|()| storage(backend.clone()));
    a.store(ID, context(1)).unwrap();
    a.store(ID, context(2)).unwrap();
    a.flush().unwrap();
    assert_eq!(b.get(ID).unwrap(), a.get(ID).unwrap());
    assert_eq!(b.get(ID).unwrap().unwrap().span_id(), context(2).span_id());
    assert_eq!(b.get("unknown").unwrap(), None);
}

#[test]
fn a_resumed_agent_continues_what_another_worker_recorded() {
    let backend = MemoryBackend::new();
    let [a, b] = [(); 2].map(|()| worker_on(backend.clone()));
    a.step("first", Tags::instance(ID));
    a.storage.flush().unwrap();
    b.storage.create_resumed(ID, Some("Planner")).unwrap();
    assert_continues(
        &b.span("Planner.ToolCallingWorkflow"),
        &a.span("first").span_context,
    );
    b.storage.flush().unwrap();
    assert!(kept(&backend, ID).context.is_resumed());
}

#[test]
fn a_parent_instance_is_found_where_another_worker_recorded_it() {
    let backend = MemoryBackend::new();
    let [a, b] = [(); 2].map(|()| worker_on(backend.clone()));
    a.step("parent", Tags::instance("parent"));
    a.storage.flush().unwrap();
    b.step("child", Tags::instance("child").child_of("parent"));
    assert_continues(&b.span("child"), &a.span("parent").span_context);
}

/// Both record the instance before either has written, and B writes first.
#[test]
fn two_workers_that_record_at_once_agree_once_their_writes_are_done() {
    for_each_via(|via| {
        let backend = MemoryBackend::new();
        let controlled = ControlledBackend::over(backend.clone());
        controlled.set(Call::Write, Behaviour::Blocks);
        let [a, b] = [storage(controlled.clone()), storage(backend.clone())]
            .map(|storage| Worker::via(via, storage));
        let (of_a, of_b) = (
            a.open("a", Tags::instance(ID)),
            b.open("b", Tags::instance(ID)),
        );
        of_a.start();
        of_b.start();
        b.storage.flush().unwrap();
        controlled.set(Call::Write, Behaviour::Works);
        a.storage.flush().unwrap();

        let winner = of_b.span_context();
        for worker in [&a, &b] {
            assert_same_span(&worker.stored(ID), &winner);
            worker.step("later", Tags::instance(ID));
            assert_continues(&worker.span("later"), &winner);
        }
        assert_eq!(kept(&backend, ID).context.span_id(), winner.span_id());
        // A span of the OpenTelemetry API that is dropped without `end` is not updated at its end.
        for opened in [of_a, of_b] {
            opened.otel_context().span().end();
        }
        let (relation, target) = link(&a.span("a"));
        assert_eq!(relation, "late");
        assert_same_span(&target, &winner);
        assert!(b.span("b").links.is_empty());
        assert_eq!(
            (a.storage.stats().conflicts, b.storage.stats().conflicts),
            (1, 0)
        );
    });
}

/// The losing span is still open: its children stay in its trace, and a link points to the winner.
#[test]
fn a_span_that_ended_before_it_lost_has_no_link_and_later_ones_follow_the_winner() {
    let backend = MemoryBackend::new();
    let controlled = ControlledBackend::over(backend.clone());
    controlled.set(Call::Write, Behaviour::Blocks);
    let (a, b) = (worker_on(controlled.clone()), worker_on(backend.clone()));
    a.step("a", Tags::instance(ID));
    b.step("b", Tags::instance(ID));
    b.storage.flush().unwrap();
    controlled.set(Call::Write, Behaviour::Works);
    a.storage.flush().unwrap();
    assert!(a.span("a").links.is_empty());
    a.step("later", Tags::instance(ID));
    assert_continues(&a.span("later"), &b.span("b").span_context);
}

#[test]
fn write_through_makes_many_workers_agree_at_once() {
    const WORKERS: usize = 8;
    let backend = MemoryBackend::new();
    let make = |_| {
        let storage = patient(backend.clone()).write_through(true).build();
        Worker::with_storage(storage.unwrap())
    };
    let workers: Vec<_> = (0..WORKERS).map(make).collect();
    for round in 0..50 {
        let id = format!("order-{round}");
        let opened = at_once(WORKERS, |worker| {
            let opened = workers[worker].open("first", Tags::instance(&id));
            opened.start();
            (opened, workers[worker].stored(&id))
        });
        let winner = &opened[0].1;
        let traces = opened
            .iter()
            .map(|(opened, _)| opened.span_context().trace_id());
        assert!(traces.into_iter().any(|trace| trace == winner.trace_id()));
        opened
            .iter()
            .for_each(|(_, stored)| assert_same_span(stored, winner));
    }
    for span in workers.iter().flat_map(|worker| worker.spans()) {
        let losers = span.links.iter().map(|link| link.span_context.trace_id());
        assert!(
            losers
                .into_iter()
                .all(|winner| winner != span.span_context.trace_id())
        );
    }
}

#[test]
fn write_through_needs_no_flush() {
    let backend = MemoryBackend::new();
    let storage = patient(backend.clone())
        .write_through(true)
        .build()
        .unwrap();
    let a = Worker::with_storage(storage);
    a.step("first", Tags::instance(ID).run("run"));
    assert_eq!(kept(&backend, ID).run_id.as_deref(), Some("run"));
    let b = worker_on(backend.clone());
    b.step("second", Tags::instance(ID).run("run"));
    assert_continues(&b.span("second"), &a.span("first").span_context);
}

#[test]
fn runs_agree_between_workers() {
    let backend = MemoryBackend::new();
    let [a, b, c] = [(); 3].map(|()| worker_on(backend.clone()));
    let tags = |run| Tags::instance(ID).run(run);
    a.step("1", tags("1"));
    a.storage.flush().unwrap();
    b.step("1 too", tags("1"));
    b.step("2", tags("2"));
    b.storage.flush().unwrap();
    let (first, second) = (a.span("1").span_context, b.span("2").span_context);
    assert_continues(&b.span("1 too"), &first);
    assert_root(&b.span("2"));
    assert_eq!(links(&b.span("2")), [("new_run".to_owned(), ids(&first))]);

    a.step("2 too", tags("2"));
    a.step("late 1", tags("1"));
    a.step("latest", Tags::instance(ID));
    assert_continues(&a.span("2 too"), &second);
    assert_continues(&a.span("late 1"), &first);
    assert_continues(&a.span("latest"), &second);

    c.step("very late 1", tags("1"));
    c.step("2 as well", tags("2"));
    assert_continues(&c.span("very late 1"), &first);
    assert_continues(&c.span("2 as well"), &second);
    assert_eq!(worker_on(backend).stored(ID).trace_id(), second.trace_id());
}

#[test]
fn two_workers_that_begin_a_run_at_once_agree_on_it() {
    let backend = MemoryBackend::new();
    let controlled = ControlledBackend::over(backend.clone());
    let (a, b) = (worker_on(controlled.clone()), worker_on(backend.clone()));
    a.step("1", Tags::instance(ID).run("1"));
    a.storage.flush().unwrap();
    controlled.set(Call::Write, Behaviour::Blocks);
    a.step("a", Tags::instance(ID).run("2"));
    b.step("b", Tags::instance(ID).run("2"));
    b.storage.flush().unwrap();
    controlled.set(Call::Write, Behaviour::Works);
    a.storage.flush().unwrap();
    let winner = b.span("b").span_context;
    // The pointer to the latest run is put right after the claim.
    a.storage.flush().unwrap();
    for worker in [&a, &b, &worker_on(backend.clone())] {
        assert_same_span(&worker.stored(ID), &winner);
        worker.step("later", Tags::instance(ID).run("2"));
        assert_continues(&worker.span("later"), &winner);
    }
}

fn rolling(backend: impl StorageBackend) -> Worker {
    let storage = patient(backend).max_spans(2).build();
    Worker::with_storage(storage.unwrap())
}

#[test]
fn generations_agree_between_workers() {
    for run in [None, Some("run")] {
        let tags = || run.map_or(Tags::instance(ID), |run| Tags::instance(ID).run(run));
        let backend = MemoryBackend::new();
        let a = rolling(backend.clone());
        for name in ["1", "1 too", "2"] {
            a.step(name, tags());
        }
        a.storage.flush().unwrap();
        assert_eq!(generation(&a.span("2")), Some(2));
        assert_eq!(kept(&backend, ID).generation, 2);

        let b = rolling(backend.clone());
        b.step("2 too", tags());
        assert_continues(&b.span("2 too"), &a.span("2").span_context);
        b.step("3", tags());
        assert_eq!(generation(&b.span("3")), Some(3));
        b.storage.flush().unwrap();
        let record = kept(&backend, ID);
        assert_eq!((record.generation, record.run_id.as_deref()), (3, run));
    }
}

#[test]
fn a_trace_that_a_span_without_a_run_id_opened_is_its_runs_for_other_workers_too() {
    let backend = MemoryBackend::new();
    let a = rolling(backend.clone());
    let run = Tags::instance(ID).run("run");
    for (name, tags) in [("1", run), ("1 too", run), ("2", Tags::instance(ID))] {
        a.step(name, tags);
    }
    a.storage.flush().unwrap();
    let b = rolling(backend.clone());
    b.step("another run", Tags::instance(ID).run("another"));
    b.step("2 too", run);
    assert_root(&b.span("another run"));
    assert_continues(&b.span("2 too"), &a.span("2").span_context);
}

/// Each has the first trace in memory, finds it full, and opens the next one.
#[test]
fn two_workers_that_open_a_generation_at_once_agree_on_it() {
    let backend = MemoryBackend::new();
    let controlled = ControlledBackend::over(backend.clone());
    let (a, b) = (rolling(controlled.clone()), rolling(backend.clone()));
    a.step("1", Tags::instance(ID));
    a.storage.flush().unwrap();
    b.step("1 too", Tags::instance(ID));
    b.step("b", Tags::instance(ID));
    a.step("1 as well", Tags::instance(ID));
    controlled.set(Call::Write, Behaviour::Blocks);
    a.step("a", Tags::instance(ID));
    b.storage.flush().unwrap();
    controlled.set(Call::Write, Behaviour::Works);
    a.storage.flush().unwrap();
    a.storage.flush().unwrap();
    let winner = b.span("b").span_context;
    assert_eq!(
        [generation(&a.span("a")), generation(&b.span("b"))],
        [Some(2); 2]
    );
    for worker in [&a, &b, &worker_on(backend.clone())] {
        assert_same_span(&worker.stored(ID), &winner);
    }
}

/// A claim for an earlier instance of the same id is ignored.
#[test]
fn a_reused_id_rolls_over_into_a_trace_of_its_own() {
    let backend = MemoryBackend::new();
    let worker = rolling(backend.clone());
    for life in ["first", "second"] {
        for trace in [1, 2, 3] {
            for span in [1, 2] {
                worker.step(&format!("{life} {trace} {span}"), Tags::instance(ID));
            }
        }
        worker.storage.flush().unwrap();
        worker.storage.cleanup(ID).unwrap();
    }
    let trace = |name: &str| worker.trace_of(name);
    for number in [1, 2, 3] {
        let [one, other] = ["first", "second"].map(|life| {
            let traces = [1, 2].map(|span| trace(&format!("{life} {number} {span}")));
            assert_eq!(traces[0], traces[1], "{life} {number}");
            traces[0]
        });
        assert_ne!(one, other);
    }
    assert_eq!(worker.storage.stats().conflicts, 0);
}

#[test]
fn cleanup_on_one_worker_removes_for_the_others() {
    let backend = MemoryBackend::new();
    let a = worker_on(backend.clone());
    a.step("first", Tags::instance(ID).run("run"));
    a.storage.flush().unwrap();
    let b = worker_on(backend.clone());
    assert!(b.storage.cleanup(ID).unwrap());
    b.storage.flush().unwrap();
    let mut left = Vec::new();
    backend
        .scan(&mut |key, _| left.push(key.to_owned()))
        .unwrap();
    // What tells the other worker, for some minutes.
    assert_eq!(left, [format!("{ID}\u{1f}\u{1f}\u{1f}\u{1f}")]);

    let c = worker_on(backend);
    c.step("anew", Tags::instance(ID).run("run"));
    assert_root(&c.span("anew"));
    assert!(c.span("anew").links.is_empty());
    assert!(!worker_on(MemoryBackend::new()).storage.cleanup(ID).unwrap());
}

/// A cleaned up instance is gone at once, although the backend still has it.
#[test]
fn a_cleaned_up_instance_does_not_come_back_from_a_slow_backend() {
    let controlled = ControlledBackend::new();
    let worker = worker_on(controlled.clone());
    worker.step("first", Tags::instance(ID));
    worker.storage.flush().unwrap();

    controlled.set(Call::Write, Behaviour::Blocks);
    assert!(worker.storage.cleanup(ID).unwrap());
    assert_eq!(worker.storage.get(ID).unwrap(), None);
    controlled.await_blocked(Call::Write);
    assert_eq!(
        worker.storage.get(ID).unwrap(),
        None,
        "while it is being removed"
    );
    worker.step("anew", Tags::instance(ID));
    assert_root(&worker.span("anew"));
    controlled.set(Call::Write, Behaviour::Works);
    worker.storage.flush().unwrap();
    let anew = worker.span("anew").span_context;
    assert_same_span(&worker_on(controlled.clone()).stored(ID), &anew);
    assert_eq!(worker.storage.stats().conflicts, 0);
}

#[test]
fn a_terminal_status_has_the_backends_entry_expire_with_the_grace() {
    for run in [None, Some("run")] {
        let clock = ManualClock::new();
        let backend = MemoryBackend::with_clock(clock.clone());
        let make = || {
            let storage = patient(backend.clone())
                .clock(clock.clone())
                .idle_ttl(Duration::from_secs(3600))
                .completed_grace(Duration::from_secs(60));
            Worker::with_storage(storage.build().unwrap())
        };
        let tags = || run.map_or(Tags::instance(ID), |run| Tags::instance(ID).run(run));
        let a = make();
        a.step("first", tags());
        a.storage.flush().unwrap();
        let in_seconds = |record: &Record| {
            record
                .expires_at
                .duration_since(clock.now())
                .unwrap()
                .as_secs()
        };
        assert_eq!(in_seconds(&kept(&backend, ID)), 3600);

        a.run(|| {
            drop(
                info_span!(
                    "last",
                    workflow.instance_id = ID,
                    workflow.run_id = run,
                    workflow.status = "completed"
                )
                .entered(),
            )
        });
        a.storage.flush().unwrap();
        let keys = [
            Some(ID.to_owned()),
            run.map(|run| format!("{ID}\u{1f}{run}")),
        ];
        for key in keys.into_iter().flatten() {
            assert_eq!(in_seconds(&kept(&backend, &key)), 60, "{key:?}");
        }

        clock.advance(Duration::from_secs(59));
        let b = make();
        b.step("late", tags());
        assert_continues(&b.span("late"), &a.span("first").span_context);
        clock.advance(Duration::from_secs(2));
        let c = make();
        c.step("anew", tags());
        assert_root(&c.span("anew"));
        assert!(c.span("anew").links.is_empty());
    }
}

/// The old record has expired by then, even if the backend was not updated.
#[test]
fn a_reused_id_does_not_lose_to_its_expired_record() {
    let controlled = ControlledBackend::new();
    let storage = patient(controlled.clone())
        .completed_grace(Duration::ZERO)
        .build();
    let worker = Worker::with_storage(storage.unwrap());
    worker.step("first", Tags::instance(ID));
    worker.storage.flush().unwrap();
    controlled.set(Call::Write, Behaviour::Blocks);
    worker.storage.store("another", context(1)).unwrap();
    controlled.await_blocked(Call::Write);
    worker.run(|| {
        drop(
            info_span!(
                "last",
                workflow.instance_id = ID,
                workflow.status = "failed"
            )
            .entered(),
        )
    });
    worker.step("anew", Tags::instance(ID));
    assert_root(&worker.span("anew"));
    controlled.set(Call::Write, Behaviour::Works);
    worker.storage.flush().unwrap();
    assert_same_span(
        &worker_on(controlled.clone()).stored(ID),
        &worker.span("anew").span_context,
    );
    assert_eq!(worker.storage.stats().conflicts, 0);
}

#[test]
fn an_evicted_instance_is_found_in_the_backend() {
    let controlled = ControlledBackend::new();
    let storage = patient(controlled.clone())
        .max_instances(1)
        .build()
        .unwrap();
    let worker = Worker::with_storage(storage);
    let ids = ["1", "2", "3"];
    ids.iter()
        .for_each(|id| worker.step(id, Tags::instance(id)));
    worker.storage.flush().unwrap();
    assert!(worker.storage.stats().evicted >= 2);
    for id in ids {
        let name = format!("{id} again");
        worker.step(&name, Tags::instance(id));
        assert_continues(&worker.span(&name), &worker.span(id).span_context);
    }
}

/// The write is queued; the backend does not have it yet.
#[test]
fn an_evicted_instance_is_found_while_the_backend_is_slow_or_down() {
    for behaviour in [Behaviour::Blocks, Behaviour::Fails] {
        let controlled = ControlledBackend::new();
        controlled.set(Call::Write, behaviour);
        let storage = patient(controlled.clone())
            .max_instances(1)
            .build()
            .unwrap();
        let worker = Worker::with_storage(storage);
        let ids = ["1", "2", "3"];
        ids.iter()
            .for_each(|id| worker.step(id, Tags::instance(id).run("run")));
        for id in ids {
            let name = format!("{id} again");
            worker.step(&name, Tags::instance(id).run("run"));
            assert_continues(&worker.span(&name), &worker.span(id).span_context);
        }
        assert_eq!(
            controlled.calls(Call::Get),
            3,
            "before the first spans alone, for a run and its instance at once"
        );
        controlled.set(Call::Write, Behaviour::Works);
    }
}

/// It was recorded again because the lookup timed out; then the first record wins.
#[test]
fn an_instance_recorded_twice_while_the_backend_was_slow_is_one() {
    let controlled = ControlledBackend::new();
    controlled.set(Call::Write, Behaviour::Blocks);
    let storage = patient(controlled.clone())
        .max_instances(1)
        .lookup_budget(Duration::ZERO)
        .connect_budget(Duration::ZERO)
        .build();
    let worker = Worker::with_storage(storage.unwrap());
    worker.step("other", Tags::instance("other"));
    controlled.await_blocked(Call::Write);
    worker.step("first", Tags::instance(ID));
    worker.step("evicting", Tags::instance("evicting"));
    let second = worker.open("second", Tags::instance(ID));
    second.start();
    controlled.set(Call::Write, Behaviour::Works);
    worker.storage.flush().unwrap();
    let first = worker.span("first").span_context;
    assert_same_span(&worker.stored(ID), &first);
    drop(second);
    assert_same_span(&link(&worker.span("second")).1, &first);
    assert_same_span(&worker_on(controlled.clone()).stored(ID), &first);
}

#[test]
fn ids_with_separators_are_kept_apart() {
    let backend = MemoryBackend::new();
    let a = worker_on(backend.clone());
    a.step("run", Tags::instance("a").run("b"));
    a.step("instance", Tags::instance("a\u{1f}b"));
    a.step("escaped", Tags::instance("a\u{1e} b"));
    a.storage.flush().unwrap();
    let b = worker_on(ControlledBackend::warming_up(backend));
    let mut warm = b.storage.instance_ids();
    warm.sort();
    assert_eq!(warm, ["a", "a\u{1e} b", "a\u{1f}b"]);
    for (name, tags) in [
        ("run", Tags::instance("a").run("b")),
        ("instance", Tags::instance("a\u{1f}b")),
        ("escaped", Tags::instance("a\u{1e} b")),
    ] {
        b.step(name, tags);
        assert_continues(&b.span(name), &a.span(name).span_context);
    }
}

/// Such a backend keeps milliseconds, or no times at all.
#[test]
fn a_backend_that_rounds_times_reports_no_false_conflict() {
    #[derive(Debug)]
    struct Rounding(MemoryBackend);
    impl StorageBackend for Rounding {
        fn write(
            &self,
            writes: &[Write],
        ) -> Result<Vec<WriteOutcome>, tracing_workflow_context::backend::BackendError> {
            self.0.write(writes)?;
            let read = |write: &Write| {
                let mut record = self.0.get(write.key())?;
                if let Some(record) = &mut record {
                    let (parent, state) =
                        (record.context.traceparent(), record.context.tracestate());
                    record.context = WorkflowContext::parse(&parent, &state).unwrap();
                }
                Ok(record.map_or(WriteOutcome::Done, WriteOutcome::Existing))
            };
            writes.iter().map(read).collect()
        }
        fn get(
            &self,
            key: &str,
        ) -> Result<Option<Record>, tracing_workflow_context::backend::BackendError> {
            self.0.get(key)
        }
        fn scan(
            &self,
            visit: &mut dyn FnMut(&str, Record),
        ) -> Result<(), tracing_workflow_context::backend::BackendError> {
            self.0.scan(visit)
        }
        fn flush(&self) -> Result<(), tracing_workflow_context::backend::BackendError> {
            Ok(())
        }
    }
    let worker = worker_on(Rounding(MemoryBackend::new()));
    worker.step("first", Tags::instance(ID));
    worker.storage.flush().unwrap();
    assert_eq!(worker.storage.stats().conflicts, 0);
    assert_eq!(
        worker.storage.get(ID).unwrap().unwrap().span_id(),
        worker.span("first").span_context.span_id()
    );
}

#[test]
fn a_new_storage_loads_a_local_backend_up_to_its_capacity() {
    let backend = MemoryBackend::new();
    let a = storage(backend.clone());
    let ids: Vec<_> = (0..100).map(|n| format!("order-{n}")).collect();
    for (id, span) in ids.iter().zip(1..) {
        a.store(id, context(span)).unwrap();
    }
    a.flush().unwrap();

    let controlled = ControlledBackend::warming_up(backend.clone());
    let b = storage(controlled.clone());
    assert_eq!(b.stats().stored_instances, 100);
    for id in &ids {
        assert_eq!(b.get(id).unwrap(), a.get(id).unwrap());
    }
    assert_eq!(controlled.calls(Call::Get), 0);

    let c = patient(ControlledBackend::warming_up(backend))
        .max_instances(10)
        .build()
        .unwrap();
    let stats = c.stats();
    assert_eq!((stats.stored_instances, stats.evicted), (10, 0));
    for id in &ids {
        assert_eq!(c.get(id).unwrap(), a.get(id).unwrap());
    }
}

// The cost of spans.

#[test]
fn a_span_that_hits_memory_calls_no_backend() {
    for_each_via(|via| {
        let controlled = ControlledBackend::new();
        let worker = Worker::via(via, storage(controlled.clone()));
        worker.step("first", Tags::instance(ID));
        worker.storage.flush().unwrap();
        let calls = || [Call::Get, Call::Write, Call::Scan].map(|call| controlled.calls(call));
        let before = calls();
        for _ in 0..100 {
            worker.step("hit", Tags::instance(ID));
            worker.within("outer", Tags::instance(ID), || {
                worker.step("nested", Tags::instance(ID))
            });
            worker.storage.get(ID).unwrap();
        }
        worker.storage.flush().unwrap();
        assert_eq!(calls(), before, "{via:?}");
    });
}

/// A span waits for one answer of the backend, not for two one after the other.
#[test]
fn a_run_and_its_instance_are_asked_for_at_once() {
    let backend = MemoryBackend::new();
    let a = worker_on(backend.clone());
    a.step("client", Tags::instance(ID));
    a.storage.flush().unwrap();
    for run in ["asked for the first time", "known by then"] {
        let controlled = ControlledBackend::over(backend.clone());
        let b = worker_on(controlled.clone());
        b.step("step", Tags::instance(ID).run("run"));
        assert_continues(&b.span("step"), &a.span("client").span_context);
        assert_eq!(controlled.calls(Call::Get), 1, "{run}");
        b.storage.flush().unwrap();
    }
}

#[test]
fn a_missing_instance_is_looked_up_only_once_in_a_while() {
    let controlled = ControlledBackend::new();
    let storage = storage(controlled.clone());
    let worker = Worker::with_sampler(storage, true, opentelemetry_sdk::trace::Sampler::AlwaysOff);
    // Unsampled spans are recorded too, so each of these ids is new.
    let start = Instant::now();
    for n in 0..10 {
        worker.run(|| info_span!("step", workflow.instance_id = n).in_scope(|| {}));
    }
    assert_eq!(controlled.calls(Call::Get), 10);
    // Replays of unknown instances miss, and record nothing.
    for _ in 0..100 {
        let replay = || {
            info_span!(
                "replay",
                workflow.instance_id = ID,
                workflow.replaying = true
            )
        };
        worker.run(|| replay().in_scope(|| {}));
    }
    let most = 11 + start.elapsed().as_millis() as usize / 50;
    let asked = controlled.calls(Call::Get);
    assert!(asked <= most, "{asked} times, {most} at most");
}

#[test]
fn a_zero_budget_never_asks_and_never_waits() {
    let controlled = ControlledBackend::new();
    controlled.set(Call::Get, Behaviour::Blocks);
    controlled.set(Call::Write, Behaviour::Blocks);
    let storage = patient(controlled.clone())
        .lookup_budget(Duration::ZERO)
        .connect_budget(Duration::ZERO)
        .write_through(true);
    let worker = Worker::with_storage(storage.build().unwrap());
    for _ in 0..10 {
        worker.step("first", Tags::instance(ID));
        worker.storage.cleanup(ID).unwrap();
        assert_eq!(worker.storage.get(ID).unwrap(), None);
    }
    assert_eq!(controlled.calls(Call::Get), 0);
    let explained = worker.storage.explain("unseen").reason();
    assert_eq!(explained, Some(Absence::NeverSeen), "nothing is down");
    controlled.set_all(Behaviour::Works);
}

#[test]
fn the_budget_bounds_how_long_a_span_or_call_waits_for_a_hanging_backend() {
    for budget in [5, 20, 200].map(Duration::from_millis) {
        let controlled = ControlledBackend::new();
        controlled.set_all(Behaviour::Blocks);
        let storage = patient(controlled.clone())
            .lookup_budget(budget)
            .connect_budget(Duration::ZERO)
            .write_through(true);
        let worker = Worker::with_storage(storage.build().unwrap());
        // Each asks for the run, the instance and the parent, and waits for its claim.
        let span = |n: usize| {
            let id = format!("order-{n}");
            timed(|| worker.step("first", Tags::instance(&id).run("run").child_of("parent"))).0
        };
        let spans = (0..3).map(span).max().unwrap();
        println!("budget {budget:?}: a span waited for {spans:?}");
        assert!(
            spans < budget + SLACK,
            "a span waited for {spans:?}, not {budget:?}"
        );

        let calls: [&dyn Fn(); 3] = [
            &|| drop(worker.storage.get("unknown")),
            &|| drop(worker.storage.cleanup("unknown")),
            &|| drop(worker.storage.create_resumed("unknown", None)),
        ];
        for call in calls {
            let took = timed(call).0;
            // The last of them also opens a span of its own, which waits once more.
            assert!(
                took < 2 * budget + SLACK,
                "a call waited for {took:?}, not {budget:?}"
            );
        }
        controlled.set_all(Behaviour::Works);
    }
}

#[test]
fn a_failing_backend_opens_the_circuit_which_closes_by_itself() {
    for behaviour in [Behaviour::Fails, Behaviour::Panics, Behaviour::Blocks] {
        let backend = MemoryBackend::new();
        storage(backend.clone()).store("known", context(1)).unwrap();
        let controlled = ControlledBackend::over(backend);
        let storage = patient(controlled.clone())
            .lookup_budget(Duration::from_millis(20))
            .connect_budget(Duration::ZERO);
        let worker = Worker::with_storage(storage.build().unwrap());
        controlled.set(Call::Get, behaviour);
        let start = Instant::now();
        let spans = (0..1_000).map(|n| {
            // Writes succeed all the while.
            timed(|| worker.step("first", Tags::instance(&n.to_string()))).0
        });
        let waited: Duration = spans
            .filter(|took| *took >= Duration::from_millis(20))
            .sum();
        // Three, and one more at the end of each pause, which begins with 50 ms at least and is doubled each time.
        let tries = 4 + (start.elapsed().as_millis() as f64 / 50.0 + 1.0).log2() as usize;
        assert!(
            controlled.calls(Call::Get) <= tries,
            "{behaviour:?}: {} calls",
            controlled.calls(Call::Get)
        );
        assert!(
            waited < Duration::from_millis(20) * tries as u32 + 10 * SLACK,
            "{behaviour:?}: {waited:?}"
        );
        let explanation = worker.storage.explain("unseen");
        assert_eq!(
            explanation.reason(),
            Some(Absence::BackendDown),
            "{behaviour:?}"
        );
        assert!(
            explanation.to_string().contains("the backend"),
            "{explanation}"
        );
        let errors = || worker.storage.stats().backend_errors;
        match behaviour {
            Behaviour::Blocks => assert_eq!(errors(), 0),
            // A panic is counted after its message was printed, which may take longer than the budget.
            _ => wait_until("the failures are counted", || errors() > 0),
        }

        controlled.set(Call::Get, Behaviour::Works);
        wait_until("the backend is asked again", || {
            worker.storage.get("known").unwrap().is_some()
        });
        assert_eq!(
            worker.storage.explain("unseen").reason(),
            Some(Absence::NeverSeen)
        );
        worker.step("joins", Tags::instance("known"));
        assert_eq!(worker.trace_of("joins"), TraceId::from(7));
    }
}

/// All workers fail at the same moment, and must not reconnect at the same moment.
#[test]
fn a_fleet_reconnects_with_jitter() {
    #[derive(Clone, Debug, Default)]
    struct Dead(Arc<Mutex<Vec<Instant>>>);
    impl StorageBackend for Dead {
        fn write(&self, _: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
            self.0.lock().unwrap().push(Instant::now());
            Err(BackendError::new("dead", None))
        }
        fn get(&self, _: &str) -> Result<Option<Record>, BackendError> {
            Ok(None)
        }
        fn scan(&self, _: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
            Ok(())
        }
        fn flush(&self) -> Result<(), BackendError> {
            Ok(())
        }
    }
    let fleet: Vec<_> = (0..30)
        .map(|_| {
            let backend = Dead::default();
            let storage = storage(backend.clone());
            storage.store(ID, context(1)).unwrap();
            (storage, backend)
        })
        .collect();
    let pauses: Vec<_> = fleet
        .iter()
        .map(|(_, Dead(tries))| {
            wait_until("each has tried three times", || {
                tries.lock().unwrap().len() >= 3
            });
            let tries = tries.lock().unwrap();
            [tries[1] - tries[0], tries[2] - tries[1]]
        })
        .collect();
    for (which, pause) in [100, 200]
        .map(Duration::from_millis)
        .into_iter()
        .enumerate()
    {
        let mut pauses: Vec<_> = pauses.iter().map(|pauses| pauses[which]).collect();
        pauses.sort();
        println!("{pause:?} at most: {pauses:?}");
        assert!(pauses[0] >= pause / 2, "{pauses:?}");
        // With jitter, the probability that all are this close is below one in 10^12.
        assert!(pauses[29] - pauses[0] >= pause / 8, "{pauses:?}");
    }
}

#[test]
fn a_lookup_that_times_out_is_counted() {
    let controlled = ControlledBackend::new();
    let budget = Duration::from_millis(20);
    let storage = patient(controlled.clone())
        .lookup_budget(budget)
        .connect_budget(Duration::ZERO)
        .build();
    let worker = Worker::with_storage(storage.unwrap());
    let timeouts = || worker.storage.stats().lookup_timeouts;
    let lookups: [&dyn Fn(); 3] = [
        &|| worker.step("first", Tags::instance(ID)),
        &|| drop(worker.storage.get("unknown")),
        &|| drop(worker.storage.create_resumed("another", None)),
    ];
    controlled.set(Call::Get, Behaviour::Blocks);
    for (before, lookup) in (0..).zip(lookups) {
        assert_eq!(timeouts(), before);
        lookup();
        assert_eq!(timeouts(), before + 1);
    }
    // From now on the circuit is open, and no call waits.
    worker.storage.get("unknown").unwrap();
    assert_eq!((timeouts(), worker.storage.stats().backend_errors), (3, 0));
    controlled.set_all(Behaviour::Works);
}

// A part of the backend is unavailable.

/// A backend of two parts, of which the second has the keys that begin with `~`.
#[derive(Clone, Debug, Default)]
struct Partitioned(Arc<[(MemoryBackend, AtomicBool); 2]>);

impl Partitioned {
    fn part(&self, key: &str) -> &(MemoryBackend, AtomicBool) {
        &self.0[usize::from(key.starts_with('~'))]
    }

    fn set_away(&self, is_away: bool) {
        self.0[1].1.store(is_away, Relaxed);
    }

    fn there(&self, key: &str) -> Option<Record> {
        self.part(key).0.get(key).unwrap()
    }

    fn away() -> BackendError {
        BackendError::new("a part is unavailable", None).partial()
    }
}

impl StorageBackend for Partitioned {
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        let outcome = |write: &Write| match self.part(write.key()) {
            (_, is_away) if is_away.load(Relaxed) => WriteOutcome::Failed(Self::away()),
            (part, _) => {
                let outcomes = part.write(std::slice::from_ref(write)).unwrap();
                outcomes.into_iter().next().unwrap()
            }
        };
        Ok(writes.iter().map(outcome).collect())
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        match self.part(key) {
            (_, is_away) if is_away.load(Relaxed) => Err(Self::away()),
            (part, _) => part.get(key),
        }
    }

    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        self.0.iter().try_for_each(|(part, _)| part.scan(visit))
    }

    fn flush(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[test]
fn writes_to_a_failing_part_are_held_while_the_rest_proceeds() {
    let backend = Partitioned::default();
    let worker = worker_on(backend.clone());
    backend.set_away(true);
    for round in 1..=20 {
        for n in 1..=10 {
            for id in [format!("{n}"), format!("~{n}")] {
                worker.storage.store(&id, context(round * 100 + n)).unwrap();
            }
        }
        let written = || {
            let record = backend.there("10")?;
            (record.context.span_id() == context(round * 100 + 10).span_id()).then_some(())
        };
        wait_until("the rest is written", || written().is_some());
    }
    worker.step("first", Tags::instance("~claimed").run("run"));
    let errors = worker.storage.flush().unwrap_err();
    assert!(
        causes(&errors).contains("a part is unavailable"),
        "{errors}"
    );
    assert!(backend.there("~10").is_none());
    // Held writes are visible to lookups.
    let evicted = patient(backend.clone()).max_instances(1).build().unwrap();
    let small = Worker::with_storage(evicted);
    small.step("first", Tags::instance("~small"));
    (0..20).for_each(|n| small.step("other", Tags::instance(&n.to_string())));
    assert!(small.storage.flush().is_err());
    small.step("second", Tags::instance("~small"));
    assert_continues(&small.span("second"), &small.span("first").span_context);

    backend.set_away(false);
    for storage in [&worker.storage, &small.storage] {
        storage.flush().unwrap();
        assert_eq!(storage.stats().dropped_writes, 0);
        assert_eq!(storage.stats().conflicts, 0);
    }
    for n in 1..=10 {
        let span = kept(&backend, &format!("~{n}")).context.span_id();
        assert_eq!(span, context(2000 + n).span_id());
    }
    assert_same_span(
        &worker_on(backend.clone()).stored("~claimed"),
        &worker.span("first").span_context,
    );
    assert!(backend.there("~claimed\u{1f}run").is_some());
}

#[test]
fn a_flush_tells_how_many_writes_are_refused_and_how_many_were_dropped() {
    let numbers = |storage: &WorkflowContextStorage| match storage.flush() {
        Ok(()) => (0, 0),
        Err(StorageError::NotWritten {
            dropped,
            refused,
            cause,
            ..
        }) => {
            assert_eq!(cause.to_string(), "a part is unavailable");
            (dropped, refused)
        }
        Err(error) => panic!("{error:?}"),
    };
    let backend = Partitioned::default();
    let storage = storage(backend.clone());
    backend.set_away(true);
    for n in 0..10 {
        storage.store(&format!("~{n}"), context(1)).unwrap();
        storage.store(&n.to_string(), context(1)).unwrap();
    }
    assert_eq!(numbers(&storage), (0, 10));
    // More than a queue holds, while none is accepted.
    const MANY: u64 = 100_000;
    for n in 0..MANY {
        storage.store(&format!("~{n}"), context(2)).unwrap();
    }
    let (dropped, refused) = numbers(&storage);
    assert_eq!(
        (dropped + refused, storage.stats().dropped_writes),
        (MANY, dropped)
    );
    assert!(dropped > 30_000 && refused > 30_000);
    assert_eq!(numbers(&storage), (0, refused), "what is lost is told once");
    backend.set_away(false);
    assert_eq!(numbers(&storage), (0, 0));
    let mut there = 0;
    backend.0[1].0.scan(&mut |_, _| there += 1).unwrap();
    assert_eq!(there, refused);
}

/// Without a flush, the writer retries by itself, and the loser learns of the winner.
#[test]
fn held_writes_are_written_once_their_part_is_back() {
    let backend = Partitioned::default();
    let [a, b] = [(); 2].map(|()| worker_on(backend.clone()));
    backend.set_away(true);
    a.step("a", Tags::instance("~1"));
    wait_until("the write is held", || a.storage.stats().backend_errors > 0);
    backend.set_away(false);
    b.step("b", Tags::instance("~2"));
    wait_until("all is written", || {
        backend.there("~1").is_some() && backend.there("~2").is_some()
    });

    backend.set_away(true);
    let errors = a.storage.stats().backend_errors;
    a.step("a", Tags::instance("~3"));
    wait_until("the write is held", || {
        a.storage.stats().backend_errors > errors + 1
    });
    let winner = Record::new(context(1), SystemTime::now() + PATIENCE);
    backend.0[1]
        .0
        .write(&[Write::Put("~3".to_owned(), winner)])
        .unwrap();
    backend.set_away(false);
    wait_until("the loser knows the winner", || {
        a.storage.get("~3").unwrap().unwrap().span_id() == context(1).span_id()
    });
    assert_eq!(a.storage.stats().conflicts, 1);
}

#[test]
fn an_unavailable_part_does_not_block_lookups_in_the_rest() {
    let backend = Partitioned::default();
    let other = worker_on(backend.clone());
    other.step("first", Tags::instance("known"));
    other.storage.flush().unwrap();
    let trace = other.trace_of("first");
    backend.set_away(true);
    for n in 0..20 {
        let worker = worker_on(backend.clone());
        for lost in 0..n {
            worker.step("lost", Tags::instance(&format!("~{lost}")));
        }
        worker.step("second", Tags::instance("known"));
        assert_eq!(worker.trace_of("second"), trace, "after {n} that are lost");
        assert!(worker.storage.stats().backend_errors >= n);
    }
}

/// A part fails and recovers repeatedly; the last write must be the final value.
#[test]
fn held_writes_keep_their_order() {
    let backend = Partitioned::default();
    let storage = storage(backend.clone());
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0_u64.. {
                if over.load(Relaxed) {
                    break;
                }
                backend.set_away(round % 3 != 0);
                thread::sleep(Duration::from_micros(700 * (round % 7)));
            }
            backend.set_away(false);
        });
        for round in 1..=300 {
            for id in ["1", "~1", "~2", "~3"] {
                storage.store(id, context(round)).unwrap();
            }
            if round % 10 == 0 {
                storage.cleanup("~2").unwrap();
            }
            thread::sleep(Duration::from_micros(300));
        }
        over.store(true, Relaxed);
    });
    wait_until("all is flushed", || storage.flush().is_ok());
    for id in ["1", "~1", "~3"] {
        assert_eq!(kept(&backend, id).context.span_id(), context(300).span_id());
    }
    assert_eq!(backend.there("~2"), None);
}

#[test]
fn dropping_the_last_handle_writes_to_the_available_part() {
    let backend = Partitioned::default();
    backend.set_away(true);
    for held in [false, true] {
        let storage = storage(backend.clone());
        storage.store("~1", context(1)).unwrap();
        if held {
            wait_until("the write is held", || storage.stats().backend_errors > 0);
        }
        storage.store("1", context(1)).unwrap();
        let took = timed(|| drop(storage)).0;
        assert!(took < Duration::from_secs(4), "{took:?}");
        assert!(backend.there("1").is_some());
        assert_eq!(Arc::strong_count(&backend.0), 1, "the backend is released");
        backend.write(&[Write::Remove("1".to_owned())]).unwrap();
    }
}

// Durability of writes.

#[test]
fn flush_fails_with_the_backend_and_succeeds_later_with_nothing_lost() {
    for (call, behaviour) in [
        (Call::Write, Behaviour::Fails),
        (Call::Write, Behaviour::Panics),
        (Call::Flush, Behaviour::Fails),
        (Call::Flush, Behaviour::Panics),
    ] {
        labelled(&format!("{call:?}: {behaviour:?}"), || {
            let backend = MemoryBackend::new();
            let controlled = ControlledBackend::over(backend.clone());
            let storage = storage(controlled.clone());
            controlled.set(call, behaviour);
            for round in 1..=3 {
                for n in 1..=10 {
                    storage
                        .store(&n.to_string(), context(round * 100 + n))
                        .unwrap();
                }
                let error = storage.flush().unwrap_err();
                assert!(matches!(error, StorageError::Backend(_)));
                let causes = causes(&error);
                let expected = match behaviour {
                    Behaviour::Fails => "the backend was told to fail",
                    _ => "the backend panicked",
                };
                assert!(causes.contains(expected), "{causes}");
            }
            storage.cleanup("1").unwrap();
            storage.store("2", context(1_000)).unwrap();
            assert!(storage.stats().backend_errors >= 3);
            controlled.set(call, Behaviour::Works);
            storage.flush().unwrap();
            storage.flush().unwrap();
            assert_eq!(backend.get("1").unwrap(), None);
            let span = |n: u64| kept(&backend, &n.to_string()).context.span_id();
            assert_eq!(span(2), context(1_000).span_id());
            (3..=10).for_each(|n| assert_eq!(span(n), context(300 + n).span_id()));
            assert_eq!(storage.stats().dropped_writes, 0);
        });
    }
}

/// A backend that takes too long for more than so many writes at once.
#[derive(Clone, Debug, Default)]
struct Slow {
    inner: MemoryBackend,
    most: Arc<AtomicUsize>,
    /// How many writes each group had.
    groups: Arc<Mutex<Vec<usize>>>,
}

impl Slow {
    fn set_most(&self, most: usize) {
        self.groups.lock().unwrap().clear();
        self.most.store(most, Relaxed);
    }

    fn groups(&self) -> Vec<usize> {
        self.groups.lock().unwrap().clone()
    }
}

impl StorageBackend for Slow {
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        self.groups.lock().unwrap().push(writes.len());
        match writes.len() > self.most.load(Relaxed) {
            true => Err(BackendError::new("no answer within 1s", None)),
            false => self.inner.write(writes),
        }
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        self.inner.get(key)
    }

    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        self.inner.scan(visit)
    }

    fn flush(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[test]
fn a_group_that_takes_too_long_is_tried_again_in_smaller_ones() {
    for most in [1, 7, 300] {
        let backend = Slow::default();
        let storage = storage(backend.clone());
        let writes = most * 10;
        // None is written before all of them wait.
        for n in 0..writes {
            storage.store(&n.to_string(), context(1)).unwrap();
        }
        backend.set_most(most);
        wait_until("all is written", || storage.flush().is_ok());
        for n in 0..writes {
            kept(&backend, &n.to_string());
        }
        for pair in backend.groups().windows(2) {
            assert!(pair[0] <= most || pair[1] <= pair[0] / 2, "{pair:?}");
        }
        assert_eq!(storage.stats().dropped_writes, 0);
    }
}

#[test]
fn groups_grow_again_once_the_backend_is_as_fast_as_before() {
    let backend = Slow::default();
    let storage = storage(backend.clone());
    for n in 0..30_000 {
        storage.store(&n.to_string(), context(1)).unwrap();
    }
    while storage.stats().backend_errors < 20 {
        assert!(storage.flush().is_err());
    }
    assert_eq!(backend.groups().last(), Some(&1));
    backend.set_most(usize::MAX);
    storage.flush().unwrap();
    let groups = backend.groups();
    assert_eq!(groups.iter().max(), Some(&1000));
    assert!(groups.len() < 100, "{} groups", groups.len());
}

/// Even if each attempt ends with a group that is too large.
#[test]
fn a_slow_backend_is_not_taken_for_one_that_is_down() {
    let backend = Slow::default();
    let storage = storage(backend.clone());
    let is_down = || storage.explain("unknown").reason() == Some(Absence::BackendDown);
    for n in 0..100 {
        storage.store(&n.to_string(), context(1)).unwrap();
    }
    wait_until("it is down", || storage.flush().is_err() && is_down());
    backend.set_most(1);
    wait_until("it is slow", || {
        assert!(storage.flush().is_err());
        !is_down()
    });
    wait_until("all is written", || storage.flush().is_ok());
}

/// Without a flush, the writer retries by itself.
#[test]
fn failed_writes_are_retried_in_order() {
    let backend = MemoryBackend::new();
    let controlled = ControlledBackend::over(backend.clone());
    let storage = storage(controlled.clone());
    controlled.set(Call::Write, Behaviour::Fails);
    storage.store("a", context(1)).unwrap();
    wait_until("a write has failed", || storage.stats().backend_errors > 0);
    storage.store("b", context(2)).unwrap();
    storage.store("a", context(3)).unwrap();
    storage.store("c", context(4)).unwrap();
    controlled.set(Call::Write, Behaviour::Works);
    wait_until("all is written", || backend.get("c").unwrap().is_some());
    let groups = controlled.groups();
    let keys: Vec<_> = groups.iter().flatten().map(Write::key).collect();
    assert_eq!(keys, ["a", "b", "a", "c"]);
    assert_eq!(kept(&backend, "a").context.span_id(), context(3).span_id());
}

#[test]
fn flush_waits_for_earlier_writes_and_for_the_backends_own_flush() {
    let controlled = ControlledBackend::new();
    let storage = storage(controlled.clone());
    for call in [Call::Write, Call::Flush] {
        controlled.set(call, Behaviour::Blocks);
        storage.store(ID, context(1)).unwrap();
        thread::scope(|scope| {
            let flush = scope.spawn(|| storage.flush());
            controlled.await_blocked(call);
            assert!(!flush.is_finished());
            controlled.set(call, Behaviour::Works);
            flush.join().unwrap().unwrap();
        });
    }
    let flushes = controlled.calls(Call::Flush);
    storage.flush().unwrap();
    assert_eq!(
        controlled.calls(Call::Flush),
        flushes,
        "there is nothing to flush"
    );
}

/// While one flush is in progress, other threads store and flush.
#[test]
fn several_threads_can_flush_at_once() {
    let backend = MemoryBackend::new();
    let storage = storage(ControlledBackend::over(backend.clone()));
    at_once(8, |thread| {
        for n in 0..50 {
            let id = format!("{thread} {n}");
            storage.store(&id, context(1)).unwrap();
            storage.flush().unwrap();
            assert!(backend.get(&id).unwrap().is_some());
        }
    });
}

#[test]
fn writes_are_batched_and_each_key_is_written_once() {
    let controlled = ControlledBackend::new();
    let storage = storage(controlled.clone());
    controlled.set(Call::Write, Behaviour::Blocks);
    storage.store("first", context(1)).unwrap();
    controlled.await_blocked(Call::Write);
    for round in 1..=10 {
        for n in 0..1_500 {
            storage.store(&n.to_string(), context(round)).unwrap();
        }
    }
    controlled.set(Call::Write, Behaviour::Works);
    storage.flush().unwrap();
    let groups = controlled.groups();
    assert_eq!(
        groups.iter().map(Vec::len).collect::<Vec<_>>(),
        [1, 1_000, 500]
    );
    let last = |write: &Write| matches!(write, Write::Put(_, record) if record.context.span_id() == context(10).span_id());
    assert!(groups[1..].iter().flatten().all(last));
    let keys = groups[1..].iter().flatten().map(Write::key);
    assert!(keys.eq((0..1_500).map(|n| n.to_string())), "oldest first");
}

#[test]
fn a_full_queue_drops_the_oldest_write_and_counts_it() {
    const MOST: usize = 64 * 1024;
    const WRITES: usize = 70_000;
    let backend = MemoryBackend::new();
    let controlled = ControlledBackend::over(backend.clone());
    let storage = storage(controlled.clone());
    controlled.set(Call::Write, Behaviour::Blocks);
    storage.store("in flight", context(1)).unwrap();
    controlled.await_blocked(Call::Write);
    for n in 0..WRITES {
        storage.store(&n.to_string(), context(2)).unwrap();
    }
    assert_eq!(storage.stats().dropped_writes, (WRITES - MOST) as u64);
    assert_eq!(storage.stats().stored_instances, WRITES as u64 + 1);
    controlled.set(Call::Write, Behaviour::Works);
    match storage.flush() {
        Err(StorageError::NotWritten {
            dropped,
            refused: 0,
            ..
        }) => assert_eq!(dropped, (WRITES - MOST) as u64),
        other => panic!("{other:?}"),
    }
    storage.flush().unwrap();
    let there = |n: usize| backend.get(&n.to_string()).unwrap().is_some();
    assert!(there(WRITES - 1) && there(WRITES - MOST));
    assert!(!there(0) && !there(WRITES - MOST - 1));
    assert!(backend.get("in flight").unwrap().is_some());
    assert_eq!(storage.stats().dropped_writes, (WRITES - MOST) as u64);
}

#[test]
fn dropping_the_last_handle_flushes_and_releases_the_backend() {
    let backend = MemoryBackend::new();
    let controlled = ControlledBackend::over(backend.clone());
    let storage = storage(controlled.clone());
    let worker = Worker::with_storage(storage.clone());
    worker.run(|| info_span!("step", workflow.instance_id = ID).in_scope(|| {}));
    drop(storage);
    assert!(!controlled.is_released(), "the layer still holds it");
    worker.close();
    wait_until("the backend is released", || controlled.is_released());
    assert!(backend.get(ID).unwrap().is_some());
    assert!(controlled.calls(Call::Flush) > 0);
}

#[test]
fn dropping_the_last_handle_waits_a_few_seconds_at_most() {
    let controlled = ControlledBackend::new();
    for behaviour in [Behaviour::Fails, Behaviour::Panics] {
        let storage = storage(controlled.clone());
        controlled.set_all(behaviour);
        storage.store(ID, context(1)).unwrap();
        let took = timed(|| drop(storage)).0;
        assert!(took < Duration::from_secs(4), "{behaviour:?}: {took:?}");
        assert!(controlled.is_released(), "{behaviour:?}");
    }
    controlled.set_all(Behaviour::Blocks);
    let storage = patient(controlled.clone())
        .lookup_budget(Duration::from_millis(1))
        .connect_budget(Duration::ZERO)
        .build()
        .unwrap();
    storage.store(ID, context(1)).unwrap();
    storage.get("unknown").unwrap();
    let took = timed(|| drop(storage)).0;
    let expected = Duration::from_secs(4)..Duration::from_secs(10);
    assert!(expected.contains(&took), "{took:?}");
    controlled.set_all(Behaviour::Works);
    wait_until("the threads release the backend", || {
        controlled.is_released()
    });
}

#[test]
fn a_failing_scan_costs_only_the_warm_start() {
    let backend = MemoryBackend::new();
    storage(backend.clone()).store(ID, context(1)).unwrap();
    for behaviour in [Behaviour::Fails, Behaviour::Panics] {
        let controlled = ControlledBackend::warming_up(backend.clone());
        controlled.set(Call::Scan, behaviour);
        let storage = storage(controlled.clone());
        let stats = storage.stats();
        assert_eq!(
            (stats.stored_instances, stats.backend_errors),
            (0, 1),
            "{behaviour:?}"
        );
        assert!(storage.get(ID).unwrap().is_some());
    }
}

#[test]
fn undecodable_records_of_the_backend_are_counted() {
    let controlled = ControlledBackend::new();
    let storage = storage(controlled.clone());
    assert_eq!(storage.stats().malformed, 0);
    controlled.set_malformed(3);
    assert_eq!(storage.stats().malformed, 3);
}

// Inside a runtime with one thread.

#[test]
fn a_single_threaded_runtime_is_not_blocked_for_long() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let backend = MemoryBackend::new();
    let [a, b] = [(); 2].map(|()| {
        let storage = patient(backend.clone()).write_through(true).build();
        Arc::new(Worker::with_storage(storage.unwrap()))
    });
    runtime.block_on(async {
        let first = tokio::spawn({
            let a = a.clone();
            async move {
                a.step("first", Tags::instance(ID));
                tokio::task::yield_now().await;
                a.storage.flush().unwrap();
            }
        });
        first.await.unwrap();
        b.step("second", Tags::instance(ID));
    });
    assert_continues(&b.span("second"), &a.span("first").span_context);

    let controlled = ControlledBackend::new();
    controlled.set_all(Behaviour::Blocks);
    let budget = Duration::from_millis(20);
    let storage = patient(controlled.clone())
        .lookup_budget(budget)
        .connect_budget(Duration::ZERO)
        .build()
        .unwrap();
    let worker = Worker::with_storage(storage);
    runtime.block_on(async {
        let took = timed(|| worker.step("first", Tags::instance(ID))).0;
        assert!(took < budget + SLACK, "{took:?}");
    });
    controlled.set_all(Behaviour::Works);
    runtime.block_on(async { worker.close() });
    wait_until("the backend is released", || controlled.is_released());
}

#[test]
fn records_expired_by_the_storages_clock_are_not_found() {
    let clock = ManualClock::new();
    // The backend's clock is behind.
    let backend = MemoryBackend::new();
    let over = Record::new(context(1), clock.now() - Duration::from_secs(1));
    assert!(
        over.expires_at > SystemTime::now(),
        "the manual clock is ahead"
    );
    backend.write(&[Write::Put(ID.to_owned(), over)]).unwrap();
    let storage = patient(backend).clock(clock).build().unwrap();
    assert_eq!(storage.get(ID).unwrap(), None);
}

#[test]
fn a_process_that_lives_for_one_span_keeps_its_instance_for_the_next() {
    let (backend, clock) = (MemoryBackend::new(), ManualClock::new());
    let process = || {
        let storage = patient(backend.clone()).idle_ttl(24 * HOUR);
        let storage = storage.completed_grace(HOUR).clock(clock.clone());
        Worker::with_storage(storage.build().unwrap())
    };
    let step = |worker: &Worker, status: &str| {
        worker.run(|| {
            info_span!("step", workflow.instance_id = ID, workflow.status = status).in_scope(|| ());
        });
        worker.storage.flush().unwrap();
        worker.trace_of("step")
    };
    let first = step(&process(), "running");
    for _ in 0..4 {
        clock.advance(20 * HOUR);
        assert_eq!(step(&process(), "running"), first);
    }
    // The end is not put off.
    assert_eq!(step(&process(), "completed"), first);
    clock.advance(HOUR - Duration::from_secs(1));
    assert_eq!(step(&process(), "running"), first);
    clock.advance(Duration::from_secs(2));
    assert_ne!(step(&process(), "running"), first);
}

#[test]
fn namespaces_on_one_backend_do_not_meet() {
    let backend = MemoryBackend::new();
    let worker = |namespace: &str| {
        let storage = patient(backend.clone()).namespace(namespace);
        Worker::with_storage(storage.build().unwrap())
    };
    let namespaces = ["", "orders", "orders\u{1d}", "o", "\u{1d}", "orders\u{1f}"];
    // Ids that could be taken for keys of a namespace.
    let ids = [
        ID,
        "orders\u{1d}order-42",
        "\u{1d}order-42",
        "order-42\u{1f}1",
    ];
    let step = |namespace, id| {
        let worker = worker(namespace);
        worker.run(|| info_span!("step", workflow.instance_id = id).in_scope(|| ()));
        worker.storage.flush().unwrap();
        worker.trace_of("step")
    };
    let mut traces = std::collections::HashSet::new();
    for (namespace, id) in namespaces.iter().flat_map(|n| ids.map(|id| (*n, id))) {
        let trace = step(namespace, id);
        assert!(
            traces.insert(trace),
            "{namespace:?} met another with {id:?}"
        );
        assert_eq!(step(namespace, id), trace, "{namespace:?}, {id:?}");
    }
    assert!(worker("orders").storage.cleanup(ID).unwrap());
    assert!(worker("").storage.get(ID).unwrap().is_some());
}

#[test]
fn a_namespace_has_a_bound() {
    let build = |length| {
        WorkflowContextStorage::builder()
            .namespace("n".repeat(length))
            .build()
    };
    assert!(build(256).is_ok());
    assert_eq!(
        build(257).unwrap_err().to_string(),
        "namespace: 257 bytes are too many, the most is 256"
    );
}
