//! The explicit calls: store, get, cleanup, create_resumed, ids and stats of a storage.
//!
//! No test of this binary may set a global tracer provider: one needs its absence.
use crate::support::*;

use std::error::Error as _;
use std::io;
use std::sync::{Arc, LazyLock, Mutex};

use opentelemetry::Value;
use opentelemetry::trace::{Tracer as _, TracerProvider as _};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::{Level, info_span};
use tracing_workflow_context::{
    CreateResumedError, InvalidInstanceId, MAX_INSTANCE_ID_BYTES, Stats, StorageError,
    WorkflowContext, WorkflowContextStorage,
};

const ID: &str = "order-42";

/// Returns a context of trace 7, the same one on each call: equality includes the time of recording.
fn context(span: u64) -> WorkflowContext {
    static CONTEXTS: LazyLock<Vec<WorkflowContext>> = LazyLock::new(|| {
        (1..20)
            .map(|span| WorkflowContext::try_from(&remote(7, span)).unwrap())
            .collect()
    });
    CONTEXTS[span as usize - 1].clone()
}

fn step() {
    info_span!("step", workflow.instance_id = ID).in_scope(|| {});
}

// Store, get, cleanup.

#[test]
fn what_is_stored_is_found_until_it_is_cleaned_up() {
    let storage = WorkflowContextStorage::new();

    assert_eq!(storage.get(ID).unwrap(), None);
    storage.store(ID, context(1)).unwrap();
    storage.store("another", context(2)).unwrap();
    assert_eq!(storage.get(ID).unwrap(), Some(context(1)));
    assert!(storage.cleanup(ID).unwrap());
    assert_eq!(storage.get(ID).unwrap(), None);
    assert!(!storage.cleanup(ID).unwrap());
    assert_eq!(storage.get("another").unwrap(), Some(context(2)));
}

#[test]
fn the_last_write_wins() {
    let storage = WorkflowContextStorage::new();
    for span in [1, 2, 1] {
        storage.store(ID, context(span)).unwrap();
        assert_eq!(storage.get(ID).unwrap(), Some(context(span)));
    }
    assert_eq!(storage.stats().stored_instances, 1);
}

#[test]
fn a_stored_context_replaces_one_that_a_span_recorded() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        worker.run(|| info_span!("first", workflow.instance_id = ID).in_scope(|| {}));
        worker.storage.store(ID, context(1)).unwrap();
        worker.run_in(place, step);

        assert_continues(&worker.span("step"), &remote(7, 1));
        assert_eq!(worker.storage.get(ID).unwrap(), Some(context(1)));
    });
}

#[test]
fn after_a_cleanup_the_next_span_is_the_first() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        worker.storage.store(ID, context(1)).unwrap();
        assert!(worker.storage.cleanup(ID).unwrap());
        worker.run_in(place, step);

        assert_root(&worker.span("step"));
        assert_same_span(&worker.stored(ID), &worker.span("step").span_context);
    });
}

#[test]
fn clones_share_everything() {
    let storage = WorkflowContextStorage::new();
    let clone = storage.clone();
    storage.store(ID, context(1)).unwrap();

    assert_eq!(clone.get(ID).unwrap(), Some(context(1)));
    assert_eq!(storage.stats(), clone.stats());
    drop(storage);
    assert_eq!(clone.instance_ids(), [ID]);
}

#[test]
fn flush_removes_nothing() {
    let storage = WorkflowContextStorage::new();
    storage.flush().unwrap();
    storage.store(ID, context(1)).unwrap();
    storage.flush().unwrap();

    assert_eq!(storage.get(ID).unwrap(), Some(context(1)));
}

// Ids and stats.

#[test]
fn instance_ids_lists_every_stored_instance() {
    let worker = Worker::new();
    let ids = || {
        let mut ids = worker.storage.instance_ids();
        ids.sort_unstable();
        ids
    };

    assert!(ids().is_empty());
    worker.storage.store("stored", context(1)).unwrap();
    worker.storage.store("stored", context(2)).unwrap();
    worker.run(|| info_span!("step", workflow.instance_id = "recorded").in_scope(|| {}));
    worker.storage.create_resumed("resumed", None).unwrap();
    assert_eq!(worker.storage.get("missing").unwrap(), None);
    assert_eq!(ids(), ["recorded", "resumed", "stored"]);
    assert_eq!(worker.storage.stats().stored_instances, 3);

    worker.storage.cleanup("recorded").unwrap();
    assert_eq!(ids(), ["resumed", "stored"]);
    assert_eq!(worker.storage.stats().stored_instances, 2);
}

