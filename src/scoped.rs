//! Thread-locals with another value for the duration of a call.

use std::cell::Cell;
use std::thread::LocalKey;

/// Calls `run` with the cell set to `value`, and restores the previous value afterwards, after a panic too.
///
/// On a thread whose thread-locals are destroyed already, only calls `run`.
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
