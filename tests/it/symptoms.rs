//! The table "Symptoms" of docs/GUIDE.md: each one is provoked, and the line that the page quotes is what `explain` prints.

use std::sync::Arc;

use crate::support::*;
use opentelemetry_sdk::trace::Sampler;
use tracing::field::Empty;
use tracing::info_span;
use tracing_workflow_context::{
    Engine, WorkflowContextStorage as Storage, WorkflowContextStorageBuilder as Builder,
};

const ID: &str = "order-42";
const GUIDE: &str = include_str!("../../docs/GUIDE.md");

/// Asserts that the explanation of the instance contains a text which the guide quotes.
#[track_caller]
fn assert_told(worker: &Worker, quoted: &str) {
    assert_told_of(worker, ID, quoted);
}

#[track_caller]
fn assert_told_of(worker: &Worker, id: &str, quoted: &str) {
    assert!(
        GUIDE.contains(quoted),
        "docs/GUIDE.md does not quote {quoted:?}"
    );
    let told = worker.storage.explain(id).to_string();
    assert!(told.contains(quoted), "{quoted:?} is not in\n{told}");
}

fn worker(settings: impl FnOnce(Builder) -> Builder) -> (Worker, Arc<ManualClock>) {
    let clock = ManualClock::new();
    let storage = settings(Storage::builder().clock(clock.clone()));
    (Worker::with_storage(storage.build().unwrap()), clock)
}

fn step(name: &'static str) {
    info_span!("step", otel.name = name, workflow.instance_id = ID).in_scope(|| ());
}

fn end() {
    info_span!(
        "end",
        workflow.instance_id = ID,
        workflow.status = "completed"
    )
    .in_scope(|| ());
}

#[track_caller]
fn assert_traces(worker: &Worker, traces: usize) {
    let forest = worker.forest();
    assert_eq!(forest.trace_count(), traces, "{forest}");
}

#[test]
fn two_traces_because_a_field_is_misspelt() {
    let (worker, _) = worker(|builder| builder);
    worker.run(|| {
        info_span!("charge", workflow.instance = ID).in_scope(|| ());
        info_span!("ship", workflow.instance = ID).in_scope(|| ());
    });
    assert_traces(&worker, 2);
    assert_told(
        &worker,
        "nothing is recorded: never seen: no span and no call has named it lately (is the span filtered out, or the field misspelt?)",
    );
}

#[test]
fn two_traces_because_of_a_long_timer() {
    let (worker, clock) = worker(|builder| builder);
    worker.run(|| {
        step("charge");
        clock.advance(25 * HOUR);
        assert_told(
            &worker,
            "nothing is recorded: expired: it was idle for longer than idle_ttl",
        );
        step("ship");
    });
    assert_traces(&worker, 2);
}

#[test]
fn two_traces_because_memory_is_full() {
    let (worker, _) = worker(|builder| builder.max_instances(1));
    worker.run(|| {
        step("charge");
        info_span!("charge", workflow.instance_id = "another").in_scope(|| ());
        assert_told(
            &worker,
            "nothing is recorded: evicted: memory held more than max_instances",
        );
    });
}

#[test]
fn two_traces_because_it_had_ended() {
    let (worker, clock) = worker(|builder| builder);
    worker.run(|| {
        end();
        clock.advance(HOUR);
        assert_told(
            &worker,
            "nothing is recorded: completed: its grace after a terminal workflow.status is over",
        );
        step("another try");
    });
    assert_traces(&worker, 2);
}

#[test]
fn two_traces_because_of_two_runs() {
    let (worker, _) = worker(|builder| builder);
    worker.run(|| {
        for run in ["1", "2"] {
            info_span!("charge", workflow.instance_id = ID, workflow.run_id = run).in_scope(|| ());
        }
    });
    assert_traces(&worker, 2);
    assert_told(&worker, "new_run: a new root, linked to the stored context");
}

#[test]
fn two_traces_because_of_a_bound() {
    let (worker, clock) = worker(|builder| builder.max_age(HOUR));
    worker.run(|| {
        step("charge");
        clock.advance(2 * HOUR);
        step("ship");
    });
    assert_traces(&worker, 2);
    assert_told(&worker, "expired: a new root, linked to the stored context");
}

#[test]
fn two_traces_because_the_processes_share_no_backend() {
    let workers = [0, 1].map(|_| worker(|builder| builder).0);
    for worker in &workers {
        worker.run(|| step("charge"));
        assert_told(
            worker,
            "recorded, the first of its instance or run (no natural parent)",
        );
    }
    assert_ne!(workers[0].trace_of("charge"), workers[1].trace_of("charge"));
}

#[test]
fn two_traces_because_another_id_counts() {
    let names = ["workflow.instance_id", "order.id"];
    let (worker, _) = worker(|builder| builder.instance_id_fields(names));
    worker.run(|| {
        info_span!("charge", workflow.instance_id = "batch-7", order.id = ID).in_scope(|| ());
    });
    assert_told(
        &worker,
        "ignored, the same span names \"batch-7\" in a field that ranks higher",
    );
}

