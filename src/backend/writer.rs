//! The writer: a thread that carries out queued writes in groups, retries those that failed, and flushes.
//!
//! A span sends its write through a channel and never waits for a lock, whose holder might have been preempted. Each
//! thread that locks the queue first moves messages from the channel into it: the writer's own, a lookup, and a span
//! that finds the channel crowded and the queue unlocked.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::atomic::{
    AtomicBool, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::breaker::{Backoff, Breaker};
use super::group_size::GroupSize;
use super::guard::Guarded;
use super::write_queue::{
    Callbacks, FollowUp, InFlight, Known, Lost, MAX_WRITES, OnWinner, WriteQueue, overflow, weight,
};
use crate::backend::{BackendError, Record, Write, WriteOutcome};
use crate::error::StorageError;
use crate::lock::{lock, try_lock};
use crate::stats::Counter;

/// The time for which writes gather before they are taken.
const GATHERING: Duration = Duration::from_millis(1);

/// The number of times that the thread finds nothing gathered before it sleeps until it is woken.
const IDLE_ROUNDS: u32 = 64;

/// The weight of the messages in the channel from which on each write moves some into the queue, where they are merged and
/// bounded. Large enough for a burst while the backend is busy with a group.
const CROWDED: usize = 8 * 1024;

/// The largest number of writes that are handled while the queue is locked, since lookups wait meanwhile.
const AT_ONCE: usize = 64;

/// The number of times that a lookup tries to lock the queue without a pause, and the pause between further attempts.
const SPINS: u32 = 250;
const LOCK_RETRY: Duration = Duration::from_micros(50);

/// The longest wait of `flush`.
const FLUSH_PATIENCE: Duration = Duration::from_secs(30);

/// The side of the writer that spans and lookups use, shared with its thread.
pub(crate) struct Writer {
    channel: Sender<Message>,
    /// The weight of the messages in the channel, at least their number: added before sending, subtracted after
    /// receiving.
    in_channel: AtomicUsize,
    queue: Mutex<Queue>,
    /// Set while the thread has to be woken for a new write.
    is_asleep: AtomicBool,
    /// Set before anything is written.
    thread: OnceLock<Thread>,
    pub(super) breaker: Breaker,
    /// Writes dropped because the channel was full, or because of an unreadable value in their place.
    dropped: Counter,
}

enum Message {
    Write(Write, Option<OnWinner>),
    /// Ends the gathering.
    Hurry,
    Flush(Flush),
    Close,
}

/// The receiver of a flush's result.
type Flush = SyncSender<Result<(), StorageError>>;

impl Message {
    fn weight(&self) -> usize {
        match self {
            Self::Write(write, _) => weight(write),
            Self::Hurry | Self::Flush(_) | Self::Close => 1,
        }
    }
}

struct Queue {
    channel: Receiver<Message>,
    waiting: WriteQueue,
    /// Shared with the thread, which alone replaces it.
    in_flight: Option<Arc<InFlight>>,
    /// Writes that follow from those in flight. Only the thread adds to it.
    follow_ups: WriteQueue,
    /// Writes that a part of the backend failed to carry out, and later ones of their keys. Only the thread adds to it.
    held: WriteQueue,
    lost: Lost,
    is_urgent: bool,
    /// Answered by the next turn.
    flushes: Vec<Flush>,
    is_closing: bool,
}

/// One turn of the thread: what it carries out, beside the waiting writes, before it waits again.
struct Turn {
    with_held: bool,
    flushes: Vec<Flush>,
    is_closing: bool,
}

/// A lookup could not lock the queue in time.
pub(super) struct TimedOut;

impl Writer {
    pub(super) fn new() -> Arc<Self> {
        let (sender, receiver) = channel();
        Arc::new(Self {
            channel: sender,
            in_channel: AtomicUsize::new(0),
            queue: Mutex::new(Queue {
                channel: receiver,
                waiting: WriteQueue::default(),
                in_flight: None,
                follow_ups: WriteQueue::default(),
                held: WriteQueue::default(),
                lost: Lost::default(),
                is_urgent: false,
                flushes: Vec::new(),
                is_closing: false,
            }),
            is_asleep: AtomicBool::new(false),
            thread: OnceLock::new(),
            breaker: Breaker::default(),
            dropped: Counter::default(),
        })
    }

    /// Sets the thread to wake when something is written.
    pub(super) fn set_thread(&self, thread: &Thread) {
        let _ = self.thread.set(thread.clone());
    }

