//! The durable functions. An order is charged, which fails once, waits, is packed in a child context, loaded by two branches at
//! once, approved by a callback, and billed by another durable function.

use std::time::Duration;

use aws_durable_execution_sdk::{BoxError, DurableContext, RetryDecision};

use crate::pipe;

pub const ORDER: &str = "order";
pub const RECEIPT: &str = "receipt";

/// The least that the service waits.
const PAUSE: Duration = Duration::from_secs(1);

/// What an order does, each once: in steps, and in the code around them, which runs again in each invocation.
pub const OF_ORDER: [&str; 15] = [
    "check",
    "reserve",
    "price",
    "charge (1)",
    "charge (2)",
    "pick a box",
    "wrap",
    "print the label",
    "stick it on",
    "find a truck",
    "book it",
    "weigh",
    "ask for approval",
    "thank",
    "ship",
];
pub const OF_RECEIPT: [&str; 3] = ["number", "print", "send"];

pub async fn order(order: String, ctx: DurableContext) -> Result<(), BoxError> {
    work("check", &order);
    step(&ctx, "reserve", &order).await?;

    work("price", &order);
    let charged = order.clone();
    ctx.step(|step| async move { charge(&charged, step.attempt()) })
        .name("charge")
        .retry_strategy(|_, attempt| match attempt {
            1 => RetryDecision::Retry { delay: PAUSE },
            _ => RetryDecision::Stop,
        })
        .await?;
    ctx.wait(PAUSE).name("cool down").await?;

    let packed = order.clone();
    ctx.run_in_child_context(|child| pack(packed, child))
        .name("pack")
        .await?;
    let loaded = order.clone();
    // Unnamed, since the emulator forgets the name of a branch that has ended before the others, and the SDK then takes it for
    // another one.
    ctx.map([true, false], move |branch, is_truck, _| {
        load(is_truck, loaded.clone(), branch)
    })
    .await?;

    let asked = order.clone();
    let submit = |_, callback: String| async move {
        work("ask for approval", &asked);
        println!("{}{callback}", pipe::CALLBACK);
        Ok(())
    };
    ctx.wait_for_callback::<bool, _, _>(submit)
        .name("approval")
        .await?;
    let receipt = order.replace(ORDER, RECEIPT);
    ctx.invoke::<(), _>(RECEIPT, receipt).await?;
    work("thank", &order);
    step(&ctx, "ship", &order).await
}

/// Suspended in the middle: what its code does before is not to be told again.
async fn pack(order: String, ctx: DurableContext) -> Result<(), BoxError> {
    work("pick a box", &order);
    step(&ctx, "wrap", &order).await?;
    work("print the label", &order);
    ctx.wait(PAUSE).name("dry").await?;
    step(&ctx, "stick it on", &order).await
}

/// Two branches at once, of which one is suspended.
async fn load(is_truck: bool, order: String, ctx: DurableContext) -> Result<(), BoxError> {
    if !is_truck {
        return step(&ctx, "weigh", &order).await;
    }
    work("find a truck", &order);
    ctx.wait(PAUSE).await?;
    step(&ctx, "book it", &order).await
}

pub async fn receipt(receipt: String, ctx: DurableContext) -> Result<(), BoxError> {
    work("number", &receipt);
    step(&ctx, "print", &receipt).await?;
    ctx.wait(PAUSE).await?;
    step(&ctx, "send", &receipt).await
}

async fn step(ctx: &DurableContext, what: &'static str, order: &str) -> Result<(), BoxError> {
    let order = order.to_owned();
    let body = move |_| async move {
        work(what, &order);
        Ok(())
    };
    Ok(ctx.step(body).name(what).await?)
}

#[tracing::instrument(skip(what), fields(otel.name = what))]
fn work(what: &str, order: &str) {}

#[tracing::instrument(err)]
fn charge(order: &str, attempt: u32) -> Result<(), BoxError> {
    match attempt {
        1 => Err("the bank is busy".into()),
        _ => Ok(()),
    }
}
