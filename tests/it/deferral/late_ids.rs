//! An instance id that is recorded after the span was created.

use super::*;

#[test]
fn an_id_recorded_in_the_body_puts_the_span_and_its_children_into_the_stored_trace() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        learns_its_id("order");

        let span = worker.span("learns_its_id");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child"), &span);
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted, stats.late), (1, 0, 0));
    });
}

#[test]
fn an_id_recorded_in_the_body_stores_the_span_for_a_new_instance() {
    in_both_modes(|worker| {
        learns_its_id("order");

        let span = worker.span("learns_its_id");
        assert_root(&span);
        assert_unlinked(&span);
        assert_same_span(&worker.stored("order"), &span.span_context);
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn an_id_recorded_in_the_first_poll_applies_to_later_polls_on_other_threads() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        {
            let mut task = pin!(learns_its_id_in_the_first_poll("order"));
            assert!(poll(task.as_mut()).is_pending());
            assert_context_stack_is_empty();
            elsewhere(worker, || assert!(poll(task.as_mut()).is_ready()));
        }

        let span = worker.span("learns_its_id_in_the_first_poll");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child in the first poll"), &span);
        assert_nested(&worker.span("child in the second poll"), &span);
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn an_id_recorded_after_the_first_child_becomes_a_link() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        awaiting("span").in_scope(|| {
            step("child");
            record_id("order");
            step("next child");
        });

        let span = worker.span("span");
        assert_root(&span);
        assert_linked(&span, "late", &stored);
        assert_nested(&worker.span("child"), &span);
        assert_nested(&worker.span("next child"), &span);
        assert_eq!(worker.storage.stats().late, 1);
    });
}

#[test]
fn an_id_recorded_after_the_first_child_stores_the_span_for_a_new_instance() {
    in_both_modes(|worker| {
        awaiting("span").in_scope(|| {
            step("child");
            record_id("order");
        });
        tagged_step("next", "order");

        let span = worker.span("span");
        assert_root(&span);
        assert_unlinked(&span);
        assert_joined(&worker.span("next"), &span.span_context);
        assert_eq!(worker.storage.stats().late, 1);
    });
}

#[test]
fn an_id_recorded_in_the_second_poll_is_in_time() {
    in_both_modes(|worker| {
        {
            let mut task = pin!(learns_its_id_in_the_second_poll("order"));
            assert!(poll(task.as_mut()).is_pending());
            let stored = elsewhere(worker, || stored_first(worker, "order"));
            assert!(poll(task.as_mut()).is_ready());
            assert_same_span(&worker.stored("order"), &stored);
        }

        let span = worker.span("learns_its_id_in_the_second_poll");
        assert_joined(&span, &worker.stored("order"));
        assert_nested(&worker.span("child"), &span);
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn a_task_that_awaits_before_it_records_its_id_joins_the_instance() {
    #[instrument(skip_all, fields(workflow.instance_id = Empty))]
    async fn handler() {
        info!("reading the request");
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        record_id("order");
        step("child");
    }
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_time()
            .build()
            .expect("a runtime");
        let task = runtime.spawn(handler().with_subscriber(worker.dispatch.clone()));
        runtime.block_on(task).expect("no panic");

        let span = worker.span("handler");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child"), &span);
        assert_eq!(span.events.len(), 1);
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.late), (1, 0));
    });
}

/// As tower-http's `TraceLayer` does: the span is entered while the service is called, and again for each poll.
#[test]
fn a_request_span_joins_the_instance_that_its_handler_records() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        {
            let span = awaiting("request");
            let handler = span.in_scope(|| {
                info!("started processing request");
                async {
                    tokio::task::yield_now().await;
                    record_id("order");
                    step("child");
                }
            });
            let mut response = pin!(handler.instrument(span));
            while poll(response.as_mut()).is_pending() {}
        }

        let span = worker.span("request");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child"), &span);
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn an_id_recorded_between_two_polls_is_in_time() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let [entered_again, closed] = ["entered again", "closed"].map(awaiting);
        for span in [&entered_again, &closed] {
            span.in_scope(|| info!("an event"));
            span.record(ID, "order");
        }
        entered_again.in_scope(|| step("child"));
        drop((entered_again, closed));

        assert_joined(&worker.span("entered again"), &stored);
        assert_nested(&worker.span("child"), &worker.span("entered again"));
        assert_joined(&worker.span("closed"), &stored);
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn a_child_adopts_a_span_that_awaits_its_id_however_often_it_was_left_before() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let engine = info_span!("my_engine_handler", workflow.instance_id = Empty);
        for span in [awaiting("awaiting"), engine] {
            span.in_scope(|| ());
            span.in_scope(|| tagged_step("child", "order"));
        }

        for name in ["awaiting", "my_engine_handler"] {
            assert_joined(&worker.span(name), &stored);
            assert_id(&worker.span(name), "order");
        }
        assert_eq!(worker.storage.stats().adopted, 2);
    });
}