    /// Queues a write. Waits for no lock.
    pub(crate) fn write(&self, write: Write, on_winner: Option<OnWinner>) {
        let in_channel = self.in_channel.load(Relaxed);
        if in_channel >= CROWDED {
            if let Some(queue) = try_lock(&self.queue) {
                self.with(queue, |_| ());
            } else if in_channel >= MAX_WRITES {
                self.dropped.add();
                return;
            }
        }
        self.send(weight(&write), Message::Write(write, on_winner));
        // The thread sets this before it checks the channel for the last time.
        if self.is_asleep.load(SeqCst) && self.is_asleep.swap(false, SeqCst) {
            self.wake();
        }
    }

    /// Returns `true` if writes that can wait may be queued now: most of the queue is kept for others.
    pub(crate) fn has_room(&self) -> bool {
        self.with_queue(|queue| queue.waiting.len() < MAX_WRITES / 4)
    }

    /// Returns for each key whether something is still to be written to it.
    pub(crate) fn are_queued(&self, keys: &[String]) -> Vec<bool> {
        let mut queued = Vec::with_capacity(keys.len());
        for some in keys.chunks(AT_ONCE) {
            self.with_queue(|queue| {
                queued.extend(some.iter().map(|key| queue.known(key).is_some()));
            });
        }
        queued
    }

    /// Returns `true` while the circuit is open.
    pub(crate) fn is_down(&self) -> bool {
        self.breaker.is_open()
    }

    /// Queues a write and waits, for `most` at most, until it and all that follows from it is done.
    pub(super) fn write_and_wait(&self, write: Write, on_winner: OnWinner, most: Duration) {
        // Disconnected with the last of the callbacks.
        let (pending, is_done) = sync_channel(0);
        self.write(write, Some(holding(pending, on_winner)));
        self.send(1, Message::Hurry);
        self.wake();
        if let Err(RecvTimeoutError::Timeout) = is_done.recv_timeout(most) {
            self.breaker.failed();
        }
    }

