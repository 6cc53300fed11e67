//! Workers that share one Redis server agree, whatever happens to the server.

use std::error::Error as _;
use std::time::{Duration, Instant, SystemTime};

use crate::support::*;
use redis::Commands as _;
use tracing_workflow_context::backend::{StorageBackend, Write, WriteOutcome};
use tracing_workflow_context::testing::check_backend;
use tracing_workflow_context::{
    ConnectError, Form, RedisBackend, StorageError, WorkflowContextStorage,
};

mod cluster;
mod faults;
mod interop;
mod race;
mod refused;
#[cfg(feature = "redis-tls")]
mod tls;

fn backend(server: &RedisServer) -> RedisBackend {
    let backend = RedisBackend::connect(&server.url()).expect("a URL");
    backend
        .with_connect_timeout(PATIENCE)
        .with_response_timeout(PATIENCE)
}

fn raw(server: &RedisServer) -> redis::Connection {
    let client = redis::Client::open(server.url()).expect("a URL");
    client.get_connection().expect("the server is up")
}

fn storage_on(backend: RedisBackend) -> WorkflowContextStorage {
    patient(backend).build().expect("sound settings")
}

/// Runs the contract suite, with a new key prefix for each backend.
fn assert_fulfils_the_contract(form: Form, connect: impl Fn() -> RedisBackend) {
    let numbers = std::cell::RefCell::new(0..);
    check_backend(|| {
        let number: u32 = numbers.borrow_mut().next().expect("endless");
        let prefix = format!("a[{number}]*?\\:");
        connect().with_form(form).with_key_prefix(&prefix)
    });
}

#[test]
fn redis_fulfils_the_contract() {
    for form in [Form::Binary, Form::Json] {
        let server = RedisServer::start();
        assert_fulfils_the_contract(form, || backend(&server));
    }
}

#[test]
fn an_id_with_braces_is_not_found_by_workers_with_another_prefix() {
    let server = RedisServer::start();
    let tenants = ["wf:", "wf:{tenant-b}:"].map(|prefix| {
        let backend = backend(&server).with_key_prefix(prefix);
        patient(backend).build().unwrap()
    });
    let [outer, inner] = &tenants;
    inner.store("order-1", context(1)).unwrap();
    inner.flush().unwrap();
    for id in ["tenant-b}:{order-1", "{tenant-b}:{order-1}", "}:{"] {
        assert_eq!(outer.get(id).unwrap(), None, "{id}");
        outer.store(id, context(2)).unwrap();
    }
    outer.flush().unwrap();
    let later = backend(&server).with_key_prefix("wf:{tenant-b}:");
    let later = patient(later).build().unwrap();
    let found = later.get("order-1").unwrap().unwrap();
    assert_eq!(found.span_id(), context(1).span_id());
}

#[test]
fn keys_of_an_instance_share_a_slot_and_expire_on_the_server() {
    let server = RedisServer::start();
    let backend = backend(&server);
    let record = record(PARENT);
    let keys = ["order-42", "order-42\u{1f}run", "order-42\u{1f}run\u{1f}2"];
    let writes = keys.map(|key| claim(key, &record));
    assert!(
        backend
            .write_all(&writes)
            .unwrap()
            .iter()
            .all(|o| o.existing().is_none())
    );

    let mut raw = raw(&server);
    let mut on_server: Vec<String> = raw.keys("*").unwrap();
    on_server.sort();
    let expected = [
        "workflow-context:{order-42}",
        "workflow-context:{order-42}\u{1f}run",
        "workflow-context:{order-42}\u{1f}run\u{1f}2",
    ];
    assert_eq!(on_server, expected);
    for key in expected {
        let value: Vec<u8> = raw.get(key).unwrap();
        assert!(
            value.len() <= 64,
            "the compact form has {} bytes",
            value.len()
        );
        let left: i64 = raw.pttl(key).unwrap();
        assert!(
            (3_500_000..=3_600_000).contains(&left),
            "{left} ms are left"
        );
    }

    backend
        .write_all(&[Write::Expire(keys[0].to_owned(), SystemTime::now())])
        .unwrap();
    assert!(!raw.exists::<_, bool>(expected[0]).unwrap());
}

