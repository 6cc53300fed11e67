//! The answers of a backend that come too late for whoever asked: memory follows them nevertheless.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};

use super::claim::Claim;
use crate::backend::Record;
use crate::cache::Cache;
use crate::lock::lock;

/// The number of instances from which on those without an open question are removed at each new one.
const MANY: usize = 1024;

/// The largest number of claims of one instance that wait for a late answer.
const MOST_CLAIMS: usize = 64;

/// The instances of which an answer is still to come.
#[derive(Default)]
pub(super) struct LateAnswers {
    open: Mutex<HashMap<Box<str>, Weak<Open>>>,
    /// The size of `open`, so that a storage whose backend is in time locks nothing.
    count: AtomicUsize,
}

/// The open questions of one instance, each of which holds a reference.
#[derive(Default)]
pub(super) struct Open {
    /// The contexts of this instance that were recorded meanwhile.
    claims: Mutex<Vec<Arc<Claim>>>,
    /// A call has stored a context since, or removed the instance.
    is_void: AtomicBool,
}

impl LateAnswers {
    /// Returns the open questions of an instance, to which one more is added.
    pub(super) fn expect(&self, id: &str) -> Arc<Open> {
        let mut open = lock(&self.open);
        if let Some(known) = open.get(id).and_then(Weak::upgrade) {
            return known;
        }
        if open.len() >= MANY {
            open.retain(|_, open| open.strong_count() > 0);
        }
        let new = Arc::default();
        open.insert(id.into(), Arc::downgrade(&new));
        self.count.store(open.len(), Relaxed);
        new
    }

    /// Lets a claim take part in the answers to come.
    pub(super) fn join(&self, id: &str, claim: &Arc<Claim>) {
        if self.count.load(Relaxed) == 0 {
            return;
        }
        let open = lock(&self.open).get(id).and_then(Weak::upgrade);
        if let Some(open) = open {
            let mut claims = lock(&open.claims);
            if claims.len() < MOST_CLAIMS {
                claims.push(claim.clone());
            }
        }
    }

    /// Ignores the answers to come: a call decides what is stored now.
    pub(super) fn ignore(&self, id: &str) {
        if self.count.load(Relaxed) == 0 {
            return;
        }
        let open = lock(&self.open).remove(id).and_then(|open| open.upgrade());
        if let Some(open) = open {
            open.is_void.store(true, Relaxed);
        }
    }
}

impl Open {
    /// Takes what was found under the key of the run `asked`, or else of the instance.
    pub(super) fn answer(&self, cache: &Cache, id: &str, asked: Option<&str>, found: Record) {
        if self.is_void.load(Relaxed) {
            return;
        }
        let claims = lock(&self.claims).clone();
        if claims.is_empty() {
            cache.insert_late(id, found);
            return;
        }
        for claim in claims {
            claim.on_late_answer(asked, &found);
        }
    }
}
