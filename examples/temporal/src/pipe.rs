//! The lines by which a process hands its spans over.

#[path = "../../support/pipe.rs"]
mod shared;

use opentelemetry_sdk::trace::SpanData;

use self::shared::line;
pub(crate) use self::shared::line::from_line;
pub(crate) use self::shared::{Exporter, KILL_ME, SPAN};

/// Stands between the name of a span and the workflow, and between that and its run.
pub const OF: char = '@';
pub const RUN: char = '#';

/// Returns the name of a span, with what tells it from others of that name: its attempt or part, its workflow and run.
pub(crate) fn name_of(span: &SpanData) -> String {
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
