//! The state of spans that may be held: what each waits for, its times, and a filter of their ids.

use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU32, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use tracing::span;

use crate::fields::ReservedFields;
use crate::fields::identity::{Identity, Ids};
use crate::lock::lock;
use crate::tracer::handoff::{self, HeldSpan, HeldTimes, StartNumber};

/// The state of a span that may be held, or may have to be started by force. Kept in the span's extensions.
#[derive(Debug)]
pub(super) struct Pending {
    /// The span is not held when it is entered: it has what it awaited, or was started.
    is_free: AtomicBool,
    was_held: AtomicBool,
    /// The number by which its start is noted.
    pub(super) number: StartNumber,
    /// The fields that it waits for, in the bits of [`ReservedFields`].
    awaits: AtomicU8,
    /// It declares an instance id of its own.
    may_name_itself: bool,
    /// The number of events that the inner layer may have buffered for the span.
    events: AtomicU32,
    times: Mutex<Times>,
    /// The ids that it has while it waits for more.
    ids: Mutex<Option<Box<Ids>>>,
    has_ids: AtomicBool,
}

/// The number of events that a held span may have. opentelemetry_sdk 0.33 keeps no more of a span by default
/// (`SpanLimits::max_events_per_span`), so that none is lost by waiting; the inner layer, which buffers them, has no limit.
const MAX_EVENTS: u32 = 128;

/// A span that is no longer held when it is entered.
#[derive(Debug)]
pub(super) struct WaitsNoMore {
    pub(super) number: StartNumber,
    pub(super) may_name_itself: bool,
    /// The ids that were noted while it waited for more.
    pub(super) ids: Option<Ids>,
}

impl WaitsNoMore {
    pub(super) fn new(pending: &Pending) -> Self {
        Self {
            number: pending.number,
            may_name_itself: pending.may_name_itself,
            ids: pending.ids(),
        }
    }

    /// Returns its identity, if it had one while it waited for more.
    pub(super) fn identity(&self) -> Option<Identity> {
        self.ids.clone()?.identity()
    }
}

/// The news that a record is to a span that may be held.
pub(super) enum Learnt {
    /// It does not wait.
    Nothing,
    /// It still waits for more.
    Some,
    All(WaitsNoMore),
}

/// The reason to hold a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaits {
    /// The span had its id from the start. It is watched only while it is unknown whether entering starts it.
    Nothing,
    /// The span declares these fields without a value, an instance id at least, or is an engine's around user code.
    Identity(ReservedFields),
}

/// The times of a span, counted as the inner layer counts them, which is not told of each entry and exit of a held span.
#[derive(Debug)]
struct Times {
    entered: u32,
    last: Instant,
    busy: Duration,
    idle: Duration,
    left: Option<SystemTime>,
}

impl Times {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.last, now)
    }
}

impl Pending {
    pub(super) fn new(awaits: Awaits, number: StartNumber) -> Self {
        let fields = match awaits {
            Awaits::Nothing => ReservedFields::NONE,
            Awaits::Identity(fields) => fields,
        };
        let awaited = fields.with(ReservedFields::INSTANCE_ID);
        Self {
            is_free: AtomicBool::new(awaits == Awaits::Nothing),
            was_held: AtomicBool::new(false),
            number,
            awaits: AtomicU8::new(awaited.bits()),
            may_name_itself: fields.has_id(),
            events: AtomicU32::new(0),
            times: Mutex::new(Times {
                entered: 0,
                last: Instant::now(),
                busy: Duration::ZERO,
                idle: Duration::ZERO,
                left: None,
            }),
            ids: Mutex::default(),
            has_ids: AtomicBool::new(false),
        }
    }

    /// Keeps ids that the span has, for the spans around it.
    pub(super) fn note(&self, ids: Ids) {
        lock(&self.ids).get_or_insert_default().add(ids);
        self.has_ids.store(true, Release);
    }

    fn ids(&self) -> Option<Ids> {
        let has_ids = self.has_ids.load(Acquire);
        has_ids.then(|| lock(&self.ids).as_deref().cloned())?
    }

    /// Returns the identity that was noted, as long as the span is held when it is entered.
    pub(super) fn held_identity(&self) -> Option<Identity> {
        let is_held = !self.is_free.load(Relaxed);
        is_held.then(|| self.ids())??.identity()
    }

    pub(super) fn may_name_itself(&self) -> bool {
        self.may_name_itself
    }

    /// Makes the span one that is not held when it is entered. Returns `true` if it would have been.
    pub(super) fn set_free(&self) -> bool {
        !self.is_free.swap(true, Relaxed)
    }

    /// Notes that the span is entered. Returns whether it is to be held, and whether that is so for the first time.
    pub(super) fn enter(&self) -> (bool, bool) {
        let holds = !self.is_free.load(Relaxed);
        let is_first = holds && !self.was_held.swap(true, Relaxed);
        if self.was_held.load(Relaxed) {
            let mut times = self.times();
            if times.entered == 0 {
                let lap = times.lap();
                times.idle += lap;
            }
            times.entered += 1;
        }
        (holds, is_first)
    }

    /// Notes that the span is exited, and whether the inner layer is told so.
    pub(super) fn leave(&self, is_told: bool) {
        if !self.was_held.load(Relaxed) {
            return;
        }
        let mut times = self.times();
        times.left = (!is_told).then(SystemTime::now);
        times.entered = times.entered.saturating_sub(1);
        if times.entered == 0 {
            let lap = times.lap();
            times.busy += lap;
        }
    }

    /// Returns the times of a span that was held, for its end.
    pub(super) fn held_times(&self) -> Option<HeldTimes> {
        let was_held = self.was_held.load(Relaxed);
        was_held.then(|| {
            let times = self.times();
            HeldTimes {
                busy: times.busy,
                idle: times.idle,
                end: times.left,
            }
        })
    }

    /// Counts an event. Returns `true` if the span is held, and has had as many as it may.
    pub(super) fn has_too_many_events(&self) -> bool {
        !self.is_free.load(Relaxed)
            && self.events.fetch_add(1, Relaxed) >= MAX_EVENTS
            && self.was_held.load(Relaxed)
    }

    /// Notes which fields were recorded. A span that has all that it awaited is held no more.
    pub(super) fn learn(&self, recorded: ReservedFields) -> Learnt {
        let others = !recorded.bits();
        let has_all = self.awaits.fetch_and(others, Relaxed) & others == 0;
        if self.is_free.load(Relaxed) {
            Learnt::Nothing
        } else if !has_all {
            Learnt::Some
        } else if self.set_free() {
            Learnt::All(WaitsNoMore::new(self))
        } else {
            Learnt::Nothing
        }
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        lock(&self.times)
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

    /// The number of this layer, in the stack of held spans.
    pub(super) fn layer(&self) -> usize {
        self.layer
    }

    /// Returns the held spans of this layer and thread, outermost first.
    pub(super) fn held(&self) -> Vec<span::Id> {
        let held = handoff::held_spans().into_iter();
        held.filter(|(layer, _)| *layer == self.layer)
            .map(|(_, id)| id)
            .collect()
    }

    /// Returns `true` if the span is held, and no other one is around it.
    pub(super) fn holds_alone(&self, id: &span::Id) -> bool {
        handoff::is_held_alone(self.layer, id)
    }

    pub(super) fn holds(&self, id: &span::Id) -> bool {
        handoff::is_held(self.layer, id)
    }
}
