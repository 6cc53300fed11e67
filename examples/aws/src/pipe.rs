//! The lines by which a function's process hands its spans over.

#[path = "../../support/pipe.rs"]
#[expect(
    dead_code,
    reason = "no process wants to be killed at a certain moment"
)]
mod shared;

use opentelemetry_sdk::trace::SpanData;

use self::shared::line;
pub(crate) use self::shared::line::from_line;
pub(crate) use self::shared::{Exporter, SPAN};

/// Opens the line that tells the id of a callback.
pub(crate) const CALLBACK: &str = "callback:";

/// Stands between the name of an engine's span and the execution.
pub(crate) const OF: char = '@';

/// Returns the name of a span, with what tells it from others of that name: its execution, or its order and attempt.
pub(crate) fn name_of(span: &SpanData) -> String {
    let mut name = span.name.to_string();
    if let Some(arn) = line::value(span, "executionArn") {
        name += &format!("{OF}{arn}");
    }
    if let Some(order) = line::value(span, "order") {
        name += &format!(" {order}");
    }
    if let Some(attempt) = line::value(span, "attempt").filter(|_| !name.contains(OF)) {
        name += &format!(" ({attempt})");
    }
    name
}
