//! One trace is bounded in age and in spans: past the bounds the next span opens a new root, linked to the old one.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Duration;

use crate::support::*;
use opentelemetry_sdk::trace::SpanData;
use tracing_workflow_context::{WorkflowContextStorage, WorkflowContextStorageBuilder};

const ID: &str = "order-42";
const INSTANT: Duration = Duration::from_nanos(1);

fn built(builder: WorkflowContextStorageBuilder) -> WorkflowContextStorage {
    builder.build().expect("valid settings")
}

fn max_spans(spans: u64) -> WorkflowContextStorage {
    built(WorkflowContextStorage::builder().max_spans(spans))
}

/// Runs a test for each way to make spans, with a `max_age` of one hour.
fn for_each_worker_with_max_age_of_an_hour(test: impl Fn(&Worker, &ManualClock)) {
    for_each_via(|via| {
        let clock = ManualClock::new();
        let builder = WorkflowContextStorage::builder().clock(clock.clone());
        let week = HOUR * 24 * 7;
        let storage = built(builder.max_age(HOUR).idle_ttl(2 * week));
        let worker = Worker::via(via, storage);
        worker.run(|| test(&worker, &clock));
    });
}

fn step(worker: &Worker, name: &str) {
    worker.step(name, Tags::instance(ID));
}

/// Asserts that the span opened the trace after the one that `last` opened, and is the stored one.
#[track_caller]
fn assert_next_root(root: &SpanData, nth: i64, last: &SpanData) {
    assert_root(root);
    let links = links(root);
    let (to_last, to_request) = links.split_first().expect("linked to the last trace");
    assert_eq!(*to_last, ("expired".to_owned(), ids(&last.span_context)));
    // A poll's, if it opened in one.
    assert!(to_request.len() <= 1 && to_request.iter().all(|(why, _)| why == "foreign"));
    assert_eq!(generation(root), Some(nth));
}

#[track_caller]
fn assert_stored(worker: &Worker, span: &str) {
    assert_eq!(
        ids(&worker.stored(ID)),
        ids(&worker.span(span).span_context)
    );
}

/// Asserts that the span continues the root, and opens no trace.
#[track_caller]
fn assert_joins(worker: &Worker, span: &str, root: &str) {
    let span = worker.span(span);
    assert_continues(&span, &worker.span(root).span_context);
    assert_eq!(links(&span), []);
    assert_eq!(generation(&span), None);
}

// Age.

#[test]
fn a_trace_older_than_max_age_is_followed_by_a_linked_one() {
    for_each_worker_with_max_age_of_an_hour(|worker, clock| {
        step(worker, "first");
        clock.advance(HOUR);
        step(worker, "at the limit");
        clock.advance(INSTANT);
        step(worker, "second");
        assert_stored(worker, "second");
        clock.advance(HOUR);
        step(worker, "at the second limit");
        clock.advance(INSTANT);
        worker.within("poll", UNTAGGED, || step(worker, "third"));
        step(worker, "in the third");

        assert_joins(worker, "at the limit", "first");
        assert_next_root(&worker.span("second"), 2, &worker.span("first"));
        assert_joins(worker, "at the second limit", "second");
        assert_next_root(&worker.span("third"), 3, &worker.span("second"));
        assert_joins(worker, "in the third", "third");
        assert_eq!(generation(&worker.span("first")), None);
        assert_eq!(worker.forest().trace_count(), 4, "three, and the poller's");
    });
}

#[test]
fn week_long_workflows_do_not_grow_one_unbounded_trace() {
    for_each_worker_with_max_age_of_an_hour(|worker, clock| {
        const HOURS: usize = 7 * 24;
        for _ in 0..HOURS {
            for _ in 0..4 {
                step(worker, "activity");
                clock.advance(HOUR / 4);
            }
            clock.advance(INSTANT);
        }
        let traces = Generations::of(worker);
        assert_eq!(traces.sizes, vec![4; HOURS]);
    });
}

#[test]
fn local_nesting_wins_over_max_age() {
    for_each_worker_with_max_age_of_an_hour(|worker, clock| {
        worker.within("first", Tags::instance(ID), || {
            clock.advance(24 * HOUR);
            worker.within("untagged", UNTAGGED, || step(worker, "nested"));
        });
        step(worker, "second");

        let nested = worker.span("nested");
        assert_nested(&nested, &worker.span("untagged"));
        assert_eq!((links(&nested), generation(&nested)), (vec![], None));
        assert_next_root(&worker.span("second"), 2, &worker.span("first"));
    });
}

