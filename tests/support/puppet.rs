//! A backend that does as the test tells it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use tracing_workflow_context::MemoryBackend;
use tracing_workflow_context::backend::{
    BackendError, Record, StorageBackend, Write, WriteOutcome,
};

/// What becomes of calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Works,
    Fails,
    /// Until the mood is another one.
    Blocks,
    Panics,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Write,
    Get,
    Scan,
    Flush,
}

/// Several can stand before one `MemoryBackend`, each as the connection of one worker. Clones are the same puppet.
#[derive(Clone, Debug)]
pub struct Puppet(Arc<Strings>);

#[derive(Debug)]
struct Strings {
    inner: MemoryBackend,
    warms_up: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    moods: [Mood; 4],
    calls: [usize; 4],
    blocked: [usize; 4],
    malformed: u64,
    /// What was written, group by group.
    groups: Vec<Vec<Write>>,
}

impl Puppet {
    pub fn new() -> Self {
        Self::over(MemoryBackend::new())
    }

    pub fn over(inner: MemoryBackend) -> Self {
        Self::with(inner, false)
    }

    pub fn warming_up(inner: MemoryBackend) -> Self {
        Self::with(inner, true)
    }

    fn with(inner: MemoryBackend, warms_up: bool) -> Self {
        Self(Arc::new(Strings {
            inner,
            warms_up,
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    pub fn set(&self, call: Call, mood: Mood) {
        self.state().moods[call as usize] = mood;
        self.0.changed.notify_all();
    }

    pub fn set_all(&self, mood: Mood) {
        self.state().moods = [mood; 4];
        self.0.changed.notify_all();
    }

    pub fn set_malformed(&self, malformed: u64) {
        self.state().malformed = malformed;
    }

    pub fn calls(&self, call: Call) -> usize {
        self.state().calls[call as usize]
    }

    pub fn groups(&self) -> Vec<Vec<Write>> {
        self.state().groups.clone()
    }

    /// Waits until a call is blocked.
    #[track_caller]
    pub fn await_blocked(&self, call: Call) {
        let is_free = |state: &mut State| state.blocked[call as usize] == 0;
        let patience = Duration::from_secs(60);
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.state(), patience, is_free);
        assert!(!waited.unwrap().1.timed_out(), "no {call:?} came");
    }

    /// Whether nobody else holds on to it.
    pub fn is_let_go(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    fn enter(&self, call: Call) -> Result<(), BackendError> {
        let mut state = self.state();
        let call = call as usize;
        state.calls[call] += 1;
        loop {
            match state.moods[call] {
                Mood::Works => return Ok(()),
                Mood::Fails => return Err(BackendError::new("the puppet fails", None)),
                Mood::Panics => {
                    drop(state);
                    panic!("the puppet panics");
                }
                Mood::Blocks => {
                    state.blocked[call] += 1;
                    self.0.changed.notify_all();
                    state = self.0.changed.wait(state).unwrap();
                    state.blocked[call] -= 1;
                }
            }
        }
    }
}

impl StorageBackend for Puppet {
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        self.enter(Call::Write)?;
        self.state().groups.push(writes.to_vec());
        self.0.inner.write(writes)
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        self.enter(Call::Get)?;
        self.0.inner.get(key)
    }

    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        self.enter(Call::Scan)?;
        self.0.inner.scan(visit)
    }

    fn flush(&self) -> Result<(), BackendError> {
        self.enter(Call::Flush)
    }

    fn malformed(&self) -> u64 {
        self.state().malformed
    }

    fn warms_up(&self) -> bool {
        self.0.warms_up
    }
}
