//! Two processes that record the same instances, at once and one after the other.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use tracing_workflow_context::{RedisBackend, WorkflowContextStorage};

use super::*;

const INSTANCES: usize = 10_000;

/// The URL of the server and the lookup budget in milliseconds, for a process of the race.
const RACE: &str = "WORKFLOW_CONTEXT_RACE";

#[test]
fn two_processes_agree_on_every_instance() {
    // Without lookups each of them claims every instance; with them most are found.
    for budget in [0, 5] {
        let server = RedisServer::start();
        let mut processes = [0, 1].map(|_| racer(&server.url(), budget));
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
}

fn racer(url: &str, budget: u64) -> Child {
    test_process(module_path!(), "one_process_of_the_race")
        .env(RACE, format!("{url} {budget}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program can be run")
}

#[test]
#[ignore = "run by two_processes_agree_on_every_instance"]
fn one_process_of_the_race() {
    let Ok(race) = std::env::var(RACE) else {
        return;
    };
    let (url, budget) = race.split_once(' ').expect("two words");
    let backend = RedisBackend::connect(url).expect("a URL");
    let storage = WorkflowContextStorage::builder()
        .backend(backend.with_response_timeout(PATIENCE))
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

/// Nothing was looked up or written yet.
#[test]
fn a_storage_connects_once_it_is_built() {
    let server = RedisServer::start();
    let storage = WorkflowContextStorage::builder().backend(backend(&server));
    let _storage = storage.build().expect("sound settings");
    let mut client = raw(&server);
    wait_until("both threads have a connection, beside this one", || {
        let clients: String = redis::cmd("CLIENT")
            .arg("LIST")
            .query(&mut client)
            .expect("a list");
        clients.lines().count() == 3
    });
}

#[test]
fn a_flushed_context_is_found_by_the_next_worker() {
    let server = RedisServer::start();
    let [one, other] = [0, 1].map(|_| {
        let storage = WorkflowContextStorage::builder()
            .backend(backend(&server))
            .lookup_budget(PATIENCE)
            .build();
        Worker::with_storage(storage.expect("sound settings"))
    });
    for number in 0..100 {
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
        assert_eq!(
            (stats.conflicts, stats.backend_errors, stats.malformed),
            (0, 0, 0)
        );
    }
}
