//! The process-wide default, and the free functions over it.

use std::sync::OnceLock;

use crate::context::WorkflowContext;
use crate::error::StorageError;
use crate::stats::Stats;
use crate::storage::WorkflowContextStorage;

impl WorkflowContextStorage {
    /// The storage that this process shares by default, in memory. It is made on the first use and lives as
    /// long as the process.
    ///
    /// ```
    /// use tracing_workflow_context::{WorkflowContextStorage, get_workflow_context};
    ///
    /// assert_eq!(get_workflow_context("never-seen")?, None);
    /// assert_eq!(WorkflowContextStorage::global().stats().misses, 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn global() -> &'static Self {
        static GLOBAL: OnceLock<WorkflowContextStorage> = OnceLock::new();
        GLOBAL.get_or_init(Self::new)
    }
}

/// [`store`](WorkflowContextStorage::store) in the [process-wide default](WorkflowContextStorage::global).
///
/// # Errors
///
/// Where the id is empty or too long.
pub fn store_workflow_context(
    instance_id: &str,
    context: WorkflowContext,
) -> Result<(), StorageError> {
    WorkflowContextStorage::global().store(instance_id, context)
}

/// [`get`](WorkflowContextStorage::get) from the [process-wide default](WorkflowContextStorage::global).
///
/// # Errors
///
/// Where the id is empty or too long.
pub fn get_workflow_context(instance_id: &str) -> Result<Option<WorkflowContext>, StorageError> {
    WorkflowContextStorage::global().get(instance_id)
}

/// [`cleanup`](WorkflowContextStorage::cleanup) in the [process-wide default](WorkflowContextStorage::global).
///
/// # Errors
///
/// Where the id is empty or too long.
pub fn cleanup_workflow_context(instance_id: &str) -> Result<bool, StorageError> {
    WorkflowContextStorage::global().cleanup(instance_id)
}

/// [`stats`](WorkflowContextStorage::stats) of the [process-wide default](WorkflowContextStorage::global).
#[must_use]
pub fn get_context_storage_stats() -> Stats {
    WorkflowContextStorage::global().stats()
}
