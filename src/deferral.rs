//! Spans that are held back until their instance is known.
//!
//! A span starts when it is first entered, and once it has started its parent cannot change. Held back are
//! spans that declare an instance id without a value, and engine spans that never have one: the inner layer
//! does not hear that such a span was entered until the id is recorded or the first child opens.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry::trace::SpanRef;
use opentelemetry::{KeyValue, Value};
use tracing::span;

use crate::fields::Identity;
use crate::scoped;
use crate::storage::core::Core;

/// An attribute that tells a started span how long it was entered while it was held back, in nanoseconds.
/// It is never exported.
pub(crate) const HELD: &str = "tracing-workflow-context.held_ns";

/// A span of this layer that may still have to be held back or started by force; in the span's extensions.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) kind: Kind,
    /// It is no longer held back when it is entered: it has what it waited for, or was started.
    pub(crate) settled: AtomicBool,
    /// What it still waits for; a run id is waited for only where the callsite declares one.
    awaits_id: AtomicBool,
    awaits_run: AtomicBool,
    held: Mutex<HeldTime>,
    counted: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Had its id from the start, and is watched only while it is unknown whether entering starts it.
    Named,
    /// Declares an id without a value: held back until its first exit at the latest.
    AwaitsId,
    /// An engine's span around user code: held back until it closes at the latest.
    Engine,
}

/// For how long a span was entered while the inner layer did not know, on however many threads at once.
#[derive(Debug, Default)]
struct HeldTime {
    entered: u32,
    since: Option<Instant>,
    total: Duration,
}

impl HeldTime {
    fn stop(&mut self) {
        if let Some(since) = self.since.take() {
            self.total += since.elapsed();
        }
    }
}

/// One entering of a span whose start is held back.
#[derive(Debug)]
pub(crate) struct Held {
    layer: usize,
    pub(crate) span: span::Id,
    /// The inner layer was told that the span is entered, which starts nothing.
    pub(crate) heard: bool,
}

thread_local! {
    /// The length of `STACK`, in a cell without a destructor.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// While a span is started, what is held beneath is out of reach for the spans which that opens.
    static FLOOR: Cell<usize> = const { Cell::new(0) };
    /// The held entries of this thread, of all layers, outermost first.
    static STACK: RefCell<Vec<Held>> = const { RefCell::new(Vec::new()) };
    /// Whether there is anything in `ADOPTION`, for all who only need to know that.
    static ADOPTS: Cell<bool> = const { Cell::new(false) };
    /// The instance that a held span joins when it starts, and the storage (by its address) that may say so.
    static ADOPTION: RefCell<Option<(usize, Identity)>> = const { RefCell::new(None) };
}

/// Whether this thread is inside any span that is held back.
#[inline]
pub(crate) fn any_held() -> bool {
    DEPTH.get() != 0
}

/// The part of the thread's stack that belongs to one layer, so that two subscribers on one thread do not
/// release each other's spans; and a filter that knows almost always which spans are none of its business.
#[derive(Debug)]
pub(crate) struct Deferral {
    layer: usize,
    /// How many spans are pending.
    count: AtomicUsize,
    /// How many of them hash to each slot.
    pending: [AtomicU32; SLOTS],
}

const SLOTS: usize = 256;

impl Deferral {
    pub(crate) fn new() -> Self {
        static LAYERS: AtomicUsize = AtomicUsize::new(0);
        Self {
            layer: LAYERS.fetch_add(1, Relaxed),
            count: AtomicUsize::new(0),
            pending: [const { AtomicU32::new(0) }; SLOTS],
        }
    }

    /// Whether no span of this layer can be held back. All that an ordinary span pays for.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.count.load(Relaxed) == 0
    }

    /// `false` is certain, `true` is not.
    #[inline]
    pub(crate) fn may_be_pending(&self, id: &span::Id) -> bool {
        self.slot(id).load(Relaxed) != 0
    }

    /// The same for what is done within spans that are held back, too.
    #[inline]
    pub(crate) fn concerns(&self, id: &span::Id) -> bool {
        any_held() || self.may_be_pending(id)
    }

    pub(crate) fn add_pending(&self, id: &span::Id) {
        self.count.fetch_add(1, Relaxed);
        self.slot(id).fetch_add(1, Relaxed);
    }

    pub(crate) fn remove_pending(&self, id: &span::Id) {
        self.count.fetch_sub(1, Relaxed);
        self.slot(id).fetch_sub(1, Relaxed);
    }

    #[inline]
    fn slot(&self, id: &span::Id) -> &AtomicU32 {
        // Fibonacci hashing: the registry packs a slot, a thread and a generation into the id's bits.
        let hash = id.into_u64().wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.pending[(hash >> 56) as usize % SLOTS]
    }

    /// `false` where the thread is past its thread-locals.
    pub(crate) fn hold(&self, id: &span::Id, heard: bool) -> bool {
        let held = Held {
            layer: self.layer,
            span: id.clone(),
            heard,
        };
        stack(|stack| stack.push(held)).is_some()
    }

    /// Takes the innermost entering of the span from the stack.
    pub(crate) fn take(&self, id: &span::Id) -> Option<Held> {
        stack(|stack| {
            let at = stack.iter().rposition(|held| self.is_of(held, id))?;
            Some(stack.remove(at))
        })?
    }

    /// Takes the outermost entering from the stack.
    pub(crate) fn take_outermost(&self) -> Option<Held> {
        stack(|stack| {
            let reachable = stack.get(FLOOR.get()..)?;
            let at = reachable.iter().position(|held| held.layer == self.layer)?;
            Some(stack.remove(FLOOR.get() + at))
        })?
    }

    pub(crate) fn holds(&self, id: &span::Id) -> bool {
        let held = stack(|stack| {
            let reachable = stack.get(FLOOR.get()..).unwrap_or_default();
            reachable.iter().any(|held| self.is_of(held, id))
        });
        held.unwrap_or(false)
    }

    fn is_of(&self, held: &Held, id: &span::Id) -> bool {
        held.layer == self.layer && held.span == *id
    }
}

