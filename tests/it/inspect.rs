//! `examples/inspect.rs` looks into stores of each kind, as workers leave them.

use tracing_workflow_context::backend::StorageBackend;
use tracing_workflow_context::{PostgresBackend, RedisBackend};

use crate::support::*;

#[path = "../../examples/inspect.rs"]
#[allow(
    dead_code,
    reason = "it has a `main`, which reads the arguments of the process"
)]
mod program;

/// Returns what the program prints, or its error with all causes.
fn inspect(arguments: &[&str]) -> Result<String, String> {
    let arguments = arguments.iter().map(ToString::to_string);
    let mut out = Vec::new();
    match program::run(arguments, &mut out) {
        Ok(()) => Ok(String::from_utf8(out).expect("text")),
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                text += &format!(": {error}");
                cause = error.source();
            }
            Err(text)
        }
    }
}

/// An instance as a worker has recorded it.
struct Recorded {
    id: &'static str,
    trace: String,
}

/// Lets workers record instances: two of them, one with a run and one with a name that has to be escaped, and one of
/// another namespace.
fn record_instances<B: StorageBackend>(backend: impl Fn() -> B) -> [Recorded; 3] {
    [
        (None, "order-42"),
        (None, "order\u{1f}7"),
        (Some("shop"), "cart-1"),
    ]
    .map(|(namespace, id)| {
        let mut storage = patient(backend());
        if let Some(namespace) = namespace {
            storage = storage.namespace(namespace);
        }
        let worker = Worker::with_storage(storage.build().expect("sound settings"));
        worker.run(|| {
            let span =
                tracing::info_span!("step", workflow.instance_id = id, workflow.run_id = "run 1");
            span.in_scope(|| {});
        });
        worker.storage.flush().unwrap();
        let trace = worker.trace_of("step").to_string();
        Recorded { id, trace }
    })
}

/// Looks into a store with those instances.
fn assert_shows(store: &str, [order, other, cart]: [Recorded; 3]) {
    let listed = inspect(&[store]).unwrap();
    let lines: Vec<_> = listed.lines().collect();
    assert_eq!(lines.len(), 2, "{listed}");
    for (line, recorded) in lines.into_iter().zip([&other, &order]) {
        let expected = format!("{:?}  trace {}  ", recorded.id, recorded.trace);
        assert!(line.starts_with(&expected), "{line}");
        assert!(line.ends_with(" s old  run \"run 1\""), "{line}");
    }
    let of_shop = inspect(&[store, "--namespace", "shop", "cart-1"]).unwrap();
    assert!(of_shop.starts_with("\"cart-1\"  trace "), "{of_shop}");
    assert!(of_shop.contains(&cart.trace), "{of_shop}");
    assert!(
        inspect(&[store, "--namespace", "order-42"])
            .unwrap()
            .is_empty()
    );

    // As text: its line, with the URL of its trace, and what a storage says of it.
    let found = inspect(&[store, order.id, "--jaeger", "http://localhost:16686"]).unwrap();
    let (line, explained) = found.split_once("\n\n").expect("two parts");
    let url = format!("  http://localhost:16686/trace/{}", order.trace);
    assert!(line.ends_with(&url), "{line}");
    assert!(explained.contains("order-42"), "{explained}");
    assert!(explained.contains(&order.trace), "{explained}");

    // As JSON, one line for each.
    let json = inspect(&[store, "--json", "--url", "see:{trace}!"]).unwrap();
    let objects: Vec<serde_json::Value> = json
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(objects.len(), 2);
    for (object, recorded) in objects.iter().zip([&other, &order]) {
        assert_eq!(object["instance_id"], recorded.id);
        assert_eq!(object["trace_id"], recorded.trace);
        assert_eq!(object["run_id"], "run 1");
        assert_eq!(object["generation"], 1);
        assert_eq!(object["url"], format!("see:{}!", recorded.trace));
        let parent = object["traceparent"].as_str().expect("text");
        assert!(
            parent.starts_with(&format!("00-{}-", recorded.trace)),
            "{parent}"
        );
        let at = |name: &str| object[name].as_u64().expect("seconds");
        assert!(at("recorded_at") > 1_700_000_000 && at("expires_at") > at("recorded_at"));
    }
    let one = inspect(&[store, order.id, "--json"]).unwrap();
    let one: serde_json::Value = serde_json::from_str(&one).expect("one object");
    assert_eq!(one["instance_id"], "order-42");
    assert_eq!(one["url"], serde_json::Value::Null);

    let unknown = inspect(&[store, "order-43"]).unwrap_err();
    assert!(
        unknown.contains("\"order-43\" is not in the store"),
        "{unknown}"
    );
}

#[test]
fn a_file_is_looked_into() {
    let directory = Directory::new();
    let file = directory.file("contexts.redb");
    let recorded = record_instances(|| open(&file));
    drop(open(&file)); // waits until it is closed
    assert_shows(file.to_str().expect("text"), recorded);
    let missing = directory.file("missing").display().to_string();
    let error = inspect(&[&missing]).unwrap_err();
    assert!(error.contains("there is no file"), "{error}");
}

#[test]
fn a_redis_server_is_looked_into() {
    let server = RedisServer::start();
    let url = server.url();
    let recorded = record_instances(|| RedisBackend::connect(&url).expect("a URL"));
    assert_shows(&url, recorded);
}

#[test]
fn a_postgresql_database_is_looked_into() {
    let server = PostgresServer::start();
    let url = server.url();
    let recorded = record_instances(|| {
        let backend = PostgresBackend::connect(&url).expect("a URL");
        backend.connect_timeout(PATIENCE).response_timeout(PATIENCE)
    });
    assert_shows(&url, recorded);
}

#[test]
fn the_trace_of_an_instance_has_a_url_in_each_ui() {
    let directory = Directory::new();
    let file = directory.file("contexts.redb");
    let [order, ..] = record_instances(|| open(&file));
    drop(open(&file)); // waits until it is closed
    let url = |ui: &[&str]| {
        let store = [file.to_str().expect("text"), order.id];
        let line = inspect(&[&store, ui].concat()).unwrap();
        let line = line.lines().next().expect("a line").to_owned();
        line.rsplit("  ").next().expect("the last part").to_owned()
    };
    let trace = &order.trace;
    assert_eq!(
        url(&["--phoenix", "http://localhost:6006"]),
        format!("http://localhost:6006/redirects/traces/{trace}")
    );
    let tempo = url(&["--tempo", "http://localhost:3000"]);
    let query = format!("%22query%22%3A%22{trace}%22");
    assert!(
        tempo.starts_with("http://localhost:3000/explore?") && tempo.contains(&query),
        "{tempo}"
    );
    assert!(!tempo.contains([' ', '"', '\n']), "{tempo}");
}

#[test]
fn what_is_no_store_or_option_is_refused() {
    for (arguments, told) in [
        (&[][..], "usage: inspect"),
        (
            &["mysql://localhost/"],
            "a store is a file, redis:// or postgres://",
        ),
        (&["redis://127.0.0.1:1/"], "127.0.0.1:1"),
        (&["postgres://u:secret@127.0.0.1:1/db"], "127.0.0.1:1"),
        (&["postgres://"], "postgres://user@127.0.0.1"),
        (&["a", "--jsn"], "no such option: --jsn"),
        (&["a", "--url"], "--url needs a value"),
    ] {
        let error = inspect(arguments).unwrap_err();
        assert!(error.contains(told), "{arguments:?}: {error}");
        assert!(!error.contains("secret"), "{error}");
    }
}
