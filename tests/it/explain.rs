//! `explain` says what is recorded and by whom, what was decided for the last spans, and why nothing is recorded.

use std::sync::Arc;
use std::time::Duration;

use crate::support::*;
use opentelemetry::KeyValue;
use opentelemetry::trace::noop::NoopTracer;
use opentelemetry::trace::{SpanBuilder, Tracer as _};
use opentelemetry_sdk::trace::Sampler;
use tracing::{info_span, level_filters::LevelFilter};
use tracing_subscriber::Layer as _;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::backend::{
    BackendError, Record, StorageBackend, Write, WriteOutcome,
};
use tracing_workflow_context::{
    Absence, Continuation, MAX_INSTANCE_ID_BYTES, Relation, WorkflowContext,
    WorkflowContextStorage, WorkflowContextStorageBuilder,
};

const ID: &str = "order-42";

/// Returns a worker with a manual clock.
fn worker_with(
    settings: impl FnOnce(WorkflowContextStorageBuilder) -> WorkflowContextStorageBuilder,
) -> (Worker, Arc<ManualClock>) {
    let clock = ManualClock::new();
    let builder = settings(WorkflowContextStorage::builder().clock(clock.clone()));
    (
        Worker::with_storage(builder.build().expect("valid settings")),
        clock,
    )
}

fn worker() -> (Worker, Arc<ManualClock>) {
    worker_with(|builder| builder)
}

fn step() {
    info_span!("step", workflow.instance_id = ID).in_scope(|| {});
}

fn complete(worker: &Worker) {
    worker.run(|| {
        info_span!(
            "last",
            workflow.instance_id = ID,
            workflow.status = "completed"
        )
        .in_scope(|| {});
    });
}

fn reason(storage: &WorkflowContextStorage) -> Option<Absence> {
    storage.explain(ID).reason()
}

/// Returns the explanation with ids replaced: a trace id by the number of the trace, in the order in which their
/// first spans ended, and a span id by the span's name.
fn explained(worker: &Worker, id: &str) -> String {
    let mut text = worker.storage.explain(id).to_string();
    let mut traces = Vec::new();
    for span in worker.spans() {
        let context = &span.span_context;
        if !traces.contains(&context.trace_id()) {
            traces.push(context.trace_id());
        }
        text = text.replace(&context.span_id().to_string(), &format!("<{}>", span.name));
    }
    for (number, trace) in (1..).zip(traces) {
        text = text.replace(&trace.to_string(), &format!("trace-{number}"));
    }
    let process = format!("process {} on ", std::process::id());
    if let Some((before, after)) = text.split_once(&process) {
        let (host, after) = after.split_once('\n').expect("the host ends its line");
        assert!(!host.is_empty());
        text = format!("{before}this process\n{after}");
    }
    text
}

/// Returns the decision for the last span.
fn last_decision(worker: &Worker) -> String {
    let text = explained(worker, ID);
    let last = text.lines().last().expect("an explanation has lines");
    last.split_once(" ago  ")
        .expect("a decision has a time")
        .1
        .to_owned()
}

/// Returns the lines that describe the recorded context.
fn recorded(worker: &Worker) -> Vec<String> {
    let text = explained(worker, ID);
    let lines = text.lines().filter(|line| !line.contains(" ago  "));
    lines
        .skip(1)
        .map(|line| line.trim_start().to_owned())
        .collect()
}

// As a whole.

