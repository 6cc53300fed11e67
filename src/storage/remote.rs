//! The backend behind a cache: fetches records into memory, and publishes recorded contexts.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::refresh::{Lifetimes, Refresher};
use crate::backend::client::Client;
use crate::backend::keys::{claim_key, instance_key, instance_of, run_key};
use crate::backend::write_queue::OnWinner;
use crate::backend::{BackendError, Record, StorageBackend, Write};
use crate::cache::{Cache, Key};
use crate::clock::Clock;
use crate::context::WorkflowContext;
use crate::stats::Counters;
use crate::warnings::Warnings;

/// Set if another process turns out to have recorded its context first.
pub(crate) type LateWinner = Arc<OnceLock<WorkflowContext>>;

/// A backend behind a cache.
pub(crate) struct Remote {
    client: Client,
    cache: Arc<Cache>,
    /// Memory began with the latest run of each instance in the backend, to which nobody else writes.
    loaded_all: bool,
    clock: Arc<dyn Clock>,
    lifetimes: Lifetimes,
    write_through: bool,
    misses: RecentMisses,
    /// Called by the clock as long as this lives.
    _refresher: Arc<Refresher>,
}

/// The settings of a [`Remote`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) lifetimes: Lifetimes,
    pub(super) lookup_budget: Duration,
    pub(super) write_through: bool,
}

impl Remote {
    /// Starts the threads of the backend.
    ///
    /// # Errors
    ///
    /// If the operating system refuses to start a thread.
    pub(super) fn new(
        backend: Arc<dyn StorageBackend>,
        cache: Arc<Cache>,
        clock: Arc<dyn Clock>,
        settings: Settings,
        warnings: Arc<Warnings>,
    ) -> std::io::Result<Self> {
        let Settings {
            lifetimes,
            lookup_budget,
            write_through,
        } = settings;
        let warms_up = backend.warms_up();
        let client = Client::new(backend, lookup_budget, warnings)?;
        let mut has_room = true;
        let mut load = |key: &str, record| {
            if let Some(id) = instance_of(key) {
                has_room &= cache.has_room();
                if has_room {
                    cache.insert_fetched(&id, record);
                }
            }
        };
        // Records that the scan could not read are looked up one by one later.
        let loaded_all = warms_up && client.load(&mut load) && has_room;
        let refresher = Refresher::new(client.writer(), &cache, clock.clone(), lifetimes.idle);
        Ok(Self {
            client,
            cache,
            loaded_all,
            clock,
            lifetimes,
            write_through,
            misses: RecentMisses::new(),
            _refresher: refresher,
        })
    }

    /// Begins the budget of one span or call on this thread.
    #[inline]
    pub(super) fn begin(&self) {
        Client::begin();
    }

    /// Returns `false` if the backend has nothing that memory does not have.
    #[inline]
    pub(super) fn may_have(&self, key: Key<'_>) -> bool {
        key.run_id.is_some() || !self.knows_all()
    }

    /// Fetches the record of the run, or else of the instance, into memory, unless there was none a moment ago.
    pub(super) fn fetch(&self, key: Key<'_>) {
        let hash = self.hash(key);
        if !self.misses.is_recent(hash) && !self.fetch_always(key) {
            self.misses.note(hash);
        }
    }

    /// Fetches the record of the run, or else of the instance, into memory. Returns `false` if there is none.
    pub(super) fn fetch_always(&self, key: Key<'_>) -> bool {
        let Key { id, run_id, .. } = key;
        if self.knows_all() && (run_id.is_none() || !self.cache.has(id, None)) {
            return false;
        }
        let of_run = run_id.and_then(|run_id| self.client.get(&run_key(id, run_id)));
        let record = of_run.or_else(|| {
            // If nobody has recorded the run, the record of the instance decides whether it is a new one.
            (!self.cache.has(id, None))
                .then(|| self.client.get(&instance_key(id)))
                .flatten()
        });
        let record = record.filter(|record| record.expires_at > self.clock.now());
        let found = record.is_some();
        if let Some(record) = record {
            self.cache.insert_fetched(id, record);
        }
        found
    }

    /// Returns `true` if every instance in the backend is in memory.
    fn knows_all(&self) -> bool {
        self.loaded_all && self.cache.evicted.get() == 0
    }

    fn hash(&self, key: Key<'_>) -> u64 {
        key.hash ^ key.run_id.map_or(0, |run_id| self.cache.hash(run_id))
    }

    /// Forgets that the key was missing: it is there now, and memory may soon have evicted it.
    fn forget_miss(&self, key: Key<'_>) {
        if !self.knows_all() {
            self.misses.forget(self.hash(key));
        }
    }

