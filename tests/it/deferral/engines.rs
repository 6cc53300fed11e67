//! Presets for engines. Each span is declared as the engine's crate declares it.

use super::*;
use tracing_workflow_context::MemoryBackend;
use tracing_workflow_context::testing::TraceForest;

/// temporalio-sdk 1.1.1, src/workflow_future.rs
fn run_workflow() -> Span {
    info_span!(
        target: "temporalio_sdk::workflow_future",
        "RunWorkflow",
        "otel.name" = "RunWorkflow:Order",
        "otel.kind" = "server"
    )
}

/// temporalio-sdk 1.1.1, src/lib.rs
fn run_activity() -> Span {
    info_span!(
        target: "temporalio_sdk",
        "RunActivity",
        "otel.name" = "RunActivity:charge",
        "otel.kind" = "server",
        "temporalActivityID" = "1",
        "temporalWorkflowID" = Empty,
        "temporalRunID" = Empty,
    )
}

/// restate-sdk 0.13.0, src/endpoint/mod.rs
fn restate_handle() -> Span {
    info_span!(
        target: "restate_sdk::endpoint",
        "restate_sdk_endpoint_handle",
        "rpc.system" = "restate",
        "rpc.service" = "Order",
        "rpc.method" = "run",
        "restate.sdk.is_replaying" = false
    )
}

#[test]
fn the_workflow_span_of_temporal_joins_the_instance_of_the_workflow_code() {
    in_both_modes_of(
        || knowing(Engine::Temporal),
        |worker| {
            let stored = stored_first(worker, "order");
            let span = run_workflow();
            // The first activation runs no code that opens a span.
            span.in_scope(|| ());
            span.in_scope(|| tagged_step("workflow code", "order"));
            drop(span);

            let span = worker.span("RunWorkflow:Order");
            assert_joined(&span, &stored);
            assert_nested(&worker.span("workflow code"), &span);
            assert_eq!(worker.storage.stats().adopted, 1);
        },
    );
}

/// An interceptor of Temporal's SDK is polled once outside of `RunWorkflow`, and handlers go on inside it.
fn handler(id: &str, replaying: bool) -> Span {
    info_span!(
        "handler",
        workflow.instance_id = id,
        workflow.run_id = "run 1",
        workflow.replaying = replaying,
    )
}

#[test]
fn the_workflow_span_of_temporal_joins_the_instance_of_a_span_that_is_entered_in_it() {
    for replaying in [false, true] {
        in_both_modes_of(
            || knowing(Engine::Temporal),
            |worker| {
                let stored = stored_first(worker, "order");
                let handler = handler("order", replaying);
                handler.in_scope(|| ());
                run_workflow().in_scope(|| handler.in_scope(|| step("update")));
                drop(handler);

                assert_joined(&worker.span("RunWorkflow:Order"), &stored);
                if !replaying {
                    assert_nested(&worker.span("update"), &worker.span("handler"));
                }
                assert_eq!(worker.storage.stats().adopted, 1, "{replaying}");
            },
        );
    }
}

#[test]
fn a_span_that_awaits_its_own_id_does_not_join_the_instance_of_a_span_that_is_entered_in_it() {
    in_both_modes_of(
        || knowing(Engine::Temporal),
        |worker| {
            let handler = handler("another order", false);
            handler.in_scope(|| ());
            run_activity().in_scope(|| handler.in_scope(|| ()));
            drop(handler);

            let span = worker.span("RunActivity:charge");
            assert_root(&span);
            assert_ne!(
                worker.trace_of("handler"),
                worker.trace_of("RunActivity:charge")
            );
            assert_eq!(worker.storage.stats().adopted, 0);
        },
    );
}

#[test]
fn an_ordinary_span_that_is_entered_in_a_held_one_starts_it_undecided() {
    in_both_modes_of(
        || knowing(Engine::Temporal),
        |worker| {
            let ordinary = info_span!("ordinary");
            ordinary.in_scope(|| ());
            run_workflow().in_scope(|| ordinary.in_scope(|| ()));

            assert_root(&worker.span("RunWorkflow:Order"));
            assert_eq!(worker.storage.stats().adopted, 0);
        },
    );
}

#[test]
fn the_activity_span_of_temporal_joins_its_workflow() {
    in_both_modes_of(
        || knowing(Engine::Temporal),
        |worker| {
            let stored = stored_first(worker, "order");
            let activity = async {
                let span = Span::current();
                span.record("temporalWorkflowID", "order");
                span.record("temporalRunID", "run 1");
                step("activity code");
            };
            assert!(poll(pin!(activity.instrument(run_activity()))).is_ready());

            let span = worker.span("RunActivity:charge");
            assert_joined(&span, &stored);
            assert_nested(&worker.span("activity code"), &span);
            assert_eq!(worker.storage.stats().late, 0);
        },
    );
}

