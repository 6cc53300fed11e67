//! What a process tells the one that started it, a line each; lines that open with none of these words are for the user.
//!
//! A worker that is killed cannot be asked for its spans afterwards, so each of them leaves when it ends.

#[path = "line.rs"]
pub(crate) mod line;

use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

/// Opens the line of a finished span.
pub(crate) const SPAN: &str = "span:";

/// The worker waits to be killed.
pub(crate) const KILL_ME: &str = "kill me";

/// Prints each span as it ends, by the name that a function gives it; `println!` leaves nothing in a buffer that a kill
/// could take away.
#[derive(Debug)]
pub(crate) struct Exporter(pub(crate) fn(&SpanData) -> String);

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        for span in &batch {
            println!("{SPAN}{}", line::to_line(span, &(self.0)(span)));
        }
        Ok(())
    }
}
