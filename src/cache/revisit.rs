//! The comparison of memory with a backend: a walk through all instances, and the consequences if the backend tells otherwise.

use std::sync::Arc;
use std::time::Duration;

use super::entry::{Conflict, Rank, Run};
use super::{Cache, Cursor};
use crate::backend::Record;
use crate::clock::{TICK, ticks};
use crate::context::WorkflowContext;
use crate::explain::trail::Event;
use crate::root::open::OpenRoot;

/// An instance as memory has it: its latest run.
pub(crate) struct Held {
    pub(crate) id: String,
    pub(crate) context: WorkflowContext,
    pub(crate) run_id: Option<String>,
    pub(crate) generation: u32,
    pub(crate) root: Option<Arc<OpenRoot>>,
    /// The ids of all its runs.
    pub(crate) run_ids: Vec<Box<str>>,
    /// It has been used since the walk before.
    pub(crate) is_in_use: bool,
    pub(crate) is_completed: bool,
    /// The time after which memory forgets it.
    pub(crate) left: Duration,
}

impl Cache {
    /// Returns `true` if a walk that is to take `all` ticks has not come as far as after that number of them.
    pub(crate) fn is_behind(&self, cursor: &Cursor, elapsed: u32, all: u32) -> bool {
        cursor.share(&self.shards) < f64::from(elapsed) / f64::from(all)
    }

    /// Returns the next page of the instances, in use if they were used since that tick; `None` when all were read.
    pub(crate) fn next_held(&self, since: u32, cursor: &mut Cursor) -> Option<Vec<Held>> {
        let now = self.time.now();
        let limits = &self.shards.limits;
        cursor.next_page(&self.shards, |_, entry| {
            let (used, completed) = (entry.used.get() >> 1, entry.completed.get());
            let left = match entry.rank(now, limits) {
                Rank::Expired => return None,
                Rank::Completed => limits.completed_grace - now.saturating_sub(completed),
                Rank::Used(_) => limits.idle_ttl - now.saturating_sub(used),
            };
            let latest = entry.latest();
            Some(Held {
                id: entry.id.as_str().to_owned(),
                context: latest.context(),
                run_id: latest.run_id().map(|id| id.as_str().to_owned()),
                generation: latest.generation(),
                root: latest.root().cloned(),
                run_ids: entry.run_ids(),
                is_in_use: used >= since,
                is_completed: completed != 0,
                left: TICK * left,
            })
        })
    }

    /// Takes the end of an instance that another process has told, and that is forgotten after so long, unless memory has
    /// another context by now or the end already.
    pub(crate) fn end_elsewhere(&self, id: &str, context: &WorkflowContext, left: Duration) {
        let (hash, now) = (self.hash(id), self.time.now());
        let grace = self.shards.limits.completed_grace;
        let (left, mut is_new) = (ticks(left).min(grace), false);
        let removed = self.shards.remove(hash, id, |entry| {
            if !entry.latest().context().is_same_span(context) {
                return None;
            }
            is_new = !entry.is_completed();
            if is_new {
                entry.complete(None, now.saturating_sub(grace - left));
            }
            // Only a pointer is taken out under the lock.
            (left == 0).then(|| entry.latest.rare.take())
        });
        if is_new {
            self.note(hash, Event::Completed);
        }
        if removed.is_some() {
            self.note_loss(hash, now, Event::GraceOver);
        }
    }

    /// Lets memory follow the record of a run that is the latest for others, unless it has another context by now than it
    /// had. Returns `true` if that is another context of the same run.
    pub(crate) fn follow_elsewhere(&self, held: &Held, there: &Record) -> bool {
        let is_new_run =
            there.run_id.is_some() && held.run_id.is_some() && there.run_id != held.run_id;
        if !is_new_run {
            let run_id = held.run_id.as_deref();
            return self.overrule(&held.id, run_id, &held.context, there);
        }
        let root = self.reopen(&held.id, there);
        let run_id = there.run_id.as_deref();
        let context = self.bounded(there.context.clone());
        let run = Run::new(context, run_id, there.generation).with_root(root);
        let _ = self.upsert(
            self.hash(&held.id),
            &held.id,
            self.time.now(),
            run,
            |entry, run| {
                let is_as_it_was = entry.latest().context().is_same_span(&held.context);
                if is_as_it_was && entry.run(run_id).is_none() {
                    entry.begin(run);
                    return Ok(());
                }
                Err(Conflict {
                    winner: entry.latest().context(),
                })
            },
        );
        false
    }
}
