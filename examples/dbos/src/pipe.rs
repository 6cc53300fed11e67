//! What a worker process tells its parent, a line each; lines that open with none of these words are for the user.
//!
//! A worker that is killed cannot be asked for its spans afterwards, so each of them leaves when it ends.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::InstrumentationScope;
use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter, SpanLinks};

use crate::Result;

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
            println!("{SPAN}{}", to_line(span));
        }
        Ok(())
    }
}

/// What the comparison needs of a span: its name goes on with the id of the workflow, or the name of the step.
fn to_line(span: &SpanData) -> String {
    let more = |key: &str| {
        let mut attributes = span.attributes.iter();
        attributes.find(|attribute| attribute.key.as_str() == key)
    };
    let more = more("workflow_id").or_else(|| more("step_name"));
    let more = more.map_or_else(String::new, |more| format!(" {}", more.value));
    let error = match &span.status {
        Status::Error { description } => description,
        _ => "",
    };
    [
        &*span.span_context.trace_id().to_string(),
        &*span.span_context.span_id().to_string(),
        &*span.parent_span_id.to_string(),
        &*since_epoch(span.start_time).to_string(),
        &*since_epoch(span.end_time).to_string(),
        error,
        &*format!("{}{more}", span.name),
    ]
    .join("\t")
}

pub fn from_line(line: &str) -> Result<SpanData> {
    let fields: Vec<_> = line.split('\t').collect();
    let [trace, span, parent, start, end, error, name] = fields[..] else {
        return Err(format!("not a span: {line}").into());
    };
    Ok(SpanData {
        span_context: SpanContext::new(
            TraceId::from_hex(trace)?,
            SpanId::from_hex(span)?,
            TraceFlags::SAMPLED, // only what was sampled is exported
            false,
            TraceState::NONE,
        ),
        parent_span_id: SpanId::from_hex(parent)?,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.to_owned().into(),
        start_time: UNIX_EPOCH + Duration::from_nanos(start.parse()?),
        end_time: UNIX_EPOCH + Duration::from_nanos(end.parse()?),
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: match error {
            "" => Status::Unset,
            error => Status::error(error.to_owned()),
        },
        instrumentation_scope: InstrumentationScope::default(),
    })
}

fn since_epoch(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos()
}
