//! Finished spans on their way from the workers to the driver: a line of JSON each, written as the span ends, so that
//! those which ended before a kill are there after it.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{
    Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter, SpanLinks};
use serde::{Deserialize, Serialize};

use crate::Result;

pub(crate) fn file(directory: &Path, worker: u32) -> PathBuf {
    directory.join(format!("spans-of-worker-{worker}.jsonl"))
}

#[derive(Debug)]
pub(crate) struct FileExporter(File);

impl FileExporter {
    pub(crate) fn create(file: &Path) -> Result<Self> {
        Ok(Self(File::create(file)?))
    }
}

impl SpanExporter for FileExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        for span in batch {
            let failed = |error: String| OTelSdkError::InternalFailure(error);
            let mut line =
                serde_json::to_vec(&Line::from(span)).map_err(|e| failed(e.to_string()))?;
            line.push(b'\n');
            // One write, with no buffer in this process that a kill could take away.
            (&self.0)
                .write_all(&line)
                .map_err(|e| failed(e.to_string()))?;
        }
        Ok(())
    }
}

pub(crate) fn read(file: &Path) -> Result<Vec<SpanData>> {
    fs::read_to_string(file)?
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n')) // else it is just being written
        .map(|line| serde_json::from_str::<Line>(line)?.try_into())
        .collect()
}

/// What the forest needs of a span. Values become text; events, kind and status stay behind.
#[derive(Serialize, Deserialize)]
struct Line {
    name: String,
    ids: Ids,
    parent_span_id: String,
    parent_is_remote: bool,
    start: Duration,
    end: Duration,
    attributes: Attributes,
    links: Vec<(Ids, Attributes)>,
}

/// Trace id, span id.
type Ids = (String, String);
type Attributes = Vec<(String, String)>;

impl From<SpanData> for Line {
    fn from(span: SpanData) -> Self {
        Self {
            name: span.name.into_owned(),
            ids: to_ids(&span.span_context),
            parent_span_id: span.parent_span_id.to_string(),
            parent_is_remote: span.parent_span_is_remote,
            start: since_epoch(span.start_time),
            end: since_epoch(span.end_time),
            attributes: to_text(&span.attributes),
            links: span
                .links
                .iter()
                .map(|link| (to_ids(&link.span_context), to_text(&link.attributes)))
                .collect(),
        }
    }
}

impl TryFrom<Line> for SpanData {
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn try_from(line: Line) -> Result<Self> {
        let mut links = SpanLinks::default();
        for (ids, attributes) in line.links {
            let link = Link::new(from_ids(&ids)?, from_text(attributes), 0);
            links.links.push(link);
        }
        Ok(Self {
            span_context: from_ids(&line.ids)?,
            parent_span_id: SpanId::from_hex(&line.parent_span_id)?,
            parent_span_is_remote: line.parent_is_remote,
            span_kind: SpanKind::Internal,
            name: line.name.into(),
            start_time: UNIX_EPOCH + line.start,
            end_time: UNIX_EPOCH + line.end,
            attributes: from_text(line.attributes),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::default(),
        })
    }
}

fn to_ids(context: &SpanContext) -> Ids {
    let (trace_id, span_id) = (context.trace_id(), context.span_id());
    (trace_id.to_string(), span_id.to_string())
}

fn from_ids((trace_id, span_id): &Ids) -> Result<SpanContext> {
    Ok(SpanContext::new(
        TraceId::from_hex(trace_id)?,
        SpanId::from_hex(span_id)?,
        TraceFlags::SAMPLED, // only what was sampled is exported
        false,
        TraceState::NONE,
    ))
}

fn to_text(attributes: &[KeyValue]) -> Attributes {
    let pairs = attributes.iter();
    pairs
        .map(|pair| (pair.key.to_string(), pair.value.to_string()))
        .collect()
}

fn from_text(attributes: Attributes) -> Vec<KeyValue> {
    let pairs = attributes.into_iter();
    pairs
        .map(|(key, value)| KeyValue::new(key, value))
        .collect()
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}
