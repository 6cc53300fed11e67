//! Random sequences of span operations on three threads, compared with a model of the documented behaviour.
//!
//! The threads run in lock step, so that a seed determines the interleaving. The model is independent of the layer's
//! implementation: it says when a span starts, where it is placed, and which span is current.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use opentelemetry::trace::{SpanId, TraceContextExt as _};
use opentelemetry::{Context, Value};
use opentelemetry_sdk::trace::{Sampler, SpanData};
use tracing::field::Empty;
use tracing::span::EnteredSpan;
use tracing::{Span, info, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_workflow_context::WorkflowContextStorage;

use crate::support::*;

const SEQUENCES: u64 = 10_000;
const THREADS: usize = 3;
const INSTANCES: [&str; 3] = ["order 1", "order 2", "order 3"];
const ID: &str = "workflow.instance_id";

#[test]
fn exported_spans_match_the_model() {
    for seed in 0..SEQUENCES {
        let worker = worker(true);
        Sequence::perform(seed, &worker, Model::new(true), &[]).compare();
    }
}

#[test]
fn exported_spans_match_the_model_without_activation() {
    for seed in 0..SEQUENCES {
        let worker = worker(false);
        Sequence::perform(seed, &worker, Model::new(false), &LEARN_ACTIVATION).compare();
    }
}

/// Before its first span a layer does not know that entering starts nothing, and may still start spans early.
#[test]
fn a_new_layer_without_activation_neither_loses_nor_separates_spans() {
    for seed in 0..SEQUENCES / 2 {
        let worker = worker(false);
        Sequence::perform(seed, &worker, Model::new(false), &[]).compare_roughly();
    }
}

fn worker(activation: bool) -> Worker {
    let builder = WorkflowContextStorage::builder().adopt_spans(["my_engine_handler"]);
    let storage = builder.build().expect("valid settings");
    Worker::with_sampler(storage, activation, Sampler::AlwaysOn)
}

/// A span, by the number in its attribute `n`.
type Number = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ordinary,
    Tagged(&'static str),
    /// Declares an id without a value.
    Awaiting,
    Engine,
}

#[derive(Clone, Copy, Debug)]
enum ParentOf {
    Contextual,
    Explicit(Number),
    None,
}

/// One step of one thread.
#[derive(Clone, Copy, Debug)]
enum Step {
    New(Number, Kind, ParentOf),
    Enter(Number),
    Exit(Number),
    Record(Number, &'static str),
    Event,
    /// Asks for the span's OpenTelemetry context.
    Ask(Number),
    FollowsFrom(Number, Number),
    /// Drops the handle; the span closes when it is no longer entered and has no open children.
    Drop(Number),
    /// Unwinds through that many enterings, innermost first.
    Panic(usize),
}

/// Shows the layer that entering a span does not start it.
const LEARN_ACTIVATION: [Step; 4] = [
    Step::New(0, Kind::Tagged("first"), ParentOf::None),
    Step::Enter(0),
    Step::Exit(0),
    Step::Drop(0),
];

// Execution.

/// The spans whose handle has not been dropped yet.
type Handles = Mutex<Vec<Option<Span>>>;

/// Performs all steps, and reports the current span after each. At the end there must be none.
fn perform(worker: &Worker, handles: &Handles, steps: Receiver<Step>, current: Sender<SpanId>) {
    worker.run(|| {
        let mut entered = Vec::new();
        for step in steps {
            take(step, handles, &mut entered);
            let id = Context::map_current(|cx| cx.span().span_context().span_id());
            if current.send(id).is_err() {
                break;
            }
        }
    });
}

fn take(step: Step, handles: &Handles, entered: &mut Vec<(Number, EnteredSpan)>) {
    let handle = |number: Number| handles.lock().unwrap()[number].clone().expect("open");
    match step {
        Step::New(number, kind, parent) => {
            let parent = match parent {
                ParentOf::Contextual => None,
                ParentOf::Explicit(parent) => Some(handle(parent).id()),
                ParentOf::None => Some(None),
            };
            let span = open(number, kind, parent);
            handles.lock().unwrap().push(Some(span));
        }
        Step::Enter(number) => entered.push((number, handle(number).entered())),
        Step::Exit(number) => {
            let innermost = entered.iter().rposition(|(entered, _)| *entered == number);
            drop(entered.remove(innermost.expect("entered here")));
        }
        Step::Record(number, id) => {
            handle(number).record(ID, id);
        }
        Step::Event => info!("event"),
        Step::Ask(number) => drop(handle(number).context()),
        Step::FollowsFrom(number, followed) => {
            handle(number).follows_from(handle(followed));
        }
        Step::Drop(number) => {
            let span = handles.lock().unwrap()[number].take();
            drop(span);
        }
        Step::Panic(count) => {
            let mut unwound = entered.split_off(entered.len() - count);
            unwound.reverse();
            let panicked = catch_unwind(AssertUnwindSafe(move || {
                let _unwound = unwound;
                resume_unwind(Box::new("on purpose"));
            }));
            assert!(panicked.is_err());
        }
    }
}

fn open(number: Number, kind: Kind, parent: Option<Option<tracing::Id>>) -> Span {
    let n = i64::try_from(number).expect("a small number");
    macro_rules! open {
        ($name:literal $($field:tt)*) => {
            match parent {
                None => info_span!($name, n $($field)*),
                Some(parent) => info_span!(parent: parent, $name, n $($field)*),
            }
        };
    }
    match kind {
        Kind::Ordinary => open!("ordinary"),
        Kind::Tagged(id) => open!("tagged", workflow.instance_id = id),
        Kind::Awaiting => open!("awaiting", workflow.instance_id = Empty),
        Kind::Engine => open!("my_engine_handler"),
    }
}

// The model.

/// The expected state of one layer in one activation mode.
struct Model {
    activation: bool,
    spans: Vec<Modelled>,
    /// The enterings of each thread, outermost first.
    entered: [Vec<Entering>; THREADS],
    /// The recorded span of each instance.
    stored: BTreeMap<&'static str, Number>,
    deferred: u64,
    adopted: u64,
    late: u64,
}

struct Modelled {
    kind: Kind,
    /// The parent that it has without this crate.
    natural: Option<Number>,
    /// The span that tracing keeps open as long as this one.
    keeps_open: Option<Number>,
    /// Entering it does not start it, yet.
    held_back: bool,
    /// Its natural parent was held when it was opened, and had not started.
    in_held: bool,
    deferred: bool,
    /// The id that was given to it or recorded on it.
    id: Option<&'static str>,
    adopted_by: Option<&'static str>,
    started: Option<Started>,
    /// Relation and target; a link that is not ours has no relation.
    links: Vec<(Option<&'static str>, Number)>,
    events: usize,
    has_handle: bool,
    times_entered: usize,
    open_children: usize,
}

struct Started {
    parent: Origin,
    /// By the number of its root.
    trace: Number,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Root,
    Natural(Number),
    Stored(Number),
}

struct Entering {
    span: Number,
    /// Not visible outside the layer yet.
    held: bool,
    /// Tracing does not take an inner entering of the same span for a change of the current span.
    again: bool,
}

impl Model {
    fn new(activation: bool) -> Self {
        Self {
            activation,
            spans: Vec::new(),
            entered: Default::default(),
            stored: BTreeMap::new(),
            deferred: 0,
            adopted: 0,
            late: 0,
        }
    }

    fn apply(&mut self, thread: usize, step: Step) {
        match step {
            Step::New(_, kind, parent) => self.open(thread, kind, parent),
            Step::Enter(span) => self.enter(thread, span),
            Step::Exit(span) => self.exit(thread, span),
            Step::Record(span, id) => self.record(thread, span, id),
            Step::Event => {
                if let Some(span) = self.current_in_tracing(thread) {
                    self.spans[span].events += 1;
                }
            }
            Step::Ask(span) => self.start(span, None),
            Step::FollowsFrom(span, followed) => {
                self.start(followed, None);
                self.spans[span].links.push((None, followed));
            }
            Step::Drop(span) => {
                self.spans[span].has_handle = false;
                self.close_if_unused(span);
            }
            Step::Panic(count) => {
                for _ in 0..count {
                    let innermost = self.entered[thread].last().expect("entered").span;
                    self.exit(thread, innermost);
                }
            }
        }
    }

    /// A span releases what it is the first child of; a tagged one is joined by it.
    fn open(&mut self, thread: usize, kind: Kind, parent: ParentOf) {
        let id = match kind {
            Kind::Tagged(id) => Some(id),
            _ => None,
        };
        let waits = matches!(kind, Kind::Awaiting | Kind::Engine);
        let current = self.current_in_tracing(thread);
        let held = current.filter(|&span| waits && self.is_held(thread, span));
        let mut in_held = false;
        let (natural, keeps_open) = match parent {
            ParentOf::None => (None, None),
            ParentOf::Contextual if held.is_some() => {
                in_held = true;
                (held, held)
            }
            ParentOf::Contextual => {
                self.release(thread, None, id);
                let keeps_open = self.current_in_tracing(thread);
                let natural = match self.activation {
                    true => self.current(thread),
                    false => keeps_open,
                };
                (natural, keeps_open)
            }
            ParentOf::Explicit(parent) => {
                if self.is_held(thread, parent) {
                    self.release(thread, Some(parent), id);
                } else if self.spans[parent].held_back {
                    self.start_by_layer(parent, id);
                }
                (Some(parent), Some(parent))
            }
        };
        if let Some(natural) = natural.filter(|_| !in_held) {
            self.start(natural, None);
        }
        if let Some(kept) = keeps_open {
            self.spans[kept].open_children += 1;
        }
        self.spans.push(Modelled {
            kind,
            natural,
            keeps_open,
            held_back: waits,
            in_held,
            deferred: false,
            id,
            adopted_by: None,
            started: None,
            links: Vec::new(),
            events: 0,
            has_handle: true,
            times_entered: 0,
            open_children: 0,
        });
    }

    fn enter(&mut self, thread: usize, span: Number) {
        let modelled = &mut self.spans[span];
        if modelled.started.is_some() {
            modelled.held_back = false;
        }
        let held = modelled.held_back;
        if !held {
            // Contexts are a stack: spans held below this one are released first.
            self.release(thread, None, None);
            self.start(span, None);
        } else if !self.spans[span].deferred {
            self.spans[span].deferred = true;
            self.deferred += 1;
        }
        self.spans[span].times_entered += 1;
        let entered = &mut self.entered[thread];
        let again = entered.iter().any(|outer| outer.span == span);
        entered.push(Entering { span, held, again });
    }

    fn exit(&mut self, thread: usize, span: Number) {
        let entered = &mut self.entered[thread];
        let innermost = entered.iter().rposition(|entering| entering.span == span);
        entered.remove(innermost.expect("entered here"));
        self.spans[span].times_entered -= 1;
        self.close_if_unused(span);
    }

    /// An id that comes late counts, unless the span was adopted into that very instance.
    fn record(&mut self, thread: usize, span: Number, id: &'static str) {
        let has_started = self.spans[span].started.is_some();
        if has_started && self.spans[span].adopted_by != Some(id) {
            self.join_late(span, id);
        }
        self.spans[span].id = Some(id);
        if !std::mem::take(&mut self.spans[span].held_back) {
            return;
        }
        if self.is_held(thread, span) {
            self.release(thread, Some(span), Some(id));
        } else if let Some(parent) = self.spans[span]
            .natural
            .filter(|_| self.spans[span].in_held)
        {
            // The held spans around it join its instance too.
            if self.is_held(thread, parent) {
                self.release(thread, Some(parent), Some(id));
            } else if self.spans[parent].held_back {
                self.start_by_layer(parent, Some(id));
            }
        }
    }

    /// Starts a span that waits, after the held spans around it. All may be adopted.
    fn start_by_layer(&mut self, span: Number, adopted_by: Option<&'static str>) {
        self.spans[span].held_back = false;
        let parent = self.spans[span]
            .natural
            .filter(|_| self.spans[span].in_held);
        if let Some(parent) = parent.filter(|&parent| self.spans[parent].held_back) {
            self.start_by_layer(parent, adopted_by);
        }
        self.start(span, adopted_by);
    }

    /// Starts the spans held on the thread, outermost first, up to the last entering of a span or all of it.
    fn release(&mut self, thread: usize, up_to: Option<Number>, id: Option<&'static str>) {
        let entered = &mut self.entered[thread];
        let last = match up_to {
            Some(span) => entered.iter().rposition(|e| e.held && e.span == span),
            None => entered.len().checked_sub(1),
        };
        let Some(last) = last else { return };
        let released = entered[..=last].iter_mut();
        let released = released.filter_map(|e| std::mem::take(&mut e.held).then_some(e.span));
        for span in released.collect::<Vec<_>>() {
            self.start_by_layer(span, id);
        }
    }

    /// The table "What becomes of a tagged span", for a span that may be adopted by an instance.
    fn start(&mut self, span: Number, adopted_by: Option<&'static str>) {
        if self.spans[span].started.is_some() {
            return;
        }
        let natural = self.spans[span].natural;
        if let Some(parent) = natural {
            self.start(parent, None);
        }
        let by_nature = match natural {
            Some(natural) => Started {
                parent: Origin::Natural(natural),
                trace: self.trace(natural),
            },
            None => Started {
                parent: Origin::Root,
                trace: span,
            },
        };
        if let (None, Some(_)) = (self.spans[span].id, adopted_by) {
            self.spans[span].adopted_by = adopted_by;
            self.adopted += 1;
        }
        let instance = self.spans[span].instance();
        let stored = instance.and_then(|id| self.stored.get(id).copied());
        let started = match (instance, stored) {
            (None, _) => by_nature,
            (Some(id), None) => {
                self.stored.insert(id, span);
                by_nature
            }
            (Some(_), Some(stored)) if self.trace(stored) == by_nature.trace => by_nature,
            (Some(_), Some(stored)) => {
                let foreign = natural.map(|natural| (Some("foreign"), natural));
                self.spans[span].links.extend(foreign);
                Started {
                    parent: Origin::Stored(stored),
                    trace: self.trace(stored),
                }
            }
        };
        self.spans[span].started = Some(started);
    }

    fn join_late(&mut self, span: Number, id: &'static str) {
        self.late += 1;
        let stored = *self.stored.entry(id).or_insert(span);
        if self.trace(stored) != self.trace(span) {
            self.spans[span].links.push((Some("late"), stored));
        }
    }

    fn close_if_unused(&mut self, span: Number) {
        let is_open =
            |span: &Modelled| span.has_handle || span.times_entered > 0 || span.open_children > 0;
        if is_open(&self.spans[span]) {
            return;
        }
        self.start(span, None);
        if let Some(kept) = self.spans[span].keeps_open {
            self.spans[kept].open_children -= 1;
            self.close_if_unused(kept);
        }
    }

    fn trace(&self, span: Number) -> Number {
        self.spans[span].started.as_ref().expect("started").trace
    }

    fn is_held(&self, thread: usize, span: Number) -> bool {
        let mut entered = self.entered[thread].iter();
        entered.any(|entering| entering.held && entering.span == span)
    }

    /// The span in the current OpenTelemetry context.
    fn current(&self, thread: usize) -> Option<Number> {
        let mut noticed = self.entered[thread].iter().rev().filter(|e| !e.held);
        noticed.next().map(|e| e.span).filter(|_| self.activation)
    }

    fn current_in_tracing(&self, thread: usize) -> Option<Number> {
        let mut changes = self.entered[thread].iter().rev().filter(|e| !e.again);
        changes.next().map(|e| e.span)
    }
}

impl Modelled {
    fn instance(&self) -> Option<&'static str> {
        self.id.or(self.adopted_by)
    }
}

// The sequences.

fn instance(random: &mut Random) -> &'static str {
    INSTANCES[random.below(INSTANCES.len())]
}

/// The steps so far, to be printed on failure.
struct Sequence<'a> {
    seed: u64,
    worker: &'a Worker,
    model: Model,
    random: Random,
    steps: Vec<(usize, Step)>,
    /// After each step: the span that should be current on its thread, and the one that was.
    current: Vec<(Option<Number>, SpanId)>,
}

