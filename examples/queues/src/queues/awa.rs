//! Awa: a job that fails says when it is to be tried again.

use std::time::Duration;

use ::awa::{Client, InsertOpts, JobArgs, JobResult, QueueConfig, insert_with, migrations};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;

use crate::Result;
use crate::invoices::{NUMBERS, all_sent, charge_and_send};

#[derive(Deserialize, JobArgs, Serialize)]
struct Invoice {
    number: u32,
}

pub async fn run(url: &str) -> Result<()> {
    let pool = PgPool::connect(url).await?;
    migrations::run(&pool).await?;
    let queue = "invoices";
    for number in NUMBERS {
        let options = InsertOpts {
            queue: queue.into(),
            ..InsertOpts::default()
        };
        insert_with(&pool, &Invoice { number }, options).await?;
    }
    let client = Client::builder(pool)
        .queue(
            queue,
            QueueConfig {
                poll_interval: Duration::from_millis(100),
                ..QueueConfig::default()
            },
        )
        .promote_interval(Duration::from_millis(100))
        .register::<Invoice, _, _>(|invoice, _| async move {
            Ok(match charge_and_send(invoice.number).await {
                Ok(()) => JobResult::Completed,
                Err(_) => JobResult::RetryAfter(Duration::from_millis(200)),
            })
        })
        .build()?;
    client.start().await?;
    all_sent().await?;
    client.shutdown(Duration::from_secs(5)).await;
    Ok(())
}
