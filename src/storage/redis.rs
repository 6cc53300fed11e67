//! A backend on a server that many machines share.

mod json;

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use redis::{
    Client, Cmd, Connection, ConnectionAddr, IntoConnectionInfo, RedisError, RedisResult, Value,
    cmd,
};

use super::backend::{Record, StorageBackend, Write};
use super::codec;
use super::core::Counter;
use crate::error::BackendError;

/// Ends the instance id in a key of the storage, where there is more than that.
const SEPARATOR: char = '\u{1f}';

const KEY_PREFIX: &str = "workflow-context:";
const TIMEOUT: Duration = Duration::from_secs(1);

/// How many commands go to the server before its answers are read.
const PIPELINE: usize = 1000;

/// How many connections are kept for later use. A storage uses two.
const IDLE: usize = 8;

/// How often a value that cannot be decoded is tried to be replaced while others change it.
const REPLACEMENTS: usize = 10;

/// A backend on a [Redis] or Valkey server of version 7 or later, which any number of machines share.
///
/// ```no_run
/// use tracing_workflow_context::{RedisBackend, WorkflowContextStorage};
///
/// let backend = RedisBackend::connect("redis://127.0.0.1:6379/")?;
/// let storage = WorkflowContextStorage::builder().backend(backend).build()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// | setting | default |
/// |---|---|
/// | [`with_sentinels`](Self::with_sentinels) | none |
/// | [`with_key_prefix`](Self::with_key_prefix) | `workflow-context:` |
/// | [`with_form`](Self::with_form) | [`Form::Binary`] |
/// | [`with_connect_timeout`](Self::with_connect_timeout) | 1 second |
/// | [`with_response_timeout`](Self::with_response_timeout) | 1 second |
///
/// # When the server is away
///
/// Telemetry fails open: a server that cannot be reached is no error of [`connect`](Self::connect), which connects to
/// nothing yet. The first call does, and each call after a connection was lost; one that the server closed while it
/// was not in use is replaced unnoticed. While calls fail, the storage leaves the server alone for pauses that grow
/// from 100 milliseconds to 5 seconds, keeps what is to be written, and counts in
/// [`backend_errors`](crate::Stats::backend_errors).
///
/// No call waits longer for the server than the two timeouts allow, for each 1,000 writes and each address that its
/// name has. How long the name itself takes is the operating system's matter.
///
/// # What is on the server
///
/// One string for each instance, and one for each of its runs and of its second, third, ... traces. The key of instance
/// `order-42` is `workflow-context:{order-42}`; the others have more text after the brace, which makes all of them
/// share one hash slot. The server itself removes what has expired, by its own clock: the clocks of all machines must
/// agree within what is acceptable for the
/// [grace of a completed instance](crate::WorkflowContextStorageBuilder::completed_grace).
///
/// The user needs `SET`, `GET`, `DEL`, `PEXPIREAT`, `PEXPIRETIME`, `PING`, `WATCH`, `UNWATCH`, `MULTI` and `EXEC`;
/// a [scan](StorageBackend::scan), which a storage never makes, also `SCAN`.
///
/// Whoever else may write these keys is not trusted: what cannot be decoded is counted in
/// [`malformed`](crate::Stats::malformed), treated as missing, and replaced by the next context of its instance.
///
/// # What can be lost
///
/// Written means that the server has answered. What it keeps when it dies itself is the matter of its persistence and
/// replication.
///
/// # TLS
///
/// With feature `redis-tls`, by a URL that begins with `rediss://`. The server's certificate is checked against those
/// that the operating system trusts, or those in the file that the variable `SSL_CERT_FILE` names. Where the process
/// has not chosen its cryptography for rustls when the backend is made, that of `ring` is chosen.
///
/// # What is left out
///
/// Cluster: this is a client of one server, of the master that [sentinels](Self::with_sentinels) name, or of a proxy in
/// front of several.
///
/// Clones share connections. A lock is held only while an idle connection is taken or given back.
///
/// [Redis]: https://redis.io
#[derive(Clone)]
pub struct RedisBackend {
    server: Arc<Server>,
    key_prefix: Arc<str>,
    form: Form,
    connect_timeout: Duration,
    response_timeout: Duration,
}

