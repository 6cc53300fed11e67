//! The meaning of each field name in one storage.

use std::borrow::Cow;

/// The meaning of a field. Ranks are positions in the builder's order: of several ids on one span the lowest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    InstanceId { rank: u16 },
    RunId,
    ParentInstanceId,
    Replaying,
    ReplayingChildren,
    Status,
}

/// The field names with a meaning.
#[derive(Clone, Debug, Default)]
pub(crate) struct Meanings {
    names: Vec<(Cow<'static, str>, Meaning)>,
    /// Bit n is set if some name has n bytes (63: or more). Most attributes are ruled out by that alone.
    lengths: u64,
}

impl Meanings {
    /// Adds an id field, ranked after those added before.
    pub(super) fn add_instance_id(&mut self, name: Cow<'static, str>) {
        let rank = u16::try_from(self.names.len()).unwrap_or(u16::MAX);
        self.add(name, Meaning::InstanceId { rank });
    }

    /// Adds a name, unless it has a meaning already.
    pub(super) fn add(&mut self, name: Cow<'static, str>, meaning: Meaning) {
        if self.get(&name).is_none() {
            self.lengths |= length_bit(&name);
            self.names.push((name, meaning));
        }
    }

    /// The id field that was added first.
    pub(super) fn first_name(&self) -> Option<Cow<'static, str>> {
        self.names.first().map(|(name, _)| name.clone())
    }

    #[inline]
    pub(super) fn get(&self, name: &str) -> Option<Meaning> {
        if !self.may_have(name) {
            return None;
        }
        let found = self.names.iter().find(|(known, _)| known == name);
        found.map(|(_, meaning)| *meaning)
    }

    /// Returns `false` if the name certainly has no meaning, which costs next to nothing.
    #[inline]
    pub(super) fn may_have(&self, name: &str) -> bool {
        self.lengths & length_bit(name) != 0
    }
}

#[inline]
fn length_bit(name: &str) -> u64 {
    1 << name.len().min(63)
}

/// The fields that a callsite declares, a span waits for, or a record gives a value to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct IdFields {
    pub(crate) id: bool,
    pub(crate) run: bool,
    /// Says whether the span, or what is beneath it, is a replay.
    pub(crate) replay: bool,
}

impl IdFields {
    #[inline]
    pub(super) fn add(&mut self, meaning: Option<Meaning>) {
        self.id |= matches!(meaning, Some(Meaning::InstanceId { .. }));
        self.run |= meaning == Some(Meaning::RunId);
        let replay = [Meaning::Replaying, Meaning::ReplayingChildren];
        self.replay |= meaning.is_some_and(|meaning| replay.contains(&meaning));
    }
}
