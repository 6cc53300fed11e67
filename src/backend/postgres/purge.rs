//! The deletion of expired rows, a few blocks of the table at a time.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::ops::Range;
use std::sync::Mutex;
use std::time::Duration;

use tokio_postgres::types::Type;

use super::connection::Connection;
use super::failure::Failure;
use super::table::Table;
use crate::lock::lock;

/// Number of writes after which some blocks are looked at.
const WRITES: usize = 256;

/// Number of writes for which one block is looked at. A block has about 24 rows.
const WRITES_PER_BLOCK: usize = 4;

/// The largest number of blocks that are looked at together: 4 MiB.
const MOST_BLOCKS: usize = 512;

/// The blocks that one worker has looked at. Each worker begins somewhere, so that together they look at all of the table.
#[derive(Default)]
pub(super) struct Purge(Mutex<State>);

#[derive(Default)]
struct State {
    /// Number of writes for which no blocks were looked at.
    written: usize,
    /// The next block, which is unknown until the size of the table is known.
    next: Option<u32>,
    /// Number of blocks that are being looked at.
    now: u32,
}

impl Purge {
    /// Returns the blocks to look at, if enough was written.
    pub(super) fn due(&self, written: usize) -> Option<Range<u32>> {
        let mut state = lock(&self.0);
        state.written += written;
        if state.written < WRITES {
            return None;
        }
        let blocks = (state.written / WRITES_PER_BLOCK).min(MOST_BLOCKS) as u32;
        state.written = 0;
        let next = state.next.unwrap_or(0);
        state.now = state.next.map_or(0, |_| blocks);
        Some(next..next.saturating_add(state.now))
    }

    /// Takes note that the blocks were looked at, in a table of that many.
    pub(super) fn done(&self, in_table: i64) {
        let in_table = u32::try_from(in_table).unwrap_or(u32::MAX);
        let mut state = lock(&self.0);
        let next = match state.next {
            Some(next) => next.saturating_add(state.now),
            None => {
                let random = RandomState::new().hash_one(in_table);
                (random % u64::from(in_table.max(1))) as u32
            }
        };
        state.next = Some(if next < in_table { next } else { 0 });
    }
}

/// Deletes the expired rows of some blocks, unless another worker does so. Returns the number of blocks of the table.
pub(super) async fn delete_expired(
    client: &Connection,
    table: &Table,
    blocks: Range<u32>,
    most: Duration,
) -> Result<i64, Failure> {
    let [name, begin, end] = [
        table.name.to_string(),
        format!("({},0)", blocks.start),
        format!("({},0)", blocks.end),
    ];
    let rows = client
        .run(
            &table.remove_expired,
            &[
                (&name, Type::TEXT),
                (&begin, Type::TEXT),
                (&end, Type::TEXT),
            ],
            most,
        )
        .await?;
    Ok(rows.first().map_or(0, |row| row.get("blocks")))
}
