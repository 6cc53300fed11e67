//! One trace is bounded in age and in spans: past the bounds the next span opens a new root, linked to the old one.

mod support;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Duration;

use opentelemetry_sdk::trace::SpanData;
use support::*;
use tracing_workflow_context::{WorkflowContextStorage, WorkflowContextStorageBuilder};

const ID: &str = "order-42";
const HOUR: Duration = Duration::from_secs(60 * 60);
const INSTANT: Duration = Duration::from_nanos(1);

fn built(builder: WorkflowContextStorageBuilder) -> WorkflowContextStorage {
    builder.build().expect("valid settings")
}

fn max_spans(spans: u64) -> WorkflowContextStorage {
    built(WorkflowContextStorage::builder().max_spans(spans))
}

/// Runs a test with a bound of one hour in each way to make spans.
fn on_every_stage_with_max_age_of_an_hour(test: impl Fn(&Stage, &ManualClock)) {
    for via in VIAS {
        labelled(&format!("spans made via {via:?}"), || {
            let clock = ManualClock::new();
            let builder = WorkflowContextStorage::builder().clock(clock.clone());
            let week = HOUR * 24 * 7;
            let storage = built(builder.max_age(HOUR).idle_ttl(2 * week));
            let stage = Stage::new(storage, via);
            stage.run(|| test(&stage, &clock));
        });
    }
}

fn step(stage: &Stage, name: &str) {
    stage.step(name, Tags::of(ID));
}

/// The span opened the trace that follows the one which that span opened, and is what is stored now.
#[track_caller]
fn assert_next_root(root: &SpanData, nth: i64, last: &SpanData) {
    assert_root(root);
    assert_eq!(
        links(root),
        [("expired".to_owned(), ids(&last.span_context))]
    );
    assert_eq!(generation(root), Some(nth));
}

#[track_caller]
fn assert_stored(stage: &Stage, span: &str) {
    assert_eq!(ids(&stage.stored(ID)), ids(&stage.span(span).span_context));
}

/// The span continues that one, and opens nothing.
#[track_caller]
fn assert_joins(stage: &Stage, span: &str, root: &str) {
    let span = stage.span(span);
    assert_continues(&span, &stage.span(root).span_context);
    assert_eq!(links(&span), []);
    assert_eq!(generation(&span), None);
}

// Age.

#[test]
fn a_trace_older_than_max_age_is_followed_by_a_linked_one() {
    on_every_stage_with_max_age_of_an_hour(|stage, clock| {
        step(stage, "first");
        clock.advance(HOUR);
        step(stage, "at the limit");
        clock.advance(INSTANT);
        step(stage, "second");
        assert_stored(stage, "second");
        clock.advance(HOUR);
        step(stage, "at the second limit");
        clock.advance(INSTANT);
        stage.within("poll", UNTAGGED, || step(stage, "third"));
        step(stage, "in the third");

        assert_joins(stage, "at the limit", "first");
        assert_next_root(&stage.span("second"), 2, &stage.span("first"));
        assert_joins(stage, "at the second limit", "second");
        assert_next_root(&stage.span("third"), 3, &stage.span("second"));
        assert_joins(stage, "in the third", "third");
        assert_eq!(generation(&stage.span("first")), None);
        assert_eq!(stage.forest().trace_count(), 4, "three, and the poller's");
    });
}

#[test]
fn week_long_workflows_do_not_grow_one_unbounded_trace() {
    on_every_stage_with_max_age_of_an_hour(|stage, clock| {
        const HOURS: usize = 7 * 24;
        for _ in 0..HOURS {
            for _ in 0..4 {
                step(stage, "activity");
                clock.advance(HOUR / 4);
            }
            clock.advance(INSTANT);
        }
        let traces = Generations::of(stage);
        assert_eq!(traces.sizes, vec![4; HOURS]);
    });
}

#[test]
fn local_nesting_wins_over_max_age() {
    on_every_stage_with_max_age_of_an_hour(|stage, clock| {
        stage.within("first", Tags::of(ID), || {
            clock.advance(24 * HOUR);
            stage.within("untagged", UNTAGGED, || step(stage, "nested"));
        });
        step(stage, "second");

        let nested = stage.span("nested");
        assert_nested(&nested, &stage.span("untagged"));
        assert_eq!((links(&nested), generation(&nested)), (vec![], None));
        assert_next_root(&stage.span("second"), 2, &stage.span("first"));
    });
}

#[test]
fn a_clock_that_goes_backwards_makes_no_trace_old() {
    on_every_stage_with_max_age_of_an_hour(|stage, clock| {
        step(stage, "first");
        clock.rewind(24 * HOUR);
        step(stage, "a day before");
        clock.advance(25 * HOUR);
        step(stage, "an hour after");
        assert_joins(stage, "a day before", "first");
        assert_joins(stage, "an hour after", "first");

        clock.advance(INSTANT);
        step(stage, "second");
        clock.rewind(24 * HOUR);
        step(stage, "in the second");
        assert_next_root(&stage.span("second"), 2, &stage.span("first"));
        assert_joins(stage, "in the second", "second");
    });
}

