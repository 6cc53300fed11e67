//! The table "what becomes of a tagged span": from what is stored and the natural parent to a decision.

use std::thread;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::SpanContext;

use crate::context::WorkflowContext;
use crate::explain::{Outcome, Recorder};
use crate::fields::{Identity, Names};
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
    pub(crate) names: Names<'a>,
    /// Of the instance id.
    pub(crate) hash: u64,
    /// The valid span context that the span would have as its parent without this crate.
    pub(crate) natural: Option<&'a SpanContext>,
    /// That one stands for a recorded span in a replay, so the trace may be as old as can be.
    pub(crate) in_replay: bool,
}

impl Arrival<'_> {
    #[inline]
    fn is_in_trace_of(self, stored: &WorkflowContext) -> bool {
        self.natural
            .is_some_and(|natural| natural.trace_id() == stored.trace_id())
    }
}

/// Where it starts.
pub(crate) struct Placement<'a> {
    pub(crate) parent: Parent,
    /// What is stored, where anything is.
    pub(crate) stored: Option<WorkflowContext>,
    pub(crate) outcome: Outcome,
    /// Boxed, since most spans have none of it.
    pub(crate) more: Option<Box<More<'a>>>,
}

#[derive(Clone, Copy)]
pub(crate) enum Parent {
    Natural,
    None,
    Stored,
}

#[derive(Default)]
pub(crate) struct More<'a> {
    /// At most one link, with the relation that it tells of.
    pub(crate) link: Option<(SpanContext, Relation)>,
    pub(crate) record: Option<Recording<'a>>,
    /// Set once per process and instance for a context that another process recorded: when.
    pub(crate) resumed: Option<SystemTime>,
}

/// The span's own context is to be recorded once it has one.
pub(crate) struct Recording<'a> {
    core: &'a Core,
    identity: Identity,
    /// What this one follows, as the next generation; this recording alone may do so.
    follows: Option<Followed>,
}

impl<'a> Placement<'a> {
    #[inline]
    pub(crate) fn of(arrival: Arrival<'_>, core: &'a Core) -> Self {
        core.prepare(arrival.names.instance_id, arrival.names.run_id);
        let mut placement = Self {
            parent: Parent::Natural,
            stored: None,
            outcome: Outcome::Recorded,
            more: None,
        };
        match Verdict::of(arrival, core, &mut placement.stored) {
            Verdict::Is(relation) => placement.relate(arrival, core, relation),
            verdict => placement.go_on(arrival, core, verdict),
        }
        placement
    }

    /// What only few spans do.
    #[inline(never)]
    fn go_on(&mut self, arrival: Arrival<'_>, core: &'a Core, mut verdict: Verdict) {
        let mut waiting_since = None;
        while let Verdict::BeingRolled = verdict {
            if waiting_since.get_or_insert_with(Instant::now).elapsed() > ROLL_PATIENCE {
                return self.by(arrival, Relation::Expired, Continuation::Parent);
            }
            thread::yield_now();
            verdict = Verdict::of(arrival, core, &mut self.stored);
        }
        match verdict {
            Verdict::BeingRolled => {}
            Verdict::First => self.begin(arrival, core),
            Verdict::Is(relation) => self.relate(arrival, core, relation),
            Verdict::Announces(relation) => {
                self.relate(arrival, core, relation);
                self.more().resumed = self.stored.as_ref().map(WorkflowContext::recorded_at);
            }
            Verdict::IsRecorded {
                relation,
                follows,
                announces,
            } => {
                self.relate(arrival, core, relation);
                let recorded_at = self.stored.as_ref().map(WorkflowContext::recorded_at);
                let more = self.more();
                more.record = Some(Recording::new(arrival, core, follows));
                more.resumed = recorded_at.filter(|_| announces);
            }
        }
    }

    /// Nothing is stored for the instance: its natural parent, or its parent instance.
    fn begin(&mut self, arrival: Arrival<'_>, core: &'a Core) {
        let parent = arrival.names.parent_instance_id;
        self.stored = parent
            .and_then(|id| core.peek_parent(id))
            .filter(|stored| !arrival.is_in_trace_of(stored));
        if self.stored.is_some() {
            self.by(arrival, Relation::Child, core.policy.of(Relation::Child));
        }
        self.more().record = Some(Recording::new(arrival, core, None));
    }

