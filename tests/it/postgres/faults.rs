//! A server failure costs continuity for a while, and nothing else; behind PgBouncer too.

use std::fs;
use std::sync::Mutex;

use super::*;

every_way![
    a_server_that_is_stopped,
    a_server_that_is_frozen,
    a_server_that_is_slow,
    a_server_that_is_too_slow_for_many_rows_at_once,
    a_table_that_is_dropped,
    a_table_of_another_version_or_program_is_refused_and_kept,
    a_server_that_becomes_read_only,
    a_read_only_server_is_read_and_not_written,
    a_connection_closed_by_the_server_is_replaced,
    a_connection_that_is_killed_at_work,
    a_server_that_is_restarted_and_empty,
    a_wrong_password_is_told_and_not_repeated,
    a_full_disk_is_told_and_recovered_from,
    a_table_that_cannot_grow_is_told_and_recovered_from,
    a_disk_that_is_full_for_a_while,
    a_statement_is_given_up_by_the_server_in_time,
    a_standby_is_read_and_is_written_to_once_it_is_promoted,
    a_primary_whose_standby_is_promoted,
    a_standby_without_the_table_says_so,
    an_unlogged_table_is_empty_after_a_failover,
];

const TIMEOUT: Duration = Duration::from_millis(250);

fn at(route: &Route) -> PostgresBackend {
    at_url(&route.url(), route)
}

/// A backend of another URL, by the same way.
fn at_url(url: &str, route: &Route) -> PostgresBackend {
    backend_at(url).direct(route.owns_sessions)
}

/// A backend whose calls fail soon.
fn hasty(route: &Route) -> PostgresBackend {
    in_haste(at(route))
}

fn in_haste(backend: PostgresBackend) -> PostgresBackend {
    backend.connect_timeout(TIMEOUT).response_timeout(TIMEOUT)
}

/// Makes the backend of another worker.
fn other(server: &Mutex<PostgresServer>) -> impl FnOnce() -> PostgresBackend {
    || backend(&server.lock().unwrap())
}

/// A server, locked for each use, and the way to it.
fn server(way: Way) -> (Mutex<PostgresServer>, Route) {
    let server = PostgresServer::start();
    let route = way.to(&server);
    (Mutex::new(server), route)
}

/// Lets new transactions of a server only read, or write again.
fn set_read_only(server: &PostgresServer, read_only: bool) {
    server.sql(&format!(
        "ALTER SYSTEM SET default_transaction_read_only = {read_only}"
    ));
    server.sql("SELECT pg_reload_conf()");
}

fn a_server_that_is_stopped(way: Way) {
    let (server, route) = server(way);
    let (stop, start) = (
        || server.lock().unwrap().stop(),
        || server.lock().unwrap().start_again(),
    );
    under_load("stopped", hasty(&route), other(&server), stop, start)
        .assert_never_waits_for(TIMEOUT, "stopped");
}

fn a_server_that_is_frozen(way: Way) {
    let (server, route) = server(way);
    let (freeze, thaw) = (
        || server.lock().unwrap().freeze(),
        || server.lock().unwrap().thaw(),
    );
    under_load("frozen", hasty(&route), other(&server), freeze, thaw)
        .assert_never_waits_for(TIMEOUT, "frozen");
}

fn a_server_that_is_slow(way: Way) {
    let server = Mutex::new(PostgresServer::start());
    let proxy = Proxy::before(&*server.lock().unwrap());
    let route = way.to_port(proxy.port(), &[]);
    let (spoil, mend) = (
        || proxy.set_replies(Replies::Delay(Duration::from_millis(600))),
        || proxy.set_replies(Replies::Forward),
    );
    under_load("slow", hasty(&route), other(&server), spoil, mend)
        .assert_never_waits_for(TIMEOUT, "slow");
}

