//! The hand-over between the layer and the tracer: all thread-locals.
//!
//! tracing-opentelemetry calls the tracer somewhere inside the layer's callbacks, with no argument of ours. So the layer
//! leaves word in thread-locals, and the tracer reads them in the same call, on the same thread:
//!
//! | thread-local | set by | read by | for the time of |
//! |---|---|---|---|
//! | `MARKING`, `MARK` | layer, `on_new_span` | tracer, `span_builder` | one call of the inner layer |
//! | `ADOPTION`, `ADOPTS` | layer, for a held span and its first child | tracer, `build_with_context`, once | one start |
//! | `HELD`, `DEPTH` | layer, `on_enter` and `on_exit` | layer | as long as a span is held on this thread |
//! | `FLOOR` | layer, while it starts a span | layer | one start |
//! | `STARTS` | layer, while it starts a span | tracer, `build_with_context` | one start |
//! | `TIMES` | layer, `on_close` of a span that was held | span, `set_attribute` and `end` | one close |
//! | `ASKING`, `ANSWER` | tracer, `build_with_context` | the parent, `is_recording` | one question |
//! | `IS_TAGGED` | a tagged span, `is_recording` | tracer, for a first span | one question |
//! | `ASKING_IDENTITY`, `IDENTITY` | layer, `on_enter` inside a held span | a tagged span, `is_recording` | one question |
//! | `MUST_NOT_ASK` | span, `end` | tracer | one export |
//! | `HAS_PANICKED` | ordinary span, `end` | layer, `on_close` | one close |
//!
//! None is borrowed while foreign code runs. A thread past the destruction of its thread-locals does without them.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use opentelemetry::{KeyValue, Value};
use tracing::span;

use super::replays::Replay;
use crate::fields::identity::Identity;
use crate::scoped;

/// Identifies a storage by the address of its shared state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StorageId(usize);

impl StorageId {
    #[inline]
    pub(crate) fn new<T>(shared: &Arc<T>) -> Self {
        Self(Arc::as_ptr(shared).addr())
    }
}

/// A span on the stack of this thread that was entered while its start was deferred.
#[derive(Debug)]
pub(crate) struct HeldSpan {
    pub(crate) layer: usize,
    pub(crate) id: span::Id,
    /// The inner layer was told that the span is entered, which starts nothing.
    pub(crate) is_heard: bool,
}

/// The values of `MARKING`.
const MARKS_PLAINLY: u8 = 1;
const MARKS_WITH: u8 = 2;

thread_local! {
    /// Zero if nothing is marked.
    static MARKING: Cell<u8> = const { Cell::new(0) };
    static MARK: Cell<Mark> = const { Cell::new(Mark::NONE) };
    static ADOPTS: Cell<bool> = const { Cell::new(false) };
    static ADOPTION: RefCell<Option<Adoption>> = const { RefCell::new(None) };
    /// Outermost first, of all layers.
    static HELD: RefCell<Vec<HeldSpan>> = const { RefCell::new(Vec::new()) };
    /// The length of `HELD`, in a cell without a destructor.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// The entries of `HELD` below this index are out of reach.
    static FLOOR: Cell<usize> = const { Cell::new(0) };
    static STARTS: Cell<bool> = const { Cell::new(false) };
    static TIMES: Cell<Option<HeldTimes>> = const { Cell::new(None) };
    static ASKING: Cell<Option<StorageId>> = const { Cell::new(None) };
    static ANSWER: RefCell<Option<Replay>> = const { RefCell::new(None) };
    static IS_TAGGED: Cell<bool> = const { Cell::new(false) };
    static ASKING_IDENTITY: Cell<Option<StorageId>> = const { Cell::new(None) };
    static IDENTITY: RefCell<Option<Identity>> = const { RefCell::new(None) };
    static MUST_NOT_ASK: Cell<bool> = const { Cell::new(false) };
    static HAS_PANICKED: Cell<bool> = const { Cell::new(false) };
}

