//! The decision: what becomes of a tagged span. Everything that chooses a parent is in this file.
//!
//! [`decide`] is a pure function of the span that arrives, the cache entry of its instance, the policy and the time. It
//! does no I/O, takes no lock, reads no clock and calls nothing back, so it runs under the lock of the entry's shard.
//! Its callers look up the entry, act on the [`Decision`], and record the span: `tracer.rs` for a span that starts,
//! `tracer/watch.rs` for one whose id came late, `tracer/replay.rs` for one that is re-executed.

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
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival<'a> {
    pub(crate) moment: Moment,
    pub(crate) run_id: Option<&'a str>,
    /// The valid span context that the span has as its parent without this crate; its own, if it has started.
    pub(crate) natural: Option<&'a SpanContext>,
    /// That one is in the trace of a live poller.
    pub(crate) is_polled: bool,
    /// The stored context of its parent instance, which the caller looks up for the first span of an instance.
    pub(crate) parent_instance: Option<&'a WorkflowContext>,
    /// The caller has waited long enough for another thread that opens the next trace.
    pub(crate) stops_waiting: bool,
}

/// The event for which a decision is needed.
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
    /// It starts, and only looks at the instance.
    Observe,
}

/// The fate of a tagged span: its parent, its links, and its part in the records.
#[derive(Debug)]
pub(crate) struct Decision {
    pub(crate) parent: Parent,
    pub(crate) links: Links,
    /// The row of the table and what is done, as `explain` tells it.
    pub(crate) outcome: Outcome,
    /// The context that [`Parent::Stored`] and [`Links::to_stored`] mean.
    pub(crate) stored: Option<WorkflowContext>,
    /// Says if the span's own context becomes the stored one.
    pub(crate) record: Record,
    /// It is the first span here of a context that another process recorded: it says so by attributes.
    pub(crate) announce: bool,
    /// Its instance had ended before.
    pub(crate) after_end: bool,
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

/// The links of a span, each with its reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Links {
    pub(crate) to_natural: Option<Relation>,
    pub(crate) to_stored: Option<Relation>,
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
    let is_nested = arrival.is_in_trace_of(&stored) || arrival.is_in_other_trace_of(entry);

