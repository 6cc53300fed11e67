//! Feature `durable-root`: a workflow has a span of its own, from its first sight to its end, exported once.

mod abandoned;
mod derived;
mod suspended;

use std::time::Duration;

use opentelemetry::Context;
use opentelemetry::trace::Status;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    Sampler, SdkTracerProvider, Span, SpanData, SpanProcessor, TracerProviderBuilder,
};
use tracing::{Dispatch, info_span, span::EnteredSpan};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::testing::TraceForest;
use tracing_workflow_context::{
    MemoryBackend, WorkflowContext, WorkflowContextStorage, WorkflowContextStorageBuilder,
};

use crate::support::*;

const ID: &str = "order-42";

fn builder() -> WorkflowContextStorageBuilder {
    WorkflowContextStorage::builder().durable_root(true)
}

/// A worker whose provider has both pieces.
fn worker(storage: WorkflowContextStorage) -> Worker {
    sampled(storage, Sampler::AlwaysOn)
}

fn sampled(storage: WorkflowContextStorage, root: Sampler) -> Worker {
    let provider = SdkTracerProvider::builder()
        .with_id_generator(storage.id_generator())
        .with_sampler(storage.sampler(Sampler::ParentBased(Box::new(root))));
    assembled(provider, storage)
}

fn assembled(provider: TracerProviderBuilder, storage: WorkflowContextStorage) -> Worker {
    Worker::assembled(provider, storage, true, |layer| {
        Dispatch::new(tracing_subscriber::registry().with(layer))
    })
}

fn order() -> EnteredSpan {
    info_span!("order", workflow.instance_id = ID).entered()
}

fn step(worker: &Worker, name: &str) {
    worker.run(|| {
        info_span!("step", otel.name = name, workflow.instance_id = ID).in_scope(|| ());
    });
}

fn end(worker: &Worker, status: &str) {
    worker.run(|| {
        info_span!("end", workflow.instance_id = ID, workflow.status = status).in_scope(|| ());
    });
}

/// Returns the span of that name that is no root.
#[track_caller]
fn child(worker: &Worker, name: &str) -> SpanData {
    let spans = worker.spans().into_iter();
    let mut named =
        spans.filter(|span| span.name == name && attribute(span, "workflow.spans").is_none());
    named.next().expect("it was exported")
}

/// Returns the only span of the forest that carries the counts of a root.
#[track_caller]
fn root(spans: &[SpanData]) -> SpanData {
    let mut roots = spans
        .iter()
        .filter(|span| attribute(span, "workflow.spans").is_some());
    let root = roots.next().expect("a root was exported").clone();
    assert!(roots.next().is_none(), "one root");
    root
}

fn number(span: &SpanData, name: &str) -> i64 {
    match attribute(span, name) {
        Some(opentelemetry::Value::I64(number)) => number,
        other => panic!("{name} is {other:?}"),
    }
}

#[track_caller]
fn assert_spans(root: &SpanData, children: &[SpanData]) {
    for child in children {
        let ids = (child.span_context.trace_id(), child.span_context.span_id());
        if ids == (root.span_context.trace_id(), root.span_context.span_id()) {
            continue;
        }
        assert_eq!(ids.0, root.span_context.trace_id(), "{}", child.name);
        assert!(child.start_time >= root.start_time, "{}", child.name);
        assert!(child.end_time <= root.end_time, "{}", child.name);
    }
}

