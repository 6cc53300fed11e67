//! The mark of a span builder, by which the tracer knows the spans that matter, and the numbers that it carries.

use opentelemetry::trace::{Link, SpanBuilder, SpanContext, TraceFlags, TraceState};
use opentelemetry::{SpanId, TraceId};

use super::handoff::{Mark, StartNumber};

/// Flags of [`Mark`], kept as those of a trace.
const MAY_BE_HELD: u8 = 1;
const MAY_BE_REPLAYED: u8 = 2;
const IS_ORDINARY: u8 = 4;
const AWAITS: u8 = 8;

/// Marks a builder by an empty list of links, which costs nothing, so that `build_with_context` reads its attributes.
/// Reading those of each ordinary span would cost more than all else that this crate does to it. The numbers of a span that
/// may be held or replayed go along in the list, as the trace id of a link without a span.
#[inline]
pub(super) fn mark(builder: &mut SpanBuilder) -> &mut Vec<Link> {
    builder.links.get_or_insert_default()
}

#[cold]
pub(super) fn mark_with(builder: &mut SpanBuilder, carried: Mark) {
    let links = mark(builder);
    links.reserve(2);
    links.insert(0, link_with(carried));
}

#[inline(never)]
fn link_with(mark: Mark) -> Link {
    let trace = TraceId::from(u128::from(mark.beneath) << 64 | u128::from(mark.number));
    let flag = |is_set: bool, flag| if is_set { flag } else { 0 };
    let flags = TraceFlags::new(
        flag(mark.may_be_held, MAY_BE_HELD)
            | flag(mark.may_be_replayed, MAY_BE_REPLAYED)
            | flag(mark.is_ordinary, IS_ORDINARY)
            | flag(mark.awaits, AWAITS),
    );
    Link::with_context(SpanContext::new(
        trace,
        SpanId::INVALID,
        flags,
        false,
        TraceState::NONE,
    ))
}

/// Takes out of a marked builder what it carries.
#[inline]
pub(super) fn take_mark(builder: &mut SpanBuilder) -> Option<Mark> {
    let links = builder.links.as_mut()?;
    let carrier = &links.first()?.span_context;
    (carrier.span_id() == SpanId::INVALID).then(|| take_first(links))
}

#[inline(never)]
fn take_first(links: &mut Vec<Link>) -> Mark {
    let carrier = links.remove(0).span_context;
    let numbers = u128::from_be_bytes(carrier.trace_id().to_bytes());
    let flags = carrier.trace_flags().to_u8();
    Mark {
        number: numbers as StartNumber,
        beneath: (numbers >> 64) as StartNumber,
        may_be_held: flags & MAY_BE_HELD != 0,
        may_be_replayed: flags & MAY_BE_REPLAYED != 0,
        is_ordinary: flags & IS_ORDINARY != 0,
        awaits: flags & AWAITS != 0,
    }
}

/// Returns `true` also for an ordinary span with several links, which only costs a little. For one link
/// tracing-opentelemetry 0.34 allocates a list of just that capacity, to which the empty list of a mark never grows.
#[inline]
pub(super) fn is_marked(builder: &SpanBuilder) -> bool {
    (builder.links.as_ref()).is_some_and(|links| links.capacity() != 1)
}
