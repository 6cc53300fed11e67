//! The workflow, as its author would write it. All it does for tracing is to put the field `workflow.instance_id` on
//! the spans it has anyway.

use std::time::Duration;

use dapr_durabletask::api::OrchestrationStatus;
use dapr_durabletask::client::TaskHubGrpcClient;
use dapr_durabletask::task::{ActivityContext, OrchestrationContext};
use dapr_durabletask::worker::{ActivityResult, OrchestratorResult, TaskHubGrpcWorker};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::instrument;

use crate::Result;

/// The bound of the only long wait. An order takes about two seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Places one order and answers its result.
pub(crate) async fn run(address: &str, order: &str) -> Result<String> {
    let mut worker = TaskHubGrpcWorker::new(address);
    let registry = worker.registry_mut();
    registry.add_named_orchestrator("order", self::order);
    registry.add_named_activity("reserve_stock", reserve_stock);
    registry.add_named_activity("charge_card", charge_card);
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    let worker = tokio::spawn(async move { worker.start(token).await });

    let mut client = TaskHubGrpcClient::new(address).await?;
    place_order(&mut client, order).await?;
    let state = client
        .wait_for_orchestration_completion(order, true, Some(PATIENCE))
        .await?
        .ok_or("the order is not known")?;

    shutdown.cancel();
    worker.await??; // after what it still has in hand
    match state.runtime_status {
        OrchestrationStatus::Completed => Ok(state.serialized_output.unwrap_or_default()),
        status => Err(format!("{status}: {:?}", state.failure_details).into()),
    }
}

#[instrument(skip_all, fields(workflow.instance_id = %order))]
async fn place_order(client: &mut TaskHubGrpcClient, order: &str) -> Result<()> {
    let input = serde_json::to_string("a red bicycle")?;
    client
        .schedule_new_orchestration("order", Some(input), Some(order.to_owned()), None)
        .await?;
    Ok(())
}

/// Run again from its first line on every turn, that is whenever an activity or the timer is done.
#[instrument(skip_all, fields(workflow.instance_id = %ctx.instance_id()))]
async fn order(ctx: OrchestrationContext) -> OrchestratorResult {
    let item: String = ctx.input()?;
    ctx.call_activity("reserve_stock", &item).await?;
    ctx.create_timer(Duration::from_secs(1)).await?;
    ctx.call_activity("charge_card", &item).await
}

#[instrument(skip_all, fields(workflow.instance_id = %ctx.orchestration_id()))]
async fn reserve_stock(ctx: ActivityContext, _item: Option<String>) -> ActivityResult {
    sleep(Duration::from_millis(20)).await;
    Ok(None)
}

#[instrument(skip_all, fields(workflow.instance_id = %ctx.orchestration_id()))]
async fn charge_card(ctx: ActivityContext, _item: Option<String>) -> ActivityResult {
    let receipt = ask_bank().await;
    Ok(Some(serde_json::to_string(receipt)?))
}

/// Untagged: a span inside an activity finds its parent in the ordinary way.
#[instrument]
async fn ask_bank() -> &'static str {
    sleep(Duration::from_millis(20)).await;
    "receipt 4711"
}
