//! Spans that are held back until their instance is known: they land in its trace, and nobody else notices.
#![cfg(feature = "testing")]

mod support;

use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{self, Poll, Waker};
use std::time::{Duration, Instant};

use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, TraceContextExt as _, Tracer as _,
};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SpanData, SpanProcessor};
use tracing::field::{Empty, debug, display};
use tracing::instrument::WithSubscriber as _;
use tracing::{Instrument as _, Span, info, info_span, instrument};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_workflow_context::{Engine, WorkflowContext, WorkflowContextStorage};

use support::*;

const ID: &str = "workflow.instance_id";

/// How long a span is kept busy where its timings are looked at.
const BUSY: Duration = Duration::from_millis(2);

fn adopting() -> WorkflowContextStorage {
    let builder = WorkflowContextStorage::builder().adopt_spans(["my_engine_handler"]);
    builder.build().expect("valid settings")
}

fn knowing(engine: Engine) -> WorkflowContextStorage {
    let builder = WorkflowContextStorage::builder().engine(engine);
    builder.build().expect("valid settings")
}

/// Runs with and without context activation, each on a new worker and on one that has seen spans before.
fn in_both_modes(scenario: impl Fn(&Worker)) {
    in_both_modes_of(adopting, scenario);
}

fn in_both_modes_of(make: impl Fn() -> WorkflowContextStorage, scenario: impl Fn(&Worker)) {
    for seen_before in [false, true] {
        for (worker, activation) in both_activations(&make).iter().zip(["with", "without"]) {
            let age = if seen_before { "used" } else { "new" };
            let _drawing = DrawnOnPanic(worker, format!("{age} worker {activation} activation"));
            worker.run(|| {
                if seen_before {
                    tagged("seen before", "another instance").in_scope(|| ());
                }
                scenario(worker);
            });
        }
    }
}

/// Runs with context activation, which is the default.
fn with_activation(scenario: impl Fn(&Worker)) {
    let worker = Worker::of(adopting());
    let _drawing = DrawnOnPanic(&worker, "with activation".into());
    worker.run(|| scenario(&worker));
}

fn elsewhere<R: Send>(worker: &Worker, run: impl FnOnce() -> R + Send) -> R {
    worker.run_in(Place::OtherThread, run)
}

/// A span that declares an instance id and does not have one yet.
fn awaiting(name: &str) -> Span {
    info_span!("awaiting", otel.name = name, workflow.instance_id = Empty)
}

/// A span as an engine opens it around user code.
fn engine(name: &str) -> Span {
    info_span!("my_engine_handler", otel.name = name)
}

fn tagged(name: &str, id: &str) -> Span {
    info_span!("tagged", otel.name = name, workflow.instance_id = id)
}

fn ordinary(name: &str) -> Span {
    info_span!("ordinary", otel.name = name)
}

/// An ordinary span that is opened, entered and closed.
fn step(name: &str) {
    ordinary(name).in_scope(|| ());
}

/// A tagged span that is opened, entered and closed.
fn tagged_step(name: &str, id: &str) {
    tagged(name, id).in_scope(|| ());
}

/// Stores the instance by its first span.
fn stored_first(worker: &Worker, id: &str) -> SpanContext {
    let name = format!("first of {id}");
    tagged_step(&name, id);
    worker.span(&name).span_context
}

/// The span that OpenTelemetry takes for the current one.
fn current() -> SpanContext {
    Context::map_current(|cx| cx.span().span_context().clone())
}

/// Records the id on the span that this thread is in.
fn record_id(id: &str) {
    Span::current().record(ID, id);
}

fn poll<F: Future>(task: Pin<&mut F>) -> Poll<F::Output> {
    task.poll(&mut task::Context::from_waker(Waker::noop()))
}

/// What a client would send along with a request that it makes here.
fn headers(cx: &Context) -> HashMap<String, String> {
    let mut headers = HashMap::new();
    TraceContextPropagator::new().inject_context(cx, &mut headers);
    headers
}

fn traceparent(span: &SpanData) -> String {
    let cx = &span.span_context;
    format!("00-{}-{}-01", cx.trace_id(), cx.span_id())
}

#[track_caller]
fn assert_id(span: &SpanData, id: &str) {
    let attribute = attribute(span, ID);
    assert_eq!(
        attribute,
        Some(Value::from(id.to_owned())),
        "{ID} of {}",
        span.name
    );
}

