//! The layer composes with filters and other layers like any layer, and behaves the same in every position.

use std::io;

use crate::support::*;
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry::{SpanId, TraceId};
use opentelemetry_sdk::trace::{SdkTracer, SpanData};
use tracing::field::Empty;
use tracing::level_filters::LevelFilter;
use tracing::{Dispatch, Level, Span, dispatcher, info, info_span};
use tracing_opentelemetry::{OpenTelemetrySpanExt as _, SetParentError, get_otel_context};
use tracing_subscriber::filter::{EnvFilter, Targets, dynamic_filter_fn, filter_fn};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry, registry, reload};
use tracing_workflow_context::{WorkflowContextLayer, WorkflowContextStorage};

type Stack = fn(WorkflowContextStorage, bool) -> Worker;

/// Every way of stacking in which the OpenTelemetry layer can be found by `downcast_ref`.
const STACKINGS: [(&str, Stack); 20] = [
    ("alone", |s, on| Worker::stacked(s, on, subscriber)),
    ("LevelFilter", |s, on| {
        Worker::stacked(s, on, |ours| {
            subscriber(ours.with_filter(LevelFilter::INFO))
        })
    }),
    ("Targets", |s, on| {
        let targets = Targets::new().with_target(module_path!(), Level::INFO);
        Worker::stacked(s, on, |ours| subscriber(ours.with_filter(targets)))
    }),
    ("EnvFilter", |s, on| {
        Worker::stacked(s, on, |ours| {
            subscriber(ours.with_filter(EnvFilter::new("off,it::stacking=info")))
        })
    }),
    ("EnvFilter, by span", |s, on| {
        let filter = EnvFilter::new(
            "it::stacking=warn,[{workflow.instance_id}]=info,[free]=info,[engine]=info",
        );
        Worker::stacked(s, on, |ours| subscriber(ours.with_filter(filter)))
    }),
    ("dynamic filter", |s, on| {
        let filter = dynamic_filter_fn(|metadata, cx| {
            metadata.level() <= &Level::INFO || cx.lookup_current().is_some()
        });
        Worker::stacked(s, on, |ours| subscriber(ours.with_filter(filter)))
    }),
    ("reloadable filter", |s, on| {
        let filter = reload::Layer::new(LevelFilter::INFO).0;
        Worker::stacked(s, on, |ours| subscriber(ours.with_filter(filter)))
    }),
    ("two filters", |s, on| {
        Worker::stacked(s, on, |ours| {
            subscriber(
                ours.with_filter(LevelFilter::INFO)
                    .with_filter(filter_fn(|metadata| metadata.is_span())),
            )
        })
    }),
    ("subscriber's LevelFilter", |s, on| {
        Worker::stacked(s, on, |ours| {
            Dispatch::new(registry().with(LevelFilter::INFO).with(ours))
        })
    }),
    ("subscriber's EnvFilter", |s, on| {
        Worker::stacked(s, on, |ours| {
            Dispatch::new(
                registry()
                    .with(ours)
                    .with(EnvFilter::new("it::stacking=info")),
            )
        })
    }),
    ("boxed", |s, on| {
        Worker::stacked(s, on, |ours| subscriber(ours.boxed()))
    }),
    ("boxed, filtered, boxed", |s, on| {
        Worker::stacked(s, on, |ours| {
            subscriber(ours.boxed().with_filter(LevelFilter::INFO).boxed())
        })
    }),
    ("Some", |s, on| {
        Worker::stacked(s, on, |ours| subscriber(Some(ours)))
    }),
    ("Some, filtered", |s, on| {
        Worker::stacked(s, on, |ours| {
            subscriber(Some(ours).with_filter(LevelFilter::INFO))
        })
    }),
    ("Vec", |s, on| {
        Worker::stacked(s, on, |ours| {
            subscriber(vec![sink().boxed(), ours.boxed(), sink().boxed()])
        })
    }),
    ("and_then fmt", |s, on| {
        Worker::stacked(s, on, |ours| subscriber(ours.and_then(sink())))
    }),
    ("fmt and_then", |s, on| {
        Worker::stacked(s, on, |ours| subscriber(sink().and_then(ours)))
    }),
    ("before fmt", |s, on| {
        Worker::stacked(s, on, |ours| {
            Dispatch::new(registry().with(ours).with(sink()))
        })
    }),
    ("after fmt", |s, on| {
        Worker::stacked(s, on, |ours| {
            Dispatch::new(registry().with(sink()).with(ours))
        })
    }),
    ("after a filtered fmt", |s, on| {
        Worker::stacked(s, on, |ours| {
            Dispatch::new(
                registry()
                    .with(sink().with_filter(LevelFilter::WARN))
                    .with(ours),
            )
        })
    }),
];

