//! What a backend has lost is given back by the workers that still have it, and the end of an instance reaches all workers.

use std::sync::Arc;
use std::time::Duration;

use tracing_workflow_context::backend::{StorageBackend, Write};
use tracing_workflow_context::{Clock as _, MemoryBackend, WorkflowContextStorage};

use crate::support::*;

const ID: &str = "order-42";

/// Longer than any worker with the default settings is behind, and shorter than the grace.
const BEHIND: Duration = Duration::from_secs(4 * 60);

/// The default grace.
const GRACE: Duration = Duration::from_secs(5 * 60);

fn worker(backend: impl StorageBackend, clock: &Arc<ManualClock>) -> Worker {
    Worker::with_storage(patient(backend).clock(clock.clone()).build().unwrap())
}

fn flush(worker: &Worker) {
    worker.storage.flush().unwrap();
}

/// Lets so much time pass, and opens spans of the instance on the way.
fn use_for(worker: &Worker, clock: &ManualClock, time: Duration) {
    for _ in 0..8 {
        clock.advance(time / 8);
        worker.step("in use", Tags::instance(ID));
    }
}

/// Returns how long the record of the instance has to live.
fn left_in(backend: &impl StorageBackend, clock: &ManualClock) -> Duration {
    backend.get(ID).unwrap().map_or(Duration::ZERO, |record| {
        let left = record.expires_at.duration_since(clock.now());
        left.unwrap_or_default()
    })
}

fn has(backend: &impl StorageBackend, key: &str) -> bool {
    backend.get(key).unwrap().is_some()
}

/// Empties the backend by `empty` while a worker uses instances, some of them with runs.
fn assert_given_back<B: StorageBackend + Clone>(backend: &B, empty: impl FnOnce()) {
    let clock = ManualClock::new();
    let a = worker(backend.clone(), &clock);
    let ids: Vec<_> = (0..300).map(|n| format!("order-{n}")).collect();
    for id in &ids {
        a.step("first", Tags::instance(id));
    }
    a.step("first of a run", Tags::instance("other").run("run 1"));
    flush(&a);
    empty();
    assert!(!has(backend, "order-0") && !has(backend, "other"));

    clock.advance(BEHIND);
    wait_until("all are given back", || {
        ids.iter().all(|id| has(backend, id)) && has(backend, "other\u{1f}run 1")
    });
    // Another worker goes on in their traces.
    let b = worker(backend.clone(), &clock);
    for id in ids.iter().map(|id| &**id).chain(["other"]) {
        assert_eq!(
            b.storage.get(id).unwrap(),
            a.storage.get(id).unwrap(),
            "{id}"
        );
    }
    assert_eq!(a.storage.stats().conflicts, 0);
}

/// Lets another worker record the instance anew after the backend has lost it.
fn assert_winner_is_adopted<B: StorageBackend + Clone>(backend: &B, lose: impl FnOnce()) {
    let clock = ManualClock::new();
    let [a, b] = [(); 2].map(|()| worker(backend.clone(), &clock));
    a.step("first", Tags::instance(ID));
    flush(&a);
    lose();
    b.step("first again", Tags::instance(ID));
    flush(&b);
    let [ours, theirs] = [&a, &b].map(|worker| worker.storage.get(ID).unwrap().unwrap());
    assert_ne!(ours.trace_id(), theirs.trace_id(), "nobody could know");

    clock.advance(BEHIND);
    wait_until("the winner is adopted", || {
        a.storage.get(ID).unwrap().as_ref() == Some(&theirs)
    });
    wait_until("it is counted", || a.storage.stats().conflicts == 1);
    a.step("later", Tags::instance(ID));
    assert_eq!(a.span("later").span_context.trace_id(), theirs.trace_id());
    assert_eq!(
        backend.get(ID).unwrap().unwrap().context.trace_id(),
        theirs.trace_id()
    );
}

/// Completes an instance on one worker while another one goes on using it, on a backend whose time the clock may not be.
fn assert_end_reaches_another_worker<B: StorageBackend + Clone>(backend: &B) {
    let clock = ManualClock::new();
    let b = worker(backend.clone(), &clock);
    b.step("first", Tags::instance(ID));
    flush(&b);
    use_for(&b, &clock, 7 * HOUR);
    wait_until("it is extended", || left_in(backend, &clock) > 22 * HOUR);
    // The other worker begins only now: an extension of its own could cross the end.
    let a = worker(backend.clone(), &clock);
    a.step("second", Tags::instance(ID));
    assert_eq!(b.storage.get(ID).unwrap(), a.storage.get(ID).unwrap());

    a.storage.complete(ID, "completed").unwrap();
    flush(&a);
    use_for(&b, &clock, BEHIND);
    wait_until("the end is seen", || {
        b.storage.explain(ID).to_string().contains("completed")
    });
    flush(&b);
    let left = left_in(backend, &clock);
    assert!(
        left <= GRACE - BEHIND + Duration::from_secs(2),
        "extended to {left:?}"
    );
    clock.advance(GRACE - BEHIND + Duration::from_secs(5));
    assert_eq!(
        b.storage.get(ID).unwrap(),
        None,
        "the grace is over on both"
    );
    assert_eq!(a.storage.get(ID).unwrap(), None);
}

