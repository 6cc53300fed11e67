//! Span contexts to compare with, and what exported spans are asserted to be.

use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, TraceContextExt as _};
use opentelemetry::{Context, KeyValue, SpanId, TraceFlags, TraceId, Value};
use opentelemetry_sdk::trace::SpanData;
use tracing_workflow_context::WorkflowContext;
use tracing_workflow_context::backend::Record;

/// Returns a remote, sampled span context that no span of a test has.
pub(crate) fn remote(trace: u128, span: u64) -> SpanContext {
    SpanContext::new(
        TraceId::from(trace),
        SpanId::from(span),
        TraceFlags::SAMPLED,
        true,
        Default::default(),
    )
}

pub(crate) fn remote_context(trace: u128, span: u64) -> Context {
    Context::new().with_remote_span_context(remote(trace, span))
}

/// Returns a workflow context of trace 7.
pub(crate) fn context(span: u64) -> WorkflowContext {
    WorkflowContext::try_from(&remote(7, span)).unwrap()
}

/// Returns a record that expires in an hour.
pub(crate) fn record_of(context: WorkflowContext) -> Record {
    Record::new(context, SystemTime::now() + Duration::from_secs(3600))
}

pub(crate) fn span_context(context: &WorkflowContext) -> SpanContext {
    context.to_otel().span().span_context().clone()
}

/// Returns the ids that identify a span.
pub(crate) fn ids(context: &SpanContext) -> (TraceId, SpanId) {
    (context.trace_id(), context.span_id())
}

pub(crate) fn attribute(span: &SpanData, key: &str) -> Option<Value> {
    let found = span.attributes.iter().find(|kv| kv.key.as_str() == key);
    found.map(|KeyValue { value, .. }| value.clone())
}

/// Returns the number of the trace that the span opened, if that is not the first one of its instance.
pub(crate) fn generation(span: &SpanData) -> Option<i64> {
    attribute(span, "workflow.generation").map(|value| match value {
        Value::I64(generation) => generation,
        other => panic!("the generation {other:?} is not an integer"),
    })
}

/// Returns the relation and the target of a span's only link.
#[track_caller]
pub(crate) fn link(span: &SpanData) -> (String, SpanContext) {
    assert_eq!(span.links.len(), 1, "links of {}", span.name);
    let link = &span.links[0];
    let relation = link
        .attributes
        .iter()
        .find(|kv| kv.key.as_str() == "workflow.relation");
    let relation = relation
        .expect("every link has a relation")
        .value
        .to_string();
    (relation, link.span_context.clone())
}

/// Returns the relation and the target's ids of each link, and asserts that a link has no other attributes.
#[track_caller]
pub(crate) fn links(span: &SpanData) -> Vec<(String, (TraceId, SpanId))> {
    let links = span.links.iter().map(|link| {
        let [relation] = &link.attributes[..] else {
            panic!(
                "a link of {} has the attributes {:?}",
                span.name, link.attributes
            );
        };
        assert_eq!(relation.key.as_str(), "workflow.relation");
        (relation.value.to_string(), ids(&link.span_context))
    });
    links.collect()
}

/// Asserts that no context is attached to this thread: every span that was entered was also exited.
#[track_caller]
pub(crate) fn assert_context_stack_is_empty() {
    assert!(
        !Context::current().has_active_span(),
        "a context is still attached"
    );
}

#[track_caller]
pub(crate) fn assert_same_span(one: &SpanContext, other: &SpanContext) {
    assert_eq!(ids(one), ids(other));
}

#[track_caller]
pub(crate) fn assert_root(span: &SpanData) {
    assert_eq!(
        span.parent_span_id,
        SpanId::INVALID,
        "the parent of {}",
        span.name
    );
}

/// Asserts that the span is a child of the other one, within this process.
#[track_caller]
pub(crate) fn assert_nested(span: &SpanData, parent: &SpanData) {
    assert_child(span, &parent.span_context, false);
}

/// Asserts that the span's parent is that remote context; stored contexts are always remote.
#[track_caller]
pub(crate) fn assert_continues(span: &SpanData, parent: &SpanContext) {
    assert_child(span, parent, true);
}

/// Asserts that the span's parent is that context, remote or local as the context says.
#[track_caller]
pub(crate) fn assert_child_of(span: &SpanData, parent: &SpanContext) {
    assert_child(span, parent, parent.is_remote());
}

#[track_caller]
fn assert_child(span: &SpanData, parent: &SpanContext, is_remote: bool) {
    let got = (
        span.span_context.trace_id(),
        span.parent_span_id,
        span.parent_span_is_remote,
    );
    let expected = (parent.trace_id(), parent.span_id(), is_remote);
    assert_eq!(
        got, expected,
        "trace, parent and whether that is remote, of {}",
        span.name
    );
}

/// Returns the texts of an error and of what caused it.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources
        .map(|error| error.to_string())
        .collect::<Vec<_>>()
        .join(": ")
}
