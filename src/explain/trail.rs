//! The trail of a storage: its recent decisions, in ring buffers.

use std::borrow::Cow;
use std::fmt;
use std::sync::Mutex;

use opentelemetry::trace::SpanContext;
use opentelemetry::{SpanId, TraceId};

use crate::decision::relation::{Continuation, Relation};
use crate::lock::{lock, try_lock};

/// The most recent steps of all instances, in several ring buffers, so that threads rarely contend for a lock. The steps
/// of one instance are in one of them, except those that were added while it was locked.
#[derive(Debug)]
pub(crate) struct Trail {
    rings: Box<[Ring]>,
}

/// A ring buffer with cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Ring(Mutex<Steps>);

#[derive(Debug)]
struct Steps {
    steps: Vec<Step>,
    /// The maximum length. Once it is reached, each new step overwrites the oldest.
    capacity: usize,
    oldest: usize,
}

/// One event of an instance.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    /// The hash of the instance's id, which is shorter than the id.
    pub(crate) instance: u64,
    pub(crate) tick: u32,
    pub(crate) event: Event,
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Started(SpanNote),
    Stored,
    Completed,
    CleanedUp,
    /// It was idle for longer than `idle_ttl`.
    Expired,
    /// Its grace after completion ended.
    GraceOver,
    Evicted,
    /// Its first span named a parent instance of which no context was found.
    UnknownParent(Box<str>),
    /// A span of it named this id too, in a field of a lower rank.
    Outranks(Box<str>),
    /// A span that named it belongs to this instance, by a field of a higher rank.
    Outranked(Box<str>),
}

/// The decision on one span of an instance.
#[derive(Clone, Debug)]
pub(crate) struct SpanNote {
    pub(crate) span_name: Cow<'static, str>,
    pub(crate) span: SpanIds,
    /// The natural parent; zeros if there is none.
    pub(crate) natural: SpanIds,
    pub(crate) outcome: Outcome,
    /// The instance had ended before.
    pub(crate) after_end: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    /// It was recorded as the first of its instance or run.
    Recorded,
    /// Another span was recorded between the decision and its start.
    LostRace,
    Related(Relation, Continuation),
    Replayed,
}

/// The ids of a span and its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SpanIds {
    trace: [u8; 16],
    span: [u8; 8],
}

impl SpanIds {
    fn are_valid(&self) -> bool {
        self.trace != [0; 16] && self.span != [0; 8]
    }
}

impl From<&SpanContext> for SpanIds {
    fn from(span: &SpanContext) -> Self {
        Self {
            trace: span.trace_id().to_bytes(),
            span: span.span_id().to_bytes(),
        }
    }
}

impl fmt::Display for SpanIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}/{}",
            TraceId::from_bytes(self.trace),
            SpanId::from_bytes(self.span)
        )
    }
}

impl Trail {
    /// The minimum capacity of a ring, if there is more than one.
    const PER_RING: usize = 128;

    /// Creates a trail of that many steps; zero switches it off.
    pub(crate) fn new(steps: usize) -> Self {
        let rings = (steps / Self::PER_RING).clamp(1, 64).min(steps);
        let ring = |n| {
            Ring(Mutex::new(Steps {
                steps: Vec::new(),
                capacity: (steps + n) / rings,
                oldest: 0,
            }))
        };
        Self {
            rings: (0..rings).map(ring).collect(),
        }
    }

    pub(crate) fn is_off(&self) -> bool {
        self.rings.is_empty()
    }

    #[inline]
    pub(crate) fn add(&self, step: Step) {
        if self.is_off() {
            return;
        }
        let own = ((u128::from(step.instance) * self.rings.len() as u128) >> 64) as usize;
        match try_lock(&self.rings[own].0) {
            Some(mut ring) => ring.add(step),
            None => self.add_to_another(own, step),
        }
    }

    /// Adds to any ring that is free: the lock holder may have been preempted, and a span should not wait for it.
    #[cold]
    fn add_to_another(&self, own: usize, step: Step) {
        let free = self.rings.iter().find_map(|ring| try_lock(&ring.0));
        free.unwrap_or_else(|| lock(&self.rings[own].0)).add(step);
    }

