//! Code that an engine runs again exports nothing again, and what it newly schedules joins the real trace.

mod support;

use std::collections::HashMap;
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Duration;

use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, TraceContextExt as _, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue, SpanId};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, SpanData, SpanProcessor};
use support::*;
use tracing::field::Empty;
use tracing::{Span, error, info, info_span};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{Continuation, Relation, WorkflowContext, WorkflowContextStorage};

const ID: &str = "order-42";

fn live() -> Tags<'static> {
    Tags::of(ID)
}

fn replay() -> Tags<'static> {
    live().replaying(true)
}

/// Work that is new although it is inside of a replay.
fn new_work() -> Tags<'static> {
    UNTAGGED.replaying(false)
}

/// Records the workflow, and answers its span.
fn recorded(stage: &Stage) -> SpanContext {
    stage.step("workflow", live());
    stage.stored(ID)
}

#[track_caller]
fn assert_exported(stage: &Stage, names: &[&str]) {
    assert_eq!(stage.names(), names, "in\n{}", stage.forest());
}

// Nothing is exported and nothing recorded.

#[test]
fn replays_do_not_multiply_spans() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let workflow = recorded(stage);
        for _ in 0..13 {
            stage.within("replay", replay(), || stage.step("activity", UNTAGGED));
        }
        assert_exported(stage, &["workflow"]);
        assert_eq!(ids(&stage.stored(ID)), ids(&workflow));
        let stats = stage.storage.stats();
        assert_eq!((stats.replayed, stats.stored_instances), (26, 1));
    });
}

#[test]
fn a_replay_of_what_nobody_recorded_exports_nothing_and_records_nothing() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        for tags in [replay(), UNTAGGED.replaying(true)] {
            stage.within("replay", tags, || {
                stage.within("untagged", UNTAGGED, || stage.step("tagged", live()));
            });
        }
        stage.within("poll", UNTAGGED, || {
            stage.within("replay", replay(), || stage.step("untagged", UNTAGGED));
            // The stand-in had the poller's ids.
            stage.step("polled", UNTAGGED);
        });
        assert_exported(stage, &["poll", "polled"]);
        assert_eq!(stage.storage.instance_ids(), [""; 0]);
        assert_eq!(stage.storage.stats().replayed, 8);

        stage.step("workflow", live());
        assert_root(&stage.span("workflow"));
    });
}

#[test]
fn new_work_in_a_replay_of_what_nobody_recorded_is_exported_as_if_there_were_no_replay() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let turn = stage.open("replay", replay());
        turn.inside(|| {
            stage.step("new", new_work());
            turn.record_replaying(false);
            stage.step("caught up", UNTAGGED);
            stage.step("first", live());
        });
        drop(turn);
        stage.within("poll", UNTAGGED, || {
            stage.within("replay", Tags::of("polled").replaying(true), || {
                stage.step("new in poll", new_work());
            });
        });
        assert_exported(stage, &["caught up", "first", "new", "new in poll", "poll"]);
        for name in ["caught up", "first", "new"] {
            assert_root(&stage.span(name));
        }
        assert_eq!(
            ids(&stage.stored(ID)),
            ids(&stage.span("first").span_context)
        );
        assert_nested(&stage.span("new in poll"), &stage.span("poll"));
    });
}

#[test]
fn untagged_descendants_of_a_replay_are_not_exported_at_any_depth() {
    const DEPTH: usize = 50;
    fn descend(stage: &Stage, depth: usize) {
        if depth > 0 {
            stage.within("descendant", UNTAGGED, || descend(stage, depth - 1));
        } else {
            stage.step("new", new_work());
        }
    }
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let workflow = recorded(stage);
        stage.within("replay", replay(), || descend(stage, DEPTH));
        assert_exported(stage, &["new", "workflow"]);
        assert_child_of(&stage.span("new"), &workflow);
        assert_eq!(stage.storage.stats().replayed, 1 + DEPTH as u64);
    });
}

