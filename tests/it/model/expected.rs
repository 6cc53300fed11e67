//! The expected state of one layer: which spans are held, when each starts, and which is current. Where one starts is
//! decided in [`placement`](super::placement).

use super::placement::{Instances, Natural, Origin, Placed};
use super::{Field, Kind, Names, Number, ParentOf, Step, THREADS};

/// The expected state of one layer in one activation mode.
pub(super) struct Model {
    pub(super) activation: bool,
    pub(super) spans: Vec<Modelled>,
    /// The enterings of each thread, outermost first.
    pub(super) entered: [Vec<Entering>; THREADS],
    /// The OpenTelemetry contexts of each thread, outermost first.
    contexts: [Vec<Attached>; THREADS],
    pub(super) instances: Instances,
    pub(super) deferred: u64,
    pub(super) adopted: u64,
    pub(super) late: u64,
    pub(super) replayed: u64,
}

pub(super) struct Modelled {
    pub(super) kind: Kind,
    /// The parent that it has without this crate.
    natural: Option<Number>,
    /// The span that tracing keeps open as long as this one.
    keeps_open: Option<Number>,
    /// Entering it does not start it, yet.
    held_back: bool,
    /// The span that was held, and had not started, when this one was opened to be held in it.
    held_inside: Option<Number>,
    deferred: bool,
    /// The ids that were given to it or recorded on it.
    pub(super) own: Names,
    adopted_as: Option<Names>,
    /// The instance and run that it belongs to, once it has started.
    joined: Option<Names>,
    /// Its parent instance is to be linked when it names its own.
    owes_link_to: Option<&'static str>,
    pub(super) started: Option<Placed>,
    /// Set once it has started and is replayed.
    stand_in: Option<StandIn>,
    /// Relation and target; a link that is not ours has no relation.
    pub(super) links: Vec<(Option<&'static str>, Number)>,
    pub(super) events: usize,
    pub(super) has_handle: bool,
    times_entered: usize,
    pub(super) was_entered: bool,
    open_children: usize,
    is_closed: bool,
}

/// A replayed span, which is not exported: the span that it stands for, if any.
#[derive(Clone, Copy)]
struct StandIn(Option<Shown>);

/// A span as OpenTelemetry shows it.
#[derive(Clone, Copy)]
struct Shown {
    span: Number,
    is_stored: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Attached {
    ByEntering(Number),
    ByHand(Number),
}

pub(super) struct Entering {
    pub(super) span: Number,
    /// Not visible outside the layer yet.
    held: bool,
    /// Tracing does not take an inner entering of the same span for a change of the current span.
    again: bool,
}

impl Model {
    pub(super) fn new(activation: bool, max_spans: Option<u64>) -> Self {
        Self {
            activation,
            spans: Vec::new(),
            entered: Default::default(),
            contexts: Default::default(),
            instances: Instances::new(max_spans),
            deferred: 0,
            adopted: 0,
            late: 0,
            replayed: 0,
        }
    }

    pub(super) fn apply(&mut self, thread: usize, step: Step) {
        match step {
            Step::New(_, kind, parent) => self.open(thread, kind, parent),
            Step::Enter(span) => self.enter(thread, span),
            Step::Exit(span) => self.exit(thread, span),
            Step::Record(span, field, value) => self.record(thread, span, field, value),
            Step::Event => {
                if let Some(span) = self.current_in_tracing(thread) {
                    self.spans[span].events += 1;
                }
            }
            Step::Ask(span) => self.start(span, None),
            Step::SetParent(span, parent) => {
                self.start(parent, None);
                if !self.spans[span].has_started() {
                    self.spans[span].natural = Some(parent);
                }
            }
            Step::Attach(span) => {
                self.start(span, None);
                self.contexts[thread].push(Attached::ByHand(span));
            }
            Step::Detach => {
                let contexts = &mut self.contexts[thread];
                let by_hand = |attached: &Attached| matches!(attached, Attached::ByHand(_));
                let innermost = contexts.iter().rposition(by_hand);
                contexts.remove(innermost.expect("attached here"));
            }
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
        let own = kind.names();
        let waits = kind.waits();
        let current = self.current_in_tracing(thread);
        let held = current.filter(|&span| waits && self.is_held(thread, span));
        let mut held_inside = None;
        let (natural, keeps_open) = match parent {
            ParentOf::None => (None, None),
            ParentOf::Contextual if held.is_some() => {
                held_inside = held;
                (held, held)
            }
            ParentOf::Contextual => {
                self.release(thread, None, own.if_named());
                let keeps_open = self.current_in_tracing(thread);
                let natural = match self.activation {
                    true => self.attached(thread),
                    false => keeps_open.or(self.attached(thread)),
                };
                (natural, keeps_open)
            }
            ParentOf::Explicit(parent) => {
                if self.is_held(thread, parent) {
                    self.release(thread, Some(parent), own.if_named());
                } else if self.spans[parent].held_back {
                    self.start_by_layer(parent, own.if_named());
                }
                (Some(parent), Some(parent))
            }
        };
        if let Some(natural) = natural.filter(|_| held_inside.is_none()) {
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
            held_inside,
            deferred: false,
            own,
            adopted_as: None,
            joined: None,
            owes_link_to: None,
            started: None,
            stand_in: None,
            links: Vec::new(),
            events: 0,
            has_handle: true,
            times_entered: 0,
            was_entered: false,
            open_children: 0,
            is_closed: false,
        });
    }