    /// Returns the steps of one instance, oldest first.
    pub(crate) fn steps_of(&self, instance: u64) -> Vec<Step> {
        let of_instance = |ring: &Ring| lock(&ring.0).steps_of(instance);
        let mut steps: Vec<_> = self.rings.iter().flat_map(of_instance).collect();
        steps.sort_by_key(|step| step.tick);
        steps
    }

    /// Returns the name of a span of an instance.
    pub(crate) fn span_name(&self, instance: u64, span: &SpanContext) -> Option<Cow<'static, str>> {
        let span = SpanIds::from(span);
        let mut steps = self.steps_of(instance).into_iter();
        steps.find_map(|step| match step.event {
            Event::Started(note) if note.span == span => Some(note.span_name),
            _ => None,
        })
    }
}

impl Steps {
    #[inline]
    fn add(&mut self, step: Step) {
        if self.steps.len() < self.capacity {
            self.steps.push(step);
            return;
        }
        let oldest = self.oldest;
        self.oldest = if oldest + 1 == self.capacity {
            0
        } else {
            oldest + 1
        };
        // Dropping the replaced step frees at most a span name.
        if let Some(place) = self.steps.get_mut(oldest) {
            *place = step;
        }
    }

    fn steps_of(&self, instance: u64) -> Vec<Step> {
        let (newer, older) = self.steps.split_at(self.oldest);
        let steps = older.iter().chain(newer);
        let of_instance = steps.filter(|step| step.instance == instance);
        of_instance.cloned().collect()
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started(decision) => write!(f, "{decision}"),
            Self::Stored => f.write_str("stored by a call"),
            Self::Completed => f.write_str("terminal workflow.status"),
            Self::CleanedUp => f.write_str("cleaned up by a call"),
            Self::Expired => f.write_str("expired"),
            Self::GraceOver => f.write_str("its grace was over"),
            Self::Evicted => f.write_str("evicted"),
            Self::UnknownParent(id) => {
                write!(f, "no context is found for the parent instance {id:?}")
            }
            Self::Outranks(id) => write!(
                f,
                "ignored the id {id:?}, of a field that ranks lower on the same span"
            ),
            Self::Outranked(id) => write!(
                f,
                "ignored, the same span names {id:?} in a field that ranks higher"
            ),
        }
    }
}

/// Describes the action taken for a span of that relation.
fn describe(relation: Relation, continuation: Continuation) -> &'static str {
    match (relation, continuation) {
        (Relation::Polled, Continuation::Keep) => {
            "kept its natural parent, not recorded in a poller's trace"
        }
        (Relation::First | Relation::Polled, Continuation::NewRoot) => "recorded as a new root",
        (Relation::First | Relation::Polled, Continuation::NewRootAndLink) => {
            "recorded as a new root, linked to its natural parent"
        }
        (_, continuation) => continuation.describe(),
    }
}

impl fmt::Display for SpanNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            span_name,
            span,
            natural,
            outcome,
            after_end,
        } = self;
        write!(f, "span {span_name:?} {span}: ")?;
        match outcome {
            Outcome::Recorded if !span.are_valid() => {
                f.write_str("not recorded, it has no valid span context")?;
            }
            Outcome::Recorded => f.write_str("recorded, the first of its instance or run")?,
            Outcome::LostRace => f.write_str("another span was recorded first, linked to it")?,
            Outcome::Replayed => f.write_str("a replay, not exported")?,
            Outcome::Related(relation, continuation) => {
                write!(
                    f,
                    "{}: {}",
                    relation.as_str(),
                    describe(*relation, *continuation)
                )?;
            }
        }
        if *after_end {
            f.write_str(", joined after its end")?;
        }
        match natural.are_valid() {
            true => write!(f, " (natural parent {natural})"),
            false => f.write_str(" (no natural parent)"),
        }
    }
}
