//! Between memory and a backend: bounded waits, a writer that groups, a breaker for what is dead.
//!
//! A span never calls a backend. One thread carries out the writes, in groups; another one answers lookups, for
//! which a span waits no longer than its budget. A backend that fails or is too slow several times in a row is
//! asked only once in a while until it answers again. What a part of a backend does not take is held until that part
//! answers again, and everything else goes on.

use std::cell::Cell;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{
    AtomicU32, AtomicUsize,
    Ordering::{Acquire, Relaxed},
};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::write_queue::{Claims, InFlight, Known, MOST_KEYS, OnWinner, Unneeded, Waiting};
use crate::backend::{BackendError, Record, StorageBackend, Write, WriteOutcome};
use crate::lock::{lock, try_lock};
use crate::stats::Counter;
use crate::warnings::Warnings;

/// How many writes go to the backend as one group.
const GROUP: usize = 1000;

/// How many writes are looked at or held at once while spans that write wait.
const AT_ONCE: usize = 50;

/// How often the queue is tried to be locked before the thread lets others run, and how often it then does that.
const SPINS: u32 = 100;

/// How long it sleeps after that before it tries again.
const RETRY: Duration = Duration::from_micros(50);

/// How long a write tries to get into the queue itself.
const HANDOVER: Duration = Duration::from_micros(100);

/// How long writes gather before they go: who writes needs not wake the writer each time.
const GATHERING: Duration = Duration::from_millis(1);

/// After how many times that nothing gathered the writer goes to sleep, and is to be woken.
const WAKEFUL: u32 = 64;

/// How many lookups wait to be answered at most; one more is not asked.
const LOOKUPS: usize = 1024;

/// Failures in a row after which the backend is taken for dead.
const FAILURES: u32 = 3;

/// How long a dead backend, or a failed group of writes, is left alone: doubled each time up to the second, and then
/// [cut by chance](jittered).
pub(crate) const BACKOFF: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(5));

/// The writer and the reader.
const THREADS: usize = 2;

/// The longest wait of `flush`, and of the last handle that is dropped.
const FLUSH_PATIENCE: Duration = Duration::from_secs(30);
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

