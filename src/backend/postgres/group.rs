//! A group of writes, carried out in few statements.

use std::collections::HashMap;
use std::mem::discriminant;
use std::time::{Duration, SystemTime};

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Error, Row};

use super::connection::Connection;
use super::failure::{Failure, is_of_data};
use super::lookup::Found;
use super::table::Table;
use crate::backend::form::Form;
use crate::backend::{Record, Write, WriteOutcome};

/// Number of attempts to claim a key while others claim and remove it.
const ATTEMPTS: usize = 10;

/// A NUL in the text of a JSON object. It may also be an escaped backslash before `u0000`, which then does no harm.
const NUL: &[u8] = b"\\u0000";

pub(super) struct Group {
    writes: Vec<Write>,
    /// One for each write.
    values: Vec<Value>,
}

/// The columns of the row that is written.
#[derive(Default)]
struct Value {
    record: Option<Vec<u8>>,
    context: Option<String>,
    lifetime: i64,
}

/// The outcome of one write.
type Written = Result<WriteOutcome, Failure>;

impl Group {
    pub(super) fn new(writes: &[Write], form: Form) -> Self {
        let value = |write: &Write| match write {
            Write::PutIfAbsent(key, record) | Write::Put(key, record) => {
                Value::new(key, record, form)
            }
            Write::Expire(_, at) => Value {
                lifetime: lifetime(*at),
                ..Value::default()
            },
            Write::Remove(_) => Value::default(),
        };
        Self {
            values: writes.iter().map(value).collect(),
            writes: writes.to_vec(),
        }
    }

    /// Carries out the writes, and returns an outcome for each.
    pub(super) async fn write(
        &self,
        client: &Connection,
        table: &Table,
        most: Duration,
    ) -> Result<Vec<Written>, Failure> {
        let mut outcomes: Vec<_> = self.writes.iter().map(|_| Ok(WriteOutcome::Done)).collect();
        for run in self.runs() {
            for of_kind in self.by_kind(&run) {
                // Of the writes that the server refuses, those are found that are to blame.
                let mut todo = vec![&*of_kind];
                while let Some(some) = todo.pop() {
                    let refused = match self.carry_out(client, table, most, some).await {
                        Ok(found) => {
                            outcomes_of(found, &mut outcomes);
                            continue;
                        }
                        Err(Failure::Postgres(error)) if is_of_data(&error) => error,
                        Err(failure) => return Err(failure),
                    };
                    match some {
                        &[one] => outcomes[one] = Err(refused.into()),
                        _ => todo.extend(<[_; 2]>::from(some.split_at(some.len() / 2))),
                    }
                }
            }
        }
        Ok(outcomes)
    }

    /// Divides the writes into the first one on each key, the second ones, and so on: a statement can write to a row once,
    /// and the writes on a key keep their order.
    fn runs(&self) -> Vec<Vec<usize>> {
        let (mut runs, mut of_key) = (Vec::new(), HashMap::new());
        for (at, write) in self.writes.iter().enumerate() {
            let earlier = of_key.entry(write.key()).or_insert(0);
            if runs.len() == *earlier {
                runs.push(Vec::new());
            }
            runs[*earlier].push(at);
            *earlier += 1;
        }
        runs
    }

    /// Divides the writes of a run by what they do.
    fn by_kind(&self, run: &[usize]) -> Vec<Vec<usize>> {
        let mut kinds: Vec<Vec<usize>> = Vec::new();
        for &at in run {
            let kind = |&of: &usize| discriminant(&self.writes[of]);
            match kinds.iter_mut().find(|those| kind(&those[0]) == kind(&at)) {
                Some(those) => those.push(at),
                None => kinds.push(vec![at]),
            }
        }
        kinds
    }

    /// Carries out writes of one kind, all of them or none. Returns what claims have found.
    async fn carry_out(
        &self,
        client: &Connection,
        table: &Table,
        most: Duration,
        some: &[usize],
    ) -> Result<Vec<(usize, WriteOutcome)>, Failure> {
        let keys = self.keys(some);
        let lifetimes = self.lifetimes(some);
        match &self.writes[some[0]] {
            Write::PutIfAbsent(..) => return self.claim(client, table, most, some).await,
            Write::Put(..) => drop(self.insert(client, &table.put, most, some).await?),
            Write::Expire(..) => {
                let parameters: [(&(dyn ToSql + Sync), Type); 2] =
                    [(&keys, Type::BYTEA_ARRAY), (&lifetimes, Type::INT8_ARRAY)];
                client.run(&table.expire, &parameters, most).await?;
            }
            Write::Remove(_) => {
                client
                    .run(&table.remove, &[(&keys, Type::BYTEA_ARRAY)], most)
                    .await?;
            }
        }
        Ok(Vec::new())
    }