#[track_caller]
fn assert_linked(span: &SpanData, relation: &str, target: &SpanContext) {
    let (told, linked) = link(span);
    assert_eq!(told, relation, "the relation that {} tells of", span.name);
    assert_same_span(&linked, target);
}

#[track_caller]
fn assert_unlinked(span: &SpanData) {
    assert!(
        span.links.is_empty(),
        "links of {}: {:?}",
        span.name,
        span.links
    );
}

/// The span continues the stored context, and nothing had to be repaired by a link.
#[track_caller]
fn assert_joined(span: &SpanData, stored: &SpanContext) {
    assert_continues(span, stored);
    assert_unlinked(span);
}

/// The span is a root of its own that no instance has claimed.
#[track_caller]
fn assert_untouched(span: &SpanData) {
    assert_root(span);
    assert_unlinked(span);
    assert_eq!(attribute(span, ID), None, "{ID} of {}", span.name);
}

// An id that comes late.

#[instrument(skip_all, fields(workflow.instance_id = Empty))]
fn learns_its_id(id: &str) {
    record_id(id);
    step("child");
}

#[instrument(skip_all, fields(workflow.instance_id = Empty))]
async fn learns_its_id_in_the_first_poll(id: &str) {
    record_id(id);
    step("child in the first poll");
    tokio::task::yield_now().await;
    step("child in the second poll");
}

#[instrument(skip_all, fields(workflow.instance_id = Empty))]
async fn learns_its_id_in_the_second_poll(id: &str) {
    tokio::task::yield_now().await;
    record_id(id);
    step("child");
}

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
fn an_id_recorded_in_the_body_is_recorded_where_none_is_stored() {
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
fn an_id_recorded_in_the_first_poll_holds_for_later_polls_on_other_threads() {
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
fn an_id_recorded_after_the_first_child_is_recorded_where_none_is_stored() {
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
fn an_id_recorded_in_the_second_poll_becomes_a_link() {
    with_activation(|worker| {
        let stored = stored_first(worker, "order");
        {
            let mut task = pin!(learns_its_id_in_the_second_poll("order"));
            assert!(poll(task.as_mut()).is_pending());
            assert!(poll(task.as_mut()).is_ready());
        }

        let span = worker.span("learns_its_id_in_the_second_poll");
        assert_root(&span);
        assert_linked(&span, "late", &stored);
        assert_nested(&worker.span("child"), &span);
        assert_eq!(worker.storage.stats().late, 1);
    });
}

/// Leaving a span starts it only where entering it would have.
#[test]
fn without_activation_an_id_recorded_in_the_second_poll_is_in_time() {
    for seen_before in [false, true] {
        let worker = Worker::with(adopting(), false, Sampler::AlwaysOn);
        let _drawing = DrawnOnPanic(&worker, format!("seen before: {seen_before}"));
        worker.run(|| {
            if seen_before {
                tagged_step("seen before", "another instance");
            }
            let mut task = pin!(learns_its_id_in_the_second_poll("order"));
            assert!(poll(task.as_mut()).is_pending());
            let stored = elsewhere(&worker, || stored_first(&worker, "order"));
            assert!(poll(task.as_mut()).is_ready());
            assert_same_span(&worker.stored("order"), &stored);
        });

        let span = worker.span("learns_its_id_in_the_second_poll");
        assert_joined(&span, &worker.stored("order"));
        assert_nested(&worker.span("child"), &span);
        assert_eq!(worker.storage.stats().late, 0);
    }
}

#[test]
fn a_span_that_the_sampler_drops_learns_its_id_too() {
    for activation in [true, false] {
        let worker = Worker::with(adopting(), activation, Sampler::AlwaysOff);
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
fn an_empty_id_is_no_id() {
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
fn a_span_whose_id_is_an_empty_text_at_its_creation_awaits_one() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        info_span!("span", workflow.instance_id = "").in_scope(|| record_id("order"));

        assert_joined(&worker.span("span"), &stored);
        assert_eq!(worker.storage.stats().late, 0);
    });
}

#[test]
fn the_first_id_of_a_started_span_counts() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        stored_first(worker, "other order");
        awaiting("span").in_scope(|| {
            record_id("order");
            step("child");
            record_id("other order");
        });

        assert_joined(&worker.span("span"), &stored);
        assert_eq!(worker.storage.stats().late, 0);
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
fn a_span_that_declares_a_run_waits_for_that_too() {
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
fn a_run_that_never_comes_is_the_latest() {
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
fn other_fields_recorded_first_release_nothing() {
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
fn an_id_recorded_before_the_span_is_entered_leaves_nothing_to_hold_back() {
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

        assert_untouched(&worker.span("without an id"));
        assert_untouched(&worker.span("engine"));
        assert_joined(&worker.span("with an id"), &stored);
        assert_eq!(worker.storage.stats().deferred, 0);
    });
}

#[test]
fn a_span_that_never_learns_its_id_is_exported_untouched() {
    in_both_modes(|worker| {
        awaiting("span").in_scope(|| info!("an event"));

        let span = worker.span("span");
        assert_untouched(&span);
        assert_eq!(span.events.len(), 1);
        assert_eq!(worker.storage.stats().deferred, 1);
    });
}

// Adoption.

#[test]
fn an_engine_span_joins_the_instance_of_its_first_child_however_often_it_was_left_before() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = engine("engine");
        for _ in 0..3 {
            span.in_scope(|| info!("awaiting the input"));
        }
        span.in_scope(|| tagged_step("handler", "order"));
        drop(span);

        let span = worker.span("engine");
        assert_joined(&span, &stored);
        assert_id(&span, "order");
        assert_eq!(span.events.len(), 3);
        let handler = worker.span("handler");
        assert_nested(&handler, &span);
        assert_unlinked(&handler);
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted, stats.late), (1, 1, 0));
    });
}

