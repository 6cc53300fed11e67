//! The claim of a recorded context against all processes: who was first, and what follows for the one who was not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::SystemTime;

use opentelemetry::TraceId;

use crate::backend::keys::{instance_key, run_key};
use crate::backend::write_queue::{FollowUp, OnWinner};
use crate::backend::{Record, Write};
use crate::cache::Cache;
use crate::context::WorkflowContext;
use crate::lock::lock;
use crate::stats::Counters;

/// Set if another process turns out to have recorded its context first.
pub(crate) type LateWinner = Arc<OnceLock<WorkflowContext>>;

/// The span whose context is claimed: it is linked to the winner, and counted.
pub(super) struct Claimant {
    pub(super) late_winner: LateWinner,
    /// The trace of the run before, as far as this process knew when the span was recorded.
    pub(super) before: Option<TraceId>,
    pub(super) counters: Arc<Counters>,
}

/// A context that this process recorded, as the first of its instance or run as far as it knows.
///
/// The key of the instance is claimed first. It tells which run the instance is at: another one, then the run is a new one
/// and its own key is claimed; or this run, as is a record without a run id, which belongs to the run that asks first.
pub(super) struct Claim {
    id: String,
    ours: Record,
    /// The key of the run that is claimed, if it is one's.
    run_key: Option<String>,
    claims: Arc<Claims>,
    cache: Arc<Cache>,
    /// `None` if no span recorded it now: it was recorded before, and got its run id only now.
    claimant: Option<Claimant>,
    state: Mutex<State>,
}

struct State {
    /// The context that memory has for the run, as far as this claim knows.
    followed: WorkflowContext,
    has_lost: bool,
    /// The backend has answered.
    is_settled: bool,
    /// The run has been completed: its records are to expire then.
    completed: Option<SystemTime>,
    /// A call has replaced or removed the run: nothing more is written.
    is_void: bool,
}

/// The claims of runs that are not settled, by the keys of the runs. What a call decides meanwhile holds for what is still to
/// be written.
#[derive(Default)]
pub(super) struct Claims(Mutex<HashMap<String, Weak<Claim>>>);

impl Claims {
    fn add(&self, key: String, claim: &Arc<Claim>) {
        lock(&self.0).insert(key, Arc::downgrade(claim));
    }

    fn get(&self, key: &str) -> Option<Arc<Claim>> {
        lock(&self.0).get(key).and_then(Weak::upgrade)
    }

    pub(super) fn complete(&self, key: &str, expiry: SystemTime) {
        if let Some(claim) = self.get(key) {
            lock(&claim.state).completed = Some(expiry);
        }
    }

    pub(super) fn void(&self, key: &str) {
        if let Some(claim) = self.get(key) {
            lock(&claim.state).is_void = true;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(key) = &self.run_key {
            let mut claims = lock(&self.claims.0);
            // The run may have been claimed anew.
            if claims
                .get(key)
                .is_some_and(|claim| claim.strong_count() == 0)
            {
                claims.remove(key);
            }
        }
    }
}

impl Claim {
    pub(super) fn new(
        id: &str,
        ours: Record,
        cache: &Arc<Cache>,
        claims: &Arc<Claims>,
        claimant: Option<Claimant>,
    ) -> Arc<Self> {
        let run_key = ours.run_id.as_deref().map(|run_id| run_key(id, run_id));
        let claim = Arc::new(Self {
            id: id.to_owned(),
            cache: cache.clone(),
            claimant,
            state: Mutex::new(State {
                followed: ours.context.clone(),
                has_lost: false,
                is_settled: false,
                completed: None,
                is_void: false,
            }),
            ours,
            run_key: run_key.clone(),
            claims: claims.clone(),
        });
        if let Some(key) = run_key {
            claims.add(key, &claim);
        }
        claim
    }

    /// Returns the write that claims the instance, or its run.
    pub(super) fn first_write(self: &Arc<Self>) -> (Write, OnWinner) {
        let claim = self.clone();
        let write = Write::PutIfAbsent(instance_key(&self.id), self.ours.clone());
        (write, Box::new(move |winner| claim.on_instance(winner)))
    }

    /// Returns the write that claims the trace that follows another one, under a key of its own.
    pub(super) fn generation_write(
        self: &Arc<Self>,
        key: String,
        pointers: Vec<String>,
    ) -> (Write, OnWinner) {
        let claim = self.clone();
        let write = Write::PutIfAbsent(key, self.ours.clone());
        let on_winner = move |winner: Record| {
            let is_lost = !claim.is_ours(&winner);
            claim.settle(&winner);
            if !is_lost || claim.is_void() {
                return Vec::new();
            }
            let follow = |pointer| put(pointer, claim.as_of_now(winner.clone()));
            pointers.into_iter().map(follow).collect()
        };
        (write, Box::new(on_winner))
    }

