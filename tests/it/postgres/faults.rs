//! A server failure under load costs continuity for a while, and nothing else.

use std::fs;
use std::sync::Mutex;

use super::*;

const TIMEOUT: Duration = Duration::from_millis(250);

/// A backend whose calls fail soon.
fn hasty(url: &str) -> PostgresBackend {
    let backend = PostgresBackend::connect(url).expect("a URL");
    backend.connect_timeout(TIMEOUT).response_timeout(TIMEOUT)
}

/// Makes the backend of another worker.
fn other(server: &Mutex<PostgresServer>) -> impl FnOnce() -> PostgresBackend {
    || backend(&server.lock().unwrap())
}

/// A server, locked for each use, and its URL.
fn server() -> (Mutex<PostgresServer>, String) {
    let server = PostgresServer::start();
    let url = server.url();
    (Mutex::new(server), url)
}

#[test]
fn a_server_that_is_stopped() {
    let (server, url) = server();
    let (stop, start) = (
        || server.lock().unwrap().stop(),
        || server.lock().unwrap().start_again(),
    );
    under_load("stopped", hasty(&url), other(&server), stop, start)
        .assert_never_waits_for(TIMEOUT, "stopped");
}

#[test]
fn a_server_that_is_frozen() {
    let (server, url) = server();
    let (freeze, thaw) = (
        || server.lock().unwrap().freeze(),
        || server.lock().unwrap().thaw(),
    );
    under_load("frozen", hasty(&url), other(&server), freeze, thaw)
        .assert_never_waits_for(TIMEOUT, "frozen");
}

#[test]
fn a_server_that_is_slow() {
    let (server, _) = server();
    let proxy = Proxy::before(&*server.lock().unwrap());
    let (spoil, mend) = (
        || proxy.set_replies(Replies::Delay(Duration::from_millis(600))),
        || proxy.set_replies(Replies::Forward),
    );
    under_load("slow", hasty(&proxy.url()), other(&server), spoil, mend)
        .assert_never_waits_for(TIMEOUT, "slow");
}

#[test]
fn a_table_that_is_dropped() {
    let (server, url) = server();
    let sql = |sql: &str| server.lock().unwrap().sql(sql);
    let drop_it = || drop(sql("DROP TABLE workflow_contexts"));
    // The failure makes the next call create it.
    under_load("dropped", hasty(&url), other(&server), drop_it, || ())
        .assert_never_waits_for(TIMEOUT, "dropped");
}

#[test]
fn a_server_that_becomes_read_only() {
    let (server, url) = server();
    let set = |read_only: &str| {
        let server = server.lock().unwrap();
        server.sql(&format!(
            "ALTER SYSTEM SET default_transaction_read_only = {read_only}"
        ));
        server.sql("SELECT pg_reload_conf()");
    };
    under_load(
        "read-only",
        hasty(&url),
        other(&server),
        || set("on"),
        || set("off"),
    )
    .assert_never_waits_for(TIMEOUT, "read-only");
}

#[test]
fn a_pooler_whose_server_is_stopped() {
    let (server, _) = server();
    let pooler = PgBouncer::before(&server.lock().unwrap(), 3);
    let (stop, start) = (
        || server.lock().unwrap().stop(),
        || server.lock().unwrap().start_again(),
    );
    under_load("pooled", hasty(pooler.url()), other(&server), stop, start)
        .assert_never_waits_for(TIMEOUT, "pooled");
}

#[test]
fn a_connection_closed_by_the_server_is_replaced() {
    let mut server = PostgresServer::start();
    let backend = backend(&server);
    for _ in 0..3 {
        backend.write_all(&[claim("id", &record(PARENT))]).unwrap();
        let killed = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
            WHERE application_name = 'tracing-workflow-context'";
        assert_ne!(server.sql(killed), "0");
        assert!(backend.get("id").unwrap().is_some());
        server.start_again();
        assert!(backend.get("id").unwrap().is_some(), "it was committed");
    }
    server.stop();
    assert!(backend.get("id").is_err());
    assert!(backend.flush().is_err());
    server.start_again();
    assert!(backend.get("id").is_ok());
}

#[test]
fn a_connection_that_is_killed_at_work() {
    let server = PostgresServer::start();
    let backend = backend(&server);
    StorageBackend::connect(&backend).unwrap();
    std::thread::scope(|scope| {
        let killing = scope.spawn(|| {
            for _ in 0..20 {
                server.sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                     WHERE application_name = 'tracing-workflow-context'",
                );
            }
        });
        for round in 0.. {
            let key = |n: usize| format!("{round} {n}");
            let writes: Vec<_> = (0..100).map(|n| claim(&key(n), &record(PARENT))).collect();
            // As the storage does: all of them again.
            wait_until("they are written", || backend.write_all(&writes).is_ok());
            assert!(
                backend.get(&key(99)).is_ok_and(|found| found.is_some()) || !killing.is_finished()
            );
            if killing.is_finished() {
                break;
            }
        }
    });
}

