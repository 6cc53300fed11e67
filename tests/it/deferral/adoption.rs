//! Engine spans that take the instance of their first tagged child.

use super::*;

#[test]
fn an_engine_span_joins_the_instance_of_its_first_child_however_often_it_was_left_before() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = engine("engine");
        for _ in 0..3 {
            span.in_scope(|| info!("awaiting the input"));
        }
        span.in_scope(|| tagged_step("handler", "order"));
        drop(span);

        let span = worker.span("engine");
        assert_joined(&span, &stored);
        assert_id(&span, "order");
        assert_eq!(span.events.len(), 3);
        let handler = worker.span("handler");
        assert_nested(&handler, &span);
        assert_unlinked(&handler);
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted, stats.late), (1, 1, 0));
    });
}

#[test]
fn an_adopted_engine_span_is_recorded_for_a_new_instance() {
    in_both_modes(|worker| {
        engine("engine").in_scope(|| tagged_step("handler", "order"));

        let span = worker.span("engine");
        assert_root(&span);
        assert_unlinked(&span);
        assert_id(&span, "order");
        assert_same_span(&worker.stored("order"), &span.span_context);
        let handler = worker.span("handler");
        assert_nested(&handler, &span);
        assert_unlinked(&handler);
        assert_eq!(worker.storage.stats().adopted, 1);
    });
}

#[test]
fn an_untagged_first_child_releases_an_engine_span_unchanged() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        engine("engine").in_scope(|| {
            step("untagged");
            tagged_step("handler", "order");
        });

        let span = worker.span("engine");
        assert_unchanged_root(&span);
        assert_nested(&worker.span("untagged"), &span);
        let handler = worker.span("handler");
        assert_continues(&handler, &stored);
        assert_linked(&handler, "foreign", &span.span_context);
        assert_eq!(worker.storage.stats().adopted, 0);
    });
}

#[test]
fn an_engine_span_without_children_is_exported_once_when_it_closes() {
    in_both_modes(|worker| {
        let span = engine("engine");
        for _ in 0..3 {
            span.in_scope(|| ());
        }
        assert!(worker.spans().iter().all(|span| span.name != "engine"));
        drop(span);

        assert_unchanged_root(&worker.span("engine"));
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted), (1, 0));
    });
}

#[test]
fn a_span_without_an_id_is_adopted_by_its_first_child_too() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        awaiting("span").in_scope(|| {
            tagged_step("child", "order");
            record_id("order");
        });

        let span = worker.span("span");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child"), &span);
        let stats = worker.storage.stats();
        assert_eq!((stats.adopted, stats.late), (1, 0));
    });
}

#[test]
fn an_adopted_span_that_then_names_another_instance_is_linked_to_it() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let parent = stored_first(worker, "parent of the order");
        awaiting("span").in_scope(|| {
            tagged_step("child", "order");
            record_id("parent of the order");
        });

        let span = worker.span("span");
        assert_continues(&span, &stored);
        assert_linked(&span, "late", &parent);
        assert_eq!(worker.storage.stats().late, 1);
    });
}

#[test]
fn an_adopted_span_that_then_names_an_unknown_instance_is_recorded_for_it() {
    in_both_modes(|worker| {
        awaiting("span").in_scope(|| {
            tagged_step("child", "order");
            record_id("parent of the order");
        });
        tagged_step("next", "parent of the order");

        assert_joined(&worker.span("next"), &worker.span("span").span_context);
    });
}

#[test]
fn nested_held_spans_are_released_outermost_first_each_nested_in_the_previous() {
    for activation in [true, false] {
        let (worker, starts) = noting_starts(activation);
        let _drawing = DrawnOnPanic(&worker, format!("activation: {activation}"));
        worker.run(|| {
            let (outer, inner) = (engine("outer"), awaiting("inner"));
            outer.in_scope(|| inner.in_scope(|| tagged_step("child", "order")));
        });

        assert_eq!(*starts.lock().unwrap(), ["outer", "inner", "child"]);
        let (outer, inner) = (worker.span("outer"), worker.span("inner"));
        assert_same_span(&worker.stored("order"), &outer.span_context);
        assert_joined(&inner, &outer.span_context);
        assert_nested(&worker.span("child"), &inner);
        assert_eq!(worker.storage.stats().adopted, 2);
    }
}

