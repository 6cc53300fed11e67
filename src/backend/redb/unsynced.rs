//! The writes that no sync has reached yet, with [`RedbSync::Eventual`](super::RedbSync::Eventual): after a failure they are
//! made again in the file.

use std::collections::HashMap;

use redb::{Database, Durability};

use super::open::RECORDS;

/// From so many bytes on, a group of writes is synced at once: this is what a disk that takes no syncs can cost in memory.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// About what a key costs in the map, beside its bytes.
const ENTRY: usize = 64;

/// The values that have been written since the last sync, by key; `None` for those that were removed.
#[derive(Debug, Default)]
pub(super) struct Unsynced {
    values: HashMap<Box<[u8]>, Option<Box<[u8]>>>,
    bytes: usize,
}

/// The changes of one group of writes, in order.
pub(super) type Changes = Vec<(Box<[u8]>, Option<Box<[u8]>>)>;

impl Unsynced {
    pub(super) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes >= MAX_BYTES
    }

    pub(super) fn add(&mut self, changes: Changes) {
        for (key, value) in changes {
            let size = |value: &Option<Box<[u8]>>| value.as_ref().map_or(0, |value| value.len());
            self.bytes += ENTRY + key.len() + size(&value);
            let len = key.len();
            if let Some(before) = self.values.insert(key, value) {
                self.bytes -= ENTRY + len + size(&before);
            }
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Makes all of them again, in a file that may lack some. They stay here until a sync.
    pub(super) fn redo(&self, database: &Database) -> Result<(), redb::Error> {
        if self.is_empty() {
            return Ok(());
        }
        let mut transaction = database.begin_write()?;
        transaction.set_durability(Durability::None)?;
        let mut records = transaction.open_table(RECORDS)?;
        for (key, value) in &self.values {
            match value {
                Some(value) => drop(records.insert(&**key, &**value)?),
                None => drop(records.remove(&**key)?),
            }
        }
        drop(records);
        Ok(transaction.commit()?)
    }
}