#[test]
fn a_clock_that_goes_backwards_ages_no_trace() {
    for_each_worker_with_max_age_of_an_hour(|worker, clock| {
        step(worker, "first");
        clock.rewind(24 * HOUR);
        step(worker, "a day before");
        clock.advance(25 * HOUR);
        step(worker, "an hour after");
        assert_joins(worker, "a day before", "first");
        assert_joins(worker, "an hour after", "first");

        clock.advance(INSTANT);
        step(worker, "second");
        clock.rewind(24 * HOUR);
        step(worker, "in the second");
        assert_next_root(&worker.span("second"), 2, &worker.span("first"));
        assert_joins(worker, "in the second", "second");
    });
}

#[test]
fn unreachable_bounds_have_no_effect() {
    let make = || {
        let builder = WorkflowContextStorage::builder()
            .max_age(Duration::MAX)
            .max_spans(u64::MAX);
        built(builder)
    };
    for_each_worker(make, |worker| {
        step(worker, "first");
        step(worker, "joins");
        assert_joins(worker, "joins", "first");
    });
}

// Number of spans.

#[test]
fn a_trace_of_max_spans_is_followed_by_a_linked_one() {
    for_each_worker(
        || max_spans(3),
        |worker| {
            for name in ["first", "1.2", "1.3", "second", "2.2", "2.3", "third"] {
                worker.within("poll", UNTAGGED, || step(worker, name));
            }
            for (name, root) in [
                ("1.2", "first"),
                ("1.3", "first"),
                ("2.2", "second"),
                ("2.3", "second"),
            ] {
                assert_continues(&worker.span(name), &worker.span(root).span_context);
                assert_eq!(generation(&worker.span(name)), None);
            }
            // The very first span keeps its natural parent.
            assert_eq!(generation(&worker.span("first")), None);
            assert_next_root(&worker.span("second"), 2, &worker.span("first"));
            assert_next_root(&worker.span("third"), 3, &worker.span("second"));
            assert_stored(worker, "third");
        },
    );
}

#[test]
fn local_nesting_wins_over_max_spans_and_is_not_counted() {
    for_each_worker(
        || max_spans(2),
        |worker| {
            worker.within("first", Tags::instance(ID), || {
                (0..100).for_each(|_| step(worker, "nested"));
            });
            worker.within("joins", Tags::instance(ID), || {
                (0..100).for_each(|_| step(worker, "nested in a full trace"));
            });
            step(worker, "second");

            assert_joins(worker, "joins", "first");
            assert_next_root(&worker.span("second"), 2, &worker.span("first"));
            assert_eq!(Generations::of(worker).sizes, [202, 1]);
        },
    );
}

#[test]
fn the_bound_that_is_reached_first_applies_once() {
    for_each_via(|via| {
        let clock = ManualClock::new();
        let builder = WorkflowContextStorage::builder().clock(clock.clone());
        let worker = Worker::via(via, built(builder.max_age(HOUR).max_spans(2)));
        step(&worker, "first");
        step(&worker, "full");
        clock.advance(2 * HOUR);
        step(&worker, "second");
        clock.advance(2 * HOUR);
        step(&worker, "third");
        step(&worker, "in the third");
        step(&worker, "fourth");

        assert_next_root(&worker.span("second"), 2, &worker.span("first"));
        assert_next_root(&worker.span("third"), 3, &worker.span("second"));
        assert_joins(&worker, "in the third", "third");
        assert_next_root(&worker.span("fourth"), 4, &worker.span("third"));
    });
}

#[test]
fn each_run_has_bounds_of_its_own() {
    for_each_worker(
        || max_spans(2),
        |worker| {
            let [run_1, run_2] = ["run-1", "run-2"].map(|run| Tags::instance(ID).run(run));
            worker.step("run-1", run_1);
            worker.step("run-1 is full", run_1);
            worker.step("run-2", run_2);
            worker.step("run-1 again", run_1);
            assert_stored(worker, "run-2");
            worker.step("late in run-1", run_1);
            worker.step("run-2 is full", run_2);
            worker.step("run-2 again", run_2);

            assert_next_root(&worker.span("run-1 again"), 2, &worker.span("run-1"));
            assert_joins(worker, "late in run-1", "run-1 again");
            assert_joins(worker, "run-2 is full", "run-2");
            assert_next_root(&worker.span("run-2 again"), 2, &worker.span("run-2"));
        },
    );
}

