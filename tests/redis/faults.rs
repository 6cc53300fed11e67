//! What happens to the server in the middle of load costs continuity for a while, and nothing else.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use tracing_workflow_context::{RedisBackend, WorkflowContextStorage};

use super::{PATIENCE, Proxy, RedisServer, Says, Worker, backend};

const BUDGET: Duration = Duration::from_millis(5);

/// How much later than the budget a span may start before something is wrong beyond doubt: the machine may be busy.
const GROSS: Duration = Duration::from_millis(100);

/// The longest of many times.
#[derive(Default)]
struct Longest(AtomicU64);

impl Longest {
    fn time<R>(&self, run: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = run();
        let took = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.0.fetch_max(took, Relaxed);
        result
    }

    fn get(&self) -> Duration {
        Duration::from_nanos(self.0.load(Relaxed))
    }
}

/// A worker with spans on several threads, and beside it one without a backend, which tells how busy the machine is.
struct Load {
    worker: Worker,
    alone: Worker,
    longest: Longest,
    longest_alone: Longest,
    /// The instance that each thread recorded last.
    last: [Mutex<String>; 2],
    over: AtomicBool,
}

impl Load {
    fn new(url: &str) -> Self {
        let backend = RedisBackend::connect(url).expect("a URL");
        let timeout = Duration::from_millis(100);
        let backend = backend
            .with_connect_timeout(timeout)
            .with_response_timeout(timeout);
        let storage = WorkflowContextStorage::builder()
            .backend(backend)
            .lookup_budget(BUDGET);
        Self {
            worker: Worker::of(storage.build().expect("sound settings")),
            alone: Worker::new(),
            longest: Longest::default(),
            longest_alone: Longest::default(),
            last: Default::default(),
            over: AtomicBool::new(false),
        }
    }

    fn run(&self, thread: usize) {
        for number in 0.. {
            if self.over.load(Relaxed) {
                break;
            }
            let id = format!("{thread} {number}");
            for (worker, longest) in [
                (&self.worker, &self.longest),
                (&self.alone, &self.longest_alone),
            ] {
                worker.run(|| {
                    // The first one misses, the second one hits.
                    for _ in 0..2 {
                        drop(longest.time(|| {
                            tracing::info_span!("step", workflow.instance_id = %id).entered()
                        }));
                    }
                });
            }
            *self.last[thread].lock().unwrap() = id;
            thread::sleep(Duration::from_micros(500));
        }
    }

    /// Waits until each thread has recorded many more instances; answers some of them.
    fn goes_on(&self) -> Vec<String> {
        let last = || {
            self.last
                .each_ref()
                .map(|last| last.lock().unwrap().clone())
        };
        let mut recorded = Vec::new();
        for _ in 0..100 {
            let before = last();
            until("spans are started", || {
                let now = last();
                (0..2).all(|thread| now[thread] != before[thread])
            });
            recorded.extend(last());
        }
        recorded
    }

    fn errors(&self) -> u64 {
        self.worker.storage.stats().backend_errors
    }
}

#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Breaks something in the middle of load, lets it be broken until that was noticed, and mends it.
fn under_load(
    what: &str,
    url: &str,
    server: &Mutex<RedisServer>,
    break_it: impl FnOnce(),
    mend_it: impl FnOnce(),
) {
    let load = &Load::new(url);
    let storage = &load.worker.storage;
    thread::scope(|scope| {
        // Whatever fails ends the load too.
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let over = Over(&load.over);
        for thread in 0..2 {
            scope.spawn(move || load.run(thread));
        }
        load.goes_on();
        until("the server is reached", || storage.flush().is_ok());

        let errors = load.errors();
        break_it();
        until("the failure is counted", || load.errors() > errors);
        let recorded = load.goes_on();
        mend_it();

        // By itself: what was recorded meanwhile reaches the others, and what they record is found.
        until("what was recorded is written", || storage.flush().is_ok());
        let other = WorkflowContextStorage::builder()
            .backend(backend(&server.lock().unwrap()))
            .lookup_budget(PATIENCE)
            .build();
        let other = other.expect("sound settings");
        for id in &recorded {
            let trace = |storage: &WorkflowContextStorage| {
                storage.get(id).unwrap().map(|found| found.trace_id())
            };
            assert!(trace(storage).is_some());
            assert_eq!(trace(storage), trace(&other), "{id:?}");
        }
        let theirs = super::record(super::PARENT).context;
        other.store("theirs", theirs.clone()).unwrap();
        other.flush().unwrap();
        until("what others record is found", || {
            storage.get("theirs").unwrap() == Some(theirs.clone())
        });
        load.goes_on();
        drop(over);
    });
    let (stats, longest, alone) = (
        storage.stats(),
        load.longest.get(),
        load.longest_alone.get(),
    );
    eprintln!(
        "{what}: the longest start of a span took {longest:?}, without a backend {alone:?}; {stats:?}"
    );
    assert_eq!(stats.dropped_writes, 0, "few enough waited");
    assert!(
        longest < BUDGET + GROSS + alone,
        "{what}: {longest:?}, and {alone:?} without a backend"
    );
}

