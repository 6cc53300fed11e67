//! One instance, one trace: the table "What becomes of a tagged span", and every way of opening such a span.
use crate::support::*;

use std::future::Future;
use std::pin::pin;
use std::task::{Context as TaskContext, Poll, Waker};

use opentelemetry::trace::{
    SpanContext, TraceContextExt as _, TraceFlags, TraceState, Tracer as _,
};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_sdk::trace::Sampler;
use tracing::field::Empty;
use tracing::instrument::WithSubscriber as _;
use tracing::{Instrument as _, Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_workflow_context::{Continuation, Relation, WorkflowContext, WorkflowContextStorage};

const FIELD: &str = "workflow.instance_id";
const ID: &str = "order-42";
/// An unrelated instance.
const OTHER: &str = "order-43";

/// A span of the instance.
macro_rules! tagged {
    ($name:literal, $($id:tt)+) => { info_span!($name, workflow.instance_id = $($id)+) };
}

fn open(span: Span) {
    span.in_scope(|| {});
}

/// Records the instance with a span that has ended.
fn record(worker: &Worker) -> SpanContext {
    worker.run(|| open(tagged!("first", ID)));
    worker.stored(ID)
}

// The rows of the table, in its order.

#[test]
fn the_first_span_of_an_instance_keeps_its_natural_parent_and_is_recorded() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        worker.run_in(place, || {
            open(tagged!("alone", "a"));
            info_span!("poll").in_scope(|| open(tagged!("polled", "b")));
            let _request = remote_context(7, 8).attach();
            open(tagged!("served", "c"));
        });

        assert_root(&worker.span("alone"));
        assert_nested(&worker.span("polled"), &worker.span("poll"));
        assert_continues(&worker.span("served"), &remote(7, 8));
        for (id, name) in [("a", "alone"), ("b", "polled"), ("c", "served")] {
            let span = worker.span(name);
            assert_same_span(&worker.stored(id), &span.span_context);
            assert!(span.links.is_empty(), "{:?}", span.links);
        }
    });
}

#[test]
fn the_first_span_remains_the_recorded_one() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let first = record(worker);
        worker.run_in(place, || {
            open(tagged!("later", ID));
            info_span!("poll").in_scope(|| open(tagged!("polled", ID)));
        });

        assert_same_span(&worker.stored(ID), &first);
        assert_same_span(&worker.span("first").span_context, &first);
    });
}

#[test]
fn a_child_instance_starts_in_its_parent_instance() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let parent = record(worker);
        worker.run_in(place, || open(child("child")));

        let child = worker.span("child");
        assert_continues(&child, &parent);
        assert!(child.links.is_empty(), "{:?}", child.links);
        assert_same_span(&worker.stored("child"), &child.span_context);
        assert_same_span(&worker.stored(ID), &parent);
    });
}

#[test]
fn a_child_instance_links_to_the_foreign_parent_that_it_leaves() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let parent = record(worker);
        worker.run_in(place, || {
            info_span!("poll").in_scope(|| open(child("child")))
        });

        let (child, poll) = (worker.span("child"), worker.span("poll"));
        assert_continues(&child, &parent);
        assert_eq!(link(&child), ("child".to_owned(), poll.span_context));
        assert_same_span(&worker.stored("child"), &child.span_context);
    });
}

#[test]
fn a_child_instance_that_is_nested_in_its_parents_trace_stays_there() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        record(worker);
        worker.run_in(place, || {
            tagged!("parent", ID).in_scope(|| open(child("child")))
        });

        let child = worker.span("child");
        assert_nested(&child, &worker.span("parent"));
        assert!(child.links.is_empty(), "{:?}", child.links);
        assert_same_span(&worker.stored("child"), &child.span_context);
    });
}

#[test]
fn a_child_instance_of_an_unknown_parent_keeps_its_natural_parent() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        worker.run_in(place, || {
            info_span!("poll").in_scope(|| open(child("child")))
        });

        let child = worker.span("child");
        assert_nested(&child, &worker.span("poll"));
        assert_same_span(&worker.stored("child"), &child.span_context);
        assert_eq!(worker.storage.instance_ids(), ["child"]);
    });
}

#[test]
fn a_parent_instance_applies_only_to_the_first_span_of_its_child() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        worker.run(|| open(tagged!("started before its parent", "child")));
        record(worker);
        worker.run_in(place, || open(child("child")));

        assert_continues(&worker.span("child"), &worker.stored("child"));
        assert_eq!(worker.forest().trace_count(), 2);
    });
}

#[test]
fn a_later_span_without_a_parent_continues_the_stored_context() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let first = record(worker);
        worker.run_in(place, || open(tagged!("later", ID)));

        let later = worker.span("later");
        assert_continues(&later, &first);
        assert!(later.links.is_empty(), "{:?}", later.links);
        worker.forest().assert_one_trace().assert_no_orphans();
    });
}

