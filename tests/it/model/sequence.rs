//! Random sequences of steps, performed step by step beside the model, and the comparison of what is exported.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::mpsc::channel;
use std::thread;

use opentelemetry::{SpanId, Value};
use opentelemetry_sdk::trace::SpanData;

use super::expected::Model;
use super::placement::Origin;
use super::{
    Declared, Field, Handles, ID, INSTANCES, Kind, Number, ParentOf, RUNS, Setup, Step, THREADS,
    perform,
};
use crate::support::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Held spans, named by an instance id alone.
    Held,
    /// Also runs, parent instances and pollers.
    Traces,
    /// Also replayed spans, and contexts that are attached by hand.
    Replays,
}

fn instance(random: &mut Random) -> &'static str {
    INSTANCES[random.below(INSTANCES.len())]
}

fn run(random: &mut Random) -> &'static str {
    RUNS[random.below(RUNS.len())]
}

fn kind(random: &mut Random, scope: Scope) -> Kind {
    match (random.below(9), scope) {
        (0..2, _) => Kind::Ordinary,
        (2..4, _) => Kind::Engine,
        (4..6, Scope::Replays) => Kind::Flagged {
            id: (random.below(3) > 0).then(|| maybe_instance(random)),
            replaying: random.below(3) > 0,
        },
        (4, Scope::Traces) => Kind::Poller,
        (_, Scope::Traces) => Kind::Tagged {
            id: maybe_instance(random),
            run: declared(random, 5, run),
            parent: declared(random, 8, instance),
        },
        _ => Kind::Tagged {
            id: maybe_instance(random),
            run: None,
            parent: None,
        },
    }
}

fn maybe_instance(random: &mut Random) -> Option<&'static str> {
    (random.below(2) == 0).then(|| instance(random))
}

/// Declares a field in two of so many cases, once with a value.
fn declared(random: &mut Random, cases: usize, value: fn(&mut Random) -> &'static str) -> Declared {
    match random.below(cases) {
        0 => Some(None),
        1 => Some(Some(value(random))),
        _ => None,
    }
}

/// The steps so far, to be printed on failure.
pub(super) struct Sequence<'a> {
    seed: u64,
    setup: Setup,
    worker: &'a Worker,
    model: Model,
    random: Random,
    steps: Vec<(usize, Step)>,
    /// After each step: the span that should be current on its thread, and the one that was.
    current: Vec<(Option<Number>, SpanId)>,
}

impl<'a> Sequence<'a> {
    /// Performs the first steps, random ones, and then exits and drops all spans.
    pub(super) fn perform(seed: u64, setup: Setup, worker: &'a Worker, first: &[Step]) -> Self {
        let mut sequence = Self {
            seed,
            setup,
            worker,
            model: setup.model(),
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
        let scope = self.setup.scope;
        Some(match random.below(35) {
            0..10 => {
                let kind = kind(random, scope);
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
                let spans = open.iter();
                let nameless = spans.flat_map(|n| {
                    let fields = self.model.spans[*n].nameless();
                    fields.map(move |field| (*n, field))
                });
                let (span, field) = random.choose(&nameless.collect::<Vec<_>>())?;
                let value = match field {
                    Field::Id | Field::Parent => instance(random),
                    Field::Run => run(random),
                };
                Step::Record(span, field, value)
            }
            26 => Step::Event,
            27 => Step::Ask(random.choose(&open)?),
            // A link to a replayed span would be one to what that stands for.
            28 if scope != Scope::Replays => {
                let (span, followed) = (random.choose(&open)?, random.choose(&open)?);
                (span != followed).then_some(Step::FollowsFrom(span, followed))?
            }
            29..31 => Step::Drop(random.choose(&open)?),
            31 => {
                let spans = open.iter().copied();
                // Without activation, what may be replayed starts when it is entered, ordinary or not.
                let waiting = spans.filter(|n| {
                    let span = &self.model.spans[*n];
                    let may_have_started = scope == Scope::Replays && span.was_entered;
                    !span.has_started() && !may_have_started
                });
                let span = random.choose(&waiting.collect::<Vec<_>>())?;
                let parent = random.choose(&open)?;
                let is_real = self.model.spans[parent].started.is_some();
                (scope != Scope::Replays || is_real).then_some(())?;
                (span != parent).then_some(Step::SetParent(span, parent))?
            }
            32 | 33 => {
                (scope == Scope::Replays).then_some(())?;
                match self.model.attached_by_hand(thread) {
                    0 => Step::Attach(random.choose(&open)?),
                    _ if random.below(2) == 0 => Step::Attach(random.choose(&open)?),
                    _ => Step::Detach,
                }
            }
            _ => Step::Panic(
                1 + random
                    .below(entered.len().max(1))
                    .min(entered.len().checked_sub(1)?),
            ),
        })
    }

    /// Exits and drops the remaining spans in random order, without the contexts that are still attached by hand.
    fn clear_up(&mut self) -> Option<(usize, Step)> {
        let attached = (0..THREADS).find(|thread| self.model.attached_by_hand(*thread) > 0);
        if let Some(thread) = attached {
            return Some((thread, Step::Detach));
        }
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
        let spans = self.model.spans.iter().enumerate();
        let expected = spans.filter(|(_, span)| !span.is_replayed());
        let expected: Vec<_> = expected.map(|(number, _)| number).collect();
        self.check("numbers of the exported spans", expected, numbers);
        exported
    }

    /// Asserts that every span has the expected parent and links.
    pub(super) fn compare_roughly(&self) {
        self.worker.forest().assert_no_orphans();
        for (n, span) in self.exported() {
            let Some(id) = self.model.spans[n].own.id else {
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

    pub(super) fn compare(&self) {
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
        let traces = self.worker.forest().trace_count();
        self.check("number of traces", self.model.traces(), traces);
        for id in INSTANCES {
            let stored = self.worker.storage.get(id).expect("a valid id");
            let stored = stored.and_then(|stored| number(stored.span_id()));
            let expected = self.model.instances.latest(id).map(|(span, _)| span);
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
            replayed,
            ..
        } = self.model;
        let stats = self.worker.storage.stats();
        let counted = (stats.deferred, stats.adopted, stats.late, stats.replayed);
        self.check(
            "deferred, adopted, late and replayed",
            (deferred, adopted, late, replayed),
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
            format_args!("generation of {n}"),
            started.generation,
            generation(span),
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
        writeln!(f, "seed {}, {:?}", self.seed, self.setup)?;
        for (at, (thread, step)) in self.steps.iter().enumerate() {
            writeln!(f, "{at:>4}  thread {thread}  {step:?}")?;
        }
        write!(f, "{}", self.worker.forest())
    }
}
