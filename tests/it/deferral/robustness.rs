//! Panics, unusual orders of entering and leaving, other threads, and spans opened from inside the layer.

use super::*;

#[test]
fn a_panic_unwinds_through_held_spans() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        for released in [false, true] {
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                let prefix = if released { "released" } else { "held" };
                let outer = engine(&format!("{prefix} engine"));
                let inner = awaiting(&format!("{prefix} awaiting"));
                let _entered = (outer.enter(), inner.enter());
                if released {
                    inner.record(ID, "order");
                }
                resume_unwind(Box::new("on purpose"));
            }));
            assert!(panicked.is_err());
            assert_context_stack_is_empty();
        }
        learns_its_id("order");

        assert_unchanged_root(&worker.span("held engine"));
        assert_unchanged_root(&worker.span("held awaiting"));
        assert_joined(&worker.span("released engine"), &stored);
        assert_joined(&worker.span("released awaiting"), &stored);
        assert_joined(&worker.span("learns_its_id"), &stored);
    });
}

#[test]
fn a_panic_in_one_task_does_not_release_the_held_spans_around_it() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        engine("engine").in_scope(|| {
            let made_before = info_span!(parent: None, "panics", workflow.instance_id = Empty);
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                made_before.in_scope(|| resume_unwind(Box::new("on purpose")))
            }));
            assert!(panicked.is_err());
            tagged_step("handler", "order");
        });

        assert_unchanged_root(&worker.span("panics"));
        assert_joined(&worker.span("engine"), &stored);
        assert_nested(&worker.span("handler"), &worker.span("engine"));
    });
}

#[test]
fn a_held_span_may_be_entered_twice() {
    in_both_modes(|worker| {
        for (name, span) in [
            ("awaiting", awaiting("awaiting")),
            ("engine", engine("engine")),
        ] {
            span.in_scope(|| span.in_scope(|| ()));
            drop(span);
            assert_unchanged_root(&worker.span(name));
        }
    });
}

#[test]
fn a_held_span_that_is_entered_twice_is_released_as_a_whole() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = awaiting("span");
        span.in_scope(|| {
            span.in_scope(|| {
                span.record(ID, "order");
                step("innermost");
            });
            step("outermost");
        });
        drop(span);

        let span = worker.span("span");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("innermost"), &span);
        assert_nested(&worker.span("outermost"), &span);
    });
}

#[test]
fn held_spans_may_be_left_in_any_order() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        {
            let (left, stays) = (engine("left first"), engine("stays"));
            let (left_entered, stays_entered) = (left.enter(), stays.enter());
            drop(left_entered);
            tagged_step("handler", "order");
            drop(stays_entered);
        }

        assert_unchanged_root(&worker.span("left first"));
        assert_joined(&worker.span("stays"), &stored);
        assert_nested(&worker.span("handler"), &worker.span("stays"));
    });
}

#[test]
fn released_spans_may_be_left_in_any_order() {
    with_activation(|worker| {
        let (outer, inner) = (engine("outer"), engine("inner"));
        let (outer_entered, inner_entered) = (outer.enter(), inner.enter());
        step("child");
        drop(outer_entered);
        let inside = current();
        drop(inner_entered);
        assert_context_stack_is_empty();
        drop((outer, inner));

        assert_same_span(&inside, &worker.span("inner").span_context);
    });
}

#[test]
fn an_id_recorded_on_another_thread_applies_to_a_held_span() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = awaiting("span");
        span.in_scope(|| {
            elsewhere(worker, || {
                span.record(ID, "order");
            });
            step("child");
        });
        drop(span);

        let span = worker.span("span");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child"), &span);
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn a_span_held_on_two_threads_has_the_children_of_both() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = awaiting("span");
        span.in_scope(|| {
            elsewhere(worker, || {
                span.in_scope(|| {
                    span.record(ID, "order");
                    step("child there");
                });
            });
            step("child here");
        });
        drop(span);

        let span = worker.span("span");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child there"), &span);
        assert_nested(&worker.span("child here"), &span);
        assert_eq!(worker.storage.stats().deferred, 1);
    });
}

#[test]
fn a_span_released_on_one_thread_is_released_on_a_thread_that_still_holds_it() {
    with_activation(|worker| {
        let span = engine("engine");
        let there = span.in_scope(|| {
            elsewhere(worker, || {
                span.in_scope(|| {
                    elsewhere(worker, || span.in_scope(|| tagged_step("handler", "order")));
                    step("child");
                    current()
                })
            })
        });
        drop(span);

        let span = worker.span("engine");
        assert_same_span(&there, &span.span_context);
        assert_nested(&worker.span("handler"), &span);
        assert_nested(&worker.span("child"), &span);
        assert_eq!(worker.storage.stats().adopted, 1);
    });
}

