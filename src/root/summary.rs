//! The part of an explanation that tells of the workflow's own span.

use std::fmt;

use opentelemetry::SpanId;

use crate::fields::value::EndStatus;

/// A root as this process knows it.
#[derive(Clone, Debug)]
pub(crate) struct RootSummary {
    pub(super) name: String,
    pub(super) span_id: SpanId,
    /// The number of spans that have ended here.
    pub(super) spans: u64,
    /// The number of spans that are open here.
    pub(super) open: u32,
    pub(super) status: Option<EndStatus>,
    pub(super) is_closed: bool,
}

impl fmt::Display for RootSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            span_id,
            spans,
            open,
            status,
            is_closed,
        } = self;
        write!(f, "workflow span {name:?} {span_id}, ")?;
        match (status.map(EndStatus::as_str), *is_closed) {
            (None, true) => f.write_str("ended by another process")?,
            (Some(status), true) => write!(f, "ended as {status}")?,
            (Some(status), false) => write!(f, "ends as {status}")?,
            (None, false) => f.write_str(
                "open until its end is told by workflow.status, a span in completing_spans, complete or cleanup",
            )?,
        }
        write!(f, "; {spans} spans have ended here, {open} are open")
    }
}
