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
    assert_a_flushed_context_is_found(100, || backend(&server));
}
