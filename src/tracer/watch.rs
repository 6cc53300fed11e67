//! The watch over a started span: which instance it has, and what may still be recorded on it.

use std::sync::Arc;
use std::time::SystemTime;

use opentelemetry::trace::{Span, SpanContext};
use opentelemetry::{KeyValue, SpanId, TraceId};

use super::handoff::{self, Mark, StorageId};
use super::live_ids::Live;
use super::replay::ReplaysBeneath;
use super::rooted::{Rooted, allocate_late};
use crate::context::WorkflowContext;
use crate::decision::relation::Relation;
use crate::decision::{Arrival, Decision, Moment, Record, decide};
use crate::explain::author::Author;
use crate::explain::trail;
use crate::fields::identity::{Identity, Names};
use crate::fields::value::EndStatus;
use crate::fields::{self, Fields, Owner, Scope};
use crate::root::open::Within;
use crate::storage::remote::LateWinner;
use crate::storage::shared::Shared;

/// The knowledge of a started span, and of what may still be recorded on it.
pub(super) struct Watch {
    pub(super) shared: Arc<Shared>,
    joined: Joined,
    memo: Option<Box<Memo>>,
    /// The rank of the field that named its instance; a lower one counts more.
    rank: u16,
    /// Its attributes are read whether it records or not.
    observes: bool,
    /// That of its target, if a reserved field may still be recorded on it.
    scope: Scope,
}

/// The instance of a span.
pub(super) enum Joined {
    /// No instance is named so far.
    Nothing,
    /// The hash of the instance's id.
    Hash(u64),
    /// Kept for a run, or for a backend: the hash is not enough there.
    Identity(Box<Identity>),
}

/// The knowledge that only some spans need.
#[derive(Default)]
pub(super) struct Memo {
    /// Set if it has not named its instance itself; if that is known all the same, it is its first child's.
    unnamed: Option<Box<Unnamed>>,
    /// Set if it was recorded, and a backend may still know of a faster process.
    late_winner: Option<LateWinner>,
    /// Set if it is a poller, as long as it lives.
    poller: Option<Live<Shared, TraceId>>,
    /// The number by which its children in `tracing` find it, as soon as they are replayed; zero if it has none.
    number: u64,
    /// Set once the span has said that what is opened beneath it is replayed.
    replays_beneath: Option<ReplaysBeneath>,
    /// Set if it was opened inside a replay through the OpenTelemetry API, and is real.
    new_work: Option<Live<Shared, SpanId>>,
    /// Set while the span is open in the own span of its instance.
    within: Option<Within>,
    /// Set if its close is the end of its instance: the status, so far.
    at_close: Option<EndStatus>,
}

/// A span that has not named its instance, and may be recorded late.
#[derive(Default)]
pub(super) struct Unnamed {
    pub(super) run_id: Option<Box<str>>,
    pub(super) parent_instance_id: Option<Box<str>>,
    /// The id of the instance that it was adopted into becomes an attribute when it ends, unless it names itself.
    pub(super) owes_id: bool,
    /// The span only looks at the instance that it names.
    pub(super) is_observing: bool,
    pub(super) author: Author,
    /// A terminal status that was told, and counts for the instance that it names later.
    pub(super) told_end: Option<EndStatus>,
}

impl Memo {
    /// `completes` says whether the close of the span is the end of its instance.
    #[inline(never)]
    pub(super) fn new(unnamed: Option<Box<Unnamed>>, completes: bool) -> Box<Self> {
        Box::new(Self {
            unnamed,
            at_close: completes.then_some(EndStatus::Completed),
            ..Self::default()
        })
    }

    pub(super) fn unnamed(&self) -> Option<&Unnamed> {
        self.unnamed.as_deref()
    }
}

impl Unnamed {
    /// Returns the attribute of an adopted span that certainly does not name itself.
    pub(super) fn id_to_give_at_start(
        &self,
        fields: &Fields,
        joined: &Identity,
    ) -> Option<KeyValue> {
        (!self.owes_id).then(|| Self::id_to_give(fields, joined))
    }

    /// Returns the attribute of an adopted span that could have named itself, and has not.
    fn id_to_give_at_end(&self, fields: &Fields, joined: &Identity) -> Option<KeyValue> {
        self.owes_id.then(|| Self::id_to_give(fields, joined))
    }

    fn id_to_give(fields: &Fields, joined: &Identity) -> KeyValue {
        KeyValue::new(fields.primary_instance_id(), joined.instance_id.to_string())
    }
}

