//! Direct writes to a backend.

use tracing_workflow_context::WorkflowContext;
use tracing_workflow_context::backend::{
    BackendError, Record, StorageBackend, Write, WriteOutcome,
};

use super::record_of;

pub(crate) const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// Creates a record that expires in an hour.
pub(crate) fn record(traceparent: &str) -> Record {
    let context = WorkflowContext::parse(traceparent, "").expect("well formed");
    record_of(context)
}

/// Writes as a backend without parts does: if any write failed, all of it did.
pub(crate) trait WriteAll {
    fn write_all(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError>;
}

impl<B: StorageBackend> WriteAll for B {
    fn write_all(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        let outcomes = self.write(writes)?;
        let failure = outcomes.iter().find_map(|outcome| match outcome {
            WriteOutcome::Failed(error) => Some(error.clone()),
            _ => None,
        });
        failure.map_or(Ok(outcomes), Err)
    }
}

pub(crate) fn claim(key: &str, record: &Record) -> Write {
    Write::PutIfAbsent(key.to_owned(), record.clone())
}
