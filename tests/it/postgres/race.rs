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
    let pooler = PgBouncer::before(&server);
    assert_two_processes_agree(module_path!(), &pooler.url(), 0);
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
    assert_a_flushed_context_is_found(50, || backend(&server));
}