#[test]
fn tracing_and_opentelemetry_spans_mixed_beneath_a_replay_are_not_exported() {
    fn descend(stage: &Stage, vias: &[Via]) {
        match vias.split_first() {
            Some((via, rest)) => {
                let span = stage.open_via(*via, "descendant", UNTAGGED);
                span.inside(|| descend(stage, rest));
            }
            None => {
                stage
                    .open_via(Via::Layer, "new in tracing", new_work())
                    .inside(|| ());
                stage
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
            let stage = Stage::new(WorkflowContextStorage::new(), Via::Layer);
            let workflow = recorded(&stage);
            let replay = stage.open_via(outermost, "replay", replay());
            stage.run(|| replay.inside(|| descend(&stage, &vias)));
            drop(replay);

            assert_exported(
                &stage,
                &["new in opentelemetry", "new in tracing", "workflow"],
            );
            assert_child_of(&stage.span("new in tracing"), &workflow);
            assert_child_of(&stage.span("new in opentelemetry"), &workflow);
        }
    }
}

#[test]
fn opentelemetry_spans_beneath_a_replay_in_tracing_without_activation_are_not_exported() {
    let stage = Stage::new(WorkflowContextStorage::new(), Via::LayerWithoutActivation);
    let workflow = recorded(&stage);
    let replay = stage.open("replay", replay());
    replay.inside(|| {
        let _explicitly = replay.otel_context().attach();
        let descendant = stage.open_via(Via::Api, "descendant", UNTAGGED);
        descendant.inside(|| stage.open_via(Via::Api, "new", new_work()).inside(|| ()));
    });
    assert_exported(&stage, &["new", "workflow"]);
    assert_child_of(&stage.span("new"), &workflow);
}

#[test]
fn a_tagged_descendant_of_a_replay_is_a_replay_of_its_own_instance() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let workflow = recorded(stage);
        stage.step("child workflow", Tags::of("child").child_of(ID));
        let child = stage.stored("child");
        stage.within("replay", replay(), || {
            stage.within("same instance", live(), || stage.step("new", new_work()));
            stage.within("child again", Tags::of("child").child_of(ID), || {
                stage.step("new in child", new_work());
            });
            stage.within("unknown child", Tags::of("unknown").child_of(ID), || {
                stage.step("new in unknown child", new_work());
            });
        });
        assert_exported(
            stage,
            &[
                "child workflow",
                "new",
                "new in child",
                "new in unknown child",
                "workflow",
            ],
        );
        assert_child_of(&stage.span("new"), &workflow);
        assert_child_of(&stage.span("new in child"), &child);
        assert_child_of(&stage.span("new in unknown child"), &workflow);
        assert_eq!(stage.storage.stats().stored_instances, 2);
    });
}

#[test]
fn a_replay_suppresses_nothing_but_its_descendants() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let workflow = recorded(stage);
        stage.within("poll", UNTAGGED, || {
            let replaying = stage.open("replay", replay());
            replaying.inside(|| stage.step("replayed", UNTAGGED));
            stage.step("sibling", UNTAGGED);
            stage.step("sibling activity", live());
            replaying.inside(|| stage.open_root("explicit root", ID).inside(|| ()));
        });
        stage.step("after", live());

        assert_exported(
            stage,
            &[
                "after",
                "explicit root",
                "poll",
                "sibling",
                "sibling activity",
                "workflow",
            ],
        );
        assert_nested(&stage.span("sibling"), &stage.span("poll"));
        for name in ["sibling activity", "explicit root", "after"] {
            assert_child_of(&stage.span(name), &workflow);
        }
    });
}

// New work.

#[test]
fn work_newly_scheduled_inside_a_replay_attaches_to_the_recorded_span() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let workflow = recorded(stage);
        stage.within("poll", UNTAGGED, || {
            stage.within("replay", replay(), || {
                stage.step("new", new_work());
                stage.within("new and tagged", live().replaying(false), || {
                    stage.step("nested in new", UNTAGGED);
                });
                stage.within("replayed", UNTAGGED, || stage.step("new below", new_work()));
            });
        });
        for name in ["new", "new and tagged", "new below"] {
            assert_child_of(&stage.span(name), &workflow);
            assert_eq!(links(&stage.span(name)), []);
        }
        assert_nested(&stage.span("nested in new"), &stage.span("new and tagged"));
        assert_eq!(
            stage.spans().len(),
            6,
            "with the workflow and the poller:\n{}",
            stage.forest()
        );
        assert_eq!(stage.storage.stats().replayed, 2);
    });
}

