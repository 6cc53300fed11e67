//! Old and new workers side by side: what one cannot read, it leaves to the other.

use std::time::Duration;

use tracing_workflow_context::StorageError;
use tracing_workflow_context::backend::StorageBackend;

use crate::support::*;

const ID: &str = "order-42";

/// Runs a worker beside those of a newer version, whose value for the instance is under its key: `is_there` tells that it still
/// is. `remove` is what they do at the end.
#[cfg_attr(
    not(any(feature = "postgres", feature = "redb", feature = "redis")),
    allow(dead_code)
)]
fn assert_left_alone(
    backend: impl StorageBackend,
    is_there: impl Fn() -> bool,
    remove: impl FnOnce(),
) {
    let clock = ManualClock::new();
    let storage = patient(backend).clock(clock.clone()).build().unwrap();
    let old = Worker::with_storage(storage);
    let malformed = old.storage.stats().malformed;
    old.step("first", Tags::instance(ID));
    old.step("of another", Tags::instance("another"));
    let told = old.storage.flush();
    let Err(StorageError::NotWritten {
        dropped: 1,
        refused: 0,
        cause,
    }) = told
    else {
        panic!("{told:?}");
    };
    assert!(cause.to_string().contains(ID), "{cause}");
    assert!(old.storage.stats().malformed > malformed);
    assert_eq!(old.storage.stats().dropped_writes, 1);
    old.step("second", Tags::instance(ID));
    // Here it is one trace nevertheless.
    assert_continues(&old.span("second"), &old.span("first").span_context);
    old.storage.flush().unwrap();
    // Neither does a refresh replace it.
    clock.advance(Duration::from_secs(7 * 60 * 60));
    let before = old.storage.stats().malformed;
    wait_until("it is looked at again", || {
        old.storage.stats().malformed > before
    });
    let _ = old.storage.flush();
    assert!(is_there());

    remove();
    clock.advance(Duration::from_secs(7 * 60 * 60));
    wait_until("its place is taken", || old.storage.stats().given_back == 1);
    // The flush before may have come earlier than what it would have told.
    let _ = old.storage.flush();
    old.storage.flush().unwrap();
}

/// A binary record of a later version.
#[cfg(any(feature = "postgres", feature = "redb", feature = "redis"))]
const NEWER: [u8; 50] = [2; 50];

#[cfg(feature = "redis")]
#[test]
fn a_value_of_another_version_or_type_stays_on_a_redis_server() {
    use redis::Commands as _;

    const KEY: &str = "workflow-context:{order-42}";
    let server = RedisServer::start();
    let backend = || {
        let backend = tracing_workflow_context::RedisBackend::connect(&server.url()).unwrap();
        backend.with_response_timeout(PATIENCE)
    };
    let raw = || {
        let client = redis::Client::open(server.url()).unwrap();
        client.get_connection().unwrap()
    };
    let remove = || raw().del::<_, ()>(KEY).unwrap();
    for value in [&NEWER[..], br#"{"traceparent": 2}"#] {
        let () = raw().set(KEY, value).unwrap();
        let is_there = || raw().get::<_, Vec<u8>>(KEY).unwrap() == value;
        assert_left_alone(backend(), is_there, remove);
        remove();
    }
    let () = raw().rpush(KEY, "a list").unwrap();
    let is_there = || raw().lrange::<_, Vec<String>>(KEY, 0, -1).unwrap() == ["a list"];
    assert_left_alone(backend(), is_there, remove);
    remove();
    let () = raw().hset(KEY, "a", "hash").unwrap();
    let is_there = || raw().hget::<_, _, String>(KEY, "a").unwrap() == "hash";
    assert_left_alone(backend(), is_there, remove);
}

#[cfg(feature = "postgres")]
#[test]
fn a_value_of_another_version_stays_in_a_table() {
    let server = PostgresServer::start();
    for (column, value) in [
        ("record", r"'\x0202'"),
        ("context", r#"'{"traceparent": 2}'"#),
    ] {
        let backend = tracing_workflow_context::PostgresBackend::connect(&server.url()).unwrap();
        let backend = backend.response_timeout(PATIENCE).connect_timeout(PATIENCE);
        StorageBackend::connect(&backend).unwrap();
        server.sql("TRUNCATE workflow_contexts");
        server.sql(&format!(
            "INSERT INTO workflow_contexts (key, {column}) VALUES ('{ID}', {value})"
        ));
        let count = format!("SELECT count(*) FROM workflow_contexts WHERE {column} = {value}");
        let is_there = || server.sql(&count) == "1";
        let remove = || {
            drop(server.sql(&format!(
                "DELETE FROM workflow_contexts WHERE {column} = {value}"
            )))
        };
        assert_left_alone(backend, is_there, remove);
    }
}

/// A single process has the file open, so the newer version comes and goes.
#[cfg(feature = "redb")]
#[test]
fn a_value_of_another_version_stays_in_a_file() {
    use redb::ReadableDatabase as _;
    use tracing_workflow_context::RedbBackend;

    const RECORDS: redb::TableDefinition<'_, &[u8], &[u8]> = redb::TableDefinition::new("records");
    let directory = Directory::new();
    let path = directory.file("contexts");
    drop(RedbBackend::open(&path).unwrap());
    {
        let database = redb::Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        let mut records = transaction.open_table(RECORDS).unwrap();
        records.insert(ID.as_bytes(), &NEWER[..]).unwrap();
        drop(records);
        transaction.commit().unwrap();
    }
    let old = Worker::with_storage(patient(RedbBackend::open(&path).unwrap()).build().unwrap());
    assert_eq!(old.storage.stats().malformed, 1);
    old.step("first", Tags::instance(ID));
    old.step("of another", Tags::instance("another"));
    drop(old);
    drop(open(&path)); // waits until it is closed
    let database = redb::Database::open(&path).unwrap();
    let records = database.begin_read().unwrap().open_table(RECORDS).unwrap();
    let there = redb::ReadableTable::get(&records, ID.as_bytes())
        .unwrap()
        .unwrap();
    assert!(there.value() == NEWER, "left alone");
    assert!(
        redb::ReadableTable::get(&records, b"another".as_slice())
            .unwrap()
            .is_some()
    );
}
