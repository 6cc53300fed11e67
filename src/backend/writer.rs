//! The writer: a thread that carries out queued writes in groups, retries those that failed, and flushes.
//!
//! A span sends its write through a channel and never waits for a lock, whose holder might have been preempted. Each
//! thread that locks the queue first moves messages from the channel into it: the writer's own, a lookup, and a span
//! that finds the channel crowded and the queue unlocked.

pub(super) mod turns;

use std::convert::Infallible;
use std::sync::atomic::{
    AtomicBool, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::breaker::Breaker;
use super::write_queue::{InFlight, Known, Lost, MAX_WRITES, OnWinner, WriteQueue, weight};
use crate::backend::{BackendError, Write};
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