#[test]
fn work_opened_after_the_replay_has_caught_up_attaches_to_the_recorded_span() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let workflow = recorded(stage);
        let turn = stage.open("replay", replay());
        turn.inside(|| {
            stage.step("replayed", UNTAGGED);
            turn.record_replaying(false);
            stage.within("new", UNTAGGED, || stage.step("nested in new", UNTAGGED));
            stage.step("new and tagged", live());
            turn.record_replaying(true);
            stage.step("replayed again", UNTAGGED);
        });
        drop(turn);

        assert_exported(
            stage,
            &["nested in new", "new", "new and tagged", "workflow"],
        );
        assert_child_of(&stage.span("new"), &workflow);
        assert_child_of(&stage.span("new and tagged"), &workflow);
        assert_nested(&stage.span("nested in new"), &stage.span("new"));
        assert_eq!(ids(&stage.stored(ID)), ids(&workflow));
        assert_eq!(stage.storage.stats().replayed, 3);
    });
}

#[test]
fn work_opened_after_the_replay_has_caught_up_is_exported_below_a_replayed_descendant_too() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let workflow = recorded(stage);
        let turn = stage.open("replay", replay());
        turn.inside(|| {
            stage.within("helper", UNTAGGED, || {
                stage.within("deeper helper", UNTAGGED, || {
                    stage.step("replayed", UNTAGGED);
                    turn.record_replaying(false);
                    stage.step("new", UNTAGGED);
                });
            });
        });
        drop(turn);

        assert_exported(stage, &["new", "workflow"]);
        assert_child_of(&stage.span("new"), &workflow);
    });
}

#[test]
fn a_replay_of_an_old_run_stands_for_the_span_of_that_run() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        for run_id in ["run-1", "run-2"] {
            stage.step(run_id, live().run(run_id));
        }
        let latest = stage.stored(ID);
        for run_id in ["run-1", "run-2"] {
            stage.within("replay", replay().run(run_id), || {
                stage.step(&format!("new in {run_id}"), new_work());
            });
        }
        stage.within("unknown run", replay().run("run-3"), || {
            stage.step("replayed", UNTAGGED)
        });

        assert_exported(stage, &["new in run-1", "new in run-2", "run-1", "run-2"]);
        for run_id in ["run-1", "run-2"] {
            assert_continues(
                &stage.span(&format!("new in {run_id}")),
                &stage.span(run_id).span_context,
            );
        }
        assert_eq!(ids(&stage.stored(ID)), ids(&latest), "a replay began a run");
    });
}

#[test]
fn replays_do_not_fill_a_trace() {
    let make = || {
        let builder = WorkflowContextStorage::builder().max_spans(2);
        builder.build().expect("a valid setting")
    };
    on_every_stage(make, |stage| {
        let workflow = recorded(stage);
        for _ in 0..10 {
            stage.within("replay", replay(), || stage.step("replayed", live()));
        }
        stage.step("second and last", live());
        stage.step("next trace", live());

        assert_child_of(&stage.span("second and last"), &workflow);
        assert_root(&stage.span("next trace"));
    });
}

// The flag.