#[test]
fn an_explanation_reads_well() {
    let (worker, clock) = worker();
    let step = |name: &'static str, replaying: Option<bool>, status: Option<&str>| {
        info_span!(
            "workflow",
            otel.name = name,
            workflow.instance_id = ID,
            workflow.run_id = "run-1",
            workflow.replaying = replaying,
            workflow.status = status,
        )
    };
    worker.run(|| {
        info_span!("request").in_scope(|| {
            step("start", None, None).in_scope(|| {
                clock.advance(Duration::from_millis(1_500));
                step("charge", None, None).in_scope(|| {});
            });
        });
        clock.advance(90 * SECOND);
        step("start again", Some(true), None).in_scope(|| {});
        info_span!("poll").in_scope(|| step("ship", None, None).in_scope(|| {}));
        clock.advance(2 * SECOND);
        step("finish", None, Some("completed")).in_scope(|| {});
        clock.advance(SECOND);
    });

    assert_eq!(
        explained(&worker, ID),
        r#"workflow instance "order-42"
  trace trace-1 span <start>, sampled
  recorded 94.5s ago by span "start" of it::explain, this process
  generation 1, run "run-1", completed
     94.5s ago  span "start" trace-1/<start>: recorded, the first of its instance or run (natural parent trace-1/<request>)
     93.0s ago  span "charge" trace-1/<charge>: same_trace: kept its natural parent (natural parent trace-1/<start>)
      3.0s ago  span "start again" trace-1/<start>: a replay, not exported (no natural parent)
      3.0s ago  span "ship" trace-1/<ship>: foreign: child of the stored context, linked to its natural parent (natural parent trace-2/<poll>)
      1.0s ago  span "finish" trace-1/<finish>: orphan: child of the stored context (no natural parent)
      1.0s ago  terminal workflow.status"#
    );
    assert!(worker.storage.explain(ID).is_recorded());
    assert_eq!(reason(&worker.storage), None);

    clock.advance(HOUR);
    let text = explained(&worker, ID);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(
        lines[..2],
        [
            r#"workflow instance "order-42""#,
            "  nothing is recorded: completed: its grace after a terminal workflow.status is over",
        ]
    );
    assert_eq!(*lines.last().unwrap(), "      0.0s ago  its grace was over");
    assert_eq!(lines.len(), 2 + 7);
}

// Why nothing is recorded.

#[test]
fn an_id_of_no_span_was_never_seen() {
    let (worker, _clock) = worker();
    worker.storage.store("another", context(1)).unwrap();
    assert_eq!(reason(&worker.storage), Some(Absence::NeverSeen));
    assert_eq!(
        worker.storage.explain(ID).to_string(),
        "workflow instance \"order-42\"\n  nothing is recorded: never seen: no span and no call has named it lately \
         (is the span filtered out, or the field misspelt?)"
    );
}

#[test]
fn an_id_of_a_filtered_span_was_never_seen() {
    let storage = WorkflowContextStorage::new();
    let worker = Worker::stacked(storage, true, |layer| {
        tracing_subscriber::registry()
            .with(layer.with_filter(LevelFilter::WARN))
            .into()
    });
    worker.run(step);
    assert_eq!(reason(&worker.storage), Some(Absence::NeverSeen));
}

#[test]
fn a_failed_lookup_is_not_a_decision() {
    let (worker, _clock) = worker();
    worker.storage.get(ID).unwrap();
    worker.storage.cleanup(ID).unwrap();
    assert!(!worker.storage.explain(ID).is_recorded());
    assert_eq!(reason(&worker.storage), Some(Absence::NeverSeen));
    assert_eq!(
        (worker.storage.stats().hits, worker.storage.stats().misses),
        (0, 1)
    );
}

#[test]
fn an_instance_idle_for_too_long_is_reported_as_expired() {
    let (worker, clock) = worker();
    worker.run(step);
    clock.advance(25 * HOUR);
    assert_gone(
        &worker,
        Absence::Expired,
        "expired: it was idle for longer than idle_ttl",
        "expired",
    );
}

#[test]
fn an_instance_above_the_limit_is_reported_as_evicted() {
    let (worker, _clock) = worker_with(|builder| builder.max_instances(1));
    worker.run(step);
    worker.storage.store("another", context(1)).unwrap();
    assert_gone(
        &worker,
        Absence::Evicted,
        "evicted: memory held more than max_instances",
        "evicted",
    );
}