// Marking: the layer looks at each span's callsite, and marks the builders of those that matter.

/// The knowledge that the layer has of a new span, and that its builder carries until it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Zero if it has none.
    pub(crate) number: StartNumber,
    /// The number of its parent in `tracing`; zero if that has none.
    pub(crate) beneath: StartNumber,
    /// Its start is to be noted.
    pub(crate) may_be_held: bool,
    /// Its children may have to find it by its number.
    pub(crate) may_be_replayed: bool,
    /// It declares no reserved field.
    pub(crate) is_ordinary: bool,
    /// A reserved field may still be recorded on it.
    pub(crate) awaits: bool,
}

impl Mark {
    pub(crate) const NONE: Self = Self {
        number: 0,
        beneath: 0,
        may_be_held: false,
        may_be_replayed: false,
        is_ordinary: false,
        awaits: false,
    };
}

/// Says whether builders are marked at this moment, and by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marking {
    No,
    Plain,
    With(Mark),
}

/// Marks the span builder that the inner layer asks for within `create`.
#[inline]
pub(crate) fn marking<R>(mark: Option<Mark>, create: impl FnOnce() -> R) -> R {
    match mark {
        None => scoped::with(&MARKING, MARKS_PLAINLY, create),
        Some(mark) => scoped::with(&MARK, mark, || scoped::with(&MARKING, MARKS_WITH, create)),
    }
}

#[inline]
pub(super) fn marks() -> Marking {
    match MARKING.get() {
        MARKS_PLAINLY => Marking::Plain,
        MARKS_WITH => Marking::With(MARK.get()),
        _ => Marking::No,
    }
}

// Adoption: a span without an id of its own joins the instance of its first child.

/// An instance that is offered to a span.
#[derive(Debug)]
pub(crate) struct Adoption {
    pub(crate) storage: StorageId,
    pub(crate) identity: Identity,
    /// The span declares an id of its own, which may still be recorded.
    pub(crate) may_name_itself: bool,
}

/// Offers an instance to the span that starts within `start`, if that names none itself.
pub(crate) fn adopting<R>(offer: Option<Adoption>, start: impl FnOnce() -> R) -> R {
    struct Clear;
    impl Drop for Clear {
        fn drop(&mut self) {
            end_adoption();
        }
    }
    if offer.is_none() {
        return start();
    }
    let _clear = Clear;
    let offered = ADOPTION.try_with(|adoption| adoption.replace(offer));
    ADOPTS.set(offered.is_ok());
    start()
}

/// Withdraws the offer.
#[inline]
pub(super) fn end_adoption() {
    if ADOPTS.get() {
        drop(adoption());
    }
}

/// Takes the offer, which holds once and for one storage.
#[inline]
pub(super) fn take_adoption(storage: StorageId) -> Option<Adoption> {
    if !ADOPTS.get() {
        return None;
    }
    adoption().filter(|offer| offer.storage == storage)
}

#[inline(never)]
fn adoption() -> Option<Adoption> {
    ADOPTS.set(false);
    ADOPTION.try_with(|adoption| adoption.take()).ok()?
}

// Held spans: the part of the stack that belongs to one layer, so that two subscribers on one thread do not release
// each other's spans.

/// Returns `true` if this thread is inside a held span of any layer.
#[inline]
pub(crate) fn is_any_held() -> bool {
    DEPTH.get() != 0
}

/// The number of held spans inside each other from which on the next one releases them: a span starts its held parents, so
/// that many calls are on the stack.
const MAX_DEPTH: usize = 32;

/// Returns `true` if this thread is inside a held span, and may hold another one inside it.
pub(crate) fn may_hold_more() -> bool {
    (1..MAX_DEPTH).contains(&DEPTH.get())
}

/// Pushes a span; `false` if the thread is past its thread-locals.
pub(crate) fn push_held(span: HeldSpan) -> bool {
    edit_held(|held| held.push(span)).is_some()
}

