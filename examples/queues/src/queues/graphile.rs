//! Graphile Worker: a job that fails is tried again after a while.

use std::time::Duration;

use graphile_worker::{IntoTaskHandlerResult, JobSpec, TaskHandler, WorkerContext, WorkerOptions};

use crate::Result;
use crate::invoices::{Invoice, NUMBERS, all_sent, charge_and_send};

impl TaskHandler for Invoice {
    const IDENTIFIER: &'static str = "invoice";

    async fn run(self, _: WorkerContext) -> impl IntoTaskHandlerResult {
        charge_and_send(self.number).await
    }
}

pub async fn run(url: &str) -> Result<()> {
    let worker = WorkerOptions::default()
        .database_url(url)
        .schema("graphile_worker")
        .poll_interval(Duration::from_millis(200))
        .listen_os_shutdown_signals(false)
        .define_job::<Invoice>()
        .init()
        .await?;
    for number in NUMBERS {
        let job = JobSpec::default();
        worker
            .create_utils()
            .add_job(Invoice { number }, job)
            .await?;
    }
    let until_sent = async {
        let sent = all_sent().await;
        worker.request_shutdown();
        sent
    };
    let (worked, sent) = tokio::join!(worker.run(), until_sent);
    worked?;
    sent
}