thread_local! {
    /// How long the span that is starting on this thread, or the call, has waited for the backend.
    static WAITED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// A backend and the threads that use it.
pub(crate) struct Client {
    shared: Arc<Queuing>,
    /// `None` only while it is being dropped.
    lookups: Option<SyncSender<Lookup>>,
    budget: Duration,
}

pub(crate) struct Queuing {
    backend: Mutex<Option<Arc<dyn StorageBackend>>>,
    queue: Mutex<Queue>,
    /// Takes what is to be written while whoever has locked the queue has lost its shared: no span waits for that. Taken in
    /// by whoever locks the queue next.
    inbox: Sender<(Write, Option<OnWinner>)>,
    /// How much is on its way through it.
    in_inbox: AtomicUsize,
    /// Something was queued, or is waited for.
    queued: Condvar,
    /// A group was written, or could not be; a thread has ended.
    settled: Condvar,
    /// Two, since what answers reads need not answer writes, nor the other way round.
    reads: Breaker,
    writes: Breaker,
    dropped_writes: Counter,
    errors: Counter,
    lookup_timeouts: Counter,
    warnings: Arc<Warnings>,
}

struct Queue {
    inbox: Receiver<(Write, Option<OnWinner>)>,
    /// Dropped by the writer, where nothing is locked.
    unneeded: Vec<Unneeded>,
    waiting: Waiting,
    /// What is being written, or could not be, and is tried again before anything else.
    in_flight: Option<Arc<InFlight>>,
    /// What a part of the backend did not take, and whatever was to be written to the same keys after that. Only the
    /// writer adds to it.
    held: Waiting,
    /// When that is tried again, if there is any.
    held_until: Option<Instant>,
    /// Counts what was queued: up to where it was taken, was written, is to be flushed, and was.
    submitted: u64,
    taken: u64,
    flush_wanted: u64,
    written: u64,
    flushed: u64,
    failures: u64,
    /// The last of them.
    failure: String,
    /// Somebody waits for what was queued last.
    is_urgent: bool,
    /// The writer does not look by itself.
    is_asleep: bool,
    closing: bool,
    threads: usize,
}

struct Lookup {
    key: String,
    deadline: Instant,
    answer: SyncSender<Option<Record>>,
}

impl Client {
    pub(crate) fn new(
        backend: Arc<dyn StorageBackend>,
        budget: Duration,
        warnings: Arc<Warnings>,
    ) -> std::io::Result<Self> {
        let (inbox, taken_in) = channel();
        let shared = Arc::new(Queuing {
            backend: Mutex::new(Some(backend)),
            queue: Mutex::new(Queue::new(taken_in)),
            inbox,
            in_inbox: AtomicUsize::new(0),
            queued: Condvar::new(),
            settled: Condvar::new(),
            reads: Breaker::default(),
            writes: Breaker::default(),
            dropped_writes: Counter::default(),
            errors: Counter::default(),
            lookup_timeouts: Counter::default(),
            warnings,
        });
        let (lookups, asked) = sync_channel(LOOKUPS);
        let backing = Self {
            shared: shared.clone(),
            lookups: Some(lookups),
            budget,
        };
        let answering = shared.clone();
        spawn("workflow-context-writes", &shared, move |shared| {
            shared.write_until_closed()
        })?;
        spawn("workflow-context-lookups", &answering, move |shared| {
            shared.answer(&asked)
        })?;
        Ok(backing)
    }

    /// A span begins to start on this thread, or a call: all its questions share one budget.
    pub(crate) fn begin() {
        WAITED.set(Duration::ZERO);
    }

    /// Asks for a key, and waits for the answer within the budget; `None` where there is none by then.
    pub(crate) fn get(&self, key: &str) -> Option<Record> {
        if self.budget.is_zero() {
            return None;
        }
        let start = Instant::now();
        let Some(queue) = self.shared.queue_within(self.left().unwrap_or_default()) else {
            WAITED.set(WAITED.get() + start.elapsed());
            self.shared.lookup_timeouts.add();
            return None;
        };
        let known = queue.known(key);
        drop(queue);
        WAITED.set(WAITED.get() + start.elapsed());
        let until = match known {
            Some(Known::Record(record)) => return Some(record),
            Some(Known::Gone) => return None,
            Some(Known::Until(moment)) => Some(moment),
            None => None,
        };
        let left = self.left()?;
        if !self.shared.reads.lets_through() {
            return None;
        }
        let (answer, answered) = sync_channel(1);
        let lookup = Lookup {
            key: key.to_owned(),
            deadline: Instant::now().checked_add(left)?,
            answer,
        };
        // Too many are asked for already, or the thread is gone.
        self.lookups.as_ref()?.try_send(lookup).ok()?;
        let answer = self.wait(&answered, left, &self.shared.reads);
        if let Err(RecvTimeoutError::Timeout) = answer {
            self.shared.lookup_timeouts.add();
        }
        let mut record = answer.ok()??;
        record.expires_at = until.unwrap_or(record.expires_at);
        Some(record)
    }

    /// What is left of the budget, if anything is.
    fn left(&self) -> Option<Duration> {
        let left = self.budget.saturating_sub(WAITED.get());
        (!left.is_zero()).then_some(left)
    }

    /// Waits for an answer; none at all is a failure of the backend.
    fn wait<T>(
        &self,
        answered: &Receiver<T>,
        most: Duration,
        breaker: &Breaker,
    ) -> Result<T, RecvTimeoutError> {
        let start = Instant::now();
        let answer = answered.recv_timeout(most);
        WAITED.set(WAITED.get() + start.elapsed());
        if let Err(RecvTimeoutError::Timeout) = answer {
            breaker.failed();
        }
        answer
    }

    pub(crate) fn write(&self, write: Write) {
        self.shared.write(write, None);
    }

    /// Queues a write whose winner matters.
    pub(crate) fn claim(&self, write: Write, on_winner: OnWinner) {
        self.shared.write(write, Some(on_winner));
    }

    /// Queues a write and waits for what becomes of it, within the budget.
    pub(crate) fn claim_now(&self, write: Write, on_winner: OnWinner) {
        let Some(left) = self.left().filter(|_| self.shared.writes.lets_through()) else {
            return self.claim(write, on_winner);
        };
        let (done, is_done) = sync_channel(1);
        let on_winner: OnWinner = Box::new(move |winner| {
            let follow_ups = on_winner(winner);
            let _ = done.try_send(());
            follow_ups
        });
        self.shared.write(write, Some(on_winner));
        if let Some(mut queue) = self.shared.queue_within(left) {
            queue.is_urgent = true;
        }
        self.shared.queued.notify_one();
        let _ = self.wait(&is_done, left, &self.shared.writes);
    }

    /// Shows all that the backend has; `false` where it failed, and that was perhaps not all.
    pub(crate) fn load(&self, visit: &mut dyn FnMut(&str, Record)) -> bool {
        let backend = self.shared.backend();
        let Some(backend) = backend else {
            return false;
        };
        let loaded = tried(|| backend.scan(visit));
        if let Err(error) = &loaded {
            self.shared.refused(error);
            self.shared.reads.failed();
        }
        loaded.is_ok()
    }

    /// Waits until all that was queued by now is written and flushed, or an attempt at it has failed.
    pub(crate) fn flush(&self) -> Result<(), BackendError> {
        let mut queue = self.shared.queue();
        let target = queue.submitted;
        let failures = queue.failures;
        queue.flush_wanted = target;
        self.shared.queued.notify_one();
        let deadline = Instant::now() + FLUSH_PATIENCE;
        while queue.flushed < target {
            if queue.failures != failures || queue.threads < THREADS {
                return Err(BackendError::new(
                    "the backend did not take what was written",
                    Some(queue.failure.clone().into()),
                ));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(BackendError::new(
                    "the backend took too long to flush",
                    None,
                ));
            }
            queue = wait(&self.shared.settled, queue, left);
        }
        Ok(())
    }

    pub(crate) fn queuing(&self) -> &Arc<Queuing> {
        &self.shared
    }

    pub(crate) fn is_down(&self) -> bool {
        self.shared.reads.is_open() || self.shared.writes.is_open()
    }

    pub(crate) fn dropped_writes(&self) -> u64 {
        self.shared.dropped_writes.get()
    }

    pub(crate) fn errors(&self) -> u64 {
        self.shared.errors.get()
    }

    pub(crate) fn lookup_timeouts(&self) -> u64 {
        self.shared.lookup_timeouts.get()
    }

    pub(crate) fn malformed(&self) -> u64 {
        self.shared
            .backend()
            .map_or(0, |backend| backend.malformed())
    }
}

impl Drop for Client {
    /// Writes what is queued, and lets go of the backend, as long as that does not take too long.
    fn drop(&mut self) {
        self.lookups = None;
        let mut queue = self.shared.queue();
        queue.closing = true;
        self.shared.queued.notify_one();
        let deadline = Instant::now() + CLOSE_PATIENCE;
        while queue.threads > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            queue = wait(&self.shared.settled, queue, left);
        }
        drop(queue);
        let backend = lock(&self.shared.backend).take();
        drop(backend);
    }
}