#[test]
fn an_engine_span_is_what_is_recorded_where_nothing_is_stored() {
    in_both_modes(|worker| {
        engine("engine").in_scope(|| tagged_step("handler", "order"));

        let span = worker.span("engine");
        assert_root(&span);
        assert_unlinked(&span);
        assert_id(&span, "order");
        assert_same_span(&worker.stored("order"), &span.span_context);
        let handler = worker.span("handler");
        assert_nested(&handler, &span);
        assert_unlinked(&handler);
        assert_eq!(worker.storage.stats().adopted, 1);
    });
}

#[test]
fn an_untagged_first_child_releases_an_engine_span_untouched() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        engine("engine").in_scope(|| {
            step("untagged");
            tagged_step("handler", "order");
        });

        let span = worker.span("engine");
        assert_untouched(&span);
        assert_nested(&worker.span("untagged"), &span);
        let handler = worker.span("handler");
        assert_continues(&handler, &stored);
        assert_linked(&handler, "foreign", &span.span_context);
        assert_eq!(worker.storage.stats().adopted, 0);
    });
}

#[test]
fn an_engine_span_without_children_is_exported_once_when_it_closes() {
    in_both_modes(|worker| {
        let span = engine("engine");
        for _ in 0..3 {
            span.in_scope(|| ());
        }
        assert!(worker.spans().iter().all(|span| span.name != "engine"));
        drop(span);

        assert_untouched(&worker.span("engine"));
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted), (1, 0));
    });
}

#[test]
fn a_span_without_an_id_is_adopted_by_its_first_child_too() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        awaiting("span").in_scope(|| {
            tagged_step("child", "order");
            record_id("order");
        });

        let span = worker.span("span");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child"), &span);
        let stats = worker.storage.stats();
        assert_eq!((stats.adopted, stats.late), (1, 0));
    });
}

#[test]
fn an_adopted_span_that_then_names_another_instance_is_linked_to_that() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let parent = stored_first(worker, "parent of the order");
        awaiting("span").in_scope(|| {
            tagged_step("child", "order");
            record_id("parent of the order");
        });

        let span = worker.span("span");
        assert_continues(&span, &stored);
        assert_linked(&span, "late", &parent);
        assert_eq!(worker.storage.stats().late, 1);
    });
}

#[test]
fn an_adopted_span_that_then_names_an_unknown_instance_is_recorded_for_that() {
    in_both_modes(|worker| {
        awaiting("span").in_scope(|| {
            tagged_step("child", "order");
            record_id("parent of the order");
        });
        tagged_step("next", "parent of the order");

        assert_joined(&worker.span("next"), &worker.span("span").span_context);
    });
}

