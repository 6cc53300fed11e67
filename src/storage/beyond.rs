//! What memory does not have, and what it hands on: the keys and records of a backend.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::SpanId;

use super::backend::{Record, StorageBackend, Write};
use super::backing::{Backing, Queuing};
use super::core::Counters;
use super::memory::{Cursor, Memory};
use super::queue::OnWinner;
use crate::clock::{Clock, OnTick, ticks};
use crate::context::WorkflowContext;
use crate::error::BackendError;
use crate::warnings::Warnings;

/// Between an id, its run and the trace of that in a key of the backend. The id alone is the key of the latest run,
/// which every worker can know without knowing runs.
const SEPARATOR: char = '\u{1f}';

/// Keeps a separator within an id from being taken for one: no two instances or runs share a key.
const ESCAPE: char = '\u{1e}';

/// For how long a span does not ask again for what the backend did not have.
const MISS: Duration = Duration::from_millis(50);
const MISSES: usize = 256;

/// Set where another process turns out to have been first.
pub(crate) type Overruled = Arc<OnceLock<WorkflowContext>>;

/// How long records live in the backend.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lifetimes {
    pub(super) idle: Duration,
    pub(super) completed: Duration,
}

/// A backend behind memory.
pub(super) struct Beyond {
    backing: Backing,
    memory: Arc<Memory>,
    /// Memory began with the latest run of each instance that the backend has, which nobody else writes to.
    loaded_all: bool,
    clock: Arc<dyn Clock>,
    lifetimes: Lifetimes,
    write_through: bool,
    /// When which key, by its hash, was asked for in vain: the upper half of the hash, and milliseconds since `start`.
    misses: Box<[AtomicU64; MISSES]>,
    start: Instant,
    /// Called by the clock as long as this lives.
    _refresher: Arc<Refresher>,
}

impl Beyond {
    pub(super) fn new(
        backend: Arc<dyn StorageBackend>,
        memory: Arc<Memory>,
        clock: Arc<dyn Clock>,
        lifetimes: Lifetimes,
        budget: Duration,
        write_through: bool,
        warnings: Arc<Warnings>,
    ) -> std::io::Result<Self> {
        let warms_up = backend.warms_up();
        let backing = Backing::new(backend, budget, warnings)?;
        let mut has_room = true;
        let mut load = |key: &str, record| {
            if let Some(id) = id_of(key) {
                has_room &= memory.has_room();
                if has_room {
                    memory.adopt(&id, record);
                }
            }
        };
        // What cannot be read is asked for one by one later on.
        let loaded_all = warms_up && backing.load(&mut load) && has_room;
        let refresher = Refresher::new(backing.queuing(), &memory, clock.clone(), lifetimes.idle);
        Ok(Self {
            backing,
            memory,
            loaded_all,
            clock,
            lifetimes,
            write_through,
            misses: Box::new([const { AtomicU64::new(0) }; MISSES]),
            start: Instant::now(),
            _refresher: refresher,
        })
    }

    /// Brings into memory what the backend has for the run, or for the instance.
    pub(super) fn fetch(&self, id: &str, run_id: Option<&str>) -> bool {
        Backing::begin();
        self.fetch_too(id, run_id)
    }

    /// The same, within the budget of what was begun before.
    pub(super) fn fetch_too(&self, id: &str, run_id: Option<&str>) -> bool {
        if self.knows_all() && (run_id.is_none() || !self.memory.has(id, None)) {
            return false;
        }
        let of_run = run_id.and_then(|run_id| self.backing.get(&run_key(id, run_id)));
        let record = of_run.or_else(|| {
            // A run that nobody has recorded: what is known of the instance decides whether it is a new one.
            (!self.memory.has(id, None))
                .then(|| self.backing.get(&key(id)))
                .flatten()
        });
        let record = record.filter(|record| record.expires_at > self.clock.now());
        let found = record.is_some();
        if let Some(record) = record {
            self.memory.adopt(id, record);
        }
        found
    }