    /// Returns the content of a key after all queued writes, or `None` if there is none of this key.
    pub(super) fn known(&self, key: &str, most: Duration) -> Result<Option<Known>, TimedOut> {
        let start = Instant::now();
        let mut to_move = self.in_channel.load(SeqCst);
        let mut failed_attempts = 0;
        loop {
            if let Some(queue) = try_lock(&self.queue) {
                let known = self.with(queue, |queue| queue.known(key));
                to_move = to_move.saturating_sub(AT_ONCE);
                if to_move == 0 {
                    return Ok(known);
                }
            } else {
                failed_attempts += 1;
            }
            let left = most.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(TimedOut);
            }
            if failed_attempts > SPINS {
                thread::sleep(left.min(LOCK_RETRY));
            }
        }
    }

    /// Waits until everything queued by now is written and flushed, or an attempt has failed.
    ///
    /// # Errors
    ///
    /// Also if writes since the last flush were dropped, or are refused.
    pub(super) fn flush(&self) -> Result<(), StorageError> {
        let (flush, flushed) = sync_channel(1);
        self.send(1, Message::Flush(flush));
        self.wake();
        flushed.recv_timeout(FLUSH_PATIENCE).unwrap_or_else(|_| {
            let message = format!("flush timed out after {} s", FLUSH_PATIENCE.as_secs());
            Err(BackendError::new(message, None).into())
        })
    }

    /// Ends the thread once everything is written and flushed, or an attempt has failed.
    pub(super) fn close(&self) {
        self.send(1, Message::Close);
        self.wake();
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.get() + self.with_queue(|queue| queue.lost.writes)
    }

    #[cfg(test)]
    pub(super) fn lock_queue(&self) -> impl Drop + '_ {
        lock(&self.queue)
    }

    #[inline]
    fn send(&self, weight: usize, message: Message) {
        self.in_channel.fetch_add(weight, SeqCst);
        // It cannot fail: the receiver lives as long as `self`.
        let _ = self.channel.send(message);
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Calls `run` once every message that was sent before is in the queue.
    fn with_queue<R>(&self, run: impl FnOnce(&mut Queue) -> R) -> R {
        let in_channel = self.in_channel.load(SeqCst);
        for _ in 0..in_channel / AT_ONCE {
            self.with(lock(&self.queue), |_| ());
        }
        self.with(lock(&self.queue), run)
    }

    /// Moves some messages from the channel into the queue, and calls `run`.
    fn with<R>(&self, mut queue: MutexGuard<'_, Queue>, run: impl FnOnce(&mut Queue) -> R) -> R {
        for _ in 0..self.in_channel.load(SeqCst).min(AT_ONCE) {
            // The sender may have incremented the counter and not sent yet.
            let Ok(message) = queue.channel.try_recv() else {
                break;
            };
            self.in_channel.fetch_sub(message.weight(), Relaxed);
            let queue = &mut *queue;
            match message {
                Message::Write(write, on_winner) => {
                    queue.waiting.add(write, on_winner, &mut queue.lost);
                }
                Message::Hurry => queue.is_urgent = true,
                Message::Flush(flush) => queue.flushes.push(flush),
                Message::Close => queue.is_closing = true,
            }
        }
        let result = run(&mut queue);
        let callbacks = std::mem::take(&mut queue.lost.callbacks);
        drop(queue);
        drop(callbacks);
        result
    }

    /// Carries out writes on the calling thread, until the writer is closed.
    pub(super) fn run(&self, backend: &Guarded) {
        let mut state = ThreadState {
            writer: self,
            backend,
            callbacks: Callbacks::new(),
            held_until: None,
            held_backoff: Backoff::new(),
            size: GroupSize::new(),
            has_written: false,
            is_dirty: false,
            dropped_before: 0,
            first_failure: None,
        };
        let mut backoff = Backoff::new();
        loop {
            let turn = state.next_turn();
            let mut partial = None;
            let result = state.carry_out(&turn, &mut partial);
            if let Some(error) = &partial {
                backend.report(error);
            }
            state.schedule_held(&turn);
            if let Some(error) = result.as_ref().err().or(partial.as_ref()) {
                state.first_failure.get_or_insert_with(|| error.clone());
            }
            state.answer(&turn.flushes, result.as_ref().err());
            let is_done = result.is_err() || self.with_queue(|queue| queue.waiting.is_empty());
            if turn.is_closing && is_done {
                return;
            }
            // Of a slow backend, which has carried out a part of the writes, the rest is tried again soon.
            if result.is_ok() || state.has_written {
                self.breaker.succeeded();
                backoff = Backoff::new();
            }
            if result.is_err() {
                self.breaker.failed();
                self.pause_until(backoff.next_attempt());
            }
        }
    }

    /// Pauses, but not while a flush or the close waits for another attempt.
    fn pause_until(&self, moment: Instant) {
        while !self.with_queue(|queue| queue.is_waited_for()) {
            let left = moment.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::park_timeout(left);
        }
    }
}

/// Returns the cause of a write that is given up since it would replace what others may read.
fn in_the_way() -> BackendError {
    let message = "a value that this version cannot decode is in the way, and left alone";
    BackendError::new(message, None).partial()
}

/// Returns a callback that drops `pending` once everything that follows from it is done.
fn holding(pending: SyncSender<Infallible>, on_winner: OnWinner) -> OnWinner {
    Box::new(move |winner| {
        let mut follow_ups = on_winner(winner);
        for follow_up in &mut follow_ups {
            let on_winner = follow_up.on_winner.take();
            let on_winner = on_winner.unwrap_or_else(|| Box::new(|_| Vec::new()));
            follow_up.on_winner = Some(holding(pending.clone(), on_winner));
        }
        follow_ups
    })
}

impl Queue {
    /// Returns the content of a key after all writes.
    fn known(&self, key: &str) -> Option<Known> {
        let in_flight = || self.in_flight.as_ref()?.known(key);
        let follow_up = || self.follow_ups.known(key);
        let held = || self.held.known(key);
        let waiting = self.waiting.known(key);
        waiting.or_else(follow_up).or_else(in_flight).or_else(held)
    }

    fn is_waited_for(&self) -> bool {
        self.is_closing || !self.flushes.is_empty()
    }

    fn begin_turn(&mut self, with_held: bool) -> Turn {
        self.is_urgent = false;
        Turn {
            with_held,
            flushes: std::mem::take(&mut self.flushes),
            is_closing: self.is_closing,
        }
    }
}

/// The part of the writer that its thread alone uses.
struct ThreadState<'a> {
    writer: &'a Writer,
    backend: &'a Guarded,
    /// The callbacks of the writes in flight that are not done.
    callbacks: Callbacks,
    /// Time of the next attempt at held writes, if there are any.
    held_until: Option<Instant>,
    held_backoff: Backoff,
    size: GroupSize,
    /// Set if the backend has carried out a group in this turn, and was not asked to flush since.
    has_written: bool,
    /// Set if the backend has carried out a group since its last flush.
    is_dirty: bool,
    /// The number of dropped writes that flushes have told.
    dropped_before: u64,
    /// The first failure since the last flush that succeeded.
    first_failure: Option<BackendError>,
}

