//! Where the time comes from: exact where a context is recorded, coarse where one is only used.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// The length of a tick of [`Ticks`]: durations are honoured within two of them.
pub(crate) const TICK: Duration = Duration::from_millis(25);

/// The wall clock of a storage.
///
/// The default asks the operating system. Tests hand in their own with
/// [`WorkflowContextStorageBuilder::clock`](crate::WorkflowContextStorageBuilder::clock).
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The time now. It may go backwards, as wall clocks do; ages are then taken for zero.
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

/// A clock that is cheap enough to be read on every lookup.
#[derive(Clone, Debug)]
pub(crate) enum Ticks {
    /// The tick that one thread of this process counts for all storages.
    Shared,
    /// Ticks of a clock since the storage was made.
    Of {
        clock: Arc<dyn Clock>,
        start: SystemTime,
    },
}

impl Ticks {
    pub(crate) fn of(clock: Arc<dyn Clock>) -> Self {
        let start = clock.now();
        Self::Of { clock, start }
    }

    /// Ticks since some moment in the past.
    #[inline]
    pub(crate) fn now(&self) -> u32 {
        match self {
            Self::Shared => NOW.load(Relaxed),
            Self::Of { clock, start } => {
                ticks(clock.now().duration_since(*start).unwrap_or_default())
            }
        }
    }
}

/// Whole ticks, at least one for what is not zero. There are no more than 2^31, so that twice a tick is a `u32` too:
/// after 20 months of one process or a clock that leaps, time stands still and nothing grows old.
pub(crate) fn ticks(duration: Duration) -> u32 {
    const MOST: u32 = u32::MAX >> 1;
    let ticks = duration.as_nanos().div_ceil(TICK.as_nanos());
    u32::try_from(ticks).map_or(MOST, |ticks| ticks.min(MOST))
}

/// What wants to be called once a tick.
pub(crate) trait OnTick: Send + Sync {
    /// Must take no longer than a fraction of a tick.
    fn on_tick(&self, now: u32);
}

static NOW: AtomicU32 = AtomicU32::new(0);
static TICKER: Mutex<Ticker> = Mutex::new(Ticker {
    start: None,
    running: false,
    callees: Vec::new(),
});

struct Ticker {
    start: Option<Instant>,
    running: bool,
    callees: Vec<Weak<dyn OnTick>>,
}

/// Calls it from the process's one ticking thread until it is dropped; `false` where no thread can be had.
pub(crate) fn subscribe(callee: Weak<dyn OnTick>) -> bool {
    let mut ticker = ticker();
    ticker.tick();
    if !ticker.running {
        let thread = thread::Builder::new().name("workflow-context-ticks".into());
        ticker.running = thread.spawn(run).is_ok();
    }
    if ticker.running {
        ticker.callees.push(callee);
    }
    ticker.running
}

/// Ends when nobody is left to be called.
fn run() {
    loop {
        thread::sleep(TICK);
        let callees: Vec<_> = {
            let mut ticker = ticker();
            ticker.tick();
            ticker.callees.retain(|callee| callee.strong_count() > 0);
            ticker.running = !ticker.callees.is_empty();
            if !ticker.running {
                return;
            }
            ticker.callees.iter().filter_map(Weak::upgrade).collect()
        };
        let now = NOW.load(Relaxed);
        callees.iter().for_each(|callee| callee.on_tick(now));
    }
}

impl Ticker {
    fn tick(&mut self) {
        let start = *self.start.get_or_insert_with(Instant::now);
        NOW.store(ticks(start.elapsed()), Relaxed);
    }
}

fn ticker() -> MutexGuard<'static, Ticker> {
    TICKER.lock().unwrap_or_else(PoisonError::into_inner)
}
