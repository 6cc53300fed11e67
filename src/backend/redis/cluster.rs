//! Several servers that share the hash slots of a Cluster.
//!
//! Commands go to the masters of their slots, to all of them at once. A master that fails is left alone until it answers
//! the keeper, a thread that there is only as long as something is amiss: nobody else waits for it meanwhile, and the
//! others are asked as ever.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use redis::{Arg, Client, Cmd, ConnectionAddr, Value, cmd};

use super::node::{self, Node, Session, Timeouts};
use crate::backend::BackendError;
use crate::backend::breaker::{BACKOFF, jittered};
use crate::lock::lock;

const SLOTS: u16 = 16 * 1024;

/// How often a command follows a slot that has moved.
const REDIRECTIONS: usize = 5;

/// Redis itself recommends no more than 1,000.
const MOST_MEMBERS: usize = 4096;

/// What came back.
pub(super) struct Answers {
    /// `None` where there is none.
    pub(super) values: Vec<Option<Value>>,
    /// Why, the first time.
    pub(super) error: Option<BackendError>,
}

/// Dropped with the last handle.
pub(super) struct Cluster(Arc<Shared>);

struct Shared {
    /// Where to ask for the others when none is known. Of the first all but the address holds for the others too.
    seeds: Vec<Client>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    members: HashMap<(String, u16), Arc<Member>>,
    /// By slot; empty before anything is known.
    masters: Vec<Option<Arc<Member>>>,
    /// A server has told otherwise.
    is_stale: bool,
    /// Something went amiss since the keeper last looked.
    has_news: bool,
    has_keeper: bool,
    closing: bool,
}

pub(super) struct Member {
    pub(super) node: Node,
    host: String,
    is_away: AtomicBool,
}

/// Where a command goes.
enum Way {
    Master,
    /// To whom its slot is just moving.
    Asking(Arc<Member>),
}

/// What one server is asked in one go.
struct Part {
    member: Arc<Member>,
    asking: bool,
    /// Of the commands.
    places: Vec<usize>,
}

