//! The reserved field names, and the reading of them from spans, records and events.

pub(crate) mod callsite;
pub(crate) mod engine;
pub(crate) mod identity;
mod meaning;
pub(crate) mod names;
pub(crate) mod value;
mod visit;

use std::borrow::Cow;

use opentelemetry::trace::{Event, SpanBuilder};
use opentelemetry::{KeyValue, Value};
use tracing::field::Visit;
use tracing::{Metadata, span};

use self::callsite::{Callsite, Role};
use self::engine::{Engine, SpanName};
use self::identity::{IdForm, Ids, Names};
use self::meaning::{Meaning, Meanings, target_in};
pub(crate) use self::meaning::{Owner, ReservedFields, Scope};
use self::names::FieldNames;
pub(crate) use self::names::{
    AGENT_NAME, GEN_AI_AGENT_NAME, GENERATION, INSTANCE_ID, NAME, OBSERVING, PENDING, PROCESSES,
    RELATION, RESUMED, RESUMES, RUN_ID, SPANS, STATUS,
};
use self::value::{EndStatus, printed, truth};
use self::visit::{HasValue, IdentityVisitor, IsThere, IsThereAt, QueueVisitor};
use crate::error::InvalidInstanceId;

/// The fields and engine spans that one storage knows.
#[derive(Clone, Debug)]
pub(crate) struct Fields {
    meanings: Meanings,
    engine_spans: Vec<SpanPattern>,
    nested: Vec<SpanPattern>,
    pollers: Vec<SpanPattern>,
    completing: Vec<SpanPattern>,
}

/// A span by its name, and by its target if that is known.
#[derive(Clone, Debug)]
struct SpanPattern {
    name: Cow<'static, str>,
    target: Option<Cow<'static, str>>,
}

impl SpanPattern {
    fn of_engine(&(name, target): &SpanName) -> Self {
        Self {
            name: name.into(),
            target: Some(target.into()),
        }
    }

    fn matches(&self, name: &str, target: Option<&str>) -> bool {
        let is_target = |known: &Cow<'_, str>| target.is_some_and(|target| target == known);
        self.name == name && self.target.as_ref().is_none_or(is_target)
    }

    fn is_of(&self, metadata: &Metadata<'_>) -> bool {
        self.matches(metadata.name(), Some(metadata.target()))
    }

    /// Reads a name, which may have a target in front, and is taken as a whole as well.
    fn parse(name: Cow<'static, str>) -> impl Iterator<Item = Self> {
        let with_target = name.rsplit_once("::").map(|(target, name)| Self {
            name: name.to_owned().into(),
            target: Some(target.to_owned().into()),
        });
        with_target.into_iter().chain([Self { name, target: None }])
    }

    fn any_matches(patterns: &[Self], span: &SpanBuilder) -> bool {
        if patterns.is_empty() {
            return false;
        }
        let target = target_of(span);
        (patterns.iter()).any(|pattern| pattern.matches(&span.name, target.as_deref()))
    }
}

impl Fields {
    pub(crate) fn new(names: FieldNames) -> Self {
        let mut meanings = Meanings::default();
        for name in names.instance_ids {
            meanings.add_instance_id(name, None, Scope::NONE);
        }
        let others = [
            (names.run_ids, Meaning::RunId),
            (names.parent_instance_ids, Meaning::ParentInstanceId),
            (names.replaying, Meaning::Replaying),
            (names.replaying_children, Meaning::ReplayingChildren),
            (names.statuses, Meaning::Status),
        ];
        for (names, meaning) in others {
            names
                .into_iter()
                .for_each(|name| meanings.add(name, meaning, Scope::NONE));
        }
        meanings.add(OBSERVING.into(), Meaning::Observing, Scope::NONE);
        Self {
            meanings,
            engine_spans: Vec::new(),
            nested: Vec::new(),
            pollers: Vec::new(),
            completing: Vec::new(),
        }
    }

