//! The stored value: the context in which an instance continues its trace.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector};
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::traceparent::{ParseContextError, TRACEPARENT, Traceparent};
use crate::tracestate::{TRACESTATE, Tracestate};

/// The point of a trace at which a workflow instance continues: the ids of a span, its flags and its tracestate.
///
/// Neither id is ever zero. Clones are cheap; they share the tracestate.
///
/// It is read and written by the rules of [W3C Trace Context level 2][w3c]: ids have their full length in lower-case
/// digits, and neither is zero. The sampled and the random flag are kept, and all others cleared. It is written as
/// version 00, and read in that and any later version. A tracestate that breaks a rule (33 list members, an empty value,
/// more than 32 KiB in total, ...) is dropped as a whole, and the trace is kept. All others are passed on as they came,
/// blanks between members aside: a key that is there twice too, and one that OpenTelemetry's [`TraceState`] refuses
/// (with two `@`, more than 13 characters after one, or another sign right after one). Only
/// [`to_otel`](Self::to_otel) and the spans beneath do without such a member. [`current`](Self::current) has it again in
/// spans that have the context of `to_otel` as an ancestor, but not in one whose parent the storage has chosen.
///
/// # Examples
///
/// ```
/// use tracing_workflow_context::WorkflowContext;
///
/// let sent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
/// let cx = WorkflowContext::parse(sent, "rojo=00f067aa0ba902b7")?;
/// assert_eq!(cx.span_id().to_string(), "00f067aa0ba902b7");
/// assert!(cx.is_sampled());
/// assert_eq!(cx.traceparent(), sent);
/// # Ok::<(), tracing_workflow_context::ParseContextError>(())
/// ```
///
/// [w3c]: https://www.w3.org/TR/trace-context-2/
#[derive(Clone)]
pub struct WorkflowContext {
    // Bytes, since a `TraceId` is aligned to 16 and would add padding.
    trace_id: [u8; 16],
    span_id: [u8; 8],
    /// Nanoseconds since the Unix epoch, which last until the year 2554.
    recorded_at: u64,
    trace_state: Option<Arc<Tracestate>>,
    flags: u8,
    resumed: bool,
    /// It came from outside this process.
    remote: bool,
}

/// A value of OpenTelemetry contexts: the tracestate of a remote span, if OpenTelemetry's type refuses a part of it.
struct WholeState {
    trace_id: [u8; 16],
    state: Arc<Tracestate>,
}

// One is moved and cloned for each tagged span.
const _: () = assert!(size_of::<WorkflowContext>() <= 48);

/// The part of a context that the cache keeps for every instance; it keeps the flags and the tracestate elsewhere.
#[derive(Clone, Copy)]
pub(crate) struct Packed {
    trace_id: [u8; 16],
    span_id: [u8; 8],
    recorded_at: u64,
}

impl Packed {
    pub(crate) fn recorded_at(&self) -> SystemTime {
        from_epoch(self.recorded_at)
    }
}

/// Marks in the byte of the traceparent's flags.
const RESUMED: u8 = 0x10;
const REMOTE: u8 = 0x20;

impl WorkflowContext {
    /// Returns the context of the current `tracing` span, or else of the current OpenTelemetry context.
    ///
    /// A span that the sampler dropped is returned too, as unsampled. If the OpenTelemetry layer does not see the
    /// `tracing` span, because a filter hides it or there is no such layer, the OpenTelemetry context is used. `None` if
    /// neither has a valid span.
    ///
    /// This starts a span that has not started yet. It cannot be given another parent afterwards.
    ///
    /// # Examples
    ///
    /// ```
    /// use tracing_workflow_context::WorkflowContext;
    ///
    /// assert_eq!(WorkflowContext::current(), None);
    ///
    /// let received = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    /// let cx = WorkflowContext::parse(received, "")?;
    /// let _attached = cx.to_otel().attach();
    /// assert_eq!(WorkflowContext::current().unwrap().trace_id(), cx.trace_id());
    /// # Ok::<(), tracing_workflow_context::ParseContextError>(())
    /// ```
    pub fn current() -> Option<Self> {
        let read = Self::from_context;
        read(&tracing::Span::current().context()).or_else(|| Context::map_current(read))
    }

