//! Time that a test controls.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tracing_workflow_context::Clock;

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const HOUR: Duration = Duration::from_secs(60 * 60);

/// A clock that moves only when a test moves it.
#[derive(Debug)]
pub(crate) struct ManualClock(Mutex<SystemTime>);

impl ManualClock {
    pub(crate) fn new() -> Arc<Self> {
        // In the year 2096, so that a server which goes by the real time does not expire at once what is written by this one.
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000);
        Arc::new(Self(Mutex::new(start)))
    }

    pub(crate) fn advance(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }

    pub(crate) fn rewind(&self, by: Duration) {
        *self.0.lock().unwrap() -= by;
    }
}

impl Clock for ManualClock {
    fn now(&self) -> SystemTime {
        *self.0.lock().unwrap()
    }
}
