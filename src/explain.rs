//! Why the spans of an instance went where they did: a bounded trail of decisions, and its reading.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Mutex, OnceLock};
use std::time::SystemTime;

use opentelemetry::trace::{SpanBuilder, SpanContext};
use opentelemetry::{SpanId, TraceId};

use crate::clock::TICK;
use crate::context::WorkflowContext;
use crate::error::{InvalidInstanceId, MAX_INSTANCE_ID_BYTES};
use crate::policy::{Continuation, Relation};
use crate::sync::{lock, try_lock};

/// What happened to the instances, the last steps of all. Those of one instance are in one of several rings, but for a
/// few, so that threads seldom want the same lock.
#[derive(Debug)]
pub(crate) struct Trail {
    rings: Box<[Ring]>,
}

/// With cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Ring(Mutex<Steps>);

#[derive(Debug)]
struct Steps {
    steps: Vec<Step>,
    /// Grows to that many, and then begins anew at its oldest.
    most: usize,
    oldest: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct Step {
    /// The hash of the id stands for it: the ring holds no strings of the caller's.
    pub(crate) instance: u64,
    pub(crate) tick: u32,
    pub(crate) event: Event,
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Started(Decision),
    Stored,
    Completed,
    CleanedUp,
    /// Idle for too long.
    Expired,
    /// Completed for long enough.
    GraceOver,
    Evicted,
}

/// What was decided for one span of an instance.
#[derive(Clone, Debug)]
pub(crate) struct Decision {
    pub(crate) span_name: Cow<'static, str>,
    pub(crate) span: Ids,
    /// Zeros where there is none.
    pub(crate) natural: Ids,
    pub(crate) outcome: Outcome,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    /// The first of its instance.
    Recorded,
    /// It would have been the first, but another span was recorded meanwhile.
    LostRace,
    Related(Relation, Continuation),
    Replayed,
}

/// A span, where its flags and its state do not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ids {
    trace: [u8; 16],
    span: [u8; 8],
}

impl Ids {
    fn are_valid(&self) -> bool {
        self.trace != [0; 16] && self.span != [0; 8]
    }
}

impl From<&SpanContext> for Ids {
    fn from(span: &SpanContext) -> Self {
        Self {
            trace: span.trace_id().to_bytes(),
            span: span.span_id().to_bytes(),
        }
    }
}

impl fmt::Display for Ids {
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
    /// How many steps are in one ring at least, where there is more than one ring.
    const PER_RING: usize = 128;

