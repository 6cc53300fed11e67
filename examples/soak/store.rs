//! Any store by its name, and the switch that takes it away.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use tracing_workflow_context::backend::{
    BackendError, Record, StorageBackend, Write, WriteOutcome,
};
use tracing_workflow_context::{MemoryBackend, PostgresBackend, RedbBackend, RedisBackend};

use super::Result;

/// Opens the backend of a store.
pub(crate) fn open(store: &str) -> Result<Arc<dyn StorageBackend>> {
    Ok(match store.split_once("://") {
        _ if store == "memory" => Arc::new(MemoryBackend::new()),
        None => Arc::new(RedbBackend::open(store)?),
        Some(("redis", _)) => Arc::new(RedisBackend::connect(store)?),
        Some(_) => Arc::new(PostgresBackend::connect(store)?),
    })
}

/// One process at a time has a file.
pub(crate) fn is_file(store: &str) -> bool {
    store != "memory" && !store.contains("://")
}

/// A backend that is away at times.
#[derive(Clone, Debug)]
pub(crate) struct Switched {
    pub(crate) inner: Arc<dyn StorageBackend>,
    pub(crate) outage: Arc<AtomicU8>,
}

/// No outage; each call fails; each call hangs, then fails.
pub(crate) const NONE: u8 = 0;
pub(crate) const FAILS: u8 = 1;
pub(crate) const HANGS: u8 = 2;

impl Switched {
    fn or_fail<R>(
        &self,
        call: impl FnOnce() -> std::result::Result<R, BackendError>,
    ) -> std::result::Result<R, BackendError> {
        match self.outage.load(Relaxed) {
            NONE => return call(),
            HANGS => thread::sleep(Duration::from_millis(200)),
            _ => {}
        }
        Err(BackendError::new("an outage", None))
    }
}

impl StorageBackend for Switched {
    fn connect(&self) -> std::result::Result<(), BackendError> {
        self.inner.connect()
    }

    fn write(&self, writes: &[Write]) -> std::result::Result<Vec<WriteOutcome>, BackendError> {
        self.or_fail(|| self.inner.write(writes))
    }

    fn get(&self, key: &str) -> std::result::Result<Option<Record>, BackendError> {
        self.or_fail(|| self.inner.get(key))
    }

    fn get_many(&self, keys: &[String]) -> std::result::Result<Vec<Option<Record>>, BackendError> {
        self.or_fail(|| self.inner.get_many(keys))
    }

    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> std::result::Result<(), BackendError> {
        self.inner.scan(visit)
    }

    fn flush(&self) -> std::result::Result<(), BackendError> {
        self.or_fail(|| self.inner.flush())
    }

    fn malformed(&self) -> u64 {
        self.inner.malformed()
    }

    fn warms_up(&self) -> bool {
        self.inner.warms_up()
    }
}
