//! The lines by which a worker process hands its spans over.

#[path = "../../support/pipe.rs"]
mod shared;

use opentelemetry_sdk::trace::SpanData;

use self::shared::line;
pub(crate) use self::shared::line::from_line;
pub(crate) use self::shared::{Exporter, KILL_ME, SPAN};

/// Returns the name of a span, which goes on with the id of the workflow, or the name of the step.
pub(crate) fn name_of(span: &SpanData) -> String {
    let more = line::value(span, "workflow_id").or_else(|| line::value(span, "step_name"));
    more.map_or_else(
        || span.name.to_string(),
        |more| format!("{} {more}", span.name),
    )
}
