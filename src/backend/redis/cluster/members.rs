//! The servers of a Cluster: the master of each slot, the servers that are down, and the thread that brings both up to
//! date again.
//!
//! The thread exists only while a server is down or the slots are stale. It asks for the slots and pings the servers
//! that are down, with pauses that grow, so that no caller has to wait for them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use redis::{Client, ConnectionAddr, cmd};

use crate::backend::BackendError;
use crate::backend::breaker::{BACKOFF, jittered};
use crate::backend::redis::connect;
use crate::backend::redis::node::{Node, Session, Timeouts};
use crate::backend::redis::topology::{self, SLOTS, SlotRange};
use crate::lock::lock;

/// Limit of the number of servers. Redis itself recommends at most 1,000.
const MAX_MEMBERS: usize = 4096;

/// The handle. Dropping it ends the thread.
pub(super) struct Members(Arc<Shared>);

struct Shared {
    /// The servers to ask for the slots if no other is known. The settings of the first hold for all servers.
    seeds: Vec<Client>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    members: HashMap<(String, u16), Arc<Member>>,
    /// The master of each slot. Empty until the slots are known.
    masters: Vec<Option<Arc<Member>>>,
    /// A reply contradicted `masters`.
    is_stale: bool,
    /// Tells the recovery thread of a new problem, and ends it when dropped. `None` if there is no such thread.
    recovery: Option<SyncSender<()>>,
}

/// A server of a Cluster.
pub(in crate::backend::redis) struct Member {
    node: Node,
    host: String,
    is_down: AtomicBool,
}

impl Member {
    pub(in crate::backend::redis) fn node(&self) -> &Node {
        &self.node
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn is_down(&self) -> bool {
        self.is_down.load(Relaxed)
    }

    /// Returns the error of a command that was not sent because this server is down.
    pub(super) fn down(&self) -> BackendError {
        self.node.failure("marked down, circuit open")
    }
}

impl Members {
    pub(super) fn new(seeds: Vec<Client>) -> Self {
        let state = Mutex::default();
        Self(Arc::new(Shared { seeds, state }))
    }

    pub(super) fn seeds(&self) -> &[Client] {
        &self.0.seeds
    }

    pub(super) fn all(&self) -> Vec<Arc<Member>> {
        self.0.members()
    }

    /// Asks for the slots if they are not known yet.
    pub(super) fn ensure_known(&self, timeouts: Timeouts) -> Result<(), BackendError> {
        let is_known = !self.0.state().masters.is_empty();
        if is_known {
            return Ok(());
        }
        self.0.refresh(timeouts)
    }

    pub(super) fn masters_of(&self, slots: &[u16]) -> Vec<Option<Arc<Member>>> {
        let state = self.0.state();
        let master = |&slot: &u16| state.masters.get(usize::from(slot)).cloned().flatten();
        slots.iter().map(master).collect()
    }

    pub(super) fn masters(&self) -> Vec<Arc<Member>> {
        let state = self.0.state();
        let mut masters: Vec<Arc<Member>> = Vec::new();
        for master in state.masters.iter().flatten() {
            // Mostly the same as that of the slot before.
            let is_last = masters.last().is_some_and(|last| Arc::ptr_eq(last, master));
            if !is_last && !masters.iter().any(|known| Arc::ptr_eq(known, master)) {
                masters.push(master.clone());
            }
        }
        masters
    }

    pub(super) fn set_master(&self, slot: u16, member: Arc<Member>) {
        if let Some(master) = self.0.state().masters.get_mut(usize::from(slot)) {
            *master = Some(member);
        }
    }

    /// Returns the server of an address, or `None` if the address is invalid or there are too many servers.
    pub(super) fn with_address(&self, host: &str, port: u16) -> Option<Arc<Member>> {
        self.0.member(&mut self.0.state(), host, port)
    }

    /// Keeps commands from a server until it has replied to the recovery thread.
    pub(super) fn mark_down(&self, member: &Arc<Member>, timeouts: Timeouts) {
        member.is_down.store(true, Relaxed);
        if !self.ensure_recovery(false, timeouts) {
            // Without a thread, the next caller has to try.
            member.is_down.store(false, Relaxed);
        }
        member.node.close_idle();
    }

    /// Lets the recovery thread ask for the slots again.
    pub(super) fn mark_stale(&self, timeouts: Timeouts) {
        self.ensure_recovery(true, timeouts);
    }

