//! The backend on a Redis server or Cluster.

mod cluster;
mod command;
mod connect;
mod hash_tag;
mod node;
mod topology;
mod wire;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use redis::{Cmd, Value};

use self::cluster::{Cluster, Reply};
use self::command::Found;
use self::connect::client;
use self::node::{Node, Replies, Session, Timeouts};
use super::form::Form;
use super::outcomes::fail_later_writes;
use super::url::ConnectError;
use crate::backend::{BackendError, Record, StorageBackend, Write, WriteOutcome};
use crate::clock::{Clock, SystemClock};
use crate::stats::Counter;

const KEY_PREFIX: &str = "workflow-context:";
const TIMEOUT: Duration = Duration::from_secs(1);
const MIN_TIMEOUT: Duration = Duration::from_millis(1);

/// Number of commands that are sent before the replies are read.
const PIPELINE: usize = 1000;

/// A backend on a [Redis] or Valkey server of version 7 or later, which any number of machines share: a single server,
/// the master that [sentinels](Self::with_sentinels) name, or a [Cluster](Self::connect_cluster).
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
/// | [`with_replicas`](Self::with_replicas) | 0 |
///
/// # When the server is down
///
/// Telemetry fails open: a server that cannot be reached is no error of [`connect`](Self::connect), which does not
/// connect yet. A storage that is built with it connects in the background, and each call does after a connection was
/// lost; an idle connection that the server has closed is replaced without an error. While calls fail, the storage pauses
/// between attempts, from 100 milliseconds up to 5 seconds with jitter, keeps what is to be written, and counts in
/// [`backend_errors`](crate::Stats::backend_errors).
///
/// A call waits for the server no longer than the two timeouts allow, for each 1,000 writes, however slowly its replies come.
/// Writes that took longer are tried again in smaller groups, down to single ones, so that a slow server gets on.
/// The time to resolve the name is up to the operating system.
///
/// # Cluster
///
/// All keys of an instance are in one hash slot, and so on one server; a group of writes goes to all its servers at once.
/// Only masters are asked. Slots that move to another server are followed (`MOVED`, `ASK`), and so are replicas that
/// take over.
///
/// A server that fails is marked down until it replies to a thread that pings it with the same pauses. Meanwhile,
/// spans of its instances fail open at once, and what they write is kept as above; those of the other servers are not
/// affected. If a server hangs instead of refusing connections, one call waits for it, for at most the response timeout,
/// and the lookups behind that call wait too. What one server did not reply to in time is tried again all at once: a server
/// that is slow, not down, needs a response timeout that is long enough. All this requires a Cluster that itself works
/// without some of its slots: `cluster-require-full-coverage no`, or a replica for each master.
///
/// # Keys and permissions
///
/// There is one string for each instance, and one for each of its runs and of its second, third, ... traces. The key of
/// instance `order-42` is `workflow-context:{order-42}`; the others have more text after the brace, so all of them
/// share one hash slot. Braces in an id are escaped, `{` as U+001E and `<`, `}` as U+001E and `>`, and U+001E as U+001E
/// and `=`. So no two instances share a key, whatever their ids and the prefixes of their workers are.
/// The server is told how long a key is to live, and removes it by its own clock, so the clocks of the machines need not agree.
///
/// The user needs `SET`, `GETRANGE`, `DEL`, `PEXPIRE`, `PTTL` and `PING`; a Cluster also `CLUSTER SLOTS` and `ASKING`, and a
/// [scan](StorageBackend::scan), which a storage never makes, `SCAN`.
///
/// Values that others write are not trusted. One that cannot be decoded, of a newer version of this crate or of another type, is
/// counted in [`malformed`](crate::Stats::malformed), and treated as missing. It is left alone: the claim of a context in its
/// place is given up, and told by the next [flush](crate::WorkflowContextStorage::flush). Only a
/// [call](crate::WorkflowContextStorage::store) replaces it. Of each value, 256 KiB are read at most.
///
/// # Eviction
///
/// Use `maxmemory-policy noeviction`, with memory for what the fleet needs: a full server then refuses writes, which are tried
/// again and told by each flush. Where it has to evict, `volatile-ttl` takes the keys that expire first: those of ended instances
/// and of those unused for longest. The `lru`, `lfu` and `random` policies take instances under way as well. What a server
/// loses is given back by a worker that still has it ([`given_back`](crate::Stats::given_back)), at its next comparison: within
/// 4 minutes by default. A worker that meets the gap before begins a new trace, which the others then follow.
///
/// # Refused writes
///
/// A server may refuse single commands: those that need memory which it has not (`OOM`), or keys that the user may not
/// write (`NOPERM`). What is refused is set aside and tried again after the pauses above, with later writes of its key;
/// all others go on, those first that free memory. A [flush](crate::WorkflowContextStorage::flush) fails as long as
/// something is refused, and names the first cause.
///
/// # What can be lost
///
/// A write is done when the server has replied, and as many [replicas](Self::with_replicas) as are set. Whether it survives a
/// crash of the server depends on the persistence and replication of the server.
///
/// # TLS
///
/// Feature `redis-tls` accepts URLs that begin with `rediss://`. The certificate of the server is verified with the
/// roots of the operating system, or those in the file that the variable `SSL_CERT_FILE` names. A URL that ends with
/// `#insecure`, to do without, is refused. If the process has not
/// installed a cryptography provider for rustls when the backend is created, that of `ring` is installed.
///
/// # Not supported
///
/// Reading from replicas, and databases other than 0 of a Cluster without them. RESP2 is spoken, whatever `protocol` the URL
/// names.
///
/// # Locking
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
    /// The number of replicas that have to confirm a write.
    replicas: u32,
    clock: Arc<dyn Clock>,
}

