//! What every storage asks first: a bounded, expiring, concurrent map from instance id to its runs.

use std::fmt;
use std::hash::BuildHasher as _;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use dashmap::{DashMap, SharedValue};
use opentelemetry::SpanId;

use super::backend::Record;
use super::core::Counter;
use crate::clock::{self, Clock, OnTick, SystemClock, Ticks};
use crate::context::WorkflowContext;
use crate::explain::{Event, Explanation, Recorded, Recorder, Step, Trail};

/// How many runs of one instance are kept beside the latest, for their late spans.
const OLDER_RUNS: usize = 8;

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

/// A [`DashMap`], bounded in number and time.
///
/// Its methods lock one shard of the map for the time of a lookup; no lock is held while code of the caller runs.
pub(crate) struct Memory {
    /// Each shard is a hash table that is used by hash: an id is hashed once an operation.
    instances: DashMap<Box<str>, Instance, foldhash::fast::RandomState>,
    /// For each shard the hashes of its instances, in no order, so that some can be picked without a search. An
    /// instance knows its place. Locked within the shard's lock only.
    rings: Box<[Mutex<Vec<u64>>]>,
    len: AtomicUsize,
    limits: Limits,
    time: Ticks,
    sweep: Mutex<Sweep>,
    pub(crate) expired: Counter,
    pub(crate) evicted: Counter,
    pub(crate) trail: Trail,
}

/// What bounds the memory; durations in ticks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) max_instances: usize,
    pub(crate) idle_ttl: u32,
    pub(crate) completed_grace: u32,
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

/// The runs of one instance id.
pub(crate) struct Instance {
    latest: Run,
    /// Oldest first, at most [`OLDER_RUNS`].
    older: Vec<Run>,
    /// Twice the tick of the last use, and one more if it was used since it was stored.
    used: AtomicU32,
    /// The tick of the terminal status; zero while there is none.
    completed: AtomicU32,
    place: u32,
}

/// One run: what is recorded for it, and how its trace has grown since.
pub(crate) struct Run {
    pub(crate) context: WorkflowContext,
    /// Counts the traces of this run from 1; `max_age` and `max_spans` start the next one.
    pub(crate) generation: u32,
    /// `None` where a call stored it.
    recorder: Option<Arc<Recorder>>,
    /// Set later where the context was stored without a run id and a span of a run then joined it.
    id: OnceLock<Box<str>>,
    /// The spans of this generation that were recorded or placed by this process.
    spans: AtomicU64,
    /// A thread is opening the root of the next generation.
    rolling: AtomicBool,
    /// A span of this process was already told that its context came from another one.
    announced: AtomicBool,
}

/// The trace of a run that another one is to follow.
#[derive(Debug)]
pub(crate) struct Followed {
    context: WorkflowContext,
    generation: u32,
}

impl Followed {
    pub(crate) fn next(&self) -> u32 {
        self.generation.saturating_add(1)
    }

    pub(crate) fn span_id(&self) -> SpanId {
        self.context.span_id()
    }
}

/// Why a context was not recorded: somebody else was first.
#[derive(Debug)]
pub(crate) struct Conflict {
    pub(crate) winner: WorkflowContext,
}

/// Which instance goes first when there are too many: completed, then expired, then least recently used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Completed,
    Expired,
    Used(u32),
}

struct Candidate {
    rank: Rank,
    shard: usize,
    hash: u64,
    place: u32,
}

impl Memory {
    fn with(limits: Limits, time: Ticks, trail: Trail) -> Self {
        let instances: DashMap<_, _, foldhash::fast::RandomState> =
            DashMap::with_hasher_and_shard_amount(Default::default(), shards(limits.max_instances));
        let rings = instances
            .shards()
            .iter()
            .map(|_| Mutex::default())
            .collect();
        Self {
            instances,
            rings,
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
        self.settle();
        self.len.load(Relaxed)
    }

    pub(crate) fn ids(&self) -> Ids<'_> {
        self.settle();
        Ids {
            memory: self,
            cursor: Cursor::default(),
            page: Vec::new().into_iter(),
        }
    }

