//! One server, and the connections to it.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use redis::{Client, Cmd, RedisError, RedisResult, Value, cmd};

use super::wire::Wire;
use super::{command, connect};
use crate::backend::BackendError;
use crate::lock::lock;

/// Number of idle connections that are kept. A storage uses two.
const IDLE: usize = 8;

#[derive(Clone, Copy)]
pub(super) struct Timeouts {
    pub(super) connect: Duration,
    pub(super) response: Duration,
    /// The number of replicas that have to confirm what is sent; 0 for reads.
    pub(super) replicas: u32,
}

pub(super) struct Node {
    client: Client,
    sentinels: Vec<Client>,
    /// The name of the master in the configuration of the sentinels.
    service: String,
    idle: Mutex<Vec<Wire>>,
}

impl Node {
    pub(super) fn new(client: Client) -> Self {
        Self::with_sentinels(client, Vec::new(), String::new())
    }

    pub(super) fn with_sentinels(client: Client, sentinels: Vec<Client>, service: String) -> Self {
        Self {
            client,
            sentinels,
            service,
            idle: Mutex::default(),
        }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn name(&self) -> String {
        match &*self.sentinels {
            [] => format!("Redis server {}", self.client.get_connection_info().addr()),
            _ => format!("Redis service {:?}", self.service),
        }
    }

    pub(super) fn failure(&self, message: &str) -> BackendError {
        BackendError::new(format!("{}: {message}", self.name()), None)
    }

    pub(super) fn failure_by(&self, source: RedisError, message: &str) -> BackendError {
        BackendError::new(format!("{}: {message}", self.name()), Some(source.into()))
    }

    /// Returns the error of a command that the server refuses: a partial one, unless it refuses all.
    pub(super) fn refused_by(&self, reply: RedisError) -> BackendError {
        let is_of_the_server = (reply.code()).is_some_and(|code| OF_THE_SERVER.contains(&code));
        let error = self.failure_by(reply, "error reply");
        match is_of_the_server {
            true => error,
            false => error.partial(),
        }
    }

    /// Takes an idle connection, or opens one.
    pub(super) fn session(&self, timeouts: Timeouts) -> Result<Session<'_>, BackendError> {
        let idle = lock(&self.idle).pop();
        let reused = idle.is_some();
        let connection = match idle {
            Some(connection) => connection,
            None => self.open(timeouts)?,
        };
        Ok(Session {
            node: self,
            timeouts,
            connection,
            reused,
        })
    }

    /// Opens a connection after closing the idle ones, which have failed or are about to.
    pub(super) fn new_session(&self, timeouts: Timeouts) -> Result<Session<'_>, BackendError> {
        self.close_idle();
        self.session(timeouts)
    }

    pub(super) fn close_idle(&self) {
        let idle = std::mem::take(&mut *lock(&self.idle));
        // Closed without the lock.
        drop(idle);
    }

    fn open(&self, timeouts: Timeouts) -> Result<Wire, BackendError> {
        let open = || match &*self.sentinels {
            [] => open_on(&self.client, timeouts),
            sentinels => {
                let mut result = Err(not_found("there are no sentinels"));
                for sentinel in sentinels {
                    result = self
                        .master(sentinel, timeouts)
                        .and_then(|master| open_on(&master, timeouts));
                    if result.is_ok() {
                        break;
                    }
                }
                result
            }
        };
        open().map_err(|error| self.failure_by(error, "cannot connect"))
    }

    /// Asks a sentinel for the master.
    fn master(&self, sentinel: &Client, timeouts: Timeouts) -> RedisResult<Client> {
        let mut connection = open_on(sentinel, timeouts)?;
        let mut ask = cmd("SENTINEL");
        ask.arg("GET-MASTER-ADDR-BY-NAME").arg(&self.service);
        let reply = connection.ask(&ask, Instant::now() + timeouts.response)?;
        let address: Option<(String, u16)> = redis::from_redis_value(reply)?;
        let (host, port) = address.ok_or_else(|| not_found("the sentinel has no such service"))?;
        connect::with_address(&self.client, host, port)
    }
}

/// The codes of error replies that concern the whole server, not one command: it loads, waits, or is no master.
const OF_THE_SERVER: [&str; 8] = [
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOAUTH",
    "NOREPLICAS",
    "READONLY",
];

/// One connection. It is closed unless it is given back: after a failure, the next reply may belong to an earlier
/// command.
pub(super) struct Session<'a> {
    node: &'a Node,
    timeouts: Timeouts,
    connection: Wire,
    /// The connection was idle before, and the server may have closed it since.
    reused: bool,
}

