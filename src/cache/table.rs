//! The table of one shard: entries by instance id, and by index.

use indexmap::IndexMap;
use indexmap::map::RawEntryApiV1 as _;
use indexmap::map::raw_entry_v1::RawEntryMut;

use super::entry::Entry;
use super::inline_str::InlineStr;

/// The entries of one shard, at the indices `0..len` without a gap.
///
/// A removal moves the last entry to the index of the removed one. A walk from the end therefore misses no entry while
/// others are removed, and a candidate for eviction is picked by its index alone.
///
/// The map has no hasher, so that only the methods that are given a hash compile: the caller has computed it already, to
/// choose the shard.
#[derive(Default)]
pub(super) struct Table(IndexMap<InlineStr, Entry, ()>);

/// The place of an id in the table, occupied or vacant.
pub(super) type Place<'a> = RawEntryMut<'a, InlineStr, Entry, ()>;

impl Table {
    /// The capacity below which a table does not shrink.
    const MIN_CAPACITY: usize = 8;

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    #[inline]
    pub(super) fn get(&self, index: usize) -> Option<(&InlineStr, &Entry)> {
        self.0.get_index(index)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Entry> {
        self.0.get_index_mut(index).map(|(_, entry)| entry)
    }

    /// Returns the index of the entry with that hash whose id matches.
    #[inline]
    pub(super) fn find(&self, hash: u64, is_match: impl Fn(&InlineStr) -> bool) -> Option<usize> {
        self.0.raw_entry_v1().index_from_hash(hash, is_match)
    }

    /// Returns the place of an id, with room for an insertion.
    #[inline]
    pub(super) fn place(&mut self, hash: u64, id: &str) -> Place<'_> {
        if self.0.len() == self.0.capacity() {
            self.grow();
        }
        self.0
            .raw_entry_mut_v1()
            .from_hash(hash, |known| *known == *id)
    }

    /// Removes the entry at an index.
    #[inline]
    pub(super) fn remove(&mut self, index: usize) -> Option<(InlineStr, Entry)> {
        let removed = self.0.swap_remove_index(index);
        let capacity = self.0.capacity();
        if self.0.len() < capacity / 2 && capacity > Self::MIN_CAPACITY {
            self.shrink();
        }
        removed
    }

    /// Grows by an eighth: doubling would leave a quarter of all memory unused on average.
    #[cold]
    fn grow(&mut self) {
        self.0.reserve_exact(self.spare());
    }

    #[cold]
    fn shrink(&mut self) {
        self.0.shrink_to(self.0.len() + self.spare());
    }

    fn spare(&self) -> usize {
        (self.0.len() / 8).max(Self::MIN_CAPACITY / 2)
    }
}