    fn enter(&mut self, thread: usize, span: Number) {
        let modelled = &mut self.spans[span];
        if modelled.has_started() {
            modelled.held_back = false;
        }
        let held = modelled.held_back;
        if !held {
            // Contexts are a stack: spans held below this one are released first.
            let offer = self.run_of_entered(thread, span);
            self.release(thread, None, offer);
            let starts = self.activation || self.spans[span].kind.is_tagged();
            if starts {
                self.start(span, None);
            }
        } else if !self.spans[span].deferred {
            self.spans[span].deferred = true;
            self.deferred += 1;
        }
        self.spans[span].times_entered += 1;
        self.spans[span].was_entered = true;
        let entered = &mut self.entered[thread];
        let again = entered.iter().any(|outer| outer.span == span);
        entered.push(Entering { span, held, again });
        if !held {
            self.attach(thread, span);
        }
    }

    /// The run of a span that is entered inside held spans of engines alone, which join it.
    fn run_of_entered(&mut self, thread: usize, span: Number) -> Option<Names> {
        let held = self.entered[thread].iter().filter(|e| e.held);
        let mut kinds = held.map(|e| self.spans[e.span].kind).peekable();
        kinds.peek()?;
        if !kinds.all(|kind| kind == Kind::Engine) || !self.spans[span].kind.is_tagged() {
            return None;
        }
        self.start(span, None);
        self.spans[span].joined.filter(|names| names.run.is_some())
    }

    /// With context activation, an entering that is noticed attaches a context.
    fn attach(&mut self, thread: usize, span: Number) {
        if self.activation {
            self.contexts[thread].push(Attached::ByEntering(span));
        }
    }

    fn exit(&mut self, thread: usize, span: Number) {
        let entered = &mut self.entered[thread];
        let innermost = entered.iter().rposition(|entering| entering.span == span);
        let entering = entered.remove(innermost.expect("entered here"));
        let contexts = &mut self.contexts[thread];
        let attached = Attached::ByEntering(span);
        let attached = contexts.iter().rposition(|a| *a == attached);
        if let Some(attached) = attached.filter(|_| !entering.held) {
            contexts.remove(attached);
        }
        self.spans[span].times_entered -= 1;
        self.close_if_unused(span);
    }

    /// What is recorded before the start counts as if it had been given; after it, it leaves a link. A span that has all
    /// that it waits for is held no longer, nor are the spans around it, which join its instance.
    fn record(&mut self, thread: usize, span: Number, field: Field, value: &'static str) {
        self.spans[span].own.set(field, value);
        if self.spans[span].started.is_some() {
            self.learn(span, field, value);
        }
        let modelled = &mut self.spans[span];
        if !modelled.has_all() || !std::mem::take(&mut modelled.held_back) {
            return;
        }
        let own = modelled.own.if_named();
        let around = modelled.held_inside;
        if self.is_held(thread, span) {
            self.release(thread, Some(span), own);
        } else if let Some(around) = around {
            if self.is_held(thread, around) {
                self.release(thread, Some(around), own);
            } else if self.spans[around].held_back {
                self.start_by_layer(around, own);
            }
        }
    }

    /// Starts a span that waits, after the held spans around it. All may be adopted.
    fn start_by_layer(&mut self, span: Number, offer: Option<Names>) {
        let modelled = &mut self.spans[span];
        modelled.held_back = false;
        let offer_around = modelled.own.if_named().or(offer);
        let around = modelled.held_inside;
        if let Some(around) = around.filter(|&around| self.spans[around].held_back) {
            self.start_by_layer(around, offer_around);
        }
        self.start(span, offer);
    }