#[test]
fn a_later_span_whose_parent_is_none_continues_the_stored_context_wherever_it_opens() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let first = record(worker);
        worker.run_in(place, || {
            let detached = || open(info_span!(parent: None, "detached", workflow.instance_id = ID));
            info_span!("poll").in_scope(detached);
            tagged!("same trace", ID).in_scope(detached);
        });

        let detached = || {
            worker
                .spans()
                .into_iter()
                .filter(|span| span.name == "detached")
        };
        assert_eq!(detached().count(), 2);
        for span in detached() {
            assert_continues(&span, &first);
            assert!(span.links.is_empty(), "{:?}", span.links);
        }
    });
}

#[test]
fn a_later_span_that_is_nested_in_the_stored_trace_keeps_its_parent() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        record(worker);
        worker.run_in(place, || {
            tagged!("outer", ID).in_scope(|| {
                info_span!("untagged").in_scope(|| open(tagged!("inner", ID)));
            });
        });

        let inner = worker.span("inner");
        assert_nested(&worker.span("untagged"), &worker.span("outer"));
        assert_nested(&inner, &worker.span("untagged"));
        assert!(inner.links.is_empty(), "{:?}", inner.links);
    });
}

#[test]
fn a_remote_parent_in_the_stored_trace_is_kept() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let first = record(worker);
        let trace = u128::from_be_bytes(first.trace_id().to_bytes());
        worker.run_in(place, || {
            let _request = remote_context(trace, 8).attach();
            open(tagged!("served", ID));
        });

        let served = worker.span("served");
        assert_continues(&served, &remote(trace, 8));
        assert!(served.links.is_empty(), "{:?}", served.links);
    });
}

#[test]
fn a_later_span_under_a_foreign_parent_is_reparented_and_links_to_it() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let first = record(worker);
        worker.run_in(place, || {
            info_span!("poll").in_scope(|| open(tagged!("polled", ID)));
            tagged!("other", OTHER).in_scope(|| open(tagged!("in another instance", ID)));
            let _request = remote_context(7, 8).attach();
            open(tagged!("served", ID));
        });

        for (name, parent) in [
            ("polled", worker.span("poll").span_context),
            ("in another instance", worker.span("other").span_context),
            ("served", remote(7, 8)),
        ] {
            let span = worker.span(name);
            assert_continues(&span, &first);
            assert_eq!(link(&span), ("foreign".to_owned(), parent));
        }
    });
}

#[test]
fn descendants_of_a_reparented_span_follow_it() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let first = record(worker);
        worker.run_in(place, || {
            info_span!("poll").in_scope(|| {
                tagged!("moved", ID).in_scope(|| {
                    info_span!("untagged").in_scope(|| open(tagged!("tagged", ID)));
                });
                open(info_span!("still polling"));
            });
        });

        assert_nested(&worker.span("untagged"), &worker.span("moved"));
        assert_nested(&worker.span("tagged"), &worker.span("untagged"));
        assert_nested(&worker.span("still polling"), &worker.span("poll"));
        assert_eq!(
            worker.span("tagged").span_context.trace_id(),
            first.trace_id()
        );
        assert_ne!(
            worker.span("poll").span_context.trace_id(),
            first.trace_id()
        );
    });
}

#[test]
fn untagged_spans_are_unchanged() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        record(worker);
        worker.run_in(place, || {
            info_span!("root").in_scope(|| open(info_span!("child")));
            let _request = remote_context(7, 8).attach();
            open(info_span!("served"));
        });

        assert_root(&worker.span("root"));
        assert_nested(&worker.span("child"), &worker.span("root"));
        assert_continues(&worker.span("served"), &remote(7, 8));
        assert_eq!(worker.storage.instance_ids(), [ID]);
    });
}

// Instance ids.

/// An instance, and ways to open a span of it.
type Named = (&'static str, &'static [fn() -> Span]);