#[test]
fn a_server_that_is_restarted_and_empty() {
    let mut server = PostgresServer::start();
    let storage = patient(backend(&server)).build().expect("sound settings");
    let worker = Worker::with_storage(storage);
    let step = |id: &str| {
        worker.run(|| tracing::info_span!("step", workflow.instance_id = id).in_scope(|| {}));
        worker.storage.flush()
    };
    step("early").unwrap();
    server.start_again_empty();
    wait_until("the table is created again", || step("late").is_ok());
    let other = backend(&server);
    assert!(other.get("early").unwrap().is_none());
    assert!(other.get("late").unwrap().is_some());
    assert!(
        worker.storage.get("early").unwrap().is_some(),
        "memory still has it"
    );
}

#[test]
fn a_wrong_password_is_told_and_not_repeated() {
    let server = PostgresServer::start_on(&[], None, |data| {
        let rules =
            "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        fs::write(data.join("pg_hba.conf"), rules).expect("a file");
    });
    server.sql("CREATE USER worker PASSWORD 'right @ password' SUPERUSER");
    let with = |password: &str| backend_at(&server.url_of(&format!("worker:{password}")));
    let wrong = with("wrong%20secret");
    for _ in 0..2 {
        let error = wrong.get("id").unwrap_err();
        assert!(
            error.to_string().contains("password authentication failed"),
            "{error}"
        );
        assert!(!format!("{error:?} {wrong:?} {}", text_of(&error)).contains("secret"));
    }
    let right = with("right%20%40%20password");
    right.write_all(&[claim("id", &record(PARENT))]).unwrap();
    assert!(!format!("{right:?}").contains("password"));
}

#[test]
fn a_read_only_server_is_read_and_not_written() {
    let server = PostgresServer::start();
    server.sql("ALTER SYSTEM SET default_transaction_read_only = on");
    server.sql("SELECT pg_reload_conf()");
    let backend = backend(&server);
    let error = backend.get("id").unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
    assert!(error.to_string().contains("is missing"), "{error}");

    server.sql(&format!("SET TRANSACTION READ WRITE; {}", backend.ddl()));
    assert_eq!(backend.get("id").unwrap(), None);
    let error = backend.write(&[claim("id", &record(PARENT))]).unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
}

/// As after a failover: the first server of the URL no longer takes writes.
#[test]
fn the_server_of_several_that_can_be_written_to_is_used() {
    let [one, other] = [0, 1].map(|_| PostgresServer::start());
    let set = |server: &PostgresServer, read_only: &str| {
        server.sql(&format!(
            "ALTER SYSTEM SET default_transaction_read_only = {read_only}"
        ));
        server.sql("SELECT pg_reload_conf()");
    };
    set(&other, "on");
    let backend = backend_at(&format!(
        "postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres?target_session_attrs=read-write",
        one.port(),
        other.port()
    ));
    backend.write_all(&[claim("id", &record(PARENT))]).unwrap();
    assert_eq!(one.sql("SELECT count(*) FROM workflow_contexts"), "1");

    set(&one, "on");
    set(&other, "off");
    wait_until("the other one is written to", || {
        backend.write_all(&[claim("id", &record(PARENT))]).is_ok()
            && other.sql("SELECT to_regclass('workflow_contexts') IS NOT NULL") == "t"
    });
}

/// A file that may not grow stands for a full disk.
#[test]
fn a_full_disk_is_told_and_recovered_from() {
    // More than a segment of the log.
    let server = PostgresServer::start_with_files_of(2_500_000);
    let backend = backend(&server);
    backend
        .write_all(&[claim("first", &record(PARENT))])
        .unwrap();
    let write = |round: usize| {
        let writes: Vec<_> = (0..1000)
            .map(|n| claim(&format!("{round} {n}"), &record(PARENT)))
            .collect();
        backend.write_all(&writes)
    };
    let refused = (0..50).find_map(|round| write(round).err());
    let error = refused.expect("the table does not fit");
    assert!(
        error.to_string().contains("could not extend file"),
        "{error}"
    );
    assert!(backend.get("first").unwrap().is_some(), "it is still read");
    server.sql("TRUNCATE workflow_contexts");
    write(50).unwrap();
}
