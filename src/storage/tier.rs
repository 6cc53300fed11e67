//! The two tiers joined in one lookup: memory first, the backend only on a miss, then memory once more.

use std::cell::Cell;
use std::num::NonZeroU16;
use std::sync::Arc;

use super::remote::{LateWinner, Remote};
use crate::cache::entry::{Conflict, Entry};
use crate::cache::{Cache, Key};
use crate::context::WorkflowContext;
use crate::decision::relation::Relation;
use crate::error::StorageError;
use crate::fields::value::EndStatus;
use crate::root::open::OpenRoot;
use crate::stats::Counters;

/// The cache and, behind it, the backend if there is one.
#[derive(Debug)]
pub(crate) struct Tier {
    cache: Arc<Cache>,
    remote: Option<Remote>,
    /// There is neither a backend nor a root, so that a call changes memory alone.
    is_memory_alone: bool,
}

impl Tier {
    pub(super) fn new(cache: Arc<Cache>, remote: Option<Remote>) -> Self {
        Self {
            is_memory_alone: remote.is_none() && !cache.has_roots(),
            cache,
            remote,
        }
    }

    pub(crate) fn cache(&self) -> &Cache {
        &self.cache
    }

    pub(super) fn remote(&self) -> Option<&Remote> {
        self.remote.as_ref()
    }

    /// Looks an instance up for a span or a call; counted as one hit or one miss. A hit takes one lock. `look` runs under
    /// the lock of a shard: it must neither block nor call out.
    #[inline]
    pub(crate) fn look_up<R>(&self, key: Key<'_>, look: impl Fn(Option<&Entry>) -> R) -> R {
        match &self.remote {
            None => self.cache.look_up(key, look),
            Some(remote) => self.look_up_with(remote, key, look),
        }
    }

    fn look_up_with<R>(
        &self,
        remote: &Remote,
        key: Key<'_>,
        look: impl Fn(Option<&Entry>) -> R,
    ) -> R {
        remote.begin();
        let named = Cell::new(None);
        let look = |entry: Option<&Entry>| {
            if let Some(run) = entry.and_then(Entry::take_named) {
                named.set(Some(run));
            }
            look(entry)
        };
        let mut found = None;
        if remote.may_have(key) {
            found = self.cache.look_up_known(key, |entry| look(Some(entry)));
            if found.is_none() {
                remote.fetch(key);
            }
        }
        let found = found.unwrap_or_else(|| self.cache.look_up(key, look));
        if let Some(run) = named.into_inner() {
            remote.publish_named(key.id, run);
        }
        found
    }

    /// Returns the latest context of an instance for a call, without counting.
    pub(crate) fn peek(&self, id: &str) -> Option<WorkflowContext> {
        if let Some(remote) = &self.remote {
            remote.begin();
        }
        self.peek_within(id)
    }

    /// Returns the latest context of the parent instance of a span that is starting, within what is left of that span's
    /// budget.
    pub(crate) fn peek_within(&self, id: &str) -> Option<WorkflowContext> {
        self.cache.latest(id).or_else(|| {
            self.remote.as_ref()?.fetch_always(self.cache.key(id, None));
            self.cache.latest(id)
        })
    }

    /// Records the context of a span, unless another span was faster; then the winner is the error. If a backend may
    /// still know of a faster process, the answer will tell.
    pub(crate) fn record(
        &self,
        key: Key<'_>,
        follows: Option<(&WorkflowContext, u32)>,
        context: WorkflowContext,
        author: Option<NonZeroU16>,
        root: Option<Arc<OpenRoot>>,
        counters: &Arc<Counters>,
    ) -> Result<Option<LateWinner>, WorkflowContext> {
        let context = self.cache.bounded(context);
        // The next trace of a run is that run's, also if a span opens it that does not name the run.
        let run_id = match (follows, key.run_id) {
            (Some(_), None) => self.cache.latest_run_id(key),
            _ => None,
        };
        let key = Key {
            run_id: key.run_id.or(run_id.as_deref()),
            ..key
        };
        let own = root.clone();
        let recorded = (self.cache).record(key, follows, context.clone(), author, root);
        match (recorded, &self.remote) {
            (Err(Conflict { winner }), _) => {
                counters.conflicts.add();
                Err(winner)
            }
            (Ok(_), None) => Ok(None),
            (Ok(before), Some(remote)) => {
                let root = own.map(|root| Box::new(root.record().clone()));
                Ok(remote.publish(key, follows, context, before, root, counters))
            }
        }
    }

