//! The table of one shard: entries by instance id, and by index.

use std::hash::{BuildHasher as _, Hasher as _};

use foldhash::fast::RandomState;

use super::entry::Entry;
use super::inline_str::InlineStr;
use super::slots::Slots;

/// The entries of one shard, at the indices `0..len` without a gap. The caller has computed the hash of an id already, to
/// choose the shard.
pub(super) struct Table {
    entries: Slots<(InlineStr, Entry)>,
    hasher: RandomState,
}

impl Table {
    pub(super) fn new(hasher: RandomState) -> Self {
        Self {
            entries: Slots::default(),
            hasher,
        }
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    #[inline]
    pub(super) fn get(&self, index: usize) -> Option<(&InlineStr, &Entry)> {
        self.entries.get(index).map(|(id, entry)| (id, entry))
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Entry> {
        self.entries.get_mut(index).map(|(_, entry)| entry)
    }

    /// Returns the index of the entry with that hash whose id matches.
    #[inline]
    pub(super) fn find(&self, hash: u64, is_match: impl Fn(&InlineStr) -> bool) -> Option<usize> {
        self.entries.find(hash, |(id, _)| is_match(id))
    }

    /// Adds an entry whose id is not in the table yet.
    #[inline]
    pub(super) fn insert(&mut self, hash: u64, id: &str, entry: Entry) {
        let hasher = &self.hasher;
        let hash_of = |(id, _): &(InlineStr, Entry)| self::hash(hasher, id.as_bytes());
        self.entries.insert(hash, (id.into(), entry), hash_of);
    }

    /// Removes the entry at an index, whose id has that hash.
    #[inline]
    pub(super) fn remove(&mut self, hash: u64, index: usize) {
        let hasher = &self.hasher;
        let hash_of = |(id, _): &(InlineStr, Entry)| self::hash(hasher, id.as_bytes());
        self.entries.remove(hash, index, hash_of);
    }
}

/// Hashes an id.
#[inline]
pub(super) fn hash(hasher: &RandomState, id: &[u8]) -> u64 {
    // Not by `Hash`, which also hashes the end of a string: nothing follows it here.
    let mut hasher = hasher.build_hasher();
    hasher.write(id);
    hasher.finish()
}
