//! Long walks through a backend, on the thread of who walks.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::SyncSender;

use super::guard::Guarded;
use crate::backend::{BackendError, Record};

/// A backend that can be walked through while the client lives on, or not: a client that is dropped waits for the walk to
/// end, as it does for its threads, so that nothing uses the backend after it.
pub(crate) struct Scanner {
    pub(super) backend: Guarded,
    pub(super) is_closing: Arc<AtomicBool>,
    /// Dropped as the last thing.
    pub(super) _alive: SyncSender<Infallible>,
}

impl Scanner {
    /// Visits all records.
    pub(crate) fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        self.backend.call(|backend| backend.scan(visit))
    }

    /// Returns the record of a key. Waits as long as the backend does.
    pub(crate) fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        self.backend.call(|backend| backend.get(key))
    }

    /// Returns the records of several keys. Waits as long as the backend does.
    pub(crate) fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Record>>, BackendError> {
        let mut found = self.backend.call(|backend| backend.get_many(keys))?;
        // One that is missing counts as nothing.
        found.resize(keys.len(), None);
        Ok(found)
    }

    /// Returns `true` if the client waits for this.
    pub(crate) fn is_closing(&self) -> bool {
        self.is_closing.load(Relaxed)
    }
}