/// All at once, they take three times as long as a call may.
fn a_server_that_is_too_slow_for_many_rows_at_once(way: Way) {
    const ROWS: usize = 400;
    let server = PostgresServer::start();
    let backend = backend(&server);
    StorageBackend::connect(&backend).unwrap();
    server.sql(
        "CREATE FUNCTION take_time() RETURNS trigger LANGUAGE plpgsql AS \
             'BEGIN PERFORM pg_sleep(0.002); RETURN NEW; END'; \
         CREATE TRIGGER slow BEFORE INSERT ON workflow_contexts FOR EACH ROW EXECUTE FUNCTION take_time()",
    );
    let route = way.to(&server);
    let storage = patient(hasty(&route)).build().expect("sound settings");
    for row in 0..ROWS {
        storage
            .store(&row.to_string(), record(PARENT).context)
            .unwrap();
    }
    wait_until("all are written", || storage.flush().is_ok());
    let rows = server.sql("SELECT count(*) FROM workflow_contexts");
    assert_eq!(rows, ROWS.to_string());
    let stats = storage.stats();
    assert_eq!(stats.dropped_writes, 0);
    assert!(stats.backend_errors > 0, "some groups were too large");
}

fn a_table_that_is_dropped(way: Way) {
    let (server, route) = server(way);
    let sql = |sql: &str| server.lock().unwrap().sql(sql);
    // The failure makes the next call create it. So may an earlier one, as on a busy machine, and then nobody sees the first drop.
    let drop_it = || {
        for _ in 0..2 {
            sql("DROP TABLE IF EXISTS workflow_contexts");
            let there = "SELECT to_regclass('workflow_contexts') IS NOT NULL";
            wait_until("it is created again", || sql(there).trim() == "t");
        }
    };
    under_load("dropped", hasty(&route), other(&server), drop_it, || ())
        .assert_never_waits_for(TIMEOUT, "dropped");
}