impl Queuing {
    fn refused(&self, error: &BackendError) {
        self.errors.add();
        self.warnings.backend_refused(error);
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.take_in(lock(&self.queue))
    }

    /// The same, unless that takes longer: nobody holds it for long, but one that does may have lost its shared.
    fn queue_within(&self, most: Duration) -> Option<MutexGuard<'_, Queue>> {
        let mut deadline = None;
        for attempt in 0_u32.. {
            if let Some(queue) = try_lock(&self.queue) {
                return Some(self.take_in(queue));
            }
            if attempt < SPINS {
                std::hint::spin_loop();
                continue;
            }
            let now = Instant::now();
            let left = deadline
                .get_or_insert(now + most)
                .saturating_duration_since(now);
            if left.is_zero() {
                return None;
            }
            if attempt < 2 * SPINS {
                thread::yield_now();
            } else {
                thread::sleep(left.min(RETRY));
            }
        }
        None
    }

    /// Queues what came by the inbox, before anything else is queued.
    fn take_in<'a>(&self, mut queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        let mut is_new = false;
        while self.in_inbox.load(Acquire) > 0 {
            let Ok((write, on_winner)) = queue.inbox.try_recv() else {
                // It is about to come.
                break;
            };
            self.in_inbox.fetch_sub(1, Relaxed);
            let unneeded = self.add(&mut queue, write, on_winner);
            queue.unneeded.push(unneeded);
            is_new = true;
        }
        if is_new && std::mem::take(&mut queue.is_asleep) {
            self.queued.notify_one();
        }
        queue
    }

    fn add(&self, queue: &mut Queue, write: Write, on_winner: Option<OnWinner>) -> Unneeded {
        queue.submitted += 1;
        let (unneeded, is_dropped) = queue.waiting.add(write, on_winner);
        if is_dropped {
            self.dropped_writes.add();
        }
        unneeded
    }

    /// Has the writer see what came by the inbox, if nobody else has taken it in.
    pub(crate) fn look_into_inbox(&self) {
        if self.in_inbox.load(Relaxed) > 0 {
            drop(self.queue());
        }
    }

    fn backend(&self) -> Option<Arc<dyn StorageBackend>> {
        lock(&self.backend).clone()
    }

    /// Queues a write. What waits under the same key is replaced where it is no longer needed.
    pub(crate) fn write(&self, write: Write, on_winner: Option<OnWinner>) {
        let Some(mut queue) = self.queue_within(HANDOVER) else {
            if self.in_inbox.fetch_add(1, Relaxed) < MOST_KEYS {
                // It cannot fail: the other end is in the queue.
                let _ = self.inbox.send((write, on_winner));
                self.queued.notify_one();
            } else {
                self.in_inbox.fetch_sub(1, Relaxed);
                self.dropped_writes.add();
            }
            return;
        };
        let _unneeded = self.add(&mut queue, write, on_winner);
        let wakes = std::mem::take(&mut queue.is_asleep);
        drop(queue);
        if wakes {
            self.queued.notify_one();
        }
    }

    fn write_until_closed(&self) {
        let Some(backend) = self.backend() else {
            return;
        };
        let (mut claims, mut emptied) = (Claims::default(), Waiting::default());
        let (mut backoff, mut held_backoff) = (BACKOFF.0, BACKOFF.0);
        let mut was_held = false;
        loop {
            let mut queue = self.await_work();
            if queue.in_flight.is_none() {
                // Who waits for all has what is held tried at once, by turns with what is new.
                let is_wanted = !queue.held.is_empty() && queue.is_waited_for();
                was_held = queue.is_held_due() || (is_wanted && !was_held);
                let taken = if was_held {
                    queue.held_until = None;
                    &mut queue.held
                } else {
                    queue.taken = queue.submitted;
                    &mut queue.waiting
                };
                if !taken.is_empty() {
                    let (taken, theirs) = taken.take(std::mem::take(&mut emptied));
                    queue.in_flight = Some(Arc::new(taken));
                    claims = theirs;
                }
            }
            let in_flight = queue.in_flight.clone();
            let unneeded = std::mem::take(&mut queue.unneeded);
            drop(queue);
            drop(unneeded);

            let mut in_part = None;
            let written = match &in_flight {
                Some(in_flight) => {
                    self.write_groups(&*backend, in_flight, &mut claims, &mut in_part)
                }
                None => Ok(()),
            };
            let mut queue = self.queue();
            if written.is_ok() {
                queue.in_flight = None;
                if queue.held.is_empty() {
                    queue.written = queue.taken;
                    held_backoff = BACKOFF.0;
                }
            }
            let last = queue.closing && queue.waiting.is_empty() && queue.held.is_empty();
            let wanted = (queue.flushed + 1..=queue.written).contains(&queue.flush_wanted);
            drop(queue);
            if let (Ok(()), Some(in_flight)) = (&written, in_flight.and_then(Arc::into_inner)) {
                emptied = in_flight.into_emptied(std::mem::take(&mut claims));
            }
            let outcome = written.and_then(|()| match last || wanted {
                true => tried(|| backend.flush()).map(|()| true),
                false => Ok(false),
            });

            let mut queue = self.queue();
            match &outcome {
                Ok(is_flushed) => {
                    self.writes.succeeded();
                    backoff = BACKOFF.0;
                    if *is_flushed {
                        queue.flushed = queue.written;
                    }
                }
                Err(_) => self.writes.failed(),
            }
            for error in in_part.iter().chain(outcome.as_ref().err()) {
                self.refused(error);
                queue.failures += 1;
                queue.failure = error.to_string();
                // Who waits for it is told, and may ask again.
                queue.flush_wanted = queue.flushed;
            }
            if queue.held.is_empty() {
                queue.held_until = None;
            } else if queue.held_until.is_none() {
                queue.held_until = Some(Instant::now() + jittered(held_backoff));
                held_backoff = (held_backoff * 2).min(BACKOFF.1);
            }
            self.settled.notify_all();
            let is_over =
                last || outcome.is_err() || (in_part.is_some() && queue.waiting.is_empty());
            if queue.closing && is_over {
                return;
            }
            if outcome.is_err() {
                // A flush or the end cuts this short: somebody waits for one more try.
                let deadline = Instant::now() + jittered(backoff);
                backoff = (backoff * 2).min(BACKOFF.1);
                while !queue.is_waited_for() && Instant::now() < deadline {
                    let left = deadline.saturating_duration_since(Instant::now());
                    queue = wait(&self.queued, queue, left);
                }
            }
        }
    }

    /// Returns when there is something to be written or flushed.
    fn await_work(&self) -> MutexGuard<'_, Queue> {
        let mut queue = self.queue();
        let mut idle = 0;
        loop {
            queue = self.take_in(queue);
            if queue.is_waited_for() || queue.in_flight.is_some() || queue.is_held_due() {
                return queue;
            }
            if idle < WAKEFUL {
                let gathers = |queue: &mut Queue| !queue.is_urgent && !queue.is_waited_for();
                let waited = self.queued.wait_timeout_while(queue, GATHERING, gathers);
                queue = self.take_in(waited.unwrap_or_else(PoisonError::into_inner).0);
                queue.is_urgent = false;
                if !queue.waiting.is_empty() {
                    return queue;
                }
                idle += 1;
            } else {
                queue.is_asleep = true;
                let sleeps = |queue: &mut Queue| {
                    let is_new = self.in_inbox.load(Relaxed) > 0;
                    queue.is_asleep && !is_new && !queue.is_waited_for()
                };
                queue = match queue.held_until {
                    None => {
                        let waited = self.queued.wait_while(queue, sleeps);
                        waited.unwrap_or_else(PoisonError::into_inner)
                    }
                    Some(moment) => {
                        let left = moment.saturating_duration_since(Instant::now());
                        let waited = self.queued.wait_timeout_while(queue, left, sleeps);
                        waited.unwrap_or_else(PoisonError::into_inner).0
                    }
                };
                queue.is_asleep = false;
                idle = 0;
            }
        }
    }

    /// Writes what is left of it, and tells those who have claimed a key what is stored there. What a part of the
    /// backend does not take is held; the error is left in `in_part`.
    fn write_groups(
        &self,
        backend: &dyn StorageBackend,
        in_flight: &InFlight,
        claims: &mut Claims,
        in_part: &mut Option<BackendError>,
    ) -> Result<(), BackendError> {
        loop {
            let (group, places) = in_flight.next_group(GROUP);
            if places.is_empty() {
                return Ok(());
            }
            let answers = self.write_group(backend, group, in_part)?;
            let of_group = || claims.pop_front().flatten();
            let mut claims: Vec<_> = std::iter::repeat_with(of_group).take(group.len()).collect();
            if answers.iter().any(Option::is_none) {
                self.hold(group, &answers, &mut claims);
            }
            in_flight.are_done(places);
            for ((write, answer), claim) in group.iter().zip(answers).zip(claims) {
                let (Write::Put(_, own) | Write::PutIfAbsent(_, own)) = write else {
                    continue;
                };
                if let (Some(winner), Some(on_winner)) = (answer, claim) {
                    let follow_ups = on_winner(winner.unwrap_or_else(|| own.clone()));
                    follow_ups
                        .into_iter()
                        .for_each(|write| self.write(write, None));
                }
            }
        }
    }

    /// The answer to each write; `None` where it was not carried out.
    fn write_group(
        &self,
        backend: &dyn StorageBackend,
        group: &[Write],
        in_part: &mut Option<BackendError>,
    ) -> Result<Vec<Option<Option<Record>>>, BackendError> {
        // What is held of a key has to be written before.
        let is_any_held = !self.queue().held.is_empty();
        let free = is_any_held.then(|| {
            let mut free = Vec::new();
            for (part, writes) in group.chunks(AT_ONCE).enumerate() {
                let queue = self.queue();
                let is_free = |&at: &usize| queue.held.known(writes[at].key()).is_none();
                let places = (0..writes.len()).filter(is_free);
                free.extend(places.map(|at| part * AT_ONCE + at));
            }
            free
        });
        let Some(free) = free.filter(|free| free.len() < group.len()) else {
            return carried_out(backend, group, in_part);
        };
        let mut answers = vec![None; group.len()];
        if !free.is_empty() {
            let writes: Vec<_> = free.iter().map(|&at| group[at].clone()).collect();
            for (at, answer) in free
                .into_iter()
                .zip(carried_out(backend, &writes, in_part)?)
            {
                answers[at] = answer;
            }
        }
        Ok(answers)
    }

    /// Keeps what was not carried out, and who wants to know of it.
    fn hold(
        &self,
        group: &[Write],
        answers: &[Option<Option<Record>>],
        claims: &mut [Option<OnWinner>],
    ) {
        let mut unneeded = Vec::new();
        let to_hold = group.iter().zip(answers).zip(claims);
        let mut to_hold: Vec<_> = to_hold
            .filter(|((_, answer), _)| answer.is_none())
            .map(|((write, _), claim)| (write.clone(), claim.take()))
            .collect();
        while !to_hold.is_empty() {
            let some = to_hold.drain(..to_hold.len().min(AT_ONCE));
            let mut queue = self.queue();
            for (write, claim) in some {
                let (not_needed, is_dropped) = queue.held.add(write, claim);
                unneeded.push(not_needed);
                if is_dropped {
                    self.dropped_writes.add();
                }
            }
        }
    }

    fn answer(&self, asked: &Receiver<Lookup>) {
        let Some(backend) = self.backend() else {
            return;
        };
        while let Ok(Lookup {
            key,
            deadline,
            answer,
        }) = asked.recv()
        {
            if Instant::now() > deadline {
                continue;
            }
            match tried(|| backend.get(&key)) {
                Ok(found) => {
                    if Instant::now() <= deadline {
                        self.reads.succeeded();
                    }
                    let _ = answer.try_send(found);
                }
                Err(error) => {
                    self.refused(&error);
                    if !error.is_partial() {
                        self.reads.failed();
                    }
                    let _ = answer.try_send(None);
                }
            }
        }
    }
}