    /// Returns the field in which an adopted span gets its instance id.
    pub(crate) fn primary_instance_id(&self) -> Cow<'static, str> {
        self.meanings.first_name().unwrap_or(INSTANCE_ID.into())
    }

    pub(crate) fn add_engine(&mut self, engine: Engine) {
        let preset = engine.preset();
        let meanings = &mut self.meanings;
        let own = match preset.targets {
            [] => Scope::NONE,
            targets => meanings.add_scope(targets),
        };
        let scope = |is_own| if is_own { own } else { Scope::NONE };
        if let Some(field) = preset.instance_id {
            meanings.add_instance_id(field.name.into(), preset.id_form, scope(field.is_own));
        }
        let names = [
            (preset.run_id, Meaning::RunId),
            (preset.parent_instance_id, Meaning::ParentInstanceId),
            (preset.status, Meaning::Status),
            (preset.replaying, Meaning::Replaying),
        ];
        for (name, meaning) in names {
            if let Some(name) = name {
                meanings.add(name.into(), meaning, Scope::NONE);
            }
        }
        if let Some(field) = preset.replaying_children {
            let meaning = Meaning::ReplayingChildren;
            meanings.add(field.name.into(), meaning, scope(field.is_own));
        }
        let spans = [
            (&mut self.engine_spans, preset.adopted),
            (&mut self.nested, preset.nested),
            (&mut self.pollers, preset.pollers),
            (&mut self.completing, preset.completing),
        ];
        for (patterns, names) in spans {
            patterns.extend(names.iter().map(SpanPattern::of_engine));
        }
    }

    /// Returns `false` if each name has its meaning on every span.
    #[inline]
    pub(crate) fn has_scopes(&self) -> bool {
        self.meanings.has_scopes()
    }

    /// Returns the scope of a span.
    pub(crate) fn scope_of(&self, owner: Owner<'_>) -> Scope {
        self.meanings.scope_of(owner)
    }

    pub(crate) fn add_engine_span(&mut self, name: Cow<'static, str>) {
        self.engine_spans.push(SpanPattern { name, target: None });
    }

    /// Adds a poller by its name, or as `target::name`.
    pub(crate) fn add_poller(&mut self, name: Cow<'static, str>) {
        self.pollers.extend(SpanPattern::parse(name));
    }

    /// Adds a span whose close is the end of its instance, by its name or as `target::name`.
    pub(crate) fn add_completing(&mut self, name: Cow<'static, str>) {
        self.completing.extend(SpanPattern::parse(name));
    }

    /// Returns `true` if a span that is about to start is a poller.
    pub(crate) fn is_poller(&self, span: &SpanBuilder) -> bool {
        SpanPattern::any_matches(&self.pollers, span)
    }

    /// Returns `true` if the close of a span that is about to start is the end of its instance.
    pub(crate) fn is_completing(&self, span: &SpanBuilder) -> bool {
        SpanPattern::any_matches(&self.completing, span)
    }

    /// Returns `true` if the close of some span is the end of its instance.
    pub(crate) fn has_completing(&self) -> bool {
        !self.completing.is_empty()
    }

    /// Returns `true` if a span that is created with `parent: None` belongs into the current one all the same.
    pub(crate) fn is_nested(&self, metadata: &Metadata<'_>) -> bool {
        self.nested.iter().any(|span| span.is_of(metadata))
    }

    /// Reads what the spans of a callsite have in common.
    pub(crate) fn callsite(&self, metadata: &Metadata<'_>) -> Callsite {
        let named = |span: &SpanPattern| span.is_of(metadata);
        let mut declares = ReservedFields::default();
        let mut reserved = Vec::new();
        for field in metadata.fields() {
            let owner = Owner::Target(metadata.target());
            if let Some(meaning) = self.meanings.get(field.name(), owner) {
                declares = declares.with(ReservedFields::from_meaning(Some(meaning)));
                reserved.push(field.index());
            }
        }
        let sole_id = match (declares, &reserved[..]) {
            (ReservedFields::INSTANCE_ID, [index]) => Some(*index),
            _ => None,
        };
        let role = if self.engine_spans.iter().any(named) {
            Role::Engine
        } else if !reserved.is_empty() {
            Role::Tagged
        } else if self.pollers.iter().any(named) {
            Role::Poller
        } else {
            Role::Ordinary
        };
        Callsite::new(role, declares, sole_id)
    }

    /// Returns `false` if the name certainly is not reserved. Nearly always so, and next to free.
    #[inline]
    pub(crate) fn may_mean(&self, name: &str) -> bool {
        self.meanings.may_have(name)
    }

    /// Returns the instance id and the rank of its field if that is the only reserved field among the attributes, and is one
    /// on every span.
    #[inline]
    pub(crate) fn only_id<'a>(&self, attributes: &'a [KeyValue]) -> Option<(Cow<'a, str>, u16)> {
        let mut only = None;
        for attribute in attributes {
            if self.may_mean(attribute.key.as_str()) && only.replace(attribute).is_some() {
                return None;
            }
        }
        let only = only?;
        let everywhere = Owner::Scope(Scope::NONE);
        let Meaning::InstanceId { rank } = self.meanings.get(only.key.as_str(), everywhere)? else {
            return None;
        };
        Some((valid_id(&only.value)?, rank))
    }

    /// Returns the instance id, and the run id if there is one, unless another field among the attributes is reserved. For a span
    /// without a run [`only_id`](Self::only_id) takes 110 instructions less.
    pub(crate) fn only_ids<'a>(&self, attributes: &'a [KeyValue]) -> Option<OnlyIds<'a>> {
        let (mut id, mut run_id) = (None, None);
        for attribute in attributes {
            let name = attribute.key.as_str();
            if !self.may_mean(name) {
                continue;
            }
            match self.meanings.get(name, Owner::Scope(Scope::NONE)) {
                Some(Meaning::InstanceId { rank }) if id.is_none() => {
                    id = Some((valid_id(&attribute.value)?, rank));
                }
                Some(Meaning::RunId) if run_id.is_none() => {
                    run_id = Some(valid_id(&attribute.value)?);
                }
                None if !self.has_scopes() => {}
                _ => return None,
            }
        }
        let (instance_id, rank) = id?;
        Some(OnlyIds {
            instance_id,
            run_id,
            rank,
        })
    }

    /// Reads the reserved fields of a span that is about to start, or of what is recorded on one.
    pub(crate) fn tag_of<'a>(&self, attributes: &'a [KeyValue], owner: Owner<'_>) -> Tag<'a> {
        let mut tag = Tag::default();
        for attribute in attributes {
            if let Some(meaning) = self.meanings.get(attribute.key.as_str(), owner) {
                let form = |rank, id| formed(id, self.meanings.form(rank), attributes);
                tag.take(meaning, &attribute.value, form);
            }
        }
        tag
    }

    /// Reads the terminal status that an event reports.
    pub(crate) fn end_of(&self, event: &[KeyValue]) -> Option<EndStatus> {
        self.tag_of(event, Owner::Scope(Scope::NONE)).end
    }

    /// Returns the terminal status that one of the events reports.
    pub(crate) fn end_in(&self, events: &[Event]) -> Option<EndStatus> {
        let mut events = events.iter();
        events.find_map(|event| self.end_of(&event.attributes))
    }

    /// Reads the ids from a span that is being created, or from what is recorded on one. A span that only looks at an instance
    /// has none.
    pub(crate) fn ids(&self, owner: Owner<'_>, record: impl Fn(&mut dyn Visit)) -> Ids {
        let mut visitor = IdentityVisitor {
            meanings: &self.meanings,
            owner,
            ids: Ids::default(),
        };
        record(&mut visitor);
        let mut ids = visitor.ids;
        if ids.observing {
            return Ids {
                observing: true,
                ..Ids::default()
            };
        }
        if let (Some(form), Some(id)) = (self.meanings.form(ids.rank), &ids.instance_id) {
            let queue = form.queue.and_then(|name| {
                let mut visitor = QueueVisitor { name, queue: None };
                record(&mut visitor);
                visitor.queue
            });
            let id = form.apply(queue.as_deref(), id);
            let is_valid = InvalidInstanceId::check(&id).is_ok();
            ids.instance_id = is_valid.then(|| id.into());
        }
        ids
    }

    /// Returns `true` for a span that is being created, and only looks at the instance that it names.
    pub(crate) fn is_observing(&self, attributes: &span::Attributes<'_>) -> bool {
        let is_declared = attributes.metadata().fields().field(OBSERVING).is_some();
        is_declared && self.ids_of(attributes).observing
    }

    /// Reads the ids from a span that is being created.
    pub(crate) fn ids_of(&self, attributes: &span::Attributes<'_>) -> Ids {
        let owner = Owner::Target(attributes.metadata().target());
        self.ids(owner, |visitor| attributes.record(visitor))
    }

    /// Returns the declared reserved fields that have no value yet. Only an empty `&str` counts as none: formatting every other
    /// value to see whether it is empty would cost each span too much.
    #[inline]
    pub(crate) fn awaits(
        &self,
        callsite: Callsite,
        attributes: &span::Attributes<'_>,
    ) -> ReservedFields {
        let Some(index) = callsite.sole_id() else {
            return self.awaits_any(callsite.declares(), attributes);
        };
        let mut visitor = IsThereAt {
            index,
            is_there: false,
        };
        attributes.record(&mut visitor);
        match visitor.is_there {
            true => ReservedFields::NONE,
            false => ReservedFields::INSTANCE_ID,
        }
    }

    #[inline(never)]
    fn awaits_any(
        &self,
        declared: ReservedFields,
        attributes: &span::Attributes<'_>,
    ) -> ReservedFields {
        if declared == ReservedFields::NONE {
            return declared;
        }
        let mut visitor = IsThere {
            meanings: &self.meanings,
            owner: Owner::Target(attributes.metadata().target()),
            found: ReservedFields::default(),
        };
        attributes.record(&mut visitor);
        declared.without(visitor.found)
    }

    /// Returns the id fields that a record on a span gives a value to.
    pub(crate) fn recorded(&self, owner: Owner<'_>, values: &span::Record<'_>) -> ReservedFields {
        let mut visitor = HasValue {
            meanings: &self.meanings,
            owner,
            found: ReservedFields::default(),
        };
        values.record(&mut visitor);
        visitor.found
    }
}

