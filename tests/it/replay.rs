//! Replayed code exports no span again, and work that it newly schedules joins the recorded trace.

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Duration;

use crate::support::*;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    FutureExt as _, Span as _, SpanBuilder, SpanContext, TraceContextExt as _, Tracer as _,
    TracerProvider as _,
};
use opentelemetry::{Context, KeyValue, SpanId};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, SpanData, SpanProcessor};
use tracing::field::Empty;
use tracing::{Instrument as _, Span, error, info, info_span, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{
    BuildError, Continuation, Engine, Relation, WorkflowContext, WorkflowContextStorage,
};

const ID: &str = "order-42";

fn live() -> Tags<'static> {
    Tags::instance(ID)
}

fn replay() -> Tags<'static> {
    live().replaying(true)
}

/// The tags of new work inside a replay.
fn new_work() -> Tags<'static> {
    UNTAGGED.replaying(false)
}

/// Records the workflow, and returns its span.
fn recorded(worker: &Worker) -> SpanContext {
    worker.step("workflow", live());
    worker.stored(ID)
}

#[track_caller]
fn assert_exported(worker: &Worker, names: &[&str]) {
    assert_eq!(worker.names(), names, "in\n{}", worker.forest());
}

// Nothing is exported and nothing recorded.

#[test]
fn replays_do_not_multiply_spans() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        for _ in 0..13 {
            worker.within("replay", replay(), || worker.step("activity", UNTAGGED));
        }
        assert_exported(worker, &["workflow"]);
        assert_eq!(ids(&worker.stored(ID)), ids(&workflow));
        let stats = worker.storage.stats();
        assert_eq!((stats.replayed, stats.stored_instances), (26, 1));
    });
}

#[test]
fn a_replay_of_an_unknown_instance_exports_and_records_nothing() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        for tags in [replay(), UNTAGGED.replaying(true)] {
            worker.within("replay", tags, || {
                worker.within("untagged", UNTAGGED, || worker.step("tagged", live()));
            });
        }
        worker.within("poll", UNTAGGED, || {
            worker.within("replay", replay(), || worker.step("untagged", UNTAGGED));
            // The replayed span has the poller's ids.
            worker.step("polled", UNTAGGED);
        });
        assert_exported(worker, &["poll", "polled"]);
        assert_eq!(worker.storage.instance_ids(), [""; 0]);
        assert_eq!(worker.storage.stats().replayed, 8);

        worker.step("workflow", live());
        assert_root(&worker.span("workflow"));
    });
}

#[test]
fn new_work_in_a_replay_of_an_unknown_instance_is_exported_as_without_the_replay() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let turn = worker.open("replay", replay());
        turn.inside(|| {
            worker.step("new", new_work());
            turn.record_replaying(false);
            worker.step("caught up", UNTAGGED);
            worker.step("first", live());
        });
        drop(turn);
        worker.within("poll", UNTAGGED, || {
            worker.within("replay", Tags::instance("polled").replaying(true), || {
                worker.step("new in poll", new_work());
            });
        });
        assert_exported(
            worker,
            &["caught up", "first", "new", "new in poll", "poll"],
        );
        for name in ["caught up", "first", "new"] {
            assert_root(&worker.span(name));
        }
        assert_eq!(
            ids(&worker.stored(ID)),
            ids(&worker.span("first").span_context)
        );
        assert_nested(&worker.span("new in poll"), &worker.span("poll"));
    });
}

#[test]
fn untagged_descendants_of_a_replay_are_not_exported_at_any_depth() {
    const DEPTH: usize = 50;
    fn descend(worker: &Worker, depth: usize) {
        if depth > 0 {
            worker.within("descendant", UNTAGGED, || descend(worker, depth - 1));
        } else {
            worker.step("new", new_work());
        }
    }
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        worker.within("replay", replay(), || descend(worker, DEPTH));
        assert_exported(worker, &["new", "workflow"]);
        assert_child_of(&worker.span("new"), &workflow);
        assert_eq!(worker.storage.stats().replayed, 1 + DEPTH as u64);
    });
}

#[test]
fn tracing_and_opentelemetry_spans_mixed_beneath_a_replay_are_not_exported() {
    fn descend(worker: &Worker, vias: &[Via]) {
        match vias.split_first() {
            Some((via, rest)) => {
                let span = worker.open_via(*via, "descendant", UNTAGGED);
                span.inside(|| descend(worker, rest));
            }
            None => {
                worker
                    .open_via(Via::Layer, "new in tracing", new_work())
                    .inside(|| ());
                worker
                    .open_via(Via::Api, "new in opentelemetry", new_work())
                    .inside(|| ());
            }
        }
    }
    for outermost in [Via::Layer, Via::Api] {
        for vias in [
            [Via::Layer, Via::Api, Via::Layer],
            [Via::Api, Via::Layer, Via::Api],
        ] {
            let worker = Worker::with_storage(WorkflowContextStorage::new());
            let workflow = recorded(&worker);
            let replay = worker.open_via(outermost, "replay", replay());
            worker.run(|| replay.inside(|| descend(&worker, &vias)));
            drop(replay);

            assert_exported(
                &worker,
                &["new in opentelemetry", "new in tracing", "workflow"],
            );
            assert_child_of(&worker.span("new in tracing"), &workflow);
            assert_child_of(&worker.span("new in opentelemetry"), &workflow);
        }
    }
}

#[test]
fn opentelemetry_spans_beneath_a_replay_in_tracing_without_activation_are_not_exported() {
    let worker = Worker::via(Via::LayerWithoutActivation, WorkflowContextStorage::new());
    let workflow = recorded(&worker);
    let replay = worker.open("replay", replay());
    replay.inside(|| {
        let _explicitly = replay.otel_context().attach();
        let descendant = worker.open_via(Via::Api, "descendant", UNTAGGED);
        descendant.inside(|| worker.open_via(Via::Api, "new", new_work()).inside(|| ()));
    });
    assert_exported(&worker, &["new", "workflow"]);
    assert_child_of(&worker.span("new"), &workflow);
}

#[test]
fn a_tagged_descendant_of_a_replay_is_a_replay_of_its_own_instance() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        worker.step("child workflow", Tags::instance("child").child_of(ID));
        let child = worker.stored("child");
        worker.within("replay", replay(), || {
            worker.within("same instance", live(), || worker.step("new", new_work()));
            worker.within("child again", Tags::instance("child").child_of(ID), || {
                worker.step("new in child", new_work());
            });
            worker.within(
                "unknown child",
                Tags::instance("unknown").child_of(ID),
                || {
                    worker.step("new in unknown child", new_work());
                },
            );
        });
        assert_exported(
            worker,
            &[
                "child workflow",
                "new",
                "new in child",
                "new in unknown child",
                "workflow",
            ],
        );
        assert_child_of(&worker.span("new"), &workflow);
        assert_child_of(&worker.span("new in child"), &child);
        assert_child_of(&worker.span("new in unknown child"), &workflow);
        assert_eq!(worker.storage.stats().stored_instances, 2);
    });
}

#[test]
fn a_replay_suppresses_nothing_but_its_descendants() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        worker.within("poll", UNTAGGED, || {
            let replaying = worker.open("replay", replay());
            replaying.inside(|| worker.step("replayed", UNTAGGED));
            worker.step("sibling", UNTAGGED);
            worker.step("sibling activity", live());
            replaying.inside(|| worker.open_root("explicit root", ID).inside(|| ()));
        });
        worker.step("after", live());

        assert_exported(
            worker,
            &[
                "after",
                "explicit root",
                "poll",
                "sibling",
                "sibling activity",
                "workflow",
            ],
        );
        assert_nested(&worker.span("sibling"), &worker.span("poll"));
        for name in ["sibling activity", "explicit root", "after"] {
            assert_child_of(&worker.span(name), &workflow);
        }
    });
}

