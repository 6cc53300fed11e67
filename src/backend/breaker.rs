//! The circuit breaker: skips calls of a backend that keeps failing, and tries again after growing pauses.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::lock::lock;

/// Failures in a row that open the circuit.
const FAILURES: u32 = 3;

/// The first and the longest pause before what failed is tried again. Each pause is twice the one before, then
/// [with jitter](jittered).
pub(crate) const BACKOFF: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(5));

/// Shortens a pause at random, down to half of it, so that processes that failed at one moment do not retry at one.
pub(crate) fn jittered(pause: Duration) -> Duration {
    // Each `RandomState` has new keys, seeded from the operating system.
    let random = RandomState::new().hash_one(()) as u32;
    pause.mul_f64(1.0 - f64::from(random) / f64::from(u32::MAX) / 2.0)
}

/// Growing pauses between attempts.
pub(crate) struct Backoff(Duration);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self(BACKOFF.0)
    }

    /// Returns the end of the next pause, which begins now.
    pub(crate) fn next_attempt(&mut self) -> Instant {
        let pause = self.0;
        self.0 = (pause * 2).min(BACKOFF.1);
        Instant::now() + jittered(pause)
    }
}

/// A circuit breaker. Open after [`FAILURES`] in a row, until the next success.
#[derive(Default)]
pub(super) struct Breaker {
    failures: AtomicU32,
    /// Set while the circuit is open.
    open: Mutex<Option<Open>>,
}

struct Open {
    next_attempt: Instant,
    backoff: Backoff,
}

impl Breaker {
    /// Returns `false` while calls are to be skipped. While the circuit is open, one caller per pause gets `true`.
    pub(super) fn allows(&self) -> bool {
        if !self.is_open() {
            return true;
        }
        let mut open = lock(&self.open);
        let Some(open) = &mut *open else {
            return true;
        };
        let is_due = Instant::now() >= open.next_attempt;
        if is_due {
            open.next_attempt = open.backoff.next_attempt();
        }
        is_due
    }

    pub(super) fn failed(&self) {
        let failures = self.failures.fetch_add(1, Relaxed).saturating_add(1);
        if failures == FAILURES {
            let mut backoff = Backoff::new();
            let next_attempt = backoff.next_attempt();
            *lock(&self.open) = Some(Open {
                next_attempt,
                backoff,
            });
        }
    }

    pub(super) fn succeeded(&self) {
        if self.failures.swap(0, Relaxed) >= FAILURES {
            *lock(&self.open) = None;
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.failures.load(Relaxed) >= FAILURES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_of_many_are_spread_over_the_second_half() {
        let pause = Duration::from_secs(100);
        let pauses: Vec<_> = (0..1_000).map(|_| jittered(pause).as_secs()).collect();
        assert!(pauses.iter().all(|pause| (50..=100).contains(pause)));
        // Ten parts, with about a tenth of them each.
        for part in 0..10 {
            let there = pauses
                .iter()
                .filter(|&&pause| (pause.min(99) - 50) / 5 == part)
                .count();
            assert!(
                (40..=180).contains(&there),
                "{there} of 1,000 in part {part}"
            );
        }
        assert_eq!(jittered(Duration::ZERO), Duration::ZERO);
    }
}
