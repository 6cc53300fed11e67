//! The workflows: an order is charged, which fails once, waits, is packed by a child workflow that is run directly, shipped,
//! and leaves a mail to a child workflow in the queue.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use dbos::{DBOS, Enqueue, Error, RunOptions, StartOptions, StepOptions, WorkflowRef};
use serde::{Deserialize, Serialize};

use crate::pipe;

/// Started by a request; the others come out of the queue.
pub const IN_REQUEST: &str = "order-0";
pub const IN_QUEUE: [&str; 3] = ["order-1", "order-2", "order-3"];
pub const QUEUE: &str = "orders";

/// The order in which the first worker is killed.
const KILLED_IN: &str = "order-3";

pub fn all_orders() -> Vec<&'static str> {
    [IN_REQUEST].into_iter().chain(IN_QUEUE).collect()
}

static CHARGED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[error("the bank is busy")]
pub struct BankIsBusy;

pub type Workflow = WorkflowRef<String, (), BankIsBusy>;

/// Registers the workflows. With `is_first` the worker asks to be killed in the middle of one.
pub fn register(dbos: &DBOS, is_first: bool) -> dbos::Result<Workflow> {
    let pack = dbos.register_workflow("pack", |_: String| async {
        dbos::step("wrap", || async { wrap().await }).await
    })?;
    let mail: Workflow = dbos.register_workflow("mail", |_: String| async {
        dbos::step("send", || async { Ok::<_, Error<BankIsBusy>>(()) }).await
    })?;
    dbos.register_workflow("order", move |order: String| {
        let (pack, mail): (Workflow, Workflow) = (pack.clone(), mail.clone());
        async move {
            let twice = StepOptions {
                max_attempts: 2,
                interval: Duration::from_millis(20),
                ..StepOptions::default()
            };
            dbos::step_with("charge", twice, || charge(order.clone())).await?;
            dbos::sleep::<BankIsBusy>(Duration::from_millis(300)).await?;
            let (child, other) = (format!("{order}-pack"), format!("{order}-mail"));
            let options = RunOptions {
                workflow_id: Some(&child),
                ..RunOptions::default()
            };
            pack.run_with(order.clone(), options).await?;
            dbos::step("ship", || ship(order.clone(), is_first)).await?;
            let options = StartOptions {
                workflow_id: Some(&other),
                queue: Some(Enqueue::new(QUEUE)),
                ..StartOptions::default()
            };
            mail.start_with(order.clone(), options).await?;
            Ok(())
        }
    })
}

#[tracing::instrument]
async fn charge(order: String) -> Result<(), Error<BankIsBusy>> {
    let is_new = CHARGED
        .lock()
        .is_ok_and(|mut charged| charged.insert(order));
    if is_new {
        Err(BankIsBusy.into())
    } else {
        Ok(())
    }
}

#[tracing::instrument]
async fn wrap() -> Result<(), Error<BankIsBusy>> {
    Ok(())
}

#[tracing::instrument(skip(is_first))]
async fn ship(order: String, is_first: bool) -> Result<(), Error<BankIsBusy>> {
    if is_first && order == KILLED_IN {
        // Until the others are done.
        tokio::time::sleep(Duration::from_secs(3)).await;
        println!("{}", pipe::KILL_ME);
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    Ok(())
}