/// Commands that were sent, and are to be replied to.
pub(super) struct Sent {
    packed: Vec<u8>,
    commands: usize,
    sent: RedisResult<()>,
}

/// The reply to each command, error replies included.
pub(super) struct Replies {
    pub(super) values: Vec<Value>,
    /// Set if fewer replicas than asked for have confirmed what was carried out: the error of each command that was.
    pub(super) unconfirmed: Option<BackendError>,
}

impl Session<'_> {
    /// Returns the reply to each command. An error reply fails the call, unless it says that a value is no string.
    pub(super) fn call(&mut self, commands: &[Cmd]) -> Result<Vec<Value>, BackendError> {
        let replies = self.ask(commands)?.values;
        match replies.iter().find_map(error_reply) {
            Some(error) => Err(self.node.refused_by(error)),
            None => Ok(replies),
        }
    }

    pub(super) fn ask(&mut self, commands: &[Cmd]) -> Result<Replies, BackendError> {
        let deadline = Instant::now() + self.timeouts.response;
        let sent = self.send(commands);
        self.receive(sent, deadline)
    }

    pub(super) fn ping(mut self) -> Result<(), BackendError> {
        self.call(&[cmd("PING")])?;
        self.give_back();
        Ok(())
    }

    pub(super) fn send<'c>(&mut self, commands: impl IntoIterator<Item = &'c Cmd>) -> Sent {
        let (mut packed, mut count) = (Vec::new(), 0);
        for command in commands {
            command.write_packed_command(&mut packed);
            count += 1;
        }
        if self.timeouts.replicas > 0 {
            // Half of the time is left for the server itself.
            let wait = command::wait(self.timeouts.replicas, self.timeouts.response / 2);
            wait.write_packed_command(&mut packed);
            count += 1;
        }
        Sent {
            sent: self
                .connection
                .send(&packed, Instant::now() + self.timeouts.response),
            packed,
            commands: count,
        }
    }

    pub(super) fn receive(
        &mut self,
        sent: Sent,
        deadline: Instant,
    ) -> Result<Replies, BackendError> {
        let Sent {
            packed,
            commands,
            sent,
        } = sent;
        let mut replies = sent.and_then(|()| self.receive_until(deadline, commands));
        if self.reused && matches!(&replies, Err(error) if error.is_connection_dropped()) {
            // The other idle connections are as old.
            self.node.close_idle();
            self.connection = self.node.open(self.timeouts)?;
            let deadline = Instant::now() + self.timeouts.response;
            let sent = self.connection.send(&packed, deadline);
            replies = sent.and_then(|()| self.receive_until(deadline, commands));
        }
        self.reused = false;
        let mut values = replies.map_err(|error| self.node.failure_by(error, "no reply"))?;
        let confirmations = (self.timeouts.replicas > 0).then(|| values.pop()).flatten();
        Ok(Replies {
            unconfirmed: confirmations.and_then(|reply| self.unconfirmed(&reply)),
            values,
        })
    }

    /// Reads the reply to `WAIT`.
    fn unconfirmed(&self, reply: &Value) -> Option<BackendError> {
        let asked = i64::from(self.timeouts.replicas);
        let confirmed = match *reply {
            Value::Int(confirmed) => confirmed,
            _ => 0,
        };
        let message = format!("written, and confirmed by {confirmed} of {asked} replicas");
        (confirmed < asked).then(|| self.node.failure(&message).partial())
    }

    /// Receives all replies by one deadline.
    fn receive_until(&mut self, deadline: Instant, commands: usize) -> RedisResult<Vec<Value>> {
        let mut replies = Vec::with_capacity(commands);
        for _ in 0..commands {
            replies.push(self.connection.receive(deadline)?);
        }
        Ok(replies)
    }

    pub(super) fn give_back(self) {
        let mut idle = lock(&self.node.idle);
        if idle.len() < IDLE {
            idle.push(self.connection);
        }
    }
}

/// Returns the error that a reply is, unless it says that a value is no string: such a value is malformed.
pub(super) fn error_reply(reply: &Value) -> Option<RedisError> {
    match reply {
        Value::ServerError(error) if error.code() != "WRONGTYPE" => Some(error.clone().into()),
        _ => None,
    }
}

fn open_on(client: &Client, timeouts: Timeouts) -> RedisResult<Wire> {
    Wire::open(client, Instant::now() + timeouts.connect)
}

fn not_found(message: &'static str) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::NotFound, message).into()
}
