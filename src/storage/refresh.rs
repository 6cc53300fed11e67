//! The refresher: compares what memory has with the backend, extends the expiries of records still in use, gives back what
//! the backend has lost, and takes over what other processes have decided meanwhile.
//!
//! | under the key of an instance | what follows |
//! |---|---|
//! | the record that memory has | its expiry is extended, if the instance is used and a quarter of the idle time is over |
//! | the same, with no more than the grace left | another process has told the end: memory forgets it with the record |
//! | a record of another context or run | memory follows it |
//! | nothing, and under the key of the end that it was removed | memory forgets it |
//! | nothing else | the backend has lost it: it is claimed anew |

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, Thread};
use std::time::{Duration, Instant, SystemTime};

use super::claim::{Claim, Claimant, Claims};
use super::lifetimes::Lifetimes;
use crate::backend::breaker::Backoff;
use crate::backend::client::Client;
use crate::backend::keys::{ended_key, instance_key, run_key};
use crate::backend::scanner::Scanner;
use crate::backend::writer::Writer;
use crate::backend::{BackendError, Record, Write};
use crate::cache::{Cache, Cursor, Held};
use crate::caught::caught;
use crate::clock::{Clock, OnTick, after, ticks};
use crate::stats::Counters;

/// The difference of two expiries that may come from their roundings.
const ROUNDING: Duration = Duration::from_secs(1);

/// Keeps the thread running until it is dropped.
pub(super) struct Refresher(Arc<Alarm>);

/// Wakes the thread when there is something to do.
struct Alarm {
    cache: Weak<Cache>,
    /// The tick from which on there is.
    next: AtomicU32,
    thread: OnceLock<Thread>,
    is_closing: AtomicBool,
}

impl Refresher {
    /// Starts the thread. With `is_alone`, nobody else writes to the backend.
    ///
    /// # Errors
    ///
    /// If the operating system refuses to.
    pub(super) fn start(
        client: &Client,
        cache: &Arc<Cache>,
        clock: Arc<dyn Clock>,
        lifetimes: Lifetimes,
        is_alone: bool,
        claims: Arc<Claims>,
        counters: Arc<Counters>,
    ) -> std::io::Result<Self> {
        let interval = ticks(match is_alone {
            true => lifetimes.pass(),
            false => lifetimes.check(),
        })
        .max(1);
        let (now, weak) = (cache.tick(), Arc::downgrade(cache));
        let alarm = Arc::new(Alarm {
            cache: weak.clone(),
            next: AtomicU32::new(now.saturating_add(interval)),
            thread: OnceLock::new(),
            is_closing: AtomicBool::new(false),
        });
        let Some(scanner) = client.scanner() else {
            return Ok(Self(alarm));
        };
        let mut walk = Walk {
            alarm: alarm.clone(),
            scanner,
            writer: Arc::downgrade(client.writer()),
            cache: weak,
            clock,
            lifetimes,
            claims,
            counters,
            interval,
            begun: now,
            due: now.saturating_add(interval),
            pass: None,
            unread: None,
            not_before: None,
            backoff: Backoff::new(),
        };
        let thread = thread::Builder::new().name("workflow-context-refresh".into());
        let thread = thread.spawn(move || walk.run())?;
        let _ = alarm.thread.set(thread.thread().clone());
        let on_tick = Arc::downgrade(&alarm);
        crate::clock::subscribe(on_tick);
        Ok(Self(alarm))
    }
}

impl Drop for Refresher {
    fn drop(&mut self) {
        self.0.is_closing.store(true, Relaxed);
        self.0.wake();
    }
}