const NAMED: [Named; 7] = [
    (
        "42",
        &[
            || tagged!("step", "42"),
            || tagged!("step", %"42"),
            || tagged!("step", ?"42"),
            || tagged!("step", ?String::from("42")),
            || tagged!("step", String::from("42")),
            || tagged!("step", Some("42")),
            || tagged!("step", &Box::new("42")),
            || tagged!("step", 42_u8),
            || tagged!("step", 42_i64),
            || tagged!("step", 42_u64),
            || tagged!("step", 42_i128),
            || tagged!("step", 42_u128),
            || tagged!("step", ?42),
        ],
    ),
    (
        "-7",
        &[
            || tagged!("step", -7_i64),
            || tagged!("step", "-7"),
            || tagged!("step", -7_i128),
        ],
    ),
    (
        "18446744073709551615",
        &[|| tagged!("step", u64::MAX), || tagged!("step", %u64::MAX)],
    ),
    (
        "true",
        &[|| tagged!("step", true), || tagged!("step", "true")],
    ),
    (
        "-1.5",
        &[
            || tagged!("step", -1.5),
            || tagged!("step", %-1.5),
            || tagged!("step", "-1.5"),
        ],
    ),
    (
        "a \"b\"\\\n\u{7f}ü",
        &[
            || tagged!("step", "a \"b\"\\\n\u{7f}ü"),
            || tagged!("step", %"a \"b\"\\\n\u{7f}ü"),
            || tagged!("step", ?"a \"b\"\\\n\u{7f}ü"),
        ],
    ),
    (
        "Order { number: 42 }",
        &[
            || tagged!("step", ?Order { number: 42 }),
            || tagged!("step", "Order { number: 42 }"),
        ],
    ),
];

#[test]
fn ids_are_compared_by_their_formatted_value() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        for (id, spans) in NAMED {
            worker.run_in(place, || spans.iter().for_each(|span| open(span())));
            worker.stored(id);
        }
        worker.run_in(place, || {
            open(recorded_before_it_starts(&"42"));
            open(recorded_before_it_starts(&42_i64));
            open(recorded_before_it_starts(&42_i128));
            open(recorded_before_it_starts(&tracing::field::debug("42")));
        });

        assert_eq!(worker.storage.instance_ids().len(), NAMED.len());
        assert_eq!(worker.forest().trace_count(), NAMED.len());
    });
}

#[test]
fn an_adopted_span_joins_exactly_the_instance_of_its_child() {
    let adopting = || {
        WorkflowContextStorage::builder()
            .adopt_spans(["handler"])
            .build()
            .unwrap()
    };
    let whole: Named = ("42", &[|| tagged!("step", 42.0), || tagged!("step", %42.0)]);
    for (id, spans) in NAMED.into_iter().chain([whole]) {
        for span in spans {
            everywhere(adopting, |worker, place| {
                worker.run_in(place, || info_span!("handler").in_scope(|| open(span())));

                let handler = worker.span("handler");
                assert_eq!(worker.storage.instance_ids(), [id]);
                assert_eq!(attribute(&handler, FIELD), Some(id.to_owned().into()));
                assert_same_span(&worker.stored(id), &handler.span_context);
                assert_nested(&worker.span("step"), &handler);
            });
        }
    }
}

#[test]
fn ids_with_different_formatted_values_are_different_instances() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        worker.run_in(place, || {
            open(tagged!("step", "1"));
            open(tagged!("step", "01"));
            open(tagged!("step", " 1"));
            open(tagged!("step", "\"1"));
            open(tagged!("step", "1.0"));
            open(tagged!("step", 10));
        });

        assert_eq!(worker.storage.instance_ids().len(), 6);
        assert_eq!(worker.forest().trace_count(), 6);
    });
}

#[test]
fn an_id_without_a_value_is_ignored() {
    let untagged: [fn() -> Span; 8] = [
        || tagged!("step", ""),
        || tagged!("step", %""),
        || tagged!("step", ?""),
        || tagged!("step", None::<&str>),
        || tagged!("step", ?None::<&str>),
        || recorded_before_it_starts(&tracing::field::debug(None::<&str>)),
        || tagged!("step", Empty),
        || recorded_before_it_starts(&""),
    ];
    everywhere(WorkflowContextStorage::new, |worker, place| {
        for span in untagged {
            worker.run_in(place, || open(span()));
            worker.run_in(place, || info_span!("parent").in_scope(|| open(span())));
        }

        assert!(worker.storage.instance_ids().is_empty());
        assert_eq!(worker.storage.stats().misses, 0, "nothing was looked up");
        assert_eq!(worker.forest().trace_count(), 2 * untagged.len());
    });
}

#[test]
fn the_first_id_field_with_a_value_in_builder_order_is_used() {
    let fields = || {
        let builder = WorkflowContextStorage::builder();
        builder
            .instance_id_fields(["order.id", FIELD, "cart"])
            .build()
            .unwrap()
    };
    let spans: [fn() -> Span; 5] = [
        || {
            info_span!(
                "step",
                order.id = "a",
                workflow.instance_id = "b",
                cart = "c"
            )
        },
        || {
            info_span!(
                "step",
                cart = "c",
                workflow.instance_id = "b",
                order.id = "a"
            )
        },
        || {
            info_span!(
                "step",
                order.id = "",
                workflow.instance_id = "a",
                cart = "c"
            )
        },
        || info_span!("step", cart = "c", order.id = Empty, workflow.instance_id = ?"a"),
        || info_span!("step", order.id = None::<u8>, workflow.instance_id = ?"", cart = %"a"),
    ];
    everywhere(fields, |worker, place| {
        worker.run_in(place, || spans.iter().for_each(|span| open(span())));

        assert_eq!(worker.storage.instance_ids(), ["a"]);
        worker.forest().assert_one_trace();
    });
}

