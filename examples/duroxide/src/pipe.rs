//! What a worker process tells its parent, a line each; lines that open with none of these words are for the user.
//!
//! A worker that is killed cannot be asked for its spans afterwards, so each of them leaves when it ends.

#[path = "../../support/line.rs"]
mod line;

use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

pub(crate) use self::line::from_line;

/// Opens the line of a finished span.
pub const SPAN: &str = "span:";

/// Opens the line with the number of replayed spans so far.
pub const REPLAYED: &str = "replayed:";

/// The worker waits to be killed.
pub const KILL_ME: &str = "kill me";

/// Prints each span as it ends; `println!` leaves nothing in a buffer that a kill could take away.
#[derive(Debug)]
pub struct Exporter;

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        for span in &batch {
            println!("{SPAN}{}", line::to_line(span, &span.name));
        }
        Ok(())
    }
}
