//! The storage's side of a backend: lookups and writes that wait no longer than a span's budget.
//!
//! A span never calls the backend itself. One thread [writes](Writer), another one [answers lookups](Reader).

use std::cell::Cell;
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::guard::Guarded;
use super::reader::{OnLate, Reader};
use super::scanner::Scanner;
use super::write_queue::{Known, OnWinner};
use super::writer::{Writer, turns};
use crate::backend::{Record, StorageBackend, Write};
use crate::error::StorageError;
use crate::lock::lock;
use crate::warnings::Warnings;

/// The longest wait for the threads when the last handle is dropped.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

thread_local! {
    /// How the span or call on this thread has waited for the backend.
    static WAIT: Cell<Wait> = const { Cell::new(Wait::NONE) };
}

/// The wait of one span or call.
#[derive(Clone, Copy)]
struct Wait {
    waited: Duration,
    /// A part of it fell into the first connection.
    for_connection: bool,
}

impl Wait {
    const NONE: Self = Self {
        waited: Duration::ZERO,
        for_connection: false,
    };
}

/// The longest waits of a span or call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budgets {
    pub(crate) lookup: Duration,
    /// While the backend is connected to for the first time.
    pub(crate) connect: Duration,
}

/// A backend and the threads that use it.
pub(crate) struct Client {
    backend: Guarded,
    writer: Arc<Writer>,
    reader: Reader,
    budgets: Budgets,
    /// Unset once the backend has been connected to, or a span or call has waited for that in vain.
    is_connecting: Arc<AtomicBool>,
    is_closing: Arc<AtomicBool>,
    /// Keeps `ended` connected, as the copies of all scanners do; `None` once this is dropped.
    alive: Option<SyncSender<Infallible>>,
    /// Disconnected once both threads and all scanners have ended.
    ended: Mutex<Receiver<Infallible>>,
}

impl Client {
    /// Starts the threads.
    pub(crate) fn new(
        backend: Arc<dyn StorageBackend>,
        budgets: Budgets,
        warnings: Arc<Warnings>,
    ) -> std::io::Result<Self> {
        let backend = Guarded::new(backend, warnings);
        let writer = Writer::new();
        let is_connecting = Arc::new(AtomicBool::new(true));
        let (reader, answer) = Reader::new(is_connecting.clone());
        let (alive, ended) = sync_channel(0);
        let client = Self {
            backend: backend.clone(),
            writer: writer.clone(),
            reader,
            budgets,
            is_connecting,
            is_closing: Arc::default(),
            alive: Some(alive.clone()),
            ended: Mutex::new(ended),
        };
        spawn(
            "workflow-context-lookups",
            backend.clone(),
            alive.clone(),
            answer,
        )?;
        let write = move |backend| turns::run(&writer, &backend);
        let thread = spawn("workflow-context-writes", backend, alive, write)?;
        client.writer.set_thread(thread.thread());
        Ok(client)
    }

    /// Begins a span or a call on this thread. All its waits share one budget.
    pub(crate) fn begin() {
        WAIT.set(Wait::NONE);
    }

    /// Returns the record of a key if it is known within the budget; otherwise the callback made by `on_late` is called if
    /// the backend has one.
    pub(crate) fn get(&self, key: String, on_late: impl FnOnce() -> OnLate) -> Option<Record> {
        self.get_first([key], on_late)
    }

    /// Returns the record of the first of some keys that has one, as [`get`](Self::get) does, in one round trip.
    pub(crate) fn get_first(
        &self,
        keys: impl IntoIterator<Item = String>,
        on_late: impl FnOnce() -> OnLate,
    ) -> Option<Record> {
        if self.budgets.lookup.is_zero() {
            return None;
        }
        let at_first = self.left();
        let (mut asked, mut expiries) = (Vec::new(), Vec::new());
        let mut queued = None;
        let mut is_known = true;
        for key in keys {
            let left = self.left();
            let known = self.waiting(|| self.writer.known(&key, left));
            is_known &= known.is_ok();
            let expires_at = match known.unwrap_or(None) {
                Some(Known::Record(record)) => {
                    queued = Some(record);
                    break;
                }
                Some(Known::Gone) => continue,
                Some(Known::Until(expires_at)) => Some(expires_at),
                None => None,
            };
            asked.push(key);
            expiries.push(expires_at);
        }
        if asked.is_empty() {
            return queued;
        }
        let left = self.left();
        if left.is_zero() || !is_known {
            if !at_first.is_zero() {
                self.reader.timeouts.add();
            }
            self.reader.ask(asked, on_late);
            return queued;
        }
        let found = self.waiting(|| self.reader.get_first(asked, left, on_late));
        let Some((position, mut record)) = found else {
            return queued;
        };
        record.expires_at = expiries[position].unwrap_or(record.expires_at);
        Some(record)
    }

    /// Returns the record that a queued write will put under the key, if that is known at once.
    pub(crate) fn queued(&self, key: &str) -> Option<Record> {
        if self.budgets.lookup.is_zero() {
            return None;
        }
        match self.writer.known(key, Duration::ZERO) {
            Ok(Some(Known::Record(record))) => Some(record),
            _ => None,
        }
    }

    pub(crate) fn write(&self, write: Write) {
        self.writer.write(write, None);
    }

    /// Queues a write, and calls `on_winner` with the record that is stored after it.
    pub(crate) fn claim(&self, write: Write, on_winner: OnWinner) {
        self.writer.write(write, Some(on_winner));
    }

