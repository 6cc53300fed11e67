//! The lines by which a worker process hands its spans over, and one more of its own.

#[path = "../../support/pipe.rs"]
mod shared;

use opentelemetry_sdk::trace::SpanData;

pub(crate) use self::shared::line::from_line;
pub(crate) use self::shared::{Exporter, KILL_ME, SPAN};

/// Opens the line with the number of replayed spans so far.
pub const REPLAYED: &str = "replayed:";

pub(crate) fn name_of(span: &SpanData) -> String {
    span.name.to_string()
}