impl ThreadState<'_> {
    /// Waits until there is something to do.
    fn next_turn(&self) -> Turn {
        let mut idle = 0;
        loop {
            let is_held_due = self.held_until.is_some_and(|due| Instant::now() >= due);
            let turn = self.writer.with_queue(|queue| {
                let is_gathered = !queue.waiting.is_empty() && (idle > 0 || queue.is_urgent);
                let is_retry = queue.in_flight.is_some();
                let with_held = is_held_due || queue.is_waited_for();
                (is_retry || is_gathered || with_held).then(|| queue.begin_turn(with_held))
            });
            if let Some(turn) = turn {
                return turn;
            }
            if idle < IDLE_ROUNDS {
                thread::park_timeout(GATHERING);
                idle += 1;
            } else {
                self.sleep();
                idle = 0;
            }
        }
    }

    /// Sleeps until something is written or held writes are due.
    fn sleep(&self) {
        let Writer { is_asleep, .. } = self.writer;
        is_asleep.store(true, SeqCst);
        // A span that wakes nobody has incremented the counter before this. By now, a lookup may have moved its write
        // into the queue.
        let is_empty = self.writer.with_queue(|queue| queue.waiting.is_empty());
        if is_empty && self.writer.in_channel.load(SeqCst) == 0 {
            match self.held_until {
                Some(due) => thread::park_timeout(due.saturating_duration_since(Instant::now())),
                None => thread::park(),
            }
        }
        is_asleep.store(false, SeqCst);
    }

    /// Carries out the writes of a turn, and flushes if the turn is to. Leaves the first failure of a single write in
    /// `partial`.
    ///
    /// What was refused comes last: among the writes before it may be those that free the memory which it lacked.
    fn carry_out(
        &mut self,
        turn: &Turn,
        partial: &mut Option<BackendError>,
    ) -> Result<(), BackendError> {
        self.has_written = false;
        // Left from a turn in which the backend failed as a whole.
        self.write_in_flight(partial)?;
        self.take(|queue| &mut queue.waiting);
        self.write_in_flight(partial)?;
        let held = self.held();
        if turn.with_held && held > 0 {
            self.take(|queue| &mut queue.held);
            self.write_in_flight(partial)?;
            if self.held() < held {
                self.held_backoff = Backoff::new();
            }
        }
        let is_wanted = turn.is_closing || !turn.flushes.is_empty();
        if is_wanted && self.is_dirty {
            // Now only a failure of the flush is left, and no group is too large for it.
            self.has_written = false;
            self.backend.call(|backend| backend.flush())?;
            self.is_dirty = false;
        }
        Ok(())
    }

    /// Answers flushes: with the failure of the whole backend, else with what was dropped since the last answer and what
    /// is held now.
    fn answer(&mut self, flushes: &[Flush], failure: Option<&BackendError>) {
        if flushes.is_empty() {
            return;
        }
        let all_dropped = self.writer.dropped();
        let (dropped, refused) = (all_dropped - self.dropped_before, self.held() as u64);
        for flush in flushes {
            let _ = flush.try_send(match (failure, dropped, refused) {
                (Some(error), ..) => Err(error.clone().into()),
                (None, 0, 0) => Ok(()),
                (None, ..) => Err(StorageError::NotWritten {
                    dropped,
                    refused,
                    cause: self.first_failure.clone().unwrap_or_else(overflow),
                }),
            });
        }
        if failure.is_none() {
            self.dropped_before = all_dropped;
            if refused == 0 {
                self.first_failure = None;
            }
        }
    }

    /// Puts all writes of a queue in flight. None may be in flight.
    fn take(&mut self, from: impl FnOnce(&mut Queue) -> &mut WriteQueue) {
        self.callbacks = self.writer.with_queue(|queue| {
            let (in_flight, callbacks) = std::mem::take(from(queue)).into_in_flight();
            queue.in_flight = Some(Arc::new(in_flight));
            callbacks
        });
    }

    /// Carries out the writes in flight, and then what follows from them.
    fn write_in_flight(&mut self, partial: &mut Option<BackendError>) -> Result<(), BackendError> {
        loop {
            let in_flight = self.writer.with_queue(|queue| queue.in_flight.clone());
            let Some(in_flight) = in_flight else {
                return Ok(());
            };
            self.write_all(&in_flight, partial)?;
            // Its memory is freed when `in_flight` is dropped, where nothing is locked.
            let is_over = self.writer.with_queue(|queue| {
                queue.in_flight = None;
                queue.follow_ups.is_empty()
            });
            if !is_over {
                self.take(|queue| &mut queue.follow_ups);
            }
        }
    }

    fn write_all(
        &mut self,
        in_flight: &InFlight,
        partial: &mut Option<BackendError>,
    ) -> Result<(), BackendError> {
        loop {
            let group = in_flight.next_group(self.size.get());
            if group.is_empty() {
                return Ok(());
            }
            let winners = self.write_group(group, partial)?;
            in_flight.mark_done(group.len());
            for (on_winner, winner) in winners {
                let follow_ups = on_winner(winner);
                if follow_ups.is_empty() {
                    continue;
                }
                self.writer.with_queue(|queue| {
                    for FollowUp { write, on_winner } in follow_ups {
                        queue.follow_ups.add(write, on_winner, &mut queue.lost);
                    }
                });
            }
        }
    }

    /// Carries out a group, and holds those of its writes that failed and those whose key has a held write. Returns the
    /// callbacks of the others, each with the record that it is to be called with.
    fn write_group(
        &mut self,
        group: &[Write],
        partial: &mut Option<BackendError>,
    ) -> Result<Vec<(OnWinner, Record)>, BackendError> {
        let held = self.held_keys(group);
        let free: Vec<_>;
        let mut writes = group;
        if !held.is_empty() {
            let is_free = |write: &&Write| !held.contains(write.key());
            free = group.iter().filter(is_free).cloned().collect();
            writes = &free;
        }
        let mut outcomes = Vec::new().into_iter();
        if !writes.is_empty() {
            let written = self.backend.call(|backend| backend.write(writes));
            self.size.adapt(group.len(), written.is_ok());
            outcomes = written?.into_iter();
            (self.has_written, self.is_dirty) = (true, true);
        }
        let (mut winners, mut to_hold) = (Vec::new(), Vec::new());
        for write in group {
            let on_winner = self.callbacks.pop_front().flatten();
            if held.contains(write.key()) {
                to_hold.push((write.clone(), on_winner));
                continue;
            }
            let existing = match outcomes.next() {
                Some(WriteOutcome::Failed(error)) => {
                    partial.get_or_insert(error);
                    to_hold.push((write.clone(), on_winner));
                    continue;
                }
                Some(WriteOutcome::Unreadable) => {
                    partial.get_or_insert_with(|| in_the_way().on_key(write.key()));
                    self.writer.dropped.add();
                    continue;
                }
                Some(WriteOutcome::Existing(record)) => Some(record),
                // A missing outcome counts as done.
                Some(WriteOutcome::Done) | None => None,
            };
            if let Write::Put(_, own) | Write::PutIfAbsent(_, own) = write {
                let winner = || existing.unwrap_or_else(|| own.clone());
                winners.extend(on_winner.map(|on_winner| (on_winner, winner())));
            }
        }
        let mut to_hold = to_hold.into_iter();
        while to_hold.len() > 0 {
            self.writer.with_queue(|queue| {
                for (write, on_winner) in to_hold.by_ref().take(AT_ONCE) {
                    queue.held.add(write, on_winner, &mut queue.lost);
                }
            });
        }
        Ok(winners)
    }

    fn held_keys<'a>(&self, group: &'a [Write]) -> HashSet<&'a str> {
        let mut held = HashSet::new();
        if self.held() == 0 {
            return held;
        }
        for some in group.chunks(AT_ONCE) {
            self.writer.with_queue(|queue| {
                let is_held = |key: &&str| queue.held.known(key).is_some();
                held.extend(some.iter().map(Write::key).filter(is_held));
            });
        }
        held
    }

    /// Returns the number of held writes.
    fn held(&self) -> usize {
        self.writer.with_queue(|queue| queue.held.len())
    }

    fn schedule_held(&mut self, turn: &Turn) {
        if self.held() == 0 {
            self.held_until = None;
            self.held_backoff = Backoff::new();
        } else if turn.with_held || self.held_until.is_none() {
            self.held_until = Some(self.held_backoff.next_attempt());
        }
    }
}