#[derive(Clone)]
enum Servers {
    One(Arc<Node>),
    Cluster(Arc<Cluster>),
}

impl RedisBackend {
    /// Creates a backend on the server of a URL: `redis://user:password@host:port/database`, of which only the host is
    /// required, `rediss://` for [TLS](Self#tls), or `redis+unix:///path`.
    ///
    /// It connects when a storage is built with it, see [above](Self#when-the-server-is-down).
    ///
    /// # Errors
    ///
    /// [`ConnectError::InvalidUrl`]. A server that is down is no error here.
    pub fn connect(url: &str) -> Result<Self, ConnectError> {
        let node = Node::new(client(url)?);
        Ok(Self::with_servers(Servers::One(Arc::new(node))))
    }

    /// Creates a backend on a [Cluster](Self#cluster). The URLs are asked for all its servers, one after the other until
    /// one replies. The settings of the first URL, all but its host and port, hold for all servers.
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
    /// [`ConnectError::InvalidUrl`] if one of them is invalid, and [`ConnectError::NoUrl`] if there are none. Servers
    /// that are down are no error here.
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
        let cluster = Cluster::new(seeds);
        Ok(Self::with_servers(Servers::Cluster(Arc::new(cluster))))
    }

    fn with_servers(servers: Servers) -> Self {
        Self {
            servers,
            malformed: Arc::default(),
            key_prefix: KEY_PREFIX.into(),
            form: Form::default(),
            clock: Arc::new(SystemClock),
            timeouts: Timeouts {
                connect: TIMEOUT,
                response: TIMEOUT,
                replicas: 0,
            },
            replicas: 0,
        }
    }

    /// Asks sentinels, one after the other, for the master of a service, for each new connection and so also after a
    /// failover. The settings of the URL given to [`connect`](Self::connect), all but its host and port, hold for the
    /// master. A Cluster does without sentinels; with them, this is no backend on a Cluster any more.
    ///
    /// By default, there are no sentinels. Earlier clones do not share connections with the result.
    ///
    /// # Errors
    ///
    /// [`ConnectError::InvalidUrl`] if the URL of a sentinel is invalid.
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
        let node = Node::with_sentinels(client.clone(), sentinels, service.to_owned());
        self.servers = Servers::One(Arc::new(node));
        Ok(self)
    }

    /// Sets the prefix of all keys. Workers that share contexts need the same one. With braces in the prefix, all keys
    /// may fall into one hash slot, or, if nothing is between them, the keys of one instance into several. U+001D, U+001E
    /// and U+001F in it are escaped, as in an instance id.
    ///
    /// By default, `workflow-context:`.
    #[must_use]
    pub fn with_key_prefix(mut self, prefix: &str) -> Self {
        self.key_prefix = hash_tag::clean_prefix(prefix).into();
        self
    }

    /// Sets the form of the values that are written.
    ///
    /// By default, [`Form::Binary`].
    #[must_use]
    pub fn with_form(mut self, form: Form) -> Self {
        self.form = form;
        self
    }

    /// Sets the longest wait for a connection, with the login.
    ///
    /// By default, 1 second; at least 1 millisecond.
    #[must_use]
    pub fn with_connect_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.connect = timeout.max(MIN_TIMEOUT);
        self
    }

    /// Sets the longest wait for the replies to a group of commands.
    ///
    /// By default, 1 second; at least 1 millisecond.
    #[must_use]
    pub fn with_response_timeout(mut self, timeout: Duration) -> Self {
        self.timeouts.response = timeout.max(MIN_TIMEOUT);
        self
    }

    /// Sets the number of replicas that have to confirm a write before it counts as done, by `WAIT`, for which the user needs the
    /// permission. A write that fewer confirm within half of the [response timeout](Self::with_response_timeout) is set aside and
    /// tried again as a [refused](Self#refused-writes) one, so a [flush](crate::WorkflowContextStorage::flush) that answers `Ok`
    /// means that so many replicas have all that was stored before it. What the server has is read meanwhile.
    ///
    /// It takes a round trip to the replicas for each group of writes, on a thread for which no span waits. A failover loses what
    /// was confirmed only if a replica takes over that has not confirmed it; no such replica is left if this is the number of
    /// replicas.
    ///
    /// By default, 0: replication is not waited for.
    #[must_use]
    pub fn with_replicas(mut self, replicas: u32) -> Self {
        self.replicas = replicas;
        self
    }

    /// Sets the clock by which the lifetimes of records are measured; for tests.
    ///
    /// By default, the operating system's clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    fn key(&self, key: &str) -> String {
        hash_tag::to_server(&self.key_prefix, key)
    }

    fn ask(&self, commands: &[Cmd]) -> Vec<Reply> {
        self.servers.ask(commands, self.timeouts)
    }

    /// Asks as [`ask`](Self::ask) does, and waits for the replicas that have to confirm.
    fn ask_to_write(&self, commands: &[Cmd]) -> Vec<Reply> {
        let timeouts = Timeouts {
            replicas: self.replicas,
            ..self.timeouts
        };
        self.servers.ask(commands, timeouts)
    }

    /// Returns the replies, or the first error.
    fn ask_all(&self, commands: &[Cmd]) -> Result<Vec<Value>, BackendError> {
        self.ask(commands).into_iter().collect()
    }

    /// Adds the commands of a write: one, or two for a claim.
    fn add_commands(&self, write: &Write, commands: &mut Vec<Cmd>) {
        let (on_server, now) = (self.key(write.key()), self.clock.now());
        let left = |at: SystemTime| at.duration_since(now).unwrap_or_default();
        match write {
            Write::Put(key, record) => {
                let value = self.form.encode(key, record);
                commands.push(command::set(&on_server, value, left(record.expires_at)));
            }
            Write::PutIfAbsent(key, record) => {
                let value = self.form.encode(key, record);
                let set = command::set_if_absent(&on_server, value, left(record.expires_at));
                commands.extend([set, command::read_value(&*on_server)]);
            }
            Write::Expire(_, at) => commands.push(command::expire(&on_server, left(*at))),
            Write::Remove(_) => commands.push(command::on_key("DEL", &on_server, &[])),
        }
    }

    /// Reads the replies to [`command::read`], and counts a malformed value.
    fn read_record(&self, value: &Value, expiry: &Value) -> Option<Record> {
        let mut record = match command::found_at(value, expiry) {
            Found::Record(record) => record,
            Found::Nothing => return None,
            Found::Malformed => {
                self.malformed.add();
                return None;
            }
        };
        let now = self.clock.now();
        if let Some(at) = command::expiry(expiry, now) {
            record.expires_at = at;
            return Some(record);
        }
        // Another program wrote it without an expiry on the server.
        (record.expires_at > now).then_some(record)
    }
}

