//! Many threads record the same instances: the first writer wins, and the others link to it.
use crate::support::*;

use std::collections::HashMap;
use std::sync::Arc;

use opentelemetry::trace::{SpanContext, TraceId, Tracer as _};
use opentelemetry::{KeyValue, SpanId};
use opentelemetry_sdk::trace::{Sampler, SdkTracer, ShouldSample, SpanData};
use tracing::info_span;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage, WorkflowTracer};

const FIELD: &str = "workflow.instance_id";
const THREADS: usize = 8;
const INSTANCES: usize = 1_000;

/// Opens a span of the instance around the body.
type Open = fn(&WorkflowTracer<SdkTracer>, usize, &mut dyn FnMut());

const OF_THE_LAYER: Open =
    |_, instance, body| info_span!("racing", workflow.instance_id = instance).in_scope(body);

const OF_THE_API: Open = |tracer, instance, body| {
    let id = KeyValue::new(FIELD, instance.to_string());
    let builder = tracer.span_builder("racing").with_attributes([id]);
    tracer.in_span_with_builder(builder, |_| body());
};

#[test]
fn threads_that_open_spans_of_the_same_instances_record_each_once() {
    threads_record_each_instance_once(50, true, OF_THE_LAYER);
}

#[test]
fn without_activation_threads_record_each_instance_once() {
    threads_record_each_instance_once(20, false, OF_THE_LAYER);
}

#[test]
fn threads_that_use_the_opentelemetry_api_record_each_instance_once() {
    threads_record_each_instance_once(20, true, OF_THE_API);
}

/// Threads may race here or not; the tests below force the race.
fn threads_record_each_instance_once(rounds: usize, activation: bool, open: Open) {
    for _ in 0..rounds {
        let worker =
            Worker::with_sampler(WorkflowContextStorage::new(), activation, Sampler::AlwaysOn);
        let tracer = worker.storage.tracer(worker.tracer());
        let seen = at_once(THREADS, |_| {
            let mut seen = Vec::with_capacity(INSTANCES);
            worker.run(|| {
                for instance in 0..INSTANCES {
                    open(&tracer, instance, &mut || {
                        seen.push(stored(&worker, instance))
                    });
                }
            });
            seen
        });

        assert_recorded_once(&worker, INSTANCES);
        let last: Vec<_> = (0..INSTANCES)
            .map(|instance| stored(&worker, instance))
            .collect();
        assert!(
            seen.iter().all(|seen| *seen == last),
            "within its span each thread sees the winner"
        );
    }
}

#[test]
fn one_of_racing_spans_is_recorded_and_the_others_link_to_it() {
    let ways: [fn(usize) -> Open; 3] = [
        |_| OF_THE_LAYER,
        |_| OF_THE_API,
        |thread| {
            if thread % 2 == 0 {
                OF_THE_LAYER
            } else {
                OF_THE_API
            }
        },
    ];
    for (way, activation) in ways.into_iter().flat_map(|way| [(way, true), (way, false)]) {
        let worker = Worker::with_sampler(WorkflowContextStorage::new(), activation, all_at_once());
        let _drawing = DrawnOnPanic(&worker, format!("activation: {activation}"));
        let tracer = worker.storage.tracer(worker.tracer());
        for instance in 0..20 {
            at_once(THREADS, |thread| {
                worker.run(|| way(thread)(&tracer, instance, &mut || {}));
            });
        }

        assert_recorded_once(&worker, 20);
        let stats = worker.storage.stats();
        assert_eq!(
            stats.conflicts,
            20 * (THREADS as u64 - 1),
            "all of them looked before one recorded"
        );
        worker.run(|| info_span!("later", workflow.instance_id = 0).in_scope(|| {}));
        assert_continues(&worker.span("later"), &worker.stored("0"));
    }
}

#[test]
fn the_losers_of_a_race_keep_their_foreign_parents() {
    for activation in [true, false] {
        let worker = Worker::with_sampler(WorkflowContextStorage::new(), activation, all_at_once());
        let _drawing = DrawnOnPanic(&worker, format!("activation: {activation}"));
        at_once(THREADS, |thread| {
            worker.run(|| {
                let _request = remote_context(thread as u128 + 1, 7).attach();
                info_span!("racing", workflow.instance_id = "a").in_scope(|| {});
            });
        });

        let winner = worker.stored("a");
        let mut traces = Vec::new();
        for span in worker.spans() {
            let trace = span.span_context.trace_id();
            traces.push(trace);
            assert_continues(&span, &remote(u128::from_be_bytes(trace.to_bytes()), 7));
            if span.span_context.span_id() != winner.span_id() {
                assert_late(&span, &winner);
            }
        }
        traces.sort_unstable_by_key(|trace| trace.to_bytes());
        let expected: Vec<_> = (1..=THREADS as u128).map(TraceId::from).collect();
        assert_eq!(traces, expected);
    }
}