#[test]
fn either_form_is_read_whichever_is_written() {
    let server = RedisServer::start();
    let [binary, json] = [Form::Binary, Form::Json].map(|form| backend(&server).with_form(form));
    let record = record(PARENT);
    for (writer, reader) in [(&binary, &json), (&json, &binary)] {
        writer
            .write_all(&[Write::Put("id".to_owned(), record.clone())])
            .unwrap();
        let found = reader.get("id").unwrap().expect("a record");
        assert_eq!(found.context.traceparent(), PARENT);
        let winner = reader.write_all(&[claim("id", &record)]).unwrap().remove(0);
        assert_eq!(
            winner
                .existing()
                .expect("it is taken")
                .context
                .traceparent(),
            PARENT
        );
    }
    assert_eq!((binary.malformed(), json.malformed()), (0, 0));
}

#[test]
fn undecodable_values_are_counted_and_left_alone() {
    let server = RedisServer::start();
    let mut raw = raw(&server);
    let key = "workflow-context:{id}";
    let record = record(PARENT);
    let values: [&[u8]; 6] = [
        b"",
        b"\0",
        b"\x01short",
        b"{",
        b"{\"traceparent\":null}",
        &[255; 100_000],
    ];
    for value in values {
        let backend = backend(&server);
        let () = raw.set(key, value).unwrap();
        assert_eq!(backend.get("id").unwrap(), None, "{value:.10?}");
        backend
            .scan(&mut |key, record| panic!("{key} {record:?}"))
            .unwrap();
        assert_eq!(backend.malformed(), 2);

        let outcomes = backend.write_all(&[claim("id", &record)]).unwrap();
        assert!(matches!(outcomes[..], [WriteOutcome::Unreadable]));
        assert_eq!(backend.malformed(), 3);
        let there: Vec<u8> = raw.get(key).unwrap();
        assert!(there == value, "{value:.10?}");
        // A call decides what is stored.
        backend
            .write_all(&[Write::Put("id".to_owned(), record.clone())])
            .unwrap();
        let found = backend.get("id").unwrap().expect("it was replaced");
        assert_eq!(found.context, record.context);
    }

    // Not even a string, and with other writes around it.
    let backend = backend(&server);
    let () = raw.del(key).unwrap();
    let () = raw.rpush(key, "a list").unwrap();
    assert_eq!(backend.get("id").unwrap(), None);
    let writes = [
        claim("other", &record),
        claim("id", &record),
        claim("id", &record),
        claim("other", &record),
    ];
    use WriteOutcome::{Done, Existing, Unreadable};
    let outcomes = backend.write_all(&writes).unwrap();
    assert!(
        matches!(outcomes[..], [Done, Unreadable, Unreadable, Existing(_)]),
        "{outcomes:?}"
    );
    let list: Vec<String> = raw.lrange(key, 0, -1).unwrap();
    assert_eq!(list, ["a list"]);
}

#[test]
fn one_of_many_writers_wins() {
    let server = RedisServer::start();
    for round in 0..20 {
        let key = format!("id {round}");
        assert_one_of_four_wins(&key, |_, claim| backend(&server).write_all(claim));
    }
}

