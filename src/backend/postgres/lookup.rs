//! The lookup of one key or two, which a span waits for.
//!
//! Where a pooler may stand between, it is one message to the server. Only in a message without parameters can there be several
//! statements, so keys and records go as hexadecimal text.

use std::fmt::Write as _;
use std::time::Duration;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error, SimpleQueryMessage, SimpleQueryRow};

use super::failure::Failure;
use super::server::Connection;
use super::table::{Name, SECONDS_LEFT, Table, VALUE, give_up_after, query};
use crate::backend::Record;

/// The largest number of keys of a lookup.
pub(super) const KEYS: usize = 2;

/// The statements of the lookups in one table.
pub(super) struct Lookup {
    /// Without the ids of the rows, and with columns of text.
    as_text: String,
    prepared: String,
}

impl Lookup {
    pub(super) fn new(table: &Name) -> Self {
        let rows = format!("FROM {table} AS t WHERE t.expires_at > now() AND t.id IN");
        Self {
            as_text: format!(
                "SELECT encode(t.key, 'hex') AS key, encode({VALUE}, 'hex') AS value, {SECONDS_LEFT} AS seconds_left {rows}"
            ),
            prepared: format!(
                "SELECT t.key, {VALUE} AS value, {SECONDS_LEFT} AS seconds_left {rows} (sha256($1), sha256($2))"
            ),
        }
    }

    fn as_text(&self, keys: &[String]) -> String {
        let ids = keys.iter().map(|key| format!("sha256({})", literal(key)));
        format!("{} ({})", self.as_text, ids.collect::<Vec<_>>().join(", "))
    }
}

impl Table {
    /// Returns the records of one key or two, with their keys.
    pub(super) async fn find(
        &self,
        connection: &Connection,
        keys: &[String],
        most: Duration,
    ) -> Result<Vec<(String, Record)>, Failure> {
        if connection.prepares(most) {
            let [first, second] = [0, 1].map(|at| keys.get(at).map(String::as_bytes));
            let keys = &[(&first as _, Type::BYTEA), (&second as _, Type::BYTEA)];
            let rows = query(connection, &self.lookup.prepared, keys, most).await?;
            return Ok(rows
                .iter()
                .filter_map(|row| self.keyed_record(row))
                .collect());
        }
        let rows = rows_within(connection, most, &self.lookup.as_text(keys)).await?;
        Ok(rows.iter().filter_map(|row| self.found(row)).collect())
    }

    fn found(&self, row: &SimpleQueryRow) -> Option<(String, Record)> {
        let bytes = |column| row.get(column).and_then(bytes_of);
        let left = row.get("seconds_left").and_then(|left| left.parse().ok());
        self.keyed_record_of(&bytes("key")?, bytes("value").as_deref(), left?)
    }
}

/// Runs a statement in a transaction of its own, which the server gives up after `most`. Several statements in one message are
/// a transaction, which an error rolls back.
async fn rows_within(
    client: &Client,
    most: Duration,
    statement: &str,
) -> Result<Vec<SimpleQueryRow>, Error> {
    let isolation = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED";
    let statements = format!("{isolation}; {}; {statement}", give_up_after(most));
    let answer = client.simple_query(&statements).await?;
    let rows = answer.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    Ok(rows.collect())
}

/// Prints a key as a literal of type `bytea`, whatever the server's `standard_conforming_strings`.
fn literal(key: &str) -> String {
    let mut literal = String::from("E'\\\\x");
    for byte in key.bytes() {
        let _ = write!(literal, "{byte:02x}");
    }
    literal + "'::bytea"
}

/// Reads what the server's `encode(.., 'hex')` has printed.
fn bytes_of(hex: &str) -> Option<Vec<u8>> {
    let digit = |digit: u8| Some(char::from(digit).to_digit(16)? as u8);
    let pairs = hex.as_bytes().chunks_exact(2);
    pairs
        .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
        .collect()
}
