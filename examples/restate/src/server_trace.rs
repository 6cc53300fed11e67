//! The second mode: the server exports its own spans, and the order, from the client's span on, belongs into one trace with them.

use std::collections::HashSet;
use std::path::Path;

use opentelemetry::trace::{Span as _, SpanId, Tracer as _, TracerProvider as _};
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData};
use tracing_workflow_context::WorkflowContext;
use tracing_workflow_context::testing::TraceForest;

use crate::driver::{Server, one_order, summary};
use crate::receiver::Receiver;
use crate::worker::Layer;
use crate::{Result, spans};

/// Its handler, and the steps that it runs.
const OF_THE_USER: [&str; 4] = ["order", "reserve_stock", "charge_card", "ship"];

/// The exported spans of one order.
struct Order {
    client: Vec<SpanData>,
    workers: Vec<SpanData>,
}

pub(crate) async fn compare(server: &Path, directory: &Path) -> Result<()> {
    let receiver = Receiver::start().await?;
    let server = Server::start(server, directory, Some(&receiver.url)).await?;
    let plain = place_order(&server, Layer::Plain, directory).await?;
    let header = place_order(&server, Layer::PlainInServerTrace, directory).await?;
    let ours = place_order(&server, Layer::ServerTrace, directory).await?;
    server.stop().await?;
    let of_server = receiver.spans();

    let plain = plain.forest(&of_server);
    println!("With the plain OpenTelemetry layer, and the server's spans:\n\n{plain}\n");
    let header = header.forest(&of_server);
    println!("The same with the server's traceparent:\n\n{header}\n");
    let forest = ours.forest(&of_server);
    println!("With the server's traceparent and tracing-workflow-context:\n\n{forest}\n");
    println!(
        "plain: {} / plain with the server's traceparent: {} / with tracing-workflow-context: {}",
        with_repeats(&plain),
        with_repeats(&header),
        with_repeats(&forest)
    );
    ours.check(&forest, &of_server)
}

async fn place_order(server: &Server, layer: Layer, directory: &Path) -> Result<Order> {
    let exported = directory.join(format!("spans-of-client-{}.jsonl", layer.name()));
    let provider = SdkTracerProvider::builder()
        .with_simple_exporter(spans::FileExporter::create(&exported)?)
        .build();
    let mut span = provider.tracer("client").start("place order");
    let traceparent = WorkflowContext::try_from(span.span_context())?.traceparent();
    let workers = one_order(server, layer, directory, Some(traceparent)).await?;
    span.end();
    let client = spans::read(&exported)?;
    Ok(Order { client, workers })
}

impl Order {
    /// All spans of the order: the client's, those of the server in the same trace, and the workers'.
    fn forest(&self, of_server: &[SpanData]) -> TraceForest {
        let of_order = self.of_order(of_server);
        TraceForest::from_spans(&[&*self.client, &*of_order, &*self.workers].concat())
    }

    fn of_order(&self, of_server: &[SpanData]) -> Vec<SpanData> {
        let trace_id = self.client[0].span_context.trace_id();
        let of_order = |span: &&SpanData| span.span_context.trace_id() == trace_id;
        of_server.iter().filter(of_order).cloned().collect()
    }

    fn check(&self, forest: &TraceForest, of_server: &[SpanData]) -> Result<()> {
        if forest.trace_count() != 1 {
            return Err(format!("one order, {} traces", forest.trace_count()).into());
        }
        let counts = forest.count_by_name();
        for name in OF_THE_USER {
            match counts.get(name) {
                Some(1) => {}
                count => return Err(format!("{name} was exported {count:?} times").into()),
            }
        }
        let is_root = |span: &&SpanData| span.parent_span_id == SpanId::INVALID;
        let roots: Vec<_> = forest.spans().filter(is_root).collect();
        if roots.len() != 1 || roots[0].name != "place order" {
            return Err("the client's span is not the only root".into());
        }
        if let Some(span) = forest.spans().find(|span| is_orphan(forest, span)) {
            return Err(format!("{} has a parent that was not exported", span.name).into());
        }
        let of_order = self.of_order(of_server);
        let ids: HashSet<_> = of_order
            .iter()
            .map(|span| span.span_context.span_id())
            .collect();
        let mut attempts = self
            .workers
            .iter()
            .filter(|span| span.name == "restate_sdk_endpoint_handle")
            .peekable();
        if attempts.peek().is_none() {
            return Err("no attempt was exported".into());
        }
        match attempts.find(|attempt| !ids.contains(&attempt.parent_span_id)) {
            Some(_) => Err("an attempt is not a child of a span of the server".into()),
            None => Ok(()),
        }
    }
}

/// Adds the number of spans of the user that were exported again, and of those whose parent never was.
fn with_repeats(forest: &TraceForest) -> String {
    let counts = forest.count_by_name();
    let of_user = OF_THE_USER.iter().filter_map(|&name| counts.get(name));
    let repeats: usize = of_user.map(|count| count.saturating_sub(1)).sum();
    let lost = forest.spans().filter(|span| is_orphan(forest, span));
    format!(
        "{}, {repeats} repeats, {} without their parent",
        summary(forest),
        lost.count()
    )
}

fn is_orphan(forest: &TraceForest, span: &SpanData) -> bool {
    span.parent_span_id != SpanId::INVALID && forest.parent_of(span).is_none()
}
