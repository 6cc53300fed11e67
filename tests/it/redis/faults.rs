//! A server failure under load costs continuity for a while, and nothing else.

use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use tracing_workflow_context::{RedisBackend, WorkflowContextStorage};

use super::*;

/// A backend whose calls fail soon.
fn hasty(url: &str) -> RedisBackend {
    let backend = RedisBackend::connect(url).expect("a URL");
    let timeout = Duration::from_millis(100);
    backend
        .with_connect_timeout(timeout)
        .with_response_timeout(timeout)
}

/// Makes the backend of another worker.
fn other(server: &Mutex<RedisServer>) -> impl FnOnce() -> RedisBackend {
    || backend(&server.lock().unwrap())
}

#[test]
fn a_server_that_is_stopped() {
    let server = Mutex::new(RedisServer::start());
    let url = server.lock().unwrap().url();
    let (stop, start) = (
        || server.lock().unwrap().stop(),
        || server.lock().unwrap().start_again(),
    );
    under_load("stopped", hasty(&url), other(&server), stop, start).assert_in_time("stopped");
}

#[test]
fn a_server_that_is_frozen() {
    let server = Mutex::new(RedisServer::start());
    let url = server.lock().unwrap().url();
    let (freeze, thaw) = (
        || server.lock().unwrap().freeze(),
        || server.lock().unwrap().thaw(),
    );
    under_load("frozen", hasty(&url), other(&server), freeze, thaw).assert_in_time("frozen");
}

#[test]
fn a_server_that_is_slow() {
    spoiled("slow", Replies::Delay(Duration::from_millis(300)));
}

/// The replies to all at once take twice as long as a call may.
#[test]
fn a_server_that_is_too_slow_for_many_writes_at_once() {
    const WRITES: usize = 100;
    let server = RedisServer::start();
    let proxy = Proxy::before(&server);
    // For each byte: a write is replied to with five.
    proxy.set_replies(Replies::Trickle(Duration::from_millis(2)));
    let timeout = Duration::from_millis(500);
    let slow = RedisBackend::connect(&proxy.url()).expect("a URL");
    let slow = slow.with_connect_timeout(PATIENCE);
    let storage = patient(slow.with_response_timeout(timeout)).build();
    let storage = storage.expect("sound settings");
    for n in 0..WRITES {
        let context = record(PARENT).context;
        storage.store(&n.to_string(), context).unwrap();
    }
    wait_until("all are written", || storage.flush().is_ok());
    let direct = backend(&server);
    for n in 0..WRITES {
        assert!(direct.get(&n.to_string()).unwrap().is_some());
    }
    assert!(
        storage.stats().backend_errors > 0,
        "some groups were too large"
    );
}

#[test]
fn a_server_that_answers_garbage() {
    spoiled(
        "garbage",
        Replies::Replace(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
    );
    spoiled(
        "wrong replies",
        Replies::Replace(b"$7\r\ngarbage\r\n".repeat(10)),
    );
}

/// Replies slower than the lookup budget, and faster than the call timeout.
#[test]
fn a_server_that_is_a_little_slow() {
    let server = RedisServer::start();
    let proxy = Proxy::before(&server);
    let load = &Load::new(hasty(&proxy.url()));
    proxy.set_replies(Replies::Delay(Duration::from_millis(20)));
    thread::scope(|scope| {
        scope.spawn(|| load.run(0));
        scope.spawn(|| load.run(1));
        scope.spawn(|| load.wait_alone());
        load.goes_on();
        load.over.store(true, Relaxed);
    });
    load.assert_in_time("a little slow");
}

#[test]
fn a_server_that_is_restarted_and_empty() {
    let server = Mutex::new(RedisServer::start());
    let url = server.lock().unwrap().url();
    let load = &Load::new(hasty(&url));
    let storage = &load.worker.storage;
    thread::scope(|scope| {
        scope.spawn(|| load.run(0));
        scope.spawn(|| load.run(1));
        scope.spawn(|| load.wait_alone());
        let early = load.goes_on();
        wait_until("the server is reached", || storage.flush().is_ok());
        server.lock().unwrap().start_again();
        let late = load.goes_on();
        wait_until("it is reached again", || storage.flush().is_ok());
        let other = WorkflowContextStorage::builder()
            .backend(backend(&server.lock().unwrap()))
            .lookup_budget(PATIENCE)
            .build();
        let other = other.expect("sound settings");
        for id in early.iter().chain(&late) {
            assert!(
                storage.get(id).unwrap().is_some(),
                "memory still has {id:?}"
            );
        }
        for id in &late {
            let trace =
                |storage: &WorkflowContextStorage| storage.get(id).unwrap().unwrap().trace_id();
            assert_eq!(trace(storage), trace(&other), "{id:?}");
        }
        load.over.store(true, Relaxed);
    });
    load.assert_in_time("restarted");
}

fn spoiled(what: &str, says: Replies) {
    let server = Mutex::new(RedisServer::start());
    let proxy = Proxy::before(&*server.lock().unwrap());
    let (spoil, mend) = (
        || proxy.set_replies(says),
        || proxy.set_replies(Replies::Forward),
    );
    under_load(what, hasty(&proxy.url()), other(&server), spoil, mend).assert_in_time(what);
}