    /// Returns `false` if the thread cannot be started.
    fn ensure_recovery(&self, is_stale: bool, timeouts: Timeouts) -> bool {
        let mut state = self.0.state();
        state.is_stale |= is_stale;
        if state.recovery.is_none() {
            let (recovery, problems) = sync_channel(1);
            let shared = self.0.clone();
            let thread = thread::Builder::new().name("workflow-context-cluster".to_owned());
            let started = thread.spawn(move || shared.recover(&problems, timeouts));
            state.recovery = started.is_ok().then_some(recovery);
        }
        let Some(recovery) = &state.recovery else {
            return false;
        };
        // If the channel is full, the thread is told already.
        let _ = recovery.try_send(());
        true
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        self.0.state().recovery = None;
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn members(&self) -> Vec<Arc<Member>> {
        self.state().members.values().cloned().collect()
    }

    /// Refreshes the slots and pings the servers that are down, until there are no problems left.
    fn recover(&self, problems: &Receiver<()>, timeouts: Timeouts) {
        let mut pause = BACKOFF.0;
        while let Some(has_new_problem) = wait(problems, pause) {
            pause = match has_new_problem {
                true => BACKOFF.0,
                false => (pause * 2).min(BACKOFF.1),
            };
            self.state().is_stale = false;
            let is_refreshed = self.refresh(timeouts).is_ok();
            for member in self.members().iter().filter(|member| member.is_down()) {
                let pinged = member.node.new_session(timeouts).and_then(Session::ping);
                if pinged.is_ok() {
                    member.is_down.store(false, Relaxed);
                }
            }
            let mut state = self.state();
            state.is_stale |= !is_refreshed;
            if !state.is_stale && !state.members.values().any(|member| member.is_down()) {
                // Under the lock, so that a problem that is found later starts another thread.
                state.recovery = None;
                return;
            }
        }
    }

    /// Asks for the slots, first the servers that are up and then the seeds.
    fn refresh(&self, timeouts: Timeouts) -> Result<(), BackendError> {
        let ask = |node: &Node, host: &str| {
            let mut session = node.session(timeouts)?;
            let mut slots = cmd("CLUSTER");
            let reply = session.call(&[slots.arg("SLOTS").clone()])?.pop();
            session.give_back();
            let ranges = reply.and_then(|reply| topology::slot_ranges(reply, host));
            ranges.ok_or_else(|| node.failure("unexpected reply to CLUSTER SLOTS"))
        };
        for member in self.members().iter().filter(|member| !member.is_down()) {
            if let Ok(ranges) = ask(&member.node, &member.host) {
                self.set_topology(ranges);
                return Ok(());
            }
        }
        let mut result = Err(BackendError::new("Redis Cluster: no URL", None));
        for seed in &self.seeds {
            let host = match seed.get_connection_info().addr() {
                ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => &**host,
                _ => "",
            };
            match ask(&Node::new(seed.clone()), host) {
                Ok(ranges) => {
                    self.set_topology(ranges);
                    return Ok(());
                }
                Err(error) => result = Err(error),
            }
        }
        result
    }

    fn set_topology(&self, ranges: Vec<SlotRange>) {
        let mut state = self.state();
        let mut masters = vec![None; usize::from(SLOTS)];
        let mut members = HashMap::new();
        for range in ranges {
            if let Some(member) = self.member(&mut state, &range.host, range.port) {
                let slots = usize::from(range.first)..=usize::from(range.last);
                masters[slots].fill(Some(member.clone()));
                members.insert((range.host, range.port), member);
            }
        }
        let old = (
            std::mem::replace(&mut state.masters, masters),
            std::mem::replace(&mut state.members, members),
        );
        drop(state);
        // Without the lock, since this may close connections.
        drop(old);
    }

    fn member(&self, state: &mut State, host: &str, port: u16) -> Option<Arc<Member>> {
        let address = (host.to_owned(), port);
        if let Some(member) = state.members.get(&address) {
            return Some(member.clone());
        }
        if state.members.len() >= MAX_MEMBERS {
            return None;
        }
        let client = connect::with_address(self.seeds.first()?, host.to_owned(), port).ok()?;
        let member = Arc::new(Member {
            node: Node::new(client),
            host: host.to_owned(),
            is_down: AtomicBool::new(false),
        });
        state.members.insert(address, member.clone());
        Some(member)
    }
}

/// Waits for a pause with jitter, which the first new problem shortens to a short one. Returns `None` once the handle is
/// dropped, else whether there was a new problem.
fn wait(problems: &Receiver<()>, pause: Duration) -> Option<bool> {
    let mut deadline = Instant::now() + jittered(pause);
    let mut has_new_problem = false;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Some(has_new_problem);
        }
        match problems.recv_timeout(left) {
            Ok(()) if has_new_problem || pause <= BACKOFF.0 => has_new_problem = true,
            Ok(()) => {
                has_new_problem = true;
                deadline = deadline.min(Instant::now() + jittered(BACKOFF.0));
            }
            Err(RecvTimeoutError::Timeout) => return Some(has_new_problem),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}
