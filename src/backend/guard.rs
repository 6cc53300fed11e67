//! Guarded calls of a backend: a panic becomes an error, and each failure is counted and logged.

use std::sync::Arc;

use crate::backend::{BackendError, StorageBackend};
use crate::caught::caught;
use crate::stats::Counter;
use crate::warnings::Warnings;

/// A backend whose methods may panic, though they must not.
#[derive(Clone)]
pub(super) struct Guarded {
    backend: Arc<dyn StorageBackend>,
    failures: Arc<Counter>,
    warnings: Arc<Warnings>,
}

impl Guarded {
    pub(super) fn new(backend: Arc<dyn StorageBackend>, warnings: Arc<Warnings>) -> Self {
        Self {
            backend,
            failures: Arc::default(),
            warnings,
        }
    }

    pub(super) fn call<R>(
        &self,
        call: impl FnOnce(&dyn StorageBackend) -> Result<R, BackendError>,
    ) -> Result<R, BackendError> {
        let result = caught(|| call(&*self.backend))
            .unwrap_or_else(|| Err(BackendError::new("the backend panicked", None)));
        if let Err(error) = &result {
            self.report(error);
        }
        result
    }

    /// Counts and logs a failure. [`call`](Self::call) does so for the error it returns.
    pub(super) fn report(&self, error: &BackendError) {
        self.failures.add();
        self.warnings.backend_failed(error);
    }

    pub(super) fn failures(&self) -> u64 {
        self.failures.get()
    }

    pub(super) fn expired_at_open(&self) -> u64 {
        self.backend.expired_at_open()
    }

    pub(super) fn malformed(&self) -> u64 {
        self.backend.malformed()
    }
}