#[test]
fn an_id_recorded_on_a_held_span_applies_to_the_held_spans_around_it() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        {
            let (outer, inner) = (engine("outer"), awaiting("inner"));
            outer.in_scope(|| inner.in_scope(|| inner.record(ID, "order")));
        }

        let outer = worker.span("outer");
        assert_joined(&outer, &stored);
        assert_id(&outer, "order");
        assert_joined(&worker.span("inner"), &stored);
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted), (2, 1));
    });
}

#[test]
fn an_id_recorded_on_a_held_span_does_not_affect_the_held_spans_inside_it() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let other = stored_first(worker, "other order");
        {
            let (outer, inner) = (awaiting("outer"), engine("inner"));
            outer.in_scope(|| {
                inner.in_scope(|| {
                    outer.record(ID, "order");
                    tagged_step("child", "other order");
                })
            });
        }

        assert_joined(&worker.span("outer"), &stored);
        let inner = worker.span("inner");
        assert_joined(&inner, &other);
        assert_nested(&worker.span("child"), &inner);
    });
}

#[test]
fn an_explicit_child_does_not_affect_the_held_spans_inside_its_parent() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let other = stored_first(worker, "other order");
        {
            let (outer, inner) = (engine("outer"), engine("inner"));
            outer.in_scope(|| {
                inner.in_scope(|| {
                    drop(info_span!(parent: &outer, "child", workflow.instance_id = "order"));
                    tagged_step("inner child", "other order");
                })
            });
        }

        assert_joined(&worker.span("outer"), &stored);
        assert_nested(&worker.span("child"), &worker.span("outer"));
        assert_joined(&worker.span("inner"), &other);
        assert_nested(&worker.span("inner child"), &worker.span("inner"));
    });
}

#[test]
fn an_engine_span_is_held_together_with_a_first_child_whose_id_comes_late() {
    in_both_modes(|worker| {
        for _ in 0..10 {
            engine("outer").in_scope(|| learns_its_id("order"));
        }

        let spans = worker.spans();
        let named = |name| spans.iter().filter(move |span| span.name == name);
        for inner in named("learns_its_id") {
            let mut outers = named("outer");
            let outer = outers.find(|outer| outer.span_context.span_id() == inner.parent_span_id);
            let outer = outer.expect("nested in its engine span");
            assert_id(outer, "order");
            assert_eq!(outer.span_context.trace_id(), worker.stored_trace("order"));
            assert_unlinked(inner);
        }
        assert_eq!(named("learns_its_id").count(), 10);
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted, stats.late), (20, 10, 0));
    });
}

#[test]
fn two_engine_levels_are_adopted_together_outermost_first() {
    for activation in [true, false] {
        let (worker, starts) = noting_starts(activation);
        worker.run(|| {
            engine("outer").in_scope(|| {
                engine("inner").in_scope(|| tagged_step("child", "order"));
            });
        });

        assert_eq!(*starts.lock().unwrap(), ["outer", "inner", "child"]);
        let (outer, inner) = (worker.span("outer"), worker.span("inner"));
        assert_root(&outer);
        assert_same_span(&worker.stored("order"), &outer.span_context);
        assert_nested(&inner, &outer);
        assert_nested(&worker.span("child"), &inner);
        assert_id(&outer, "order");
        assert_id(&inner, "order");
        assert_eq!(worker.storage.stats().adopted, 2);
    }
}

#[test]
fn held_spans_inside_each_other_that_never_learn_an_id_are_exported_as_they_were_opened() {
    in_both_modes(|worker| {
        engine("outer").in_scope(|| awaiting("inner").in_scope(|| ()));
        engine("second outer").in_scope(|| {
            awaiting("second inner").in_scope(|| ());
            step("second child");
        });

        for (outer, inner) in [("outer", "inner"), ("second outer", "second inner")] {
            assert_unchanged_root(&worker.span(outer));
            assert_nested(&worker.span(inner), &worker.span(outer));
        }
        assert_nested(&worker.span("second child"), &worker.span("second outer"));
        assert_eq!(worker.storage.stats().adopted, 0);
    });
}

#[test]
fn a_span_that_leaves_its_held_engine_span_takes_it_along() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let outer = engine("outer");
        let inner = outer.in_scope(|| awaiting("inner"));
        elsewhere(worker, || {
            inner.in_scope(|| {
                record_id("order");
                step("child");
            });
        });
        outer.in_scope(|| step("later"));
        drop((inner, outer));

        let outer = worker.span("outer");
        assert_joined(&outer, &stored);
        assert_nested(&worker.span("inner"), &outer);
        assert_nested(&worker.span("child"), &worker.span("inner"));
        assert_nested(&worker.span("later"), &outer);
    });
}

