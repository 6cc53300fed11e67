//! What several workers see of the same instances on one server, and whether that is a possible history.
//!
//! An instance's record is a register that is written once: the first writer wins. So, whatever the network does, every value
//! that a flush has confirmed or that a client without memory has read is the same, and no such client finds nothing once it was
//! there. A root is exported once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::Context;
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider, Span, SpanData, SpanProcessor};
use tracing::info_span;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::WorkflowContextStorage;
use tracing_workflow_context::backend::StorageBackend;

use super::store::{self, NONE, Switched};
use super::{Random, Result};

/// A new instance begins each so often, and ends after so many others have begun.
const EACH: Duration = Duration::from_millis(5);
const LIVES: u64 = 400;

const THREADS: usize = 4;

/// Lines of the history that are not printed yet.
static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn note(line: String) {
    LINES
        .lock()
        .unwrap_or_else(|error| error.into_inner())
        .push(line);
}

fn print_all() {
    let lines = std::mem::take(&mut *LINES.lock().unwrap_or_else(|error| error.into_inner()));
    for line in lines {
        println!("{line}");
    }
}

fn now() -> u128 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_nanos()
}

/// Notes each instance's own span.
#[derive(Debug)]
struct Roots;

impl SpanProcessor for Roots {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        let value = |name: &str| {
            let mut found = span.attributes.iter().filter(|kv| kv.key.as_str() == name);
            found.next().map(|kv| kv.value.to_string())
        };
        if let (Some(_), Some(id)) = (value("workflow.spans"), value("workflow.instance_id")) {
            let status = value("workflow.status").unwrap_or_default();
            note(format!("root {id} {} {} {}", now(), now(), status));
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Works on the same instances as the others do, by the clock of the machine, and prints what it sees.
pub(crate) fn work(store: &str, name: &str, time: Duration) -> Result<()> {
    let connect = || -> Result<_> {
        let outage = std::sync::Arc::new(NONE.into());
        Ok(Switched {
            inner: store::open(store)?,
            outage,
        })
    };
    // A client without memory.
    let cold = connect()?.inner;
    let storage = WorkflowContextStorage::builder()
        .backend(connect()?)
        .durable_root(true)
        .build()?;
    let provider = SdkTracerProvider::builder()
        .with_id_generator(storage.id_generator())
        .with_sampler(storage.sampler(Sampler::AlwaysOn))
        .with_span_processor(Roots)
        .build();
    tracing_subscriber::registry()
        .with(storage.layer(provider.tracer("history")))
        .init();

    let begin = Instant::now();
    let results = thread::scope(|scope| {
        let threads = [(); THREADS].map(|()| {
            scope.spawn(|| {
                use_instances(&storage, &*cold, name, begin, time)
                    .map_err(|error| error.to_string())
            })
        });
        threads.map(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err("a thread panicked".into()))
        })
    });
    results
        .into_iter()
        .collect::<std::result::Result<Vec<_>, _>>()?;
    // Roots are exported once their claim is answered.
    thread::sleep(Duration::from_secs(2));
    let _ = storage.flush();
    print_all();
    let stats = storage.stats();
    println!("lost_roots - 0 0 {}", stats.lost_roots);
    println!("done - 0 0 {name}");
    eprintln!("{name}: {stats:?}");
    Ok(())
}

