//! The table: its name, its creation, and the statements on it.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{Error, Row};

use super::connection::{Connection, begin};
use super::failure::{Failure, is_read_only};
use super::lookup::{Found, Lookup, SECONDS_LEFT, VALUE};
use crate::backend::{Record, form};
use crate::stats::Counter;

/// The comment of a table of this crate, with the version of its columns.
const COMMENT: &str = "tracing-workflow-context, format 1";

/// Looks for a table and its comment.
const LOOK: &str = "SELECT found.oid IS NOT NULL, obj_description(found.oid, 'pg_class') \
    FROM (SELECT to_regclass($1)::oid AS oid) AS found";

/// The quoted name of a table.
#[derive(Clone)]
pub(super) struct Name {
    schema: String,
    table: String,
}

impl Name {
    pub(super) fn new(schema: &str, table: &str) -> Self {
        Self {
            schema: quoted(schema),
            table: quoted(table),
        }
    }

    pub(super) fn with_schema(&self, schema: &str) -> Self {
        Self {
            schema: quoted(schema),
            ..self.clone()
        }
    }

    pub(super) fn with_table(&self, table: &str) -> Self {
        Self {
            table: quoted(table),
            ..self.clone()
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.table)
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

pub(super) struct Table {
    pub(super) name: Name,
    pub(super) is_unlogged: bool,
    /// Set once the table is known to be there, in the right format.
    is_ready: AtomicBool,
    pub(super) malformed: Counter,
    pub(super) lookup: Lookup,
    pub(super) get: String,
    pub(super) page: String,
    pub(super) claim: String,
    pub(super) put: String,
    pub(super) expire: String,
    pub(super) remove: String,
    pub(super) remove_expired: String,
}

impl Table {
    pub(super) fn new(name: Name, is_unlogged: bool) -> Self {
        // Statements that lock several rows lock them in the order of `id`, so that no two of them wait for each other. Rows
        // are found by `id` alone, and their expiry is looked at afterwards: the server's statistics of it are always old,
        // and would let it expect too few rows.
        let insert = format!(
            "INSERT INTO {name} AS t (key, record, context, expires_at)
             SELECT w.key, w.record, w.context::jsonb, now() + w.lifetime * interval '1 millisecond'
             FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::int8[]) AS w (key, record, context, lifetime)
             ORDER BY sha256(w.key)
             ON CONFLICT (id) DO UPDATE
             SET record = excluded.record, context = excluded.context, expires_at = excluded.expires_at"
        );
        let record = format!("{VALUE} AS value, {SECONDS_LEFT} AS seconds_left");
        Self {
            lookup: Lookup::new(&name),
            get: format!(
                "SELECT t.key, {record} FROM {name} AS t
                 WHERE t.id = ANY (ARRAY(SELECT sha256(key) FROM unnest($1::bytea[]) AS key)) AND t.expires_at > now()"
            ),
            page: format!(
                "SELECT t.id, t.key, {record} FROM {name} AS t WHERE t.id > $1 ORDER BY t.id LIMIT $2"
            ),
            // The rows that the statement does not see, since they were committed after it began, are in neither part.
            claim: format!(
                "WITH won AS ({insert} WHERE t.expires_at <= now() RETURNING t.key),
                 w AS MATERIALIZED (SELECT sha256(key) AS id FROM unnest($1::bytea[]) AS key)
                 SELECT key, true AS is_won, NULL::bytea AS value, 0::float8 AS seconds_left FROM won
                 UNION ALL
                 SELECT t.key, false, {record}
                 FROM (SELECT t.* FROM w JOIN {name} AS t ON t.id = w.id OFFSET 0) AS t
                 WHERE t.expires_at > now()"
            ),
            put: insert,
            expire: format!(
                "WITH w AS MATERIALIZED (
                     SELECT sha256(key) AS id, lifetime FROM unnest($1::bytea[], $2::int8[]) AS w (key, lifetime)
                 )
                 UPDATE {name} AS t SET expires_at = now() + w.lifetime * interval '1 millisecond'
                 FROM (
                     SELECT t.id, w.lifetime FROM w JOIN {name} AS t ON t.id = w.id ORDER BY t.id FOR UPDATE OF t
                 ) AS w
                 WHERE t.id = w.id AND t.expires_at > now()"
            ),
            remove: format!(
                "WITH w AS MATERIALIZED (SELECT sha256(key) AS id FROM unnest($1::bytea[]) AS key)
                 DELETE FROM {name} AS t
                 USING (SELECT t.id FROM w JOIN {name} AS t ON t.id = w.id ORDER BY t.id FOR UPDATE OF t) AS w
                 WHERE t.id = w.id"
            ),
            // The lock ends with the statement. By `ctid`, since an index on the expiry would make each move of an expiry
            // write to it.
            remove_expired: format!(
                "WITH turn AS MATERIALIZED (
                     SELECT pg_try_advisory_xact_lock(hashtextextended('purge ' || $1::text, 0)) AS is_ours
                 ), gone AS (
                     DELETE FROM {name} WHERE ctid = ANY (ARRAY(
                         SELECT ctid FROM {name}
                         WHERE (SELECT is_ours FROM turn) AND ctid >= $2::text::tid AND ctid < $3::text::tid
                             AND expires_at <= now()
                         FOR UPDATE SKIP LOCKED
                     ))
                 )
                 SELECT pg_relation_size($1::text::regclass) / current_setting('block_size')::int8 AS blocks"
            ),
            name,
            is_unlogged,
            is_ready: AtomicBool::new(false),
            malformed: Counter::default(),
        }
    }

    pub(super) fn ddl(&self) -> String {
        let Self { name, .. } = self;
        let unlogged = if self.is_unlogged { "UNLOGGED " } else { "" };
        format!(
            "CREATE {unlogged}TABLE IF NOT EXISTS {name} (
    expires_at timestamptz NOT NULL DEFAULT now() + interval '24 hours',
    id bytea GENERATED ALWAYS AS (sha256(key)) STORED PRIMARY KEY,
    key bytea NOT NULL,
    record bytea,
    context jsonb,
    CHECK (num_nonnulls(record, context) = 1)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
COMMENT ON TABLE {name} IS '{COMMENT}';
"
        )
    }

    /// Makes sure that the table is there, in the right format. Asks the server until it was so once.
    pub(super) async fn ensure(&self, client: &Connection, most: Duration) -> Result<(), Failure> {
        if self.is_ready.load(Relaxed) {
            return Ok(());
        }
        let name = self.name.to_string();
        let look = async || client.run(LOOK, &[(&name, Type::TEXT)], most).await;
        let is_there = match self.is_in(&look().await?) {
            Ok(is_there) => is_there,
            // A table that is created meanwhile is found by its name at once, but its comment only by the next statement.
            Err(_) => self.is_in(&look().await?)?,
        };
        if !is_there {
            self.create(client, most).await?;
        }
        self.is_ready.store(true, Relaxed);
        Ok(())
    }

    /// Makes the next call ask for the table again.
    pub(super) fn forget(&self) {
        self.is_ready.store(false, Relaxed);
    }

    /// Returns whether the answer to [`LOOK`] is this table, or an error if it is another one.
    fn is_in(&self, rows: &[Row]) -> Result<bool, Failure> {
        let comment = match rows.first() {
            Some(row) if row.get(0) => row.get::<_, Option<&str>>(1).unwrap_or_default(),
            _ => return Ok(false),
        };
        if comment == COMMENT {
            return Ok(true);
        }
        Err(Failure::Table(format!(
            "table {} has the comment {comment:?}, but this version of the crate expects {COMMENT:?}: \
             it is of another version, or of another program",
            self.name
        )))
    }

    async fn create(&self, client: &Connection, most: Duration) -> Result<(), Failure> {
        let lock = "SELECT pg_advisory_xact_lock(hashtextextended('create ' || $1::text, 0))";
        let name = self.name.to_string();
        client.batch_execute(&begin(most)).await?;
        client.query_typed(lock, &[(&name, Type::TEXT)]).await?;
        // Another worker may have been faster.
        let rows = client.query_typed(LOOK, &[(&name, Type::TEXT)]).await?;
        if !self.is_in(&rows)? {
            let created = client.batch_execute(&self.ddl()).await;
            created.map_err(|error| self.cannot_create(error))?;
        }
        Ok(client.batch_execute("COMMIT").await?)
    }

    fn cannot_create(&self, error: Error) -> Failure {
        let Some(of_server) = error.as_db_error() else {
            return error.into();
        };
        let code = of_server.code();
        let refusals = [
            SqlState::INSUFFICIENT_PRIVILEGE,
            SqlState::INVALID_SCHEMA_NAME,
        ];
        if !refusals.contains(code) && !is_read_only(code) {
            return error.into();
        }
        Failure::Table(format!(
            "table {} is missing, and this user cannot create it ({}): \
             create it with the SQL that PostgresBackend::ddl returns",
            self.name,
            of_server.message()
        ))
    }

    /// Reads the key and the record of a row. Returns `None` if it has expired, or one of them is malformed, which is counted.
    pub(super) fn keyed_record(&self, found: &Found<'_>) -> Option<(String, Record)> {
        if found.seconds_left <= 0.0 {
            return None;
        }
        let record = self.record(found)?;
        let key = std::str::from_utf8(&found.key);
        if key.is_err() {
            self.malformed.add();
        }
        Some((key.ok()?.to_owned(), record))
    }

    /// Reads the record of a row. Returns `None` for a malformed one, which is counted.
    pub(super) fn record(&self, found: &Found<'_>) -> Option<Record> {
        let value = found.value.as_deref();
        let record = value.and_then(form::decode).and_then(|record| {
            let left = Duration::try_from_secs_f64(found.seconds_left).ok()?;
            let expires_at = SystemTime::now().checked_add(left)?;
            Some(Record {
                expires_at,
                ..record
            })
        });
        if record.is_none() {
            self.malformed.add();
        }
        record
    }
}
