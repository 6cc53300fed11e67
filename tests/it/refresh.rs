//! A record in a backend lives as long as its instance is used, however short the idle time and however many there are.

use std::time::Duration;

use tracing_workflow_context::backend::StorageBackend as _;
use tracing_workflow_context::{Clock as _, MemoryBackend, WorkflowContext};

use crate::support::*;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// Uses 50 instances beside others that nobody uses, for twice the idle time.
fn assert_kept_in_use(idle: Duration, others: usize) {
    let (backend, clock) = (MemoryBackend::new(), ManualClock::new());
    let storage = patient(backend.clone()).clock(clock.clone());
    let storage = storage.idle_ttl(idle).build().expect("sound settings");
    let context = WorkflowContext::parse(PARENT, "").expect("well formed");
    for n in 0..others {
        storage
            .store(&format!("other {n}"), context.clone())
            .unwrap();
    }
    // So many at once may be too many for the queue.
    let _ = storage.flush();
    let used: Vec<_> = (0..50).map(|n| format!("used {n}")).collect();
    for id in &used {
        storage.store(id, context.clone()).unwrap();
    }
    storage.flush().unwrap();
    for step in 1..=40 {
        clock.advance(idle / 20);
        for id in &used {
            assert!(storage.get(id).unwrap().is_some(), "memory has it");
        }
        let least = clock.now() + idle / 4;
        let is_kept = |id: &String| {
            let record = backend.get(id).unwrap();
            record.is_some_and(|record| record.expires_at > least)
        };
        wait_until(&format!("all are kept at step {step}"), || {
            used.iter().all(is_kept)
        });
    }
    let unused = format!("other {}", others - 1);
    let unused = backend.get(&unused).unwrap();
    let unused = unused.expect("by the system's clock it lives");
    assert!(unused.expires_at < clock.now(), "nobody has used it");
}

#[test]
fn instances_in_use_do_not_expire_in_the_backend_within_two_seconds() {
    assert_kept_in_use(Duration::from_secs(2), 1_000);
}

#[test]
fn instances_in_use_do_not_expire_in_the_backend_within_half_a_minute() {
    assert_kept_in_use(Duration::from_secs(30), 300_000);
}
