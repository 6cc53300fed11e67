//! Workflows whose processes are all gone before anybody has told their end.

use std::sync::Arc;

use tracing_workflow_context::backend::StorageBackend;

use super::*;

/// A worker of a store, on a clock.
fn on(backend: impl StorageBackend, clock: &Arc<ManualClock>) -> Worker {
    let storage = patient(backend).durable_root(true).idle_ttl(HOUR);
    worker(storage.clock(clock.clone()).build().unwrap())
}

/// Opens and ends a span of an instance's only run, and an ordinary one inside it.
fn order(id: &str, status: Option<&str>) {
    info_span!(
        "order",
        workflow.instance_id = id,
        workflow.run_id = "run 1",
        workflow.status = status
    )
    .in_scope(|| info_span!("charge").in_scope(|| ()));
}

fn text(span: &SpanData, name: &str) -> String {
    attribute(span, name).unwrap().as_str().into_owned()
}

/// Returns the roots of an instance.
fn roots_of<'a>(spans: &'a [SpanData], id: &str) -> Vec<&'a SpanData> {
    let is_root = |span: &&SpanData| {
        attribute(span, "workflow.spans").is_some() && text(span, "workflow.instance_id") == id
    };
    spans.iter().filter(is_root).collect()
}

/// Begins a workflow out of a request, and another one that ends, in a process that then dies.
fn dies(worker: Worker) -> Vec<SpanData> {
    worker.run(|| {
        info_span!("request").in_scope(|| order(ID, None));
        order(ID, None);
        order("ended", Some("completed"));
    });
    worker.storage.flush().unwrap();
    worker.spans()
}

/// Asserts that a later process has exported the root that the one before had promised, and nothing twice.
fn assert_abandoned(before: &[SpanData], after: &[SpanData]) {
    let all = [before, after].concat();
    assert_eq!(roots_of(&all, "ended").len(), 1);
    let [root] = roots_of(&all, ID)[..] else {
        panic!("one root: {:?}", roots_of(&all, ID));
    };
    let own: Vec<_> = before
        .iter()
        .filter(|span| span.parent_span_id == root.span_context.span_id())
        .collect();
    assert_eq!(own.len(), 2);
    let request = before.iter().find(|span| span.name == "request").unwrap();
    assert_eq!(root.parent_span_id, request.span_context.span_id());
    assert_eq!(root.span_context.trace_id(), own[0].span_context.trace_id());
    assert_eq!(root.name, "order");
    assert_eq!(text(root, "workflow.status"), "abandoned");
    assert_eq!(text(root, "workflow.run_id"), "run 1");
    assert_eq!(number(root, "workflow.spans"), 2);
    assert_eq!(number(root, "workflow.processes"), 1);
    let (starts, ends) = (
        |span: &&SpanData| span.start_time,
        |span: &&SpanData| span.end_time,
    );
    assert!(root.start_time <= own.iter().map(starts).min().unwrap());
    assert_eq!(Some(root.end_time), own.iter().map(ends).max());
}

/// Waits until the worker has exported that many roots.
fn wait_for(worker: &Worker, roots: u64) {
    wait_until("it is exported", || {
        worker.storage.stats().exported_roots == roots
    });
}

#[test]
fn a_workflow_that_no_living_process_has_seen_is_abandoned() {
    let clock = ManualClock::new();
    let backend = MemoryBackend::with_clock(clock.clone());
    let before = dies(on(backend.clone(), &clock));
    clock.advance(2 * HOUR);
    let later = on(backend, &clock);
    later.run(|| order("another", None));
    wait_for(&later, 1);
    assert_abandoned(&before, &later.spans());
}

/// Twenty times, since the two meet anywhere in their sweeps.
#[test]
fn of_two_living_processes_one_tells_that_a_workflow_was_abandoned() {
    for _ in 0..20 {
        let clock = ManualClock::new();
        let backend = MemoryBackend::with_clock(clock.clone());
        let before = dies(on(backend.clone(), &clock));
        clock.advance(2 * HOUR);
        let later = ["another", "a third"].map(|id| (on(backend.clone(), &clock), id));
        std::thread::scope(|scope| {
            for (worker, id) in &later {
                scope.spawn(|| worker.run(|| order(id, None)));
            }
        });
        let after = || later.each_ref().map(|(worker, _)| worker.spans()).concat();
        wait_until("it is exported", || !roots_of(&after(), ID).is_empty());
        assert_abandoned(&before, &after());
    }
}

/// Nothing is added to its root for as long as to that of the abandoned one, which the same sweep finds.
#[test]
fn a_workflow_whose_record_is_in_use_is_not_abandoned() {
    let clock = ManualClock::new();
    let backend = MemoryBackend::with_clock(clock.clone());
    let first = on(backend.clone(), &clock);
    first.run(|| order("in use", None));
    let before = dies(first);
    for _ in 0..2 {
        clock.advance(50 * HOUR / 60);
        let waiting = on(backend.clone(), &clock);
        assert!(waiting.storage.get("in use").unwrap().is_some());
        waiting.storage.flush().unwrap();
    }
    let later = on(backend, &clock);
    later.run(|| order("another", None));
    wait_for(&later, 1);
    let after = later.spans();
    assert_abandoned(&before, &after);
    assert_eq!(roots_of(&after, "in use").len(), 0);
}

/// On real time: an idle time is two seconds, so that the sweep finds what nobody has used for so long.
fn is_abandoned_on<B: StorageBackend>(connect: impl Fn() -> B) {
    let on_it = || {
        let storage = patient(connect()).durable_root(true);
        let storage = storage.idle_ttl(Duration::from_secs(2));
        worker(storage.build().unwrap())
    };
    let before = dies(on_it());
    let later = on_it();
    later.run(|| order("another", None));
    wait_until("it is exported", || {
        !roots_of(&later.spans(), ID).is_empty()
    });
    assert_abandoned(&before, &later.spans());
}

#[cfg(feature = "redb")]
#[test]
fn a_workflow_left_in_a_file_is_abandoned() {
    let directory = Directory::new();
    is_abandoned_on(|| open(&directory.file("contexts")));
}

#[cfg(feature = "redis")]
#[test]
fn a_workflow_left_on_a_redis_server_is_abandoned() {
    let server = RedisServer::start();
    is_abandoned_on(|| tracing_workflow_context::RedisBackend::connect(&server.url()).unwrap());
}

#[cfg(feature = "postgres")]
#[test]
fn a_workflow_left_on_a_postgres_server_is_abandoned() {
    let server = PostgresServer::start();
    is_abandoned_on(|| tracing_workflow_context::PostgresBackend::connect(&server.url()).unwrap());
}