/// Notes the names of spans in the order in which they start.
fn noting_starts(activation: bool) -> (Worker, Arc<Mutex<Vec<String>>>) {
    let starts = Arc::new(Mutex::new(Vec::new()));
    let noted = starts.clone();
    let sampler = Hooked(move |name: &str| noted.lock().unwrap().push(name.to_owned()));
    (Worker::with(adopting(), activation, sampler), starts)
}

#[test]
fn nested_held_spans_are_released_outermost_first_each_beneath_the_one_before() {
    for activation in [true, false] {
        let (worker, starts) = noting_starts(activation);
        let _drawing = DrawnOnPanic(&worker, format!("activation: {activation}"));
        worker.run(|| {
            let (outer, inner) = (engine("outer"), awaiting("inner"));
            outer.in_scope(|| inner.in_scope(|| tagged_step("child", "order")));
        });

        assert_eq!(*starts.lock().unwrap(), ["outer", "inner", "child"]);
        let (outer, inner) = (worker.span("outer"), worker.span("inner"));
        assert_same_span(&worker.stored("order"), &outer.span_context);
        assert_joined(&inner, &outer.span_context);
        assert_nested(&worker.span("child"), &inner);
        assert_eq!(worker.storage.stats().adopted, 2);
    }
}

#[test]
fn an_id_recorded_on_a_held_span_holds_for_the_held_spans_around_it() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        {
            let (outer, inner) = (engine("outer"), awaiting("inner"));
            outer.in_scope(|| inner.in_scope(|| inner.record(ID, "order")));
        }

        let outer = worker.span("outer");
        assert_joined(&outer, &stored);
        assert_id(&outer, "order");
        assert_joined(&worker.span("inner"), &stored);
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted), (2, 1));
    });
}

#[test]
fn an_id_recorded_on_a_held_span_leaves_the_held_spans_inside_it_alone() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let other = stored_first(worker, "other order");
        {
            let (outer, inner) = (awaiting("outer"), engine("inner"));
            outer.in_scope(|| {
                inner.in_scope(|| {
                    outer.record(ID, "order");
                    tagged_step("child", "other order");
                })
            });
        }

        assert_joined(&worker.span("outer"), &stored);
        let inner = worker.span("inner");
        assert_joined(&inner, &other);
        assert_nested(&worker.span("child"), &inner);
    });
}

#[test]
fn an_explicit_child_leaves_the_held_spans_inside_its_parent_alone() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let other = stored_first(worker, "other order");
        {
            let (outer, inner) = (engine("outer"), engine("inner"));
            outer.in_scope(|| {
                inner.in_scope(|| {
                    drop(info_span!(parent: &outer, "child", workflow.instance_id = "order"));
                    tagged_step("inner child", "other order");
                })
            });
        }

        assert_joined(&worker.span("outer"), &stored);
        assert_nested(&worker.span("child"), &worker.span("outer"));
        assert_joined(&worker.span("inner"), &other);
        assert_nested(&worker.span("inner child"), &worker.span("inner"));
    });
}

#[test]
fn a_held_span_is_the_first_child_that_releases_the_held_span_around_it() {
    in_both_modes(|worker| {
        engine("outer").in_scope(|| learns_its_id("order"));

        let outer = worker.span("outer");
        assert_untouched(&outer);
        let inner = worker.span("learns_its_id");
        assert_nested(&inner, &outer);
        assert_unlinked(&inner);
        assert_nested(&worker.span("child"), &inner);
        assert_same_span(&worker.stored("order"), &inner.span_context);
    });
}

#[test]
fn a_span_made_before_releases_what_is_held_when_it_is_entered() {
    with_activation(|worker| {
        let (made_before, held) = (ordinary("made before"), engine("engine"));
        let (inside, left) = held.in_scope(|| (made_before.in_scope(current), current()));
        drop((made_before, held));

        let held = worker.span("engine");
        assert_untouched(&held);
        assert_root(&worker.span("made before"));
        assert_same_span(&inside, &worker.span("made before").span_context);
        assert_same_span(&left, &held.span_context);
    });
}

#[test]
fn a_span_without_parent_is_no_child_of_the_held_span_it_opens_in() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        engine("engine").in_scope(|| {
            drop(info_span!(parent: None, "root"));
            tagged_step("handler", "order");
        });

        assert_root(&worker.span("root"));
        assert_joined(&worker.span("engine"), &stored);
    });
}

