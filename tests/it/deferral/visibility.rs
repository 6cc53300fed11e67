//! The view of code inside a held span: the current span, parents, headers and links.

use super::*;

#[test]
fn a_held_span_is_current_from_its_release_until_its_exit() {
    type Release = fn(&Span);
    let ways: [(&str, Release); 3] = [
        ("id", |span| {
            span.record(ID, "order");
        }),
        ("tagged child", |_| tagged_step("child", "order")),
        ("untagged child", |_| step("child")),
    ];
    for (way, release) in ways {
        with_activation(|worker| {
            let _drawing = DrawnOnPanic(worker, format!("released by its {way}"));
            let below = remote_context(1, 1).attach();
            let before = current();
            let span = awaiting("span");
            let released = span.in_scope(|| {
                assert_same_span(&current(), &before);
                release(&span);
                current()
            });
            assert_same_span(&current(), &before);
            let entered_again = span.in_scope(current);
            assert_same_span(&current(), &before);
            drop(span);
            drop(below);

            let span = worker.span("span");
            assert_same_span(&released, &span.span_context);
            assert_same_span(&entered_again, &span.span_context);
        });
    }
}

#[test]
fn released_spans_are_current_one_after_the_other() {
    with_activation(|worker| {
        let (outer, inner) = (engine("outer"), engine("inner"));
        let (in_child, in_inner, in_outer) = outer.in_scope(|| {
            let (in_child, in_inner) =
                inner.in_scope(|| (tagged("child", "order").in_scope(current), current()));
            (in_child, in_inner, current())
        });
        drop((outer, inner));

        assert_same_span(&in_child, &worker.span("child").span_context);
        assert_same_span(&in_inner, &worker.span("inner").span_context);
        assert_same_span(&in_outer, &worker.span("outer").span_context);
    });
}

#[test]
fn a_held_span_keeps_the_foreign_parent_it_opened_under() {
    in_both_modes(|worker| {
        let below = remote_context(1, 1).attach();
        awaiting("first").in_scope(|| record_id("order"));
        drop(below);
        let below = remote_context(2, 2).attach();
        awaiting("second").in_scope(|| record_id("order"));
        engine("third").in_scope(|| tagged_step("child", "order"));
        engine("untouched").in_scope(|| ());
        drop(below);

        let first = worker.span("first");
        assert_continues(&first, &remote(1, 1));
        for name in ["second", "third"] {
            assert_continues(&worker.span(name), &first.span_context);
            assert_linked(&worker.span(name), "foreign", &remote(2, 2));
        }
        assert_continues(&worker.span("untouched"), &remote(2, 2));
    });
}

#[test]
fn a_context_attached_inside_a_held_span_is_detached_with_its_guard() {
    with_activation(|worker| {
        let span = engine("engine");
        let (within, after) = span.in_scope(|| {
            let inside = remote_context(1, 1).attach();
            let within = current();
            step("child");
            drop(inside);
            (within, current())
        });
        assert_context_stack_is_empty();
        drop(span);

        assert_same_span(&within, &remote(1, 1));
        assert_same_span(&after, &worker.span("engine").span_context);
    });
}

#[test]
fn an_ordinary_root_span_is_current_at_once() {
    with_activation(|worker| {
        let (inside, sent) =
            ordinary("ordinary").in_scope(|| (current(), headers(&Context::current())));

        let span = worker.span("ordinary");
        assert_same_span(&inside, &span.span_context);
        assert_eq!(sent["traceparent"], traceparent(&span));
        assert_eq!(worker.storage.stats().deferred, 0);
    });
}

#[test]
fn a_span_with_an_id_is_current_at_once() {
    with_activation(|worker| {
        let stored = stored_first(worker, "order");
        let (inside, sent) =
            tagged("tagged", "order").in_scope(|| (current(), headers(&Context::current())));

        let span = worker.span("tagged");
        assert_same_span(&inside, &span.span_context);
        assert_eq!(sent["traceparent"], traceparent(&span));
        assert_eq!(span.span_context.trace_id(), stored.trace_id());
        assert_eq!(worker.storage.stats().deferred, 0);
    });
}

#[test]
fn a_held_span_is_not_current_until_its_context_is_requested() {
    in_both_modes(|worker| {
        let span = awaiting("span");
        let (before, sent) = span.in_scope(|| {
            let before = headers(&Context::current());
            (before, headers(&Span::current().context()))
        });
        drop(span);

        assert_eq!(before.get("traceparent"), None);
        assert_eq!(sent["traceparent"], traceparent(&worker.span("span")));
    });
}

#[test]
fn the_current_workflow_context_inside_a_held_span_is_its_own() {
    in_both_modes(|worker| {
        for (name, held) in [
            ("awaiting", awaiting("awaiting")),
            ("engine", engine("engine")),
        ] {
            let inside = held.in_scope(|| WorkflowContext::current().expect("inside a span"));
            drop(held);

            let span = worker.span(name);
            assert_eq!(inside.trace_id(), span.span_context.trace_id());
            assert_eq!(inside.span_id(), span.span_context.span_id());
        }
    });
}

