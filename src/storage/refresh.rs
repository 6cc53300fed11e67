//! The lifetimes of records in a backend, and the refresher that extends those of records still in use.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
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
    next: AtomicU32,
    /// The pass under way, and the tick since which an instance must have been used to be extended.
    pass: Mutex<Option<(Cursor, u32)>>,
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
            next: AtomicU32::new(0),
            pass: Mutex::default(),
        });
        let weak = Arc::downgrade(&refresher);
        crate::clock::subscribe(weak);
        refresher
    }
}

impl OnTick for Refresher {
    fn on_tick(&self, now: u32) {
        let interval = ticks(self.idle) / Self::PASSES;
        let next = self.next.load(Relaxed);
        let mut pass = lock(&self.pass);
        if pass.is_none() && now >= next {
            // The first pass is due one interval after the start.
            self.next.store(now.saturating_add(interval), Relaxed);
            *pass = (next != 0).then(|| (Cursor::default(), now.saturating_sub(interval)));
        }
        let (Some((cursor, since)), Some(cache)) = (&mut *pass, self.cache.upgrade()) else {
            return;
        };
        let (Some(page), Some(writer)) = (cache.used_since(*since, cursor), self.writer.upgrade())
        else {
            *pass = None;
            return;
        };
        let expiry = after(self.clock.now(), self.idle);
        let refresh = |key| writer.write(Write::Expire(key, expiry), None);
        for (id, run_ids) in page {
            let run_keys = run_ids.iter().map(|run_id| run_key(&id, run_id));
            run_keys.for_each(refresh);
            refresh(instance_key(&id));
        }
    }
}