#[test]
fn bounds_that_cannot_be_reached_are_none() {
    let make = || {
        let builder = WorkflowContextStorage::builder()
            .max_age(Duration::MAX)
            .max_spans(u64::MAX);
        built(builder)
    };
    on_every_stage(make, |stage| {
        step(stage, "first");
        step(stage, "joins");
        assert_joins(stage, "joins", "first");
    });
}

// Number of spans.

#[test]
fn a_trace_of_max_spans_is_followed_by_a_linked_one() {
    on_every_stage(
        || max_spans(3),
        |stage| {
            for name in ["first", "1.2", "1.3", "second", "2.2", "2.3", "third"] {
                stage.within("poll", UNTAGGED, || step(stage, name));
            }
            for (name, root) in [
                ("1.2", "first"),
                ("1.3", "first"),
                ("2.2", "second"),
                ("2.3", "second"),
            ] {
                assert_continues(&stage.span(name), &stage.span(root).span_context);
                assert_eq!(generation(&stage.span(name)), None);
            }
            // The first span of all keeps its natural parent.
            assert_eq!(generation(&stage.span("first")), None);
            assert_next_root(&stage.span("second"), 2, &stage.span("first"));
            assert_next_root(&stage.span("third"), 3, &stage.span("second"));
            assert_stored(stage, "third");
        },
    );
}

#[test]
fn local_nesting_wins_over_max_spans_and_is_not_counted() {
    on_every_stage(
        || max_spans(2),
        |stage| {
            stage.within("first", Tags::of(ID), || {
                (0..100).for_each(|_| step(stage, "nested"));
            });
            stage.within("joins", Tags::of(ID), || {
                (0..100).for_each(|_| step(stage, "nested in a full trace"));
            });
            step(stage, "second");

            assert_joins(stage, "joins", "first");
            assert_next_root(&stage.span("second"), 2, &stage.span("first"));
            assert_eq!(Generations::of(stage).sizes, [202, 1]);
        },
    );
}

#[test]
fn whichever_bound_is_reached_first_counts_and_only_once() {
    for via in VIAS {
        let clock = ManualClock::new();
        let builder = WorkflowContextStorage::builder().clock(clock.clone());
        let stage = Stage::new(built(builder.max_age(HOUR).max_spans(2)), via);
        step(&stage, "first");
        step(&stage, "full");
        clock.advance(2 * HOUR);
        step(&stage, "second");
        clock.advance(2 * HOUR);
        step(&stage, "third");
        step(&stage, "in the third");
        step(&stage, "fourth");

        assert_next_root(&stage.span("second"), 2, &stage.span("first"));
        assert_next_root(&stage.span("third"), 3, &stage.span("second"));
        assert_joins(&stage, "in the third", "third");
        assert_next_root(&stage.span("fourth"), 4, &stage.span("third"));
    }
}

#[test]
fn each_run_has_bounds_of_its_own() {
    on_every_stage(
        || max_spans(2),
        |stage| {
            let (run_1, run_2) = (Tags::of(ID).run("run-1"), Tags::of(ID).run("run-2"));
            stage.step("run-1", run_1);
            stage.step("run-1 is full", run_1);
            stage.step("run-2", run_2);
            stage.step("run-1 again", run_1);
            assert_stored(stage, "run-2");
            stage.step("late in run-1", run_1);
            stage.step("run-2 is full", run_2);
            stage.step("run-2 again", run_2);

            assert_next_root(&stage.span("run-1 again"), 2, &stage.span("run-1"));
            assert_joins(stage, "late in run-1", "run-1 again");
            assert_joins(stage, "run-2 is full", "run-2");
            assert_next_root(&stage.span("run-2 again"), 2, &stage.span("run-2"));
        },
    );
}

#[test]
fn each_instance_has_bounds_of_its_own() {
    on_every_stage(
        || max_spans(1),
        |stage| {
            stage.step("a", Tags::of("a"));
            stage.step("b", Tags::of("b"));
            stage.step("a again", Tags::of("a"));

            assert_eq!(generation(&stage.span("b")), None);
            assert_eq!(links(&stage.span("b")), []);
            assert_next_root(&stage.span("a again"), 2, &stage.span("a"));
        },
    );
}

#[test]
fn a_hundred_thousand_spans_are_ten_generations_of_ten_thousand() {
    for via in [Via::Layer, Via::Api] {
        let stage = Stage::new(max_spans(10_000), via);
        stage.run(|| (0..100_000).for_each(|_| step(&stage, "step")));
        assert_eq!(
            Generations::of(&stage).sizes,
            [10_000; 10],
            "made via {via:?}"
        );
    }
}

#[test]
fn a_hundred_thousand_spans_from_eight_threads_are_ten_generations() {
    for via in [Via::Layer, Via::Api] {
        let stage = Stage::new(max_spans(10_000), via);
        // With the instance known, no thread loses the race for recording it.
        step(&stage, "step");
        let opened = AtomicUsize::new(1);
        on_eight_threads(|_| {
            stage.run(|| {
                while opened.fetch_add(1, Ordering::Relaxed) < 100_000 {
                    step(&stage, "step");
                }
            });
        });
        let sizes = Generations::of(&stage).sizes;
        assert_eq!(sizes.len(), 10, "{sizes:?}, made via {via:?}");
        assert_eq!(sizes.iter().sum::<usize>(), 100_000);
        // A thread that waited in vain for another to open the next root has put its span into the full trace.
        assert!(
            sizes[..9].iter().all(|size| *size >= 10_000),
            "{sizes:?}, made via {via:?}"
        );
    }
}

