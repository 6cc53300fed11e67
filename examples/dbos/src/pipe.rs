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

/// The worker waits to be killed.
pub const KILL_ME: &str = "kill me";

/// Prints each span as it ends; `println!` leaves nothing in a buffer that a kill could take away.
#[derive(Debug)]
pub struct Exporter;

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        for span in &batch {
            println!("{SPAN}{}", line::to_line(span, &name_of(span)));
        }
        Ok(())
    }
}

/// Returns the name of a span, which goes on with the id of the workflow, or the name of the step.
fn name_of(span: &SpanData) -> String {
    let more = line::value(span, "workflow_id").or_else(|| line::value(span, "step_name"));
    more.map_or_else(
        || span.name.to_string(),
        |more| format!("{} {more}", span.name),
    )
}
