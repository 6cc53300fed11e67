//! Threads that start together, and threads that wait for each other.

use std::sync::{Barrier, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// A time limit that no call exceeds, even on a busy machine: a test that reaches it fails instead of hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the closure on several threads that start together, each with its number, counted from 0.
pub(crate) fn at_once<R: Send>(threads: usize, run: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let (start, run) = (&Barrier::new(threads), &run);
    thread::scope(|scope| {
        let start_one = |thread| {
            scope.spawn(move || {
                start.wait();
                run(thread)
            })
        };
        let threads: Vec<_> = (0..threads).map(start_one).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a thread panicked"))
            .collect()
    })
}

/// Waits until the condition holds, and fails with its description if it does not within [`PATIENCE`].
#[track_caller]
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A point where threads wait for each other; unlike a barrier, it gives up after [`PATIENCE`].
#[derive(Debug, Default)]
pub(crate) struct Rendezvous(Mutex<usize>, Condvar);

impl Rendezvous {
    /// Waits until that many threads have arrived in all.
    pub(crate) fn wait_for(&self, threads: usize) {
        self.wait(|_| threads);
    }

    /// Waits until a group of that many threads is complete, then is ready for the next group.
    pub(crate) fn wait_for_groups_of(&self, threads: usize) {
        self.wait(|arrived| arrived.next_multiple_of(threads));
    }

    fn wait(&self, needed: impl FnOnce(usize) -> usize) {
        let mut arrived = self.0.lock().unwrap();
        *arrived += 1;
        let needed = needed(*arrived);
        self.1.notify_all();
        let waited = self
            .1
            .wait_timeout_while(arrived, PATIENCE, |arrived| *arrived < needed);
        drop(waited);
    }
}
