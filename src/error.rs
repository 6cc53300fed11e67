//! The error enums of the explicit API, one per operation.

use crate::backend::BackendError;

/// The longest instance id that is stored, in bytes: 1 KiB.
///
/// Engines stay well below it (Temporal's default limit is 1,000 bytes, Dapr and Restate use UUIDs or
/// user keys); past it a value is taken for a payload that was tagged by mistake.
pub const MAX_INSTANCE_ID_BYTES: usize = 1024;

/// Why an instance id was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidInstanceId {
    /// The id is the empty string.
    #[error("an instance id must not be empty")]
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
    pub(crate) fn check(id: &str) -> Result<(), Self> {
        match id.len() {
            0 => Err(Self::Empty),
            length if length > MAX_INSTANCE_ID_BYTES => Err(Self::TooLong { length }),
            _ => Ok(()),
        }
    }
}

/// Why an explicit call on the storage failed. Nothing that was stored is lost by it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The instance id cannot be a key.
    #[error(transparent)]
    InvalidInstanceId(#[from] InvalidInstanceId),
    /// The backend refused or could not be reached.
    #[error("the storage backend failed")]
    Backend(#[from] BackendError),
}

/// Why no resumed context was created. Nothing was stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateResumedError {
    /// The instance id cannot be a key, or the backend failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// No span that records could be opened: no tracer was given to
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

/// Why [`WorkflowContextStorageBuilder::build`](crate::WorkflowContextStorageBuilder::build) refused its settings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A field or span name that the builder was given is empty.
    #[error("{setting}: a name must not be empty")]
    EmptyName {
        /// The builder's method.
        setting: &'static str,
    },
    /// `instance_id_fields` was given no name at all: no span could ever be tagged.
    #[error("instance_id_fields: at least one field name is needed")]
    NoInstanceIdField,
    /// A number or a duration of the builder is zero.
    #[error("{setting}: must be more than zero")]
    Zero {
        /// The builder's method.
        setting: &'static str,
    },
    /// A relation cannot be continued in that way.
    #[error("relation: {relation:?} cannot be continued with {continuation:?}: {why}")]
    ImpossibleRelation {
        /// The relation.
        relation: crate::Relation,
        /// The continuation that it cannot have.
        continuation: crate::Continuation,
        /// The reason, as a sentence.
        why: &'static str,
    },
    /// The operating system gave no thread for the backend.
    #[error("backend: no thread can be had: {error}")]
    NoThread {
        /// What the operating system said.
        error: String,
    },
    /// `resample_on` was given a relation in which nothing begins anew.
    #[error(
        "resample_on: {relation:?} begins no new trace; \
         a fresh sampling decision can be taken on Resumed, NewRun and Expired"
    )]
    ImpossibleResampling {
        /// The relation.
        relation: crate::Relation,
    },
}