#[test]
fn a_completed_instance_is_reported_as_completed_however_it_was_removed() {
    let text = "completed: its grace after a terminal workflow.status is over";
    for remove in [
        |_: &Worker| {},
        |worker: &Worker| assert_eq!(worker.storage.stats().expired, 1),
        |worker: &Worker| assert!(!worker.storage.cleanup(ID).unwrap()),
        |worker: &Worker| worker.storage.store("another", context(1)).unwrap(),
    ] {
        let (worker, clock) = worker_with(|builder| builder.max_instances(1));
        complete(&worker);
        clock.advance(HOUR);
        remove(&worker);
        assert_gone(&worker, Absence::Completed, text, "its grace was over");
    }
}

#[test]
fn a_cleaned_up_instance_is_reported_as_such_even_if_completed_before() {
    let (worker, _clock) = worker();
    complete(&worker);
    assert!(worker.storage.cleanup(ID).unwrap());
    assert_gone(
        &worker,
        Absence::CleanedUp,
        "cleaned up by a call",
        "cleaned up by a call",
    );
}

#[test]
fn the_last_removal_is_reported() {
    let (worker, clock) = worker_with(|builder| builder.max_instances(1));
    let storage = &worker.storage;
    complete(&worker);
    clock.advance(HOUR);
    assert_eq!(reason(storage), Some(Absence::Completed));
    worker.run(step);
    clock.advance(25 * HOUR);
    assert_eq!(reason(storage), Some(Absence::Expired));
    storage.store(ID, context(1)).unwrap();
    storage.store("another", context(1)).unwrap();
    assert_eq!(reason(storage), Some(Absence::Evicted));
    complete(&worker);
    storage.store(ID, context(1)).unwrap();
    clock.advance(25 * HOUR);
    assert_eq!(reason(storage), Some(Absence::Expired));
    storage.store(ID, context(1)).unwrap();
    assert!(storage.cleanup(ID).unwrap());
    assert_eq!(reason(storage), Some(Absence::CleanedUp));
}

#[test]
fn an_instance_with_replays_only_is_not_recorded() {
    let (worker, _clock) = worker();
    let replayed = || info_span!("step", workflow.instance_id = ID, workflow.replaying = true);
    worker.run(|| replayed().in_scope(|| {}));
    let text = "its spans were replays, only look at it, or had no valid span context";
    assert_gone(
        &worker,
        Absence::NotRecorded,
        text,
        "a replay, not exported (no natural parent)",
    );
}

#[test]
fn an_instance_whose_spans_have_invalid_contexts_is_not_recorded() {
    let text = "its spans were replays, only look at it, or had no valid span context";
    let decision = "not recorded, it has no valid span context (no natural parent)";

    let (worker, _clock) = worker();
    worker.provider.shutdown().unwrap();
    worker.run(step);
    assert_gone(&worker, Absence::NotRecorded, text, decision);

    let (worker, _clock) = self::worker();
    let builder = SpanBuilder::from_name("step");
    let builder = builder.with_attributes([KeyValue::new("workflow.instance_id", ID)]);
    worker.storage.tracer(NoopTracer::new()).build(builder);
    assert_gone(&worker, Absence::NotRecorded, text, decision);
}

#[test]
fn an_instance_that_only_a_failing_backend_may_have_is_not_reported_as_never_seen() {
    #[derive(Debug)]
    struct Dead;

    impl StorageBackend for Dead {
        fn write(&self, _: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
            Err(BackendError::new("dead", None))
        }

        fn get(&self, _: &str) -> Result<Option<Record>, BackendError> {
            Err(BackendError::new("dead", None))
        }

        fn scan(&self, _: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
            Err(BackendError::new("dead", None))
        }

        fn flush(&self) -> Result<(), BackendError> {
            Err(BackendError::new("dead", None))
        }
    }

    let (worker, _clock) = worker_with(|builder| builder.backend(Dead).lookup_budget(HOUR));
    for _ in 0..3 {
        assert_eq!(worker.storage.get(ID).unwrap(), None);
    }
    assert_eq!(reason(&worker.storage), Some(Absence::BackendDown));
    assert_eq!(
        worker.storage.explain(ID).to_string(),
        "workflow instance \"order-42\"\n  nothing is recorded: the backend, which may know it, does not answer"
    );
}

