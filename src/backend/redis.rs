//! A backend on a server that many machines share.

mod cluster;
mod json;
mod node;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use redis::{Cmd, Value, cmd};

use self::cluster::{Answers, Cluster};
use self::node::{Node, Timeouts, client};
use super::{codec, keys};
use crate::backend::{BackendError, Record, StorageBackend, Write, WriteOutcome};
use crate::stats::Counter;

/// Ends the instance id in a key of the storage, where there is more than that.
const SEPARATOR: char = '\u{1f}';

const KEY_PREFIX: &str = "workflow-context:";
const TIMEOUT: Duration = Duration::from_secs(1);

/// How many commands go to the server before its answers are read.
const PIPELINE: usize = 1000;

/// Stands before the closing brace that an id begins with, since an empty tag would be none, and before itself there.
const BEFORE_BRACE: char = '\u{1e}';

/// How often a value that cannot be decoded is tried to be replaced while others change it.
const REPLACEMENTS: usize = 10;

/// A backend on a [Redis] or Valkey server of version 7 or later, which any number of machines share: a single one, the
/// master that [sentinels](Self::with_sentinels) name, or a [Cluster](Self::connect_cluster).
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
/// [`backend_errors`](crate::Stats::backend_errors). Each pause is cut by chance, down to half of it at most, so that a
/// fleet does not come back at one moment.
///
/// No call waits longer for the server than the two timeouts allow, for each 1,000 writes and each address that its
/// name has. How long the name itself takes is the operating system's matter.
///
/// # Cluster
///
/// All keys of an instance lie in one hash slot, so on one server; a group of writes goes to all its servers at once.
/// Only masters are asked. A slot that moves is followed (`MOVED`, `ASK`), and so is a replica that takes over.
///
/// A server that fails is left alone, with the same pauses, until it answers a thread that exists for this alone. Spans
/// of its instances fail open at once meanwhile, and what they write is kept as above; those of the other servers go on.
/// Where a server hangs instead of refusing, the others' lookups wait for it once, for the response timeout at most, and
/// one call waits for that long for each server that begins to hang. All this needs a Cluster that itself goes on
/// without some of its slots: `cluster-require-full-coverage no`, or a replica for each master.
///
/// # What is on the server
///
/// One string for each instance, and one for each of its runs and of its second, third, ... traces. The key of instance
/// `order-42` is `workflow-context:{order-42}`; the others have more text after the brace, which makes all of them
/// share one hash slot. In that of an id that begins with a closing brace, U+001E stands before it, since an empty tag
/// would be none. The server itself removes what has expired, by its own clock: the clocks of all machines must
/// agree within what is acceptable for the
/// [grace of a completed instance](crate::WorkflowContextStorageBuilder::completed_grace).
///
/// The user needs `SET`, `GET`, `DEL`, `PEXPIREAT`, `PEXPIRETIME`, `PING`, `WATCH`, `UNWATCH`, `MULTI` and `EXEC`;
/// a Cluster also `CLUSTER SLOTS` and `ASKING`, and a [scan](StorageBackend::scan), which a storage never makes, `SCAN`.
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
/// Reading from replicas, and databases other than 0 of a Cluster that has none.
///
/// Clones share connections. A lock is held only while an idle connection is taken or given back, or the server of a
/// slot is looked up.
///
/// [Redis]: https://redis.io
#[derive(Clone)]
pub struct RedisBackend {
    servers: Servers,
    malformed: Arc<Counter>,
    key_prefix: Arc<str>,
    form: Form,
    timeouts: Timeouts,
}

