//! The error enums of the explicit API, one per operation.

use crate::backend::BackendError;

/// The maximum length of an instance id: 1024 bytes.
///
/// Engines stay below it (Temporal's default limit is 1,000 bytes, Dapr and Restate use UUIDs or user keys). A longer
/// value is assumed to be a payload that was tagged by mistake.
pub const MAX_INSTANCE_ID_BYTES: usize = 1024;

/// The error of an invalid instance id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidInstanceId {
    /// The id is the empty string, or `None`, the `Debug` form of no id.
    #[error("an instance id must not be empty; the text `None` counts as empty")]
    Empty,
    /// The id is longer than [`MAX_INSTANCE_ID_BYTES`].
    #[error(
        "an instance id is at most {MAX_INSTANCE_ID_BYTES} bytes long, this one has {length} bytes"
    )]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
}

impl InvalidInstanceId {
    /// Returns an error if the id is empty or too long.
    pub(crate) fn check(id: &str) -> Result<(), Self> {
        match id.len() {
            0 => Err(Self::Empty),
            length if length > MAX_INSTANCE_ID_BYTES => Err(Self::TooLong { length }),
            _ => Ok(()),
        }
    }
}

/// The most bytes that a namespace may have.
pub(crate) const MAX_NAMESPACE_BYTES: usize = 256;

/// The error of an explicit call on the storage. But for [`NotWritten`](Self::NotWritten), nothing that was stored is lost.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The instance id is empty or too long.
    #[error(transparent)]
    InvalidInstanceId(#[from] InvalidInstanceId),
    /// The backend failed or could not be reached.
    #[error("the storage backend failed")]
    Backend(#[from] BackendError),
    /// The backend works, but not everything that was stored since the last flush is in it. What is refused is tried again;
    /// what was dropped is in memory alone, and told by one flush.
    #[error(
        "since the last flush, {dropped} writes to the storage backend were dropped, and {refused} are refused by it"
    )]
    NotWritten {
        /// The number of writes that were dropped, since too many waited for the backend, or a value that cannot be decoded was
        /// in their place.
        dropped: u64,
        /// The number of writes that the backend refuses now.
        refused: u64,
        /// The first failure since the last flush that succeeded.
        #[source]
        cause: BackendError,
    },
    /// The status does not end an instance.
    #[error("not a terminal status: expected completed, failed, timed_out, terminated or canceled")]
    NoTerminalStatus,
}

/// The error of `create_resumed`. Nothing was stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateResumedError {
    /// The instance id is empty or too long, or the backend failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// No recording span could be opened: no tracer was given to
    /// [`layer`](crate::WorkflowContextStorage::layer) or [`tracer`](crate::WorkflowContextStorage::tracer)
    /// and no global tracer provider is set, the provider is shut down, or the sampler dropped the span.
    #[error(
        "no recording span could be opened for the resumed workflow: \
         no tracer is set up, its provider is shut down, or the sampler dropped the span"
    )]
    NoRecordingSpan,
}

impl From<InvalidInstanceId> for CreateResumedError {
    fn from(error: InvalidInstanceId) -> Self {
        Self::Storage(error.into())
    }
}

/// The error of [`WorkflowContextStorageBuilder::build`](crate::WorkflowContextStorageBuilder::build).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The name of a field or span is empty.
    #[error("{setting}: a name must not be empty")]
    EmptyName {
        /// The method of the builder.
        setting: &'static str,
    },
    /// `instance_id_fields` was called without a name, so no span could ever be tagged.
    #[error("instance_id_fields: at least one field name is needed")]
    NoInstanceIdField,
    /// A field name has two meanings: it is in two settings, or reserved for another one.
    #[error(
        "{setting}: the field {name:?} belongs to {owner}; a field has one meaning, choose another name"
    )]
    TwoMeanings {
        /// The method of the builder.
        setting: &'static str,
        /// The field.
        name: String,
        /// The method of the builder to which it belongs already, or whoever else uses it.
        owner: &'static str,
    },
    /// A number or a duration is zero.
    #[error("{setting}: must be more than zero")]
    Zero {
        /// The method of the builder.
        setting: &'static str,
    },
    /// The relation does not allow that continuation.
    #[error("relation: {relation:?} cannot be continued with {continuation:?}: {why}")]
    ImpossibleRelation {
        /// The relation.
        relation: crate::Relation,
        /// The continuation that it does not allow.
        continuation: crate::Continuation,
        /// The reason.
        why: &'static str,
    },
    /// The namespace is longer than 256 bytes.
    #[error("namespace: {length} bytes are too many, the most is {MAX_NAMESPACE_BYTES}")]
    NamespaceTooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// A thread for the backend could not be started.
    #[error("backend: could not start a thread: {error}")]
    NoThread {
        /// The error of the operating system.
        error: String,
    },
    /// `resample_on` was called with a relation that begins no new trace.
    #[error(
        "resample_on: {relation:?} begins no new trace; \
         a fresh sampling decision can be taken on Resumed, NewRun and Expired"
    )]
    ImpossibleResampling {
        /// The relation.
        relation: crate::Relation,
    },
}