#[test]
fn no_parent_because_the_id_came_late() {
    let (worker, _) = worker(|builder| builder);
    worker.run(|| {
        step("charge");
        let ship = info_span!("ship", workflow.instance_id = Empty);
        ship.in_scope(|| info_span!("child").in_scope(|| ()));
        ship.record("workflow.instance_id", ID);
    });
    assert_traces(&worker, 2);
    assert_told(
        &worker,
        "late: kept its natural parent, linked to the stored context",
    );
}

#[test]
fn no_parent_because_the_parent_instance_is_unknown() {
    let (worker, _) = worker(|builder| builder);
    worker.run(|| {
        let parent = "batch-7";
        info_span!(
            "charge",
            workflow.instance_id = ID,
            workflow.parent_instance_id = parent
        )
        .in_scope(|| ());
    });
    assert_told(
        &worker,
        "no context is found for the parent instance \"batch-7\"",
    );
}

#[test]
fn no_parent_because_the_span_observes() {
    let (worker, _) = worker(|builder| builder);
    worker.run(|| {
        step("charge");
        info_span!("GET", workflow.instance_id = ID, workflow.observing = true).in_scope(|| ());
    });
    assert_told(
        &worker,
        "observed: kept its natural parent, linked to the stored context",
    );
}

#[test]
fn no_parent_because_the_backend_is_away() {
    let backend = ControlledBackend::new();
    backend.set_all(Behaviour::Fails);
    let worker = Worker::with_storage(patient(backend).build().unwrap());
    // The circuit opens after three failures.
    for _ in 0..3 {
        assert_eq!(worker.storage.get(ID).unwrap(), None);
    }
    assert_told(
        &worker,
        "nothing is recorded: the backend, which may know it, does not answer",
    );
}

#[test]
fn one_trace_for_many_workflows() {
    let (worker, _) = worker(|builder| builder);
    worker.run(|| {
        let _poll = info_span!("poll").entered();
        for order in 0..20 {
            info_span!("charge", workflow.instance_id = format!("order-{order}")).in_scope(|| ());
        }
    });
    assert_traces(&worker, 1);
    assert_told_of(
        &worker,
        "order-0",
        "more than 16 instances share this trace: name the span that they have in common, a poller's, in poller_spans",
    );
}

#[cfg(feature = "durable-root")]
mod root_missing {
    use super::*;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing::Dispatch;
    use tracing_subscriber::prelude::*;

    fn rooted(both: bool) -> Worker {
        let storage = Storage::builder().durable_root(true).build().unwrap();
        let mut provider = SdkTracerProvider::builder().with_id_generator(storage.id_generator());
        if both {
            provider = provider.with_sampler(storage.sampler(Sampler::AlwaysOn));
        }
        Worker::assembled(provider, storage, true, |layer| {
            Dispatch::new(tracing_subscriber::registry().with(layer))
        })
    }

    #[test]
    fn because_nobody_has_told_the_end() {
        let worker = rooted(true);
        worker.run(|| step("charge"));
        assert_eq!(worker.storage.stats().exported_roots, 0);
        assert_told(
            &worker,
            "open until its end is told by workflow.status, a span in completing_spans, complete or cleanup; 1 spans have ended here, 0 are open",
        );
    }

    #[test]
    fn because_the_provider_lacks_a_piece() {
        let worker = rooted(false);
        worker.run(|| {
            step("charge");
            end();
        });
        assert_eq!(worker.storage.stats().exported_roots, 0);
        assert_told(
            &worker,
            "durable roots are off: the tracer provider lacks .with_sampler(storage.sampler(..))",
        );
    }

    #[test]
    fn because_a_span_is_still_open() {
        let worker = rooted(true);
        worker.run(|| {
            let open = info_span!("charge", workflow.instance_id = ID);
            open.in_scope(end);
            assert_told(
                &worker,
                "ends as completed; 1 spans have ended here, 1 are open",
            );
            drop(open);
        });
        assert_eq!(worker.storage.stats().exported_roots, 1);
    }
}

#[test]
fn spans_twice_because_a_replay_is_not_told() {
    let (worker, _) = worker(|builder| builder);
    worker.run(|| {
        step("charge");
        step("charge"); // the engine runs the code again
    });
    assert_eq!(worker.names(), ["charge", "charge"]);
    assert_told(
        &worker,
        "orphan: child of the stored context (no natural parent)",
    );
}

#[test]
fn nothing_exported_because_all_is_replayed() {
    let (worker, _) = worker(|builder| builder.engine(Engine::Dapr));
    worker.run(|| {
        info_span!(
            "charge",
            workflow.instance_id = ID,
            workflow.replaying = true
        )
        .in_scope(|| ());
    });
    assert!(worker.spans().is_empty());
    assert_told(
        &worker,
        "nothing is recorded: its spans were replays, only look at it, or had no valid span context",
    );
    assert_told(&worker, "a replay, not exported");
}

#[test]
fn nothing_exported_because_the_provider_is_gone() {
    let (worker, _) = worker(|builder| builder);
    worker.provider.shutdown().unwrap();
    worker.run(|| step("charge"));
    assert_told(&worker, "not recorded, it has no valid span context");
}

#[test]
fn nothing_exported_because_the_sampler_says_no() {
    let worker = Worker::with_sampler(Storage::new(), true, Sampler::AlwaysOff);
    worker.run(|| step("charge"));
    assert!(worker.spans().is_empty());
    assert_told(&worker, ", not sampled");
}