/// Asserts that nothing is recorded for that reason, and that the last event ends with those words.
#[track_caller]
fn assert_gone(worker: &Worker, absence: Absence, text: &str, last: &str) {
    let explanation = worker.storage.explain(ID);
    assert!(!explanation.is_recorded());
    assert_eq!(explanation.reason(), Some(absence));
    assert_eq!(absence.to_string(), text);
    assert_eq!(recorded(worker), [format!("nothing is recorded: {text}")]);
    let happened = last_decision(worker);
    assert!(happened.ends_with(last), "{happened}");
}

// The last decisions.

#[test]
fn every_continuation_of_a_relation_is_described() {
    let reported = [
        (Continuation::Keep, "kept its natural parent"),
        (Continuation::Parent, "child of the stored context"),
        (
            Continuation::Link,
            "kept its natural parent, linked to the stored context",
        ),
        (
            Continuation::ParentAndLink,
            "child of the stored context, linked to its natural parent",
        ),
        (Continuation::NewRoot, "a new root"),
        (
            Continuation::NewRootAndLink,
            "a new root, linked to the stored context",
        ),
    ];
    for (continuation, words) in reported {
        let (worker, _clock) =
            worker_with(|builder| builder.relation(Relation::Foreign, continuation));
        worker.run(|| info_span!("first", workflow.instance_id = ID).in_scope(|| {}));
        worker.run(|| info_span!("poll").in_scope(step));
        let decision = last_decision(&worker);
        let reported = format!(": foreign: {words} (natural parent ");
        assert!(decision.contains(&reported), "no {reported} in {decision}");
    }
}

#[test]
fn the_relation_of_every_span_is_described() {
    let tell = |relation: &str,
                settings: fn(WorkflowContextStorageBuilder) -> WorkflowContextStorageBuilder,
                enact: fn(&Worker)| {
        let (worker, _clock) = worker_with(settings);
        worker.run(|| enact(&worker));
        let decision = last_decision(&worker);
        assert!(
            decision.contains(&format!(": {relation}: ")),
            "{relation}: {decision}"
        );
    };
    let default = |builder| builder;
    tell("orphan", default, |_| {
        step();
        step();
    });
    tell("same_trace", default, |_| {
        info_span!("first", workflow.instance_id = ID).in_scope(step);
    });
    tell("foreign", default, |_| {
        step();
        info_span!("poll").in_scope(step);
    });
    tell("resumed", default, |worker| {
        worker.storage.store(ID, context(1)).unwrap();
        step();
    });
    tell("child", default, |worker| {
        worker.storage.store("parent", context(1)).unwrap();
        let (id, parent) = (ID, "parent");
        info_span!(
            "child",
            workflow.instance_id = id,
            workflow.parent_instance_id = parent
        )
        .in_scope(|| {});
    });
    tell("new_run", default, |_| {
        for run in ["1", "2"] {
            info_span!("step", workflow.instance_id = ID, workflow.run_id = run).in_scope(|| {});
        }
    });
    tell("late", default, |_| {
        step();
        let span = info_span!("late", workflow.instance_id = tracing::field::Empty);
        span.in_scope(|| {
            info_span!("untagged").in_scope(|| {});
            span.record("workflow.instance_id", ID);
        });
    });
    tell(
        "expired",
        |builder| builder.max_spans(1),
        |_| {
            step();
            step();
        },
    );
}

