//! Tags what a Temporal worker runs, for `tracing-workflow-context`: a file to copy. Nothing else is to be done in workflows,
//! activities and handlers.
//!
//! ```ignore
//! let mut options = WorkerOptions::new("orders") /* workflows, activities */ .build();
//! tagging::install(&mut options);
//! ```
//!
//! Each call into your code gets a span with the workflow's id, its run and its parent, so handlers of signals, updates and
//! queries are in the workflow's trace, a child workflow in its parent's, and a new run in a trace of its own. A replay is told
//! by `workflow.replaying`, and nothing of it is exported; where it ends within a span, `false` is recorded there.
//!
//! Works with the layer of this crate and `Engine::Temporal`, which knows the SDK's own spans.

use std::pin::Pin;
use std::task::{Context, Poll};

use temporalio_sdk::WorkerOptions;
use temporalio_sdk::interceptors::{
    ActivityInboundInterceptor, ExecuteActivityInput, ExecuteActivityOutput, Next,
};
use temporalio_sdk::workflow_interceptors::{
    ExecuteWorkflowInput, ExecuteWorkflowResult, HandleQueryInput, HandleQueryResult,
    HandleSignalInput, HandleSignalResult, HandleUpdateInput, HandleUpdateResult,
    SyncWorkflowInterceptorContext, ValidateUpdateInput, ValidateUpdateResult, WorkflowInterceptor,
    WorkflowInterceptorConstructor, WorkflowInterceptorContext, WorkflowInterceptorFuture,
    WorkflowNext,
};
use tracing::instrument::Instrumented;
use tracing::{Instrument as _, Span, info_span};

/// Tags all that a worker with these options runs.
pub fn install(options: &mut WorkerOptions) {
    options
        .activity_inbound_interceptor(TagActivities)
        .workflow_interceptor(WorkflowInterceptorConstructor::new(|workflow| {
            TagWorkflow {
                parent: workflow.parent().map(|parent| parent.workflow_id().into()),
            }
        }));
}

struct TagActivities;

impl ActivityInboundInterceptor for TagActivities {
    fn execute_activity<'a>(
        &'a self,
        input: ExecuteActivityInput,
        next: Next<'a, ExecuteActivityInput, ExecuteActivityOutput<'a>>,
    ) -> ExecuteActivityOutput<'a> {
        let activity = input.activity_info();
        let span = info_span!(
            "ExecuteActivity",
            otel.name = format!("ExecuteActivity:{}", activity.activity_type),
            workflow.instance_id = activity.workflow_id,
            workflow.run_id = activity.workflow_run_id,
            attempt = activity.attempt,
        );
        Box::pin(async move { next.run(input).await }.instrument(span))
    }
}

struct TagWorkflow {
    parent: Option<String>,
}

/// Opens the span of one call, by what the context tells at that moment.
macro_rules! call_span {
    ($call:literal, $name:expr, $workflow:expr, $parent:expr, $replaying:expr) => {
        info_span!(
            $call,
            otel.name = format!(concat!($call, ":{}"), $name),
            workflow.instance_id = $workflow.workflow_id(),
            workflow.run_id = $workflow.run_id(),
            workflow.parent_instance_id = $parent,
            workflow.replaying = $replaying,
        )
    };
}