    /// Starts the spans held on the thread, outermost first, up to the last entering of a span or all of it. Each joins the
    /// instance of the next span that is released with it and names one.
    fn release(&mut self, thread: usize, up_to: Option<Number>, offer: Option<Names>) {
        let entered = &mut self.entered[thread];
        let last = match up_to {
            Some(span) => entered.iter().rposition(|e| e.held && e.span == span),
            None => entered.len().checked_sub(1),
        };
        let Some(last) = last else { return };
        let released = entered[..=last].iter_mut();
        let released = released.filter_map(|e| std::mem::take(&mut e.held).then_some(e.span));
        let released: Vec<_> = released.collect();
        for (at, span) in released.iter().enumerate() {
            let mut inside = released[at + 1..].iter();
            let named = inside.find_map(|inside| {
                let inside = &self.spans[*inside];
                inside.own.if_named().filter(|_| inside.held_back)
            });
            self.start_by_layer(*span, named.or(offer));
            self.attach(thread, *span);
        }
    }

    /// Starts a span that may be adopted, after its natural parent and the one that it was held in.
    fn start(&mut self, span: Number, offer: Option<Names>) {
        let Modelled {
            natural,
            held_inside,
            ..
        } = self.spans[span];
        if self.spans[span].has_started() {
            return;
        }
        for parent in held_inside.into_iter().chain(natural) {
            self.start(parent, None);
        }
        if let Some(beneath) = self.replay_of(span) {
            return self.start_replayed(span, beneath, offer);
        }
        let natural = natural.and_then(|natural| self.shown(natural));
        let natural = natural.map(|Shown { span, is_stored }| Natural {
            span,
            is_stored,
            trace: self.trace(span),
            is_polled: self.is_polled(self.trace(span)),
        });
        let modelled = &mut self.spans[span];
        let own = modelled.own;
        let names = own.if_named().or(offer);
        if let (None, Some(_)) = (own.id, offer) {
            modelled.adopted_as = offer;
            self.adopted += 1;
        }
        if own.id.is_none() {
            modelled.owes_link_to = own.parent;
        }
        modelled.joined = names;
        let placed = match names {
            None => Placed::by_nature(span, natural),
            Some(names) => self.instances.place(span, names, natural),
        };
        let links = placed.links.iter();
        (modelled.links).extend(links.map(|(relation, target)| (Some(*relation), *target)));
        modelled.started = Some(placed);
    }

    /// A span is replayed if its flag says so; without a flag, if its natural parent is, or else its parent in tracing. Returns
    /// what a replayed span is beneath.
    fn replay_of(&self, span: Number) -> Option<Option<Number>> {
        let Modelled {
            kind,
            natural,
            keeps_open,
            ..
        } = &self.spans[span];
        let mut parents = natural.iter().chain(keeps_open);
        let beneath = parents.find(|parent| self.spans[**parent].is_replayed());
        let is_replayed = kind.is_replayed().unwrap_or(beneath.is_some());
        is_replayed.then(|| beneath.copied().or(*natural))
    }

    /// A replayed span stands for the recorded one of its instance; else for what it is beneath.
    fn start_replayed(&mut self, span: Number, beneath: Option<Number>, offer: Option<Names>) {
        self.replayed += 1;
        let names = self.spans[span].own.if_named().or(offer);
        let recorded = names.and_then(|names| self.instances.latest(names.id?));
        let recorded = recorded.map(|(span, _)| Shown {
            span,
            is_stored: true,
        });
        let shown = recorded.or_else(|| self.shown(beneath?));
        self.spans[span].joined = names;
        self.spans[span].stand_in = Some(StandIn(shown));
    }

    fn shown(&self, span: Number) -> Option<Shown> {
        match self.spans[span].stand_in {
            Some(StandIn(shown)) => shown,
            None => Some(Shown {
                span,
                is_stored: false,
            }),
        }
    }

    /// Takes what is recorded on a started span.
    fn learn(&mut self, span: Number, field: Field, value: &'static str) {
        let Modelled {
            own,
            joined,
            owes_link_to,
            ..
        } = &mut self.spans[span];
        match (field, *joined) {
            // An id that comes late counts, unless the span was adopted into that very instance and run.
            (Field::Id, adopted) => {
                let is_same = adopted.is_some_and(|adopted| {
                    adopted.id == Some(value) && (own.run.is_none() || adopted.run == own.run)
                });
                let (run, owed) = (own.run, owes_link_to.take());
                if !is_same {
                    self.join_late(span, value, run);
                }
                if let Some(parent) = owed {
                    self.link_to_parent_instance(span, parent);
                }
            }
            // Counts when the span names its instance.
            (Field::Run, None) => {}
            (Field::Parent, None) => *owes_link_to = Some(value),
            (Field::Run, Some(Names { run: Some(run), .. })) => {
                // A span has one run.
                self.late += u64::from(run != value);
            }
            (Field::Run, Some(Names { id, .. })) => {
                self.join_late(span, id.expect("joined"), Some(value));
            }
            (Field::Parent, Some(_)) => self.link_to_parent_instance(span, value),
        }
    }