    /// Looks at the next few instances under one lock; `None` when all were seen.
    ///
    /// Each ring is walked from its end: what takes the place of a removed instance comes from there, and was
    /// seen. So an instance may be seen twice while others are removed, but is never left out.
    fn walk<R>(
        &self,
        cursor: &mut Cursor,
        see: impl Fn(&str, &Instance) -> Option<R>,
    ) -> Option<Vec<R>> {
        let shard = self.instances.shards().get(cursor.shard)?.read();
        let ring = lock(&self.rings[cursor.shard]);
        let end = cursor.place.unwrap_or(ring.len()).min(ring.len());
        let start = end.saturating_sub(PER_LOCK);
        let see = |place: usize| {
            let here = |instance: &Instance| instance.place as usize == place;
            let (id, instance) = shard.get(ring[place], |(_, instance)| here(instance.get()))?;
            see(id, instance.get())
        };
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

    /// Looks at an instance under the read lock of its shard: `look` must neither block nor call out.
    #[inline]
    pub(crate) fn look<R>(&self, id: &str, look: impl FnOnce(Option<&Instance>) -> R) -> R {
        self.look_hashed(self.hash(id), id, look)
    }

    #[inline]
    pub(crate) fn look_hashed<R>(
        &self,
        hash: u64,
        id: &str,
        look: impl FnOnce(Option<&Instance>) -> R,
    ) -> R {
        let now = self.time.now();
        let shard = self.instances.shards()[self.shard(hash)].read();
        let found = shard
            .get(hash, |(key, _)| **key == *id)
            .map(|(_, instance)| instance.get());
        look(found.filter(|instance| instance.touch(now, &self.limits)))
    }

    pub(crate) fn latest(&self, id: &str) -> Option<WorkflowContext> {
        self.look(id, |instance| instance.map(|i| i.latest.context.clone()))
    }

    pub(crate) fn has_room(&self) -> bool {
        self.len.load(Relaxed) < self.limits.max_instances
    }

    /// Whether there is something for that run.
    pub(crate) fn has(&self, id: &str, run_id: Option<&str>) -> bool {
        self.look(id, |instance| {
            instance.is_some_and(|instance| instance.run(run_id).is_some())
        })
    }

    /// Whatever was known of the instance is replaced; answers the ids of its runs.
    pub(crate) fn replace(&self, id: &str, context: WorkflowContext) -> Vec<Box<str>> {
        let mut runs = Vec::new();
        let run = Run::new(context, None, 1);
        let replaced = self.upsert(id, run, |instance, run| {
            runs = instance.run_ids();
            instance.latest = run;
            instance.older = Vec::new();
            *instance.completed.get_mut() = 0;
            Ok(())
        });
        debug_assert!(
            replaced.is_ok(),
            "nothing can be in conflict with what replaces everything"
        );
        self.note(id, Event::Stored);
        runs
    }

    /// Takes over what a backend knows, unless memory knows of that run already.
    pub(crate) fn adopt(&self, id: &str, record: Record) {
        let run_id = record.run_id.as_deref();
        let run = Run::new(record.context, run_id, record.generation);
        // A conflict means that memory was told meanwhile.
        let _ = self.upsert(id, run, |instance, run| match instance.run_mut(run_id) {
            Some(there) => Err(Conflict {
                winner: there.context.clone(),
            }),
            None => {
                instance.begin(run);
                Ok(())
            }
        });
    }

    /// Another process was first: its context takes the place of ours, if that is still the one.
    pub(crate) fn overrule(&self, id: &str, ours: &WorkflowContext, winner: Record) {
        let now = self.time.now();
        let hash = self.hash(id);
        let mut shard = self.instances.shards()[self.shard(hash)].write();
        let there = shard.get_mut(hash, |(key, _)| **key == *id);
        let Some(instance) = there.map(|(_, instance)| instance.get_mut()) else {
            return;
        };
        if !instance.touch(now, &self.limits) {
            return;
        }
        let runs = std::iter::once(&mut instance.latest).chain(&mut instance.older);
        for run in runs.filter(|run| run.context == *ours) {
            let id = run.id.get().map(|id| id.to_string());
            *run = Run::new(winner.context.clone(), id.as_deref(), winner.generation);
        }
    }

    /// Removes the instance, and answers the ids of its runs.
    pub(crate) fn remove_instance(&self, id: &str) -> Option<Vec<Box<str>>> {
        let now = self.time.now();
        let hash = self.hash(id);
        let removed = self.remove_where(hash, |key, _| *key == *id)?;
        if removed.rank(now, &self.limits) == Rank::Expired {
            self.lose(hash, now, removed.end());
            return None;
        }
        let event = Event::CleanedUp;
        self.trail.add(Step {
            instance: hash,
            tick: now,
            event,
        });
        Some(removed.run_ids())
    }

    /// Records the context of a run, first writer wins. `follows` names the trace which it is to replace.
    pub(crate) fn record(
        &self,
        id: &str,
        run_id: Option<&str>,
        follows: Option<Followed>,
        context: WorkflowContext,
        recorder: Option<Arc<Recorder>>,
    ) -> Result<u32, Conflict> {
        let generation = follows.as_ref().map_or(1, Followed::next);
        let run = Run {
            recorder,
            ..Run::new(context, run_id, generation)
        };
        let recorded = self.upsert(id, run, |instance, run| match instance.run_mut(run_id) {
            Some(there) if follows.as_ref().is_some_and(|f| there.is_followed_by(f)) => {
                *there = run;
                Ok(())
            }
            Some(there) => Err(Conflict {
                winner: there.context.clone(),
            }),
            None => {
                instance.begin(run);
                Ok(())
            }
        });
        recorded.map(|()| generation)
    }

    /// Lets another thread open the next generation, after this one could not.
    pub(crate) fn give_up_rolling(&self, id: &str, run_id: Option<&str>) {
        self.look(id, |instance| {
            if let Some(run) = instance.and_then(|i| i.run(run_id)) {
                run.rolling.store(false, Relaxed);
            }
        });
    }

    /// Adds to the trail of the instance.
    pub(crate) fn note(&self, id: &str, event: Event) {
        self.note_hashed(self.hash(id), event);
    }

    #[inline]
    pub(crate) fn note_hashed(&self, instance: u64, event: Event) {
        if !self.trail.is_off() {
            let tick = self.time.now();
            self.trail.add(Step {
                instance,
                tick,
                event,
            });
        }
    }

    /// Looks without that being a use.
    pub(crate) fn explain(&self, id: &str, wall: SystemTime) -> Explanation {
        let now = self.time.now();
        let hash = self.hash(id);
        let is_over = |key: &str, instance: &Instance| {
            *key == *id && instance.rank(now, &self.limits) == Rank::Expired
        };
        // Nobody may have looked since its time was over, and then the trail does not say so.
        if let Some(instance) = self.remove_where(hash, is_over) {
            self.lose(hash, now, instance.end());
        }
        let shard = self.instances.shards()[self.shard(hash)].read();
        let found = shard.get(hash, |(key, _)| **key == *id);
        let recorded = found.map(|(_, instance)| instance.get().explain(wall));
        drop(shard);
        let steps = self.trail.of(hash);
        Explanation::new(id, recorded, steps, now, self.trail.is_off())
    }

    /// The instance does no more work, unless a new run of it begins.
    pub(crate) fn complete(&self, id: &str, run_id: Option<&str>) -> bool {
        let now = self.time.now();
        self.note(id, Event::Completed);
        self.look(id, |instance| {
            let Some(instance) = instance.filter(|i| i.is_latest(run_id)) else {
                return false;
            };
            let completed = &instance.completed;
            completed
                .compare_exchange(0, now.max(1), Relaxed, Relaxed)
                .is_ok()
        })
    }

    /// The same for the latest run of the instance whose id has that hash.
    pub(crate) fn complete_hashed(&self, hash: u64) {
        let now = self.time.now();
        self.note_hashed(hash, Event::Completed);
        let shard = self.instances.shards()[self.shard(hash)].read();
        if let Some((_, instance)) = shard.get(hash, |(key, _)| self.hash(key) == hash) {
            let instance = instance.get();
            if instance.touch(now, &self.limits) {
                let _ = instance
                    .completed
                    .compare_exchange(0, now.max(1), Relaxed, Relaxed);
            }
        }
    }

    /// Some more ids that were used since that tick, for the backend to keep them longer; `None` when all were seen.
    pub(crate) fn used_since(
        &self,
        tick: u32,
        cursor: &mut Cursor,
    ) -> Option<Vec<(String, Vec<Box<str>>)>> {
        self.walk(cursor, |id, instance| {
            let used = instance.used.load(Relaxed) >> 1;
            let refresh = used >= tick && instance.completed.load(Relaxed) == 0;
            refresh.then(|| (id.to_owned(), instance.run_ids()))
        })
    }

    /// Updates a live instance under the write lock of its shard, or inserts a new one with that run.
    fn upsert(
        &self,
        id: &str,
        run: Run,
        update: impl FnOnce(&mut Instance, Run) -> Result<(), Conflict>,
    ) -> Result<(), Conflict> {
        let now = self.time.now();
        let hash = self.hash(id);
        let at = self.shard(hash);
        {
            let mut shard = self.instances.shards()[at].write();
            if let Some((_, instance)) = shard.get_mut(hash, |(key, _)| **key == *id) {
                let instance = instance.get_mut();
                if instance.touch(now, &self.limits) {
                    return update(instance, run);
                }
                let end = instance.end();
                *instance = Instance::new(run, instance.place, now);
                drop(shard);
                self.lose(hash, now, end);
                return Ok(());
            }
            let mut ring = lock(&self.rings[at]);
            let instance = Instance::new(run, ring.len() as u32, now);
            ring.push(hash);
            drop(ring);
            let rehash = |(key, _): &(Box<str>, _)| self.hash(key);
            shard.insert(hash, (id.into(), SharedValue::new(instance)), rehash);
        }
        self.len.fetch_add(1, Relaxed);
        // The second makes up for an insertion that found nothing to evict, all being taken by other threads.
        for _ in 0..2 {
            if self.len.load(Relaxed) > self.limits.max_instances {
                self.evict(now, hash);
            }
        }
        Ok(())
    }

    fn remove_where(&self, hash: u64, is: impl Fn(&str, &Instance) -> bool) -> Option<Instance> {
        let at = self.shard(hash);
        let mut shard = self.instances.shards()[at].write();
        let (_, removed) = shard.remove_entry(hash, |(key, instance)| is(key, instance.get()))?;
        let removed = removed.into_inner();
        let mut ring = lock(&self.rings[at]);
        ring.swap_remove(removed.place as usize);
        // The last of the ring now has the place of the removed one, and must learn that.
        if let Some(&moved) = ring.get(removed.place as usize) {
            let last = ring.len() as u32;
            let moved = shard.get_mut(moved, |(_, instance)| instance.get().place == last);
            if let Some((_, instance)) = moved {
                instance.get_mut().place = removed.place;
            }
        }
        self.len.fetch_sub(1, Relaxed);
        Some(removed)
    }

    /// Removes one instance other than the one that was just inserted.
    fn evict(&self, now: u32, inserted: u64) {
        // A candidate that was used or removed meanwhile is let go, and others are looked for.
        for attempt in 0..4 {
            let Some(victim) = self.candidate(now, inserted, attempt) else {
                return;
            };
            let removed = self.remove_where(victim.hash, |_, instance| {
                instance.place == victim.place && instance.rank(now, &self.limits) <= victim.rank
            });
            if let Some(removed) = removed {
                let event = match victim.rank {
                    Rank::Expired => removed.end(),
                    Rank::Completed | Rank::Used(_) => Event::Evicted,
                };
                return self.lose(victim.hash, now, event);
            }
        }
    }

    /// The one to go first among a few, of the shard of the one just inserted and of those after it.
    fn candidate(&self, now: u32, except: u64, attempt: usize) -> Option<Candidate> {
        let shards = self.instances.shards();
        let own = self.shard(except);
        let mut best: Option<Candidate> = None;
        let mut seen = 0;
        for at in (own..shards.len()).chain(0..own) {
            let shard = shards[at].read();
            let ring = lock(&self.rings[at]);
            let looked_at = match CANDIDATES - seen {
                left if ring.len() <= left => ring.len(),
                left => left.min(PER_SHARD),
            };
            for nth in 0..looked_at {
                let place = match looked_at == ring.len() {
                    true => nth,
                    false => scattered(except, attempt * CANDIDATES + nth, ring.len()),
                };
                let hash = ring[place];
                seen += 1;
                let place = place as u32;
                let found = shard.get(hash, |(_, instance)| instance.get().place == place);
                let Some((_, instance)) = found.filter(|_| hash != except) else {
                    continue;
                };
                let rank = instance.get().rank(now, &self.limits);
                if best.as_ref().is_none_or(|best| rank < best.rank) {
                    best = Some(Candidate {
                        rank,
                        shard: at,
                        hash,
                        place,
                    });
                }
            }
            if seen >= CANDIDATES {
                break;
            }
        }
        debug_assert!(
            best.as_ref()
                .is_none_or(|best| self.shard(best.hash) == best.shard)
        );
        best
    }

    /// Looks at some instances, and removes those whose time is over.
    fn sweep(&self, now: u32, most: usize) {
        let mut sweep = lock(&self.sweep);
        if now < sweep.next_pass {
            return;
        }
        let is_over = |instance: &Instance| instance.rank(now, &self.limits) == Rank::Expired;
        for _ in 0..most.div_ceil(PER_LOCK) {
            let over = self.walk(&mut sweep.cursor, |id, instance| {
                is_over(instance).then(|| (self.hash(id), instance.place))
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
            for (hash, place) in over {
                let still =
                    |_: &str, instance: &Instance| instance.place == place && is_over(instance);
                if let Some(removed) = self.remove_where(hash, still) {
                    self.lose(hash, now, removed.end());
                }
            }
        }
    }

    fn lose(&self, hash: u64, now: u32, event: Event) {
        match event {
            Event::Evicted => self.evicted.add(),
            _ => self.expired.add(),
        }
        self.trail.add(Step {
            instance: hash,
            tick: now,
            event,
        });
    }

    /// With a clock of the caller's own nobody ticks: everything is swept when it is looked at as a whole.
    fn settle(&self) {
        if let Ticks::Of { .. } = self.time {
            let now = self.time.now();
            lock(&self.sweep).next_pass = 0;
            self.sweep(now, usize::MAX);
        }
    }

    #[inline]
    pub(crate) fn hash(&self, id: &str) -> u64 {
        self.instances.hasher().hash_one(id)
    }

    #[inline]
    fn shard(&self, hash: u64) -> usize {
        self.instances.determine_shard(hash as usize)
    }
}

impl OnTick for Memory {
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A walk through the ids of all instances that takes a lock for some at a time, and none while it is not asked.
#[derive(Debug)]
pub(crate) struct Ids<'a> {
    memory: &'a Memory,
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
            let page = self
                .memory
                .walk(&mut self.cursor, |id, _| Some(id.to_owned()))?;
            self.page = page.into_iter();
        }
    }
}

impl Instance {
    fn new(latest: Run, place: u32, now: u32) -> Self {
        Self {
            latest,
            older: Vec::new(),
            used: AtomicU32::new(now << 1),
            completed: AtomicU32::new(0),
            place,
        }
    }

