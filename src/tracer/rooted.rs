//! Spans of instances that have a span of their own, with durable roots.

use std::sync::Arc;

use opentelemetry::Context;
use opentelemetry::trace::{SpanBuilder, TraceContextExt as _, Tracer};

use super::recording::Recording;
use crate::cache::Key;
use crate::context::WorkflowContext;
use crate::decision::relation::Relation;
use crate::explain::author::Author;
use crate::explain::trail::Outcome;
use crate::fields::{self, identity::Identity};
use crate::own_spans::OpenAndEnd;
use crate::root::allocate::kept_links;
use crate::root::open::{OpenRoot, Within};
use crate::root::state::Allocated;
use crate::storage::remote::LateWinner;
use crate::storage::shared::Shared;

/// The part of a start that the instance's own span has.
#[derive(Default)]
pub(super) struct Rooted {
    /// The context beneath the root, for the first span.
    pub(super) parent: Option<Context>,
    /// The outcome of the recording, if that is not what was decided.
    pub(super) outcome: Option<Outcome>,
    pub(super) late_winner: Option<LateWinner>,
    pub(super) within: Option<Within>,
}

/// Allocates and records the root of the span's instance, if it is the first of that; otherwise enters the one that is
/// there. The last `added_links` of the span's become the root's. Takes the recording unless the instance goes
/// without a root.
#[inline(never)]
pub(super) fn enter_root(
    tracer: &impl Tracer,
    shared: &Shared,
    builder: &mut SpanBuilder,
    added_links: usize,
    identity: Option<&Identity>,
    recording: &mut Option<Box<Recording<'_>>>,
    parent: &Context,
) -> Box<Rooted> {
    let Some(roots) = &shared.roots else {
        return Box::default();
    };
    let Some(first) = recording.take() else {
        let key =
            identity.map(|identity| shared.key(&identity.instance_id, identity.run_id.as_deref()));
        return Box::new(Rooted {
            within: key.and_then(|key| shared.enter_root(key)),
            ..Rooted::default()
        });
    };
    let name = builder.attributes.iter().flatten();
    let mut name = name.filter(|attribute| attribute.key.as_str() == fields::NAME);
    let name = name.next().map(|name| name.value.as_str().into_owned());
    let name = name.map_or_else(|| builder.name.clone(), Into::into);
    let (key, generation) = (first.key(), first.generation());
    let (id, run_id) = (key.id, key.run_id);
    let allocated = roots.allocate(tracer, name, id, run_id, generation, parent);
    let Some(mut allocated) = allocated else {
        *recording = Some(first);
        return Box::default();
    };
    // The first span has begun before anything could be allocated.
    if let Some(start) = builder.start_time {
        allocated.span.started_at = start;
        allocated.span.last_end = start;
    }
    if let Some(all) = &mut builder.links {
        let of_root = all.split_off(all.len().saturating_sub(added_links));
        allocated.span.links = kept_links(of_root);
    }
    let before = shared.tier.cache().root_of(Key {
        run_id: None,
        ..first.key()
    });
    let key = first.key();
    let root = roots.open(key.id, key.run_id, generation, &allocated);
    let context = allocated.context.clone();
    let beneath =
        |cx: &WorkflowContext| Some(parent.with_remote_span_context(cx.to_span_context()));
    let owned: (Box<str>, Option<Box<str>>) = (key.id.into(), key.run_id.map(Box::from));
    Box::new(match first.finish(context.clone(), Some(root.clone())) {
        Ok(late_winner) => {
            if let Some(before) = before {
                before.continue_in(context.to_span_context(), follows(generation).as_str());
            }
            if roots.has_start_marker() {
                roots.mark_start(tracer, &owned.0, &allocated);
            }
            Rooted {
                parent: beneath(&context),
                outcome: None,
                late_winner,
                within: Some(root.enter()),
            }
        }
        Err(winner) => Rooted {
            parent: beneath(&winner),
            outcome: Some(Outcome::LostRace),
            late_winner: None,
            within: shared.enter_root(shared.key(&owned.0, owned.1.as_deref())),
        },
    })
}

fn follows(generation: u32) -> Relation {
    match generation {
        1 => Relation::NewRun,
        _ => Relation::Expired,
    }
}

/// Allocates the root of an instance whose first span has started without one: it becomes a child of that span.
pub(super) fn allocate_late(
    shared: &Shared,
    key: Key<'_>,
    name: &str,
    span: &opentelemetry::trace::SpanContext,
) -> Option<(WorkflowContext, Arc<OpenRoot>)> {
    let parent = Context::new().with_remote_span_context(span.clone());
    let name = if name.is_empty() { "workflow" } else { name };
    allocate(shared, key, name, &parent)
}

/// Records the root of an instance of which nothing is stored, for a call that opens a span of it. Returns what is recorded
/// then.
pub(crate) fn record_root(shared: &Shared, id: &str, name: &str) -> Option<WorkflowContext> {
    let key = shared.key(id, None);
    let (context, root) = allocate(shared, key, name, &Context::new())?;
    match shared.record(key, None, context.clone(), Author::default(), Some(root)) {
        Ok(_) => Some(context),
        Err(winner) => Some(winner),
    }
}

/// Allocates the first root of an instance or run, outside the start of a span.
fn allocate(
    shared: &Shared,
    key: Key<'_>,
    name: &str,
    parent: &Context,
) -> Option<(WorkflowContext, Arc<OpenRoot>)> {
    let roots = shared.roots.as_ref()?;
    let allocate = |tracer: &dyn OpenAndEnd| -> Option<Allocated> {
        let name = name.to_owned().into();
        roots.allocate(tracer, name, key.id, key.run_id, 1, parent)
    };
    let allocated = shared.tracers.with(allocate)?;
    let root = roots.open(key.id, key.run_id, 1, &allocated);
    Some((allocated.context, root))
}
