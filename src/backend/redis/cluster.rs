//! The commands of a Cluster: which server gets which, and what follows from the replies.
//!
//! Each call sends to all masters first, and then reads their replies. A server that fails costs only its own commands,
//! and is marked down, so that no other call waits for it.
//!
//! The redis crate (1.2.2, `src/cluster_handling`) has two clients for a Cluster, which do not allow that:
//!
//! - The synchronous one fails as a whole. One slot without a master fails all commands of a pipeline before any is sent
//!   (`map_cmds_to_nodes` in `sync_connection/mod.rs`); one node that cannot be sent to ends it before anything is read
//!   (`send_all_commands`); and after an I/O error on one node, the replies of all nodes are discarded
//!   (`recv_all_commands` returns the first error in place of them). With one dead server of three, no write would ever
//!   be known to be done. Single commands are retried after `thread::sleep` (`request`), on the caller's thread.
//! - The asynchronous one (`async_connection/mod.rs`) polls no request while it recovers: `poll_flush` completes
//!   `poll_recover`, which refreshes the slots or reconnects, before `poll_complete`. So the commands of all servers wait
//!   for the one that is dead. It also needs tokio, which this crate does not use.

mod members;

use std::sync::Arc;
use std::time::Instant;

use redis::{Arg, Client, Cmd, Value, cmd};

use self::members::{Member, Members};
use super::node::{self, Replies, Sent, Session, Timeouts};
use super::topology;
use crate::backend::BackendError;

/// Number of times that a command follows its slot to another server.
const REDIRECTIONS: usize = 5;

pub(super) type Reply = Result<Value, BackendError>;

pub(super) struct Cluster {
    members: Members,
}

/// A command that has no reply yet.
struct Pending {
    /// Its index.
    at: usize,
    /// The server to which its slot is being moved, instead of the master.
    ask: Option<Arc<Member>>,
}

/// The commands for one server.
struct Batch {
    member: Arc<Member>,
    /// Sends `ASKING` before each command, for slots that are being moved to this server.
    asking: bool,
    /// The indices of the commands.
    places: Vec<usize>,
}

impl Cluster {
    pub(super) fn new(seeds: Vec<Client>) -> Self {
        let members = Members::new(seeds);
        Self { members }
    }

    pub(super) fn seeds(&self) -> &[Client] {
        self.members.seeds()
    }

    /// Returns `true` unless all known servers are down.
    pub(super) fn is_any_up(&self) -> bool {
        self.members.all().iter().any(|member| !member.is_down())
    }

    /// Returns one reply for each command, of which the first argument is the key. Commands on one slot are carried
    /// out in their order.
    pub(super) fn ask(&self, commands: &[Cmd], timeouts: Timeouts) -> Vec<Reply> {
        if let Err(error) = self.members.ensure_known(timeouts) {
            return vec![Err(error); commands.len()];
        }
        let slots: Vec<_> = commands.iter().map(slot_of).collect();
        let mut replies: Vec<Option<Reply>> = vec![None; commands.len()];
        let new = |at| Pending { at, ask: None };
        let mut pending: Vec<_> = (0..commands.len()).map(new).collect();
        for _ in 0..=REDIRECTIONS {
            if pending.is_empty() {
                break;
            }
            let batches = self.batches(&slots, pending, timeouts, &mut replies);
            let sent = batches.iter().map(|batch| batch.send(commands, timeouts));
            let sent: Vec<_> = sent.collect();
            pending = Vec::new();
            for (batch, sent) in batches.iter().zip(sent) {
                let received = sent.and_then(|(session, sent)| receive(session, sent, timeouts));
                match received {
                    Ok(received) => {
                        self.sort(batch, received, timeouts, &mut replies, &mut pending);
                    }
                    Err(error) => {
                        self.members.mark_down(&batch.member, timeouts);
                        for &at in &batch.places {
                            replies[at] = Some(Err(error.clone()));
                        }
                    }
                }
            }
        }
        let too_many = |slot: u16| {
            let message =
                format!("Redis Cluster: more than {REDIRECTIONS} redirections of slot {slot}");
            Err(BackendError::new(message, None))
        };
        let replies = replies.into_iter().zip(slots);
        replies
            .map(|(reply, slot)| reply.unwrap_or_else(|| too_many(slot)))
            .collect()
    }

    /// Returns all masters, or an error if one is down.
    pub(super) fn masters(&self, timeouts: Timeouts) -> Result<Vec<Arc<Member>>, BackendError> {
        self.members.ensure_known(timeouts)?;
        let masters = self.members.masters();
        match masters.iter().find(|master| master.is_down()) {
            Some(master) => Err(master.down()),
            None => Ok(masters),
        }
    }

    pub(super) fn close_idle(&self) {
        for member in self.members.all() {
            member.node().close_idle();
        }
    }