/// Removes an instance on one worker while another one goes on using it.
fn assert_removal_reaches_another_worker<B: StorageBackend + Clone>(backend: &B) {
    let clock = ManualClock::new();
    let [a, b] = [(); 2].map(|()| worker(backend.clone(), &clock));
    a.step("first", Tags::instance(ID));
    flush(&a);
    b.step("second", Tags::instance(ID));
    assert!(a.storage.cleanup(ID).unwrap());
    flush(&a);
    assert!(!has(backend, ID));
    clock.advance(BEHIND);
    wait_until("the removal is seen", || {
        b.storage.get(ID).unwrap().is_none()
    });
    flush(&b);
    assert!(!has(backend, ID), "nobody gives it back");
    // The next trace of that id is both workers'.
    a.step("first again", Tags::instance(ID));
    flush(&a);
    b.step("second again", Tags::instance(ID));
    let anew = a.span("first again").span_context;
    assert_ne!(anew.trace_id(), a.span("first").span_context.trace_id());
    assert_continues(&b.span("second again"), &anew);
    // Nor is it taken for the one that ended.
    clock.advance(BEHIND);
    clock.advance(BEHIND);
    for _ in 0..100 {
        assert!(b.storage.get(ID).unwrap().is_some() && has(backend, ID));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn empty(backend: &impl StorageBackend) {
    let mut keys = Vec::new();
    backend
        .scan(&mut |key, _| keys.push(Write::Remove(key.to_owned())))
        .unwrap();
    backend.write(&keys).unwrap();
}

#[test]
fn a_backend_in_memory_gets_back_what_it_lost() {
    let backend = MemoryBackend::new();
    assert_given_back(&backend, || empty(&backend));
    let backend = MemoryBackend::new();
    assert_winner_is_adopted(&backend, || empty(&backend));
}

/// Another worker extends the record just after the end was told.
#[test]
fn an_extension_that_crosses_an_end_is_taken_back() {
    let clock = ManualClock::new();
    let backend = MemoryBackend::with_clock(clock.clone());
    let [a, b] = [(); 2].map(|()| worker(backend.clone(), &clock));
    a.step("first", Tags::instance(ID));
    flush(&a);
    b.step("second", Tags::instance(ID));
    a.storage.complete(ID, "completed").unwrap();
    flush(&a);
    let extended = Write::Expire(ID.to_owned(), clock.now() + 24 * HOUR);
    backend.write(&[extended]).unwrap();
    clock.advance(GRACE * 3 / 4);
    wait_until("it is taken back", || left_in(&backend, &clock) < GRACE);
    // The other worker may have looked just before.
    clock.advance(GRACE / 2);
    wait_until("it is over", || b.storage.get(ID).unwrap().is_none());
}

#[test]
fn the_end_of_an_instance_reaches_another_worker() {
    assert_end_reaches_another_worker(&MemoryBackend::new());
    assert_removal_reaches_another_worker(&MemoryBackend::new());
}

/// With a grace of nothing, and one longer than the idle time, the expiry of a record does not tell that it has ended.
#[test]
fn an_end_is_told_where_the_expiry_does_not_tell_it() {
    for [idle, grace, behind] in
        [[24 * 60 * 60, 0, 8], [60, 5 * 60, 24]].map(|settings| settings.map(Duration::from_secs))
    {
        let clock = ManualClock::new();
        let backend = MemoryBackend::with_clock(clock.clone());
        let [a, b] = [(); 2].map(|()| {
            let builder = patient(backend.clone()).clock(clock.clone());
            let builder = builder.idle_ttl(idle).completed_grace(grace);
            Worker::with_storage(builder.build().unwrap())
        });
        a.step("first", Tags::instance(ID));
        flush(&a);
        b.step("second", Tags::instance(ID));
        a.storage.complete(ID, "completed").unwrap();
        flush(&a);
        clock.advance(behind);
        wait_until("the end is seen", || {
            b.storage.get(ID).unwrap().is_none()
                || b.storage.explain(ID).to_string().contains("completed")
        });
        for _ in 0..20 {
            clock.advance(grace / 16);
            let _ = b.storage.get(ID).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(b.storage.get(ID).unwrap(), None, "{idle:?}, {grace:?}");
        flush(&b);
        assert!(!has(&backend, ID), "{idle:?}, {grace:?}");
    }
}

/// What a worker reads in the grace of an instance, it keeps no longer than that.
#[test]
fn a_worker_that_finds_an_ended_instance_forgets_it_with_the_grace() {
    let clock = ManualClock::new();
    let backend = MemoryBackend::with_clock(clock.clone());
    let a = worker(backend.clone(), &clock);
    a.step("first", Tags::instance(ID));
    a.storage.complete(ID, "completed").unwrap();
    flush(&a);
    clock.advance(GRACE / 2);
    let b = worker(backend.clone(), &clock);
    b.step("late", Tags::instance(ID));
    assert_continues(&b.span("late"), &a.span("first").span_context);
    clock.advance(GRACE / 2 + Duration::from_secs(1));
    assert_eq!(b.storage.get(ID).unwrap(), None);
}

#[cfg(feature = "redis")]
mod on_redis {
    use super::*;
    use redis::Commands as _;
    use tracing_workflow_context::RedisBackend;

    fn backend(server: &RedisServer) -> RedisBackend {
        let backend = RedisBackend::connect(&server.url()).unwrap();
        let backend = backend.with_connect_timeout(PATIENCE);
        backend.with_response_timeout(PATIENCE)
    }

    fn raw(server: &RedisServer) -> redis::Connection {
        let client = redis::Client::open(server.url()).unwrap();
        client.get_connection().unwrap()
    }

    #[test]
    fn a_redis_server_gets_back_what_it_lost() {
        let mut server = RedisServer::start();
        let connected = backend(&server);
        // It is started again without its data, as after a failover to a replica that had none of it.
        assert_given_back(&connected, || server.start_again());
        let connected = backend(&server);
        assert_winner_is_adopted(&connected, || server.start_again());
    }

    #[test]
    fn a_redis_server_gets_back_what_it_evicted() {
        let server = RedisServer::start();
        let mut raw = raw(&server);
        let set = |raw: &mut redis::Connection, setting: &str, value: &str| {
            let () = (redis::cmd("CONFIG").arg("SET").arg(setting).arg(value))
                .query(raw)
                .unwrap();
        };
        let connected = backend(&server);
        assert_given_back(&connected, || {
            set(&mut raw, "maxmemory-policy", "allkeys-lru");
            set(&mut raw, "maxmemory", "1");
            // Each command evicts what it can in its time, until there is nothing left and one is refused.
            wait_until("all is evicted", || {
                let junk: redis::RedisResult<()> = raw.set("junk", "junk");
                junk.is_err()
            });
            set(&mut raw, "maxmemory", "0");
        });
    }

    #[test]
    fn an_end_reaches_another_worker_through_redis() {
        let server = RedisServer::start();
        assert_end_reaches_another_worker(&backend(&server).with_key_prefix("a:"));
        assert_removal_reaches_another_worker(&backend(&server).with_key_prefix("b:"));
    }
}

#[cfg(feature = "postgres")]
mod on_postgres {
    use super::*;
    use tracing_workflow_context::PostgresBackend;

    #[test]
    fn a_table_gets_back_what_it_lost_and_an_end_reaches_another_worker() {
        let server = PostgresServer::start();
        let connected = |table| {
            let backend = PostgresBackend::connect(&server.url())
                .unwrap()
                .table(table);
            backend.connect_timeout(PATIENCE).response_timeout(PATIENCE)
        };
        assert_given_back(&connected("lost"), || drop(server.sql("TRUNCATE lost")));
        let [won, ended, removed] = &["won", "ended", "removed"].map(connected);
        assert_winner_is_adopted(won, || drop(server.sql("TRUNCATE won")));
        assert_end_reaches_another_worker(ended);
        assert_removal_reaches_another_worker(removed);
    }
}

/// A storage that is dropped ends its threads, also while its backend hangs.
#[test]
fn a_storage_is_dropped_while_its_records_are_compared() {
    let clock = ManualClock::new();
    let backend = ControlledBackend::new();
    let storage: WorkflowContextStorage = patient(backend.clone())
        .clock(clock.clone())
        .build()
        .unwrap();
    storage.store(ID, context(1)).unwrap();
    storage.flush().unwrap();
    backend.set(Call::GetMany, Behaviour::Blocks);
    clock.advance(BEHIND);
    backend.await_blocked(Call::GetMany);
    // Neither lookups nor writes wait for that.
    storage.store("another", context(2)).unwrap();
    storage.flush().unwrap();
    assert_eq!(storage.get("unknown").unwrap(), None);
    let dropped = std::thread::spawn(move || drop(storage));
    backend.set_all(Behaviour::Works);
    dropped.join().unwrap();
    wait_until("all threads have ended", || backend.is_released());
}