    /// Whether an instance that is not in memory is not in the backend either.
    fn knows_all(&self) -> bool {
        self.loaded_all && self.memory.evicted.get() == 0
    }

    pub(super) fn fetch_unless_missed(&self, id: &str, run_id: Option<&str>) {
        Backing::begin();
        let needs_no_look = run_id.is_none() && self.knows_all();
        if needs_no_look || self.memory.has(id, run_id) {
            return;
        }
        let (slot, high) = self.slot_of(id, run_id);
        let now = u64::from(u32::try_from(self.start.elapsed().as_millis()).unwrap_or(u32::MAX));
        let missed = slot.load(Relaxed);
        let fresh = now.saturating_sub(missed & u64::from(u32::MAX)) < MISS.as_millis() as u64;
        if missed != 0 && missed & !u64::from(u32::MAX) == high && fresh {
            return;
        }
        if !self.fetch_too(id, run_id) {
            slot.store(high | now.max(1), Relaxed);
        }
    }

    /// Where it is noted that a key was asked for in vain, and as what.
    fn slot_of(&self, id: &str, run_id: Option<&str>) -> (&AtomicU64, u64) {
        let hash = self.memory.hash(id) ^ run_id.map_or(0, |run_id| self.memory.hash(run_id));
        let slot = &self.misses[hash as usize % MISSES];
        (slot, hash & !u64::from(u32::MAX))
    }

    /// It is there now, and memory may soon have evicted it.
    fn forget_miss(&self, id: &str, run_id: Option<&str>) {
        if !self.knows_all() {
            self.slot_of(id, run_id).0.store(0, Relaxed);
        }
    }

    /// Claims the place of a newly recorded context for all processes; `followed` is the span of the one that it follows.
    pub(super) fn publish(
        &self,
        id: &str,
        run_id: Option<&str>,
        generation: u32,
        followed: Option<SpanId>,
        context: WorkflowContext,
        counters: &Arc<Counters>,
    ) -> Option<Overruled> {
        self.forget_miss(id, run_id);
        let record = Record {
            context: context.clone(),
            run_id: run_id.map(str::to_owned),
            generation,
            // It has just been recorded.
            expires_at: after(context.recorded_at(), self.lifetimes.idle),
        };
        // The claimed key is the one that all who record the same thing agree on; the others point to the latest.
        let of_run = run_id.map(|run_id| run_key(id, run_id));
        let (claimed, pointers) = match (followed, of_run) {
            (None, None) => (key(id), Vec::new()),
            (None, Some(of_run)) => (of_run, vec![key(id)]),
            // The span that is followed tells this instance from an earlier one of the same id.
            (Some(followed), of_run) => {
                let pointers = [Some(key(id)), of_run].into_iter().flatten().collect();
                (claim_key(id, run_id, followed), pointers)
            }
        };
        for pointer in &pointers {
            self.backing
                .write(Write::Put(pointer.clone(), record.clone()));
        }
        if self.knows_all() && !self.write_through {
            // Nobody else can be first, and nobody but the pointers is asked for a later trace.
            if followed.is_none() {
                self.backing.write(Write::Put(claimed, record));
            }
            return None;
        }
        let overruled = Overruled::default();
        let on_winner: OnWinner = {
            let (memory, counters) = (self.memory.clone(), counters.clone());
            let (overruled, id) = (overruled.clone(), id.to_owned());
            Box::new(move |winner, queuing| {
                // By its ids: a backend may round the times.
                let ids = |context: &WorkflowContext| (context.trace_id(), context.span_id());
                if ids(&winner.context) == ids(&context) {
                    return;
                }
                counters.conflicts.add();
                memory.overrule(&id, &context, winner.clone());
                for pointer in pointers {
                    queuing.write(Write::Put(pointer, winner.clone()), None);
                }
                let _ = overruled.set(winner.context);
            })
        };
        let claim = Write::PutIfAbsent(claimed, record);
        if self.write_through {
            self.backing.claim_now(claim, on_winner);
        } else {
            self.backing.claim(claim, on_winner);
        }
        Some(overruled)
    }