// New work.

#[test]
fn work_newly_scheduled_inside_a_replay_attaches_to_the_recorded_span() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        worker.within("poll", UNTAGGED, || {
            worker.within("replay", replay(), || {
                worker.step("new", new_work());
                worker.within("new and tagged", live().replaying(false), || {
                    worker.step("nested in new", UNTAGGED);
                });
                worker.within("replayed", UNTAGGED, || {
                    worker.step("new below", new_work())
                });
            });
        });
        for name in ["new", "new and tagged", "new below"] {
            assert_child_of(&worker.span(name), &workflow);
            assert_eq!(links(&worker.span(name)), []);
        }
        assert_nested(
            &worker.span("nested in new"),
            &worker.span("new and tagged"),
        );
        assert_eq!(
            worker.spans().len(),
            6,
            "with the workflow and the poller:\n{}",
            worker.forest()
        );
        assert_eq!(worker.storage.stats().replayed, 2);
    });
}

#[test]
fn work_opened_after_the_replay_has_caught_up_attaches_to_the_recorded_span() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        let turn = worker.open("replay", replay());
        turn.inside(|| {
            worker.step("replayed", UNTAGGED);
            turn.record_replaying(false);
            worker.within("new", UNTAGGED, || worker.step("nested in new", UNTAGGED));
            worker.step("new and tagged", live());
            turn.record_replaying(true);
            worker.step("replayed again", UNTAGGED);
        });
        drop(turn);

        assert_exported(
            worker,
            &["nested in new", "new", "new and tagged", "workflow"],
        );
        assert_child_of(&worker.span("new"), &workflow);
        assert_child_of(&worker.span("new and tagged"), &workflow);
        assert_nested(&worker.span("nested in new"), &worker.span("new"));
        assert_eq!(ids(&worker.stored(ID)), ids(&workflow));
        assert_eq!(worker.storage.stats().replayed, 3);
    });
}

#[test]
fn work_opened_after_the_replay_has_caught_up_is_exported_below_a_replayed_descendant_too() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        let turn = worker.open("replay", replay());
        turn.inside(|| {
            worker.within("helper", UNTAGGED, || {
                worker.within("deeper helper", UNTAGGED, || {
                    worker.step("replayed", UNTAGGED);
                    turn.record_replaying(false);
                    worker.step("new", UNTAGGED);
                });
            });
        });
        drop(turn);

        assert_exported(worker, &["new", "workflow"]);
        assert_child_of(&worker.span("new"), &workflow);
    });
}

#[test]
fn a_replay_of_an_old_run_uses_the_span_of_that_run() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        for run_id in ["run-1", "run-2"] {
            worker.step(run_id, live().run(run_id));
        }
        let latest = worker.stored(ID);
        for run_id in ["run-1", "run-2"] {
            worker.within("replay", replay().run(run_id), || {
                worker.step(&format!("new in {run_id}"), new_work());
            });
        }
        worker.within("unknown run", replay().run("run-3"), || {
            worker.step("replayed", UNTAGGED)
        });

        assert_exported(worker, &["new in run-1", "new in run-2", "run-1", "run-2"]);
        for run_id in ["run-1", "run-2"] {
            assert_continues(
                &worker.span(&format!("new in {run_id}")),
                &worker.span(run_id).span_context,
            );
        }
        assert_eq!(
            ids(&worker.stored(ID)),
            ids(&latest),
            "a replay began a run"
        );
    });
}

#[test]
fn replays_do_not_count_towards_max_spans() {
    let make = || {
        let builder = WorkflowContextStorage::builder().max_spans(2);
        builder.build().expect("a valid setting")
    };
    for_each_worker(make, |worker| {
        let workflow = recorded(worker);
        for _ in 0..10 {
            worker.within("replay", replay(), || worker.step("replayed", live()));
        }
        worker.step("second and last", live());
        worker.step("next trace", live());

        assert_child_of(&worker.span("second and last"), &workflow);
        assert_root(&worker.span("next trace"));
    });
}

// The flag.

#[test]
fn replaying_is_a_bool_or_its_text() {
    /// The same span, tagged `workflow.replaying` in every form.
    macro_rules! in_every_form {
        ($name:literal, $truth:literal) => {
            [
                info_span!($name, workflow.instance_id = ID, workflow.replaying = $truth),
                info_span!($name, workflow.instance_id = ID, workflow.replaying = %$truth),
                info_span!($name, workflow.instance_id = ID, workflow.replaying = ?$truth),
                info_span!($name, workflow.instance_id = ID, workflow.replaying = stringify!($truth)),
                info_span!($name, workflow.instance_id = ID, workflow.replaying = %stringify!($truth)),
                info_span!($name, workflow.instance_id = ID, workflow.replaying = ?stringify!($truth)),
                info_span!($name, workflow.instance_id = ID, workflow.replaying = stringify!($truth).to_uppercase()),
            ]
        };
    }
    for worker in both_activations(WorkflowContextStorage::new) {
        worker.run(|| {
            for (form, span) in in_every_form!("replay", true).into_iter().enumerate() {
                span.in_scope(|| info_span!("replayed").in_scope(|| ()));
                drop(span);
                assert_eq!(
                    worker.spans().len(),
                    0,
                    "form {form} of true was not understood"
                );
            }
            let replaying = info_span!("replay", workflow.replaying = true);
            for span in replaying.in_scope(|| in_every_form!("live", false)) {
                span.in_scope(|| ());
            }
        });
        let live = worker.spans();
        assert_eq!(live.len(), 7, "a form of false was not understood");
    }
}

#[test]
fn a_value_that_is_not_true_is_not_a_replay() {
    let worker = Worker::new();
    worker.run(|| {
        let id = ID;
        info_span!(
            "text",
            workflow.instance_id = id,
            workflow.replaying = "maybe"
        )
        .in_scope(|| ());
        info_span!("empty", workflow.instance_id = id, workflow.replaying = "").in_scope(|| ());
        info_span!("number", workflow.instance_id = id, workflow.replaying = 1).in_scope(|| ());
        info_span!(
            "not yet",
            workflow.instance_id = id,
            workflow.replaying = Empty
        )
        .in_scope(|| ());
    });
    assert_eq!(worker.spans().len(), 4, "{}", worker.forest());
    assert_eq!(worker.storage.stats().replayed, 0);
}

#[test]
fn a_custom_replay_field_works_beside_the_reserved_one() {
    let make = || {
        let builder = WorkflowContextStorage::builder().replay_field("my.replaying");
        builder.build().expect("a valid setting")
    };
    for worker in both_activations(make) {
        worker.run(|| {
            let id = ID;
            info_span!("workflow", workflow.instance_id = id, my.replaying = false).in_scope(|| ());
            let turn = info_span!("replay", workflow.instance_id = id, my.replaying = true);
            turn.in_scope(|| {
                info_span!("replayed").in_scope(|| ());
                info_span!("new", my.replaying = false).in_scope(|| ());
                turn.record("my.replaying", false);
                info_span!("caught up").in_scope(|| ());
            });
            info_span!(
                "reserved",
                workflow.instance_id = id,
                workflow.replaying = true
            )
            .in_scope(|| ());
        });
        let workflow = worker.span("workflow").span_context;
        assert_continues(&worker.span("new"), &workflow);
        assert_continues(&worker.span("caught up"), &workflow);
        assert_eq!(worker.spans().len(), 3, "{}", worker.forest());
    }
    let worker = Worker::with_storage(WorkflowContextStorage::new());
    worker.run(|| {
        info_span!("not named", workflow.instance_id = ID, my.replaying = true).in_scope(|| ())
    });
    assert_exported(&worker, &["not named"]);
}