#[test]
fn a_span_inside_a_held_one_is_nested_in_it_whoever_starts_it() {
    in_both_modes(|worker| {
        engine("outer").in_scope(|| {
            let inner = awaiting("inner").entered();
            let asked = inner.context().span().span_context().clone();
            inner.record(ID, "order");
            drop(inner);
            assert_same_span(&worker.span("inner").span_context, &asked);
        });

        let (outer, inner) = (worker.span("outer"), worker.span("inner"));
        assert_nested(&inner, &outer);
        assert_same_span(&worker.stored("order"), &inner.span_context);
    });
}

#[test]
fn many_held_spans_inside_each_other_overflow_no_stack() {
    in_both_modes(|worker| {
        let spans: Vec<_> = (0..1_000).map(|_| engine("engine").entered()).collect();
        tagged_step("child", "order");
        spans.into_iter().rev().for_each(drop);

        let child = worker.span("child");
        let engines = worker.spans();
        let engines = engines.iter().filter(|span| span.name == "engine");
        let is_joined =
            |span: &&SpanData| span.span_context.trace_id() == child.span_context.trace_id();
        assert_eq!(engines.filter(is_joined).count(), 1_000);
    });
}

#[test]
fn a_span_of_the_opentelemetry_api_adopts_as_one_of_tracing_does() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let tracer = worker.storage.tracer(worker.tracer());
        let step = |name: &'static str| {
            let id = vec![KeyValue::new(ID, "order")];
            let builder = tracer.span_builder(name).with_attributes(id);
            tracer
                .build_with_context(builder, &Context::current())
                .end();
        };
        engine("outer").in_scope(|| {
            engine("inner").in_scope(|| {
                step("first");
                tagged_step("second", "order");
            });
        });

        let (outer, inner) = (worker.span("outer"), worker.span("inner"));
        assert_joined(&outer, &stored);
        assert_nested(&inner, &outer);
        assert_nested(&worker.span("first"), &inner);
        assert_nested(&worker.span("second"), &inner);
        assert_eq!(worker.storage.stats().adopted, 2);
    });
}

#[test]
fn a_span_of_the_api_with_a_parent_of_its_own_adopts_nothing() {
    in_both_modes(|worker| {
        let tracer = worker.storage.tracer(worker.tracer());
        let foreign = worker.tracer().start("foreign");
        let parent = Context::new().with_span(foreign);
        engine("engine").in_scope(|| {
            let id = vec![KeyValue::new(ID, "order")];
            let builder = tracer.span_builder("api").with_attributes(id);
            tracer.build_with_context(builder, &parent).end();
        });

        assert_unchanged_root(&worker.span("engine"));
        assert_eq!(worker.storage.stats().adopted, 0);
    });
}

#[test]
fn a_late_span_whose_first_child_is_of_another_instance_keeps_its_own_identity() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let other = stored_first(worker, "other order");
        awaiting("span").in_scope(|| {
            tagged_step("child", "other order");
            record_id("order");
        });
        awaiting("never named").in_scope(|| tagged_step("last child", "other order"));

        let span = worker.span("span");
        assert_continues(&span, &other);
        assert_linked(&span, "late", &stored);
        let ids = span.attributes.iter().filter(|kv| kv.key.as_str() == ID);
        let ids: Vec<_> = ids.map(|kv| kv.value.to_string()).collect();
        assert_eq!(ids, ["order"], "it is not renamed");
        assert_id(&worker.span("never named"), "other order");
    });
}

#[test]
fn entering_an_existing_span_releases_held_spans() {
    with_activation(|worker| {
        let (made_before, held) = (ordinary("made before"), engine("engine"));
        let (inside, left) = held.in_scope(|| (made_before.in_scope(current), current()));
        drop((made_before, held));

        let held = worker.span("engine");
        assert_unchanged_root(&held);
        assert_root(&worker.span("made before"));
        assert_same_span(&inside, &worker.span("made before").span_context);
        assert_same_span(&left, &held.span_context);
    });
}

#[test]
fn an_explicit_root_does_not_release_the_held_span_it_opens_in() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        engine("engine").in_scope(|| {
            drop(info_span!(parent: None, "root"));
            tagged_step("handler", "order");
        });

        assert_root(&worker.span("root"));
        assert_joined(&worker.span("engine"), &stored);
    });
}