#[test]
fn replaying_is_told_by_a_bool_or_by_its_text() {
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
fn a_value_that_is_no_truth_is_no_replay() {
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
fn a_home_made_engine_names_its_own_replay_field_beside_the_reserved_one() {
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
    let stage = Stage::new(WorkflowContextStorage::new(), Via::Layer);
    stage.run(|| {
        info_span!("not named", workflow.instance_id = ID, my.replaying = true).in_scope(|| ())
    });
    assert_exported(&stage, &["not named"]);
}

#[test]
fn a_replay_that_learns_its_instance_id_while_it_is_held_stands_for_the_recorded_span() {
    for via in [Via::Layer, Via::LayerWithoutActivation] {
        let stage = Stage::new(WorkflowContextStorage::new(), via);
        let workflow = recorded(&stage);
        stage.run(|| {
            let turn = info_span!(
                "replay",
                workflow.instance_id = Empty,
                workflow.replaying = Empty
            );
            turn.in_scope(|| {
                turn.record("workflow.replaying", true);
                turn.record("workflow.instance_id", ID);
                stage.step("replayed", UNTAGGED);
                stage.step("new", new_work());
            });
        });
        assert_exported(&stage, &["new", "workflow"]);
        assert_child_of(&stage.span("new"), &workflow);
        assert_eq!(stage.storage.stats().late, 0);
    }
}

#[test]
fn a_replay_that_learns_its_instance_id_after_it_has_started_exports_and_records_nothing() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        for (id, recorded_before) in [(ID, true), ("unknown", false)] {
            if recorded_before {
                recorded(stage);
            }
            let turn = stage.open("replay", Tags::to_come().replaying(true));
            turn.inside(|| {
                stage.step("replayed", UNTAGGED);
                turn.record_instance_id(id);
                stage.step("replayed after", UNTAGGED);
            });
        }
        assert_exported(stage, &["workflow"]);
        assert_eq!(stage.storage.instance_ids(), [ID]);
        assert_eq!(stage.storage.stats().replayed, 6);
    });
}

// Samplers.

#[test]
fn a_replay_is_not_exported_whatever_the_sampler_and_never_shown_to_it() {
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
                let stage = Stage::with(WorkflowContextStorage::new(), via, sampler.clone());
                let workflow = recorded(&stage);
                let (new, nested) = stage.within("replay", replay(), || {
                    stage.step("replayed", UNTAGGED);
                    let new = stage.open("new", new_work());
                    let nested = new.inside(|| {
                        let nested = stage.open("nested", UNTAGGED);
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
                    true => assert_exported(&stage, &["nested", "new", "workflow"]),
                    false => assert_exported(&stage, &[]),
                }
            });
        }
    }
    for via in VIAS {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let hook = asked.clone();
        let sampler = Hooked(move |name: &str| hook.lock().unwrap().push(name.to_owned()));
        let stage = Stage::with(WorkflowContextStorage::new(), via, sampler);
        recorded(&stage);
        stage.within("replay", replay(), || stage.step("replayed", UNTAGGED));
        assert_eq!(*asked.lock().unwrap(), ["workflow"]);
    }
}

// What is inside.

#[test]
fn events_inside_a_replay_are_dropped_with_it_and_counted() {
    for via in [Via::Layer, Via::LayerWithoutActivation] {
        let stage = Stage::new(WorkflowContextStorage::new(), via);
        recorded(&stage);
        stage.run(|| {
            let turn = stage.open("replay", replay());
            turn.inside(|| {
                info!("one");
                stage.within("replayed", UNTAGGED, || error!("two"));
                stage.within("new", new_work(), || info!("exported"));
                turn.record_replaying(false);
                info!("three: the span itself is not exported");
            });
            // Before it is entered, and after it was left.
            info!(parent: turn.tracing(), "four");
            let unentered = stage.open("replay", replay());
            info!(parent: unentered.tracing(), "five");
            unentered.inside(|| ());
        });
        assert_exported(&stage, &["new", "workflow"]);
        assert_eq!(stage.span("new").events.len(), 1);
        assert_eq!(stage.span("workflow").events.len(), 0);
        let stats = stage.storage.stats();
        assert_eq!(
            (stats.replayed, stats.replayed_events),
            (3, 5),
            "made via {via:?}"
        );
    }
}

#[test]
fn events_of_a_replay_through_the_opentelemetry_api_are_dropped_with_it_and_counted() {
    let stage = Stage::new(WorkflowContextStorage::new(), Via::Api);
    recorded(&stage);
    let tracer = stage.storage.tracer(stage.tracer());
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

    assert_exported(&stage, &["workflow"]);
    assert_eq!(stage.span("workflow").links.len(), 0);
    assert_eq!(stage.storage.stats().replayed_events, 2);
}