    /// Reads the values of a `traceparent` and a `tracestate` header; an empty `tracestate` means that there was none.
    ///
    /// Spaces and tabs around the `traceparent` are ignored. In a version later than 00, everything after the flags is
    /// ignored. An invalid `tracestate` is dropped. [`recorded_at`](Self::recorded_at) is the time of the call.
    ///
    /// # Errors
    ///
    /// If `traceparent` breaks a rule of the specification; the variants of [`ParseContextError`] name the rules.
    ///
    /// # Examples
    ///
    /// ```
    /// use tracing_workflow_context::{ParseContextError, WorkflowContext};
    ///
    /// // Python's SDK sends the random flag along.
    /// let from_python = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03";
    /// assert_eq!(WorkflowContext::parse(from_python, "")?.traceparent(), from_python);
    ///
    /// let no_trace = "00-00000000000000000000000000000000-00f067aa0ba902b7-01";
    /// assert_eq!(WorkflowContext::parse(no_trace, ""), Err(ParseContextError::ZeroTraceId));
    /// # Ok::<(), ParseContextError>(())
    /// ```
    pub fn parse(traceparent: &str, tracestate: &str) -> Result<Self, ParseContextError> {
        Self::from_headers(traceparent, &[tracestate])
    }

    /// Reads the `traceparent` and `tracestate` headers of a carrier, as [`parse`](Self::parse) does.
    ///
    /// Several `tracestate` headers are read as one list, in their order.
    ///
    /// # Errors
    ///
    /// If the carrier has no `traceparent` or more than one, or one that [`parse`](Self::parse) refuses.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::collections::HashMap;
    /// use tracing_workflow_context::{ParseContextError, WorkflowContext};
    ///
    /// let mut headers = HashMap::new();
    /// assert_eq!(WorkflowContext::extract(&headers), Err(ParseContextError::Missing));
    ///
    /// let sent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    /// headers.insert("traceparent".to_owned(), sent.to_owned());
    /// assert_eq!(WorkflowContext::extract(&headers)?.traceparent(), sent);
    /// # Ok::<(), ParseContextError>(())
    /// ```
    pub fn extract(carrier: &dyn Extractor) -> Result<Self, ParseContextError> {
        let traceparents = carrier.get_all(TRACEPARENT).unwrap_or_default();
        match traceparents[..] {
            [] => Err(ParseContextError::Missing),
            [traceparent] => Self::from_headers(
                traceparent,
                &carrier.get_all(TRACESTATE).unwrap_or_default(),
            ),
            _ => Err(ParseContextError::Duplicate),
        }
    }

    /// Writes the `traceparent` header to a carrier, and the `tracestate` header unless it is empty.
    ///
    /// A carrier cannot remove a header: one that already has a `tracestate` of another trace keeps it.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::collections::HashMap;
    /// use tracing_workflow_context::WorkflowContext;
    ///
    /// let sent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    /// let mut headers = HashMap::new();
    /// WorkflowContext::parse(sent, "")?.inject(&mut headers);
    /// assert_eq!(headers, HashMap::from([("traceparent".to_owned(), sent.to_owned())]));
    /// # Ok::<(), tracing_workflow_context::ParseContextError>(())
    /// ```
    pub fn inject(&self, carrier: &mut dyn Injector) {
        carrier.set(TRACEPARENT, self.traceparent());
        if let Some(state) = &self.trace_state {
            carrier.set(TRACESTATE, state.header());
        }
    }

    /// Returns the value of a `traceparent` header: 55 characters, of version 00.
    pub fn traceparent(&self) -> String {
        let value = Traceparent {
            trace_id: self.trace_id(),
            span_id: self.span_id(),
            flags: self.flags(),
        };
        String::from_utf8(value.write().to_vec()).unwrap_or_default()
    }

    /// Returns the value of a `tracestate` header; empty if there is nothing to send.
    pub fn tracestate(&self) -> String {
        self.trace_state
            .as_ref()
            .map(|state| state.header())
            .unwrap_or_default()
    }

    /// Returns the trace id, which is never zero.
    pub fn trace_id(&self) -> TraceId {
        TraceId::from_bytes(self.trace_id)
    }