#[test]
fn a_span_that_lost_the_race_is_reported() {
    let storage = WorkflowContextStorage::new();
    let racing = storage.clone();
    let meanwhile = Hooked(move |_: &str| racing.store(ID, context(1)).unwrap());
    let worker = Worker::with_sampler(storage, true, meanwhile);
    worker.run(step);
    assert_eq!(
        last_decision(&worker),
        "span \"step\" trace-1/<step>: another span was recorded first, linked to it (no natural parent)"
    );
}

#[test]
fn a_late_span_that_was_the_first_is_reported_as_recorded() {
    let (worker, _clock) = worker();
    let tracer = worker.storage.tracer(worker.tracer());
    let mut span = tracer.start("late");
    opentelemetry::trace::Span::set_attribute(&mut span, KeyValue::new("workflow.instance_id", ID));
    drop(span);
    assert_eq!(
        last_decision(&worker),
        "span \"late\" trace-1/<late>: recorded, the first of its instance or run (no natural parent)"
    );
    assert_eq!(
        recorded(&worker)[1],
        "recorded 0.0s ago by span \"late\", this process"
    );
}

// The recorded context and its origin.

#[test]
fn the_recording_span_is_reported_by_name_and_target() {
    let (worker, clock) = worker();
    worker.run(|| {
        info_span!(target: "orders::api", "accept", workflow.instance_id = ID).in_scope(|| {});
    });
    clock.advance(SECOND);
    worker.run(step);
    assert_eq!(
        recorded(&worker),
        [
            "trace trace-1 span <accept>, sampled",
            "recorded 1.0s ago by span \"accept\" of orders::api, this process",
            "generation 1"
        ]
    );
}

#[test]
fn a_span_of_the_opentelemetry_api_is_reported_by_name() {
    let (worker, _clock) = worker();
    let builder = SpanBuilder::from_name("accept");
    let builder = builder.with_attributes([KeyValue::new("workflow.instance_id", ID)]);
    drop(worker.storage.tracer(worker.tracer()).build(builder));
    assert_eq!(
        recorded(&worker)[1],
        "recorded 0.0s ago by span \"accept\", this process"
    );
}

#[test]
fn a_context_stored_by_this_process_is_reported_as_stored_by_a_call() {
    let (worker, _clock) = worker();
    worker.run(|| {
        info_span!("request").in_scope(|| {
            let current = WorkflowContext::current().unwrap();
            worker.storage.store(ID, current).unwrap();
        });
    });
    let lines = recorded(&worker);
    assert_eq!(lines[0], "trace trace-1 span <request>, sampled");
    assert!(
        lines[1].ends_with(" ago by a call, this process"),
        "{lines:?}"
    );
    assert_eq!(last_decision(&worker), "stored by a call");
}

#[test]
fn a_context_from_elsewhere_is_reported_as_from_another_process() {
    let (worker, _clock) = worker();
    let sent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
    worker
        .storage
        .store(ID, WorkflowContext::parse(sent, "").unwrap())
        .unwrap();
    let lines = recorded(&worker);
    assert_eq!(
        lines[0],
        "trace 4bf92f3577b34da6a3ce929d0e0e4736 span 00f067aa0ba902b7, not sampled"
    );
    assert!(lines[1].ends_with(" ago by another process"), "{lines:?}");
}

#[test]
fn an_unsampled_span_is_reported_as_such() {
    let worker = Worker::with_sampler(WorkflowContextStorage::new(), true, Sampler::AlwaysOff);
    worker.run(step);
    let lines = recorded(&worker);
    assert!(lines[0].ends_with(", not sampled"), "{lines:?}");
}

#[test]
fn the_run_its_generation_and_older_runs_are_reported() {
    let (worker, _clock) = worker_with(|builder| builder.max_spans(2));
    let step = |run: &str| {
        info_span!("step", workflow.instance_id = ID, workflow.run_id = run).in_scope(|| {});
    };
    worker.run(|| {
        ["a", "a", "b", "c", "c", "c", "c", "c"]
            .iter()
            .for_each(|run| step(run))
    });
    assert_eq!(
        recorded(&worker)[2],
        "generation 3, run \"c\" after 2 older"
    );
}

