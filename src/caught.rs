//! Panics of other people's code, which must not unwind through this crate: OpenTelemetry's locks would be poisoned.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Calls `run`; `None` if it panics. What it has changed by then stays changed.
#[inline]
pub(crate) fn caught<R>(run: impl FnOnce() -> R) -> Option<R> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => Some(result),
        Err(payload) => {
            drop_payload(payload);
            None
        }
    }
}

/// Drops the payload of a panic, which is the panicking code's as well.
#[cold]
fn drop_payload(payload: Box<dyn Any + Send>) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(payload);
    }
}
