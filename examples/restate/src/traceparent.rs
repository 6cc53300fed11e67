//! The trace context that Restate sends with each attempt, which the SDK does not read. A file to copy: [`serve`] takes the
//! place of the SDK's `HttpServer`.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::Service;
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::graceful::GracefulShutdown;
use restate_sdk::endpoint::Endpoint;
use restate_sdk::hyper::HyperEndpoint;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tracing_workflow_context::WorkflowContext;

/// Serves an endpoint until `stop` is ready, each attempt within the trace context of its request.
pub(crate) async fn serve(endpoint: Endpoint, listener: TcpListener, stop: impl Future) {
    let service = WithTraceparent(HyperEndpoint::new(endpoint));
    let connections = GracefulShutdown::new();
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut stop => break,
        };
        let Ok((stream, _)) = accepted else {
            sleep(Duration::from_millis(50)).await; // too many open files, for example
            continue;
        };
        let connection = http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service.clone());
        tokio::spawn(connections.watch(connection));
    }
    let _ = timeout(Duration::from_secs(10), connections.shutdown()).await;
}

#[derive(Clone)]
struct WithTraceparent<S>(S);

impl<S, B> Service<Request<Incoming>> for WithTraceparent<S>
where
    S: Service<Request<Incoming>, Response = Response<B>, Future: Send + 'static>,
{
    type Response = Response<Within<B>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let parent = parent(request.headers());
        let response = self.0.call(request);
        Box::pin(async move {
            let within = |body| Within {
                body: Box::pin(body),
                parent,
            };
            Ok(response.await?.map(within))
        })
    }
}

/// Returns the context of the headers; of malformed ones, none.
fn parent(headers: &HeaderMap) -> Option<opentelemetry::Context> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let context =
        WorkflowContext::parse(text("traceparent")?, text("tracestate").unwrap_or_default());
    Some(context.ok()?.to_otel())
}

/// A body, in whose polls the SDK runs the handler: `restate_sdk_endpoint_handle` is opened there.
pub(crate) struct Within<B> {
    body: Pin<Box<B>>,
    parent: Option<opentelemetry::Context>,
}

impl<B: Body> Body for Within<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let _current = self.parent.clone().map(|parent| parent.attach());
        self.body.as_mut().poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