/// How a [`RedisBackend`] writes contexts. It reads both forms, whichever it writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// A compact form of this crate, mostly of less than 64 bytes.
    #[default]
    Binary,
    /// The JSON object of dapr-agents, about 280 bytes, for workers in other languages.
    ///
    /// `traceparent` and `tracestate` (or null) are those of the headers; `instance_id`, `resumed` and `debug_info` stand
    /// beside them, and `run_id`, `generation`, `recorded_at` and `expires_at` (in seconds since 1970) of this crate. Of
    /// a value that another worker has written only `traceparent` must be there. The expiry of the key on the server
    /// goes before `expires_at`; with neither, a context lives for another 24 hours each time that it is read.
    Json,
}

/// Why a [`RedisBackend`] could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The text is no URL of a Redis server, or asks for what is [left out](RedisBackend#what-is-left-out). It is not
    /// repeated here, since it may contain a password.
    #[error("this is not the URL of a Redis server")]
    InvalidUrl {
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

struct Server {
    client: Client,
    sentinels: Vec<Client>,
    /// What the sentinels call it.
    service: String,
    idle: Mutex<Vec<Connection>>,
    malformed: Counter,
}

impl RedisBackend {
    /// A backend on the server of that URL: `redis://user:password@host:port/database`, all but the host optional,
    /// `rediss://` for [TLS](Self#tls), or `redis+unix:///path`.
    ///
    /// It connects when it is first used, see [above](Self#when-the-server-is-away).
    ///
    /// # Errors
    ///
    /// [`ConnectError::InvalidUrl`], and nothing that has to do with the server.
    pub fn connect(url: &str) -> Result<Self, ConnectError> {
        Ok(Self {
            server: Arc::new(Server::new(client(url)?, Vec::new(), String::new())),
            key_prefix: KEY_PREFIX.into(),
            form: Form::default(),
            connect_timeout: TIMEOUT,
            response_timeout: TIMEOUT,
        })
    }

    /// Asks sentinels, by their URLs and one after the other, for the server: the master of that service. Asks again for
    /// each new connection, and so follows a failover. Of the URL given to [`connect`](Self::connect) all but the host
    /// and the port holds.
    ///
    /// By default, there are none. Clones made before this do not share connections with it.
    ///
    /// # Errors
    ///
    /// [`ConnectError::InvalidUrl`] where a sentinel's is none.
    pub fn with_sentinels<'a>(
        mut self,
        urls: impl IntoIterator<Item = &'a str>,
        service: &str,
    ) -> Result<Self, ConnectError> {
        let sentinels = urls.into_iter().map(client).collect::<Result<_, _>>()?;
        let server = Server::new(self.server.client.clone(), sentinels, service.to_owned());
        self.server = Arc::new(server);
        Ok(self)
    }

    /// What all keys begin with: whatever shares contexts must have the same. With braces in it, all keys may fall
    /// into one hash slot.
    ///
    /// By default, `workflow-context:`.
    #[must_use]
    pub fn with_key_prefix(mut self, prefix: &str) -> Self {
        self.key_prefix = prefix.into();
        self
    }

    /// How contexts are written.
    ///
    /// By default, [`Form::Binary`].
    #[must_use]
    pub fn with_form(mut self, form: Form) -> Self {
        self.form = form;
        self
    }

    /// How long to wait at most until the server accepts a connection, and then until it accepts the user.
    ///
    /// By default, 1 second; at least 1 millisecond.
    #[must_use]
    pub fn with_connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = at_least_a_moment(timeout);
        self
    }

    /// How long to wait at most for an answer of the server.
    ///
    /// By default, 1 second; at least 1 millisecond.
    #[must_use]
    pub fn with_response_timeout(mut self, timeout: Duration) -> Self {
        self.response_timeout = at_least_a_moment(timeout);
        self
    }

    fn session(&self) -> Result<Session<'_>, BackendError> {
        let idle = self.server.idle().pop();
        let reused = idle.is_some();
        let connection = match idle {
            Some(connection) => connection,
            None => self.open()?,
        };
        Ok(Session {
            backend: self,
            connection,
            reused,
        })
    }

    fn open(&self) -> Result<Connection, BackendError> {
        let open = || match &*self.server.sentinels {
            [] => self.open_on(&self.server.client),
            sentinels => {
                let mut result = Err(no_answer("no sentinel"));
                for sentinel in sentinels {
                    result = self
                        .master(sentinel)
                        .and_then(|master| self.open_on(&master));
                    if result.is_ok() {
                        break;
                    }
                }
                result
            }
        };
        open().map_err(|error: RedisError| self.failure("cannot be reached", error))
    }

    fn open_on(&self, client: &Client) -> RedisResult<Connection> {
        let connection = client.get_connection_with_timeout(self.connect_timeout)?;
        connection.set_read_timeout(Some(self.response_timeout))?;
        connection.set_write_timeout(Some(self.response_timeout))?;
        Ok(connection)
    }

    /// The server that a sentinel names.
    fn master(&self, sentinel: &Client) -> RedisResult<Client> {
        let mut connection = self.open_on(sentinel)?;
        let mut ask = cmd("SENTINEL");
        ask.arg("GET-MASTER-ADDR-BY-NAME").arg(&self.server.service);
        let address: Option<(String, u16)> = ask.query(&mut connection)?;
        let (host, port) =
            address.ok_or_else(|| no_answer("the sentinel knows no such service"))?;
        let info = self.server.client.get_connection_info();
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

    fn failure(
        &self,
        what: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> BackendError {
        let name = self.server.name();
        BackendError::new(
            format!("the Redis server {name} {what}"),
            Some(source.into()),
        )
    }

    /// The key on the server: two keys of one instance have the same text in the braces.
    fn key(&self, key: &str) -> String {
        let (id, rest) = key.split_at(key.find(SEPARATOR).unwrap_or(key.len()));
        format!("{}{{{id}}}{rest}", self.key_prefix)
    }

    /// The opposite of [`key`](Self::key); `None` for what it does not make.
    fn key_of(&self, on_server: &[u8]) -> Option<String> {
        let key = std::str::from_utf8(on_server).ok()?;
        let key = key.strip_prefix(&*self.key_prefix)?.strip_prefix('{')?;
        let (id, rest) = key.split_at(key.find(SEPARATOR).unwrap_or(key.len()));
        Some(format!("{}{rest}", id.strip_suffix('}')?))
    }

    fn encode(&self, key: &str, record: &Record) -> Vec<u8> {
        match self.form {
            Form::Binary => codec::encode(record),
            Form::Json => {
                let id = key.split(SEPARATOR).next().unwrap_or(key);
                json::encode(id, record)
            }
        }
    }

    fn command(&self, write: &Write) -> Cmd {
        let key = self.key(write.key());
        match write {
            Write::Put(key_of, record) => self.set(&key, key_of, record),
            Write::PutIfAbsent(key_of, record) => {
                let mut set = self.set(&key, key_of, record);
                set.arg("NX").arg("GET");
                set
            }
            Write::Expire(_, at) => on_key("PEXPIREAT", &key, &[milliseconds(*at)]),
            Write::Remove(_) => on_key("DEL", &key, &[]),
        }
    }

    fn set(&self, on_server: &str, key: &str, record: &Record) -> Cmd {
        let mut set = cmd("SET");
        set.arg(on_server).arg(self.encode(key, record));
        set.arg("PXAT").arg(milliseconds(record.expires_at));
        set
    }

    /// What an answer shows, counted where it cannot be decoded.
    fn read(&self, value: &Value) -> Found {
        let found = found(value);
        if let Found::Malformed = found {
            self.server.malformed.add();
        }
        found
    }

    /// What two answers, of `GET` and of `PEXPIRETIME`, tell of a key.
    fn read_with_expiry(&self, value: &Value, expiry: &Value) -> Option<Record> {
        match self.read(value) {
            Found::Record(record) => expiring(record, expiry),
            Found::Nothing | Found::Malformed => None,
        }
    }
}

impl StorageBackend for RedisBackend {
    fn write(&self, writes: &[Write]) -> Result<Vec<Option<Record>>, BackendError> {
        let mut winners = Vec::with_capacity(writes.len());
        if writes.is_empty() {
            return Ok(winners);
        }
        let mut session = self.session()?;
        for group in writes.chunks(PIPELINE) {
            winners.append(&mut session.write(group)?);
        }
        session.give_back();
        Ok(winners)
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        let key = self.key(key);
        let mut session = self.session()?;
        let answers = session.call(&read_commands(&key))?;
        session.give_back();
        Ok(self.read_with_expiry(&answers[0], &answers[1]))
    }

    /// Remembers every key that it has shown. What others add or remove meanwhile may be shown or not.
    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        let pattern = format!("{}{{*", escaped(&self.key_prefix));
        let mut shown = HashSet::new();
        let mut session = self.session()?;
        let mut cursor = b"0".to_vec();
        loop {
            let mut scan = cmd("SCAN");
            scan.arg(&*cursor).arg("MATCH").arg(&pattern);
            scan.arg("COUNT").arg(PIPELINE);
            let page = session.call(&[scan])?.pop();
            let Some((next, mut keys)) = page.and_then(scanned) else {
                return Err(self.failure("answers what is no answer", "to SCAN"));
            };
            keys.retain(|key| self.key_of(key).is_some() && shown.insert(key.clone()));
            for keys in keys.chunks(PIPELINE) {
                let commands: Vec<_> = keys.iter().flat_map(read_commands).collect();
                let answers = session.call(&commands)?;
                for (key, answers) in keys.iter().zip(answers.chunks_exact(2)) {
                    let record = self.read_with_expiry(&answers[0], &answers[1]);
                    if let (Some(key), Some(record)) = (self.key_of(key), record) {
                        visit(&key, record);
                    }
                }
            }
            if next == b"0" {
                break;
            }
            cursor = next;
        }
        session.give_back();
        Ok(())
    }

    /// Asks whether the server is there; it has already answered every write.
    fn flush(&self) -> Result<(), BackendError> {
        let mut session = self.session()?;
        session.call(&[cmd("PING")])?;
        session.give_back();
        Ok(())
    }

    fn malformed(&self) -> u64 {
        self.server.malformed.get()
    }
}

