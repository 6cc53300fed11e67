//! apalis: its tracing layer is asked for, and opens a span for each attempt.

use std::io;

use ::apalis::prelude::*;
use apalis_postgres::{PgPool, PostgresStorage};

use crate::Result;
use crate::invoices::{Invoice, NUMBERS, all_sent, charge_and_send};

pub async fn run(url: &str) -> Result<()> {
    let pool = PgPool::connect(url).await?;
    PostgresStorage::setup(&pool).await?;
    let mut storage = PostgresStorage::new(&pool);
    for number in NUMBERS {
        storage.push(Invoice { number }).await?;
    }
    let worker = WorkerBuilder::new("invoices")
        .backend(storage)
        .enable_tracing()
        .build(handle);
    let sent = async { all_sent().await.map_err(io::Error::other) };
    worker.run_until(sent).await?;
    Ok(())
}

async fn handle(invoice: Invoice) -> std::result::Result<(), BoxDynError> {
    charge_and_send(invoice.number).await.map_err(Into::into)
}
