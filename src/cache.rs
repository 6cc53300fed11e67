//! The cache: a bounded, expiring, concurrent map from instance id to its runs, which every storage asks first.

pub(crate) mod entry;
mod evict;
mod explained;
mod inline_str;
mod revisit;
mod shards;
mod slots;
mod walk;

use std::fmt;
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex};

use opentelemetry::TraceId;

use crate::backend::Record;
use crate::clock::{self, Clock, OnTick, SystemClock, Ticks};
use crate::context::WorkflowContext;
use crate::explain::trail::{Event, Step, Trail};
use crate::lock::lock;
use crate::root::open::{OpenRoot, reopen, set_recorded};
use crate::root::state::Roots;
use crate::stats::Counter;
use entry::{Conflict, Entry, Limits, Rank, Replaced, Run};
use inline_str::InlineStr;
use shards::{Contents, Counts, Shards};
use walk::{Ids, Sweep};

pub(crate) use revisit::Held;
pub(crate) use walk::Cursor;

/// The number of entries that one tick of the sweep reads.
const SWEPT_PER_TICK: usize = 16 * 1024;

/// The cache of one storage.
///
/// Its methods lock one shard for the time of a lookup or a change. No lock is held while code of the caller runs, except
/// for the closures given to [`look_up`](Self::look_up) and [`look_up_known`](Self::look_up_known).
pub(crate) struct Cache {
    shards: Shards,
    time: Ticks,
    sweep: Mutex<Sweep>,
    pub(crate) expired: Counter,
    pub(crate) evicted: Counter,
    pub(crate) trail: Trail,
    /// Set with durable roots.
    roots: Option<Arc<Roots>>,
}

/// The key of a lookup. The hash is computed once for each operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key<'a> {
    pub(crate) hash: u64,
    pub(crate) id: &'a str,
    /// The run that the span or call names, if any.
    pub(crate) run_id: Option<&'a str>,
}

impl Cache {
    /// Creates a cache that is swept once a tick. With a clock of the caller's own, which does not tick, it is swept
    /// whenever its instances are counted or listed.
    pub(crate) fn new(
        limits: Limits,
        clock: Option<Arc<dyn Clock>>,
        steps: usize,
        roots: Option<Arc<Roots>>,
    ) -> Arc<Self> {
        let with_time = |time| {
            Arc::new(Self {
                shards: Shards::new(limits),
                time,
                sweep: Mutex::default(),
                expired: Counter::default(),
                evicted: Counter::default(),
                trail: Trail::new(steps),
                roots: roots.clone(),
            })
        };
        if let Some(clock) = clock {
            return with_time(Ticks::from_clock(clock));
        }
        let shared: Arc<Self> = with_time(Ticks::Shared);
        let weak = Arc::downgrade(&shared);
        match clock::subscribe(weak) {
            true => shared,
            false => with_time(Ticks::from_clock(Arc::new(SystemClock))),
        }
    }

    /// Returns the number of instances.
    pub(crate) fn len(&self) -> usize {
        self.sweep_unless_ticking();
        self.shards.len()
    }

    /// Returns `true` if one more instance fits without an eviction.
    pub(crate) fn has_room(&self) -> bool {
        self.shards.has_room()
    }

    /// Returns the number of lookups that found an instance, and of those that did not.
    pub(crate) fn hits_and_misses(&self) -> (u64, u64) {
        self.shards.hits_and_misses()
    }

