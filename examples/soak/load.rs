//! Spans at full rate over 200,000 live instances, while their backend comes and goes. Each exported span is checked.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use std::{process, thread};

use opentelemetry::trace::{TraceContextExt as _, TraceId, TracerProvider as _};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, Span, SpanData, SpanProcessor};
use tracing::field::Empty;
use tracing::{Dispatch, dispatcher, info_span};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::backend::StorageBackend;
use tracing_workflow_context::{Stats, WorkflowContext, WorkflowContextStorage};

use super::store::{self, FAILS, HANGS, NONE, Switched, is_file};
use super::{Random, Result};

/// Returns the number of instances that live at any time. A debug build, as `scripts/test` runs it, takes seconds for the
/// fewer ones already.
fn live() -> usize {
    let given = std::env::var("SOAK_LIVE").ok();
    let usual = if cfg!(debug_assertions) {
        20_000
    } else {
        200_000
    };
    given.and_then(|given| given.parse().ok()).unwrap_or(usual)
}

const THREADS: usize = 2;

/// An outage begins each so many seconds, and lasts so long.
const OUTAGE_EACH: Duration = Duration::from_secs(10);
const OUTAGE: Duration = Duration::from_secs(2);

/// The longest pause of a storage after a failure, doubled: by then a backend that is back is used again.
const SETTLED: Duration = Duration::from_secs(10);

thread_local! {
    /// What has ended on this thread since it last looked.
    static ENDED: RefCell<Vec<(TraceId, bool)>> = const { RefCell::new(Vec::new()) };
}

/// Notes the spans that end, in place of an exporter.
#[derive(Debug)]
struct Noting;

impl SpanProcessor for Noting {
    fn on_start(&self, _: &mut Span, _: &opentelemetry::Context) {}

