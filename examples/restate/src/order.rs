//! The workflow, as its author would write it. Nothing here knows of this crate: the spans only say whose they are, and those
//! inside of `ctx.run`, which the SDK never runs again, that they are no replay.

use std::time::Duration;

use restate_sdk::prelude::*;
use tracing::{info, instrument};

/// Longer than the server's inactivity timeout: the sleeping workflow is suspended, and replayed when it wakes.
const PAUSE: Duration = Duration::from_millis(2500);

pub(crate) struct Order;

#[workflow]
impl Order {
    #[handler]
    #[instrument(name = "order", skip_all, fields(workflow.instance_id = %ctx.key()))]
    async fn run(&self, ctx: WorkflowContext<'_>, item: String) -> HandlerResult<String> {
        let order = ctx.key();
        ctx.run(|| reserve_stock(order, &item))
            .name("reserve_stock")
            .await?;
        ctx.sleep(PAUSE).await?;
        ctx.run(|| charge_card(order)).name("charge_card").await?;
        ctx.sleep(PAUSE).await?;
        ctx.run(|| ship(order)).name("ship").await?;
        Ok(format!("{item} shipped"))
    }
}

#[instrument(skip_all, fields(workflow.instance_id = %order, workflow.replaying = false))]
async fn reserve_stock(order: &str, item: &str) -> HandlerResult<()> {
    info!(item, "reserved");
    work().await
}

#[instrument(skip_all, fields(workflow.instance_id = %order, workflow.replaying = false))]
async fn charge_card(order: &str) -> HandlerResult<()> {
    work().await
}

#[instrument(skip_all, fields(workflow.instance_id = %order, workflow.replaying = false))]
async fn ship(order: &str) -> HandlerResult<()> {
    work().await
}

async fn work() -> HandlerResult<()> {
    tokio::time::sleep(Duration::from_millis(20)).await;
    Ok(())
}