    /// Returns the id of the span at which the instance continues, which is never zero.
    pub fn span_id(&self) -> SpanId {
        SpanId::from_bytes(self.span_id)
    }

    /// Returns `true` if the sampled flag is set.
    pub fn is_sampled(&self) -> bool {
        self.flags().is_sampled()
    }

    /// Returns `true` if this is the context of a resumed instance, as `create_resumed` of a storage stores it.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Returns the time when the context was recorded for its instance; before that, the time when it was read or taken
    /// from a span.
    ///
    /// It is kept in nanoseconds between 1970 and 2554; times outside are clamped.
    pub fn recorded_at(&self) -> SystemTime {
        from_epoch(self.recorded_at)
    }

    /// Returns an OpenTelemetry context that contains only this, as its remote span, to attach or to use as a parent.
    ///
    /// # Examples
    ///
    /// ```
    /// use opentelemetry::trace::TraceContextExt;
    /// use tracing_workflow_context::WorkflowContext;
    ///
    /// let sent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    /// let parent = WorkflowContext::parse(sent, "")?.to_otel();
    /// assert!(parent.span().span_context().is_remote());
    /// # Ok::<(), tracing_workflow_context::ParseContextError>(())
    /// ```
    pub fn to_otel(&self) -> Context {
        let cx = Context::new().with_remote_span_context(self.to_span_context());
        match &self.trace_state {
            Some(state) if state.exceeds_otel() => cx.with_value(WholeState {
                trace_id: self.trace_id,
                state: state.clone(),
            }),
            _ => cx,
        }
    }

    /// Returns the context of the span of an OpenTelemetry context.
    pub(crate) fn from_context(cx: &Context) -> Option<Self> {
        let mut read = Self::try_from(cx.span().span_context()).ok()?;
        read.take_whole_state_of(cx);
        Some(read)
    }

    /// Gives this back the members that OpenTelemetry's type refused, if it is beneath a context that had some.
    #[inline]
    pub(crate) fn take_whole_state_of(&mut self, cx: &Context) {
        if let Some(whole) = cx.get::<WholeState>() {
            self.take_whole_state(whole);
        }
    }

    #[cold]
    fn take_whole_state(&mut self, whole: &WholeState) {
        let state = self.trace_state.as_deref().map(Tracestate::otel);
        // A sampler may have changed it.
        let is_unchanged = state.unwrap_or(&TraceState::NONE) == whole.state.otel();
        if is_unchanged && self.trace_id == whole.trace_id {
            self.trace_state = Some(whole.state.clone());
        }
    }

    #[inline]
    pub(crate) fn has_trace_state(&self) -> bool {
        self.trace_state.is_some()
    }

    /// Returns about how many bytes the tracestate takes in memory.
    #[inline]
    pub(crate) fn trace_state_bytes(&self) -> usize {
        self.trace_state.as_deref().map_or(0, Tracestate::bytes)
    }

    /// Shortens the tracestate to that many bytes.
    #[inline]
    pub(crate) fn with_trace_state_up_to(mut self, most: usize) -> Self {
        if let Some(state) = &self.trace_state {
            if !state.fits(most) {
                self.trace_state = state.shortened(most).map(Arc::new);
            }
        }
        self
    }

    /// Returns this as a span context, marked remote.
    pub(crate) fn to_span_context(&self) -> SpanContext {
        let trace_state = self.trace_state.as_ref().map(|state| state.otel().clone());
        SpanContext::new(
            self.trace_id(),
            self.span_id(),
            self.flags(),
            true,
            trace_state.unwrap_or_default(),
        )
    }

    /// Takes the context of a span, recorded at that time; `None` if it is invalid.
    pub(crate) fn from_span(span: &SpanContext, recorded_at: SystemTime) -> Option<Self> {
        Self::try_from_span(span, recorded_at).ok()
    }

