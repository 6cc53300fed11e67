//! What every storage asks first: a bounded, expiring, concurrent map from instance id to its runs.

pub(crate) mod entry;
mod inline_str;
mod slots;

use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _};
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use crate::backend::Record;
use crate::clock::{self, Clock, OnTick, SystemClock, Ticks};
use crate::context::WorkflowContext;
use crate::explain::Explanation;
use crate::explain::author::Authors;
use crate::explain::trail::{Event, Step, Trail};
use crate::lock::lock;
use crate::stats::Counter;
use entry::{Entry, Limits, Rank, Run};
use slots::Slots;

/// About how many instances share a shard at most: when it grows all of them are moved, and whoever needs it waits.
const SHARD: usize = 4096;

/// Among how many instances the one to be evicted is chosen, with the one just inserted, which stays. The least
/// recently used of 16 that lie anywhere is on average among the oldest sixteenth of all.
const CANDIDATES: usize = 17;

/// How many of them are of one shard that has more: shards that hold more than others, and so for longer, lose more.
const PER_SHARD: usize = 6;

/// How many instances a tick of the sweeper looks at, and how many anybody does while holding a lock.
const SWEPT_PER_TICK: usize = 16 * 1024;
const PER_LOCK: usize = 128;

/// A concurrent map, bounded in number and time.
///
/// Its methods lock one shard of the map for the time of a lookup; no lock is held while code of the caller runs.
pub(crate) struct Cache {
    hasher: foldhash::fast::RandomState,
    /// As many as a power of two.
    shards: Box<[Shard]>,
    len: AtomicUsize,
    limits: Limits,
    time: Ticks,
    sweep: Mutex<Sweep>,
    pub(crate) expired: Counter,
    pub(crate) evicted: Counter,
    pub(crate) trail: Trail,
}

/// A part of the instances, with cache lines of its own: what one thread writes here slows no other one down that
/// works on another shard.
///
/// Readers exclude each other too: a look is so short that a lock to be shared costs more than it gains, on one
/// instance as on many, and hits and misses are counted within it, not by atomics of their own.
#[derive(Default)]
#[repr(align(128))]
struct Shard(Mutex<Contents>);

/// What each look writes comes first, in the cache line of the lock.
#[derive(Default)]
#[repr(C)]
struct Contents {
    counts: Counts,
    entries: Slots<Entry>,
}

#[derive(Default)]
struct Counts {
    hits: u64,
    misses: u64,
}

/// How far a walk through all instances has come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    shard: usize,
    /// What lies here and beyond was seen; `None` at the end of the shard.
    place: Option<usize>,
}

#[derive(Debug, Default)]
struct Sweep {
    cursor: Cursor,
    next_pass: u32,
}

/// The key of a lookup. The hash is computed once for each operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key<'a> {
    pub(crate) hash: u64,
    pub(crate) id: &'a str,
    /// The run that asks.
    pub(crate) run_id: Option<&'a str>,
}

/// Another span was recorded first.
#[derive(Debug)]
pub(crate) struct Conflict {
    pub(crate) winner: WorkflowContext,
}

struct Candidate {
    rank: Rank,
    shard: usize,
    place: usize,
}

impl Cache {
    fn with(limits: Limits, time: Ticks, trail: Trail) -> Self {
        let shards = (0..shards(limits.max_instances)).map(|_| Shard::default());
        Self {
            hasher: foldhash::fast::RandomState::default(),
            shards: shards.collect(),
            len: AtomicUsize::new(0),
            limits,
            time,
            sweep: Mutex::default(),
            expired: Counter::default(),
            evicted: Counter::default(),
            trail,
        }
    }

