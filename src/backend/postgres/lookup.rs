//! The lookup of one key or two, which a span waits for.
//!
//! Where a pooler may stand between, it is one message to the server. Only in a message without parameters can there be several
//! statements, so keys and records go as hexadecimal text.

use std::borrow::Cow;
use std::fmt::{Display, Write as _};
use std::time::Duration;

use tokio_postgres::types::Type;
use tokio_postgres::{Error, Row, SimpleQueryRow};

use super::connection::Connection;

/// The largest number of keys of a lookup.
pub(super) const KEYS: usize = 2;

/// The stored form of a row's record.
pub(super) const VALUE: &str = "coalesce(t.record, convert_to(t.context::text, 'UTF8'))";

/// The time that a row has left: 0 if it has expired. Infinite times cannot be subtracted.
pub(super) const SECONDS_LEFT: &str = "extract(epoch FROM greatest(least(t.expires_at, now() + interval '1000 years'), now()) \
    - now())::float8";

/// The statements of the lookups in one table.
pub(super) struct Lookup {
    /// Without the ids of the rows, and with columns of text.
    as_text: String,
    prepared: String,
}

/// The columns of a row.
pub(super) struct Found<'a> {
    pub(super) key: Cow<'a, [u8]>,
    pub(super) value: Option<Cow<'a, [u8]>>,
    pub(super) seconds_left: f64,
}

impl Lookup {
    pub(super) fn new(table: &impl Display) -> Self {
        let rows = format!("FROM {table} AS t WHERE t.expires_at > now() AND t.id IN");
        Self {
            // The columns of a subquery would not be told twice, but take the server 40 µs more.
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

    /// Looks one key or two up, and reads each row that is found.
    pub(super) async fn run<R>(
        &self,
        connection: &Connection,
        keys: &[String],
        most: Duration,
        read: impl Fn(&Found<'_>) -> Option<R>,
    ) -> Result<Vec<R>, Error> {
        if connection.prepares(most) {
            let [first, second] = [0, 1].map(|at| keys.get(at).map(String::as_bytes));
            let keys = &[(&first as _, Type::BYTEA), (&second as _, Type::BYTEA)];
            let rows = connection.run(&self.prepared, keys, most).await?;
            let found = rows.iter().map(Found::from_row);
            return Ok(found.filter_map(|found| read(&found)).collect());
        }
        let rows = connection.run_as_text(&self.as_text(keys), most).await?;
        let found = rows.iter().filter_map(Found::from_text);
        Ok(found.filter_map(|found| read(&found)).collect())
    }
}

impl<'a> Found<'a> {
    pub(super) fn from_row(row: &'a Row) -> Self {
        Self {
            key: Cow::Borrowed(row.get("key")),
            value: row.get::<_, Option<&[u8]>>("value").map(Cow::Borrowed),
            seconds_left: row.get("seconds_left"),
        }
    }

    /// `None` if the columns are not what the statement asks for.
    fn from_text(row: &'a SimpleQueryRow) -> Option<Self> {
        let bytes = |column| row.get(column).and_then(bytes_of).map(Cow::Owned);
        Some(Self {
            key: bytes("key")?,
            value: bytes("value"),
            seconds_left: row.get("seconds_left")?.parse().ok()?,
        })
    }
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
