//! What both servers do: listen until they are told to stop, and carry trace context in headers.

use axum::Router;
use axum::http::{HeaderMap, Response};
use opentelemetry::global;
use opentelemetry::trace::TraceContextExt;
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use tokio::net::TcpListener;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::Result;

/// Returns the address in that environment variable, or else the default.
pub(crate) fn address(variable: &str, default: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| default.to_owned())
}

/// Serves until the process is interrupted.
pub(crate) async fn serve(variable: &str, default: &str, router: Router) -> Result<()> {
    let listener = TcpListener::bind(address(variable, default)).await?;
    println!("listening on http://{}", listener.local_addr()?);
    let interrupted = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    axum::serve(listener, router)
        .with_graceful_shutdown(interrupted)
        .await?;
    Ok(())
}

/// Lets the span of a request continue the trace that its headers name, if they do.
pub(crate) fn continue_trace(span: &Span, headers: &HeaderMap) {
    let received =
        global::get_text_map_propagator(|propagator| propagator.extract(&HeaderExtractor(headers)));
    if received.span().span_context().is_valid() {
        let _ = span.set_parent(received); // fails only without an OpenTelemetry layer
    }
}

/// Returns headers that carry the current span's context.
pub(crate) fn trace_headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    let current = Span::current().context();
    global::get_text_map_propagator(|propagator| {
        propagator.inject_context(&current, &mut HeaderInjector(&mut headers));
    });
    headers
}

/// Records the status of a response on the span of its request.
pub(crate) fn record_status<B>(response: &Response<B>, span: &Span) {
    span.record("http.response.status_code", response.status().as_u16());
}
