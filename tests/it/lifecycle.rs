//! Instances are removed when completed, idle or above the limit, and not before.
//!
//! All tests but one use a manual clock.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::*;
use opentelemetry::trace::{Event, SpanBuilder, TraceContextExt as _, Tracer as _};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_sdk::trace::Sampler;
use tracing::field::Empty;
use tracing::{Span, info, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_workflow_context::{Absence, WorkflowContextStorage, WorkflowContextStorageBuilder};

const ID: &str = "order-42";

const YEAR: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// The defaults of `completed_grace` and `idle_ttl`.
const GRACE: Duration = Duration::from_secs(5 * 60);
const TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// The precision of expiry.
const SLACK: Duration = Duration::from_millis(50);

fn built(builder: WorkflowContextStorageBuilder) -> WorkflowContextStorage {
    builder.build().expect("valid settings")
}

/// Returns a storage with a manual clock.
fn clocked(
    settings: impl FnOnce(WorkflowContextStorageBuilder) -> WorkflowContextStorageBuilder,
) -> (WorkflowContextStorage, Arc<ManualClock>) {
    let clock = ManualClock::new();
    let builder = WorkflowContextStorage::builder().clock(clock.clone());
    (built(settings(builder)), clock)
}

/// Runs a test for each way to make spans, with the default settings.
fn for_each_worker_with_a_clock(test: impl Fn(&Worker, &ManualClock)) {
    for_each_via(|via| {
        let (storage, clock) = clocked(|builder| builder);
        let worker = Worker::via(via, storage);
        worker.run(|| test(&worker, &clock));
    });
}

fn step(worker: &Worker, name: &str) {
    worker.step(name, Tags::instance(ID));
}

/// Returns the stored ids, which does not count as use.
fn ids_of(storage: &WorkflowContextStorage) -> BTreeSet<String> {
    storage.instance_ids().into_iter().collect()
}

#[track_caller]
fn assert_ids(storage: &WorkflowContextStorage, expected: &[&str]) {
    assert_eq!(
        ids_of(storage),
        expected.iter().map(|id| (*id).to_owned()).collect()
    );
}

/// Asserts that the instances are kept for exactly that time.
#[track_caller]
fn assert_go_after(time: Duration, storage: &WorkflowContextStorage, clock: &ManualClock) {
    let (ids, expired) = (ids_of(storage), storage.stats().expired);
    assert!(!ids.is_empty(), "nothing is there to begin with");
    clock.advance(time - SLACK);
    assert_eq!(ids_of(storage), ids, "they went too early");
    clock.advance(2 * SLACK);
    assert_ids(storage, &[]);
    assert_eq!(storage.stats().expired, expired + ids.len() as u64);
}

/// Asserts that the instance is not removed after the grace.
#[track_caller]
fn assert_is_alive(storage: &WorkflowContextStorage, clock: &ManualClock) {
    clock.advance(2 * GRACE);
    assert_ids(storage, &[ID]);
}

// Completed instances.

/// The way in which a span is given its status.
#[derive(Clone, Copy, Debug)]
enum StatusGiven {
    AtItsCreation,
    ByRecordBeforeItStarts,
    ByRecord,
    ByEventBeforeItStarts,
    ByEvent,
}

const STATUS_GIVEN: [StatusGiven; 5] = [
    StatusGiven::AtItsCreation,
    StatusGiven::ByRecordBeforeItStarts,
    StatusGiven::ByRecord,
    StatusGiven::ByEventBeforeItStarts,
    StatusGiven::ByEvent,
];

/// Opens a span of the instance and gives it the status.
fn set_status(worker: &Worker, given: StatusGiven, status: &str, replaying: bool) {
    match worker.made_via() {
        Via::Api => set_status_by_api(worker, given, status, replaying),
        Via::Layer | Via::LayerWithoutActivation => set_status_by_layer(given, status, replaying),
    }
}

fn set_status_by_layer(given: StatusGiven, status: &str, replaying: bool) {
    let span = info_span!(
        "reporter",
        workflow.instance_id = ID,
        workflow.status = matches!(given, StatusGiven::AtItsCreation).then_some(status),
        workflow.replaying = replaying.then_some(true),
    );
    match given {
        StatusGiven::ByRecordBeforeItStarts => drop(span.record("workflow.status", status)),
        StatusGiven::ByEventBeforeItStarts => info!(parent: &span, workflow.status = status),
        _ => {}
    }
    span.in_scope(|| match given {
        StatusGiven::ByRecord => drop(span.record("workflow.status", status)),
        StatusGiven::ByEvent => info!(workflow.status = status),
        _ => {}
    });
}

fn set_status_by_api(worker: &Worker, given: StatusGiven, status: &str, replaying: bool) {
    let status = KeyValue::new("workflow.status", status.to_owned());
    let mut attributes = vec![KeyValue::new("workflow.instance_id", ID)];
    attributes.extend(replaying.then(|| KeyValue::new("workflow.replaying", true)));
    let mut builder = SpanBuilder::from_name("reporter");
    match given {
        StatusGiven::AtItsCreation | StatusGiven::ByRecordBeforeItStarts => {
            attributes.push(status.clone())
        }
        StatusGiven::ByEventBeforeItStarts => {
            let now = std::time::SystemTime::now();
            builder.events = Some(vec![Event::new("done", now, vec![status.clone()], 0)]);
        }
        StatusGiven::ByRecord | StatusGiven::ByEvent => {}
    }
    builder = builder.with_attributes(attributes);
    let tracer = worker.storage.tracer(worker.tracer());
    let context = Context::current_with_span(tracer.build(builder));
    match given {
        StatusGiven::ByRecord => context.span().set_attribute(status),
        StatusGiven::ByEvent => context.span().add_event("done", vec![status]),
        _ => {}
    }
}

fn complete(worker: &Worker) {
    set_status(worker, StatusGiven::AtItsCreation, "completed", false);
}

#[test]
fn after_a_terminal_status_an_instance_is_kept_for_the_grace_and_then_removed() {
    for status in [
        "completed",
        "failed",
        "terminated",
        "canceled",
        "cancelled",
        "timed_out",
    ] {
        let capitalized = status[..1].to_uppercase() + &status[1..];
        for status in [status.to_owned(), status.to_uppercase(), capitalized] {
            labelled(&status, || {
                for_each_worker_with_a_clock(|worker, clock| {
                    set_status(worker, StatusGiven::AtItsCreation, &status, false);
                    assert_go_after(GRACE, &worker.storage, clock);
                    let reason = worker.storage.explain(ID).reason();
                    assert_eq!(reason, Some(Absence::Completed));
                });
            });
        }
    }
}

#[test]
fn a_terminal_status_applies_whenever_a_span_records_it() {
    for given in STATUS_GIVEN {
        labelled(&format!("status given {given:?}"), || {
            for_each_worker_with_a_clock(|worker, clock| {
                set_status(worker, given, "completed", false);
                assert_go_after(GRACE, &worker.storage, clock);
            });
        });
    }
}

#[test]
fn a_terminal_status_of_a_replayed_span_applies() {
    for given in STATUS_GIVEN {
        labelled(&format!("status given {given:?}"), || {
            for_each_worker_with_a_clock(|worker, clock| {
                step(worker, "recorded");
                set_status(worker, given, "completed", true);
                assert_eq!(worker.names(), ["recorded"]);
                assert_go_after(GRACE, &worker.storage, clock);
            });
        });
    }
}

#[test]
fn a_terminal_status_of_an_unsampled_span_applies() {
    for (given, via) in STATUS_GIVEN
        .into_iter()
        .flat_map(|given| VIAS.map(|via| (given, via)))
    {
        labelled(&format!("status given {given:?} via {via:?}"), || {
            let (storage, clock) = clocked(|builder| builder);
            let worker = Worker::via_with_sampler(via, storage, Sampler::AlwaysOff);
            worker.run(|| set_status(&worker, given, "completed", false));
            assert_eq!(worker.names(), [""; 0]);
            assert_go_after(GRACE, &worker.storage, &clock);
        });
    }
}

#[test]
fn a_terminal_status_applies_on_a_span_whose_id_is_recorded_late() {
    type Tell = fn(&tracing::Span);
    let scenarios: [(&str, Tell); 3] = [
        ("the status first", |span| {
            span.record("workflow.status", "completed");
            span.record("workflow.instance_id", ID);
        }),
        ("the id first", |span| {
            span.record("workflow.instance_id", ID);
            span.record("workflow.status", "completed");
        }),
        ("an id that is too late", |span| {
            info_span!("untagged").in_scope(|| {});
            span.record("workflow.instance_id", ID);
            span.record("workflow.status", "completed");
        }),
    ];
    for (label, scenario) in scenarios {
        labelled(label, || {
            let (storage, clock) = clocked(|builder| builder);
            let worker = Worker::with_storage(storage);
            worker.run(|| {
                let (instance_id, status) = (None::<&str>, None::<&str>);
                let span = info_span!(
                    "late",
                    workflow.instance_id = instance_id,
                    workflow.status = status
                );
                span.in_scope(|| scenario(&span));
            });
            assert_go_after(GRACE, &worker.storage, &clock);
        });
    }
}

#[test]
fn a_status_is_its_formatted_value() {
    #[derive(Debug)]
    #[allow(dead_code, reason = "printed")]
    enum Status {
        Failed { reason: &'static str },
    }
    #[derive(Debug)]
    #[allow(non_camel_case_types, reason = "printed")]
    struct Timed_Out(#[allow(dead_code, reason = "printed")] u8);
    let spans: [fn() -> tracing::Span; 8] = [
        || {
            let status = Status::Failed { reason: "no stock" };
            info_span!("step", workflow.instance_id = ID, workflow.status = ?status)
        },
        || info_span!("step", workflow.instance_id = ID, workflow.status = ?Timed_Out(1)),
        || info_span!("step", workflow.instance_id = ID, workflow.status = ?Some("failed")),
        || info_span!("step", workflow.instance_id = ID, workflow.status = ?Some(Timed_Out(1))),
        || {
            info_span!(
                "step",
                workflow.instance_id = ID,
                workflow.status = "failed(no stock)"
            )
        },
        || info_span!("step", workflow.instance_id = ID, workflow.status = %"Completed"),
        || info_span!("step", workflow.instance_id = ID, workflow.status = ?"Completed"),
        || {
            #[derive(Debug)]
            struct Completed;
            info_span!("step", workflow.instance_id = ID, workflow.status = ?Completed)
        },
    ];
    for span in spans {
        let (storage, clock) = clocked(|builder| builder);
        let worker = Worker::with_storage(storage);
        worker.run(|| span().in_scope(|| {}));
        assert_go_after(GRACE, &worker.storage, &clock);
    }
}

#[test]
fn any_other_status_has_no_effect() {
    for status in [
        "running",
        "suspended",
        "pending",
        "continued_as_new",
        "complete",
        "completed!",
        "completed_with_warnings",
        "completed with warnings",
        "error: no stock, will retry",
        "failed (will be retried)",
        "failed-over",
        "failed(",
        "failed {",
        "not failed",
        "(failed)",
        "errors",
        "None",
        "",
    ] {
        for given in STATUS_GIVEN {
            labelled(&format!("{status:?} given {given:?}"), || {
                for_each_worker_with_a_clock(|worker, clock| {
                    set_status(worker, given, status, false);
                    assert_is_alive(&worker.storage, clock);
                });
            });
        }
    }
}

#[test]
fn a_status_may_have_another_field() {
    for (field, ends) in [
        ("order.state", true),
        ("outcome", true),
        ("workflow.status", false),
    ] {
        let (storage, clock) = clocked(|builder| builder.status_fields(["order.state", "outcome"]));
        let worker = Worker::with_storage(storage);
        let tracer = worker.storage.tracer(worker.tracer());
        let attributes = [("workflow.instance_id", ID), (field, "completed")];
        let attributes = attributes.map(|(key, value)| KeyValue::new(key, value));
        drop(tracer.build(SpanBuilder::from_name("step").with_attributes(attributes)));
        match ends {
            true => assert_go_after(GRACE, &worker.storage, &clock),
            false => assert_is_alive(&worker.storage, &clock),
        }
    }
}

#[test]
fn a_status_that_is_not_text_has_no_effect() {
    for_each_worker_with_a_clock(|worker, clock| {
        info_span!("step", workflow.instance_id = ID, workflow.status = true).in_scope(|| {});
        info_span!("step", workflow.instance_id = ID, workflow.status = 0).in_scope(|| {});
        let tracer = worker.storage.tracer(worker.tracer());
        for status in [Value::Bool(true), Value::I64(0)] {
            let attributes = [
                ("workflow.instance_id", Value::from(ID)),
                ("workflow.status", status),
            ];
            let attributes = attributes.map(|(key, value)| KeyValue::new(key, value));
            drop(tracer.build(SpanBuilder::from_name("step").with_attributes(attributes)));
        }
        assert_is_alive(&worker.storage, clock);
    });
}

#[test]
fn a_terminal_status_of_another_instance_has_no_effect() {
    let (storage, clock) = clocked(|builder| builder);
    let worker = Worker::with_storage(storage);
    worker.run(|| {
        info!(workflow.status = "completed");
        info_span!("step", workflow.instance_id = ID, status = "completed").in_scope(|| {
            info!(status = "completed");
            info_span!("untagged", workflow.status = "completed").in_scope(|| {
                info!(workflow.status = "completed");
            });
            info_span!(
                "another's",
                workflow.instance_id = "another",
                workflow.status = "completed"
            );
        });
    });
    assert_ids(&worker.storage, &[ID, "another"]);
    assert_is_alive(&worker.storage, &clock);
}

#[test]
fn late_spans_find_their_trace_and_do_not_extend_the_grace() {
    for_each_worker_with_a_clock(|worker, clock| {
        complete(worker);
        let recorded = worker.span("reporter").span_context;
        clock.advance(GRACE / 2);
        step(worker, "late");
        clock.advance(GRACE / 2 - SLACK);
        step(worker, "very late");
        for name in ["late", "very late"] {
            assert_continues(&worker.span(name), &recorded);
        }

        clock.advance(2 * SLACK);
        step(worker, "too late");
        assert_root(&worker.span("too late"));
        assert_ne!(worker.trace_of("too late"), recorded.trace_id());
        assert_eq!(worker.storage.stats().expired, 1);
        assert_is_alive(&worker.storage, clock);
    });
}

#[test]
fn a_second_terminal_status_does_not_extend_the_grace() {
    for_each_worker_with_a_clock(|worker, clock| {
        complete(worker);
        clock.advance(GRACE / 2);
        set_status(worker, StatusGiven::AtItsCreation, "failed", false);
        assert_go_after(GRACE / 2, &worker.storage, clock);
    });
}

#[test]
fn a_new_run_of_a_completed_instance_is_active_and_late_spans_of_the_old_one_do_not_complete_it() {
    for_each_worker_with_a_clock(|worker, clock| {
        let of_run = |run: &str, status: Option<&str>| match worker.made_via() {
            Via::Api => {
                let ids = [("workflow.instance_id", ID), ("workflow.run_id", run)];
                let status = status.map(|status| ("workflow.status", status));
                let attributes = ids.into_iter().chain(status);
                let attributes =
                    attributes.map(|(key, value)| KeyValue::new(key, value.to_owned()));
                let builder = SpanBuilder::from_name("step").with_attributes(attributes);
                drop(worker.storage.tracer(worker.tracer()).build(builder));
            }
            _ => info_span!(
                "step",
                workflow.instance_id = ID,
                workflow.run_id = run,
                workflow.status = status
            )
            .in_scope(|| {}),
        };
        of_run("first", Some("completed"));
        clock.advance(GRACE / 2);
        of_run("second", None);
        of_run("first", Some("completed"));
        assert_is_alive(&worker.storage, clock);

        of_run("second", Some("completed"));
        assert_go_after(GRACE, &worker.storage, clock);
    });
}

#[test]
fn a_completed_instance_that_is_stored_again_is_active() {
    for_each_worker_with_a_clock(|worker, clock| {
        complete(worker);
        worker.storage.store(ID, context(1)).unwrap();
        assert_is_alive(&worker.storage, clock);
    });
}

#[test]
fn completed_grace_is_a_setting() {
    for grace in [100, 1_000, 3_600_000].map(Duration::from_millis) {
        let (storage, clock) = clocked(|builder| builder.completed_grace(grace));
        let worker = Worker::with_storage(storage);
        worker.run(|| complete(&worker));
        assert_go_after(grace, &worker.storage, &clock);
    }
}

#[test]
fn without_a_grace_a_completed_instance_is_forgotten_at_once() {
    for (given, via) in STATUS_GIVEN
        .into_iter()
        .flat_map(|given| VIAS.map(|via| (given, via)))
    {
        labelled(&format!("status given {given:?} via {via:?}"), || {
            let (storage, _clock) = clocked(|builder| builder.completed_grace(Duration::ZERO));
            let worker = Worker::via(via, storage);
            worker.run(|| {
                set_status(&worker, given, "completed", false);
                assert_eq!(worker.storage.get(ID).unwrap(), None);
                assert_eq!(worker.storage.stats().expired, 1);
                step(&worker, "again");
                assert_root(&worker.span("again"));
            });
        });
    }
}

#[test]
fn cleanup_removes_a_completed_instance_at_once_and_later_spans_start_anew() {
    for_each_worker_with_a_clock(|worker, clock| {
        complete(worker);
        assert!(worker.storage.cleanup(ID).unwrap());
        assert_ids(&worker.storage, &[]);
        assert_eq!(worker.storage.stats().expired, 0);

        step(worker, "again");
        assert_root(&worker.span("again"));
        assert_ne!(worker.trace_of("again"), worker.trace_of("reporter"));
        assert_is_alive(&worker.storage, clock);
    });
}

// Idle instances.

#[test]
fn an_instance_expires_when_unused_for_idle_ttl() {
    for_each_worker_with_a_clock(|worker, clock| {
        step(worker, "recorded");
        assert_go_after(TTL, &worker.storage, clock);
        assert_eq!(worker.storage.explain(ID).reason(), Some(Absence::Expired));
        assert_eq!(worker.storage.get(ID).unwrap(), None);
        assert!(!worker.storage.cleanup(ID).unwrap());

        step(worker, "again");
        assert_root(&worker.span("again"));
    });
}

#[test]
fn spans_and_calls_both_count_as_use() {
    for_each_worker_with_a_clock(|worker, clock| {
        let storage = &worker.storage;
        let uses: [(&str, &dyn Fn()); 5] = [
            ("get", &|| assert!(storage.get(ID).unwrap().is_some())),
            ("a span", &|| step(worker, "step")),
            ("store", &|| storage.store(ID, context(1)).unwrap()),
            ("a span without parent", &|| {
                worker.open_root("root", ID).inside(|| {})
            }),
            ("create_resumed", &|| {
                drop(storage.create_resumed(ID, None).unwrap())
            }),
        ];
        step(worker, "recorded");
        for (label, using) in uses {
            labelled(label, || {
                clock.advance(TTL - SLACK);
                using();
                clock.advance(2 * SLACK);
                assert_ids(storage, &[ID]);
            });
        }
    });
}

#[test]
fn inspecting_a_storage_does_not_count_as_use() {
    let (storage, clock) = clocked(|builder| builder);
    storage.store(ID, context(1)).unwrap();
    clock.advance(TTL - SLACK);
    assert_eq!(storage.instance_ids(), [ID]);
    assert_eq!(storage.iter_instance_ids().count(), 1);
    assert_eq!(storage.stats().stored_instances, 1);
    assert!(storage.explain(ID).is_recorded());
    assert!(format!("{storage:?}").contains("stored_instances: 1"));
    assert_go_after(SLACK, &storage, &clock);
}

#[test]
fn an_expired_instance_is_gone_for_every_call_before_it_is_swept() {
    let over = || {
        let (storage, clock) = clocked(|builder| builder);
        storage.store(ID, context(1)).unwrap();
        clock.advance(TTL + SLACK);
        storage
    };
    let storage = over();
    assert_eq!(storage.get(ID).unwrap(), None);
    assert_eq!(storage.stats().misses, 1);

    let storage = over();
    assert!(!storage.cleanup(ID).unwrap());
    assert_eq!(storage.stats().expired, 1);

    let storage = over();
    let new = context(2);
    storage.store(ID, new.clone()).unwrap();
    assert_eq!(storage.get(ID).unwrap(), Some(new));
    assert_eq!(storage.stats().expired, 1);

    let storage = over();
    assert_eq!(storage.explain(ID).reason(), Some(Absence::Expired));
    assert_eq!(storage.stats().expired, 1);
}

#[test]
fn idle_ttl_is_a_setting() {
    for ttl in [100, 1_000, 3_600_000].map(Duration::from_millis) {
        let (storage, clock) = clocked(|builder| builder.idle_ttl(ttl));
        storage.store(ID, context(1)).unwrap();
        assert_go_after(ttl, &storage, &clock);
    }
}

#[test]
fn unreachable_expiry_times_keep_everything() {
    let never = Duration::MAX;
    let (storage, clock) = clocked(|builder| builder.idle_ttl(never).completed_grace(never));
    let worker = Worker::with_storage(storage);
    worker.storage.store("idle", context(1)).unwrap();
    worker.run(|| complete(&worker));
    for _ in 0..10 {
        clock.advance(YEAR);
        assert_ids(&worker.storage, &["idle", ID]);
    }
}

#[test]
fn a_process_that_runs_for_years_still_finds_what_it_stores() {
    let (storage, clock) = clocked(|builder| builder);
    for year in 0..10 {
        storage.store(ID, context(1)).unwrap();
        clock.advance(HOUR);
        assert!(storage.get(ID).unwrap().is_some(), "after {year} years");
        clock.advance(YEAR);
    }
}

// Too many instances.

#[test]
fn up_to_sixteen_instances_eviction_is_exactly_least_recently_used() {
    for max in 1..=16 {
        let (storage, clock) = clocked(|builder| builder.max_instances(max));
        // Least recently used first.
        let mut expected: Vec<String> = Vec::new();
        let mut random = Random::new(max as u64);
        for next in 0..200 {
            clock.advance(SECOND);
            if next % 3 > 0 && !expected.is_empty() {
                let used = expected.remove(random.below(expected.len()));
                assert!(storage.get(&used).unwrap().is_some());
                expected.push(used);
                continue;
            }
            let id = next.to_string();
            storage.store(&id, context(1)).unwrap();
            if expected.len() == max {
                expected.remove(0);
            }
            expected.push(id);
            assert_eq!(
                ids_of(&storage),
                expected.iter().cloned().collect(),
                "of {max}"
            );
        }
        assert_eq!(storage.stats().evicted, 67 - max as u64);
    }
}

#[test]
fn completed_instances_are_evicted_first_then_expired_ones_then_the_least_recently_used() {
    let (storage, clock) = clocked(|builder| builder.max_instances(3).idle_ttl(HOUR));
    let worker = Worker::with_storage(storage);
    let storage = &worker.storage;
    storage.store("idle", context(1)).unwrap();
    clock.advance(HOUR - SECOND);
    storage.store("used", context(1)).unwrap();
    clock.advance(SECOND);
    worker.run(|| complete(&worker));
    clock.advance(SECOND);

    storage.store("first more", context(1)).unwrap();
    assert_eq!(storage.explain(ID).reason(), Some(Absence::Evicted));
    storage.store("second more", context(1)).unwrap();
    assert_ids(storage, &["used", "first more", "second more"]);
    assert_eq!((storage.stats().evicted, storage.stats().expired), (1, 1));
    storage.store("third more", context(1)).unwrap();
    assert_ids(storage, &["first more", "second more", "third more"]);
    assert_eq!((storage.stats().evicted, storage.stats().expired), (2, 1));
}

#[test]
fn with_a_limit_of_one_the_latest_instance_is_kept() {
    let one = || {
        built(
            WorkflowContextStorage::builder()
                .max_instances(1)
                .clock(ManualClock::new()),
        )
    };
    for_each_worker(one, |worker| {
        for id in ["a", "b", "a"] {
            worker.within(id, Tags::instance(id), || {
                worker.step("nested", Tags::instance(id))
            });
            assert_ids(&worker.storage, &[id]);
        }
        assert_eq!(worker.storage.stats().evicted, 2);
        assert_eq!(worker.forest().trace_count(), 3);
    });
}

#[test]
fn spans_within_one_of_an_evicted_instance_stay_in_its_trace() {
    let one = || {
        built(
            WorkflowContextStorage::builder()
                .max_instances(1)
                .clock(ManualClock::new()),
        )
    };
    for_each_worker(one, |worker| {
        worker.within("evicted", Tags::instance(ID), || {
            worker.storage.store("another", context(1)).unwrap();
            step(worker, "nested");
        });
        assert_nested(&worker.span("nested"), &worker.span("evicted"));
        assert_ids(&worker.storage, &[ID]);
    });
}

/// The rank of evicted instances among all: from 0 for the least recently used to 1 for the most recently used.
#[test]
fn with_many_instances_eviction_is_nearly_least_recently_used() {
    const MAX: usize = 10_000;
    const ALL: usize = 2 * MAX;
    const BATCH: usize = 100;
    for (label, uses) in [("stored and never used", 0), ("used at random", 2)] {
        let (storage, clock) = clocked(|builder| builder.max_instances(MAX));
        let mut random = Random::new(1);
        // By id, while it is kept.
        let mut last_use = vec![None; ALL];
        let mut ages = Vec::new();
        for id in 0..ALL {
            clock.advance(SLACK);
            storage.store(&id.to_string(), context(1)).unwrap();
            last_use[id] = Some(id);
            for _ in 0..uses {
                let used = random.below(id + 1);
                if last_use[used].is_some() && storage.get(&used.to_string()).unwrap().is_some() {
                    last_use[used] = Some(id);
                }
            }
            if (id + 1) % BATCH == 0 {
                let kept: HashSet<usize> = storage
                    .iter_instance_ids()
                    .map(|id| id.parse().unwrap())
                    .collect();
                let mut by_age: Vec<_> = (0..ALL).filter(|id| last_use[*id].is_some()).collect();
                by_age.sort_unstable_by_key(|id| last_use[*id]);
                for (rank, id) in by_age.iter().enumerate() {
                    if !kept.contains(id) {
                        ages.push(rank as f64 / by_age.len() as f64);
                        last_use[*id] = None;
                    }
                }
            }
        }
        assert_eq!(ages.len(), ALL - MAX);
        assert_eq!(storage.stats().evicted as usize, ALL - MAX);
        ages.sort_unstable_by(f64::total_cmp);
        let mean = ages.iter().sum::<f64>() / ages.len() as f64;
        let at = |part: f64| ages[(part * ages.len() as f64) as usize];
        println!(
            "{label}: on average {mean:.3}, half of them below {:.3}, 99 % below {:.3}",
            at(0.5),
            at(0.99)
        );
        assert!(mean < 0.1, "{label}: {mean}");
    }
}

#[test]
fn concurrent_inserts_do_not_exceed_max_instances() {
    const THREADS: usize = 8;
    const EACH: usize = 2_000;
    for max in [1, 10, 1_000] {
        let storage = built(
            WorkflowContextStorage::builder()
                .max_instances(max)
                .clock(ManualClock::new()),
        );
        at_once(THREADS, |thread| {
            for next in 0..EACH {
                let id = format!("{thread} {next}");
                storage.store(&id, context(1)).unwrap();
                storage.get(&id).unwrap();
            }
        });
        let stats = storage.stats();
        assert_eq!(
            stats.stored_instances + stats.evicted,
            (THREADS * EACH) as u64
        );
        assert_eq!(storage.instance_ids().len() as u64, stats.stored_instances);
        // Threads that evict at once may evict one too many each.
        let kept = stats.stored_instances as usize;
        assert!(kept <= max && kept + THREADS > max, "{kept} of {max}");
    }
}

// Iteration over ids.

#[test]
fn ids_that_stay_are_listed_while_others_come_and_go() {
    const STAYING: usize = 100_000;
    let storage = built(WorkflowContextStorage::builder().clock(ManualClock::new()));
    let staying: HashSet<_> = (0..STAYING).map(|id| format!("staying {id}")).collect();
    let passing: Vec<_> = (0..10_000).map(|id| format!("passing {id}")).collect();
    // Shuffled, so that removed entries are spread over the table.
    let mut passing_by = passing.iter();
    for (nth, id) in staying.iter().enumerate() {
        storage.store(id, context(1)).unwrap();
        if nth % 10 == 0 {
            storage
                .store(passing_by.next().unwrap(), context(1))
                .unwrap();
        }
    }
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for half in passing.chunks(passing.len() / 2) {
            let (storage, done) = (&storage, &done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    half.iter()
                        .for_each(|id| assert!(storage.cleanup(id).unwrap()));
                    half.iter()
                        .for_each(|id| storage.store(id, context(1)).unwrap());
                }
            });
        }
        for _ in 0..5 {
            let shown: HashSet<_> = storage.iter_instance_ids().collect();
            let missing = staying.difference(&shown).count();
            done.store(missing > 0, Ordering::Relaxed);
            assert_eq!(missing, 0, "of {STAYING} that stay are not shown");
            assert!(
                shown
                    .iter()
                    .all(|id| id.starts_with("staying") || id.starts_with("passing"))
            );
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(storage.instance_ids().len(), STAYING + passing.len());
}

#[test]
fn each_id_is_listed_once_while_nothing_changes() {
    let storage = built(WorkflowContextStorage::builder().clock(ManualClock::new()));
    let ids: BTreeSet<_> = (0..10_000).map(|id: u32| id.to_string()).collect();
    ids.iter()
        .for_each(|id| storage.store(id, context(1)).unwrap());
    assert_eq!(storage.instance_ids().len(), ids.len());
    assert_eq!(ids_of(&storage), ids);
}

#[test]
fn the_storage_can_be_used_while_iterating_ids() {
    let storage = built(WorkflowContextStorage::builder().clock(ManualClock::new()));
    let ids: HashSet<_> = (0..2_000).map(|id: u32| id.to_string()).collect();
    ids.iter()
        .for_each(|id| storage.store(id, context(1)).unwrap());

    let mut shown = HashSet::new();
    for id in storage.iter_instance_ids() {
        assert!(storage.get(&id).unwrap().is_some());
        storage.store(&format!("{id}, again"), context(1)).unwrap();
        assert!(storage.explain(&id).is_recorded());
        shown.insert(id);
    }
    assert!(shown.is_superset(&ids));
    for id in storage.iter_instance_ids() {
        storage.cleanup(&id).unwrap();
        assert!(!storage.cleanup(&id).unwrap());
    }
    assert_eq!(storage.stats().stored_instances, 0);
}

// The real clock.

#[test]
fn without_an_injected_clock_one_thread_ticks_for_all_storages_while_there_is_one() {
    in_own_process(
        module_path!(),
        "without_an_injected_clock_one_thread_ticks_for_all_storages_while_there_is_one",
        one_thread_ticks_for_all_storages_while_there_is_one,
    );
}

fn one_thread_ticks_for_all_storages_while_there_is_one() {
    for _ in 0..2 {
        let storages: Vec<_> = (0..100)
            .map(|_| built(WorkflowContextStorage::builder().idle_ttl(Duration::from_millis(100))))
            .collect();
        for storage in &storages {
            storage.store(ID, context(1)).unwrap();
        }
        // A thread has its name only once it runs.
        wait_until("the clock thread runs", || {
            ticking_threads().unwrap_or(1) > 0
        });
        assert_eq!(ticking_threads().unwrap_or(1), 1);
        wait_until("all instances expire", || {
            storages
                .iter()
                .all(|storage| storage.stats().stored_instances == 0)
        });
        for storage in &storages {
            assert_eq!(storage.stats().expired, 1);
            assert_eq!(storage.explain(ID).reason(), Some(Absence::Expired));
        }
        drop(storages);
        wait_until("the clock thread ends", || {
            ticking_threads().unwrap_or(0) == 0
        });
    }
}

/// `None` where the operating system does not say.
fn ticking_threads() -> Option<usize> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?.flatten();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    Some(
        names
            .filter(|name| name.starts_with("workflow-contex"))
            .count(),
    )
}

/// OpenTelemetry hands attributes to recording spans only.
#[test]
fn an_unsampled_span_records_only_while_a_reserved_field_is_awaited() {
    for activation in [true, false] {
        let storage = WorkflowContextStorage::new();
        let worker = Worker::with_sampler(storage, activation, Sampler::AlwaysOff);
        worker.run(|| {
            let is_recording = |span: &Span| span.context().span().is_recording();
            assert!(!is_recording(&info_span!(
                "tagged",
                workflow.instance_id = "order"
            )));
            assert!(!is_recording(&info_span!("ordinary")));
            let status = info_span!("s", workflow.instance_id = "order", workflow.status = Empty);
            assert!(is_recording(&status));
            status.record("workflow.status", "completed");
            let explained = worker.storage.explain("order").to_string();
            assert!(explained.contains("completed"), "{explained}");
            let late = info_span!("late", workflow.instance_id = Empty);
            assert!(is_recording(&late));
            late.record("workflow.instance_id", "late order");
            assert!(worker.storage.get("late order").unwrap().is_some());
        });
    }
}