#[test]
fn headers_injected_inside_a_replay_name_the_recorded_span() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let workflow = recorded(stage);
        let traceparent = |context: &Context| {
            let mut headers = HashMap::new();
            TraceContextPropagator::new().inject_context(context, &mut headers);
            headers.remove("traceparent").expect("a valid context")
        };
        let expected = format!("00-{}-{}-01", workflow.trace_id(), workflow.span_id());
        stage.within("poll", UNTAGGED, || {
            let turn = stage.open("replay", replay());
            turn.inside(|| {
                assert_eq!(traceparent(&turn.otel_context()), expected);
                let current = WorkflowContext::current().map(|current| current.traceparent());
                assert_eq!(current, Some(expected.clone()));
                if stage.via() != Via::LayerWithoutActivation {
                    assert_eq!(traceparent(&Context::current()), expected);
                }
                let replayed = stage.open("replayed", UNTAGGED);
                assert_eq!(traceparent(&replayed.otel_context()), expected);
            });
        });
    });
}

// Real spans and stand-ins that have the same ids.

#[test]
fn a_span_that_is_still_open_keeps_its_children_while_a_replay_of_it_runs_elsewhere() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let (go_on, wait) = channel();
        let (is_replaying, replaying) = channel();
        // Whoever panics drops a channel's end, for which the other one does not wait.
        thread::scope(move |scope| {
            let original = stage.open("workflow", live());
            original.inside(move || {
                scope.spawn(move || {
                    stage.within("replay", replay(), || {
                        stage.step("replayed", UNTAGGED);
                        is_replaying.send(()).expect("the test still runs");
                        wait.recv().expect("the test still runs");
                        stage.step("replayed after", UNTAGGED);
                        stage.step("new", new_work());
                    });
                });
                replaying.recv().expect("the replay still runs");
                stage.step("child", UNTAGGED);
                stage.step("tagged child", live());
                go_on.send(()).expect("the replay still runs");
            });
        });
        assert_exported(stage, &["child", "new", "tagged child", "workflow"]);
        let workflow = stage.span("workflow");
        for name in ["child", "tagged child"] {
            assert_nested(&stage.span(name), &workflow);
        }
        assert_continues(&stage.span("new"), &workflow.span_context);
    });
}

#[test]
fn replays_and_live_spans_of_one_instance_on_many_threads_are_kept_apart() {
    const ROUNDS: usize = 200;
    for via in [Via::Layer, Via::Api] {
        let stage = Stage::new(WorkflowContextStorage::new(), via);
        let original = stage.open("workflow", live());
        original.inside(|| ());
        let start = Barrier::new(8);
        thread::scope(|scope| {
            for thread in 0..8 {
                let (stage, start, original) = (&stage, &start, original.clone());
                scope.spawn(move || {
                    start.wait();
                    for _ in 0..ROUNDS {
                        if thread % 2 == 0 {
                            original.inside(|| stage.step("live", UNTAGGED));
                        } else {
                            stage.within("replay", replay(), || {
                                stage.step("replayed", UNTAGGED);
                                stage.step("new", new_work());
                            });
                        }
                    }
                });
            }
        });
        drop(original);
        let count = |name| {
            stage
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
        stage
            .forest()
            .assert_one_trace()
            .assert_no_orphans()
            .assert_no_duplicates();
        assert_eq!(stage.storage.stats().replayed, 8 * ROUNDS as u64);
    }
}

#[test]
fn the_replay_of_one_storage_suppresses_nothing_of_another() {
    let ours = Stage::new(WorkflowContextStorage::new(), Via::Api);
    let theirs = Stage::new(WorkflowContextStorage::new(), Via::Api);
    let workflow = recorded(&ours);
    let context = ours.storage.get(ID).expect("a valid id").expect("recorded");
    theirs.storage.store(ID, context).expect("a valid id");
    // Both stand for the same span.
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

/// Opens a span while another one is being exported, as an exporter does whose HTTP client is instrumented.
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
fn an_exporter_that_opens_spans_beneath_the_exported_one_does_not_hang_while_a_replay_stands_for_it()
 {
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
        // Not joined: where it hangs it does so for ever.
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

// Odd orders.

#[test]
fn replays_may_end_in_any_order() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        recorded(stage);
        let outer = stage.open("outer", replay());
        let inner = outer.inside(|| stage.open("inner", UNTAGGED));
        let other = stage.open("other", replay());
        let innermost = inner.inside(|| stage.open("innermost", UNTAGGED));
        // Whether it is entered or not, each still suppresses what is opened beneath it.
        drop(outer);
        innermost.inside(|| stage.step("replayed", UNTAGGED));
        drop(other);
        inner.inside(|| stage.step("replayed", UNTAGGED));
        drop(inner);
        innermost.inside(|| stage.step("replayed", UNTAGGED));
        drop(innermost);

        stage.within("live", live(), || stage.step("nested", UNTAGGED));
        assert_exported(stage, &["live", "nested", "workflow"]);
    });
}