impl Cluster {
    pub(super) fn new(seeds: Vec<Client>) -> Self {
        Self(Arc::new(Shared {
            seeds,
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    pub(super) fn seeds(&self) -> &[Client] {
        &self.0.seeds
    }

    /// Whether any server is not known to be away.
    pub(super) fn is_alive(&self) -> bool {
        let state = self.0.state();
        state.members.values().any(|member| !member.is_away())
    }

    /// Each command is on the key that is its first argument. Of those on one slot none is carried out before one that
    /// stands before it.
    pub(super) fn ask(&self, commands: &[Cmd], timeouts: Timeouts) -> Answers {
        let mut answers = Answers {
            values: vec![None; commands.len()],
            error: None,
        };
        if let Err(error) = self.know_slots(timeouts) {
            answers.error = Some(error);
            return answers;
        }
        let slots: Vec<_> = commands.iter().map(slot_of).collect();
        let mut pending: Vec<_> = (0..commands.len()).map(|at| (at, Way::Master)).collect();
        for _ in 0..=REDIRECTIONS {
            if pending.is_empty() {
                return answers;
            }
            let pending_now = std::mem::take(&mut pending);
            let parts = self.parts(&slots, pending_now, timeouts, &mut answers);
            let mut sent = Vec::with_capacity(parts.len());
            for part in &parts {
                let session = part.member.node.session(timeouts);
                sent.push(session.map(|mut session| {
                    let sent = part.send(&mut session, commands);
                    (session, sent)
                }));
            }
            for (part, sent) in parts.iter().zip(sent) {
                let received = sent.and_then(|(mut session, sent)| {
                    // Its own: the answers of one may have come while another one was waited for.
                    let deadline = Instant::now() + timeouts.response;
                    let values = session.receive(sent, deadline)?;
                    session.give_back();
                    Ok(values)
                });
                match received {
                    Ok(values) => {
                        self.sort_out(part, values, timeouts, &mut answers, &mut pending);
                    }
                    Err(error) => {
                        self.leave_alone(&part.member, timeouts);
                        answers.error.get_or_insert(error);
                    }
                }
            }
        }
        if !pending.is_empty() {
            let error = || BackendError::new("the Redis Cluster moves a slot all the time", None);
            answers.error.get_or_insert_with(error);
        }
        answers
    }

    /// The master of a slot, to talk to it alone.
    pub(super) fn master(
        &self,
        slot: u16,
        timeouts: Timeouts,
    ) -> Result<Arc<Member>, BackendError> {
        self.know_slots(timeouts)?;
        let state = self.0.state();
        let master = state.masters.get(usize::from(slot)).cloned().flatten();
        drop(state);
        match master {
            Some(master) if master.is_away() => Err(master.left_alone()),
            Some(master) => Ok(master),
            None => Err(self.no_master(slot, timeouts)),
        }
    }

    /// All of them; an error if one is away.
    pub(super) fn masters(&self, timeouts: Timeouts) -> Result<Vec<Arc<Member>>, BackendError> {
        self.know_slots(timeouts)?;
        let state = self.0.state();
        let mut masters: Vec<Arc<Member>> = Vec::new();
        for master in state.masters.iter().flatten() {
            // Slots lie in long ranges.
            let is_last = masters.last().is_some_and(|last| Arc::ptr_eq(last, master));
            if !is_last && !masters.iter().any(|known| Arc::ptr_eq(known, master)) {
                masters.push(master.clone());
            }
        }
        drop(state);
        match masters.iter().find(|master| master.is_away()) {
            Some(master) => Err(master.left_alone()),
            None => Ok(masters),
        }
    }

    /// Whether any of them answers.
    pub(super) fn ping(&self, timeouts: Timeouts) -> Result<(), BackendError> {
        self.know_slots(timeouts)?;
        let members: Vec<_> = self.0.state().members.values().cloned().collect();
        let mut result = Err(BackendError::new(
            "no server of the Redis Cluster answers",
            None,
        ));
        for member in members.iter().filter(|member| !member.is_away()) {
            result = member.node.session(timeouts).and_then(Session::ping);
            if result.is_ok() {
                break;
            }
            self.leave_alone(member, timeouts);
        }
        result
    }

    /// Nobody waits for it until it has answered the keeper.
    fn leave_alone(&self, member: &Arc<Member>, timeouts: Timeouts) {
        member.is_away.store(true, Relaxed);
        if !self.have_kept(false, timeouts) {
            // Without a thread that asks it whoever needs it has to.
            member.is_away.store(false, Relaxed);
        }
        member.node.close_idle();
    }

    /// Has the slots be asked for again.
    fn distrust(&self, timeouts: Timeouts) {
        self.have_kept(true, timeouts);
    }

    fn no_master(&self, slot: u16, timeouts: Timeouts) -> BackendError {
        self.distrust(timeouts);
        BackendError::new(
            format!("no server of the Redis Cluster has slot {slot}"),
            None,
        )
    }

    fn know_slots(&self, timeouts: Timeouts) -> Result<(), BackendError> {
        let is_known = !self.0.state().masters.is_empty();
        if is_known {
            return Ok(());
        }
        self.0.refresh(timeouts)
    }

    /// Who is asked what; what cannot be asked is an error in `answers`.
    fn parts(
        &self,
        slots: &[u16],
        pending: Vec<(usize, Way)>,
        timeouts: Timeouts,
        answers: &mut Answers,
    ) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut uncovered = None;
        let state = self.0.state();
        for (at, way) in pending {
            let slot = slots[at];
            let (member, asking) = match way {
                Way::Asking(member) => (member, true),
                Way::Master => match state.masters.get(usize::from(slot)).cloned().flatten() {
                    Some(master) => (master, false),
                    None => {
                        uncovered = Some(slot);
                        continue;
                    }
                },
            };
            if member.is_away() {
                answers.error.get_or_insert_with(|| member.left_alone());
                continue;
            }
            let is_its =
                |part: &&mut Part| Arc::ptr_eq(&part.member, &member) && part.asking == asking;
            match parts.iter_mut().find(is_its) {
                Some(part) => part.places.push(at),
                None => parts.push(Part {
                    member,
                    asking,
                    places: vec![at],
                }),
            }
        }
        drop(state);
        if let Some(slot) = uncovered {
            let error = self.no_master(slot, timeouts);
            answers.error.get_or_insert(error);
        }
        parts
    }

    /// Keeps what is an answer, and notes what has to go elsewhere.
    fn sort_out(
        &self,
        part: &Part,
        values: Vec<Value>,
        timeouts: Timeouts,
        answers: &mut Answers,
        pending: &mut Vec<(usize, Way)>,
    ) {
        // Each command has its `ASKING` before it.
        let skipped = usize::from(part.asking);
        let values = values.into_iter().skip(skipped).step_by(1 + skipped);
        for (&at, value) in part.places.iter().zip(values) {
            let Some(error) = node::refusal(&value) else {
                answers.values[at] = Some(value);
                continue;
            };
            let code = error.code().unwrap_or_default();
            let target = match code {
                "MOVED" | "ASK" => error.detail().and_then(|detail| self.target(detail, part)),
                _ => None,
            };
            match target {
                Some((_, member)) if code == "ASK" => pending.push((at, Way::Asking(member))),
                Some((slot, member)) => {
                    let mut state = self.0.state();
                    if let Some(master) = state.masters.get_mut(usize::from(slot)) {
                        *master = Some(member);
                    }
                    drop(state);
                    self.distrust(timeouts);
                    pending.push((at, Way::Master));
                }
                None => {
                    // Whoever answers thus may not be the master any more.
                    if matches!(code, "CLUSTERDOWN" | "READONLY" | "MASTERDOWN" | "LOADING") {
                        self.distrust(timeouts);
                    }
                    let error = || part.member.node.failure("refuses", error);
                    answers.error.get_or_insert_with(error);
                }
            }
        }
    }

    /// The slot and the server in `3999 127.0.0.1:6381`.
    fn target(&self, detail: &str, part: &Part) -> Option<(u16, Arc<Member>)> {
        let (slot, address) = detail.split_once(' ')?;
        let (host, port) = address.trim_end().rsplit_once(':')?;
        let slot = slot.parse().ok().filter(|slot| *slot < SLOTS)?;
        let host = match host {
            // Where it was asked.
            "" | "?" => &part.member.host,
            host => host,
        };
        let mut state = self.0.state();
        let member = self.0.member(&mut state, host, port.parse().ok()?)?;
        Some((slot, member))
    }

    /// `false` where there is no thread for a keeper.
    fn have_kept(&self, is_stale: bool, timeouts: Timeouts) -> bool {
        let mut state = self.0.state();
        state.is_stale |= is_stale;
        state.has_news = true;
        if state.has_keeper {
            self.0.changed.notify_all();
            return true;
        }
        state.has_keeper = true;
        drop(state);
        let shared = self.0.clone();
        let keeper = thread::Builder::new().name("workflow-context-cluster".to_owned());
        let spawned = keeper.spawn(move || shared.keep(timeouts)).is_ok();
        if !spawned {
            self.0.state().has_keeper = false;
        }
        spawned
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.0.state().closing = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Tries to mend what is amiss, after pauses that grow, until nothing is.
    fn keep(&self, timeouts: Timeouts) {
        let mut pause = BACKOFF.0;
        loop {
            if !self.pause(pause) {
                return;
            }
            let mut state = self.state();
            pause = match std::mem::take(&mut state.has_news) {
                true => BACKOFF.0,
                false => (pause * 2).min(BACKOFF.1),
            };
            state.is_stale = false;
            drop(state);
            let is_known = self.refresh(timeouts).is_ok();
            let members: Vec<_> = self.state().members.values().cloned().collect();
            for member in members.iter().filter(|member| member.is_away()) {
                let answers = member.node.new_session(timeouts).and_then(Session::ping);
                if answers.is_ok() {
                    member.is_away.store(false, Relaxed);
                }
            }
            let mut state = self.state();
            state.is_stale |= !is_known;
            let is_away = state.members.values().any(|member| member.is_away());
            if !state.is_stale && !is_away {
                state.has_keeper = false;
                return;
            }
        }
    }

    /// Until it is over, or a short one after news; `false` at the end of everything.
    fn pause(&self, pause: Duration) -> bool {
        let mut deadline = Instant::now() + jittered(pause);
        let mut state = self.state();
        let mut is_cut = pause <= BACKOFF.0;
        loop {
            if state.closing {
                return false;
            }
            if state.has_news && !is_cut {
                is_cut = true;
                deadline = deadline.min(Instant::now() + jittered(BACKOFF.0));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Asks for the slots: who is there first, and then who was named at the beginning.
    fn refresh(&self, timeouts: Timeouts) -> Result<(), BackendError> {
        let members: Vec<_> = self.state().members.values().cloned().collect();
        let ask = |node: &Node, host: &str| {
            let mut session = node.session(timeouts)?;
            let mut slots = cmd("CLUSTER");
            let answer = session.call(&[slots.arg("SLOTS").clone()])?.pop();
            session.give_back();
            match answer.and_then(|answer| ranges(answer, host)) {
                Some(ranges) => Ok(ranges),
                None => Err(node.failure("knows of no slots", "it answers no range of them")),
            }
        };
        let is_here = |member: &&Arc<Member>| !member.is_away();
        for member in members.iter().filter(is_here) {
            if let Ok(ranges) = ask(&member.node, &member.host) {
                self.know(ranges);
                return Ok(());
            }
        }
        let mut result = Err(BackendError::new("there is no URL", None));
        for seed in &self.seeds {
            let host = match seed.get_connection_info().addr() {
                ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => &**host,
                _ => "",
            };
            match ask(&Node::new(seed.clone()), host) {
                Ok(ranges) => {
                    self.know(ranges);
                    return Ok(());
                }
                Err(error) => result = Err(error),
            }
        }
        result
    }

    fn know(&self, ranges: Vec<Range>) {
        let mut state = self.state();
        let mut masters = vec![None; usize::from(SLOTS)];
        let mut members = HashMap::new();
        for Range {
            first,
            last,
            host,
            port,
        } in ranges
        {
            if let Some(member) = self.member(&mut state, &host, port) {
                masters[usize::from(first)..=usize::from(last)].fill(Some(member.clone()));
                members.insert((host, port), member);
            }
        }
        let old = (
            std::mem::replace(&mut state.masters, masters),
            std::mem::replace(&mut state.members, members),
        );
        drop(state);
        // Connections may be closed with it.
        drop(old);
    }

    /// The server of that address; `None` where there are too many, or it cannot be one.
    fn member(&self, state: &mut State, host: &str, port: u16) -> Option<Arc<Member>> {
        let address = (host.to_owned(), port);
        if let Some(member) = state.members.get(&address) {
            return Some(member.clone());
        }
        if state.members.len() >= MOST_MEMBERS {
            return None;
        }
        let client = node::at(self.seeds.first()?, host.to_owned(), port).ok()?;
        let member = Arc::new(Member {
            node: Node::new(client),
            host: host.to_owned(),
            is_away: AtomicBool::new(false),
        });
        state.members.insert(address, member.clone());
        Some(member)
    }
}

impl Member {
    fn is_away(&self) -> bool {
        self.is_away.load(Relaxed)
    }

    fn left_alone(&self) -> BackendError {
        self.node
            .failure("is left alone for a while", "it did not answer before")
    }
}

impl Part {
    fn send(&self, session: &mut Session<'_>, commands: &[Cmd]) -> node::Sent {
        let commands = self.places.iter().map(|&at| &commands[at]);
        if !self.asking {
            return session.send(commands);
        }
        let asking = cmd("ASKING");
        session.send(commands.flat_map(|command| [&asking, command]))
    }
}

/// Slots and their master.
struct Range {
    first: u16,
    last: u16,
    host: String,
    port: u16,
}

/// What `CLUSTER SLOTS` tells, without replicas; `asked` is whoever was asked. `None` where that is no range at all.
fn ranges(answer: Value, asked: &str) -> Option<Vec<Range>> {
    let Value::Array(ranges) = answer else {
        return None;
    };
    let ranges: Vec<_> = ranges
        .into_iter()
        .map(|range| {
            let (first, last, master): (u16, u16, Value) = match range {
                Value::Array(range) => {
                    let mut parts = range.into_iter();
                    let mut number = || match parts.next()? {
                        Value::Int(number) => u16::try_from(number).ok(),
                        _ => None,
                    };
                    (number()?, number()?, parts.next()?)
                }
                _ => return None,
            };
            let Value::Array(master) = master else {
                return None;
            };
            let mut master = master.into_iter();
            let host = match master.next()? {
                Value::BulkString(host) => String::from_utf8(host).ok()?,
                Value::SimpleString(host) => host,
                Value::Nil => String::new(),
                _ => return None,
            };
            let port = match master.next()? {
                Value::Int(port) => u16::try_from(port).ok()?,
                _ => return None,
            };
            // It does not know by which name it is reached.
            let host = match &*host {
                "" | "?" => asked.to_owned(),
                _ => host,
            };
            (first <= last && last < SLOTS).then_some(Range {
                first,
                last,
                host,
                port,
            })
        })
        .collect::<Option<_>>()?;
    (!ranges.is_empty()).then_some(ranges)
}

/// That of the key which is its first argument.
fn slot_of(command: &Cmd) -> u16 {
    match command.args_iter().nth(1) {
        Some(Arg::Simple(key)) => slot(key),
        _ => 0,
    }
}

/// The hash slot of a key: that of what stands between its first brace and the next closing one, if that is anything.
pub(super) fn slot(key: &[u8]) -> u16 {
    let tag = || {
        let start = key.iter().position(|&byte| byte == b'{')? + 1;
        let length = key[start..].iter().position(|&byte| byte == b'}')?;
        (length > 0).then(|| &key[start..start + length])
    };
    crc16(tag().unwrap_or(key)) % SLOTS
}

/// The one that is called XMODEM.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, &byte| {
        (0..8).fold(crc ^ (u16::from(byte) << 8), |crc, _| match crc >> 15 {
            0 => crc << 1,
            _ => (crc << 1) ^ 0x1021,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_that_servers_tell() {
        // By `CLUSTER KEYSLOT`.
        for (key, expected) in [
            ("123456789", 0x31c3),
            ("", 0),
            ("foo", 12182),
            ("{foo}bar", 12182),
            ("a{foo}{bar}", 12182),
            ("foo{}{bar}", 8363),
        ] {
            assert_eq!(slot(key.as_bytes()), expected % SLOTS, "{key:?}");
        }
    }

    #[test]
    fn what_is_no_list_of_slots_is_none() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let range = |first, last, host: Value, port| {
            let master = Value::Array(vec![host, Value::Int(port), text("id")]);
            Value::Array(vec![Value::Int(first), Value::Int(last), master])
        };
        let wrong = [
            Value::Nil,
            Value::Array(Vec::new()),
            Value::Array(vec![Value::Array(Vec::new())]),
            Value::Array(vec![Value::Array(vec![Value::Int(0), Value::Int(1)])]),
            Value::Array(vec![range(2, 1, text("host"), 1)]),
            Value::Array(vec![range(0, 16384, text("host"), 1)]),
            Value::Array(vec![range(-1, 1, text("host"), 1)]),
            Value::Array(vec![range(0, 1, text("host"), 65536)]),
            Value::Array(vec![range(0, 1, Value::Int(1), 1)]),
            Value::Array(vec![range(0, 1, Value::BulkString(vec![255]), 1)]),
        ];
        for answer in wrong {
            assert!(ranges(answer.clone(), "").is_none(), "{answer:?}");
        }
        let hosts = [text("host"), text("?"), text(""), Value::Nil]
            .map(|host| ranges(Value::Array(vec![range(0, 16383, host, 1)]), "asked"));
        let hosts = hosts.map(|ranges| ranges.expect("a range").remove(0).host);
        assert_eq!(hosts, ["host", "asked", "asked", "asked"]);
    }
}
