//! The entry of an instance: its runs, and the time of its last use and of its completion.

use std::cell::Cell;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::SystemTime;

use opentelemetry::TraceId;

use super::inline_str::InlineStr;
use crate::context::{Packed, WorkflowContext};
use crate::explain::Summary;
use crate::explain::author::Writer;
use crate::explain::trail::Event;
use crate::root::open::OpenRoot;
use crate::tracestate::Tracestate;

/// The number of runs that are kept besides the latest, for their late spans.
const OLDER_RUNS: usize = 8;

/// The number of earlier generations of a run that are remembered, for spans that are still open in them.
const OLDER_TRACES: usize = 8;

/// The runs of one instance. It is only read under the lock of its shard; what a read changes is in cells.
pub(crate) struct Entry {
    pub(super) id: InlineStr,
    pub(super) latest: Run,
    /// Twice the tick of the last use, plus one if it was used since it was stored.
    pub(super) used: Cell<u32>,
    /// The tick of the terminal status; zero before it.
    pub(super) completed: Cell<u32>,
}

// One is kept for every live instance, so growth here is paid a million times.
const _: () = assert!(size_of::<Entry>() <= 104);

/// One run: its recorded context, and how its trace has grown since.
pub(crate) struct Run {
    context: Packed,
    pub(super) rare: Option<Box<Rare>>,
    /// The number of spans of this generation that this process recorded or placed.
    spans: Cell<u64>,
    /// The number of this trace among those of the run, from 1; `max_age` and `max_spans` begin the next one.
    generation: u32,
    /// `None` if a call stored it.
    pub(super) author: Option<NonZeroU16>,
    /// The flags of the context, which [`Packed`] does not hold.
    flags: u8,
    marks: Cell<u8>,
}

/// Set while a thread opens the root of the next generation.
const ROLLING: u8 = 1;
/// Set once a span of this process has told by its attributes that its context came from another one.
const ANNOUNCED: u8 = 2;
/// Set if the run got its id from a span after it was recorded, until a backend is told.
const NAMED: u8 = 4;

/// The parts that most runs do not have.
#[derive(Default)]
pub(super) struct Rare {
    trace_state: Option<Arc<Tracestate>>,
    /// Set later if the context was stored without a run id, by the first span with one.
    run_id: Option<InlineStr>,
    /// Oldest first, at most [`OLDER_RUNS`]. Empty except in the latest run.
    older: Vec<Run>,
    /// The traces of earlier generations of this run, oldest first, at most [`OLDER_TRACES`].
    older_traces: Vec<TraceId>,
    /// The workflow's own span, with durable roots.
    root: Option<Arc<OpenRoot>>,
    /// The size that was last counted among the bytes of all entries.
    counted: usize,
}

/// A bound of the size of a root, with its name and progress.
const ROOT_BYTES: usize = 768;

impl Rare {
    /// Returns about how many bytes it takes, with what it points to.
    fn size(&self) -> usize {
        let older = self.older.iter().map(|run| size_of::<Run>() + run.size());
        size_of::<Self>()
            + self.trace_state.as_deref().map_or(0, Tracestate::bytes)
            + self.run_id.as_ref().map_or(0, InlineStr::heap_bytes)
            + older.sum::<usize>()
            + size_of::<TraceId>() * self.older_traces.capacity()
            + self.root.as_ref().map_or(0, |_| ROOT_BYTES)
    }

    /// Returns the ids of the run and of the older ones.
    pub(super) fn run_ids(&self) -> Vec<Box<str>> {
        let older = self.older.iter().filter_map(Run::run_id);
        let ids = self.run_id.iter().chain(older);
        ids.map(|id| id.as_str().into()).collect()
    }
}

/// The context was not recorded, because another one was recorded first.
#[derive(Debug)]
pub(crate) struct Conflict {
    pub(crate) winner: WorkflowContext,
}

/// The runs in whose place another context was stored.
#[derive(Default)]
pub(crate) struct Replaced(Option<Box<Rare>>);

impl Replaced {
    pub(crate) fn run_ids(&self) -> Vec<Box<str>> {
        self.0.as_ref().map_or_else(Vec::new, |rare| rare.run_ids())
    }
}