#[test]
fn a_resumed_instance_is_reported_as_such() {
    let (worker, _clock) = worker();
    worker.storage.create_resumed(ID, Some("Planner")).unwrap();
    assert_eq!(
        recorded(&worker),
        [
            "trace trace-1 span <Planner.ToolCallingWorkflow>, sampled",
            "recorded 0.0s ago by a call, this process",
            "generation 1, resumed"
        ]
    );
}

#[test]
fn a_completed_instance_is_reported_as_such_until_it_is_used_again() {
    let (worker, _clock) = worker();
    complete(&worker);
    assert_eq!(recorded(&worker)[2], "generation 1, completed");
    worker.storage.store(ID, context(1)).unwrap();
    assert_eq!(recorded(&worker)[2], "generation 1");
}

#[test]
fn a_span_whose_name_is_not_kept_is_not_reported_as_a_call() {
    let (worker, _clock) = worker();
    worker.run(|| {
        for n in 0..1_100 {
            let (name, id) = (format!("step {n}"), format!("order-{n}"));
            info_span!("step", otel.name = name, workflow.instance_id = id).in_scope(|| {});
        }
    });
    let by = |id: &str| {
        let text = worker.storage.explain(id).to_string();
        let line = text.lines().nth(2).expect("the line of the author");
        line.split_once(" ago ").expect("a time").1.to_owned()
    };
    let kept = by("order-0");
    assert!(
        kept.starts_with("by span \"step 0\" of it::explain, process "),
        "{kept}"
    );
    let too_many = by("order-1099");
    assert!(
        too_many.starts_with("by a span whose name is not kept, process "),
        "{too_many}"
    );
    worker.storage.create_resumed("order-0", None).unwrap();
    worker.run(|| {
        info_span!("step", otel.name = "step 1", workflow.instance_id = "new").in_scope(|| {});
    });
    assert!(by("order-0").starts_with("by a call, process "));
    assert!(by("new").starts_with("by span \"step 1\" of "));
}

// Ids that do not count.

#[test]
fn an_unknown_parent_instance_is_named() {
    for made_by_layer in [true, false] {
        let (worker, _clock) = worker();
        let child = |name: &'static str, id: &'static str, parent: &'static str| {
            if made_by_layer {
                let ids = info_span!(
                    "child",
                    otel.name = name,
                    workflow.instance_id = id,
                    workflow.parent_instance_id = parent
                );
                return worker.run(|| ids.in_scope(|| {}));
            }
            let ids = [
                ("workflow.instance_id", id),
                ("workflow.parent_instance_id", parent),
            ];
            let builder = SpanBuilder::from_name(name);
            let builder = builder.with_attributes(ids.map(|(key, id)| KeyValue::new(key, id)));
            drop(worker.storage.tracer(worker.tracer()).build(builder));
        };
        worker.run(|| child("child", ID, "order\u{1b}-9"));
        let text = explained(&worker, ID);
        let named = "  no context is found for the parent instance \"order\\u{1b}-9\"";
        assert_eq!(text.matches(named).count(), 1, "{text}");
        assert!(text.ends_with(
            "span \"child\" trace-1/<child>: recorded, the first of its instance or run (no natural parent)"
        ), "{text}");

        // Known, or no longer asked for.
        worker.storage.store("order-9", context(1)).unwrap();
        worker.run(|| child("known", "another", "order-9"));
        worker.run(|| child("later", ID, "order-8"));
        for id in ["another", ID] {
            let text = explained(&worker, id);
            assert!(
                !text.contains("order-8") && !text.contains("instance \"order-9"),
                "{text}"
            );
        }
    }
}