#[test]
fn only_configured_fields_are_read_as_ids() {
    let fields = || {
        let builder = WorkflowContextStorage::builder();
        builder.instance_id_fields(["order.id"]).build().unwrap()
    };
    everywhere(fields, |worker, place| {
        worker.run_in(place, || open(tagged!("step", ID)));

        assert!(worker.storage.instance_ids().is_empty());
    });
}

// Ways to open a span.

#[tracing::instrument(skip_all, fields(workflow.instance_id = id))]
fn instrumented(id: &str) {
    nested();
}

#[tracing::instrument]
fn nested() {}

#[tracing::instrument(skip_all, fields(workflow.instance_id = %id))]
async fn instrumented_task(id: &str) {
    activities(id).await;
}

/// A task with several polls, and child spans in each.
async fn activities(id: &str) {
    for _ in 0..5 {
        nested();
        tokio::task::yield_now().await;
        instrumented(id);
    }
}

#[test]
fn an_instrumented_function_joins_its_instance() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let first = record(worker);
        worker.run_in(place, || instrumented(ID));

        assert_continues(&worker.span("instrumented"), &first);
        assert_nested(&worker.span("nested"), &worker.span("instrumented"));
    });
}

#[test]
fn a_task_that_moves_between_threads_is_one_span_of_its_instance() {
    for worker in both_activations(WorkflowContextStorage::new) {
        let _drawing = DrawnOnPanic(&worker, "polled by threads".to_owned());
        let first = record(&worker);
        poll_on_new_threads(&worker, instrumented_task(ID));
        worker.run(|| assert_same_span(&worker.stored(ID), &first));
        let task = worker.run(|| activities(ID).instrument(tagged!("instrument", ID)));
        poll_on_new_threads(&worker, task);

        let forest = worker.forest();
        forest.assert_one_trace().assert_no_orphans();
        for name in ["instrumented_task", "instrument"] {
            let task = worker.span(name);
            assert_continues(&task, &first);
            let beneath = forest
                .spans()
                .filter(|span| forest.parent_of(span) == Some(&task));
            assert_eq!(beneath.count(), 10, "beneath {name}");
        }
    }
}

#[test]
fn tasks_of_a_runtime_stay_in_the_traces_of_their_instances() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .build();
    let runtime = runtime.expect("a runtime");
    let ids = ["a", "b", "c", "d"];
    for worker in both_activations(WorkflowContextStorage::new) {
        let _drawing = DrawnOnPanic(&worker, "spawned".to_owned());
        worker.run(|| ids.iter().for_each(|id| open(tagged!("first", id))));
        let tasks: Vec<_> = (0..4)
            .flat_map(|_| ids)
            .map(|id| runtime.spawn(instrumented_task(id).with_subscriber(worker.dispatch.clone())))
            .collect();
        for task in tasks {
            runtime.block_on(task).expect("the task panicked");
        }

        let forest = worker.forest();
        forest.assert_no_orphans();
        assert_eq!(forest.trace_count(), ids.len());
        for span in forest
            .spans()
            .filter(|span| span.name == "instrumented_task")
        {
            let Some(Value::String(id)) = attribute(span, FIELD) else {
                panic!("no id")
            };
            assert_continues(span, &worker.stored(id.as_str()));
        }
    }
}

#[test]
fn an_explicit_parent_is_a_natural_parent() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let first = record(worker);
        let (poll, step) = worker.run(|| (info_span!("poll"), tagged!("step", ID)));
        worker.run_in(place, || {
            open(info_span!(parent: &poll, "polled", workflow.instance_id = ID));
            open(info_span!(parent: &step, "nested", workflow.instance_id = ID));
            // Neither was entered: a child starts its parent.
            assert_same_span(&worker.stored(ID), &first);
        });
        worker.run(|| drop((poll, step)));

        assert_continues(&worker.span("step"), &first);
        assert_nested(&worker.span("nested"), &worker.span("step"));
        assert_continues(&worker.span("polled"), &first);
        let poll = worker.span("poll").span_context;
        assert_eq!(link(&worker.span("polled")), ("foreign".to_owned(), poll));
    });
}

