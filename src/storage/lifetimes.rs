//! The lifetimes of records in a backend, and how soon the end of an instance reaches all its processes.

use std::time::{Duration, SystemTime};

use crate::clock::after;

/// The shortest time between two looks at a record, but for shorter idle times.
const SHORTEST_CHECK: Duration = Duration::from_secs(5);

/// The number of passes within the idle time.
const PASSES: u32 = 4;

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

    pub(super) fn completed_after(&self, moment: SystemTime) -> SystemTime {
        after(moment, self.completed)
    }

    /// Returns the time after which a record in use is extended.
    pub(super) fn pass(&self) -> Duration {
        self.idle / PASSES
    }

    /// Returns `true` if the refresher would have extended a record in use with so much left.
    pub(super) fn is_to_extend(&self, left: Duration) -> bool {
        left < self.idle - self.pass()
    }

    /// Returns the time between two looks at a record, if other processes may change it: two fall into the grace.
    pub(super) fn check(&self) -> Duration {
        self.pass().min((self.completed / 2).max(SHORTEST_CHECK))
    }

    /// Returns `true` if each process sees by the expiry of a record that the instance has ended, before the record is gone.
    /// Otherwise the end has a key of its own.
    pub(super) fn expiry_tells_ends(&self) -> bool {
        self.completed >= 2 * self.check() && self.completed < self.idle / 2
    }

    /// Returns `true` if another process has told the end of an instance whose record has so much left.
    pub(super) fn is_ended(&self, left: Duration) -> bool {
        self.expiry_tells_ends() && left <= self.completed
    }

    /// Returns the time for which the key of an end is kept beyond the grace.
    pub(super) fn memory_of_ends(&self) -> Duration {
        (4 * self.check()).max(2 * self.completed)
    }

    /// Returns the expiry of the key of an end with that grace.
    pub(super) fn ended_after(&self, moment: SystemTime, grace: Duration) -> SystemTime {
        after(moment, grace.saturating_add(self.memory_of_ends()))
    }
}
