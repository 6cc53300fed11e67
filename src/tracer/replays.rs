//! The replays of one storage that are under way: the state of each, and which open spans they are beneath.

use std::fmt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use dashmap::DashMap;
use opentelemetry::trace::{Event, SpanContext};

use crate::lock::lock;
use crate::stats::Counters;

/// The number of events of one replay that wait for a span which can have them.
const MAX_EVENTS: usize = 16;

/// One re-execution: what it opens beneath is replayed too, until the code says that it has caught up.
#[derive(Clone)]
pub(crate) struct Replay(Arc<State>);

struct State {
    is_over: AtomicBool,
    /// The span that says so is real.
    is_beneath_real: bool,
    /// Told after the end of the replay by spans that are not exported.
    events: Mutex<Vec<Event>>,
    counters: Arc<Counters>,
}

impl Replay {
    pub(super) fn new(counters: &Arc<Counters>) -> Self {
        Self::beneath(false, counters)
    }

    /// The replay of what a real span opens.
    pub(super) fn beneath_real(counters: &Arc<Counters>) -> Self {
        Self::beneath(true, counters)
    }

    fn beneath(is_beneath_real: bool, counters: &Arc<Counters>) -> Self {
        Self(Arc::new(State {
            is_over: AtomicBool::new(false),
            is_beneath_real,
            events: Mutex::default(),
            counters: counters.clone(),
        }))
    }

    pub(super) fn is_beneath_real(&self) -> bool {
        self.0.is_beneath_real
    }

    pub(super) fn is_over(&self) -> bool {
        self.0.is_over.load(Relaxed)
    }

    pub(super) fn set_over(&self, is_over: bool) {
        self.0.is_over.store(is_over, Relaxed);
    }

    /// Keeps an event for the next real span beneath; counts it as dropped if too many wait.
    pub(super) fn keep_event(&self, event: Event) {
        let mut events = lock(&self.0.events);
        if events.len() < MAX_EVENTS {
            events.push(event);
        } else {
            self.0.counters.replayed_events.add();
        }
    }

    /// Gives the events that wait to a real span that is about to start.
    pub(super) fn give_events(&self, to: &mut Option<Vec<Event>>) {
        let mut events = std::mem::take(&mut *lock(&self.0.events));
        if !events.is_empty() {
            events.extend(to.take().unwrap_or_default());
            *to = Some(events);
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let left = lock(&self.events).len();
        self.counters.replayed_events.add_many(left as u64);
    }
}

impl fmt::Debug for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_over = &self.is_over();
        f.debug_struct("Replay")
            .field("is_over", is_over)
            .finish_non_exhaustive()
    }
}

/// The open spans of one storage beneath which others may be replayed. Those that the layer has made have a number each, by
/// which their children in `tracing` find them, whatever OpenTelemetry takes for the parent.
#[derive(Debug, Default)]
pub(crate) struct Replays {
    open: AtomicUsize,
    by_number: DashMap<u64, Standing>,
}

/// A span that stands for another one, or beneath which code is re-executed.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    pub(super) replay: Replay,
    /// The span context that new work beneath it continues.
    pub(super) context: SpanContext,
    /// Only what is beneath it is re-executed.
    pub(super) is_real: bool,
}

impl Replays {
    /// Returns `true` if certainly no span can be beneath a replay. All that others pay for.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.open.load(Relaxed) == 0
    }

    /// Adds a span; zero if it has no number.
    pub(super) fn add(&self, number: u64, standing: impl FnOnce() -> Standing) {
        self.open();
        if number != 0 {
            self.by_number.insert(number, standing());
        }
    }

    pub(super) fn remove(&self, number: u64) {
        if number != 0 {
            self.by_number.remove(&number);
        }
        self.close();
    }

    /// Counts an open span that may still begin a replay, or be beneath one.
    pub(super) fn open(&self) {
        self.open.fetch_add(1, Relaxed);
    }

    pub(super) fn close(&self) {
        self.open.fetch_sub(1, Relaxed);
    }

    /// Returns `true` if the span with that number is not exported, since its code has run before.
    pub(crate) fn is_replayed(&self, number: u64) -> bool {
        let standing = self.by_number.get(&number);
        standing.is_some_and(|standing| !standing.is_real && !standing.replay.is_over())
    }

    pub(super) fn get(&self, number: u64) -> Option<Standing> {
        if number == 0 {
            return None;
        }
        self.by_number.get(&number).map(|found| found.clone())
    }
}
