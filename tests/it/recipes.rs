//! The recipes of docs/GUIDE.md, run: logs with trace and instance, requests, child processes, messages.

use std::collections::HashMap;
use std::env;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use crate::support::*;
use opentelemetry::logs::AnyValue;
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_appender_tracing::layer::{OpenTelemetryTracingBridge, TracingSpanAttributes};
use opentelemetry_sdk::logs::{InMemoryLogExporter, SdkLoggerProvider};
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::field::Empty;
use tracing::{Event, Subscriber, info, info_span};
use tracing_log::log;
use tracing_subscriber::fmt::format::{self, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

const ID: &str = "order-42";

/// A format of lines, with the trace in front.
struct WithTrace<F>(F);

impl<S, N, F> FormatEvent<S, N> for WithTrace<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if let Some(cx) = WorkflowContext::peek() {
            write!(
                writer,
                "trace_id={} span_id={} ",
                cx.trace_id(),
                cx.span_id()
            )?;
        }
        self.0.format_event(ctx, writer, event)
    }
}

/// A format of JSON lines, with the trace as the first members.
struct WithTraceAsJson<F>(F);

impl<S, N, F> FormatEvent<S, N> for WithTraceAsJson<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.0.format_event(ctx, Writer::new(&mut line), event)?;
        match (WorkflowContext::peek(), line.strip_prefix('{')) {
            (Some(cx), Some(rest)) => write!(
                writer,
                r#"{{"trace_id":"{}","span_id":"{}",{rest}"#,
                cx.trace_id(),
                cx.span_id()
            ),
            _ => writer.write_str(&line),
        }
    }
}

/// What a logging layer has written.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// Logs a line before, inside and in a held span of an instance.
fn work() {
    info!("outside");
    info_span!("charge", workflow.instance_id = ID).in_scope(|| info!("charged"));
    let held = info_span!("ship", workflow.instance_id = Empty).entered();
    info!("not known yet");
    held.record("workflow.instance_id", ID);
    info!("shipped");
}

#[test]
fn lines_of_fmt_have_the_trace_and_the_instance() {
    let (lines, storage) = (Lines::default(), WorkflowContextStorage::new());
    let sink = lines.clone();
    let fmt = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(move || sink.clone())
        .event_format(WithTrace(format::Format::default()));
    let tracer = SdkTracerProvider::builder().build().tracer("test");
    let subscriber = tracing_subscriber::registry()
        .with(storage.layer(tracer))
        .with(fmt.with_filter(storage.log_filter()));
    tracing::subscriber::with_default(subscriber, work);

    let trace = storage.get(ID).unwrap().unwrap().trace_id();
    let text = lines.text();
    let lines: Vec<_> = text.lines().collect();
    assert!(!lines[0].contains("trace_id"), "{text}");
    for line in [lines[1], lines[3]] {
        assert!(
            line.starts_with(&format!("trace_id={trace} span_id=")),
            "{text}"
        );
        assert!(line.contains("workflow.instance_id=\"order-42\""), "{text}");
    }
    assert!(!lines[2].contains("trace_id"), "{text}");
    assert_eq!(storage.stats().late, 0, "no line has started the held span");
}

#[test]
fn lines_of_json_have_the_trace_and_the_instance() {
    let (lines, storage) = (Lines::default(), WorkflowContextStorage::new());
    let sink = lines.clone();
    let json = tracing_subscriber::fmt::layer()
        .json()
        .with_writer(move || sink.clone())
        .event_format(WithTraceAsJson(format::json()));
    let tracer = SdkTracerProvider::builder().build().tracer("test");
    let subscriber = tracing_subscriber::registry()
        .with(storage.layer(tracer))
        .with(json.with_filter(storage.log_filter()));
    tracing::subscriber::with_default(subscriber, work);

    let trace = storage.get(ID).unwrap().unwrap().trace_id();
    let text = lines.text();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    assert_eq!(lines.len(), 4);
    for line in [&lines[1], &lines[3]] {
        assert_eq!(line["trace_id"], trace.to_string());
        assert_eq!(line["span"]["workflow.instance_id"], ID, "{text}");
    }
    assert_eq!(lines[2]["trace_id"], serde_json::Value::Null);
    assert_eq!(storage.stats().late, 0);
}

#[test]
fn records_of_otlp_have_the_trace_and_the_instance() {
    let (exporter, storage) = (
        InMemoryLogExporter::default(),
        WorkflowContextStorage::new(),
    );
    let logs = SdkLoggerProvider::builder()
        .with_simple_exporter(exporter.clone())
        .build();
    let instance = TracingSpanAttributes::allowlist(["workflow.instance_id"]);
    let bridge = OpenTelemetryTracingBridge::builder(&logs)
        .with_tracing_span_attributes(instance)
        .build();
    let tracer = SdkTracerProvider::builder().build().tracer("test");
    let subscriber = tracing_subscriber::registry()
        .with(storage.layer(tracer))
        .with(bridge.with_filter(storage.log_filter()));
    tracing::subscriber::with_default(subscriber, work);

    let trace = storage.get(ID).unwrap().unwrap().trace_id();
    let records = exporter.get_emitted_logs().unwrap();
    let of = |index: usize| {
        let record = &records[index].record;
        let traced = record.trace_context().map(|cx| cx.trace_id);
        let mut attributes = record.attributes_iter();
        let id = attributes.find(|(key, _)| key.as_str() == "workflow.instance_id");
        (traced, id.map(|(_, value)| value.clone()))
    };
    let id = Some(AnyValue::from(ID));
    assert_eq!(records.len(), 4);
    assert_eq!(of(0), (None, None));
    assert_eq!(of(1), (Some(trace), id.clone()));
    assert_eq!(of(3), (Some(trace), id));
    assert_eq!(storage.stats().late, 0);
}