impl StorageBackend for RedisBackend {
    /// Opens the two connections that a storage uses; of a Cluster, finds its servers and connects to one.
    fn connect(&self) -> Result<(), BackendError> {
        match &self.servers {
            Servers::Cluster(cluster) => cluster.ping(self.timeouts),
            Servers::One(node) => {
                let both = [node.session(self.timeouts)?, node.session(self.timeouts)?];
                both.into_iter().try_for_each(Session::ping)
            }
        }
    }

    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        let mut outcomes = Vec::with_capacity(writes.len());
        for group in writes.chunks(PIPELINE) {
            let group = self.write_group(group);
            // What a server refuses is partial.
            let error = (group.iter().filter_map(failure)).find(|error| !error.is_partial());
            if let (Servers::One(_), Some(error)) = (&self.servers, error) {
                return Err(error.clone());
            }
            outcomes.extend(group);
        }
        let error = (outcomes.iter().filter_map(failure)).find(|error| !error.is_partial());
        if let Some(error) = error.filter(|_| !self.servers.is_any_up()) {
            return Err(error.clone());
        }
        fail_later_writes(writes, &mut outcomes);
        Ok(outcomes)
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        let mut found = self.get_many(&[key.to_owned()])?;
        Ok(found.pop().flatten())
    }

    fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Record>>, BackendError> {
        let mut records = Vec::with_capacity(keys.len());
        for some in keys.chunks(PIPELINE / 2) {
            let commands: Vec<_> = (some.iter())
                .flat_map(|key| command::read(&*self.key(key)))
                .collect();
            let replies = self.ask_all(&commands);
            let replies = replies.map_err(|error| self.servers.scoped(error))?;
            if replies.len() != commands.len() {
                return Err(self.servers.distrusted());
            }
            for both in replies.chunks_exact(2) {
                match both {
                    [value, expiry @ Value::Int(_)] => {
                        records.push(self.read_record(value, expiry))
                    }
                    _ => return Err(self.servers.distrusted()),
                }
            }
        }
        Ok(records)
    }

    /// Visits all masters of a Cluster. Remembers every key, to visit it once. Keys that others add or remove during the
    /// scan, and those that a Cluster moves to another server, may be visited or not.
    fn scan(&self, visit: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        let mut visited = HashSet::new();
        match &self.servers {
            Servers::One(node) => self.scan_node(node, &mut visited, visit),
            Servers::Cluster(cluster) => {
                for master in cluster.masters(self.timeouts)? {
                    self.scan_node(master.node(), &mut visited, visit)?;
                }
                Ok(())
            }
        }
    }

    /// Succeeds if the server replies, or any server of a Cluster: each write that is done was replied to.
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