    fn join_late(&mut self, span: Number, id: &'static str, run: Option<&'static str>) {
        self.late += 1;
        let trace = self.trace(span);
        let own = Natural {
            span,
            is_stored: false,
            trace,
            is_polled: self.is_polled(trace),
        };
        let link = self.instances.join_late(id, run, own);
        let link = link.map(|(relation, target)| (Some(relation), target));
        let modelled = &mut self.spans[span];
        modelled.links.extend(link);
        modelled.joined = Some(Names {
            id: Some(id),
            run,
            parent: None,
        });
    }

    fn link_to_parent_instance(&mut self, span: Number, parent: &'static str) {
        self.late += 1;
        let stored = self.instances.latest(parent);
        if let Some((stored, _)) = stored.filter(|(_, trace)| *trace != self.trace(span)) {
            self.spans[span].links.push((Some("child"), stored));
        }
    }

    fn close_if_unused(&mut self, span: Number) {
        let is_open =
            |span: &Modelled| span.has_handle || span.times_entered > 0 || span.open_children > 0;
        if is_open(&self.spans[span]) {
            return;
        }
        self.start(span, None);
        self.spans[span].is_closed = true;
        if let Some(kept) = self.spans[span].keeps_open {
            self.spans[kept].open_children -= 1;
            self.close_if_unused(kept);
        }
    }

    fn trace(&self, span: Number) -> Number {
        self.spans[span].started.as_ref().expect("started").trace
    }

    /// A live poller is in that trace.
    fn is_polled(&self, trace: Number) -> bool {
        self.spans.iter().any(|span| {
            let is_there = span.started.as_ref().is_some_and(|at| at.trace == trace);
            span.kind == Kind::Poller && is_there && !span.is_closed
        })
    }

    fn is_held(&self, thread: usize, span: Number) -> bool {
        let mut entered = self.entered[thread].iter();
        entered.any(|entering| entering.held && entering.span == span)
    }

    /// The span that OpenTelemetry shows as the current one.
    pub(super) fn current(&self, thread: usize) -> Option<Number> {
        Some(self.shown(self.attached(thread)?)?.span)
    }

    /// The span in the current OpenTelemetry context.
    fn attached(&self, thread: usize) -> Option<Number> {
        self.contexts[thread].last().map(|attached| match attached {
            Attached::ByEntering(span) | Attached::ByHand(span) => *span,
        })
    }

    /// The number of contexts that are attached by hand.
    pub(super) fn attached_by_hand(&self, thread: usize) -> usize {
        let contexts = self.contexts[thread].iter();
        contexts
            .filter(|a| matches!(a, Attached::ByHand(_)))
            .count()
    }

    fn current_in_tracing(&self, thread: usize) -> Option<Number> {
        let mut changes = self.entered[thread].iter().rev().filter(|e| !e.again);
        changes.next().map(|e| e.span)
    }

    /// The number of roots.
    pub(super) fn traces(&self) -> usize {
        let placed = self.spans.iter().filter_map(|span| span.started.as_ref());
        placed.filter(|at| at.parent == Origin::Root).count()
    }
}

impl Modelled {
    pub(super) fn has_started(&self) -> bool {
        self.started.is_some() || self.is_replayed()
    }

    /// It has started, and is not exported.
    pub(super) fn is_replayed(&self) -> bool {
        self.stand_in.is_some()
    }

    pub(super) fn instance(&self) -> Option<&'static str> {
        self.own.id.or(self.adopted_as.and_then(|names| names.id))
    }

    /// Every id field that it declares has a value.
    fn has_all(&self) -> bool {
        let mut fields = Field::ALL.into_iter();
        fields.all(|field| !self.kind.declares(field) || self.own.get(field).is_some())
    }

    /// The fields that it declares and that have no value yet. Each gets one value at most: precedence is tested elsewhere.
    pub(super) fn nameless(&self) -> impl Iterator<Item = Field> {
        let fields = Field::ALL.into_iter();
        fields.filter(|field| self.kind.declares(*field) && self.own.get(*field).is_none())
    }
}
