//! How the engine's own spans come to know of the storage: it makes them by a tracer of the global provider, past
//! every `tracing` layer.

use opentelemetry::InstrumentationScope;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing_workflow_context::{WorkflowContextStorage, WorkflowTracer};

/// The SDK's tracer provider, each tracer of which is decorated by the storage.
pub(crate) struct WorkflowTracerProvider {
    pub(crate) inner: SdkTracerProvider,
    pub(crate) storage: WorkflowContextStorage,
}

impl TracerProvider for WorkflowTracerProvider {
    type Tracer = WorkflowTracer<SdkTracer>;

    fn tracer_with_scope(&self, scope: InstrumentationScope) -> Self::Tracer {
        self.storage.tracer(self.inner.tracer_with_scope(scope))
    }
}

#[cfg(test)]
mod tests {
    use dapr_durabletask::otel;
    use opentelemetry::trace::TraceContextExt;
    use opentelemetry::{Context, global};
    use opentelemetry_sdk::trace::InMemorySpanExporter;
    use tracing_workflow_context::Engine;
    use tracing_workflow_context::testing::TraceForest;

    use super::*;

    /// By the functions with which the engine opens its spans, so without a sidecar.
    #[test]
    fn engine_spans_name_their_instance_and_keep_their_parents() {
        let exporter = InMemorySpanExporter::default();
        let inner = SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .build();
        let storage = WorkflowContextStorage::builder()
            .engine(Engine::Dapr)
            .build()
            .unwrap();
        global::set_tracer_provider(WorkflowTracerProvider {
            inner,
            storage: storage.clone(),
        });
        let (nowhere, id) = (Context::new(), "order-42");

        let created = otel::start_create_orchestration_span(&nowhere, "order", id);
        let stored = storage
            .get(id)
            .unwrap()
            .expect("the first span is recorded");
        assert_eq!(stored.span_id(), created.span().span_context().span_id());

        let sent = otel::trace_context_from_span_context(created.span().span_context());
        let received = otel::context_from_trace_context(sent.as_ref());
        let turn = otel::start_orchestration_span(&received, "order", id);
        let good_parent = otel::start_activity_span(&turn, "charge_card", id, 0);
        let no_parent = otel::start_activity_span(&nowhere, "ship", id, 1);
        for cx in [no_parent, good_parent, turn, created] {
            otel::end_span(&cx);
        }

        let forest = TraceForest::from_spans(&exporter.get_finished_spans().unwrap());
        forest.assert_one_trace().assert_no_orphans();
        for (span, parent) in [
            ("orchestration||order", "create_orchestration||order"),
            ("activity||charge_card", "orchestration||order"),
            ("activity||ship", "create_orchestration||order"),
        ] {
            let found = forest.find(span).and_then(|span| forest.parent_of(span));
            assert_eq!(found, forest.find(parent), "{span} in\n\n{forest}");
        }
    }
}
