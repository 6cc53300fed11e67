//! A task queue in memory. As in any other, a task is a few words: no span, no trace context.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};

use crate::Result;

/// The steps of an order.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    ReserveStock,
    ChargeCard,
    ShipParcel,
    SendReceipt,
}

impl Step {
    pub(crate) fn next(self) -> Option<Self> {
        match self {
            Self::ReserveStock => Some(Self::ChargeCard),
            Self::ChargeCard => Some(Self::ShipParcel),
            Self::ShipParcel => Some(Self::SendReceipt),
            Self::SendReceipt => None,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) order: String,
    pub(crate) step: Step,
    pub(crate) attempt: u32,
}

#[derive(Clone)]
pub(crate) struct Queue {
    put: mpsc::Sender<Task>,
    take: Arc<Mutex<mpsc::Receiver<Task>>>,
}

impl Queue {
    pub(crate) fn new() -> Self {
        let (put, take) = mpsc::channel(1_000);
        let take = Arc::new(Mutex::new(take));
        Self { put, take }
    }

    /// Adds a task. An error says that the queue is full.
    pub(crate) fn put(&self, order: String, step: Step) -> Result<()> {
        let attempt = 1;
        let task = Task {
            order,
            step,
            attempt,
        };
        Ok(self.put.try_send(task)?)
    }

    /// Adds a task that failed, after a while.
    pub(crate) fn put_back(&self, mut task: Task) {
        task.attempt += 1;
        let put = self.put.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(250)).await;
            let _ = put.send(task).await; // fails only when the process ends
        });
    }

    /// Waits for the next task. `None` says that there will be none.
    pub(crate) async fn take(&self) -> Option<Task> {
        self.take.lock().await.recv().await
    }
}
