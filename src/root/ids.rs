//! The two pieces in the user's provider: an id generator and a sampler that do nothing of their own until this crate asks
//! them to, on the thread on which it starts a span.
//!
//! OpenTelemetry offers no other way to choose the ids of a span, nor to ask a sampler without starting one.

use std::cell::{Cell, RefCell};

use opentelemetry::trace::TraceState;
use opentelemetry::{SpanId, TraceId};

/// The request to the two pieces while one span is built.
#[cfg_attr(
    not(feature = "durable-root"),
    expect(dead_code, reason = "the pieces read it")
)]
#[derive(Debug, Default)]
pub(crate) struct Request {
    pub(crate) purpose: Purpose,
    /// The ids that the span gets; random ones where there is none.
    pub(crate) trace_id: Option<TraceId>,
    pub(crate) span_id: Option<SpanId>,
}

#[cfg_attr(
    not(feature = "durable-root"),
    expect(dead_code, reason = "the pieces read it")
)]
#[derive(Debug, Default)]
pub(crate) enum Purpose {
    /// The sampler decides, and the span is dropped.
    #[default]
    Probe,
    /// The span is exported, with this tracestate.
    Export(TraceState),
}

/// The answer of the two pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Answer {
    /// The id generator was asked.
    pub(crate) has_generator: bool,
    /// The decision of the sampler; `None` if it was not asked.
    pub(crate) is_sampled: Option<bool>,
}

thread_local! {
    /// Set as long as there is a request: the one thing that an ordinary span reads.
    static IS_ASKED: Cell<bool> = const { Cell::new(false) };
    static REQUEST: RefCell<Option<Request>> = const { RefCell::new(None) };
    static ANSWER: Cell<Answer> = const { Cell::new(Answer { has_generator: false, is_sampled: None }) };
}

/// Returns `true` while a span of this crate's own is being built on this thread.
pub(crate) fn is_asked() -> bool {
    IS_ASKED.try_with(Cell::get).unwrap_or_default()
}

/// Builds one span with a request to the two pieces. Whatever happens, a panic included, no later span sees it.
pub(crate) fn asking<R>(request: Request, build: impl FnOnce() -> R) -> (R, Answer) {
    struct Restore(bool, Option<Request>, Answer);

    impl Drop for Restore {
        fn drop(&mut self) {
            let _ = IS_ASKED.try_with(|asked| asked.set(self.0));
            let _ = REQUEST.try_with(|request| request.replace(self.1.take()));
            let _ = ANSWER.try_with(|answer| answer.set(self.2));
        }
    }

    let before = Restore(
        IS_ASKED
            .try_with(|asked| asked.replace(true))
            .unwrap_or_default(),
        (REQUEST.try_with(|it| it.replace(Some(request)))).unwrap_or_default(),
        (ANSWER.try_with(Cell::take)).unwrap_or_default(),
    );
    let built = build();
    let answer = ANSWER.try_with(Cell::get).unwrap_or_default();
    drop(before);
    (built, answer)
}

#[cfg(feature = "durable-root")]
pub use self::pieces::{WorkflowIdGenerator, WorkflowSampler};

#[cfg(feature = "durable-root")]
mod pieces {
    use opentelemetry::trace::{Link, SpanKind};
    use opentelemetry::{Context, KeyValue, SpanId, TraceId};
    use opentelemetry_sdk::trace::{
        IdGenerator, RandomIdGenerator, SamplingDecision, SamplingResult, ShouldSample,
    };

    use super::{ANSWER, Answer, IS_ASKED, Purpose, REQUEST, Request, is_asked};

    /// An id generator that hands everything to another one, except the ids of a workflow's own span.
    ///
    /// Made by [`WorkflowContextStorage::id_generator`](crate::WorkflowContextStorage::id_generator), for
    /// `SdkTracerProvider::builder().with_id_generator(..)`. An ordinary span pays for the reading of one thread-local.
    #[derive(Clone, Debug)]
    pub struct WorkflowIdGenerator<G = RandomIdGenerator> {
        inner: G,
    }