#[test]
fn spans_that_race_with_a_cleanup_never_join_another_instance() {
    let worker = Worker::new();
    at_once(THREADS, |thread| {
        worker.run(|| {
            for step in 0..2_000 {
                let instance = step % 10;
                if thread < 2 {
                    worker.storage.cleanup(&instance.to_string()).unwrap();
                } else {
                    info_span!("step", workflow.instance_id = instance).in_scope(|| {});
                }
            }
        });
    });

    let spans = worker.spans();
    let opened = (THREADS - 2) * 2_000;
    assert_eq!(spans.len(), opened);
    let instances: HashMap<_, _> = spans
        .iter()
        .map(|span| (ids(&span.span_context), instance(span)))
        .collect();
    for span in &spans {
        if span.parent_span_id != SpanId::INVALID {
            let parent = (span.span_context.trace_id(), span.parent_span_id);
            assert_eq!(instances.get(&parent), Some(&instance(span)));
        }
        for link in span.links.iter() {
            assert_eq!(
                instances.get(&ids(&link.span_context)),
                Some(&instance(span))
            );
        }
    }
    let stats = worker.storage.stats();
    assert_eq!(stats.hits + stats.misses, opened as u64);
    assert_eq!(
        stats.stored_instances as usize,
        worker.storage.instance_ids().len()
    );
}

#[test]
fn a_context_that_is_stored_during_a_race_wins_it() {
    for activation in [true, false] {
        let context = WorkflowContext::try_from(&remote(7, 8)).unwrap();
        let storage = WorkflowContextStorage::new();
        // Stored after the span's lookup missed, and before the span is recorded.
        let store = {
            let storage = storage.clone();
            move |_: &str| storage.store("a", context.clone()).unwrap()
        };
        let worker = Worker::with_sampler(storage, activation, Hooked(store));
        worker.run(|| info_span!("step", workflow.instance_id = "a").in_scope(|| {}));

        assert_root(&worker.span("step"));
        assert_late(&worker.span("step"), &remote(7, 8));
        assert_same_span(&worker.stored("a"), &remote(7, 8));
        assert_eq!(worker.storage.stats().conflicts, 1);
    }
}

#[test]
fn workflows_that_are_resumed_at_once_are_all_resumed_and_one_is_stored() {
    let worker = Worker::new();
    let resumed = at_once(THREADS, |_| {
        worker.storage.create_resumed("a", None).unwrap()
    });

    let stored = worker.storage.get("a").unwrap().expect("was stored");
    assert!(resumed.contains(&stored));
    let spans = worker.spans();
    assert_eq!(spans.len(), THREADS);
    for span in &spans {
        let parent = (span.span_context.trace_id(), span.parent_span_id);
        let found = spans.iter().any(|span| ids(&span.span_context) == parent);
        assert!(
            found || span.parent_span_id == SpanId::INVALID,
            "{}",
            worker.forest()
        );
    }
}

/// Asserts that of the spans that each thread opened for an instance one is stored, and the others continue it or link
/// to it.
#[track_caller]
fn assert_recorded_once(worker: &Worker, instances: usize) {
    let mut of_instance = HashMap::<_, Vec<_>>::new();
    for span in worker.spans() {
        of_instance.entry(instance(&span)).or_default().push(span);
    }
    assert_eq!(of_instance.len(), instances);
    // Read before the lookups below.
    let stats = worker.storage.stats();
    let mut lost = 0;
    for (id, spans) in &of_instance {
        assert_eq!(spans.len(), THREADS, "spans of {id}");
        let stored = worker.stored(id);
        let (winners, others): (Vec<&SpanData>, Vec<_>) = spans
            .iter()
            .partition(|span| ids(&span.span_context) == ids(&stored));
        let [winner] = winners[..] else {
            panic!("the stored span of {id} was not exported")
        };
        assert_root(winner);
        assert!(winner.links.is_empty(), "{:?}", winner.links);
        for span in others {
            if span.span_context.trace_id() == stored.trace_id() {
                assert_continues(span, &stored);
                assert!(span.links.is_empty(), "{:?}", span.links);
            } else {
                lost += 1;
                assert_root(span);
                assert_late(span, &stored);
            }
        }
    }
    assert_eq!(stats.conflicts, lost);
    assert_eq!(stats.misses, lost + instances as u64);
    assert_eq!(stats.stored_instances, instances as u64);
}

#[track_caller]
fn assert_late(span: &SpanData, winner: &SpanContext) {
    let (relation, target) = link(span);
    assert_eq!(relation, "late");
    assert_same_span(&target, winner);
}

fn instance(span: &SpanData) -> String {
    attribute(span, FIELD)
        .expect("every span is tagged")
        .to_string()
}

fn stored(worker: &Worker, instance: usize) -> (TraceId, SpanId) {
    ids(&worker.stored(&instance.to_string()))
}

/// A sampler that blocks racing spans until each thread has one there: after the lookup, before the recording.
fn all_at_once() -> impl ShouldSample {
    let rendezvous = Arc::new(Rendezvous::default());
    Hooked(move |name: &str| {
        if name == "racing" {
            rendezvous.wait_for_groups_of(THREADS);
        }
    })
}