#[test]
fn a_held_replay_whose_id_is_recorded_uses_the_recorded_span() {
    for via in [Via::Layer, Via::LayerWithoutActivation] {
        let worker = Worker::via(via, WorkflowContextStorage::new());
        let workflow = recorded(&worker);
        worker.run(|| {
            let turn = info_span!(
                "replay",
                workflow.instance_id = Empty,
                workflow.replaying = Empty
            );
            turn.in_scope(|| {
                turn.record("workflow.replaying", true);
                turn.record("workflow.instance_id", ID);
                worker.step("replayed", UNTAGGED);
                worker.step("new", new_work());
            });
        });
        assert_exported(&worker, &["new", "workflow"]);
        assert_child_of(&worker.span("new"), &workflow);
        assert_eq!(worker.storage.stats().late, 0);
    }
}

#[test]
fn a_started_replay_whose_id_is_recorded_exports_and_records_nothing() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        for (id, recorded_before) in [(ID, true), ("unknown", false)] {
            if recorded_before {
                recorded(worker);
            }
            let turn = worker.open("replay", Tags::awaiting_id().replaying(true));
            turn.inside(|| {
                worker.step("replayed", UNTAGGED);
                turn.record_instance_id(id);
                worker.step("replayed after", UNTAGGED);
            });
        }
        assert_exported(worker, &["workflow"]);
        assert_eq!(worker.storage.instance_ids(), [ID]);
        assert_eq!(worker.storage.stats().replayed, 6);
    });
}

// Contexts that are attached or set by hand inside a replay.

/// The spans that are run again on each turn.
const STEPS: usize = 10;

/// A way to open spans beneath a context that is not the one of the span around them.
type ByHand = fn(&Worker, &str);

const BY_HAND: [(&str, ByHand); 5] = [
    ("attached around all", |worker, name| {
        let _attached = context_of(worker).attach();
        (0..STEPS).for_each(|_| worker.step(name, UNTAGGED));
    }),
    (
        "attached around each, with spans beneath",
        |worker, name| {
            for _ in 0..STEPS / 2 {
                let _attached = context_of(worker).attach();
                worker.within(name, live(), || {
                    let _attached = context_of(worker).attach();
                    worker.step(name, UNTAGGED);
                });
            }
        },
    ),
    ("set as the parent", |worker, name| {
        for _ in 0..STEPS / 2 {
            let span = info_span!("step", otel.name = name);
            span.set_parent(context_of(worker)).unwrap();
            span.in_scope(|| worker.step(name, UNTAGGED));
        }
    }),
    (
        "set as the parent of a tagged span that is never entered",
        |worker, name| {
            for _ in 0..STEPS {
                let span = info_span!("step", otel.name = name, workflow.instance_id = ID);
                span.set_parent(context_of(worker)).unwrap();
            }
        },
    ),
    ("of a future", |worker, name| {
        let steps = async {
            for _ in 0..STEPS / 2 {
                tokio::task::yield_now().await;
                worker.step(name, live());
                let span = info_span!("step", otel.name = name);
                async {}
                    .with_context(context_of(worker))
                    .instrument(span)
                    .await;
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(steps.with_context(context_of(worker)));
    }),
];

/// The context of the workflow, as the README attaches it.
fn context_of(worker: &Worker) -> Context {
    worker.storage.get(ID).unwrap().expect("recorded").to_otel()
}

const LAYERS: [Via; 2] = [Via::Layer, Via::LayerWithoutActivation];

/// Runs a test on a new worker with and without context activation, within the worker's subscriber.
fn for_each_layer(make: impl Fn() -> WorkflowContextStorage, test: impl Fn(&Worker)) {
    for via in LAYERS {
        labelled(&format!("spans made via {via:?}"), || {
            let worker = Worker::via(via, make());
            worker.run(|| test(&worker));
        });
    }
}

#[test]
fn of_10_spans_beneath_a_context_that_is_attached_or_set_by_hand_each_replay_exports_none() {
    const TURNS: usize = 4;
    for (way, steps) in BY_HAND {
        for_each_layer(WorkflowContextStorage::new, |worker| {
            labelled(way, || {
                let workflow = recorded(worker);
                for turn in 0..TURNS {
                    worker.within("replay", replay(), || match turn % 2 {
                        0 => steps(worker, "replayed"),
                        _ => worker.within("helper", UNTAGGED, || steps(worker, "replayed")),
                    });
                }
                assert_exported(worker, &["workflow"]);
                assert_eq!(ids(&worker.stored(ID)), ids(&workflow));
                let helpers = TURNS / 2;
                let replayed = TURNS * (1 + STEPS) + helpers;
                assert_eq!(worker.storage.stats().replayed, replayed as u64);
            });
        });
    }
}

#[test]
fn on_another_thread_children_of_a_replay_are_judged_by_their_parent_in_tracing_too() {
    for_each_layer(WorkflowContextStorage::new, |worker| {
        recorded(worker);
        let turn = worker.open("replay", replay());
        for enters_first in [false, true] {
            if enters_first {
                turn.inside(|| ());
            }
            thread::scope(|scope| {
                scope.spawn(|| {
                    worker.run(|| {
                        let parent = turn.tracing();
                        let child = info_span!(parent: parent, "child");
                        child.set_parent(context_of(worker)).unwrap();
                        let _attached = context_of(worker).attach();
                        child.in_scope(|| {
                            let _attached = context_of(worker).attach();
                            worker.step("grandchild", live());
                        });
                    });
                });
            });
        }
        drop(turn);
        assert_exported(worker, &["workflow"]);
        assert_eq!(worker.storage.stats().replayed, 5);
    });
}

#[test]
fn past_the_replay_a_context_attached_or_set_by_hand_is_the_parent_again() {
    for_each_layer(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        let request = remote(0xf0, 0xf1);
        let by_hand = || Context::new().with_remote_span_context(request.clone());
        let turn = worker.open("replay", replay());
        turn.inside(|| {
            // It is new work by its own flag.
            let new = info_span!("new", workflow.replaying = false);
            new.set_parent(by_hand()).unwrap();
            new.in_scope(|| {
                let _attached = by_hand().attach();
                worker.step("in new", UNTAGGED);
            });
            // Opened within the replay, and started past it.
            let span = info_span!("caught up");
            span.set_parent(by_hand()).unwrap();
            turn.record_replaying(false);
            span.in_scope(|| worker.step("beneath", UNTAGGED));
            let tagged = info_span!("tagged", workflow.instance_id = ID);
            tagged.set_parent(by_hand()).unwrap();
            tagged.in_scope(|| ());
        });
        drop(turn);
        assert_exported(
            worker,
            &[
                "beneath",
                "caught up",
                "in new",
                "new",
                "tagged",
                "workflow",
            ],
        );
        for name in ["new", "caught up"] {
            assert_continues(&worker.span(name), &request);
        }
        assert_nested(&worker.span("beneath"), &worker.span("caught up"));
        let tagged = worker.span("tagged");
        assert_child_of(&tagged, &workflow);
        assert_eq!(links(&tagged), [("foreign".to_owned(), ids(&request))]);
    });
}

#[test]
fn new_work_through_the_opentelemetry_api_inside_a_replay_keeps_its_children_in_tracing() {
    for_each_layer(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        let turn = worker.open("replay", replay());
        turn.inside(|| {
            let _within = turn.otel_context().attach();
            let new = worker.open_via(Via::Api, "new", new_work());
            new.inside(|| {
                let nested = worker.open_via(Via::Api, "nested", UNTAGGED);
                nested.inside(|| {
                    // Without activation, `tracing` knows of no span in between.
                    let child = info_span!("child");
                    child.set_parent(Context::current()).unwrap();
                    child.in_scope(|| ());
                });
            });
        });
        drop(turn);
        assert_exported(worker, &["child", "nested", "new", "workflow"]);
        assert_child_of(&worker.span("new"), &workflow);
        assert_nested(&worker.span("nested"), &worker.span("new"));
        assert_nested(&worker.span("child"), &worker.span("nested"));
    });
}

