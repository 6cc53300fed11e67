//! The table "what becomes of a tagged span": from what is stored and the natural parent to a decision.

use std::thread;
use std::time::{Duration, Instant};

use opentelemetry::trace::SpanContext;

use crate::context::WorkflowContext;
use crate::explain::{Outcome, Recorder};
use crate::policy::{Continuation, Relation};
use crate::storage::beyond::Overruled;
use crate::storage::core::Core;
use crate::storage::memory::{Followed, Run};

/// How long a span waits for another thread that is just opening the root of the next generation.
/// After that it stays in the old trace: telemetry never waits without a bound.
const ROLL_PATIENCE: Duration = Duration::from_millis(1);

/// A tagged span that is about to start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival<'a> {
    pub(crate) instance_id: &'a str,
    pub(crate) run_id: Option<&'a str>,
    pub(crate) parent_instance_id: Option<&'a str>,
    /// The valid span context that the span would have as its parent without this crate.
    pub(crate) natural: Option<&'a SpanContext>,
    /// That one stands for a recorded span in a replay, so the trace may be as old as can be.
    pub(crate) in_replay: bool,
}

impl Arrival<'_> {
    fn is_in_trace_of(self, stored: &WorkflowContext) -> bool {
        self.natural
            .is_some_and(|natural| natural.trace_id() == stored.trace_id())
    }
}

/// Where it starts.
pub(crate) struct Placement<'a> {
    pub(crate) parent: Parent,
    /// At most one link, with the relation that it tells of.
    pub(crate) link: Option<(SpanContext, Relation)>,
    pub(crate) record: Option<Recording<'a>>,
    /// Set once per process and instance for a context that another process recorded.
    pub(crate) resumed: Option<WorkflowContext>,
    pub(crate) outcome: Outcome,
}

pub(crate) enum Parent {
    Natural,
    None,
    Stored(WorkflowContext),
}

/// The span's own context is to be recorded once it has one.
pub(crate) struct Recording<'a> {
    core: &'a Core,
    instance_id: &'a str,
    run_id: Option<&'a str>,
    /// What this one follows, as the next generation; this recording alone may do so.
    follows: Option<Followed>,
}

impl<'a> Placement<'a> {
    pub(crate) fn of(arrival: Arrival<'a>, core: &'a Core) -> Self {
        core.prepare(arrival.instance_id, arrival.run_id);
        let mut waiting_since = None;
        loop {
            match Verdict::of(arrival, core) {
                Verdict::First => return Self::first(arrival, core),
                Verdict::Related {
                    relation,
                    stored,
                    record,
                    resumed,
                } => {
                    let continuation = core.policy.continuation(relation, stored.is_sampled());
                    let mut placement = Self::related(arrival, relation, continuation, stored);
                    placement.record = record.map(|follows| Recording::new(arrival, core, follows));
                    placement.resumed = resumed;
                    return placement;
                }
                Verdict::BeingRolled { stored } => {
                    if waiting_since.get_or_insert_with(Instant::now).elapsed() > ROLL_PATIENCE {
                        return Self::related(
                            arrival,
                            Relation::Expired,
                            Continuation::Parent,
                            stored,
                        );
                    }
                    thread::yield_now();
                }
            }
        }
    }

    /// Nothing is stored for the instance: its natural parent, or its parent instance.
    fn first(arrival: Arrival<'a>, core: &'a Core) -> Self {
        let parent = arrival
            .parent_instance_id
            .and_then(|id| core.peek_parent(id));
        let mut placement = match parent {
            Some(stored) if !arrival.is_in_trace_of(&stored) => {
                let continuation = core.policy.of(Relation::Child);
                Self::related(arrival, Relation::Child, continuation, stored)
            }
            _ => Self {
                parent: Parent::Natural,
                link: None,
                record: None,
                resumed: None,
                outcome: Outcome::Recorded,
            },
        };
        placement.record = Some(Recording::new(arrival, core, None));
        placement
    }

