//! Derived ids: a workflow's trace id and the id of its own span, computed from what identifies it.
//!
//! Both are taken from the SHA-256 of this text of bytes, in which each part is preceded by its length as eight bytes,
//! little-endian: the text `tracing-workflow-context 1`, the namespace, the instance id, the run id (empty without one), and the
//! number of the trace among those of its run, as decimal digits. The trace id is the first 16 bytes of the digest, the span id
//! the next 8. An id of zeros alone, which is none, becomes one that ends in 1.

use opentelemetry::{SpanId, TraceId};
use sha2::{Digest as _, Sha256};

const VERSION: &str = "tracing-workflow-context 1";

/// Returns the derived ids of a trace of a workflow.
pub(super) fn ids(
    namespace: &str,
    instance_id: &str,
    run_id: Option<&str>,
    generation: u32,
) -> (TraceId, SpanId) {
    let mut hasher = Sha256::new();
    let generation = generation.to_string();
    let run_id = run_id.unwrap_or_default();
    for part in [VERSION, namespace, instance_id, run_id, &generation] {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let digest = hasher.finalize();
    let (mut trace_id, mut span_id) = ([0; 16], [0; 8]);
    trace_id.copy_from_slice(&digest[..16]);
    span_id.copy_from_slice(&digest[16..24]);
    // Of zeros alone is no id; one digest of 2^64 or 2^128 is.
    if trace_id == [0; 16] {
        trace_id[15] = 1;
    }
    if span_id == [0; 8] {
        span_id[7] = 1;
    }
    (TraceId::from_bytes(trace_id), SpanId::from_bytes(span_id))
}