#[test]
fn the_next_trace_of_a_run_is_that_runs_also_if_a_span_without_its_run_id_opens_it() {
    for_each_worker(
        || max_spans(2),
        |worker| {
            let [run_1, run_2] = ["run-1", "run-2"].map(|run| Tags::instance(ID).run(run));
            worker.step("run-1", run_1);
            worker.step("run-1 is full", run_1);
            step(worker, "second");
            worker.step("run-2", run_2);
            worker.step("late in run-1", run_1);

            assert_next_root(&worker.span("second"), 2, &worker.span("run-1"));
            let second = ids(&worker.span("second").span_context);
            let run_2 = worker.span("run-2");
            assert_eq!(links(&run_2), [("new_run".to_owned(), second)]);
            assert_joins(worker, "late in run-1", "second");
        },
    );
}

#[test]
fn each_instance_has_bounds_of_its_own() {
    for_each_worker(
        || max_spans(1),
        |worker| {
            worker.step("a", Tags::instance("a"));
            worker.step("b", Tags::instance("b"));
            worker.step("a again", Tags::instance("a"));

            assert_eq!(generation(&worker.span("b")), None);
            assert_eq!(links(&worker.span("b")), []);
            assert_next_root(&worker.span("a again"), 2, &worker.span("a"));
        },
    );
}

#[test]
fn a_hundred_thousand_spans_are_ten_generations_of_ten_thousand() {
    for via in [Via::Layer, Via::Api] {
        let worker = Worker::via(via, max_spans(10_000));
        worker.run(|| (0..100_000).for_each(|_| step(&worker, "step")));
        assert_eq!(
            Generations::of(&worker).sizes,
            [10_000; 10],
            "made via {via:?}"
        );
    }
}

#[test]
fn a_hundred_thousand_spans_from_eight_threads_are_ten_generations() {
    for via in [Via::Layer, Via::Api] {
        let worker = Worker::via(via, max_spans(10_000));
        // The instance is already recorded, so that no thread loses the race to record it.
        step(&worker, "step");
        let opened = AtomicUsize::new(1);
        on_eight_threads(|_| {
            worker.run(|| {
                while opened.fetch_add(1, Ordering::Relaxed) < 100_000 {
                    step(&worker, "step");
                }
            });
        });
        let sizes = Generations::of(&worker).sizes;
        assert_eq!(sizes.len(), 10, "{sizes:?}, made via {via:?}");
        assert_eq!(sizes.iter().sum::<usize>(), 100_000);
        // A thread whose wait for the next root timed out has put its span into the full trace.
        assert!(
            sizes[..9].iter().all(|size| *size >= 10_000),
            "{sizes:?}, made via {via:?}"
        );
    }
}

/// The traces of the only instance, oldest first.
struct Generations {
    sizes: Vec<usize>,
}

impl Generations {
    /// Asserts that the roots are chained by links, the newest first, and that every span is in the trace of one.
    #[track_caller]
    fn of(worker: &Worker) -> Self {
        let spans = worker.spans();
        let mut sizes = HashMap::new();
        for span in &spans {
            *sizes.entry(span.span_context.trace_id()).or_insert(0) += 1;
        }
        let is_root = |span: &&SpanData| span.parent_span_id == opentelemetry::SpanId::INVALID;
        let mut roots: Vec<_> = spans.iter().filter(is_root).collect();
        roots.sort_by_key(|root| generation(root).unwrap_or(1));
        assert_eq!(roots.len(), sizes.len(), "a root for each trace");
        let (first, rest) = roots.split_first().expect("a span");
        assert_eq!(
            (links(first), generation(first)),
            (vec![], None),
            "the first root"
        );
        for (nth, pair) in (2..).zip(roots.windows(2)) {
            assert_next_root(pair[1], nth, pair[0]);
        }
        assert_eq!(
            ids(&worker.stored(ID)),
            ids(&rest.last().unwrap_or(first).span_context)
        );
        Self {
            sizes: roots
                .iter()
                .map(|root| sizes[&root.span_context.trace_id()])
                .collect(),
        }
    }
}

// At once.

fn on_eight_threads(run: impl Fn(usize) + Sync) {
    thread::scope(|scope| {
        for thread in 0..8 {
            let run = &run;
            scope.spawn(move || run(thread));
        }
    });
}

