//! The error of a URL, alike for the backends on servers.

use std::error::Error;

use crate::backend::BackendError;
use crate::error::StorageError;

/// Why a backend on a server could not be created. A server that is down is no such error.
///
/// It becomes a [`StorageError`] by `?`, as the errors of that backend do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The text is no URL of such a server, or it asks for something that is not supported. No message repeats the text,
    /// since it may contain a password.
    #[error("invalid URL of a {server}, expected a form like {form}: its {part} is wrong")]
    #[non_exhaustive]
    InvalidUrl {
        /// The kind of server: `Redis server` or `PostgreSQL database`.
        server: &'static str,
        /// An example of a valid URL.
        form: &'static str,
        /// The part that is wrong: `scheme`, `user or password`, `host`, `port`, `database`, `parameters`, `fragment` or
        /// `percent-encoding`; `form` if it cannot be told.
        part: &'static str,
        /// The reason why it is wrong.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The list of URLs of a Cluster is empty.
    #[error("no URL of a Redis Cluster was given, at least one is needed")]
    NoUrl,
}

impl From<ConnectError> for StorageError {
    fn from(error: ConnectError) -> Self {
        let message = error.to_string();
        let reason = match error {
            ConnectError::InvalidUrl { source, .. } => Some(source),
            ConnectError::NoUrl => None,
        };
        Self::Backend(BackendError::new(message, reason))
    }
}