impl fmt::Debug for RedisBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisBackend")
            .field("server", &self.server.name())
            .field("key_prefix", &self.key_prefix)
            .field("form", &self.form)
            .finish_non_exhaustive()
    }
}

impl Server {
    fn new(client: Client, sentinels: Vec<Client>, service: String) -> Self {
        Self {
            client,
            sentinels,
            service,
            idle: Mutex::default(),
            malformed: Counter::default(),
        }
    }

    fn name(&self) -> String {
        match &*self.sentinels {
            [] => format!("at {}", self.client.get_connection_info().addr()),
            _ => format!("{:?} of its sentinels", self.service),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is under a key.
enum Found {
    Nothing,
    Malformed,
    Record(Record),
}

/// One connection, which is closed unless it is given back: after an error nobody knows which answer comes next.
struct Session<'a> {
    backend: &'a RedisBackend,
    connection: Connection,
    /// It was idle before, and the server may have closed it since.
    reused: bool,
}

impl Session<'_> {
    /// The answer of each command. An error among them fails the call, unless it tells that a value is no string.
    fn call(&mut self, commands: &[Cmd]) -> Result<Vec<Value>, BackendError> {
        let mut answers = self.exchange(commands);
        if self.reused && matches!(&answers, Err(error) if error.is_connection_dropped()) {
            // The others are as old.
            self.backend.server.idle().clear();
            self.connection = self.backend.open()?;
            answers = self.exchange(commands);
        }
        self.reused = false;
        let answers = answers.map_err(|error| self.backend.failure("does not answer", error))?;
        for answer in &answers {
            match answer {
                Value::ServerError(error) if error.code() != "WRONGTYPE" => {
                    let error = RedisError::from(error.clone());
                    return Err(self.backend.failure("refuses", error));
                }
                _ => {}
            }
        }
        Ok(answers)
    }

    /// As a pipeline of the client does it, which however waits for every answer for as long again after the first one
    /// has failed to come.
    fn exchange(&mut self, commands: &[Cmd]) -> RedisResult<Vec<Value>> {
        let deadline = Instant::now() + self.backend.response_timeout;
        let mut packed = Vec::new();
        for command in commands {
            command.write_packed_command(&mut packed);
        }
        self.connection.send_packed_command(&packed)?;
        let mut answers = Vec::with_capacity(commands.len());
        for _ in commands {
            if Instant::now() > deadline {
                return Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into());
            }
            answers.push(self.connection.recv_response()?);
        }
        Ok(answers)
    }