#[test]
fn a_workflow_is_one_root_from_its_first_span_to_its_end() {
    let worker = worker(builder().build().unwrap());
    step(&worker, "reserve");
    step(&worker, "charge");
    assert_eq!(worker.storage.stats().exported_roots, 0);
    end(&worker, "completed");
    let spans = worker.spans();
    let root = root(&spans);
    assert_eq!(root.name, "reserve", "the name of the first span");
    assert_root(&root);
    worker.forest().assert_one_trace().assert_rooted();
    for name in ["reserve", "charge", "end"] {
        let parent = child(&worker, name).parent_span_id;
        assert_eq!(parent, root.span_context.span_id(), "{name}");
    }
    assert_spans(&root, &spans);
    assert_eq!(number(&root, "workflow.spans"), 3);
    assert_eq!(number(&root, "workflow.processes"), 1);
    assert_eq!(number(&root, "workflow.resumes"), 0);
    assert_eq!(
        attribute(&root, "workflow.status").unwrap().as_str(),
        "completed"
    );
    assert_eq!(
        attribute(&root, "workflow.instance_id").unwrap().as_str(),
        ID
    );
    assert_eq!(root.status, Status::Unset);
    assert_eq!(worker.storage.stats().exported_roots, 1);
    // Late spans and a second end change nothing.
    step(&worker, "late");
    end(&worker, "failed");
    assert_eq!(worker.storage.stats().exported_roots, 1);
    assert_eq!(
        worker.span("late").parent_span_id,
        root.span_context.span_id()
    );
}

#[test]
fn an_end_that_is_told_in_an_open_span_waits_for_it() {
    let worker = worker(builder().build().unwrap());
    worker.run(|| {
        let outer = info_span!("outer", workflow.instance_id = ID, workflow.name = "order");
        let outer = outer.entered();
        info_span!(
            "inner",
            workflow.instance_id = ID,
            workflow.status = "timed_out"
        )
        .in_scope(|| ());
        assert_eq!(worker.storage.stats().exported_roots, 0);
        drop(outer);
    });
    let spans = worker.spans();
    let root = root(&spans);
    assert_eq!(root.name, "order");
    assert_eq!(root.status, Status::error("timed_out"));
    assert_spans(&root, &spans);
    assert_eq!(spans.last().map(|span| span.name.as_ref()), Some("order"));
}

#[test]
fn a_request_stays_the_parent_of_the_root() {
    let worker = worker(builder().build().unwrap());
    worker.run(|| {
        let _request = info_span!("request").entered();
        drop(order());
    });
    assert!(worker.storage.complete(ID, "canceled").unwrap());
    let root = root(&worker.spans());
    let request = worker.span("request");
    assert_eq!(root.parent_span_id, request.span_context.span_id());
    assert_eq!(root.status, Status::Unset, "to cancel is no error");
    worker.forest().assert_one_trace().assert_no_orphans();
}

#[test]
fn calls_tell_the_end_too() {
    let worker = worker(builder().build().unwrap());
    worker.run(|| drop(order()));
    assert!(worker.storage.complete(ID, "running").is_err());
    assert!(!worker.storage.complete("unknown", "failed").unwrap());
    assert!(worker.storage.cleanup(ID).unwrap());
    let root = root(&worker.spans());
    assert_eq!(
        attribute(&root, "workflow.status").unwrap().as_str(),
        "completed"
    );
}

#[test]
fn the_close_of_a_completing_span_is_the_end() {
    for (fails, status) in [(false, "completed"), (true, "failed")] {
        let storage = builder().completing_spans(["dbos::workflow"]);
        let worker = worker(storage.build().unwrap());
        worker.run(|| {
            let span = info_span!(
                target: "dbos",
                "workflow",
                workflow.instance_id = ID,
                otel.status_code = tracing::field::Empty
            );
            span.in_scope(|| {
                drop(order());
                if fails {
                    span.record("otel.status_code", "ERROR");
                }
            });
            info_span!("workflow", workflow.instance_id = "another").in_scope(|| ());
        });
        let root = root(&worker.spans());
        assert_eq!(
            attribute(&root, "workflow.status").unwrap().as_str(),
            status
        );
        assert_eq!(
            attribute(&root, "workflow.instance_id").unwrap().as_str(),
            ID
        );
    }
}

#[test]
fn a_start_marker_shows_a_workflow_before_it_ends() {
    let worker = worker(builder().start_marker(true).build().unwrap());
    worker.run(|| drop(order()));
    let marker = worker.span("order started");
    assert_eq!(marker.start_time, marker.end_time);
    assert_eq!(attribute(&marker, "workflow.pending"), Some(true.into()));
    worker.storage.complete(ID, "completed").unwrap();
    let root = root(&worker.spans());
    assert_eq!(marker.parent_span_id, root.span_context.span_id());
}

