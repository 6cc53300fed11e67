//! A connection, and how one statement runs on it.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Mutex;
use std::time::Duration;

use futures_util::future::join3;
use tokio::task::JoinHandle;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, Row, SimpleQueryMessage, SimpleQueryRow, Statement};

use crate::lock::lock;

pub(super) type Parameters<'a> = &'a [(&'a (dyn ToSql + Sync), Type)];

/// One connection, which is closed when this is dropped.
pub(super) struct Connection {
    client: Client,
    /// Its side of the network.
    task: JoinHandle<()>,
    /// Set if the session of the server is this connection's own.
    own_session: Option<OwnSession>,
}

struct OwnSession {
    /// The server gives up a statement after that time.
    most: Duration,
    /// Those that were prepared, by their text.
    statements: Mutex<HashMap<String, Statement>>,
}

impl Connection {
    /// `own_session` is set if the session of the server is the connection's own: the time after which it gives up a statement.
    pub(super) fn new(client: Client, task: JoinHandle<()>, own_session: Option<Duration>) -> Self {
        let own_session = own_session.map(|most| OwnSession {
            most,
            statements: Mutex::default(),
        });
        Self {
            client,
            task,
            own_session,
        }
    }

    /// Returns `true` if the server plans statements once, and gives them up after `most`.
    pub(super) fn prepares(&self, most: Duration) -> bool {
        (self.own_session.as_ref()).is_some_and(|session| session.most == most)
    }

    /// Prepares a statement, unless it is; `None` if [`prepares`](Self::prepares) returns `false`.
    async fn prepared(
        &self,
        text: &str,
        parameters: Parameters<'_>,
        most: Duration,
    ) -> Result<Option<Statement>, Error> {
        let session = self.own_session.as_ref().filter(|_| self.prepares(most));
        let Some(session) = session else {
            return Ok(None);
        };
        let known = lock(&session.statements).get(text).cloned();
        if known.is_some() {
            return Ok(known);
        }
        let types: Vec<_> = parameters.iter().map(|(_, of)| of.clone()).collect();
        let statement = self.client.prepare_typed(text, &types).await?;
        lock(&session.statements).insert(text.to_owned(), statement.clone());
        Ok(Some(statement))
    }

    /// Runs one statement in a transaction of its own, in one round trip. The server gives it up after `most`; set for the
    /// transaction alone if a pooler may give the session to others.
    pub(super) async fn run(
        &self,
        statement: &str,
        parameters: Parameters<'_>,
        most: Duration,
    ) -> Result<Vec<Row>, Error> {
        if let Some(prepared) = self.prepared(statement, parameters, most).await? {
            let values: Vec<_> = parameters.iter().map(|(value, _)| *value).collect();
            return self.client.query(&prepared, &values).await;
        }
        let begin = begin(most);
        let (begun, rows, committed) = join3(
            self.client.batch_execute(&begin),
            self.client.query_typed(statement, parameters),
            self.client.batch_execute("COMMIT"),
        )
        .await;
        begun?;
        let rows = rows?;
        committed?;
        Ok(rows)
    }

    /// Runs one statement as [`run`](Self::run) does, in one message, which has no parameters and is answered by text. Several
    /// statements in one message are a transaction, which an error rolls back.
    pub(super) async fn run_as_text(
        &self,
        statement: &str,
        most: Duration,
    ) -> Result<Vec<SimpleQueryRow>, Error> {
        let isolation = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED";
        let statements = format!("{isolation}; {}; {statement}", give_up_after(most));
        let answer = self.client.simple_query(&statements).await?;
        let rows = answer.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        Ok(rows.collect())
    }
}

impl Deref for Connection {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Otherwise a connection to a server that does not answer would wait for it.
        self.task.abort();
    }
}

/// Each statement sees what was committed before it, whatever the user's default is.
pub(super) fn begin(most: Duration) -> String {
    let limit = give_up_after(most);
    format!("BEGIN ISOLATION LEVEL READ COMMITTED; {limit}")
}

/// Has the server give up each statement of the transaction after `most`.
fn give_up_after(most: Duration) -> String {
    format!("SET LOCAL statement_timeout = {}", milliseconds(most))
}

/// A time as the server takes it, to which 0 is none.
pub(super) fn milliseconds(time: Duration) -> u128 {
    time.as_millis().clamp(1, i32::MAX as u128)
}