#[test]
fn a_value_without_expiry_is_read() {
    let server = RedisServer::start();
    let backend = backend(&server);
    let value = format!(r#"{{"traceparent":"{PARENT}","tracestate":null,"resumed":false}}"#);
    let () = raw(&server).set("workflow-context:{id}", value).unwrap();
    let found = backend.get("id").unwrap().expect("a record");
    assert_eq!(found.context.traceparent(), PARENT);
    assert!(found.expires_at > SystemTime::now() + Duration::from_secs(3600));
}

#[test]
fn connecting_needs_no_reachable_server() {
    let nobody = RedisBackend::connect("redis://127.0.0.1:1/").unwrap();
    let error = nobody.get("id").unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    assert!(error.source().is_some());
    assert!(nobody.write_all(&[]).unwrap().is_empty());

    let insecure = match cfg!(feature = "redis-tls") {
        true => "fragment",
        false => "scheme",
    };
    for (url, wrong) in [
        ("", "scheme"),
        ("127.0.0.1:6379", "scheme"),
        ("http://127.0.0.1/", "scheme"),
        ("redis://:secret@/", "host"),
        ("redis://:secret@0.0.0.0/", "host"),
        ("redis://:sec/ret@127.0.0.1/", "host"),
        ("redis://:secret@127.0.0.1:port/", "host"),
        ("redis://:secret@127.0.0.1/x", "database"),
        ("redis://:secret%ff@127.0.0.1/", "user or password"),
        ("redis://:secret@127.0.0.1/?protocol=x", "parameters"),
        ("redis://127.0.0.1/?protocol=secret", "parameters"),
        ("redis://127.0.0.1/?pass=1&pro%74ocol=3secret", "parameters"),
        ("rediss://:secret@127.0.0.1/#insecure", insecure),
    ] {
        let error = RedisBackend::connect(url).unwrap_err();
        let ConnectError::InvalidUrl { part, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(part, wrong, "{url}");
        let error = StorageError::from(error);
        let cause = error.source().expect("the same error");
        let text = format!("{cause} {error:?}");
        assert!(text.contains("redis://127.0.0.1"), "{url}: {text}");
        let is_told = text.replace("insecure", "").contains("sec");
        assert!(text.contains(wrong) && !is_told, "{text}");
    }
    let with_password = RedisBackend::connect("redis://:secret@127.0.0.1:1/").unwrap();
    assert!(!format!("{with_password:?}").contains("secret"));
}

#[test]
fn a_connection_closed_by_the_server_is_replaced() {
    let mut server = RedisServer::start();
    let backend = backend(&server);
    for _ in 0..3 {
        backend.write_all(&[claim("id", &record(PARENT))]).unwrap();
        assert!(backend.get("id").unwrap().is_some());
        server.start_again();
        assert_eq!(backend.get("id").unwrap(), None, "it is empty again");
    }
    server.stop();
    assert!(backend.get("id").is_err());
    assert!(backend.flush().is_err());
    server.start_again();
    assert!(backend.get("id").is_ok());
}

#[test]
fn no_call_waits_longer_than_its_timeouts() {
    let server = RedisServer::start();
    let timeout = Duration::from_millis(100);
    let proxy = Proxy::before(&server);
    let [direct, spoiled] = [server.url(), proxy.url()].map(|url| {
        let backend = RedisBackend::connect(&url).unwrap();
        let backend = backend
            .with_connect_timeout(timeout)
            .with_response_timeout(timeout);
        backend.flush().unwrap();
        backend
    });
    let writes: Vec<_> = (0..1000)
        .map(|n| claim(&n.to_string(), &record(PARENT)))
        .collect();
    let refused = |backend: &RedisBackend| {
        let start = Instant::now();
        assert!(backend.write_all(&writes).is_err());
        assert!(backend.get("id").is_err());
        // A thousand replies that each wait for the timeout would take 100 seconds.
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{:?}",
            start.elapsed()
        );
    };
    server.freeze();
    refused(&direct);
    server.thaw();
    proxy.set_replies(Replies::Delay(Duration::from_millis(500)));
    refused(&spoiled);

    // No single reply is late.
    proxy.set_replies(Replies::Trickle(Duration::from_millis(10)));
    let start = Instant::now();
    assert!(spoiled.write_all(&writes).is_err());
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?} of 50 s",
        start.elapsed()
    );
}

