//! A client process: places the order, and sees it through.

use anyhow::{Context as _, Result, ensure};
use temporalio_client::{
    Client, ClientOptions, Connection, ConnectionOptions, WorkflowExecuteUpdateOptions,
    WorkflowGetResultOptions, WorkflowQueryOptions, WorkflowSignalOptions, WorkflowStartOptions,
};
use tokio::task::block_in_place;
use tracing::{Instrument, info_span};
use tracing_workflow_context::WorkflowContextStorage;
use url::Url;

use crate::order::{ORDER, Order};

pub const QUEUE: &str = "orders";

/// Its span names the order and is open before the workflow exists, so it is the first of the order's trace.
pub async fn place_order(temporal: &str, storage: &WorkflowContextStorage) -> Result<()> {
    let client = connect(temporal).await?;
    run_order(client, storage)
        .instrument(info_span!("place order", workflow.instance_id = ORDER))
        .await
}

pub async fn connect(temporal: &str) -> Result<Client> {
    let connection =
        Connection::connect(ConnectionOptions::new(Url::parse(temporal)?).build()).await?;
    Ok(Client::new(
        connection,
        ClientOptions::new("default").build(),
    )?)
}

async fn run_order(client: Client, storage: &WorkflowContextStorage) -> Result<()> {
    // A worker may have the order before the next line.
    block_in_place(|| storage.flush())?;
    let start = WorkflowStartOptions::new(QUEUE, ORDER).build();
    let order = client.start_workflow(Order::run, 1, start).await?;
    let update = WorkflowExecuteUpdateOptions::default();
    let is_known = order
        .execute_update(Order::send_to, "12 Main Street".to_owned(), update)
        .await?;
    ensure!(is_known, "the address is not known");
    let query = WorkflowQueryOptions::default();
    let is_approved = order.query(Order::is_approved, (), query).await?;
    ensure!(!is_approved, "the order is approved before it is");
    let signal = WorkflowSignalOptions::default();
    order.signal(Order::approve, (), signal).await?;
    let result = order
        .get_result(WorkflowGetResultOptions::default())
        .await
        .context("the order failed")?;
    ensure!(result == "shipped", "unexpected result: {result}");
    Ok(())
}
