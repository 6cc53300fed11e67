//! A backend whose calls a test makes succeed, fail, block or panic.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use tracing_workflow_context::MemoryBackend;
use tracing_workflow_context::backend::{
    BackendError, Record, StorageBackend, Write, WriteOutcome,
};

use super::PATIENCE;

/// The outcome of a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Behaviour {
    #[default]
    Works,
    Fails,
    /// Blocks until another behaviour is set.
    Blocks,
    Panics,
    /// Of a get: finds nothing. Other calls work.
    Misses,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Write,
    Get,
    GetMany,
    Scan,
    Flush,
    Connect,
}

/// A connection to a `MemoryBackend`, which several of these can share as the connections of several workers. Clones
/// are the same connection.
#[derive(Clone, Debug)]
pub(crate) struct ControlledBackend(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    inner: MemoryBackend,
    warms_up: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    behaviours: [Behaviour; 6],
    calls: [usize; 6],
    blocked: [usize; 6],
    malformed: u64,
    /// The writes of each call.
    groups: Vec<Vec<Write>>,
}

impl ControlledBackend {
    pub(crate) fn new() -> Self {
        Self::over(MemoryBackend::new())
    }

    pub(crate) fn over(inner: MemoryBackend) -> Self {
        Self::with(inner, false)
    }

    pub(crate) fn warming_up(inner: MemoryBackend) -> Self {
        Self::with(inner, true)
    }

    fn with(inner: MemoryBackend, warms_up: bool) -> Self {
        Self(Arc::new(Inner {
            inner,
            warms_up,
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    pub(crate) fn set(&self, call: Call, behaviour: Behaviour) {
        self.state().behaviours[call as usize] = behaviour;
        self.0.changed.notify_all();
    }

    pub(crate) fn set_all(&self, behaviour: Behaviour) {
        self.state().behaviours = [behaviour; 6];
        self.0.changed.notify_all();
    }

    pub(crate) fn set_malformed(&self, malformed: u64) {
        self.state().malformed = malformed;
    }

    pub(crate) fn calls(&self, call: Call) -> usize {
        self.state().calls[call as usize]
    }

    pub(crate) fn groups(&self) -> Vec<Vec<Write>> {
        self.state().groups.clone()
    }

    /// Waits until a call of that kind is blocked.
    #[track_caller]
    pub(crate) fn await_blocked(&self, call: Call) {
        let is_free = |state: &mut State| state.blocked[call as usize] == 0;
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.state(), PATIENCE, is_free);
        assert!(!waited.unwrap().1.timed_out(), "{call:?} was not called");
    }

    /// Returns whether no storage holds a clone any more.
    pub(crate) fn is_released(&self) -> bool {
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
            match state.behaviours[call] {
                Behaviour::Works | Behaviour::Misses => return Ok(()),
                Behaviour::Fails => {
                    return Err(BackendError::new("the backend was told to fail", None));
                }
                Behaviour::Panics => {
                    drop(state);
                    panic!("the backend was told to panic");
                }
                Behaviour::Blocks => {
                    state.blocked[call] += 1;
                    self.0.changed.notify_all();
                    state = self.0.changed.wait(state).unwrap();
                    state.blocked[call] -= 1;
                }
            }
        }
    }
}

impl StorageBackend for ControlledBackend {
    fn connect(&self) -> Result<(), BackendError> {
        self.enter(Call::Connect)
    }

    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        self.enter(Call::Write)?;
        self.state().groups.push(writes.to_vec());
        self.0.inner.write(writes)
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        self.enter(Call::Get)?;
        if self.state().behaviours[Call::Get as usize] == Behaviour::Misses {
            return Ok(None);
        }
        self.0.inner.get(key)
    }

    /// Counts as a get if a span waits for it.
    fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Record>>, BackendError> {
        let is_lookup = thread::current().name() == Some("workflow-context-lookups");
        let call = if is_lookup { Call::Get } else { Call::GetMany };
        self.enter(call)?;
        if self.state().behaviours[call as usize] == Behaviour::Misses {
            return Ok(vec![None; keys.len()]);
        }
        self.0.inner.get_many(keys)
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
