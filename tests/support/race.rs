//! Two processes or workers that record the same instances of a shared backend, at once or one after the other.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use tracing_workflow_context::WorkflowContextStorage;
use tracing_workflow_context::backend::StorageBackend;

use super::{PATIENCE, Worker, patient, test_process};

const INSTANCES: usize = 10_000;

/// The URL of the server and the lookup budget in milliseconds, for a process of the race.
const RACE: &str = "WORKFLOW_CONTEXT_RACE";

/// Lets two processes record the same instances, with this lookup budget in milliseconds, and asserts that they agree. Each
/// of them is the test `one_process_of_the_race` of the module.
pub(crate) fn assert_two_processes_agree(module_path: &str, url: &str, budget: u64) {
    let mut processes = [0, 1].map(|_| racer(module_path, url, budget));
    let mut lines = processes.each_mut().map(|process| {
        BufReader::new(process.stdout.take().expect("piped"))
            .lines()
            .map(|line| line.expect("text"))
            // The test harness writes to stdout too, not always whole lines.
            .filter_map(|line| Some(line.split_once("race: ")?.1.to_owned()))
    });
    for lines in &mut lines {
        assert_eq!(lines.next().as_deref(), Some("ready"));
    }
    for process in &mut processes {
        let mut start = process.stdin.take().expect("piped");
        start.write_all(b"\n").expect("it waits");
    }
    let results = lines.map(|lines| lines.collect::<Vec<_>>());
    for mut process in processes {
        assert!(process.wait().expect("it ends").success());
    }
    let [one, other] = &results;
    assert_eq!(one.len(), INSTANCES + 1);
    assert_eq!(one[..INSTANCES], other[..INSTANCES], "they do not agree");
    let conflicts = |lines: &[String]| lines[INSTANCES].parse::<usize>().expect("a number");
    let [one, other] = [conflicts(one), conflicts(other)];
    eprintln!(
        "budget {budget} ms: {one} and {other} of {INSTANCES} instances were the other process's"
    );
    if budget == 0 {
        assert_eq!(one + other, INSTANCES, "one of two is first");
    }
}

fn racer(module_path: &str, url: &str, budget: u64) -> Child {
    test_process(module_path, "one_process_of_the_race")
        .env(RACE, format!("{url} {budget}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program can be run")
}

/// Records all instances, if this process is one of a race, with the backend at a URL.
pub(crate) fn run_one_process<B: StorageBackend>(backend: impl FnOnce(&str) -> B) {
    let Ok(race) = std::env::var(RACE) else {
        return;
    };
    let (url, budget) = race.split_once(' ').expect("two words");
    let storage = WorkflowContextStorage::builder()
        .backend(backend(url))
        .lookup_budget(Duration::from_millis(budget.parse().expect("a number")))
        .build();
    let worker = Worker::with_storage(storage.expect("sound settings"));
    let mut out = std::io::stdout();
    writeln!(out, "race: ready").expect("the parent reads it");
    std::io::stdin()
        .read_line(&mut String::new())
        .expect("a line");

    worker.run(|| {
        for number in 0..INSTANCES {
            tracing::info_span!("step", workflow.instance_id = number).in_scope(|| {});
        }
    });
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = worker.storage.flush() {
        assert!(Instant::now() < deadline, "{error}");
    }
    for number in 0..INSTANCES {
        let trace = worker.stored_trace(&number.to_string());
        writeln!(out, "race: {number} {trace}").expect("the parent reads it");
    }
    let conflicts = worker.storage.stats().conflicts;
    writeln!(out, "race: {conflicts}").expect("the parent reads it");
}

/// Lets two workers, each with a backend of its own to the same server, hand over so many instances by a flush, and asserts
/// that the second span of each continues the first one's trace.
pub(crate) fn assert_a_flushed_context_is_found<B: StorageBackend>(
    instances: usize,
    backend: impl Fn() -> B,
) {
    let [one, other] = [0, 1].map(|_| {
        let storage = patient(backend()).build();
        Worker::with_storage(storage.expect("sound settings"))
    });
    for number in 0..instances {
        let id = format!("order-{number}");
        let (first, second) = if number % 2 == 0 {
            (&one, &other)
        } else {
            (&other, &one)
        };
        first.run(|| tracing::info_span!("first", workflow.instance_id = %id).in_scope(|| {}));
        first.storage.flush().unwrap();
        second.run(|| tracing::info_span!("second", workflow.instance_id = %id).in_scope(|| {}));

        let last = |worker: &Worker| worker.spans().pop().expect("a span");
        let (first, second) = (last(first), last(second));
        assert_eq!(
            second.span_context.trace_id(),
            first.span_context.trace_id(),
            "{id}"
        );
        assert_eq!(second.parent_span_id, first.span_context.span_id(), "{id}");
        assert!(second.parent_span_is_remote);
    }
    for worker in [one, other] {
        let stats = worker.storage.stats();
        let failed = (stats.conflicts, stats.backend_errors, stats.malformed);
        assert_eq!(failed, (0, 0, 0));
    }
}