/// Each byte comes well within the timeout of a read, and the whole reply in two minutes.
#[test]
fn a_reply_that_drips_in_keeps_no_call_longer_than_its_timeout() {
    let server = RedisServer::start();
    let () = raw(&server)
        .set("workflow-context:{id}", "x".repeat(2_000))
        .unwrap();
    let proxy = Proxy::before(&server);
    let connected = RedisBackend::connect(&proxy.url()).unwrap();
    let connected = connected.with_response_timeout(Duration::from_millis(100));
    connected.flush().unwrap();
    proxy.set_replies(Replies::Trickle(Duration::from_millis(60)));
    let start = Instant::now();
    let error = connected.get("id").unwrap_err();
    assert!(causes(&error).contains("timed out"), "{}", causes(&error));
    let outcomes = connected.write(&[claim("id", &record(PARENT))]);
    assert!(outcomes.is_err());
    let took = start.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?} of two minutes");

    // Nor the login.
    proxy.set_replies(Replies::Forward);
    let mut password = redis::cmd("CONFIG");
    password.arg("SET").arg("requirepass").arg("secret");
    let () = password.query(&mut raw(&server)).unwrap();
    let url = proxy.url().replace("redis://", "redis://:secret@");
    let connected = RedisBackend::connect(&format!("{url}1")).unwrap();
    assert_eq!(connected.get("id").unwrap(), None, "it is in database 0");
    let connected = RedisBackend::connect(&url).unwrap();
    let connected = connected.with_connect_timeout(Duration::from_millis(100));
    proxy.set_replies(Replies::Trickle(Duration::from_millis(60)));
    let error = causes(&connected.get("id").unwrap_err());
    assert!(error.contains("cannot connect"), "{error}");
    proxy.set_replies(Replies::Forward);
    assert_eq!(connected.get("id").unwrap(), None, "junk");
    assert_eq!(connected.malformed(), 1);
}

#[test]
fn no_reply_makes_the_backend_panic() {
    let server = RedisServer::start();
    let proxy = Proxy::before(&server);
    let answers: [&[u8]; 14] = [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0\0\0\0",
        b"\r\n",
        b"$-2\r\n",
        b"$99999999999999\r\n",
        b"$9223372036854775807\r\nx",
        b"*1000000000000\r\n",
        b"*-1\r\n",
        b":1\r\n:2\r\n",
        b"+OK\r\n+OK\r\n+OK\r\n",
        b"$3\r\nabc\r\n:99999999999999999\r\n",
        b"*2\r\n$1\r\n0\r\n*1\r\n:1\r\n",
        b"-ERR no\r\n-ERR no\r\n",
        b"%1\r\n+a\r\n+b\r\n",
    ];
    for answer in answers {
        let backend = RedisBackend::connect(&proxy.url()).unwrap();
        let backend = backend.with_response_timeout(Duration::from_millis(50));
        proxy.set_replies(Replies::Forward);
        wait_until("the server replies", || backend.flush().is_ok());
        proxy.set_replies(Replies::Replace(answer.to_owned()));
        for _ in 0..2 {
            assert!(!matches!(backend.get("id"), Ok(Some(_))));
            let _ = backend.write_all(&[claim("id", &record(PARENT))]);
            let _ = backend.scan(&mut |key, record| panic!("{key} {record:?}"));
            let _ = backend.flush();
        }
    }
}