impl<'a> Sequence<'a> {
    /// Performs the first steps, random ones, and then exits and drops all spans.
    fn perform(seed: u64, worker: &'a Worker, model: Model, first: &[Step]) -> Self {
        let mut sequence = Self {
            seed,
            worker,
            model,
            random: Random::new(seed),
            steps: Vec::new(),
            current: Vec::new(),
        };
        let handles = Handles::default();
        thread::scope(|scope| {
            let threads = [(); THREADS].map(|()| {
                let (step, steps) = channel();
                let (current, currents) = channel();
                let handles = &handles;
                let thread = scope.spawn(move || perform(worker, handles, steps, current));
                (thread, step, currents)
            });
            let perform = |thread: usize, step: Step, sequence: &mut Self| {
                sequence.steps.push((thread, step));
                sequence.model.apply(thread, step);
                let (_, steps, currents) = &threads[thread];
                let sent = steps.send(step).is_ok();
                let Some(current) = currents.recv().ok().filter(|_| sent) else {
                    panic!("thread {thread} panicked\n{sequence}");
                };
                let expected = sequence.model.current(thread);
                sequence.current.push((expected, current));
            };
            for step in first {
                perform(0, *step, &mut sequence);
            }
            for _ in 0..10 + sequence.random.below(40) {
                let thread = sequence.random.below(THREADS);
                if let Some(step) = sequence.next(thread) {
                    perform(thread, step, &mut sequence);
                }
            }
            while let Some((thread, step)) = sequence.clear_up() {
                perform(thread, step, &mut sequence);
            }
            for (thread, step, _) in threads {
                drop(step);
                assert!(thread.join().is_ok(), "a thread ended badly\n{sequence}");
            }
        });
        sequence
    }