#[test]
fn an_explicit_child_records_the_instance_of_a_parent_that_was_never_entered() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let parent = worker.run(|| tagged!("parent", ID));
        assert_eq!(worker.storage.get(ID).unwrap(), None);
        worker.run_in(place, || open(info_span!(parent: &parent, "child")));
        let stored = worker.stored(ID);
        worker.run(|| drop(parent));

        assert_same_span(&worker.span("parent").span_context, &stored);
        assert_nested(&worker.span("child"), &worker.span("parent"));
    });
}

#[test]
fn a_span_that_is_never_entered_is_recorded_when_it_closes() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let first = worker.run(|| tagged!("first", ID));
        assert_eq!(worker.storage.get(ID).unwrap(), None);
        worker.run_in(place, || drop(first));
        let stored = worker.stored(ID);
        worker.run_in(place, || drop(tagged!("later", ID)));

        assert_same_span(&worker.span("first").span_context, &stored);
        assert_continues(&worker.span("later"), &stored);
    });
}

#[test]
fn a_span_is_recorded_when_it_is_first_entered() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        worker.run_in(place, || {
            // The first span that the layer ever sees may behave differently from later ones.
            for id in ["a", "b"] {
                let span = tagged!("step", id);
                assert_eq!(worker.storage.get(id).unwrap(), None);
                span.in_scope(|| {
                    let stored = worker.stored(id);
                    assert_same_span(&stored, Span::current().context().span().span_context());
                });
                open(info_span!("untagged"));
            }
        });
    });
}

#[test]
fn an_instrumented_task_is_recorded_by_its_first_poll() {
    for worker in both_activations(WorkflowContextStorage::new) {
        let task = async {
            let at_first = worker.storage.get(ID).unwrap();
            tokio::task::yield_now().await;
            (at_first, worker.storage.get(ID).unwrap())
        };
        let task = worker.run(|| task.instrument(tagged!("task", ID)));
        let (at_first, at_last) = poll_on_new_threads(&worker, task);

        assert!(at_first.is_some());
        assert_eq!(at_first, at_last);
        assert_same_span(&worker.span("task").span_context, &worker.stored(ID));
    }
}

#[test]
fn a_parent_that_the_user_set_is_a_natural_parent() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let set_parent = |span: Span, parent: &SpanContext| {
            let parent = Context::new().with_remote_span_context(parent.clone());
            span.set_parent(parent).expect("the span has not started");
            open(span);
        };
        worker.run_in(place, || set_parent(tagged!("first", ID), &remote(1, 2)));
        worker.run_in(place, || {
            set_parent(tagged!("same trace", ID), &remote(1, 3));
            set_parent(tagged!("other trace", ID), &remote(7, 8));
        });

        let (same, other) = (worker.span("same trace"), worker.span("other trace"));
        assert_continues(&worker.span("first"), &remote(1, 2));
        assert_continues(&same, &remote(1, 3));
        assert!(same.links.is_empty(), "{:?}", same.links);
        assert_continues(&other, &worker.span("first").span_context);
        assert_eq!(link(&other), ("foreign".to_owned(), remote(7, 8)));
    });
}

#[test]
fn a_span_that_panics_leaves_its_instance_intact() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        worker.run_in(place, || {
            let panics =
                || tagged!("panics", ID).in_scope(|| std::panic::resume_unwind(Box::new(1)));
            std::panic::catch_unwind(panics).expect_err("it panics");
        });
        worker.run_in(place, || open(tagged!("later", ID)));

        assert_continues(&worker.span("later"), &worker.span("panics").span_context);
    });
}

// Spans made through the OpenTelemetry API alone.

#[test]
fn spans_of_the_opentelemetry_api_follow_the_same_table() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let tracer = worker.storage.tracer(worker.tracer());
        let tagged = |name: &'static str| {
            tracer
                .span_builder(name)
                .with_attributes([KeyValue::new(FIELD, ID)])
        };
        worker.run_in(place, || {
            drop(tracer.build(tagged("first")));
            drop(tracer.build(tagged("later")));
            drop(tracer.build_with_context(tagged("served"), &remote_context(7, 8)));
            tracer.in_span("poll", |_| {
                tracer.in_span_with_builder(tagged("polled"), |_| {
                    tracer.in_span("nested", |_| drop(tracer.build(tagged("deeper"))));
                    drop(tracer.build_with_context(tagged("detached"), &Context::new()));
                })
            });
        });

        let first = worker.span("first");
        assert_root(&first);
        assert_same_span(&worker.stored(ID), &first.span_context);
        for name in ["later", "served", "polled", "detached"] {
            assert_continues(&worker.span(name), &first.span_context);
        }
        assert_nested(&worker.span("nested"), &worker.span("polled"));
        assert_nested(&worker.span("deeper"), &worker.span("nested"));
        assert_eq!(
            link(&worker.span("served")),
            ("foreign".to_owned(), remote(7, 8))
        );
        let poll = worker.span("poll").span_context;
        assert_eq!(link(&worker.span("polled")), ("foreign".to_owned(), poll));
        for name in ["later", "deeper", "detached"] {
            assert!(worker.span(name).links.is_empty(), "{name}");
        }
    });
}

