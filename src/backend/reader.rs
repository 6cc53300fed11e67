//! The reader: a thread that answers lookups, so that a span can stop waiting when its budget is spent.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::breaker::Breaker;
use super::guard::Guarded;
use crate::backend::Record;
use crate::lock::lock;
use crate::stats::Counter;

/// The largest number of lookups that wait for the backend. One more finds nothing.
const MAX_LOOKUPS: usize = 1024;

/// The side of the reader that asks.
pub(super) struct Reader {
    /// `None` once the reader is closed.
    lookups: Option<SyncSender<Lookup>>,
    is_closed: Arc<AtomicBool>,
    pub(super) breaker: Arc<Breaker>,
    pub(super) timeouts: Counter,
}

struct Lookup {
    /// The record of the first key that has one is looked up.
    keys: Vec<String>,
    deadline: Instant,
    answer: SyncSender<Option<Found>>,
    late: Late,
}

/// The position of a key, and its record.
type Found = (usize, Record);

/// Called with the key and the record that were found after the lookup had waited too long.
pub(crate) type OnLate = Box<dyn FnOnce(&str, Record) + Send>;

/// Set once nobody waits for the answer any more. Locked while the answer is sent to whoever waits.
type Late = Arc<Mutex<Option<OnLate>>>;

impl Reader {
    /// Returns a reader and the loop for its thread, which returns once the reader is closed.
    /// The loop first connects, and unsets `is_connecting`.
    pub(super) fn new(
        is_connecting: Arc<AtomicBool>,
    ) -> (Self, impl FnOnce(Guarded) + Send + 'static) {
        let (lookups, received) = sync_channel(MAX_LOOKUPS);
        let breaker = Arc::new(Breaker::default());
        let is_closed = Arc::new(AtomicBool::new(false));
        let reader = Self {
            lookups: Some(lookups),
            is_closed: is_closed.clone(),
            breaker: breaker.clone(),
            timeouts: Counter::default(),
        };
        let run = move |backend: Guarded| {
            if let Err(error) = backend.call(|backend| backend.connect()) {
                if !error.is_partial() {
                    breaker.failed();
                }
            }
            is_connecting.store(false, Relaxed);
            while let Ok(lookup) = received.recv() {
                if lookup.is_late() && (breaker.is_open() || is_closed.load(Relaxed)) {
                    continue;
                }
                lookup.answer(&backend, &breaker);
            }
        };
        (reader, run)
    }

    /// Returns the backend's record of the first key that has one, with the key's position, if it answers in time; otherwise
    /// the callback made by `on_late` is called once it does. Asks nothing while the circuit is open.
    pub(super) fn get_first(
        &self,
        keys: Vec<String>,
        most: Duration,
        on_late: impl FnOnce() -> OnLate,
    ) -> Option<Found> {
        if !self.breaker.allows() {
            return None;
        }
        let (answer, answered) = sync_channel(1);
        let late = Late::default();
        let lookup = Lookup {
            keys,
            deadline: Instant::now().checked_add(most)?,
            answer,
            late: late.clone(),
        };
        self.lookups.as_ref()?.try_send(lookup).ok()?;
        match answered.recv_timeout(most) {
            Err(RecvTimeoutError::Timeout) => {
                self.breaker.failed();
                self.timeouts.add();
                let on_late = on_late();
                let mut late = lock(&late);
                // It may have come just now.
                match answered.try_recv() {
                    Ok(found) => found,
                    Err(_) => {
                        *late = Some(on_late);
                        None
                    }
                }
            }
            answer => answer.ok()?,
        }
    }

    /// Asks for a record that nobody waits for, unless the circuit is open.
    pub(super) fn ask(&self, keys: Vec<String>, on_late: impl FnOnce() -> OnLate) {
        if self.breaker.is_open() {
            return;
        }
        let lookup = Lookup {
            keys,
            deadline: Instant::now(),
            answer: sync_channel(1).0,
            late: Arc::new(Mutex::new(Some(on_late()))),
        };
        // One too many finds nothing.
        let _ = (self.lookups.as_ref()).map(|lookups| lookups.try_send(lookup));
    }

    pub(super) fn close(&mut self) {
        self.is_closed.store(true, Relaxed);
        self.lookups = None;
    }
}

impl Lookup {
    fn is_late(&self) -> bool {
        Instant::now() > self.deadline
    }

    fn answer(self, backend: &Guarded, breaker: &Breaker) {
        let found = backend.call(|backend| backend.get_many(&self.keys));
        match &found {
            Ok(_) if !self.is_late() => breaker.succeeded(),
            Err(error) if !error.is_partial() => breaker.failed(),
            _ => {}
        }
        let records = found.unwrap_or_default().into_iter().take(self.keys.len());
        let found = (records.enumerate()).find_map(|(position, record)| Some((position, record?)));
        let mut late = lock(&self.late);
        match late.take() {
            None => drop(self.answer.try_send(found)),
            Some(on_late) => {
                drop(late);
                if let Some((position, record)) = found {
                    on_late(&self.keys[position], record);
                }
            }
        }
    }
}
