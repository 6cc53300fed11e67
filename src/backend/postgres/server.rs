//! The connections to the server, and the runtime by which a calling thread uses them.

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::yield_now;
use tokio::time::timeout;

use super::connect::Target;
use super::connection::Connection;
use super::failure::Failure;
use crate::lock::lock;

/// Number of idle connections that are kept. A storage uses two.
const IDLE: usize = 8;

/// Number of threads that resolve names, since the operating system does so without a limit in time.
const RESOLVERS: usize = 4;

#[derive(Clone, Copy)]
pub(super) struct Timeouts {
    pub(super) connect: Duration,
    pub(super) response: Duration,
}

pub(super) struct Server {
    target: Target,
    /// Each connection has a session of the server for itself.
    is_direct: bool,
    idle: Mutex<Vec<Connection>>,
    /// Made by the first call. It has no thread: each call drives it on its own, with all connections, until it is done.
    runtime: Mutex<Option<Arc<Runtime>>>,
}

impl Server {
    pub(super) fn new(target: Target, is_direct: bool) -> Self {
        Self {
            target,
            is_direct,
            idle: Mutex::default(),
            runtime: Mutex::default(),
        }
    }

    /// Returns the same server, without the connections.
    pub(super) fn with_direct(&self, is_direct: bool) -> Self {
        Self::new(self.target.clone(), is_direct)
    }

    pub(super) fn name(&self) -> &str {
        self.target.name()
    }

    /// Runs `work` on a connection, a second time if the first one was idle and turns out to be lost.
    pub(super) fn call<R: Send>(
        &self,
        timeouts: Timeouts,
        work: impl AsyncFn(&Connection) -> Result<R, Failure> + Sync,
    ) -> Result<R, Failure> {
        self.block_on(timeouts, async || self.call_on_any(timeouts, &work).await)
    }

    /// Opens that many connections, unless there are as many idle ones.
    pub(super) fn open(&self, connections: usize, timeouts: Timeouts) -> Result<(), Failure> {
        self.block_on(timeouts, async || {
            while lock(&self.idle).len() < connections {
                let connection = self.connect(timeouts).await?;
                self.give_back(connection);
            }
            Ok(())
        })
    }

    /// Runs `task` for no longer than the timeouts together: on this thread, or on one of its own if this one is within a
    /// runtime, which must not be blocked by another.
    fn block_on<R: Send>(
        &self,
        timeouts: Timeouts,
        task: impl AsyncFnOnce() -> Result<R, Failure> + Send,
    ) -> Result<R, Failure> {
        let runtime = self.runtime()?;
        let most = timeouts.connect.saturating_add(timeouts.response);
        let run = || {
            runtime.block_on(async {
                let result = timeout(most, task()).await;
                let result = result.unwrap_or(Err(Failure::NoAnswer("no answer", most)));
                if result.is_err() {
                    // Dropped connections are closed by their tasks, which nobody runs between calls.
                    yield_now().await;
                }
                result
            })
        };
        if Handle::try_current().is_err_and(|error| error.is_missing_context()) {
            return run();
        }
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("workflow-context-postgres".into());
            let thread = thread.spawn_scoped(scope, run);
            let thread = thread.map_err(|error| Failure::Io("cannot start a thread", error))?;
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    fn runtime(&self) -> Result<Arc<Runtime>, Failure> {
        let mut runtime = lock(&self.runtime);
        if let Some(runtime) = &*runtime {
            return Ok(runtime.clone());
        }
        let new = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(RESOLVERS)
            .build();
        let new = new.map_err(|error| Failure::Io("cannot start a runtime", error))?;
        Ok(runtime.insert(Arc::new(new)).clone())
    }

    async fn call_on_any<R>(
        &self,
        timeouts: Timeouts,
        work: &impl AsyncFn(&Connection) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let idle = self.take_idle();
        let mut reused = idle.is_some();
        let mut connection = match idle {
            Some(connection) => connection,
            None => self.connect(timeouts).await?,
        };
        loop {
            let answer = timeout(timeouts.response, work(&connection)).await;
            let failure = match answer {
                Ok(Ok(result)) => {
                    self.give_back(connection);
                    return Ok(result);
                }
                Ok(Err(failure)) => failure,
                Err(_) => Failure::NoAnswer("no answer", timeouts.response),
            };
            // The other idle connections are as old.
            self.close_idle();
            if !reused || !failure.is_lost_connection() {
                return Err(failure);
            }
            connection = self.connect(timeouts).await?;
            reused = false;
        }
    }

    async fn connect(&self, timeouts: Timeouts) -> Result<Connection, Failure> {
        let (most, own) = (
            timeouts.connect,
            self.is_direct.then_some(timeouts.response),
        );
        let opened = timeout(most, self.target.open(most, own)).await;
        opened.unwrap_or(Err(Failure::NoAnswer("cannot connect", most)))
    }

    fn take_idle(&self) -> Option<Connection> {
        loop {
            let connection = lock(&self.idle).pop()?;
            if !connection.is_closed() {
                return Some(connection);
            }
        }
    }

    fn give_back(&self, connection: Connection) {
        let mut idle = lock(&self.idle);
        if idle.len() < IDLE {
            idle.push(connection);
        }
    }

    fn close_idle(&self) {
        let idle = std::mem::take(&mut *lock(&self.idle));
        // Closed without the lock.
        drop(idle);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = lock(&self.runtime).take().and_then(Arc::into_inner) {
            // Closes all connections, without waiting for a name that is being resolved.
            runtime.shutdown_background();
        }
    }
}
