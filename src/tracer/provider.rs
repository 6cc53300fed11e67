//! The tracer provider that decorates another one: each of its tracers is a [`WorkflowTracer`], which can be cloned.

use std::fmt;
use std::sync::Arc;

use opentelemetry::InstrumentationScope;
use opentelemetry::trace::{Tracer, TracerProvider};

use super::WorkflowTracer;
use crate::storage::shared::Shared;

/// A tracer provider whose tracers start the spans of a workflow instance in the instance's trace.
///
/// It decorates any other one, and is made by [`WorkflowContextStorage::tracer_provider`].
///
/// [`WorkflowContextStorage::tracer_provider`]: crate::WorkflowContextStorage::tracer_provider
#[derive(Clone)]
pub struct WorkflowTracerProvider<P> {
    inner: P,
    shared: Arc<Shared>,
}

impl<P> WorkflowTracerProvider<P> {
    pub(crate) fn new(inner: P, shared: Arc<Shared>) -> Self {
        Self { inner, shared }
    }
}

impl<P> TracerProvider for WorkflowTracerProvider<P>
where
    P: TracerProvider,
    P::Tracer: Send + Sync + 'static,
    <P::Tracer as Tracer>::Span: Send + Sync + 'static,
{
    type Tracer = WorkflowTracer<P::Tracer>;

    fn tracer_with_scope(&self, scope: InstrumentationScope) -> Self::Tracer {
        let tracer = self.inner.tracer_with_scope(scope);
        WorkflowTracer::for_api(self.shared.share_tracer(tracer), self.shared.clone())
    }
}

/// The clone starts spans through the same inner tracer, so `T` need not be `Clone`.
impl<T> Clone for WorkflowTracer<T> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            shared: self.shared.clone(),
            origin: self.origin,
        }
    }
}

impl<P: fmt::Debug> fmt::Debug for WorkflowTracerProvider<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkflowTracerProvider")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}
