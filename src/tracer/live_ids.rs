//! The ids that are in use at this moment: the span ids of stand-ins, the trace ids of pollers, the numbers of started spans.

use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use dashmap::DashMap;

/// Counts live ids. An empty one, as nearly always, is told by one load.
#[derive(Debug)]
pub(crate) struct LiveIds<Id: Eq + Hash> {
    total: AtomicUsize,
    counts: DashMap<Id, usize>,
}

/// Keeps an id among the live ones of its owner, until this is dropped.
pub(super) struct Live<Owner, Id: Copy + Eq + Hash> {
    owner: Arc<Owner>,
    ids: fn(&Owner) -> &LiveIds<Id>,
    id: Id,
}

impl<Owner, Id: Copy + Eq + Hash> Live<Owner, Id> {
    pub(super) fn new(owner: &Arc<Owner>, ids: fn(&Owner) -> &LiveIds<Id>, id: Id) -> Self {
        ids(owner).add(id);
        Self {
            owner: owner.clone(),
            ids,
            id,
        }
    }
}

impl<Owner, Id: Copy + Eq + Hash> Drop for Live<Owner, Id> {
    fn drop(&mut self) {
        (self.ids)(&self.owner).remove(self.id);
    }
}

impl<Id: Eq + Hash> Default for LiveIds<Id> {
    fn default() -> Self {
        Self {
            total: AtomicUsize::new(0),
            counts: DashMap::new(),
        }
    }
}

impl<Id: Copy + Eq + Hash> LiveIds<Id> {
    pub(crate) fn add(&self, id: Id) {
        self.total.fetch_add(1, Relaxed);
        *self.counts.entry(id).or_default() += 1;
    }

    pub(crate) fn remove(&self, id: Id) {
        self.counts.entry(id).and_modify(|count| *count -= 1);
        self.counts.remove_if(&id, |_, count| *count == 0);
        self.total.fetch_sub(1, Relaxed);
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.total.load(Relaxed) == 0
    }

    pub(crate) fn contains(&self, id: Id) -> bool {
        !self.is_empty() && self.counts.contains_key(&id)
    }
}
