//! The first span of an instance: inside a request, inside a poller, and what many of them in one trace tell.

use std::time::Duration;

use crate::support::*;
use opentelemetry::trace::{SpanBuilder, TraceContextExt as _, Tracer as _};
use opentelemetry::{Context, KeyValue};
use tracing::{info_span, span::EnteredSpan};
use tracing_workflow_context::{
    BuildError, Continuation, Relation, WorkflowContextStorage, WorkflowContextStorageBuilder,
};

fn polling() -> WorkflowContextStorageBuilder {
    WorkflowContextStorage::builder().poller_spans(["worker", "my_crate::queue::poll"])
}

fn poller() -> EnteredSpan {
    info_span!("worker").entered()
}

fn step(name: &str, id: &str) {
    info_span!("step", otel.name = name, workflow.instance_id = id).in_scope(|| ());
}

/// One long-lived span around the loop of a worker, as DBOS's SDK has.
#[test]
fn a_worker_with_one_span_around_its_loop_keeps_its_instances_apart() {
    for worker in both_activations(|| polling().max_spans(10).build().unwrap()) {
        worker.run(|| {
            let _poller = poller();
            for round in 0..20 {
                for id in 0..50 {
                    // Spans between the poller and the tagged one change nothing.
                    let _task = (round % 2 == 0).then(|| info_span!("task").entered());
                    step(&format!("step {round} of {id}"), &format!("order-{id}"));
                }
            }
        });
        let polled = worker.trace_of("worker");
        for id in 0..50 {
            let traces: Vec<_> = (0..20)
                .map(|round| worker.trace_of(&format!("step {round} of {id}")))
                .collect();
            assert!(!traces.contains(&polled));
            // Ten spans in each of two traces.
            assert!(traces[..10].iter().all(|trace| *trace == traces[0]));
            assert!(traces[10..].iter().all(|trace| *trace == traces[10]));
            assert_ne!(traces[0], traces[10]);
            let first = worker.span(&format!("step 0 of {id}"));
            assert_root(&first);
            assert!(links(&first).is_empty(), "a poller has thousands");
            let later = worker.span(&format!("step 1 of {id}"));
            assert_continues(&later, &first.span_context);
            assert!(links(&later).is_empty());
        }
        assert_eq!(worker.forest().trace_count(), 1 + 50 * 2);
        assert_eq!(worker.storage.stats().shared_traces, 0);
        // Ordinary spans in a poller stay as they are.
        let tasks = (worker.spans().into_iter()).filter(|span| span.name == "task");
        assert!(
            tasks
                .into_iter()
                .all(|task| task.span_context.trace_id() == polled)
        );
    }
}

#[test]
fn a_poller_is_named_by_its_target_too() {
    for worker in both_activations(|| polling().build().unwrap()) {
        worker.run(|| {
            info_span!(target: "my_crate::queue", "poll").in_scope(|| step("named", "1"));
            info_span!(target: "another", "poll").in_scope(|| step("another", "2"));
        });
        assert_root(&worker.span("named"));
        assert_ne!(
            worker.span("another").parent_span_id,
            opentelemetry::SpanId::INVALID
        );
    }
}

#[test]
fn a_poller_may_be_made_through_the_opentelemetry_api() {
    let worker = Worker::via(Via::Api, polling().build().unwrap());
    let tracer = worker.storage.tracer(worker.tracer());
    let poller = Context::new().with_span(tracer.start_with_context("worker", &Context::new()));
    let tagged = |name: &'static str| {
        let id = KeyValue::new("workflow.instance_id", "order-42");
        let span = SpanBuilder::from_name(name).with_attributes([id]);
        drop(tracer.build_with_context(span, &poller));
    };
    tagged("first");
    tagged("second");
    assert_root(&worker.span("first"));
    assert_continues(&worker.span("second"), &worker.span("first").span_context);
    // When it has ended, its trace is one like any other.
    poller.span().end();
    let id = KeyValue::new("workflow.instance_id", "order-43");
    let span = SpanBuilder::from_name("after").with_attributes([id]);
    drop(tracer.build_with_context(span, &poller));
    assert_nested(&worker.span("after"), &worker.span("worker"));
}