    /// Creates a context from its stored parts; `None` if an id is zero.
    ///
    /// Unknown flags are cleared.
    #[cfg(any(
        test,
        feature = "postgres",
        feature = "redb",
        feature = "redis",
        feature = "testing"
    ))]
    pub(crate) fn from_parts(
        trace_id: TraceId,
        span_id: SpanId,
        flags: TraceFlags,
        trace_state: Option<Tracestate>,
        recorded_at: SystemTime,
        resumed: bool,
    ) -> Option<Self> {
        let ids = Traceparent::new(trace_id, span_id, flags).ok()?;
        let cx = Self::new(ids, trace_state.map(Arc::new), recorded_at, true);
        Some(Self { resumed, ..cx })
    }

    /// Returns `true` if both are of one span. A backend may round the times.
    pub(crate) fn is_same_span(&self, other: &Self) -> bool {
        (self.trace_id(), self.span_id()) == (other.trace_id(), other.span_id())
    }

    /// Returns this, recorded at another time.
    pub(crate) fn with_recorded_at(self, recorded_at: SystemTime) -> Self {
        Self {
            recorded_at: since_epoch(recorded_at),
            ..self
        }
    }

    /// Returns this, marked as the context of a resumed instance.
    pub(crate) fn into_resumed(self) -> Self {
        Self {
            resumed: true,
            ..self
        }
    }

    /// Splits this into the part that every entry of the cache has, the flags in one byte, and the tracestate, which is
    /// rare.
    #[inline]
    pub(crate) fn pack(self) -> (Packed, u8, Option<Arc<Tracestate>>) {
        let packed = Packed {
            trace_id: self.trace_id,
            span_id: self.span_id,
            recorded_at: self.recorded_at,
        };
        let resumed = if self.resumed { RESUMED } else { 0 };
        let remote = if self.remote { REMOTE } else { 0 };
        (packed, self.flags | resumed | remote, self.trace_state)
    }

    /// Joins the parts that [`pack`](Self::pack) returned.
    #[inline]
    pub(crate) fn unpack(packed: Packed, flags: u8, trace_state: Option<Arc<Tracestate>>) -> Self {
        Self {
            trace_id: packed.trace_id,
            span_id: packed.span_id,
            recorded_at: packed.recorded_at,
            trace_state,
            flags: flags & !(RESUMED | REMOTE),
            resumed: flags & RESUMED != 0,
            remote: flags & REMOTE != 0,
        }
    }

    /// Returns `true` if this came from outside this process: as text, from a backend, or as a span context marked remote.
    pub(crate) fn is_remote(&self) -> bool {
        self.remote
    }

    /// Returns the sampled and the random flag.
    pub(crate) fn flags(&self) -> TraceFlags {
        TraceFlags::new(self.flags)
    }

    fn from_headers(traceparent: &str, tracestates: &[&str]) -> Result<Self, ParseContextError> {
        // In this order: a tracestate has no meaning without a traceparent ("Tracestate Header").
        let ids = Traceparent::parse(traceparent)?;
        let trace_state = Tracestate::parse(tracestates).map(Arc::new);
        Ok(Self::new(ids, trace_state, SystemTime::now(), true))
    }

    fn try_from_span(
        span: &SpanContext,
        recorded_at: SystemTime,
    ) -> Result<Self, ParseContextError> {
        let ids = Traceparent::new(span.trace_id(), span.span_id(), span.trace_flags())?;
        let trace_state = Tracestate::from_otel(span.trace_state()).map(Arc::new);
        Ok(Self::new(ids, trace_state, recorded_at, span.is_remote()))
    }

    fn new(
        ids: Traceparent,
        trace_state: Option<Arc<Tracestate>>,
        recorded_at: SystemTime,
        remote: bool,
    ) -> Self {
        Self {
            trace_id: ids.trace_id.to_bytes(),
            span_id: ids.span_id.to_bytes(),
            recorded_at: since_epoch(recorded_at),
            trace_state,
            flags: ids.flags.to_u8(),
            resumed: false,
            remote,
        }
    }
}

/// Takes the context of a span; [`recorded_at`](WorkflowContext::recorded_at) is the time of the call.
///
/// A tracestate that breaks a rule is dropped, as [`parse`](WorkflowContext::parse) does.
///
/// # Examples
///
/// ```
/// use opentelemetry::trace::SpanContext;
/// use tracing_workflow_context::{ParseContextError, WorkflowContext};
///
/// let invalid = WorkflowContext::try_from(&SpanContext::NONE);
/// assert_eq!(invalid, Err(ParseContextError::ZeroTraceId));
/// ```
impl TryFrom<&SpanContext> for WorkflowContext {
    type Error = ParseContextError;