#[test]
fn in_tracing_beneath_a_replay_through_the_opentelemetry_api_an_attached_context_exports_nothing() {
    for_each_layer(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        let turn = worker.open_via(Via::Api, "replay", replay());
        turn.inside(|| {
            worker.within("replayed", UNTAGGED, || {
                let _attached = context_of(worker).attach();
                worker.step("replayed", live());
                worker.step("new", new_work());
            });
        });
        drop(turn);
        assert_exported(worker, &["new", "workflow"]);
        assert_child_of(&worker.span("new"), &workflow);
        assert_eq!(worker.storage.stats().replayed, 3);
    });
}

#[test]
fn a_held_span_inside_a_held_one_is_replayed_with_it_whatever_parent_is_set_by_hand() {
    for_each_layer(WorkflowContextStorage::new, |worker| {
        recorded(worker);
        let awaiting = || info_span!("awaiting", workflow.instance_id = Empty);
        worker.within("replay", replay(), || {
            let outer = awaiting();
            outer.in_scope(|| {
                let inner = awaiting();
                inner.set_parent(context_of(worker)).unwrap();
                drop(inner.context());
            });
        });
        assert_exported(worker, &["workflow"]);
        assert_eq!(worker.storage.stats().replayed, 3);
    });
}

#[test]
fn spans_that_have_nothing_to_do_with_a_replay_keep_a_parent_that_is_set_by_hand() {
    for_each_layer(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        let turn = worker.open("replay", replay());
        turn.inside(|| ());
        worker.within("poll", UNTAGGED, || {
            let span = info_span!("by hand");
            span.set_parent(context_of(worker)).unwrap();
            span.in_scope(|| worker.step("nested", UNTAGGED));
        });
        turn.inside(|| info_span!(parent: None, "root").in_scope(|| ()));
        drop(turn);
        assert_exported(worker, &["by hand", "nested", "poll", "root", "workflow"]);
        assert_continues(&worker.span("by hand"), &workflow);
        assert_nested(&worker.span("nested"), &worker.span("by hand"));
        assert_root(&worker.span("root"));
    });
}

// A flag that is recorded in the body.

/// In each order in which a span can learn its id and its flag, before it is entered or after.
const ORDERS: [[&str; 2]; 2] = [
    ["workflow.instance_id", "workflow.replaying"],
    ["workflow.replaying", "workflow.instance_id"],
];

#[test]
fn a_flag_recorded_beside_a_late_id_counts_in_either_order() {
    for (order, is_entered) in ORDERS
        .iter()
        .flat_map(|order| [(order, false), (order, true)])
    {
        for_each_layer(WorkflowContextStorage::new, |worker| {
            labelled(&format!("{order:?}, entered before {is_entered}"), || {
                let workflow = recorded(worker);
                let (id, flag) = (Empty, Empty);
                let turn = info_span!("t", workflow.instance_id = id, workflow.replaying = flag);
                let record = || {
                    for field in order {
                        match *field {
                            "workflow.replaying" => turn.record(*field, true),
                            _ => turn.record(*field, ID),
                        };
                    }
                };
                if !is_entered {
                    record();
                }
                turn.in_scope(|| {
                    if is_entered {
                        record();
                    }
                    worker.step("replayed", UNTAGGED);
                    let _attached = context_of(worker).attach();
                    worker.step("replayed too", live());
                    worker.step("new", new_work());
                });
                drop(turn);
                assert_exported(worker, &["new", "workflow"]);
                assert_child_of(&worker.span("new"), &workflow);
                assert_eq!(worker.storage.stats().replayed, 3);
            });
        });
    }
}

#[test]
fn a_span_that_never_records_its_flag_is_real() {
    for_each_layer(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        for child in [true, false] {
            let (id, flag) = (Empty, Empty);
            let turn = info_span!("t", workflow.instance_id = id, workflow.replaying = flag);
            turn.in_scope(|| {
                turn.record("workflow.instance_id", ID);
                if child {
                    worker.step("child", UNTAGGED);
                }
            });
        }
        assert_exported(worker, &["child", "t", "t", "workflow"]);
        for turn in worker.spans().iter().filter(|span| span.name == "t") {
            assert_child_of(turn, &workflow);
        }
    });
}

#[test]
fn once_a_span_has_started_true_replays_what_is_opened_beneath_until_false() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let turn = worker.open("turn", live());
        turn.inside(|| {
            worker.step("before", UNTAGGED);
            let earlier = worker.open("earlier", UNTAGGED);
            earlier.inside(|| ());
            turn.record_replaying(true);
            earlier.inside(|| worker.step("in earlier", UNTAGGED));
            worker.within("replayed", UNTAGGED, || worker.step("replayed", live()));
            worker.within("replayed", live(), || worker.step("new", new_work()));
            let helper = worker.open("replayed", UNTAGGED);
            helper.inside(|| {
                turn.record_replaying(false);
                worker.step("new in helper", UNTAGGED);
            });
            worker.step("after", UNTAGGED);
            worker.step("after, tagged", live());
            turn.record_replaying(true);
            worker.step("replayed", UNTAGGED);
            turn.record_replaying(false);
            worker.step("after again", UNTAGGED);
        });
        drop(turn);
        let exported = [
            "after",
            "after again",
            "after, tagged",
            "before",
            "earlier",
            "in earlier",
            "new",
            "new in helper",
            "turn",
        ];
        assert_exported(worker, &exported);
        let turn = worker.span("turn");
        for name in exported {
            match name {
                "turn" => assert_root(&turn),
                "in earlier" => assert_nested(&worker.span(name), &worker.span("earlier")),
                _ => assert_eq!(
                    worker.span(name).parent_span_id,
                    turn.span_context.span_id()
                ),
            }
        }
        assert_eq!(ids(&worker.stored(ID)), ids(&turn.span_context));
        assert_eq!(worker.storage.stats().replayed, 5);
    });
}

#[test]
fn local_nesting_wins_over_the_bounds_in_a_span_whose_replay_is_over() {
    let make = || {
        let builder = WorkflowContextStorage::builder().max_spans(1);
        builder.build().expect("a valid setting")
    };
    for_each_worker(make, |worker| {
        let turn = worker.open("turn", live());
        turn.inside(|| {
            turn.record_replaying(true);
            worker.step("replayed", live());
            turn.record_replaying(false);
            worker.step("nested", live());
        });
        drop(turn);
        assert_exported(worker, &["nested", "turn"]);
        assert_nested(&worker.span("nested"), &worker.span("turn"));
    });
}

#[test]
fn what_is_replayed_beneath_a_real_span_stays_so_when_that_ends() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let turn = worker.open("turn", live());
        let helper = turn.inside(|| {
            turn.record_replaying(true);
            worker.open("helper", UNTAGGED)
        });
        helper.inside(|| ());
        drop(turn);
        helper.inside(|| worker.step("replayed", UNTAGGED));
        drop(helper);
        worker.within("next", live(), || worker.step("nested", UNTAGGED));
        assert_exported(worker, &["nested", "next", "turn"]);
        assert_nested(&worker.span("nested"), &worker.span("next"));
        assert_eq!(worker.storage.stats().replayed, 2);
    });
}

// Random programs: trees of spans with flags, contexts attached or set by hand, and flags that flip.