fn subscriber(layer: impl Layer<Registry> + Send + Sync) -> Dispatch {
    Dispatch::new(registry().with(layer))
}

/// A fmt layer that discards its output.
fn sink<S>() -> impl Layer<S> + Send + Sync
where
    S: tracing::Subscriber + for<'span> LookupSpan<'span>,
{
    tracing_subscriber::fmt::layer().with_writer(io::sink)
}

/// Runs a check for each way of stacking, with and without context activation.
fn in_every_stacking(storage: fn() -> WorkflowContextStorage, check: impl Fn(&Worker)) {
    for (name, stack) in STACKINGS {
        for on in [true, false] {
            let worker = stack(storage(), on);
            let _drawing = DrawnOnPanic(&worker, format!("{name}, context activation {on}"));
            check(&worker);
        }
    }
}

#[tracing::instrument(fields(workflow.instance_id = id))]
fn step(id: &str) {
    inner();
}

#[tracing::instrument(fields(workflow.instance_id = Empty))]
fn late(id: &str) {
    Span::current().record("workflow.instance_id", id);
    inner();
}

#[tracing::instrument]
fn engine(id: &str) {
    step(id);
}

#[tracing::instrument]
fn inner() {
    info!("inside");
}

fn adopting_engines() -> WorkflowContextStorage {
    let storage = WorkflowContextStorage::builder().adopt_spans(["engine"]);
    storage.build().unwrap()
}

/// The ids of the current span, through the OpenTelemetry layer.
fn current_ids() -> (TraceId, SpanId) {
    let cx = Span::current().context();
    let cx = cx.span().span_context().clone();
    (cx.trace_id(), cx.span_id())
}

#[test]
fn every_later_span_of_an_instance_joins_the_trace_of_the_first() {
    in_every_stacking(WorkflowContextStorage::new, |worker| {
        worker.run(|| step("order"));
        let first = worker.span("step").span_context;
        worker.run(|| step("order"));
        worker.run_in(Place::OtherThread, || step("order"));
        let forest = worker.forest();
        forest.assert_one_trace().assert_no_orphans();
        let later = |span: &&SpanData| span.name == "step" && span.span_context != first;
        assert_eq!(forest.spans().filter(later).count(), 2);
        for step in forest.spans().filter(later) {
            assert_continues(step, &first);
        }
    });
}

#[test]
fn an_id_recorded_on_an_empty_field_counts() {
    in_every_stacking(WorkflowContextStorage::new, |worker| {
        worker.run(|| step("order"));
        worker.run(|| late("order"));
        let late = worker.span("late");
        assert_continues(&late, &worker.span("step").span_context);
        let forest = worker.forest();
        let below = |span: &&_| forest.parent_of(span) == Some(&late);
        assert_eq!(forest.spans().filter(below).count(), 1);
        assert_eq!(worker.storage.stats().deferred, 1);
    });
}

#[test]
fn an_engine_span_is_adopted_into_the_instance_of_its_child() {
    in_every_stacking(adopting_engines, |worker| {
        worker.run(|| late("order"));
        worker.run(|| engine("order"));
        let engine = worker.span("engine");
        assert_continues(&engine, &worker.span("late").span_context);
        assert_nested(&worker.span("step"), &engine);
        assert_eq!(worker.storage.stats().adopted, 1);
    });
}

#[test]
fn the_span_extension_reaches_the_inner_layer() {
    in_every_stacking(WorkflowContextStorage::new, |worker| {
        let linked = remote(7, 7);
        worker.run(|| {
            let free = info_span!("free");
            free.set_parent(remote_context(8, 8)).unwrap();
            free.set_attribute("colour", "red");
            free.add_link(linked.clone());
            free.in_scope(|| {
                Span::current().set_attribute("shape", "round");
                assert_eq!(current_ids().0, TraceId::from(8));
                step("order");
            });
        });
        let free = worker.span("free");
        assert_eq!(free.parent_span_id, SpanId::from(8));
        assert_eq!(attribute(&free, "colour"), Some("red".into()));
        assert_eq!(attribute(&free, "shape"), Some("round".into()));
        assert_eq!(free.links[0].span_context, linked);
        assert_eq!(worker.stored_trace("order"), TraceId::from(8));
    });
}