#[test]
fn what_starts_inside_a_request_keeps_the_request_by_default() {
    let settings = [
        (None, true, 0),
        (Some(Continuation::Keep), true, 0),
        (Some(Continuation::NewRoot), false, 0),
        (Some(Continuation::NewRootAndLink), false, 1),
    ];
    for (setting, stays, linked) in settings {
        for worker in both_activations(|| {
            let builder = polling();
            match setting {
                None => builder.build().unwrap(),
                Some(setting) => builder.relation(Relation::First, setting).build().unwrap(),
            }
        }) {
            worker.run(|| info_span!("request").in_scope(|| step("first", "order-42")));
            let (first, request) = (worker.span("first"), worker.span("request"));
            assert_eq!(links(&first).len(), linked);
            if stays {
                assert_nested(&first, &request);
            } else {
                assert_root(&first);
                let to_request = ("first".to_owned(), ids(&request.span_context));
                assert!(links(&first).iter().all(|link| *link == to_request));
            }
            let stored = worker.stored("order-42");
            assert_same_span(&stored, &first.span_context);
        }
    }
}

#[test]
fn a_poller_may_be_linked_or_kept_by_a_setting() {
    let settings = [Continuation::NewRootAndLink, Continuation::Keep];
    for setting in settings {
        for worker in both_activations(|| {
            polling()
                .relation(Relation::Polled, setting)
                .build()
                .unwrap()
        }) {
            worker.run(|| {
                let _poller = poller();
                step("first", "order-42");
            });
            let (first, poller) = (worker.span("first"), worker.span("worker"));
            match setting {
                Continuation::Keep => assert_nested(&first, &poller),
                _ => {
                    assert_root(&first);
                    let to_poller = ("polled".to_owned(), ids(&poller.span_context));
                    assert_eq!(links(&first), [to_poller]);
                }
            }
        }
    }
}

#[test]
fn nothing_is_stored_for_a_first_span_so_it_cannot_become_a_parent() {
    for relation in [Relation::First, Relation::Polled] {
        for continuation in [
            Continuation::Parent,
            Continuation::Link,
            Continuation::ParentAndLink,
        ] {
            let refused = polling().relation(relation, continuation).build();
            assert!(matches!(
                refused,
                Err(BuildError::ImpossibleRelation { .. })
            ));
        }
    }
}

#[test]
fn a_child_workflow_in_a_poller_continues_its_parent_instance() {
    for worker in both_activations(|| polling().build().unwrap()) {
        worker.run(|| {
            step("parent", "order-42");
            let _poller = poller();
            info_span!(
                "child",
                workflow.instance_id = "order-42/ship",
                workflow.parent_instance_id = "order-42"
            )
            .in_scope(|| ());
        });
        let child = worker.span("child");
        assert_continues(&child, &worker.span("parent").span_context);
        assert!(links(&child).is_empty());
    }
}

#[test]
fn an_id_that_comes_late_in_a_poller_does_not_make_its_trace_the_instances() {
    let worker = Worker::with_storage(polling().build().unwrap());
    worker.run(|| {
        let _poller = poller();
        let span = info_span!("late", workflow.instance_id = tracing::field::Empty);
        span.in_scope(|| info_span!("inside").in_scope(|| ()));
        span.record("workflow.instance_id", "order-42");
        drop(span);
        step("next", "order-42");
    });
    assert_root(&worker.span("next"));
    assert_eq!(worker.trace_of("late"), worker.trace_of("worker"));
}

#[test]
fn a_run_id_that_comes_late_in_a_poller_does_not_make_its_trace_the_runs() {
    for worker in both_activations(|| polling().build().unwrap()) {
        worker.run(|| {
            info_span!(
                "run 1",
                workflow.instance_id = "order-42",
                workflow.run_id = "1"
            )
            .in_scope(|| ());
            let poller = poller();
            let empty = tracing::field::Empty;
            let span = info_span!("late", workflow.instance_id = empty, workflow.run_id = "2");
            span.in_scope(|| info_span!("inside").in_scope(|| ()));
            span.record("workflow.instance_id", "order-42");
            drop((span, poller));
            info_span!(
                "run 2",
                workflow.instance_id = "order-42",
                workflow.run_id = "2"
            )
            .in_scope(|| ());
        });
        assert_eq!(worker.trace_of("late"), worker.trace_of("worker"));
        let run_1 = ids(&worker.span("run 1").span_context);
        let to_run_1 = [("new_run".to_owned(), run_1)];
        assert_eq!(links(&worker.span("late")), to_run_1);
        assert_root(&worker.span("run 2"));
        assert_eq!(links(&worker.span("run 2")), to_run_1);
    }
}