/// Opens random spans inside one whose children are replayed if the cell says so, and notes what must be exported.
fn grow(
    worker: &Worker,
    random: &mut Random,
    depth: usize,
    beneath: &Rc<Cell<bool>>,
    real: &mut Vec<String>,
    replayed: &mut u64,
) {
    for _ in 0..random.below(4) {
        let flag = match random.below(6) {
            0 => Some(true),
            1 => Some(false),
            _ => None,
        };
        let tags = [UNTAGGED, UNTAGGED, live(), Tags::instance("another")][random.below(4)];
        let tags = flag.map_or(tags, |flag| tags.replaying(flag));
        let name = format!("{} {}", real.len(), replayed);
        let by_hand = random.below(4);
        let attached = (by_hand == 0).then(|| context_of(worker).attach());
        let span = worker.open(&name, tags);
        drop(attached);
        if by_hand == 1 {
            span.tracing().set_parent(context_of(worker)).unwrap();
        }
        let is_replayed = flag.unwrap_or(beneath.get());
        let own = match flag {
            None if is_replayed => beneath.clone(),
            _ => Rc::new(Cell::new(is_replayed)),
        };
        match is_replayed {
            true => *replayed += 1,
            false => real.push(name),
        }
        span.inside(|| {
            let _attached = (by_hand == 2).then(|| context_of(worker).attach());
            let is_flagged = declares_flag(&span);
            for _ in 0..2 {
                if depth > 0 {
                    grow(worker, random, depth - 1, &own, real, replayed);
                }
                if is_flagged && random.below(3) == 0 {
                    own.set(random.below(2) == 0);
                    span.record_replaying(own.get());
                }
            }
        });
    }
}

/// Returns `true` if the span declares the flag.
fn declares_flag(span: &Opened) -> bool {
    let metadata = span.tracing().metadata().expect("enabled");
    metadata.fields().field("workflow.replaying").is_some()
}

#[test]
fn whatever_is_attached_set_or_recorded_a_span_is_exported_if_and_only_if_its_flags_say_so() {
    const PROGRAMS: u64 = 300;
    for seed in 0..PROGRAMS {
        for_each_layer(WorkflowContextStorage::new, |worker| {
            labelled(&format!("seed {seed}"), || {
                recorded(worker);
                let (mut real, mut replayed) = (vec!["workflow".to_owned()], 0);
                let outside = Rc::new(Cell::new(false));
                let mut random = Random::new(seed);
                grow(worker, &mut random, 4, &outside, &mut real, &mut replayed);
                real.sort();
                let real: Vec<_> = real.iter().map(String::as_str).collect();
                assert_exported(worker, &real);
                assert_eq!(worker.storage.stats().replayed, replayed);
                let forest = worker.forest();
                forest.assert_no_orphans().assert_no_duplicates();
            });
        });
    }
}

// A real span whose children are replayed.

fn with_children_field() -> WorkflowContextStorage {
    let builder = WorkflowContextStorage::builder().replay_children_field("is_replay");
    builder.build().expect("a valid setting")
}

/// Runs all earlier steps again in a new span of the engine, then the new one.
fn invoke(worker: &Worker, turn: usize, run_again: impl Fn(usize)) {
    let invocation = info_span!(
        "invocation",
        otel.name = format!("invocation {turn}"),
        workflow.instance_id = ID,
        is_replay = turn > 0
    );
    invocation.in_scope(|| {
        (0..turn).for_each(&run_again);
        invocation.record("is_replay", false);
        worker.within(&format!("step {turn}"), UNTAGGED, || {
            worker.step(&format!("detail {turn}"), live());
        });
    });
}

#[test]
fn beneath_a_real_span_whose_children_are_replayed_each_step_is_exported_once() {
    for_each_layer(with_children_field, |worker| {
        for turn in 0..TURNS {
            invoke(worker, turn, |step| {
                let _attached = (step % 3 == 0).then(|| context_of(worker).attach());
                worker.within(&format!("step {step}"), UNTAGGED, || {
                    let _attached = (step % 3 == 1).then(|| context_of(worker).attach());
                    worker.step(&format!("detail {step}"), live());
                });
            });
        }
        let forest = worker.forest();
        forest
            .assert_one_trace()
            .assert_no_orphans()
            .assert_no_duplicates();
        assert_eq!(worker.spans().len(), 3 * TURNS, "in\n{forest}");
        let first = worker.span("invocation 0");
        assert_root(&first);
        for turn in 0..TURNS {
            let invocation = worker.span(&format!("invocation {turn}"));
            let step = worker.span(&format!("step {turn}"));
            if turn > 0 {
                assert_continues(&invocation, &first.span_context);
            }
            assert_nested(&step, &invocation);
            assert_nested(&worker.span(&format!("detail {turn}")), &step);
        }
        let replayed = TURNS * (TURNS - 1);
        assert_eq!(worker.storage.stats().replayed, replayed as u64);
    });
}

#[test]
fn the_flag_for_children_counts_through_the_opentelemetry_api_too() {
    let worker = Worker::via(Via::Api, with_children_field());
    let tracer = worker.storage.tracer(worker.tracer());
    let builder = SpanBuilder::from_name("invocation").with_attributes([
        KeyValue::new("workflow.instance_id", ID),
        KeyValue::new("is_replay", true),
    ]);
    let invocation = Context::new().with_span(tracer.build_with_context(builder, &Context::new()));
    {
        let _inside = invocation.clone().attach();
        worker.within("replayed", UNTAGGED, || worker.step("replayed", live()));
        worker.step("new", new_work());
        let flag = |replaying| KeyValue::new("is_replay", replaying);
        invocation.span().set_attribute(flag(false));
        worker.step("after", UNTAGGED);
        invocation.span().set_attribute(flag(true));
        worker.step("replayed", UNTAGGED);
    }
    drop(invocation);
    assert_exported(&worker, &["after", "invocation", "new"]);
    for name in ["after", "new"] {
        assert_nested(&worker.span(name), &worker.span("invocation"));
    }
    assert_eq!(worker.storage.stats().replayed, 3);
}

#[test]
fn the_flag_for_children_recorded_beside_a_late_id_counts_in_either_order() {
    for flag_first in [true, false] {
        for_each_layer(with_children_field, |worker| {
            let workflow = recorded(worker);
            let (id, flag) = (Empty, Empty);
            let invocation = info_span!("invocation", workflow.instance_id = id, is_replay = flag);
            invocation.in_scope(|| {
                match flag_first {
                    true => invocation
                        .record("is_replay", true)
                        .record("workflow.instance_id", ID),
                    false => invocation
                        .record("workflow.instance_id", ID)
                        .record("is_replay", true),
                };
                worker.step("replayed", UNTAGGED);
                invocation.record("is_replay", false);
                worker.step("after", UNTAGGED);
            });
            drop(invocation);
            assert_exported(worker, &["after", "invocation", "workflow"]);
            assert_child_of(&worker.span("invocation"), &workflow);
            assert_nested(&worker.span("after"), &worker.span("invocation"));
        });
    }
}

#[test]
fn a_replay_of_an_unknown_instance_beneath_an_attached_context_stands_for_the_replay_around_it() {
    for_each_layer(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        worker.within("replay", replay(), || {
            let request = Context::new().with_remote_span_context(remote(0xf0, 0xf1));
            let _attached = request.attach();
            worker.within("unknown", Tags::instance("unknown").replaying(true), || {
                worker.step("new", new_work());
            });
        });
        assert_exported(worker, &["new", "workflow"]);
        assert_child_of(&worker.span("new"), &workflow);
    });
}