    async fn insert(
        &self,
        client: &Connection,
        statement: &str,
        most: Duration,
        some: &[usize],
    ) -> Result<Vec<Row>, Error> {
        let values = some.iter().map(|&at| &self.values[at]);
        let records: Vec<_> = values
            .clone()
            .map(|value| value.record.as_deref())
            .collect();
        let contexts: Vec<_> = values.map(|value| value.context.as_deref()).collect();
        let parameters: [(&(dyn ToSql + Sync), Type); 4] = [
            (&self.keys(some), Type::BYTEA_ARRAY),
            (&records, Type::BYTEA_ARRAY),
            (&contexts, Type::TEXT_ARRAY),
            (&self.lifetimes(some), Type::INT8_ARRAY),
        ];
        client.run(statement, &parameters, most).await
    }

    async fn claim(
        &self,
        client: &Connection,
        table: &Table,
        most: Duration,
        some: &[usize],
    ) -> Result<Vec<(usize, WriteOutcome)>, Failure> {
        let mut found = Vec::new();
        let mut open: HashMap<_, _> = some.iter().map(|&at| (self.key(at), at)).collect();
        for _ in 0..ATTEMPTS {
            let claimed: Vec<_> = open.values().copied().collect();
            let rows = self.insert(client, &table.claim, most, &claimed).await?;
            let (won, existing): (Vec<_>, Vec<_>) =
                rows.iter().partition(|row| row.get::<_, bool>("is_won"));
            for row in won {
                open.remove(row.get::<_, &[u8]>("key"));
            }
            for row in existing {
                let key: &[u8] = row.get("key");
                // Won since it was seen, if it is no longer open.
                let Some(at) = open.remove(key) else {
                    continue;
                };
                let record = table
                    .record(&Found::from_row(row))
                    .map(WriteOutcome::Existing);
                found.push((at, record.unwrap_or(WriteOutcome::Unreadable)));
            }
            if open.is_empty() {
                return Ok(found);
            }
        }
        Err(Failure::Table(format!(
            "{} keys of table {} changed during each of {ATTEMPTS} attempts to claim them",
            open.len(),
            table.name
        )))
    }

    fn key(&self, at: usize) -> &[u8] {
        self.writes[at].key().as_bytes()
    }

    fn keys(&self, some: &[usize]) -> Vec<&[u8]> {
        some.iter().map(|&at| self.key(at)).collect()
    }

    fn lifetimes(&self, some: &[usize]) -> Vec<i64> {
        some.iter().map(|&at| self.values[at].lifetime).collect()
    }
}

fn outcomes_of(found: Vec<(usize, WriteOutcome)>, outcomes: &mut [Written]) {
    for (at, outcome) in found {
        outcomes[at] = Ok(outcome);
    }
}

impl Value {
    fn new(key: &str, record: &Record, form: Form) -> Self {
        let mut form = form;
        let mut encoded = form.encode(key, record);
        let has_nul = || encoded.windows(NUL.len()).any(|bytes| bytes == NUL);
        if form == Form::Json && has_nul() {
            form = Form::Binary;
            encoded = form.encode(key, record);
        }
        let (record_column, context) = match form {
            Form::Binary => (Some(encoded), None),
            // JSON is UTF-8.
            Form::Json => (None, String::from_utf8(encoded).ok()),
        };
        Self {
            record: record_column,
            context,
            lifetime: lifetime(record.expires_at),
        }
    }
}

/// Returns how long a record lives, in milliseconds; negative if it has expired. At most a thousand years, since the
/// server's times end.
fn lifetime(expires_at: SystemTime) -> i64 {
    const LONGEST: i64 = 1000 * 365 * 24 * 60 * 60 * 1000;
    let milliseconds = |span: Duration| i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
    match expires_at.duration_since(SystemTime::now()) {
        Ok(left) => milliseconds(left).min(LONGEST),
        Err(gone) => -milliseconds(gone.duration()).min(LONGEST),
    }
}
