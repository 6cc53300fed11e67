//! The user's side of the second run: one long order, in which every turn but the first begins with a replay.
//!
//! What it adds to the fields of `order.rs` is `workflow.replaying`, on the spans that open inside the orchestrator.
//! duroxide's flag changes in the middle of a turn, so each of them reads it when it opens.

use duroxide::runtime::registry::ActivityRegistry;
use duroxide::{ActivityContext, OrchestrationContext, OrchestrationRegistry};

pub const NAME: &str = "parcels";

pub const STEPS: u32 = 20;

/// `on_new_step` is called inside each step that runs for the first time.
pub fn orchestrations<F>(on_new_step: F) -> OrchestrationRegistry
where
    F: Fn(u32) + Clone + Send + Sync + 'static,
{
    OrchestrationRegistry::builder()
        .register(NAME, move |ctx, _| order(ctx, on_new_step.clone()))
        .build()
}

pub fn activities() -> ActivityRegistry {
    ActivityRegistry::builder()
        .register("activity", activity)
        .build()
}

/// Re-run from its first line on every turn: `STEPS` activities make `STEPS` + 1 turns.
#[tracing::instrument(skip_all, fields(
    workflow.instance_id = %ctx.instance_id(),
    workflow.replaying = ctx.is_replaying(),
))]
async fn order(ctx: OrchestrationContext, on_new_step: impl Fn(u32)) -> Result<String, String> {
    for n in 1..=STEPS {
        step(&ctx, n, &on_new_step).await?;
    }
    Ok(format!("{STEPS} parcels"))
}

/// Ends with the turn that opened it, which drops it at the `await`, and opens as a replay in all later ones.
#[tracing::instrument(skip_all, fields(
    otel.name = %format_args!("step {n}"),
    workflow.replaying = ctx.is_replaying(),
))]
async fn step(
    ctx: &OrchestrationContext,
    n: u32,
    on_new_step: &impl Fn(u32),
) -> Result<(), String> {
    if !ctx.is_replaying() {
        on_new_step(n);
    }
    ctx.set_custom_status(format!("parcel {n} of {STEPS}"));
    ctx.schedule_activity("activity", n.to_string())
        .await
        .map(drop)
}

/// Is in a task of its own and never replayed.
#[tracing::instrument(skip_all, fields(
    otel.name = %format_args!("activity {n}"),
    workflow.instance_id = %ctx.instance_id(),
))]
async fn activity(ctx: ActivityContext, n: String) -> Result<String, String> {
    Ok(format!("parcel {n}"))
}