    fn on_end(&self, span: SpanData) {
        let is_replay = span.name == "replayed";
        ENDED.with_borrow_mut(|ended| ended.push((span.span_context.trace_id(), is_replay)));
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

struct Worker {
    storage: WorkflowContextStorage,
    dispatch: Dispatch,
}

/// What all threads share.
struct Shared {
    start: Instant,
    outage: Arc<AtomicU8>,
    /// When the last outage was over, in milliseconds since the start.
    last_outage: AtomicU64,
    /// The number of flushes that succeeded on all workers.
    flushes: AtomicU64,
    is_over: AtomicBool,
}

impl Shared {
    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// Returns `true` if there was an outage since that moment, or shortly before it.
    fn was_away_since(&self, moment: u64) -> bool {
        let last = self.last_outage.load(Relaxed);
        let is_away = self.outage.load(Relaxed) != NONE;
        is_away || (last > 0 && last + SETTLED.as_millis() as u64 >= moment)
    }
}

struct Instance {
    number: u64,
    trace: Option<TraceId>,
    /// When it was recorded, and how many flushes had succeeded by then.
    born: u64,
    flushes: u64,
    is_split: bool,
}

/// What a thread has done and seen.
#[derive(Default)]
struct Seen {
    spans: u64,
    replays: u64,
    ends: u64,
    late: u64,
    foreign: u64,
    /// Spans in another trace than their instance's, and the instances of which there are such.
    strays: u64,
    splits: u64,
    /// The same without an outage around it.
    unexplained: u64,
    times: Histogram,
}

impl Seen {
    fn add(&mut self, other: &Self) {
        for (one, other) in [
            (&mut self.spans, other.spans),
            (&mut self.replays, other.replays),
            (&mut self.ends, other.ends),
            (&mut self.late, other.late),
            (&mut self.foreign, other.foreign),
            (&mut self.strays, other.strays),
            (&mut self.splits, other.splits),
            (&mut self.unexplained, other.unexplained),
        ] {
            *one += other;
        }
        self.times.add(&other.times);
    }
}

pub(crate) fn run(store: &str, time: Duration) -> Result<()> {
    let inner = store::open(store)?;
    let outage = Arc::new(AtomicU8::new(NONE));
    // Another worker, which meets an instance only after a flush. Only one storage may have a file.
    let workers = if is_file(store) { 1 } else { 2 };
    let workers: Vec<_> = (0..workers)
        .map(|_| Worker::new(inner.clone(), outage.clone()))
        .collect::<Result<_>>()?;
    let shared = Shared {
        start: Instant::now(),
        outage,
        last_outage: AtomicU64::new(0),
        flushes: AtomicU64::new(0),
        is_over: AtomicBool::new(false),
    };
    let (workers, shared) = (&workers, &shared);
    let mut seen = Seen::default();
    let mut resident = Vec::new();
    thread::scope(|scope| {
        let (results, all) = channel();
        let (filled, is_filled) = channel::<()>();
        for thread in 0..THREADS {
            let (results, filled) = (results.clone(), filled.clone());
            scope.spawn(move || {
                // A thread that panics ends the others too.
                let _over = Over(&shared.is_over);
                let mut threads_own = OfThread::new(thread, workers, shared);
                threads_own.fill();
                drop(filled);
                while !shared.is_over.load(Relaxed) {
                    threads_own.step();
                }
                let _ = results.send((threads_own.seen, threads_own.instances));
            });
        }
        drop((results, filled));
        scope.spawn(|| {
            while !shared.is_over.load(Relaxed) {
                if workers.iter().all(|worker| worker.storage.flush().is_ok()) {
                    shared.flushes.fetch_add(1, Relaxed);
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
        let _ = is_filled.recv();
        let begin = Instant::now();
        println!(
            "{} instances live after {:.1} s",
            live(),
            shared.start.elapsed().as_secs_f64()
        );
        resident = outages(shared, begin, time);
        shared.is_over.store(true, Relaxed);
        let took = begin.elapsed();
        for (one, instances) in all {
            seen.add(&one);
            check_stored(&inner, workers, &instances, &mut seen);
        }
        report(store, took, &seen, &resident, workers);
    });
    judge(&seen, &resident, workers)
}

/// Lets the backend go and come for so long; returns the resident memory, each second.
fn outages(shared: &Shared, begin: Instant, time: Duration) -> Vec<u64> {
    let mut resident = Vec::new();
    let mut number = 0;
    while begin.elapsed() < time && !shared.is_over.load(Relaxed) {
        thread::sleep(Duration::from_millis(250));
        let at = begin.elapsed();
        if at.as_secs() as usize >= resident.len() {
            resident.push(resident_bytes());
        }
        // The first one not at once, and none in the end, so that the state can be checked.
        let phase = Duration::from_millis((at.as_millis() % OUTAGE_EACH.as_millis()) as u64);
        let ends_in_time = at + OUTAGE + SETTLED < time;
        let is_away = phase >= OUTAGE_EACH / 2 && phase < OUTAGE_EACH / 2 + OUTAGE && ends_in_time;
        if shared.outage.load(Relaxed) != NONE && !is_away {
            shared.last_outage.store(shared.now(), Relaxed);
            shared.outage.store(NONE, Relaxed);
        } else if shared.outage.load(Relaxed) == NONE && is_away {
            number += 1;
            shared.outage.store([FAILS, HANGS][number % 2], Relaxed);
        }
    }
    println!("{number} outages of {OUTAGE:?}");
    resident
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Relaxed);
        }
    }
}

impl Worker {
    fn new(inner: Arc<dyn StorageBackend>, outage: Arc<AtomicU8>) -> Result<Self> {
        let storage = WorkflowContextStorage::builder()
            .backend(Switched { inner, outage })
            .completed_grace(Duration::from_secs(1))
            // A worker does not hear of an end that another one sees: those make room for others.
            .max_instances(live() + live() / 4)
            .build()?;
        let provider = SdkTracerProvider::builder()
            .with_span_processor(Noting)
            .build();
        let layer = storage.layer(provider.tracer("soak"));
        let dispatch = Dispatch::new(tracing_subscriber::registry().with(layer));
        Ok(Self { storage, dispatch })
    }
}

/// A thread with its part of the instances.
struct OfThread<'a> {
    workers: &'a [Worker],
    shared: &'a Shared,
    random: Random,
    instances: Vec<Instance>,
    next: u64,
    seen: Seen,
}

impl<'a> OfThread<'a> {
    fn new(thread: usize, workers: &'a [Worker], shared: &'a Shared) -> Self {
        Self {
            workers,
            shared,
            random: Random(thread as u64),
            instances: Vec::new(),
            next: thread as u64,
            seen: Seen::default(),
        }
    }

    /// Records all instances, no faster than they are written.
    fn fill(&mut self) {
        for number in 0..live() / THREADS {
            let instance = self.born();
            self.instances.push(instance);
            self.perform(number, 0, Kind::Plain);
            if number % 10_000 == 0 {
                while self.workers[0].storage.flush().is_err() {}
            }
        }
        self.seen = Seen::default();
    }

    fn born(&mut self) -> Instance {
        self.next += THREADS as u64;
        Instance {
            number: self.next,
            trace: None,
            born: self.shared.now(),
            flushes: self.shared.flushes.load(Relaxed),
            is_split: false,
        }
    }

    fn step(&mut self) {
        let at = self.random.below(self.instances.len());
        let instance = &self.instances[at];
        // The next flush may have begun before it was recorded.
        let is_flushed = self.shared.flushes.load(Relaxed) >= instance.flushes + 2;
        let others = if is_flushed { self.workers.len() } else { 1 };
        let worker = self.random.below(others);
        let kind = match self.random.below(100) {
            0 => Kind::End,
            1..6 => Kind::Late,
            6..16 => Kind::Foreign,
            16..26 => Kind::Replayed,
            26..46 => Kind::WithChild,
            _ => Kind::Plain,
        };
        self.perform(at, worker, kind);
        if kind == Kind::End {
            self.seen.ends += 1;
            self.instances[at] = self.born();
            self.perform(at, 0, Kind::Plain);
        }
    }

    /// Opens and ends a span of an instance, and checks what is exported.
    fn perform(&mut self, at: usize, worker: usize, kind: Kind) {
        let id = id_of(self.instances[at].number);
        let start = dispatcher::with_default(&self.workers[worker].dispatch, || {
            let start = Instant::now();
            kind.perform(&id, &mut self.random);
            start.elapsed()
        });
        if kind == Kind::Plain {
            self.seen.times.note(start);
        }
        let expected = match kind {
            Kind::Replayed => 0,
            Kind::WithChild => 2,
            _ => 1,
        };
        match kind {
            Kind::Replayed => self.seen.replays += 1,
            Kind::Late => self.seen.late += 1,
            Kind::Foreign => self.seen.foreign += 1,
            _ => {}
        }
        let ended = ENDED.with_borrow_mut(std::mem::take);
        assert_eq!(
            ended.len(),
            expected,
            "{kind:?}: spans are lost or exported twice"
        );
        for (trace, is_replay) in ended {
            assert!(!is_replay, "a replay is exported");
            self.seen.spans += 1;
            self.check(at, trace);
        }
    }

    fn check(&mut self, at: usize, trace: TraceId) {
        let instance = &mut self.instances[at];
        let first = *instance.trace.get_or_insert(trace);
        if first == trace {
            return;
        }
        self.seen.strays += 1;
        if !instance.is_split {
            instance.is_split = true;
            self.seen.splits += 1;
            if !self.shared.was_away_since(instance.born) {
                self.seen.unexplained += 1;
            }
        }
    }
}

fn id_of(number: u64) -> String {
    // As long as a UUID.
    format!("order-{number:030}")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    WithChild,
    /// It learns its id in its body.
    Late,
    /// Inside a request of another trace.
    Foreign,
    Replayed,
    End,
}

impl Kind {
    fn perform(self, id: &str, random: &mut Random) {
        match self {
            Self::Plain => info_span!("step", workflow.instance_id = id).in_scope(|| {}),
            Self::WithChild => {
                info_span!("step", workflow.instance_id = id)
                    .in_scope(|| info_span!("inner").in_scope(|| {}));
            }
            Self::Late => {
                let span = info_span!("late", workflow.instance_id = Empty).entered();
                span.record("workflow.instance_id", id);
            }
            Self::Foreign => {
                let (trace, span) = (random.below(usize::MAX) + 1, random.below(usize::MAX) + 1);
                let request = format!("00-{trace:032x}-{span:016x}-01");
                let request = WorkflowContext::parse(&request, "")
                    .expect("well formed")
                    .to_otel();
                debug_assert!(request.span().span_context().is_valid());
                let _request = request.attach();
                info_span!("handler", workflow.instance_id = id).in_scope(|| {});
            }
            Self::Replayed => {
                info_span!(
                    "replayed",
                    workflow.instance_id = id,
                    workflow.replaying = true
                )
                .in_scope(|| {});
            }
            Self::End => {
                info_span!(
                    "last",
                    workflow.instance_id = id,
                    workflow.status = "completed"
                )
                .in_scope(|| {});
            }
        }
    }
}

/// Flushes, and counts as unexplained each record that is missing or another one than in memory, of some thousands.
fn check_stored(
    backend: &Arc<dyn StorageBackend>,
    workers: &[Worker],
    instances: &[Instance],
    seen: &mut Seen,
) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !workers.iter().all(|worker| worker.storage.flush().is_ok()) {
        assert!(
            Instant::now() < deadline,
            "no flush succeeds after the last outage"
        );
    }
    for instance in instances.iter().step_by(37) {
        let kept = loop {
            match backend.get(&id_of(instance.number)) {
                Ok(kept) => break kept.map(|record| record.context.trace_id()),
                // A busy machine keeps a reply for longer than a call waits.
                Err(error) => assert!(Instant::now() < deadline, "the backend is up: {error:?}"),
            }
        };
        let is_as_seen = kept == instance.trace || (instance.is_split && kept.is_some());
        if !is_as_seen {
            eprintln!(
                "{}: {kept:?} is stored, {:?} was seen",
                id_of(instance.number),
                instance.trace
            );
            seen.unexplained += 1;
        }
    }
}

fn sum(workers: &[Worker], counter: impl Fn(&Stats) -> u64) -> u64 {
    workers
        .iter()
        .map(|worker| counter(&worker.storage.stats()))
        .sum()
}

fn report(store: &str, took: Duration, seen: &Seen, resident: &[u64], workers: &[Worker]) {
    let store = store.split("://").next().unwrap_or(store);
    let store = if is_file(store) && !["redis", "postgres"].contains(&store) {
        "redb"
    } else {
        store
    };
    let mb = |bytes: Option<&u64>| bytes.copied().unwrap_or_default() / 1_000_000;
    let [half, nearly, rare] = [0.5, 0.99, 0.999].map(|part| seen.times.quantile(part));
    println!(
        "{store}, {:.0} s: {} spans ({:.0} a second), {} replays, {} late ids, {} foreign parents, {} instances ended",
        took.as_secs_f64(),
        seen.spans,
        seen.spans as f64 / took.as_secs_f64(),
        seen.replays,
        seen.late,
        seen.foreign,
        seen.ends
    );
    println!(
        "  {} spans of {} instances in a second trace, {} of these instances without an outage; conflicts {}, \
         lookup timeouts {}, failed calls {}, dropped writes {}, evicted {}, malformed {}",
        seen.strays,
        seen.splits,
        seen.unexplained,
        sum(workers, |it| it.conflicts),
        sum(workers, |it| it.lookup_timeouts),
        sum(workers, |it| it.backend_errors),
        sum(workers, |it| it.dropped_writes),
        sum(workers, |it| it.evicted),
        sum(workers, |it| it.malformed)
    );
    println!(
        "  a span: p50 {half:?}, p99 {nearly:?}, p99.9 {rare:?}, longest {:?}",
        seen.times.longest
    );
    println!(
        "  resident memory: {} MB first, {} MB at most, {} MB last",
        mb(resident.first()),
        mb(resident.iter().max()),
        mb(resident.last())
    );
}

fn judge(seen: &Seen, resident: &[u64], workers: &[Worker]) -> Result<()> {
    let counted = sum(workers, |it| it.conflicts + it.lookup_timeouts);
    if seen.unexplained > counted {
        return Err(format!(
            "{} instances were split, and {counted} are counted",
            seen.unexplained
        )
        .into());
    }
    // From the end of the first third on: tables have grown, and freed memory is used again.
    let settled = &resident[resident.len() / 3..];
    let (first, last) = settled.split_at(settled.len() / 2);
    let most = |part: &[u64]| part.iter().max().copied().unwrap_or_default();
    if most(last) > most(first) + most(first) / 10 + (32 << 20) {
        return Err(format!("memory grows: {} bytes, then {}", most(first), most(last)).into());
    }
    Ok(())
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", process::id()));
    let pages = statm
        .ok()
        .and_then(|statm| statm.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or_default() * 4096
}

/// Durations by their magnitude: sixteen steps for each doubling.
struct Histogram {
    counts: Vec<u64>,
    longest: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; 16 * 64],
            longest: Duration::ZERO,
        }
    }
}

impl Histogram {
    fn note(&mut self, took: Duration) {
        let ns = (took.as_nanos() as u64).max(16);
        let exponent = ns.ilog2();
        let step = (ns >> (exponent - 4)) as usize & 15;
        self.counts[exponent as usize * 16 + step] += 1;
        self.longest = self.longest.max(took);
    }

    fn add(&mut self, other: &Self) {
        for (count, other) in self.counts.iter_mut().zip(&other.counts) {
            *count += other;
        }
        self.longest = self.longest.max(other.longest);
    }

    /// Returns an upper bound of the quantile.
    fn quantile(&self, part: f64) -> Duration {
        let wanted = (self.counts.iter().sum::<u64>() as f64 * part) as u64;
        let mut below = 0;
        let at = self.counts.iter().position(|count| {
            below += count;
            below > wanted
        });
        let at = at.unwrap_or_default();
        let (exponent, step) = (at / 16, at as u64 % 16);
        Duration::from_nanos((17 + step) << exponent >> 4)
    }
}
