//! A root whose end has not been told: what this process knows of its spans.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::SystemTime;

use opentelemetry::trace::SpanContext;

use super::close;
use super::state::{Allocated, Due, Ending, Part, Place, Progress, Roots, Stage};
use super::summary::RootSummary;
use crate::backend::{Record, RootSpan};
use crate::context::WorkflowContext;
use crate::decision::relation::Relation;
use crate::fields::value::EndStatus;
use crate::lock::lock;

/// The root of an instance, or of one of its runs or generations. Memory keeps one beside the context; each open span of the
/// instance holds a reference.
pub(crate) struct OpenRoot(pub(super) Arc<Part>);

/// The step to take once nothing is locked.
enum Next {
    Nothing,
    AskForPlace,
    WritePart(u32),
    Close,
}

impl OpenRoot {
    pub(super) fn new(part: Part) -> Arc<Self> {
        Arc::new(Self(Arc::new(part)))
    }

    /// Returns the root as a backend keeps it beside the context of the instance.
    pub(crate) fn record(&self) -> &RootSpan {
        &self.0.span
    }

    /// Returns `true` if the context is one of this root's trace.
    pub(crate) fn is_of(&self, context: &WorkflowContext) -> bool {
        self.0.context.trace_id() == context.trace_id()
    }

    fn set_recorded(&self) {
        let progress = &mut *lock(&self.0.progress);
        if progress.stage == Stage::New {
            progress.stage = Stage::Open;
        }
    }

    /// Opens a span of the instance in this process.
    pub(crate) fn enter(self: Arc<Self>) -> Within {
        let next = {
            let progress = &mut *lock(&self.0.progress);
            progress.open = progress.open.saturating_add(1);
            let asks = progress.place == Place::None && self.0.roots.backing.get().is_some();
            if asks {
                progress.place = Place::Asked;
                Next::AskForPlace
            } else {
                Next::Nothing
            }
        };
        self.0.proceed(next);
        Within {
            root: self,
            ended_at: None,
        }
    }

    /// Returns what `explain` tells of it.
    pub(crate) fn summary(&self) -> RootSummary {
        let Part { span, progress, .. } = &*self.0;
        let progress = lock(progress);
        RootSummary {
            name: span.name.clone(),
            span_id: span.span_id,
            spans: progress.spans,
            open: progress.open,
            status: progress.ending.map(|ending| ending.status),
            is_closed: progress.stage == Stage::Closed,
        }
    }

    /// Takes the end of the instance as somebody has told it.
    pub(crate) fn end(&self, status: EndStatus) {
        self.0.roots.knows_an_end.store(true, Relaxed);
        self.end_as(status);
    }

    /// Takes the end of the instance. It is exported as soon as no span of it is open in this process. The first end counts.
    fn end_as(&self, status: EndStatus) {
        let at = self.0.roots.clock.now();
        let next = {
            let progress = &mut *lock(&self.0.progress);
            progress.ending.get_or_insert(Ending { status, at });
            progress.close_if_over()
        };
        self.0.proceed(next);
    }

    /// Takes the trace that follows this one, which ends it.
    pub(crate) fn continue_in(&self, next: SpanContext, relation: &str) {
        lock(&self.0.progress)
            .links
            .push((next, relation.to_owned()));
        self.end_as(EndStatus::Continued);
    }

    /// Takes the root of another process, which was recorded first: what has started here is exported beneath this one. Does
    /// not export it at once: memory is locked. For the same reason the time is the caller's. Returns the end of the instance
    /// that was told of this root, and is now the other one's.
    pub(crate) fn give_way_to(&self, winner: SpanContext, at: SystemTime) -> Option<EndStatus> {
        let progress = &mut *lock(&self.0.progress);
        let relation = Relation::Late.as_str().to_owned();
        progress.links.push((winner, relation));
        let status = EndStatus::Superseded;
        let told = progress.ending.replace(Ending { status, at });
        told.map(|ending| ending.status).filter(|it| it.is_told())
    }
}

impl Drop for OpenRoot {
    /// Memory has forgotten the instance, and no span of it is open.
    fn drop(&mut self) {
        let stage = lock(&self.0.progress).stage;
        if stage == Stage::Open {
            // Not exported here: memory may be locked.
            self.0.roots.add_due(Due::new(self.0.clone()));
        }
    }
}

impl Progress {
    fn close_if_over(&mut self) -> Next {
        if self.stage == Stage::Open && self.open == 0 && self.ending.is_some() {
            self.stage = Stage::Closing;
            Next::Close
        } else {
            Next::Nothing
        }
    }
}

impl Part {
    fn proceed(self: &Arc<Self>, next: Next) {
        match next {
            Next::Nothing => {}
            Next::AskForPlace => close::ask_for_place(self),
            Next::WritePart(place) => close::write_part(self, place),
            Next::Close => close::close(self),
        }
    }
}

/// An open span of the instance in this process. One that is dropped without an end has none to tell.
pub(crate) struct Within {
    root: Arc<OpenRoot>,
    /// `None` until the span has ended.
    ended_at: Option<SystemTime>,
}

impl Within {
    /// Notes the end of the span. To be called once it is exported, so that the root comes last.
    pub(crate) fn end(mut self, at: SystemTime) {
        self.ended_at = Some(at);
    }
}

impl Drop for Within {
    fn drop(&mut self) {
        let part = &self.root.0;
        let next = {
            let progress = &mut *lock(&part.progress);
            if let Some(at) = self.ended_at {
                progress.last_end = progress.last_end.max(at);
                progress.spans += 1;
            }
            progress.open = progress.open.saturating_sub(1);
            match (progress.close_if_over(), progress.stage, progress.place) {
                (Next::Nothing, Stage::Open, Place::Taken(place)) => Next::WritePart(place),
                (next, ..) => next,
            }
        };
        part.proceed(next);
    }
}

impl Roots {
    /// Opens an allocated root, which is not recorded yet.
    pub(crate) fn open(
        self: &Arc<Self>,
        id: &str,
        run_id: Option<&str>,
        generation: u32,
        allocated: &Allocated,
    ) -> Arc<OpenRoot> {
        self.count_opened();
        let Allocated { context, span } = allocated.clone();
        let stage = Stage::New;
        OpenRoot::new(Part::new(
            self, id, run_id, generation, context, span, stage,
        ))
    }
}

/// Notes that memory has the root now. One that it refused is of no use to anybody.
#[inline]
pub(crate) fn set_recorded(root: Option<Arc<OpenRoot>>) {
    if let Some(root) = root {
        root.set_recorded();
    }
}

/// Returns a root that a backend keeps beside the context of an instance.
pub(crate) fn reopen(roots: &Arc<Roots>, id: &str, record: &Record) -> Option<Arc<OpenRoot>> {
    let span = record.root.as_deref()?.clone();
    let (run_id, generation) = (record.run_id.as_deref(), record.generation);
    let (context, stage) = (record.context.clone(), Stage::New);
    let part = Part::new(roots, id, run_id, generation, context, span, stage);
    Some(OpenRoot::new(part))
}

impl fmt::Debug for OpenRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenRoot")
            .field("span", &self.0.span)
            .finish_non_exhaustive()
    }
}