#[test]
fn a_new_run_or_generation_keeps_its_request_as_a_link() {
    let clock = ManualClock::new();
    let builder = WorkflowContextStorage::builder()
        .max_age(Duration::from_secs(60))
        .clock(clock.clone());
    let worker = Worker::with_storage(builder.build().unwrap());
    worker.step("first", Tags::instance("order-42").run("1"));
    worker.within("request 2", UNTAGGED, || {
        worker.step("run 2", Tags::instance("order-42").run("2"));
    });
    clock.advance(Duration::from_secs(61));
    worker.within("request 3", UNTAGGED, || {
        worker.step("generation 2", Tags::instance("order-42").run("2"));
    });
    for (name, relation, old, request) in [
        ("run 2", "new_run", "first", "request 2"),
        ("generation 2", "expired", "run 2", "request 3"),
    ] {
        let span = worker.span(name);
        assert_root(&span);
        let expected = [
            (relation.to_owned(), ids(&worker.span(old).span_context)),
            (
                "foreign".to_owned(),
                ids(&worker.span(request).span_context),
            ),
        ];
        assert_eq!(links(&span), expected);
    }
}

#[test]
fn a_span_nested_in_an_older_run_or_generation_stays_there() {
    for_each_worker(
        || {
            WorkflowContextStorage::builder()
                .max_spans(1)
                .build()
                .unwrap()
        },
        |worker| {
            let open = worker.open("first", Tags::instance("order-42"));
            open.inside(|| {
                // Another task opens the second and the third trace.
                worker.step_elsewhere("second", Tags::instance("order-42"));
                worker.step_elsewhere("third", Tags::instance("order-42"));
                worker.step("nested", Tags::instance("order-42"));
            });
            let run = worker.open("run 1", Tags::instance("order-43").run("1"));
            run.inside(|| {
                worker.step_elsewhere("run 2", Tags::instance("order-43").run("2"));
                worker.step("nested in run 1", Tags::instance("order-43").run("2"));
            });
            drop((open, run));
            assert_nested(&worker.span("nested"), &worker.span("first"));
            assert_nested(&worker.span("nested in run 1"), &worker.span("run 1"));
            assert_ne!(worker.trace_of("second"), worker.trace_of("first"));
            assert_ne!(worker.trace_of("third"), worker.trace_of("second"));
            assert_ne!(worker.trace_of("run 2"), worker.trace_of("run 1"));
        },
    );
}

#[test]
fn a_trace_that_many_instances_share_is_reported() {
    for worker in both_activations(WorkflowContextStorage::new) {
        worker.run(|| {
            let _poller = poller();
            for id in 0..16 {
                step("step", &format!("order-{id}"));
            }
            assert_eq!(worker.storage.stats().shared_traces, 0);
            for id in 16..40 {
                step("step", &format!("order-{id}"));
            }
        });
        assert_eq!(
            worker.storage.stats().shared_traces,
            1,
            "once for each trace"
        );
        let explanation = worker.storage.explain("order-3").to_string();
        assert!(explanation.contains("poller_spans"), "{explanation}");
    }
}

#[test]
fn a_workflow_with_many_children_is_not_taken_for_a_poller() {
    for worker in both_activations(WorkflowContextStorage::new) {
        worker.run(|| {
            let parent = info_span!("parent", workflow.instance_id = "order-42");
            parent.in_scope(|| {
                for child in 0..40 {
                    step("child", &format!("order-42/{child}"));
                }
            });
        });
        assert_eq!(worker.storage.stats().shared_traces, 0);
        assert_eq!(worker.forest().trace_count(), 1);
    }
}

#[test]
fn explain_shows_who_joined_after_the_end() {
    let worker = Worker::new();
    worker.run(|| {
        info_span!(
            "done",
            workflow.instance_id = "order-42",
            workflow.status = "completed"
        )
        .in_scope(|| ());
        step("again", "order-42");
    });
    let explanation = worker.storage.explain("order-42").to_string();
    assert!(
        explanation.contains("joined after its end"),
        "{explanation}"
    );
}