/// The traces of the one instance, in the order in which they follow each other.
struct Generations {
    sizes: Vec<usize>,
}

impl Generations {
    /// Asserts that the roots are chained by links, the newest first, and that every span is in the trace of one.
    #[track_caller]
    fn of(stage: &Stage) -> Self {
        let spans = stage.spans();
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
            ids(&stage.stored(ID)),
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
    for via in VIAS {
        let clock = ManualClock::new();
        let builder = WorkflowContextStorage::builder()
            .clock(clock.clone())
            .idle_ttl(HOUR * 1_000);
        let stage = Stage::new(built(builder.max_age(HOUR)), via);
        step(&stage, "first");
        let at_once = Barrier::new(8);
        on_eight_threads(|thread| {
            for _ in 0..ROUNDS {
                if at_once.wait().is_leader() {
                    clock.advance(HOUR + INSTANT);
                }
                at_once.wait();
                stage.run(|| step(&stage, &thread.to_string()));
            }
        });
        // Chained, each by one root, and no span is anywhere else.
        let sizes = Generations::of(&stage).sizes;
        assert_eq!(sizes.len(), 1 + ROUNDS, "made via {via:?}");
        assert_eq!(sizes.iter().sum::<usize>(), 1 + 8 * ROUNDS);
    }
}

#[test]
fn a_span_does_not_wait_for_a_root_that_does_not_open() {
    for via in VIAS {
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
        let stage = Stage::with(max_spans(1), via, sampler);
        step(&stage, "first");
        let (meanwhile, done) = channel();
        let in_time = thread::scope(|scope| {
            scope.spawn(|| step(&stage, "second"));
            opening.recv().expect("the second root is being opened");
            scope.spawn(|| {
                step(&stage, "meanwhile");
                meanwhile.send(()).expect("the test still runs");
            });
            let in_time = done.recv_timeout(Duration::from_secs(20));
            finish.send(()).expect("the second root waits");
            in_time
        });
        in_time.expect("a span waits for another one's root");
        step(&stage, "third");

        assert_joins(&stage, "meanwhile", "first");
        assert_next_root(&stage.span("second"), 2, &stage.span("first"));
        assert_next_root(&stage.span("third"), 3, &stage.span("second"));
    }
}

#[test]
fn a_context_that_is_stored_while_the_next_root_opens_is_not_overwritten() {
    for via in VIAS {
        let store = Arc::new(Mutex::new(None));
        let hook = store.clone();
        let sampler = Hooked(move |name: &str| {
            if let ("second", Some((storage, context))) = (name, hook.lock().unwrap().take()) {
                WorkflowContextStorage::store(&storage, ID, context).expect("a valid id");
            }
        });
        let stage = Stage::with(max_spans(1), via, sampler);
        step(&stage, "first");
        stage.step("other", Tags::of("other"));
        let other = stage
            .storage
            .get("other")
            .expect("a valid id")
            .expect("recorded");
        *store.lock().unwrap() = Some((stage.storage.clone(), other));
        step(&stage, "second");
        store.lock().unwrap().take();

        assert_stored(&stage, "other");
    }
}

#[test]
fn a_panic_in_the_sampler_does_not_keep_later_spans_from_opening_the_next_root() {
    let sampler = Hooked(|name: &str| assert_ne!(name, "panics", "the sampler's own panic"));
    let stage = Stage::with(max_spans(2), Via::Api, sampler);
    step(&stage, "first");
    step(&stage, "full");
    for _ in 0..3 {
        let panicked = catch_unwind(AssertUnwindSafe(|| step(&stage, "panics")));
        panicked.expect_err("the sampler panics");
        assert_stored(&stage, "first");
    }
    for name in ["second", "in the second", "third"] {
        step(&stage, name);
    }
    assert_next_root(&stage.span("second"), 2, &stage.span("first"));
    assert_joins(&stage, "in the second", "second");
    assert_next_root(&stage.span("third"), 3, &stage.span("second"));
}

#[test]
fn new_work_of_a_replayed_workflow_opens_the_next_generation_too() {
    for via in VIAS {
        let stage = Stage::new(max_spans(3), via);
        stage.run(|| {
            step(&stage, "first");
            for turn in ["second", "third", "fourth", "fifth"] {
                let tags = Tags::of(ID).replaying(true);
                stage.within("replay", tags, || {
                    stage.step("replayed", UNTAGGED);
                    stage.step(turn, Tags::of(ID).replaying(false));
                });
            }
        });

        assert_joins(&stage, "second", "first");
        assert_joins(&stage, "third", "first");
        assert_next_root(&stage.span("fourth"), 2, &stage.span("first"));
        assert_joins(&stage, "fifth", "fourth");
    }
}