#[test]
fn records_of_log_keep_their_target() {
    let worker = Worker::new();
    worker.run(|| {
        let _step = info_span!("step", workflow.instance_id = ID).entered();
        let record = log::Record::builder()
            .level(log::Level::Info)
            .target("bank::client")
            .args(format_args!("connected"))
            .build();
        tracing_log::format_trace(&record).unwrap();
    });
    let step = worker.span("step");
    let target = (step.events[0].attributes.iter())
        .find(|attribute| attribute.key.as_str() == "target")
        .expect("a target");
    assert_eq!(target.value.as_str(), "bank::client");
}

#[test]
fn a_request_becomes_the_beginning_of_the_workflow_that_it_starts() {
    for worker in both_activations(WorkflowContextStorage::new) {
        worker.run(|| {
            let request = info_span!("POST /orders", workflow.instance_id = Empty);
            request.in_scope(|| {
                info_span!("authenticate").in_scope(|| ());
                let order = ID; // made by the handler
                tracing::Span::current().record("workflow.instance_id", order);
            });
            drop(request);
            info_span!("charge", workflow.instance_id = ID).in_scope(|| ());
        });
        worker.forest().assert_one_trace().assert_no_orphans();
        assert_eq!(worker.trace_of("charge"), worker.trace_of("POST /orders"));
    }
}

/// The child process of the next test.
#[test]
#[ignore = "run by the next test, in a process of its own"]
fn child() {
    let worker = Worker::new();
    let traceparent = env::var("TRACEPARENT").expect("set by the parent");
    let tracestate = env::var("TRACESTATE").unwrap_or_default();
    let order = env::var("ORDER").expect("set by the parent");
    let cx = WorkflowContext::parse(&traceparent, &tracestate).expect("a valid context");
    worker.storage.store(&order, cx).unwrap();
    worker.run(|| info_span!("print label", workflow.instance_id = %order).in_scope(|| ()));
    let span = worker.span("print label");
    println!("trace {}", span.span_context.trace_id());
    println!("state {}", span.span_context.trace_state().header());
}

#[test]
fn a_child_process_continues_by_its_environment() {
    let worker = Worker::new();
    worker.run(|| info_span!("charge", workflow.instance_id = ID).in_scope(|| ()));
    let stored = worker.storage.get(ID).unwrap().unwrap();
    // With a state, as a vendor's sampler would leave one.
    let cx = WorkflowContext::parse(&stored.traceparent(), "vendor=a").unwrap();
    let output = test_process(module_path!(), "child")
        .env("TRACEPARENT", cx.traceparent())
        .env("TRACESTATE", cx.tracestate())
        .env("ORDER", ID)
        .output()
        .unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{told}");
    assert!(told.contains(&format!("trace {}", cx.trace_id())), "{told}");
    assert!(told.contains("state vendor=a"), "{told}");
}

#[test]
fn a_message_carries_the_context_in_its_headers() {
    let (sender, receiver) = (Worker::new(), Worker::new());
    let mut headers = HashMap::new();
    sender.run(|| {
        let _charge = info_span!("charge", workflow.instance_id = ID).entered();
        let cx = WorkflowContext::current().expect("a current span");
        cx.inject(&mut headers);
    });
    receiver.run(|| {
        let cx = WorkflowContext::extract(&headers).unwrap();
        receiver.storage.store(ID, cx).unwrap();
        info_span!("ship", workflow.instance_id = ID).in_scope(|| ());
    });
    assert_eq!(receiver.trace_of("ship"), sender.trace_of("charge"));
    let ship = receiver.span("ship");
    assert_eq!(
        ship.parent_span_id,
        sender.span("charge").span_context.span_id()
    );
}

#[test]
fn the_span_extension_is_at_hand_without_another_dependency() {
    use tracing_workflow_context::OpenTelemetrySpanExt as _;
    use tracing_workflow_context::tracing_opentelemetry::get_otel_context;

    let worker = Worker::new();
    worker.run(|| {
        let span = info_span!("step", workflow.instance_id = ID);
        span.in_scope(|| ());
        let context = span.context();
        let trace = context.span().span_context().trace_id();
        assert_eq!(trace, worker.stored_trace(ID));
        let id = span.id().unwrap();
        assert!(get_otel_context(&id, &worker.dispatch).is_some());
    });
}