#[test]
fn unsampled_spans_are_deferred_too() {
    for activation in [true, false] {
        let worker = Worker::with_sampler(adopting(), activation, Sampler::AlwaysOff);
        worker.run(|| {
            learns_its_id("in time");
            awaiting("span").in_scope(|| {
                step("child");
                record_id("late");
            });
            engine("engine").in_scope(|| tagged_step("handler", "adopted"));
        });

        for id in ["in time", "late", "adopted"] {
            assert!(!worker.stored(id).is_sampled(), "{id}");
        }
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted, stats.late), (3, 1, 1));
        assert!(worker.spans().is_empty());
    }
}

#[test]
fn an_empty_id_is_ignored() {
    type Record = fn(&Span);
    let empty: [(&str, Record); 3] = [
        ("str", |span| {
            span.record(ID, "");
        }),
        ("display", |span| {
            span.record(ID, display(""));
        }),
        ("debug", |span| {
            span.record(ID, debug(""));
        }),
    ];
    for (form, record) in empty {
        in_both_modes(|worker| {
            let _drawing = DrawnOnPanic(worker, format!("the empty id is a {form}"));
            let stored = stored_first(worker, "order");
            awaiting("span").in_scope(|| {
                record(&Span::current());
                record_id("order");
            });

            assert_joined(&worker.span("span"), &stored);
            assert_eq!(worker.storage.stats().late, 0);
        });
    }
}

#[test]
fn a_span_created_with_an_empty_id_awaits_one() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        info_span!("span", workflow.instance_id = "").in_scope(|| record_id("order"));

        assert_joined(&worker.span("span"), &stored);
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn a_second_id_of_a_started_span_is_linked() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let other = stored_first(worker, "other order");
        awaiting("span").in_scope(|| {
            record_id("order");
            step("child");
            record_id("other order");
            // Recorded again, it tells nothing new.
            record_id("order");
        });

        let span = worker.span("span");
        assert_continues(&span, &stored);
        assert_linked(&span, "late", &other);
        assert_eq!(worker.storage.stats().late, 1);
    });
}

/// A storage with two id fields, the first of which counts more.
fn two_id_fields() -> WorkflowContextStorage {
    let builder = WorkflowContextStorage::builder();
    builder
        .instance_id_fields([ID, "order.id"])
        .build()
        .unwrap()
}

