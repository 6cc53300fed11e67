//! The decision: what becomes of a tagged span. Everything that chooses a parent is in this file.
//!
//! [`decide`] is a pure function of the span that arrives, the cache entry of its instance, the policy and the time. It
//! does no I/O, takes no lock, reads no clock and calls nothing back, so it runs under the lock of the entry's shard.
//! Its callers look up the entry, act on the [`Decision`], and record the span: `tracer.rs` for a span that starts,
//! `tracer/span.rs` for one whose id came late, `tracer/replay.rs` for one that is re-executed.

pub(crate) mod bounds;
pub(crate) mod relation;

use std::time::SystemTime;

use opentelemetry::trace::SpanContext;

use crate::cache::entry::{Entry, Run};
use crate::context::WorkflowContext;
use crate::explain::trail::Outcome;
use bounds::Bounds;
use relation::{Continuation, Relation, Relations};

/// The settings that decide.
#[derive(Clone, Debug, Default)]
pub(crate) struct Policy {
    pub(crate) relations: Relations,
    pub(crate) bounds: Bounds,
}

/// A tagged span at the moment of the decision.
#[derive(Clone, Debug)]
pub(crate) struct Arrival<'a> {
    pub(crate) moment: Moment,
    pub(crate) run_id: Option<&'a str>,
    /// The valid span context that the span has as its parent without this crate; its own, if it has started.
    pub(crate) natural: Option<&'a SpanContext>,
    /// The stored context of its parent instance, which the caller looks up for the first span of an instance.
    pub(crate) parent_instance: Option<WorkflowContext>,
    /// The caller has waited long enough for another thread that opens the next trace.
    pub(crate) stops_waiting: bool,
}

/// What is happening to the span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// It starts.
    Start,
    /// It starts beneath a span whose replay is over: its natural parent may be of any age.
    StartAfterReplay,
    /// It has started, and its id was recorded only now.
    Late,
    /// It is re-executed, and a stand-in takes its place.
    Replay,
}

/// What becomes of a tagged span.
#[derive(Debug)]
pub(crate) struct Decision {
    pub(crate) parent: Parent,
    pub(crate) link: Option<Link>,
    /// The row of the table and what is done, as `explain` tells it.
    pub(crate) outcome: Outcome,
    /// The context that [`Parent::Stored`] and [`Link::ToStored`] mean.
    pub(crate) stored: Option<WorkflowContext>,
    /// Whether the span's own context becomes the stored one.
    pub(crate) record: Record,
    /// It is the first span here of a context that another process recorded: it says so by attributes.
    pub(crate) announce: bool,
    /// It counts towards `max_spans`.
    count: bool,
    /// Another thread is opening the next trace: look up and decide again.
    pub(crate) wait: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    Natural,
    Stored,
    /// None: the span becomes a root.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    ToNatural(Relation),
    ToStored(Relation),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    No,
    /// As the first span of its instance or run, unless another one is faster.
    First,
    /// As the root of the trace with this number, which follows the stored one.
    Generation(u32),
}

/// Decides what becomes of a tagged span. The rows are read from the top; the first that fits counts.
///
/// `entry` is what the cache has for the instance; `now` is needed with a `max_age` only.
#[inline]
pub(crate) fn decide(
    arrival: &Arrival<'_>,
    entry: Option<&Entry>,
    policy: &Policy,
    now: Option<SystemTime>,
) -> Decision {
    let relations = &policy.relations;
    let Some(entry) = entry else {
        return decide_first(arrival, relations);
    };
    let known = entry.run(arrival.run_id);
    let run = known.unwrap_or(entry.latest());
    let stored = run.context();
    let is_nested = arrival.is_in_trace_of(&stored);

    if arrival.moment == Moment::Replay {
        return Decision::replayed(known.map(|_| stored));
    }
    if arrival.moment == Moment::Late {
        return Decision::late(stored, known.is_some(), is_nested, relations);
    }
    if known.is_none() {
        // The first span of another run. Nested in the old run's trace, it stays there.
        let relation = match is_nested {
            true => Relation::SameTrace,
            false => Relation::NewRun,
        };
        return Decision {
            record: Record::First,
            ..Decision::related(relation, stored, arrival, relations)
        };
    }
    // Local nesting wins over the bounds, but what a replay stands in for may be of any age.
    let is_bounded = !is_nested || arrival.moment == Moment::StartAfterReplay;
    if is_bounded && policy.bounds.are_passed(run, now) {
        return decide_generation(Relation::Expired, run, stored, arrival, relations);
    }
    if is_nested {
        return Decision {
            count: is_bounded,
            ..Decision::related(Relation::SameTrace, stored, arrival, relations)
        };
    }
    let announce = stored.is_remote() && !run.is_announced();
    let decision = if announce || stored.is_resumed() {
        if relations.resamples(Relation::Resumed) {
            decide_generation(Relation::Resumed, run, stored, arrival, relations)
        } else {
            Decision::related(Relation::Resumed, stored, arrival, relations)
        }
    } else if arrival.natural.is_some() {
        Decision::related(Relation::Foreign, stored, arrival, relations)
    } else {
        Decision::related(Relation::Orphan, stored, arrival, relations)
    };
    Decision {
        announce: announce && !decision.wait,
        count: !decision.wait,
        ..decision
    }
}