#[test]
fn a_missing_piece_switches_durable_roots_off_and_exports_no_probe() {
    let pieces = [(false, false), (true, false), (false, true)];
    for (has_generator, has_sampler) in pieces {
        let storage = builder().build().unwrap();
        let mut provider = SdkTracerProvider::builder();
        if has_generator {
            provider = provider.with_id_generator(storage.id_generator());
        }
        if has_sampler {
            provider = provider.with_sampler(storage.sampler(Sampler::AlwaysOn));
        }
        let worker = assembled(provider, storage);
        step(&worker, "first");
        step(&worker, "second");
        end(&worker, "completed");
        assert_eq!(worker.names(), ["end", "first", "second"]);
        assert_root(&worker.span("first"));
        assert_continues(&worker.span("second"), &worker.span("first").span_context);
    }
}

#[test]
fn explain_tells_of_the_root_and_of_the_missing_line() {
    let worker = worker(builder().build().unwrap());
    let explained = |worker: &Worker| worker.storage.explain(ID).to_string();
    worker.run(|| {
        let _order = order();
        info_span!("step", workflow.instance_id = ID).in_scope(|| ());
        let text = explained(&worker);
        let open = "open until its end is told by workflow.status, a span in completing_spans, complete or cleanup; \
                    1 spans have ended here, 1 are open";
        assert!(text.contains("workflow span \"order\""), "{text}");
        assert!(text.contains(open), "{text}");
        worker.storage.complete(ID, "failed").unwrap();
        assert!(explained(&worker).contains("ends as failed"));
    });
    let text = explained(&worker);
    assert!(text.contains("ended as failed; 2 spans"), "{text}");

    let storage = builder().build().unwrap();
    let provider = SdkTracerProvider::builder().with_sampler(storage.sampler(Sampler::AlwaysOn));
    let worker = assembled(provider, storage);
    step(&worker, "first");
    let text = explained(&worker);
    let missing = "durable roots are off: the tracer provider lacks .with_id_generator(storage.id_generator())";
    assert!(text.contains(missing), "{text}");
}

#[test]
fn a_context_of_the_trace_that_is_stored_by_a_call_leaves_the_root_open() {
    let backend = MemoryBackend::new();
    let make = || worker(patient(backend.clone()).durable_root(true).build().unwrap());
    let (one, other) = (make(), make());
    step(&one, "first");
    let first = one.span("first").span_context.clone();
    let context = WorkflowContext::try_from(&first).unwrap();
    one.storage.store(ID, context).unwrap();
    one.storage.create_resumed(ID, None).unwrap();
    step(&one, "second");
    one.storage.flush().unwrap();
    step(&other, "third");
    end(&other, "completed");
    other.storage.flush().unwrap();
    let spans = [one.spans(), other.spans()].concat();
    let root = root(&spans);
    let status = attribute(&root, "workflow.status").unwrap();
    assert_eq!(status.as_str(), "completed");
    assert_eq!(
        number(&root, "workflow.spans"),
        4,
        "the agent's is no span of a tracer"
    );
    TraceForest::from_spans(&spans)
        .assert_one_trace()
        .assert_rooted();
}

#[test]
fn a_tenth_of_the_instances_is_sampled_each_as_a_whole() {
    let worker = sampled(builder().build().unwrap(), Sampler::TraceIdRatioBased(0.1));
    let ids: Vec<_> = (0..1_000).map(|n| format!("order-{n}")).collect();
    for status in ["running", "running", "completed"] {
        for id in &ids {
            worker.run(|| {
                info_span!("step", workflow.instance_id = id, workflow.status = status)
                    .in_scope(|| ());
            });
        }
    }
    let forest = worker.forest();
    let traces = forest.trace_count();
    assert!((50..200).contains(&traces), "{traces}");
    assert_eq!(forest.span_count(), 4 * traces);
    forest.assert_no_orphans().assert_no_duplicates();
}

