//! Held spans that are themselves inside a held span: their natural parent has not started when they are created.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use dashmap::DashMap;
use opentelemetry::Context;
use opentelemetry::trace::TraceContextExt as _;
use tracing::dispatcher::WeakDispatch;
use tracing::span;

use super::handoff::{self, StartNumber};

/// The held parents, by the number of the child.
#[derive(Debug, Default)]
pub(crate) struct HeldParents {
    len: AtomicUsize,
    parents: DashMap<StartNumber, (WeakDispatch, span::Id)>,
}

/// The mark of the context that a span keeps which is created inside a held one: the number of that span.
#[derive(Debug, PartialEq, Eq)]
struct InsideHeld(StartNumber);

/// Runs `create`, which creates a span inside a held one, so that a parent that is set by hand afterwards is told from the one
/// that was current.
pub(crate) fn inside_held(child: StartNumber, create: impl FnOnce()) {
    let current = Context::current_with_value(InsideHeld(child));
    let _marked = current.attach();
    create();
}

impl HeldParents {
    pub(crate) fn add(&self, child: StartNumber, dispatch: WeakDispatch, parent: span::Id) {
        self.len.fetch_add(1, Relaxed);
        self.parents.insert(child, (dispatch, parent));
    }

    /// Forgets a child that closes.
    pub(crate) fn remove(&self, child: StartNumber) {
        if self.len.load(Relaxed) != 0 && self.parents.remove(&child).is_some() {
            self.len.fetch_sub(1, Relaxed);
        }
    }

    /// Returns the held parent of a span.
    pub(crate) fn of(&self, child: StartNumber) -> Option<span::Id> {
        if child == 0 || self.len.load(Relaxed) == 0 {
            return None;
        }
        Some(self.parents.get(&child)?.1.clone())
    }

    /// Returns the context in which a span starts whose held parent has started by now, or is started by this; `None` if
    /// another parent was set by hand.
    pub(super) fn beneath(&self, child: StartNumber, given: &Context) -> Option<Context> {
        if self.len.load(Relaxed) == 0 {
            return None;
        }
        // No guard of the map is held while the parent starts.
        let (dispatch, parent) = self.parents.get(&child)?.clone();
        let dispatch = dispatch.upgrade()?;
        let start = || tracing_opentelemetry::get_otel_context(&parent, &dispatch);
        let parent = handoff::behind_the_layer(start)?;
        let is_as_created = given.get::<InsideHeld>() == Some(&InsideHeld(child));
        if given.has_active_span() && !is_as_created {
            return None;
        }
        Some(given.with_remote_span_context(parent.span().span_context().clone()))
    }
}
