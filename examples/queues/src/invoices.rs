//! The work of each queue: an invoice is charged, which fails the first time, and sent.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Result;

/// The invoices.
pub const NUMBERS: [u32; 2] = [1, 2];

static CHARGED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
static SENT: AtomicUsize = AtomicUsize::new(0);

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Invoice {
    pub number: u32,
}

/// One step does it all.
pub async fn charge_and_send(invoice: u32) -> std::result::Result<(), String> {
    charge(invoice).await?;
    send(invoice).await;
    Ok(())
}

#[tracing::instrument]
pub async fn charge(invoice: u32) -> std::result::Result<(), String> {
    tokio::time::sleep(Duration::from_millis(5)).await;
    match CHARGED
        .lock()
        .map_err(|error| error.to_string())?
        .insert(invoice)
    {
        true => Err("the bank does not answer".into()),
        false => Ok(()),
    }
}

#[tracing::instrument]
pub async fn send(invoice: u32) {
    tokio::time::sleep(Duration::from_millis(5)).await;
    SENT.fetch_add(1, SeqCst);
}

/// Waits until all invoices are sent, and the queue has noticed.
pub async fn all_sent() -> Result<()> {
    let sent = async {
        while SENT.load(SeqCst) < NUMBERS.len() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(60), sent).await;
    in_time.map_err(|_| "not all invoices were sent within a minute")?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    Ok(())
}