    /// Returns a random next step of the thread, or `None` if there is no span for it.
    fn next(&mut self, thread: usize) -> Option<Step> {
        let open: Vec<_> = self.open().collect();
        let entered: Vec<_> = self.model.entered[thread].iter().map(|e| e.span).collect();
        let random = &mut self.random;
        Some(match random.below(32) {
            0..10 => {
                let kind = match random.below(8) {
                    0..2 => Kind::Ordinary,
                    2..4 => Kind::Tagged(instance(random)),
                    4..6 => Kind::Awaiting,
                    _ => Kind::Engine,
                };
                let parent = match random.below(8) {
                    0..5 => ParentOf::Contextual,
                    5..7 => random
                        .choose(&open)
                        .map_or(ParentOf::None, ParentOf::Explicit),
                    _ => ParentOf::None,
                };
                Step::New(self.model.spans.len(), kind, parent)
            }
            10..18 => Step::Enter(random.choose(&open)?),
            18..22 => Step::Exit(*entered.last()?),
            22 => Step::Exit(random.choose(&entered)?),
            23..26 => {
                let id = instance(random);
                let nameless: Vec<_> = open.into_iter().filter(|n| self.is_nameless(*n)).collect();
                Step::Record(self.random.choose(&nameless)?, id)
            }
            26 => Step::Event,
            27 => Step::Ask(random.choose(&open)?),
            28 => {
                let (span, followed) = (random.choose(&open)?, random.choose(&open)?);
                (span != followed).then_some(Step::FollowsFrom(span, followed))?
            }
            29..31 => Step::Drop(random.choose(&open)?),
            _ => Step::Panic(
                1 + random
                    .below(entered.len().max(1))
                    .min(entered.len().checked_sub(1)?),
            ),
        })
    }

