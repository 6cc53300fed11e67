//! The backend on a PostgreSQL database.

mod connect;
mod connection;
mod failure;
mod group;
mod lookup;
mod purge;
mod server;
mod table;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::types::Type;

use self::connect::Target;
use self::connection::{Connection, Parameters};
use self::failure::Failure;
use self::group::Group;
use self::lookup::Found;
use self::purge::Purge;
use self::server::{Server, Timeouts};
use self::table::{Name, Table};
use super::form::Form;
use super::outcomes::fail_later_writes;
use super::url::ConnectError;
use crate::backend::{BackendError, Record, StorageBackend, Write, WriteOutcome};

const SCHEMA: &str = "public";
const TABLE: &str = "workflow_contexts";
const TIMEOUT: Duration = Duration::from_secs(1);
const MIN_TIMEOUT: Duration = Duration::from_millis(1);

/// Number of writes in one statement, and of records in one page of a scan.
const GROUP: usize = 1000;

/// A backend in one table of a [PostgreSQL] database of version 14 or later, which any number of machines share.
///
/// ```no_run
/// use tracing_workflow_context::{PostgresBackend, WorkflowContextStorage};
///
/// let backend = PostgresBackend::connect("postgres://app:secret@127.0.0.1:5432/orders")?;
/// let storage = WorkflowContextStorage::builder().backend(backend).build()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// | setting | default |
/// |---|---|
/// | [`schema`](Self::schema) | `public` |
/// | [`table`](Self::table) | `workflow_contexts` |
/// | [`unlogged`](Self::unlogged) | `false` |
/// | [`with_form`](Self::with_form) | [`Form::Binary`] |
/// | [`direct`](Self::direct) | `false` |
/// | [`connect_timeout`](Self::connect_timeout) | 1 second |
/// | [`response_timeout`](Self::response_timeout) | 1 second |
///
/// # When the server is down
///
/// Telemetry fails open: a server that cannot be reached is no error of [`connect`](Self::connect), which does not
/// connect yet. A storage that is built with it connects in the background, and each call does after a connection was
/// lost; an idle connection that the server has closed is replaced without an error. While calls fail, the storage pauses
/// between attempts, from 100 milliseconds up to 5 seconds with jitter, keeps what is to be written, and counts in
/// [`backend_errors`](crate::Stats::backend_errors).
///
/// A call waits no longer than the two timeouts together, for each 1,000 writes. The server gives up a statement after the
/// response timeout too, so that it does not go on, or wait for a lock, for nobody. Writes that took longer are tried again
/// in smaller groups, down to single ones, so that a slow server gets on.
///
/// A URL may name several servers, `postgres://a,b/orders?target_session_attrs=read-write`: then the first that can be
/// written to is used, and after a failover the next one.
///
/// # The table
///
/// It is created by the first use if it is missing, or by the user from [`ddl`](Self::ddl) where workers may not create
/// tables; they need `SELECT`, `INSERT`, `UPDATE` and `DELETE` on it. The schema has to exist.
///
/// There is one row for each instance, and one for each of its runs and of its second, third, ... traces. A table that
/// this crate has not made, or that has another format, is refused and stays unchanged.
///
/// | column | content |
/// |---|---|
/// | `key bytea` | the key as UTF-8, for an instance its id; `bytea`, since `text` has no NUL |
/// | `id bytea` | the primary key: `sha256(key)`, made by the server, since an index entry has a limit and a key may exceed it |
/// | `record bytea` | [`Form::Binary`], or null |
/// | `context jsonb` | [`Form::Json`], or null |
/// | `expires_at timestamptz` | the row is gone from then on, by the server's clock; 24 hours from now by default |
///
/// ```sql
/// SELECT context ->> 'traceparent' FROM workflow_contexts WHERE id = sha256('order-42');
/// INSERT INTO workflow_contexts (key, context) VALUES ('order-42', '{"traceparent": "00-..-..-01"}') ON CONFLICT DO NOTHING;
/// ```
///
/// Only durations are sent and received, so the clocks of workers need not agree with the server's. Rows that have expired
/// are deleted beside later writes: about six rows are looked at for each write, in the order of the file, by one worker at
/// a time, and rows that others have locked are left for later.
///
/// Rows that others write are not trusted: one that cannot be decoded is counted in
/// [`malformed`](crate::Stats::malformed), and treated as missing. It is left alone: the claim of a context in its place is given
/// up, and told by the next [flush](crate::WorkflowContextStorage::flush). Only a
/// [call](crate::WorkflowContextStorage::store) replaces it. With [`Form::Json`], a context with a NUL in one of its texts is
/// stored in the binary form, since `jsonb` has none.
///
/// # PgBouncer
///
/// By default every call is one transaction, with statements that have no name and settings that end with it (`SET LOCAL`). So it
/// works behind a pooler in transaction mode, which a fleet needs: a storage keeps two connections, and a server allows 100
/// by default. Without a pooler, set [`direct`](Self::direct).
///
/// # What can be lost
///
/// A write is done when the server has committed it. Whether it survives a crash of the server depends on the server's
/// `synchronous_commit` and replication, and on [`unlogged`](Self::unlogged).
///
/// # TLS
///
/// With the feature `postgres-tls` and `sslmode=require` in the URL, connections use TLS. The certificate of the server is
/// verified, name included, with the roots of the operating system, or those in the file that the variable `SSL_CERT_FILE`
/// names. Any other `sslmode` connects without TLS. If the process has not installed a cryptography provider for rustls,
/// that of `ring` is used.
///
/// # Threads and locking
///
/// A call runs on the calling thread, by a runtime that the clones share and that has no thread of its own. A caller that is within
/// another runtime waits for a thread that is started for the call. Names of hosts are resolved on up to four threads, which
/// end when they have been idle. A lock is held only while an idle connection is taken or given back, or a statement that was
/// prepared is looked for.
///
/// [PostgreSQL]: https://www.postgresql.org
#[derive(Clone)]
pub struct PostgresBackend {
    server: Arc<Server>,
    table: Arc<Table>,
    purge: Arc<Purge>,
    form: Form,
    timeouts: Timeouts,
}

