//! A thread-local that has another value for the time of a call.

use std::cell::Cell;
use std::thread::LocalKey;

/// Runs with the cell set to `value`, and puts back what was there, after a panic too.
///
/// A thread that is past its thread-locals runs without.
pub(crate) fn with<T: Copy + 'static, R>(
    key: &'static LocalKey<Cell<T>>,
    value: T,
    run: impl FnOnce() -> R,
) -> R {
    struct Restore<T: Copy + 'static>(&'static LocalKey<Cell<T>>, Option<T>);

    impl<T: Copy + 'static> Drop for Restore<T> {
        fn drop(&mut self) {
            if let Some(before) = self.1 {
                let _ = self.0.try_with(|cell| cell.set(before));
            }
        }
    }

    let _restore = Restore(key, key.try_with(|cell| cell.replace(value)).ok());
    run()
}