    /// A store that is swept once in a while, by the clock if one is given.
    pub(crate) fn swept(limits: Limits, clock: Option<Arc<dyn Clock>>, steps: usize) -> Arc<Self> {
        let with = |time| Arc::new(Self::with(limits, time, Trail::new(steps)));
        if let Some(clock) = clock {
            return with(Ticks::of(clock));
        }
        let shared: Arc<Self> = with(Ticks::Shared);
        let weak = Arc::downgrade(&shared);
        match clock::subscribe(weak) {
            true => shared,
            false => with(Ticks::of(Arc::new(SystemClock))),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.sweep_all();
        self.len.load(Relaxed)
    }

    /// How many looks have found something, and how many have not.
    pub(crate) fn hits_and_misses(&self) -> (u64, u64) {
        self.shards.iter().fold((0, 0), |(hits, misses), shard| {
            let shard = shard.lock();
            (hits + shard.counts.hits, misses + shard.counts.misses)
        })
    }

    pub(crate) fn ids(&self) -> Ids<'_> {
        self.sweep_all();
        Ids {
            memory: self,
            cursor: Cursor::default(),
            page: Vec::new().into_iter(),
        }
    }

    /// Looks at the next few instances under one lock; `None` when all were seen.
    ///
    /// Each shard is walked from its end: what takes the place of a removed instance comes from there, and was
    /// seen. So an instance may be seen twice while others are removed, but is never left out.
    fn walk<R>(
        &self,
        cursor: &mut Cursor,
        see: impl Fn(usize, &Entry) -> Option<R>,
    ) -> Option<Vec<R>> {
        let instances = &self.shards.get(cursor.shard)?.lock().entries;
        let end = cursor.place.unwrap_or(usize::MAX).min(instances.len());
        let start = end.saturating_sub(PER_LOCK);
        let see = |place| see(place, instances.get(place)?);
        let seen = (start..end).rev().filter_map(see).collect();
        *cursor = match start {
            0 => Cursor {
                shard: cursor.shard + 1,
                place: None,
            },
            _ => Cursor {
                shard: cursor.shard,
                place: Some(start),
            },
        };
        Some(seen)
    }

    /// The key by which a span or a call looks for an instance.
    #[inline]
    pub(crate) fn key<'a>(&self, id: &'a str, run_id: Option<&'a str>) -> Key<'a> {
        Key {
            hash: self.hash(id),
            id,
            run_id,
        }
    }

    /// Looks at an instance, counted as a hit or a miss. `look` runs under the lock of the shard: it must neither block
    /// nor call out.
    #[inline]
    pub(crate) fn look_up<R>(&self, key: Key<'_>, look: impl FnOnce(Option<&Entry>) -> R) -> R {
        self.look_at(key, |found, counts| {
            match found {
                Some(_) => counts.hits += 1,
                None => counts.misses += 1,
            }
            look(found)
        })
    }

    /// Looks at an instance as [`look_up`](Self::look_up) does, counted as a hit, if the run that asks is known; else
    /// answers `None` and counts nothing.
    #[inline]
    pub(crate) fn look_up_known<R>(
        &self,
        key: Key<'_>,
        look: impl FnOnce(&Entry) -> R,
    ) -> Option<R> {
        self.look_at(key, |found, counts| {
            let known = found.filter(|entry| entry.run(key.run_id).is_some())?;
            counts.hits += 1;
            Some(look(known))
        })
    }

    /// Looks at an instance, without counting.
    fn look<R>(&self, key: Key<'_>, look: impl FnOnce(Option<&Entry>) -> R) -> R {
        self.look_at(key, |found, _| look(found))
    }

    #[inline]
    fn look_at<R>(&self, key: Key<'_>, look: impl FnOnce(Option<&Entry>, &mut Counts) -> R) -> R {
        let now = self.time.now();
        let mut shard = self.shards[self.shard(key.hash)].lock();
        let Contents { counts, entries } = &mut *shard;
        let is = |entry: &Entry| entry.id == *key.id;
        look(self.find(entries, key.hash, is, key.run_id, now), counts)
    }

    /// Looks at the instance whose id has that hash.
    fn look_at_hash<R>(&self, hash: u64, look: impl FnOnce(Option<&Entry>) -> R) -> R {
        let now = self.time.now();
        let mut shard = self.shards[self.shard(hash)].lock();
        let is = |entry: &Entry| self.hash_of(entry) == hash;
        look(self.find(&mut shard.entries, hash, is, None, now))
    }

