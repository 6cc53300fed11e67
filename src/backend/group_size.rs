//! How many writes go to the backend as one group: fewer after a group has failed.

/// The largest number of writes in a group.
const MOST: usize = 1000;

/// The size of the next group.
///
/// A slow backend may need longer for a group than it is waited for. The same group would take as long again, so each attempt
/// tries half of it, down to one write; what succeeds lets the groups grow again, slower than they shrink. Other failures are
/// not told apart: where no size helps, none does harm.
pub(super) struct GroupSize(usize);

impl GroupSize {
    pub(super) fn new() -> Self {
        Self(MOST)
    }

    pub(super) fn get(&self) -> usize {
        self.0
    }

    /// Halves the group that has failed, of so many writes.
    pub(super) fn failed(&mut self, writes: usize) {
        self.0 = (writes / 2).max(1);
    }

    pub(super) fn succeeded(&mut self) {
        let more = (self.0 / 8).max(1);
        self.0 = (self.0 + more).min(MOST);
    }
}