/// Has a panic of the backend, which it must not do, be a failure like any other.
fn tried<R>(call: impl FnOnce() -> Result<R, BackendError>) -> Result<R, BackendError> {
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err(BackendError::new("the backend panicked", None)))
}

/// Writes a group. Answers for each write the record that it found, if any; `None` for a write that failed, whose error
/// is left in `in_part`. A backend that returns too few outcomes is taken to have carried out the rest.
fn carried_out(
    backend: &dyn StorageBackend,
    writes: &[Write],
    in_part: &mut Option<BackendError>,
) -> Result<Vec<Option<Option<Record>>>, BackendError> {
    let outcomes = tried(|| backend.write(writes))?;
    let mut answers: Vec<_> = outcomes
        .into_iter()
        .map(|outcome| match outcome {
            WriteOutcome::Done => Some(None),
            WriteOutcome::Existing(record) => Some(Some(record)),
            WriteOutcome::Failed(error) => {
                *in_part = Some(error);
                None
            }
        })
        .collect();
    answers.resize(writes.len(), Some(None));
    Ok(answers)
}

/// A pause for as long, or for less by chance, down to half of it: what began for many processes at one moment does not
/// go on so.
pub(crate) fn jittered(pause: Duration) -> Duration {
    // Each of these has keys of its own, which the operating system's randomness began.
    let random = RandomState::new().hash_one(()) as u32;
    pause.mul_f64(1.0 - f64::from(random) / f64::from(u32::MAX) / 2.0)
}