#[test]
fn requesting_the_context_of_a_held_span_starts_it() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        awaiting("awaiting").in_scope(|| {
            Span::current().context();
            record_id("order");
            step("child of awaiting");
        });
        engine("engine").in_scope(|| {
            WorkflowContext::current();
            tagged_step("handler", "order");
        });

        let awaiting = worker.span("awaiting");
        assert_root(&awaiting);
        assert_linked(&awaiting, "late", &stored);
        assert_nested(&worker.span("child of awaiting"), &awaiting);
        let engine = worker.span("engine");
        assert_unchanged_root(&engine);
        assert_continues(&worker.span("handler"), &stored);
        assert_linked(&worker.span("handler"), "foreign", &engine.span_context);
    });
}

#[test]
fn the_context_of_a_held_span_can_be_requested_on_another_thread() {
    in_both_modes(|worker| {
        let span = awaiting("span");
        let there = span.in_scope(|| {
            let there = elsewhere(worker, || span.context().span().span_context().clone());
            step("child");
            there
        });
        drop(span);

        let span = worker.span("span");
        assert_same_span(&there, &span.span_context);
        assert_nested(&worker.span("child"), &span);
    });
}

/// As `future.instrument(span.clone()).with_context(span.context())` does.
#[test]
fn a_span_can_be_entered_beneath_its_own_context() {
    with_activation(|worker| {
        let span = tagged("first ever", "order");
        let own = span.context().attach();
        span.in_scope(|| ());
        drop(own);
        drop(span);
        let held = awaiting("held");
        held.in_scope(|| {
            assert_context_stack_is_empty();
            held.record(ID, "order");
        });
        drop(held);

        assert_joined(
            &worker.span("held"),
            &worker.span("first ever").span_context,
        );
    });
}

#[test]
fn a_span_that_follows_from_a_held_span_links_to_it() {
    in_both_modes(|worker| {
        let follower = ordinary("follower");
        let held = awaiting("held");
        held.in_scope(|| {
            follower.follows_from(&held);
            step("child");
        });
        drop((follower, held));

        let (follower, held) = (worker.span("follower"), worker.span("held"));
        assert_eq!(follower.links.len(), 1);
        assert_same_span(&follower.links[0].span_context, &held.span_context);
        assert_root(&held);
        assert_nested(&worker.span("child"), &held);
    });
}

#[test]
fn a_held_span_whose_context_was_requested_is_current_when_it_is_entered_again() {
    with_activation(|worker| {
        for name in ["awaiting", "engine"] {
            let span = if name == "engine" {
                engine(name)
            } else {
                awaiting(name)
            };
            drop(span.in_scope(|| Span::current().context()));
            let inside = span.in_scope(current);
            drop(span);

            assert_same_span(&inside, &worker.span(name).span_context);
        }
    });
}

#[test]
fn a_span_that_ends_inside_a_held_span_does_not_release_it() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let never_entered = awaiting("never entered");
        let engine = engine("engine");
        engine.in_scope(|| drop(never_entered));
        engine.in_scope(|| tagged_step("handler", "order"));
        drop(engine);

        assert_joined(&worker.span("engine"), &stored);
        assert_nested(&worker.span("handler"), &worker.span("engine"));
    });
}

/// A value of an application's own in the OpenTelemetry context.
#[derive(Clone, Debug, PartialEq)]
struct Tenant(u32);

/// What code inside a span sees of its OpenTelemetry context beside the span.
fn seen() -> (Option<String>, Option<Tenant>) {
    Context::map_current(|cx| {
        let baggage = cx.baggage().get("tenant").map(|value| value.to_string());
        (baggage, cx.get::<Tenant>().cloned())
    })
}

#[test]
fn what_is_attached_inside_a_held_span_is_seen_by_what_is_opened_there() {
    with_activation(|worker| {
        let attached = || {
            let baggage = [KeyValue::new("tenant", "7")];
            Context::current()
                .with_value(Tenant(7))
                .with_baggage(baggage)
        };
        for (name, make) in [
            ("engine", engine as fn(&str) -> Span),
            ("awaiting", awaiting),
        ] {
            let inside = make(name).in_scope(|| {
                let _attached = attached().attach();
                let child = tagged("child", "order").entered();
                let inside = seen();
                drop(child);
                inside
            });
            assert_eq!(inside, (Some("7".to_owned()), Some(Tenant(7))), "in {name}");
        }
        // Attached around it, as under the plain layer.
        let _around = attached().attach();
        let around = engine("inside").in_scope(|| tagged("child", "order").in_scope(seen));
        assert_eq!(around, (Some("7".to_owned()), Some(Tenant(7))));
        let child = worker
            .spans()
            .into_iter()
            .filter(|span| span.name == "child");
        assert_eq!(
            child
                .filter(|child| child.parent_span_id != SpanId::INVALID)
                .count(),
            3
        );
    });
}

/// A new root hides the parent span only.
#[test]
fn what_is_attached_around_a_new_root_is_seen_inside_it() {
    let builder = WorkflowContextStorage::builder();
    let storage = builder
        .relation(Relation::First, Continuation::NewRoot)
        .build();
    let worker = Worker::with_storage(storage.unwrap());
    let inside = worker.run(|| {
        let request = info_span!("request").entered();
        let cx = Context::current().with_value(Tenant(7));
        let _attached = cx.with_baggage([KeyValue::new("tenant", "7")]).attach();
        let inside = tagged("root", "order").in_scope(seen);
        drop((_attached, request));
        inside
    });
    assert_eq!(inside, (Some("7".to_owned()), Some(Tenant(7))));
    assert_root(&worker.span("root"));
}
