//! What a client, and whoever writes to a shared backend, can do to a trace: the claims of docs/SECURITY.md.

use crate::support::*;
use opentelemetry_sdk::trace::Sampler;
use tracing::info_span;
use tracing_workflow_context::backend::{StorageBackend as _, Write};
use tracing_workflow_context::{
    Continuation, MemoryBackend, Relation, WorkflowContext, WorkflowContextStorage,
    WorkflowContextStorageBuilder,
};

const ID: &str = "order-42";
const UNSAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// A worker with the sampler that the SDK has by default.
fn worker(builder: WorkflowContextStorageBuilder) -> Worker {
    let sampler = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
    Worker::with_sampler(builder.build().unwrap(), true, sampler)
}

/// Runs the closure as the handler of a request that came with this header.
fn request(traceparent: &str, run: impl FnOnce()) {
    let _client = client(traceparent).to_otel().attach();
    run();
}

fn client(traceparent: &str) -> WorkflowContext {
    WorkflowContext::parse(traceparent, "").unwrap()
}

fn step(name: &str) {
    info_span!("step", otel.name = name, workflow.instance_id = ID).in_scope(|| ());
}

#[test]
fn a_request_with_flag_00_silences_the_workflow_that_it_starts_unless_that_is_a_root() {
    let trusting = || WorkflowContextStorage::builder();
    let careful = || trusting().relation(Relation::First, Continuation::NewRootAndLink);
    let run = |worker: &Worker, traceparent| {
        worker.run(|| {
            request(traceparent, || step("charge"));
            step("ship");
        });
        worker.names().len()
    };
    assert_eq!(run(&worker(trusting()), UNSAMPLED), 0);
    assert_eq!(run(&worker(careful()), UNSAMPLED), 2);
    for (builder, is_moved) in [(trusting(), true), (careful(), false)] {
        let worker = worker(builder);
        assert_eq!(run(&worker, SAMPLED), 2);
        for name in ["charge", "ship"] {
            let trace = worker.trace_of(name);
            assert_eq!(trace == client(SAMPLED).trace_id(), is_moved, "{name}");
        }
    }
}

#[test]
fn a_later_request_neither_silences_nor_moves_a_workflow() {
    for traceparent in [SAMPLED, UNSAMPLED] {
        let worker = worker(WorkflowContextStorage::builder());
        worker.run(|| {
            step("charge");
            request(traceparent, || step("ship"));
        });
        assert_eq!(worker.trace_of("ship"), worker.trace_of("charge"));
        let (relation, to) = link(&worker.span("ship"));
        assert_eq!(relation, "foreign");
        assert_eq!(to.trace_id(), client(traceparent).trace_id());
    }
}

#[test]
fn a_guessed_id_joins_a_trace_and_ends_it_unless_it_only_looks() {
    let guess = |observing: bool| {
        let handler = info_span!(
            "GET",
            workflow.instance_id = ID,
            workflow.observing = observing,
            workflow.status = "completed"
        );
        request(SAMPLED, || handler.in_scope(|| ()));
    };
    let forgets = || WorkflowContextStorage::builder().completed_grace(SECOND);
    for (observing, joins) in [(false, true), (true, false)] {
        let clock = ManualClock::new();
        let worker = worker(forgets().clock(clock.clone()));
        worker.run(|| {
            step("charge");
            guess(observing);
            clock.advance(2 * SECOND);
            step("ship");
        });
        let charged = worker.trace_of("charge");
        assert_eq!(worker.trace_of("GET") == charged, joins);
        assert_eq!(worker.trace_of("ship") != charged, joins, "it was ended");
    }

    let linking = forgets().relation(Relation::Foreign, Continuation::Link);
    let worker = worker(linking);
    worker.run(|| {
        step("charge");
        request(SAMPLED, || step("GET"));
    });
    assert_eq!(worker.trace_of("GET"), client(SAMPLED).trace_id());
}

#[test]
fn a_flood_of_ids_costs_bounded_memory_and_no_instance_that_a_backend_has() {
    const FLOOD: usize = 5_000;
    for backend in [None, Some(MemoryBackend::new())] {
        let has_backend = backend.is_some();
        let mut builder = WorkflowContextStorage::builder().max_instances(100);
        if let Some(backend) = backend {
            builder = builder.backend(backend).lookup_budget(PATIENCE);
        }
        let worker = worker(builder);
        worker.run(|| {
            step("charge");
            for number in 0..FLOOD {
                info_span!("GET", workflow.instance_id = number).in_scope(|| ());
            }
            worker.storage.flush().unwrap();
            step("ship");
        });
        let stats = worker.storage.stats();
        assert!(stats.stored_instances <= 100, "{stats:?}");
        assert!(stats.evicted as usize >= FLOOD - 100, "{stats:?}");
        let kept = worker.trace_of("ship") == worker.trace_of("charge");
        assert_eq!(kept, has_backend);
    }
}