#[test]
fn a_new_run_ends_the_root_of_the_one_before_and_links_both_ways() {
    let worker = worker(builder().build().unwrap());
    worker.step("1", Tags::instance(ID).run("1"));
    worker.step("2", Tags::instance(ID).run("2"));
    worker.storage.complete(ID, "completed").unwrap();
    let spans = worker.spans();
    let of_run = |run: &str| {
        let is_root = |span: &&SpanData| attribute(span, "workflow.spans").is_some();
        let mut roots = spans.iter().filter(is_root);
        let is_run = |span: &&SpanData| {
            attribute(span, "workflow.run_id").is_some_and(|id| id.as_str() == run)
        };
        roots.find(is_run).expect("its root").clone()
    };
    let (first, second) = (of_run("1"), of_run("2"));
    assert_eq!(
        attribute(&first, "workflow.status").unwrap().as_str(),
        "continued"
    );
    assert_eq!(
        links(&first),
        [("new_run".to_owned(), ids(&second.span_context))]
    );
    assert_eq!(
        links(&second),
        [("new_run".to_owned(), ids(&first.span_context))]
    );
    assert_eq!(
        child(&worker, "2").parent_span_id,
        second.span_context.span_id()
    );
    assert_eq!(worker.forest().trace_count(), 2);
}

#[test]
fn workers_that_share_nothing_meet_in_derived_ids() {
    let make = || {
        let storage = builder().derived_trace_ids(true).namespace("orders");
        worker(storage.build().unwrap())
    };
    let (one, other) = (make(), make());
    step(&one, "one");
    step(&other, "other");
    end(&other, "completed");
    let root = root(&other.spans());
    assert_eq!(
        root.span_context.trace_id().to_string(),
        "c5fc75afbef42b3e85204c05940dabfe"
    );
    assert_eq!(root.span_context.span_id().to_string(), "b03bd634f4249522");
    assert_eq!(one.span("one").parent_span_id, root.span_context.span_id());
    assert_eq!(one.trace_of("one"), root.span_context.trace_id());
    // Its low 7 bytes may be called random.
    assert_eq!(one.stored(ID).trace_flags().to_u8() & 2, 2);
}

#[test]
fn workers_that_share_a_backend_export_one_root_with_the_sum_of_all() {
    let backend = MemoryBackend::new();
    let clock = ManualClock::new();
    let mut spans = Vec::new();
    let mut exported = 0;
    for number in 0..5 {
        let storage = patient(backend.clone()).durable_root(true);
        let worker = worker(storage.clock(clock.clone()).build().unwrap());
        step(&worker, &format!("{number}"));
        step(&worker, &format!("{number} too"));
        worker.storage.flush().unwrap();
        clock.advance(HOUR);
        if number == 4 {
            end(&worker, "failed");
            worker.storage.flush().unwrap();
        }
        exported += worker.storage.stats().exported_roots;
        spans.extend(worker.spans());
        // Killed: nothing is ended.
        std::mem::forget(worker.storage.clone());
    }
    assert_eq!(exported, 1);
    let root = root(&spans);
    assert_eq!(root.status, Status::error("failed"));
    assert_eq!(number(&root, "workflow.spans"), 11);
    assert_eq!(number(&root, "workflow.processes"), 5);
    assert_eq!(number(&root, "workflow.resumes"), 4);
    assert_eq!(
        root.events
            .iter()
            .filter(|event| event.name == "resumed")
            .count(),
        4
    );
    let forest = tracing_workflow_context::testing::TraceForest::from_spans(&spans);
    forest
        .assert_one_trace()
        .assert_no_orphans()
        .assert_no_duplicates();
}

