//! The sharded map: which shard holds an instance, its lock, and its removal.

use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

use super::entry::{Entry, Limits, Run};
use super::slots::Slots;
use crate::explain::trail::Event;
use crate::lock::lock;

/// The approximate maximum of instances in a shard. A shard that grows moves all of its entries, and other threads wait
/// for its lock meanwhile.
const PER_SHARD: usize = 4096;

/// The bytes of an instance without a run id or a tracestate, and with an id of up to 38 bytes: 119 were measured for UUIDs at
/// a million (docs/PERFORMANCE.md), and up to twice as much of the table is free after it has grown.
const PER_ENTRY: usize = 176;

/// All entries, spread over shards by the hash of their ids. Each method locks one shard at a time.
pub(super) struct Shards {
    hasher: foldhash::fast::RandomState,
    /// Their number is a power of two.
    shards: Box<[Shard]>,
    len: AtomicUsize,
    /// The bytes beyond the entries themselves, as they were last counted.
    more_bytes: AtomicUsize,
    /// The most instances that take no more bytes than that.
    most_small: usize,
    pub(super) limits: Limits,
}

/// A part of the entries, with cache lines of its own: threads that work on different shards do not slow each other
/// down.
///
/// Readers exclude each other too: a lookup is so short that a reader-writer lock costs more than it gains, and hits and
/// misses are counted under the lock instead of by atomics.
#[repr(align(128))]
struct Shard(Mutex<Contents>);

/// The contents of a shard. The counts, which each lookup writes, come first: they are in the cache line of the lock.
#[repr(C)]
pub(super) struct Contents {
    pub(super) counts: Counts,
    pub(super) table: Slots<Entry>,
}

#[derive(Default)]
pub(super) struct Counts {
    pub(super) hits: u64,
    pub(super) misses: u64,
}

impl Shards {
    pub(super) fn new(limits: Limits) -> Self {
        let shards = (0..count(limits.max_instances)).map(|_| {
            Shard(Mutex::new(Contents {
                counts: Counts::default(),
                table: Slots::default(),
            }))
        });
        Self {
            hasher: foldhash::fast::RandomState::default(),
            shards: shards.collect(),
            len: AtomicUsize::new(0),
            more_bytes: AtomicUsize::new(0),
            most_small: limits.max_instances.min(limits.max_bytes / PER_ENTRY),
            limits,
        }
    }

    /// Returns the number of shards.
    pub(super) fn number(&self) -> usize {
        self.shards.len()
    }

    /// Returns the number of instances, including those that have expired and were not removed yet.
    pub(super) fn len(&self) -> usize {
        self.len.load(Relaxed)
    }

    /// Returns `true` if there are more instances or bytes than there may be.
    #[inline]
    pub(super) fn are_too_many(&self) -> bool {
        self.is_too_many(self.len())
    }

    #[inline]
    fn is_too_many(&self, len: usize) -> bool {
        match self.more_bytes.load(Relaxed) {
            0 => len > self.most_small,
            // As much memory as there is does not overflow.
            more => {
                let bytes = len.wrapping_mul(PER_ENTRY).wrapping_add(more);
                len > self.limits.max_instances || bytes > self.limits.max_bytes
            }
        }
    }

    /// Returns `true` if one more instance fits without an eviction.
    pub(super) fn has_room(&self) -> bool {
        !self.is_too_many(self.len() + 1)
    }

    /// Changes each run of an entry, whose bytes are counted again.
    pub(super) fn change_runs(&self, entry: &mut Entry, change: impl FnMut(&mut Run)) {
        let before = entry.counted_bytes();
        entry.for_each_run(change);
        self.recount(before, entry.count_bytes());
    }

    /// Notes that the counted bytes of an entry have changed. Returns `true` if there are more. To be called under the lock of
    /// its shard: an entry that another thread removes has been counted then, so that the sum is never less than zero.
    #[inline]
    pub(super) fn recount(&self, before: usize, now: usize) -> bool {
        if before != now {
            // Wraps where there are less.
            self.more_bytes.fetch_add(now.wrapping_sub(before), Relaxed);
        }
        now > before
    }

