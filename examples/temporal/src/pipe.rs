//! What a worker process tells its parent, a JSON line each.
//!
//! A worker that is killed cannot be asked for its spans afterwards, so each of them leaves when
//! it ends, as it would through OTLP.

use anyhow::Result;
use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::{
    error::OTelSdkResult,
    trace::{SpanData, SpanEvents, SpanExporter, SpanLinks},
};
use serde::{Deserialize, Serialize};
use std::{future, time::SystemTime};

#[derive(Serialize, Deserialize)]
pub enum Message {
    Span(PipedSpan),
    /// The charge hangs. The context of its workflow, as a `traceparent`, if one is stored.
    Hanging {
        context: Option<String>,
    },
}

/// Prints a message, at once and in one piece.
pub fn send(message: &Message) {
    println!(
        "{}",
        serde_json::to_string(message).expect("all of it is JSON")
    );
}

/// Sends each span that ends.
#[derive(Debug)]
pub struct PipeExporter;

impl SpanExporter for PipeExporter {
    fn export(&self, batch: Vec<SpanData>) -> impl Future<Output = OTelSdkResult> + Send {
        for span in batch {
            send(&Message::Span(PipedSpan::from(&span)));
        }
        future::ready(Ok(()))
    }
}

/// As much of a span as the comparison needs.
#[derive(Serialize, Deserialize)]
pub struct PipedSpan {
    context: PipedContext,
    parent: String,
    parent_is_remote: bool,
    name: String,
    start: SystemTime,
    end: SystemTime,
    attributes: Attributes,
    links: Vec<(PipedContext, Attributes)>,
}

#[derive(Serialize, Deserialize)]
struct PipedContext {
    trace: String,
    span: String,
}

type Attributes = Vec<(String, String)>;

impl From<&SpanData> for PipedSpan {
    fn from(span: &SpanData) -> Self {
        let links = span.links.iter();
        Self {
            context: PipedContext::from(&span.span_context),
            parent: span.parent_span_id.to_string(),
            parent_is_remote: span.parent_span_is_remote,
            name: span.name.to_string(),
            start: span.start_time,
            end: span.end_time,
            attributes: piped(&span.attributes),
            links: links
                .map(|link| {
                    (
                        PipedContext::from(&link.span_context),
                        piped(&link.attributes),
                    )
                })
                .collect(),
        }
    }
}

impl TryFrom<PipedSpan> for SpanData {
    type Error = anyhow::Error;

    fn try_from(span: PipedSpan) -> Result<Self> {
        let mut links = SpanLinks::default();
        for (context, attributes) in span.links {
            links
                .links
                .push(Link::new(context.try_into()?, unpiped(attributes), 0));
        }
        Ok(Self {
            span_context: span.context.try_into()?,
            parent_span_id: SpanId::from_hex(&span.parent)?,
            parent_span_is_remote: span.parent_is_remote,
            span_kind: SpanKind::Internal,
            name: span.name.into(),
            start_time: span.start,
            end_time: span.end,
            attributes: unpiped(span.attributes),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::default(),
        })
    }
}

impl From<&SpanContext> for PipedContext {
    fn from(context: &SpanContext) -> Self {
        Self {
            trace: context.trace_id().to_string(),
            span: context.span_id().to_string(),
        }
    }
}

impl TryFrom<PipedContext> for SpanContext {
    type Error = anyhow::Error;

    fn try_from(context: PipedContext) -> Result<Self> {
        Ok(Self::new(
            TraceId::from_hex(&context.trace)?,
            SpanId::from_hex(&context.span)?,
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        ))
    }
}

fn piped(attributes: &[KeyValue]) -> Attributes {
    let pair = |attribute: &KeyValue| (attribute.key.to_string(), attribute.value.to_string());
    attributes.iter().map(pair).collect()
}

fn unpiped(attributes: Attributes) -> Vec<KeyValue> {
    let pair = |(key, value)| KeyValue::new::<String, String>(key, value);
    attributes.into_iter().map(pair).collect()
}