#[test]
fn two_workers_that_see_the_end_at_once_export_one_root() {
    for _ in 0..200 {
        let backend = MemoryBackend::new();
        let workers =
            [(); 2].map(|()| worker(patient(backend.clone()).durable_root(true).build().unwrap()));
        step(&workers[0], "first");
        workers[0].storage.flush().unwrap();
        step(&workers[1], "second");
        std::thread::scope(|scope| {
            for worker in &workers {
                scope.spawn(|| {
                    end(worker, "completed");
                    worker.storage.flush().unwrap();
                });
            }
        });
        let exported = workers.iter().map(|it| it.storage.stats().exported_roots);
        assert_eq!(exported.sum::<u64>(), 1);
    }
}

/// The end was told of its own root, which gives way.
#[test]
fn an_end_told_by_a_worker_that_was_not_the_first_is_that_of_the_root_which_was() {
    // With and without an open span when it learns that.
    for is_open in [true, false] {
        let backend = MemoryBackend::new();
        let first = worker(patient(backend.clone()).durable_root(true).build().unwrap());
        step(&first, "first");
        first.storage.flush().unwrap();
        let controlled = ControlledBackend::over(backend);
        controlled.set(Call::Get, Behaviour::Misses);
        controlled.set(Call::Write, Behaviour::Blocks);
        let storage = patient(controlled.clone()).durable_root(true);
        let late = worker(storage.build().unwrap());
        late.run(|| {
            let open = order();
            let end = info_span!("end", workflow.instance_id = ID, workflow.status = "failed");
            end.in_scope(|| ());
            drop(end);
            let _open = is_open.then_some(open);
            controlled.set(Call::Write, Behaviour::Works);
            late.storage.flush().unwrap();
        });
        wait_until("both roots are exported", || {
            late.storage.stats().exported_roots == 2
        });

        let first = child(&first, "first");
        let is_root = |span: &&SpanData| attribute(span, "workflow.spans").is_some();
        let spans = late.spans();
        let of_first =
            |span: &&SpanData| span.span_context.trace_id() == first.span_context.trace_id();
        let roots: Vec<_> = spans.iter().filter(is_root).filter(of_first).collect();
        assert_eq!(roots.len(), 1, "with an open span: {is_open}");
        assert_eq!(roots[0].span_context.span_id(), first.parent_span_id);
        assert_eq!(roots[0].status, Status::error("failed"));
        let own = spans.iter().filter(is_root).find(|span| !of_first(span));
        let status = own.and_then(|own| attribute(own, "workflow.status"));
        assert_eq!(
            status,
            Some("superseded".into()),
            "with an open span: {is_open}"
        );
    }
}

#[test]
fn a_root_never_ends_before_it_starts_nor_before_a_child_whatever_the_clock_says() {
    let clock = ManualClock::new();
    let worker = worker(builder().clock(clock.clone()).build().unwrap());
    step(&worker, "first");
    clock.rewind(100_000 * HOUR);
    end(&worker, "completed");
    let root = root(&worker.spans());
    assert!(root.end_time >= root.start_time);
    assert!(root.end_time >= child(&worker, "first").end_time);
}

#[test]
fn a_forgotten_workflow_is_abandoned_and_its_trace_not_headless() {
    let clock = ManualClock::new();
    let storage = builder().clock(clock.clone()).idle_ttl(HOUR);
    let worker = worker(storage.build().unwrap());
    step(&worker, "first");
    clock.advance(2 * HOUR);
    assert_eq!(worker.storage.stats().stored_instances, 0);
    wait_until("it is exported", || {
        worker.storage.stats().exported_roots == 1
    });
    let root = root(&worker.spans());
    assert_eq!(
        attribute(&root, "workflow.status").unwrap().as_str(),
        "abandoned"
    );
    worker.forest().assert_one_trace().assert_no_orphans();
}