#[test]
fn a_server_that_is_stopped() {
    let server = Mutex::new(RedisServer::start());
    let url = server.lock().unwrap().url();
    let (stop, start) = (
        || server.lock().unwrap().stop(),
        || server.lock().unwrap().start_again(),
    );
    under_load("stopped", &url, &server, stop, start);
}

#[test]
fn a_server_that_is_frozen() {
    let server = Mutex::new(RedisServer::start());
    let url = server.lock().unwrap().url();
    let (freeze, thaw) = (
        || server.lock().unwrap().freeze(),
        || server.lock().unwrap().thaw(),
    );
    under_load("frozen", &url, &server, freeze, thaw);
}

#[test]
fn a_server_that_is_slow() {
    spoiled("slow", Says::Later(Duration::from_millis(300)));
}

#[test]
fn a_server_that_answers_garbage() {
    spoiled(
        "garbage",
        Says::This(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
    );
    spoiled("wrong answers", Says::This(b"$7\r\ngarbage\r\n".repeat(10)));
}

/// Slower than any span waits, and never so slow that a call fails.
#[test]
fn a_server_that_is_a_little_slow() {
    let server = RedisServer::start();
    let proxy = Proxy::before(&server);
    let load = &Load::new(&proxy.url());
    proxy.says(Says::Later(Duration::from_millis(20)));
    thread::scope(|scope| {
        scope.spawn(|| load.run(0));
        scope.spawn(|| load.run(1));
        load.goes_on();
        load.over.store(true, Relaxed);
    });
    let (longest, alone) = (load.longest.get(), load.longest_alone.get());
    eprintln!(
        "a little slow: the longest start of a span took {longest:?}, without a backend {alone:?}"
    );
    assert!(longest < BUDGET + GROSS + alone, "{longest:?}, {alone:?}");
}

#[test]
fn a_server_that_is_restarted_and_empty() {
    let server = Mutex::new(RedisServer::start());
    let url = server.lock().unwrap().url();
    let load = &Load::new(&url);
    let storage = &load.worker.storage;
    thread::scope(|scope| {
        scope.spawn(|| load.run(0));
        scope.spawn(|| load.run(1));
        let early = load.goes_on();
        until("the server is reached", || storage.flush().is_ok());
        server.lock().unwrap().start_again();
        let late = load.goes_on();
        until("it is reached again", || storage.flush().is_ok());
        let other = WorkflowContextStorage::builder()
            .backend(backend(&server.lock().unwrap()))
            .lookup_budget(PATIENCE)
            .build();
        let other = other.expect("sound settings");
        for id in early.iter().chain(&late) {
            assert!(
                storage.get(id).unwrap().is_some(),
                "memory still has {id:?}"
            );
        }
        for id in &late {
            let trace =
                |storage: &WorkflowContextStorage| storage.get(id).unwrap().unwrap().trace_id();
            assert_eq!(trace(storage), trace(&other), "{id:?}");
        }
        load.over.store(true, Relaxed);
    });
    let (longest, alone) = (load.longest.get(), load.longest_alone.get());
    eprintln!(
        "restarted: the longest start of a span took {longest:?}, without a backend {alone:?}; {:?}",
        storage.stats()
    );
    assert!(longest < BUDGET + GROSS + alone, "{longest:?}, {alone:?}");
}

fn spoiled(what: &str, says: Says) {
    let server = Mutex::new(RedisServer::start());
    let proxy = Proxy::before(&server.lock().unwrap());
    let (spoil, mend) = (|| proxy.says(says), || proxy.says(Says::That));
    under_load(what, &proxy.url(), &server, spoil, mend);
}