#[test]
fn sentinels_give_the_master_and_its_successor() {
    let directory = Directory::new();
    let mut master = RedisServer::start();
    let replica = RedisServer::start_replica_of(&master);
    let file = directory.file("sentinel.conf");
    let sentinel = RedisServer::start_sentinel(&file, "contexts", &master);
    let sentinels = ["redis://127.0.0.1:1/".to_owned(), sentinel.url()];
    let backend = RedisBackend::connect("redis://nobody.invalid/")
        .unwrap()
        .with_sentinels(sentinels.iter().map(String::as_str), "contexts")
        .unwrap();
    let written = |key: &str| backend.write_all(&[claim(key, &record(PARENT))]).is_ok();
    let until = |what: &str, is_so: &dyn Fn() -> bool| {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < deadline, "{what} within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    until("the master is written to", &|| written("before"));
    let on = |server: &RedisServer, key: &str| {
        raw(server).exists::<_, bool>(format!("workflow-context:{{{key}}}"))
    };
    assert_eq!(on(&master, "before"), Ok(true));
    let sentinel_knows = || -> bool {
        let client = redis::Client::open(sentinel.url()).expect("a URL");
        let mut connection = client.get_connection().expect("it is up");
        let mut ask = redis::cmd("SENTINEL");
        let replicas: Vec<redis::Value> = ask
            .arg("REPLICAS")
            .arg("contexts")
            .query(&mut connection)
            .expect("it knows");
        !replicas.is_empty()
    };
    until("the sentinel knows the replica", &sentinel_knows);
    until("the replica has everything", &|| {
        on(&replica, "before") == Ok(true)
    });

    master.stop();
    assert!(!written("after"));
    until("the replica is written to", &|| written("after"));
    assert_eq!(on(&replica, "after"), Ok(true));
    assert!(backend.get("before").unwrap().is_some());

    let unknown = RedisBackend::connect("redis://nobody.invalid/").unwrap();
    let unknown = unknown.with_sentinels([&*sentinel.url()], "other").unwrap();
    let error = unknown.flush().unwrap_err();
    assert!(error.to_string().contains("\"other\""), "{error}");
}

#[test]
fn a_flush_waits_for_the_replicas_that_have_to_confirm() {
    /// Half of it is waited for the replica.
    const RESPONSE: Duration = Duration::from_secs(2);
    let master = RedisServer::start();
    let replica = RedisServer::start_replica_of(&master);
    let backend = |replicas| {
        let backend = backend(&master).with_response_timeout(RESPONSE);
        backend.with_replicas(replicas)
    };
    let on_replica = |key: &str| {
        let key = format!("workflow-context:{{{key}}}");
        raw(&replica).exists::<_, bool>(key).expect("a reply")
    };
    let storage = storage_on(backend(1));
    wait_until("the replica follows its master", || {
        let early = [claim("early", &record(PARENT))];
        backend(1).write_all(&early).is_ok()
    });
    for n in 0..100 {
        let id = format!("confirmed {n}");
        storage.store(&id, record(PARENT).context).unwrap();
    }
    wait_until("the replica confirms", || storage.flush().is_ok());
    assert!((0..100).all(|n| on_replica(&format!("confirmed {n}"))));

    replica.freeze();
    storage.store("later", record(PARENT).context).unwrap();
    let error = storage.flush().unwrap_err();
    let StorageError::NotWritten { refused: 1, .. } = error else {
        panic!("{error:?}");
    };
    let cause = causes(&error);
    assert!(cause.contains("confirmed by 0 of 1 replicas"), "{cause}");
    // The server has it, and others go on with that.
    assert!(storage_on(backend(0)).get("later").unwrap().is_some());
    storage_on(backend(0)).flush().unwrap();

    replica.thaw();
    wait_until("the replica is back", || storage.flush().is_ok());
    assert!(on_replica("later"));
    assert_eq!(storage.stats().dropped_writes, 0);
}

/// The server has a clock of its own.
#[test]
fn instances_in_use_do_not_expire_on_the_server() {
    const IDLE: Duration = Duration::from_secs(2);
    let server = RedisServer::start();
    let on_server = || {
        let builder = patient(backend(&server)).idle_ttl(IDLE);
        builder.build().expect("sound settings")
    };
    let storage = on_server();
    let ids: Vec<_> = (0..50).map(|n| format!("used {n}")).collect();
    for id in &ids {
        storage.store(id, record(PARENT).context).unwrap();
    }
    storage.store("unused", record(PARENT).context).unwrap();
    storage.flush().unwrap();
    let mut raw = raw(&server);
    let are_there = |raw: &mut redis::Connection, id: &str| -> bool {
        let there = raw.exists(format!("workflow-context:{{{id}}}"));
        there.expect("a reply")
    };
    let start = Instant::now();
    wait_until("the one that nobody uses is gone", || {
        for id in &ids {
            assert!(storage.get(id).unwrap().is_some());
        }
        start.elapsed() > IDLE * 2 && !are_there(&mut raw, "unused")
    });
    let other = on_server();
    for id in &ids {
        assert!(
            are_there(&mut raw, id),
            "{id:?} after {:?}",
            start.elapsed()
        );
        assert!(other.get(id).unwrap().is_some());
    }
}
