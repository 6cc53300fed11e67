//! The backend in memory.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;

use crate::backend::{BackendError, Record, StorageBackend, Write, WriteOutcome};
use crate::clock::{Clock, SystemClock};

/// A backend in the memory of this process, which several storages can share. Clones share their records.
///
/// Its records are lost with the last clone, and are bounded by their expiry alone. A single storage does not need it,
/// since it has a bounded cache of its own.
///
/// Locks one shard of a [`DashMap`] at a time, and none while code of the caller runs.
#[derive(Clone)]
pub struct MemoryBackend(Arc<Shared>);

struct Shared {
    records: DashMap<String, Record, foldhash::fast::RandomState>,
    clock: Arc<dyn Clock>,
    /// The number of records at which expired ones are removed.
    sweep_at: AtomicUsize,
}

const SMALLEST_SWEEP: usize = 1024;

impl Default for MemoryBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryBackend {
    /// Creates an empty backend that uses the operating system's clock.
    #[must_use]
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock))
    }

    /// Creates an empty backend that uses this clock; for tests.
    #[must_use]
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        Self(Arc::new(Shared {
            records: DashMap::default(),
            clock,
            sweep_at: AtomicUsize::new(SMALLEST_SWEEP),
        }))
    }

    fn write_one(&self, write: &Write) -> WriteOutcome {
        let now = self.0.clock.now();
        let records = &self.0.records;
        match write {
            Write::Put(key, record) => drop(records.insert(key.clone(), record.clone())),
            Write::Remove(key) => drop(records.remove(key)),
            Write::Expire(key, at) => {
                if let Some(mut record) = records.get_mut(key).filter(|r| r.expires_at > now) {
                    record.expires_at = *at;
                }
            }
            Write::PutIfAbsent(key, record) => match records.entry(key.clone()) {
                Entry::Occupied(there) if there.get().expires_at > now => {
                    return WriteOutcome::Existing(there.get().clone());
                }
                Entry::Occupied(mut expired) => drop(expired.insert(record.clone())),
                Entry::Vacant(vacant) => drop(vacant.insert(record.clone())),
            },
        }
        WriteOutcome::Done
    }

    /// Removes expired records, each time that the number of records has doubled since the last time.
    fn sweep(&self) {
        let Shared {
            records,
            clock,
            sweep_at,
        } = &*self.0;
        if records.len() < sweep_at.load(Relaxed) {
            return;
        }
        let now = clock.now();
        records.retain(|_, record| record.expires_at > now);
        sweep_at.store((records.len() * 2).max(SMALLEST_SWEEP), Relaxed);
    }
}

impl StorageBackend for MemoryBackend {
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        let outcomes = writes.iter().map(|write| self.write_one(write)).collect();
        self.sweep();
        Ok(outcomes)
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        let now = self.0.clock.now();
        let found = self.0.records.get(key).map(|record| record.clone());
        Ok(found.filter(|record| record.expires_at > now))
    }

    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        let now = self.0.clock.now();
        let keys: Vec<String> = self
            .0
            .records
            .iter()
            .map(|entry| entry.key().clone())
            .collect();
        for key in keys {
            let record = self.0.records.get(&key).map(|record| record.clone());
            if let Some(record) = record.filter(|record| record.expires_at > now) {
                visit(&key, record);
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

impl fmt::Debug for MemoryBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBackend")
            .field("records", &self.0.records.len())
            .finish_non_exhaustive()
    }
}