#[test]
fn a_parent_set_on_a_tagged_span_is_foreign_to_a_stored_instance() {
    in_every_stacking(WorkflowContextStorage::new, |worker| {
        worker.run(|| step("order"));
        worker.run(|| {
            let span = info_span!("moved", workflow.instance_id = "order");
            span.set_parent(remote_context(8, 8)).unwrap();
            span.in_scope(|| assert_eq!(current_ids().0, worker.stored_trace("order")));
        });
        let moved = worker.span("moved");
        assert_eq!(moved.span_context.trace_id(), worker.stored_trace("order"));
        assert_eq!(link(&moved), ("foreign".to_owned(), remote(8, 8)));
    });
}

#[test]
fn get_otel_context_reaches_the_inner_layer() {
    in_every_stacking(WorkflowContextStorage::new, |worker| {
        worker.run(|| {
            let _span = info_span!("asked", workflow.instance_id = "order").entered();
            let id = Span::current().id().expect("enabled");
            let cx = get_otel_context(&id, &worker.dispatch).expect("the layer was found");
            let trace = cx.span().span_context().trace_id();
            assert_eq!(trace, current_ids().0);
            assert_eq!(trace, worker.stored_trace("order"));
        });
    });
}

/// Returns workers whose layer does not see spans of the target `hidden`, which a fmt layer enables.
fn partially_filtered(storage: fn() -> WorkflowContextStorage) -> [Worker; 2] {
    [true, false].map(|on| {
        Worker::stacked(storage(), on, |ours| {
            let seen = filter_fn(|metadata| metadata.target() != "hidden");
            Dispatch::new(registry().with(ours.with_filter(seen)).with(sink()))
        })
    })
}

#[test]
fn a_tagged_span_hidden_by_a_filter_has_no_effect() {
    for worker in partially_filtered(WorkflowContextStorage::new) {
        worker.run(|| {
            let named = info_span!(target: "hidden", "named", workflow.instance_id = "a");
            let empty = info_span!(target: "hidden", "empty", workflow.instance_id = Empty);
            assert!(!named.is_disabled(), "the fmt layer sees it");
            let _ = named.set_parent(remote_context(8, 8));
            named.follows_from(&empty);
            for span in [&named, &empty] {
                span.in_scope(|| {
                    info!(target: "hidden", "inside");
                    span.record("workflow.instance_id", "b");
                    span.set_attribute("workflow.instance_id", "c");
                });
                assert!(!span.context().has_active_span());
            }
        });
        assert_eq!(worker.spans().len(), 0, "{}", worker.forest());
        assert_eq!(
            worker.storage.stats(),
            WorkflowContextStorage::new().stats()
        );
    }
}

#[test]
fn children_of_a_hidden_tagged_span_are_parented_without_it() {
    for worker in partially_filtered(WorkflowContextStorage::new) {
        worker.run(|| {
            let hidden = info_span!(target: "hidden", "hidden", workflow.instance_id = "a");
            hidden.in_scope(|| {
                inner();
                step("b");
                step("b");
            });
            info_span!(parent: &hidden, "explicit", workflow.instance_id = "b").in_scope(|| {});
        });
        let forest = worker.forest();
        assert_eq!(worker.storage.instance_ids(), ["b"]);
        // One trace of `inner` alone, and that of the instance.
        assert_eq!(forest.trace_count(), 2, "{forest}");
        let explicit = worker.span("explicit").span_context.trace_id();
        assert_eq!(explicit, worker.stored_trace("b"), "{forest}");
        forest.assert_no_orphans();
    }
}

#[test]
fn a_hidden_span_between_two_of_an_instance_does_not_separate_them() {
    for worker in partially_filtered(WorkflowContextStorage::new) {
        worker.run(|| {
            let outer = info_span!("outer", workflow.instance_id = "a").entered();
            info_span!(target: "hidden", "between", workflow.instance_id = "z")
                .in_scope(|| step("a"));
            drop(outer);
        });
        assert_nested(&worker.span("step"), &worker.span("outer"));
    }
}

#[test]
fn a_hidden_engine_span_is_not_held_back() {
    for worker in partially_filtered(adopting_engines) {
        worker.run(|| info_span!(target: "hidden", "engine").in_scope(|| step("a")));
        worker.run(|| info_span!(target: "hidden", "engine").in_scope(inner));
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted), (0, 0));
        assert_root(&worker.span("step"));
        assert_eq!(worker.spans().len(), 3, "{}", worker.forest());
    }
}