    /// Queues a write like [`claim`](Self::claim), and waits for its result within the budget.
    pub(crate) fn claim_now(&self, write: Write, on_winner: OnWinner) {
        let left = self.left();
        if left.is_zero() || !self.writer.breaker.allows() {
            return self.claim(write, on_winner);
        }
        self.waiting(|| self.writer.write_and_wait(write, on_winner, left));
    }

    /// Visits all records of the backend. Returns `false` if the backend failed and some may be missing.
    pub(crate) fn load(&self, visit: &mut dyn FnMut(&str, Record)) -> bool {
        let loaded = self.backend.call(|backend| backend.scan(visit));
        if loaded.is_err() {
            self.reader.breaker.failed();
        }
        loaded.is_ok()
    }

    /// Returns what walks through the backend on a thread of the caller's.
    pub(crate) fn scanner(&self) -> Option<Scanner> {
        Some(Scanner {
            backend: self.backend.clone(),
            is_closing: self.is_closing.clone(),
            _alive: self.alive.clone()?,
        })
    }

    /// Waits until everything queued by now is written and flushed, or an attempt has failed.
    pub(crate) fn flush(&self) -> Result<(), StorageError> {
        self.writer.flush()
    }

    pub(crate) fn writer(&self) -> &Arc<Writer> {
        &self.writer
    }

    /// Returns `true` while the circuit is open for lookups or for writes.
    pub(crate) fn is_down(&self) -> bool {
        self.reader.breaker.is_open() || self.writer.breaker.is_open()
    }

    pub(crate) fn dropped_writes(&self) -> u64 {
        self.writer.dropped()
    }

    pub(crate) fn errors(&self) -> u64 {
        self.backend.failures()
    }

    pub(crate) fn lookup_timeouts(&self) -> u64 {
        self.reader.timeouts.get()
    }

    pub(crate) fn expired_at_open(&self) -> u64 {
        self.backend.expired_at_open()
    }

    pub(crate) fn malformed(&self) -> u64 {
        self.backend.malformed()
    }

    /// Returns the rest of the budget.
    fn left(&self) -> Duration {
        let Budgets { lookup, connect } = self.budgets;
        let mut wait = WAIT.get();
        if !wait.for_connection && self.is_connecting.load(Relaxed) {
            wait.for_connection = true;
            WAIT.set(wait);
        }
        let budget = match wait.for_connection {
            true if !lookup.is_zero() => lookup.max(connect),
            _ => lookup,
        };
        budget.saturating_sub(wait.waited)
    }

    /// Charges the time that `wait` takes to the budget.
    fn waiting<R>(&self, wait: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = wait();
        let before = WAIT.get();
        WAIT.set(Wait {
            waited: before.waited + start.elapsed(),
            ..before
        });
        if before.for_connection && self.left().is_zero() {
            // Nobody else waits as long for it.
            self.is_connecting.store(false, Relaxed);
        }
        result
    }
}

/// Starts a thread that drops `alive` as the last thing.
fn spawn(
    name: &str,
    backend: Guarded,
    alive: SyncSender<Infallible>,
    run: impl FnOnce(Guarded) + Send + 'static,
) -> std::io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _alive = alive;
        run(backend);
    })
}

impl Drop for Client {
    /// Writes and flushes what is queued, unless that takes too long.
    fn drop(&mut self) {
        self.is_closing.store(true, Relaxed);
        self.alive = None;
        self.reader.close();
        self.writer.close();
        let _ = lock(&self.ended).recv_timeout(CLOSE_PATIENCE);
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("budgets", &self.budgets)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::backend::memory::MemoryBackend;
    use crate::context::WorkflowContext;

    /// As if the lock holder was preempted.
    #[test]
    fn no_span_waits_for_a_thread_that_has_locked_the_queue() {
        let backend = Arc::new(MemoryBackend::new());
        let budgets = Budgets {
            lookup: Duration::from_millis(20),
            connect: Duration::ZERO,
        };
        let client = Client::new(backend.clone(), budgets, Warnings::new(false));
        let client = client.expect("there are threads");
        let record = |span: u64| {
            let parent = format!("00-0af7651916cd43dd8448eb211c80319c-{span:016x}-01");
            let context = WorkflowContext::parse(&parent, "").expect("well formed");
            Record::new(context, SystemTime::now() + Duration::from_secs(60))
        };
        let has = |key: &str| backend.get(key).expect("it works");
        for round in 1..50 {
            let key = format!("key {round}");
            // The writer is asleep after 100 ms, and not yet after the shorter pauses.
            thread::sleep(Duration::from_millis(round % 3 * 50));
            let locked = client.writer.lock_queue();
            thread::scope(|scope| {
                let span = scope.spawn(|| {
                    Client::begin();
                    assert_eq!(
                        client.get("unknown".to_owned(), || Box::new(|_, _| ())),
                        None
                    );
                    client.write(Write::Put(key.clone(), record(round)));
                    client.write(Write::Put(key.clone(), record(round + 1)));
                    client.write(Write::Put(key.clone(), record(round + 2)));
                });
                span.join().expect("it does not wait for the lock");
            });
            assert_eq!(client.lookup_timeouts(), round);
            drop(locked);
            if round % 2 == 0 {
                Client::begin();
                let known = client
                    .get(key.clone(), || Box::new(|_, _| ()))
                    .expect("it is known")
                    .context;
                assert_eq!(known.span_id(), record(round + 2).context.span_id());
            }
            // Nobody flushes.
            let deadline = Instant::now() + Duration::from_secs(30);
            while has(&key).is_none() {
                assert!(Instant::now() < deadline, "it is written");
                thread::sleep(Duration::from_millis(1));
            }
            let written = has(&key).expect("it is there").context;
            assert_eq!(written.span_id(), record(round + 2).context.span_id());
        }
    }
}
