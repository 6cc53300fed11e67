//! The table: who creates it, which ones are refused, and how expired rows leave it.

use super::*;

/// A user who may do nothing but what is granted.
const WORKER: &str = "CREATE USER worker";

const GRANT: &str = "GRANT SELECT, INSERT, UPDATE, DELETE ON workflow_contexts TO worker";

fn worker(server: &PostgresServer) -> PostgresBackend {
    backend_at(&postgres_url("worker", server.port()))
}

#[test]
fn a_worker_without_create_rights_needs_the_table() {
    let server = PostgresServer::start();
    server.sql(WORKER);
    let worker = worker(&server);
    for _ in 0..2 {
        let error = worker.write(&[claim("id", &record(PARENT))]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(r#""public"."workflow_contexts" is missing"#),
            "{text}"
        );
        assert!(text.contains("PostgresBackend::ddl"), "{text}");
    }

    server.sql(&worker.ddl());
    let error = worker.write(&[claim("id", &record(PARENT))]).unwrap_err();
    assert!(error.to_string().contains("permission denied"), "{error}");

    server.sql(GRANT);
    worker.write_all(&[claim("id", &record(PARENT))]).unwrap();
    assert!(worker.get("id").unwrap().is_some());
    worker.flush().unwrap();
    // Enough writes to look for expired rows.
    let writes: Vec<_> = (0..1000).map(|n| Write::Remove(n.to_string())).collect();
    for _ in 0..3 {
        worker.write_all(&writes).unwrap();
    }
}

#[test]
fn the_contract_is_fulfilled_without_create_rights() {
    let server = PostgresServer::start();
    server.sql(WORKER);
    server.sql(&backend(&server).ddl());
    server.sql(GRANT);
    check_backend(|| {
        server.sql("TRUNCATE workflow_contexts");
        worker(&server)
    });
}

#[test]
fn the_table_is_where_it_was_asked_for() {
    let server = PostgresServer::start();
    let backend = backend(&server).schema("a \"schema").table("O'Brien; --");
    let error = StorageBackend::connect(&backend).unwrap_err();
    assert!(
        error
            .to_string()
            .contains(r#"schema "a "schema" does not exist"#),
        "{error}"
    );
    server.sql(r#"CREATE SCHEMA "a ""schema""#);
    backend.write_all(&[claim("id", &record(PARENT))]).unwrap();
    let count = r#"SELECT count(*) FROM "a ""schema"."O'Brien; --""#;
    assert_eq!(server.sql(count), "1");
    assert!(format!("{backend:?}").contains("O'Brien"));
}

#[test]
fn many_workers_create_one_table() {
    let server = PostgresServer::start();
    let backends = [0; 8].map(|_| backend(&server));
    at_once(8, |thread| {
        backends[thread]
            .write_all(&[claim("id", &record(PARENT))])
            .unwrap();
    });
    assert_eq!(server.sql("SELECT count(*) FROM workflow_contexts"), "1");
}

#[test]
fn an_unlogged_table_is_one() {
    let server = PostgresServer::start();
    let persistence = "SELECT relpersistence FROM pg_class WHERE relname = 'workflow_contexts'";
    for (unlogged, expected) in [(true, "u"), (false, "p")] {
        server.sql("DROP TABLE IF EXISTS workflow_contexts");
        let backend = backend(&server).unlogged(unlogged);
        backend.write_all(&[claim("id", &record(PARENT))]).unwrap();
        assert_eq!(server.sql(persistence), expected);
    }
}

#[test]
fn a_key_of_any_length_is_the_key_of_its_row() {
    let server = PostgresServer::start();
    let backend = backend(&server);
    let longest = "k".repeat(4095);
    backend
        .write_all(&[
            claim("order-42", &record(PARENT)),
            claim(&longest, &record(PARENT)),
        ])
        .unwrap();
    let by_key =
        "SELECT convert_from(key, 'UTF8') FROM workflow_contexts WHERE id = sha256('order-42')";
    assert_eq!(server.sql(by_key), "order-42");
    let left = "SELECT expires_at - now() BETWEEN interval '59 minutes' AND interval '1 hour' FROM workflow_contexts";
    assert_eq!(server.sql(left), "t\nt");
    assert_eq!(
        server.sql("SELECT max(octet_length(record)) <= 64 FROM workflow_contexts"),
        "t"
    );
}

#[test]
fn rows_of_others_with_any_expiry_are_read() {
    let server = PostgresServer::start();
    let backend = backend(&server);
    StorageBackend::connect(&backend).unwrap();
    let insert = |key: &str, columns: &str, values: &str| {
        server.sql(&format!(
            "INSERT INTO workflow_contexts (key, context{columns}) \
             VALUES ('{key}', '{{\"traceparent\": \"{PARENT}\"}}'{values})"
        ));
    };
    insert("default", "", "");
    insert("endless", ", expires_at", ", 'infinity'");
    insert("long gone", ", expires_at", ", '-infinity'");
    let left = |key: &str| {
        let found = backend.get(key).unwrap()?;
        assert_eq!(found.context.traceparent(), PARENT);
        Some(found.expires_at.duration_since(SystemTime::now()).unwrap())
    };
    let hours = |hours: u64| Duration::from_secs(hours * 3600);
    assert!(left("default").is_some_and(|left| left > hours(23) && left <= hours(24)));
    assert!(left("endless").is_some_and(|left| left > hours(100 * 365 * 24)));
    assert_eq!(left("long gone"), None);
    let outcomes = ["default", "endless", "long gone"].map(|key| claim(key, &record(PARENT)));
    let outcomes = backend.write_all(&outcomes).unwrap();
    let won: Vec<_> = outcomes.iter().map(|o| o.existing().is_none()).collect();
    assert_eq!(won, [false, false, true]);
}

#[test]
fn expired_rows_are_deleted_beside_later_writes() {
    let server = PostgresServer::start();
    let backend = backend(&server);
    let gone = SystemTime::now() - Duration::from_secs(1);
    let mut record = record(PARENT);
    let lasting: Vec<_> = (0..100)
        .map(|n| claim(&format!("lasting {n}"), &record))
        .collect();
    record.expires_at = gone;
    let passing: Vec<_> = (0..5000)
        .map(|n| claim(&format!("passing {n}"), &record))
        .collect();
    backend.write_all(&passing).unwrap();
    backend.write_all(&lasting).unwrap();
    // Locked rows are left for later.
    let lock = "SELECT 1 FROM workflow_contexts WHERE key = 'passing 7' FOR UPDATE";
    let locked = server.transaction(lock);
    let nobody: Vec<_> = (0..1000)
        .map(|n| Write::Remove(format!("nobody {n}")))
        .collect();
    let rows_become = |rows: &str| {
        wait_until("expired rows are deleted", || {
            backend.write_all(&nobody).unwrap();
            server.sql("SELECT count(*) FROM workflow_contexts") == rows
        });
    };
    rows_become("101");
    drop(locked);
    rows_become("100");
}

#[test]
fn one_worker_at_a_time_deletes_expired_rows() {
    let server = PostgresServer::start();
    let backend = backend(&server);
    let mut passing = record(PARENT);
    passing.expires_at = SystemTime::now() - Duration::from_secs(1);
    let passing: Vec<_> = (0..1000).map(|n| claim(&n.to_string(), &passing)).collect();
    backend.write_all(&passing).unwrap();
    let nobody: Vec<_> = (0..1000)
        .map(|n| Write::Remove(format!("nobody {n}")))
        .collect();
    let count = || server.sql("SELECT count(*) FROM workflow_contexts");

    // As another worker has it while it deletes. Nobody waits for it.
    let turn = r#"SELECT pg_advisory_xact_lock(hashtextextended('purge "public"."workflow_contexts"', 0))"#;
    let others = server.transaction(turn);
    for _ in 0..5 {
        backend.write_all(&nobody).unwrap();
    }
    assert_eq!(count(), "1000");
    drop(others);
    wait_until("expired rows are deleted", || {
        backend.write_all(&nobody).unwrap();
        count() == "0"
    });
}

/// Who asks for a key that is taken writes no row.
#[test]
fn claims_that_lose_leave_no_dead_rows() {
    let server = PostgresServer::start_with(&["autovacuum=off"]);
    let [one, other] = [0, 1].map(|_| backend(&server));
    let claims: Vec<_> = (0..500)
        .map(|n| claim(&n.to_string(), &record(PARENT)))
        .collect();
    one.write_all(&claims).unwrap();
    let lost = other.write_all(&claims).unwrap();
    assert!(lost.iter().all(|outcome| outcome.existing().is_some()));
    other
        .write_all(&[claim("the last", &record(PARENT))])
        .unwrap();
    drop((one, other));
    // The server's counters come late.
    wait_until("the claims are counted", || {
        server.sql(
            "SELECT n_tup_ins, n_tup_upd, n_tup_del, n_dead_tup FROM pg_stat_user_tables WHERE relname = 'workflow_contexts'",
        ) == "501|0|0|0"
    });
}

/// An index on the expiry would make each move of it write to every index.
#[test]
fn a_moved_expiry_writes_to_no_index() {
    let server = PostgresServer::start_with(&["autovacuum=off"]);
    let backend = backend(&server);
    let ids: Vec<_> = (0..1000).map(|n| n.to_string()).collect();
    let claims: Vec<_> = ids.iter().map(|id| claim(id, &record(PARENT))).collect();
    backend.write_all(&claims).unwrap();
    // As workers do, a few at a time.
    for some in ids.chunks(100) {
        let in_an_hour = SystemTime::now() + Duration::from_secs(3600);
        let moves: Vec<_> = some
            .iter()
            .step_by(10)
            .map(|id| Write::Expire(id.clone(), in_an_hour))
            .collect();
        backend.write_all(&moves).unwrap();
    }
    let counts = || {
        server.sql(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'workflow_contexts'",
        )
    };
    // The server's counters come late.
    wait_until(
        "the moves are counted, all of them within their blocks",
        || counts() == "100|100",
    );
}
