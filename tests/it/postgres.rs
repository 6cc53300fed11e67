//! Workers that share one table of a PostgreSQL database agree, whatever happens to the server.

use std::cell::RefCell;
use std::error::Error as _;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant, SystemTime};

use crate::support::*;
use tracing_workflow_context::backend::{StorageBackend, Write, WriteOutcome};
use tracing_workflow_context::testing::check_backend;
use tracing_workflow_context::{ConnectError, Form, PostgresBackend, StorageError};

/// Makes three tests of each fault: for workers that reach the server itself, for those that make use of it, and for workers
/// behind PgBouncer.
macro_rules! every_way {
    ($($fault:ident),+ $(,)?) => {
        mod direct {
            use crate::support::Way;
            $(#[test] fn $fault() { super::$fault(Way::Direct); })+
        }
        mod own_sessions {
            use crate::support::Way;
            $(#[test] fn $fault() { super::$fault(Way::OwnSessions); })+
        }
        mod pooled {
            use crate::support::Way;
            $(#[test] fn $fault() { super::$fault(Way::Pooled); })+
        }
    };
}

mod faults;
mod interop;
mod race;
mod table;
#[cfg(feature = "postgres-tls")]
mod tls;

fn backend(server: &PostgresServer) -> PostgresBackend {
    backend_at(&server.url())
}

fn backend_at(url: &str) -> PostgresBackend {
    let backend = PostgresBackend::connect(url).expect("a URL");
    backend.connect_timeout(PATIENCE).response_timeout(PATIENCE)
}

/// Returns an error's text with that of its source, as it is logged.
fn text_of(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

/// Runs the contract suite, with a new table for each backend.
fn assert_fulfils_the_contract(form: Form, connect: impl Fn() -> PostgresBackend) {
    let numbers = RefCell::new(0..);
    check_backend(|| {
        let number: u32 = numbers.borrow_mut().next().expect("endless");
        let name = format!("a \"table\"; --{number}");
        connect().with_form(form).table(&name)
    });
}

#[test]
fn postgres_fulfils_the_contract() {
    let server = PostgresServer::start();
    assert_fulfils_the_contract(Form::Binary, || backend(&server));
}

#[test]
fn postgres_fulfils_the_contract_with_json() {
    let server = PostgresServer::start();
    assert_fulfils_the_contract(Form::Json, || backend(&server));
}

#[test]
fn postgres_with_sessions_of_its_own_fulfils_the_contract() {
    let server = PostgresServer::start();
    server.sql("CREATE SCHEMA \"of JSON\"");
    let direct = || backend(&server).direct(true);
    assert_fulfils_the_contract(Form::Binary, direct);
    assert_fulfils_the_contract(Form::Json, || direct().schema("of JSON"));
}

/// Its sessions may have prepared statements of others, which have the same names.
#[test]
fn a_pooler_is_told_from_the_server() {
    let server = PostgresServer::start();
    let pooler = PgBouncer::before(&server);
    let direct = || backend_at(&pooler.url()).direct(true);
    let error = direct().get("id").unwrap_err();
    assert!(error.to_string().contains("startup parameter"), "{error}");
    pooler.ignore("options");
    wait_until("it is told by what it does not pass on", || {
        let error = direct().get("id").unwrap_err().to_string();
        error.contains("PostgresBackend::direct must not be set")
    });
    assert!(backend_at(&pooler.url()).get("id").unwrap().is_none());
}

/// A plan is used for as long as a session lives, which may be long after the table was small.
#[test]
fn a_plan_that_was_made_for_a_small_table_serves_a_large_one() {
    let server = PostgresServer::start_with(&["autovacuum=off"]);
    let backend = backend(&server).direct(true);
    backend.write_all(&[claim("id", &record(PARENT))]).unwrap();
    server.sql("ANALYZE workflow_contexts");
    let look = || assert!(backend.get("id").unwrap().is_some());
    (0..10).for_each(|_| look());
    server.sql(
        "INSERT INTO workflow_contexts (key, record) \
         SELECT n::text::bytea, '' FROM generate_series(1, 50000) AS n",
    );
    (0..1000).for_each(|_| look());
    // The server counts them a moment later.
    let counted = "SELECT idx_scan > 1000 FROM pg_stat_user_tables";
    wait_until("the index was used", || server.sql(counted) == "t");
    let all_read = "SELECT seq_tup_read >= 50000 FROM pg_stat_user_tables";
    assert_eq!(server.sql(all_read), "f");
}

#[test]
fn postgres_behind_pgbouncer_fulfils_the_contract() {
    let server = PostgresServer::start();
    let pooler = PgBouncer::before(&server);
    server.sql("CREATE SCHEMA \"of JSON\"");
    assert_fulfils_the_contract(Form::Binary, || backend_at(&pooler.url()));
    assert_fulfils_the_contract(Form::Json, || backend_at(&pooler.url()).schema("of JSON"));
    // Its connections, which others use too, are as they were.
    for setting in ["statement_timeout", "transaction_isolation"] {
        let show = format!("SHOW {setting}");
        assert_eq!(pooler.sql(&show), server.sql(&show));
    }
    assert_eq!(
        pooler.sql("SELECT count(*) FROM pg_prepared_statements"),
        "0"
    );
}

#[test]
fn a_server_is_reached_by_its_socket() {
    use std::os::unix::fs::PermissionsExt as _;

    let directory = Directory::new();
    let all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(directory.path(), all).expect("a directory");
    let path = directory.path().display().to_string();
    let server = PostgresServer::start_with(&[&format!("unix_socket_directories={path}")]);
    let (encoded, port) = (path.replace('/', "%2F"), server.port());
    for url in [
        format!("postgres://postgres@{encoded}:{port}/postgres"),
        format!("postgres:///postgres?user=postgres&host={path}&port={port}"),
    ] {
        let backend = backend_at(&url);
        backend.write_all(&[claim("id", &record(PARENT))]).unwrap();
        assert!(backend.get("id").unwrap().is_some());
        assert!(format!("{backend:?}").contains(&path), "{backend:?}");
    }
}

/// The server of another user's database, with other defaults.
#[test]
fn other_defaults_of_the_server_change_nothing() {
    let settings = [
        "default_transaction_isolation=serializable",
        "bytea_output=escape",
        "datestyle=German",
        "intervalstyle=sql_standard",
        "timezone=Pacific/Chatham",
        "standard_conforming_strings=off",
        "search_path=pg_catalog",
    ];
    let server = PostgresServer::start_with(&settings);
    server.sql("CREATE SCHEMA direct");
    assert_fulfils_the_contract(Form::Json, || backend(&server));
    assert_fulfils_the_contract(Form::Json, || {
        backend(&server).direct(true).schema("direct")
    });
}

#[test]
fn either_form_is_read_whichever_is_written() {
    let server = PostgresServer::start();
    let [binary, json] = [Form::Binary, Form::Json].map(|form| backend(&server).with_form(form));
    let record = record(PARENT);
    for (writer, reader) in [(&binary, &json), (&json, &binary)] {
        writer
            .write_all(&[Write::Put("id".to_owned(), record.clone())])
            .unwrap();
        let found = reader.get("id").unwrap().expect("a record");
        assert_eq!(found.context.traceparent(), PARENT);
        let outcome = reader.write_all(&[claim("id", &record)]).unwrap().remove(0);
        let existing = outcome.existing().expect("it is taken");
        assert_eq!(existing.context.traceparent(), PARENT);
    }
    assert_eq!((binary.malformed(), json.malformed()), (0, 0));
    assert_eq!(
        server.sql("SELECT record IS NULL, context IS NULL FROM workflow_contexts"),
        "t|f"
    );
}

/// `jsonb` has no NUL.
#[test]
fn a_nul_is_stored_in_the_binary_form() {
    let server = PostgresServer::start();
    let json = backend(&server).with_form(Form::Json);
    let without = record(PARENT);
    let mut record = without.clone();
    record.run_id = Some("run \0".to_owned());
    json.write_all(&[claim("id", &record), claim("other", &without)])
        .unwrap();
    assert_eq!(
        json.get("id").unwrap().expect("a record").run_id,
        record.run_id
    );
    let forms =
        "SELECT string_agg((context IS NULL)::text, ',' ORDER BY key) FROM workflow_contexts";
    assert_eq!(server.sql(forms), "true,false");
}

#[test]
fn rows_that_cannot_be_decoded_are_counted_and_left_alone() {
    let server = PostgresServer::start();
    let first = backend(&server);
    StorageBackend::connect(&first).unwrap();
    let record = record(PARENT);
    let values = [
        ("record", r"''"),
        ("record", r"'\x00'"),
        ("record", r"'\x01ff'"),
        ("context", "'[]'"),
        ("context", "'7'"),
        ("context", "'null'"),
        ("context", r#"'"text"'"#),
        ("context", r#"'{"traceparent": null}'"#),
    ];
    for (column, value) in values {
        let backend = backend(&server);
        server.sql(&format!(
            "DELETE FROM workflow_contexts; INSERT INTO workflow_contexts (key, {column}) VALUES ('id', {value})"
        ));
        assert_eq!(backend.get("id").unwrap(), None, "{value}");
        backend
            .scan(&mut |key, record| panic!("{key} {record:?}"))
            .unwrap();
        assert_eq!(backend.malformed(), 2);

        // With other writes around it.
        let writes = [
            claim("other", &record),
            claim("id", &record),
            claim("id", &record),
        ];
        let outcomes = backend.write_all(&writes).unwrap();
        use WriteOutcome::{Done, Unreadable};
        assert!(
            matches!(outcomes[..], [Done, Unreadable, Unreadable]),
            "{value}: {outcomes:?}"
        );
        assert_eq!(backend.malformed(), 4);
        let there = server.sql(&format!(
            "SELECT {column} = {value} FROM workflow_contexts WHERE key = 'id'"
        ));
        assert_eq!(there, "t", "{value}");
        // A call decides what is stored.
        backend
            .write_all(&[Write::Put("id".to_owned(), record.clone())])
            .unwrap();
        let found = backend.get("id").unwrap().expect("it was replaced");
        assert_eq!(found.context, record.context);
    }
    // A key that is no text.
    server.sql(r"UPDATE workflow_contexts SET key = '\xff' WHERE key = 'other'");
    let backend = backend(&server);
    let mut keys = Vec::new();
    backend
        .scan(&mut |key, _| keys.push(key.to_owned()))
        .unwrap();
    assert_eq!((keys, backend.malformed()), (vec!["id".to_owned()], 1));
}

#[test]
fn one_of_many_writers_wins() {
    let server = PostgresServer::start();
    let backends = [0; 4].map(|_| backend(&server));
    for round in 0..20 {
        let key = format!("id {round}");
        assert_one_of_four_wins(&key, |thread, claim| backends[thread].write_all(claim));
    }
}

#[test]
fn a_refused_write_holds_back_no_other() {
    let server = PostgresServer::start();
    let backend = backend(&server);
    StorageBackend::connect(&backend).unwrap();
    server.sql("ALTER TABLE workflow_contexts ADD CHECK (key NOT IN ('refused 7', 'refused 9'))");
    let record = record(PARENT);
    let mut writes: Vec<_> = (0..1000).map(|n| claim(&format!("{n}"), &record)).collect();
    writes[7] = claim("refused 7", &record);
    writes[9] = Write::Put("refused 9".to_owned(), record.clone());
    writes.push(Write::Expire("refused 7".to_owned(), record.expires_at));
    let outcomes = backend.write(&writes).unwrap();
    for (at, outcome) in outcomes.iter().enumerate() {
        match (at, outcome) {
            // What follows on its key waits for it.
            (7 | 9 | 1000, WriteOutcome::Failed(error)) => {
                assert!(error.is_partial());
                assert!(error.to_string().contains("check constraint"), "{error}");
            }
            (7 | 9 | 1000, _) | (_, WriteOutcome::Failed(_) | WriteOutcome::Existing(_)) => {
                panic!("write {at}: {outcome:?}")
            }
            _ => {}
        }
    }
    assert_eq!(server.sql("SELECT count(*) FROM workflow_contexts"), "998");
    assert!(backend.get("999").unwrap().is_some());
}

#[test]
fn a_group_is_written_in_few_transactions() {
    let server = PostgresServer::start();
    let backend = backend(&server);
    StorageBackend::connect(&backend).unwrap();
    let transactions = || {
        let number = server.sql("SELECT pg_current_xact_id()");
        number.parse::<u64>().expect("a number")
    };
    let in_an_hour = SystemTime::now() + Duration::from_secs(3600);
    // As a storage writes them: the instance and its end.
    let both = |n: usize| {
        let key = n.to_string();
        [claim(&key, &record(PARENT)), Write::Expire(key, in_an_hour)]
    };
    let writes: Vec<_> = (0..500).flat_map(both).collect();
    let before = transactions();
    backend.write_all(&writes).unwrap();
    // The claims, the expiries, the look for expired rows, and the question itself.
    let used = transactions() - before;
    assert!(used <= 4, "{used} transactions");
}

/// A statement can write to a row once.
#[test]
fn a_key_may_repeat_in_a_group() {
    let server = PostgresServer::start();
    let backend = backend(&server);
    let of = |n: u8| record(&format!("00-0af7651916cd43dd8448eb211c80319c-{n:016x}-01"));
    let put = |n| Write::Put("id".to_owned(), of(n));
    let mut writes: Vec<_> = (0..900).map(|n| claim(&n.to_string(), &of(9))).collect();
    writes.extend([claim("id", &of(1)), put(2), put(3), claim("id", &of(4))]);
    writes.extend([Write::Remove("id".to_owned()), claim("id", &of(5)), put(6)]);
    let outcomes = backend.write_all(&writes).unwrap();
    let found: Vec<_> = outcomes.iter().map(|o| o.existing().is_some()).collect();
    let expected: Vec<_> = (0..907).map(|at| at == 903).collect();
    assert_eq!(found, expected);
    let existing = outcomes[903].existing().expect("what was put before");
    assert_eq!(existing.context.span_id(), of(3).context.span_id());
    let stored = backend.get("id").unwrap().expect("the last one");
    assert_eq!(stored.context.span_id(), of(6).context.span_id());
}

#[test]
fn a_scan_has_no_transaction_open_while_it_visits() {
    let server = PostgresServer::start();
    let backend = backend(&server);
    let ids: Vec<_> = (0..2500).map(|n| n.to_string()).collect();
    let claims: Vec<_> = ids.iter().map(|id| claim(id, &record(PARENT))).collect();
    backend.write_all(&claims).unwrap();
    let mut seen = Vec::new();
    let scanned = backend.scan(&mut |key, _| {
        if seen.len() % 500 == 0 {
            let open = "SELECT count(*) FROM pg_stat_activity \
                WHERE application_name = 'tracing-workflow-context' AND xact_start IS NOT NULL";
            assert_eq!(server.sql(open), "0");
        }
        seen.push(key.to_owned());
    });
    scanned.unwrap();
    seen.sort();
    let mut ids = ids;
    ids.sort();
    assert_eq!(seen, ids);
}

#[test]
fn workers_that_write_the_same_keys_do_not_wait_for_each_other() {
    let server = PostgresServer::start();
    let backends = [0; 4].map(|_| backend(&server));
    at_once(4, |thread| {
        for round in 0..20 {
            let key = |n: usize| ((n * 7 + thread * 13) % 100).to_string();
            let write = |n: usize| match (n + thread + round) % 4 {
                0 => Write::Put(key(n), record(PARENT)),
                1 => Write::Expire(key(n), SystemTime::now() + Duration::from_secs(60)),
                2 => Write::Remove(key(n)),
                _ => claim(&key(n), &record(PARENT)),
            };
            let writes: Vec<_> = (0..100).map(write).collect();
            backends[thread].write_all(&writes).unwrap();
        }
    });
    // One of two that deadlock would have been given up.
    assert_eq!(
        server.sql("SELECT sum(deadlocks) FROM pg_stat_database"),
        "0"
    );
}

#[test]
fn connecting_needs_no_reachable_server() {
    let nobody = PostgresBackend::connect("postgres://u:secret@127.0.0.1:1/orders").unwrap();
    let error = nobody.get("id").unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    assert!(text_of(&error).contains("refused"), "{}", text_of(&error));
    assert!(nobody.write_all(&[]).is_ok());
    assert!(!format!("{nobody:?} {error:?} {error}").contains("secret"));

    for (url, wrong) in [
        ("", "scheme"),
        ("127.0.0.1:5432", "scheme"),
        ("http://127.0.0.1/", "scheme"),
        ("host=127.0.0.1 password=secret", "scheme"),
        ("postgres://", "host"),
        ("postgres:///orders", "host"),
        ("postgres://u:secret@", "host"),
        ("postgres://u:secret@[::1/orders", "host"),
        ("postgres://u:secret/orders", "port"),
        ("postgres://u:secret@127.0.0.1:port/orders", "port"),
        ("postgres://u:secret@127.0.0.1/%ff", "percent-encoding"),
        (
            "postgres://u:secret@127.0.0.1/orders?unknown=1",
            "parameters",
        ),
        (
            "postgres://u:secret@127.0.0.1/orders?sslmode=perhaps",
            "parameters",
        ),
        ("postgres://u:secret@127.0.0.1/orders?sslmode", "parameters"),
        // The client would take a part of the password for a host, a user or a parameter.
        (
            "postgres://u:sec@ret?secret=1@127.0.0.1/orders",
            "user or password",
        ),
        (
            "postgres://127.0.0.1/orders?user=u&password=sec@ret",
            "user or password",
        ),
        (
            "postgres://127.0.0.1/orders?user=u&password=top&secret=1",
            "parameters",
        ),
        (
            "postgres://127.0.0.1/orders?user=u&pass%77ord=top&secret=1",
            "parameters",
        ),
        // It could never connect to these.
        (
            "postgres://u:secret@127.0.0.1,127.0.0.2/orders?port=5433",
            "port",
        ),
        ("postgres://u:secret@a,b/orders?hostaddr=127.0.0.1", "host"),
    ] {
        let error = PostgresBackend::connect(url).unwrap_err();
        let ConnectError::InvalidUrl { part, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(part, wrong, "{url}");
        let cause = error.source().expect("a reason");
        let text = format!("{error} {error:?} {cause} {:?}", cause.source());
        assert!(text.contains("postgres://user@127.0.0.1"), "{url}: {text}");
        assert!(!text.contains("sec"), "{url}: {text}");
        let error = StorageError::from(error);
        let text = format!("{} {error:?}", error.source().expect("the same error"));
        assert!(text.contains(wrong) && !text.contains("sec"), "{text}");
    }
}

#[cfg(not(feature = "postgres-tls"))]
#[test]
fn tls_needs_its_feature() {
    let error = PostgresBackend::connect("postgres://127.0.0.1/?sslmode=require").unwrap_err();
    assert!(text_of(&error).contains("postgres-tls"), "{error}");
}

#[test]
fn it_works_within_a_runtime() {
    let server = PostgresServer::start();
    for runtime in [
        tokio::runtime::Builder::new_current_thread().build(),
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build(),
    ] {
        runtime.expect("a runtime").block_on(async {
            let backend = backend(&server);
            backend.write_all(&[claim("id", &record(PARENT))]).unwrap();
            assert!(backend.get("id").unwrap().is_some());
            drop(backend);
        });
    }
}

#[test]
fn no_call_waits_longer_than_its_timeouts() {
    let server = PostgresServer::start();
    let timeout = Duration::from_millis(200);
    let proxy = Proxy::before(&server);
    let [direct, spoiled] = [server.url(), proxy.url()].map(|url| {
        let backend = PostgresBackend::connect(&url).unwrap();
        let backend = backend.connect_timeout(timeout).response_timeout(timeout);
        wait_until("the table is there", || {
            StorageBackend::connect(&backend).is_ok()
        });
        backend
    });
    let writes: Vec<_> = (0..1000)
        .map(|n| claim(&n.to_string(), &record(PARENT)))
        .collect();
    let refused = |backend: &PostgresBackend| {
        let start = Instant::now();
        let errors = [
            backend.write(&writes).unwrap_err(),
            backend.get("id").unwrap_err(),
            backend.flush().unwrap_err(),
        ];
        for error in errors {
            assert!(error.to_string().contains("within"), "{error}");
        }
        // Far from the 50 seconds that the slowest reply takes.
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{:?}",
            start.elapsed()
        );
    };
    server.freeze();
    refused(&direct);
    server.thaw();
    proxy.set_replies(Replies::Delay(Duration::from_millis(900)));
    refused(&spoiled);
    // No single byte is late.
    proxy.set_replies(Replies::Trickle(Duration::from_millis(10)));
    refused(&spoiled);
}

/// Such as a pooler whose server is away. In the end each of them would keep a connection open.
#[test]
fn a_connection_that_is_not_answered_after_its_login_is_closed() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let (closing, closed) = channel();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.expect("a connection");
            let mut buffer = [0; 1024];
            let _ = client.read(&mut buffer);
            // The login is fine, and the server is ready.
            let _ = client.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I");
            let closing = closing.clone();
            std::thread::spawn(move || {
                while let Ok(1..) = client.read(&mut buffer) {}
                let _ = closing.send(());
            });
        }
    });
    let timeout = Duration::from_millis(100);
    for direct in [false, true] {
        let backend = backend_at(&postgres_url("worker", port)).direct(direct);
        let backend = backend.connect_timeout(timeout).response_timeout(timeout);
        for _ in 0..3 {
            let error = backend.get("id").unwrap_err();
            assert!(error.to_string().contains("within"), "{error}");
            let closed = closed.recv_timeout(PATIENCE);
            closed.expect("it is closed, and not by the next call");
        }
    }
}

#[test]
fn no_reply_makes_the_backend_panic() {
    let server = PostgresServer::start();
    let proxy = Proxy::before(&server);
    let replies: [&[u8]; 9] = [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0\0\0\0\0\0\0\0",
        b"Z\0\0\0\x05I",
        b"Z\0\0\0\x05IZ\0\0\0\x05IZ\0\0\0\x05I",
        b"D\xff\xff\xff\xff",
        b"D\x7f\xff\xff\xff",
        b"T\0\0\0\x06\xff\xff",
        b"E\0\0\0\x05\0",
        b"1\0\0\0\x042\0\0\0\x04T\0\0\0\x06\0\0D\0\0\0\x06\0\0C\0\0\0\x05\0Z\0\0\0\x05I",
    ];
    for reply in replies {
        let backend = PostgresBackend::connect(&proxy.url()).unwrap();
        proxy.set_replies(Replies::Forward);
        wait_until("the table is there", || {
            StorageBackend::connect(&backend).is_ok()
        });
        let backend = backend.response_timeout(Duration::from_millis(50));
        proxy.set_replies(Replies::Replace(reply.to_owned()));
        for _ in 0..2 {
            assert!(!matches!(backend.get("id"), Ok(Some(_))));
            let _ = backend.write(&[claim("id", &record(PARENT))]);
            let _ = backend.scan(&mut |key, record| panic!("{key} {record:?}"));
            let _ = backend.flush();
        }
    }
}
