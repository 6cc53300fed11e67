//! The thread that speaks with the server, and the connections that it keeps.

use std::future::pending;
use std::io;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_postgres::Client;

use super::connect::Target;
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
    pool: Arc<Pool>,
    /// Started by the first call.
    io: Mutex<Option<Io>>,
}

struct Pool {
    target: Target,
    idle: Mutex<Vec<Session>>,
}

/// One connection, which is closed when this is dropped.
struct Session {
    client: Arc<Client>,
    connection: AbortHandle,
}

/// The thread, which ends when this is dropped.
struct Io {
    runtime: Handle,
    /// The task that the thread waits for.
    running: AbortHandle,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(super) fn new(target: Target) -> Self {
        Self {
            pool: Arc::new(Pool {
                target,
                idle: Mutex::default(),
            }),
            io: Mutex::default(),
        }
    }

    pub(super) fn name(&self) -> &str {
        self.pool.target.name()
    }

    /// Runs `work` on a connection, a second time if the first one was idle and turns out to be lost.
    pub(super) fn call<R, F>(
        &self,
        timeouts: Timeouts,
        work: impl Fn(Arc<Client>) -> F + Send + 'static,
    ) -> Result<R, Failure>
    where
        R: Send + 'static,
        F: Future<Output = Result<R, Failure>> + Send,
    {
        let pool = self.pool.clone();
        self.run(timeouts, async move { pool.call(timeouts, work).await })
    }

    /// Opens that many connections, unless there are as many idle ones.
    pub(super) fn open(&self, connections: usize, timeouts: Timeouts) -> Result<(), Failure> {
        let pool = self.pool.clone();
        self.run(timeouts, async move {
            while lock(&pool.idle).len() < connections {
                let session = pool.open(timeouts.connect).await?;
                pool.give_back(session);
            }
            Ok(())
        })
    }

    /// Runs a task on the thread, and waits for it no longer than the timeouts together.
    fn run<R: Send + 'static>(
        &self,
        timeouts: Timeouts,
        task: impl Future<Output = Result<R, Failure>> + Send + 'static,
    ) -> Result<R, Failure> {
        let runtime = self.runtime()?;
        let (answer, answered) = sync_channel(1);
        let task = runtime.spawn(async move {
            let _ = answer.try_send(task.await);
        });
        let most = timeouts.connect.saturating_add(timeouts.response);
        answered.recv_timeout(most).unwrap_or_else(|_| {
            // Closes the connection.
            task.abort();
            Err(Failure::NoAnswer("no answer", most))
        })
    }

    fn runtime(&self) -> Result<Handle, Failure> {
        let mut io = lock(&self.io);
        if let Some(io) = &*io {
            return Ok(io.runtime.clone());
        }
        let started = Io::start().map_err(|error| Failure::Io("cannot start a thread", error))?;
        Ok(io.insert(started).runtime.clone())
    }
}

impl Io {
    fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(RESOLVERS)
            .build()?;
        let until_stopped = runtime.spawn(pending::<()>());
        let (handle, running) = (runtime.handle().clone(), until_stopped.abort_handle());
        let thread = thread::Builder::new().name("workflow-context-postgres".into());
        let thread = thread.spawn(move || {
            let _ = runtime.block_on(until_stopped);
            // Without waiting for a name that is being resolved.
            runtime.shutdown_background();
        })?;
        Ok(Self {
            runtime: handle,
            running,
            thread: Some(thread),
        })
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        self.running.abort();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Pool {
    async fn call<R, F>(
        &self,
        timeouts: Timeouts,
        work: impl Fn(Arc<Client>) -> F,
    ) -> Result<R, Failure>
    where
        F: Future<Output = Result<R, Failure>>,
    {
        let idle = self.take_idle();
        let mut reused = idle.is_some();
        let mut session = match idle {
            Some(session) => session,
            None => self.open(timeouts.connect).await?,
        };
        loop {
            let answer = timeout(timeouts.response, work(session.client.clone())).await;
            let failure = match answer {
                Ok(Ok(result)) => {
                    self.give_back(session);
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
            session = self.open(timeouts.connect).await?;
            reused = false;
        }
    }

    async fn open(&self, most: Duration) -> Result<Session, Failure> {
        let opened = timeout(most, self.target.open(most)).await;
        let opened = opened.unwrap_or(Err(Failure::NoAnswer("cannot connect", most)));
        let (client, connection) = opened?;
        Ok(Session {
            client: Arc::new(client),
            connection,
        })
    }

    fn take_idle(&self) -> Option<Session> {
        loop {
            let session = lock(&self.idle).pop()?;
            if !session.client.is_closed() {
                return Some(session);
            }
        }
    }

    fn give_back(&self, session: Session) {
        let mut idle = lock(&self.idle);
        if idle.len() < IDLE {
            idle.push(session);
        }
    }

    fn close_idle(&self) {
        let idle = std::mem::take(&mut *lock(&self.idle));
        // Closed without the lock.
        drop(idle);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Otherwise a connection to a server that does not answer would wait for it.
        self.connection.abort();
    }
}
