//! Receives the spans that the server exports, as a collector would: OTLP over gRPC, on loopback.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;

use crate::Result;

#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<SpanData>>>);

pub(crate) struct Receiver {
    pub(crate) url: String,
    spans: Spans,
}

impl Receiver {
    pub(crate) async fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let spans = Spans::default();
        let service = TraceServiceServer::new(spans.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Ok(Self { url, spans })
    }

    pub(crate) fn spans(&self) -> Vec<SpanData> {
        self.spans.0.lock().expect("no panic while locked").clone()
    }
}

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> std::result::Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let resources = request.into_inner().resource_spans.into_iter();
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        let spans = scopes.flat_map(|scope| scope.spans).map(to_span);
        let spans: std::result::Result<Vec<_>, _> = spans.collect();
        let spans = spans.map_err(tonic::Status::invalid_argument)?;
        self.0.lock().expect("no panic while locked").extend(spans);
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Converts what the forest needs of a span; events, links, kind and status stay behind.
fn to_span(span: Span) -> std::result::Result<SpanData, &'static str> {
    let span_id = |id: Vec<u8>| id.try_into().map(SpanId::from_bytes);
    let parent_span_id = match span.parent_span_id {
        none if none.is_empty() => SpanId::INVALID,
        id => span_id(id).map_err(|_| "a parent's id is not of 8 bytes")?,
    };
    let trace_id = span.trace_id.try_into().map(TraceId::from_bytes);
    let attributes = span.attributes.into_iter().map(|pair| {
        let value = match pair.value.and_then(|value| value.value) {
            Some(Value::StringValue(text)) => text,
            other => format!("{other:?}"),
        };
        KeyValue::new(pair.key, value)
    });
    Ok(SpanData {
        span_context: SpanContext::new(
            trace_id.map_err(|_| "a trace id is not of 16 bytes")?,
            span_id(span.span_id).map_err(|_| "a span id is not of 8 bytes")?,
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        ),
        parent_span_id,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: span.name.into(),
        start_time: UNIX_EPOCH + Duration::from_nanos(span.start_time_unix_nano),
        end_time: UNIX_EPOCH + Duration::from_nanos(span.end_time_unix_nano),
        attributes: attributes.collect(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::default(),
    })
}