    fn related(
        arrival: Arrival<'a>,
        relation: Relation,
        continuation: Continuation,
        stored: WorkflowContext,
    ) -> Self {
        let to_stored = |stored: &WorkflowContext| Some((stored.to_span_context(), relation));
        let (parent, link) = match continuation {
            Continuation::Keep => (Parent::Natural, None),
            Continuation::Link => (Parent::Natural, to_stored(&stored)),
            Continuation::NewRoot => (Parent::None, None),
            Continuation::NewRootAndLink => (Parent::None, to_stored(&stored)),
            Continuation::Parent => (Parent::Stored(stored), None),
            Continuation::ParentAndLink => {
                let link = arrival.natural.map(|natural| (natural.clone(), relation));
                (Parent::Stored(stored), link)
            }
        };
        let outcome = Outcome::Related(relation, continuation);
        Self {
            parent,
            link,
            record: None,
            resumed: None,
            outcome,
        }
    }
}

impl<'a> Recording<'a> {
    fn new(arrival: Arrival<'a>, core: &'a Core, follows: Option<Followed>) -> Self {
        let Arrival {
            instance_id,
            run_id,
            ..
        } = arrival;
        Self {
            core,
            instance_id,
            run_id,
            follows,
        }
    }

    /// Counts the traces of the run from 1; `None` for the first.
    pub(crate) fn generation(&self) -> Option<u32> {
        self.follows.as_ref().map(Followed::next)
    }

    /// Records the context of the span that was started, unless another span was faster.
    pub(crate) fn finish(
        mut self,
        context: WorkflowContext,
        recorder: Recorder,
    ) -> Result<Option<Overruled>, WorkflowContext> {
        let follows = self.follows.take();
        self.core
            .record(self.instance_id, self.run_id, follows, context, recorder)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        // No span came of it, a panic in the sampler included: somebody else may open the next root.
        if self.follows.is_some() {
            self.core
                .memory
                .give_up_rolling(self.instance_id, self.run_id);
        }
    }
}

/// What one look at the stored runs says.
enum Verdict {
    First,
    /// The trace is full, and another thread is opening the next one.
    BeingRolled {
        stored: WorkflowContext,
    },
    Related {
        relation: Relation,
        stored: WorkflowContext,
        /// The span is recorded: as the first of its run, or of the generation after the one named.
        record: Option<Option<Followed>>,
        resumed: Option<WorkflowContext>,
    },
}

impl Verdict {
    fn of(arrival: Arrival<'_>, core: &Core) -> Self {
        // Asked before the shard is locked: a clock may be anybody's code.
        let now = core.bounds.max_age.map(|_| core.clock.now());
        core.look(arrival.instance_id, |instance| {
            let Some(instance) = instance else {
                return Self::First;
            };
            let Some(run) = instance.run(arrival.run_id) else {
                let stored = instance.latest().context.clone();
                // Nested in the old run's trace, the first span of the new run keeps its place.
                let relation = match arrival.is_in_trace_of(&stored) {
                    true => Relation::SameTrace,
                    false => Relation::NewRun,
                };
                return Self::Related {
                    relation,
                    stored,
                    record: Some(None),
                    resumed: None,
                };
            };
            let stored = run.context.clone();
            let related = |relation, stored, resumed| Self::Related {
                relation,
                stored,
                record: None,
                resumed,
            };
            let is_nested = arrival.is_in_trace_of(&stored);
            let is_bound = !is_nested || arrival.in_replay;
            if is_bound && core.bounds.are_passed(run, now) {
                return Self::next_generation(Relation::Expired, run, stored, None);
            }
            if is_nested {
                return related(Relation::SameTrace, stored, None);
            }
            let announced = (stored.is_remote() && run.announce()).then(|| stored.clone());
            if announced.is_some() || stored.is_resumed() {
                if core.policy.resamples(Relation::Resumed) {
                    return Self::next_generation(Relation::Resumed, run, stored, announced);
                }
                return related(Relation::Resumed, stored, announced);
            }
            match arrival.natural {
                Some(_) => related(Relation::Foreign, stored, None),
                None => related(Relation::Orphan, stored, None),
            }
        })
    }

    fn next_generation(
        relation: Relation,
        run: &Run,
        stored: WorkflowContext,
        resumed: Option<WorkflowContext>,
    ) -> Self {
        if !run.roll() {
            return Self::BeingRolled { stored };
        }
        Self::Related {
            relation,
            stored,
            record: Some(Some(run.followed())),
            resumed,
        }
    }
}