#[test]
fn the_opentelemetry_api_starts_child_instances_in_their_parents() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let tracer = worker.storage.tracer(worker.tracer());
        let parent = record(worker);
        worker.run_in(place, || {
            let child = tracer.span_builder("child").with_attributes([
                KeyValue::new(FIELD, "child"),
                KeyValue::new("workflow.parent_instance_id", ID),
            ]);
            drop(tracer.build_with_context(child, &remote_context(7, 8)));
        });

        let child = worker.span("child");
        assert_continues(&child, &parent);
        assert_eq!(link(&child), ("child".to_owned(), remote(7, 8)));
        assert_same_span(&worker.stored("child"), &child.span_context);
    });
}

#[test]
fn an_attribute_and_a_field_with_equal_text_name_the_same_instance() {
    let worker = Worker::new();
    let tracer = worker.storage.tracer(worker.tracer());
    for id in [Value::I64(42), "42".into(), "\"42\"".into()] {
        let builder = tracer
            .span_builder("step")
            .with_attributes([KeyValue::new(FIELD, id)]);
        drop(tracer.build(builder));
    }
    worker.run(|| open(tagged!("step", 42)));
    for no_id in [KeyValue::new(FIELD, ""), KeyValue::new("other", "42")] {
        drop(tracer.build(tracer.span_builder("untagged").with_attributes([no_id])));
    }

    assert_eq!(worker.storage.instance_ids(), ["42"]);
    assert_eq!(worker.forest().trace_count(), 3, "{}", worker.forest());
}

#[test]
fn spans_of_both_apis_share_their_instance() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let tracer = worker.storage.tracer(worker.tracer());
        let api = |name: &'static str, id| {
            tracer
                .span_builder(name)
                .with_attributes([KeyValue::new(FIELD, id)])
        };
        worker.run_in(place, || {
            open(tagged!("tracing first", "a"));
            drop(tracer.build(api("api later", "a")));
            drop(tracer.build(api("api first", "b")));
            open(tagged!("tracing later", "b"));
            tracer.in_span_with_builder(api("api around", "b"), |_| {
                open(tagged!("tracing within", "b"));
            });
        });

        assert_continues(
            &worker.span("api later"),
            &worker.span("tracing first").span_context,
        );
        assert_continues(
            &worker.span("tracing later"),
            &worker.span("api first").span_context,
        );
        assert_nested(&worker.span("tracing within"), &worker.span("api around"));
        assert_eq!(worker.forest().trace_count(), 2);
    });
}

// Flags and tracestate of the stored context.

#[test]
fn the_stored_flags_and_tracestate_are_kept() {
    const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03";
    const TRACESTATE: &str = "vendor=1,other=a b";
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let elsewhere = WorkflowContext::parse(TRACEPARENT, TRACESTATE).unwrap();
        worker.storage.store(ID, elsewhere.clone()).unwrap();
        worker.run_in(place, || tagged!("step", ID).in_scope(nested));

        let step = worker.span("step");
        assert_continues(&step, elsewhere.to_otel().span().span_context());
        for span in [&step, &worker.span("nested")] {
            assert_eq!(
                span.span_context.trace_flags(),
                TraceFlags::new(3),
                "sampled and random"
            );
            assert_eq!(span.span_context.trace_state().header(), TRACESTATE);
        }
        assert_eq!(worker.storage.get(ID).unwrap(), Some(elsewhere));
    });
}

#[test]
fn later_spans_inherit_the_tracestate_of_the_first() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let state = TraceState::from_key_value([("vendor", "1")]).unwrap();
        let parent = SpanContext::new(1.into(), 2.into(), TraceFlags::SAMPLED, true, state.clone());
        worker.run(|| {
            let _request = Context::new().with_remote_span_context(parent).attach();
            open(tagged!("first", ID));
        });
        worker.run_in(place, || open(tagged!("later", ID)));

        assert_continues(&worker.span("later"), &worker.span("first").span_context);
        assert_eq!(worker.span("later").span_context.trace_state(), &state);
    });
}

