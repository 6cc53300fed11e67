//! `workflow.observing = true`: a span that looks at an instance without being moved, recorded or counted for it.

use crate::support::*;
use opentelemetry::trace::{SpanBuilder, Tracer as _};
use opentelemetry::{Context, KeyValue};
use tracing::field::Empty;
use tracing::info_span;
use tracing_workflow_context::{BuildError, Continuation, Relation, WorkflowContextStorage};

const ID: &str = "order-42";

/// Runs a test with and without context activation.
fn for_both(test: impl Fn(&Worker)) {
    let make = WorkflowContextStorage::new;
    for (worker, activation) in both_activations(make).iter().zip(["with", "without"]) {
        labelled(&format!("{activation} activation"), || {
            worker.run(|| test(worker));
        });
    }
}

fn step(name: &'static str) {
    info_span!("step", otel.name = name, workflow.instance_id = ID).in_scope(|| ());
}

/// Asserts that the request is in a trace of its own, with one link, to the stored context.
#[track_caller]
fn assert_only_linked(worker: &Worker, name: &str) {
    let request = worker.span(name);
    let stored = worker.stored(ID);
    assert_ne!(request.span_context.trace_id(), stored.trace_id());
    assert_eq!(request.links.len(), 1, "{}", worker.forest());
    assert_eq!(request.links[0].span_context.span_id(), stored.span_id());
    let why = &request.links[0].attributes[0];
    assert_eq!(why.key.as_str(), "workflow.relation");
    assert_eq!(why.value.as_str(), "observed");
}

#[test]
fn a_request_that_looks_at_an_instance_stays_where_it_is_and_is_linked() {
    for_both(|worker| {
        step("charge");
        let request = info_span!("GET", workflow.instance_id = ID, workflow.observing = true);
        request.in_scope(|| info_span!("query").in_scope(|| ()));
        drop(request);
        step("ship");
        assert_only_linked(worker, "GET");
        assert_eq!(worker.trace_of("query"), worker.trace_of("GET"));
        assert_eq!(worker.trace_of("ship"), worker.trace_of("charge"));
        let told = worker.storage.explain(ID).to_string();
        let line = "observed: kept its natural parent, linked to the stored context";
        assert!(told.contains(line), "{told}");
    });
}

#[test]
fn within_another_request_it_keeps_that_as_its_parent() {
    for_both(|worker| {
        step("charge");
        info_span!("server").in_scope(|| {
            info_span!("GET", workflow.instance_id = ID, workflow.observing = true).in_scope(|| ());
        });
        assert_only_linked(worker, "GET");
        let (server, get) = (worker.span("server"), worker.span("GET"));
        assert_eq!(get.parent_span_id, server.span_context.span_id());
    });
}

#[test]
fn it_records_nothing_and_ends_nothing() {
    for_both(|worker| {
        let look = || {
            let status = "completed";
            info_span!(
                "GET",
                workflow.instance_id = ID,
                workflow.observing = true,
                workflow.status = status
            )
            .in_scope(|| tracing::info!(workflow.status = status));
        };
        look();
        assert_eq!(worker.storage.get(ID).unwrap(), None);
        assert!(worker.span("GET").links.is_empty());
        step("charge");
        look();
        assert_eq!(worker.storage.stats().stored_instances, 1);
        let told = worker.storage.explain(ID).to_string();
        assert!(!told.contains("completed"), "{told}");
    });
}

#[test]
fn inside_the_instance_it_needs_no_link() {
    for_both(|worker| {
        info_span!("charge", workflow.instance_id = ID).in_scope(|| {
            info_span!("look", workflow.instance_id = ID, workflow.observing = true)
                .in_scope(|| ());
        });
        assert!(worker.span("look").links.is_empty());
        worker.forest().assert_one_trace();
    });
}