#[test]
fn an_explicit_child_releases_and_is_nested_in_the_held_span_it_names() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = engine("engine");
        span.in_scope(|| {
            drop(info_span!(parent: &span, "child", workflow.instance_id = "order"));
            step("contextual child");
        });
        drop(span);

        let span = worker.span("engine");
        assert_joined(&span, &stored);
        assert_nested(&worker.span("child"), &span);
        assert_nested(&worker.span("contextual child"), &span);
    });
}

#[test]
fn a_child_made_on_another_thread_adopts_the_span_held_here() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        let span = engine("engine");
        span.in_scope(|| {
            elsewhere(worker, || {
                info_span!(parent: &span, "child there", workflow.instance_id = "order")
                    .in_scope(|| step("grandchild there"));
            });
            step("child here");
        });
        drop(span);

        let span = worker.span("engine");
        assert_joined(&span, &stored);
        assert_id(&span, "order");
        let there = worker.span("child there");
        assert_nested(&there, &span);
        assert_nested(&worker.span("grandchild there"), &there);
        assert_nested(&worker.span("child here"), &span);
    });
}

#[test]
fn a_child_adopts_a_span_that_nobody_has_entered() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        for span in [engine("engine"), awaiting("awaiting")] {
            info_span!(parent: &span, "child", workflow.instance_id = "order").in_scope(|| ());
            span.in_scope(|| ());
        }

        for name in ["engine", "awaiting"] {
            assert_joined(&worker.span(name), &stored);
            assert_id(&worker.span(name), "order");
        }
        let stats = worker.storage.stats();
        assert_eq!((stats.deferred, stats.adopted), (0, 2));
    });
}

// What code inside sees.

#[test]
fn a_held_span_is_current_from_its_release_to_its_exit_and_not_longer() {
    type Release = fn(&Span);
    let ways: [(&str, Release); 3] = [
        ("id", |span| {
            span.record(ID, "order");
        }),
        ("tagged child", |_| tagged_step("child", "order")),
        ("untagged child", |_| step("child")),
    ];
    for (way, release) in ways {
        with_activation(|worker| {
            let _drawing = DrawnOnPanic(worker, format!("released by its {way}"));
            let below = remote_context(1, 1).attach();
            let before = current();
            let span = awaiting("span");
            let released = span.in_scope(|| {
                assert_same_span(&current(), &before);
                release(&span);
                current()
            });
            assert_same_span(&current(), &before);
            let entered_again = span.in_scope(current);
            assert_same_span(&current(), &before);
            drop(span);
            drop(below);

            let span = worker.span("span");
            assert_same_span(&released, &span.span_context);
            assert_same_span(&entered_again, &span.span_context);
        });
    }
}

#[test]
fn released_spans_are_current_one_after_the_other() {
    with_activation(|worker| {
        let (outer, inner) = (engine("outer"), engine("inner"));
        let (in_child, in_inner, in_outer) = outer.in_scope(|| {
            let (in_child, in_inner) =
                inner.in_scope(|| (tagged("child", "order").in_scope(current), current()));
            (in_child, in_inner, current())
        });
        drop((outer, inner));

        assert_same_span(&in_child, &worker.span("child").span_context);
        assert_same_span(&in_inner, &worker.span("inner").span_context);
        assert_same_span(&in_outer, &worker.span("outer").span_context);
    });
}

#[test]
fn a_held_span_keeps_the_foreign_parent_it_opened_under() {
    in_both_modes(|worker| {
        let below = remote_context(1, 1).attach();
        awaiting("first").in_scope(|| record_id("order"));
        drop(below);
        let below = remote_context(2, 2).attach();
        awaiting("second").in_scope(|| record_id("order"));
        engine("third").in_scope(|| tagged_step("child", "order"));
        engine("untouched").in_scope(|| ());
        drop(below);

        let first = worker.span("first");
        assert_continues(&first, &remote(1, 1));
        for name in ["second", "third"] {
            assert_continues(&worker.span(name), &first.span_context);
            assert_linked(&worker.span(name), "foreign", &remote(2, 2));
        }
        assert_continues(&worker.span("untouched"), &remote(2, 2));
    });
}

#[test]
fn a_context_attached_inside_a_held_span_is_gone_with_its_guard() {
    with_activation(|worker| {
        let span = engine("engine");
        let (within, after) = span.in_scope(|| {
            let inside = remote_context(1, 1).attach();
            let within = current();
            step("child");
            drop(inside);
            (within, current())
        });
        assert_context_stack_is_empty();
        drop(span);

        assert_same_span(&within, &remote(1, 1));
        assert_same_span(&after, &worker.span("engine").span_context);
    });
}