/// What one thread of a worker does.
fn use_instances(
    storage: &WorkflowContextStorage,
    cold: &dyn StorageBackend,
    name: &str,
    begin: Instant,
    time: Duration,
) -> Result<()> {
    static SEED: AtomicU64 = AtomicU64::new(1);
    let seed = u64::from(std::process::id()) << 8 | SEED.fetch_add(1, Relaxed);
    let mut random = Random(seed);
    let mut flushed_at = Instant::now();
    let mut touched = HashSet::new();
    let mut ended = HashSet::new();
    while begin.elapsed() < time {
        let newest = (now() / EACH.as_nanos()) as u64;
        let number = newest - random.below(LIVES as usize) as u64;
        let id = format!("order-{number}");
        match random.below(10) {
            0..6 if !ended.contains(&number) => {
                let start = now();
                let trace = info_span!("step", workflow.instance_id = %id)
                    .in_scope(|| Context::map_current(|cx| cx.span().span_context().trace_id()));
                note(format!("span {id} {start} {} {trace}", now()));
                touched.insert(id);
            }
            6 | 7 => {
                let start = now();
                if let Ok(found) = cold.get(&id) {
                    let value = found.map(|record| record.context.trace_id().to_string());
                    note(format!(
                        "read {id} {start} {} {}",
                        now(),
                        value.as_deref().unwrap_or("none")
                    ));
                }
            }
            _ => {
                let number = newest - LIVES - random.below(20) as u64;
                let id = format!("order-{number}");
                if ended.insert(number) && matches!(storage.complete(&id, "completed"), Ok(true)) {
                    note(format!("end {id} {} {} {name}", now(), now()));
                }
            }
        }
        if flushed_at.elapsed() > Duration::from_millis(200) {
            confirm(storage, &mut touched);
            flushed_at = Instant::now();
            print_all();
        }
        thread::sleep(Duration::from_micros(random.below(600) as u64));
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while !confirm(storage, &mut touched) {
        if Instant::now() > deadline {
            return Err("no flush succeeds though the network is whole again".into());
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Flushes; if that succeeds, notes what is recorded for each instance that was used before.
fn confirm(storage: &WorkflowContextStorage, touched: &mut HashSet<String>) -> bool {
    let start = now();
    if storage.flush().is_err() {
        return false;
    }
    let end = now();
    for id in touched.drain() {
        if let Ok(Some(found)) = storage.get(&id) {
            note(format!("confirmed {id} {start} {end} {}", found.trace_id()));
        }
    }
    true
}

/// What is known of one register.
#[derive(Default)]
struct Register {
    /// Values with the end of the call that saw them, and what that was.
    values: Vec<(String, u128, String)>,
    /// The beginnings of the calls that found nothing.
    nothing: Vec<u128>,
    spans: Vec<String>,
    roots: u64,
    superseded: u64,
    is_ended: bool,
}

pub(crate) fn judge(files: &[&str]) -> Result<()> {
    let mut registers: BTreeMap<String, Register> = BTreeMap::new();
    let mut count: HashMap<String, u64> = HashMap::new();
    let (mut done, mut lost_roots) = (0, 0);
    for file in files {
        for line in fs::read_to_string(file)?.lines() {
            let parts: Vec<_> = line.splitn(5, ' ').collect();
            let [kind, id, start, end, value] = parts[..] else {
                return Err(format!("{file}: {line:?}").into());
            };
            *count.entry(kind.to_owned()).or_default() += 1;
            let (start, end): (u128, u128) = (start.parse()?, end.parse()?);
            match kind {
                "done" => done += 1,
                "lost_roots" => lost_roots += value.parse::<u64>()?,
                _ => {
                    let register = registers.entry(id.to_owned()).or_default();
                    match (kind, value) {
                        ("read", "none") => register.nothing.push(start),
                        ("read" | "confirmed", _) => {
                            let who = format!("{kind} by {file}");
                            register.values.push((value.to_owned(), end, who));
                        }
                        ("span", _) => register.spans.push(value.to_owned()),
                        ("root", "superseded") => register.superseded += 1,
                        ("root", _) => register.roots += 1,
                        ("end", _) => register.is_ended = true,
                        _ => return Err(format!("{file}: {line:?}").into()),
                    }
                }
            }
        }
    }
    if done != files.len() {
        return Err(format!("{done} of {} workers came to their end", files.len()).into());
    }
    let (mut wrong, mut strays, mut twice, mut none) = (0, 0, 0, 0);
    for (id, register) in &registers {
        let Some((value, _, _)) = register.values.first() else {
            continue;
        };
        if let Some(other) = register.values.iter().find(|other| other.0 != *value) {
            wrong += 1;
            println!("{id}: {:?}, but {other:?}", register.values[0]);
        }
        let known = register.values.iter().map(|(_, end, _)| end).min();
        if register
            .nothing
            .iter()
            .any(|start| known.is_some_and(|known| start > known))
        {
            wrong += 1;
            println!("{id}: it was there, and then it was not");
        }
        strays += register
            .spans
            .iter()
            .filter(|trace| *trace != value)
            .count();
        twice += u64::from(register.roots > 1);
        none += u64::from(register.is_ended && register.roots == 0);
        if register.is_ended && register.roots == 0 {
            println!(
                "{id}: ended, and no root is exported; {} superseded",
                register.superseded
            );
        }
        if register.roots > 1 {
            println!("{id}: its root is exported {} times", register.roots);
        }
    }
    let of = |kind: &str| count.get(kind).copied().unwrap_or_default();
    println!(
        "{} registers: {} values confirmed by a flush, {} reads; {wrong} contradictions",
        registers.len(),
        of("confirmed"),
        of("read")
    );
    println!(
        "{} spans, {strays} of them in a trace that lost (counted in conflicts and lookup_timeouts)",
        of("span")
    );
    let superseded: u64 = registers.values().map(|it| it.superseded).sum();
    println!(
        "{} instances ended: {twice} roots exported twice, {none} never ({lost_roots} in lost_roots), {superseded} superseded",
        of("end")
    );
    // A root that could not be written is counted.
    match wrong + twice + none.saturating_sub(lost_roots) {
        0 => Ok(()),
        _ => Err("this is no history of registers that are written once".into()),
    }
}