#[test]
fn on_any_thread_children_of_a_real_span_are_replayed_as_its_flag_says() {
    for_each_layer(with_children_field, |worker| {
        let id = ID;
        let invocation = info_span!("invocation", workflow.instance_id = id, is_replay = true);
        let elsewhere = |name: &str| {
            thread::scope(|scope| {
                scope.spawn(|| {
                    worker.run(|| {
                        let child = info_span!(parent: &invocation, "child", otel.name = name);
                        child.in_scope(|| worker.step(name, UNTAGGED));
                    });
                });
            });
        };
        // The first child starts its parent, which was never entered.
        elsewhere("replayed");
        invocation.in_scope(|| elsewhere("replayed"));
        invocation.record("is_replay", false);
        elsewhere("after");
        drop(invocation);
        assert_exported(worker, &["after", "after", "invocation"]);
        assert_eq!(worker.storage.stats().replayed, 4);
    });
}

#[test]
fn a_span_that_is_not_sampled_tells_of_its_children_all_the_same() {
    for via in LAYERS {
        for field in ["is_replay", "workflow.replaying"] {
            labelled(&format!("{field}, spans made via {via:?}"), || {
                let sampler = Switch::default();
                let worker = Worker::via_with_sampler(via, with_children_field(), sampler.clone());
                worker.run(|| {
                    let (own, children) = (false, true);
                    let turn = info_span!("turn", workflow.replaying = own, is_replay = children);
                    turn.in_scope(|| {
                        sampler.set(true);
                        worker.step("replayed", UNTAGGED);
                        turn.record(field, false);
                        worker.step("after", UNTAGGED);
                        turn.record(field, true);
                        worker.step("replayed", UNTAGGED);
                    });
                });
                assert_exported(&worker, &["after"]);
                assert_eq!(worker.storage.stats().replayed, 2);
            });
        }
    }
}

#[test]
fn inside_a_replay_a_span_with_the_flag_for_children_is_replayed_itself() {
    for_each_layer(with_children_field, |worker| {
        recorded(worker);
        worker.within("replay", replay(), || {
            let invocation = info_span!("invocation", is_replay = false);
            invocation.in_scope(|| worker.step("replayed", UNTAGGED));
        });
        let id = ID;
        let both = info_span!(
            "both",
            workflow.instance_id = id,
            workflow.replaying = true,
            is_replay = false
        );
        both.in_scope(|| worker.step("replayed", UNTAGGED));
        drop(both);
        assert_exported(worker, &["workflow"]);
    });
}

#[test]
fn the_flag_for_children_has_one_meaning_and_a_name() {
    let build = |name: &'static str| {
        let builder = WorkflowContextStorage::builder().replay_children_field(name);
        builder.build().map(|_| ())
    };
    assert!(matches!(
        build(""),
        Err(BuildError::EmptyName {
            setting: "replay_children_field"
        })
    ));
    for taken in [
        "workflow.replaying",
        "workflow.instance_id",
        "workflow.status",
        "workflow.relation",
    ] {
        let refused = build(taken);
        assert!(
            matches!(
                &refused,
                Err(BuildError::TwoMeanings { setting: "replay_children_field", name, .. }) if name == taken
            ),
            "{refused:?}"
        );
    }
    let builder = WorkflowContextStorage::builder().engine(Engine::Temporal);
    let refused = builder.replay_children_field("temporalRunID").build();
    assert!(matches!(refused, Err(BuildError::TwoMeanings { .. })));
    let builder = WorkflowContextStorage::builder().replay_field("flag");
    let refused = builder.replay_children_field("flag").build();
    assert!(matches!(refused, Err(BuildError::TwoMeanings { .. })));
    assert_eq!(build("is_replay"), Ok(()));
}

// Samplers.

#[test]
fn a_replay_is_never_exported_and_never_sampled() {
    let root_of = |root: Sampler| Sampler::ParentBased(Box::new(root));
    let samplers = [
        (Sampler::AlwaysOn, Some(true)),
        (Sampler::AlwaysOff, Some(false)),
        (Sampler::TraceIdRatioBased(1.0), Some(true)),
        (Sampler::TraceIdRatioBased(0.0), Some(false)),
        (Sampler::TraceIdRatioBased(0.5), None),
        (root_of(Sampler::AlwaysOn), Some(true)),
        (root_of(Sampler::AlwaysOff), Some(false)),
        (root_of(Sampler::TraceIdRatioBased(0.5)), None),
    ];
    for (sampler, takes_all) in samplers {
        for via in VIAS {
            labelled(&format!("{sampler:?}, spans made via {via:?}"), || {
                let worker =
                    Worker::via_with_sampler(via, WorkflowContextStorage::new(), sampler.clone());
                let workflow = recorded(&worker);
                let (new, nested) = worker.within("replay", replay(), || {
                    worker.step("replayed", UNTAGGED);
                    let new = worker.open("new", new_work());
                    let nested = new.inside(|| {
                        let nested = worker.open("nested", UNTAGGED);
                        nested.inside(|| nested.span_context())
                    });
                    (new.span_context(), nested)
                });
                for context in [&new, &nested] {
                    assert_eq!(context.trace_id(), workflow.trace_id(), "not in one trace");
                    assert_eq!(context.is_sampled(), workflow.is_sampled());
                }
                assert_eq!(
                    workflow.is_sampled(),
                    takes_all.unwrap_or(workflow.is_sampled())
                );
                match workflow.is_sampled() {
                    true => assert_exported(&worker, &["nested", "new", "workflow"]),
                    false => assert_exported(&worker, &[]),
                }
            });
        }
    }
    for_each_via(|via| {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let hook = asked.clone();
        let sampler = Hooked(move |name: &str| hook.lock().unwrap().push(name.to_owned()));
        let worker = Worker::via_with_sampler(via, WorkflowContextStorage::new(), sampler);
        recorded(&worker);
        worker.within("replay", replay(), || worker.step("replayed", UNTAGGED));
        assert_eq!(*asked.lock().unwrap(), ["workflow"]);
    });
}

// Events and headers inside a replay.

#[test]
fn events_inside_a_replay_are_dropped_with_it_and_counted() {
    for via in [Via::Layer, Via::LayerWithoutActivation] {
        let worker = Worker::via(via, WorkflowContextStorage::new());
        recorded(&worker);
        worker.run(|| {
            let turn = worker.open("replay", replay());
            turn.inside(|| {
                info!("one");
                worker.within("replayed", UNTAGGED, || error!("two"));
                worker.within("new", new_work(), || info!("exported"));
                turn.record_replaying(false);
                info!("three: the span itself is not exported");
            });
            // Before it is entered, and after it was left.
            info!(parent: turn.tracing(), "four");
            let unentered = worker.open("replay", replay());
            info!(parent: unentered.tracing(), "five");
            unentered.inside(|| ());
        });
        assert_exported(&worker, &["new", "workflow"]);
        assert_eq!(worker.span("new").events.len(), 1);
        assert_eq!(worker.span("workflow").events.len(), 0);
        let stats = worker.storage.stats();
        assert_eq!(
            (stats.replayed, stats.replayed_events),
            (3, 5),
            "made via {via:?}"
        );
    }
}

/// The messages of a span's events, in their order.
fn messages(span: &SpanData) -> Vec<String> {
    span.events
        .iter()
        .map(|event| event.name.to_string())
        .collect()
}

#[test]
fn warnings_and_errors_past_a_replay_become_events_of_the_next_real_span_beneath() {
    for_each_layer(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        let turn = worker.open("replay", replay());
        turn.inside(|| {
            warn!("before: dropped");
            worker.within("helper", UNTAGGED, || {
                turn.record_replaying(false);
                info!("past it, below WARN: dropped");
                warn!("one");
            });
            error!("two");
            worker.within("next", UNTAGGED, || info!("its own"));
            worker.step("after", UNTAGGED);
            warn!("three");
            worker.step("tagged", live());
            error!("four");
            let _attached = context_of(worker).attach();
            worker.step("by hand", UNTAGGED);
            warn!("nothing follows: dropped");
        });
        let dropped = |worker: &Worker| worker.storage.stats().replayed_events;
        assert_eq!(dropped(worker), 2);
        drop(turn);
        assert_eq!(dropped(worker), 3);

        let next = worker.span("next");
        assert_eq!(messages(&next), ["one", "two", "its own"]);
        let times: Vec<_> = next.events.iter().map(|event| event.timestamp).collect();
        assert!(times.is_sorted() && times[1] <= next.start_time && next.start_time <= times[2]);
        assert_eq!(messages(&worker.span("after")), [""; 0]);
        assert_eq!(messages(&worker.span("tagged")), ["three"]);
        assert_eq!(messages(&worker.span("by hand")), ["four"]);
        for name in ["next", "after", "tagged", "by hand"] {
            assert_child_of(&worker.span(name), &workflow);
        }
    });
}