    /// Takes an answer to a lookup that asked before the context was recorded, and came after that. `asked` is the run
    /// under whose key it was found, if it was under a run's.
    pub(super) fn on_late_answer(&self, asked: Option<&str>, found: &Record) {
        let is_about_it = match asked {
            Some(_) => asked == self.ours.run_id.as_deref(),
            None => self.is_of_this_run(found),
        };
        if is_about_it {
            self.follow(found, false);
        }
    }

    fn on_instance(self: Arc<Self>, there: Record) -> Vec<FollowUp> {
        let (Some(run_id), Some(key)) = (self.ours.run_id.clone(), self.run_key.clone()) else {
            self.settle(&there);
            return Vec::new();
        };
        if self.is_void() {
            return Vec::new();
        }
        let other = there.run_id.as_ref().filter(|there| **there != run_id);
        if let Some(other) = other.filter(|_| self.is_ours(&there)) {
            // Another worker has asked for the same record before.
            (self.cache).rename_run(&self.id, &there.context, &run_id, other);
            return Vec::new();
        }
        let mut claimed = self.ours.clone();
        if self.is_of_this_run(&there) {
            self.follow(&there, false);
            claimed = there.clone();
            claimed.run_id = Some(run_id.clone());
        }
        let write = Write::PutIfAbsent(key, self.as_of_now(claimed.clone()));
        let on_run = move |winner| self.on_run(&there, claimed, winner);
        vec![FollowUp {
            write,
            on_winner: Some(Box::new(on_run)),
        }]
    }

    /// `there` was found under the key of the instance, and `claimed` tried under that of the run.
    fn on_run(&self, there: &Record, claimed: Record, winner: Record) -> Vec<FollowUp> {
        let is_claimed = claimed.context.is_same_span(&winner.context);
        self.settle(&winner);
        if self.is_void() {
            return Vec::new();
        }
        let pointer = |record| vec![put(instance_key(&self.id), self.as_of_now(record))];
        if is_claimed {
            if !there.context.is_same_span(&claimed.context) {
                self.link_if_unknown(&there.context);
            }
            let is_there = there.run_id == claimed.run_id;
            return if is_there {
                Vec::new()
            } else {
                pointer(claimed)
            };
        }
        // A record without a run may be a call's, which the run's does not replace.
        let may_move = there.run_id.is_some() || self.is_ours(there);
        if may_move {
            pointer(winner)
        } else {
            Vec::new()
        }
    }

    /// Returns a record as it is to be written now.
    fn as_of_now(&self, record: Record) -> Record {
        let expires_at = lock(&self.state).completed.unwrap_or(record.expires_at);
        Record {
            expires_at,
            ..record
        }
    }

    fn is_ours(&self, record: &Record) -> bool {
        self.ours.context.is_same_span(&record.context)
    }

    /// Returns `true` if what was found under the key of the instance is of the run that is claimed. A record without a run
    /// id is of the run that asks first.
    fn is_of_this_run(&self, there: &Record) -> bool {
        let Some(run_id) = self.ours.run_id.as_deref() else {
            return true;
        };
        match &there.run_id {
            Some(other) => *other == run_id,
            None => !(self.cache).is_of_other_run(&self.id, &there.context, run_id),
        }
    }

    fn settle(&self, winner: &Record) {
        self.follow(winner, true);
    }

    fn is_void(&self) -> bool {
        lock(&self.state).is_void
    }

    /// Lets memory follow the winner, and the span be linked to it, if that is not what memory follows already. Once a winner
    /// was final, no other one is followed.
    fn follow(&self, winner: &Record, is_final: bool) {
        let followed = {
            let state = &mut *lock(&self.state);
            let was_settled = state.is_settled;
            state.is_settled |= is_final;
            if (was_settled && !is_final) || state.followed.is_same_span(&winner.context) {
                return;
            }
            std::mem::replace(&mut state.followed, winner.context.clone())
        };
        let run_id = self.ours.run_id.as_deref();
        let is_same_run = self.cache.overrule(&self.id, run_id, &followed, winner);
        if self.is_ours(winner) {
            return;
        }
        if !is_same_run && winner.run_id.is_some() {
            return self.link_if_unknown(&winner.context);
        }
        let is_first_loss = !std::mem::replace(&mut lock(&self.state).has_lost, true);
        if let Some(Claimant {
            late_winner,
            counters,
            ..
        }) = &self.claimant
        {
            if is_first_loss {
                counters.conflicts.add();
            }
            let _ = late_winner.set(winner.context.clone());
        }
    }

    /// Links the span to the context of the run before, unless it was known when the span was recorded.
    fn link_if_unknown(&self, other: &WorkflowContext) {
        let claimant = self.claimant.as_ref();
        if let Some(claimant) = claimant.filter(|it| it.before != Some(other.trace_id())) {
            let _ = claimant.late_winner.set(other.clone());
        }
    }
}

fn put(key: String, record: Record) -> FollowUp {
    FollowUp {
        write: Write::Put(key, record),
        on_winner: None,
    }
}
