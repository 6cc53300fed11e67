//! Where contexts are kept: the contract of a backend.

use std::fmt;
use std::time::SystemTime;

use crate::context::WorkflowContext;
use crate::error::BackendError;

/// Where contexts are kept beyond memory: a file, a server. Users can write their own.
///
/// The storage asks memory first, and its backend on a miss; it calls a backend from threads of its own, so that a
/// span waits for it no longer than the lookup budget.
///
/// # Contract
///
/// A backend is a map from keys to [`Record`]s. A key is not empty and shorter than 4 KiB; any text is possible.
///
/// *Atomic* is each write on one key: concurrent writes behave as if they came one after the other. The writes of
/// one [`write`](Self::write) need not be atomic together, but happen in their order for each key.
///
/// *Lost* may be, when the process or its machine dies, what was written and not flushed since. A flushed write is
/// lost only as the backend documents.
///
/// A record is gone when its `expires_at` is past: `get` and `scan` must not show it any more, and its space is
/// to be freed.
///
/// Where a backend has parts that fail on their own, such as the servers of a cluster, its errors say
/// [`in_part`](BackendError::in_part): without that, a part that is away holds up everything.
///
/// Methods may block, take their time and fail; they must not panic, and must not call back into the storage that
/// uses them. `testing::check_backend` (feature `testing`) holds a backend to all of this.
pub trait StorageBackend: fmt::Debug + Send + Sync + 'static {
    /// Carries out writes in their order, as one group where that is cheaper, and answers for each
    /// [`PutIfAbsent`](Write::PutIfAbsent) that found a record the winner, and `None` for everything else.
    ///
    /// # Errors
    ///
    /// Where the backend failed. Which of the writes were carried out is then unknown, unless
    /// [`in_part`](BackendError::in_part) tells; the others will be tried again.
    fn write(&self, writes: &[Write]) -> Result<Vec<Option<Record>>, BackendError>;

    /// The record of a key. One that cannot be decoded is none, and counted by [`malformed`](Self::malformed).
    ///
    /// # Errors
    ///
    /// Where the backend failed.
    fn get(&self, key: &str) -> Result<Option<Record>, BackendError>;

    /// Shows once every record that is there during the whole scan, in no order. Holds no lock while `visit` runs.
    ///
    /// # Errors
    ///
    /// Where the backend failed; what was visited by then stands.
    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError>;

    /// Returns when everything that was written before is as durable as the backend makes it.
    ///
    /// # Errors
    ///
    /// Where the backend failed; what is durable is then unknown.
    fn flush(&self) -> Result<(), BackendError>;

    /// How many values this backend has read that it could not decode.
    fn malformed(&self) -> u64 {
        0
    }

    /// Whether a new storage loads what is there into its memory, and asks later on only for what there was no room
    /// for: for what is local and read fast, and used by nobody but that storage.
    fn warms_up(&self) -> bool {
        false
    }
}

/// One change of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Write {
    /// Stores the record if there is none under the key; else the one that is there is the winner.
    PutIfAbsent(String, Record),
    /// Stores the record, over any other.
    Put(String, Record),
    /// Moves the expiry of a record that is there; without one it does nothing.
    Expire(String, SystemTime),
    /// Forgets the key.
    Remove(String),
}

impl Write {
    /// The key that is changed.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::PutIfAbsent(key, _)
            | Self::Put(key, _)
            | Self::Expire(key, _)
            | Self::Remove(key) => key,
        }
    }
}

/// What a backend keeps under one key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// The trace context that later spans continue.
    pub context: WorkflowContext,
    /// The run that it belongs to, where runs are told apart.
    pub run_id: Option<String>,
    /// Which trace of its run it is, from 1.
    pub generation: u32,
    /// The record is gone then.
    pub expires_at: SystemTime,
}

impl Record {
    /// A record of the first trace of an instance without runs.
    #[must_use]
    pub fn new(context: WorkflowContext, expires_at: SystemTime) -> Self {
        Self {
            context,
            run_id: None,
            generation: 1,
            expires_at,
        }
    }
}