#[test]
fn of_the_warnings_past_a_replay_16_are_kept_and_the_others_counted() {
    for_each_layer(WorkflowContextStorage::new, |worker| {
        recorded(worker);
        let turn = worker.open("replay", replay());
        turn.inside(|| {
            turn.record_replaying(false);
            for _ in 0..20 {
                warn!("kept, as far as there is room");
            }
            worker.step("next", UNTAGGED);
            error!("there is room again");
            worker.step("last", UNTAGGED);
        });
        drop(turn);
        assert_eq!(worker.span("next").events.len(), 16);
        assert_eq!(messages(&worker.span("last")), ["there is room again"]);
        assert_eq!(worker.storage.stats().replayed_events, 4);
    });
}

#[test]
fn an_event_through_the_opentelemetry_api_has_no_level_and_is_dropped_past_a_replay_too() {
    let worker = Worker::via(Via::Api, WorkflowContextStorage::new());
    recorded(&worker);
    let turn = worker.open("replay", replay());
    turn.inside(|| {
        turn.record_replaying(false);
        turn.otel_context().span().add_event("event", vec![]);
        worker.step("next", UNTAGGED);
    });
    drop(turn);
    assert_eq!(worker.span("next").events.len(), 0);
    assert_eq!(worker.storage.stats().replayed_events, 1);
}

#[test]
fn events_of_a_replay_through_the_opentelemetry_api_are_dropped_with_it_and_counted() {
    let worker = Worker::via(Via::Api, WorkflowContextStorage::new());
    recorded(&worker);
    let tracer = worker.storage.tracer(worker.tracer());
    let builder = SpanBuilder::from_name("replay")
        .with_events(vec![opentelemetry::trace::Event::with_name("one")])
        .with_attributes([
            KeyValue::new("workflow.instance_id", ID),
            KeyValue::new("workflow.replaying", true),
        ]);
    let mut replay = tracer.build(builder);
    replay.add_event("two", vec![]);
    replay.update_name("not exported");
    replay.set_status(opentelemetry::trace::Status::error("not exported"));
    replay.add_link(remote(0xf0, 0xf1), vec![]);
    replay.end();
    drop(replay);

    assert_exported(&worker, &["workflow"]);
    assert_eq!(worker.span("workflow").links.len(), 0);
    assert_eq!(worker.storage.stats().replayed_events, 2);
}

#[test]
fn headers_injected_inside_a_replay_name_the_recorded_span() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        let traceparent = |context: &Context| {
            let mut headers = HashMap::new();
            TraceContextPropagator::new().inject_context(context, &mut headers);
            headers.remove("traceparent").expect("a valid context")
        };
        let expected = format!("00-{}-{}-01", workflow.trace_id(), workflow.span_id());
        worker.within("poll", UNTAGGED, || {
            let turn = worker.open("replay", replay());
            turn.inside(|| {
                assert_eq!(traceparent(&turn.otel_context()), expected);
                let current = WorkflowContext::current().map(|current| current.traceparent());
                assert_eq!(current, Some(expected.clone()));
                if worker.made_via() != Via::LayerWithoutActivation {
                    assert_eq!(traceparent(&Context::current()), expected);
                }
                let replayed = worker.open("replayed", UNTAGGED);
                assert_eq!(traceparent(&replayed.otel_context()), expected);
            });
        });
    });
}

// Real spans and stand-ins that have the same ids.

#[test]
fn an_open_span_keeps_its_children_while_a_replay_of_it_runs_elsewhere() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let (go_on, wait) = channel();
        let (is_replaying, replaying) = channel();
        // Whoever panics drops a channel's end, for which the other one does not wait.
        thread::scope(move |scope| {
            let original = worker.open("workflow", live());
            original.inside(move || {
                scope.spawn(move || {
                    worker.within("replay", replay(), || {
                        worker.step("replayed", UNTAGGED);
                        is_replaying.send(()).expect("the test still runs");
                        wait.recv().expect("the test still runs");
                        worker.step("replayed after", UNTAGGED);
                        worker.step("new", new_work());
                    });
                });
                replaying.recv().expect("the replay still runs");
                worker.step("child", UNTAGGED);
                worker.step("tagged child", live());
                go_on.send(()).expect("the replay still runs");
            });
        });
        assert_exported(worker, &["child", "new", "tagged child", "workflow"]);
        let workflow = worker.span("workflow");
        for name in ["child", "tagged child"] {
            assert_nested(&worker.span(name), &workflow);
        }
        assert_continues(&worker.span("new"), &workflow.span_context);
    });
}

#[test]
fn replays_and_live_spans_of_one_instance_on_many_threads_are_kept_apart() {
    const ROUNDS: usize = 200;
    for via in [Via::Layer, Via::Api] {
        let worker = Worker::via(via, WorkflowContextStorage::new());
        let original = worker.open("workflow", live());
        original.inside(|| ());
        let start = Barrier::new(8);
        thread::scope(|scope| {
            for thread in 0..8 {
                let (worker, start, original) = (&worker, &start, original.clone());
                scope.spawn(move || {
                    start.wait();
                    for _ in 0..ROUNDS {
                        if thread % 2 == 0 {
                            original.inside(|| worker.step("live", UNTAGGED));
                        } else {
                            worker.within("replay", replay(), || {
                                worker.step("replayed", UNTAGGED);
                                worker.step("new", new_work());
                            });
                        }
                    }
                });
            }
        });
        drop(original);
        let count = |name| {
            worker
                .forest()
                .count_by_name()
                .get(name)
                .copied()
                .unwrap_or(0)
        };
        let counts = ["workflow", "live", "new", "replay", "replayed"].map(count);
        assert_eq!(
            counts,
            [1, 4 * ROUNDS, 4 * ROUNDS, 0, 0],
            "made via {via:?}"
        );
        worker
            .forest()
            .assert_one_trace()
            .assert_no_orphans()
            .assert_no_duplicates();
        assert_eq!(worker.storage.stats().replayed, 8 * ROUNDS as u64);
    }
}

#[test]
fn the_replay_of_one_storage_suppresses_nothing_of_another() {
    let ours = Worker::via(Via::Api, WorkflowContextStorage::new());
    let theirs = Worker::via(Via::Api, WorkflowContextStorage::new());
    let workflow = recorded(&ours);
    let context = ours.storage.get(ID).expect("a valid id").expect("recorded");
    theirs.storage.store(ID, context).expect("a valid id");
    // Both replays have the ids of the same span.
    let (our_replay, their_replay) = (
        ours.open("replay", replay()),
        theirs.open("replay", replay()),
    );
    our_replay.inside(|| {
        ours.step("our replayed", UNTAGGED);
        theirs.step("their live", UNTAGGED);
    });
    their_replay.inside(|| {
        theirs.step("their replayed", UNTAGGED);
        ours.step("our live", UNTAGGED);
    });
    assert_exported(&ours, &["our live", "workflow"]);
    assert_exported(&theirs, &["their live"]);
    assert_child_of(&ours.span("our live"), &workflow);
    assert_child_of(&theirs.span("their live"), &workflow);
}

