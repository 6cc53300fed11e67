//! The turns of the writing thread: takes what is queued, writes it in groups, holds what a part of the backend refused, and
//! answers flushes.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Instant;

use super::{AT_ONCE, Flush, GATHERING, IDLE_ROUNDS, Queue, Turn, Writer};
use crate::backend::breaker::Backoff;
use crate::backend::group_size::GroupSize;
use crate::backend::guard::Guarded;
use crate::backend::write_queue::{Callbacks, FollowUp, InFlight, OnWinner, WriteQueue, overflow};
use crate::backend::{BackendError, Record, Write, WriteOutcome};
use crate::error::StorageError;

/// Carries out writes on the calling thread, until the writer is closed.
pub(in crate::backend) fn run(writer: &Writer, backend: &Guarded) {
    let mut state = ThreadState::new(writer, backend);
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
        let is_done = result.is_err() || writer.with_queue(|queue| queue.waiting.is_empty());
        if turn.is_closing && is_done {
            return;
        }
        // Of a slow backend, which has carried out a part of the writes, the rest is tried again soon.
        if result.is_ok() || state.has_written {
            writer.breaker.succeeded();
            backoff = Backoff::new();
        }
        if result.is_err() {
            writer.breaker.failed();
            pause_until(writer, backoff.next_attempt());
        }
    }
}

/// Pauses, but not while a flush or the close waits for another attempt.
fn pause_until(writer: &Writer, moment: Instant) {
    while !writer.with_queue(|queue| queue.is_waited_for()) {
        let left = moment.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::park_timeout(left);
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

impl<'a> ThreadState<'a> {
    fn new(writer: &'a Writer, backend: &'a Guarded) -> Self {
        Self {
            writer,
            backend,
            callbacks: Callbacks::new(),
            held_until: None,
            held_backoff: Backoff::new(),
            size: GroupSize::new(),
            has_written: false,
            is_dirty: false,
            dropped_before: 0,
            first_failure: None,
        }
    }
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
    /// Refused writes come last: among the writes before them may be those that free the memory which they lacked.
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

/// Returns the cause of a write that is given up since it would replace what others may read.
fn in_the_way() -> BackendError {
    let message = "a value that this version cannot decode is in the way, and left alone";
    BackendError::new(message, None).partial()
}