#[test]
fn a_first_span_that_was_not_sampled_is_recorded_and_the_later_ones_stay_unsampled() {
    for (place, activation) in PLACES
        .into_iter()
        .flat_map(|place| [(place, true), (place, false)])
    {
        let storage = WorkflowContextStorage::new();
        let dropping = Worker::with_sampler(storage.clone(), activation, Sampler::AlwaysOff);
        dropping.run_in(place, || open(tagged!("first", ID)));
        let first = dropping.stored(ID);
        assert!(first.is_valid() && !first.is_sampled());

        let root = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
        let parent_based = Worker::with_sampler(storage.clone(), activation, root);
        parent_based.run_in(place, || {
            tagged!("later", ID).in_scope(|| open(tagged!("deeper", ID)));
            open(tagged!("other", OTHER));
        });
        let always_on = Worker::with_sampler(storage, activation, Sampler::AlwaysOn);
        always_on.run_in(place, || open(tagged!("sampled all the same", ID)));

        assert_eq!(dropping.spans(), []);
        let names: Vec<_> = parent_based
            .spans()
            .into_iter()
            .map(|span| span.name)
            .collect();
        assert_eq!(names, ["other"], "{place:?}, activation: {activation}");
        assert_continues(&always_on.span("sampled all the same"), &first);
        assert_same_span(&always_on.stored(ID), &first);
        assert!(!always_on.stored(ID).is_sampled());
    }
}

#[test]
fn a_context_that_was_stored_unsampled_keeps_its_instance_unsampled() {
    let root = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
    let worker = Worker::with_sampler(WorkflowContextStorage::new(), true, root);
    let unsampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    worker
        .storage
        .store(ID, WorkflowContext::parse(unsampled, "").unwrap())
        .unwrap();
    worker.run(|| {
        open(tagged!("unsampled", ID));
        open(tagged!("sampled", OTHER));
    });

    let names: Vec<_> = worker.spans().into_iter().map(|span| span.name).collect();
    assert_eq!(names, ["sampled"]);
}

#[test]
fn a_new_root_is_sampled_as_a_root() {
    let new_roots = || {
        let builder = WorkflowContextStorage::builder();
        builder
            .relation(Relation::Foreign, Continuation::NewRootAndLink)
            .build()
            .unwrap()
    };
    for (place, activation) in PLACES
        .into_iter()
        .flat_map(|place| [(place, true), (place, false)])
    {
        // The default of `SdkTracerProvider`.
        let by_default = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
        let worker = Worker::with_sampler(new_roots(), activation, by_default);
        let first = record(&worker);
        worker.run_in(place, || {
            info_span!("poll").in_scope(|| open(tagged!("new root", ID)))
        });

        let root = worker.span("new root");
        assert_root(&root);
        assert!(root.span_context.is_sampled());
        let (relation, target) = link(&root);
        assert_eq!(relation, "foreign");
        assert_same_span(&target, &first);
    }
}

#[test]
fn no_instance_is_recorded_while_telemetry_is_suppressed() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let tracer = worker.storage.tracer(worker.tracer());
        worker.run_in(place, || {
            let _suppressed = Context::enter_telemetry_suppressed_scope();
            open(tagged!("suppressed", ID));
            let builder = tracer.span_builder("suppressed");
            drop(tracer.build(builder.with_attributes([KeyValue::new(FIELD, ID)])));
        });
        assert!(worker.storage.instance_ids().is_empty());
        assert_eq!(worker.storage.stats().misses, 0, "nothing was looked up");
        worker.run_in(place, || open(tagged!("first", ID)));

        assert_eq!(worker.spans().len(), 1);
        assert_same_span(&worker.stored(ID), &worker.span("first").span_context);
    });
}

// Several storages, several subscribers.

#[test]
fn two_storages_in_one_process_are_independent() {
    let workers = both_activations(WorkflowContextStorage::new);
    let others = both_activations(WorkflowContextStorage::new);
    for (one, other) in workers.iter().zip(&others) {
        for place in PLACES {
            for worker in [one, other, one, other] {
                worker.run_in(place, || instrumented(ID));
                let tracer = worker.storage.tracer(worker.tracer());
                let builder = tracer
                    .span_builder("api")
                    .with_attributes([KeyValue::new(FIELD, ID)]);
                drop(tracer.build(builder));
            }
        }
        one.run(|| open(tagged!("step", "of one")));

        one.forest().assert_no_orphans();
        other.forest().assert_one_trace().assert_no_orphans();
        assert_ne!(one.stored_trace(ID), other.stored_trace(ID));
        assert_eq!(one.stored_trace(ID), one.spans()[0].span_context.trace_id());
        assert_eq!(
            other.stored_trace(ID),
            other.spans()[0].span_context.trace_id()
        );
        assert_eq!(other.storage.instance_ids(), [ID]);
    }
}