    /// Returns the ids of all instances, in no order.
    pub(crate) fn ids(&self) -> Ids<'_> {
        self.sweep_unless_ticking();
        Ids::new(&self.shards)
    }

    /// Returns a context as it is kept: its tracestate has a bound.
    #[inline]
    pub(crate) fn bounded(&self, context: WorkflowContext) -> WorkflowContext {
        context.with_trace_state_up_to(self.shards.limits.max_trace_state)
    }

    /// Returns the hash of an id, to be computed once for each operation.
    #[inline]
    pub(crate) fn hash(&self, id: &str) -> u64 {
        self.shards.hash(id)
    }

    /// Returns the key of an instance or run, with its hash.
    #[inline]
    pub(crate) fn key<'a>(&self, id: &'a str, run_id: Option<&'a str>) -> Key<'a> {
        Key {
            hash: self.hash(id),
            id,
            run_id,
        }
    }

    /// Looks an instance up, counted as a hit or a miss. `read` runs under the lock of the shard: it must neither block
    /// nor call foreign code.
    #[inline]
    pub(crate) fn look_up<R>(&self, key: Key<'_>, read: impl FnOnce(Option<&Entry>) -> R) -> R {
        self.with_entry(key, |found, counts| {
            match found {
                Some(_) => counts.hits += 1,
                None => counts.misses += 1,
            }
            read(found)
        })
    }

    /// Looks an instance up as [`look_up`](Self::look_up) does, counted as a hit, if the run of the key is known.
    /// Otherwise returns `None` and counts nothing.
    #[inline]
    pub(crate) fn look_up_known<R>(
        &self,
        key: Key<'_>,
        read: impl FnOnce(&Entry) -> R,
    ) -> Option<R> {
        self.with_entry(key, |found, counts| {
            let known = found.filter(|entry| entry.run(key.run_id).is_some())?;
            counts.hits += 1;
            Some(read(known))
        })
    }

    /// Looks an instance up without counting.
    fn peek<R>(&self, key: Key<'_>, read: impl FnOnce(Option<&Entry>) -> R) -> R {
        self.with_entry(key, |found, _| read(found))
    }

    /// Finds the live entry of a key, which counts as a use of it, and reads it under the lock of its shard.
    #[inline]
    fn with_entry<R>(
        &self,
        key: Key<'_>,
        read: impl FnOnce(Option<&Entry>, &mut Counts) -> R,
    ) -> R {
        let is_match = |entry: &Entry| entry.id == *key.id;
        self.with_match(key.hash, is_match, key.run_id, read)
    }

    /// Finds the live entry with that hash whose id matches, and reads it as [`with_entry`](Self::with_entry) does.
    #[inline]
    fn with_match<R>(
        &self,
        hash: u64,
        is_match: impl Fn(&Entry) -> bool,
        run_id: Option<&str>,
        read: impl FnOnce(Option<&Entry>, &mut Counts) -> R,
    ) -> R {
        let now = self.time.now();
        let mut shard = self.shards.lock_for(hash);
        let Contents { counts, table } = &mut *shard;
        let entry = table.find(hash, is_match);
        let entry = entry.and_then(|index| table.get_mut(index));
        let entry = entry.filter(|entry| entry.touch(now, &self.shards.limits));
        match (entry, run_id) {
            (Some(entry), Some(run_id)) => {
                entry.name_latest(run_id);
                read(Some(entry), counts)
            }
            (entry, _) => read(entry.as_deref(), counts),
        }
    }

    /// Returns the context of the latest run, without counting.
    pub(crate) fn latest(&self, id: &str) -> Option<WorkflowContext> {
        self.peek(self.key(id, None), |entry| {
            entry.map(|entry| entry.latest().context())
        })
    }

    /// Returns the id of the latest run, if it has one, without counting.
    pub(crate) fn latest_run_id(&self, key: Key<'_>) -> Option<Box<str>> {
        self.peek(key, |entry| {
            let run_id = entry?.latest().run_id()?;
            Some(run_id.as_str().into())
        })
    }

    /// Returns `true` if a context is stored for that run.
    pub(crate) fn has(&self, id: &str, run_id: Option<&str>) -> bool {
        self.peek(self.key(id, run_id), |entry| {
            entry.is_some_and(|entry| entry.run(run_id).is_some())
        })
    }

    /// Stores the context of an instance in place of all its runs.
    pub(crate) fn replace(&self, id: &str, context: WorkflowContext) -> Replaced {
        let (hash, now) = (self.hash(id), self.time.now());
        // Only a pointer is taken out under the lock, and nearly always there is none.
        let mut replaced = Replaced::default();
        let run = Run::new(context, None, 1);
        let stored = self.upsert(hash, id, now, run, |entry, run| {
            replaced = entry.replace(run);
            Ok(())
        });
        debug_assert!(stored.is_ok(), "a replacement conflicts with nothing");
        self.note_at(now, hash, Event::Stored);
        replaced
    }

    /// Stores a context as [`replace`](Self::replace) does, beneath the root that goes on. Apart from it, since to pass the
    /// run on would take 30 instructions of each `store`.
    pub(crate) fn replace_beneath(
        &self,
        id: &str,
        context: WorkflowContext,
        root: Arc<OpenRoot>,
    ) -> Replaced {
        let (hash, now) = (self.hash(id), self.time.now());
        let mut replaced = Replaced::default();
        let run = Run::new(context, None, 1).with_root(Some(root));
        let _ = self.upsert(hash, id, now, run, |entry, run| {
            replaced = entry.replace(run);
            Ok(())
        });
        self.note_at(now, hash, Event::Stored);
        replaced
    }

    /// Inserts a record of the backend, unless the run is known already.
    pub(crate) fn insert_fetched(&self, id: &str, record: Record) {
        let root = self.reopen(id, &record);
        let run_id = record.run_id.as_deref();
        let context = self.bounded(record.context);
        let run = Run::new(context, run_id, record.generation).with_root(root);
        // On a conflict the run was recorded here while it was fetched, and that counts.
        let _ = self.upsert(
            self.hash(id),
            id,
            self.time.now(),
            run,
            |entry, run| match entry.run_mut(run_id) {
                Some(known) => Err(Conflict {
                    winner: known.context(),
                }),
                None => {
                    entry.begin(run);
                    Ok(())
                }
            },
        );
    }

    /// Inserts a record of the backend, unless the instance is known already.
    pub(crate) fn insert_late(&self, id: &str, record: Record) {
        let root = self.reopen(id, &record);
        let context = self.bounded(record.context);
        let run = Run::new(context, record.run_id.as_deref(), record.generation);
        let run = run.with_root(root);
        let known = |entry: &mut Entry, _| {
            Err(Conflict {
                winner: entry.latest().context(),
            })
        };
        let _ = self.upsert(self.hash(id), id, self.time.now(), run, known);
    }

    /// Replaces our context of a run with that of another process, which was recorded first, if ours is still stored.
    /// Returns `false` if ours is stored, but may be of another run than the winner's.
    pub(crate) fn overrule(
        &self,
        id: &str,
        run_id: Option<&str>,
        ours: &WorkflowContext,
        winner: &Record,
    ) -> bool {
        let root = self.reopen(id, winner);
        // Read before the shard is locked: a clock may be anybody's code.
        let at = self.roots.as_ref().map(|roots| roots.now());
        let now = self.time.now();
        let hash = self.hash(id);
        let mut shard = self.shards.lock_for(hash);
        let table = &mut shard.table;
        let found = table.find(hash, |entry| entry.id == *id);
        let Some(entry) = found.and_then(|index| table.get_mut(index)) else {
            return true;
        };
        if !entry.touch(now, &self.shards.limits) {
            return true;
        }
        let (mut is_of_another_run, mut told) = (false, None);
        self.shards.change_runs(entry, |run| {
            if !run.context().is_same_span(ours) || !run.may_be(run_id) {
                return;
            }
            let winners = winner.run_id.as_deref();
            let known = run.run_id().map(|id| id.as_str().to_owned());
            // If it got its id meanwhile, the claim of that run decides whose the winner without one is.
            let is_undecided = known.as_deref() != run_id && winners.is_none();
            if is_undecided || !run.may_be(winners) {
                is_of_another_run = true;
                return;
            }
            let context = self.bounded(winner.context.clone());
            let run_id = known.as_deref().or(winners);
            let new = Run::new(context, run_id, winner.generation);
            // Derived, it may be the same root.
            let (ours, theirs) = (run.root().cloned(), &winner.root);
            let span_of = |root: &Arc<OpenRoot>| root.record().span_id;
            let is_same = ours.as_ref().map(span_of) == theirs.as_ref().map(|root| root.span_id);
            if let (Some(ours), Some(at), false) = (&ours, at, is_same) {
                told = ours.give_way_to(winner.context.to_span_context(), at);
            }
            let root = if is_same { ours } else { root.clone() };
            set_recorded(root.clone());
            let new = new.with_root(root);
            match winner.generation > run.generation() {
                true => run.continue_as(new),
                false => run.replace(new),
            }
        });
        drop(shard);
        if let (Some(root), Some(status)) = (root, told) {
            root.end(status);
        }
        !is_of_another_run
    }

    /// Gives a run that has that context another id.
    pub(crate) fn rename_run(&self, id: &str, context: &WorkflowContext, from: &str, to: &str) {
        let hash = self.hash(id);
        let mut shard = self.shards.lock_for(hash);
        let table = &mut shard.table;
        let found = table.find(hash, |entry| entry.id == *id);
        if let Some(entry) = found.and_then(|index| table.get_mut(index)) {
            self.shards.change_runs(entry, |run| {
                if run.may_be(Some(from)) && run.context().is_same_span(context) {
                    run.rename(to);
                }
            });
        }
    }

    /// Returns `true` if the context is known here as that of a run with another id.
    pub(crate) fn is_of_other_run(
        &self,
        id: &str,
        context: &WorkflowContext,
        run_id: &str,
    ) -> bool {
        self.peek(self.key(id, None), |entry| {
            entry.is_some_and(|entry| entry.is_of_other_run(context, run_id))
        })
    }

    /// Removes an instance. Returns the ids of its runs; `None` if it was not stored.
    pub(crate) fn remove(&self, id: &str) -> Option<Vec<Box<str>>> {
        let now = self.time.now();
        let hash = self.hash(id);
        let removed = self.shards.remove(hash, id, |entry| {
            Some(match entry.rank(now, &self.shards.limits) {
                Rank::Expired => Err(entry.expiry_event()),
                // Only a pointer is taken out under the lock.
                Rank::Completed | Rank::Used(_) => Ok(entry.latest.rare.take()),
            })
        });
        match removed? {
            Err(event) => {
                self.note_loss(hash, now, event);
                None
            }
            Ok(rare) => {
                self.note_at(now, hash, Event::CleanedUp);
                Some(rare.map_or_else(Vec::new, |rare| rare.run_ids()))
            }
        }
    }

    /// Records the context of a run; the first writer wins. With `follows`, replaces that context by the given
    /// generation. Returns the trace of the run that was the latest before, if this is another one.
    pub(crate) fn record(
        &self,
        key: Key<'_>,
        follows: Option<(&WorkflowContext, u32)>,
        context: WorkflowContext,
        author: Option<NonZeroU16>,
        root: Option<Arc<OpenRoot>>,
    ) -> Result<Option<TraceId>, Conflict> {
        let generation = follows.map_or(1, |(_, generation)| generation);
        let mut run = Run::new(context, key.run_id, generation);
        run.set_root(root);
        run.author = author;
        let mut before = None;
        self.upsert(
            key.hash,
            key.id,
            self.time.now(),
            run,
            |entry, run| match entry.run_mut(key.run_id) {
                Some(known) if follows.is_some_and(|(context, _)| known.context() == *context) => {
                    known.continue_as(run);
                    Ok(())
                }
                Some(known) => Err(Conflict {
                    winner: known.context(),
                }),
                None => {
                    before = Some(entry.latest().context().trace_id());
                    entry.begin(run);
                    Ok(())
                }
            },
        )?;
        Ok(before)
    }

    /// Lets another thread open the next trace of a run, after this one could not.
    pub(crate) fn stop_rolling(&self, key: Key<'_>) {
        self.peek(key, |entry| {
            if let Some(run) = entry.and_then(|entry| entry.run(key.run_id)) {
                run.set_rolling(false);
            }
        });
    }

    /// Returns `true` with durable roots.
    #[inline]
    pub(crate) fn has_roots(&self) -> bool {
        self.roots.is_some()
    }

    /// Returns the own span of a run, or else of the latest, without counting.
    pub(crate) fn root_of(&self, key: Key<'_>) -> Option<Arc<OpenRoot>> {
        self.roots.as_ref()?;
        self.peek(key, |entry| entry?.run(key.run_id)?.root().cloned())
    }

    /// Returns the own span that a record of the backend has, if durable roots are on.
    fn reopen(&self, id: &str, record: &Record) -> Option<Arc<OpenRoot>> {
        reopen(self.roots.as_ref()?, id, record)
    }

    /// Marks an instance as completed, unless a newer run has begun. Returns `true` for the first call.
    pub(crate) fn complete(&self, key: Key<'_>) -> bool {
        self.note(key.hash, Event::Completed);
        let now = self.time.now();
        self.peek(key, |entry| {
            entry.is_some_and(|entry| entry.complete(key.run_id, now))
        })
    }

    /// Marks the instance whose id has that hash as completed.
    pub(crate) fn complete_hashed(&self, hash: u64) -> bool {
        self.note(hash, Event::Completed);
        let now = self.time.now();
        let is_match = |entry: &Entry| self.shards.hash_of(entry) == hash;
        self.with_match(hash, is_match, None, |entry, _| {
            entry.is_some_and(|entry| entry.complete(None, now))
        })
    }

    /// Returns the id of the instance whose id has that hash.
    pub(crate) fn id_of(&self, hash: u64) -> Option<Box<str>> {
        let is_match = |entry: &Entry| self.shards.hash_of(entry) == hash;
        self.with_match(hash, is_match, None, |entry, _| {
            entry.map(|entry| entry.id.as_str().into())
        })
    }

    /// Returns the current tick.
    pub(crate) fn tick(&self) -> u32 {
        self.time.now()
    }

    /// Updates a live entry under the lock of its shard, or inserts a new one with that run.
    #[inline]
    fn upsert(
        &self,
        hash: u64,
        id: &str,
        now: u32,
        mut run: Run,
        update: impl FnOnce(&mut Entry, Run) -> Result<(), Conflict>,
    ) -> Result<(), Conflict> {
        let root = self.roots.as_ref().and_then(|_| run.root().cloned());
        let mut shard = self.shards.lock_for(hash);
        let table = &mut shard.table;
        let known = table.find(hash, |entry| entry.id == *id);
        let report = |hash, event| self.note_loss(hash, now, event);
        if let Some(entry) = known.and_then(|index| table.get_mut(index)) {
            let (bytes, mut expiry) = (entry.counted_bytes(), None);
            if entry.touch(now, &self.shards.limits) {
                update(entry, run)?;
            } else {
                expiry = Some(entry.expiry_event());
                entry.restart(run, now);
            }
            let has_grown = self.shards.recount(bytes, entry.count_bytes());
            drop(shard);
            set_recorded(root);
            if let Some(event) = expiry {
                report(hash, event);
            }
            if has_grown && self.shards.are_too_many() {
                evict::make_room(&self.shards, now, hash, id, report);
            }
            return Ok(());
        }
        let bytes = run.count_bytes() + InlineStr::heap_bytes_for(id);
        table.insert(hash, Entry::new(id, run, now), |entry| {
            self.shards.hash_of(entry)
        });
        let are_too_many = self.shards.count_inserted(bytes);
        drop(shard);
        set_recorded(root);
        if are_too_many {
            evict::make_room(&self.shards, now, hash, id, report);
        }
        Ok(())
    }

    /// Sweeps all entries if no thread ticks, which is so with a clock of the caller's own.
    fn sweep_unless_ticking(&self) {
        if let Ticks::Clock { .. } = self.time {
            let now = self.time.now();
            let report = |hash, event| self.note_loss(hash, now, event);
            lock(&self.sweep).run_all(&self.shards, now, report);
        }
    }

    /// Counts and notes the expiry or eviction of an instance.
    fn note_loss(&self, hash: u64, now: u32, event: Event) {
        match event {
            Event::Evicted => self.evicted.add(),
            _ => self.expired.add(),
        }
        self.note_at(now, hash, event);
    }

    /// Adds an event to the trail of an instance.
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
}