#[test]
fn a_replay_that_was_ended_still_suppresses_what_is_opened_beneath_it() {
    let stage = Stage::new(WorkflowContextStorage::new(), Via::Api);
    recorded(&stage);
    let turn = stage.open("replay", replay());
    let context = turn.otel_context();
    for _ in 0..2 {
        context.span().end();
        turn.inside(|| stage.step("replayed", UNTAGGED));
    }
    drop((turn, context));
    assert_exported(&stage, &["workflow"]);
}

#[test]
fn a_replay_that_is_never_entered_is_not_exported() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let workflow = recorded(stage);
        drop(stage.open("replay", replay()));
        drop(stage.open("unknown", Tags::of("unknown").replaying(true)));
        drop(stage.open("to come", Tags::to_come().replaying(true)));

        assert_exported(stage, &["workflow"]);
        assert_eq!(ids(&stage.stored(ID)), ids(&workflow));
        assert_eq!(stage.storage.instance_ids(), [ID]);
    });
}

#[test]
fn a_span_is_a_replay_by_its_parent_and_not_by_where_it_is_entered() {
    on_every_stage(WorkflowContextStorage::new, |stage| {
        let workflow = recorded(stage);
        let (opened_live, opened_in_replay) = {
            let opened_live = stage.open("opened live", UNTAGGED);
            let turn = stage.open("replay", replay());
            let opened_in_replay = turn.inside(|| stage.open("opened in replay", UNTAGGED));
            turn.inside(|| opened_live.inside(|| ()));
            (opened_live, opened_in_replay)
        };
        opened_in_replay.inside(|| ());
        drop((opened_live, opened_in_replay));

        assert_exported(stage, &["opened live", "workflow"]);
        assert_ne!(stage.trace_of("opened live"), workflow.trace_id());
    });
}

#[test]
fn new_work_in_a_replay_obeys_the_relations() {
    let make = || {
        let builder = WorkflowContextStorage::builder();
        let builder = builder.relation(Relation::SameTrace, Continuation::NewRootAndLink);
        builder.build().expect("a valid setting")
    };
    on_every_stage(make, |stage| {
        let workflow = recorded(stage);
        stage.within("replay", replay(), || {
            stage.step("new", live().replaying(false))
        });

        assert_root(&stage.span("new"));
        assert_eq!(
            links(&stage.span("new")),
            [("same_trace".to_owned(), ids(&workflow))]
        );
    });
}

// An orchestrator that is run again from its start on each turn, as duroxide's is.

const TURNS: usize = 20;

/// Runs all earlier steps again, then the new one, which schedules an activity for another worker thread.
fn orchestrate(stage: &Stage, turn: usize) {
    let orchestrator = stage.open("orchestrator", live().replaying(turn > 0));
    orchestrator.inside(|| {
        for step in 0..turn {
            stage.within(&format!("step {step}"), UNTAGGED, || {
                stage.step(&format!("detail {step}"), UNTAGGED);
            });
        }
        orchestrator.record_replaying(false);
        stage.within(&format!("step {turn}"), UNTAGGED, || {
            stage.step(&format!("detail {turn}"), UNTAGGED);
        });
    });
    drop(orchestrator);
    stage.step_elsewhere(&format!("activity {turn}"), live());
}

#[test]
fn an_orchestrator_that_is_run_again_on_each_turn_exports_each_span_once() {
    for via in VIAS {
        let before = Stage::new(WorkflowContextStorage::new(), via);
        (0..TURNS / 2).for_each(|turn| orchestrate(&before, turn));
        // The worker is replaced; what was recorded survives.
        let after = Stage::new(before.storage.clone(), via);
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
    }
}
