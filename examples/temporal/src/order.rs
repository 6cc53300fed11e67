//! The user's code: an order in two runs, its child workflow, its handlers and activities.
//!
//! Each workflow and handler opens one span, and what it does for its trace are the fields on that: none, the id alone, or all
//! of them.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use temporalio_common::RetryPolicy;
use temporalio_macros::{activities, workflow, workflow_methods};
use temporalio_sdk::activities::{ActivityContext, ActivityError};
use temporalio_sdk::{
    ActivityOptions, ChildWorkflowOptions, ContinueAsNewOptions, SyncWorkflowContext,
    WorkflowContext, WorkflowContextView, WorkflowResult,
};
use tokio::sync::Notify;
use tracing::{Instrument, info_span, instrument};

pub const ORDER: &str = "order-42";

/// The fields on the spans of workflows and handlers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fields {
    None,
    Id,
    All,
}

/// The same for a whole worker, as workflows get nothing but their input.
pub static FIELDS: OnceLock<Fields> = OnceLock::new();

/// Opens a span of a workflow or handler.
macro_rules! span {
    ($name:literal, $workflow:expr $(, $field:ident = $value:expr)?) => {{
        let workflow: WorkflowContextView = $workflow;
        match FIELDS.get() {
            Some(Fields::All) => info_span!(
                $name,
                workflow.instance_id = workflow.workflow_id(),
                workflow.run_id = workflow.run_id(),
                workflow.parent_instance_id = workflow.parent().map(|it| it.workflow_id().to_owned()),
                $($field = $value)?
            ),
            Some(Fields::Id) => info_span!(
                $name,
                workflow.instance_id = workflow.workflow_id(),
                $($field = $value)?
            ),
            Some(Fields::None) | None => info_span!($name $(, $field = $value)?),
        }
    }};
}

#[workflow]
#[derive(Default)]
pub struct Order {
    address: Option<String>,
    is_approved: bool,
}

#[workflow_methods]
impl Order {
    #[run]
    pub async fn run(ctx: &mut WorkflowContext<Self>, part: u32) -> WorkflowResult<String> {
        let span = span!("order", ctx.info(), part = part);
        match part {
            1 => first_part(ctx).instrument(span).await,
            _ => second_part(ctx).instrument(span).await,
        }
    }

    #[signal]
    pub fn approve(&mut self, ctx: &mut SyncWorkflowContext<Self>) {
        let _span = span!("approve", ctx.info()).entered();
        self.is_approved = true;
    }

    /// A handler that goes on after others have had their turn.
    #[update]
    pub async fn send_to(ctx: &mut WorkflowContext<Self>, address: String) -> bool {
        let span = span!("send_to", ctx.info());
        async {
            let looked_up = ctx
                .execute_activity(OrderActivities::look_up_address, (), patient())
                .instrument(info_span!("await look_up_address"))
                .await;
            ctx.state_mut(|order| order.address = Some(address));
            looked_up.is_ok()
        }
        .instrument(span)
        .await
    }

    #[query]
    pub fn is_approved(&self, ctx: &WorkflowContextView) -> bool {
        span!("is_approved", ctx.clone()).in_scope(|| self.is_approved)
    }
}

async fn first_part(ctx: &mut WorkflowContext<Order>) -> WorkflowResult<String> {
    ctx.execute_activity(OrderActivities::reserve, (), patient())
        .instrument(info_span!("await reserve"))
        .await?;
    ctx.timer(Duration::from_millis(50))
        .instrument(info_span!("await timer"))
        .await;
    let child = ChildWorkflowOptions::builder()
        .workflow_id(format!("{}-pack", ctx.workflow_id()))
        .task_queue(ctx.task_queue().to_owned()) // the test server does not take its parent's
        .build();
    async {
        let started = ctx.start_child_workflow(Pack::run, (), child).await?;
        WorkflowResult::Ok(started.result().await?)
    }
    .instrument(info_span!("await pack"))
    .await?;
    ctx.wait_condition(|order| order.is_approved && order.address.is_some())
        .instrument(info_span!("await approval"))
        .await?;
    let short = ActivityOptions::with_start_to_close_timeout(Duration::from_secs(3))
        .retry_policy(quick())
        .build();
    ctx.execute_activity(OrderActivities::charge, (), short)
        .instrument(info_span!("await charge"))
        .await?;
    ctx.continue_as_new(2, ContinueAsNewOptions::default())?;
    unreachable!("the run has ended")
}

