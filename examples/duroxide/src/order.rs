//! The user's side: an ordinary duroxide workflow.
//!
//! All it does for tracing is to put the field `workflow.instance_id` on the spans it has anyway, and to tell its end by the
//! field `workflow.status`, so that the workflow's own span has an outcome.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use duroxide::runtime::registry::ActivityRegistry;
use duroxide::{ActivityContext, OrchestrationContext, OrchestrationRegistry, RetryPolicy};
use tokio::time::sleep;
use tracing::Span;
use tracing::field::Empty;

pub const NAME: &str = "order";

pub fn orchestrations() -> OrchestrationRegistry {
    OrchestrationRegistry::builder()
        .register(NAME, order)
        .build()
}

pub fn activities() -> ActivityRegistry {
    ActivityRegistry::builder()
        .register("reserve_stock", reserve_stock)
        .register("charge_card", charge_card)
        .build()
}

/// Re-run from its first line on every turn, that is whenever an activity or a timer below is done.
#[tracing::instrument(skip_all, fields(workflow.instance_id = %ctx.instance_id(), workflow.status = Empty))]
async fn order(ctx: OrchestrationContext, item: String) -> Result<String, String> {
    let result = fulfil(ctx, item).await;
    let status = if result.is_ok() {
        "completed"
    } else {
        "failed"
    };
    Span::current().record("workflow.status", status);
    result
}

async fn fulfil(ctx: OrchestrationContext, item: String) -> Result<String, String> {
    ctx.set_custom_status("reserving the stock");
    let shelf = ctx.schedule_activity("reserve_stock", &item).await?;

    ctx.set_custom_status("a timer of 2 s: the customer may still cancel");
    ctx.schedule_timer(Duration::from_secs(2)).await;

    ctx.set_custom_status("charging the card, up to 3 attempts");
    let receipt = ctx
        .schedule_activity_with_retry("charge_card", &item, RetryPolicy::new(3))
        .await?;
    Ok(format!("{item} from {shelf}, {receipt}"))
}

#[tracing::instrument(skip_all, fields(workflow.instance_id = %ctx.instance_id()))]
async fn reserve_stock(ctx: ActivityContext, _item: String) -> Result<String, String> {
    sleep(Duration::from_millis(50)).await;
    Ok("shelf 7".to_owned())
}

#[tracing::instrument(err, skip_all, fields(workflow.instance_id = %ctx.instance_id()))]
async fn charge_card(ctx: ActivityContext, _item: String) -> Result<String, String> {
    ask_bank().await
}

/// Untagged: a span inside an activity finds its parent in the ordinary way.
#[tracing::instrument]
async fn ask_bank() -> Result<String, String> {
    static CALLS: AtomicU32 = AtomicU32::new(0);

    sleep(Duration::from_millis(80)).await;
    match CALLS.fetch_add(1, Ordering::Relaxed) {
        // What makes duroxide retry.
        0 => Err("the bank is busy".to_owned()),
        _ => Ok("receipt 4711".to_owned()),
    }
}