/// Workflow code names the order alone, so spans of a new run stay in the trace before until an activity names the run.
#[test]
fn a_run_of_temporal_that_activities_alone_name_has_one_linked_root_for_all_workers() {
    let backend = MemoryBackend::new();
    let [a, b] = [(); 2].map(|()| {
        let builder = patient(backend.clone()).engine(Engine::Temporal);
        Worker::with_storage(builder.build().expect("valid settings"))
    });
    let workflow = |worker: &Worker, name| {
        worker.run(|| run_workflow().in_scope(|| tagged_step(name, "order")));
        worker.storage.flush().expect("works");
    };
    let activity = |worker: &Worker, name, run: &str| {
        worker.run(|| {
            let span = run_activity();
            span.in_scope(|| {
                span.record("temporalWorkflowID", "order");
                span.record("temporalRunID", run);
                step(name);
            });
        });
        worker.storage.flush().expect("works");
    };
    workflow(&a, "1");
    workflow(&b, "1 on b");
    activity(&a, "activity 1", "run 1");
    activity(&b, "activity 1 on b", "run 1");
    workflow(&a, "2, yet unknown");
    activity(&a, "activity 2", "run 2");
    workflow(&a, "2");
    activity(&b, "activity 2 on b", "run 2");
    workflow(&b, "2 on b");

    let spans = [a.spans(), b.spans()].concat();
    let forest = TraceForest::from_spans(&spans);
    forest.assert_no_orphans().assert_no_duplicates();
    assert_eq!(forest.trace_count(), 2, "{forest}");
    let span = |name| forest.find(name).expect(name);
    let trace = |name| span(name).span_context.trace_id();
    for name in ["1 on b", "activity 1", "activity 1 on b", "2, yet unknown"] {
        assert_eq!(trace(name), trace("1"), "{name}\n{forest}");
    }
    for name in ["2", "activity 2 on b", "2 on b"] {
        assert_eq!(trace(name), trace("activity 2"), "{name}\n{forest}");
    }
    let root = forest.parent_of(span("activity 2")).expect("nested");
    assert_root(root);
    let first = forest.parent_of(span("1")).expect("nested");
    let expected = ("new_run".to_owned(), ids(&first.span_context));
    assert_eq!(links(root), [expected]);
}

#[test]
fn the_handler_span_of_restate_joins_the_instance_of_the_handler() {
    in_both_modes_of(
        || knowing(Engine::Restate),
        |worker| {
            let stored = stored_first(worker, "order");
            let attempt = async {
                tokio::task::yield_now().await;
                Span::current().record("restate.sdk.is_replaying", true);
                tokio::task::yield_now().await;
                tagged_step("handler", "order");
            };
            let mut attempt = Box::pin(attempt.instrument(restate_handle()));
            assert!(poll(attempt.as_mut()).is_pending());
            assert!(poll(attempt.as_mut()).is_pending());
            assert!(poll(attempt.as_mut()).is_ready());
            drop(attempt);

            let span = worker.span("restate_sdk_endpoint_handle");
            assert_joined(&span, &stored);
            assert_nested(&worker.span("handler"), &span);
            assert_eq!(worker.storage.stats().adopted, 1);
        },
    );
}

/// As examples/restate attaches it: the context of the attempt's request.
#[test]
fn the_traceparent_that_restate_sends_is_the_parent_of_the_attempt() {
    let attempt = |worker: &Worker, sent: u64| {
        let _current = remote_context(1, sent).attach();
        restate_handle().in_scope(|| tagged_step("handler", "order"));
        let is_attempt = |span: &SpanData| span.name == "restate_sdk_endpoint_handle";
        worker.spans().into_iter().rfind(is_attempt).expect("ended")
    };
    in_both_modes_of(
        || knowing(Engine::Restate),
        |worker| {
            for sent in [1, 2] {
                assert_joined(&attempt(worker, sent), &remote(1, sent));
            }
        },
    );
    in_both_modes_of(
        || knowing(Engine::Restate),
        |worker| {
            let stored = stored_first(worker, "order");
            let span = attempt(worker, 1);
            assert_continues(&span, &stored);
            assert_eq!(links(&span), [("foreign".to_owned(), ids(&remote(1, 1)))]);
        },
    );
    let make = || {
        let builder = WorkflowContextStorage::builder().engine(Engine::Restate);
        let builder = builder.relation(Relation::Foreign, Continuation::Link);
        builder.build().expect("valid settings")
    };
    in_both_modes_of(make, |worker| {
        let stored = stored_first(worker, "order");
        let span = attempt(worker, 1);
        assert_continues(&span, &remote(1, 1));
        assert_eq!(links(&span), [("foreign".to_owned(), ids(&stored))]);
    });
}

