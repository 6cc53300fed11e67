//! The backend behind a cache: fetches records into memory, and publishes recorded contexts.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::TraceId;

use super::claim::{Claim, Claimant, Claims};
use super::late::LateAnswers;
use super::lifetimes::Lifetimes;
use super::refresh::Refresher;
use crate::backend::client::{Budgets, Client};
use crate::backend::keys::{claim_key, ended_key, instance_key, instance_of, run_key};
use crate::backend::reader::OnLate;
use crate::backend::write_queue::OnWinner;
use crate::backend::{Record, RootSpan, StorageBackend, Write};
use crate::cache::entry::Named;
use crate::cache::{Cache, Key};
use crate::clock::Clock;
use crate::context::WorkflowContext;
use crate::error::StorageError;
use crate::root::state::Roots;
use crate::stats::Counters;
use crate::warnings::Warnings;

pub(crate) use super::claim::LateWinner;

/// A backend behind a cache.
pub(crate) struct Remote {
    /// Dropped first, since the client waits for its thread.
    _refresher: Refresher,
    client: Arc<Client>,
    cache: Arc<Cache>,
    /// Memory began with the latest run of each instance in the backend, to which nobody else writes.
    loaded_all: bool,
    /// Nobody else writes to the backend.
    is_alone: bool,
    clock: Arc<dyn Clock>,
    lifetimes: Lifetimes,
    write_through: bool,
    misses: RecentMisses,
    late: LateAnswers,
    claims: Arc<Claims>,
}

