//! Samplers, id generators, processors and exporters that panic harm neither the process nor later spans.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::*;
use opentelemetry::trace::{SpanId, TraceId, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    IdGenerator, RandomIdGenerator, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor,
    TracerProviderBuilder,
};
use tracing::{Dispatch, info_span};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

const ID: &str = "order-42";

/// The place in which other people's code panics, at the span called "panics".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Sampler,
    IdGenerator,
    Start,
    End,
    Export,
}

const AT_START: [At; 2] = [At::Sampler, At::Start];
const AT_END: [At; 2] = [At::End, At::Export];

#[derive(Debug)]
struct Panicking(At);

impl SpanProcessor for Panicking {
    fn on_start(&self, span: &mut Span, _: &Context) {
        let name = span.exported_data().map(|data| data.name);
        assert!(self.0 != At::Start || name.as_deref() != Some("panics"));
    }

    fn on_end(&self, span: SpanData) {
        assert!(self.0 != At::End || span.name != "panics");
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

impl SpanExporter for Panicking {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        assert!(batch.iter().all(|span| span.name != "panics"));
        Ok(())
    }
}

/// Set to make the next span id panic.
static NEXT_ID_PANICS: AtomicBool = AtomicBool::new(false);

#[derive(Debug, Default)]
struct PanickingIds(RandomIdGenerator);

impl IdGenerator for PanickingIds {
    fn new_trace_id(&self) -> TraceId {
        self.0.new_trace_id()
    }

