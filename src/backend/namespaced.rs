//! A backend that several tenants share: each finds only the keys of its own namespace.

use std::sync::Arc;

use super::{BackendError, Record, StorageBackend, Write, WriteOutcome, keys};

/// A backend, seen through a namespace that is part of every key.
#[derive(Debug)]
pub(crate) struct Namespaced {
    inner: Arc<dyn StorageBackend>,
    prefix: String,
}

impl Namespaced {
    /// Returns the backend itself if the namespace is empty.
    pub(crate) fn wrap(inner: Arc<dyn StorageBackend>, namespace: &str) -> Arc<dyn StorageBackend> {
        if namespace.is_empty() {
            return inner;
        }
        let prefix = keys::namespace_prefix(namespace);
        Arc::new(Self { inner, prefix })
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn within(&self, write: &Write) -> Write {
        let key = self.key(write.key());
        match write {
            Write::PutIfAbsent(_, record) => Write::PutIfAbsent(key, record.clone()),
            Write::Put(_, record) => Write::Put(key, record.clone()),
            Write::Expire(_, expiry) => Write::Expire(key, *expiry),
            Write::Remove(_) => Write::Remove(key),
        }
    }
}

impl StorageBackend for Namespaced {
    fn connect(&self) -> Result<(), BackendError> {
        self.inner.connect()
    }

    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        let writes: Vec<_> = writes.iter().map(|write| self.within(write)).collect();
        self.inner.write(&writes)
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        self.inner.get(&self.key(key))
    }

    fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Record>>, BackendError> {
        let keys: Vec<_> = keys.iter().map(|key| self.key(key)).collect();
        self.inner.get_many(&keys)
    }

    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        self.inner.scan(&mut |key, record| {
            if let Some(key) = key.strip_prefix(&self.prefix) {
                visit(key, record);
            }
        })
    }

    fn flush(&self) -> Result<(), BackendError> {
        self.inner.flush()
    }

    fn malformed(&self) -> u64 {
        self.inner.malformed()
    }

    fn expired_at_open(&self) -> u64 {
        self.inner.expired_at_open()
    }

    fn warms_up(&self) -> bool {
        self.inner.warms_up()
    }
}