    /// Notes that it is used, unless its time is over: then it is as if it were not there.
    #[inline]
    fn touch(&self, now: u32, limits: &Limits) -> bool {
        let used = now << 1 | 1;
        if self.used.load(Relaxed) == used && self.completed.load(Relaxed) == 0 {
            return true;
        }
        let live = self.rank(now, limits) != Rank::Expired;
        if live {
            self.used.store(used, Relaxed);
        }
        live
    }

    fn rank(&self, now: u32, limits: &Limits) -> Rank {
        let used = self.used.load(Relaxed);
        let completed = self.completed.load(Relaxed);
        let over = completed != 0 && now.saturating_sub(completed) >= limits.completed_grace;
        if over || now.saturating_sub(used >> 1) > limits.idle_ttl {
            Rank::Expired
        } else if completed != 0 {
            Rank::Completed
        } else {
            Rank::Used(used)
        }
    }

    /// What its time being over is called.
    fn end(&self) -> Event {
        match self.completed.load(Relaxed) {
            0 => Event::Expired,
            _ => Event::GraceOver,
        }
    }

    fn explain(&self, now: SystemTime) -> Recorded {
        Recorded {
            context: self.latest.context.clone(),
            recorder: self.latest.recorder.as_deref().cloned(),
            generation: self.latest.generation,
            run_id: self.latest.id.get().map(|id| id.to_string()),
            completed: self.completed.load(Relaxed) != 0,
            older_runs: self.older.len(),
            now,
        }
    }