impl Queue {
    fn new(inbox: Receiver<(Write, Option<OnWinner>)>) -> Self {
        Self {
            inbox,
            unneeded: Vec::new(),
            waiting: Waiting::default(),
            in_flight: None,
            held: Waiting::default(),
            held_until: None,
            submitted: 0,
            taken: 0,
            flush_wanted: 0,
            written: 0,
            flushed: 0,
            failures: 0,
            failure: String::new(),
            is_urgent: false,
            is_asleep: false,
            closing: false,
            threads: 0,
        }
    }

    /// What a key has as soon as everything is written.
    fn known(&self, key: &str) -> Option<Known> {
        let in_flight = || self.in_flight.as_ref()?.known(key);
        let held = || self.held.known(key);
        self.waiting.known(key).or_else(in_flight).or_else(held)
    }

    fn is_held_due(&self) -> bool {
        self.held_until
            .is_some_and(|moment| Instant::now() >= moment)
    }

    fn is_waited_for(&self) -> bool {
        self.closing || self.flush_wanted > self.flushed
    }
}

/// Keeps callers away from a backend that does not answer.
#[derive(Default)]
struct Breaker {
    failures: AtomicU32,
    state: Mutex<Option<Open>>,
}

struct Open {
    until: Instant,
    pause: Duration,
}