    fn write(&mut self, writes: &[Write]) -> Result<Vec<Option<Record>>, BackendError> {
        let commands: Vec<_> = writes
            .iter()
            .map(|write| self.backend.command(write))
            .collect();
        let answers = self.call(&commands)?;
        let (mut winners, mut malformed) = (vec![None; writes.len()], Vec::new());
        for (at, answer) in answers.iter().enumerate() {
            if let Write::PutIfAbsent(..) = writes[at] {
                match self.backend.read(answer) {
                    Found::Nothing => {}
                    Found::Malformed => malformed.push(at),
                    Found::Record(winner) => winners[at] = Some(winner),
                }
            }
        }
        self.read_expiries(writes, &mut winners)?;

        let mut replaced = HashSet::new();
        for at in malformed {
            let Write::PutIfAbsent(key, record) = &writes[at] else {
                continue;
            };
            if !replaced.insert(key) {
                continue;
            }
            winners[at] = self.replace(key, record)?;
            // What came after it has to be written after it.
            let of_key = |at: &usize| writes[*at].key() == key;
            let later: Vec<_> = (at + 1..writes.len()).filter(of_key).collect();
            if !later.is_empty() {
                let again: Vec<_> = later.iter().map(|&at| writes[at].clone()).collect();
                for (at, winner) in later.into_iter().zip(self.write(&again)?) {
                    winners[at] = winner;
                }
            }
        }
        Ok(winners)
    }

