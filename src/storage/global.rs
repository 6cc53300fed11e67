//! The process-wide default storage, and the free functions that use it.

use std::sync::OnceLock;

use crate::context::WorkflowContext;
use crate::error::StorageError;
use crate::stats::Stats;
use crate::storage::WorkflowContextStorage;

impl WorkflowContextStorage {
    /// Returns the process-wide default storage, in memory. It is created on the first use and lives as long as the
    /// process.
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

/// Calls [`store`](WorkflowContextStorage::store) on the [process-wide default](WorkflowContextStorage::global).
///
/// # Errors
///
/// [`StorageError::InvalidInstanceId`] if the id is empty or too long.
pub fn store_workflow_context(
    instance_id: &str,
    context: WorkflowContext,
) -> Result<(), StorageError> {
    WorkflowContextStorage::global().store(instance_id, context)
}

/// Calls [`get`](WorkflowContextStorage::get) on the [process-wide default](WorkflowContextStorage::global).
///
/// # Errors
///
/// [`StorageError::InvalidInstanceId`] if the id is empty or too long.
pub fn get_workflow_context(instance_id: &str) -> Result<Option<WorkflowContext>, StorageError> {
    WorkflowContextStorage::global().get(instance_id)
}

/// Calls [`cleanup`](WorkflowContextStorage::cleanup) on the [process-wide default](WorkflowContextStorage::global).
///
/// # Errors
///
/// [`StorageError::InvalidInstanceId`] if the id is empty or too long.
pub fn cleanup_workflow_context(instance_id: &str) -> Result<bool, StorageError> {
    WorkflowContextStorage::global().cleanup(instance_id)
}

/// Calls [`stats`](WorkflowContextStorage::stats) on the [process-wide default](WorkflowContextStorage::global).
#[must_use]
pub fn get_context_storage_stats() -> Stats {
    WorkflowContextStorage::global().stats()
}