impl Breaker {
    /// `false` while the backend is to be left alone; else one caller tries, once a pause.
    fn lets_through(&self) -> bool {
        if self.failures.load(Relaxed) < FAILURES {
            return true;
        }
        let now = Instant::now();
        let mut state = lock(&self.state);
        match &mut *state {
            Some(open) if now < open.until => false,
            Some(open) => {
                open.pause = (open.pause * 2).min(BACKOFF.1);
                open.until = now + jittered(open.pause);
                true
            }
            None => true,
        }
    }

    fn failed(&self) {
        let failures = self.failures.fetch_add(1, Relaxed).saturating_add(1);
        if failures == FAILURES {
            let open = Open {
                until: Instant::now() + jittered(BACKOFF.0),
                pause: BACKOFF.0,
            };
            *lock(&self.state) = Some(open);
        }
    }

    fn succeeded(&self) {
        if self.failures.swap(0, Relaxed) >= FAILURES {
            *lock(&self.state) = None;
        }
    }

    fn is_open(&self) -> bool {
        self.failures.load(Relaxed) >= FAILURES
    }
}

fn spawn(
    name: &str,
    shared: &Arc<Queuing>,
    run: impl FnOnce(&Queuing) + Send + 'static,
) -> std::io::Result<()> {
    /// Counts the thread out, however it ends.
    struct Alive(Arc<Queuing>);
    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.queue().threads -= 1;
            self.0.settled.notify_all();
        }
    }
    shared.queue().threads += 1;
    let alive = Alive(shared.clone());
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || run(&alive.0))
        .map(drop)
}

