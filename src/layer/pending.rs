//! The state of spans that may be held: what each waits for, how long it was held, and a filter of their ids.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tracing::span;

use crate::lock::lock;
use crate::tracer::handoff::{self, HeldSpan};

/// The state of a span that may be held, or may have to be started by force. Kept in the span's extensions.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) awaits: Awaits,
    /// The span is not held when it is entered: it has what it awaited, or was started.
    pub(super) is_free: AtomicBool,
    /// A run id is awaited only if the callsite declares one.
    awaits_id: AtomicBool,
    awaits_run: AtomicBool,
    /// The number of events that the inner layer may have buffered for the span.
    events: AtomicU32,
    held: Mutex<HeldTime>,
    counted: AtomicBool,
}

/// The number of events that a held span may have. opentelemetry_sdk 0.33 keeps no more of a span by default
/// (`SpanLimits::max_events_per_span`), so that none is lost by waiting; the inner layer, which buffers them, has no limit.
const MAX_EVENTS: u32 = 128;

/// The reason to hold a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaits {
    /// The span had its id from the start. It is watched only while it is unknown whether entering starts it.
    Nothing,
    /// The span declares an id without a value: held until its first exit at the latest.
    Id,
    /// An engine's span around user code: held until it closes at the latest.
    Child,
}

/// The time for which a span was entered, on one thread or several, while the inner layer was not told.
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

impl Pending {
    pub(super) fn new(awaits: Awaits, awaits_run: bool) -> Self {
        Self {
            awaits,
            is_free: AtomicBool::new(awaits == Awaits::Nothing),
            awaits_id: AtomicBool::new(true),
            awaits_run: AtomicBool::new(awaits_run),
            events: AtomicU32::new(0),
            held: Mutex::default(),
            counted: AtomicBool::new(false),
        }
    }

    /// Returns `true` once, for the counter of deferred spans.
    pub(super) fn count_once(&self) -> bool {
        !self.counted.swap(true, Relaxed)
    }

    /// Counts an event. Returns `true` if the span is held, and has had as many as it may.
    pub(super) fn has_too_many_events(&self) -> bool {
        !self.is_free.load(Relaxed)
            && self.events.fetch_add(1, Relaxed) >= MAX_EVENTS
            && self.counted.load(Relaxed)
    }

    /// Notes which ids were recorded. Returns `true` if the span has all that it awaited.
    pub(super) fn learn(&self, id: bool, run: bool) -> bool {
        let awaits_id = self.awaits_id.fetch_and(!id, Relaxed) && !id;
        let awaits_run = self.awaits_run.fetch_and(!run, Relaxed) && !run;
        !awaits_id && !awaits_run
    }

    pub(super) fn enter(&self) {
        let mut held = self.held();
        if held.entered == 0 {
            held.since = Some(Instant::now());
        }
        held.entered += 1;
    }

    pub(super) fn leave(&self) {
        let mut held = self.held();
        held.entered = held.entered.saturating_sub(1);
        if held.entered == 0 {
            held.stop();
        }
    }

    /// Goes on counting after the inner layer was told of an exit: other entries may still be unknown to it.
    pub(super) fn resume(&self) {
        let mut held = self.held();
        if held.entered > 0 && held.since.is_none() {
            held.since = Some(Instant::now());
        }
    }

    /// Takes the time counted so far: from now on the inner layer counts.
    pub(super) fn take_held(&self) -> Duration {
        let mut held = self.held();
        held.stop();
        std::mem::take(&mut held.total)
    }

    /// Gives time back, if the span did not start after all.
    pub(super) fn give_back(&self, time: Duration) {
        self.held().total += time;
    }

    pub(super) fn was_held(&self) -> bool {
        !self.held().total.is_zero()
    }

    fn held(&self) -> MutexGuard<'_, HeldTime> {
        lock(&self.held)
    }
}

/// The pending spans of one layer, as a counting filter over their ids: nearly every other span is ruled out by one
/// load. Through it the layer reaches its part of this thread's stack of held spans.
#[derive(Debug)]
pub(super) struct PendingSpans {
    layer: usize,
    /// The number of pending spans.
    count: AtomicUsize,
    /// The number of them that hash to each slot.
    pending: [AtomicU32; SLOTS],
}

const SLOTS: usize = 256;

impl PendingSpans {
    pub(super) fn new() -> Self {
        static LAYERS: AtomicUsize = AtomicUsize::new(0);
        Self {
            layer: LAYERS.fetch_add(1, Relaxed),
            count: AtomicUsize::new(0),
            pending: [const { AtomicU32::new(0) }; SLOTS],
        }
    }

    /// Returns `true` if no span of this layer is pending. All that an ordinary span pays for.
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.count.load(Relaxed) == 0
    }

    /// Returns `false` if the span certainly is not pending.
    #[inline]
    pub(super) fn may_be_pending(&self, id: &span::Id) -> bool {
        self.slot(id).load(Relaxed) != 0
    }

    /// Returns `false` if the span certainly is neither pending nor inside a held span.
    #[inline]
    pub(super) fn concerns(&self, id: &span::Id) -> bool {
        handoff::is_any_held() || self.may_be_pending(id)
    }

    pub(super) fn add(&self, id: &span::Id) {
        self.count.fetch_add(1, Relaxed);
        self.slot(id).fetch_add(1, Relaxed);
    }

    pub(super) fn remove(&self, id: &span::Id) {
        self.count.fetch_sub(1, Relaxed);
        self.slot(id).fetch_sub(1, Relaxed);
    }

    #[inline]
    fn slot(&self, id: &span::Id) -> &AtomicU32 {
        // Fibonacci hashing: the registry packs a slot, a thread and a generation into the id's bits.
        let hash = id.into_u64().wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.pending[(hash >> 56) as usize % SLOTS]
    }

    /// Holds a span; `false` if the thread is past its thread-locals.
    pub(super) fn hold(&self, id: &span::Id, is_heard: bool) -> bool {
        handoff::push_held(HeldSpan {
            layer: self.layer,
            id: id.clone(),
            is_heard,
        })
    }

    /// Takes the innermost entry of the span from the stack.
    pub(super) fn take(&self, id: &span::Id) -> Option<HeldSpan> {
        handoff::remove_held(self.layer, id)
    }

    /// Takes the outermost entry of this layer from the stack.
    pub(super) fn take_outermost(&self) -> Option<HeldSpan> {
        handoff::remove_outermost_held(self.layer)
    }

    pub(super) fn holds(&self, id: &span::Id) -> bool {
        handoff::is_held(self.layer, id)
    }
}