    #[inline]
    fn relate(&mut self, arrival: Arrival<'_>, core: &Core, relation: Relation) {
        let is_sampled = self
            .stored
            .as_ref()
            .is_some_and(WorkflowContext::is_sampled);
        self.by(
            arrival,
            relation,
            core.policy.continuation(relation, is_sampled),
        );
    }

    #[inline]
    fn by(&mut self, arrival: Arrival<'_>, relation: Relation, continuation: Continuation) {
        self.outcome = Outcome::Related(relation, continuation);
        self.parent = match continuation {
            Continuation::Keep | Continuation::Link => Parent::Natural,
            Continuation::NewRoot | Continuation::NewRootAndLink => Parent::None,
            Continuation::Parent | Continuation::ParentAndLink => Parent::Stored,
        };
        let target = match continuation {
            Continuation::Keep | Continuation::NewRoot | Continuation::Parent => return,
            Continuation::ParentAndLink => arrival.natural.cloned(),
            Continuation::Link | Continuation::NewRootAndLink => {
                self.stored.as_ref().map(WorkflowContext::to_span_context)
            }
        };
        self.more().link = target.map(|target| (target, relation));
    }

    #[cold]
    fn more(&mut self) -> &mut More<'a> {
        self.more.get_or_insert_default()
    }
}

impl<'a> Recording<'a> {
    fn new(arrival: Arrival<'_>, core: &'a Core, follows: Option<Followed>) -> Self {
        Self {
            core,
            identity: arrival.names.to_identity(),
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
        let (id, run_id) = (&self.identity.instance_id, self.identity.run_id.as_deref());
        self.core.record(id, run_id, follows, context, recorder)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        // No span came of it, a panic in the sampler included: somebody else may open the next root.
        if self.follows.is_some() {
            let (id, run_id) = (&self.identity.instance_id, self.identity.run_id.as_deref());
            self.core.memory.give_up_rolling(id, run_id);
        }
    }
}

/// What one look at the stored runs says.
enum Verdict {
    First,
    Is(Relation),
    /// It is the first of this process in a trace that another one recorded.
    Announces(Relation),
    /// It is recorded: as the first of its run, or of the generation after the one named.
    IsRecorded {
        relation: Relation,
        follows: Option<Followed>,
        announces: bool,
    },
    /// The trace is full, and another thread is opening the next one.
    BeingRolled,
}

impl Verdict {
    #[inline]
    fn of(arrival: Arrival<'_>, core: &Core, found: &mut Option<WorkflowContext>) -> Self {
        // Asked before the shard is locked: a clock may be anybody's code.
        let now = core.bounds.max_age.map(|_| core.clock.now());
        let Names {
            instance_id,
            run_id,
            ..
        } = arrival.names;
        let (memory, hash) = (&core.memory, arrival.hash);
        memory.look_up(hash, instance_id, run_id, |instance| {
            let Some(instance) = instance else {
                return Self::First;
            };
            let Some(run) = instance.run(run_id) else {
                let stored = found.insert(instance.latest().context());
                return Self::IsRecorded {
                    // Nested in the old run's trace, the first span of the new run keeps its place.
                    relation: match arrival.is_in_trace_of(stored) {
                        true => Relation::SameTrace,
                        false => Relation::NewRun,
                    },
                    follows: None,
                    announces: false,
                };
            };
            let stored = found.insert(run.context());
            let is_nested = arrival.is_in_trace_of(stored);
            let is_bound = !is_nested || arrival.in_replay;
            if is_bound && core.bounds.are_passed(run, now) {
                return Self::next_generation(Relation::Expired, run, false);
            }
            if is_nested {
                return Self::Is(Relation::SameTrace);
            }
            let announces = stored.is_remote() && run.announce();
            if announces || stored.is_resumed() {
                return match core.policy.resamples(Relation::Resumed) {
                    true => Self::next_generation(Relation::Resumed, run, announces),
                    false if announces => Self::Announces(Relation::Resumed),
                    false => Self::Is(Relation::Resumed),
                };
            }
            Self::Is(match arrival.natural {
                Some(_) => Relation::Foreign,
                None => Relation::Orphan,
            })
        })
    }

    fn next_generation(relation: Relation, run: &Run, announces: bool) -> Self {
        match run.roll() {
            false => Self::BeingRolled,
            true => Self::IsRecorded {
                relation,
                follows: Some(run.followed()),
                announces,
            },
        }
    }
}