fn a_table_of_another_version_or_program_is_refused_and_kept(way: Way) {
    let server = PostgresServer::start();
    let route = way.to(&server);
    let change = |sql: &str| server.sql(sql);
    for (sql, found) in [
        ("CREATE TABLE workflow_contexts (id int)", r#""""#),
        ("COMMENT ON TABLE workflow_contexts IS 'orders'", "orders"),
        (
            "COMMENT ON TABLE workflow_contexts IS 'tracing-workflow-context, format 2'",
            "format 2",
        ),
    ] {
        change(sql);
        let backend = at(&route);
        for _ in 0..2 {
            for error in [
                backend.get("id").unwrap_err(),
                backend.write(&[claim("id", &record(PARENT))]).unwrap_err(),
                StorageBackend::connect(&backend).unwrap_err(),
            ] {
                let text = error.to_string();
                assert!(text.contains(found) && text.contains("format 1"), "{text}");
            }
        }
    }
    let columns = "SELECT string_agg(attname, ',') FROM pg_attribute \
        WHERE attrelid = 'workflow_contexts'::regclass AND attnum > 0";
    assert_eq!(change(columns), "id");
}

fn a_server_that_becomes_read_only(way: Way) {
    let (server, route) = server(way);
    let set = |read_only| set_read_only(&server.lock().unwrap(), read_only);
    under_load(
        "read-only",
        hasty(&route),
        other(&server),
        || set(true),
        || set(false),
    )
    .assert_never_waits_for(TIMEOUT, "read-only");
}

fn a_connection_closed_by_the_server_is_replaced(way: Way) {
    let mut server = PostgresServer::start();
    let route = way.to(&server);
    let backend = at(&route);
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
    // PgBouncer lets clients wait for a server that is away.
    let impatient = in_haste(backend.clone());
    assert!(impatient.get("id").is_err());
    assert!(impatient.flush().is_err());
    server.start_again();
    wait_until("it is reached again", || backend.get("id").is_ok());
}

fn a_connection_that_is_killed_at_work(way: Way) {
    let server = PostgresServer::start();
    let route = way.to(&server);
    let backend = at(&route);
    StorageBackend::connect(&backend).unwrap();
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

fn a_server_that_is_restarted_and_empty(way: Way) {
    let mut server = PostgresServer::start();
    let route = way.to(&server);
    let storage = patient(at(&route)).build();
    let worker = Worker::with_storage(storage.expect("sound settings"));
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

/// The pooler knows the same users, and is the one who refuses them.
fn a_wrong_password_is_told_and_not_repeated(way: Way) {
    let server = PostgresServer::start_on(&[], |data| {
        let rules =
            "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        fs::write(data.join("pg_hba.conf"), rules).expect("a file");
    });
    let password = "right @ password";
    server.sql(&format!(
        "CREATE USER worker PASSWORD '{password}' SUPERUSER"
    ));
    let route = way.to_port(server.port(), &[("worker", password)]);
    let with = |password: &str| {
        at_url(
            &postgres_url(&format!("worker:{password}"), route.port()),
            &route,
        )
    };
    let wrong = with("wrong%20secret");
    for _ in 0..2 {
        let error = wrong.get("id").unwrap_err();
        assert!(
            error.to_string().contains("authentication failed"),
            "{error}"
        );
        assert!(!format!("{error:?} {wrong:?} {}", text_of(&error)).contains("secret"));
    }
    let right = with("right%20%40%20password");
    right.write_all(&[claim("id", &record(PARENT))]).unwrap();
    assert!(!format!("{right:?}").contains("password"));
}

fn a_read_only_server_is_read_and_not_written(way: Way) {
    let server = PostgresServer::start();
    set_read_only(&server, true);
    let route = way.to(&server);
    let backend = at(&route);
    let error = backend.get("id").unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
    assert!(error.to_string().contains("is missing"), "{error}");

    server.sql(&format!("SET TRANSACTION READ WRITE; {}", backend.ddl()));
    assert_eq!(backend.get("id").unwrap(), None);
    let error = backend.write(&[claim("id", &record(PARENT))]).unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
}

/// As after a failover: the first server of the URL no longer takes writes. Not pooled: a URL of several poolers has the
/// client choose among servers that it does not see, and a pooler accepts clients while its server is away.
#[test]
fn the_server_of_several_that_can_be_written_to_is_used() {
    let [one, other] = [0, 1].map(|_| PostgresServer::start());
    set_read_only(&other, true);
    let backend = backend_at(&url_of_both(&one, &other));
    backend.write_all(&[claim("id", &record(PARENT))]).unwrap();
    assert_eq!(one.sql("SELECT count(*) FROM workflow_contexts"), "1");

    set_read_only(&one, true);
    set_read_only(&other, false);
    wait_until("the other one is written to", || {
        backend.write_all(&[claim("id", &record(PARENT))]).is_ok()
            && other.sql("SELECT to_regclass('workflow_contexts') IS NOT NULL") == "t"
    });
}

/// Returns a URL of which the first server is used that can be written to.
fn url_of_both(one: &PostgresServer, other: &PostgresServer) -> String {
    format!(
        "postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres?target_session_attrs=read-write",
        one.port(),
        other.port()
    )
}

/// A server on a tablespace of 4 MiB, see [`PostgresServer::start_on_a_small_disk`] for what that needs.
fn a_full_disk_is_told_and_recovered_from(way: Way) {
    let server = PostgresServer::start_on_a_small_disk(4 << 20);
    assert_a_full_disk_is_told_and_recovered_from(way, &server);
}

/// A file that may not grow stands for a full disk, where no small one can be mounted.
fn a_table_that_cannot_grow_is_told_and_recovered_from(way: Way) {
    // More than a segment of the log.
    let server = PostgresServer::start_with_files_of(2_500_000);
    assert_a_full_disk_is_told_and_recovered_from(way, &server);
}

fn assert_a_full_disk_is_told_and_recovered_from(way: Way, server: &PostgresServer) {
    server.sql("CREATE TABLE reserve AS SELECT repeat('x', 2000) FROM generate_series(1, 500)");
    let route = way.to(server);
    let backend = at(&route);
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

fn a_disk_that_is_full_for_a_while(way: Way) {
    let server = PostgresServer::start_on_a_small_disk(4 << 20);
    let route = way.to(&server);
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
    under_load("full", hasty(&route), other(&server), fill, make_room)
        .assert_never_waits_for(TIMEOUT, "full");
}

/// A streaming standby takes no writes until it is promoted. Meanwhile spans find what it has, and the rest waits.
fn a_standby_is_read_and_is_written_to_once_it_is_promoted(way: Way) {
    let primary = PostgresServer::start();
    let on_primary = backend(&primary);
    on_primary
        .write_all(&[claim("early", &record(PARENT))])
        .unwrap();
    let standby = PostgresServer::start_standby_of(&primary, &[]);
    assert_eq!(standby.sql("SELECT pg_is_in_recovery()"), "t");

    let route = way.to(&standby);
    let on_standby = || at(&route);
    let worker = Worker::with_storage(patient(on_standby()).build().expect("sound settings"));
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
        on_standby().get("streamed").unwrap().is_some()
    });

    let late = step("late").span_context.trace_id();
    let of_flush = worker.storage.flush().unwrap_err();
    let of_write = on_standby().write(&[claim("id", &record(PARENT))]);
    let address = format!("127.0.0.1:{}", route.port());
    for text in [text_of(&of_flush), text_of(&of_write.unwrap_err())] {
        assert!(
            text.contains("read-only") && text.contains(&address),
            "{text}"
        );
    }
    assert!(worker.storage.stats().backend_errors > 0);
    assert_eq!(step("late").span_context.trace_id(), late, "memory has it");
    assert!(on_primary.get("late").unwrap().is_none());

    standby.sql("SELECT pg_promote()");
    wait_until("what waited is written", || worker.storage.flush().is_ok());
    let written = backend(&standby).get("late").unwrap().expect("a record");
    assert_eq!(written.context.trace_id(), late);
    assert_eq!(worker.storage.stats().dropped_writes, 0);
}

/// What a storage meets whose URL names a primary and its standby, or a pooler that is then led to the standby.
fn a_primary_whose_standby_is_promoted(way: Way) {
    let primary = PostgresServer::start();
    let standby = PostgresServer::start_standby_of(&primary, &[]);
    let route = way.to(&primary);
    let url = match &route.pooler {
        Some(_) => route.url(),
        None => url_of_both(&primary, &standby),
    };
    let promote = || {
        standby.sql("SELECT pg_promote()");
        if let Some(pooler) = &route.pooler {
            pooler.lead_to(&standby);
        }
    };
    let primary = Mutex::new(primary);
    under_load(
        "failed over",
        in_haste(at_url(&url, &route)),
        || at_url(&url, &route),
        || primary.lock().unwrap().stop(),
        promote,
    )
    .assert_never_waits_for(TIMEOUT, "failed over");
    assert_ne!(standby.sql("SELECT count(*) FROM workflow_contexts"), "0");
}

fn a_standby_without_the_table_says_so(way: Way) {
    let primary = PostgresServer::start();
    // No standby can do what that asks for.
    let settings = ["default_transaction_isolation=serializable"];
    let standby = PostgresServer::start_standby_of(&primary, &settings);
    let route = way.to(&standby);
    let on_standby = at(&route);
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
fn an_unlogged_table_is_empty_after_a_failover(way: Way) {
    let primary = PostgresServer::start();
    backend(&primary)
        .unlogged(true)
        .write_all(&[claim("id", &record(PARENT))])
        .unwrap();
    let standby = PostgresServer::start_standby_of(&primary, &[]);
    let route = way.to(&standby);
    let on_standby = at(&route).unlogged(true);
    let error = on_standby.get("id").unwrap_err();
    assert!(error.to_string().contains("unlogged"), "{error}");
    standby.sql("SELECT pg_promote()");
    assert!(on_standby.get("id").unwrap().is_none());
    on_standby
        .write_all(&[claim("id", &record(PARENT))])
        .unwrap();
}

/// A lookup that waits for a lock, as during `VACUUM FULL`, ends on the server too.
fn a_statement_is_given_up_by_the_server_in_time(way: Way) {
    let server = PostgresServer::start();
    let route = way.to(&server);
    let backend = at(&route);
    wait_until("the table is there", || {
        StorageBackend::connect(&backend).is_ok()
    });
    let backend = at(&route).response_timeout(Duration::from_millis(100));
    let waiting = || {
        let waits = "wait_event_type = 'Lock' AND application_name = 'tracing-workflow-context'";
        server.sql(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE {waits}"
        ))
    };
    let locked = server.transaction("LOCK TABLE workflow_contexts");
    wait_until("a lookup is refused", || backend.get("id").is_err());
    for _ in 0..5 {
        assert!(backend.get("id").is_err());
    }
    wait_until("nobody waits for the lock", || waiting() == "0");
    drop(locked);
    wait_until("lookups succeed again", || backend.get("id").is_ok());
}
