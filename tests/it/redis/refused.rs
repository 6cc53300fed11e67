//! A server that refuses some commands, and works for all others.

use std::collections::HashSet;

use super::*;

fn keys(raw: &mut redis::Connection) -> HashSet<String> {
    raw.keys("workflow-context:*").expect("a list")
}

fn config(raw: &mut redis::Connection, setting: &str, value: &str) {
    let mut set = redis::cmd("CONFIG");
    let set = set.arg("SET").arg(setting).arg(value);
    let () = set.query(raw).expect("a setting");
}

/// The refused ones, and the text of the first cause.
#[track_caller]
fn refused(flushed: Result<(), StorageError>) -> (u64, String) {
    match flushed {
        Err(
            error @ StorageError::NotWritten {
                dropped: 0,
                refused,
                ..
            },
        ) => (refused, causes(&error)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_server_without_memory_lets_ends_through_and_later_all_the_rest() {
    let server = RedisServer::start();
    let mut raw = raw(&server);
    config(&mut raw, "maxmemory-policy", "noeviction");
    let storage = storage_on(backend(&server));
    let context = || record(PARENT).context;
    for n in 0..2_000 {
        storage.store(&format!("early {n}"), context()).unwrap();
    }
    storage.flush().unwrap();

    config(&mut raw, "maxmemory", "1");
    for n in 0..2_000 {
        storage.store(&format!("late {n}"), context()).unwrap();
    }
    let (count, cause) = refused(storage.flush());
    assert_eq!(count, 2_000);
    assert!(cause.contains("OOM") && cause.contains("late "), "{cause}");
    // What frees memory waits for none of them.
    for n in 0..2_000 {
        match n % 2 {
            0 => drop(storage.cleanup(&format!("early {n}")).unwrap()),
            _ => drop(
                storage
                    .complete(&format!("early {n}"), "completed")
                    .unwrap(),
            ),
        }
    }
    // What tells the others that an instance was removed needs memory.
    assert_eq!(refused(storage.flush()).0, 3_000);
    assert_eq!(keys(&mut raw).len(), 1_000);
    let left: i64 = raw.pttl("workflow-context:{early 1}").unwrap();
    assert!((0..=3_600_000).contains(&left), "{left} ms are left");
    let stats = storage.stats();
    assert_eq!(stats.dropped_writes, 0);
    assert!(stats.backend_errors >= 2);
    // Nor do reads.
    let other = storage_on(backend(&server));
    assert!(other.get("early 1").unwrap().is_some());
    // A claim finds what is there, though the server refuses to set anything.
    let outcomes = backend(&server).write(&[claim("early 1", &record(PARENT))]);
    assert!(matches!(outcomes.unwrap()[..], [WriteOutcome::Existing(_)]));

    config(&mut raw, "maxmemory", "0");
    storage.flush().unwrap();
    assert_eq!(keys(&mut raw).len(), 4_000);
    assert_eq!(storage.stats().dropped_writes, 0);
}

#[test]
fn a_key_that_the_user_may_not_write_holds_back_no_other() {
    let server = RedisServer::start();
    let mut raw = raw(&server);
    let mut set_user = redis::cmd("ACL");
    set_user
        .arg("SETUSER")
        .arg("worker")
        .arg("on")
        .arg(">secret");
    set_user
        .arg("+@all")
        .arg("~workflow-context:{allowed*")
        .arg("%R~*");
    let () = set_user.query(&mut raw).unwrap();
    let url = server.url().replace("redis://", "redis://worker:secret@");
    let connected = RedisBackend::connect(&url).unwrap();
    let connected = connected
        .with_connect_timeout(PATIENCE)
        .with_response_timeout(PATIENCE);
    let storage = storage_on(connected);
    storage.store("denied", record(PARENT).context).unwrap();
    for n in 0..3_000 {
        storage
            .store(&format!("allowed {n}"), record(PARENT).context)
            .unwrap();
    }
    let (count, cause) = refused(storage.flush());
    assert_eq!(count, 1);
    assert!(
        cause.contains("NoPerm") && cause.contains("\"denied\""),
        "{cause}"
    );
    assert_eq!(keys(&mut raw).len(), 3_000);
    // It is told until it is over.
    storage
        .store("allowed more", record(PARENT).context)
        .unwrap();
    let (count, cause) = refused(storage.flush());
    assert!(count == 1 && cause.contains("NoPerm"), "{cause}");
    assert_eq!(keys(&mut raw).len(), 3_001);

    let mut allow = redis::cmd("ACL");
    let () = allow
        .arg("SETUSER")
        .arg("worker")
        .arg("~*")
        .query(&mut raw)
        .unwrap();
    storage.flush().unwrap();
    assert!(keys(&mut raw).contains("workflow-context:{denied}"));
}

#[test]
fn a_long_value_is_not_read() {
    let server = RedisServer::start();
    let mut raw = raw(&server);
    let key = "workflow-context:{id}";
    let () = raw.setrange(key, 100 * 1024 * 1024, "junk").unwrap();
    let proxy = Proxy::before(&server);
    let connected = RedisBackend::connect(&proxy.url()).unwrap();
    let connected = connected.with_response_timeout(PATIENCE);
    assert_eq!(connected.get("id").unwrap(), None);
    let other = claim("other", &record(PARENT));
    let outcomes = connected
        .write(&[claim("id", &record(PARENT)), other])
        .unwrap();
    assert!(matches!(
        outcomes[..],
        [WriteOutcome::Unreadable, WriteOutcome::Done]
    ));
    assert_eq!(connected.malformed(), 2);
    assert!(
        proxy.forwarded() < 1024 * 1024,
        "{} bytes",
        proxy.forwarded()
    );
    assert!(connected.get("other").unwrap().is_some());
}