/// Removes the innermost entry of a span.
pub(crate) fn remove_held(layer: usize, id: &span::Id) -> Option<HeldSpan> {
    edit_held(|held| {
        let at = (held.iter()).rposition(|span| span.layer == layer && span.id == *id)?;
        Some(held.remove(at))
    })?
}

/// Removes the outermost entry of a layer.
pub(crate) fn remove_outermost_held(layer: usize) -> Option<HeldSpan> {
    edit_held(|held| {
        let floor = FLOOR.get();
        let at = (held.get(floor..)?.iter()).position(|span| span.layer == layer)?;
        Some(held.remove(floor + at))
    })?
}

/// Returns the layers and ids of the held spans of this thread, outermost first.
pub(crate) fn held_spans() -> Vec<(usize, span::Id)> {
    let held = edit_held(|held| {
        let reachable = held.get(FLOOR.get()..).unwrap_or_default();
        let ids = reachable.iter().map(|span| (span.layer, span.id.clone()));
        ids.collect()
    });
    held.unwrap_or_default()
}

/// Returns `true` if the span is the innermost that is held on this thread.
pub(crate) fn is_innermost_held(id: Option<span::Id>) -> bool {
    let innermost = edit_held(|held| held.last().map(|span| span.id.clone()));
    id.is_some() && innermost.flatten() == id
}

/// Returns `true` if the span is held, and no other one of the layer around it.
pub(crate) fn is_held_alone(layer: usize, id: &span::Id) -> bool {
    let is_alone = edit_held(|held| {
        let reachable = held.get(FLOOR.get()..).unwrap_or_default();
        let innermost = (reachable.iter()).rposition(|span| span.layer == layer && span.id == *id);
        let around = innermost.map(|innermost| &reachable[..innermost]);
        around
            .is_some_and(|around| (around.iter()).all(|span| span.layer != layer || span.id == *id))
    });
    is_alone.unwrap_or(false)
}

pub(crate) fn is_held(layer: usize, id: &span::Id) -> bool {
    let is_held = edit_held(|held| {
        let reachable = held.get(FLOOR.get()..).unwrap_or_default();
        (reachable.iter()).any(|span| span.layer == layer && span.id == *id)
    });
    is_held.unwrap_or(false)
}

/// Runs `start`, which starts a span. A sampler, an id generator and a processor may open spans meanwhile: those must
/// not release what is held beneath, and so start it in the wrong order.
pub(crate) fn starting<R>(start: impl FnOnce() -> R) -> R {
    scoped::with(&FLOOR, DEPTH.get(), || scoped::with(&STARTS, true, start))
}

/// Runs `start` as [`starting`] does, for a span whose start the layer is not told of.
pub(super) fn behind_the_layer<R>(start: impl FnOnce() -> R) -> R {
    scoped::with(&FLOOR, DEPTH.get(), || scoped::with(&STARTS, false, start))
}

/// Returns `true` if the layer itself starts a span on this thread.
pub(super) fn is_starting() -> bool {
    STARTS.get()
}

fn edit_held<R>(edit: impl FnOnce(&mut Vec<HeldSpan>) -> R) -> Option<R> {
    HELD.try_with(|held| {
        let mut held = held.borrow_mut();
        let result = edit(&mut held);
        DEPTH.set(held.len());
        result
    })
    .ok()
}

// Starts that the layer is not told of: `Span::context()` starts a held span too. The builder of a span that may be held
// carries a number until then.

/// The number of a span that may be held, never zero.
pub(crate) type StartNumber = u64;

/// Returns a number that no other span of this process has.
pub(crate) fn next_number() -> StartNumber {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Relaxed) + 1
}

// Asking: OpenTelemetry hides the type of the span in a context, and a stand-in has the ids of a real span. But its
// `is_recording` is our code, and calling it changes nothing on anybody else's span.

/// Asks the span whose `is_recording` is called by `ask` whether what is opened beneath it is a replay of the storage.
pub(super) fn ask_for_replay(storage: StorageId, ask: impl FnOnce()) -> Option<Replay> {
    if MUST_NOT_ASK.get() {
        return None;
    }
    scoped::with(&ASKING, Some(storage), ask);
    ANSWER.try_with(|answer| answer.take()).ok()?
}