impl Alarm {
    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

impl OnTick for Alarm {
    fn on_tick(&self, _: u32) {
        let Some(cache) = self.cache.upgrade() else {
            return;
        };
        if cache.tick() >= self.next.load(Relaxed) {
            self.wake();
        }
    }
}

/// The state of the thread: passes over all instances, in ticks of the cache.
struct Walk {
    alarm: Arc<Alarm>,
    scanner: Scanner,
    writer: Weak<Writer>,
    cache: Weak<Cache>,
    clock: Arc<dyn Clock>,
    lifetimes: Lifetimes,
    claims: Arc<Claims>,
    counters: Arc<Counters>,
    /// The ticks between the beginnings of two passes.
    interval: u32,
    /// The time when the last pass began; at first the start.
    begun: u32,
    /// The time when the next one is to begin.
    due: u32,
    pass: Option<Pass>,
    /// A page that the backend has failed to compare.
    unread: Option<Vec<Held>>,
    /// The end of the pause after a failure.
    not_before: Option<Instant>,
    backoff: Backoff,
}

/// A pass. It is over half an interval after it was due, however many entries there are: each tick compares those that are to
/// be by then. So between two looks at an entry are at most one and a half intervals.
struct Pass {
    cursor: Cursor,
    due: u32,
    /// The time when the pass before began: an instance that was used since is in use.
    since: u32,
}

impl Walk {
    fn run(&mut self) {
        while !self.is_closing() {
            // A clock of the user's may panic.
            let _ = caught(|| self.turn());
            if !self.is_closing() {
                thread::park();
            }
        }
    }

    fn is_closing(&self) -> bool {
        self.alarm.is_closing.load(Relaxed) || self.scanner.is_closing()
    }

    fn turn(&mut self) {
        let (Some(cache), Some(writer)) = (self.cache.upgrade(), self.writer.upgrade()) else {
            return;
        };
        let now = cache.tick();
        self.begin(now);
        let half = self.interval.div_ceil(2);
        while let Some(pass) = &self.pass {
            let elapsed = now.saturating_sub(pass.due).saturating_add(1);
            let is_due = self.unread.is_some() || cache.is_behind(&pass.cursor, elapsed, half);
            // A backend that is slower than that gets no more than it takes, so that the queue drops nothing.
            if !is_due || !self.may_ask(&writer) {
                break;
            }
            let page = self.unread.take().or_else(|| {
                let pass = self.pass.as_mut()?;
                cache.next_held(pass.since, &mut pass.cursor)
            });
            let Some(page) = page else {
                break;
            };
            if self.compare(&cache, &writer, &page).is_err() {
                self.unread = Some(page);
                self.not_before = Some(self.backoff.next_attempt());
                break;
            }
            self.backoff = Backoff::new();
            self.not_before = None;
        }
        let is_over = |pass: &mut Pass| !cache.is_behind(&pass.cursor, 1, 1);
        if self.unread.is_none() {
            self.pass.take_if(is_over);
        }
        let next = self.pass.as_ref().map_or(self.due, |_| 0);
        self.alarm.next.store(next, Relaxed);
    }

    /// Begins the next pass if it is due. If the one before is not over by then, that is counted instead.
    fn begin(&mut self, now: u32) {
        if now < self.due {
            return;
        }
        let (due, next) = (self.due, self.due.saturating_add(self.interval));
        self.due = match next <= now {
            true => now.saturating_add(self.interval),
            false => next,
        };
        if self.pass.is_some() {
            self.counters.overdue_refreshes.add();
            return;
        }
        self.pass = Some(Pass {
            cursor: Cursor::default(),
            due,
            since: std::mem::replace(&mut self.begun, now),
        });
    }

    /// Returns `false` while the backend fails or is too slow, and once the storage is dropped.
    fn may_ask(&self, writer: &Writer) -> bool {
        let is_paused = self.not_before.is_some_and(|end| Instant::now() < end);
        !is_paused && !self.is_closing() && !writer.is_down() && writer.has_room()
    }