    /// A live instance, which is used by that, for a run that asks.
    #[inline]
    fn find<'a>(
        &self,
        instances: &'a mut Slots<Entry>,
        hash: u64,
        is: impl Fn(&Entry) -> bool,
        run_id: Option<&str>,
        now: u32,
    ) -> Option<&'a Entry> {
        let place = instances.find(hash, is)?;
        let instance = instances.get_mut(place)?;
        if !instance.touch(now, &self.limits) {
            return None;
        }
        if let Some(run_id) = run_id {
            instance.name_latest(run_id);
        }
        Some(instance)
    }

    pub(crate) fn latest(&self, id: &str) -> Option<WorkflowContext> {
        self.look(self.key(id, None), |entry| {
            entry.map(|entry| entry.latest().context())
        })
    }

    pub(crate) fn has_room(&self) -> bool {
        self.len.load(Relaxed) < self.limits.max_instances
    }

    /// Whether there is something for that run.
    pub(crate) fn has(&self, id: &str, run_id: Option<&str>) -> bool {
        self.look(self.key(id, run_id), |entry| {
            entry.is_some_and(|entry| entry.run(run_id).is_some())
        })
    }

    /// Whatever was known of the instance is replaced; answers the ids of its runs.
    pub(crate) fn replace(&self, id: &str, context: WorkflowContext) -> Vec<Box<str>> {
        let hash = self.hash(id);
        // All that is taken out under the lock is a pointer, nearly always none.
        let mut rare = None;
        let run = Run::new(context, None, 1);
        let replaced = self.upsert(hash, id, run, |instance, run| {
            rare = instance.latest.rare.take();
            instance.latest = run;
            instance.completed.set(0);
            Ok(())
        });
        debug_assert!(
            replaced.is_ok(),
            "nothing can be in conflict with what replaces everything"
        );
        self.note(hash, Event::Stored);
        rare.map_or_else(Vec::new, |rare| rare.run_ids())
    }

    /// Takes over what a backend knows, unless memory knows of that run already.
    pub(crate) fn insert_fetched(&self, id: &str, record: Record) {
        let run_id = record.run_id.as_deref();
        let run = Run::new(record.context, run_id, record.generation);
        // A conflict means that memory was told meanwhile.
        let _ = self.upsert(self.hash(id), id, run, |instance, run| {
            match instance.run_mut(run_id) {
                Some(there) => Err(Conflict {
                    winner: there.context(),
                }),
                None => {
                    instance.begin(run);
                    Ok(())
                }
            }
        });
    }

    /// Another process was first: its context takes the place of ours, if that is still the one.
    pub(crate) fn overrule(&self, id: &str, ours: &WorkflowContext, winner: Record) {
        let now = self.time.now();
        let hash = self.hash(id);
        let mut shard = self.shards[self.shard(hash)].lock();
        let instances = &mut shard.entries;
        let found = instances.find(hash, |instance| instance.id == *id);
        let Some(instance) = found.and_then(|place| instances.get_mut(place)) else {
            return;
        };
        if !instance.touch(now, &self.limits) {
            return;
        }
        instance.for_each_run(|run| {
            if run.context() == *ours {
                let id = run.run_id().map(|id| id.as_str().to_owned());
                let context = winner.context.clone();
                run.give_way_to(Run::new(context, id.as_deref(), winner.generation));
            }
        });
    }

    /// Removes the instance, and answers the ids of its runs.
    pub(crate) fn remove(&self, id: &str) -> Option<Vec<Box<str>>> {
        let now = self.time.now();
        let hash = self.hash(id);
        let end = |instance: &mut Entry| match instance.rank(now, &self.limits) {
            Rank::Expired => Err(instance.end()),
            Rank::Completed | Rank::Used(_) => Ok(instance.latest.rare.take()),
        };
        match self.remove_where(hash, |instance| instance.id == *id, end)? {
            Ok(rare) => {
                self.note_at(now, hash, Event::CleanedUp);
                Some(rare.map_or_else(Vec::new, |rare| rare.run_ids()))
            }
            Err(end) => {
                self.lose(hash, now, end);
                None
            }
        }
    }

    /// Records the context of a run, first writer wins; as the given generation where it follows another trace.
    pub(crate) fn record(
        &self,
        key: Key<'_>,
        follows: Option<(&WorkflowContext, u32)>,
        context: WorkflowContext,
        author: Option<NonZeroU16>,
    ) -> Result<(), Conflict> {
        let generation = follows.map_or(1, |(_, generation)| generation);
        let mut run = Run::new(context, key.run_id, generation);
        run.author = author;
        self.upsert(key.hash, key.id, run, |entry, run| {
            match entry.run_mut(key.run_id) {
                Some(there) if follows.is_some_and(|(context, _)| there.context() == *context) => {
                    there.continue_as(run);
                    Ok(())
                }
                Some(there) => Err(Conflict {
                    winner: there.context(),
                }),
                None => {
                    entry.begin(run);
                    Ok(())
                }
            }
        })
    }

    /// Lets another thread open the next trace, after this one could not.
    pub(crate) fn stop_rolling(&self, key: Key<'_>) {
        self.look(key, |entry| {
            if let Some(run) = entry.and_then(|entry| entry.run(key.run_id)) {
                run.set_rolling(false);
            }
        });
    }

    /// Adds to the trail of the instance.
    #[inline]
    pub(crate) fn note(&self, hash: u64, event: Event) {
        if !self.trail.is_off() {
            self.note_at(self.time.now(), hash, event);
        }
    }

    #[inline]
    fn note_at(&self, tick: u32, instance: u64, event: Event) {
        self.trail.add(Step {
            instance,
            tick,
            event,
        });
    }

    /// Looks without that being a use.
    pub(crate) fn explain(&self, id: &str, wall: SystemTime, authors: &Authors) -> Explanation {
        let now = self.time.now();
        let hash = self.hash(id);
        let is_over = |instance: &Entry| {
            instance.id == *id && instance.rank(now, &self.limits) == Rank::Expired
        };
        // Nobody may have looked since its time was over, and then the trail does not say so.
        if let Some(end) = self.remove_where(hash, is_over, |instance| instance.end()) {
            self.lose(hash, now, end);
        }
        let found = {
            let instances = &self.shards[self.shard(hash)].lock().entries;
            let found = instances.find(hash, |instance| instance.id == *id);
            let found = found.and_then(|place| instances.get(place));
            found.map(|instance| (instance.explain(wall), instance.latest().author))
        };
        let recorded = found.map(|(mut recorded, author)| {
            recorded.author = author.and_then(|index| authors.get(index));
            recorded
        });
        let steps = self.trail.of(hash);
        Explanation::new(id, recorded, steps, now, self.trail.is_off())
    }

    /// Marks the instance as completed, unless a newer run has begun; `true` for the first call.
    pub(crate) fn complete(&self, key: Key<'_>) -> bool {
        self.note(key.hash, Event::Completed);
        let now = self.time.now();
        self.look(key, |entry| {
            entry.is_some_and(|entry| entry.complete(key.run_id, now))
        })
    }

    /// Marks the instance whose id has that hash as completed.
    pub(crate) fn complete_hashed(&self, hash: u64) -> bool {
        self.note(hash, Event::Completed);
        let now = self.time.now();
        self.look_at_hash(hash, |entry| {
            entry.is_some_and(|entry| entry.complete(None, now))
        })
    }

    /// Some more ids that were used since that tick, for the backend to keep them longer; `None` when all were seen.
    pub(crate) fn used_since(
        &self,
        tick: u32,
        cursor: &mut Cursor,
    ) -> Option<Vec<(String, Vec<Box<str>>)>> {
        self.walk(cursor, |_, instance| {
            let used = instance.used.get() >> 1;
            let refresh = used >= tick && instance.completed.get() == 0;
            refresh.then(|| (instance.id.as_str().to_owned(), instance.run_ids()))
        })
    }

    /// Updates a live instance under the lock of its shard, or inserts a new one with that run.
    #[inline]
    fn upsert(
        &self,
        hash: u64,
        id: &str,
        run: Run,
        update: impl FnOnce(&mut Entry, Run) -> Result<(), Conflict>,
    ) -> Result<(), Conflict> {
        let now = self.time.now();
        {
            let mut shard = self.shards[self.shard(hash)].lock();
            let instances = &mut shard.entries;
            let found = instances.find(hash, |instance| instance.id == *id);
            if let Some(instance) = found.and_then(|place| instances.get_mut(place)) {
                if instance.touch(now, &self.limits) {
                    return update(instance, run);
                }
                let end = instance.end();
                *instance = Entry::new(id, run, now);
                drop(shard);
                self.lose(hash, now, end);
                return Ok(());
            }
            instances.insert(hash, Entry::new(id, run, now), |i| self.hash_of(i));
        }
        let before = self.len.fetch_add(1, Relaxed);
        if before >= self.limits.max_instances {
            self.make_room(now, hash, id);
        }
        Ok(())
    }

    #[cold]
    fn make_room(&self, now: u32, hash: u64, inserted: &str) {
        // The second makes up for an insertion that found nothing to evict, all being taken by other threads.
        for _ in 0..2 {
            if self.len.load(Relaxed) > self.limits.max_instances {
                self.evict(now, hash, inserted);
            }
        }
    }

    /// Removes an instance, and answers what was to be taken out of it.
    #[inline]
    fn remove_where<R>(
        &self,
        hash: u64,
        is: impl Fn(&Entry) -> bool,
        take: impl FnOnce(&mut Entry) -> R,
    ) -> Option<R> {
        let mut shard = self.shards[self.shard(hash)].lock();
        let instances = &mut shard.entries;
        let place = instances.find(hash, is)?;
        let taken = take(instances.get_mut(place)?);
        instances.remove(hash, place, |instance| self.hash_of(instance));
        drop(shard);
        self.len.fetch_sub(1, Relaxed);
        Some(taken)
    }

    /// Removes what has that place now, if it `is` still what is to go; its hash, and what its end is called.
    fn remove_at(
        &self,
        shard: usize,
        place: usize,
        is: impl Fn(&Entry) -> bool,
    ) -> Option<(u64, Event)> {
        let mut shard = self.shards[shard].lock();
        let instances = &mut shard.entries;
        let instance = instances.get(place).filter(|instance| is(instance))?;
        let (hash, end) = (self.hash_of(instance), instance.end());
        instances.remove(hash, place, |instance| self.hash_of(instance));
        drop(shard);
        self.len.fetch_sub(1, Relaxed);
        Some((hash, end))
    }

    /// Removes one instance other than the one that was just inserted.
    fn evict(&self, now: u32, hash: u64, inserted: &str) {
        // A candidate that was used or removed meanwhile is let go, and others are looked for.
        for attempt in 0..4 {
            let Some(victim) = self.candidate(now, hash, inserted, attempt) else {
                return;
            };
            let removed = self.remove_at(victim.shard, victim.place, |instance| {
                instance.rank(now, &self.limits) <= victim.rank && instance.id != *inserted
            });
            if let Some((hash, end)) = removed {
                let event = match victim.rank {
                    Rank::Expired => end,
                    Rank::Completed | Rank::Used(_) => Event::Evicted,
                };
                return self.lose(hash, now, event);
            }
        }
    }

    /// The one to go first among a few, of the shard of the one just inserted and of those after it.
    fn candidate(&self, now: u32, hash: u64, inserted: &str, attempt: usize) -> Option<Candidate> {
        let own = self.shard(hash);
        let mut best: Option<Candidate> = None;
        let mut seen = 0;
        for shard in (own..self.shards.len()).chain(0..own) {
            let instances = &self.shards[shard].lock().entries;
            let looked_at = match CANDIDATES - seen {
                left if instances.len() <= left => instances.len(),
                left => left.min(PER_SHARD),
            };
            for nth in 0..looked_at {
                let place = match looked_at == instances.len() {
                    true => nth,
                    false => scattered(hash, attempt * CANDIDATES + nth, instances.len()),
                };
                seen += 1;
                let Some(instance) = instances.get(place) else {
                    continue;
                };
                if shard == own && instance.id == *inserted {
                    continue;
                }
                let rank = instance.rank(now, &self.limits);
                if best.as_ref().is_none_or(|best| rank < best.rank) {
                    best = Some(Candidate { rank, shard, place });
                }
            }
            if seen >= CANDIDATES {
                break;
            }
        }
        best
    }

    /// Looks at some instances, and removes those whose time is over.
    fn sweep(&self, now: u32, most: usize) {
        let mut sweep = lock(&self.sweep);
        if now < sweep.next_pass {
            return;
        }
        let is_over = |instance: &Entry| instance.rank(now, &self.limits) == Rank::Expired;
        for _ in 0..most.div_ceil(PER_LOCK) {
            let shard = sweep.cursor.shard;
            let over = self.walk(&mut sweep.cursor, |place, instance| {
                is_over(instance).then_some(place)
            });
            let Some(over) = over else {
                // Ages are exact wherever they are looked at: a pass only frees memory.
                let shortest = self.limits.idle_ttl.min(self.limits.completed_grace);
                let next_pass = now.saturating_add(shortest / 16);
                *sweep = Sweep {
                    next_pass,
                    ..Sweep::default()
                };
                return;
            };
            for place in over {
                if let Some((hash, end)) = self.remove_at(shard, place, is_over) {
                    self.lose(hash, now, end);
                }
            }
        }
    }

    fn lose(&self, hash: u64, now: u32, event: Event) {
        match event {
            Event::Evicted => self.evicted.add(),
            _ => self.expired.add(),
        }
        self.note_at(now, hash, event);
    }

    /// With a clock of the caller's own nobody ticks: everything is swept when it is looked at as a whole.
    fn sweep_all(&self) {
        if let Ticks::Of { .. } = self.time {
            let now = self.time.now();
            lock(&self.sweep).next_pass = 0;
            self.sweep(now, usize::MAX);
        }
    }

    /// What stands for an id; to be computed once an operation.
    #[inline]
    pub(crate) fn hash(&self, id: &str) -> u64 {
        self.hash_bytes(id.as_bytes())
    }

    #[inline]
    fn hash_of(&self, instance: &Entry) -> u64 {
        self.hash_bytes(instance.id.as_bytes())
    }

    #[inline]
    fn hash_bytes(&self, id: &[u8]) -> u64 {
        // Not by `Hash`, which also hashes where a text ends: nothing follows it.
        let mut hasher = self.hasher.build_hasher();
        hasher.write(id);
        hasher.finish()
    }

    #[inline]
    fn shard(&self, hash: u64) -> usize {
        // The table of a shard uses the upper seven bits and the lowest ones.
        (hash << 7 >> 32) as usize & (self.shards.len() - 1)
    }
}

