//! The allocation of a root: the two pieces in the provider are asked for its ids, and whether it is sampled.

use std::borrow::Cow;

use opentelemetry::trace::{
    Link, SpanBuilder, SpanContext, Status, TraceContextExt as _, TraceFlags,
};
use opentelemetry::{Context, KeyValue, SpanId, TraceId};

#[cfg(feature = "durable-root")]
use super::derived;
use super::ids::{self, Answer, Purpose, Request};
use super::state::{Allocated, Roots};
use crate::backend::RootSpan;
use crate::caught::caught;
use crate::context::WorkflowContext;
use crate::fields;
use crate::own_spans::{End, OpenAndEnd};

/// The flag of W3C Trace Context level 2 that says that the low 7 bytes of the trace id are random. Those of a digest may be
/// called so: nobody who does not choose the instance id can tell them from random ones, and they are spread as evenly.
const RANDOM: TraceFlags = TraceFlags::new(2);

/// The longest name of a root, in bytes.
const MAX_NAME: usize = 256;

impl Roots {
    /// Allocates the root of an instance, or of one of its runs or generations: the sampler is asked, and a span is built and
    /// dropped, so that nothing is exported. Returns `None`, so that the instance goes without, if a piece is missing in the
    /// provider or the sampler panics.
    pub(crate) fn allocate(
        &self,
        tracer: &dyn OpenAndEnd,
        name: Cow<'static, str>,
        id: &str,
        run_id: Option<&str>,
        generation: u32,
        parent: &Context,
    ) -> Option<Allocated> {
        if self.missing().is_some() {
            return None;
        }
        let name = cut(&name, MAX_NAME).to_owned();
        let (trace_id, span_id) = self.derived(id, run_id, generation).unzip();
        let builder = SpanBuilder::from_name(name.clone())
            .with_attributes(identifying_attributes(id, run_id));
        let request = Request {
            purpose: Purpose::Probe,
            trace_id,
            span_id,
        };
        let probe = || tracer.probe(builder, parent);
        let (own, answer) = ids::asking(request, || caught(probe));
        let Some(own) = own else {
            self.count_panic("the span of a workflow was allocated");
            return None;
        };
        if !own.is_valid() {
            // The provider has been shut down, or there is none.
            return None;
        }
        let is_sampled = self.check(answer)?;
        let natural = parent.span().span_context().clone();
        let is_derived = trace_id == Some(own.trace_id());
        let flags = TraceFlags::default().with_sampled(is_sampled);
        let flags = match is_derived {
            true => flags | RANDOM,
            false => flags | (natural.trace_flags() & RANDOM),
        };
        let now = self.clock.now();
        let state = own.trace_state().clone();
        let context = SpanContext::new(own.trace_id(), own.span_id(), flags, false, state);
        let mut context = WorkflowContext::from_span(&context, now)?;
        context.take_whole_state_of(parent);
        Some(Allocated {
            context,
            span: RootSpan {
                parent_span_id: natural.is_valid().then(|| natural.span_id()),
                ..RootSpan::new(own.span_id(), name, now)
            },
        })
    }

    /// Returns the decision of the sampler, or switches durable roots off if a piece is missing.
    fn check(&self, answer: Answer) -> Option<bool> {
        let missing = match answer {
            Answer {
                has_generator: true,
                is_sampled: Some(is_sampled),
            } => return Some(is_sampled),
            Answer {
                has_generator: false,
                is_sampled: Some(_),
            } => ".with_id_generator(storage.id_generator())",
            Answer {
                has_generator: true,
                is_sampled: None,
            } => ".with_sampler(storage.sampler(..))",
            Answer { .. } => {
                ".with_id_generator(storage.id_generator()) and .with_sampler(storage.sampler(..))"
            }
        };
        self.missing.get_or_init(|| missing);
        self.warnings.durable_root_off(missing);
        None
    }

    #[cfg(feature = "durable-root")]
    fn derived(&self, id: &str, run: Option<&str>, generation: u32) -> Option<(TraceId, SpanId)> {
        let settings = &self.settings;
        let ids = || derived::ids(&settings.namespace, id, run, generation);
        settings.derived_trace_ids.then(ids)
    }

    #[cfg(not(feature = "durable-root"))]
    fn derived(&self, _: &str, _: Option<&str>, _: u32) -> Option<(TraceId, SpanId)> {
        None
    }

    /// Exports a child of no length that shows the root before it ends.
    pub(crate) fn mark_start(&self, tracer: &dyn OpenAndEnd, id: &str, allocated: &Allocated) {
        let Allocated { context, span } = allocated;
        let builder = SpanBuilder::from_name(format!("{} started", span.name))
            .with_start_time(span.started_at)
            .with_attributes([
                KeyValue::new(fields::INSTANCE_ID, id.to_owned()),
                KeyValue::new(fields::PENDING, true),
            ]);
        let end = End {
            status: Status::Unset,
            at: Some(span.started_at),
            span_id: None,
        };
        let marked = caught(|| tracer.open_and_end(builder, &context.to_otel(), end));
        if marked.is_none() {
            self.count_panic("the start of a workflow was marked");
        }
    }
}

pub(super) fn identifying_attributes(id: &str, run_id: Option<&str>) -> Vec<KeyValue> {
    let mut attributes = vec![KeyValue::new(fields::INSTANCE_ID, id.to_owned())];
    attributes.extend(run_id.map(|id| KeyValue::new(fields::RUN_ID, id.to_owned())));
    attributes
}

/// Returns the beginning of a text, of no more than that many bytes.
fn cut(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Returns what the span of a root is linked to, as it is kept until its end.
pub(crate) fn kept_links(links: Vec<Link>) -> Vec<(SpanContext, String)> {
    let kept = |link: Link| {
        let is_relation = |attribute: &&KeyValue| attribute.key.as_str() == fields::RELATION;
        let relation = link.attributes.iter().find(is_relation);
        let relation = relation.map(|it| it.value.as_str().into_owned());
        (link.span_context, relation.unwrap_or_default())
    };
    links.into_iter().map(kept).collect()
}