/// Runs what starts a span. A sampler, a generator of ids and a processor may open spans meanwhile: those must not
/// release what is held beneath, and so start it in the wrong order.
pub(crate) fn starting<R>(start: impl FnOnce() -> R) -> R {
    scoped::with(&FLOOR, DEPTH.get(), start)
}

impl Pending {
    pub(crate) fn new(kind: Kind, awaits_run: bool) -> Self {
        Self {
            kind,
            settled: AtomicBool::new(kind == Kind::Named),
            awaits_id: AtomicBool::new(true),
            awaits_run: AtomicBool::new(awaits_run),
            held: Mutex::default(),
            counted: AtomicBool::new(false),
        }
    }

    /// `true` once, for the counter of deferred spans.
    pub(crate) fn count(&self) -> bool {
        !self.counted.swap(true, Relaxed)
    }

    /// Notes what was recorded; `true` where the span knows all that it waited for.
    pub(crate) fn learn(&self, id: bool, run: bool) -> bool {
        let awaits_id = self.awaits_id.fetch_and(!id, Relaxed) && !id;
        let awaits_run = self.awaits_run.fetch_and(!run, Relaxed) && !run;
        !awaits_id && !awaits_run
    }

    pub(crate) fn enter(&self) {
        let mut held = self.held();
        if held.entered == 0 {
            held.since = Some(Instant::now());
        }
        held.entered += 1;
    }

    pub(crate) fn leave(&self) {
        let mut held = self.held();
        held.entered = held.entered.saturating_sub(1);
        if held.entered == 0 {
            held.stop();
        }
    }

    /// The inner layer no longer counts; it may still be entered where that has not heard of it.
    pub(crate) fn resume(&self) {
        let mut held = self.held();
        if held.entered > 0 && held.since.is_none() {
            held.since = Some(Instant::now());
        }
    }

    /// The time for which it was held so far, which no longer counts here: now the inner layer counts.
    pub(crate) fn take_held(&self) -> Duration {
        let mut held = self.held();
        held.stop();
        std::mem::take(&mut held.total)
    }

    /// The span did not start after all.
    pub(crate) fn give_back(&self, time: Duration) {
        self.held().total += time;
    }

    pub(crate) fn was_held(&self) -> bool {
        !self.held().total.is_zero()
    }

    fn held(&self) -> MutexGuard<'_, HeldTime> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts spans within `start` as ones of that instance, unless they name one themselves.
pub(crate) fn adopting<R>(
    core: &Arc<Core>,
    identity: Option<Identity>,
    start: impl FnOnce() -> R,
) -> R {
    struct Clear;
    impl Drop for Clear {
        fn drop(&mut self) {
            end_adoption();
        }
    }
    let Some(identity) = identity else {
        return start();
    };
    let _clear = Clear;
    let offered = ADOPTION.try_with(|adoption| adoption.replace(Some((address(core), identity))));
    ADOPTS.set(offered.is_ok());
    start()
}

/// What is started from now on joins nobody.
#[inline]
pub(crate) fn end_adoption() {
    if ADOPTS.get() {
        drop(adoption());
    }
}

/// The instance that the span which is just being started is to join, once.
#[inline]
pub(crate) fn take_adoption(core: &Arc<Core>) -> Option<Identity> {
    if !ADOPTS.get() {
        return None;
    }
    let (storage, identity) = adoption()?;
    (storage == address(core)).then_some(identity)
}

#[inline(never)]
fn adoption() -> Option<(usize, Identity)> {
    ADOPTS.set(false);
    ADOPTION.try_with(|adoption| adoption.take()).ok()?
}

/// How long a span was held back, where that is what the attribute tells.
#[inline]
pub(crate) fn held_time(attribute: &KeyValue) -> Option<i64> {
    match attribute.value {
        Value::I64(held) if attribute.key.as_str() == HELD => Some(held),
        _ => None,
    }
}

/// Moves the time for which a span was entered but held back from `idle_ns` to `busy_ns`, where
/// tracing-opentelemetry counts what it has not heard of as idle.
pub(crate) fn correct_timing(attribute: &mut KeyValue, held: i64) {
    if let Value::I64(nanos) = &mut attribute.value {
        match attribute.key.as_str() {
            "busy_ns" => *nanos = nanos.saturating_add(held),
            "idle_ns" => *nanos = nanos.saturating_sub(held).max(0),
            _ => {}
        }
    }
}

/// Tells a started span how long it was held back.
pub(crate) fn tell_held(span: &SpanRef<'_>, held: Duration) {
    if !held.is_zero() {
        let nanos = i64::try_from(held.as_nanos()).unwrap_or(i64::MAX);
        span.set_attribute(KeyValue::new(HELD, nanos));
    }
}

/// No foreign code runs while the stack is borrowed.
fn stack<R>(edit: impl FnOnce(&mut Vec<Held>) -> R) -> Option<R> {
    STACK
        .try_with(|stack| {
            let mut stack = stack.borrow_mut();
            let result = edit(&mut stack);
            DEPTH.set(stack.len());
            result
        })
        .ok()
}

fn address(core: &Arc<Core>) -> usize {
    Arc::as_ptr(core).addr()
}