/// Returns the target of a span that is about to start, if it has one.
pub(crate) fn target_of(span: &SpanBuilder) -> Option<Cow<'_, str>> {
    target_in(span.attributes.as_deref().unwrap_or_default())
}

/// Gives an id its form, unless it is none.
fn formed<'a>(
    id: Cow<'a, str>,
    form: Option<&'static IdForm>,
    attributes: &[KeyValue],
) -> Cow<'a, str> {
    let Some(form) = form.filter(|_| !id.is_empty()) else {
        return id;
    };
    let mut attributes = attributes.iter();
    let queue = attributes.find(|attribute| form.queue == Some(attribute.key.as_str()));
    let queue = queue.map(|attribute| printed(&attribute.value));
    form.apply(queue.as_deref(), &id).into()
}

#[inline]
fn valid_id(value: &Value) -> Option<Cow<'_, str>> {
    let id = printed(value);
    InvalidInstanceId::check(&id).is_ok().then_some(id)
}

/// The ids of a span that names its instance, and at most its run.
pub(crate) struct OnlyIds<'a> {
    instance_id: Cow<'a, str>,
    run_id: Option<Cow<'a, str>>,
    /// The rank of the field that names the instance.
    pub(crate) rank: u16,
}

impl OnlyIds<'_> {
    #[inline]
    pub(crate) fn names(&self) -> Names<'_> {
        Names {
            instance_id: &self.instance_id,
            run_id: self.run_id.as_deref(),
            parent_instance_id: None,
        }
    }
}