    /// Claims the key of a newly recorded context against all processes.
    pub(super) fn publish(
        &self,
        key: Key<'_>,
        follows: Option<(&WorkflowContext, u32)>,
        context: WorkflowContext,
        counters: &Arc<Counters>,
    ) -> Option<LateWinner> {
        let Key { id, run_id, .. } = key;
        self.forget_miss(key);
        let record = Record {
            context: context.clone(),
            run_id: run_id.map(str::to_owned),
            generation: follows.map_or(1, |(_, generation)| generation),
            // It has just been recorded.
            expires_at: self.lifetimes.idle_after(context.recorded_at()),
        };
        // All who record the same thing claim the same key; the others point to the latest.
        let of_run = run_id.map(|run_id| run_key(id, run_id));
        let (claimed, pointers) = match (follows, of_run) {
            (None, None) => (instance_key(id), Vec::new()),
            (None, Some(of_run)) => (of_run, vec![instance_key(id)]),
            // The span that is followed tells this instance from an earlier one of the same id.
            (Some((followed, _)), of_run) => {
                let pointers = [Some(instance_key(id)), of_run].into_iter().flatten();
                let claimed = claim_key(id, run_id, followed.span_id());
                (claimed, pointers.collect())
            }
        };
        for pointer in &pointers {
            self.client
                .write(Write::Put(pointer.clone(), record.clone()));
        }
        if self.knows_all() && !self.write_through {
            // Nobody else can be first, and only the pointers are read for a later trace.
            if follows.is_none() {
                self.client.write(Write::Put(claimed, record));
            }
            return None;
        }
        let late_winner = LateWinner::default();
        let on_winner = self.on_winner(id, context, pointers, late_winner.clone(), counters);
        let claim = Write::PutIfAbsent(claimed, record);
        if self.write_through {
            self.client.claim_now(claim, on_winner);
        } else {
            self.client.claim(claim, on_winner);
        }
        Some(late_winner)
    }

    /// Follows the winner of a claim if that is not `ours`: in memory, in the pointers, and at the span's end.
    fn on_winner(
        &self,
        id: &str,
        ours: WorkflowContext,
        pointers: Vec<String>,
        late_winner: LateWinner,
        counters: &Arc<Counters>,
    ) -> OnWinner {
        let (cache, counters) = (self.cache.clone(), counters.clone());
        let id = id.to_owned();
        Box::new(move |winner| {
            // Compared by ids, since a backend may round the times.
            let ids = |context: &WorkflowContext| (context.trace_id(), context.span_id());
            if ids(&winner.context) == ids(&ours) {
                return Vec::new();
            }
            counters.conflicts.add();
            cache.overrule(&id, &ours, winner.clone());
            let _ = late_winner.set(winner.context.clone());
            let follow = |pointer| Write::Put(pointer, winner.clone());
            pointers.into_iter().map(follow).collect()
        })
    }

    pub(super) fn put(&self, id: &str, context: WorkflowContext) {
        if !self.knows_all() {
            self.misses.forget(self.cache.hash(id));
        }
        let record = Record::new(context, self.lifetimes.idle_after(self.clock.now()));
        self.client.write(Write::Put(instance_key(id), record));
    }

    pub(super) fn remove(&self, id: &str) {
        self.client.write(Write::Remove(instance_key(id)));
    }

    pub(super) fn forget_runs(&self, id: &str, run_ids: Vec<Box<str>>) {
        for run_id in run_ids {
            self.client.write(Write::Remove(run_key(id, &run_id)));
        }
    }

    pub(super) fn complete(&self, id: &str, run_id: Option<&str>) {
        let expiry = self.lifetimes.completed_after(self.clock.now());
        let keys = [
            Some(instance_key(id)),
            run_id.map(|run_id| run_key(id, run_id)),
        ];
        let expire = |key| self.client.write(Write::Expire(key, expiry));
        keys.into_iter().flatten().for_each(expire);
    }

    pub(super) fn flush(&self) -> Result<(), BackendError> {
        self.client.flush()
    }

    /// The threads of the backend, for its counters.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote")
            .field("client", &self.client)
            .finish_non_exhaustive()
    }
}

/// The keys, by hash, that were recently missing in the backend, so that not each span looks them up again.
struct RecentMisses {
    /// Each slot holds the upper half of a hash, and milliseconds since `start`.
    slots: Box<[AtomicU64; Self::SLOTS]>,
    start: Instant,
}

impl RecentMisses {
    const SLOTS: usize = 256;

    /// The time for which a missing key is not looked up again.
    const RECENT: Duration = Duration::from_millis(50);

    const MILLISECONDS: u64 = u32::MAX as u64;

    fn new() -> Self {
        Self {
            slots: Box::new([const { AtomicU64::new(0) }; Self::SLOTS]),
            start: Instant::now(),
        }
    }

    fn is_recent(&self, hash: u64) -> bool {
        let missed = self.slot(hash).load(Relaxed);
        let age = self.now().saturating_sub(missed & Self::MILLISECONDS);
        let is_same = (missed ^ hash) & !Self::MILLISECONDS == 0;
        missed != 0 && is_same && u128::from(age) < Self::RECENT.as_millis()
    }

    fn note(&self, hash: u64) {
        let missed = (hash & !Self::MILLISECONDS) | self.now().max(1);
        self.slot(hash).store(missed, Relaxed);
    }

    fn forget(&self, hash: u64) {
        self.slot(hash).store(0, Relaxed);
    }

    fn slot(&self, hash: u64) -> &AtomicU64 {
        &self.slots[hash as usize % Self::SLOTS]
    }

    fn now(&self) -> u64 {
        let now = self.start.elapsed().as_millis();
        u64::from(u32::try_from(now).unwrap_or(u32::MAX))
    }
}