#[test]
fn an_explicit_child_releases_its_held_parent_and_is_nested_in_it() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = engine("engine");
        span.in_scope(|| {
            drop(info_span!(parent: &span, "child", workflow.instance_id = "order"));
            step("contextual child");
        });
        drop(span);

        let span = worker.span("engine");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child"), &span);
        assert_nested(&worker.span("contextual child"), &span);
    });
}

#[test]
fn a_child_created_on_another_thread_adopts_a_held_span() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = engine("engine");
        span.in_scope(|| {
            elsewhere(worker, || {
                info_span!(parent: &span, "child there", workflow.instance_id = "order")
                    .in_scope(|| step("grandchild there"));
            });
            step("child here");
        });
        drop(span);

        let span = worker.span("engine");
        assert_joined(&span, &stored);
        assert_id(&span, "order");
        let there = worker.span("child there");
        assert_nested(&there, &span);
        assert_nested(&worker.span("grandchild there"), &there);
        assert_nested(&worker.span("child here"), &span);
    });
}

#[test]
fn a_child_adopts_a_span_that_was_never_entered() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        for span in [engine("engine"), awaiting("awaiting")] {
            info_span!(parent: &span, "child", workflow.instance_id = "order").in_scope(|| ());
            span.in_scope(|| ());
        }

        for name in ["engine", "awaiting"] {
            assert_joined(&worker.span(name), &stored);
            assert_id(&worker.span(name), "order");
        }
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted), (0, 2));
    });
}

/// A span that waits for its instance id and its run id.
fn awaiting_a_run(name: &str) -> Span {
    info_span!(
        "awaiting a run",
        otel.name = name,
        workflow.instance_id = Empty,
        workflow.run_id = Empty
    )
}

#[test]
fn an_engine_span_joins_the_run_of_the_held_span_inside_it_in_whatever_order_that_learns_it() {
    const RUN: &str = "workflow.run_id";
    in_both_modes(|worker| {
        for run in ["1", "2"] {
            let span = awaiting_a_run(run);
            span.record(RUN, run);
            span.in_scope(|| record_id("order"));
        }
        for order in [[ID, RUN], [RUN, ID]] {
            engine("engine").in_scope(|| {
                let span = awaiting_a_run("inside");
                span.in_scope(|| {
                    for field in order {
                        span.record(field, if field == ID { "order" } else { "1" });
                    }
                });
            });
        }
        let of_both = |name| (worker.spans().into_iter()).filter(move |span| span.name == name);
        assert_eq!(of_both("engine").count(), 2);
        for engine in of_both("engine") {
            assert_joined(&engine, &worker.span("1").span_context);
            assert_id(&engine, "order");
        }
        for inside in of_both("inside") {
            assert_unlinked(&inside);
        }
        assert_eq!(worker.storage.stats().adopted, 2);
    });
}

#[test]
fn an_engine_span_joins_the_held_span_inside_it_and_not_what_opens_in_that() {
    type Open = fn(&Span);
    let ways: [Open; 3] = [
        |_| step("untagged"),
        |_| tagged_step("of another order", "other order"),
        |inside| drop(info_span!(parent: inside, "explicit")),
    ];
    for open in ways {
        in_both_modes(|worker| {
            let stored = stored_first(worker, "order");
            engine("engine").in_scope(|| {
                let inside = awaiting_a_run("inside");
                inside.in_scope(|| {
                    record_id("order");
                    open(&inside);
                });
            });
            let engine = worker.span("engine");
            assert_joined(&engine, &stored);
            assert_id(&engine, "order");
            assert_nested(&worker.span("inside"), &engine);
            assert_unlinked(&worker.span("inside"));
        });
    }
}

#[test]
fn a_parent_that_is_set_by_hand_on_a_span_held_inside_a_held_one_is_kept() {
    in_both_modes(|worker| {
        for outer in [None, Some(ordinary("outer"))] {
            let request = ordinary("request");
            let _outer = outer.map(Span::entered);
            engine("engine").in_scope(|| {
                for span in [awaiting("awaiting"), engine("inner engine")] {
                    span.set_parent(request.context()).expect("not started");
                    span.in_scope(|| step("child"));
                }
            });
        }
        let spans = worker.spans();
        let named = |name: &str| {
            let named = spans.iter().filter(|span| span.name == name);
            named.collect::<Vec<_>>()
        };
        for name in ["awaiting", "inner engine"] {
            let set_by_hand = named(name);
            assert_eq!(set_by_hand.len(), 2);
            for (span, request) in set_by_hand.into_iter().zip(named("request")) {
                assert_nested(span, request);
            }
        }
    });
}
