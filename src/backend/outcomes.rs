//! The outcomes of a group of writes of which some have failed.

use std::collections::HashMap;

use crate::backend::{BackendError, Write, WriteOutcome};

/// Fails the writes that follow a failed one on its key, as the contract of [`WriteOutcome::Failed`] demands, and marks
/// all failures as partial.
pub(super) fn fail_later_writes(writes: &[Write], outcomes: &mut [WriteOutcome]) {
    let mut failed: HashMap<&str, BackendError> = HashMap::new();
    for (write, outcome) in writes.iter().zip(outcomes) {
        if let WriteOutcome::Failed(error) = outcome {
            let error = error.clone().partial();
            failed.entry(write.key()).or_insert(error);
        }
        if let Some(error) = failed.get(write.key()) {
            *outcome = WriteOutcome::Failed(error.clone());
        }
    }
}