impl RedisBackend {
    /// Carries out at most [`PIPELINE`] writes.
    fn write_group(&self, writes: &[Write]) -> Vec<WriteOutcome> {
        let order = freeing_first(writes);
        let mut commands = Vec::with_capacity(writes.len());
        for &at in &order {
            self.add_commands(&writes[at], &mut commands);
        }
        let mut replies = self.ask_to_write(&commands).into_iter();
        let mut malformed = Vec::new();
        let mut outcomes = vec![WriteOutcome::Done; writes.len()];
        let mut next = |is_expected: fn(&Value) -> bool| match replies.next() {
            Some(Ok(reply)) if !is_expected(&reply) => Err(self.servers.distrusted()),
            reply => reply.unwrap_or(Ok(Value::Nil)),
        };
        for at in order {
            let result = match &writes[at] {
                Write::PutIfAbsent(..) => claimed(
                    next(|reply| matches!(reply, Value::Okay | Value::Nil)),
                    next(|_| true),
                ),
                Write::Put(..) => next(|reply| *reply == Value::Okay).map(|_| Claimed::Done),
                _ => next(|reply| matches!(reply, Value::Int(_))).map(|_| Claimed::Done),
            };
            match result {
                Ok(Claimed::Done) => {}
                Ok(Claimed::Existing(record)) => outcomes[at] = WriteOutcome::Existing(record),
                Ok(Claimed::Malformed) => malformed.push(at),
                Err(error) => {
                    outcomes[at] = WriteOutcome::Failed(error.on_key(writes[at].key()));
                }
            }
        }
        self.read_expiries(writes, &mut outcomes);

        let mut done = HashSet::new();
        for at in malformed {
            let key = writes[at].key();
            if done.contains(key) {
                continue;
            }
            outcomes[at] = match self.look_again(key) {
                Ok(Found::Record(existing)) => WriteOutcome::Existing(existing),
                Ok(Found::Malformed) => {
                    self.malformed.add();
                    WriteOutcome::Unreadable
                }
                Err(error) => WriteOutcome::Failed(error.on_key(key)),
                // It has expired just now. The later writes on the key have to be carried out after the claim.
                Ok(Found::Nothing) => {
                    done.insert(key);
                    let of_key = |at: &usize| writes[*at].key() == key;
                    let these: Vec<_> = (at..writes.len()).filter(of_key).collect();
                    let again: Vec<_> = these.iter().map(|&at| writes[at].clone()).collect();
                    for (at, outcome) in these.into_iter().zip(self.write_group(&again)) {
                        outcomes[at] = outcome;
                    }
                    continue;
                }
            };
        }
        outcomes
    }