#[test]
fn a_second_id_on_a_span_that_is_ignored_is_named() {
    let (worker, _clock) =
        worker_with(|builder| builder.instance_id_fields(["order.id", "cart.id", "id"]));
    worker.run(|| {
        info_span!("step", cart.id = "cart-7", order.id = ID, id = "\u{1b}").in_scope(|| {});
        // The same id twice is none too many.
        info_span!("step", order.id = "same", id = "same", cart.id = "").in_scope(|| {});
    });

    let text = explained(&worker, ID);
    for ignored in ["\"cart-7\"", "\"\\u{1b}\""] {
        let line =
            format!("  ignored the id {ignored}, of a field that ranks lower on the same span");
        assert_eq!(text.matches(&line).count(), 1, "{text}");
    }
    assert!(!explained(&worker, "same").contains("ignored"));

    let ignored = worker.storage.explain("cart-7");
    assert_eq!(ignored.reason(), Some(Absence::Outranked));
    let text = ignored.to_string();
    assert!(
        text.contains(
            "nothing is recorded: its spans name another instance in an id field that ranks higher"
        ),
        "{text}"
    );
    assert!(
        text.ends_with("  ignored, the same span names \"order-42\" in a field that ranks higher"),
        "{text}"
    );
    assert_eq!(worker.storage.explain("same").reason(), None);
}

// Text from outside.

#[test]
fn control_characters_are_escaped_wherever_they_are() {
    let evil = "\u{1b}[31m\r\n\0\t\u{7f}\u{9b}\u{202e}\u{200b}";
    let shown = r"\u{1b}[31m\r\n\0\t\u{7f}\u{9b}\u{202e}\u{200b}";
    let (worker, _clock) = worker();
    let attributes = ["workflow.instance_id", "workflow.run_id", "target"];
    let attributes = attributes.map(|key| KeyValue::new(key, evil));
    let builder = SpanBuilder::from_name(evil).with_attributes(attributes);
    drop(worker.storage.tracer(worker.tracer()).build(builder));

    let explanation = worker.storage.explain(evil);
    assert!(explanation.is_recorded());
    let text = explanation.to_string();
    assert_eq!(text.lines().count(), 5, "{text}");
    assert!(
        !text
            .replace('\n', "")
            .contains(|c| evil.contains(c) && !"[31m".contains(c)),
        "{text:?}"
    );
    let expected = [
        format!("workflow instance \"{shown}\""),
        format!("by span \"{shown}\" of {shown}, "),
        format!("run \"{shown}\""),
        format!("  span \"{shown}\" "),
    ];
    for expected in expected {
        assert!(text.contains(&expected), "no {expected} in\n{text}");
    }
}

#[test]
fn an_invalid_id_is_reported_as_such_and_truncated() {
    let storage = WorkflowContextStorage::new();
    let too_long = [
        "x".repeat(MAX_INSTANCE_ID_BYTES + 1),
        "ü".repeat(10_000_000),
    ];
    for id in too_long {
        let explanation = storage.explain(&id);
        assert_eq!(explanation.reason(), Some(Absence::InvalidId));
        let text = explanation.to_string();
        let refusal = format!(
            "\n  nothing is recorded: an instance id is at most 1024 bytes long, this one has {} bytes",
            id.len()
        );
        assert!(text.ends_with(&refusal), "{text}");
        assert!(
            text.len() < MAX_INSTANCE_ID_BYTES + 200,
            "{} bytes",
            text.len()
        );
    }
    let explanation = storage.explain("");
    assert_eq!(explanation.reason(), Some(Absence::InvalidId));
    assert_eq!(
        explanation.to_string(),
        "workflow instance \"\"\n  nothing is recorded: an instance id must not be empty; the text `None` counts as empty"
    );
    assert_eq!(
        Absence::InvalidId.to_string(),
        "the id is empty or too long"
    );
}

// How many decisions are kept.

#[test]
fn decisions_can_be_switched_off() {
    let (worker, clock) = worker_with(|builder| builder.recent_decisions(0));
    worker.run(step);
    assert_eq!(
        explained(&worker, ID),
        "workflow instance \"order-42\"\n  \
           trace trace-1 span <step>, sampled\n  \
           recorded 0.0s ago by span \"step\" of it::explain, this process\n  \
           generation 1\n  \
           recent decisions are switched off"
    );
    clock.advance(25 * HOUR);
    assert_eq!(reason(&worker.storage), Some(Absence::NeverSeen));
}

