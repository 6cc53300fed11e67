//! Why a call on the server failed, and what that means for the call and its connection.

use std::time::Duration;

use tokio_postgres::Error;
use tokio_postgres::error::SqlState;

use crate::backend::BackendError;

#[derive(Debug)]
pub(super) enum Failure {
    /// The client's error, which may be the server's.
    Postgres(Error),
    /// The server did not answer in time.
    NoAnswer(&'static str, Duration),
    Io(&'static str, std::io::Error),
    /// The session of the server is not the connection's own, as it was to be.
    SharedSession,
    /// The table cannot be used, for this reason.
    Table(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Postgres(error)
    }
}

impl Failure {
    /// Returns `true` if the connection was lost, or leads to a server that became read-only.
    pub(super) fn is_lost_connection(&self) -> bool {
        match self {
            Self::Postgres(error) => error.as_db_error().is_none_or(|error| {
                let code = error.code().code();
                // Connection exceptions, and a server that shuts down.
                code.starts_with("08") || code.starts_with("57P") || is_read_only(error.code())
            }),
            _ => false,
        }
    }

    /// Returns `true` if the table does not exist.
    pub(super) fn is_missing_table(&self) -> bool {
        matches!(self, Self::Postgres(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE))
    }

    pub(super) fn into_error(self, server: &str) -> BackendError {
        match self {
            Self::NoAnswer(what, most) => {
                BackendError::new(format!("{server}: {what} within {most:?}"), None)
            }
            Self::Io(what, error) => {
                BackendError::new(format!("{server}: {what}"), Some(error.into()))
            }
            Self::SharedSession => {
                let why = "a pooler stands before it, so PostgresBackend::direct must not be set";
                BackendError::new(format!("{server}: {why}"), None)
            }
            Self::Table(why) => BackendError::new(format!("{server}: {why}"), None),
            Self::Postgres(error) => {
                let what = match error.as_db_error() {
                    Some(error) => format!("{} ({})", error.message(), error.code().code()),
                    None => error.to_string(),
                };
                BackendError::new(format!("{server}: {what}"), error.into_source())
            }
        }
    }
}

/// Returns `true` if the server refuses these data, and might take others.
pub(super) fn is_of_data(error: &Error) -> bool {
    // Data exceptions, constraints, limits, and what triggers raise.
    let classes = ["22", "23", "54", "P0"];
    let code = error.code().map_or("", SqlState::code);
    classes.iter().any(|class| code.starts_with(class))
}

pub(super) fn is_read_only(code: &SqlState) -> bool {
    *code == SqlState::READ_ONLY_SQL_TRANSACTION
}