    /// The expiry in a value is that of its writing; the server knows better.
    fn read_expiries(
        &mut self,
        writes: &[Write],
        winners: &mut [Option<Record>],
    ) -> Result<(), BackendError> {
        let lost: Vec<_> = (0..winners.len())
            .filter(|&at| winners[at].is_some())
            .collect();
        if lost.is_empty() {
            return Ok(());
        }
        let expiry = |&at: &usize| on_key("PEXPIRETIME", self.backend.key(writes[at].key()), &[]);
        let commands: Vec<_> = lost.iter().map(expiry).collect();
        for (at, expiry) in lost.into_iter().zip(self.call(&commands)?) {
            winners[at] = winners[at].take().map(|winner| {
                let own = winner.clone();
                expiring(winner, &expiry).unwrap_or(own)
            });
        }
        Ok(())
    }

    /// Puts a record in place of what cannot be decoded, unless somebody else has been faster: the winner then.
    fn replace(&mut self, key: &str, record: &Record) -> Result<Option<Record>, BackendError> {
        let on_server = self.backend.key(key);
        for _ in 0..REPLACEMENTS {
            let mut commands = vec![on_key("WATCH", &on_server, &[])];
            commands.extend(read_commands(&on_server));
            let answers = self.call(&commands)?;
            if let Found::Record(winner) = found(&answers[1]) {
                self.call(&[cmd("UNWATCH")])?;
                let own = winner.clone();
                return Ok(Some(expiring(winner, &answers[2]).unwrap_or(own)));
            }
            let set = self.backend.set(&on_server, key, record);
            match self.call(&[cmd("MULTI"), set, cmd("EXEC")])?.pop() {
                Some(Value::Array(_)) => return Ok(None),
                Some(Value::Nil) => {}
                _ => return Err(self.backend.failure("answers what is no answer", "to EXEC")),
            }
        }
        Err(self
            .backend
            .failure("changes a value all the time", on_server))
    }

