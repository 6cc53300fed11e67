//! The explanation of an instance: its record, and the decisions on its last spans, as text.

pub(crate) mod author;
pub(crate) mod trail;

use std::fmt;
use std::sync::OnceLock;
use std::time::SystemTime;

use opentelemetry::TraceId;

use self::author::Writer;
use self::trail::{Event, Step};
use crate::clock::TICK;
use crate::context::WorkflowContext;
use crate::error::{InvalidInstanceId, MAX_INSTANCE_ID_BYTES};
use crate::root::summary::RootSummary;

/// An explanation of an instance: the recorded context and its author, and the decisions on the last spans.
///
/// Returned by [`WorkflowContextStorage::explain`](crate::WorkflowContextStorage::explain). `Display` is meant for a
/// terminal or a log; control characters of the id are escaped.
#[derive(Clone, Debug)]
pub struct Explanation {
    instance_id: String,
    invalid: Option<InvalidInstanceId>,
    recorded: Option<Summary>,
    steps: Vec<Step>,
    tick: u32,
    trail_is_off: bool,
    backend_is_down: bool,
    trace_is_shared: bool,
    missing_for_roots: Option<&'static str>,
}

/// The record of an instance.
#[derive(Clone, Debug)]
pub(crate) struct Summary {
    pub(crate) context: WorkflowContext,
    pub(crate) writer: Writer,
    pub(crate) generation: u32,
    pub(crate) run_id: Option<String>,
    pub(crate) completed: bool,
    pub(crate) older_runs: usize,
    /// Its own span, with durable roots.
    pub(crate) root: Option<RootSummary>,
    /// The time of the explanation.
    pub(crate) now: SystemTime,
}

impl Explanation {
    pub(crate) fn new(
        id: &str,
        recorded: Option<Summary>,
        steps: Vec<Step>,
        tick: u32,
        trail_is_off: bool,
    ) -> Self {
        // An id that is too long is cut to the maximum, since the text goes to a log.
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
            trace_is_shared: false,
            missing_for_roots: None,
        }
    }

    /// Notes whether many instances share the recorded trace.
    pub(crate) fn with_shared_trace(self, is_shared: impl FnOnce(TraceId) -> bool) -> Self {
        let recorded = self.recorded.as_ref();
        let trace_is_shared =
            recorded.is_some_and(|recorded| is_shared(recorded.context.trace_id()));
        Self {
            trace_is_shared,
            ..self
        }
    }

    pub(crate) fn with_backend_down(self, backend_is_down: bool) -> Self {
        Self {
            backend_is_down,
            ..self
        }
    }

    /// Notes the line without which durable roots are off.
    pub(crate) fn with_missing_for_roots(self, missing_for_roots: Option<&'static str>) -> Self {
        Self {
            missing_for_roots,
            ..self
        }
    }

    /// Returns `true` if a context is recorded for the instance.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// Returns the reason why nothing is recorded, as far as it is known; `None` if a context is recorded.
    #[must_use]
    pub fn reason(&self) -> Option<Absence> {
        if self.recorded.is_some() {
            return None;
        }
        if self.invalid.is_some() {
            return Some(Absence::InvalidId);
        }
        let removed = self.steps.iter().rev().find_map(|step| match step.event {
            Event::Expired => Some(Absence::Expired),
            Event::GraceOver => Some(Absence::Completed),
            Event::Evicted => Some(Absence::Evicted),
            Event::CleanedUp => Some(Absence::CleanedUp),
            _ => None,
        });
        let is_outranked = |step: &Step| matches!(step.event, Event::Outranked(_));
        Some(match removed {
            Some(reason) => reason,
            None if self.backend_is_down => Absence::BackendDown,
            None if self.steps.is_empty() => Absence::NeverSeen,
            None if self.steps.iter().all(is_outranked) => Absence::Outranked,
            None => Absence::NotRecorded,
        })
    }
}

/// A reason why nothing is recorded for an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Absence {
    /// No span and no call has named it as far back as the trail reaches. Its spans may be filtered out.
    NeverSeen,
    /// It was idle for longer than `idle_ttl`.
    Expired,
    /// The cache held more than `max_instances`.
    Evicted,
    /// Its grace after a terminal `workflow.status` is over.
    Completed,
    /// `cleanup` was called.
    CleanedUp,
    /// Its spans were replays, only look at it (`workflow.observing`), or had no valid span context: the provider is shut down, or the tracer does nothing.
    NotRecorded,
    /// Its spans belong to other instances, which they name in id fields that rank higher.
    Outranked,
    /// The backend, which may hold it, does not respond.
    BackendDown,
    /// The id is empty, or longer than [`MAX_INSTANCE_ID_BYTES`].
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
            Self::NotRecorded => "its spans were replays, only look at it, or had no valid span context",
            Self::Outranked => "its spans name another instance in an id field that ranks higher",
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
        if self.trace_is_shared {
            f.write_str(
                "\n  more than 16 instances share this trace: name the span that they have in common, a poller's, in poller_spans",
            )?;
        }
        if let Some(missing) = self.missing_for_roots {
            write!(
                f,
                "\n  durable roots are off: the tracer provider lacks {missing}"
            )?;
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

impl fmt::Display for Summary {
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
        match self.context.is_remote() {
            true => f.write_str("by another process")?,
            false => write!(f, "{}", self.writer)?,
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
        if let Some(root) = &self.root {
            write!(f, "\n  {root}")?;
        }
        Ok(())
    }
}

/// Returns the host name, as far as it can be read without `unsafe` code.
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