/// A run that was recorded without an id, and got one later.
pub(crate) struct Named {
    pub(crate) context: WorkflowContext,
    pub(crate) root: Option<Arc<OpenRoot>>,
    pub(crate) run_id: String,
    pub(crate) generation: u32,
}

/// The bounds of the cache; durations are in ticks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) max_instances: usize,
    pub(crate) max_bytes: usize,
    /// The most bytes of a tracestate.
    pub(crate) max_trace_state: usize,
    pub(crate) idle_ttl: u32,
    pub(crate) completed_grace: u32,
}

/// The order of eviction: completed instances first, then expired ones, then the least recently used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    Completed,
    Expired,
    Used(u32),
}

impl Entry {
    #[inline]
    pub(super) fn new(id: &str, latest: Run, now: u32) -> Self {
        Self {
            id: id.into(),
            latest,
            used: Cell::new(now << 1),
            completed: Cell::new(0),
        }
    }

    /// Puts a run in the place of all others.
    #[inline]
    pub(super) fn replace(&mut self, run: Run) -> Replaced {
        let replaced = Replaced(self.latest.rare.take());
        self.latest = run;
        self.completed.set(0);
        replaced
    }

    /// Returns the bytes beyond the entry itself, as they were last counted.
    #[inline]
    pub(super) fn counted_bytes(&self) -> usize {
        self.id.heap_bytes() + self.latest.rare.as_ref().map_or(0, |rare| rare.counted)
    }

    /// Counts the bytes beyond the entry itself.
    #[inline]
    pub(super) fn count_bytes(&mut self) -> usize {
        self.id.heap_bytes() + self.latest.count_bytes()
    }

    /// Makes an expired entry one that was just created with that run.
    pub(super) fn restart(&mut self, run: Run, now: u32) {
        self.latest = run;
        self.used.set(now << 1);
        self.completed.set(0);
    }

    /// Notes a use. Returns `false`, and notes nothing, if the entry has expired.
    #[inline]
    pub(super) fn touch(&self, now: u32, limits: &Limits) -> bool {
        let used = now << 1 | 1;
        if self.used.get() == used && self.completed.get() == 0 {
            return true;
        }
        let live = self.rank(now, limits) != Rank::Expired;
        if live {
            self.used.set(used);
        }
        live
    }

    /// Returns the entry's rank in the order of eviction.
    pub(super) fn rank(&self, now: u32, limits: &Limits) -> Rank {
        let (used, completed) = (self.used.get(), self.completed.get());
        let grace_is_over =
            completed != 0 && now.saturating_sub(completed) >= limits.completed_grace;
        if grace_is_over || now.saturating_sub(used >> 1) > limits.idle_ttl {
            Rank::Expired
        } else if completed != 0 {
            Rank::Completed
        } else {
            Rank::Used(used)
        }
    }

    /// Returns the event that the expiry of this entry is.
    pub(super) fn expiry_event(&self) -> Event {
        match self.completed.get() {
            0 => Event::Expired,
            _ => Event::GraceOver,
        }
    }

    /// Sets the tick of the terminal status. Returns `true` if the run is the latest and had none.
    pub(super) fn complete(&self, run_id: Option<&str>, now: u32) -> bool {
        let is_first = self.is_latest(run_id) && self.completed.get() == 0;
        if is_first {
            self.completed.set(now.max(1));
        }
        is_first
    }

    /// Returns a summary of the latest run, without its writer.
    pub(super) fn summary(&self, now: SystemTime) -> Summary {
        Summary {
            context: self.latest.context(),
            writer: Writer::Call,
            generation: self.latest.generation,
            run_id: self.latest.run_id().map(|id| id.as_str().to_owned()),
            completed: self.completed.get() != 0,
            older_runs: self.older().len(),
            root: None,
            now,
        }
    }

    /// Returns the ids of all runs.
    pub(super) fn run_ids(&self) -> Vec<Box<str>> {
        let rare = self.latest.rare.as_ref();
        rare.map_or_else(Vec::new, |rare| rare.run_ids())
    }

