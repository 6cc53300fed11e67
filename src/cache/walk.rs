//! Walks through all entries, a page under one lock at a time: the sweep of expired ones, and the listing of ids.

use super::entry::{Entry, Rank};
use super::shards::Shards;
use crate::explain::trail::Event;

/// The number of entries that are read under one lock.
const PAGE: usize = 128;

/// The position of a walk through all entries.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    shard: usize,
    /// Entries at this index and above were read; `None` before the first page of the shard.
    index: Option<usize>,
}

impl Cursor {
    /// Returns the share of the shards that were read to their end.
    pub(super) fn share(&self, shards: &Shards) -> f64 {
        self.shard as f64 / shards.number() as f64
    }

    /// Reads the next page of entries; `None` when all were read.
    ///
    /// Each shard is walked from its end: the entry that takes the place of a removed one comes from there, and was read.
    /// So an entry may be read twice while others are removed, but is never missed.
    pub(super) fn next_page<R>(
        &mut self,
        shards: &Shards,
        read: impl Fn(usize, &Entry) -> Option<R>,
    ) -> Option<Vec<R>> {
        let table = &shards.lock_nth(self.shard)?.table;
        let end = self.index.unwrap_or(usize::MAX).min(table.len());
        let start = end.saturating_sub(PAGE);
        let read = |index| read(index, table.get(index)?);
        let page = (start..end).rev().filter_map(read).collect();
        *self = match start {
            0 => Self {
                shard: self.shard + 1,
                index: None,
            },
            _ => Self {
                shard: self.shard,
                index: Some(start),
            },
        };
        Some(page)
    }
}

/// The sweep: repeated passes over all entries that remove the expired ones.
///
/// An expired entry is never returned by a lookup: a pass only frees its memory.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    cursor: Cursor,
    /// The tick before which no pass begins.
    next_pass: u32,
}

impl Sweep {
    /// Continues the pass under way with about that many entries, and reports each removed one by its hash.
    pub(super) fn run(
        &mut self,
        shards: &Shards,
        now: u32,
        entries: usize,
        mut report: impl FnMut(u64, Event),
    ) {
        if now < self.next_pass {
            return;
        }
        let is_expired = |entry: &Entry| entry.rank(now, &shards.limits) == Rank::Expired;
        for _ in 0..entries.div_ceil(PAGE) {
            let shard = self.cursor.shard;
            let expired = self
                .cursor
                .next_page(shards, |index, entry| is_expired(entry).then_some(index));
            let Some(expired) = expired else {
                let shortest = shards.limits.idle_ttl.min(shards.limits.completed_grace);
                *self = Self {
                    cursor: Cursor::default(),
                    next_pass: now.saturating_add(shortest / 16),
                };
                return;
            };
            for index in expired {
                if let Some((hash, event)) = shards.remove_at(shard, index, is_expired) {
                    report(hash, event);
                }
            }
        }
    }

    /// Runs a pass over all entries now.
    pub(super) fn run_all(&mut self, shards: &Shards, now: u32, report: impl FnMut(u64, Event)) {
        self.next_pass = 0;
        self.run(shards, now, usize::MAX, report);
    }
}

/// The ids of all instances, read page by page. No lock is held between two items.
pub(crate) struct Ids<'a> {
    shards: &'a Shards,
    cursor: Cursor,
    page: std::vec::IntoIter<String>,
}

impl<'a> Ids<'a> {
    pub(super) fn new(shards: &'a Shards) -> Self {
        Self {
            shards,
            cursor: Cursor::default(),
            page: Vec::new().into_iter(),
        }
    }
}

impl Iterator for Ids<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            if let Some(id) = self.page.next() {
                return Some(id);
            }
            let owned = |_, entry: &Entry| Some(entry.id.as_str().to_owned());
            self.page = self.cursor.next_page(self.shards, owned)?.into_iter();
        }
    }
}