    /// Reads what is under a key at which a claim has found nothing that it can read.
    fn look_again(&self, key: &str) -> Result<Found, BackendError> {
        let replies = self.ask_all(&command::read(&*self.key(key)))?;
        let [value, expiry] = &*replies else {
            return Err(self.servers.distrusted());
        };
        let mut found = command::found_at(value, expiry);
        if let Found::Record(record) = &mut found {
            record.expires_at =
                (command::expiry(expiry, self.clock.now())).unwrap_or(record.expires_at);
        }
        Ok(found)
    }

    /// Takes the expiries of existing records from the server: those in the values are older.
    fn read_expiries(&self, writes: &[Write], outcomes: &mut [WriteOutcome]) {
        let is_existing = |&at: &usize| outcomes[at].existing().is_some();
        let existing: Vec<_> = (0..outcomes.len()).filter(is_existing).collect();
        let command = |&at: &usize| {
            let key = self.key(writes[at].key());
            command::lifetime(key)
        };
        let commands: Vec<_> = existing.iter().map(command).collect();
        let replies = self.ask(&commands);
        let now = self.clock.now();
        for (at, reply) in existing.into_iter().zip(replies) {
            match (reply, &mut outcomes[at]) {
                (Ok(expiry), WriteOutcome::Existing(record)) => {
                    record.expires_at = command::expiry(&expiry, now).unwrap_or(record.expires_at);
                }
                (Ok(_), _) => {}
                (Err(error), outcome) => *outcome = WriteOutcome::Failed(error),
            }
        }
    }