/// An id whose formatting panics.
struct Unprintable;

impl fmt::Display for Unprintable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        resume_unwind(Box::new("on purpose"));
    }
}

#[test]
fn a_panic_while_formatting_the_id_releases_nothing() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        awaiting("span").in_scope(|| {
            let panicked = catch_unwind(|| {
                Span::current().record(ID, display(Unprintable));
            });
            assert!(panicked.is_err());
            record_id("order");
        });

        assert_joined(&worker.span("span"), &stored);
    });
}

/// An id that opens a span while it is formatted.
struct Instrumented(&'static str);

impl fmt::Display for Instrumented {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ordinary("printing").in_scope(|| info!("printing"));
        f.write_str(self.0)
    }
}

#[test]
fn formatting_the_id_may_open_spans() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        awaiting("recorded").in_scope(|| {
            Span::current().record(ID, display(Instrumented("order")));
        });

        // The span opened by formatting is the first child: its parent starts before the id is known.
        let span = worker.span("recorded");
        assert_linked(&span, "late", &stored);
        for printing in worker.spans().iter().filter(|span| span.name == "printing") {
            assert_nested(printing, &span);
        }
    });
}

/// While a span is created, tracing ignores all others on the thread.
#[test]
fn formatting_the_id_of_a_new_span_may_try_to_open_spans() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        engine("engine").in_scope(|| {
            info_span!("handler", workflow.instance_id = %Instrumented("order")).in_scope(|| ());
        });

        let span = worker.span("engine");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("handler"), &span);
    });
}

/// Returns a worker whose sampler opens a span when the span of that name starts.
fn sampling_opens_a_span(when: &'static str) -> Worker {
    let sampler = Hooked(move |name: &str| {
        if name == when {
            step("sampling");
        }
    });
    Worker::with_sampler(adopting(), true, sampler)
}

#[test]
fn a_sampler_may_open_spans_while_a_held_span_starts() {
    let worker = sampling_opens_a_span("span");
    let inside = worker.run(|| {
        awaiting("span").in_scope(|| {
            record_id("order");
            step("child");
            current()
        })
    });

    let span = worker.span("span");
    assert_same_span(&inside, &span.span_context);
    assert_same_span(&worker.stored("order"), &span.span_context);
    assert_nested(&worker.span("child"), &span);
    assert_root(&worker.span("sampling"));
}

#[test]
fn a_sampler_may_open_spans_while_several_held_spans_start() {
    let worker = sampling_opens_a_span("outer");
    let _drawing = DrawnOnPanic(&worker, "with activation".into());
    let inside = worker.run(|| {
        let (outer, inner) = (engine("outer"), awaiting("inner"));
        outer.in_scope(|| {
            inner.in_scope(|| {
                inner.record(ID, "order");
                step("child");
                current()
            })
        })
    });

    let (outer, inner) = (worker.span("outer"), worker.span("inner"));
    assert_same_span(&inside, &inner.span_context);
    assert_nested(&worker.span("child"), &inner);
    assert_same_span(&worker.stored("order"), &outer.span_context);
    assert_joined(&inner, &outer.span_context);
    worker.span("sampling");
}

/// Opens a span that is held back whenever a span of that name ends.
#[derive(Debug)]
struct EndingOpensSpans(&'static str);

impl SpanProcessor for EndingOpensSpans {
    fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.name == self.0 {
            let export = info_span!(parent: None, "export", workflow.instance_id = Empty);
            export.in_scope(|| {
                export.record(ID, "order");
            });
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
fn an_exporter_may_open_held_spans_inside_held_spans() {
    for activation in [true, false] {
        let worker = Worker::with_processor(adopting(), activation, EndingOpensSpans("ends"));
        let _drawing = DrawnOnPanic(&worker, format!("activation: {activation}"));
        worker.run(|| {
            let ends = ordinary("ends");
            engine("engine").in_scope(|| {
                drop(ends);
                step("child");
            });
        });

        let engine = worker.span("engine");
        assert_same_span(&worker.stored("order"), &engine.span_context);
        assert_nested(&worker.span("child"), &engine);
        assert_joined(&worker.span("export"), &engine.span_context);
    }
}

/// The most events that a held span may have: those that opentelemetry_sdk keeps of a span by default.
const MAX_EVENTS: usize = 128;

#[test]
fn a_held_span_starts_undecided_before_more_events_are_buffered_than_a_span_may_have() {
    for activation in [true, false] {
        let (worker, starts) = noting_starts(activation);
        let _drawing = DrawnOnPanic(&worker, format!("activation: {activation}"));
        worker.run(|| {
            for (name, held) in [
                ("engine", engine("engine")),
                ("awaiting", awaiting("awaiting")),
            ] {
                held.in_scope(|| {
                    for _ in 0..MAX_EVENTS {
                        info!("an event");
                    }
                    assert!(!starts.lock().unwrap().iter().any(|start| start == name));
                    info!("one too many");
                    assert!(starts.lock().unwrap().iter().any(|start| start == name));
                });
            }
        });

        for name in ["engine", "awaiting"] {
            let span = worker.span(name);
            assert_unchanged_root(&span);
            assert_eq!(
                (span.events.len(), span.events.dropped_count),
                (MAX_EVENTS, 1)
            );
        }
        assert_eq!(worker.storage.stats().deferred, 2);
    }
}

#[test]
fn a_child_of_a_span_that_its_events_have_started_is_nested_in_it() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let (outer, inner) = (engine("outer"), awaiting("inner"));
        outer.in_scope(|| {
            inner.in_scope(|| {
                for _ in 0..=MAX_EVENTS {
                    info!("an event");
                }
                tagged_step("child", "order");
                record_id("order");
            });
        });
        drop((outer, inner));

        let (outer, inner) = (worker.span("outer"), worker.span("inner"));
        assert_unchanged_root(&outer);
        assert_root(&inner);
        assert_linked(&inner, "late", &stored);
        let child = worker.span("child");
        assert_continues(&child, &stored);
        assert_linked(&child, "foreign", &inner.span_context);
        assert_eq!(worker.storage.stats().late, 1);
    });
}

