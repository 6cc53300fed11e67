//! Locks that ignore poisoning: the data that they guard is consistent after each statement, so a panic leaves it usable.
//!
//! All locks of the crate are taken here. So this is also where a model checker gets hold of them: in a build with
//! `--cfg shuttle`, which only `scripts/shuttle` makes, another thread of the model may run before each lock is taken.

#[cfg(not(shuttle))]
use std::sync::PoisonError;
use std::sync::{Mutex, MutexGuard, TryLockError};

/// Locks a mutex.
#[cfg(not(shuttle))]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks a mutex, in a thread of the model.
#[cfg(shuttle)]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    loop {
        shuttle::thread::yield_now();
        if let Some(guard) = try_lock(mutex) {
            return guard;
        }
    }
}

/// Locks a mutex without waiting; `None` while another thread holds it.
#[inline]
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}