#[test]
fn a_workflow_that_another_worker_still_uses_is_not_abandoned() {
    let clock = ManualClock::new();
    let backend = MemoryBackend::new();
    let make = |idle| {
        let storage = patient(backend.clone()).durable_root(true);
        worker(storage.clock(clock.clone()).idle_ttl(idle).build().unwrap())
    };
    let (forgetful, other) = (make(HOUR), make(100 * HOUR));
    step(&other, "first");
    other.storage.flush().unwrap();
    step(&forgetful, "second");
    forgetful.storage.flush().unwrap();
    clock.advance(2 * HOUR);
    assert_eq!(forgetful.storage.stats().stored_instances, 0);
    // Several times the interval at which forgotten roots are looked at.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(forgetful.storage.stats().exported_roots, 0);
    end(&other, "completed");
    other.storage.flush().unwrap();
    let spans: Vec<_> = [&forgetful, &other]
        .into_iter()
        .flat_map(Worker::spans)
        .collect();
    assert_eq!(number(&root(&spans), "workflow.spans"), 3);
}

/// The parts of a root outlive its end. A worker that learns of the end later exports nothing more.
#[test]
fn an_end_that_reaches_another_worker_leaves_one_root() {
    let clock = ManualClock::new();
    let backend = MemoryBackend::with_clock(clock.clone());
    let [a, b] = [(); 2].map(|()| {
        let builder = builder().backend(backend.clone()).clock(clock.clone());
        worker(builder.lookup_budget(PATIENCE).build().unwrap())
    });
    step(&a, "reserve");
    a.storage.flush().unwrap();
    step(&b, "charge");
    b.storage.flush().unwrap();
    end(&a, "completed");
    a.storage.flush().unwrap();
    wait_until("the root is exported", || {
        a.storage.stats().exported_roots == 1
    });
    clock.advance(Duration::from_secs(4 * 60));
    wait_until("the end is seen", || {
        b.storage.explain(ID).to_string().contains("completed")
    });
    clock.advance(Duration::from_secs(2 * 60));
    assert_eq!(b.storage.get(ID).unwrap(), None);
    // The next instance of that id has a root of its own, whoever sees it.
    step(&b, "anew");
    b.storage.flush().unwrap();
    step(&a, "also anew");
    let (root, anew) = (root(&a.spans()), child(&b, "anew"));
    assert_eq!(number(&root, "workflow.spans"), 3);
    assert_ne!(anew.span_context.trace_id(), root.span_context.trace_id());
    let also = child(&a, "also anew");
    assert_eq!(also.span_context.trace_id(), anew.span_context.trace_id());
    assert_eq!(b.storage.stats().exported_roots, 0);
}

#[test]
fn a_late_id_gives_its_span_a_root_beneath_it() {
    let worker = worker(builder().build().unwrap());
    worker.run(|| {
        let span = info_span!("handler", workflow.instance_id = tracing::field::Empty).entered();
        info_span!("before").in_scope(|| ());
        span.record("workflow.instance_id", ID);
        drop(span);
        drop(order());
    });
    worker.storage.complete(ID, "completed").unwrap();
    let root = root(&worker.spans());
    assert_eq!(
        root.parent_span_id,
        child(&worker, "handler").span_context.span_id()
    );
    assert_eq!(
        worker.span("order").parent_span_id,
        root.span_context.span_id()
    );
    worker.forest().assert_one_trace().assert_no_orphans();
}

/// Panics when a root ends.
#[derive(Debug)]
struct PanicsAtRoots;