/// The reserved fields of one span.
#[derive(Debug, Default)]
pub(crate) struct Tag<'a> {
    pub(crate) instance_id: Option<Cow<'a, str>>,
    pub(crate) run_id: Option<Cow<'a, str>>,
    pub(crate) parent_instance_id: Option<Cow<'a, str>>,
    pub(crate) replaying: Option<bool>,
    /// The span is real, and what it opens is replayed.
    pub(crate) replaying_children: Option<bool>,
    /// The span only looks at the instance.
    observing: Option<bool>,
    /// A terminal status.
    pub(crate) end: Option<EndStatus>,
    /// An id longer than [`MAX_INSTANCE_ID_BYTES`](crate::MAX_INSTANCE_ID_BYTES), which is ignored.
    pub(crate) oversized: Option<Cow<'a, str>>,
    /// The ids of further id fields, which do not count.
    pub(crate) outranked: Vec<Cow<'a, str>>,
    rank: u16,
}

impl<'a> Tag<'a> {
    /// Returns the ids, unless the span only looks at the instance.
    #[inline]
    pub(crate) fn names(&self) -> Option<Names<'_>> {
        match self.is_observing() {
            true => None,
            false => self.all_names(),
        }
    }

    /// Returns the ids if the span only looks at the instance.
    pub(crate) fn observed(&self) -> Option<Names<'_>> {
        self.all_names().filter(|_| self.is_observing())
    }

    pub(crate) fn is_observing(&self) -> bool {
        self.observing == Some(true)
    }

    fn all_names(&self) -> Option<Names<'_>> {
        Some(Names {
            instance_id: self.instance_id.as_deref()?,
            run_id: self.run_id.as_deref(),
            parent_instance_id: self.parent_instance_id.as_deref(),
        })
    }

    /// The rank of the field that names the instance; a lower one counts more.
    pub(crate) fn rank(&self) -> u16 {
        match self.instance_id {
            Some(_) => self.rank,
            None => u16::MAX,
        }
    }

    /// Takes a reserved field. `form` gives an instance id, by the rank of its field, the form that it has.
    fn take(
        &mut self,
        meaning: Meaning,
        value: &'a Value,
        form: impl FnOnce(u16, Cow<'a, str>) -> Cow<'a, str>,
    ) {
        match meaning {
            Meaning::Replaying => self.replaying = truth(value).or(self.replaying),
            Meaning::ReplayingChildren => {
                self.replaying_children = truth(value).or(self.replaying_children);
            }
            Meaning::Observing => self.observing = truth(value).or(self.observing),
            Meaning::Status => self.end = EndStatus::read(value).or(self.end),
            Meaning::InstanceId { rank } => {
                let Some(id) = self.id(form(rank, printed(value))) else {
                    return;
                };
                if self.instance_id.is_some() && rank > self.rank {
                    self.outranked.push(id);
                } else {
                    let known = self.instance_id.replace(id);
                    // A second value of the same field replaces the first.
                    self.outranked.extend(known.filter(|_| rank != self.rank));
                    self.rank = rank;
                }
            }
            Meaning::RunId => self.run_id = self.id(printed(value)).or(self.run_id.take()),
            Meaning::ParentInstanceId => {
                let id = self.id(printed(value));
                self.parent_instance_id = id.or(self.parent_instance_id.take());
            }
        }
    }

    fn id(&mut self, id: Cow<'a, str>) -> Option<Cow<'a, str>> {
        match InvalidInstanceId::check(&id) {
            Ok(()) => Some(id),
            Err(InvalidInstanceId::Empty) => None,
            Err(InvalidInstanceId::TooLong { .. }) => {
                self.oversized = Some(id);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_ids_the_first_in_order_with_a_value_counts() {
        let fields = Fields::new(FieldNames {
            instance_ids: vec!["a".into(), "b".into()],
            ..FieldNames::default()
        });
        let id = |attributes: &[KeyValue]| {
            let tag = fields.tag_of(attributes, Owner::Attributes(attributes));
            tag.instance_id.map(Cow::into_owned)
        };
        let (a, b) = (KeyValue::new("a", "1"), KeyValue::new("b", 2));
        assert_eq!(id(&[b.clone(), a.clone()]).as_deref(), Some("1"));
        assert_eq!(id(&[a, b.clone()]).as_deref(), Some("1"));
        assert_eq!(id(&[KeyValue::new("a", ""), b]).as_deref(), Some("2"));
    }
}
