//! The time of a file: which records have expired, and which of those may be removed.
//!
//! A clock that is wrong must not cost what is right. While the file is open, time passes no faster than a steady clock, so a wall
//! clock that is set forward expires nothing. At opening nobody can tell such a clock from a long pause: what has expired since
//! the file was written last is no longer found, but removed only once the file has been open for [`WAIT`].

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::clock::Clock;

/// The time for which what had expired before the file was opened is kept: a clock that is wrong is set right meanwhile.
const WAIT: Duration = Duration::from_secs(10 * 60);

/// The age from which an expired record is not kept, if it had expired when the file was written last: otherwise a file that is
/// always open for less than [`WAIT`] would grow without end.
const LONG_AGO: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Debug)]
pub(super) struct Times {
    /// A test's, which is believed.
    clock: Option<Arc<dyn Clock>>,
    opened_at: SystemTime,
    start: Instant,
    /// The time when the file was written last before that.
    written_at: Option<SystemTime>,
}

impl Times {
    pub(super) fn begin(clock: Option<Arc<dyn Clock>>, written_at: Option<SystemTime>) -> Self {
        Self {
            opened_at: clock
                .as_ref()
                .map_or_else(SystemTime::now, |clock| clock.now()),
            clock,
            start: Instant::now(),
            written_at,
        }
    }

    pub(super) fn now(&self) -> SystemTime {
        match &self.clock {
            Some(clock) => clock.now(),
            None => {
                let steady = self.opened_at.checked_add(self.start.elapsed());
                let wall = SystemTime::now();
                steady.map_or(wall, |steady| wall.min(steady))
            }
        }
    }

    /// Returns `true` if a record that expires then may be removed now.
    pub(super) fn may_remove(&self, expires_at: SystemTime, now: SystemTime) -> bool {
        let since = |earlier: SystemTime, later: SystemTime| {
            later.duration_since(earlier).unwrap_or_default()
        };
        let has_long_expired = || {
            let before = self.written_at.is_some_and(|written| expires_at <= written);
            before && since(expires_at, self.opened_at) >= LONG_AGO
        };
        expires_at <= now
            && (expires_at > self.opened_at
                || since(self.opened_at, now) >= WAIT
                || has_long_expired())
    }
}
