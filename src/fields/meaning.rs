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
    /// Bit n is set if some name has n bytes, modulo 64. Most attributes are ruled out by that alone.
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
    1 << (name.len() % 64)
}

/// The reserved fields that a callsite declares, a span waits for, or a record gives a value to: a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReservedFields(u8);

impl ReservedFields {
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const INSTANCE_ID: Self = Self(1);
    const RUN_ID: Self = Self(2);
    const PARENT_INSTANCE_ID: Self = Self(4);
    const REPLAYING: Self = Self(8);
    const REPLAYING_CHILDREN: Self = Self(16);
    const STATUS: Self = Self(32);

    /// The number of bits of a set.
    pub(crate) const BITS: u32 = 6;

    #[inline]
    pub(super) fn from_meaning(meaning: Option<Meaning>) -> Self {
        match meaning {
            Some(Meaning::InstanceId { .. }) => Self::INSTANCE_ID,
            Some(Meaning::RunId) => Self::RUN_ID,
            Some(Meaning::ParentInstanceId) => Self::PARENT_INSTANCE_ID,
            Some(Meaning::Replaying) => Self::REPLAYING,
            Some(Meaning::ReplayingChildren) => Self::REPLAYING_CHILDREN,
            Some(Meaning::Status) => Self::STATUS,
            None => Self::NONE,
        }
    }

    /// Returns `true` if one of the fields tells more of an instance than its id.
    pub(crate) fn has_more_than_id(self) -> bool {
        self.0 & (Self::RUN_ID.0 | Self::PARENT_INSTANCE_ID.0) != 0
    }

    #[inline]
    pub(crate) fn has_id(self) -> bool {
        self.0 & Self::INSTANCE_ID.0 != 0
    }

    /// Returns `true` if one says whether the span, or what is beneath it, is a replay.
    #[inline]
    pub(crate) fn has_replay(self) -> bool {
        self.0 & (Self::REPLAYING.0 | Self::REPLAYING_CHILDREN.0) != 0
    }

    /// Returns those for which a span is held that waits for its id.
    #[inline]
    pub(crate) fn to_wait_for(self) -> Self {
        self.without(Self::STATUS)
    }

    #[inline]
    pub(crate) fn with(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    #[inline]
    pub(crate) fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    #[inline]
    pub(crate) fn bits(self) -> u8 {
        self.0
    }

    #[inline]
    pub(crate) fn from_bits(bits: u8) -> Self {
        Self(bits)
    }
}