async fn second_part(ctx: &mut WorkflowContext<Order>) -> WorkflowResult<String> {
    ctx.timer(Duration::from_millis(50))
        .instrument(info_span!("await truck"))
        .await;
    ctx.execute_activity(OrderActivities::ship, (), patient())
        .instrument(info_span!("await ship"))
        .await?;
    ctx.execute_activity(OrderActivities::send_bill, (), patient())
        .instrument(info_span!("await send_bill"))
        .await?;
    Ok("shipped".to_owned())
}

#[workflow]
#[derive(Default)]
pub struct Pack;

#[workflow_methods]
impl Pack {
    #[run]
    pub async fn run(ctx: &mut WorkflowContext<Self>) -> WorkflowResult<()> {
        let span = span!("pack", ctx.info());
        async {
            ctx.execute_activity(OrderActivities::wrap, (), patient())
                .instrument(info_span!("await wrap"))
                .await?;
            Ok(())
        }
        .instrument(span)
        .await
    }
}

fn patient() -> ActivityOptions {
    ActivityOptions::with_start_to_close_timeout(Duration::from_secs(30))
        .retry_policy(quick())
        .build()
}

fn quick() -> RetryPolicy {
    let interval = Duration::from_millis(50);
    RetryPolicy::builder().initial_interval(interval).build()
}

pub struct OrderActivities {
    /// Signalled when the charge hangs: the moment to kill this worker.
    pub hanging: Arc<Notify>,
}

#[activities]
impl OrderActivities {
    /// Fails once, so that Temporal has to try again.
    #[activity(name = "reserve")]
    pub async fn reserve(ctx: ActivityContext) -> Result<(), ActivityError> {
        Ok(call_warehouse(ctx.info().attempt).await?)
    }

    /// Hangs at first, so that the worker can be killed in the middle of it.
    #[activity(name = "charge")]
    pub async fn charge(self: Arc<Self>, ctx: ActivityContext) -> Result<(), ActivityError> {
        call_bank(ctx.info().attempt, &self.hanging).await;
        Ok(())
    }

    #[activity(name = "look_up_address")]
    pub async fn look_up_address(_ctx: ActivityContext) -> Result<(), ActivityError> {
        call("call_map").await;
        Ok(())
    }

    #[activity(name = "wrap")]
    pub async fn wrap(_ctx: ActivityContext) -> Result<(), ActivityError> {
        call("call_packer").await;
        Ok(())
    }

    #[activity(name = "ship")]
    pub async fn ship(_ctx: ActivityContext) -> Result<(), ActivityError> {
        call("call_carrier").await;
        Ok(())
    }

    #[activity(name = "send_bill")]
    pub async fn send_bill(_ctx: ActivityContext) -> Result<(), ActivityError> {
        call("call_mailer").await;
        Ok(())
    }
}

#[instrument]
async fn call_warehouse(attempt: u32) -> anyhow::Result<()> {
    anyhow::ensure!(attempt > 1, "the warehouse did not answer");
    Ok(())
}

#[instrument(skip(hanging))]
async fn call_bank(attempt: u32, hanging: &Notify) {
    if attempt == 1 {
        hanging.notify_one();
        std::future::pending::<()>().await;
    }
}

#[instrument(skip_all, fields(otel.name = service))]
async fn call(service: &'static str) {}
