//! Clocks that are wrong: of one machine beside the others, and of one that is set forward.

#[cfg(any(feature = "redb", feature = "redis"))]
use std::sync::Arc;
#[cfg(any(feature = "redb", feature = "redis"))]
use std::time::{Duration, SystemTime};

#[cfg(any(feature = "redb", feature = "redis"))]
use tracing_workflow_context::Clock;

/// A clock that is wrong by some seconds.
#[cfg(any(feature = "redb", feature = "redis"))]
#[derive(Debug)]
struct Wrong(i64);

#[cfg(any(feature = "redb", feature = "redis"))]
impl Clock for Wrong {
    fn now(&self) -> SystemTime {
        let by = Duration::from_secs(self.0.unsigned_abs());
        match self.0 {
            0.. => SystemTime::now() + by,
            _ => SystemTime::now() - by,
        }
    }
}

#[cfg(feature = "redis")]
mod on_redis {
    use super::*;
    use crate::support::*;
    use redis::Commands as _;
    use tracing_workflow_context::RedisBackend;

    const DAYS: i64 = 24 * 60 * 60;

    /// Workers two days behind and ahead, and one that is right, each of which finds the contexts of the others.
    #[test]
    fn workers_whose_clocks_differ_share_a_redis_server() {
        let server = RedisServer::start();
        let workers = [-2 * DAYS, 0, 2 * DAYS].map(|wrong| {
            let clock = Arc::new(Wrong(wrong));
            let backend = RedisBackend::connect(&server.url()).unwrap();
            let backend = backend
                .with_response_timeout(PATIENCE)
                .with_clock(clock.clone());
            let builder = patient(backend).clock(clock);
            Worker::with_storage(builder.idle_ttl(HOUR).build().unwrap())
        });
        for (n, worker) in workers.iter().enumerate() {
            worker.step("first", Tags::instance(&format!("order-{n}")));
            worker.storage.flush().unwrap();
        }
        let client = redis::Client::open(server.url()).unwrap();
        let mut raw = client.get_connection().unwrap();
        for n in 0..3 {
            let left: i64 = raw.pttl(format!("workflow-context:{{order-{n}}}")).unwrap();
            assert!(
                (3_000_000..=3_600_000).contains(&left),
                "{n}: {left} ms are left"
            );
            let found = workers
                .each_ref()
                .map(|worker| worker.storage.get(&format!("order-{n}")).unwrap());
            assert!(
                found[0].is_some() && found.iter().all(|it| *it == found[0]),
                "{n}"
            );
        }
        // So is an end.
        workers[0].storage.complete("order-1", "completed").unwrap();
        workers[0].storage.flush().unwrap();
        let left: i64 = raw.pttl("workflow-context:{order-1}").unwrap();
        assert!((200_000..=300_000).contains(&left), "{left} ms are left");
    }
}

#[cfg(feature = "redb")]
mod on_redb {
    use super::*;
    use crate::support::*;
    use tracing_workflow_context::backend::{StorageBackend as _, Write};
    use tracing_workflow_context::{RedbBackend, RedbSync};

    fn put(id: &str) -> Write {
        Write::Put(id.to_owned(), record_of(context(7)))
    }

    #[test]
    fn a_clock_set_forward_between_two_starts_removes_nothing() {
        let directory = Directory::new();
        let path = directory.file("contexts");
        {
            let backend = RedbBackend::open(&path).unwrap();
            let ids: Vec<_> = (0..100).map(|n| put(&n.to_string())).collect();
            backend.write(&ids).unwrap();
        }
        // They live for an hour.
        for ahead in [2 * 60 * 60, 3 * 24 * 60 * 60] {
            let clock = Arc::new(Wrong(ahead));
            let backend = RedbBackend::open_with_clock(&path, RedbSync::Group, clock).unwrap();
            let storage = patient(backend).build().unwrap();
            assert_eq!(storage.stats().stored_instances, 0);
            assert_eq!(storage.stats().expired_at_open, 100);
            for n in 0..200 {
                storage.store(&format!("new {n}"), context(8)).unwrap();
                storage.flush().unwrap();
            }
            for n in 0..200 {
                storage.cleanup(&format!("new {n}")).unwrap();
            }
        }
        let storage = patient(RedbBackend::open(&path).unwrap()).build().unwrap();
        assert_eq!(storage.stats().stored_instances, 100);
        assert_eq!(storage.stats().expired_at_open, 0);
    }

    #[test]
    fn what_expires_is_removed_once_the_clock_has_had_time_to_be_set_right() {
        let directory = Directory::new();
        let path = directory.file("contexts");
        let clock = ManualClock::new();
        let open = || RedbBackend::open_with_clock(&path, RedbSync::Group, clock.clone()).unwrap();
        let raw = || {
            let mut keys = 0;
            let database = redb::Database::open(&path).unwrap();
            let records = redb::ReadableDatabase::begin_read(&database).unwrap();
            let table = redb::TableDefinition::<&[u8], &[u8]>::new("records");
            let records = records.open_table(table).unwrap();
            for _ in redb::ReadableTable::iter(&records).unwrap() {
                keys += 1;
            }
            keys
        };
        let write = |backend: &RedbBackend, id: &str, expires_in: Duration| {
            let mut record = record_of(context(7));
            record.expires_at = clock.now() + expires_in;
            backend.write(&[Write::Put(id.to_owned(), record)]).unwrap();
        };
        let backend = open();
        for n in 0..50 {
            write(&backend, &n.to_string(), HOUR);
        }
        drop(backend);
        clock.advance(2 * HOUR);
        let backend = open();
        write(&backend, "kept", 9 * HOUR);
        drop(backend);
        assert_eq!(raw(), 51);
        let backend = open();
        clock.advance(Duration::from_secs(11 * 60));
        write(&backend, "kept", 9 * HOUR);
        // What expires while the file is open needs no time.
        write(&backend, "short", SECOND);
        clock.advance(2 * SECOND);
        for _ in 0..3 {
            write(&backend, "kept", 9 * HOUR);
        }
        drop(backend);
        assert_eq!(raw(), 1);
    }
}
