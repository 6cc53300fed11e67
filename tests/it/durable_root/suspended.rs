//! The structure that conformance suites for durable execution ask for: one trace for each execution, one root in it, every
//! parent resolved, and all within the time of the root, however long an execution was suspended between two processes.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry::trace::{
    Span as _, SpanBuilder, Status, TraceContextExt as _, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData};
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{Clock as _, MemoryBackend};

use super::{ID, attribute, number};
use crate::support::*;

const CHILD: &str = "order-42/shipping";
const MINUTE: Duration = Duration::from_secs(60);

/// How long an execution sleeps; `idle_ttl` has to be longer.
const SUSPENSIONS: [Duration; 3] = [MINUTE, HOUR, Duration::from_secs(24 * 3600)];

/// The processes of an execution, one after the other, on one backend and one clock, by which all spans have their times.
struct Processes {
    backend: MemoryBackend,
    clock: Arc<ManualClock>,
    current: Worker,
    exported: Vec<SpanData>,
}

impl Processes {
    fn start() -> Self {
        let (backend, clock) = (MemoryBackend::new(), ManualClock::new());
        Self {
            current: Self::process(&backend, &clock),
            backend,
            clock,
            exported: Vec::new(),
        }
    }

    fn process(backend: &MemoryBackend, clock: &Arc<ManualClock>) -> Worker {
        let storage = patient(backend.clone()).durable_root(true);
        let storage = storage.idle_ttl(48 * HOUR).clock(clock.clone());
        super::worker(storage.build().unwrap())
    }

    /// The execution is suspended, and goes on in another process.
    fn suspend(&mut self, pause: Duration) {
        self.current.storage.flush().unwrap();
        self.exported.extend(self.current.spans());
        self.current = Self::process(&self.backend, &self.clock);
        self.clock.advance(pause);
    }

    fn span(
        &self,
        name: &'static str,
        tags: &[(&'static str, &'static str)],
        parent: &Context,
    ) -> Context {
        let tracer = self.current.storage.tracer(self.current.tracer());
        let tags = tags.iter().map(|(key, value)| KeyValue::new(*key, *value));
        let builder = SpanBuilder::from_name(name)
            .with_start_time(self.clock.now())
            .with_attributes(tags);
        let mut span = tracer.build_with_context(builder, parent);
        if name.contains("fails") {
            span.set_status(Status::error("no answer"));
        }
        let beneath = parent.with_remote_span_context(span.span_context().clone());
        self.clock.advance(MINUTE);
        span.end_with_timestamp(self.clock.now());
        beneath
    }

    /// A step of the order: a span, and one beneath it that knows nothing of the order.
    fn step(&self, name: &'static str) {
        let beneath = self.span(name, &[("workflow.instance_id", ID)], &Context::new());
        self.span("query", &[], &beneath);
    }

    fn end(&self, id: &'static str) {
        let tags = [
            ("workflow.instance_id", id),
            ("workflow.status", "completed"),
        ];
        self.span("end", &tags, &Context::new());
    }

    fn finish(mut self) -> Vec<SpanData> {
        self.suspend(Duration::ZERO);
        self.exported
    }
}

/// Checks the trace of the execution, and returns its root.
#[track_caller]
fn check(spans: &[SpanData], pause: Duration) -> SpanData {
    TraceForest::from_spans(spans)
        .assert_one_trace()
        .assert_rooted()
        .assert_no_duplicates();
    let mut roots = spans.iter().filter(|span| {
        attribute(span, "workflow.spans").is_some()
            && attribute(span, "workflow.instance_id") == Some(ID.into())
    });
    let root = roots.next().expect("the root was exported").clone();
    assert!(roots.next().is_none(), "once");
    assert_eq!(
        attribute(&root, "workflow.status"),
        Some("completed".into())
    );
    assert!(root.end_time.duration_since(root.start_time).unwrap() > pause);
    root
}

#[test]
fn by_a_timer() {
    for pause in SUSPENSIONS {
        let mut processes = Processes::start();
        processes.step("start");
        processes.suspend(pause);
        processes.step("after the timer");
        processes.end(ID);
        let root = check(&processes.finish(), pause);
        assert_eq!(number(&root, "workflow.processes"), 2);
        assert_eq!(number(&root, "workflow.resumes"), 1);
        assert_eq!(number(&root, "workflow.spans"), 3);
    }
}

#[test]
fn by_the_back_off_of_a_retry() {
    for pause in SUSPENSIONS {
        let mut processes = Processes::start();
        processes.step("start");
        for _ in 0..3 {
            processes.step("charge fails");
            processes.suspend(pause);
        }
        processes.step("charge");
        processes.end(ID);
        let root = check(&processes.finish(), pause);
        assert_eq!(root.status, Status::Unset, "only attempts have failed");
        assert_eq!(number(&root, "workflow.processes"), 4);
    }
}

#[test]
fn until_an_external_event() {
    for pause in SUSPENSIONS {
        let mut processes = Processes::start();
        processes.step("start");
        processes.suspend(pause);
        // The request that brings the event has a trace of its own, which the execution is linked to.
        let provider = SdkTracerProvider::builder().build();
        let request = provider.tracer("http").start("POST /approve");
        let request = Context::new().with_remote_span_context(request.span_context().clone());
        processes.span("approved", &[("workflow.instance_id", ID)], &request);
        processes.end(ID);
        let spans = processes.finish();
        check(&spans, pause);
        let approved = spans.iter().find(|span| span.name == "approved").unwrap();
        let linked = &approved.links.links[0].span_context;
        assert_eq!(linked.trace_id(), request.span().span_context().trace_id());
    }
}

#[test]
fn until_a_child_workflow_ends() {
    for pause in SUSPENSIONS {
        let mut processes = Processes::start();
        processes.step("start");
        processes.suspend(MINUTE);
        let child = [
            ("workflow.instance_id", CHILD),
            ("workflow.parent_instance_id", ID),
        ];
        processes.span("ship", &child, &Context::new());
        processes.suspend(pause);
        processes.end(CHILD);
        processes.step("after the child");
        processes.end(ID);
        let spans = processes.finish();
        let root = check(&spans, pause);
        let is_of_child = |span: &&SpanData| {
            attribute(span, "workflow.spans").is_some()
                && attribute(span, "workflow.instance_id") == Some(CHILD.into())
        };
        let of_child: Vec<_> = spans.iter().filter(is_of_child).collect();
        assert_eq!(of_child.len(), 1);
        assert_eq!(of_child[0].parent_span_id, root.span_context.span_id());
        assert!(of_child[0].end_time <= root.end_time);
    }
}