impl Joined {
    #[inline]
    fn identity(&self) -> Option<&Identity> {
        match self {
            Self::Identity(identity) => Some(identity),
            Self::Nothing | Self::Hash(_) => None,
        }
    }

    fn run_id(&self) -> Option<&str> {
        self.identity()?.run_id.as_deref()
    }

    /// Returns the hash of the instance's id.
    fn hash(&self, shared: &Shared) -> Option<u64> {
        match self {
            Self::Nothing => None,
            Self::Hash(hash) => Some(*hash),
            Self::Identity(identity) => Some(shared.key(&identity.instance_id, None).hash),
        }
    }
}

impl Watch {
    #[inline]
    pub(super) fn new(
        shared: &Arc<Shared>,
        joined: Joined,
        rank: u16,
        memo: Option<Box<Memo>>,
        observes: bool,
        scope: Scope,
    ) -> Self {
        Self {
            shared: shared.clone(),
            joined,
            memo,
            rank,
            observes,
            scope,
        }
    }

    /// Answers the questions that the tracer asks through `is_recording`. Returns `true` if a field may still be recorded.
    #[inline]
    pub(super) fn answer(&self) -> bool {
        if !matches!(self.joined, Joined::Nothing) {
            handoff::answer_tagged();
        }
        if let Some(identity) = self.joined.identity() {
            handoff::answer_identity(StorageId::new(&self.shared), Some(identity));
        }
        let memo = self.memo.as_ref();
        if let Some(beneath) = memo.and_then(|memo| memo.replays_beneath.as_ref()) {
            beneath.answer();
        }
        self.observes
    }

    #[cold]
    fn memo(&mut self) -> &mut Memo {
        self.memo.get_or_insert_default()
    }

    /// Makes the trace of the span a poller's, until it ends.
    pub(super) fn set_poller(&mut self, trace: TraceId) {
        let live = Live::new(&self.shared, |shared| &shared.poller_traces, trace);
        self.memo().poller = Some(live);
    }

    /// Notes the number by which its children in `tracing` find the span, should they be replayed.
    pub(super) fn note_number(&mut self, mark: Mark) {
        if mark.may_be_replayed {
            self.memo().number = mark.number;
        }
    }

    pub(super) fn set_new_work(&mut self, span: &SpanContext) {
        let live = Live::new(&self.shared, |shared| &shared.new_work, span.span_id());
        self.memo().new_work = Some(live);
    }

    /// Says whether what is opened beneath is replayed from now on. The span itself has started, and stays real.
    pub(super) fn replay_beneath(&mut self, span: &SpanContext, replaying: bool) {
        let is_known = self
            .memo
            .as_ref()
            .is_some_and(|memo| memo.replays_beneath.is_some());
        if !replaying && !is_known {
            return;
        }
        let shared = self.shared.clone();
        let memo = self.memo();
        let new = || ReplaysBeneath::new(&shared, memo.number, span);
        memo.replays_beneath.get_or_insert_with(new).set(replaying);
    }

    pub(super) fn expect_late_winner(&mut self, late_winner: Option<LateWinner>) {
        if late_winner.is_some() {
            self.memo().late_winner = late_winner;
        }
    }

    /// Returns `false` if the attribute certainly need not be observed.
    #[inline]
    pub(super) fn wants(&self, attribute: &KeyValue) -> bool {
        // One that was held declares a field, or was adopted.
        let was_held = self.observes || self.memo.is_some();
        was_held || self.shared.fields.may_mean(attribute.key.as_str())
    }

    pub(super) fn observe<S: Span>(&mut self, span: &mut S, attribute: &mut KeyValue) {
        if handoff::may_be_time(attribute.key.as_str()) {
            handoff::correct_times(attribute);
        }
        if self.shared.fields.may_mean(attribute.key.as_str()) {
            self.read(span, attribute);
        }
    }

    #[inline(never)]
    fn read<S: Span>(&mut self, span: &mut S, attribute: &KeyValue) {
        let shared = self.shared.clone();
        let owner = Owner::Scope(self.scope);
        let tag = shared.tag_of(std::slice::from_ref(attribute), owner);
        if let Some(id) = &tag.instance_id {
            self.learn_id(span, id, tag.rank());
        }
        if let Some(run_id) = &tag.run_id {
            self.learn_run(span, run_id);
        }
        if let Some(id) = &tag.parent_instance_id {
            self.learn_parent(span, id);
        }
        if let Some(replaying) = tag.replaying.or(tag.replaying_children) {
            self.replay_beneath(span.span_context(), replaying);
        }
        self.complete_if(tag.end);
    }