    /// Exits and drops the remaining spans in random order.
    fn clear_up(&mut self) -> Option<(usize, Step)> {
        let open: Vec<_> = self.open().collect();
        let entered: Vec<_> = (0..THREADS)
            .flat_map(|thread| {
                self.model.entered[thread]
                    .iter()
                    .map(move |e| (thread, e.span))
            })
            .collect();
        let thread = self.random.below(THREADS);
        let drop = self
            .random
            .choose(&open)
            .map(|span| (thread, Step::Drop(span)));
        let exit = self
            .random
            .choose(&entered)
            .map(|(thread, span)| (thread, Step::Exit(span)));
        match self.random.below(2) {
            0 => drop.or(exit),
            _ => exit.or(drop),
        }
    }

    fn open(&self) -> impl Iterator<Item = Number> {
        let spans = self.model.spans.iter().enumerate();
        spans
            .filter(|(_, span)| span.has_handle)
            .map(|(number, _)| number)
    }

    /// Each span gets one id at most: precedence is tested elsewhere.
    fn is_nameless(&self, number: Number) -> bool {
        let span = &self.model.spans[number];
        span.kind == Kind::Awaiting && span.id.is_none()
    }

    /// Returns the exported spans, and asserts that each was exported once.
    fn exported(&self) -> BTreeMap<Number, SpanData> {
        let mut exported = BTreeMap::new();
        for span in self.worker.spans() {
            let Some(Value::I64(n)) = attribute(&span, "n") else {
                panic!("a span without a number: {span:?}\n{self}");
            };
            if let Some(again) = exported.insert(usize::try_from(n).expect("a number"), span) {
                panic!("{n} is exported twice: {again:?}\n{self}");
            }
        }
        let numbers: Vec<_> = exported.keys().copied().collect();
        let expected: Vec<_> = (0..self.model.spans.len()).collect();
        self.check("numbers of the exported spans", expected, numbers);
        exported
    }