/// Answers, as a span of the storage, if that is what is asked.
pub(super) fn answer_replay(storage: StorageId, replay: &Replay) {
    if ASKING.get() == Some(storage) {
        let _ = ANSWER.try_with(|answer| answer.replace(Some(replay.clone())));
    }
}

/// Asks the span whose `is_recording` is called by `ask` whether it names an instance.
pub(super) fn ask_whether_tagged(ask: impl FnOnce()) -> bool {
    if MUST_NOT_ASK.get() {
        return false;
    }
    IS_TAGGED.set(false);
    ask();
    IS_TAGGED.get()
}

#[inline]
pub(super) fn answer_tagged() {
    let _ = IS_TAGGED.try_with(|is_tagged| is_tagged.set(true));
}

/// Asks the span whose `is_recording` is called by `ask` of which instance of the storage it is.
pub(crate) fn ask_for_identity(storage: StorageId, ask: impl FnOnce()) -> Option<Identity> {
    if MUST_NOT_ASK.get() {
        return None;
    }
    scoped::with(&ASKING_IDENTITY, Some(storage), ask);
    IDENTITY.try_with(|identity| identity.take()).ok()?
}

/// Answers, as a span of the storage, if that is what is asked.
#[inline]
pub(super) fn answer_identity(storage: StorageId, identity: Option<&Identity>) {
    if ASKING_IDENTITY.get() == Some(storage) {
        let _ = IDENTITY.try_with(|answer| answer.replace(identity.cloned()));
    }
}

/// Runs code that may start spans beneath one that OpenTelemetry has locked on this thread: asking would deadlock.
pub(super) fn without_asking<R>(run: impl FnOnce() -> R) -> R {
    scoped::with(&MUST_NOT_ASK, true, run)
}

// Held times: the times of a span that was held, as the inner layer would have counted them had it been told of each entry
// and exit. The inner layer sets the attributes and ends the span in one call, on one thread.

/// The times of a span until its last exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeldTimes {
    pub(crate) busy: Duration,
    pub(crate) idle: Duration,
    /// Its last exit, if the inner layer was not told of it.
    pub(crate) end: Option<SystemTime>,
}

/// Lets `close` end a started span with these times.
pub(crate) fn closing<R>(times: Option<HeldTimes>, close: impl FnOnce() -> R) -> R {
    match times {
        None => close(),
        Some(_) => scoped::with(&TIMES, times, close),
    }
}

/// The attributes that tracing-opentelemetry 0.34 sets when a span closes (src/layer.rs, `on_close`).
const BUSY: &str = "busy_ns";
const IDLE: &str = "idle_ns";

/// Returns `false` if the attribute certainly is not a time to be replaced.
#[inline]
pub(super) fn may_be_time(name: &str) -> bool {
    name.len() == BUSY.len() && TIMES.get().is_some()
}

/// Replaces a time of the span that closes, if it was held.
pub(super) fn correct_times(attribute: &mut KeyValue) {
    if let (Some(times), Value::I64(value)) = (TIMES.get(), &mut attribute.value) {
        match attribute.key.as_str() {
            BUSY => *value = nanos(times.busy),
            IDLE => *value = nanos(times.idle),
            _ => {}
        }
    }
}

/// Takes the times of the span that ends now: an exporter may end others meanwhile.
#[inline]
pub(super) fn take_times() -> Option<HeldTimes> {
    TIMES.take()
}

// Panics at the end of an ordinary span, which does not know its storage.

pub(super) fn leave_panic() {
    HAS_PANICKED.set(true);
}

/// Returns `true` if a span that ended on this thread has left word of a panic.
#[inline]
pub(crate) fn take_panic() -> bool {
    HAS_PANICKED.get() && HAS_PANICKED.replace(false)
}

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}