#[test]
fn an_id_that_comes_late_is_only_linked_and_holds_nothing() {
    for_both(|worker| {
        let look = |name| {
            let request = info_span!(
                "GET",
                otel.name = name,
                workflow.instance_id = Empty,
                workflow.observing = true
            );
            let _entered = request.enter();
            request.record("workflow.instance_id", ID);
        };
        look("early");
        assert_eq!(worker.storage.get(ID).unwrap(), None);
        assert_eq!(worker.storage.stats().deferred, 0);
        step("charge");
        look("late");
        assert_only_linked(worker, "late");
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn an_engine_span_around_it_does_not_join_the_instance() {
    let make = || {
        let storage = WorkflowContextStorage::builder().adopt_spans(["engine"]);
        storage.build().unwrap()
    };
    for worker in both_activations(make) {
        worker.run(|| {
            step("charge");
            info_span!("engine").in_scope(|| {
                info_span!("GET", workflow.instance_id = ID, workflow.observing = true)
                    .in_scope(|| ());
            });
        });
        assert_only_linked(&worker, "GET");
        assert_eq!(worker.trace_of("engine"), worker.trace_of("GET"));
        assert_eq!(worker.storage.stats().adopted, 0);
    }
}

#[test]
fn false_is_as_if_it_were_not_there() {
    for_both(|worker| {
        step("charge");
        info_span!("pay", workflow.instance_id = ID, workflow.observing = false).in_scope(|| ());
        worker.forest().assert_one_trace();
    });
}

#[test]
fn a_span_of_the_api_observes_too() {
    let worker = Worker::new();
    worker.run(|| step("charge"));
    let tracer = worker.storage.tracer(worker.tracer());
    let request = SpanBuilder::from_name("GET").with_attributes([
        KeyValue::new("workflow.instance_id", ID),
        KeyValue::new("workflow.observing", true),
    ]);
    drop(tracer.build_with_context(request, &Context::new()));
    assert_only_linked(&worker, "GET");
}

#[test]
fn the_link_can_be_left_out_and_nothing_else_chosen() {
    let keep = WorkflowContextStorage::builder().relation(Relation::Observed, Continuation::Keep);
    let worker = Worker::with_storage(keep.build().unwrap());
    worker.run(|| {
        step("charge");
        info_span!("GET", workflow.instance_id = ID, workflow.observing = true).in_scope(|| ());
    });
    assert!(worker.span("GET").links.is_empty());
    let parent = WorkflowContextStorage::builder()
        .relation(Relation::Observed, Continuation::Parent)
        .build();
    assert!(matches!(
        parent,
        Err(BuildError::ImpossibleRelation {
            relation: Relation::Observed,
            ..
        })
    ));
}

#[cfg(feature = "durable-root")]
#[test]
fn it_opens_no_workflow_span() {
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::prelude::*;

    let storage = WorkflowContextStorage::builder().durable_root(true);
    let storage = storage.build().unwrap();
    let provider = SdkTracerProvider::builder()
        .with_id_generator(storage.id_generator())
        .with_sampler(storage.sampler(opentelemetry_sdk::trace::Sampler::AlwaysOn));
    let worker = Worker::assembled(provider, storage, true, |layer| {
        tracing::Dispatch::new(tracing_subscriber::registry().with(layer))
    });
    worker.run(|| {
        info_span!("GET", workflow.instance_id = ID, workflow.observing = true).in_scope(|| ());
        step("charge");
        worker.storage.complete(ID, "completed").unwrap();
    });
    let spans = worker.spans();
    let counts: Vec<_> = (spans.iter().flat_map(|span| &span.attributes))
        .filter(|attribute| attribute.key.as_str() == "workflow.spans")
        .map(|attribute| attribute.value.clone())
        .collect();
    assert_eq!(
        counts,
        [1.into()],
        "one root, which has not counted the request"
    );
    assert_eq!(worker.names(), ["GET", "charge", "charge"]);
    assert_ne!(worker.trace_of("GET"), worker.stored_trace(ID));
}