#[test]
fn a_span_with_the_name_but_not_the_target_of_an_engine_span_is_not_held() {
    let builder = WorkflowContextStorage::builder()
        .engine(Engine::Temporal)
        .engine(Engine::Restate);
    let worker = Worker::with_storage(builder.build().expect("valid settings"));
    worker.run(|| {
        let spans = [
            info_span!(target: "my_app", "RunWorkflow"),
            info_span!(target: "my_app", "restate_sdk_endpoint_handle"),
        ];
        for span in spans {
            let inside = span.in_scope(current);
            let name = span.metadata().expect("enabled").name();
            drop(span);
            assert_same_span(&inside, &worker.span(name).span_context);
        }
    });
    assert_eq!(worker.storage.stats().deferred, 0);
}

#[test]
fn engines_that_are_not_configured_have_no_effect() {
    with_activation(|worker| {
        for span in [run_workflow(), run_activity(), restate_handle()] {
            assert!(span.in_scope(current).is_valid());
        }
        info_span!("duroxide", instance_id = "order").in_scope(|| ());

        assert_eq!(worker.storage.stats().deferred, 0);
        assert_eq!(worker.storage.stats().stored_instances, 0);
    });
}

#[test]
fn several_engines_can_be_configured() {
    let make = || {
        let builder = WorkflowContextStorage::builder()
            .engine(Engine::Temporal)
            .engine(Engine::Restate)
            .engine(Engine::Duroxide);
        builder.build().expect("valid settings")
    };
    in_both_modes_of(make, |worker| {
        let stored = stored_first(worker, "order");
        run_workflow().in_scope(|| tagged_step("workflow code", "order"));
        restate_handle().in_scope(|| {
            info_span!("handler", workflow.instance_id = "order").in_scope(|| ());
        });

        assert_joined(&worker.span("RunWorkflow:Order"), &stored);
        assert_joined(&worker.span("restate_sdk_endpoint_handle"), &stored);
        assert_nested(
            &worker.span("handler"),
            &worker.span("restate_sdk_endpoint_handle"),
        );
    });
}

#[test]
fn no_engine_reads_a_common_word() {
    for engine in [
        Engine::Dapr,
        Engine::Duroxide,
        Engine::Restate,
        Engine::Temporal,
        Engine::Dbos,
        Engine::AwsDurable,
        Engine::Underway,
        Engine::GraphileWorker,
        Engine::Apalis,
        Engine::Awa,
    ] {
        in_both_modes_of(
            || knowing(engine),
            |worker| {
                for request in ["one", "two"] {
                    let describe_ec2 = info_span!(
                        "describe_ec2",
                        instance_id = "i-0abc",
                        run_id = "1",
                        status = "completed",
                        is_replaying = true
                    );
                    info_span!("request", otel.name = request)
                        .in_scope(|| describe_ec2.in_scope(|| ()));
                }

                assert!(worker.storage.get("i-0abc").unwrap().is_none());
                assert_ne!(worker.trace_of("one"), worker.trace_of("two"));
            },
        );
    }
}

#[test]
fn spans_of_duroxide_name_their_instance_by_the_reserved_field_or_one_that_is_given() {
    let given = || {
        let builder = WorkflowContextStorage::builder()
            .engine(Engine::Duroxide)
            .instance_id_fields(["workflow.instance_id", "instance_id"]);
        builder.build().expect("valid settings")
    };
    in_both_modes_of(given, |worker| {
        let stored = stored_first(worker, "order");
        info_span!("given", instance_id = %"order").in_scope(|| ());
        info_span!("recorded", instance_id = Empty).in_scope(|| {
            Span::current().record("instance_id", "order");
        });
        info_span!("reserved", workflow.instance_id = "order").in_scope(|| ());

        for name in ["given", "recorded", "reserved"] {
            assert_joined(&worker.span(name), &stored);
        }
    });
}

#[test]
fn spans_of_dapr_join_their_instance_and_keep_local_parents() {
    let worker = Worker::with_storage(knowing(Engine::Dapr));
    // dapr-durabletask makes its spans through the OpenTelemetry API.
    let tracer = worker.storage.tracer(worker.tracer());
    let open = |name: &'static str, parent: &Context| {
        let id = KeyValue::new("durabletask.task.instance_id", "order");
        let span = SpanBuilder::from_name(name).with_attributes([id]);
        tracer.build_with_context(span, parent)
    };
    let mut orchestration = open("orchestration", &Context::new());
    orchestration.end();
    let replayed =
        Context::new().with_span(open("orchestration on another worker", &Context::new()));
    open("activity", &replayed).end();
    replayed.span().end();

    let orchestration = worker.span("orchestration");
    assert_root(&orchestration);
    let replayed = worker.span("orchestration on another worker");
    assert_joined(&replayed, &orchestration.span_context);
    let activity = worker.span("activity");
    assert_nested(&activity, &replayed);
    assert_unlinked(&activity);
}