#[test]
fn a_hidden_child_does_not_release_a_held_engine_span() {
    for worker in partially_filtered(adopting_engines) {
        worker.run(|| late("a"));
        worker.run(|| {
            let engine = info_span!("engine").entered();
            info_span!(target: "hidden", "between").in_scope(|| step("a"));
            drop(engine);
        });
        let engine = worker.span("engine");
        assert_continues(&engine, &worker.span("late").span_context);
        assert_nested(&worker.span("step"), &engine);
    }
}

#[test]
fn a_filter_that_changes_while_spans_are_open_loses_no_enabled_span() {
    for on in [true, false] {
        let (filter, handle) = reload::Layer::new(LevelFilter::INFO);
        let worker = Worker::stacked(adopting_engines(), on, |ours| {
            Dispatch::new(registry().with(ours.with_filter(filter)).with(sink()))
        });
        worker.run(|| {
            let engine = info_span!("engine").entered();
            let empty = info_span!("empty", workflow.instance_id = Empty).entered();
            handle.reload(LevelFilter::OFF).unwrap();
            step("unseen");
            empty.record("workflow.instance_id", "a");
            drop((empty, engine));
            handle.reload(LevelFilter::INFO).unwrap();
            step("a");
        });
        assert_eq!(worker.storage.instance_ids(), ["a"]);
        assert_nested(&worker.span("empty"), &worker.span("engine"));
        worker.forest().assert_one_trace().assert_no_orphans();
    }
}

#[test]
fn a_filter_of_the_whole_subscriber_disables_tagged_spans_too() {
    let worker = Worker::stacked(adopting_engines(), true, |ours| {
        Dispatch::new(registry().with(ours).with(LevelFilter::WARN))
    });
    worker.run(|| {
        late("a");
        engine("b");
    });
    assert_eq!(worker.spans().len(), 0);
    assert_eq!(worker.storage.stats().stored_instances, 0);
}

#[test]
fn a_layer_that_is_none_does_nothing() {
    let worker = Worker::stacked(adopting_engines(), true, |ours| {
        let none = Some(ours).filter(|_| false);
        Dispatch::new(registry().with(none).with(sink()))
    });
    worker.run(|| {
        late("a");
        engine("b");
        let found = info_span!("span").set_parent(remote_context(8, 8));
        assert!(matches!(found, Err(SetParentError::LayerNotFound)));
    });
    assert_eq!(worker.spans().len(), 0);
    assert_eq!(worker.storage.stats().stored_instances, 0);
}

/// tracing-subscriber does not expose the inside of a reloadable layer: `OpenTelemetrySpanExt` finds it no more than
/// OpenTelemetry's own there, and without context activation a span starts with its first child at the earliest.
#[test]
fn spans_in_a_reloadable_layer_are_parented_as_usual() {
    for on in [true, false] {
        let worker = Worker::stacked(adopting_engines(), on, |ours| {
            subscriber(reload::Layer::new(ours).0)
        });
        worker.run(|| {
            step("a");
            late("a");
        });
        worker.run_in(Place::OtherThread, || step("a"));
        worker.forest().assert_one_trace().assert_no_orphans();
    }
}

#[test]
fn engine_spans_in_a_reloadable_layer_are_adopted_as_usual() {
    for on in [true, false] {
        let worker = Worker::stacked(adopting_engines(), on, |ours| {
            subscriber(reload::Layer::new(ours).0)
        });
        let _drawing = DrawnOnPanic(&worker, format!("context activation {on}"));
        worker.run(|| late("a"));
        worker.run(|| engine("a"));
        let engine = worker.span("engine");
        assert_continues(&engine, &worker.span("late").span_context);
        assert_nested(&worker.span("step"), &engine);
    }
}

#[test]
fn a_layer_can_be_put_into_a_running_subscriber() {
    let (slot, handle) = reload::Layer::new(None::<WorkflowContextLayer<Registry, SdkTracer>>);
    let mut ours = None;
    let worker = Worker::stacked(adopting_engines(), true, |layer| {
        ours = Some(layer);
        Dispatch::new(registry().with(slot).with(sink()))
    });
    worker.run(|| {
        let before = info_span!("before", workflow.instance_id = "a").entered();
        handle.reload(ours).unwrap();
        engine("b");
        before.record("workflow.instance_id", "c");
        drop(before);
        late("b");
    });
    assert_eq!(worker.storage.instance_ids(), ["b"]);
    worker.forest().assert_one_trace().assert_no_orphans();
}