    /// An instance id was recorded after the start. The first one counts, unless the field of this one ranks higher; one that
    /// a span was only adopted into gives way to its own.
    fn learn_id<S: Span>(&mut self, span: &mut S, id: &str, rank: u16) {
        let unnamed = self.memo.as_ref().and_then(|memo| memo.unnamed.as_ref());
        if unnamed.is_some_and(|unnamed| unnamed.is_observing) {
            let stored = self.shared.tier.peek(id);
            return self.link(span, stored.as_ref(), Relation::Observed);
        }
        let has_joined = self.joined.hash(&self.shared) == Some(self.shared.key(id, None).hash);
        let unnamed = self.memo.as_mut().and_then(|memo| memo.unnamed.take());
        let is_named = unnamed.is_none();
        if is_named && has_joined {
            return;
        }
        if is_named && rank >= self.rank {
            self.shared.counters.late.add();
            let stored = self.shared.tier.peek(id);
            return self.link(span, stored.as_ref(), Relation::Late);
        }
        self.rank = rank;
        let Unnamed {
            run_id,
            parent_instance_id,
            author,
            told_end,
            ..
        } = *unnamed.unwrap_or_default();
        let names = Names {
            instance_id: id,
            run_id: run_id.as_deref(),
            parent_instance_id: None,
        };
        let is_other_run = run_id.is_some() && run_id.as_deref() != self.joined.run_id();
        if !has_joined || is_other_run {
            self.join_late(span, names, author);
        }
        if let Some(parent) = parent_instance_id {
            self.learn_parent(span, &parent);
        }
        self.complete_if(told_end);
    }

    /// A run id was recorded after the start.
    fn learn_run<S: Span>(&mut self, span: &mut S, run_id: &str) {
        if let Some(unnamed) = (self.memo.as_mut()).and_then(|memo| memo.unnamed.as_mut()) {
            unnamed.run_id = Some(run_id.into());
        }
        let id = match &self.joined {
            Joined::Nothing => return,
            Joined::Hash(hash) => self.shared.tier.cache().id_of(*hash),
            Joined::Identity(known) => Some(known.instance_id.clone()),
        };
        let known_run = self.joined.run_id();
        if known_run == Some(run_id) {
            return;
        }
        let (Some(id), None) = (&id, known_run) else {
            // A second run id names no other run of a span, and an instance that is forgotten has none.
            return self.shared.counters.late.add();
        };
        let names = Names {
            instance_id: id,
            run_id: Some(run_id),
            parent_instance_id: None,
        };
        self.join_late(span, names, Author::default());
    }

    /// A parent instance id was recorded after the start: only a link is left.
    fn learn_parent<S: Span>(&mut self, span: &mut S, id: &str) {
        let Some(instance) = self.joined.hash(&self.shared) else {
            if let Some(unnamed) = self.memo().unnamed.as_mut() {
                unnamed.parent_instance_id = Some(id.into());
            }
            return;
        };
        self.shared.counters.late.add();
        let parent = self.shared.tier.peek(id);
        if parent.is_none() {
            self.shared
                .note(instance, || trail::Event::UnknownParent(id.into()));
        }
        self.link(span, parent.as_ref(), Relation::Child);
    }

    /// Leaves a link to a stored context that the span could not follow, if its relation is to be linked at all.
    fn link<S: Span>(&self, span: &mut S, stored: Option<&WorkflowContext>, relation: Relation) {
        let links = self.shared.policy.relations.get(relation).links();
        if let Some(stored) = stored.filter(|_| links) {
            link_unless_in_trace(span, stored, relation);
        }
    }

    pub(super) fn observe_event(&mut self, attributes: &[KeyValue]) {
        self.complete_if(self.shared.fields.end_of(attributes));
    }

    #[inline]
    pub(super) fn complete_if(&mut self, told_end: Option<EndStatus>) {
        if let Some(status) = told_end {
            self.complete(status);
        }
    }

    #[cold]
    fn complete(&mut self, status: EndStatus) {
        let memo = self.memo.as_mut();
        if let Some(unnamed) = memo.and_then(|memo| memo.unnamed.as_mut()) {
            unnamed.told_end = Some(status);
        }
        match &self.joined {
            Joined::Nothing => {}
            Joined::Hash(hash) => {
                self.shared.tier.cache().complete_hashed(*hash);
            }
            Joined::Identity(identity) => self.shared.complete(identity, status),
        }
    }

