//! The layer adds no allocation to an untagged span; a binary of its own, because its allocator counts.
#![allow(
    unsafe_code,
    reason = "an allocator that counts is one of unsafe methods"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing::{Dispatch, Span, dispatcher, info, info_span};
use tracing_subscriber::prelude::*;
use tracing_subscriber::{Registry, registry};
use tracing_workflow_context::WorkflowContextStorage;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Counting;

thread_local! {
    /// The number of allocations of this thread.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every call is forwarded to `System`; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        unsafe { System.dealloc(memory, layout) }
    }
}

fn tracer() -> SdkTracer {
    SdkTracerProvider::builder().build().tracer("test")
}

fn plain(context_activation: bool) -> Dispatch {
    let layer = tracing_opentelemetry::layer::<Registry>();
    let layer = layer
        .with_tracer(tracer())
        .with_context_activation(context_activation);
    Dispatch::new(registry().with(layer))
}

fn ours(storage: &WorkflowContextStorage, context_activation: bool) -> Dispatch {
    let layer = storage.layer_with(tracer(), |otel| {
        otel.with_context_activation(context_activation)
    });
    Dispatch::new(registry().with(layer))
}

/// Returns the allocations of one span's life, after a few lives have filled caches.
fn allocations(dispatch: &Dispatch, life: impl Fn()) -> usize {
    dispatcher::with_default(dispatch, || {
        (0..100).for_each(|_| life());
        let before = ALLOCATIONS.get();
        life();
        ALLOCATIONS.get() - before
    })
}

fn untagged() {
    info_span!("untagged").in_scope(|| info!("inside"));
}

fn with_fields() {
    let span = info_span!(
        "fields",
        order = 42,
        name = "text",
        of_twenty_characters = tracing::field::Empty
    );
    span.in_scope(|| info!(detail = ?Some(1), "inside"));
    span.record("of_twenty_characters", "workflow.instance_id");
}

fn with_children() {
    let _outer = info_span!("outer").entered();
    info_span!("child").in_scope(untagged);
    let explicit = info_span!(parent: Span::current(), "explicit", n = 1);
    explicit.in_scope(|| {});
    info_span!("never entered");
}

fn with_link() {
    let _outer = info_span!("outer").entered();
    let span = info_span!("linked");
    span.follows_from(Span::current());
    span.in_scope(|| {});
}

fn tagged() {
    info_span!(
        "tagged",
        workflow.instance_id = "order-00000000-0000-0000-0000-42"
    )
    .in_scope(|| ());
}

fn recorded() {
    let span = info_span!("recorded", workflow.instance_id = tracing::field::Empty).entered();
    span.record("workflow.instance_id", "order-00000000-0000-0000-0000-42");
}

/// Returns a storage in every state that could affect an ordinary span.
fn storages() -> [(&'static str, WorkflowContextStorage); 3] {
    let busy = WorkflowContextStorage::builder()
        .adopt_spans(["engine"])
        .instance_id_fields(["workflow.instance_id", "order.id", "of_another_length"])
        .build()
        .unwrap();
    dispatcher::with_default(&ours(&busy, true), || {
        for n in 0..1_000 {
            info_span!("tagged", workflow.instance_id = n).in_scope(recorded);
        }
        info_span!("engine").in_scope(tagged);
    });
    let one = WorkflowContextStorage::new();
    dispatcher::with_default(&ours(&one, true), tagged);
    [
        ("empty", WorkflowContextStorage::new()),
        ("of one instance", one),
        ("busy", busy),
    ]
}

/// Asserts that no allocation is added, in each state of the storage and both activation modes.
fn assert_adds_nothing(life: fn()) {
    for (state, storage) in storages() {
        for on in [true, false] {
            let expected = allocations(&plain(on), life);
            let got = allocations(&ours(&storage, on), life);
            assert_ne!(expected, 0, "the allocator counts");
            assert_eq!(got, expected, "storage {state}, context activation {on}");
        }
    }
}

#[test]
fn an_untagged_span_allocates_what_it_does_without_the_layer() {
    assert_adds_nothing(untagged);
}

#[test]
fn an_untagged_span_with_fields_allocates_what_it_does_without_the_layer() {
    assert_adds_nothing(with_fields);
}

#[test]
fn nested_untagged_spans_allocate_what_they_do_without_the_layer() {
    assert_adds_nothing(with_children);
}

#[test]
fn an_untagged_span_with_a_link_allocates_what_it_does_without_the_layer() {
    assert_adds_nothing(with_link);
}

#[test]
fn an_untagged_span_below_a_tagged_one_allocates_what_it_does_without_the_layer() {
    for on in [true, false] {
        let below = |dispatch: &Dispatch| {
            dispatcher::with_default(dispatch, || {
                let _tagged = info_span!("tagged", workflow.instance_id = "order").entered();
                allocations(dispatch, untagged)
            })
        };
        let storage = WorkflowContextStorage::new();
        assert_eq!(
            below(&ours(&storage, on)),
            below(&plain(on)),
            "context activation {on}"
        );
    }
}

/// A generous bound: the additions are a copy of the id, its watch and the parent context.
#[test]
fn a_tagged_span_adds_few_allocations() {
    for on in [true, false] {
        for (name, life) in [("tagged", tagged as fn()), ("recorded", recorded)] {
            let storage = WorkflowContextStorage::new();
            let (plain, ours) = (
                allocations(&plain(on), life),
                allocations(&ours(&storage, on), life),
            );
            eprintln!("{name}, context activation {on}: plain {plain}, ours {ours}");
            assert!(ours <= plain + 16, "{name}: {plain}, {ours}");
        }
    }
}
