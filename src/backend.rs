//! The contract of a storage backend: what its author implements, and what the storage relies on.
//!
//! Only the author of a backend needs this module. The backends of this crate are
//! [`MemoryBackend`](crate::MemoryBackend), `RedbBackend` (feature `redb`), `RedisBackend` (feature `redis`) and
//! `PostgresBackend` (feature `postgres`).

pub(crate) mod breaker;
pub(crate) mod client;
#[cfg(any(test, feature = "postgres", feature = "redb", feature = "redis"))]
pub(crate) mod codec;
#[cfg(any(feature = "postgres", feature = "redis"))]
pub(crate) mod form;
mod group_size;
mod guard;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod json;
pub(crate) mod keys;
pub(crate) mod memory;
pub(crate) mod namespaced;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod outcomes;
#[cfg(feature = "postgres")]
pub(crate) mod postgres;
pub(crate) mod reader;
#[cfg(feature = "redb")]
pub(crate) mod redb;
#[cfg(feature = "redis")]
pub(crate) mod redis;
pub(crate) mod scanner;
#[cfg(any(feature = "postgres", feature = "redis"))]
pub(crate) mod url;
pub(crate) mod write_queue;
pub(crate) mod writer;

pub use keys::instance_of_key;

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use opentelemetry::SpanId;
use opentelemetry::trace::SpanContext;

use crate::context::WorkflowContext;

/// A map from keys to [`Record`]s in which contexts outlive memory: a file, a server. Users can write their own.
///
/// The storage looks in memory first, and asks its backend on a miss. It calls the backend from threads of its own, so
/// that a span waits no longer than the lookup budget.
///
/// # Contract
///
/// A key is not empty and shorter than 4 KiB; it can be any text.
///
/// *Atomicity*: each write on one key is atomic, so concurrent writes behave as if they came one after the other. The
/// writes of one [`write`](Self::write) call need not be atomic together, but take effect in their order for each key.
///
/// *Durability*: what was written and not yet flushed may be lost when the process or its machine dies. A flushed
/// write is lost only as the backend documents.
///
/// *Expiry*: a record is gone once its `expires_at` has passed. `get` and `scan` no longer return it, and its space is
/// freed eventually.
///
/// *Ends*: an instance that has ended is told by its expiry, which is then no further away than the grace. A record whose expiry
/// is so near is not extended, so `get` and `scan` have to return the expiry that the backend will keep.
///
/// *Partial failure*: a backend whose parts fail on their own, such as the nodes of a cluster, reports
/// [partial](BackendError::partial) errors. Otherwise one failed part holds up everything.
///
/// Methods may block, take their time and fail. They must not panic, and must not call back into the storage that
/// uses them. `testing::check_backend` (feature `testing`) checks a backend against this contract.
pub trait StorageBackend: fmt::Debug + Send + Sync + 'static {
    /// Makes the backend ready, where its first call would otherwise have to connect. Called once, before the first
    /// lookup, by the thread that answers lookups.
    ///
    /// # Errors
    ///
    /// If the backend cannot be reached. It is used nevertheless: later calls connect as they need to.
    fn connect(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Carries out writes in their order, as one group where that is cheaper, and returns one [`WriteOutcome`] for each.
    ///
    /// # Errors
    ///
    /// If the backend failed as a whole. It is then unknown which of the writes were carried out, and all of them are
    /// tried again, in smaller groups, since so many may have taken too long. Where only some failed, return `Ok` with a
    /// [`WriteOutcome::Failed`] for each of those.
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError>;

    /// Returns the record of a key. One that cannot be decoded is treated as missing, left alone, and counted by
    /// [`malformed`](Self::malformed).
    ///
    /// # Errors
    ///
    /// If the backend, or the part of it that has the key, failed.
    fn get(&self, key: &str) -> Result<Option<Record>, BackendError>;

    /// Returns the records of several keys, one for each in their order, as [`get`](Self::get) would one by one. The storage
    /// asks so for the record of a run and that of its instance, while a span waits, and for up to 128 keys from a thread for
    /// which nothing else waits.
    ///
    /// By default, [`get`](Self::get) is called for one key after the other. A backend on a server asks for all of them in one
    /// round trip.
    ///
    /// # Errors
    ///
    /// If the backend, or the part of it that has one of the keys, failed.
    fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Record>>, BackendError> {
        keys.iter().map(|key| self.get(key)).collect()
    }

    /// Visits once, in no order, every record that exists during the whole scan. Holds no lock while `visit` runs.
    ///
    /// # Errors
    ///
    /// If the backend failed; what was visited until then is valid.
    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError>;

    /// Returns once everything written before is as durable as the backend makes it.
    ///
    /// # Errors
    ///
    /// If the backend failed; it is then unknown what is durable.
    fn flush(&self) -> Result<(), BackendError>;

    /// Returns the number of values read so far that could not be decoded.
    fn malformed(&self) -> u64 {
        0
    }

    /// Returns the number of records that the first [`scan`](Self::scan) has left out since they had expired.
    fn expired_at_open(&self) -> u64 {
        0
    }

    /// Returns `true` if a new storage shall load all records into its memory, and later ask only for those that did
    /// not fit: for a backend that is local, fast to read, and used by no other storage.
    fn warms_up(&self) -> bool {
        false
    }
}