impl PostgresBackend {
    /// Creates a backend on the database of a URL: `postgres://user:password@host:port/database`, of which only the host
    /// is required. Special characters of user and password have to be percent-encoded. The directory of a Unix socket
    /// is a host too: `postgres://user@%2Frun%2Fpostgresql/database`, or `postgres:///database?host=/run/postgresql`.
    ///
    /// It connects when a storage is built with it, see [above](Self#when-the-server-is-down).
    ///
    /// # Errors
    ///
    /// [`ConnectError::InvalidUrl`], also if the URL asks for TLS without the feature `postgres-tls`. A server that is
    /// down is no error here.
    pub fn connect(url: &str) -> Result<Self, ConnectError> {
        let target = Target::parse(url)?;
        Ok(Self {
            server: Arc::new(Server::new(target, false)),
            table: Arc::new(Table::new(Name::new(SCHEMA, TABLE), false)),
            purge: Arc::default(),
            form: Form::default(),
            timeouts: Timeouts {
                connect: TIMEOUT,
                response: TIMEOUT,
            },
        })
    }

    /// Sets the schema of the table. It has to exist.
    ///
    /// By default, `public`.
    #[must_use]
    pub fn schema(self, schema: &str) -> Self {
        let name = self.table.name.with_schema(schema);
        let is_unlogged = self.table.is_unlogged;
        self.on(Table::new(name, is_unlogged))
    }

    /// Sets the name of the table. Workers that share contexts need the same one.
    ///
    /// By default, `workflow_contexts`.
    #[must_use]
    pub fn table(self, table: &str) -> Self {
        let name = self.table.name.with_table(table);
        let is_unlogged = self.table.is_unlogged;
        self.on(Table::new(name, is_unlogged))
    }

    /// Creates the table as `UNLOGGED`, if it is created: writes cost less, since they are not written to the log of the
    /// server. But the table is empty after a crash of the server and after a failover, and a standby cannot read it. Then
    /// instances that continue on another worker begin a new trace.
    ///
    /// By default, `false`.
    #[must_use]
    pub fn unlogged(self, unlogged: bool) -> Self {
        let name = self.table.name.clone();
        self.on(Table::new(name, unlogged))
    }

    /// Sets the form of the records that are written.
    ///
    /// By default, [`Form::Binary`].
    #[must_use]
    pub fn with_form(mut self, form: Form) -> Self {
        self.form = form;
        self
    }

    /// Says that connections lead to the server itself, with no pooler between. Then statements are prepared, so that the server
    /// plans each of them once, and each call is one statement without a transaction around it: a lookup takes the server
    /// less than half the time.
    ///
    /// A connection through a pooler, such as PgBouncer, is refused then: in transaction mode it would meet the prepared
    /// statements of other clients. Set it before the first call; connections from before are not used any more.
    ///
    /// By default, `false`.
    #[must_use]
    pub fn direct(self, direct: bool) -> Self {
        Self {
            server: Arc::new(self.server.with_direct(direct)),
            ..self
        }
    }

