//! The lifetimes of records in a backend, and the refresher that extends those of records still in use.

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime};

use crate::backend::Write;
use crate::backend::keys::{instance_key, run_key};
use crate::backend::writer::Writer;
use crate::cache::{Cache, Cursor};
use crate::clock::{Clock, OnTick, after, ticks};
use crate::lock::lock;

/// The lifetimes of records in the backend.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lifetimes {
    pub(super) idle: Duration,
    pub(super) completed: Duration,
}

impl Lifetimes {
    pub(super) fn idle_after(&self, moment: SystemTime) -> SystemTime {
        after(moment, self.idle)
    }

    /// Returns `true` if the refresher would have extended a record in use with so much left.
    pub(super) fn is_to_extend(&self, left: Duration) -> bool {
        left < self.idle - self.idle / Refresher::PASSES
    }

    pub(super) fn completed_after(&self, moment: SystemTime) -> SystemTime {
        after(moment, self.completed)
    }
}

/// Extends the expiry of records in the backend whose cached copy is used, since a use does not reach the backend.
pub(super) struct Refresher {
    writer: Weak<Writer>,
    cache: Weak<Cache>,
    clock: Arc<dyn Clock>,
    idle: Duration,
    passes: Mutex<Passes>,
}

/// Passes over all entries, in ticks of the cache.
struct Passes {
    /// The time when the last pass began; at first the start.
    begun: u32,
    /// The time when the next one is to begin.
    due: u32,
    under_way: Option<Pass>,
}

/// A pass. It is over half an interval after it was due, however many entries there are: each tick reads those that are to
/// be read by then. So between two visits of an entry are at most one and a half intervals, and half of the idle time is
/// left for whatever is late.
struct Pass {
    cursor: Cursor,
    due: u32,
    /// The time when the pass before began: an instance that was used since is extended.
    since: u32,
}

impl Refresher {
    /// The number of passes within the idle time.
    const PASSES: u32 = 4;

    pub(super) fn new(
        writer: &Arc<Writer>,
        cache: &Arc<Cache>,
        clock: Arc<dyn Clock>,
        idle: Duration,
    ) -> Arc<Self> {
        let refresher = Arc::new(Self {
            writer: Arc::downgrade(writer),
            cache: Arc::downgrade(cache),
            clock,
            idle,
            passes: Mutex::new(Passes {
                begun: cache.tick(),
                due: cache.tick().saturating_add(interval(idle)),
                under_way: None,
            }),
        });
        let weak = Arc::downgrade(&refresher);
        crate::clock::subscribe(weak);
        refresher
    }
}

/// Returns the ticks between two passes.
fn interval(idle: Duration) -> u32 {
    (ticks(idle) / Refresher::PASSES).max(1)
}

impl OnTick for Refresher {
    fn on_tick(&self, _: u32) {
        let (Some(cache), Some(writer)) = (self.cache.upgrade(), self.writer.upgrade()) else {
            return;
        };
        // Read before the lock: a clock may be anybody's code.
        let (now, expiry) = (cache.tick(), after(self.clock.now(), self.idle));
        let interval = interval(self.idle);
        let passes = &mut *lock(&self.passes);
        if passes.under_way.is_none() && now >= passes.due {
            passes.under_way = Some(Pass {
                cursor: Cursor::default(),
                due: passes.due,
                since: std::mem::replace(&mut passes.begun, now),
            });
            let next = passes.due.saturating_add(interval);
            let is_missed = next <= now;
            passes.due = if is_missed {
                now.saturating_add(interval)
            } else {
                next
            };
        }
        let Some(pass) = &mut passes.under_way else {
            return;
        };
        let elapsed = now.saturating_sub(pass.due).saturating_add(1);
        let refresh = |key| writer.write(Write::Expire(key, expiry), None);
        // A backend that is slower than that gets no more than it takes, so that the queue drops nothing.
        while cache.is_behind(&pass.cursor, elapsed, interval.div_ceil(2)) && writer.has_room() {
            let Some(page) = cache.used_since(pass.since, &mut pass.cursor) else {
                break;
            };
            for (id, run_ids) in page {
                let run_keys = run_ids.iter().map(|run_id| run_key(&id, run_id));
                run_keys.for_each(refresh);
                refresh(instance_key(&id));
            }
        }
        let is_over = !cache.is_behind(&pass.cursor, 1, 1);
        passes.under_way.take_if(|_| is_over);
    }
}