    pub(super) fn put(&self, id: &str, context: WorkflowContext) {
        self.forget_miss(id, None);
        let record = Record::new(context, self.expiry(self.lifetimes.idle));
        self.backing.write(Write::Put(key(id), record));
    }

    pub(super) fn remove(&self, id: &str) {
        self.backing.write(Write::Remove(key(id)));
    }

    pub(super) fn forget_runs(&self, id: &str, run_ids: Vec<Box<str>>) {
        for run_id in run_ids {
            self.backing.write(Write::Remove(run_key(id, &run_id)));
        }
    }

    pub(super) fn complete(&self, id: &str, run_id: Option<&str>) {
        let expiry = self.expiry(self.lifetimes.completed);
        let keys = std::iter::once(key(id)).chain(run_id.map(|run_id| run_key(id, run_id)));
        keys.for_each(|key| self.backing.write(Write::Expire(key, expiry)));
    }

    pub(super) fn flush(&self) -> Result<(), BackendError> {
        self.backing.flush()
    }

    pub(super) fn is_down(&self) -> bool {
        self.backing.is_down()
    }

    pub(super) fn malformed(&self) -> u64 {
        self.backing.malformed()
    }

    pub(super) fn dropped_writes(&self) -> u64 {
        self.backing.dropped_writes()
    }

    pub(super) fn lookup_timeouts(&self) -> u64 {
        self.backing.lookup_timeouts()
    }

    pub(super) fn errors(&self) -> u64 {
        self.backing.errors()
    }

    fn expiry(&self, lifetime: Duration) -> SystemTime {
        expiry(&*self.clock, lifetime)
    }
}

fn key(id: &str) -> String {
    // Nearly always. All bytes, and no end at the first: so the compiler looks at many at once.
    let is_special = |byte| matches!(char::from(byte), SEPARATOR | ESCAPE);
    let any_special = id.bytes().fold(false, |any, byte| any | is_special(byte));
    if !any_special {
        return id.to_owned();
    }
    let mut key = String::with_capacity(id.len() + 8);
    for c in id.chars() {
        match c {
            SEPARATOR => key.extend([ESCAPE, ' ']),
            ESCAPE => key.extend([ESCAPE; 2]),
            c => key.push(c),
        }
    }
    key
}

/// The id of which this is the key of the latest run.
fn id_of(key: &str) -> Option<Cow<'_, str>> {
    if key.contains(SEPARATOR) {
        return None;
    }
    if !key.contains(ESCAPE) {
        return Some(key.into());
    }
    let mut chars = key.chars();
    let unescape = std::iter::from_fn(|| match chars.next()? {
        ESCAPE => match chars.next()? {
            ' ' => Some(SEPARATOR),
            c => Some(c),
        },
        c => Some(c),
    });
    Some(unescape.collect())
}

fn run_key(id: &str, run_id: &str) -> String {
    let escape = if run_id.starts_with([SEPARATOR, ESCAPE]) {
        "\u{1e}"
    } else {
        ""
    };
    format!("{}{SEPARATOR}{escape}{run_id}", key(id))
}

/// What all claim who are to open the trace that follows the one of that span.
fn claim_key(id: &str, run_id: Option<&str>, followed: SpanId) -> String {
    let run_id = run_id.unwrap_or_default();
    format!("{}{SEPARATOR}{SEPARATOR}{followed}{run_id}", key(id))
}

fn expiry(clock: &dyn Clock, lifetime: Duration) -> SystemTime {
    after(clock.now(), lifetime)
}

fn after(now: SystemTime, lifetime: Duration) -> SystemTime {
    // A lifetime beyond the end of time is cut to what the formats of backends can tell.
    let most = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    now.checked_add(lifetime.min(most)).unwrap_or(now)
}