    fn give_back(self) {
        let mut idle = self.backend.server.idle();
        if idle.len() < IDLE {
            idle.push(self.connection);
        }
    }
}

fn found(value: &Value) -> Found {
    let record = match value {
        Value::Nil => return Found::Nothing,
        Value::BulkString(bytes) if bytes.first() == Some(&b'{') => json::decode(bytes),
        Value::BulkString(bytes) => codec::decode(bytes),
        // Not even a string.
        _ => None,
    };
    record.map_or(Found::Malformed, Found::Record)
}

/// Connects to nothing yet.
fn client(url: &str) -> Result<Client, ConnectError> {
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

fn at_least_a_moment(timeout: Duration) -> Duration {
    timeout.max(Duration::from_millis(1))
}

fn on_key(name: &str, key: impl redis::ToRedisArgs, arguments: &[u64]) -> Cmd {
    let mut command = cmd(name);
    command.arg(key).arg(arguments);
    command
}

fn read_commands(key: impl redis::ToRedisArgs + Copy) -> [Cmd; 2] {
    [on_key("GET", key, &[]), on_key("PEXPIRETIME", key, &[])]
}

/// The record with the expiry that the server has for its key; `None` where it is over by all that is known.
fn expiring(mut record: Record, expiry: &Value) -> Option<Record> {
    if let Value::Int(ms @ 1..) = *expiry {
        record.expires_at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms as u64))?;
        return Some(record);
    }
    // Somebody else wrote it without an expiry.
    (record.expires_at > SystemTime::now()).then_some(record)
}

/// Since 1970; not zero, which the server does not take.
fn milliseconds(time: SystemTime) -> u64 {
    let since_epoch = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    // More than a signed number can hold is no time at all.
    since_epoch.as_millis().clamp(1, i64::MAX as u128) as u64
}

/// The next cursor and the keys in an answer to `SCAN`.
fn scanned(answer: Value) -> Option<(Vec<u8>, Vec<Vec<u8>>)> {
    fn bytes(value: Value) -> Option<Vec<u8>> {
        match value {
            Value::BulkString(bytes) => Some(bytes),
            _ => None,
        }
    }
    let Value::Array(parts) = answer else {
        return None;
    };
    let [cursor, Value::Array(keys)] = <[Value; 2]>::try_from(parts).ok()? else {
        return None;
    };
    Some((
        bytes(cursor)?,
        keys.into_iter().map(bytes).collect::<Option<_>>()?,
    ))
}

/// A pattern of `SCAN` that stands for the text itself.
fn escaped(text: &str) -> String {
    let mut pattern = String::new();
    for letter in text.chars() {
        if matches!(letter, '*' | '?' | '[' | ']' | '\\') {
            pattern.push('\\');
        }
        pattern.push(letter);
    }
    pattern
}