fn wait<'a>(
    condvar: &Condvar,
    queue: MutexGuard<'a, Queue>,
    most: Duration,
) -> MutexGuard<'a, Queue> {
    condvar
        .wait_timeout(queue, most)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::backend::memory::MemoryBackend;
    use crate::context::WorkflowContext;

    /// As it is where a thread that has locked the queue has lost its shared.
    #[test]
    fn no_span_waits_for_whoever_has_locked_the_queue() {
        let backend = Arc::new(MemoryBackend::new());
        let budget = Duration::from_millis(20);
        let backing = Client::new(backend.clone(), budget, Warnings::new(false));
        let backing = backing.expect("there are threads");
        let record = |span: u64| {
            let parent = format!("00-0af7651916cd43dd8448eb211c80319c-{span:016x}-01");
            let context = WorkflowContext::parse(&parent, "").expect("well formed");
            Record::new(context, SystemTime::now() + Duration::from_secs(60))
        };
        let has = |key: &str| backend.get(key).expect("it works");
        for round in 1..50 {
            let key = format!("key {round}");
            // Sometimes the writer is asleep by then, and sometimes not.
            thread::sleep(Duration::from_millis(round % 3 * 50));
            let locked = backing.shared.queue();
            thread::scope(|scope| {
                let span = scope.spawn(|| {
                    Client::begin();
                    assert_eq!(backing.get("unknown"), None);
                    backing.write(Write::Put(key.clone(), record(round)));
                    backing.write(Write::Put(key.clone(), record(round + 1)));
                    backing.write(Write::Put(key.clone(), record(round + 2)));
                });
                span.join().expect("it does not wait for the lock");
            });
            assert_eq!(backing.lookup_timeouts(), round);
            drop(locked);
            if round % 2 == 0 {
                Client::begin();
                let known = backing.get(&key).expect("it is known").context;
                assert_eq!(known.span_id(), record(round + 2).context.span_id());
            }
            // By itself, without a flush or the clock.
            let deadline = Instant::now() + FLUSH_PATIENCE;
            while has(&key).is_none() {
                assert!(Instant::now() < deadline, "it is written");
                thread::sleep(Duration::from_millis(1));
            }
            let written = has(&key).expect("it is there").context;
            assert_eq!(written.span_id(), record(round + 2).context.span_id());
        }
    }

    #[test]
    fn pauses_of_many_are_spread_over_the_second_half() {
        let pause = Duration::from_secs(100);
        let pauses: Vec<_> = (0..1_000).map(|_| jittered(pause).as_secs()).collect();
        assert!(pauses.iter().all(|pause| (50..=100).contains(pause)));
        // Ten parts, with a tenth of them each but for chance.
        for part in 0..10 {
            let there = pauses
                .iter()
                .filter(|&&pause| (pause.min(99) - 50) / 5 == part)
                .count();
            assert!(
                (40..=180).contains(&there),
                "{there} of 1,000 in part {part}"
            );
        }
        assert_eq!(jittered(Duration::ZERO), Duration::ZERO);
    }
}
