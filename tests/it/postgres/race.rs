//! Two processes that record the same instances, at once and one after the other.

use tracing_workflow_context::WorkflowContextStorage;

use super::*;

#[test]
fn two_processes_agree_on_every_instance() {
    // Without lookups each of them claims every instance; with them most are found.
    for budget in [0, 5] {
        let server = PostgresServer::start();
        assert_two_processes_agree(module_path!(), &server.url(), budget);
    }
}

#[test]
fn two_processes_behind_pgbouncer_agree_on_every_instance() {
    let server = PostgresServer::start();
    // Fewer than the four connections that they keep.
    let pooler = PgBouncer::before(&server, 2);
    assert_two_processes_agree(module_path!(), pooler.url(), 0);
}

#[test]
#[ignore = "run by two_processes_agree_on_every_instance"]
fn one_process_of_the_race() {
    run_one_process(backend_at);
}

#[test]
fn a_storage_connects_once_it_is_built() {
    let server = PostgresServer::start();
    let storage = WorkflowContextStorage::builder().backend(backend(&server));
    let storage = storage.build().expect("sound settings");
    // Nothing was looked up or written yet.
    let connections = || {
        let name = "application_name = 'tracing-workflow-context'";
        server.sql(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE {name}"
        ))
    };
    wait_until("both threads have a connection", || connections() == "2");
    drop(storage);
    wait_until("they are closed", || connections() == "0");
}

#[test]
fn a_flushed_context_is_found_by_the_next_worker() {
    let server = PostgresServer::start();
    let [one, other] = [0, 1].map(|_| {
        let storage = patient(backend(&server)).build();
        Worker::with_storage(storage.expect("sound settings"))
    });
    for number in 0..50 {
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
        assert_eq!(second.parent_span_id, first.span_context.span_id(), "{id}");
        assert!(second.parent_span_is_remote);
    }
    for worker in [one, other] {
        let stats = worker.storage.stats();
        let failed = (stats.conflicts, stats.backend_errors, stats.malformed);
        assert_eq!(failed, (0, 0, 0));
    }
}
