//! The user's code: one workflow, two activities. All it does for its trace is the field
//! `workflow.instance_id`.

use std::{sync::Arc, time::Duration};
use temporalio_macros::{activities, workflow, workflow_methods};
use temporalio_sdk::{
    ActivityOptions, WorkflowContext, WorkflowResult,
    activities::{ActivityContext, ActivityError},
};
use tokio::sync::Notify;
use tracing::{Instrument, info_span, instrument};

#[workflow]
#[derive(Default)]
pub struct Order;

#[workflow_methods]
impl Order {
    #[run]
    pub async fn run(ctx: &mut WorkflowContext<Self>) -> WorkflowResult<String> {
        let order = info_span!("order", workflow.instance_id = ctx.workflow_id());
        async {
            let options = || ActivityOptions::start_to_close_timeout(Duration::from_secs(10));
            let stock = ctx
                .execute_activity(OrderActivities::reserve, (), options())
                .instrument(info_span!("await reserve"))
                .await?;
            ctx.timer(Duration::from_millis(50)).await;
            let payment = ctx
                .execute_activity(OrderActivities::charge, (), options())
                .instrument(info_span!("await charge"))
                .await?;
            Ok(format!("{stock}, {payment}"))
        }
        .instrument(order)
        .await
    }
}

pub struct OrderActivities {
    /// Signalled when the charge hangs: the moment to kill this worker.
    pub hanging: Arc<Notify>,
}

#[activities]
impl OrderActivities {
    #[activity(name = "reserve")]
    pub async fn reserve(ctx: ActivityContext) -> Result<String, ActivityError> {
        Ok(reserve_stock(ctx.info().attempt).await?)
    }

    #[activity(name = "charge")]
    pub async fn charge(self: Arc<Self>, ctx: ActivityContext) -> Result<String, ActivityError> {
        Ok(charge_card(ctx.info().attempt, &self.hanging).await?)
    }
}

/// Fails once, so that Temporal has to try again.
#[instrument]
async fn reserve_stock(attempt: u32) -> anyhow::Result<String> {
    anyhow::ensure!(attempt > 1, "the warehouse did not answer");
    Ok("reserved".to_owned())
}

/// Hangs at first, so that the worker can be killed in the middle of it.
#[instrument(skip(hanging))]
async fn charge_card(attempt: u32, hanging: &Notify) -> anyhow::Result<String> {
    if attempt == 1 {
        hanging.notify_one();
        std::future::pending::<()>().await;
    }
    Ok("charged".to_owned())
}
