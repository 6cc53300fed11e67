//! Threads that share a storage, in thousands of orders that a model checker chooses: `scripts/shuttle`.
//!
//! Another thread may run wherever the crate takes a lock (`src/lock.rs`), so what is tried here are orders of critical
//! sections: recording, eviction, completion, removal, and calls between them. Spans are made through the OpenTelemetry API with
//! explicit contexts, since the threads of the model share the thread-locals of one thread of the system.
#![cfg(shuttle)]
#![allow(missing_docs, reason = "a test")]

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use opentelemetry::trace::{Span as _, SpanContext, Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracer, SdkTracerProvider};
use shuttle::thread;
use tracing_workflow_context::{
    Clock, WorkflowContext, WorkflowContextStorage, WorkflowContextStorageBuilder, WorkflowTracer,
};

/// A clock that stands still, and starts no thread.
#[derive(Debug)]
struct Still;

impl Clock for Still {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_800_000_000)
    }
}

/// A storage, a tracer, and what that exports.
#[derive(Clone)]
struct Model {
    storage: WorkflowContextStorage,
    tracer: WorkflowTracer<SdkTracer>,
    exporter: InMemorySpanExporter,
}

impl Model {
    fn new(
        set: impl FnOnce(WorkflowContextStorageBuilder) -> WorkflowContextStorageBuilder,
    ) -> Self {
        let builder = WorkflowContextStorage::builder().clock(Arc::new(Still));
        let storage = set(builder).build().expect("sound settings");
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone());
        let tracer = storage.tracer(provider.build().tracer("model"));
        Self {
            storage,
            tracer,
            exporter,
        }
    }

    /// Opens and ends a span of the instance, which has no parent.
    fn span(&self, id: &str, attributes: &[(&'static str, &'static str)]) -> SpanContext {
        let id = KeyValue::new("workflow.instance_id", id.to_owned());
        let more = attributes
            .iter()
            .map(|(key, value)| KeyValue::new(*key, *value));
        let builder = self.tracer.span_builder("step");
        let builder = builder.with_attributes([id].into_iter().chain(more).collect::<Vec<_>>());
        let mut span = self.tracer.build_with_context(builder, &Context::new());
        let context = span.span_context().clone();
        span.end();
        context
    }

    fn stored(&self, id: &str) -> Option<WorkflowContext> {
        self.storage.get(id).expect("a sound id")
    }
}

fn context(number: u64) -> WorkflowContext {
    let text = format!("00-{number:032x}-{number:016x}-01");
    WorkflowContext::parse(&text, "").expect("well formed")
}

/// Tries so many orders, each of the two ways to choose one: evenly, and with few changes of thread (PCT).
fn check(test: impl Fn() + Send + Sync + Clone + 'static) {
    let orders = std::env::var("SHUTTLE_ORDERS").map_or(2_000, |it| it.parse().expect("a number"));
    shuttle::check_random(test.clone(), orders);
    shuttle::check_pct(test, orders, 3);
}

fn join<R: 'static>(threads: Vec<thread::JoinHandle<R>>) -> Vec<R> {
    let threads = threads.into_iter();
    threads
        .map(|thread| thread.join().expect("no panic"))
        .collect()
}

#[test]
fn of_first_spans_at_once_one_is_recorded_and_the_others_are_linked_to_it() {
    check(|| {
        let model = Model::new(|builder| builder);
        let spans = (0..3).map(|_| {
            let model = model.clone();
            thread::spawn(move || model.span("a", &[]))
        });
        let spans = join(spans.collect());
        let stored = model.stored("a").expect("recorded");
        let winners = spans
            .iter()
            .filter(|span| span.span_id() == stored.span_id());
        assert_eq!(winners.count(), 1);
        for span in model.exporter.get_finished_spans().expect("it is up") {
            let is_winner = span.span_context.span_id() == stored.span_id();
            let continues = span.parent_span_id == stored.span_id();
            let is_linked = span
                .links
                .iter()
                .any(|link| link.span_context.span_id() == stored.span_id());
            assert!(
                is_winner || continues || is_linked,
                "a loser has lost its instance"
            );
        }
        assert_eq!(model.span("a", &[]).trace_id(), stored.trace_id());
    });
}

#[test]
fn however_many_record_at_once_there_are_no_more_than_may_be_and_all_are_counted() {
    check(|| {
        let model = Model::new(|builder| builder.max_instances(2));
        let threads = (0..3).map(|thread| {
            let model = model.clone();
            thread::spawn(move || {
                for number in 0..2 {
                    model.span(&format!("{thread} {number}"), &[]);
                }
            })
        });
        join(threads.collect());
        let stats = model.storage.stats();
        assert!(stats.stored_instances <= 2, "{stats:?}");
        assert_eq!(
            stats.stored_instances as u64 + stats.evicted,
            6,
            "{stats:?}"
        );
        let ids = model.storage.instance_ids();
        assert_eq!(ids.len(), stats.stored_instances);
        assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len());
    });
}

#[test]
fn an_end_beside_spans_and_a_removal_leaves_one_state_of_those_that_may_be() {
    check(|| {
        let model = Model::new(|builder| builder);
        let first = model.span("a", &[]);
        let [ends, removes, continues] = [0, 1, 2].map(|_| model.clone());
        let ends = thread::spawn(move || {
            ends.span("a", &[("workflow.status", "completed")]);
            false
        });
        let removes = thread::spawn(move || removes.storage.cleanup("a").expect("a sound id"));
        let continues = thread::spawn(move || {
            let span = continues.span("a", &[]);
            let again = continues.span("a", &[]);
            // A removal can come between them, but only one.
            let is_first = |span: &SpanContext| span.trace_id() == first.trace_id();
            assert!(
                is_first(&span) || !is_first(&again),
                "a trace that was given up came back"
            );
            false
        });
        let [_, was_there, _] = join(vec![ends, removes, continues])[..] else {
            panic!("three threads");
        };
        assert!(was_there, "nothing else removes it");
        let stats = model.storage.stats();
        let is_there = model.stored("a").is_some();
        assert_eq!(stats.stored_instances, usize::from(is_there), "{stats:?}");
        assert_eq!(model.storage.cleanup("a").expect("a sound id"), is_there);
        assert_eq!(model.storage.stats().stored_instances, 0);
    });
}

#[test]
fn what_a_call_stores_is_never_undone_by_a_first_span() {
    check(|| {
        let model = Model::new(|builder| builder);
        let [one, other] = [0, 1].map(|_| model.clone());
        let spans = thread::spawn(move || drop(one.span("a", &[])));
        let stores = thread::spawn(move || {
            other.storage.store("a", context(7)).expect("a sound id");
            let found = other.stored("a").expect("just stored");
            assert_eq!(found.span_id(), context(7).span_id());
        });
        join(vec![spans, stores]);
        assert_eq!(
            model.stored("a").expect("stored").span_id(),
            context(7).span_id()
        );
    });
}

#[test]
fn runs_that_begin_at_once_each_keep_their_own_trace() {
    check(|| {
        let model = Model::new(|builder| builder);
        let threads = ["1", "2"].map(|run| {
            let model = model.clone();
            thread::spawn(move || {
                let run = [("workflow.run_id", run)];
                let traces = [0, 1].map(|_| model.span("a", &run).trace_id());
                assert_eq!(traces[0], traces[1], "a run has one trace");
                traces[0]
            })
        });
        let traces = join(threads.into());
        assert_ne!(traces[0], traces[1], "two runs have two");
    });
}