#[test]
fn every_get_counts_one_hit_or_miss_and_other_calls_none() {
    let worker = Worker::new();
    let storage = &worker.storage;
    let hits_and_misses = || (storage.stats().hits, storage.stats().misses);

    assert_eq!(storage.stats(), Stats::default());
    storage.get(ID).unwrap();
    storage.get(ID).unwrap();
    assert_eq!(hits_and_misses(), (0, 2));
    storage.store(ID, context(1)).unwrap();
    storage.get(ID).unwrap();
    assert_eq!(hits_and_misses(), (1, 2));
    storage.create_resumed(ID, None).unwrap();
    storage.create_resumed("another", None).unwrap();
    storage.cleanup(ID).unwrap();
    storage.cleanup(ID).unwrap();
    storage.flush().unwrap();
    storage.get("").unwrap_err();
    assert_eq!(hits_and_misses(), (1, 2));
}

#[test]
fn the_first_span_of_an_instance_is_a_miss_and_every_later_one_is_a_hit() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        for _ in 0..3 {
            worker.run_in(place, step);
        }
        worker.run_in(place, || info_span!("untagged").in_scope(|| {}));

        let stats = worker.storage.stats();
        assert_eq!((stats.misses, stats.hits, stats.conflicts), (1, 2, 0));
    });
}

// Instance ids.