    /// # Errors
    ///
    /// [`ZeroTraceId`](ParseContextError::ZeroTraceId) or [`ZeroSpanId`](ParseContextError::ZeroSpanId) if the span
    /// context is invalid.
    fn try_from(span: &SpanContext) -> Result<Self, ParseContextError> {
        Self::try_from_span(span, SystemTime::now())
    }
}

/// Compares everything that the methods return. Two readings of one header differ in
/// [`recorded_at`](WorkflowContext::recorded_at).
impl PartialEq for WorkflowContext {
    fn eq(&self, other: &Self) -> bool {
        // All but `remote`: a context that was written to a backend and read again is still equal.
        let parts = |cx: &Self| {
            (
                cx.trace_id,
                cx.span_id,
                cx.flags,
                cx.recorded_at,
                cx.resumed,
            )
        };
        parts(self) == parts(other) && self.trace_state == other.trace_state
    }
}

impl Eq for WorkflowContext {}

impl Hash for WorkflowContext {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // These distinguish most contexts; the rest need not be hashed.
        (self.trace_id, self.span_id, self.recorded_at).hash(state);
    }
}

/// Prints the ids in hex, as a `traceparent`.
impl fmt::Debug for WorkflowContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkflowContext")
            .field("traceparent", &self.traceparent())
            .field("tracestate", &self.tracestate())
            .field("recorded_at", &self.recorded_at())
            .field("resumed", &self.resumed)
            .finish()
    }
}

/// Returns the nanoseconds since 1970, clamped to 64 bits.
pub(crate) fn since_epoch(time: SystemTime) -> u64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(age) => u64::try_from(age.as_nanos()).unwrap_or(u64::MAX),
        Err(_) => 0,
    }
}

fn from_epoch(nanos: u64) -> SystemTime {
    // Does not overflow: every platform's clock reaches 584 years beyond 1970.
    SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(trace_id: u128, span_id: u64, recorded_at: SystemTime) -> Option<WorkflowContext> {
        WorkflowContext::from_parts(
            trace_id.into(),
            span_id.into(),
            TraceFlags::new(0xff),
            Tracestate::parse(&["a=1"]),
            recorded_at,
            true,
        )
    }

    #[test]
    fn a_context_made_of_its_parts_is_equal() {
        let cx = WorkflowContext::parse(
            "00-0000000000000000000000000000000a-000000000000000b-03",
            "a=1",
        )
        .expect("a valid traceparent")
        .into_resumed();
        assert_eq!(kept(10, 11, cx.recorded_at()), Some(cx.clone()));
        let later = cx.recorded_at() + Duration::from_nanos(1);
        assert_ne!(kept(10, 11, later), Some(cx.clone()));
        assert_eq!(kept(10, 11, later), Some(cx.with_recorded_at(later)));
    }

    #[test]
    fn a_zero_id_makes_no_context() {
        assert_eq!(kept(0, 11, SystemTime::now()), None);
        assert_eq!(kept(10, 0, SystemTime::now()), None);
    }

    #[test]
    fn times_out_of_range_are_clamped() {
        let recorded = |at| kept(10, 11, at).expect("valid ids").recorded_at();
        let [first, last] =
            [0, u64::MAX].map(|ns| SystemTime::UNIX_EPOCH + Duration::from_nanos(ns));
        assert_eq!(recorded(first - Duration::from_secs(1)), first);
        assert_eq!(recorded(last), last);
        assert_eq!(recorded(last + Duration::from_secs(1)), last);
    }

    #[test]
    fn a_span_context_tells_whether_it_is_remote() {
        let cx = kept(10, 11, SystemTime::now()).expect("valid ids");
        let remote = cx.to_span_context();
        let local = SpanContext::new(
            cx.trace_id(),
            cx.span_id(),
            cx.flags(),
            false,
            TraceState::NONE,
        );
        for span in [remote, local] {
            let cx = WorkflowContext::from_span(&span, SystemTime::now()).expect("valid ids");
            assert_eq!(cx.is_remote(), span.is_remote());
        }
    }
}