#[test]
fn of_two_id_fields_recorded_before_the_start_the_first_in_order_counts() {
    in_both_modes_of(two_id_fields, |worker| {
        let stored = stored_first(worker, "order");
        stored_first(worker, "other order");
        for order in [[ID, "order.id"], ["order.id", ID]] {
            let span = info_span!("span", workflow.instance_id = Empty, order.id = Empty);
            for field in order {
                span.record(field, if field == ID { "order" } else { "other order" });
            }
            span.in_scope(|| ());
        }
        for span in worker.spans().iter().filter(|span| span.name == "span") {
            assert_joined(span, &stored);
        }
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn a_second_id_field_recorded_after_the_start_is_linked_and_counts_if_it_is_the_first_in_order() {
    in_both_modes_of(two_id_fields, |worker| {
        let ours = stored_first(worker, "order");
        let other = stored_first(worker, "other order");
        for (name, first, second) in [("lower", ID, "order.id"), ("higher", "order.id", ID)] {
            let span = info_span!(
                "span",
                otel.name = name,
                workflow.instance_id = Empty,
                order.id = Empty,
                workflow.status = Empty
            );
            span.record(first, "order");
            span.in_scope(|| step("child"));
            span.record(second, "other order");
            span.record("workflow.status", "completed");
            drop(span);
            let span = worker.span(name);
            assert_continues(&span, &ours);
            assert_linked(&span, "late", &other);
        }
        assert_eq!(worker.storage.stats().late, 2);
        // Each status is that of the instance which counts.
        let completed = |id| worker.storage.explain(id).to_string().contains("completed");
        assert!(completed("order") && completed("other order"));
    });
}

const RUN: &str = "workflow.run_id";
const PARENT: &str = "workflow.parent_instance_id";

#[test]
fn a_span_that_declares_a_parent_instance_id_waits_for_it_too() {
    in_both_modes(|worker| {
        let parent = stored_first(worker, "parent order");
        let orders = [[ID, PARENT], [PARENT, ID]];
        for (id, fields) in ["first", "second"].into_iter().zip(orders) {
            let span = info_span!(
                "span",
                otel.name = id,
                workflow.instance_id = Empty,
                workflow.parent_instance_id = Empty
            );
            span.in_scope(|| {
                for field in fields {
                    span.record(field, if field == ID { id } else { "parent order" });
                }
                step("child");
            });
            drop(span);
            assert_joined(&worker.span(id), &parent);
        }
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn a_parent_instance_id_recorded_after_the_start_is_linked() {
    in_both_modes(|worker| {
        let parent = stored_first(worker, "parent order");
        let known = info_span!(
            "known",
            workflow.instance_id = "child order",
            workflow.parent_instance_id = Empty
        );
        known.in_scope(|| {
            step("child of the known");
            known.record(PARENT, "parent order");
        });
        drop(known);
        let late = info_span!(
            "late",
            workflow.instance_id = Empty,
            workflow.parent_instance_id = Empty
        );
        late.in_scope(|| {
            step("child of the late");
            late.record(PARENT, "parent order");
            late.record(ID, "another child order");
        });
        drop(late);

        for name in ["known", "late"] {
            let span = worker.span(name);
            assert_root(&span);
            assert_linked(&span, "child", &parent);
        }
        let unknown = info_span!(
            "unknown",
            workflow.instance_id = "x",
            workflow.parent_instance_id = Empty
        );
        unknown.in_scope(|| step("child of the unknown"));
        unknown.record(PARENT, "never seen");
        drop(unknown);
        assert!(
            worker
                .storage
                .explain("x")
                .to_string()
                .contains("never seen")
        );
    });
}

#[test]
fn a_run_id_recorded_after_the_start_names_the_run_or_is_linked() {
    in_both_modes(|worker| {
        let span = |name: &str| {
            info_span!(
                "span",
                otel.name = name,
                workflow.instance_id = "order",
                workflow.run_id = Empty
            )
        };
        let first = span("first");
        first.in_scope(|| step("child"));
        first.record(RUN, "1");
        drop(first);
        let second = span("second");
        second.in_scope(|| step("child of the second"));
        second.record(RUN, "1");
        drop(second);
        let first = worker.span("first");
        assert_unlinked(&first);
        assert_joined(&worker.span("second"), &first.span_context);

        // Another run, in a trace of its own: recorded for it, and linked to the old one.
        let started_elsewhere = info_span!(
            "elsewhere",
            workflow.instance_id = Empty,
            workflow.run_id = Empty
        );
        started_elsewhere.in_scope(|| step("child elsewhere"));
        started_elsewhere.record(RUN, "2");
        started_elsewhere.record(ID, "order");
        drop(started_elsewhere);
        let elsewhere = worker.span("elsewhere");
        assert_root(&elsewhere);
        assert_linked(&elsewhere, "new_run", &first.span_context);
        assert_same_span(&worker.stored("order"), &elsewhere.span_context);
    });
}

#[test]
fn an_adopted_span_that_names_a_new_run_of_its_instance_is_recorded_for_it() {
    in_both_modes(|worker| {
        let run = |name: &str, run: &str| {
            let span = awaiting_a_run(name);
            span.record(RUN, run);
            span.in_scope(|| record_id("order"));
        };
        run("first", "1");
        let span = awaiting_a_run("second");
        span.record(RUN, "2");
        span.in_scope(|| {
            tagged_step("child", "order");
            record_id("order");
        });
        drop(span);
        run("second again", "2");

        let second = worker.span("second");
        assert_joined(&second, &worker.span("first").span_context);
        assert_joined(&worker.span("second again"), &second.span_context);
        assert_eq!(worker.storage.stats().late, 1);
    });
}

#[test]
fn a_run_id_recorded_on_an_adopted_span_counts_for_the_instance_that_it_names_later() {
    in_both_modes(|worker| {
        for run in ["1", "2"] {
            let span = awaiting_a_run(run);
            span.record(RUN, run);
            span.in_scope(|| record_id("order"));
        }
        let adopter = stored_first(worker, "adopter");
        let span = awaiting_a_run("span");
        span.in_scope(|| {
            tagged_step("child", "adopter");
            span.record(RUN, "1");
            record_id("order");
        });
        drop(span);

        let span = worker.span("span");
        assert_continues(&span, &adopter);
        assert_linked(&span, "late", &worker.span("1").span_context);
    });
}

/// A span that declares both ids, each to be recorded.
fn awaiting_a_run(name: &str) -> Span {
    info_span!(
        "awaiting a run",
        otel.name = name,
        workflow.instance_id = Empty,
        workflow.run_id = Empty
    )
}

#[test]
fn a_span_that_declares_a_run_id_waits_for_it_too() {
    const RUN: &str = "workflow.run_id";
    in_both_modes(|worker| {
        let first = info_span!(
            "first",
            workflow.instance_id = "order",
            workflow.run_id = "1"
        );
        first.in_scope(|| ());
        drop(first);
        for (name, fields) in [("id first", [ID, RUN]), ("run first", [RUN, ID])] {
            let span = awaiting_a_run(name);
            span.in_scope(|| {
                for field in fields {
                    span.record(field, if field == ID { "order" } else { name });
                }
                step("child");
            });
        }
        awaiting_a_run("of the same run").in_scope(|| {
            record_id("order");
            Span::current().record(RUN, "1");
        });

        let first = worker.span("first");
        for name in ["id first", "run first"] {
            assert_root(&worker.span(name));
        }
        assert_linked(&worker.span("id first"), "new_run", &first.span_context);
        let before = worker.span("id first").span_context;
        assert_linked(&worker.span("run first"), "new_run", &before);
        assert_joined(&worker.span("of the same run"), &first.span_context);
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn a_run_id_that_is_never_recorded_means_the_latest_run() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        awaiting_a_run("span").in_scope(|| {
            record_id("order");
            step("child");
        });
        awaiting_a_run("without children").in_scope(|| record_id("order"));

        assert_joined(&worker.span("span"), &stored);
        assert_nested(&worker.span("child"), &worker.span("span"));
        assert_joined(&worker.span("without children"), &stored);
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn recording_other_fields_does_not_release_a_span() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = info_span!("span", workflow.instance_id = Empty, attempt = Empty);
        span.in_scope(|| {
            span.record("attempt", 1);
            info!("an event");
            span.record(ID, "order");
        });
        drop(span);

        let span = worker.span("span");
        assert_joined(&span, &stored);
        assert_eq!(attribute(&span, "attempt"), Some(Value::from(1)));
        assert_eq!(span.events.len(), 1);
    });
}

#[test]
fn a_span_whose_id_is_recorded_before_it_is_entered_is_not_deferred() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = awaiting("span");
        span.record(ID, "order");
        span.in_scope(|| step("child"));
        drop(span);

        let span = worker.span("span");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child"), &span);
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.late), (0, 0));
    });
}

#[test]
fn a_span_that_is_never_entered_is_exported_once() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        drop(awaiting("without an id"));
        drop(engine("engine"));
        awaiting("with an id").record(ID, "order");

        assert_unchanged_root(&worker.span("without an id"));
        assert_unchanged_root(&worker.span("engine"));
        assert_joined(&worker.span("with an id"), &stored);
        assert_eq!(worker.storage.stats().deferred, 0);
    });
}