    /// Notes that the span has failed, which is the status of its instance if its close is the end of that.
    pub(super) fn observe_failure(&mut self) {
        if let Some(status) = (self.memo.as_mut()).and_then(|memo| memo.at_close.as_mut()) {
            *status = EndStatus::Failed;
        }
    }

    /// Notes that the span is open in the own span of its instance.
    pub(super) fn enter_root(&mut self, rooted: Rooted) {
        self.expect_late_winner(rooted.late_winner);
        if rooted.within.is_some() {
            self.memo().within = rooted.within;
        }
    }

    /// Returns its stay in the own span of its instance, to be ended once the span is exported.
    #[inline]
    pub(super) fn take_within(&mut self) -> Option<Within> {
        self.memo.as_mut()?.within.take()
    }

    /// Returns the name of this span as the trail of its instance tells it, if that goes back so far.
    fn author_in_trail(&self, own: &SpanContext) -> Author {
        let joined = self.joined.hash(&self.shared);
        let name = joined.and_then(|instance| self.shared.span_name(instance, own));
        Author {
            span_name: name.unwrap_or_default(),
            ..Author::default()
        }
    }

    /// The id was recorded after the start: the parent can no longer change.
    fn join_late<S: Span>(&mut self, span: &mut S, names: Names<'_>, author: Author) {
        let shared = &self.shared;
        shared.counters.late.add();
        let key = shared.key(names.instance_id, names.run_id);
        let own = span.span_context();
        let arrival = Arrival {
            moment: Moment::Late,
            run_id: names.run_id,
            natural: Some(own),
            is_polled: shared.poller_traces.contains(own.trace_id()),
            parent_instance: None,
            stops_waiting: false,
        };
        let decide = |entry: Option<&_>| decide(&arrival, entry, &shared.policy, None);
        let mut decision = shared.tier.look_up(key, decide);
        let author = match author.is_known() {
            true => author,
            false => self.author_in_trail(own),
        };
        let (name, mut late_winner) = (author.span_name.clone(), None);
        let context = WorkflowContext::from_span(own, shared.clock.now());
        if let (Record::First, Some(context)) = (decision.record, context) {
            let (context, root) = match allocate_late(shared, key, &name, own) {
                Some((context, root)) => (context, Some(root)),
                None => (context, None),
            };
            match shared.record(key, None, context, author, root) {
                Ok(may_come) => late_winner = may_come,
                Err(winner) => {
                    decision = Decision::after_lost_race(winner, &arrival, &shared.policy);
                }
            }
        }
        let outcome = decision.outcome;
        shared.note_decision(key.hash, name, own, &SpanContext::NONE, outcome, false);
        if let Some(relation) = decision.links.to_stored {
            self.link(span, decision.stored.as_ref(), relation);
        }
        let within = shared.enter_root(key);
        self.joined = Joined::Identity(names.to_boxed_identity());
        self.memo().within = within;
        self.expect_late_winner(late_winner);
    }

    /// Leaves the last links. Returns the time of the end, if that is not the one the inner layer knows.
    #[inline]
    pub(super) fn end<S: Span>(&mut self, span: &mut S) -> Option<SystemTime> {
        if !std::mem::take(&mut self.observes) && self.memo.is_none() {
            return None;
        }
        if let Some(status) = (self.memo.as_mut()).and_then(|memo| memo.at_close.take()) {
            self.complete(status);
        }
        if let Some(memo) = &mut self.memo {
            memo.poller = None;
            if let Some(winner) = memo.late_winner.as_ref().and_then(|winner| winner.get()) {
                link_unless_in_trace(span, winner, Relation::Late);
            }
            let adopted = memo.unnamed.as_ref().zip(self.joined.identity());
            if let Some(id) = adopted.and_then(|(unnamed, joined)| {
                unnamed.id_to_give_at_end(&self.shared.fields, joined)
            }) {
                span.set_attribute(id);
            }
        }
        handoff::take_times()?.end
    }
}

/// Links a started span to the stored context that it could not follow.
pub(super) fn link_unless_in_trace<S: Span>(
    span: &mut S,
    stored: &WorkflowContext,
    relation: Relation,
) {
    if span.span_context().trace_id() != stored.trace_id() {
        span.add_link(stored.to_span_context(), vec![relation_attribute(relation)]);
    }
}

/// The attribute of every link of this crate.
pub(super) fn relation_attribute(relation: Relation) -> KeyValue {
    KeyValue::new(fields::RELATION, relation.as_str())
}