#[test]
fn threads_that_cross_a_bound_at_once_agree_on_one_new_root() {
    const ROUNDS: usize = 100;
    for_each_via(|via| {
        let clock = ManualClock::new();
        let builder = WorkflowContextStorage::builder()
            .clock(clock.clone())
            .idle_ttl(HOUR * 1_000);
        let worker = Worker::via(via, built(builder.max_age(HOUR)));
        step(&worker, "first");
        let at_once = Barrier::new(8);
        on_eight_threads(|thread| {
            for _ in 0..ROUNDS {
                if at_once.wait().is_leader() {
                    clock.advance(HOUR + INSTANT);
                }
                at_once.wait();
                worker.run(|| step(&worker, &thread.to_string()));
            }
        });
        // The roots form one chain, and every span is in one of their traces.
        let sizes = Generations::of(&worker).sizes;
        assert_eq!(sizes.len(), 1 + ROUNDS, "made via {via:?}");
        assert_eq!(sizes.iter().sum::<usize>(), 1 + 8 * ROUNDS);
    });
}

#[test]
fn a_span_does_not_wait_for_a_root_that_never_opens() {
    for_each_via(|via| {
        let (is_opening, opening) = channel();
        let (finish, finished) = channel();
        let finished = Arc::new(Mutex::new(finished));
        let sampler = Hooked(move |name: &str| {
            if name == "second" {
                is_opening.send(()).expect("the test still runs");
                finished
                    .lock()
                    .expect("not poisoned")
                    .recv()
                    .expect("the test still runs");
            }
        });
        let worker = Worker::via_with_sampler(via, max_spans(1), sampler);
        step(&worker, "first");
        let (meanwhile, done) = channel();
        let in_time = thread::scope(|scope| {
            scope.spawn(|| step(&worker, "second"));
            opening.recv().expect("the second root is being opened");
            scope.spawn(|| {
                step(&worker, "meanwhile");
                meanwhile.send(()).expect("the test still runs");
            });
            let in_time = done.recv_timeout(Duration::from_secs(20));
            finish.send(()).expect("the second root waits");
            in_time
        });
        in_time.expect("a span waits for another one's root");
        step(&worker, "third");

        assert_joins(&worker, "meanwhile", "first");
        assert_next_root(&worker.span("second"), 2, &worker.span("first"));
        assert_next_root(&worker.span("third"), 3, &worker.span("second"));
    });
}

#[test]
fn a_context_that_is_stored_while_the_next_root_opens_is_not_overwritten() {
    for_each_via(|via| {
        let store = Arc::new(Mutex::new(None));
        let hook = store.clone();
        let sampler = Hooked(move |name: &str| {
            if let ("second", Some((storage, context))) = (name, hook.lock().unwrap().take()) {
                WorkflowContextStorage::store(&storage, ID, context).expect("a valid id");
            }
        });
        let worker = Worker::via_with_sampler(via, max_spans(1), sampler);
        step(&worker, "first");
        worker.step("other", Tags::instance("other"));
        let other = worker
            .storage
            .get("other")
            .expect("a valid id")
            .expect("recorded");
        *store.lock().unwrap() = Some((worker.storage.clone(), other));
        step(&worker, "second");
        store.lock().unwrap().take();

        assert_stored(&worker, "other");
    });
}

#[test]
fn a_panic_in_the_sampler_does_not_keep_later_spans_from_opening_the_next_root() {
    let sampler = Hooked(|name: &str| assert_ne!(name, "panics", "the sampler's own panic"));
    let worker = Worker::via_with_sampler(Via::Api, max_spans(2), sampler);
    step(&worker, "first");
    step(&worker, "full");
    for _ in 0..3 {
        step(&worker, "panics");
        assert_stored(&worker, "first");
    }
    for name in ["second", "in the second", "third"] {
        step(&worker, name);
    }
    assert_next_root(&worker.span("second"), 2, &worker.span("first"));
    assert_joins(&worker, "in the second", "second");
    assert_next_root(&worker.span("third"), 3, &worker.span("second"));
}

#[test]
fn new_work_of_a_replayed_workflow_opens_the_next_generation_too() {
    for_each_via(|via| {
        let worker = Worker::via(via, max_spans(3));
        worker.run(|| {
            step(&worker, "first");
            for turn in ["second", "third", "fourth", "fifth"] {
                let tags = Tags::instance(ID).replaying(true);
                worker.within("replay", tags, || {
                    worker.step("replayed", UNTAGGED);
                    worker.step(turn, Tags::instance(ID).replaying(false));
                });
            }
        });

        assert_joins(&worker, "second", "first");
        assert_joins(&worker, "third", "first");
        assert_next_root(&worker.span("fourth"), 2, &worker.span("first"));
        assert_joins(&worker, "fifth", "fourth");
    });
}