impl SpanProcessor for PanicsAtRoots {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        assert!(
            attribute(&span, "workflow.spans").is_none(),
            "it was told to"
        );
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

#[test]
fn a_panic_while_a_root_is_exported_is_counted_and_leaves_no_id_for_the_next_span() {
    let storage = builder().build().unwrap();
    let provider = SdkTracerProvider::builder()
        .with_id_generator(storage.id_generator())
        .with_sampler(storage.sampler(Sampler::AlwaysOn))
        .with_span_processor(PanicsAtRoots);
    let worker = assembled(provider, storage);
    worker.run(|| drop(order()));
    let root = worker.stored(ID);
    assert!(worker.storage.complete(ID, "completed").unwrap());
    let stats = worker.storage.stats();
    assert_eq!(
        (stats.panics, stats.exported_roots, stats.lost_roots),
        (1, 0, 1)
    );
    worker.run(|| info_span!("next").in_scope(|| ()));
    let next = worker.span("next").span_context;
    assert_ne!(next.trace_id(), root.trace_id());
    assert_ne!(next.span_id(), root.span_id());
}

#[test]
fn no_two_spans_of_eight_threads_have_one_id() {
    let worker = worker(builder().build().unwrap());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let worker = &worker;
            scope.spawn(move || {
                worker.run(|| {
                    for n in 0..100 {
                        let id = format!("order-{}", n * 8 + thread);
                        info_span!("step", workflow.instance_id = id).in_scope(|| ());
                        info_span!("shared", workflow.instance_id = n).in_scope(|| ());
                        info_span!("plain").in_scope(|| ());
                        assert!(worker.storage.complete(&id, "completed").unwrap());
                    }
                });
            });
        }
    });
    let forest = worker.forest();
    assert_eq!(forest.span_count(), 8 * 100 * 4);
    forest.assert_no_duplicates();
}

/// Five processes work on one workflow, four of which are killed with SIGKILL.
#[cfg(any(feature = "redb", feature = "redis"))]
mod killed {
    use std::io::{BufRead as _, BufReader};
    use std::process::Stdio;
    use std::time::SystemTime;

    use opentelemetry::trace::{SpanContext, SpanId, SpanKind, TraceFlags, TraceId};

    use super::*;

    const STORE: &str = "DURABLE_ROOT_STORE";
    const NUMBER: &str = "DURABLE_ROOT_PROCESS";
    const PROCESSES: u32 = 5;

    fn open(store: &str) -> WorkflowContextStorage {
        #[cfg(feature = "redis")]
        if store.starts_with("redis://") {
            let backend = tracing_workflow_context::RedisBackend::connect(store).unwrap();
            return patient(backend).durable_root(true).build().unwrap();
        }
        #[cfg(feature = "redb")]
        return patient(tracing_workflow_context::RedbBackend::open(store).unwrap())
            .durable_root(true)
            .build()
            .unwrap();
        #[cfg(not(feature = "redb"))]
        panic!("no such store: {store}");
    }

    #[test]
    #[ignore = "the process that the tests beside it start and kill"]
    fn a_process() {
        let (Ok(store), Ok(number)) = (std::env::var(STORE), std::env::var(NUMBER)) else {
            return;
        };
        let number: u32 = number.parse().unwrap();
        let worker = worker(open(&store));
        step(&worker, &format!("{number}"));
        step(&worker, &format!("{number} too"));
        if number + 1 == PROCESSES {
            end(&worker, "completed");
        }
        worker.storage.flush().unwrap();
        for span in worker.spans() {
            let nanos = |time: SystemTime| {
                let since = time.duration_since(SystemTime::UNIX_EPOCH);
                since.unwrap().as_nanos()
            };
            let is_root = attribute(&span, "workflow.spans").is_some();
            let count = |name| {
                if is_root {
                    super::number(&span, name)
                } else {
                    0
                }
            };
            println!(
                "\nspan|{}|{}|{}|{}|{}|{}|{}|{}|{}",
                span.span_context.trace_id(),
                span.span_context.span_id(),
                span.parent_span_id,
                nanos(span.start_time),
                nanos(span.end_time),
                span.name,
                count("workflow.spans"),
                count("workflow.processes"),
                count("workflow.resumes"),
            );
        }
        println!("\nflushed");
        // Until it is killed, or its parent has ended.
        std::io::stdin().lines().for_each(drop);
    }