    fn run_ids(&self) -> Vec<Box<str>> {
        let runs = std::iter::once(&self.latest).chain(&self.older);
        runs.filter_map(|run| run.id.get().cloned()).collect()
    }

    /// Whether a span that names that run speaks for the latest.
    fn is_latest(&self, run_id: Option<&str>) -> bool {
        run_id.is_none_or(|id| self.latest.is(id))
    }

    pub(crate) fn latest(&self) -> &Run {
        &self.latest
    }

    /// The run of that id; any span without a run id belongs to the latest.
    pub(crate) fn run(&self, run_id: Option<&str>) -> Option<&Run> {
        let Some(id) = run_id else {
            return Some(&self.latest);
        };
        if self.latest.is(id) {
            return Some(&self.latest);
        }
        self.older.iter().find(|run| run.is(id))
    }

    fn run_mut(&mut self, run_id: Option<&str>) -> Option<&mut Run> {
        let Some(id) = run_id else {
            return Some(&mut self.latest);
        };
        if self.latest.is(id) {
            return Some(&mut self.latest);
        }
        self.older.iter_mut().find(|run| run.is(id))
    }

    fn begin(&mut self, run: Run) {
        if self.older.len() == OLDER_RUNS {
            self.older.remove(0);
        }
        self.older.push(std::mem::replace(&mut self.latest, run));
        *self.completed.get_mut() = 0;
    }
}

impl Run {
    fn new(context: WorkflowContext, run_id: Option<&str>, generation: u32) -> Self {
        Self {
            context,
            generation,
            recorder: None,
            id: run_id.map_or_else(OnceLock::new, |id| OnceLock::from(Box::from(id))),
            spans: AtomicU64::new(1),
            rolling: AtomicBool::new(false),
            announced: AtomicBool::new(false),
        }
    }

    /// A run that was recorded without an id takes the first id that asks for it.
    fn is(&self, id: &str) -> bool {
        &**self.id.get_or_init(|| id.into()) == id
    }

    pub(crate) fn followed(&self) -> Followed {
        Followed {
            context: self.context.clone(),
            generation: self.generation,
        }
    }

    fn is_followed_by(&self, followed: &Followed) -> bool {
        self.generation == followed.generation && self.context == followed.context
    }

    /// Counts one more span into the trace; `false` when it is full.
    pub(crate) fn admit(&self, max_spans: u64) -> bool {
        // The load keeps the count from running away where a full trace is continued all the same.
        self.spans.load(Relaxed) < max_spans && self.spans.fetch_add(1, Relaxed) < max_spans
    }

    /// `true` for the one caller that may open the next generation.
    pub(crate) fn roll(&self) -> bool {
        !self.rolling.swap(true, Relaxed)
    }

    /// `true` for the first caller.
    pub(crate) fn announce(&self) -> bool {
        !self.announced.load(Relaxed) && !self.announced.swap(true, Relaxed)
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("instances", &self.len())
            .finish_non_exhaustive()
    }
}