#[derive(Clone)]
enum Servers {
    One(Arc<Node>),
    Cluster(Arc<Cluster>),
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
    /// There is no URL among those of a Cluster.
    #[error("no URL was given")]
    NoUrl,
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
        Ok(Self::of(Servers::One(Arc::new(Node::new(client(url)?)))))
    }

    /// A backend on a [Cluster](Self#cluster), which is asked for its servers by way of any of those URLs, one after the
    /// other until one answers. Of the first URL all but the host and the port holds for the other servers too.
    ///
    /// ```no_run
    /// use tracing_workflow_context::RedisBackend;
    ///
    /// let backend = RedisBackend::connect_cluster(["redis://10.0.0.1:6379/", "redis://10.0.0.2:6379/"])?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ConnectError::InvalidUrl`] where one is none, [`ConnectError::NoUrl`], and nothing that has to do with servers.
    pub fn connect_cluster<'a>(
        urls: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, ConnectError> {
        let seeds = urls
            .into_iter()
            .map(client)
            .collect::<Result<Vec<_>, _>>()?;
        if seeds.is_empty() {
            return Err(ConnectError::NoUrl);
        }
        Ok(Self::of(Servers::Cluster(Arc::new(Cluster::new(seeds)))))
    }

    fn of(servers: Servers) -> Self {
        Self {
            servers,
            malformed: Arc::default(),
            key_prefix: KEY_PREFIX.into(),
            form: Form::default(),
            timeouts: Timeouts {
                connect: TIMEOUT,
                response: TIMEOUT,
            },
        }
    }

    /// Asks sentinels, by their URLs and one after the other, for the server: the master of that service. Asks again for
    /// each new connection, and so follows a failover. Of the URL given to [`connect`](Self::connect) all but the host
    /// and the port holds. A Cluster needs none, and is one no more with them.
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
        let client = match &self.servers {
            Servers::One(node) => node.client(),
            Servers::Cluster(cluster) => &cluster.seeds()[0],
        };
        let node = Node::of_sentinels(client.clone(), sentinels, service.to_owned());
        self.servers = Servers::One(Arc::new(node));
        Ok(self)
    }

    /// What all keys begin with: whatever shares contexts must have the same. With braces in it, all keys may fall
    /// into one hash slot, or, where nothing is between them, those of one instance into several.
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
        self.timeouts.connect = at_least_a_moment(timeout);
        self
    }

    /// How long to wait at most for an answer of the server.
    ///
    /// By default, 1 second; at least 1 millisecond.
    #[must_use]
    pub fn with_response_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.response = at_least_a_moment(timeout);
        self
    }

    fn failure(
        &self,
        what: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> BackendError {
        let name = self.servers.name();
        BackendError::new(
            format!("the Redis server {name} {what}"),
            Some(source.into()),
        )
    }

    /// The key on the server: two keys of one instance have the same text in the braces, up to the first that closes.
    fn key(&self, key: &str) -> String {
        let (id, rest) = key.split_at(key.find(SEPARATOR).unwrap_or(key.len()));
        let begins_with_brace = id.trim_start_matches(BEFORE_BRACE).starts_with('}');
        let before = if begins_with_brace { "\u{1e}" } else { "" };
        format!("{}{{{before}{id}}}{rest}", self.key_prefix)
    }

    /// The opposite of [`key`](Self::key); `None` for what it does not make.
    fn key_of(&self, on_server: &[u8]) -> Option<String> {
        let key = std::str::from_utf8(on_server).ok()?;
        let key = key.strip_prefix(&*self.key_prefix)?.strip_prefix('{')?;
        let (id, rest) = key.split_at(key.find(SEPARATOR).unwrap_or(key.len()));
        let id = id.strip_suffix('}')?;
        let id = match id.trim_start_matches(BEFORE_BRACE).starts_with('}') {
            true => id.strip_prefix(BEFORE_BRACE)?,
            false => id,
        };
        Some(format!("{id}{rest}"))
    }

    /// Each command is on the key that is its first argument.
    fn ask(&self, commands: &[Cmd]) -> Answers {
        match &self.servers {
            Servers::Cluster(cluster) => cluster.ask(commands, self.timeouts),
            Servers::One(node) => {
                let called = node.session(self.timeouts).and_then(|mut session| {
                    let answers = session.call(commands)?;
                    session.give_back();
                    Ok(answers)
                });
                let (values, error) = match called {
                    Ok(answers) => (answers.into_iter().map(Some).collect(), None),
                    Err(error) => (vec![None; commands.len()], Some(error)),
                };
                Answers { values, error }
            }
        }
    }

    /// Marks an error as partial if other nodes of a cluster go on.
    fn scoped(&self, error: BackendError) -> BackendError {
        match &self.servers {
            Servers::Cluster(cluster) if cluster.is_alive() => error.partial(),
            _ => error,
        }
    }

    fn encode(&self, key: &str, record: &Record) -> Vec<u8> {
        match self.form {
            Form::Binary => codec::encode(record),
            Form::Json => {
                let id = keys::instance_part(key);
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
            self.malformed.add();
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
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        let mut answers = Vec::with_capacity(writes.len());
        let mut failed = None;
        for group in writes.chunks(PIPELINE) {
            let mut written = self.write_group(group);
            answers.append(&mut written.answers);
            failed = failed.or(written.error);
            if failed.is_some() && !matches!(self.servers, Servers::Cluster(_)) {
                break;
            }
        }
        let error = match failed.map(|error| self.scoped(error)) {
            Some(error) if !error.is_partial() => return Err(error),
            error => error,
        };
        // After a failed write, no other on its key counts as carried out.
        let mut failed_keys = HashSet::new();
        let outcomes = writes
            .iter()
            .zip(answers)
            .map(|(write, answer)| match (answer, &error) {
                (Some(existing), _) if !failed_keys.contains(write.key()) => {
                    WriteOutcome::found(existing)
                }
                (_, Some(error)) => {
                    failed_keys.insert(write.key());
                    WriteOutcome::Failed(error.clone())
                }
                (existing, None) => WriteOutcome::found(existing.flatten()),
            });
        Ok(outcomes.collect())
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        let mut answers = self.ask(&read_commands(&self.key(key)));
        match (&*answers.values, answers.error.take()) {
            ([Some(value), Some(expiry)], _) => Ok(self.read_with_expiry(value, expiry)),
            (_, Some(error)) => Err(self.scoped(error)),
            _ => Err(self.failure("answers too little", key)),
        }
    }

    /// Remembers every key that it has shown. What others add or remove meanwhile may be shown or not, and what a Cluster
    /// moves from one server to another.
    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        let mut shown = HashSet::new();
        match &self.servers {
            Servers::One(node) => self.scan_node(node, &mut shown, visit),
            Servers::Cluster(cluster) => {
                for master in cluster.masters(self.timeouts)? {
                    self.scan_node(&master.node, &mut shown, visit)?;
                }
                Ok(())
            }
        }
    }

    /// Asks whether the server is there, or any of a Cluster; it has already answered every write.
    fn flush(&self) -> Result<(), BackendError> {
        match &self.servers {
            Servers::Cluster(cluster) => cluster.ping(self.timeouts),
            Servers::One(node) => node.session(self.timeouts)?.ping(),
        }
    }

    fn malformed(&self) -> u64 {
        self.malformed.get()
    }
}

impl fmt::Debug for RedisBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisBackend")
            .field("server", &self.servers.name())
            .field("key_prefix", &self.key_prefix)
            .field("form", &self.form)
            .finish_non_exhaustive()
    }
}