    /// Asserts that every span has the expected parent and links.
    fn compare_roughly(&self) {
        self.worker.forest().assert_no_orphans();
        for (n, span) in self.exported() {
            let Some(id) = self.model.spans[n].id else {
                continue;
            };
            let stored = self.worker.stored(id);
            let mut linked = span.links.iter().map(|link| link.span_context.span_id());
            assert!(
                span.span_context.trace_id() == stored.trace_id()
                    || linked.any(|target| target == stored.span_id()),
                "{n} has nothing to do with {id}\n{self}"
            );
        }
    }

    fn compare(&self) {
        let exported = self.exported();
        let number = |id: SpanId| {
            let mut found = exported
                .iter()
                .filter(|(_, span)| span.span_context.span_id() == id);
            found.next().map(|(number, _)| *number)
        };
        for (n, span) in &exported {
            self.compare_span(*n, span, &exported, number);
        }
        let roots = self.model.spans.iter().filter(|span| {
            let started = span.started.as_ref().expect("started");
            started.parent == Origin::Root
        });
        let traces = self.worker.forest().trace_count();
        self.check("number of traces", roots.count(), traces);
        for id in INSTANCES {
            let stored = self.worker.storage.get(id).expect("a valid id");
            let stored = stored.and_then(|stored| number(stored.span_id()));
            let expected = self.model.stored.get(id).copied();
            self.check(format_args!("recorded span of {id}"), expected, stored);
        }
        for (at, (expected, got)) in self.current.iter().enumerate() {
            let what = format_args!("current span after step {at}");
            let got = (*got != SpanId::INVALID).then(|| number(*got).expect("an exported span"));
            self.check(what, *expected, got);
        }
        let Model {
            deferred,
            adopted,
            late,
            ..
        } = self.model;
        let stats = self.worker.storage.stats();
        let counted = (stats.deferred, stats.adopted, stats.late);
        self.check(
            "deferred, adopted and late",
            (deferred, adopted, late),
            counted,
        );
    }