    /// Returns `true` if a span that names that run belongs to the latest.
    #[inline]
    pub(super) fn is_latest(&self, run_id: Option<&str>) -> bool {
        run_id.is_none_or(|id| self.latest.is(id))
    }

    pub(crate) fn latest(&self) -> &Run {
        &self.latest
    }

    pub(crate) fn is_completed(&self) -> bool {
        self.completed.get() != 0
    }

    /// Returns `false` if there is certainly no other trace than that of the latest run.
    #[inline]
    pub(crate) fn has_other_traces(&self) -> bool {
        self.latest.rare.is_some()
    }

    /// Returns `true` if a kept run or generation of the instance has that trace.
    pub(crate) fn has_trace(&self, trace: TraceId) -> bool {
        let mut runs = std::iter::once(&self.latest).chain(self.older());
        runs.any(|run| run.has_trace(trace))
    }

    fn older(&self) -> &[Run] {
        self.latest.rare.as_ref().map_or(&[], |rare| &rare.older)
    }

    /// Returns the run with that id; without an id, the latest.
    #[inline]
    pub(crate) fn run(&self, run_id: Option<&str>) -> Option<&Run> {
        if self.is_latest(run_id) {
            return Some(&self.latest);
        }
        let id = run_id?;
        self.older().iter().find(|run| run.is(id))
    }

    /// Gives the latest run that id, if it was recorded without one.
    #[inline]
    pub(super) fn name_latest(&mut self, id: &str) {
        if self.latest.run_id().is_none() {
            self.latest.rare_mut().run_id = Some(id.into());
            self.latest.mark(NAMED, true);
        }
    }

    /// Returns the latest run as a backend is to know it, once after it got its id from a span. `None` if it is completed.
    #[inline]
    pub(crate) fn take_named(&self) -> Option<Named> {
        if self.latest.marks.get() & NAMED == 0 {
            return None;
        }
        self.latest.mark(NAMED, false);
        let run_id = self.latest.run_id().filter(|_| !self.is_completed())?;
        Some(Named {
            context: self.latest.context(),
            root: self.latest.root().cloned(),
            run_id: run_id.as_str().to_owned(),
            generation: self.latest.generation,
        })
    }

    /// Returns the run with that id as [`run`](Self::run) does, after giving the latest that id if it has none.
    pub(super) fn run_mut(&mut self, run_id: Option<&str>) -> Option<&mut Run> {
        let Some(id) = run_id else {
            return Some(&mut self.latest);
        };
        self.name_latest(id);
        if self.latest.is(id) {
            return Some(&mut self.latest);
        }
        self.latest
            .rare_mut()
            .older
            .iter_mut()
            .find(|run| run.is(id))
    }

    /// Returns `true` if the context is that of a run with another id.
    pub(super) fn is_of_other_run(&self, context: &WorkflowContext, run_id: &str) -> bool {
        let mut runs = std::iter::once(&self.latest).chain(self.older());
        runs.any(|run| !run.may_be(Some(run_id)) && run.context().is_same_span(context))
    }

    /// Changes each run.
    pub(super) fn for_each_run(&mut self, mut change: impl FnMut(&mut Run)) {
        change(&mut self.latest);
        if let Some(rare) = &mut self.latest.rare {
            rare.older.iter_mut().for_each(change);
        }
    }

    /// Makes a new run the latest, and the instance no longer completed.
    pub(super) fn begin(&mut self, run: Run) {
        let mut older = self.latest.take_older();
        if older.len() == OLDER_RUNS {
            older.remove(0);
        }
        older.push(std::mem::replace(&mut self.latest, run));
        self.latest.rare_mut().older = older;
        self.completed.set(0);
    }
}

impl Run {
    #[inline]
    pub(super) fn new(context: WorkflowContext, run_id: Option<&str>, generation: u32) -> Self {
        let (context, flags, trace_state) = context.pack();
        let rare = (run_id.is_some() || trace_state.is_some()).then(|| {
            Box::new(Rare {
                trace_state,
                run_id: run_id.map(InlineStr::from),
                older: Vec::new(),
                older_traces: Vec::new(),
                root: None,
                counted: 0,
            })
        });
        Self {
            context,
            rare,
            spans: Cell::new(1),
            generation,
            author: None,
            flags,
            marks: Cell::new(0),
        }
    }

