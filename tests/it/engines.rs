//! Presets by which common words count on the engine's own spans alone, and those of job queues. Each span is declared as
//! the vendor's crate declares it, with its target, name, level and fields; the source is named at each.
//!
//! Those of Restate and Temporal, which hold spans, are in `deferral::engines`.

use opentelemetry::trace::{SpanContext, SpanKind, Tracer as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::SpanData;
use tracing::field::Empty;
use tracing::{Level, Span, debug_span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_workflow_context::{Engine, WorkflowContextStorage};

use crate::support::{
    DrawnOnPanic, Worker, assert_continues, assert_nested, assert_root, attribute,
    both_activations, link,
};

fn knowing(engines: &[Engine]) -> WorkflowContextStorage {
    let builder = WorkflowContextStorage::builder();
    let builder = engines.iter().fold(builder, |b, engine| b.engine(*engine));
    builder.build().expect("valid settings")
}

/// Runs a scenario with and without context activation.
fn with(engine: Engine, scenario: impl Fn(&Worker)) {
    with_all(&[engine], scenario);
}

fn with_all(engines: &[Engine], scenario: impl Fn(&Worker)) {
    for (worker, activation) in
        (both_activations(|| knowing(engines)).iter()).zip(["with", "without"])
    {
        let _drawing = DrawnOnPanic(worker, format!("{engines:?}, {activation} activation"));
        worker.run(|| scenario(worker));
    }
}

fn step(name: &str) {
    info_span!("ordinary", otel.name = name).in_scope(|| ());
}

#[track_caller]
fn only<const N: usize>(worker: &Worker, name: &str) -> [SpanData; N] {
    let named = worker.spans().into_iter().filter(|span| span.name == name);
    let named: Vec<_> = named.collect();
    named.try_into().unwrap_or_else(|named: Vec<_>| {
        panic!("{} spans named {name} in\n{}", named.len(), worker.forest())
    })
}

mod dbos {
    use super::*;

    /// dbos 0.5.0, src/workflow.rs:1722
    fn workflow(workflow_id: &str) -> Span {
        info_span!(target: "dbos::workflow", "workflow", workflow_id = %workflow_id, name = %"order")
    }

    /// dbos 0.5.0, src/step.rs:430
    fn step_attempt(step_id: i32, name: &str, attempt: u32) -> Span {
        info_span!(target: "dbos::step", "step", step_id, step_name = name, attempt)
    }

    /// dbos 0.5.0, src/dequeue.rs:163
    fn queues() -> Span {
        info_span!(target: "dbos::dequeue", "queues")
    }

    /// dbos 0.5.0, src/dequeue.rs:206
    fn queue(name: &str) -> Span {
        info_span!(target: "dbos::dequeue", "queue", queue = %name)
    }

    #[test]
    fn twelve_workflows_of_a_queue_are_twelve_traces() {
        with(Engine::Dbos, |worker| {
            let supervisor = queues();
            let poller = supervisor.in_scope(|| queue("orders"));
            for order in 0..12 {
                let workflow = poller.in_scope(|| workflow(&format!("order-{order}")));
                workflow.in_scope(|| {
                    step_attempt(0, "charge", 1).in_scope(|| step("call"));
                    step_attempt(1, "ship", 1).in_scope(|| ());
                });
            }
            drop((poller, supervisor));

            let forest = worker.forest();
            forest.assert_no_orphans().assert_no_duplicates();
            let workflows: [SpanData; 12] = only(worker, "workflow");
            workflows.iter().for_each(assert_root);
            assert_eq!(forest.trace_count(), 13, "and the pollers'");
            for span in forest.spans().filter(|span| span.name == "step") {
                let parent = forest.parent_of(span).expect("nested");
                assert_eq!(parent.name, "workflow");
            }
            let [poller] = only(worker, "queue");
            assert_nested(&poller, &worker.span("queues"));
        });
    }

    #[test]
    fn a_workflow_ends_when_its_span_closes() {
        let mut make = WorkflowContextStorage::builder().engine(Engine::Dbos);
        make = make.completed_grace(std::time::Duration::ZERO);
        let worker = Worker::with_storage(make.build().expect("valid settings"));
        worker.run(|| {
            let open = workflow("order-42");
            open.in_scope(|| step_attempt(0, "charge", 1).in_scope(|| ()));
            assert!(worker.storage.get("order-42").unwrap().is_some());

            drop(open);
            assert!(worker.storage.get("order-42").unwrap().is_none());
        });
    }

    /// Two executions of one workflow: the second one recovers it.
    #[test]
    fn a_recovery_continues_the_trace() {
        with(Engine::Dbos, |worker| {
            workflow("order-42").in_scope(|| step("before"));
            let first = worker.stored("order-42");
            let poller = queue("orders");
            poller.in_scope(|| workflow("order-42").in_scope(|| step("after")));

            let [_, recovered] = only(worker, "workflow");
            assert_continues(&recovered, &remote(&first));
            assert_eq!(recovered.links.len(), 0, "the poller is not linked");
        });
    }

    #[test]
    fn what_starts_in_a_request_keeps_the_trace_of_the_request() {
        with(Engine::Dbos, |worker| {
            info_span!("request").in_scope(|| {
                workflow("order-42").in_scope(|| workflow("order-42-child").in_scope(|| ()));
            });

            worker.forest().assert_one_trace().assert_no_orphans();
        });
    }

    #[test]
    fn a_workflow_id_of_anybody_else_is_no_tag() {
        with(Engine::Dbos, |worker| {
            for request in ["one", "two"] {
                let foreign = info_span!(target: "github_actions", "job", workflow_id = 7);
                foreign.in_scope(|| info_span!("job", otel.name = request).in_scope(|| ()));
            }
            assert!(worker.storage.instance_ids().is_empty());
            assert_ne!(worker.trace_of("one"), worker.trace_of("two"));
        });
    }

    fn remote(context: &SpanContext) -> SpanContext {
        SpanContext::new(
            context.trace_id(),
            context.span_id(),
            context.trace_flags(),
            true,
            context.trace_state().clone(),
        )
    }
}

mod aws {
    use super::*;

    const ARN: &str = "arn:aws:lambda:eu-central-1:1:function:order:1/durable-execution/a/b";

    /// aws-durable-execution-sdk 0.1.0, src/tracing_layer.rs:132
    fn execution(is_replay: bool) -> Span {
        info_span!(
            target: "aws_durable_execution_sdk::tracing_layer",
            "durable_execution",
            "executionArn" = ARN,
            "requestId" = "request",
            "isReplay" = is_replay,
        )
    }

    /// aws-durable-execution-sdk 0.1.0, src/tracing_layer.rs:163
    fn child_context(is_replay: bool) -> Span {
        info_span!(
            target: "aws_durable_execution_sdk::tracing_layer",
            parent: None,
            "durable_execution",
            "otel.name" = "child context",
            "executionArn" = ARN,
            "requestId" = "request",
            "isReplay" = is_replay,
        )
    }

    /// aws-durable-execution-sdk 0.1.0, src/tracing_layer.rs:100
    fn operation(id: &str) -> Span {
        info_span!(
            target: "aws_durable_execution_sdk::tracing_layer",
            "durable_operation",
            "executionArn" = ARN,
            "requestId" = "request",
            "operationId" = id,
            "attempt" = 1_u32,
            "isReplay" = false,
        )
    }

    /// lambda_runtime 1.0.1, src/layers/trace.rs:60; 1.5.0, line 66
    fn invoke(request: &str) -> Span {
        info_span!(
            target: "lambda_runtime::layers::trace",
            "Lambda runtime invoke",
            "otel.name" = format!("invoke {request}"),
            "requestId" = request,
            "xrayTraceId" = "Root=1-5759e988-bd862e3fe1be46a994272793",
        )
    }

    /// One invocation, which replays what earlier ones have done before it does the next step.
    fn invocation(number: usize, steps: &[&str]) {
        let invoke = invoke(&number.to_string());
        let handler = invoke.in_scope(|| execution(number > 0));
        let body = || {
            for (index, name) in steps.iter().enumerate() {
                // The handler's own code runs again each time, the body of a step that has a result does not.
                step(&format!("before {name}"));
                handler.record("isReplay", index + 1 < number);
                if index >= number {
                    operation(name).in_scope(|| step(name));
                    return;
                }
            }
        };
        invoke.in_scope(|| handler.in_scope(body));
    }

    #[test]
    fn several_invocations_are_one_trace_and_no_step_is_exported_twice() {
        with(Engine::AwsDurable, |worker| {
            let steps = ["charge", "pack", "ship"];
            (0..steps.len()).for_each(|number| invocation(number, &steps));

            let forest = worker.forest();
            let [first, second, third] = only(worker, "durable_execution");
            let names = ["invoke 0", "invoke 1", "invoke 2"];
            for (execution, invoke) in [&first, &second, &third].into_iter().zip(names) {
                assert_nested(execution, &worker.span(invoke));
            }
            forest.assert_one_trace().assert_no_orphans();
            for name in steps {
                assert_eq!(forest.count_by_name()[name], 1, "{forest}");
            }
            // The engine claims an operation after the code before it has run: so that is a replay up to the claim.
            for name in ["before charge", "before pack"] {
                assert_eq!(forest.count_by_name()[name], 1, "{forest}");
            }
            assert_eq!(worker.storage.stats().adopted, 3);
            let id = attribute(&worker.span("invoke 1"), "workflow.instance_id");
            assert_eq!(id.expect("adopted").as_str(), ARN);
        });
    }

    /// With the runtime's layer for OpenTelemetry there are two spans around the handler.
    #[test]
    fn both_spans_of_the_runtime_join_the_execution() {
        with(Engine::AwsDurable, |worker| {
            for number in 0..2 {
                // lambda_runtime 1.5.0, src/layers/otel.rs:87
                let layer = info_span!(
                    target: "lambda_runtime::layers::otel",
                    "Lambda function invocation",
                    "otel.name" = "order",
                    "otel.kind" = Empty,
                    "faas.invocation_id" = "request",
                );
                layer.in_scope(|| invocation(number, &["charge", "pack"]));
            }
            let [first, second] = only(worker, "order");
            let (first, second) = match first.start_time <= second.start_time {
                true => (first, second),
                false => (second, first),
            };
            assert_root(&first);
            assert_continues(&second, &first.span_context);
            assert_nested(&worker.span("invoke 1"), &second);
            worker.forest().assert_one_trace().assert_no_orphans();
            assert_eq!(worker.storage.stats().adopted, 4);
        });
    }

    /// Each invocation runs where nothing is known of the ones before.
    #[cfg(feature = "durable-root")]
    #[test]
    fn without_a_store_derived_ids_and_roots_make_one_trace_with_one_root() {
        use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
        use tracing_subscriber::prelude::*;

        let steps = ["charge", "pack", "ship"];
        let mut spans = Vec::new();
        for number in 0..steps.len() {
            let builder = WorkflowContextStorage::builder().engine(Engine::AwsDurable);
            let derived = builder.durable_root(true).derived_trace_ids(true);
            let storage = derived.build().expect("valid settings");
            let provider = SdkTracerProvider::builder()
                .with_id_generator(storage.id_generator())
                .with_sampler(storage.sampler(Sampler::AlwaysOn));
            let worker = Worker::assembled(provider, storage, true, |layer| {
                tracing::Dispatch::new(tracing_subscriber::registry().with(layer))
            });
            worker.run(|| invocation(number, &steps));
            if number + 1 == steps.len() {
                worker.storage.complete(ARN, "completed").expect("a status");
            }
            spans.extend(worker.spans());
        }

        let forest = tracing_workflow_context::testing::TraceForest::from_spans(&spans);
        forest
            .assert_one_trace()
            .assert_no_orphans()
            .assert_no_duplicates();
        let is_top = |span: &&SpanData| forest.parent_of(span).is_none();
        let root = forest.spans().find(is_top).expect("one root");
        assert_root(root);
        assert!(attribute(root, "workflow.spans").is_some(), "{forest}");
        let beneath = |span: &&SpanData| span.parent_span_id == root.span_context.span_id();
        let invocations = forest.spans().filter(beneath);
        assert_eq!(invocations.count(), steps.len(), "{forest}");
        for name in steps {
            assert_eq!(forest.count_by_name()[name], 1, "{forest}");
        }
    }

    /// A branch may do new work while its parent still replays: its own flag counts.
    #[test]
    fn a_child_context_is_judged_by_its_own_flag() {
        with(Engine::AwsDurable, |worker| {
            invoke("0").in_scope(|| execution(false).in_scope(|| ()));
            let invoke = invoke("1");
            let handler = invoke.in_scope(|| execution(true));
            invoke.in_scope(|| {
                handler.in_scope(|| {
                    let child = child_context(true);
                    child.in_scope(|| {
                        step("replayed");
                        child.record("isReplay", false);
                        step("new");
                    });
                    step("replayed by the handler");
                });
            });
            drop((handler, invoke));

            let names = worker.names();
            assert!(!names.iter().any(|name| name.starts_with("replayed")));
            let [_, handler] = only(worker, "durable_execution");
            assert_nested(&worker.span("child context"), &handler);
            assert_nested(&worker.span("new"), &worker.span("child context"));
            worker.forest().assert_one_trace().assert_no_orphans();
        });
    }

    /// Created in the handler, polled elsewhere.
    #[test]
    fn a_child_context_is_nested_where_it_was_created() {
        with(Engine::AwsDurable, |worker| {
            execution(false).in_scope(|| {
                let branch = info_span!("batch").in_scope(|| child_context(false));
                let child = branch.in_scope(|| child_context(false));
                info_span!("elsewhere").in_scope(|| child.in_scope(|| step("in the child")));
            });

            let [branch, child] = only(worker, "child context");
            let (branch, child) = match child.parent_span_id == branch.span_context.span_id() {
                true => (branch, child),
                false => (child, branch),
            };
            assert_nested(&branch, &worker.span("batch"));
            assert_nested(&child, &branch);
            assert_nested(&worker.span("in the child"), &child);
        });
    }

    #[test]
    fn a_child_context_without_a_current_span_continues_the_execution() {
        with(Engine::AwsDurable, |worker| {
            execution(false).in_scope(|| ());
            child_context(false).in_scope(|| ());
            info_span!("another request").in_scope(|| child_context(false).in_scope(|| ()));

            let first = worker.span("durable_execution").span_context;
            let [alone, in_request] = only(worker, "child context");
            for child in [&alone, &in_request] {
                assert_eq!(child.parent_span_id, first.span_id());
            }
            assert_eq!(alone.links.len(), 0);
            let request = worker.span("another request").span_context;
            let (relation, linked) = link(&in_request);
            assert_eq!(
                (relation.as_str(), linked.span_id()),
                ("foreign", request.span_id())
            );
        });
    }

    #[test]
    fn a_span_without_a_parent_that_is_not_the_engines_is_not_nested() {
        with(Engine::AwsDurable, |worker| {
            execution(false).in_scope(|| {
                info_span!(parent: None, "durable_execution", otel.name = "mine").in_scope(|| ());
            });
            assert_root(&worker.span("mine"));
            assert_eq!(worker.forest().trace_count(), 2);
        });
    }

    #[test]
    fn a_replay_flag_of_anybody_else_hides_nothing() {
        with(Engine::AwsDurable, |worker| {
            info_span!("player", "isReplay" = true).in_scope(|| step("frame"));
            let tagged = info_span!("tagged", "executionArn" = ARN, "isReplay" = Empty);
            tagged.in_scope(|| {
                tagged.record("isReplay", true);
                step("beneath a tagged one");
            });
            drop(tagged);
            assert_eq!(
                worker.names(),
                ["beneath a tagged one", "frame", "player", "tagged"]
            );
            assert_eq!(worker.storage.instance_ids(), [ARN]);
        });
    }
}

mod underway {
    use super::*;

    /// underway 0.2.0, src/worker.rs:719
    fn process_next_task() -> Span {
        info_span!(
            target: "underway::worker",
            parent: None,
            "process_next_task",
            "queue.name" = "orders",
            "task.id" = Empty,
        )
    }

    /// underway 0.2.0, src/job.rs:1624
    fn execute(job: &str, step: usize) -> Span {
        info_span!(
            target: "underway::job",
            "execute",
            "job.id" = %job,
            step,
            steps = 2_usize,
        )
    }

    #[test]
    fn the_steps_of_a_job_are_one_trace() {
        with(Engine::Underway, |worker| {
            let jobs = ["0192d1a0-0000", "0192d1a0-0001"];
            for number in [1, 2] {
                for job in jobs {
                    let poll = process_next_task();
                    poll.in_scope(|| {
                        info_span!(target: "underway::queue", "dequeue", "queue.name" = "orders", "task.id" = Empty)
                            .in_scope(|| ());
                        Span::current().record("task.id", "0192d1a0-0002");
                        execute(job, number).in_scope(|| step("user code"));
                    });
                }
            }

            let mut ids = worker.storage.instance_ids();
            ids.sort();
            assert_eq!(ids, jobs.map(|job| format!("underway:{job}")));
            let [one, other, one_again, other_again] = only(worker, "execute");
            for (first, second) in [(one, one_again), (other, other_again)] {
                assert_root(&first);
                assert_eq!(second.parent_span_id, first.span_context.span_id());
                assert_eq!((first.links.len(), second.links.len()), (0, 0));
            }
            assert_eq!(
                worker.forest().trace_count(),
                2 + 4,
                "two jobs and four polls"
            );
            worker.forest().assert_no_orphans();
        });
    }
}

mod graphile {
    use super::*;

    /// graphile_worker 0.14.0, src/runner/task_execution.rs:35
    pub(super) fn run_job(id: i64, task: &str) -> Span {
        let span = info_span!(
            target: "graphile_worker::runner::task_execution",
            "run_job",
            job_id = id,
            "messaging.system" = "graphile-worker",
            "messaging.operation.name" = "run_job",
            "messaging.destination.name" = Empty,
            "otel.name" = Empty,
        );
        span.in_scope(|| {
            // After the start, so the name stays as it is.
            span.record("otel.name", task);
            span.record("messaging.destination.name", task);
        });
        span
    }

    #[test]
    fn the_attempts_of_a_job_are_one_trace() {
        with(Engine::GraphileWorker, |worker| {
            for id in [7, 8, 7, 7] {
                run_job(id, "send_invoice").in_scope(|| step("user code"));
            }

            let [first, other, second, third] = only(worker, "run_job");
            assert_root(&other);
            for retry in [second, third] {
                assert_eq!(retry.parent_span_id, first.span_context.span_id());
            }
            let mut ids = worker.storage.instance_ids();
            ids.sort();
            assert_eq!(ids, ["graphile:7", "graphile:8"]);
            assert_eq!(worker.forest().trace_count(), 2);
        });
    }

    /// The way to continue the enqueuer's trace.
    #[test]
    fn a_span_of_the_enqueuer_names_the_job_by_its_prefix() {
        with(Engine::GraphileWorker, |worker| {
            let request = info_span!("request", workflow.instance_id = Empty);
            request.in_scope(|| request.record("workflow.instance_id", "graphile:7"));
            drop(request);
            run_job(7, "send_invoice").in_scope(|| ());

            worker.forest().assert_one_trace();
        });
    }
}

mod apalis {
    use super::*;

    /// apalis 1.0.0, src/layers/tracing/make_span.rs:79, whose default level is DEBUG
    fn task(task_id: &str, attempt: usize) -> Span {
        let span = Span::current();
        debug_span!(
            target: "apalis::layers::tracing::make_span",
            parent: span,
            "task",
            task_id = task_id,
            attempt,
        )
    }

    /// apalis 1.0.0, src/layers/tracing/contextual_span.rs:61, at another level
    fn contextual_task(task_id: &str, attempt: usize) -> Span {
        let span = Span::current();
        tracing::span!(
            target: "apalis::layers::tracing::contextual_span",
            parent: span,
            Level::INFO,
            "task",
            task_id = task_id,
            attempt,
        )
    }

    #[test]
    fn the_attempts_of_a_task_are_one_trace_whichever_way_their_spans_are_made() {
        with(Engine::Apalis, |worker| {
            task("01JBX", 1).in_scope(|| step("user code"));
            contextual_task("01JBX", 2).in_scope(|| step("user code"));
            task("01JBY", 1).in_scope(|| ());

            let [first, second, other] = only(worker, "task");
            assert_eq!(second.parent_span_id, first.span_context.span_id());
            assert_root(&other);
            assert!(worker.storage.get("apalis:01JBX").unwrap().is_some());
        });
    }
}

mod awa {
    use super::*;

    /// awa-worker 0.6.0, src/dispatcher.rs:354
    fn run(queue: &str) -> Span {
        info_span!(target: "awa_worker::dispatcher", "run", queue = %queue)
    }

    /// awa-worker 0.6.0, src/dispatcher.rs:501
    fn poll_once(queue: &str) -> Span {
        info_span!(target: "awa_worker::dispatcher", "poll_once", queue = %queue)
    }

    /// awa-worker 0.6.0, src/executor.rs:288
    pub(super) fn execute(queue: &str, id: i64, attempt: i16) -> Span {
        info_span!(
            target: "awa_worker::executor",
            "job.execute",
            job.id = id,
            job.kind = %"send_invoice",
            job.queue = %queue,
            job.attempt = attempt,
            otel.name = %format!("job.execute {queue}"),
            otel.status_code = Empty,
        )
    }

    #[test]
    fn the_jobs_of_a_dispatcher_are_traces_of_their_own_and_their_attempts_join() {
        with(Engine::Awa, |worker| {
            let dispatcher = run("mail");
            let jobs: Vec<_> = [(1, 1), (2, 1), (1, 2)]
                .map(|(id, attempt)| {
                    dispatcher
                        .in_scope(|| poll_once("mail").in_scope(|| execute("mail", id, attempt)))
                })
                .into();
            jobs.iter()
                .for_each(|job| job.in_scope(|| step("user code")));
            drop(jobs);
            drop(dispatcher);

            let forest = worker.forest();
            let [one, two, one_again] = only(worker, "job.execute mail");
            assert_root(&one);
            assert_root(&two);
            assert_eq!(one_again.parent_span_id, one.span_context.span_id());
            assert_eq!(one_again.links.len(), 0, "the poller is not linked");
            assert_eq!(forest.trace_count(), 3, "two jobs and the dispatcher's");
        });
    }
}

#[test]
fn integer_ids_of_two_queues_do_not_meet() {
    let engines = [Engine::Awa, Engine::GraphileWorker];
    with_all(&engines, |worker| {
        awa::execute("mail", 7, 1).in_scope(|| ());
        awa::execute("bills", 7, 1).in_scope(|| ());
        graphile::run_job(7, "send_invoice").in_scope(|| ());
        awa::execute("bills", 7, 2).in_scope(|| ());

        let mut ids = worker.storage.instance_ids();
        ids.sort();
        assert_eq!(ids, ["awa:bills:7", "awa:mail:7", "graphile:7"]);
        assert_eq!(worker.forest().trace_count(), 3);
        let [first, second] = only(worker, "job.execute bills");
        assert_eq!(second.parent_span_id, first.span_context.span_id());
    });
}

/// Two engines call it the same, each on its own spans.
#[test]
fn one_name_belongs_to_two_engines() {
    with_all(&[Engine::Underway, Engine::Awa], |worker| {
        let job =
            info_span!(target: "underway::job", "execute", "job.id" = %"7", step = 1, steps = 1);
        job.in_scope(|| ());
        awa::execute("mail", 7, 1).in_scope(|| ());
        let mut ids = worker.storage.instance_ids();
        ids.sort();
        assert_eq!(ids, ["awa:mail:7", "underway:7"]);
    });
}

#[test]
fn a_foreign_span_with_the_field_of_a_job_is_not_tagged() {
    let engines = [
        Engine::Dbos,
        Engine::AwsDurable,
        Engine::Underway,
        Engine::GraphileWorker,
        Engine::Apalis,
        Engine::Awa,
    ];
    with_all(&engines, |worker| {
        for request in ["one", "two"] {
            let foreign = info_span!(
                "foreign",
                otel.name = request,
                job.id = 7,
                job_id = 7,
                task_id = "7",
                workflow_id = "7",
                isReplay = true,
            );
            foreign.in_scope(|| step(&format!("beneath {request}")));
        }
        assert!(worker.storage.instance_ids().is_empty());
        assert_ne!(worker.trace_of("one"), worker.trace_of("two"));
        assert_eq!(worker.spans().len(), 4);
        assert_eq!(worker.storage.stats().deferred, 0);
    });
}

/// Foreign spans whose attributes are read all the same, since they name their instance by a reserved field.
#[test]
fn a_tagged_foreign_span_keeps_its_own_instance() {
    with_all(&[Engine::Awa, Engine::Underway], |worker| {
        let created = info_span!("created", workflow.instance_id = "order", job.id = 7);
        created.in_scope(|| ());
        let recorded = info_span!("recorded", workflow.instance_id = Empty, job.id = Empty);
        recorded.in_scope(|| {
            recorded.record("job.id", 8);
            recorded.record("workflow.instance_id", "order");
            recorded.record("job.id", 9);
            recorded.set_attribute("job.id", 10);
        });
        drop((created, recorded));

        assert_eq!(worker.storage.instance_ids(), ["order"]);
        assert_eq!(worker.storage.stats().late, 0);
        let first = worker.span("created").span_context;
        assert_eq!(worker.span("recorded").parent_span_id, first.span_id());
    });
}

/// A span that is held for the id of its own learns it from a job that opens in it, in the form that the job has itself.
#[test]
fn a_held_span_joins_the_job_that_opens_in_it() {
    with(Engine::Awa, |worker| {
        let request = info_span!("request", workflow.instance_id = Empty);
        request.in_scope(|| awa::execute("mail", 7, 1).in_scope(|| ()));
        drop(request);

        assert_eq!(worker.storage.instance_ids(), ["awa:mail:7"]);
        let id = attribute(&worker.span("request"), "workflow.instance_id");
        assert_eq!(id.expect("given").as_str(), "awa:mail:7");
        assert_nested(&worker.span("job.execute mail"), &worker.span("request"));
    });
}

#[test]
fn a_name_that_is_given_in_the_builder_counts_on_every_span_and_has_no_prefix() {
    let given = || {
        let builder = WorkflowContextStorage::builder().instance_id_fields(["job.id"]);
        builder.engine(Engine::Awa).build().expect("valid settings")
    };
    for worker in both_activations(given) {
        worker.run(|| {
            awa::execute("mail", 7, 1).in_scope(|| ());
            info_span!("mine", job.id = 7).in_scope(|| ());
        });
        assert_eq!(worker.storage.instance_ids(), ["7"]);
        assert_eq!(worker.forest().trace_count(), 1);
    }
}

/// dapr-durabletask 0.0.4, src/internal/otel.rs:146: a raw OpenTelemetry span has no target, and needs none.
#[test]
fn the_last_turn_of_dapr_ends_the_workflow() {
    for (status, ends) in [
        ("CONTINUED_AS_NEW", false),
        ("COMPLETED", true),
        ("TERMINATED", true),
        ("FAILED", true),
    ] {
        let builder = WorkflowContextStorage::builder()
            .engine(Engine::Dapr)
            .completed_grace(std::time::Duration::ZERO);
        let worker = Worker::with_storage(builder.build().expect("valid settings"));
        let tracer = worker.storage.tracer(worker.tracer());
        let turn = tracer
            .span_builder("orchestration||Order")
            .with_kind(SpanKind::Server)
            .with_attributes([
                KeyValue::new("durabletask.type", "orchestration"),
                KeyValue::new("durabletask.task.instance_id", "order"),
            ]);
        let mut turn = tracer.build_with_context(turn, &Context::new());
        assert!(worker.storage.get("order").unwrap().is_some());
        use opentelemetry::trace::Span as _;
        turn.set_attribute(KeyValue::new("durabletask.runtime_status", status));
        assert_eq!(
            worker.storage.get("order").unwrap().is_none(),
            ends,
            "{status}"
        );
    }
}