    /// Compares a page with the backend.
    fn compare(
        &self,
        cache: &Arc<Cache>,
        writer: &Writer,
        page: &[Held],
    ) -> Result<(), BackendError> {
        let keys: Vec<_> = page.iter().map(|held| instance_key(&held.id)).collect();
        // What is still to be written is newer than what is read.
        let queued = writer.are_queued(&keys);
        let found = self.scanner.get_many(&keys)?;
        let is_told = !self.lifetimes.expiry_tells_ends();
        let ask_for_end = |&at: &usize| !queued[at] && (is_told || found[at].is_none());
        let in_question: Vec<_> = (0..page.len()).filter(ask_for_end).collect();
        let keys: Vec<_> = (in_question.iter())
            .map(|&at| ended_key(&page[at].id))
            .collect();
        let mut ends = vec![None; page.len()];
        if !keys.is_empty() {
            for (at, end) in in_question.into_iter().zip(self.scanner.get_many(&keys)?) {
                ends[at] = end;
            }
        }
        let now = self.clock.now();
        for (at, held) in page.iter().enumerate().filter(|(at, _)| !queued[*at]) {
            match (found.get(at).and_then(Option::as_ref), &ends[at]) {
                (Some(there), end) if there.context.is_same_span(&held.context) => {
                    let of_this = |end: &&Record| end.context.is_same_span(&held.context);
                    let end = end.as_ref().filter(of_this);
                    self.on_same(cache, writer, held, there, end, now);
                }
                (Some(there), _) if !held.is_completed => self.follow(cache, held, there),
                (None, Some(end)) if is_end_of(end, held) => {
                    cache.end_elsewhere(&held.id, &held.context, Duration::ZERO);
                }
                (None, _) if !held.is_completed => self.give_back(cache, writer, held, now),
                // It has ended.
                (Some(_), _) | (None, _) => {}
            }
        }
        Ok(())
    }

    /// Memory and the backend agree. `end` is what another process has told beside the record.
    fn on_same(
        &self,
        cache: &Cache,
        writer: &Writer,
        held: &Held,
        there: &Record,
        end: Option<&Record>,
        now: SystemTime,
    ) {
        let left = left_of(there, now);
        let expire = |key, left| writer.write(Write::Expire(key, after(now, left)), None);
        // The end that was told here, or elsewhere.
        let ends_in = match end {
            Some(end) => Some(left_of(end, now).saturating_sub(self.lifetimes.memory_of_ends())),
            None if held.is_completed => Some(held.left),
            None => None,
        };
        if let Some(ends_in) = ends_in {
            if !held.is_completed {
                cache.end_elsewhere(&held.id, &held.context, ends_in);
            }
            // Another process has extended it in the same moment, and may look again only after the grace.
            if left > ends_in.saturating_add(ROUNDING) {
                let ended = held.context.clone().with_recorded_at(now);
                let record = Record::new(ended, self.lifetimes.ended_after(now, ends_in));
                writer.write(Write::Put(ended_key(&held.id), record), None);
                expire(instance_key(&held.id), ends_in);
            }
        } else if self.lifetimes.is_ended(left) {
            cache.end_elsewhere(&held.id, &held.context, left);
        } else if held.is_in_use && self.lifetimes.is_to_extend(left) {
            let keys = held.run_ids.iter().map(|run_id| run_key(&held.id, run_id));
            let keys = keys.chain([instance_key(&held.id)]);
            keys.for_each(|key| expire(key, self.lifetimes.idle));
        }
    }

    fn follow(&self, cache: &Cache, held: &Held, there: &Record) {
        let is_same_run = cache.follow_elsewhere(held, there);
        // The next trace of a run is no conflict.
        if is_same_run && there.generation <= held.generation {
            self.counters.conflicts.add();
        }
    }

    /// Claims a context anew that the backend has lost: another process may have claimed its own meanwhile.
    fn give_back(&self, cache: &Arc<Cache>, writer: &Writer, held: &Held, now: SystemTime) {
        let record = Record {
            context: held.context.clone(),
            run_id: held.run_id.clone(),
            generation: held.generation,
            expires_at: after(now, held.left),
            root: held
                .root
                .as_ref()
                .map(|root| Box::new(root.record().clone())),
        };
        let claimant = Claimant {
            late_winner: Default::default(),
            before: None,
            counters: self.counters.clone(),
        };
        let claim = Claim::new(&held.id, record, cache, &self.claims, Some(claimant));
        let (write, on_winner) = claim.first_write();
        let (ours, counters) = (held.context.clone(), self.counters.clone());
        let on_winner = move |winner: Record| {
            if winner.context.is_same_span(&ours) {
                counters.given_back.add();
            }
            on_winner(winner)
        };
        writer.write(write, Some(Box::new(on_winner)));
    }
}

fn left_of(record: &Record, now: SystemTime) -> Duration {
    record.expires_at.duration_since(now).unwrap_or_default()
}

/// Returns `true` if the end that is kept is that of what memory has, and not of an earlier instance of the same id.
fn is_end_of(end: &Record, held: &Held) -> bool {
    end.context.is_same_span(&held.context)
        || held.context.recorded_at() <= end.context.recorded_at()
}
