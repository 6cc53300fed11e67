//! What a process tells the one that started it, a line each; lines that open with none of these words are for the user.
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

/// Stands between the name of a span and the workflow, and between that and its run.
pub const OF: char = '@';
pub const RUN: char = '#';

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

/// Returns the name of a span, with what tells it from others of that name: its attempt or part, its workflow and run.
fn name_of(span: &SpanData) -> String {
    let value = |names: [&str; 2]| names.iter().find_map(|name| line::value(span, name));
    let mut name = span.name.to_string();
    if let Some(number) = value(["attempt", "part"]) {
        name += &format!("({number})");
    }
    if let Some(run) = value(["workflow.run_id", "temporalRunID"]) {
        let id = value(["workflow.instance_id", "temporalWorkflowID"]).unwrap_or_default();
        name += &format!("{OF}{id}{RUN}{run}");
    }
    name
}
