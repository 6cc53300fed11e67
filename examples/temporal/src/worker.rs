//! A worker process, which works until its input ends.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use temporalio_sdk::{Runtime, Worker, WorkerOptions};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::client::{QUEUE, connect};
use crate::order::{Order, OrderActivities, Pack};
use crate::{pipe, tagging};

pub async fn work(temporal: &str, with_interceptor: bool) -> Result<()> {
    let hanging = Arc::new(Notify::new());
    let mut options = WorkerOptions::new(QUEUE)
        // Nothing is cached: each suspension evicts the workflow, and each resumption replays it from the beginning.
        .max_cached_workflows(0)
        .register_workflow::<Order>()?
        .register_workflow::<Pack>()?
        .register_activities(OrderActivities {
            hanging: hanging.clone(),
        })
        .build();
    if with_interceptor {
        tagging::install(&mut options);
    }
    let runtime = Runtime::from_current_tokio(Default::default())?;
    let mut worker = Worker::new(&runtime, connect(temporal).await?, options)?;

    let shut_down = worker.shutdown_handle();
    let tokio = Handle::current();
    std::thread::spawn(move || {
        let _ = std::io::read_to_string(std::io::stdin());
        let _entered = tokio.enter(); // which the shutdown needs
        shut_down();
    });
    tokio::spawn(async move {
        hanging.notified().await;
        println!("{}", pipe::KILL_ME);
    });
    worker.run().await.context("the worker failed")
}
