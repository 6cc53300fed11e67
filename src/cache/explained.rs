//! The part of an explanation that the cache knows.

use std::time::SystemTime;

use super::Cache;
use super::entry::{Entry, Rank, Run};
use crate::explain::author::Authors;
use crate::explain::{Explanation, Summary};

impl Cache {
    /// Explains an instance, which does not count as a use of it.
    pub(crate) fn explain(&self, id: &str, wall: SystemTime, authors: &Authors) -> Explanation {
        let now = self.time.now();
        let hash = self.hash(id);
        // If no lookup has met the entry since it expired, the trail does not tell that yet.
        let is_expired = |entry: &Entry| entry.rank(now, &self.shards.limits) == Rank::Expired;
        let expired = self.shards.remove(hash, id, |entry| {
            is_expired(entry).then(|| entry.expiry_event())
        });
        if let Some(event) = expired {
            self.note_loss(hash, now, event);
        }
        let found = {
            let table = &self.shards.lock_for(hash).table;
            let found = table.find(hash, |entry| entry.id == *id);
            let found = found.and_then(|index| table.get(index));
            found.map(|entry| {
                let Run { author, .. } = *entry.latest();
                (entry.summary(wall), author, entry.latest().root().cloned())
            })
        };
        let recorded = found.map(|(recorded, author, root)| Summary {
            writer: authors.writer(author),
            root: root.map(|root| root.summary()),
            ..recorded
        });
        let steps = self.trail.steps_of(hash);
        Explanation::new(id, recorded, steps, now, self.trail.is_off())
    }
}