    pub(crate) fn new(steps: usize) -> Self {
        let rings = (steps / Self::PER_RING).clamp(1, 64).min(steps);
        let ring = |n| {
            Ring(Mutex::new(Steps {
                steps: Vec::new(),
                most: (steps + n) / rings,
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

    /// Whoever has locked the ring may have lost its core: no span waits for that while another one is free.
    #[cold]
    fn add_to_another(&self, own: usize, step: Step) {
        let free = self.rings.iter().find_map(|ring| try_lock(&ring.0));
        free.unwrap_or_else(|| lock(&self.rings[own].0)).add(step);
    }

    /// The steps of one instance, oldest first.
    pub(crate) fn of(&self, instance: u64) -> Vec<Step> {
        let of_instance = |ring: &Ring| lock(&ring.0).of(instance);
        let mut steps: Vec<_> = self.rings.iter().flat_map(of_instance).collect();
        steps.sort_by_key(|step| step.tick);
        steps
    }
}

impl Steps {
    #[inline]
    fn add(&mut self, step: Step) {
        if self.steps.len() < self.most {
            self.steps.push(step);
            return;
        }
        let oldest = self.oldest;
        self.oldest = if oldest + 1 == self.most {
            0
        } else {
            oldest + 1
        };
        // What is replaced has at most a string of ours to drop.
        if let Some(place) = self.steps.get_mut(oldest) {
            *place = step;
        }
    }

    fn of(&self, instance: u64) -> Vec<Step> {
        let (newer, older) = self.steps.split_at(self.oldest);
        let steps = older.iter().chain(newer);
        let of_instance = steps.filter(|step| step.instance == instance);
        of_instance.cloned().collect()
    }
}

/// The span that recorded a context.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Recorder {
    pub(crate) span_name: Cow<'static, str>,
    /// Empty where the span does not tell.
    target: Cow<'static, str>,
}

impl Recorder {
    pub(crate) fn of(span: &SpanBuilder) -> Self {
        let attributes = span.attributes.as_deref().unwrap_or_default();
        // tracing-opentelemetry tells the target of a span under this name.
        let target = attributes
            .iter()
            .find(|attribute| attribute.key.as_str() == "target");
        let target = target
            .map(|attribute| attribute.value.to_string())
            .unwrap_or_default();
        Self {
            span_name: span.name.clone(),
            target: target.into(),
        }
    }
}

/// What is recorded for an instance, by whom, and why its last spans went where they did.
///
/// Made by [`WorkflowContextStorage::explain`](crate::WorkflowContextStorage::explain). `Display` is meant for a
/// terminal or a log; control characters of the id are escaped.
#[derive(Clone, Debug)]
pub struct Explanation {
    instance_id: String,
    invalid: Option<InvalidInstanceId>,
    recorded: Option<Recorded>,
    steps: Vec<Step>,
    tick: u32,
    trail_is_off: bool,
    backend_is_down: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Recorded {
    pub(crate) context: WorkflowContext,
    pub(crate) recorder: Option<Recorder>,
    pub(crate) generation: u32,
    pub(crate) run_id: Option<String>,
    pub(crate) completed: bool,
    pub(crate) older_runs: usize,
    pub(crate) now: SystemTime,
}

impl Explanation {
    pub(crate) fn new(
        id: &str,
        recorded: Option<Recorded>,
        steps: Vec<Step>,
        tick: u32,
        trail_is_off: bool,
    ) -> Self {
        // An invalid id is cut to what an id can be: the text goes to a log.
        let shown = id
            .char_indices()
            .take_while(|(at, _)| *at < MAX_INSTANCE_ID_BYTES);
        Self {
            instance_id: shown.map(|(_, c)| c).collect(),
            invalid: InvalidInstanceId::check(id).err(),
            recorded,
            steps,
            tick,
            trail_is_off,
            backend_is_down: false,
        }
    }

    pub(crate) fn with_backend_down(self, backend_is_down: bool) -> Self {
        Self {
            backend_is_down,
            ..self
        }
    }

    /// Whether a context is recorded for the instance.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// Where nothing is recorded: the reason, as far as it is known.
    #[must_use]
    pub fn reason(&self) -> Option<Absence> {
        if self.recorded.is_some() {
            return None;
        }
        if self.invalid.is_some() {
            return Some(Absence::InvalidId);
        }
        let gone = self.steps.iter().rev().find_map(|step| match step.event {
            Event::Expired => Some(Absence::Expired),
            Event::GraceOver => Some(Absence::Completed),
            Event::Evicted => Some(Absence::Evicted),
            Event::CleanedUp => Some(Absence::CleanedUp),
            _ => None,
        });
        Some(match gone {
            Some(reason) => reason,
            None if self.backend_is_down => Absence::BackendDown,
            None if !self.steps.is_empty() => Absence::NotRecorded,
            None => Absence::NeverSeen,
        })
    }
}

/// Why nothing is recorded for an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Absence {
    /// No span and no call has named it, in as far as the trail reaches back: the spans may be filtered out.
    NeverSeen,
    /// It was idle for longer than `idle_ttl`.
    Expired,
    /// Memory held more than `max_instances`.
    Evicted,
    /// Its grace after a terminal `workflow.status` is over.
    Completed,
    /// `cleanup` was called.
    CleanedUp,
    /// Its spans were replays, or had no valid span context: the provider is shut down, or the tracer does nothing.
    NotRecorded,
    /// The backend, which may know it, does not answer.
    BackendDown,
    /// The id is empty or too long to be one.
    InvalidId,
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NeverSeen => {
                "never seen: no span and no call has named it lately (is the span filtered out, or the field misspelt?)"
            }
            Self::Expired => "expired: it was idle for longer than idle_ttl",
            Self::Evicted => "evicted: memory held more than max_instances",
            Self::Completed => "completed: its grace after a terminal workflow.status is over",
            Self::CleanedUp => "cleaned up by a call",
            Self::NotRecorded => "its spans were replays, or had no valid span context",
            Self::BackendDown => "the backend, which may know it, does not answer",
            Self::InvalidId => "the id is empty or too long",
        })
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "workflow instance {:?}", self.instance_id)?;
        match (&self.recorded, &self.invalid) {
            (Some(recorded), _) => write!(f, "{recorded}")?,
            (None, Some(invalid)) => write!(f, "\n  nothing is recorded: {invalid}")?,
            (None, None) => {
                let reason = self.reason().unwrap_or(Absence::NeverSeen);
                write!(f, "\n  nothing is recorded: {reason}")?;
            }
        }
        if self.trail_is_off {
            return write!(f, "\n  recent decisions are switched off");
        }
        for step in &self.steps {
            let ago = TICK.saturating_mul(self.tick.saturating_sub(step.tick));
            write!(f, "\n  {:>7.1}s ago  {}", ago.as_secs_f64(), step.event)?;
        }
        Ok(())
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let age = self
            .now
            .duration_since(self.context.recorded_at())
            .unwrap_or_default();
        let sampled = if self.context.is_sampled() {
            "sampled"
        } else {
            "not sampled"
        };
        write!(
            f,
            "\n  trace {} span {}, {sampled}",
            self.context.trace_id(),
            self.context.span_id()
        )?;
        write!(f, "\n  recorded {:.1}s ago ", age.as_secs_f64())?;
        match &self.recorder {
            _ if self.context.is_remote() => f.write_str("by another process")?,
            Some(by) if by.target.is_empty() => write!(f, "by span {:?}", by.span_name)?,
            Some(by) => write!(
                f,
                "by span {:?} of {}",
                by.span_name,
                by.target.escape_debug()
            )?,
            None => f.write_str("by a call")?,
        }
        if !self.context.is_remote() {
            write!(f, ", process {} on {}", std::process::id(), host())?;
        }
        write!(f, "\n  generation {}", self.generation)?;
        if let Some(run_id) = &self.run_id {
            write!(f, ", run {run_id:?}")?;
        }
        if self.older_runs > 0 {
            write!(f, " after {} older", self.older_runs)?;
        }
        if self.context.is_resumed() {
            f.write_str(", resumed")?;
        }
        if self.completed {
            f.write_str(", completed")?;
        }
        Ok(())
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
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            span_name,
            span,
            natural,
            outcome,
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
                write!(f, "{}: {}", relation.as_str(), continuation.describe())?;
            }
        }
        match natural.are_valid() {
            true => write!(f, " (natural parent {natural})"),
            false => f.write_str(" (no natural parent)"),
        }
    }
}

/// The machine's name, as far as it can be read without a system call of its own.
fn host() -> &'static str {
    static HOST: OnceLock<String> = OnceLock::new();
    HOST.get_or_init(|| {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        let name = name.or_else(|| std::env::var("HOSTNAME").ok());
        let name = name.or_else(|| std::env::var("COMPUTERNAME").ok());
        name.map_or_else(
            || "an unknown host".to_owned(),
            |name| name.trim().escape_debug().to_string(),
        )
    })
}
