//! Direct writes to a backend.

use tracing_workflow_context::WorkflowContext;
use tracing_workflow_context::backend::{
    BackendError, Record, StorageBackend, Write, WriteOutcome,
};

use super::{at_once, record_of};

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

/// Lets four threads claim a key at once, each with a context of its own, and asserts that one of them wins and that all
/// have its context then. `write` carries out the claim of a thread.
pub(crate) fn assert_one_of_four_wins(
    key: &str,
    write: impl Fn(usize, &[Write]) -> Result<Vec<WriteOutcome>, BackendError> + Sync,
) {
    let winners = at_once(4, |thread| {
        let span = thread + 1;
        let mine = record(&format!(
            "00-0af7651916cd43dd8448eb211c80319c-{span:016x}-01"
        ));
        let outcome = write(thread, &[claim(key, &mine)]).unwrap().remove(0);
        let found = outcome.existing();
        (found.is_none(), found.unwrap_or(&mine).context.span_id())
    });
    assert_eq!(
        winners.iter().filter(|(won, _)| *won).count(),
        1,
        "{winners:?}"
    );
    assert!(
        winners.iter().all(|(_, span)| *span == winners[0].1),
        "{winners:?}"
    );
}
