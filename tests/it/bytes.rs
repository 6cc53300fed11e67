//! Memory is bounded in bytes: long ids, tracestates and runs take the place of more instances.

use std::time::Duration;

use tracing::info_span;
use tracing_workflow_context::{
    MemoryBackend, StorageError, WorkflowContext, WorkflowContextStorage,
};

use crate::support::*;

const ID: &str = "order-42";

/// A context with a tracestate of that many members, `k0=v..` first, each with a value of that length.
fn context_with_state(members: usize, length: usize) -> WorkflowContext {
    let value = "v".repeat(length);
    let state: Vec<_> = (0..members).map(|n| format!("k{n}={value}")).collect();
    WorkflowContext::parse(
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        &state.join(","),
    )
    .unwrap()
}

#[test]
fn a_tracestate_is_kept_up_to_a_bound_without_its_long_members() {
    let kept = |most: Option<usize>, context: WorkflowContext| {
        let builder = WorkflowContextStorage::builder();
        let builder = match most {
            Some(most) => builder.max_trace_state(most),
            None => builder,
        };
        let storage = builder.build().unwrap();
        storage.store(ID, context).unwrap();
        storage.get(ID).unwrap().unwrap().tracestate()
    };
    // 32 members of 252 bytes: a client's 8 KB.
    assert_eq!(kept(None, context_with_state(32, 248)), "");
    let ten = context_with_state(10, 40);
    assert_eq!(ten.tracestate().len(), 439);
    assert_eq!(kept(None, ten.clone()), ten.tracestate());
    assert_eq!(kept(Some(439), ten.clone()), ten.tracestate());
    let nine = context_with_state(9, 40).tracestate();
    assert_eq!(kept(Some(438), ten.clone()), nine);
    assert_eq!(kept(Some(0), ten), "");
    // A long member goes before the last ones.
    let long = format!("long={}", "x".repeat(200));
    let mixed = format!("{long},{}", context_with_state(10, 30).tracestate());
    let mixed = WorkflowContext::parse(
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        &mixed,
    );
    let short = context_with_state(10, 30).tracestate();
    assert_eq!(kept(None, mixed.unwrap()), short);
}

#[test]
fn spans_and_backends_bring_no_longer_tracestate_into_memory() {
    let backend = MemoryBackend::new();
    let generous = WorkflowContextStorage::builder().backend(backend.clone());
    let generous = generous.max_trace_state(usize::MAX).build().unwrap();
    let long = context_with_state(32, 200);
    generous.store(ID, long.clone()).unwrap();
    generous.flush().unwrap();
    assert_eq!(
        generous.get(ID).unwrap().unwrap().tracestate(),
        long.tracestate()
    );
    let worker = Worker::with_storage(patient(backend).build().unwrap());
    assert_eq!(worker.storage.get(ID).unwrap().unwrap().tracestate(), "");
    // Beneath a request with a long one.
    worker.run(|| {
        let _request = long.to_otel().attach();
        info_span!("step", workflow.instance_id = "other").in_scope(|| ());
    });
    let recorded = worker.storage.get("other").unwrap().unwrap();
    assert_eq!(recorded.tracestate(), "");
}

#[test]
fn memory_is_bounded_in_bytes() {
    const KIB: u64 = 1024;
    let storage = WorkflowContextStorage::builder()
        .max_bytes(64 * KIB)
        .build()
        .unwrap();
    for n in 0..2_000 {
        storage
            .store(&format!("order-{n}"), context(n + 1))
            .unwrap();
    }
    let small = storage.stats().stored_instances;
    assert!((300..=372).contains(&small), "{small}");
    // The longest ids: each takes the place of six.
    for n in 0..2_000 {
        storage
            .store(&format!("{n:01024}"), context(n + 1))
            .unwrap();
        assert!(
            storage.get(&format!("{n:01024}")).unwrap().is_some(),
            "the last one stays"
        );
    }
    let long = storage.stats().stored_instances;
    assert!((40..=54).contains(&long), "{long}");
    let zero = WorkflowContextStorage::builder().max_bytes(0).build();
    assert_eq!(
        zero.unwrap_err().to_string(),
        "max_bytes: must be more than zero"
    );
}

