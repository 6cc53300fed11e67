//! Programs of spans: each two bytes are a step on one of a few spans of three instances.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use opentelemetry::trace::{SpanId, TraceContextExt as _, TracerProvider as _};
use opentelemetry::{Context, ContextGuard, Value};
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use tracing::field::Empty;
use tracing::span::EnteredSpan;
use tracing::{Dispatch, Span, dispatcher, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

use super::headers::Now;

const IDS: [&str; 3] = ["order 1", "order 2", "order 3"];
const SPANS: usize = 24;
const STEPS: usize = 200;

/// The state of a program that runs.
#[derive(Default)]
struct Running {
    handles: Vec<Option<Span>>,
    entered: Vec<(usize, EnteredSpan)>,
    attached: Vec<ContextGuard>,
    /// The span ids of contexts from outside.
    outside: HashSet<SpanId>,
    /// It has done something after which an instance may have a second trace.
    splits: bool,
    replays: bool,
}

pub(crate) fn span_program(data: &[u8]) {
    let storage = WorkflowContextStorage::builder()
        .adopt_spans(["engine"])
        .poller_spans(["poller"])
        .max_instances(100)
        .recent_decisions(64)
        .clock(Arc::new(Now));
    let storage = storage.build().expect("sound settings");
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let layer = storage.layer(provider.tracer("test"));
    let dispatch = Dispatch::new(tracing_subscriber::registry().with(layer));
    let mut running = Running::default();
    dispatcher::with_default(&dispatch, || {
        for step in data.chunks_exact(2).take(STEPS) {
            running.take(&storage, step[0], usize::from(step[1]));
        }
        while running.attached.pop().is_some() {}
        running.entered.clear();
        running.handles.clear();
    });
    assert!(
        !Context::current().has_active_span(),
        "a context is still attached"
    );
    let spans = exporter.get_finished_spans().expect("the exporter is up");
    running.check(&spans);
    assert!(storage.stats().stored_instances <= 100);
}

impl Running {
    fn take(&mut self, storage: &WorkflowContextStorage, step: u8, argument: usize) {
        let id = IDS[argument % 3];
        let span = |handles: &[Option<Span>]| {
            let open = handles.iter().flatten().count();
            let wanted = (argument / 3).checked_rem(open)?;
            handles
                .iter()
                .enumerate()
                .filter(|(_, span)| span.is_some())
                .nth(wanted)
                .map(|(at, _)| at)
        };
        let chosen = span(&self.handles);
        let handle = chosen.and_then(|at| self.handles[at].clone());
        let n = self.handles.len() as u64;
        match (step % 26, handle) {
            (0..=3, _) => self.open(|| info_span!("tagged", n, workflow.instance_id = id)),
            (4, _) => self.open(|| info_span!("awaiting", n, workflow.instance_id = Empty)),
            (5, _) => self.open(|| info_span!("engine", n)),
            (6, _) => self.open(|| info_span!("poller", n)),
            (7, _) => self.open(|| info_span!("ordinary", n)),
            (8, _) => {
                self.replays = true;
                let replaying = argument % 2 == 0;
                self.open(|| {
                    info_span!(
                        "replay",
                        n,
                        workflow.instance_id = id,
                        workflow.replaying = replaying
                    )
                });
            }
            (9, _) => {
                self.splits = true;
                let run = argument / 3 % 3;
                self.open(|| {
                    info_span!(
                        "run",
                        n,
                        workflow.instance_id = id,
                        workflow.run_id = run as u64
                    )
                });
            }
            (10, _) => self.open(|| {
                info_span!(
                    "child",
                    n,
                    workflow.instance_id = id,
                    workflow.parent_instance_id = IDS[0]
                )
            }),
            (11, _) => self.open(|| {
                info_span!(
                    "look",
                    n,
                    workflow.instance_id = id,
                    workflow.observing = true
                )
            }),
            (12, Some(parent)) => {
                self.open(|| info_span!(parent: &parent, "beneath", n, workflow.instance_id = id));
            }
            (13, _) => self.open(|| info_span!(parent: None, "root", n, workflow.instance_id = id)),
            (14 | 15, Some(span)) if self.entered.len() < SPANS => {
                self.entered
                    .push((chosen.expect("its number"), span.entered()));
            }
            (16, _) => {
                let innermost = self.entered.iter().rposition(|(at, _)| Some(*at) == chosen);
                drop(innermost.map(|at| self.entered.remove(at)));
            }
            (17, Some(span)) => {
                // A second id: which of them counts is not looked at here.
                let is_first = span.metadata().is_some_and(|it| it.name() == "awaiting");
                self.splits |= !is_first;
                span.record("workflow.instance_id", id);
            }
            (18, Some(span)) => {
                self.splits = true;
                span.record("workflow.replaying", argument % 2 == 0);
            }
            (19, _) => tracing::info!(argument, "event"),
            (20 | 21, Some(_)) => self.handles[chosen.expect("its number")] = None,
            (22, Some(span)) => {
                let cx = span.context().span().span_context().clone();
                assert!(cx.is_valid() || self.replays);
            }
            (23, Some(span)) => match argument % 4 {
                0 => drop(span.set_parent(self.outside(argument).to_otel())),
                1 => {
                    let outside = self.outside(argument).to_otel();
                    self.attached.push(outside.attach());
                }
                2 => drop(self.attached.pop()),
                _ => {
                    drop((WorkflowContext::peek(), WorkflowContext::current()));
                }
            },
            (24, _) => self.call(storage, id, argument / 3),
            (25, _) => {
                let told = storage.explain(id).to_string();
                assert!(told.contains(id));
            }
            _ => {}
        }
    }

    fn open(&mut self, open: impl FnOnce() -> Span) {
        if self.handles.len() < SPANS {
            self.handles.push(Some(open()));
        }
    }

    /// Returns a context of another process.
    fn outside(&mut self, number: usize) -> WorkflowContext {
        let number = number as u64 % 8 + 1;
        self.outside.insert(SpanId::from(number));
        let text = format!("00-{number:032x}-{number:016x}-01");
        WorkflowContext::parse(&text, "").expect("well formed")
    }

    fn call(&mut self, storage: &WorkflowContextStorage, id: &str, argument: usize) {
        match argument % 5 {
            0 => drop(storage.get(id).expect("a sound id")),
            1 => {
                self.splits = true;
                let context = self.outside(argument);
                storage.store(id, context.clone()).expect("a sound id");
                let found = storage.get(id).expect("a sound id").expect("just stored");
                assert_eq!(found.traceparent(), context.traceparent());
            }
            2 => {
                self.splits = true;
                storage.cleanup(id).expect("a sound id");
                assert_eq!(storage.get(id).expect("a sound id"), None);
            }
            3 => drop(storage.complete(id, "completed").expect("a status")),
            _ => drop(storage.flush()),
        }
    }

    fn check(&self, spans: &[SpanData]) {
        assert!(spans.len() <= self.handles.len().max(SPANS));
        let mut ids = HashSet::new();
        for span in spans {
            assert!(span.span_context.is_valid());
            assert!(
                ids.insert(span.span_context.span_id()),
                "a span is exported once"
            );
        }
        if self.replays || self.splits {
            return;
        }
        // Each parent is known, and each instance has one trace.
        let mut traces = HashMap::new();
        for span in spans {
            let parent = span.parent_span_id;
            let is_known = parent == SpanId::INVALID || ids.contains(&parent);
            assert!(
                is_known || self.outside.contains(&parent),
                "{}: an unknown parent",
                span.name
            );
            let names = ["tagged", "beneath", "root"];
            let is_tagged = names.contains(&&*span.name);
            let id = span
                .attributes
                .iter()
                .find(|kv| kv.key.as_str() == "workflow.instance_id");
            if let Some(Value::String(id)) = id.map(|kv| &kv.value).filter(|_| is_tagged) {
                let trace = span.span_context.trace_id();
                let first = *traces.entry(id.as_str().to_owned()).or_insert(trace);
                assert_eq!(first, trace, "{id} has two traces");
            }
        }
    }
}