    /// Sets the longest wait for a connection, from the name of the host to the end of the login. A `connect_timeout` of
    /// the URL has no effect.
    ///
    /// By default, 1 second; at least 1 millisecond.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.connect = timeout.max(MIN_TIMEOUT);
        self
    }

    /// Sets the longest wait for the server's answer.
    ///
    /// By default, 1 second; at least 1 millisecond.
    #[must_use]
    pub fn response_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.response = timeout.max(MIN_TIMEOUT);
        self
    }

    /// Returns the SQL that creates the table, with its schema, name and [`unlogged`](Self::unlogged) as they are set.
    ///
    /// ```
    /// # use tracing_workflow_context::PostgresBackend;
    /// let backend = PostgresBackend::connect("postgres://127.0.0.1/orders")?.schema("telemetry");
    /// assert!(backend.ddl().contains(r#"CREATE TABLE IF NOT EXISTS "telemetry"."workflow_contexts""#));
    /// # Ok::<(), tracing_workflow_context::StorageError>(())
    /// ```
    #[must_use]
    pub fn ddl(&self) -> String {
        self.table.ddl()
    }

    fn on(self, table: Table) -> Self {
        Self {
            table: Arc::new(table),
            purge: Arc::default(),
            ..self
        }
    }

    /// Runs `work` on a connection, after making sure that the table is there.
    fn call<R: Send>(
        &self,
        work: impl AsyncFn(&Connection) -> Result<R, Failure> + Sync,
    ) -> Result<R, BackendError> {
        let result = self.server.call(self.timeouts, async |connection| {
            (self.table.ensure(connection, self.timeouts.response)).await?;
            work(connection).await
        });
        result.map_err(|failure| {
            if failure.is_missing_table() {
                self.table.forget();
            }
            failure.into_error(self.server.name())
        })
    }

    /// Deletes some expired rows, if it is time to. A failure is ignored: the next call on that server meets it too.
    fn purge(&self, written: usize) {
        let Some(blocks) = self.purge.due(written) else {
            return;
        };
        let most = self.timeouts.response;
        let deleted = self.call(async |connection| {
            purge::delete_expired(connection, &self.table, blocks.clone(), most).await
        });
        if let Ok(in_table) = deleted {
            self.purge.done(in_table);
        }
    }
}

impl StorageBackend for PostgresBackend {
    /// Opens the two connections that a storage uses, and creates the table if it is missing.
    fn connect(&self) -> Result<(), BackendError> {
        let opened = self.server.open(2, self.timeouts);
        opened.map_err(|failure| failure.into_error(self.server.name()))?;
        self.call(async |_| Ok(()))
    }

    /// Writes in groups of at most 1,000, each in a few statements that commit on their own. Only those writes fail alone
    /// that the server refuses because of their data.
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        let mut outcomes = Vec::with_capacity(writes.len());
        let most = self.timeouts.response;
        for some in writes.chunks(GROUP) {
            let group = Group::new(some, self.form);
            let written =
                self.call(async |connection| group.write(connection, &self.table, most).await)?;
            let name = self.server.name();
            let outcome = |outcome: Result<_, Failure>| {
                outcome.unwrap_or_else(|failure| WriteOutcome::Failed(failure.into_error(name)))
            };
            outcomes.extend(written.into_iter().map(outcome));
        }
        fail_later_writes(writes, &mut outcomes);
        self.purge(writes.len());
        Ok(outcomes)
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        let mut found = self.get_many(&[key.to_owned()])?;
        Ok(found.pop().flatten())
    }

    fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Record>>, BackendError> {
        let (table, most) = (&self.table, self.timeouts.response);
        let found = self.call(async |connection| {
            if (1..=lookup::KEYS).contains(&keys.len()) {
                let read = |found: &Found<'_>| table.keyed_record(found);
                return Ok(table.lookup.run(connection, keys, most, read).await?);
            }
            let keys: Vec<_> = keys.iter().map(String::as_bytes).collect();
            let parameters: Parameters<'_> = &[(&keys, Type::BYTEA_ARRAY)];
            let rows = connection.run(&table.get, parameters, most).await?;
            Ok(rows
                .iter()
                .filter_map(|row| table.keyed_record(&Found::from_row(row)))
                .collect())
        })?;
        let found: HashMap<_, _> = found.into_iter().collect();
        Ok(keys.iter().map(|key| found.get(key).cloned()).collect())
    }

    /// Reads pages of 1,000 rows in the order of `id`, each in a transaction of its own.
    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        let (table, most) = (&self.table, self.timeouts.response);
        let mut after = Vec::new();
        loop {
            let (records, last) = self.call(async |connection| {
                let limit = GROUP as i64;
                let parameters: Parameters<'_> = &[(&after, Type::BYTEA), (&limit, Type::INT8)];
                let rows = connection.run(&table.page, parameters, most).await?;
                // At once, since a record is to live for so long from now.
                let records = rows
                    .iter()
                    .map(|row| table.keyed_record(&Found::from_row(row)));
                let last = rows.last().filter(|_| rows.len() == GROUP);
                let last = last.map(|row| row.get::<_, Vec<u8>>("id"));
                Ok((records.collect::<Vec<_>>(), last))
            })?;
            for (key, record) in records.into_iter().flatten() {
                visit(&key, record);
            }
            match last {
                Some(last) => after = last,
                None => return Ok(()),
            }
        }
    }

    /// Succeeds if the server answers: each write that is done was committed.
    fn flush(&self) -> Result<(), BackendError> {
        let ping = async |connection: &Connection| Ok(connection.batch_execute("").await?);
        let answered = self.server.call(self.timeouts, ping);
        answered.map_err(|failure| failure.into_error(self.server.name()))
    }

    fn malformed(&self) -> u64 {
        self.table.malformed.get()
    }
}

impl fmt::Debug for PostgresBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresBackend")
            .field("server", &self.server.name())
            .field("table", &self.table.name.to_string())
            .field("form", &self.form)
            .finish_non_exhaustive()
    }
}