/// The result of one [`Write`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum WriteOutcome {
    /// The write was carried out.
    Done,
    /// A [`Write::PutIfAbsent`] found this record under its key, and changed nothing.
    Existing(Record),
    /// A [`Write::PutIfAbsent`] found a value under its key that cannot be decoded, such as that of a newer version of this
    /// crate or of another program, and left it alone. The write is given up, and counted among the dropped ones.
    Unreadable,
    /// The write was not carried out. It is tried again, before any later write on its key: after a failure, no other
    /// write on the same key of the same call may be [`Done`](Self::Done).
    Failed(BackendError),
}

impl WriteOutcome {
    /// Returns the record that the write found, if any.
    #[must_use]
    pub fn existing(&self) -> Option<&Record> {
        match self {
            Self::Existing(record) => Some(record),
            Self::Done | Self::Unreadable | Self::Failed(_) => None,
        }
    }
}

/// A failure of a backend.
#[derive(Clone, Debug)]
pub struct BackendError {
    message: String,
    source: Option<Arc<dyn Error + Send + Sync>>,
    partial: bool,
}

impl BackendError {
    /// Creates an error of the whole backend, with the error that caused it.
    pub fn new(message: impl Into<String>, source: Option<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            message: message.into(),
            source: source.map(Arc::from),
            partial: false,
        }
    }

    /// Marks this as an error of one part of the backend, such as one node of several: the storage goes on using the
    /// rest, and does not open the circuit.
    #[must_use]
    pub fn partial(self) -> Self {
        Self {
            partial: true,
            ..self
        }
    }

    /// Names the key that the failure concerns, if that is part of the backend. A long key is cut.
    fn on_key(self, key: &str) -> Self {
        const SHOWN_CHARS: usize = 64;
        let shown: String = key.chars().take(SHOWN_CHARS).collect();
        match self.partial {
            true => Self {
                message: format!("{}, for key {shown:?}", self.message),
                ..self
            },
            false => self,
        }
    }

    /// Returns `true` if only a part of the backend failed.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.partial
    }
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for BackendError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        let source = self.source.as_deref()?;
        Some(source)
    }
}

/// A change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Write {
    /// Stores the record if there is none under the key, else [finds](WriteOutcome::Existing) the one that is there.
    PutIfAbsent(String, Record),
    /// Stores the record, over any other value.
    Put(String, Record),
    /// Sets the expiry of an existing record; without one it does nothing.
    Expire(String, SystemTime),
    /// Removes the record, if there is one.
    Remove(String),
}

impl Write {
    /// Returns the key that is written to.
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

/// The value that a backend keeps under one key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// The trace context that later spans continue.
    pub context: WorkflowContext,
    /// The run that it belongs to, if runs are told apart.
    pub run_id: Option<String>,
    /// Number of this trace among the traces of its run, from 1.
    pub generation: u32,
    /// Time from which on the record is gone.
    pub expires_at: SystemTime,
    /// The instance's own span, with durable roots. It outlives the process that allocated it.
    pub root: Option<Box<RootSpan>>,
}

impl Record {
    /// Creates a record of the first trace of an instance without runs.
    #[must_use]
    pub fn new(context: WorkflowContext, expires_at: SystemTime) -> Self {
        Self {
            context,
            run_id: None,
            generation: 1,
            expires_at,
            root: None,
        }
    }
}

/// The instance's own span as far as it is known before it is exported, at the end of the instance. Its trace id, flags and
/// tracestate are those of the record's context.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RootSpan {
    /// Its span id.
    pub span_id: SpanId,
    /// Its parent in the same trace, such as the request that started the workflow.
    pub parent_span_id: Option<SpanId>,
    /// Its name.
    pub name: String,
    /// Its start. In the record of one process's part, the time when that process first saw the instance.
    pub started_at: SystemTime,
    /// The end of the last span that was seen.
    pub last_end: SystemTime,
    /// The number of spans of the instance that have ended.
    pub spans: u64,
    /// The contexts that it is linked to, each with its relation, such as `new_run`.
    pub links: Vec<(SpanContext, String)>,
}

impl RootSpan {
    /// Creates a root of which nothing has ended.
    #[must_use]
    pub fn new(span_id: SpanId, name: impl Into<String>, started_at: SystemTime) -> Self {
        Self {
            span_id,
            parent_span_id: None,
            name: name.into(),
            started_at,
            last_end: started_at,
            spans: 0,
            links: Vec::new(),
        }
    }
}
