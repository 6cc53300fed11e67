//! The bank: a process that knows nothing of workflows. It refuses the first try of each order.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::post;
use tower_http::trace::TraceLayer;
use tracing::field::Empty;
use tracing::{Span, info_span};

use crate::http::{continue_trace, record_status};

pub(crate) const ADDRESS: &str = "127.0.0.1:8081";

/// The orders that were refused, and have not come back yet.
type Refused = Arc<Mutex<HashSet<String>>>;

pub(crate) fn router() -> Router {
    let trace = TraceLayer::new_for_http()
        .make_span_with(|request: &Request| {
            let span = info_span!(
                "POST /charges/{order}",
                otel.kind = "server",
                http.response.status_code = Empty,
            );
            continue_trace(&span, request.headers());
            span
        })
        .on_response(|response: &Response, _: Duration, span: &Span| record_status(response, span));
    Router::new()
        .route("/charges/{order}", post(charge))
        .route_layer(trace)
        .with_state(Refused::default())
}

async fn charge(State(refused): State<Refused>, Path(order): Path<String>) -> StatusCode {
    tokio::time::sleep(Duration::from_millis(80)).await;
    let mut refused = refused.lock().unwrap_or_else(PoisonError::into_inner);
    if refused.remove(&order) {
        return StatusCode::OK;
    }
    refused.insert(order);
    StatusCode::SERVICE_UNAVAILABLE
}