// A backend that others write to.

/// Returns a backend in which somebody has written a record with that context for the instance.
fn poisoned(traceparent: &str) -> MemoryBackend {
    let backend = MemoryBackend::new();
    poison(&backend, traceparent);
    backend
}

fn poison(backend: &MemoryBackend, traceparent: &str) {
    let record = record_of(client(traceparent));
    backend.write(&[Write::Put(ID.to_owned(), record)]).unwrap();
}

fn on(backend: &MemoryBackend) -> WorkflowContextStorageBuilder {
    let builder = WorkflowContextStorage::builder().backend(backend.clone());
    builder.lookup_budget(PATIENCE)
}

#[test]
fn a_record_with_flag_00_silences_its_instance_unless_that_is_sampled_anew() {
    let silenced = worker(on(&poisoned(UNSAMPLED)));
    silenced.run(|| step("ship"));
    assert!(silenced.names().is_empty());

    let anew = worker(on(&poisoned(UNSAMPLED)).resample_on(Relation::Resumed));
    anew.run(|| step("ship"));
    let ship = anew.span("ship");
    let stored = client(UNSAMPLED);
    assert_ne!(ship.span_context.trace_id(), stored.trace_id());
    assert_eq!(link(&ship).1.trace_id(), stored.trace_id());
}

#[test]
fn a_record_of_another_trace_moves_an_instance_that_is_not_in_memory() {
    let backend = poisoned(SAMPLED);
    let new = worker(on(&backend));
    new.run(|| step("ship"));
    assert_eq!(new.trace_of("ship"), client(SAMPLED).trace_id());

    let backend = MemoryBackend::new();
    let old = worker(on(&backend));
    old.run(|| {
        step("charge");
        old.storage.flush().unwrap();
        poison(&backend, SAMPLED);
        step("ship");
    });
    assert_eq!(old.trace_of("ship"), old.trace_of("charge"));
}

#[test]
fn a_storage_shows_no_id_of_another_namespace() {
    let backend = MemoryBackend::new();
    let [one, other] = ["one", "other"].map(|name| worker(on(&backend).namespace(name)));
    one.run(|| step("charge"));
    one.storage.flush().unwrap();
    other.run(|| step("ship"));
    assert_ne!(one.stored_trace(ID), other.stored_trace(ID));
    assert_eq!(other.storage.instance_ids(), [ID], "its own");
    // An id with what ends a namespace in a key.
    let crafted = worker(on(&backend).namespace("on"));
    let found = crafted.storage.get(&format!("e\u{1d}{ID}")).unwrap();
    assert_eq!(found, None);
}

#[cfg(feature = "redis")]
#[test]
fn an_acl_of_a_prefix_keeps_tenants_apart() {
    use tracing_workflow_context::RedisBackend;

    let server = RedisServer::start();
    let client = redis::Client::open(server.url()).unwrap();
    let mut raw = client.get_connection().unwrap();
    let commands = ["set", "getrange", "del", "pexpire", "pttl", "ping"];
    for (user, keys) in [
        ("by-prefix", "~tenant-a:*"),
        ("by-namespace", "~workflow-context:{a\u{1d}*"),
    ] {
        let mut acl = redis::cmd("ACL");
        acl.arg(&["SETUSER", user, "on", ">secret", keys]);
        acl.arg(commands.map(|command| format!("+{command}")).as_slice());
        let () = acl.query(&mut raw).unwrap();
    }
    let backend = |user: &str| {
        let user = format!("redis://{user}:secret@");
        RedisBackend::connect(&server.url().replace("redis://", &user)).unwrap()
    };
    let tenant = |prefix: &str| backend("by-prefix").with_key_prefix(prefix);
    let named = |name: &str| {
        let builder = WorkflowContextStorage::builder().backend(backend("by-namespace"));
        builder.lookup_budget(PATIENCE).namespace(name)
    };

    let own = tenant("tenant-a:");
    own.write_all(&[claim(ID, &record(SAMPLED))]).unwrap();
    assert!(own.get(ID).unwrap().is_some());
    let error = causes(&tenant("tenant-b:").get(ID).unwrap_err());
    assert!(error.to_uppercase().contains("NOPERM"), "{error}");

    for (name, is_allowed) in [("a", true), ("ab", false), ("b", false)] {
        let worker = worker(named(name));
        worker.run(|| step("charge"));
        let flushed = worker.storage.flush();
        assert_eq!(flushed.is_ok(), is_allowed, "{name}: {flushed:?}");
    }
}