    impl<G> WorkflowIdGenerator<G> {
        pub(crate) fn new(inner: G) -> Self {
            Self { inner }
        }
    }

    /// Returns the part of the request, once.
    #[cold]
    fn requested<R>(take: impl FnOnce(&mut Request) -> Option<R>) -> Option<R> {
        let taken = REQUEST.try_with(|it| it.borrow_mut().as_mut().and_then(take));
        let _ = ANSWER.try_with(|it| {
            it.set(Answer {
                has_generator: true,
                ..it.get()
            });
        });
        taken.ok().flatten()
    }

    impl<G: IdGenerator> IdGenerator for WorkflowIdGenerator<G> {
        fn new_trace_id(&self) -> TraceId {
            let requested = || requested(|request| request.trace_id.take());
            let id = if is_asked() { requested() } else { None };
            id.unwrap_or_else(|| self.inner.new_trace_id())
        }

        fn new_span_id(&self) -> SpanId {
            let requested = || requested(|request| request.span_id.take());
            let id = if is_asked() { requested() } else { None };
            id.unwrap_or_else(|| self.inner.new_span_id())
        }
    }

    /// A sampler that hands everything to another one, and keeps what that decided for a workflow's own span.
    ///
    /// Made by [`WorkflowContextStorage::sampler`](crate::WorkflowContextStorage::sampler), for
    /// `SdkTracerProvider::builder().with_sampler(..)`. The inner sampler is asked once for each workflow's own span, when
    /// the workflow is first seen; the attributes that it adds are not kept.
    #[derive(Clone, Debug)]
    pub struct WorkflowSampler {
        inner: Box<dyn ShouldSample>,
    }

    impl WorkflowSampler {
        pub(crate) fn new(inner: impl ShouldSample + 'static) -> Self {
            Self {
                inner: Box::new(inner),
            }
        }
    }

    impl ShouldSample for WorkflowSampler {
        fn should_sample(
            &self,
            parent_context: Option<&Context>,
            trace_id: TraceId,
            name: &str,
            span_kind: &SpanKind,
            attributes: &[KeyValue],
            links: &[Link],
        ) -> SamplingResult {
            if is_asked() {
                let inner = || {
                    self.inner.should_sample(
                        parent_context,
                        trace_id,
                        name,
                        span_kind,
                        attributes,
                        links,
                    )
                };
                return answer(&inner);
            }
            self.inner
                .should_sample(parent_context, trace_id, name, span_kind, attributes, links)
        }
    }

    /// Decides for a span of this crate's own. Out of the way of ordinary spans, which would pay for its stack frame.
    #[cold]
    fn answer(inner: &dyn Fn() -> SamplingResult) -> SamplingResult {
        // Taken before the inner sampler runs, which may open spans of its own.
        let _ = IS_ASKED.try_with(|asked| asked.set(false));
        let request = REQUEST.try_with(|it| it.borrow_mut().take());
        let answer = ANSWER.try_with(std::cell::Cell::get).unwrap_or_default();
        let (is_sampled, result) = match request.ok().flatten().map(|it| it.purpose) {
            None => return inner(),
            Some(Purpose::Export(trace_state)) => {
                let result = SamplingResult {
                    decision: SamplingDecision::RecordAndSample,
                    attributes: Vec::new(),
                    trace_state,
                };
                (true, result)
            }
            Some(Purpose::Probe) => {
                let decided = inner();
                let is_sampled = decided.decision == SamplingDecision::RecordAndSample;
                let result = SamplingResult {
                    decision: SamplingDecision::Drop,
                    attributes: Vec::new(),
                    ..decided
                };
                (is_sampled, result)
            }
        };
        let _ = ANSWER.try_with(|it| {
            it.set(Answer {
                is_sampled: Some(is_sampled),
                ..answer
            });
        });
        result
    }
}