impl WorkflowInterceptor for TagWorkflow {
    fn execute<'a>(
        &'a self,
        workflow: WorkflowInterceptorContext,
        input: ExecuteWorkflowInput,
        next: WorkflowNext<
            'a,
            ExecuteWorkflowInput,
            WorkflowInterceptorFuture<'a, ExecuteWorkflowResult>,
        >,
    ) -> WorkflowInterceptorFuture<'a, ExecuteWorkflowResult> {
        let of = workflow.clone();
        let open = move |replaying: bool| {
            let name = of.workflow_type();
            call_span!("ExecuteWorkflow", name, of, &self.parent, replaying)
        };
        // The SDK polls this once outside of its span `RunWorkflow`, which does not reach the workflow's code yet.
        spanned(workflow, open, 1, async move { next.run(input).await })
    }

    fn handle_signal<'a>(
        &'a self,
        workflow: WorkflowInterceptorContext,
        input: HandleSignalInput,
        next: WorkflowNext<
            'a,
            HandleSignalInput,
            WorkflowInterceptorFuture<'a, HandleSignalResult>,
        >,
    ) -> WorkflowInterceptorFuture<'a, HandleSignalResult> {
        let (of, name) = (workflow.clone(), input.name().to_owned());
        let open =
            move |replaying: bool| call_span!("HandleSignal", name, of, &self.parent, replaying);
        spanned(workflow, open, 0, async move { next.run(input).await })
    }

    fn handle_update<'a>(
        &'a self,
        workflow: WorkflowInterceptorContext,
        input: HandleUpdateInput,
        next: WorkflowNext<
            'a,
            HandleUpdateInput,
            WorkflowInterceptorFuture<'a, HandleUpdateResult>,
        >,
    ) -> WorkflowInterceptorFuture<'a, HandleUpdateResult> {
        let (of, name) = (workflow.clone(), input.name().to_owned());
        let open =
            move |replaying: bool| call_span!("HandleUpdate", name, of, &self.parent, replaying);
        spanned(workflow, open, 0, async move { next.run(input).await })
    }

    fn handle_query(
        &self,
        workflow: SyncWorkflowInterceptorContext,
        input: HandleQueryInput,
        next: WorkflowNext<'_, HandleQueryInput, HandleQueryResult>,
    ) -> HandleQueryResult {
        let replaying = workflow.is_replaying_history_events();
        let span = call_span!(
            "HandleQuery",
            input.name(),
            workflow,
            &self.parent,
            replaying
        );
        span.in_scope(|| next.run(input))
    }

    fn validate_update(
        &self,
        workflow: SyncWorkflowInterceptorContext,
        input: ValidateUpdateInput,
        next: WorkflowNext<'_, ValidateUpdateInput, ValidateUpdateResult>,
    ) -> ValidateUpdateResult {
        let replaying = workflow.is_replaying_history_events();
        let span = call_span!(
            "ValidateUpdate",
            input.name(),
            workflow,
            &self.parent,
            replaying
        );
        span.in_scope(|| next.run(input))
    }
}

fn spanned<'a, T: 'a>(
    workflow: WorkflowInterceptorContext,
    open: impl FnOnce(bool) -> Span + 'a,
    polls_before: u32,
    call: impl Future<Output = T> + 'a,
) -> WorkflowInterceptorFuture<'a, T> {
    let call: LocalBoxFuture<'a, T> = Box::pin(call);
    WorkflowInterceptorFuture::new(Spanned {
        call: call.instrument(Span::none()),
        open: Some(Box::new(open)),
        replaying: false,
        polls_before,
        workflow,
    })
}

type LocalBoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A call into the workflow's code, in a span.
struct Spanned<'a, T> {
    call: Instrumented<LocalBoxFuture<'a, T>>,
    open: Option<Box<dyn FnOnce(bool) -> Span + 'a>>,
    /// Said of the latest poll.
    replaying: bool,
    /// How many polls go by before the span opens.
    polls_before: u32,
    workflow: WorkflowInterceptorContext,
}

impl<T> Future for Spanned<'_, T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        if this.polls_before > 0 {
            this.polls_before -= 1;
        } else {
            let replaying = this.workflow.is_replaying_history_events();
            if let Some(open) = this.open.take() {
                *this.call.span_mut() = open(replaying);
            } else if this.replaying && !replaying {
                // From here on the workflow does what it has not done before.
                this.call.span().record("workflow.replaying", false);
            }
            this.replaying = replaying;
        }
        Pin::new(&mut this.call).poll(cx)
    }
}