#[test]
fn an_ordinary_root_span_sees_itself_at_once() {
    with_activation(|worker| {
        let (inside, sent) =
            ordinary("ordinary").in_scope(|| (current(), headers(&Context::current())));

        let span = worker.span("ordinary");
        assert_same_span(&inside, &span.span_context);
        assert_eq!(sent["traceparent"], traceparent(&span));
        assert_eq!(worker.storage.stats().deferred, 0);
    });
}

#[test]
fn a_span_with_an_id_sees_itself_at_once() {
    with_activation(|worker| {
        let stored = stored_first(worker, "order");
        let (inside, sent) =
            tagged("tagged", "order").in_scope(|| (current(), headers(&Context::current())));

        let span = worker.span("tagged");
        assert_same_span(&inside, &span.span_context);
        assert_eq!(sent["traceparent"], traceparent(&span));
        assert_eq!(span.span_context.trace_id(), stored.trace_id());
        assert_eq!(worker.storage.stats().deferred, 0);
    });
}

#[test]
fn a_held_span_is_missing_from_the_current_context_until_it_is_asked_for_its_own() {
    in_both_modes(|worker| {
        let span = awaiting("span");
        let (before, sent) = span.in_scope(|| {
            let before = headers(&Context::current());
            (before, headers(&Span::current().context()))
        });
        drop(span);

        assert_eq!(before.get("traceparent"), None);
        assert_eq!(sent["traceparent"], traceparent(&worker.span("span")));
    });
}

#[test]
fn the_current_workflow_context_inside_a_held_span_is_its_own() {
    in_both_modes(|worker| {
        for (name, held) in [
            ("awaiting", awaiting("awaiting")),
            ("engine", engine("engine")),
        ] {
            let inside = held.in_scope(|| WorkflowContext::current().expect("inside a span"));
            drop(held);

            let span = worker.span(name);
            assert_eq!(inside.trace_id(), span.span_context.trace_id());
            assert_eq!(inside.span_id(), span.span_context.span_id());
        }
    });
}

#[test]
fn a_held_span_that_was_asked_for_its_context_has_started() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        awaiting("awaiting").in_scope(|| {
            Span::current().context();
            record_id("order");
            step("child of awaiting");
        });
        engine("engine").in_scope(|| {
            WorkflowContext::current();
            tagged_step("handler", "order");
        });

        let awaiting = worker.span("awaiting");
        assert_root(&awaiting);
        assert_linked(&awaiting, "late", &stored);
        assert_nested(&worker.span("child of awaiting"), &awaiting);
        let engine = worker.span("engine");
        assert_untouched(&engine);
        assert_continues(&worker.span("handler"), &stored);
        assert_linked(&worker.span("handler"), "foreign", &engine.span_context);
    });
}

#[test]
fn a_held_span_may_be_asked_for_its_context_from_another_thread() {
    in_both_modes(|worker| {
        let span = awaiting("span");
        let there = span.in_scope(|| {
            let there = elsewhere(worker, || span.context().span().span_context().clone());
            step("child");
            there
        });
        drop(span);

        let span = worker.span("span");
        assert_same_span(&there, &span.span_context);
        assert_nested(&worker.span("child"), &span);
    });
}

/// As `future.instrument(span.clone()).with_context(span.context())` does.
#[test]
fn a_span_entered_beneath_its_own_context_does_not_confuse_the_layer() {
    with_activation(|worker| {
        let span = tagged("first ever", "order");
        let own = span.context().attach();
        span.in_scope(|| ());
        drop(own);
        drop(span);
        let held = awaiting("held");
        held.in_scope(|| {
            assert_context_stack_is_empty();
            held.record(ID, "order");
        });
        drop(held);

        assert_joined(
            &worker.span("held"),
            &worker.span("first ever").span_context,
        );
    });
}

#[test]
fn what_follows_from_a_held_span_links_to_it() {
    in_both_modes(|worker| {
        let follower = ordinary("follower");
        let held = awaiting("held");
        held.in_scope(|| {
            follower.follows_from(&held);
            step("child");
        });
        drop((follower, held));

        let (follower, held) = (worker.span("follower"), worker.span("held"));
        assert_eq!(follower.links.len(), 1);
        assert_same_span(&follower.links[0].span_context, &held.span_context);
        assert_root(&held);
        assert_nested(&worker.span("child"), &held);
    });
}