    fn size(&self) -> usize {
        self.rare.as_ref().map_or(0, |rare| rare.size())
    }

    /// Counts its bytes beyond itself.
    #[inline]
    pub(super) fn count_bytes(&mut self) -> usize {
        let Some(rare) = &mut self.rare else {
            return 0;
        };
        rare.counted = rare.size();
        rare.counted
    }

    /// Gives the run its own span.
    pub(super) fn with_root(mut self, root: Option<Arc<OpenRoot>>) -> Self {
        self.set_root(root);
        self
    }

    /// Gives the run its own span.
    #[inline]
    pub(super) fn set_root(&mut self, root: Option<Arc<OpenRoot>>) {
        if root.is_some() {
            self.rare_mut().root = root;
        }
    }

    pub(crate) fn root(&self) -> Option<&Arc<OpenRoot>> {
        self.rare.as_ref()?.root.as_ref()
    }

    #[inline]
    pub(crate) fn context(&self) -> WorkflowContext {
        let trace_state = self.rare.as_ref().and_then(|rare| rare.trace_state.clone());
        WorkflowContext::unpack(self.context, self.flags, trace_state)
    }

    pub(crate) fn recorded_at(&self) -> SystemTime {
        self.context.recorded_at()
    }

    fn rare_mut(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    fn take_older(&mut self) -> Vec<Run> {
        let rare = self.rare.as_mut();
        rare.map_or_else(Vec::new, |rare| std::mem::take(&mut rare.older))
    }

    fn has_trace(&self, trace: TraceId) -> bool {
        let older = self.rare.as_ref().map(|rare| &rare.older_traces);
        self.context().trace_id() == trace || older.is_some_and(|older| older.contains(&trace))
    }

    /// The next generation takes its place; its own trace is remembered.
    pub(super) fn continue_as(&mut self, next: Run) {
        let trace = self.context().trace_id();
        let rare = self.rare.as_mut();
        let mut traces = rare.map_or_else(Vec::new, |rare| std::mem::take(&mut rare.older_traces));
        if traces.len() == OLDER_TRACES {
            traces.remove(0);
        }
        traces.push(trace);
        self.replace(next);
        self.rare_mut().older_traces = traces;
    }

    /// Replaces the trace of this run by another one. The older runs stay.
    pub(super) fn replace(&mut self, next: Run) {
        let older = self.take_older();
        *self = next;
        if !older.is_empty() {
            self.rare_mut().older = older;
        }
    }

    pub(super) fn run_id(&self) -> Option<&InlineStr> {
        self.rare.as_ref()?.run_id.as_ref()
    }

    pub(super) fn rename(&mut self, id: &str) {
        self.rare_mut().run_id = Some(id.into());
    }

    /// Returns `true` if this may be the run with that id: a run without an id is any.
    pub(super) fn may_be(&self, id: Option<&str>) -> bool {
        (self.run_id().zip(id)).is_none_or(|(known, id)| *known == *id)
    }

    fn is(&self, id: &str) -> bool {
        self.run_id().is_some_and(|known| *known == *id)
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// Returns the number of spans of this trace that this process recorded or placed.
    pub(crate) fn spans(&self) -> u64 {
        self.spans.get()
    }

    #[inline]
    pub(crate) fn count_span(&self) {
        self.spans.set(self.spans.get().saturating_add(1));
    }

    /// Returns `true` while a thread opens the root of the next trace.
    pub(crate) fn is_rolling(&self) -> bool {
        self.marks.get() & ROLLING != 0
    }

    pub(crate) fn set_rolling(&self, is_rolling: bool) {
        self.mark(ROLLING, is_rolling);
    }

    /// Returns `true` once a span of this process has told that its context came from another one.
    #[inline]
    pub(crate) fn is_announced(&self) -> bool {
        self.marks.get() & ANNOUNCED != 0
    }

    pub(crate) fn set_announced(&self) {
        self.mark(ANNOUNCED, true);
    }

    fn mark(&self, mark: u8, is_set: bool) {
        let others = self.marks.get() & !mark;
        self.marks.set(if is_set { others | mark } else { others });
    }
}
