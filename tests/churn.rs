//! Memory stays bounded while a hundred times as many instances pass through a storage as it keeps; a binary of its own, because
//! its allocator counts.
//!
//! A debug build keeps 10,000; run `cargo test --release --all-features --test churn` for ten million instances.
#![allow(
    unsafe_code,
    reason = "an allocator that counts is one of unsafe methods"
)]

#[allow(
    dead_code,
    unused_imports,
    reason = "`it` uses all of it, this binary a part"
)]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use support::*;
use tracing::{Dispatch, dispatcher, info_span};
use tracing_subscriber::prelude::*;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

const KEPT: u64 = if cfg!(debug_assertions) {
    10_000
} else {
    100_000
};
const ROUND: u64 = 10 * KEPT;
const ALL: u64 = 10 * ROUND;

/// By then the tables of the shards, which double at different times, have their final size, and the heap holds what
/// the smaller ones left.
const SETTLED: u64 = 3 * ROUND - 1;

/// Instances that are used repeatedly, each time after a fifth of the capacity has passed.
const BUSY: u64 = KEPT / 100;
const BETWEEN_USES: u64 = KEPT / 5;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Counting;

/// Bytes that are allocated and not freed.
static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is forwarded to `System`; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LIVE.fetch_add(size, Relaxed);
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// Returns the resident bytes of this process, where the operating system reports them.
fn resident() -> Option<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(statm.split(' ').nth(1)?.parse::<usize>().ok()? * 4096)
}

/// Returns whether a size has grown by more than five percent.
fn has_grown(first: usize, now: usize) -> bool {
    now > first + first / 20
}

const MILLION: u64 = 1_000_000;

/// Allocations of one test must not be counted by the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn memory_stays_bounded_while_instances_churn_and_the_counters_add_up() {
    let _alone = ONE_AT_A_TIME.lock();
    let clock = ManualClock::new();
    let builder = WorkflowContextStorage::builder().clock(clock.clone());
    let builder = builder
        .max_instances(KEPT as usize)
        .idle_ttl(Duration::from_micros(280) * KEPT as u32);
    let storage = builder.build().unwrap();
    let tracer = SdkTracerProvider::builder().build().tracer("test");
    let dispatch = Dispatch::new(tracing_subscriber::registry().with(storage.layer(tracer)));

    let mut id = Id::default();
    let mut settled = None;
    let (mut hits, mut misses) = (0, 0);
    for instance in 0..ALL {
        let name = id.of(instance);
        if instance % 10 == 0 {
            // The instance is looked up, and recorded.
            let status = (instance % 100 == 0).then_some("completed");
            let span = || {
                info_span!(
                    "step",
                    workflow.instance_id = name,
                    workflow.status = status
                )
            };
            dispatcher::with_default(&dispatch, || span().in_scope(|| {}));
            misses += 1;
        } else {
            storage.store(name, context(instance)).unwrap();
        }
        if instance % 100 == 0 {
            clock.advance(Duration::from_millis(25));
        }
        if instance % BETWEEN_USES == 0 && instance > 0 {
            for busy in (0..BUSY).filter(|busy| busy % 10 != 0) {
                assert_eq!(trace(&storage, id.of(busy)), Some(busy), "after {instance}");
                hits += 1;
            }
        }
        if (instance + 1) % ROUND == 0 {
            let now = (LIVE.load(Relaxed), resident());
            if instance >= SETTLED {
                let (live, resident) = *settled.get_or_insert(now);
                assert!(
                    !has_grown(live, now.0),
                    "{} bytes live, {live} when settled",
                    now.0
                );
                if let (Some(resident), Some(now)) = (resident, now.1) {
                    assert!(
                        !has_grown(resident, now),
                        "{now} bytes resident, {resident} when settled"
                    );
                }
            }
            let stats = storage.stats();
            println!(
                "after {} instances {} bytes live, {:?} resident: {stats:?}",
                instance + 1,
                now.0,
                now.1
            );
            assert_eq!(
                stats.stored_instances + stats.evicted + stats.expired,
                instance + 1
            );
            assert!(stats.stored_instances <= KEPT && stats.stored_instances > KEPT * 9 / 10);

            // Kept instances are found as they were stored; the rest is missing.
            let mut kept = 0;
            for name in storage.iter_instance_ids() {
                let instance = Id::number(&name);
                let trace = trace(&storage, &name).expect("it is kept");
                assert!(
                    instance % 10 == 0 || trace == instance,
                    "{name} has the trace {trace}"
                );
                kept += 1;
            }
            assert_eq!(kept, stats.stored_instances);
            hits += kept;
            for gone in (BUSY..instance - 5 * KEPT).step_by(1_001) {
                assert_eq!(trace(&storage, id.of(gone)), None);
                misses += 1;
            }
            let stats = storage.stats();
            assert_eq!((stats.hits, stats.misses), (hits, misses));
        }
    }
    let stats = storage.stats();
    assert!(stats.evicted > 0 && stats.expired > 0, "{stats:?}");
}

#[test]
fn by_default_a_million_instances_are_kept() {
    let _alone = ONE_AT_A_TIME.lock();
    let storage = WorkflowContextStorage::new();
    let mut id = Id::default();
    for instance in 0..MILLION + 1_000 {
        storage.store(id.of(instance), context(instance)).unwrap();
        if instance % 1_000 != 0 && instance < MILLION {
            continue; // Statistics walk over all shards.
        }
        let stats = storage.stats();
        assert_eq!(stats.evicted, (instance + 1).saturating_sub(MILLION));
        assert_eq!(stats.stored_instances, (instance + 1).min(MILLION));
    }
}

/// Returns a context whose trace id is derived from the instance.
fn context(instance: u64) -> WorkflowContext {
    WorkflowContext::try_from(&remote(u128::from(instance) + 1, 1)).unwrap()
}

fn trace(storage: &WorkflowContextStorage, id: &str) -> Option<u64> {
    let context = storage.get(id).unwrap()?;
    let trace = u128::from_be_bytes(context.trace_id().to_bytes());
    Some((trace - 1) as u64)
}

/// A buffer for consecutive ids of the length of a UUID.
#[derive(Default)]
struct Id(String);

impl Id {
    fn of(&mut self, instance: u64) -> &str {
        self.0.clear();
        write!(self.0, "order-{instance:030}").unwrap();
        &self.0
    }

    fn number(id: &str) -> u64 {
        id["order-".len()..].parse().unwrap()
    }
}