    fn new_span_id(&self) -> SpanId {
        assert!(!NEXT_ID_PANICS.swap(false, Ordering::SeqCst));
        self.0.new_span_id()
    }
}

fn provider(at: At) -> TracerProviderBuilder {
    let provider = SdkTracerProvider::builder();
    match at {
        At::Sampler => provider.with_sampler(Hooked(|name: &str| assert_ne!(name, "panics"))),
        At::IdGenerator => provider.with_id_generator(PanickingIds::default()),
        At::Start | At::End => provider.with_span_processor(Panicking(at)),
        At::Export => provider.with_simple_exporter(Panicking(at)),
    }
}

fn worker(at: At, via: Via) -> Worker {
    let activation = via != Via::LayerWithoutActivation;
    let stack = |layer| Dispatch::new(tracing_subscriber::registry().with(layer));
    let storage = WorkflowContextStorage::new();
    Worker::assembled(provider(at), storage, activation, stack).made_by(via)
}

fn for_each_place(places: &[At], test: impl Fn(&Worker)) {
    for &at in places {
        for_each_via(|via| {
            labelled(&format!("a panic in {at:?}"), || {
                let worker = worker(at, via);
                worker.run(|| test(&worker));
            });
        });
    }
}

/// Opens and closes the span whose start or end panics.
fn panics(worker: &Worker, tags: Tags<'_>, inside: impl FnOnce()) {
    worker.within("panics", tags, inside);
}

#[test]
fn a_panic_at_the_start_of_a_span_costs_that_span_alone() {
    for_each_place(&AT_START, |worker| {
        for tags in [UNTAGGED, Tags::instance(ID)] {
            worker.within("outer", UNTAGGED, || {
                panics(worker, tags, || worker.step("inner", UNTAGGED));
                worker.step("after", UNTAGGED);
            });
        }
        let mut names = worker.names();
        // The SDK ends the span that its processor refused by a panic.
        names.retain(|name| name != "panics");
        assert_eq!(
            names,
            ["after", "after", "inner", "inner", "outer", "outer"]
        );
        assert_eq!(worker.storage.stats().panics, 2);
        // What is opened beneath continues the trace of the parent.
        let spans = worker.spans();
        let of = |name| (spans.iter()).filter(move |span| span.name == name);
        for outer in of("outer") {
            let trace =
                |span: &&SpanData| span.span_context.trace_id() == outer.span_context.trace_id();
            assert_eq!(of("inner").filter(trace).count(), 1);
            assert_eq!(of("after").filter(trace).count(), 1);
        }
        assert_eq!(
            worker.storage.get(ID).unwrap(),
            None,
            "nothing is recorded of it"
        );
    });
}

#[test]
fn a_panic_of_the_id_generator_costs_that_span_alone() {
    for via in [Via::Layer, Via::LayerWithoutActivation] {
        let worker = worker(At::IdGenerator, via);
        worker.run(|| {
            NEXT_ID_PANICS.store(true, Ordering::SeqCst);
            panics(&worker, Tags::instance(ID), || {
                worker.step("inner", UNTAGGED)
            });
            worker.step("later", Tags::instance(ID));
        });
        assert_eq!(worker.names(), ["inner", "later"]);
        assert_eq!(worker.storage.stats().panics, 1);
        assert_eq!(
            ids(&worker.stored(ID)),
            ids(&worker.span("later").span_context)
        );
    }
}

#[test]
fn a_panic_at_the_end_of_a_span_costs_that_span_alone() {
    for_each_place(&AT_END, |worker| {
        for tags in [UNTAGGED, Tags::instance(ID)] {
            worker.within("outer", UNTAGGED, || {
                panics(worker, tags, || worker.step("inner", UNTAGGED));
            });
        }
        worker.step("later", Tags::instance(ID));
        // The SDK uses an exporter no more once it has panicked.
        assert!((1..=2).contains(&worker.storage.stats().panics));
        let names = worker.names();
        for name in ["inner", "later", "outer"] {
            assert!(
                names.iter().any(|known| known == name),
                "{name} in {names:?}"
            );
        }
    });
}

/// A second panic while the thread unwinds would abort the process.
#[test]
fn a_panic_while_the_users_code_panics_does_not_abort_the_process() {
    for_each_place(&[At::Sampler, At::Start, At::End, At::Export], |worker| {
        for tags in [UNTAGGED, Tags::instance(ID)] {
            let unwinds = || {
                worker.within("outer", tags, || {
                    let _closed_while_unwinding = worker.open("panics", tags);
                    std::panic::resume_unwind(Box::new("the user's own"));
                });
            };
            catch_unwind(AssertUnwindSafe(unwinds)).expect_err("the user's own panic arrives");
        }
        assert!((1..=2).contains(&worker.storage.stats().panics));
        worker.step("later", UNTAGGED);
        assert!(worker.names().iter().any(|name| name == "later"));
    });
}

#[test]
fn a_panic_does_not_switch_tracing_off_on_its_thread() {
    for at in [At::Sampler, At::Start, At::End, At::Export] {
        let worker = worker(at, Via::Layer);
        worker.run(|| {
            panics(&worker, UNTAGGED, || ());
            let span = info_span!("current", workflow.instance_id = ID).entered();
            assert!(WorkflowContext::current().is_some());
            tracing::info!("an event");
            drop(span);
        });
        assert_eq!(worker.span("current").events.len(), 1);
    }
}

/// A span of the OpenTelemetry API ends when it is dropped.
#[test]
fn a_span_that_is_dropped_without_an_end_is_exported_and_its_panic_caught() {
    for at in AT_END {
        let worker = worker(at, Via::Api);
        let tracer = worker.storage.tracer(worker.provider.tracer("test"));
        use opentelemetry::trace::Tracer as _;
        for name in ["panics", "dropped"] {
            let attributes = vec![KeyValue::new("workflow.instance_id", ID)];
            drop(
                tracer
                    .span_builder(name)
                    .with_attributes(attributes)
                    .start(&tracer),
            );
        }
        assert_eq!(worker.storage.stats().panics, 1);
        assert!(worker.names().iter().any(|name| name == "dropped"));
    }
}

/// The worker goes on in its trace, and another thread may open the next one.
#[test]
fn a_first_span_that_panics_is_not_recorded_and_the_next_one_is() {
    for_each_place(&AT_START, |worker| {
        panics(worker, Tags::instance(ID), || ());
        worker.step("first", Tags::instance(ID));
        worker.step("second", Tags::instance(ID));
        assert_root(&worker.span("first"));
        assert_continues(&worker.span("second"), &worker.span("first").span_context);
    });
}
