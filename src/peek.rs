//! The current span's context, for loggers: read without starting the span.

use opentelemetry::Context;

use crate::context::WorkflowContext;
use crate::tracer::handoff;

impl WorkflowContext {
    /// Returns the context of the current span, as [`current`](Self::current) does, but never starts one: a span that is held
    /// until its instance is known stays held, and has no context yet. For log formatters and propagators that run on every
    /// event.
    ///
    /// Needs context activation, which is on by default: the current OpenTelemetry context is read, and the spans of
    /// `tracing` are in it only with that. `None` in a held span, and if there is no valid span.
    ///
    /// # Examples
    ///
    /// ```
    /// use tracing_workflow_context::WorkflowContext;
    ///
    /// assert_eq!(WorkflowContext::peek(), None);
    /// ```
    pub fn peek() -> Option<Self> {
        if handoff::is_any_held() && handoff::is_innermost_held(tracing::Span::current().id()) {
            return None;
        }
        Context::map_current(Self::from_context)
    }
}