impl OnTick for Cache {
    fn on_tick(&self, now: u32) {
        let report = |hash, event| self.note_loss(hash, now, event);
        lock(&self.sweep).run(&self.shards, now, SWEPT_PER_TICK, report);
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
            max_bytes: usize::MAX,
            max_trace_state: 512,
            idle_ttl: u32::MAX >> 1,
            completed_grace: u32::MAX >> 1,
        };
        Cache::new(limits, Some(Arc::new(SystemClock)), 0, None)
    }

    fn context(span: u64) -> WorkflowContext {
        let text = format!("00-{:032x}-{span:016x}-01", 1);
        WorkflowContext::parse(&text, "").expect("well formed")
    }

    #[test]
    fn an_instance_is_found_by_the_hash_of_its_id() {
        let cache = cache(100);
        for id in [
            "short",
            "0af76519-16cd-43dd-8448-eb211c80319c",
            &"long".repeat(20),
        ] {
            let hash = cache.hash(id);
            assert!(!cache.complete_hashed(hash), "nothing is stored yet");
            cache.replace(id, context(1));
            let is_there = |entry: Option<&Entry>| entry.is_some();
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
            assert!(!cache.complete_hashed(hash), "it is completed already");
            assert!(!cache.complete(cache.key(id, None)));
        }
    }

    proptest! {
        #[test]
        fn it_behaves_like_a_map(
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
                        let span = cache.look_up(cache.key(&id, None), |entry| {
                            entry.map(|entry| entry.latest().context().span_id())
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
        fn the_bound_holds_and_the_last_insertion_stays(
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