#[test]
fn a_span_of_one_storage_within_a_span_of_another_finds_its_own_instance() {
    for (one, other) in both_activations(WorkflowContextStorage::new)
        .iter()
        .zip(&both_activations(WorkflowContextStorage::new))
    {
        let _drawings = [one, other].map(|worker| DrawnOnPanic(worker, "one of two".to_owned()));
        let (first, others) = (record(one), record(other));
        one.run(|| {
            tagged!("outer", ID).in_scope(|| {
                tracing::dispatcher::with_default(&other.dispatch, || open(tagged!("inner", ID)));
                open(tagged!("nested", ID));
            });
        });

        assert_continues(&one.span("outer"), &first);
        assert_nested(&one.span("nested"), &one.span("outer"));
        assert_continues(&other.span("inner"), &others);
    }
}

#[test]
fn the_layers_of_one_storage_share_their_instances() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        for activation in [true, false] {
            let second =
                Worker::with_sampler(worker.storage.clone(), activation, Sampler::AlwaysOn);
            let id = format!("order-{activation}");
            worker.run(|| open(tagged!("first", %id)));
            second.run_in(place, || open(tagged!("second", %id)));
            worker.run_in(place, || open(tagged!("third", %id)));

            assert_continues(&second.span("second"), &worker.stored(&id));
            assert_eq!(
                worker.spans().len(),
                second.spans().len() * if activation { 2 } else { 4 }
            );
        }
        worker.forest().assert_no_orphans();
        assert_eq!(worker.forest().trace_count(), 2);
    });
}

// WorkflowContext::current.

#[test]
fn the_current_context_is_that_of_the_innermost_span() {
    let current =
        || WorkflowContext::current().map(|cx| cx.to_otel().span().span_context().clone());
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let (tagged, untagged, attached, outside) = worker.run_in(place, || {
            let inside = tagged!("tagged", ID)
                .in_scope(|| (current(), info_span!("untagged").in_scope(current)));
            let attached = {
                let _request = remote_context(7, 8).attach();
                current()
            };
            (inside.0, inside.1, attached, current())
        });

        let ids = [(tagged, "tagged"), (untagged, "untagged")];
        for (current, name) in ids {
            assert_same_span(&current.expect(name), &worker.span(name).span_context);
        }
        assert_eq!(attached, Some(remote(7, 8)));
        assert_eq!(outside, None);
    });
}

#[test]
fn the_current_context_of_an_instance_is_in_the_stored_trace() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let first = record(worker);
        let current = worker.run_in(place, || {
            info_span!("poll").in_scope(|| tagged!("step", ID).in_scope(WorkflowContext::current))
        });

        let current = current.expect("inside a span");
        assert_eq!(current.trace_id(), first.trace_id());
        assert_eq!(
            current.span_id(),
            worker.span("step").span_context.span_id()
        );
        worker.storage.store(OTHER, current).unwrap();
        worker.run_in(place, || open(tagged!("handed over", OTHER)));
        assert_continues(
            &worker.span("handed over"),
            &worker.span("step").span_context,
        );
    });
}

#[test]
fn the_current_context_is_available_in_an_unsampled_span() {
    for activation in [true, false] {
        let worker = Worker::with_sampler(
            WorkflowContextStorage::new(),
            activation,
            Sampler::AlwaysOff,
        );
        let current = worker.run(|| tagged!("step", ID).in_scope(WorkflowContext::current));

        let current = current.expect("inside a span");
        assert!(!current.is_sampled());
        assert_eq!(current.span_id(), worker.stored(ID).span_id());
    }
}

#[test]
fn the_current_context_is_available_in_a_span_of_the_opentelemetry_api() {
    let worker = Worker::new();
    let tracer = worker.storage.tracer(worker.tracer());
    let builder = tracer
        .span_builder("step")
        .with_attributes([KeyValue::new(FIELD, ID)]);
    let current = tracer.in_span_with_builder(builder, |_| WorkflowContext::current());

    let step = worker.span("step").span_context;
    assert_eq!(current.map(|cx| cx.span_id()), Some(step.span_id()));
}

fn child(id: &str) -> Span {
    info_span!(
        "child",
        workflow.instance_id = id,
        workflow.parent_instance_id = ID
    )
}

fn recorded_before_it_starts(id: &dyn tracing::Value) -> Span {
    let span = tagged!("step", Empty);
    span.record(FIELD, id);
    span
}

/// Polls the future to completion, each time on a new thread.
fn poll_on_new_threads<F>(worker: &Worker, future: F) -> F::Output
where
    F: Future + Send,
    F::Output: Send,
{
    let mut future = pin!(future);
    loop {
        let poll = || {
            future
                .as_mut()
                .poll(&mut TaskContext::from_waker(Waker::noop()))
        };
        if let Poll::Ready(output) = worker.run_in(Place::OtherThread, poll) {
            return output;
        }
    }
}

#[derive(Debug)]
struct Order {
    #[expect(dead_code, reason = "only printed")]
    number: u32,
}