/// Opens a span while another one is exported, like an exporter with an instrumented HTTP client.
#[derive(Debug)]
struct OpensSpans;

impl SpanProcessor for OpensSpans {
    fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if !span.name.starts_with("export") {
            info_span!("export").in_scope(|| ());
            info_span!("export, tagged", workflow.instance_id = "exporter").in_scope(|| ());
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

#[test]
fn an_exporter_that_opens_spans_beneath_the_exported_one_does_not_hang_during_a_replay() {
    type OpenAndReplay = fn() -> [Span; 2];
    let cases: [(&str, OpenAndReplay); 2] = [
        ("a recorded span", || {
            let id = ID;
            let workflow = info_span!("workflow", workflow.instance_id = id);
            workflow.in_scope(|| ());
            [
                workflow,
                info_span!(
                    "replay",
                    workflow.instance_id = id,
                    workflow.replaying = true
                ),
            ]
        }),
        ("an untagged span, as nothing is recorded", || {
            let poll = info_span!("poll");
            let replay = poll.in_scope(|| info_span!("replay", workflow.replaying = true));
            [poll, replay]
        }),
    ];
    for (label, open) in cases {
        let (finished, wait) = channel();
        // Not joined: on failure the thread never ends.
        thread::spawn(move || {
            let provider = SdkTracerProvider::builder()
                .with_span_processor(OpensSpans)
                .build();
            let layer = WorkflowContextStorage::new().layer(provider.tracer("test"));
            let subscriber = tracing_subscriber::registry().with(layer);
            tracing::subscriber::with_default(subscriber, || {
                let [span, replay] = open();
                replay.in_scope(|| ());
                span.in_scope(|| Context::current().span().end());
                drop((replay, span));
            });
            finished.send(()).expect("the test waits");
        });
        let finished = wait.recv_timeout(Duration::from_secs(20));
        finished.unwrap_or_else(|why| panic!("{why} while the replay stands for {label}"));
    }
}

// Unusual orders of entering and ending.

#[test]
fn replays_may_end_in_any_order() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        recorded(worker);
        let outer = worker.open("outer", replay());
        let inner = outer.inside(|| worker.open("inner", UNTAGGED));
        let other = worker.open("other", replay());
        let innermost = inner.inside(|| worker.open("innermost", UNTAGGED));
        // Whether it is entered or not, each still suppresses what is opened beneath it.
        drop(outer);
        innermost.inside(|| worker.step("replayed", UNTAGGED));
        drop(other);
        inner.inside(|| worker.step("replayed", UNTAGGED));
        drop(inner);
        innermost.inside(|| worker.step("replayed", UNTAGGED));
        drop(innermost);

        worker.within("live", live(), || worker.step("nested", UNTAGGED));
        assert_exported(worker, &["live", "nested", "workflow"]);
    });
}

#[test]
fn a_replay_that_was_ended_still_suppresses_what_is_opened_beneath_it() {
    let worker = Worker::via(Via::Api, WorkflowContextStorage::new());
    recorded(&worker);
    let turn = worker.open("replay", replay());
    let context = turn.otel_context();
    for _ in 0..2 {
        context.span().end();
        turn.inside(|| worker.step("replayed", UNTAGGED));
    }
    drop((turn, context));
    assert_exported(&worker, &["workflow"]);
}

#[test]
fn a_replay_that_is_never_entered_is_not_exported() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        drop(worker.open("replay", replay()));
        drop(worker.open("unknown", Tags::instance("unknown").replaying(true)));
        drop(worker.open("to come", Tags::awaiting_id().replaying(true)));

        assert_exported(worker, &["workflow"]);
        assert_eq!(ids(&worker.stored(ID)), ids(&workflow));
        assert_eq!(worker.storage.instance_ids(), [ID]);
    });
}

#[test]
fn a_span_is_a_replay_by_its_parent_and_not_by_where_it_is_entered() {
    for_each_worker(WorkflowContextStorage::new, |worker| {
        let workflow = recorded(worker);
        let (opened_live, opened_in_replay) = {
            let opened_live = worker.open("opened live", UNTAGGED);
            let turn = worker.open("replay", replay());
            let opened_in_replay = turn.inside(|| worker.open("opened in replay", UNTAGGED));
            turn.inside(|| opened_live.inside(|| ()));
            (opened_live, opened_in_replay)
        };
        opened_in_replay.inside(|| ());
        drop((opened_live, opened_in_replay));

        assert_exported(worker, &["opened live", "workflow"]);
        assert_ne!(worker.trace_of("opened live"), workflow.trace_id());
    });
}

#[test]
fn new_work_in_a_replay_follows_the_relations() {
    let make = || {
        let builder = WorkflowContextStorage::builder();
        let builder = builder.relation(Relation::SameTrace, Continuation::NewRootAndLink);
        builder.build().expect("a valid setting")
    };
    for_each_worker(make, |worker| {
        let workflow = recorded(worker);
        worker.within("replay", replay(), || {
            worker.step("new", live().replaying(false))
        });

        assert_root(&worker.span("new"));
        assert_eq!(
            links(&worker.span("new")),
            [("same_trace".to_owned(), ids(&workflow))]
        );
    });
}

// An orchestrator that is run again from its start on each turn, as duroxide's is.

const TURNS: usize = 20;

/// Runs all earlier steps again, then the new one, which schedules an activity for another worker thread.
fn orchestrate(worker: &Worker, turn: usize) {
    let orchestrator = worker.open("orchestrator", live().replaying(turn > 0));
    orchestrator.inside(|| {
        for step in 0..turn {
            worker.within(&format!("step {step}"), UNTAGGED, || {
                worker.step(&format!("detail {step}"), UNTAGGED);
            });
        }
        orchestrator.record_replaying(false);
        worker.within(&format!("step {turn}"), UNTAGGED, || {
            worker.step(&format!("detail {turn}"), UNTAGGED);
        });
    });
    drop(orchestrator);
    worker.step_elsewhere(&format!("activity {turn}"), live());
}

#[test]
fn an_orchestrator_that_is_run_again_on_each_turn_exports_each_span_once() {
    for_each_via(|via| {
        let before = Worker::via(via, WorkflowContextStorage::new());
        (0..TURNS / 2).for_each(|turn| orchestrate(&before, turn));
        // The worker is replaced; what was recorded survives.
        let after = Worker::via(via, before.storage.clone());
        (TURNS / 2..TURNS).for_each(|turn| orchestrate(&after, turn));

        let spans = [before.spans(), after.spans()].concat();
        let forest = TraceForest::from_spans(&spans);
        forest
            .assert_one_trace()
            .assert_no_orphans()
            .assert_no_duplicates();
        let mut expected = vec!["orchestrator".to_owned()];
        for turn in 0..TURNS {
            expected.extend(["step", "detail", "activity"].map(|name| format!("{name} {turn}")));
        }
        let counts = forest.count_by_name();
        assert!(
            counts.values().all(|count| *count == 1),
            "made via {via:?}:\n{forest}"
        );
        expected.sort();
        assert_eq!(
            counts.into_keys().collect::<Vec<_>>(),
            expected,
            "made via {via:?}"
        );

        let orchestrator = forest.find("orchestrator").expect("exported");
        assert_eq!(orchestrator.parent_span_id, SpanId::INVALID);
        for turn in 0..TURNS {
            for name in ["step", "activity"] {
                let span = forest.find(&format!("{name} {turn}")).expect("exported");
                assert_eq!(
                    span.parent_span_id,
                    orchestrator.span_context.span_id(),
                    "{forest}"
                );
            }
        }
        let replayed_steps = TURNS * (TURNS - 1) / 2;
        let replayed = TURNS - 1 + 2 * replayed_steps;
        assert_eq!(before.storage.stats().replayed, replayed as u64);
    });
}
