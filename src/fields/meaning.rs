//! The meaning of each field name in one storage, and the spans on which it has that.

use std::borrow::Cow;

use opentelemetry::KeyValue;

use super::identity::IdForm;

/// The meaning of a field. Ranks are positions in the builder's order: of several ids on one span the lowest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    InstanceId {
        rank: u16,
    },
    RunId,
    ParentInstanceId,
    Replaying,
    ReplayingChildren,
    Status,
    /// Its span only looks at the instance that it names. Known as a span starts, so no span waits for it.
    Observing,
}

/// The engine, by its number in one storage, whose targets have a span of theirs; or none.
///
/// The common words of an engine's preset have a meaning in its own scope only, all other names on every span.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scope(u8);

impl Scope {
    pub(crate) const NONE: Self = Self(0);

    /// Returns the scope of the engine with that index. There are fewer engines than numbers.
    fn nth(index: usize) -> Self {
        Self(u8::try_from(index + 1).unwrap_or(u8::MAX))
    }
}

/// The span of which a field is, in the form in which its target is at hand. Only the few names that have a scope ask for it.
#[derive(Clone, Copy)]
pub(crate) enum Owner<'a> {
    Scope(Scope),
    Target(&'a str),
    /// A builder's, which have the target among them.
    Attributes(&'a [KeyValue]),
}

/// The field names with a meaning.
#[derive(Clone, Debug, Default)]
pub(crate) struct Meanings {
    names: Vec<Named>,
    /// The targets of each engine that has a scope.
    scopes: Vec<&'static [&'static str]>,
    /// The forms of ids that have one, by the rank of the field.
    forms: Vec<(u16, &'static IdForm)>,
    /// Bit n is set if some name has n bytes, modulo 64. Most attributes are ruled out by that alone.
    lengths: u64,
}

#[derive(Clone, Debug)]
struct Named {
    name: Cow<'static, str>,
    meaning: Meaning,
    scope: Scope,
}

impl Meanings {
    /// Returns the scope of an engine by its targets.
    pub(super) fn add_scope(&mut self, targets: &'static [&'static str]) -> Scope {
        let known = self.scopes.iter().position(|known| *known == targets);
        Scope::nth(known.unwrap_or_else(|| {
            self.scopes.push(targets);
            self.scopes.len() - 1
        }))
    }

    /// Adds an id field, ranked after those added before.
    pub(super) fn add_instance_id(
        &mut self,
        name: Cow<'static, str>,
        form: Option<&'static IdForm>,
        scope: Scope,
    ) {
        let rank = u16::try_from(self.names.len()).unwrap_or(u16::MAX);
        self.add(name, Meaning::InstanceId { rank }, scope);
        self.forms.extend(form.map(|form| (rank, form)));
    }

    /// Returns the form of the ids in the field of that rank.
    pub(super) fn form(&self, rank: u16) -> Option<&'static IdForm> {
        let found = self.forms.iter().find(|(known, _)| *known == rank);
        found.map(|(_, form)| *form)
    }

    /// Adds a name, unless it has a meaning there already.
    pub(super) fn add(&mut self, name: Cow<'static, str>, meaning: Meaning, scope: Scope) {
        if self.get(&name, Owner::Scope(scope)).is_none() {
            self.lengths |= length_bit(&name);
            let named = Named {
                name,
                meaning,
                scope,
            };
            self.names.push(named);
        }
    }

    /// The id field that was added first.
    pub(super) fn first_name(&self) -> Option<Cow<'static, str>> {
        self.names.first().map(|named| named.name.clone())
    }

    /// Returns the meaning of a name on a span.
    #[inline]
    pub(super) fn get(&self, name: &str, owner: Owner<'_>) -> Option<Meaning> {
        if !self.may_have(name) {
            return None;
        }
        let is_meant = |named: &&Named| {
            named.name == name && (named.scope == Scope::NONE || self.is_in(named.scope, owner))
        };
        self.names.iter().find(is_meant).map(|named| named.meaning)
    }

    #[inline]
    pub(super) fn has_scopes(&self) -> bool {
        !self.scopes.is_empty()
    }

    /// Returns `true` if a span is in the scope. Out of line, since few names ask.
    #[cold]
    #[inline(never)]
    fn is_in(&self, scope: Scope, owner: Owner<'_>) -> bool {
        self.scope_of(owner) == scope
    }

    /// Returns the scope that a span is in.
    pub(super) fn scope_of(&self, owner: Owner<'_>) -> Scope {
        match owner {
            Owner::Scope(scope) => scope,
            _ if self.scopes.is_empty() => Scope::NONE,
            Owner::Target(target) => self.scope_of_target(target),
            Owner::Attributes(attributes) => match target_in(attributes) {
                Some(target) => self.scope_of_target(&target),
                None => Scope::NONE,
            },
        }
    }

    fn scope_of_target(&self, target: &str) -> Scope {
        let mut scopes = self.scopes.iter();
        let index = scopes.position(|targets| targets.contains(&target));
        index.map_or(Scope::NONE, Scope::nth)
    }

    /// Returns `false` if the name certainly has no meaning, which costs next to nothing.
    #[inline]
    pub(super) fn may_have(&self, name: &str) -> bool {
        self.lengths & length_bit(name) != 0
    }
}

/// Returns the target among the attributes of a span that is about to start: tracing-opentelemetry 0.34 sets it as one
/// (src/layer.rs, `on_new_span`).
pub(super) fn target_in(attributes: &[KeyValue]) -> Option<Cow<'_, str>> {
    let mut attributes = attributes.iter();
    let target = attributes.find(|attribute| attribute.key.as_str() == "target");
    target.map(|attribute| attribute.value.as_str())
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
            Some(Meaning::Observing) | None => Self::NONE,
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