#[test]
fn only_the_last_decisions_of_all_instances_are_kept() {
    for kept in [100, 4, 1] {
        let settings =
            move |builder: WorkflowContextStorageBuilder| builder.recent_decisions(kept as usize);
        let (worker, _clock) = worker_with(settings);
        let storage = &worker.storage;
        storage.store(ID, context(1)).unwrap();
        storage.cleanup(ID).unwrap();
        let decisions = |id: &str| storage.explain(id).to_string().matches(" ago  ").count();
        for span in 1..kept {
            storage.store("another", context(span)).unwrap();
        }
        assert_eq!(
            (decisions(ID), decisions("another")),
            (1, kept as usize - 1)
        );
        assert_eq!(reason(storage), Some(Absence::CleanedUp));
        for _ in 0..2 {
            storage.store("another", context(kept)).unwrap();
            assert_eq!((decisions(ID), decisions("another")), (0, kept as usize));
            assert_eq!(reason(storage), Some(Absence::NeverSeen));
        }
    }
}

#[test]
fn by_default_a_busy_instance_leaves_room_for_the_decisions_of_others() {
    let (worker, _clock) = worker_with(|builder| builder);
    let storage = &worker.storage;
    // So many that some certainly share a ring buffer with the busy one, though hashes are random: none of 32 did in one run of 70.
    let quiet: Vec<_> = (0..200).map(|n| format!("quiet {n}")).collect();
    for id in &quiet {
        storage.store(id, context(1)).unwrap();
        storage.cleanup(id).unwrap();
    }
    for span in 1..10_000 {
        storage.store(ID, context(span)).unwrap();
    }
    let is_reported = |id: &&String| storage.explain(id).reason() == Some(Absence::CleanedUp);
    let reported = quiet.iter().filter(is_reported).count();
    assert!((1..quiet.len()).contains(&reported), "{reported}");
    let decisions = storage.explain(ID).to_string().matches(" ago  ").count();
    assert_eq!(decisions, 128);
}

#[test]
fn the_decisions_of_an_instance_are_reported_in_order() {
    let (worker, clock) = worker_with(|builder| builder.recent_decisions(6));
    for _ in 0..10 {
        worker.storage.store(ID, context(1)).unwrap();
        clock.advance(SECOND);
        worker.storage.cleanup(ID).unwrap();
    }
    let text = worker.storage.explain(ID).to_string();
    let reported: Vec<_> = text.lines().skip(2).map(str::trim).collect();
    assert_eq!(
        reported,
        [
            "3.0s ago  stored by a call",
            "2.0s ago  cleaned up by a call",
            "2.0s ago  stored by a call",
            "1.0s ago  cleaned up by a call",
            "1.0s ago  stored by a call",
            "0.0s ago  cleaned up by a call"
        ]
    );
}

#[test]
fn a_span_whose_run_id_came_late_is_named_as_its_author() {
    let runs = |worker: &Worker| {
        worker.run(|| {
            info_span!("start", workflow.instance_id = ID, workflow.run_id = "1").in_scope(|| {});
            let step = info_span!(
                "step",
                workflow.instance_id = ID,
                workflow.run_id = tracing::field::Empty
            )
            .entered();
            step.record("workflow.run_id", "2");
        });
        worker.storage.explain(ID).to_string()
    };
    let text = runs(&worker().0);
    assert!(text.contains("by span \"step\", process"), "{text}");
    assert!(!text.contains("span \"\""), "{text}");

    // Without a trail nothing tells the name any more.
    let text = runs(&worker_with(|builder| builder.recent_decisions(0)).0);
    assert!(text.contains("by a span whose name is not kept"), "{text}");
}