impl Servers {
    fn name(&self) -> String {
        match self {
            Self::One(node) => node.name(),
            Self::Cluster(cluster) => {
                let first = cluster
                    .seeds()
                    .first()
                    .map(|seed| seed.get_connection_info());
                let address = first.map_or_else(String::new, |info| info.addr().to_string());
                format!("of the Cluster around {address}")
            }
        }
    }
}

/// What is under a key.
enum Found {
    Nothing,
    Malformed,
    Record(Record),
}

/// What became of a group of writes.
struct Written {
    /// To each one; `None` where it was not carried out.
    answers: Vec<Option<Option<Record>>>,
    /// Why, the first time.
    error: Option<BackendError>,
}

impl RedisBackend {
    fn write_group(&self, writes: &[Write]) -> Written {
        let commands: Vec<_> = writes.iter().map(|write| self.command(write)).collect();
        let Answers { values, mut error } = self.ask(&commands);
        let (mut answers, mut malformed) = (vec![None; writes.len()], Vec::new());
        for (at, value) in values.iter().enumerate() {
            let Some(value) = value else {
                continue;
            };
            answers[at] = Some(None);
            if let Write::PutIfAbsent(..) = writes[at] {
                match self.read(value) {
                    Found::Nothing => {}
                    Found::Malformed => malformed.push(at),
                    Found::Record(winner) => answers[at] = Some(Some(winner)),
                }
            }
        }
        error = error.or(self.read_expiries(writes, &mut answers));

        let mut replaced = HashSet::new();
        for at in malformed {
            let Write::PutIfAbsent(key, record) = &writes[at] else {
                continue;
            };
            if !replaced.insert(key) {
                continue;
            }
            match self.replace(key, record) {
                Ok(winner) => answers[at] = Some(winner),
                Err(failed) => {
                    answers[at] = None;
                    error = error.or(Some(failed));
                    continue;
                }
            }
            // What came after it has to be written after it.
            let of_key = |at: &usize| writes[*at].key() == key;
            let later: Vec<_> = (at + 1..writes.len()).filter(of_key).collect();
            if !later.is_empty() {
                let again: Vec<_> = later.iter().map(|&at| writes[at].clone()).collect();
                let written = self.write_group(&again);
                error = error.or(written.error);
                for (at, answer) in later.into_iter().zip(written.answers) {
                    answers[at] = answer;
                }
            }
        }
        Written { answers, error }
    }

