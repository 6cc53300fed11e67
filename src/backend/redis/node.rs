//! One server, and connections to it.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use redis::{
    Client, Cmd, Connection, ConnectionAddr, IntoConnectionInfo, RedisError, RedisResult, Value,
    cmd,
};

use super::ConnectError;
use crate::backend::BackendError;
use crate::lock::lock;

/// How many connections to a server are kept for later use. A storage uses two.
const IDLE: usize = 8;

#[derive(Clone, Copy)]
pub(super) struct Timeouts {
    pub(super) connect: Duration,
    pub(super) response: Duration,
}

pub(super) struct Node {
    client: Client,
    sentinels: Vec<Client>,
    /// What the sentinels call it.
    service: String,
    idle: Mutex<Vec<Connection>>,
}

impl Node {
    pub(super) fn new(client: Client) -> Self {
        Self::of_sentinels(client, Vec::new(), String::new())
    }

    pub(super) fn of_sentinels(client: Client, sentinels: Vec<Client>, service: String) -> Self {
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
            [] => format!("at {}", self.client.get_connection_info().addr()),
            _ => format!("{:?} of its sentinels", self.service),
        }
    }

    pub(super) fn failure(
        &self,
        what: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> BackendError {
        let name = self.name();
        BackendError::new(
            format!("the Redis server {name} {what}"),
            Some(source.into()),
        )
    }

    pub(super) fn session(&self, timeouts: Timeouts) -> Result<Session<'_>, BackendError> {
        let idle = self.idle().pop();
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

    /// A session by a new connection, since the others are of no use any more.
    pub(super) fn new_session(&self, timeouts: Timeouts) -> Result<Session<'_>, BackendError> {
        self.close_idle();
        self.session(timeouts)
    }

    pub(super) fn close_idle(&self) {
        let idle = std::mem::take(&mut *self.idle());
        drop(idle);
    }

    fn open(&self, timeouts: Timeouts) -> Result<Connection, BackendError> {
        let open = || match &*self.sentinels {
            [] => open_on(&self.client, timeouts),
            sentinels => {
                let mut result = Err(no_answer("no sentinel"));
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
        open().map_err(|error: RedisError| self.failure("cannot be reached", error))
    }

    /// The server that a sentinel names.
    fn master(&self, sentinel: &Client, timeouts: Timeouts) -> RedisResult<Client> {
        let mut connection = open_on(sentinel, timeouts)?;
        let mut ask = cmd("SENTINEL");
        ask.arg("GET-MASTER-ADDR-BY-NAME").arg(&self.service);
        let address: Option<(String, u16)> = ask.query(&mut connection)?;
        let (host, port) =
            address.ok_or_else(|| no_answer("the sentinel knows no such service"))?;
        at(&self.client, host, port)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        lock(&self.idle)
    }
}

/// One connection, which is closed unless it is given back: after an error nobody knows which answer comes next.
pub(super) struct Session<'a> {
    node: &'a Node,
    timeouts: Timeouts,
    connection: Connection,
    /// It was idle before, and the server may have closed it since.
    reused: bool,
}

/// Commands on their way to the server.
pub(super) struct Sent {
    packed: Vec<u8>,
    commands: usize,
    sent: RedisResult<()>,
}

impl Session<'_> {
    /// The answer of each command. An error among them fails the call, unless it tells that a value is no string.
    pub(super) fn call(&mut self, commands: &[Cmd]) -> Result<Vec<Value>, BackendError> {
        let deadline = Instant::now() + self.timeouts.response;
        let sent = self.send(commands);
        let answers = self.receive(sent, deadline)?;
        for answer in &answers {
            if let Some(error) = refusal(answer) {
                return Err(self.node.failure("refuses", error));
            }
        }
        Ok(answers)
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
        Sent {
            sent: self.connection.send_packed_command(&packed),
            packed,
            commands: count,
        }
    }

    /// The answer of each command, errors among them.
    pub(super) fn receive(
        &mut self,
        sent: Sent,
        deadline: Instant,
    ) -> Result<Vec<Value>, BackendError> {
        let Sent {
            packed,
            commands,
            sent,
        } = sent;
        let mut answers = sent.and_then(|()| self.receive_until(deadline, commands));
        if self.reused && matches!(&answers, Err(error) if error.is_connection_dropped()) {
            // The others are as old.
            self.node.close_idle();
            self.connection = self.node.open(self.timeouts)?;
            let deadline = Instant::now() + self.timeouts.response;
            let sent = self.connection.send_packed_command(&packed);
            answers = sent.and_then(|()| self.receive_until(deadline, commands));
        }
        self.reused = false;
        answers.map_err(|error| self.node.failure("does not answer", error))
    }

    /// As a pipeline of the client does it, which however waits for every answer for as long again after the first one
    /// has failed to come.
    fn receive_until(&mut self, deadline: Instant, commands: usize) -> RedisResult<Vec<Value>> {
        let mut answers = Vec::with_capacity(commands);
        for _ in 0..commands {
            if Instant::now() > deadline {
                return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
            }
            answers.push(self.connection.recv_response()?);
        }
        Ok(answers)
    }

    pub(super) fn give_back(self) {
        let mut idle = self.node.idle();
        if idle.len() < IDLE {
            idle.push(self.connection);
        }
    }
}

/// The error that an answer is, unless it tells that a value is no string.
pub(super) fn refusal(answer: &Value) -> Option<RedisError> {
    match answer {
        Value::ServerError(error) if error.code() != "WRONGTYPE" => Some(error.clone().into()),
        _ => None,
    }
}

/// Connects to nothing yet.
pub(super) fn client(url: &str) -> Result<Client, ConnectError> {
    let invalid = |source: RedisError| ConnectError::InvalidUrl {
        source: source.into(),
    };
    let info = url.into_connection_info().map_err(invalid)?;
    #[cfg(feature = "redis-tls")]
    if matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
        have_cryptography();
    }
    // Each message of a handshake has the whole timeout again: none that is not needed.
    let redis = info.redis_settings().clone().set_skip_set_lib_name();
    Client::open(info.set_redis_settings(redis)).map_err(invalid)
}

/// A client of another address, as the one in everything else.
pub(super) fn at(client: &Client, host: String, port: u16) -> RedisResult<Client> {
    let info = client.get_connection_info();
    let address = match info.addr().clone() {
        ConnectionAddr::TcpTls {
            insecure,
            tls_params,
            ..
        } => ConnectionAddr::TcpTls {
            host,
            port,
            insecure,
            tls_params,
        },
        _ => ConnectionAddr::Tcp(host, port),
    };
    Client::open(info.clone().set_addr(address))
}

fn open_on(client: &Client, timeouts: Timeouts) -> RedisResult<Connection> {
    let connection = client.get_connection_with_timeout(timeouts.connect)?;
    connection.set_read_timeout(Some(timeouts.response))?;
    connection.set_write_timeout(Some(timeouts.response))?;
    Ok(connection)
}

fn no_answer(what: &'static str) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::NotFound, what).into()
}

/// Without a choice of the process's, and with several to choose from, rustls would panic.
#[cfg(feature = "redis-tls")]
fn have_cryptography() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // If another thread has been faster, its choice stands.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}
