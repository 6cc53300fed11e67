//! underway: charging and sending are two steps of one job, each a task with attempts of its own.

use ::underway::task::{Error, RetryPolicy};
use ::underway::{Job, To, run_migrations};
use jiff::ToSpan as _;
use serde::{Deserialize, Serialize};
use sqlx::PgPool;

use crate::Result;
use crate::invoices::{Invoice, NUMBERS, all_sent, charge, send};

#[derive(Deserialize, Serialize)]
struct Charged {
    number: u32,
}

pub async fn run(url: &str) -> Result<()> {
    let pool = PgPool::connect(url).await?;
    run_migrations(&pool).await?;
    let job = Job::builder()
        .step(|_, Invoice { number }| async move {
            charge(number).await.map_err(Error::Retryable)?;
            To::next(Charged { number })
        })
        .retry_policy(RetryPolicy::builder().initial_interval_ms(200).build())
        .step(|_, Charged { number }| async move {
            send(number).await;
            To::done()
        })
        .name("invoices")
        .pool(pool)
        .build()
        .await?;
    for number in NUMBERS {
        job.enqueue(&Invoice { number }).await?;
    }
    // A step that is to be tried again is found by the next look into the queue.
    tokio::select! {
        ran = async { job.worker().run_every(200.milliseconds()).await } => ran?,
        sent = all_sent() => sent?,
    }
    Ok(())
}