// Timings.

/// Answers for how long.
fn spin() -> Duration {
    let start = Instant::now();
    while start.elapsed() < BUSY {
        std::hint::spin_loop();
    }
    start.elapsed()
}

/// Runs what a span goes through, and checks its timings against the clock on the wall. `live` answers for
/// how long it certainly kept the span busy.
#[track_caller]
fn assert_timings(worker: &Worker, open: fn(&str) -> Span, live: impl FnOnce(&Span) -> Duration) {
    let start = Instant::now();
    let span = open("timed");
    let at_least = live(&span);
    drop(span);
    let elapsed = start.elapsed();

    let span = worker.span("timed");
    let nanos = |key| match attribute(&span, key) {
        Some(Value::I64(nanos)) => {
            Duration::from_nanos(nanos.try_into().expect("no negative time"))
        }
        other => panic!("{key} is {other:?}"),
    };
    let (busy, idle) = (nanos("busy_ns"), nanos("idle_ns"));
    assert!(busy >= at_least, "{busy:?} busy, of {at_least:?} at least");
    assert!(
        busy + idle <= elapsed,
        "{busy:?} busy and {idle:?} idle within {elapsed:?}"
    );
    let internal = |kv: &&KeyValue| kv.key.as_str().contains("held");
    assert_eq!(span.attributes.iter().find(internal), None);
}

#[test]
fn the_time_before_the_id_is_recorded_is_busy_time() {
    in_both_modes(|worker| {
        assert_timings(worker, awaiting, |span| {
            span.in_scope(|| {
                let before = spin();
                span.record(ID, "order");
                before + spin()
            })
        });
    });
}

#[test]
fn the_time_before_the_first_child_is_busy_time() {
    in_both_modes(|worker| {
        assert_timings(worker, engine, |span| {
            let first_poll = span.in_scope(spin);
            let second_poll = span.in_scope(|| {
                let before = spin();
                step("child");
                before + spin()
            });
            first_poll + second_poll
        });
    });
}

#[test]
fn the_time_in_a_span_that_never_learns_its_id_is_busy_time() {
    in_both_modes(|worker| {
        assert_timings(worker, awaiting, |span| {
            span.in_scope(spin) + span.in_scope(spin)
        });
    });
}

#[test]
fn the_time_in_an_engine_span_without_children_is_busy_time() {
    in_both_modes(|worker| {
        assert_timings(worker, engine, |span| {
            span.in_scope(spin) + span.in_scope(spin)
        });
    });
}

#[test]
fn time_between_polls_stays_idle_time() {
    in_both_modes(|worker| {
        let span = engine("timed");
        span.in_scope(|| ());
        let between = i64::try_from(spin().as_nanos()).expect("a short time");
        span.in_scope(|| tagged_step("child", "order"));
        drop(span);

        let idle = attribute(&worker.span("timed"), "idle_ns");
        assert!(
            matches!(idle, Some(Value::I64(idle)) if idle >= between),
            "{idle:?} idle, with {between} between"
        );
    });
}

#[test]
fn time_in_a_held_span_that_is_entered_twice_counts_once() {
    for open in [awaiting, engine] {
        in_both_modes(|worker| {
            assert_timings(worker, open, |span| {
                span.in_scope(|| span.in_scope(spin) + spin())
            });
        });
    }
}

#[test]
fn time_in_a_held_span_that_is_entered_on_two_threads_counts_once() {
    for open in [awaiting, engine] {
        in_both_modes(|worker| {
            assert_timings(worker, open, |span| {
                span.in_scope(|| elsewhere(worker, || span.in_scope(spin)) + spin())
            });
        });
    }
}

#[test]
fn time_in_a_span_that_another_thread_releases_is_busy_time() {
    in_both_modes(|worker| {
        assert_timings(worker, awaiting, |span| {
            span.in_scope(|| {
                let before = spin();
                elsewhere(worker, || {
                    span.in_scope(|| {
                        span.record(ID, "order");
                    });
                });
                before + spin()
            })
        });
    });
}

