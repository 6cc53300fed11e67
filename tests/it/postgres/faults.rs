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
    // The failure makes the next call create it. So may an earlier one, as on a busy machine, and then nobody sees the first drop.
    let drop_it = || {
        for _ in 0..2 {
            sql("DROP TABLE IF EXISTS workflow_contexts");
            let there = "SELECT to_regclass('workflow_contexts') IS NOT NULL";
            wait_until("it is created again", || sql(there).trim() == "t");
        }
    };
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
fn a_pooler_whose_server_is_frozen() {
    let (server, _) = server();
    let pooler = PgBouncer::before(&server.lock().unwrap(), 3);
    let (freeze, thaw) = (
        || server.lock().unwrap().freeze(),
        || server.lock().unwrap().thaw(),
    );
    under_load("pooled", hasty(pooler.url()), other(&server), freeze, thaw)
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
    assert_survives_killed_connections(&server, &backend(&server));
}

#[test]
fn a_connection_of_a_pooler_that_is_killed_at_work() {
    let server = PostgresServer::start();
    let pooler = PgBouncer::before(&server, 3);
    assert_survives_killed_connections(&server, &backend_at(pooler.url()));
}

fn assert_survives_killed_connections(server: &PostgresServer, backend: &PostgresBackend) {
    StorageBackend::connect(backend).unwrap();
    std::thread::scope(|scope| {
        let killing = scope.spawn(|| {
            for _ in 0..20 {
                server.sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                     WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
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
    let server = PostgresServer::start_on(&[], |data| {
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

/// A server on a tablespace of 4 MiB, see [`PostgresServer::start_on_a_small_disk`] for what that needs.
#[test]
fn a_full_disk_is_told_and_recovered_from() {
    let server = PostgresServer::start_on_a_small_disk(4 << 20);
    assert_a_full_disk_is_told_and_recovered_from(&server);
}

/// A file that may not grow stands for a full disk, where no small one can be mounted.
#[test]
fn a_table_that_cannot_grow_is_told_and_recovered_from() {
    // More than a segment of the log.
    let server = PostgresServer::start_with_files_of(2_500_000);
    assert_a_full_disk_is_told_and_recovered_from(&server);
}

fn assert_a_full_disk_is_told_and_recovered_from(server: &PostgresServer) {
    server.sql("CREATE TABLE reserve AS SELECT repeat('x', 2000) FROM generate_series(1, 500)");
    let backend = backend(server);
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
    assert!(
        !error.is_partial(),
        "the storage keeps what it could not write"
    );
    assert!(backend.get("first").unwrap().is_some(), "it is still read");
    // What replaces the table's files needs some room too.
    server.sql("DROP TABLE reserve");
    server.sql("TRUNCATE workflow_contexts");
    write(50).unwrap();
}

#[test]
fn a_disk_that_is_full_for_a_while() {
    let server = PostgresServer::start_on_a_small_disk(4 << 20);
    let url = server.url();
    let server = Mutex::new(server);
    let fill = || {
        let server = server.lock().unwrap();
        server.sql("CREATE TABLE filler (page text)");
        server.sql("ALTER TABLE filler ALTER page SET STORAGE PLAIN");
        // Until not even one more page fits.
        for rows in [100, 10, 1] {
            let page = format!(
                "INSERT INTO filler SELECT repeat('x', 8000) FROM generate_series(1, {rows})"
            );
            while server.try_sql(&page).is_ok() {}
        }
    };
    let make_room = || drop(server.lock().unwrap().sql("DROP TABLE filler"));
    under_load("full", hasty(&url), other(&server), fill, make_room)
        .assert_never_waits_for(TIMEOUT, "full");
}

/// A streaming standby takes no writes until it is promoted. Meanwhile spans find what it has, and the rest waits.
#[test]
fn a_standby_is_read_and_is_written_to_once_it_is_promoted() {
    let primary = PostgresServer::start();
    let on_primary = backend(&primary);
    on_primary
        .write_all(&[claim("early", &record(PARENT))])
        .unwrap();
    let standby = PostgresServer::start_standby_of(&primary, &[]);
    assert_eq!(standby.sql("SELECT pg_is_in_recovery()"), "t");

    let worker = Worker::with_storage(patient(backend(&standby)).build().expect("sound settings"));
    let step = |id: &str| {
        worker.run(|| tracing::info_span!("step", workflow.instance_id = id).in_scope(|| {}));
        worker.spans().pop().expect("a span")
    };
    let parent = record(PARENT).context;
    assert_eq!(step("early").span_context.trace_id(), parent.trace_id());
    // What the primary commits is streamed to it.
    on_primary
        .write_all(&[claim("streamed", &record(PARENT))])
        .unwrap();
    wait_until("it is streamed", || {
        backend(&standby).get("streamed").unwrap().is_some()
    });

    let late = step("late").span_context.trace_id();
    assert!(worker.storage.flush().is_err());
    let error = backend(&standby).write(&[claim("id", &record(PARENT))]);
    let text = error.unwrap_err().to_string();
    let address = format!("127.0.0.1:{}", standby.port());
    assert!(
        text.contains("read-only") && text.contains(&address),
        "{text}"
    );
    assert!(worker.storage.stats().backend_errors > 0);
    assert_eq!(step("late").span_context.trace_id(), late, "memory has it");
    assert!(on_primary.get("late").unwrap().is_none());

    standby.sql("SELECT pg_promote()");
    wait_until("what waited is written", || worker.storage.flush().is_ok());
    let written = backend(&standby).get("late").unwrap().expect("a record");
    assert_eq!(written.context.trace_id(), late);
    assert_eq!(worker.storage.stats().dropped_writes, 0);
}

/// What a storage meets whose URL names a primary and its standby.
#[test]
fn a_primary_whose_standby_is_promoted() {
    let primary = PostgresServer::start();
    let standby = PostgresServer::start_standby_of(&primary, &[]);
    let url = format!(
        "postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres?target_session_attrs=read-write",
        primary.port(),
        standby.port()
    );
    let primary = Mutex::new(primary);
    under_load(
        "failed over",
        hasty(&url),
        || backend_at(&url),
        || primary.lock().unwrap().stop(),
        || drop(standby.sql("SELECT pg_promote()")),
    )
    .assert_never_waits_for(TIMEOUT, "failed over");
    assert_ne!(standby.sql("SELECT count(*) FROM workflow_contexts"), "0");
}

#[test]
fn a_standby_without_the_table_says_so() {
    let primary = PostgresServer::start();
    // No standby can do what that asks for.
    let settings = ["default_transaction_isolation=serializable"];
    let standby = PostgresServer::start_standby_of(&primary, &settings);
    let on_standby = backend(&standby);
    for _ in 0..2 {
        let text = on_standby.get("id").unwrap_err().to_string();
        assert!(text.contains("is missing"), "{text}");
        assert!(text.contains("PostgresBackend::ddl"), "{text}");
    }
    let on_primary = backend(&primary);
    on_primary
        .write_all(&[claim("id", &record(PARENT))])
        .unwrap();
    wait_until("it is streamed", || {
        on_standby.get("id").is_ok_and(|found| found.is_some())
    });
}

/// Replicas do not get the rows of an unlogged table.
#[test]
fn an_unlogged_table_is_empty_after_a_failover() {
    let primary = PostgresServer::start();
    let unlogged = |server| backend(server).unlogged(true);
    unlogged(&primary)
        .write_all(&[claim("id", &record(PARENT))])
        .unwrap();
    let standby = PostgresServer::start_standby_of(&primary, &[]);
    let on_standby = unlogged(&standby);
    let error = on_standby.get("id").unwrap_err();
    assert!(error.to_string().contains("unlogged"), "{error}");
    standby.sql("SELECT pg_promote()");
    assert!(on_standby.get("id").unwrap().is_none());
    on_standby
        .write_all(&[claim("id", &record(PARENT))])
        .unwrap();
}