    fn compare_span(
        &self,
        n: Number,
        span: &SpanData,
        exported: &BTreeMap<Number, SpanData>,
        number: impl Fn(SpanId) -> Option<Number>,
    ) {
        let expected = &self.model.spans[n];
        let started = expected.started.as_ref().expect("started");
        let parent = match (span.parent_span_id, span.parent_span_is_remote) {
            (SpanId::INVALID, _) => Origin::Root,
            (id, true) => Origin::Stored(number(id).expect("an exported parent")),
            (id, false) => Origin::Natural(number(id).expect("an exported parent")),
        };
        self.check(format_args!("parent of {n}"), started.parent, parent);
        let root = &exported[&started.trace];
        self.check(
            format_args!("trace of {n}"),
            root.span_context.trace_id(),
            span.span_context.trace_id(),
        );
        let links = span.links.iter().map(|link| {
            let relation = link.attributes.first().map(|kv| kv.value.to_string());
            (
                relation,
                number(link.span_context.span_id()).expect("an exported target"),
            )
        });
        let expected_links = expected.links.iter();
        let expected_links = expected_links.map(|(relation, n)| (relation.map(str::to_owned), *n));
        self.check(
            format_args!("links of {n}"),
            expected_links.collect::<Vec<_>>(),
            links.collect(),
        );
        self.check(
            format_args!("events of {n}"),
            expected.events,
            span.events.len(),
        );
        // A repeated attribute replaces the first, although the SDK exports both.
        let mut ids = span.attributes.iter().filter(|kv| kv.key.as_str() == ID);
        let id = ids.next_back().map(|kv| kv.value.to_string());
        let expected_id = expected.instance().map(str::to_owned);
        self.check(format_args!("instance id of {n}"), expected_id, id);
    }

    fn check<T: PartialEq + fmt::Debug>(&self, what: impl fmt::Display, expected: T, got: T) {
        assert!(
            expected == got,
            "the {what} should be {expected:?} and is {got:?}\n{self}"
        );
    }
}

/// Prints enough to reproduce the sequence by hand.
impl fmt::Display for Sequence<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let activation = self.model.activation;
        writeln!(f, "seed {}, activation {activation}", self.seed)?;
        for (at, (thread, step)) in self.steps.iter().enumerate() {
            writeln!(f, "{at:>4}  thread {thread}  {step:?}")?;
        }
        write!(f, "{}", self.worker.forest())
    }
}