impl Shard {
    #[inline]
    fn lock(&self) -> MutexGuard<'_, Contents> {
        lock(&self.0)
    }
}

impl OnTick for Cache {
    fn on_tick(&self, now: u32) {
        self.sweep(now, SWEPT_PER_TICK);
    }
}

/// Enough for the processors of this machine, and for that many instances.
fn shards(max_instances: usize) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let shards = (4 * processors).max(max_instances / SHARD);
    shards.min(1024).next_power_of_two()
}

/// Numbers below a limit, spread over all of them from somewhere on: a pattern in how instances came and are used
/// must not meet one in how they are looked at.
fn scattered(seed: u64, nth: usize, limit: usize) -> usize {
    // Multiples of the golden ratio leave no large gaps; the seed is a hash.
    let fraction = seed
        .wrapping_add(nth as u64)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((u128::from(fraction) * limit as u128) >> 64) as usize
}

/// A walk through the ids of all instances that takes a lock for some at a time, and none while it is not asked.
#[derive(Debug)]
pub(crate) struct Ids<'a> {
    memory: &'a Cache,
    cursor: Cursor,
    page: std::vec::IntoIter<String>,
}

impl Iterator for Ids<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            if let Some(id) = self.page.next() {
                return Some(id);
            }
            let page = self.memory.walk(&mut self.cursor, |_, instance| {
                Some(instance.id.as_str().to_owned())
            })?;
            self.page = page.into_iter();
        }
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache")
            .field("instances", &self.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn cache(max_instances: usize) -> Arc<Cache> {
        let limits = Limits {
            max_instances,
            idle_ttl: u32::MAX >> 1,
            completed_grace: u32::MAX >> 1,
        };
        Cache::swept(limits, Some(Arc::new(SystemClock)), 0)
    }

    fn context(span: u64) -> WorkflowContext {
        let text = format!("00-{:032x}-{span:016x}-01", 1);
        WorkflowContext::parse(&text, "").expect("well formed")
    }

    #[test]
    fn the_hash_of_an_id_stands_for_it() {
        let cache = cache(100);
        for id in [
            "short",
            "0af76519-16cd-43dd-8448-eb211c80319c",
            &"long".repeat(20),
        ] {
            let hash = cache.hash(id);
            assert!(!cache.complete_hashed(hash), "nothing is stored yet");
            cache.replace(id, context(1));
            let is_there = |instance: Option<&Entry>| instance.is_some();
            assert!(cache.look_up(cache.key(id, None), is_there));
            assert!(!cache.look_up(
                Key {
                    hash,
                    id: "another id",
                    run_id: None
                },
                is_there
            ));
            assert!(cache.complete_hashed(hash));
            assert!(!cache.complete_hashed(hash), "it is completed");
            assert!(!cache.complete(cache.key(id, None)));
        }
    }

    proptest! {
        #[test]
        fn it_holds_what_a_map_does(
            steps in prop::collection::vec((0..4_u8, 0..100_u64), 0..300),
        ) {
            let (cache, mut model) = (cache(1_000), BTreeMap::new());
            let (mut hits, mut misses) = (0, 0);
            for (step, (what, n)) in (1..).zip(steps) {
                let id = format!("{n:020}").repeat(1 + n as usize % 3);
                match what {
                    0 => {
                        let removed = cache.remove(&id).is_some();
                        prop_assert_eq!(removed, model.remove(&id).is_some());
                    }
                    1 => {
                        let span = cache.look_up(cache.key(&id, None), |instance| {
                            instance.map(|instance| instance.latest().context().span_id())
                        });
                        prop_assert_eq!(span, model.get(&id).map(|span: &u64| (*span).into()));
                        *if span.is_some() { &mut hits } else { &mut misses } += 1;
                    }
                    _ => {
                        cache.replace(&id, context(step));
                        model.insert(id, step);
                    }
                }
            }
            prop_assert_eq!(cache.len(), model.len());
            prop_assert_eq!(cache.hits_and_misses(), (hits, misses));
            let mut ids: Vec<_> = cache.ids().collect();
            ids.sort_unstable();
            prop_assert!(ids.iter().eq(model.keys()));
        }

        #[test]
        fn no_more_than_allowed_are_kept_and_the_last_one_is(
            max in 1..40_usize,
            ids in prop::collection::vec(0..100_u64, 1..100),
        ) {
            let cache = cache(max);
            for n in ids {
                let id = n.to_string();
                cache.replace(&id, context(n + 1));
                prop_assert!(cache.len() <= max);
                prop_assert_eq!(cache.latest(&id).map(|cx| cx.span_id()), Some((n + 1).into()));
            }
        }
    }
}