/// Nothing is stored for the instance.
fn decide_first(arrival: &Arrival<'_>, relations: &Relations) -> Decision {
    let parent = arrival.parent_instance.as_ref();
    match (arrival.moment, parent) {
        (Moment::Replay, _) => Decision::replayed(None),
        // A first span keeps its natural parent, and so does a child workflow inside its parent's trace.
        (Moment::Start | Moment::StartAfterReplay, Some(parent))
            if !arrival.is_in_trace_of(parent) =>
        {
            let continuation = relations.get(Relation::Child);
            Decision {
                record: Record::First,
                ..Decision::continued(Relation::Child, continuation, parent.clone(), arrival)
            }
        }
        (Moment::Start | Moment::StartAfterReplay | Moment::Late, _) => Decision::first(None),
    }
}

/// The run goes on in its next trace, which one thread opens.
#[cold]
fn decide_generation(
    relation: Relation,
    run: &Run,
    stored: WorkflowContext,
    arrival: &Arrival<'_>,
    relations: &Relations,
) -> Decision {
    if !run.is_rolling() {
        return Decision {
            record: Record::Generation(run.generation().saturating_add(1)),
            ..Decision::related(relation, stored, arrival, relations)
        };
    }
    Decision {
        wait: !arrival.stops_waiting,
        ..Decision::continued(Relation::Expired, Continuation::Parent, stored, arrival)
    }
}

impl Arrival<'_> {
    #[inline]
    fn is_in_trace_of(&self, stored: &WorkflowContext) -> bool {
        self.natural
            .is_some_and(|natural| natural.trace_id() == stored.trace_id())
    }
}

impl Decision {
    /// The span keeps its natural parent and is recorded.
    fn first(stored: Option<WorkflowContext>) -> Self {
        Self {
            parent: Parent::Natural,
            link: None,
            outcome: Outcome::Recorded,
            stored,
            record: Record::First,
            announce: false,
            count: false,
            wait: false,
        }
    }

    /// A stand-in for the recorded span, or for the natural parent if nothing is recorded.
    fn replayed(stored: Option<WorkflowContext>) -> Self {
        Self {
            parent: match stored {
                Some(_) => Parent::Stored,
                None => Parent::Natural,
            },
            outcome: Outcome::Replayed,
            record: Record::No,
            ..Self::first(stored)
        }
    }

    /// Returns `true` if nothing is stored for the instance.
    #[inline]
    pub(crate) fn is_first(&self) -> bool {
        self.record == Record::First && self.stored.is_none()
    }

    /// Decides again for a late span, after another span was recorded first.
    pub(crate) fn after_lost_race(
        winner: WorkflowContext,
        arrival: &Arrival<'_>,
        policy: &Policy,
    ) -> Self {
        let is_nested = arrival.is_in_trace_of(&winner);
        Self::late(winner, true, is_nested, &policy.relations)
    }

    /// The parent can no longer change: a link is left, or the span is the first of its instance or run.
    fn late(
        stored: WorkflowContext,
        is_known: bool,
        is_nested: bool,
        relations: &Relations,
    ) -> Self {
        if !is_known {
            return Self::first(None);
        }
        let continuation = relations.get(Relation::Late);
        let links = continuation == Continuation::Link && !is_nested;
        Self {
            outcome: Outcome::Related(Relation::Late, continuation),
            link: links.then_some(Link::ToStored(Relation::Late)),
            record: Record::No,
            ..Self::first(Some(stored))
        }
    }

    #[inline]
    fn related(
        relation: Relation,
        stored: WorkflowContext,
        arrival: &Arrival<'_>,
        relations: &Relations,
    ) -> Self {
        let continuation = relations.for_stored(relation, stored.is_sampled());
        Self::continued(relation, continuation, stored, arrival)
    }

    #[inline]
    fn continued(
        relation: Relation,
        continuation: Continuation,
        stored: WorkflowContext,
        arrival: &Arrival<'_>,
    ) -> Self {
        let (parent, link) = match continuation {
            Continuation::Keep => (Parent::Natural, None),
            Continuation::Parent => (Parent::Stored, None),
            Continuation::Link => (Parent::Natural, Some(Link::ToStored(relation))),
            Continuation::ParentAndLink => {
                let natural = arrival.natural.map(|_| Link::ToNatural(relation));
                (Parent::Stored, natural)
            }
            Continuation::NewRoot => (Parent::Nothing, None),
            Continuation::NewRootAndLink => (Parent::Nothing, Some(Link::ToStored(relation))),
        };
        Self {
            parent,
            link,
            outcome: Outcome::Related(relation, continuation),
            stored: Some(stored),
            record: Record::No,
            announce: false,
            count: false,
            wait: false,
        }
    }

    /// Notes in the run what the decision has taken: a place among `max_spans`, the opening of the next trace, the
    /// announcement. To be called under the same lock as [`decide`].
    #[inline]
    pub(crate) fn mark(&self, run: &Run) {
        match self.record {
            Record::Generation(_) => run.set_rolling(true),
            Record::No if self.count => run.count_span(),
            Record::No | Record::First => {}
        }
        if self.announce {
            run.set_announced();
        }
    }
}
