//! The bounds of one trace: past them, an instance goes on in a new one.

use std::time::{Duration, SystemTime};

use crate::cache::entry::Run;

/// The longest age and the most spans of one trace.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounds {
    pub(crate) max_age: Option<Duration>,
    pub(crate) max_spans: Option<u64>,
}

impl Bounds {
    /// Returns `true` if the run's trace takes no further span. A clock that went backwards makes nothing old.
    #[inline]
    pub(crate) fn are_passed(&self, run: &Run, now: Option<SystemTime>) -> bool {
        let age = now.and_then(|now| now.duration_since(run.recorded_at()).ok());
        let is_too_old = (self.max_age.zip(age)).is_some_and(|(max, age)| age > max);
        is_too_old || self.max_spans.is_some_and(|max| run.spans() >= max)
    }
}
