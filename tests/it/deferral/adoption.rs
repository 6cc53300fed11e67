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
fn a_held_span_releases_the_held_span_around_it() {
    in_both_modes(|worker| {
        engine("outer").in_scope(|| learns_its_id("order"));

        let outer = worker.span("outer");
        assert_unchanged_root(&outer);
        let inner = worker.span("learns_its_id");
        assert_nested(&inner, &outer);
        assert_unlinked(&inner);
        assert_nested(&worker.span("child"), &inner);
        assert_same_span(&worker.stored("order"), &inner.span_context);
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
