//! The clocks: exact time for the recording of a context, coarse ticks for its use.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::caught::caught;
use crate::lock::lock;

/// The length of a tick. Durations measured in ticks are accurate to two of them.
pub(crate) const TICK: Duration = Duration::from_millis(25);

/// The first tick, so that a moment before the start of a process has a tick too: that of an end which another one has told.
const FIRST_TICK: u32 = 1 << 24;

/// The wall clock of a storage.
///
/// The default asks the operating system. Tests hand in their own with
/// [`WorkflowContextStorageBuilder::clock`](crate::WorkflowContextStorageBuilder::clock).
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Returns the current time. It may go backwards, as wall clocks do; ages then count as zero.
    fn now(&self) -> SystemTime;
}

/// The operating system's clock.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// A coarse clock that is cheap enough to be read on every lookup.
#[derive(Clone, Debug)]
pub(crate) enum Ticks {
    /// The ticks that one thread of this process counts for all storages.
    Shared,
    /// The ticks of a clock of the caller's own since the storage was built.
    Clock {
        clock: Arc<dyn Clock>,
        start: SystemTime,
    },
}

impl Ticks {
    /// Counts the ticks of that clock from now on.
    pub(crate) fn from_clock(clock: Arc<dyn Clock>) -> Self {
        let start = clock.now();
        Self::Clock { clock, start }
    }

    /// Returns the number of ticks since a fixed moment in the past.
    #[inline]
    pub(crate) fn now(&self) -> u32 {
        match self {
            Self::Shared => NOW.load(Relaxed),
            Self::Clock { clock, start } => {
                since_start(clock.now().duration_since(*start).unwrap_or_default())
            }
        }
    }
}

/// Returns a duration in ticks, rounded up. The maximum is 2^31 - 1, so that twice a tick fits a `u32` as well: after 20
/// months of one process, or if a clock leaps as far, ticks no longer advance and nothing expires.
pub(crate) fn ticks(duration: Duration) -> u32 {
    const MAX: u32 = u32::MAX >> 1;
    let ticks = duration.as_nanos().div_ceil(TICK.as_nanos());
    u32::try_from(ticks).map_or(MAX, |ticks| ticks.min(MAX))
}

/// Returns the tick at that time after the start.
fn since_start(elapsed: Duration) -> u32 {
    (ticks(elapsed) + FIRST_TICK).min(u32::MAX >> 1)
}

/// A subscriber that is called once a tick.
pub(crate) trait OnTick: Send + Sync {
    /// Is called with the current tick. It must return within a fraction of a tick.
    fn on_tick(&self, now: u32);
}

static NOW: AtomicU32 = AtomicU32::new(0);
static TICKER: Mutex<Ticker> = Mutex::new(Ticker {
    start: None,
    running: false,
    subscribers: Vec::new(),
});

struct Ticker {
    start: Option<Instant>,
    running: bool,
    subscribers: Vec<Weak<dyn OnTick>>,
}

/// Adds a lifetime, capped to a century, which every backend's format can express.
pub(crate) fn after(moment: SystemTime, lifetime: Duration) -> SystemTime {
    let longest = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    moment.checked_add(lifetime.min(longest)).unwrap_or(moment)
}

/// Calls a subscriber from the process's ticking thread until it is dropped. Returns `false` if that thread could not be
/// started.
pub(crate) fn subscribe(subscriber: Weak<dyn OnTick>) -> bool {
    let mut ticker = ticker();
    ticker.tick();
    if !ticker.running {
        let thread = thread::Builder::new().name("workflow-context-ticks".into());
        ticker.running = thread.spawn(run).is_ok();
    }
    if ticker.running {
        ticker.subscribers.push(subscriber);
    }
    ticker.running
}

/// Runs the ticking thread until no subscriber is left.
fn run() {
    loop {
        thread::sleep(TICK);
        let subscribers: Vec<_> = {
            let mut ticker = ticker();
            ticker.tick();
            ticker
                .subscribers
                .retain(|subscriber| subscriber.strong_count() > 0);
            ticker.running = !ticker.subscribers.is_empty();
            if !ticker.running {
                return;
            }
            ticker
                .subscribers
                .iter()
                .filter_map(Weak::upgrade)
                .collect()
        };
        let now = NOW.load(Relaxed);
        for subscriber in subscribers {
            // One subscriber that panics, by a clock of the user's, must not stop the others.
            let _ = caught(|| subscriber.on_tick(now));
        }
    }
}

impl Ticker {
    /// Updates the current tick.
    fn tick(&mut self) {
        let start = *self.start.get_or_insert_with(Instant::now);
        NOW.store(since_start(start.elapsed()), Relaxed);
    }
}

fn ticker() -> MutexGuard<'static, Ticker> {
    lock(&TICKER)
}