    #[inline]
    pub(super) fn store(&self, id: &str, context: WorkflowContext) {
        if self.is_memory_alone && !context.has_trace_state() {
            drop(self.cache.replace(id, context));
        } else {
            self.store_anyhow(id, context);
        }
    }

    #[inline(never)]
    fn store_anyhow(&self, id: &str, context: WorkflowContext) {
        let context = self.cache.bounded(context);
        let root = self.root_to_keep(id, &context);
        let remote = self.remote.as_ref();
        if let Some(remote) = remote {
            remote.ignore_late(id);
        }
        let root_span = root.as_ref().map(|root| Box::new(root.record().clone()));
        let replaced = match root {
            Some(root) => self.cache.replace_beneath(id, context.clone(), root),
            None => self.cache.replace(id, context.clone()),
        };
        if let Some(remote) = remote {
            remote.forget_runs(id, replaced.run_ids());
            remote.put(id, context, root_span);
        }
    }

    /// Returns the own span of a workflow of which another context is stored, or ends it if that is of another trace.
    fn root_to_keep(&self, id: &str, context: &WorkflowContext) -> Option<Arc<OpenRoot>> {
        if !self.cache.has_roots() {
            return None;
        }
        let root = self.cache.root_of(self.cache.key(id, None))?;
        if root.is_of(context) {
            return Some(root);
        }
        root.continue_in(context.to_span_context(), Relation::NewRun.as_str());
        None
    }

    /// Fetches the record of an instance for a call, unless memory has it.
    fn fetch_missing(&self, id: &str) {
        if let Some(remote) = self.remote.as_ref().filter(|_| !self.cache.has(id, None)) {
            remote.begin();
            remote.fetch_always(self.cache.key(id, None));
        }
    }

    pub(super) fn get(&self, id: &str) -> Option<WorkflowContext> {
        self.fetch_missing(id);
        self.cache.look_up(self.cache.key(id, None), |entry| {
            entry.map(|entry| entry.latest().context())
        })
    }

    pub(super) fn cleanup(&self, id: &str) -> bool {
        self.fetch_missing(id);
        let root = self.cache.root_of(self.cache.key(id, None));
        if let Some(root) = root {
            root.end(EndStatus::Completed);
        }
        let Some(remote) = &self.remote else {
            return self.cache.remove(id).is_some();
        };
        remote.ignore_late(id);
        let removed = self.cache.latest(id);
        let removed_runs = self.cache.remove(id);
        let was_there = removed_runs.is_some();
        remote.forget_runs(id, removed_runs.unwrap_or_default());
        remote.remove(id, removed);
        was_there
    }

    /// Takes the end of an instance in both tiers.
    pub(crate) fn complete(&self, key: Key<'_>, status: EndStatus) {
        if let Some(root) = self.cache.root_of(key) {
            root.end(status);
        }
        let has_to_tell = (self.remote.as_ref()).filter(|remote| remote.has_to_tell_ends());
        let ended = has_to_tell.and_then(|_| self.cache.latest(key.id));
        let completed = self.cache.complete(key);
        if let (true, Some(remote)) = (completed, &self.remote) {
            remote.complete(key.id, key.run_id, ended);
        }
    }

    /// Takes the end of an instance from a call. Returns `true` if something was stored.
    pub(super) fn complete_called(&self, id: &str, status: EndStatus) -> bool {
        self.fetch_missing(id);
        let was_there = self.cache.has(id, None);
        self.complete(self.cache.key(id, None), status);
        was_there
    }

    pub(super) fn flush(&self) -> Result<(), StorageError> {
        self.remote.as_ref().map_or(Ok(()), Remote::flush)
    }
}