/// The settings of a [`Remote`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) lifetimes: Lifetimes,
    pub(super) budgets: Budgets,
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
        roots: Option<&Arc<Roots>>,
        warnings: Arc<Warnings>,
        counters: Arc<Counters>,
    ) -> std::io::Result<Self> {
        let Settings {
            lifetimes,
            budgets,
            write_through,
        } = settings;
        let warms_up = backend.warms_up();
        let client = Arc::new(Client::new(backend, budgets, warnings)?);
        if let Some(roots) = roots {
            roots.claim_in(&client, lifetimes.idle, lifetimes.completed);
        }
        let (mut has_room, now) = (true, clock.now());
        let mut load = |key: &str, record| {
            if let Some(id) = instance_of(key) {
                has_room &= cache.has_room();
                if has_room {
                    insert(&cache, &lifetimes, &id, record, now);
                }
            }
        };
        // Records that the scan could not read are looked up one by one later, and values that it could not decode are left alone.
        let loaded_all = warms_up && client.load(&mut load) && has_room && client.malformed() == 0;
        let claims = Arc::<Claims>::default();
        let refresher = Refresher::start(
            &client,
            &cache,
            clock.clone(),
            lifetimes,
            warms_up,
            claims.clone(),
            counters,
        )?;
        Ok(Self {
            _refresher: refresher,
            client,
            cache,
            loaded_all,
            is_alone: warms_up,
            clock,
            lifetimes,
            write_through,
            misses: RecentMisses::new(),
            late: LateAnswers::default(),
            claims,
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
        let queued = run_id.and_then(|run_id| {
            let queued = self.client.queued(&instance_key(id));
            queued.filter(|record| record.run_id.as_deref() == Some(run_id))
        });
        let record = queued.or_else(|| {
            // If nobody has recorded the run, the record of the instance decides whether it is a new one.
            let of_instance = (!self.cache.has(id, None)).then(|| instance_key(id));
            let keys = of_run(id, run_id).into_iter().chain(of_instance);
            (self.client).get_first(keys, || self.on_late(id, run_id))
        });
        let now = self.clock.now();
        let Some(record) = record.filter(|record| record.expires_at > now) else {
            return false;
        };
        self.extend(id, &record, now);
        insert(&self.cache, &self.lifetimes, id, record, now);
        true
    }

    /// Extends the expiry of a record that is used again: this process may live too short for the refresher.
    fn extend(&self, id: &str, record: &Record, now: SystemTime) {
        let left = record.expires_at.duration_since(now).unwrap_or_default();
        // One that has ended has no more than the grace left.
        if left > self.lifetimes.completed && self.lifetimes.is_to_extend(left) {
            let expiry = self.lifetimes.idle_after(now);
            let keys = [of_run(id, record.run_id.as_deref()), Some(instance_key(id))];
            let extend = |key| self.client.write(Write::Expire(key, expiry));
            keys.into_iter().flatten().for_each(extend);
        }
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

    /// Claims a newly recorded context against all processes. `before` is the trace of the run that was the latest here, if
    /// this is another one.
    pub(super) fn publish(
        &self,
        key: Key<'_>,
        follows: Option<(&WorkflowContext, u32)>,
        context: WorkflowContext,
        before: Option<TraceId>,
        root: Option<Box<RootSpan>>,
        counters: &Arc<Counters>,
    ) -> Option<LateWinner> {
        self.forget_miss(key);
        // It has just been recorded.
        let expires_at = self.lifetimes.idle_after(context.recorded_at());
        let record = Record {
            context,
            run_id: key.run_id.map(str::to_owned),
            generation: follows.map_or(1, |(_, generation)| generation),
            expires_at,
            root,
        };
        let late_winner = LateWinner::default();
        let claimant = Claimant {
            late_winner: late_winner.clone(),
            before,
            counters: counters.clone(),
        };
        let is_claimed = match follows {
            None => self.claim_run(key.id, record, Some(claimant)),
            Some((followed, _)) => self.claim_generation(key, followed, record, claimant),
        };
        is_claimed.then_some(late_winner)
    }

    /// Claims a run whose context was recorded before it had an id.
    pub(super) fn publish_named(&self, id: &str, named: Named) {
        let record = Record {
            context: named.context,
            run_id: Some(named.run_id),
            generation: named.generation,
            expires_at: self.lifetimes.idle_after(self.clock.now()),
            root: named.root.map(|root| Box::new(root.record().clone())),
        };
        self.claim_run(id, record, None);
    }

    /// Returns `false` if there was nobody to claim it against.
    fn claim_run(&self, id: &str, record: Record, claimant: Option<Claimant>) -> bool {
        if self.has_no_rival() {
            let of_run = of_run(id, record.run_id.as_deref());
            self.put_both(instance_key(id), of_run, record);
            return false;
        }
        let claim = Claim::new(id, record, &self.cache, &self.claims, claimant);
        self.late.join(id, &claim);
        self.claim(claim.first_write());
        true
    }

    /// Claims the trace that follows another one. The span that is followed tells this instance from an earlier one of the
    /// same id.
    fn claim_generation(
        &self,
        key: Key<'_>,
        followed: &WorkflowContext,
        record: Record,
        claimant: Claimant,
    ) -> bool {
        let Key { id, run_id, .. } = key;
        let (pointer, of_run) = (instance_key(id), of_run(id, run_id));
        self.put_both(pointer.clone(), of_run.clone(), record.clone());
        if self.has_no_rival() {
            return false;
        }
        let claim = Claim::new(id, record, &self.cache, &self.claims, Some(claimant));
        let key = claim_key(id, run_id, followed.span_id());
        let pointers = std::iter::once(pointer).chain(of_run).collect();
        self.claim(claim.generation_write(key, pointers));
        true
    }

    /// Returns `true` if nobody else can be first, and there is nothing to wait for.
    fn has_no_rival(&self) -> bool {
        self.knows_all() && !self.write_through
    }

    fn put_both(&self, key: String, of_run: Option<String>, record: Record) {
        let of_run = of_run.map(|of_run| Write::Put(of_run, record.clone()));
        self.client.write(Write::Put(key, record));
        if let Some(write) = of_run {
            self.client.write(write);
        }
    }

    fn claim(&self, (write, on_winner): (Write, OnWinner)) {
        if self.write_through {
            self.client.claim_now(write, on_winner);
        } else {
            self.client.claim(write, on_winner);
        }
    }

    /// Returns a callback for an answer that comes too late. `run_id` is that of the run whose key is asked for too, if any.
    fn on_late(&self, id: &str, run_id: Option<&str>) -> OnLate {
        let open = self.late.expect(id);
        let (id, run_id) = (id.to_owned(), run_id.map(str::to_owned));
        let (cache, clock) = (self.cache.clone(), self.clock.clone());
        Box::new(move |key, found| {
            if found.expires_at > clock.now() {
                let of_run = run_id.filter(|run_id| run_key(&id, run_id) == key);
                open.answer(&cache, &id, of_run.as_deref(), found);
            }
        })
    }

    /// Ignores answers that come too late from now on: a call decides what is stored.
    pub(super) fn ignore_late(&self, id: &str) {
        self.late.ignore(id);
    }

    pub(super) fn put(&self, id: &str, context: WorkflowContext, root: Option<Box<RootSpan>>) {
        if !self.knows_all() {
            self.misses.forget(self.cache.hash(id));
        }
        let record = Record {
            root,
            ..Record::new(context, self.lifetimes.idle_after(self.clock.now()))
        };
        self.client.write(Write::Put(instance_key(id), record));
    }

    /// Removes an instance. `removed` is the context that it had.
    pub(super) fn remove(&self, id: &str, removed: Option<WorkflowContext>) {
        if let Some(removed) = removed {
            self.tell_end(id, removed, Duration::ZERO);
        }
        self.client.write(Write::Remove(instance_key(id)));
    }

    pub(super) fn forget_runs(&self, id: &str, run_ids: Vec<Box<str>>) {
        for run_id in run_ids {
            let key = run_key(id, &run_id);
            self.claims.void(&key);
            self.client.write(Write::Remove(key));
        }
    }

    /// Tells other processes, which may have the instance in memory, that it ends after that grace.
    fn tell_end(&self, id: &str, ended: WorkflowContext, grace: Duration) {
        if self.is_alone {
            return;
        }
        let now = self.clock.now();
        let expires_at = self.lifetimes.ended_after(now, grace);
        let record = Record::new(ended.with_recorded_at(now), expires_at);
        self.client.write(Write::Put(ended_key(id), record));
    }

    /// Returns `true` if other processes cannot see by the expiry of a record that its instance has ended.
    pub(super) fn has_to_tell_ends(&self) -> bool {
        !self.is_alone && !self.lifetimes.expiry_tells_ends()
    }

    /// Lets the records of an instance expire after the grace. `ended` is its context, if that has to be told.
    pub(super) fn complete(&self, id: &str, run_id: Option<&str>, ended: Option<WorkflowContext>) {
        if let Some(ended) = ended {
            self.tell_end(id, ended, self.lifetimes.completed);
        }
        let expiry = self.lifetimes.completed_after(self.clock.now());
        let of_run = of_run(id, run_id);
        if let Some(key) = &of_run {
            self.claims.complete(key, expiry);
        }
        let keys = [Some(instance_key(id)), of_run];
        let expire = |key| self.client.write(Write::Expire(key, expiry));
        keys.into_iter().flatten().for_each(expire);
    }

    pub(super) fn flush(&self) -> Result<(), StorageError> {
        self.client.flush()
    }

    /// The threads of the backend, for its counters.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }
}

/// Inserts a record of the backend into memory, which keeps an instance that has ended no longer than the backend.
fn insert(cache: &Cache, lifetimes: &Lifetimes, id: &str, record: Record, now: SystemTime) {
    let left = record.expires_at.duration_since(now).unwrap_or_default();
    let ended = lifetimes.is_ended(left).then(|| record.context.clone());
    cache.insert_fetched(id, record);
    if let Some(ended) = ended {
        cache.end_elsewhere(id, &ended, left);
    }
}

fn of_run(id: &str, run_id: Option<&str>) -> Option<String> {
    run_id.map(|run_id| run_key(id, run_id))
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