    fn read(line: &str) -> SpanData {
        let parts: Vec<_> = line.split('|').collect();
        let [
            _,
            trace,
            span,
            parent,
            start,
            end,
            name,
            spans,
            processes,
            resumes,
        ] = parts[..]
        else {
            panic!("no span: {line}");
        };
        let time =
            |nanos: &str| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos.parse().unwrap());
        let counts = [
            ("workflow.spans", spans),
            ("workflow.processes", processes),
            ("workflow.resumes", resumes),
        ];
        let counts = counts
            .map(|(name, count)| opentelemetry::KeyValue::new(name, count.parse::<i64>().unwrap()));
        SpanData {
            span_context: SpanContext::new(
                TraceId::from_hex(trace).unwrap(),
                SpanId::from_hex(span).unwrap(),
                TraceFlags::SAMPLED,
                true,
                Default::default(),
            ),
            parent_span_id: SpanId::from_hex(parent).unwrap(),
            parent_span_is_remote: true,
            span_kind: SpanKind::Internal,
            name: name.to_owned().into(),
            start_time: time(start),
            end_time: time(end),
            attributes: match spans {
                "0" => Vec::new(),
                _ => counts.to_vec(),
            },
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: Status::Unset,
            instrumentation_scope: Default::default(),
        }
    }

    fn run(store: &str) {
        let mut spans = Vec::new();
        for number in 0..PROCESSES {
            let mut process = test_process(module_path!(), "a_process")
                .env(STORE, store)
                .env(NUMBER, number.to_string())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            for line in BufReader::new(process.stdout.take().unwrap()).lines() {
                match &*line.unwrap() {
                    "flushed" => process.kill().unwrap(),
                    line if line.starts_with("span|") => spans.push(read(line)),
                    _ => {}
                }
            }
            process.wait().unwrap();
        }
        let forest = tracing_workflow_context::testing::TraceForest::from_spans(&spans);
        (forest.assert_one_trace().assert_rooted()).assert_no_duplicates();
        let root = root(&spans);
        assert_eq!(
            number(&root, "workflow.spans"),
            i64::from(2 * PROCESSES + 1)
        );
        assert_eq!(number(&root, "workflow.processes"), i64::from(PROCESSES));
        assert_eq!(number(&root, "workflow.resumes"), i64::from(PROCESSES - 1));
        let others = || {
            spans
                .iter()
                .filter(|span| span.span_context != root.span_context)
        };
        assert_eq!(others().count(), 2 * PROCESSES as usize + 1);
        let first = others().map(|span| span.start_time).min().unwrap();
        let last = others().map(|span| span.end_time).max().unwrap();
        assert_eq!(root.start_time, first);
        assert!(root.end_time.duration_since(last).unwrap() < Duration::from_millis(50));
    }

    #[cfg(feature = "redb")]
    #[test]
    fn five_processes_on_one_file_leave_one_root() {
        let directory = Directory::new();
        run(directory.file("contexts").to_str().expect("text"));
    }

    #[cfg(feature = "redis")]
    #[test]
    fn five_processes_on_one_server_leave_one_root() {
        let server = RedisServer::start();
        run(&server.url());
    }
}

thread_local! {
    static IS_IN_CLOCK: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// A clock that uses the storage whose clock it is.
#[derive(Debug, Default)]
struct CallsBack(std::sync::OnceLock<WorkflowContextStorage>);

impl tracing_workflow_context::Clock for CallsBack {
    fn now(&self) -> std::time::SystemTime {
        if !IS_IN_CLOCK.replace(true) {
            if let Some(storage) = self.0.get() {
                storage.complete(ID, "completed").unwrap();
            }
            IS_IN_CLOCK.set(false);
        }
        std::time::SystemTime::now()
    }
}

/// Would deadlock otherwise.
#[test]
fn no_lock_of_a_root_is_held_while_the_clock_is_read() {
    let clock = std::sync::Arc::new(CallsBack::default());
    let storage = patient(MemoryBackend::new()).durable_root(true);
    let worker = worker(storage.clock(clock.clone()).build().unwrap());
    worker.run(|| {
        let _order = order();
        // The place of this process is taken, so that the end of a span is written to it.
        worker.storage.flush().unwrap();
        assert!(clock.0.set(worker.storage.clone()).is_ok());
        info_span!("inside", workflow.instance_id = ID).in_scope(|| ());
    });
    worker.storage.flush().unwrap();
    assert_eq!(worker.storage.stats().exported_roots, 1);
}
