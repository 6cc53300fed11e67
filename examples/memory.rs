//! Measures the memory of an instance, and the time of insertions with and without eviction, the slowest included.
//!
//! `cargo run --release --features durable-root --example memory`
#![allow(unsafe_code, reason = "the methods of a counting allocator are unsafe")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::info_span;
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

const INSTANCES: usize = 1_000_000;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Counting;

/// Bytes that are allocated now.
static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls go to `System`; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(memory, layout) }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("bytes per instance, with {INSTANCES} instances whose ids are UUIDs:");
    per_instance("stored by a call", |storage| {
        let context = context();
        uuids(INSTANCES, |id| {
            storage.store(id, context.clone()).expect("a good id")
        });
    });
    per_instance("recorded by a span", |storage| {
        in_spans(storage, || {
            uuids(INSTANCES, |id| {
                info_span!("step", workflow.instance_id = id).in_scope(|| {})
            });
        });
    });
    per_instance("recorded by a span with a run id", |storage| {
        in_spans(storage, || {
            uuids(INSTANCES, |id| {
                info_span!("step", workflow.instance_id = id, workflow.run_id = id).in_scope(|| {})
            });
        });
    });

    println!("with durable roots:");
    with_roots(INSTANCES / 4);

    println!("time of an insertion, with at most {INSTANCES} instances:");
    let before = LIVE.load(Relaxed);
    let storage = WorkflowContextStorage::builder()
        .max_instances(INSTANCES)
        .build()?;
    let context = context();
    let mut instances = 0..;
    for (kind, insertions) in [
        ("without eviction", INSTANCES),
        ("with eviction", 4 * INSTANCES),
    ] {
        let mut id = String::new();
        let mut times = Vec::with_capacity(insertions);
        for instance in instances.by_ref().take(insertions) {
            write_uuid(&mut id, instance);
            let (id, context) = (&*id, context.clone());
            let start = Instant::now();
            storage.store(id, context)?;
            times.push(start.elapsed());
        }
        print(kind, times);
    }
    let stats = storage.stats();
    assert_eq!(
        (stats.stored_instances, stats.evicted),
        (INSTANCES as u64, 4 * INSTANCES as u64)
    );
    println!(
        "bytes per instance after these insertions: {}",
        (LIVE.load(Relaxed) - before) / INSTANCES
    );
    Ok(())
}

/// Fills a new storage, and prints the bytes that this has allocated.
fn per_instance(how: &str, fill: impl FnOnce(&WorkflowContextStorage)) {
    let storage = WorkflowContextStorage::builder().max_bytes(u64::MAX);
    let storage = storage.build().expect("valid settings");
    let before = LIVE.load(Relaxed);
    fill(&storage);
    let bytes = LIVE.load(Relaxed) - before;
    assert_eq!(storage.stats().stored_instances, INSTANCES as u64);
    println!("  {:>6.1}  {how}", bytes as f64 / INSTANCES as f64);
}

/// Fills a storage with durable roots, and prints the bytes that this has allocated.
fn with_roots(instances: usize) {
    let storage = WorkflowContextStorage::builder().durable_root(true);
    let storage = storage.max_bytes(u64::MAX).build().expect("valid settings");
    let provider = SdkTracerProvider::builder()
        .with_id_generator(storage.id_generator())
        .with_sampler(storage.sampler(Sampler::AlwaysOn))
        .build();
    let layer = storage.layer(provider.tracer("memory"));
    let before = LIVE.load(Relaxed);
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
        uuids(instances, |id| {
            info_span!("step", workflow.instance_id = id).in_scope(|| {})
        });
    });
    let bytes = LIVE.load(Relaxed) - before;
    assert_eq!(storage.stats().stored_instances, instances as u64);
    println!(
        "  {:>6.1}  recorded by a span, {instances} instances",
        bytes as f64 / instances as f64
    );
}

/// Runs with the layer of the storage, without an exporter.
fn in_spans(storage: &WorkflowContextStorage, run: impl FnOnce()) {
    let provider = SdkTracerProvider::builder().build();
    let layer = storage.layer(provider.tracer("memory"));
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), run);
}

fn print(kind: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let quantile = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    let [median, late, later, last] = [0.5, 0.999, 0.99999, 1.0].map(quantile);
    println!(
        "  {kind}: median {median:.1?}, 99.9 % within {late:.1?}, 99.999 % within {later:.1?}, slowest {last:.1?}"
    );
}

fn uuids(instances: usize, mut with: impl FnMut(&str)) {
    let mut id = String::new();
    for instance in 0..instances {
        write_uuid(&mut id, instance);
        with(&id);
    }
}

fn write_uuid(id: &mut String, instance: usize) {
    id.clear();
    let bits = (instance as u128).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
    let [a, b, c, d, e] = [bits >> 96, bits >> 80, bits >> 64, bits >> 48, bits];
    let [b, c, d] = [b, c, d].map(|part| part as u16);
    let e = e as u64 & 0xffff_ffff_ffff;
    write!(id, "{:08x}-{b:04x}-{c:04x}-{d:04x}-{e:012x}", a as u32)
        .expect("writing to a String succeeds");
}

fn context() -> WorkflowContext {
    let received = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    WorkflowContext::parse(received, "").expect("a good traceparent")
}