    /// Returns the number of shards.
    pub(super) fn count(&self) -> usize {
        self.shards.len()
    }

    /// Notes an insertion, under the lock of the shard. Returns `true` if there are too many now.
    #[inline]
    pub(super) fn count_inserted(&self, bytes: usize) -> bool {
        self.recount(0, bytes);
        let len = self.len.fetch_add(1, Relaxed) + 1;
        self.is_too_many(len)
    }

    /// Notes a removal, under the lock of the shard.
    #[inline]
    fn count_removed(&self, bytes: usize) {
        self.len.fetch_sub(1, Relaxed);
        self.recount(bytes, 0);
    }

    /// Returns the hits and misses of all shards.
    pub(super) fn hits_and_misses(&self) -> (u64, u64) {
        self.shards.iter().fold((0, 0), |(hits, misses), shard| {
            let counts = &lock(&shard.0).counts;
            (hits + counts.hits, misses + counts.misses)
        })
    }

    #[inline]
    pub(super) fn hash(&self, id: &str) -> u64 {
        self.hash_bytes(id.as_bytes())
    }

    #[inline]
    pub(super) fn hash_of(&self, entry: &Entry) -> u64 {
        self.hash_bytes(entry.id.as_bytes())
    }

    #[inline]
    fn hash_bytes(&self, id: &[u8]) -> u64 {
        // Not by `Hash`, which also hashes the end of a string: nothing follows it here.
        let mut hasher = self.hasher.build_hasher();
        hasher.write(id);
        hasher.finish()
    }

    /// Returns the number of the shard that holds the instances with that hash.
    #[inline]
    pub(super) fn shard_of(&self, hash: u64) -> usize {
        // The table of a shard uses the upper seven bits and the lowest ones.
        (hash << 7 >> 32) as usize & (self.shards.len() - 1)
    }

    /// Locks the shard that holds the instances with that hash.
    #[inline]
    pub(super) fn lock_for(&self, hash: u64) -> MutexGuard<'_, Contents> {
        lock(&self.shards[self.shard_of(hash)].0)
    }

    /// Locks the shard with that number; `None` past the last one.
    pub(super) fn lock_nth(&self, shard: usize) -> Option<MutexGuard<'_, Contents>> {
        self.shards.get(shard).map(|shard| lock(&shard.0))
    }

    /// Removes an instance, unless `take` refuses with `None`; returns what that took from the entry.
    #[inline]
    pub(super) fn remove<R>(
        &self,
        hash: u64,
        id: &str,
        take: impl FnOnce(&mut Entry) -> Option<R>,
    ) -> Option<R> {
        let mut shard = self.lock_for(hash);
        let index = shard.table.find(hash, |entry| entry.id == *id)?;
        let entry = shard.table.get_mut(index)?;
        let bytes = entry.counted_bytes();
        let taken = take(entry)?;
        shard.table.remove(hash, index, |entry| self.hash_of(entry));
        self.count_removed(bytes);
        Some(taken)
    }

    /// Removes the entry that has that index now, if it fulfils the condition. Returns its hash, and the event that its
    /// expiry is.
    pub(super) fn remove_at(
        &self,
        shard: usize,
        index: usize,
        condition: impl FnOnce(&Entry) -> bool,
    ) -> Option<(u64, Event)> {
        let mut shard = self.lock_nth(shard)?;
        let entry = shard.table.get(index).filter(|entry| condition(entry))?;
        let (hash, event) = (self.hash_of(entry), entry.expiry_event());
        let bytes = entry.counted_bytes();
        shard.table.remove(hash, index, |entry| self.hash_of(entry));
        self.count_removed(bytes);
        Some((hash, event))
    }
}

/// Returns a number of shards that is enough for the processors of this machine, and for that many instances.
fn count(max_instances: usize) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let shards = (4 * processors).max(max_instances / PER_SHARD);
    shards.min(1024).next_power_of_two()
}