#[test]
fn bytes_of_what_is_gone_do_not_count() {
    let worker = Worker::with_storage(
        WorkflowContextStorage::builder()
            .max_bytes(64 * 1024)
            .max_trace_state(4096)
            .build()
            .unwrap(),
    );
    let storage = &worker.storage;
    for round in 0..300 {
        let id = format!("{round}-{}", "x".repeat(round * 3));
        let runs = [
            "1",
            "2",
            "a run of which the id does not fit into the entry itself",
        ];
        for run in runs {
            worker.run(|| {
                info_span!("step", workflow.instance_id = id, workflow.run_id = run)
                    .in_scope(|| ());
            });
            storage
                .store(&id, context_with_state(round % 32, 90))
                .unwrap();
        }
        worker.run(|| {
            info_span!("step", workflow.instance_id = id, workflow.run_id = "3").in_scope(|| ());
        });
        assert!(storage.cleanup(&id).unwrap());
    }
    assert_eq!(storage.stats().stored_instances, 0);
    let evicted = storage.stats().evicted;
    for n in 0..372 {
        storage
            .store(&format!("order-{n}"), context(n + 1))
            .unwrap();
    }
    assert_eq!(storage.stats().stored_instances, 372);
    assert_eq!(storage.stats().evicted, evicted);
}

#[test]
fn bytes_of_contexts_that_lost_to_other_workers_do_not_count() {
    let backend = MemoryBackend::new();
    // Neither asks the backend, so that both record, and one gives way.
    let worker = || {
        let storage = WorkflowContextStorage::builder().backend(backend.clone());
        let storage = storage.lookup_budget(Duration::ZERO).max_bytes(64 * 1024);
        Worker::with_storage(storage.build().unwrap())
    };
    let (first, second) = (worker(), worker());
    let step = |worker: &Worker, id: &str| {
        let run = "a run of which the id does not fit into the entry itself";
        worker.run(|| {
            info_span!("step", workflow.instance_id = id, workflow.run_id = run).in_scope(|| ());
        });
        worker.storage.flush().unwrap();
    };
    for round in 0..300 {
        let id = format!("order-{round}");
        step(&first, &id);
        step(&second, &id);
        assert!(second.storage.cleanup(&id).unwrap());
    }
    assert_eq!(second.storage.stats().conflicts, 300);
    let evicted = second.storage.stats().evicted;
    for n in 0..372 {
        let id = format!("small-{n}");
        second.storage.store(&id, context(n + 1)).unwrap();
    }
    assert_eq!(second.storage.stats().stored_instances, 372);
    assert_eq!(second.storage.stats().evicted, evicted);
}

/// A queue that waits for the backend is memory too.
#[test]
fn writes_that_wait_are_bounded_in_bytes() {
    const WRITES: u64 = 20_000;
    let controlled = ControlledBackend::new();
    let storage = patient(controlled.clone()).max_trace_state(usize::MAX);
    let storage = storage.max_instances(10).build().unwrap();
    controlled.set(Call::Write, Behaviour::Blocks);
    // 8 KB each, 160 MB in all; far fewer than the bound in number.
    let long = context_with_state(32, 250);
    for n in 0..WRITES {
        storage.store(&n.to_string(), long.clone()).unwrap();
    }
    let dropped = storage.stats().dropped_writes;
    let kept = (WRITES - dropped) * long.tracestate().len() as u64;
    assert!((16..=128).contains(&(kept >> 20)), "{kept} bytes are kept");
    controlled.set_all(Behaviour::Works);
    match storage.flush() {
        Err(StorageError::NotWritten {
            dropped: told,
            refused: 0,
            ..
        }) => assert_eq!(told, dropped),
        other => panic!("{other:?}"),
    }
    // The last ones are there, and one flush tells what was lost.
    storage.flush().unwrap();
    let last = (WRITES - 1).to_string();
    let other = patient(controlled).max_trace_state(usize::MAX);
    let there = other.build().unwrap().get(&last).unwrap();
    assert_eq!(there.unwrap().tracestate(), long.tracestate());
}