    fn scan_node(
        &self,
        node: &Node,
        visited: &mut HashSet<Vec<u8>>,
        visit: &mut dyn FnMut(&str, Record),
    ) -> Result<(), BackendError> {
        let prefix = format!("{}{{", self.key_prefix);
        let key_of = |on_server: &[u8]| hash_tag::from_server(&self.key_prefix, on_server);
        let mut session = node.session(self.timeouts)?;
        let mut cursor = b"0".to_vec();
        loop {
            let page = session.call(&[command::scan(&cursor, &prefix, PIPELINE)])?;
            let page = page.into_iter().next().and_then(command::scanned);
            let Some((next, mut keys)) = page else {
                return Err(node.failure("unexpected reply to SCAN"));
            };
            keys.retain(|key| key_of(key).is_some() && visited.insert(key.clone()));
            for keys in keys.chunks(PIPELINE) {
                let commands: Vec<_> = keys.iter().flat_map(command::read).collect();
                let replies = self.ask_all(&commands)?;
                for (key, replies) in keys.iter().zip(replies.chunks_exact(2)) {
                    let record = self.read_record(&replies[0], &replies[1]);
                    if let (Some(key), Some(record)) = (key_of(key), record) {
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

impl Servers {
    fn name(&self) -> String {
        match self {
            Self::One(node) => node.name(),
            Self::Cluster(cluster) => {
                let seeds = cluster.seeds().iter();
                let addresses: Vec<_> = seeds
                    .map(|seed| seed.get_connection_info().addr().to_string())
                    .collect();
                format!("Redis Cluster {}", addresses.join(", "))
            }
        }
    }

    fn failure(&self, message: &str) -> BackendError {
        BackendError::new(format!("{}: {message}", self.name()), None)
    }

    /// Closes the connections after a reply that no Redis server gives, and returns that as an error: replies and commands may
    /// be out of step.
    fn distrusted(&self) -> BackendError {
        match self {
            Self::Cluster(cluster) => cluster.close_idle(),
            Self::One(node) => node.close_idle(),
        }
        self.scoped(self.failure("unexpected reply"))
    }

    /// Returns one reply for each command, of which the first argument is the key.
    fn ask(&self, commands: &[Cmd], timeouts: Timeouts) -> Vec<Reply> {
        if commands.is_empty() {
            return Vec::new();
        }
        match self {
            Self::Cluster(cluster) => cluster.ask(commands, timeouts),
            Self::One(node) => {
                let asked = node.session(timeouts).and_then(|mut session| {
                    let Replies {
                        values,
                        unconfirmed,
                    } = session.ask(commands)?;
                    let reply = |value: Value| match node::error_reply(&value) {
                        Some(error) => Err(node.refused_by(error)),
                        None => unconfirmed.clone().map_or(Ok(value), Err),
                    };
                    let replies: Vec<_> = values.into_iter().map(reply).collect();
                    let is_refused = |reply: &Reply| {
                        (reply.as_ref()).map_or_else(BackendError::is_partial, |_| true)
                    };
                    // Another connection may lead to the master that this server is no longer.
                    if replies.iter().all(is_refused) {
                        session.give_back();
                    }
                    Ok(replies)
                });
                asked.unwrap_or_else(|error| vec![Err(error); commands.len()])
            }
        }
    }

    /// Returns `true` for a Cluster of which some servers may go on after a failure.
    fn is_any_up(&self) -> bool {
        match self {
            Self::Cluster(cluster) => cluster.is_any_up(),
            Self::One(_) => false,
        }
    }

    /// Marks an error as partial if other servers of a Cluster go on.
    fn scoped(&self, error: BackendError) -> BackendError {
        match self.is_any_up() {
            true => error.partial(),
            false => error,
        }
    }
}

enum Claimed {
    Done,
    Existing(Record),
    /// Or gone since.
    Malformed,
}

/// Reads the replies to a claim: to the command that sets, and to the one that reads what is there.
fn claimed(set: Reply, there: Reply) -> Result<Claimed, BackendError> {
    let there = there.map(|value| command::found(&value));
    match (set, there) {
        // A server without memory refuses also what it would not have done.
        (Ok(Value::Nil) | Err(_), Ok(Found::Record(existing))) => Ok(Claimed::Existing(existing)),
        (Ok(Value::Nil), Ok(_)) => Ok(Claimed::Malformed),
        (Ok(Value::Nil), Err(error)) | (Err(error), _) => Err(error),
        (Ok(_), _) => Ok(Claimed::Done),
    }
}

/// Returns the indices of writes with those first that free memory and follow no other write on their key: a server that
/// lacks memory then has some for the others.
fn freeing_first(writes: &[Write]) -> Vec<usize> {
    let mut seen = HashSet::new();
    let mut is_freeing = |at: &usize| {
        let is_first = seen.insert(writes[*at].key());
        is_first && matches!(writes[*at], Write::Remove(_) | Write::Expire(..))
    };
    let (mut order, others): (Vec<_>, Vec<_>) = (0..writes.len()).partition(|at| is_freeing(at));
    order.extend(others);
    order
}

fn failure(outcome: &WriteOutcome) -> Option<&BackendError> {
    match outcome {
        WriteOutcome::Failed(error) => Some(error),
        WriteOutcome::Done | WriteOutcome::Existing(_) | WriteOutcome::Unreadable => None,
    }
}