    match arrival.moment {
        Moment::Start | Moment::StartAfterReplay => {}
        Moment::Replay => return Decision::replayed(known.map(|_| stored)),
        Moment::Observe => return Decision::observed(Some(stored), is_nested, relations),
        Moment::Late => {
            let decision = Decision::late(stored, known.is_some(), is_nested, relations);
            return match decision.record {
                Record::First if arrival.is_polled && !is_nested => decision.in_poller(),
                _ => decision,
            };
        }
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
    let relation = if announce || stored.is_resumed() {
        Relation::Resumed
    } else if arrival.foreign().is_some() {
        Relation::Foreign
    } else {
        Relation::Orphan
    };
    let after_end = entry.is_completed() && arrival.run_id.is_none();
    if relation == Relation::Resumed && relations.resamples(relation) {
        let decision = decide_generation(relation, run, stored, arrival, relations);
        return Decision {
            announce: announce && !decision.wait,
            after_end,
            count: !decision.wait,
            ..decision
        };
    }
    Decision {
        announce,
        after_end,
        count: true,
        ..Decision::related(relation, stored, arrival, relations)
    }
}

/// Nothing is stored for the instance.
#[inline(never)]
fn decide_first(arrival: &Arrival<'_>, relations: &Relations) -> Decision {
    match (arrival.moment, arrival.parent_instance) {
        (Moment::Replay, _) => Decision::replayed(None),
        (Moment::Observe, _) => Decision::observed(None, false, relations),
        // A child workflow inside its parent's trace keeps its natural parent.
        (Moment::Start | Moment::StartAfterReplay, Some(parent))
            if !arrival.is_in_trace_of(parent) =>
        {
            let continuation = relations.get(Relation::Child);
            Decision {
                record: Record::First,
                ..Decision::continued(Relation::Child, continuation, parent.clone(), arrival)
            }
        }
        (Moment::Late, _) if arrival.is_polled => Decision::first(None).in_poller(),
        (Moment::Late, _) => Decision::first(None),
        (Moment::Start | Moment::StartAfterReplay, _) => match arrival.natural {
            None => Decision::first(None),
            Some(_) if arrival.is_polled => {
                Decision::first_with(Relation::Polled, relations.get(Relation::Polled))
            }
            Some(_) => Decision::first_with(Relation::First, relations.get(Relation::First)),
        },
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

    /// Returns `true` if the natural parent is in the trace of another kept run or generation of the instance: local
    /// nesting wins, whatever other tasks have opened since. What a replay stands in for is not local.
    #[inline]
    fn is_in_other_trace_of(&self, entry: &Entry) -> bool {
        self.moment != Moment::StartAfterReplay
            && entry.has_other_traces()
            && (self.natural).is_some_and(|natural| entry.has_trace(natural.trace_id()))
    }

    /// The natural parent, unless it is a poller.
    #[inline]
    fn foreign(&self) -> Option<&SpanContext> {
        self.natural.filter(|_| !self.is_polled)
    }
}

impl Decision {
    /// The span keeps its natural parent and is recorded.
    fn first(stored: Option<WorkflowContext>) -> Self {
        Self {
            parent: Parent::Natural,
            links: Links::default(),
            outcome: Outcome::Recorded,
            stored,
            record: Record::First,
            announce: false,
            after_end: false,
            count: false,
            wait: false,
        }
    }

    /// Not recorded: the parent can no longer change, and a poller's trace must not become an instance's or a run's.
    fn in_poller(self) -> Self {
        Self {
            outcome: Outcome::Related(Relation::Polled, Continuation::Keep),
            record: Record::No,
            ..self
        }
    }

    /// A first span with a natural parent, recorded.
    fn first_with(relation: Relation, continuation: Continuation) -> Self {
        let first = Self::first(None);
        let links = match continuation {
            Continuation::NewRoot => Links::default(),
            Continuation::NewRootAndLink => Links {
                to_natural: Some(relation),
                to_stored: None,
            },
            _ => return first,
        };
        Self {
            parent: Parent::Nothing,
            links,
            outcome: Outcome::Related(relation, continuation),
            ..first
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

    /// The span only looks at the instance: nothing of either changes but for a link.
    fn observed(stored: Option<WorkflowContext>, is_nested: bool, relations: &Relations) -> Self {
        let is_linked = relations.get(Relation::Observed).links() && !is_nested && stored.is_some();
        let continuation = match is_linked {
            true => Continuation::Link,
            false => Continuation::Keep,
        };
        Self {
            outcome: Outcome::Related(Relation::Observed, continuation),
            links: Links {
                to_natural: None,
                to_stored: is_linked.then_some(Relation::Observed),
            },
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
            // The first span of another run.
            let links = Links {
                to_natural: None,
                to_stored: (!is_nested).then_some(Relation::NewRun),
            };
            return Self {
                links,
                ..Self::first(Some(stored))
            };
        }
        let continuation = relations.get(Relation::Late);
        let links = continuation == Continuation::Link && !is_nested;
        Self {
            outcome: Outcome::Related(Relation::Late, continuation),
            links: Links {
                to_natural: None,
                to_stored: links.then_some(Relation::Late),
            },
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
        let mut links = Links::default();
        let parent = match continuation {
            Continuation::Keep => Parent::Natural,
            Continuation::Parent => Parent::Stored,
            Continuation::Link => {
                links.to_stored = Some(relation);
                Parent::Natural
            }
            Continuation::ParentAndLink => {
                links.to_natural = arrival.foreign().map(|_| relation);
                Parent::Stored
            }
            Continuation::NewRoot => Parent::Nothing,
            Continuation::NewRootAndLink => {
                // A new run or generation keeps the request that it comes from.
                let is_new = matches!(relation, Relation::NewRun | Relation::Expired);
                if is_new && arrival.foreign().is_some() && !arrival.is_in_trace_of(&stored) {
                    links.to_natural = Some(Relation::Foreign);
                }
                links.to_stored = Some(relation);
                Parent::Nothing
            }
        };
        Self {
            parent,
            links,
            outcome: Outcome::Related(relation, continuation),
            stored: Some(stored),
            record: Record::No,
            announce: false,
            after_end: false,
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::cache::Cache;
    use crate::cache::entry::Limits;
    use crate::clock::SystemClock;

    const STORED: &str = "00-0000000000000000000000000000000a-000000000000000a-01";
    const UNSAMPLED: &str = "00-0000000000000000000000000000000a-000000000000000a-00";
    const NESTED: &str = "00-0000000000000000000000000000000a-000000000000000b-01";
    const REQUEST: &str = "00-0000000000000000000000000000000c-000000000000000c-01";
    const PARENT_INSTANCE: &str = "00-0000000000000000000000000000000d-000000000000000d-01";

    /// One row: what is stored, the span that arrives, the settings.
    struct Row {
        stored: Option<WorkflowContext>,
        stored_run: Option<&'static str>,
        rolling: bool,
        spans: u64,
        run_id: Option<&'static str>,
        natural: Option<&'static str>,
        is_polled: bool,
        moment: Moment,
        parent_instance: bool,
        stops_waiting: bool,
        policy: Policy,
        age: Duration,
    }

    /// An instance stored here, and a span of it without a natural parent.
    fn row() -> Row {
        Row {
            stored: Some(local(STORED)),
            stored_run: None,
            rolling: false,
            spans: 1,
            run_id: None,
            natural: None,
            is_polled: false,
            moment: Moment::Start,
            parent_instance: false,
            stops_waiting: false,
            policy: Policy::default(),
            age: Duration::ZERO,
        }
    }

    fn parse(traceparent: &str) -> WorkflowContext {
        WorkflowContext::parse(traceparent, "").expect("well formed")
    }

    /// A context that a span of this process recorded.
    fn local(traceparent: &str) -> WorkflowContext {
        let span = parse(traceparent).to_span_context();
        let span = SpanContext::new(
            span.trace_id(),
            span.span_id(),
            span.trace_flags(),
            false,
            span.trace_state().clone(),
        );
        WorkflowContext::try_from(&span).expect("valid")
    }

    fn bounded(max_age: Option<Duration>, max_spans: Option<u64>) -> Policy {
        Policy {
            bounds: Bounds { max_age, max_spans },
            ..Policy::default()
        }
    }

    fn with(relation: Relation, continuation: Continuation) -> Policy {
        let mut policy = Policy::default();
        policy.relations.set(relation, continuation);
        policy
    }

    impl Row {
        /// The decision, in the words of the table: outcome; parent, link; record; announce, wait.
        fn decide(self) -> String {
            let limits = Limits {
                max_instances: 10,
                max_bytes: usize::MAX,
                max_trace_state: 512,
                idle_ttl: 1_000,
                completed_grace: 1_000,
            };
            let cache = Cache::new(limits, Some(Arc::new(SystemClock)), 0, None);
            let recorded_at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
            if let Some(stored) = self.stored {
                let key = cache.key("id", self.stored_run);
                let stored = stored.with_recorded_at(recorded_at);
                cache
                    .record(key, None, stored, None, None)
                    .expect("it is first");
            }
            let natural = self.natural.map(|natural| parse(natural).to_span_context());
            let parent_instance = self.parent_instance.then(|| parse(PARENT_INSTANCE));
            let arrival = Arrival {
                moment: self.moment,
                run_id: self.run_id,
                natural: natural.as_ref(),
                is_polled: self.is_polled,
                parent_instance: parent_instance.as_ref(),
                stops_waiting: self.stops_waiting,
            };
            let decision = cache.look_up(cache.key("id", self.run_id), |entry| {
                if let Some(run) = entry.map(Entry::latest) {
                    run.set_rolling(self.rolling);
                    (1..self.spans).for_each(|_| run.count_span());
                }
                decide(&arrival, entry, &self.policy, Some(recorded_at + self.age))
            });
            let outcome = match decision.outcome {
                Outcome::Related(relation, _) => relation.as_str(),
                Outcome::Recorded => "first",
                Outcome::LostRace => "lost race",
                Outcome::Replayed => "replayed",
            };
            let link = match (decision.links.to_natural, decision.links.to_stored) {
                (None, None) => "",
                (Some(_), None) => " + link to natural",
                (None, Some(_)) => " + link to stored",
                (Some(_), Some(_)) => " + links to both",
            };
            let record = match decision.record {
                Record::No => String::new(),
                Record::First => ", recorded".to_owned(),
                Record::Generation(number) => format!(", recorded as {number}"),
            };
            let announce = if decision.announce { ", announced" } else { "" };
            let wait = if decision.wait { ", wait" } else { "" };
            let parent = format!("{:?}", decision.parent).to_lowercase();
            format!("{outcome}: {parent}{link}{record}{announce}{wait}")
        }
    }

    #[test]
    fn the_table_holds() {
        use Moment::{Late, Replay, StartAfterReplay};
        let none = || Row {
            stored: None,
            ..row()
        };
        let old = || Row {
            policy: bounded(Some(Duration::from_secs(60)), None),
            age: Duration::from_secs(61),
            ..row()
        };
        let full = || Row {
            policy: bounded(None, Some(3)),
            spans: 3,
            ..row()
        };
        let remote = || Row {
            stored: Some(parse(STORED)),
            ..row()
        };
        let resamples = || {
            let mut policy = Policy::default();
            policy.relations.resample(Relation::Resumed);
            policy
        };
        let (request, nested) = (Some(REQUEST), Some(NESTED));
        #[rustfmt::skip]
        let rows = [
            // Nothing is stored.
            (none(), "first: natural, recorded"),
            (Row { natural: request, ..none() }, "first: natural, recorded"),
            (Row { parent_instance: true, ..none() }, "child: stored, recorded"),
            (Row { parent_instance: true, natural: request, ..none() }, "child: stored + link to natural, recorded"),
            (Row { parent_instance: true, natural: Some(PARENT_INSTANCE), ..none() }, "first: natural, recorded"),
            (Row { natural: request, policy: with(Relation::First, Continuation::NewRoot), ..none() }, "first: nothing, recorded"),
            (Row { natural: request, policy: with(Relation::First, Continuation::NewRootAndLink), ..none() }, "first: nothing + link to natural, recorded"),
            (Row { policy: with(Relation::First, Continuation::NewRootAndLink), ..none() }, "first: natural, recorded"),
            // In a poller's trace.
            (Row { natural: request, is_polled: true, ..none() }, "polled: nothing, recorded"),
            (Row { natural: request, is_polled: true, policy: with(Relation::Polled, Continuation::NewRootAndLink), ..none() }, "polled: nothing + link to natural, recorded"),
            (Row { natural: request, is_polled: true, policy: with(Relation::Polled, Continuation::Keep), ..none() }, "first: natural, recorded"),
            (Row { natural: request, is_polled: true, parent_instance: true, ..none() }, "child: stored, recorded"),
            (Row { natural: request, is_polled: true, ..row() }, "orphan: stored"),
            (Row { natural: request, is_polled: true, ..remote() }, "resumed: stored, announced"),
            (Row { natural: request, is_polled: true, ..full() }, "expired: nothing + link to stored, recorded as 2"),
            (Row { natural: nested, is_polled: true, ..row() }, "same_trace: natural"),
            (Row { natural: request, is_polled: true, moment: Late, ..none() }, "polled: natural"),
            // A context of this process.
            (row(), "orphan: stored"),
            (Row { natural: request, ..row() }, "foreign: stored + link to natural"),
            (Row { natural: nested, ..row() }, "same_trace: natural"),
            // A context of another process, or a resumed one.
            (remote(), "resumed: stored, announced"),
            (Row { natural: request, ..remote() }, "resumed: stored + link to natural, announced"),
            (Row { natural: nested, ..remote() }, "same_trace: natural"),
            (Row { policy: resamples(), ..remote() }, "resumed: nothing + link to stored, recorded as 2, announced"),
            (Row { stored: Some(local(STORED).into_resumed()), ..row() }, "resumed: stored"),
            // Runs.
            (Row { stored_run: Some("1"), run_id: Some("1"), ..row() }, "orphan: stored"),
            (Row { stored_run: Some("1"), ..row() }, "orphan: stored"),
            (Row { run_id: Some("1"), ..row() }, "orphan: stored"),
            (Row { stored_run: Some("1"), run_id: Some("2"), ..row() }, "new_run: nothing + link to stored, recorded"),
            (Row { stored_run: Some("1"), run_id: Some("2"), natural: request, ..row() }, "new_run: nothing + links to both, recorded"),
            (Row { stored_run: Some("1"), run_id: Some("2"), natural: nested, ..row() }, "same_trace: natural, recorded"),
            // Bounds.
            (old(), "expired: nothing + link to stored, recorded as 2"),
            (Row { age: Duration::from_secs(60), ..old() }, "orphan: stored"),
            (Row { natural: nested, ..old() }, "same_trace: natural"),
            (Row { natural: nested, moment: StartAfterReplay, ..old() }, "expired: nothing + link to stored, recorded as 2"),
            (full(), "expired: nothing + link to stored, recorded as 2"),
            (Row { natural: request, ..full() }, "expired: nothing + links to both, recorded as 2"),
            (Row { spans: 2, ..full() }, "orphan: stored"),
            (Row { natural: nested, ..full() }, "same_trace: natural"),
            (Row { stored: Some(local(UNSAMPLED)), ..full() }, "expired: stored, recorded as 2"),
            (Row { rolling: true, ..full() }, "expired: stored, wait"),
            (Row { rolling: true, stops_waiting: true, ..full() }, "expired: stored"),
            // The id came late.
            (Row { moment: Late, ..none() }, "first: natural, recorded"),
            (Row { moment: Late, natural: request, ..row() }, "late: natural + link to stored"),
            (Row { moment: Late, natural: nested, ..row() }, "late: natural"),
            (Row { moment: Late, natural: request, policy: with(Relation::Late, Continuation::Keep), ..row() }, "late: natural"),
            (Row { moment: Late, natural: request, stored_run: Some("1"), run_id: Some("2"), ..row() }, "first: natural + link to stored, recorded"),
            (Row { moment: Late, natural: nested, stored_run: Some("1"), run_id: Some("2"), ..row() }, "first: natural, recorded"),
            (Row { moment: Late, natural: request, is_polled: true, stored_run: Some("1"), run_id: Some("2"), ..row() }, "polled: natural + link to stored"),
            (Row { moment: Late, natural: nested, is_polled: true, stored_run: Some("1"), run_id: Some("2"), ..row() }, "first: natural, recorded"),
            (Row { moment: Late, natural: request, ..full() }, "late: natural + link to stored"),
            // Replays.
            (Row { moment: Replay, ..none() }, "replayed: natural"),
            (Row { moment: Replay, natural: request, ..row() }, "replayed: stored"),
            (Row { moment: Replay, ..full() }, "replayed: stored"),
            (Row { moment: Replay, stored_run: Some("1"), run_id: Some("2"), ..row() }, "replayed: natural"),
        ];
        for (number, (row, expected)) in rows.into_iter().enumerate() {
            assert_eq!(row.decide(), expected, "row {number}");
        }
    }

    #[test]
    fn each_continuation_places_the_span_as_it_says() {
        let expected = [
            (Continuation::Keep, "foreign: natural"),
            (Continuation::Parent, "foreign: stored"),
            (Continuation::Link, "foreign: natural + link to stored"),
            (
                Continuation::ParentAndLink,
                "foreign: stored + link to natural",
            ),
            (Continuation::NewRoot, "foreign: nothing"),
            (
                Continuation::NewRootAndLink,
                "foreign: nothing + link to stored",
            ),
        ];
        for (continuation, expected) in expected {
            let foreign = Row {
                natural: Some(REQUEST),
                policy: with(Relation::Foreign, continuation),
                ..row()
            };
            assert_eq!(foreign.decide(), expected, "{continuation:?}");
        }
    }
}
