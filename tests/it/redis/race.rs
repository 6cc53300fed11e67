//! Two processes that record the same instances, at once and one after the other.

use tracing_workflow_context::{RedisBackend, WorkflowContextStorage};

use super::*;

#[test]
fn two_processes_agree_on_every_instance() {
    // Without lookups each of them claims every instance; with them most are found.
    for budget in [0, 5] {
        let server = RedisServer::start();
        assert_two_processes_agree(module_path!(), &server.url(), budget);
    }
}

#[test]
#[ignore = "run by two_processes_agree_on_every_instance"]
fn one_process_of_the_race() {
    run_one_process(|url| {
        let backend = RedisBackend::connect(url).expect("a URL");
        backend.with_response_timeout(PATIENCE)
    });
}

/// Nothing was looked up or written yet.
#[test]
fn a_storage_connects_once_it_is_built() {
    let server = RedisServer::start();
    let storage = WorkflowContextStorage::builder().backend(backend(&server));
    let _storage = storage.build().expect("sound settings");
    let mut client = raw(&server);
    wait_until("both threads have a connection, beside this one", || {
        let clients: String = redis::cmd("CLIENT")
            .arg("LIST")
            .query(&mut client)
            .expect("a list");
        clients.lines().count() == 3
    });
}

#[test]
fn a_flushed_context_is_found_by_the_next_worker() {
    let server = RedisServer::start();
    let [one, other] = [0, 1].map(|_| {
        let storage = WorkflowContextStorage::builder()
            .backend(backend(&server))
            .lookup_budget(PATIENCE)
            .build();
        Worker::with_storage(storage.expect("sound settings"))
    });
    for number in 0..100 {
        let id = format!("order-{number}");
        let (first, second) = if number % 2 == 0 {
            (&one, &other)
        } else {
            (&other, &one)
        };
        first.run(|| tracing::info_span!("first", workflow.instance_id = %id).in_scope(|| {}));
        first.storage.flush().unwrap();
        second.run(|| tracing::info_span!("second", workflow.instance_id = %id).in_scope(|| {}));

        let last = |worker: &Worker| worker.spans().pop().expect("a span");
        let (first, second) = (last(first), last(second));
        assert_eq!(
            second.span_context.trace_id(),
            first.span_context.trace_id(),
            "{id}"
        );
        assert_eq!(second.parent_span_id, first.span_context.span_id(), "{id}");
        assert!(second.parent_span_is_remote);
    }
    for worker in [one, other] {
        let stats = worker.storage.stats();
        assert_eq!(
            (stats.conflicts, stats.backend_errors, stats.malformed),
            (0, 0, 0)
        );
    }
}
