//! The shop: a request puts the first step of an order into the queue, workers carry out the steps, one by one, and put the next
//! one into the queue. All that this crate asks of them are the fields whose names begin with `workflow`.

use std::fmt::Display;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::post;
use tokio::time::sleep;
use tower_http::trace::TraceLayer;
use tracing::field::Empty;
use tracing::{Span, info_span};

use crate::Result;
use crate::bank;
use crate::http::{address, continue_trace, record_status, trace_headers};
use crate::queue::{Queue, Step, Task};

pub(crate) const ADDRESS: &str = "127.0.0.1:8080";

const WORKERS: usize = 2;
const MAX_ATTEMPTS: u32 = 5;

pub(crate) fn router() -> Router {
    let queue = Queue::new();
    let client = reqwest::Client::new();
    for _ in 0..WORKERS {
        tokio::spawn(work(queue.clone(), client.clone()));
    }
    let trace = TraceLayer::new_for_http()
        .make_span_with(|request: &Request| {
            // The handler makes the id, or reads it, and records it then.
            let span = info_span!(
                "POST /orders/{order}",
                otel.kind = "server",
                http.response.status_code = Empty,
                workflow.instance_id = Empty,
                workflow.name = "order",
            );
            continue_trace(&span, request.headers());
            span
        })
        .on_response(|response: &Response, _: Duration, span: &Span| record_status(response, span));
    Router::new()
        .route("/orders/{order}", post(place_order))
        .route_layer(trace)
        .with_state(queue)
}

async fn place_order(State(queue): State<Queue>, Path(order): Path<String>) -> StatusCode {
    Span::current().record("workflow.instance_id", &*order);
    match queue.put(order, Step::ReserveStock) {
        Ok(()) => StatusCode::ACCEPTED,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

async fn work(queue: Queue, client: reqwest::Client) {
    while let Some(task) = queue.take().await {
        let Task {
            order,
            step,
            attempt,
        } = &task;
        let done = match step {
            Step::ReserveStock => reserve_stock(order).await,
            Step::ChargeCard => charge_card(order, *attempt, &client).await,
            Step::ShipParcel => ship_parcel(order).await,
            Step::SendReceipt => send_receipt(order).await,
        };
        match (done, step.next()) {
            (Ok(()), Some(next)) => {
                if let Err(error) = queue.put(task.order, next) {
                    eprintln!("{error}");
                }
            }
            (Ok(()), None) => println!("{order} is done"),
            (Err(_), _) if *attempt < MAX_ATTEMPTS => queue.put_back(task),
            (Err(error), _) => give_up(order, &error),
        }
    }
}

#[tracing::instrument(fields(workflow.instance_id = %order))]
async fn reserve_stock(order: &str) -> Result<()> {
    sleep(Duration::from_millis(60)).await;
    Ok(())
}

#[tracing::instrument(skip(client), err, fields(workflow.instance_id = %order))]
async fn charge_card(order: &str, attempt: u32, client: &reqwest::Client) -> Result<()> {
    sleep(Duration::from_millis(20)).await;
    ask_bank(order, client).await
}

/// Calls the other process. The span needs no id, as it is nested in one that has it.
#[tracing::instrument(skip(client), err, fields(otel.kind = "client"))]
async fn ask_bank(order: &str, client: &reqwest::Client) -> Result<()> {
    let url = format!("http://{}/charges/{order}", address("BANK", bank::ADDRESS));
    let request = client.post(url).headers(trace_headers());
    request.send().await?.error_for_status()?;
    Ok(())
}

#[tracing::instrument(fields(workflow.instance_id = %order))]
async fn ship_parcel(order: &str) -> Result<()> {
    sleep(Duration::from_millis(120)).await;
    Ok(())
}

#[tracing::instrument(fields(workflow.instance_id = %order))]
async fn send_receipt(order: &str) -> Result<()> {
    sleep(Duration::from_millis(40)).await;
    tracing::info!(workflow.status = "completed"); // the end of the workflow's own span
    Ok(())
}

#[tracing::instrument(skip(error), fields(workflow.instance_id = %order))]
fn give_up(order: &str, error: &dyn Display) {
    tracing::error!(workflow.status = "failed", "{error}");
}