    /// Succeeds if any server replies.
    pub(super) fn ping(&self, timeouts: Timeouts) -> Result<(), BackendError> {
        self.members.ensure_known(timeouts)?;
        let mut result = Err(BackendError::new(
            "Redis Cluster: all servers are down",
            None,
        ));
        let members = self.members.all();
        for member in members.iter().filter(|member| !member.is_down()) {
            result = member.node().session(timeouts).and_then(Session::ping);
            if result.is_ok() {
                break;
            }
            self.members.mark_down(member, timeouts);
        }
        result
    }

    fn no_master(&self, slot: u16, timeouts: Timeouts) -> BackendError {
        self.members.mark_stale(timeouts);
        BackendError::new(format!("Redis Cluster: slot {slot} has no master"), None)
    }

    /// Groups commands by their servers. Those that no server can get are replied to with an error.
    fn batches(
        &self,
        slots: &[u16],
        pending: Vec<Pending>,
        timeouts: Timeouts,
        replies: &mut [Option<Reply>],
    ) -> Vec<Batch> {
        let mut batches: Vec<Batch> = Vec::new();
        let pending_slots: Vec<_> = pending.iter().map(|command| slots[command.at]).collect();
        let masters = self.members.masters_of(&pending_slots);
        for (Pending { at, ask }, master) in pending.into_iter().zip(masters) {
            let asking = ask.is_some();
            let Some(member) = ask.or(master) else {
                replies[at] = Some(Err(self.no_master(slots[at], timeouts)));
                continue;
            };
            if member.is_down() {
                replies[at] = Some(Err(member.down()));
                continue;
            }
            let is_its =
                |batch: &&mut Batch| Arc::ptr_eq(&batch.member, &member) && batch.asking == asking;
            match batches.iter_mut().find(is_its) {
                Some(batch) => batch.places.push(at),
                None => batches.push(Batch {
                    member,
                    asking,
                    places: vec![at],
                }),
            }
        }
        batches
    }

    /// Sorts the replies of one server into final ones and redirections.
    fn sort(
        &self,
        batch: &Batch,
        received: Replies,
        timeouts: Timeouts,
        replies: &mut [Option<Reply>],
        pending: &mut Vec<Pending>,
    ) {
        let Replies {
            values,
            unconfirmed,
        } = received;
        // The reply to `ASKING` precedes each.
        let skipped = usize::from(batch.asking);
        let values = values.into_iter().skip(skipped).step_by(1 + skipped);
        for (&at, value) in batch.places.iter().zip(values) {
            let Some(error) = node::error_reply(&value) else {
                replies[at] = Some(unconfirmed.clone().map_or(Ok(value), Err));
                continue;
            };
            let code = error.code().unwrap_or_default();
            let target = match code {
                "MOVED" | "ASK" => error.detail().and_then(|detail| {
                    let (slot, host, port) = topology::redirection(detail, batch.member.host())?;
                    Some((slot, self.members.with_address(host, port)?))
                }),
                _ => None,
            };
            match target {
                Some((_, member)) if code == "ASK" => pending.push(Pending {
                    at,
                    ask: Some(member),
                }),
                Some((slot, member)) => {
                    self.members.set_master(slot, member);
                    self.members.mark_stale(timeouts);
                    pending.push(Pending { at, ask: None });
                }
                None => {
                    // Errors of a server that may be the master no longer.
                    if matches!(code, "CLUSTERDOWN" | "READONLY" | "MASTERDOWN" | "LOADING") {
                        self.members.mark_stale(timeouts);
                    }
                    replies[at] = Some(Err(batch.member.node().refused_by(error)));
                }
            }
        }
    }
}

impl Batch {
    fn send(
        &self,
        commands: &[Cmd],
        timeouts: Timeouts,
    ) -> Result<(Session<'_>, Sent), BackendError> {
        let mut session = self.member.node().session(timeouts)?;
        let commands = self.places.iter().map(|&at| &commands[at]);
        let sent = match self.asking {
            false => session.send(commands),
            true => {
                let asking = cmd("ASKING");
                session.send(commands.flat_map(|command| [&asking, command]))
            }
        };
        Ok((session, sent))
    }
}

/// Receives the replies of one server, by a deadline of its own: while another server was waited for, they may have
/// come long ago.
fn receive(
    mut session: Session<'_>,
    sent: Sent,
    timeouts: Timeouts,
) -> Result<Replies, BackendError> {
    let received = session.receive(sent, Instant::now() + timeouts.response)?;
    session.give_back();
    Ok(received)
}

/// Returns the slot of the key that is the first argument.
fn slot_of(command: &Cmd) -> u16 {
    match command.args_iter().nth(1) {
        Some(Arg::Simple(key)) => topology::slot(key),
        _ => 0,
    }
}