#[test]
fn a_span_that_never_gets_an_id_is_exported_unchanged() {
    in_both_modes(|worker| {
        awaiting("span").in_scope(|| info!("an event"));

        let span = worker.span("span");
        assert_unchanged_root(&span);
        assert_eq!(span.events.len(), 1);
        assert_eq!(worker.storage.stats().deferred, 1);
    });
}

#[test]
fn a_terminal_status_told_before_a_late_id_completes_the_instance() {
    type Tell = fn(&Span);
    let ways: [(&str, Tell); 6] = [
        ("recorded before the child, before the id", |span| {
            span.record("workflow.status", "completed");
            step("child");
            span.record(ID, "order");
        }),
        ("told by an event before the child", |span| {
            info!(workflow.status = "completed");
            step("child");
            span.record(ID, "order");
        }),
        ("recorded after the child, before the id", |span| {
            step("child");
            span.record("workflow.status", "failed");
            span.record(ID, "order");
        }),
        ("told by an event after the child", |span| {
            step("child");
            info!(workflow.status = "completed");
            span.record(ID, "order");
        }),
        ("recorded together with the id after the child", |span| {
            step("child");
            tracing::record_all!(
                span,
                workflow.status = "completed",
                workflow.instance_id = "order"
            );
        }),
        ("recorded together with the id in time", |span| {
            tracing::record_all!(
                span,
                workflow.status = "completed",
                workflow.instance_id = "order"
            );
        }),
    ];
    let forgets_at_once = || {
        let builder = WorkflowContextStorage::builder().completed_grace(Duration::ZERO);
        builder.build().expect("valid settings")
    };
    for (way, tell) in ways {
        for is_stored in [false, true] {
            in_both_modes_of(forgets_at_once, |worker| {
                let _drawing = DrawnOnPanic(worker, format!("{way}, stored: {is_stored}"));
                if is_stored {
                    stored_first(worker, "order");
                }
                let span = info_span!(
                    "span",
                    workflow.status = Empty,
                    workflow.instance_id = Empty
                );
                span.in_scope(|| tell(&span));
                drop(span);

                assert_eq!(worker.storage.get("order").unwrap(), None, "{way}");
                tagged_step("again", "order");
                assert_root(&worker.span("again"));
            });
        }
    }
}