/// Returns workers whose stacking gives the layer its dispatch, and ones whose stacking does not.
fn with_and_without_known_dispatch() -> [Worker; 4] {
    let stacks: [Stack; 2] = [
        |s, on| Worker::stacked(s, on, subscriber),
        |s, on| Worker::stacked(s, on, |ours| subscriber(Some(ours))),
    ];
    let [plain, some] = stacks.map(|stack| [true, false].map(|on| stack(adopting_engines(), on)));
    let ([a, b], [c, d]) = (plain, some);
    [a, b, c, d]
}

#[test]
fn a_subscriber_without_the_layer_does_not_disturb_it() {
    let other = Dispatch::new(registry().with(sink()));
    let elsewhere = |run: &dyn Fn()| dispatcher::with_default(&other, run);
    for worker in with_and_without_known_dispatch() {
        worker.run(|| {
            let engine = info_span!("engine").entered();
            let empty = info_span!("empty", workflow.instance_id = Empty).entered();
            elsewhere(&|| {
                late("x");
                step("y");
                // A span of the other subscriber, entered in this one.
                empty.in_scope(|| {});
                empty.record("workflow.instance_id", "a");
                assert_eq!(
                    empty.context().span().span_context().trace_id(),
                    worker.stored_trace("a")
                );
            });
            drop((empty, engine));
            elsewhere(&|| step("a"));
            step("a");
        });
        assert_eq!(worker.storage.instance_ids(), ["a"]);
        let forest = worker.forest();
        forest.assert_one_trace().assert_no_orphans();
        assert_eq!(forest.span_count(), 4, "{forest}");
    }
}

#[test]
fn two_subscribers_on_one_thread_use_their_own_storages() {
    for on in [true, false] {
        let [a, b] =
            [(); 2].map(|()| Worker::stacked(WorkflowContextStorage::new(), on, subscriber));
        let in_a = |run: &dyn Fn()| dispatcher::with_default(&a.dispatch, run);
        let in_b = |run: &dyn Fn()| dispatcher::with_default(&b.dispatch, run);
        a.run(|| step("order"));
        b.run(|| step("order"));
        in_a(&|| {
            let _outer = info_span!("outer", workflow.instance_id = "order").entered();
            in_b(&|| {
                let _middle = info_span!("middle", workflow.instance_id = "order").entered();
                in_a(&|| step("order"));
                late("order");
                step("only b's");
            });
            step("order");
        });
        assert_context_stack_is_empty();
        for worker in [&a, &b] {
            let trace = worker.stored_trace("order");
            let tagged = worker
                .spans()
                .into_iter()
                .filter(|span| attribute(span, "workflow.instance_id") == Some("order".into()));
            assert!(
                tagged
                    .into_iter()
                    .all(|span| span.span_context.trace_id() == trace)
            );
        }
        assert_ne!(a.stored_trace("order"), b.stored_trace("order"));
        assert_eq!(a.storage.instance_ids(), ["order"]);
        assert_eq!(b.storage.instance_ids().len(), 2);
        assert_eq!(b.storage.stats().deferred, 1);
        assert_eq!(a.storage.stats().deferred, 0);
    }
}

#[test]
fn two_subscribers_on_one_thread_do_not_release_each_others_held_spans() {
    for (on, outer_first) in [(true, true), (true, false), (false, true), (false, false)] {
        let [a, b] = [(); 2].map(|()| Worker::stacked(adopting_engines(), on, subscriber));
        let in_a = |run: &dyn Fn()| dispatcher::with_default(&a.dispatch, run);
        let in_b = |run: &dyn Fn()| dispatcher::with_default(&b.dispatch, run);
        a.run(|| step("a"));
        b.run(|| step("b"));
        in_a(&|| {
            let engine_a = info_span!("engine").entered();
            in_b(&|| {
                let _engine_b = info_span!("engine").entered();
                engine_a.in_scope(|| {});
                if outer_first {
                    in_a(&|| step("a"));
                    step("b");
                } else {
                    step("b");
                    in_a(&|| step("a"));
                }
            });
        });
        assert_context_stack_is_empty();
        for worker in [a, b] {
            let forest = worker.forest();
            let engine = worker.span("engine");
            assert_eq!(worker.storage.stats().adopted, 1, "{forest}");
            forest.assert_one_trace().assert_no_orphans();
            let below = |span: &&_| forest.parent_of(span) == Some(&engine);
            assert_eq!(forest.spans().filter(below).count(), 1, "{forest}");
        }
    }
}