    /// The expiry in a value is that of its writing; the server knows better.
    fn read_expiries(
        &self,
        writes: &[Write],
        answers: &mut [Option<Option<Record>>],
    ) -> Option<BackendError> {
        let is_lost = |&at: &usize| matches!(answers[at], Some(Some(_)));
        let lost: Vec<_> = (0..answers.len()).filter(is_lost).collect();
        if lost.is_empty() {
            return None;
        }
        let command = |&at: &usize| on_key("PEXPIRETIME", self.key(writes[at].key()), &[]);
        let commands: Vec<_> = lost.iter().map(command).collect();
        let expiries = self.ask(&commands);
        for (at, expiry) in lost.into_iter().zip(expiries.values) {
            answers[at] = match (answers[at].take(), expiry) {
                (Some(Some(winner)), Some(expiry)) => {
                    let own = winner.clone();
                    Some(Some(expiring(winner, &expiry).unwrap_or(own)))
                }
                _ => None,
            };
        }
        expiries.error
    }

    /// Puts a record in place of what cannot be decoded, unless somebody else has been faster: the winner then.
    fn replace(&self, key: &str, record: &Record) -> Result<Option<Record>, BackendError> {
        let on_server = self.key(key);
        match &self.servers {
            Servers::One(node) => self.replace_on(node, &on_server, key, record),
            Servers::Cluster(cluster) => {
                let slot = cluster::slot(on_server.as_bytes());
                let master = cluster.master(slot, self.timeouts)?;
                self.replace_on(&master.node, &on_server, key, record)
            }
        }
    }

    fn replace_on(
        &self,
        node: &Node,
        on_server: &str,
        key: &str,
        record: &Record,
    ) -> Result<Option<Record>, BackendError> {
        let mut session = node.session(self.timeouts)?;
        for _ in 0..REPLACEMENTS {
            let mut commands = vec![on_key("WATCH", on_server, &[])];
            commands.extend(read_commands(on_server));
            let answers = session.call(&commands)?;
            if let Found::Record(winner) = found(&answers[1]) {
                session.call(&[cmd("UNWATCH")])?;
                session.give_back();
                let own = winner.clone();
                return Ok(Some(expiring(winner, &answers[2]).unwrap_or(own)));
            }
            let set = self.set(on_server, key, record);
            match session.call(&[cmd("MULTI"), set, cmd("EXEC")])?.pop() {
                Some(Value::Array(_)) => {
                    session.give_back();
                    return Ok(None);
                }
                Some(Value::Nil) => {}
                _ => return Err(node.failure("answers what is no answer", "to EXEC")),
            }
        }
        Err(node.failure("changes a value all the time", on_server))
    }

    fn scan_node(
        &self,
        node: &Node,
        shown: &mut HashSet<Vec<u8>>,
        visit: &mut dyn FnMut(&str, Record),
    ) -> Result<(), BackendError> {
        let pattern = format!("{}{{*", escaped(&self.key_prefix));
        let mut session = node.session(self.timeouts)?;
        let mut cursor = b"0".to_vec();
        loop {
            let mut scan = cmd("SCAN");
            scan.arg(&*cursor).arg("MATCH").arg(&pattern);
            scan.arg("COUNT").arg(PIPELINE);
            let page = session.call(&[scan])?.pop();
            let Some((next, mut keys)) = page.and_then(scanned) else {
                return Err(node.failure("answers what is no answer", "to SCAN"));
            };
            keys.retain(|key| self.key_of(key).is_some() && shown.insert(key.clone()));
            for keys in keys.chunks(PIPELINE) {
                let commands: Vec<_> = keys.iter().flat_map(read_commands).collect();
                let answers = self.ask(&commands);
                if let Some(error) = answers.error {
                    return Err(error);
                }
                for (key, answers) in keys.iter().zip(answers.values.chunks_exact(2)) {
                    let record = match answers {
                        [Some(value), Some(expiry)] => self.read_with_expiry(value, expiry),
                        _ => None,
                    };
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

fn at_least_a_moment(timeout: Duration) -> Duration {
    timeout.max(Duration::from_millis(1))
}

fn on_key(name: &str, key: impl redis::ToRedisArgs, arguments: &[u64]) -> Cmd {
    let mut command = cmd(name);
    command.arg(key).arg(arguments);
    command
}

fn read_commands(key: impl redis::ToRedisArgs + Copy) -> [Cmd; 2] {
    ["GET", "PEXPIRETIME"].map(|name| on_key(name, key, &[]))
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