// What must not break it.

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

        assert_untouched(&worker.span("held engine"));
        assert_untouched(&worker.span("held awaiting"));
        assert_joined(&worker.span("released engine"), &stored);
        assert_joined(&worker.span("released awaiting"), &stored);
        assert_joined(&worker.span("learns_its_id"), &stored);
    });
}

#[test]
fn a_panic_unwinds_from_one_task_and_leaves_what_is_held_around_it() {
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

        assert_untouched(&worker.span("panics"));
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
            assert_untouched(&worker.span(name));
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

        assert_untouched(&worker.span("left first"));
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
fn an_id_recorded_elsewhere_counts_for_the_span_held_here() {
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
fn a_span_held_on_two_threads_has_its_children_of_both_beneath() {
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
fn a_span_released_here_is_released_for_a_thread_that_still_holds_it() {
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

/// An id that cannot be printed.
struct Unprintable;

impl fmt::Display for Unprintable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        resume_unwind(Box::new("on purpose"));
    }
}

#[test]
fn a_panic_while_the_id_is_printed_releases_nothing() {
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

/// An id that opens a span while it is printed.
struct Instrumented(&'static str);

impl fmt::Display for Instrumented {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ordinary("printing").in_scope(|| info!("printing"));
        f.write_str(self.0)
    }
}

#[test]
fn printing_the_id_may_open_spans() {
    in_both_modes(|worker| {
        let stored = stored_first(worker, "order");
        awaiting("recorded").in_scope(|| {
            Span::current().record(ID, display(Instrumented("order")));
        });

        // What printing opens is the first child: the span starts before its id is known.
        let span = worker.span("recorded");
        assert_linked(&span, "late", &stored);
        for printing in worker.spans().iter().filter(|span| span.name == "printing") {
            assert_nested(printing, &span);
        }
    });
}

/// Within the creation of a span tracing itself ignores all others.
#[test]
fn printing_the_id_of_a_new_span_may_try_to_open_spans() {
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

/// A sampler that opens a span of its own when the span of that name starts.
fn sampling_opens_a_span(when: &'static str) -> Worker {
    let sampler = Hooked(move |name: &str| {
        if name == when {
            step("sampling");
        }
    });
    Worker::with(adopting(), true, sampler)
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

#[test]
fn two_layers_on_one_thread_do_not_release_each_others_spans() {
    for (one, other) in [(true, true), (true, false), (false, true), (false, false)] {
        let label = format!("activation of the two: {one}, {other}");
        let [one, other] = [one, other].map(|on| Worker::with(adopting(), on, Sampler::AlwaysOn));
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
        assert_untouched(&other.span("engine"));
        assert_nested(&other.span("child"), &other.span("engine"));
        assert_untouched(&other.span("awaiting"));
        let (one, other) = (one.storage.stats(), other.storage.stats());
        assert_eq!((one.deferred, one.adopted), (1, 1));
        assert_eq!((other.deferred, other.adopted), (2, 0));
    }
}

#[test]
fn what_is_held_on_one_thread_while_another_makes_spans_is_left_right() {
    in_both_modes(|worker| {
        let span = engine("engine");
        span.in_scope(|| elsewhere(worker, || tagged_step("there", "order")));
        drop(span);

        assert_untouched(&worker.span("engine"));
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

// The engines. Each span is written as the engine's crate writes it.

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

#[test]
fn a_span_of_another_crate_that_is_named_like_an_engines_is_not_held_back() {
    let builder = WorkflowContextStorage::builder()
        .engine(Engine::Temporal)
        .engine(Engine::Restate);
    let worker = Worker::of(builder.build().expect("valid settings"));
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
fn an_engine_that_is_not_named_has_no_say() {
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
fn several_engines_may_be_named() {
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
            info_span!("handler", instance_id = "order").in_scope(|| ());
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
fn the_instance_id_that_duroxide_speaks_of_is_an_id() {
    in_both_modes_of(
        || knowing(Engine::Duroxide),
        |worker| {
            let stored = stored_first(worker, "order");
            info_span!("given", instance_id = %"order").in_scope(|| ());
            info_span!("recorded", instance_id = Empty).in_scope(|| {
                Span::current().record("instance_id", "order");
            });

            assert_joined(&worker.span("given"), &stored);
            assert_joined(&worker.span("recorded"), &stored);
        },
    );
}

#[test]
fn the_spans_of_dapr_join_their_instance_and_keep_their_good_parents() {
    let worker = Worker::of(knowing(Engine::Dapr));
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