/// Keeps in the backend what memory still uses: a use does not reach the backend by itself.
struct Refresher {
    queuing: Weak<Queuing>,
    memory: Weak<Memory>,
    clock: Arc<dyn Clock>,
    idle: Duration,
    next: AtomicU32,
    /// The walk that is under way, and the tick since which uses count.
    walk: Mutex<Option<(Cursor, u32)>>,
}

impl Refresher {
    /// How many passes there are within the idle time.
    const PASSES: u32 = 4;

    fn new(
        queuing: &Arc<Queuing>,
        memory: &Arc<Memory>,
        clock: Arc<dyn Clock>,
        idle: Duration,
    ) -> Arc<Self> {
        let refresher = Arc::new(Self {
            queuing: Arc::downgrade(queuing),
            memory: Arc::downgrade(memory),
            clock,
            idle,
            next: AtomicU32::new(0),
            walk: Mutex::default(),
        });
        let weak = Arc::downgrade(&refresher);
        crate::clock::subscribe(weak);
        refresher
    }
}

impl OnTick for Refresher {
    fn on_tick(&self, now: u32) {
        if let Some(queuing) = self.queuing.upgrade() {
            queuing.look_into_inbox();
        }
        let interval = ticks(self.idle) / Self::PASSES;
        let next = self.next.load(Relaxed);
        let mut walk = self.walk.lock().unwrap_or_else(PoisonError::into_inner);
        if walk.is_none() && now >= next {
            // The first pass is due one interval after the start.
            self.next.store(now.saturating_add(interval), Relaxed);
            *walk = (next != 0).then(|| (Cursor::default(), now.saturating_sub(interval)));
        }
        let (Some((cursor, since)), Some(memory)) = (&mut *walk, self.memory.upgrade()) else {
            return;
        };
        let (Some(page), Some(queuing)) =
            (memory.used_since(*since, cursor), self.queuing.upgrade())
        else {
            *walk = None;
            return;
        };
        let expiry = expiry(&*self.clock, self.idle);
        let refresh = |key| queuing.write(Write::Expire(key, expiry), None);
        for (id, run_ids) in page {
            run_ids
                .iter()
                .for_each(|run_id| refresh(run_key(&id, run_id)));
            refresh(key(&id));
        }
    }
}

impl std::fmt::Debug for Beyond {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Beyond")
            .field("backing", &self.backing)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Hardly anything but what a key gives a meaning.
    fn id() -> impl Strategy<Value = String> {
        "[a \u{1e}\u{1f}]{1,4}"
    }

    proptest! {
        #[test]
        fn no_two_instances_or_runs_or_claims_share_a_key(
            one in (id(), prop::option::of(id()), prop::option::of(1..3_u64)),
            other in (id(), prop::option::of(id()), prop::option::of(1..3_u64)),
        ) {
            let whole = |(id, run_id, followed): &(String, Option<String>, Option<u64>)| match (run_id, followed) {
                (run_id, Some(followed)) => claim_key(id, run_id.as_deref(), SpanId::from(*followed)),
                (Some(run_id), None) => run_key(id, run_id),
                (None, None) => key(id),
            };
            prop_assert_eq!(whole(&one) == whole(&other), one == other);
        }

        #[test]
        fn an_id_is_known_by_the_key_of_its_latest_run_alone(id in id(), run_id in id()) {
            let latest = key(&id);
            prop_assert!(id_of(&latest).is_some_and(|found| found == id));
            for other in [run_key(&id, &run_id), claim_key(&id, Some(&run_id), SpanId::from(1))] {
                prop_assert_eq!(id_of(&other), None);
            }
        }
    }

    #[test]
    fn a_usual_id_is_its_own_key_and_the_longest_keys_are_keys() {
        assert_eq!(key("order-42"), "order-42");
        let longest = "\u{1f}".repeat(crate::MAX_INSTANCE_ID_BYTES);
        assert!(claim_key(&longest, Some(&longest), SpanId::from(1)).len() < 4096);
    }
}