#[test]
fn two_layers_on_one_thread_do_not_release_each_others_spans() {
    for (one, other) in [(true, true), (true, false), (false, true), (false, false)] {
        let label = format!("activation of the two: {one}, {other}");
        let [one, other] =
            [one, other].map(|on| Worker::with_sampler(adopting(), on, Sampler::AlwaysOn));
        let _drawing = DrawnOnPanic(&one, label);
        one.run(|| {
            let held = engine("held");
            held.in_scope(|| {
                other.run(|| {
                    engine("engine").in_scope(|| {
                        one.run(|| held.in_scope(|| ()));
                        step("child");
                    });
                    awaiting("awaiting").in_scope(|| ());
                });
                tagged_step("handler", "order");
            });
        });

        let held = one.span("held");
        assert_id(&held, "order");
        assert_same_span(&one.stored("order"), &held.span_context);
        assert_nested(&one.span("handler"), &held);
        assert_unchanged_root(&other.span("engine"));
        assert_nested(&other.span("child"), &other.span("engine"));
        assert_unchanged_root(&other.span("awaiting"));
        let (one, other) = (one.storage.stats(), other.storage.stats());
        assert_eq!((one.deferred, one.adopted), (1, 1));
        assert_eq!((other.deferred, other.adopted), (2, 0));
    }
}

#[test]
fn spans_of_another_thread_do_not_release_a_held_span() {
    in_both_modes(|worker| {
        let span = engine("engine");
        span.in_scope(|| elsewhere(worker, || tagged_step("there", "order")));
        drop(span);

        assert_unchanged_root(&worker.span("engine"));
    });
}

#[test]
fn tasks_that_move_between_threads_stay_in_their_instances() {
    const INSTANCES: [&str; 4] = ["order 1", "order 2", "order 3", "order 4"];
    async fn attempt(id: &'static str) {
        async move {
            tokio::task::yield_now().await;
            async {
                tokio::task::yield_now().await;
                step("child");
                learns_its_id_in_the_first_poll(id).await;
            }
            .instrument(tagged("handler", id))
            .await;
        }
        .instrument(engine("engine"))
        .await;
        learns_its_id_in_the_first_poll(id).await;
    }
    in_both_modes_of(adopting, |worker| {
        let before = worker.forest().trace_count();
        let traces = INSTANCES.map(|id| stored_first(worker, id).trace_id());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(3)
            .build()
            .expect("a runtime");
        let spawn = |id| runtime.spawn(attempt(id).with_subscriber(worker.dispatch.clone()));
        let tasks: Vec<_> = INSTANCES.into_iter().cycle().take(64).map(spawn).collect();
        for task in tasks {
            runtime.block_on(task).expect("no panic");
        }

        let forest = worker.forest();
        assert_eq!(forest.trace_count(), before + traces.len());
        forest.assert_no_orphans().assert_no_duplicates();
        let counts = forest.count_by_name();
        assert_eq!(
            (counts["engine"], counts["handler"], counts["child"]),
            (64, 64, 64)
        );
        for span in forest.spans().filter(|span| span.name == "handler") {
            let parent = forest.parent_of(span).expect("a parent");
            assert_eq!(parent.name, "engine");
        }
        assert_eq!(worker.storage.stats().adopted, 64);
        assert_eq!(worker.storage.stats().late, 0);
    });
}