#[test]
fn an_empty_id_is_refused() {
    for error in refusals("") {
        assert!(matches!(error, InvalidInstanceId::Empty), "{error:?}");
        let text = "an instance id must not be empty; the text `None` counts as empty";
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn the_debug_form_of_no_id_is_refused() {
    for id in ["None", "\"\"", "Some(None)", "Some(\"\")"] {
        for error in refusals(id) {
            assert!(matches!(error, InvalidInstanceId::Empty), "{error:?}");
        }
    }
}

#[test]
fn calls_read_an_id_as_spans_do() {
    let forms = [
        "order-42",
        "\"order-42\"",
        "Some(\"order-42\")",
        "Some(order-42)",
    ];
    for form in forms {
        for other in forms {
            labelled(&format!("{form} and {other}"), || {
                let worker = Worker::new();
                let storage = &worker.storage;
                worker.run(|| info_span!("step", workflow.instance_id = form).in_scope(|| {}));
                let recorded = storage.get(other).unwrap().expect("was recorded");
                assert_eq!(recorded.trace_id(), worker.trace_of("step"));
                assert!(storage.explain(other).is_recorded());
                let resumed = storage.create_resumed(other, None).unwrap();
                let agent = worker.span("DurableAgent.ToolCallingWorkflow");
                assert_eq!(attribute(&agent, "workflow.instance_id"), Some(ID.into()));
                assert_eq!(storage.get(form).unwrap(), Some(resumed));
                storage.store(other, context(1)).unwrap();
                assert_eq!(storage.get(form).unwrap(), Some(context(1)));
                assert_eq!(storage.instance_ids(), [ID]);
                assert!(storage.cleanup(other).unwrap());
                assert_eq!(storage.get(form).unwrap(), None);
            });
        }
    }
}

#[test]
fn an_id_that_is_listed_is_found() {
    let storage = WorkflowContextStorage::new();
    for id in [
        r#""\"a\"""#,
        r#"Some("\"None")"#,
        r#""\\"#,
        r#""\"\\\"b\\\"\"""#,
        "ü\n",
    ] {
        storage.store(id, context(1)).unwrap();
        let listed = storage.instance_ids();
        assert_eq!(storage.get(&listed[0]).unwrap(), Some(context(1)), "{id}");
        assert!(storage.cleanup(&listed[0]).unwrap(), "{id}");
    }
}

#[test]
fn an_id_of_one_kib_is_accepted() {
    let worker = Worker::new();
    for id in ["x".repeat(1024), "ü".repeat(512)] {
        assert_eq!(id.len(), MAX_INSTANCE_ID_BYTES);
        worker.storage.store(&id, context(1)).unwrap();
        assert_eq!(worker.storage.get(&id).unwrap(), Some(context(1)));
        worker.storage.create_resumed(&id, None).unwrap();
        assert!(worker.storage.cleanup(&id).unwrap());
    }
}

#[test]
fn a_longer_id_is_refused_by_an_error_that_names_the_limit() {
    for id in ["x".repeat(1025), format!("{}x", "ü".repeat(512))] {
        for error in refusals(&id) {
            assert!(
                matches!(error, InvalidInstanceId::TooLong { length: 1025, .. }),
                "{error:?}"
            );
            assert!(error.to_string().contains("at most 1024 bytes"), "{error}");
        }
    }
}

/// Returns the error of each call that takes an id; nothing is stored.
fn refusals(id: &str) -> [InvalidInstanceId; 4] {
    let worker = Worker::new();
    let storage = &worker.storage;
    let of_call = |error| match error {
        StorageError::InvalidInstanceId(error) => error,
        error => panic!("{error:?}"),
    };
    let resumed = match storage.create_resumed(id, None).unwrap_err() {
        CreateResumedError::Storage(error) => of_call(error),
        error => panic!("{error:?}"),
    };
    let refusals = [
        of_call(storage.store(id, context(1)).unwrap_err()),
        of_call(storage.get(id).unwrap_err()),
        of_call(storage.cleanup(id).unwrap_err()),
        resumed,
    ];
    let stats = storage.stats();
    assert_eq!(stats.oversized, if id.len() > 1024 { 4 } else { 0 });
    assert_eq!(
        (stats.hits, stats.misses, stats.stored_instances),
        (0, 0, 0)
    );
    assert_eq!(worker.spans(), []);
    refusals
}

#[test]
fn ids_may_contain_control_characters_and_any_script() {
    let worker = Worker::new();
    let ids = [
        "\n",
        "\0",
        "\u{1b}[31m",
        "a\u{202e}b",
        "订单",
        "ü",
        "u\u{308}",
        "👩‍👩‍👧",
        " ",
        "\"",
        "a=b,c",
    ];
    for (span, id) in (1..).zip(ids) {
        worker.storage.store(id, context(span)).unwrap();
    }
    assert_eq!(worker.storage.instance_ids().len(), ids.len());
    for (span, id) in (1..).zip(ids) {
        assert_eq!(
            worker.storage.get(id).unwrap(),
            Some(context(span)),
            "{id:?}"
        );
        worker.run(|| info_span!("step", workflow.instance_id = id).in_scope(|| {}));
        let step = worker.spans().pop().expect("just exported");
        assert_continues(&step, &remote(7, span));
        assert!(worker.storage.cleanup(id).unwrap(), "{id:?}");
    }
}

#[test]
fn a_miss_is_logged_at_debug_with_the_id_escaped() {
    let log = logged(Level::DEBUG, || {
        let storage = WorkflowContextStorage::new();
        assert_eq!(storage.get("order\n\x1b[31m\r42").unwrap(), None);
    });

    assert_eq!(log.lines().count(), 1, "{log:?}");
    assert!(
        log.contains("DEBUG") && log.contains(r"order\n\u{1b}[31m\r42"),
        "{log:?}"
    );
    assert!(
        !log.trim_end().contains(|c: char| c.is_control()),
        "{log:?}"
    );
}

#[test]
fn a_miss_logs_nothing_above_debug() {
    let log = logged(Level::INFO, || {
        let storage = WorkflowContextStorage::new();
        assert_eq!(storage.get(ID).unwrap(), None);
        storage.get("").unwrap_err();
        assert!(!storage.cleanup(ID).unwrap());
    });

    assert_eq!(log, "");
}

/// Returns the log at that level, unescaped: the formatter must not hide what the crate did not escape.
fn logged(level: Level, run: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_ansi_sanitization(false)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, run);
    let bytes = log.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

// create_resumed.

#[test]
fn a_resumed_workflow_without_a_stored_context_begins_a_trace_with_an_agent_span() {
    let worker = Worker::new();
    let resumed = worker.storage.create_resumed(ID, Some("Planner")).unwrap();

    let agent = worker.span("Planner.ToolCallingWorkflow");
    assert_root(&agent);
    assert!(agent.links.is_empty(), "{:?}", agent.links);
    let mut attributes: Vec<_> = agent
        .attributes
        .iter()
        .map(|kv| (kv.key.as_str(), kv.value.clone()))
        .collect();
    attributes.sort_by_key(|(key, _)| *key);
    let expected: [(&str, Value); 5] = [
        ("agent.name", "Planner".into()),
        ("gen_ai.agent.name", "Planner".into()),
        ("openinference.span.kind", "AGENT".into()),
        ("workflow.instance_id", ID.into()),
        ("workflow.resumed", true.into()),
    ];
    assert_eq!(attributes, expected);
    let ids = (resumed.trace_id(), resumed.span_id());
    assert_eq!(
        ids,
        (agent.span_context.trace_id(), agent.span_context.span_id())
    );
    assert!(resumed.is_resumed() && resumed.is_sampled());
    assert_eq!(worker.storage.get(ID).unwrap(), Some(resumed));
}

#[test]
fn a_resumed_workflow_without_an_agent_name_is_a_durable_agent() {
    for name in [None, Some("")] {
        let worker = Worker::new();
        worker.storage.create_resumed(ID, name).unwrap();

        let agent = worker.span("DurableAgent.ToolCallingWorkflow");
        for name in ["agent.name", "gen_ai.agent.name"] {
            assert_eq!(attribute(&agent, name), Some("DurableAgent".into()));
        }
    }
}

#[test]
fn a_resumed_workflow_continues_what_is_stored() {
    let worker = Worker::new();
    worker.storage.store(ID, context(8)).unwrap();
    let resumed = worker.storage.create_resumed(ID, Some("Planner")).unwrap();
    let again = worker.storage.create_resumed(ID, Some("Executor")).unwrap();

    let planner = worker.span("Planner.ToolCallingWorkflow");
    let executor = worker.span("Executor.ToolCallingWorkflow");
    assert_continues(&planner, &remote(7, 8));
    assert_continues(&executor, &planner.span_context);
    assert_eq!(resumed.trace_id(), context(8).trace_id());
    assert_eq!(worker.storage.get(ID).unwrap(), Some(again));
}

#[test]
fn a_resumed_workflow_does_not_nest_in_whatever_span_is_current() {
    for worker in both_activations(WorkflowContextStorage::new) {
        worker.run(|| {
            let _request = remote_context(1, 2).attach();
            info_span!("request").in_scope(|| worker.storage.create_resumed(ID, None).unwrap());
        });

        assert_root(&worker.span("DurableAgent.ToolCallingWorkflow"));
    }
}

#[test]
fn later_spans_continue_the_agent_span_and_the_context_stays_resumed() {
    everywhere(WorkflowContextStorage::new, |worker, place| {
        let resumed = worker.storage.create_resumed(ID, None).unwrap();
        worker.run_in(place, || {
            step();
            info_span!("poll")
                .in_scope(|| info_span!("polled", workflow.instance_id = ID).in_scope(|| {}));
        });

        let agent = worker.span("DurableAgent.ToolCallingWorkflow");
        assert_continues(&worker.span("step"), &agent.span_context);
        assert_continues(&worker.span("polled"), &agent.span_context);
        let poll = worker.span("poll").span_context;
        assert_eq!(link(&worker.span("polled")), ("resumed".to_owned(), poll));
        assert_eq!(worker.storage.get(ID).unwrap(), Some(resumed));
    });
}

#[test]
fn without_a_tracer_create_resumed_fails() {
    let storage = WorkflowContextStorage::new();
    let error = storage.create_resumed(ID, None).unwrap_err();

    assert!(
        matches!(error, CreateResumedError::NoRecordingSpan),
        "{error:?}"
    );
    assert!(error.to_string().contains("no tracer is set up"), "{error}");
    assert!(error.source().is_none());
    assert!(storage.instance_ids().is_empty());
}

#[test]
fn a_dropped_layer_provides_no_tracer() {
    let worker = Worker::new();
    let storage = worker.storage.clone();
    storage.create_resumed("while it lives", None).unwrap();
    worker.close();

    assert_not_resumed(&storage);
}

#[test]
fn a_workflow_tracer_is_used_by_create_resumed_too() {
    let worker = Worker::new();
    let storage = WorkflowContextStorage::new();
    let tracer = storage.tracer(worker.tracer());
    let resumed = storage.create_resumed(ID, None).unwrap();
    let builder = tracer.span_builder("step");
    drop(tracer.build(
        builder.with_attributes([opentelemetry::KeyValue::new("workflow.instance_id", ID)]),
    ));

    let agent = worker.span("DurableAgent.ToolCallingWorkflow");
    assert_eq!(agent.span_context.span_id(), resumed.span_id());
    assert_continues(&worker.span("step"), &agent.span_context);
    drop(tracer);
    assert_not_resumed(&storage);
}

#[test]
fn create_resumed_uses_the_latest_tracer() {
    let (first, second) = (Worker::new(), Worker::new());
    let storage = WorkflowContextStorage::new();
    let _tracers = [
        storage.tracer(first.tracer()),
        storage.tracer(second.tracer()),
    ];
    storage.create_resumed(ID, None).unwrap();

    assert_eq!((first.spans().len(), second.spans().len()), (0, 1));
}

#[test]
fn create_resumed_uses_the_layers_tracer_again_when_a_later_one_is_dropped() {
    let (worker, other) = (Worker::new(), Worker::new());
    let storage = &worker.storage;
    drop(storage.tracer(other.tracer()));
    storage.create_resumed("short-lived", None).unwrap();
    assert_eq!((worker.spans().len(), other.spans().len()), (1, 0));

    // However many live or have lived at once.
    let later = || storage.tracer(other.tracer());
    let many: Vec<_> = (0..1_000).map(|_| later()).collect();
    storage.create_resumed("beside many", None).unwrap();
    assert_eq!((worker.spans().len(), other.spans().len()), (1, 1));
    drop(many);
    storage.create_resumed("after many", None).unwrap();
    assert_eq!((worker.spans().len(), other.spans().len()), (2, 1));
}

#[test]
fn a_workflow_tracer_can_be_cloned_whatever_it_decorates() {
    // Neither a tracer without `Clone`, nor its storage, is copied.
    let worker = Worker::new();
    let boxed = opentelemetry::global::BoxedTracer::new(Box::new(worker.tracer()));
    let tracer = worker.storage.tracer(boxed);
    for tracer in [tracer.clone(), tracer] {
        let builder = tracer.span_builder("step");
        drop(tracer.build(
            builder.with_attributes([opentelemetry::KeyValue::new("workflow.instance_id", ID)]),
        ));
    }

    assert_eq!(worker.spans().len(), 2);
    worker.forest().assert_one_trace();
}

#[test]
fn an_unsampled_agent_span_is_an_error() {
    let worker = Worker::with_sampler(WorkflowContextStorage::new(), true, Sampler::AlwaysOff);
    assert_not_resumed(&worker.storage);
}

#[test]
fn an_unsampled_stored_context_cannot_be_resumed_with_a_parent_based_sampler() {
    let sampler = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
    let worker = Worker::with_sampler(WorkflowContextStorage::new(), true, sampler);
    let unsampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    let unsampled = WorkflowContext::parse(unsampled, "").unwrap();
    worker.storage.store(ID, unsampled.clone()).unwrap();

    worker.storage.create_resumed(ID, None).unwrap_err();
    assert_eq!(worker.storage.get(ID).unwrap(), Some(unsampled));
    worker.storage.create_resumed("a root", None).unwrap();
}

#[test]
fn create_resumed_fails_after_the_provider_shut_down() {
    let provider = SdkTracerProvider::builder().build();
    let storage = WorkflowContextStorage::new();
    let _tracer = storage.tracer(provider.tracer("test"));
    storage.create_resumed("before", None).unwrap();
    provider.shutdown().unwrap();

    assert_not_resumed(&storage);
}

/// Asserts that `create_resumed` fails, and changes nothing.
#[track_caller]
fn assert_not_resumed(storage: &WorkflowContextStorage) {
    let before = storage.instance_ids();
    let error = storage.create_resumed("not stored", None).unwrap_err();
    assert!(
        matches!(error, CreateResumedError::NoRecordingSpan),
        "{error:?}"
    );
    assert_eq!(storage.instance_ids(), before);

    storage.store("stored", context(8)).unwrap();
    storage.create_resumed("stored", None).unwrap_err();
    let kept = storage.get("stored").unwrap().expect("is still there");
    assert_eq!(kept, context(8));
    assert!(!kept.is_resumed());
}
