//! The reader: a thread that answers lookups, so that a span can stop waiting when its budget is spent.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use super::breaker::Breaker;
use super::guard::Guarded;
use crate::backend::Record;
use crate::stats::Counter;

/// The largest number of lookups that wait for the backend. One more finds nothing.
const MAX_LOOKUPS: usize = 1024;

/// The side of the reader that asks.
pub(super) struct Reader {
    /// `None` once the reader is closed.
    lookups: Option<SyncSender<Lookup>>,
    pub(super) breaker: Arc<Breaker>,
    pub(super) timeouts: Counter,
}

struct Lookup {
    key: String,
    deadline: Instant,
    answer: SyncSender<Option<Record>>,
}

impl Reader {
    /// Returns a reader and the loop for its thread, which returns once the reader is closed.
    pub(super) fn new() -> (Self, impl FnOnce(Guarded) + Send + 'static) {
        let (lookups, received) = sync_channel(MAX_LOOKUPS);
        let breaker = Arc::new(Breaker::default());
        let reader = Self {
            lookups: Some(lookups),
            breaker: breaker.clone(),
            timeouts: Counter::default(),
        };
        (reader, move |backend| answer(&backend, &received, &breaker))
    }

    /// Returns the backend's record if it answers in time. Asks nothing while the circuit is open.
    pub(super) fn get(&self, key: &str, most: Duration) -> Option<Record> {
        if !self.breaker.allows() {
            return None;
        }
        let (answer, answered) = sync_channel(1);
        let lookup = Lookup {
            key: key.to_owned(),
            deadline: Instant::now().checked_add(most)?,
            answer,
        };
        self.lookups.as_ref()?.try_send(lookup).ok()?;
        let answer = answered.recv_timeout(most);
        if let Err(RecvTimeoutError::Timeout) = answer {
            self.breaker.failed();
            self.timeouts.add();
        }
        answer.ok()?
    }

    pub(super) fn close(&mut self) {
        self.lookups = None;
    }
}

fn answer(backend: &Guarded, lookups: &Receiver<Lookup>, breaker: &Breaker) {
    while let Ok(lookup) = lookups.recv() {
        if Instant::now() > lookup.deadline {
            continue;
        }
        let found = backend.call(|backend| backend.get(&lookup.key));
        match &found {
            Ok(_) if Instant::now() <= lookup.deadline => breaker.succeeded(),
            Err(error) if !error.is_partial() => breaker.failed(),
            _ => {}
        }
        let _ = lookup.answer.try_send(found.unwrap_or(None));
    }
}
