//! Random sequences of span operations on three threads, compared with a model of the documented behaviour.
//!
//! The threads run in lock step, so that a seed determines the interleaving. The model is independent of the layer's
//! implementation: it says when a span starts, and which is current ([`expected`]), and where it goes ([`placement`]).

mod expected;
mod placement;
mod sequence;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender};

use opentelemetry::trace::{SpanId, TraceContextExt as _};
use opentelemetry::{Context, ContextGuard};
use opentelemetry_sdk::trace::Sampler;
use tracing::span::EnteredSpan;
use tracing::{Span, info, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_workflow_context::WorkflowContextStorage;

use self::expected::Model;
use self::sequence::{Scope, Sequence};
use crate::support::*;

const SEQUENCES: u64 = 8_000;
const THREADS: usize = 3;
const INSTANCES: [&str; 3] = ["order 1", "order 2", "order 3"];
const RUNS: [&str; 3] = ["1", "2", "3"];
const ID: &str = "workflow.instance_id";

#[test]
fn exported_spans_match_the_model() {
    for seed in 0..SEQUENCES {
        let setup = Setup::of(seed, true);
        Sequence::perform(seed, setup, &setup.worker(), &[]).compare();
    }
}

#[test]
fn exported_spans_match_the_model_without_activation() {
    for seed in 0..SEQUENCES {
        let setup = Setup::of(seed, false);
        Sequence::perform(seed, setup, &setup.worker(), &LEARN_ACTIVATION).compare();
    }
}

/// Before its first span a layer does not know that entering starts nothing, and may still start spans early.
#[test]
fn a_new_layer_without_activation_neither_loses_nor_separates_spans() {
    for seed in 0..SEQUENCES / 2 {
        let setup = Setup {
            activation: false,
            scope: Scope::Held,
            max_spans: None,
        };
        Sequence::perform(seed, setup, &setup.worker(), &[]).compare_roughly();
    }
}

/// The layer that a sequence runs on, and the kinds of span in it.
#[derive(Clone, Copy, Debug)]
struct Setup {
    activation: bool,
    scope: Scope,
    max_spans: Option<u64>,
}

impl Setup {
    /// Each sequence is about one thing, and so has more of it.
    fn of(seed: u64, activation: bool) -> Self {
        let scope = match seed % 5 {
            0 | 1 => Scope::Held,
            2 | 3 => Scope::Traces,
            _ => Scope::Replays,
        };
        let max_spans = match (scope, seed / 5 % 4) {
            (Scope::Held | Scope::Replays, _) | (Scope::Traces, 0) => None,
            (Scope::Traces, max) => Some(max),
        };
        Self {
            activation,
            scope,
            max_spans,
        }
    }

    fn worker(self) -> Worker {
        let mut builder = WorkflowContextStorage::builder()
            .adopt_spans(["my_engine_handler"])
            .poller_spans(["poller"]);
        if let Some(max) = self.max_spans {
            builder = builder.max_spans(max);
        }
        let storage = builder.build().expect("valid settings");
        Worker::with_sampler(storage, self.activation, Sampler::AlwaysOn)
    }

    fn model(self) -> Model {
        Model::new(self.activation, self.max_spans)
    }
}

/// A span, by the number in its attribute `n`.
type Number = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ordinary,
    /// Declares an id, and perhaps a run and a parent instance, each with a value or without.
    Tagged {
        id: Option<&'static str>,
        run: Declared,
        parent: Declared,
    },
    Engine,
    Poller,
    /// Declares whether it is replayed, and perhaps an id.
    Flagged {
        id: Option<Option<&'static str>>,
        replaying: bool,
    },
}

/// The value of a field; `None` if it is not declared.
type Declared = Option<Option<&'static str>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Id,
    Run,
    Parent,
}

/// What a span tells of its instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Names {
    id: Option<&'static str>,
    run: Option<&'static str>,
    parent: Option<&'static str>,
}

impl Kind {
    fn declares(self, field: Field) -> bool {
        match (self, field) {
            (Self::Tagged { .. }, Field::Id) => true,
            (Self::Flagged { id, .. }, Field::Id) => id.is_some(),
            (Self::Tagged { run, .. }, Field::Run) => run.is_some(),
            (Self::Tagged { parent, .. }, Field::Parent) => parent.is_some(),
            _ => false,
        }
    }

    fn names(self) -> Names {
        match self {
            Self::Tagged { id, run, parent } => Names {
                id,
                run: run.flatten(),
                parent: parent.flatten(),
            },
            Self::Flagged { id, .. } => Names {
                id: id.flatten(),
                ..Names::default()
            },
            _ => Names::default(),
        }
    }

    /// Entering it starts it also without context activation, unless it waits.
    fn is_tagged(self) -> bool {
        matches!(
            self,
            Self::Engine | Self::Tagged { .. } | Self::Flagged { .. }
        )
    }

    /// The flag that it is given.
    fn is_replayed(self) -> Option<bool> {
        match self {
            Self::Flagged { replaying, .. } => Some(replaying),
            _ => None,
        }
    }

    /// Entering it does not start it.
    fn waits(self) -> bool {
        matches!(
            self,
            Self::Engine | Self::Tagged { id: None, .. } | Self::Flagged { id: Some(None), .. }
        )
    }
}

impl Field {
    const ALL: [Self; 3] = [Self::Id, Self::Run, Self::Parent];

    fn name(self) -> &'static str {
        match self {
            Self::Id => ID,
            Self::Run => "workflow.run_id",
            Self::Parent => "workflow.parent_instance_id",
        }
    }
}

impl Names {
    fn if_named(self) -> Option<Self> {
        self.id.map(|_| self)
    }

    fn get(self, field: Field) -> Option<&'static str> {
        match field {
            Field::Id => self.id,
            Field::Run => self.run,
            Field::Parent => self.parent,
        }
    }

    fn set(&mut self, field: Field, value: &'static str) {
        *match field {
            Field::Id => &mut self.id,
            Field::Run => &mut self.run,
            Field::Parent => &mut self.parent,
        } = Some(value);
    }
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
    Record(Number, Field, &'static str),
    Event,
    /// Asks for the span's OpenTelemetry context.
    Ask(Number),
    /// Gives a span the OpenTelemetry context of another one as its parent, unless it has started.
    SetParent(Number, Number),
    /// Attaches the OpenTelemetry context of a span by hand.
    Attach(Number),
    /// Ends the last of those.
    Detach,
    FollowsFrom(Number, Number),
    /// Drops the handle; the span closes when it is no longer entered and has no open children.
    Drop(Number),
    /// Unwinds through that many enterings, innermost first.
    Panic(usize),
}

/// Shows the layer that entering a span does not start it.
const LEARN_ACTIVATION: [Step; 4] = [
    Step::New(0, tagged("first"), ParentOf::None),
    Step::Enter(0),
    Step::Exit(0),
    Step::Drop(0),
];

const fn tagged(id: &'static str) -> Kind {
    Kind::Tagged {
        id: Some(id),
        run: None,
        parent: None,
    }
}

// Execution.

/// The spans whose handle has not been dropped yet.
type Handles = Mutex<Vec<Option<Span>>>;

/// Performs all steps, and reports the current span after each. At the end there must be none.
fn perform(worker: &Worker, handles: &Handles, steps: Receiver<Step>, current: Sender<SpanId>) {
    worker.run(|| {
        let mut entered = Vec::new();
        let mut attached = Vec::new();
        for step in steps {
            take(step, handles, &mut entered, &mut attached);
            let id = Context::map_current(|cx| cx.span().span_context().span_id());
            if current.send(id).is_err() {
                break;
            }
        }
    });
}

fn take(
    step: Step,
    handles: &Handles,
    entered: &mut Vec<(Number, EnteredSpan)>,
    attached: &mut Vec<ContextGuard>,
) {
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
        Step::Record(number, field, value) => {
            handle(number).record(field.name(), value);
        }
        Step::Event => info!("event"),
        Step::Ask(number) => drop(handle(number).context()),
        Step::SetParent(number, parent) => {
            // It may have started.
            let _ = handle(number).set_parent(handle(parent).context());
        }
        Step::Attach(number) => attached.push(handle(number).context().attach()),
        Step::Detach => drop(attached.pop()),
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
    // An `Option` without a value records nothing, as `Empty` does.
    let (run, parent_id) = match kind {
        Kind::Tagged { run, parent, .. } => (run, parent),
        _ => (None, None),
    };
    match kind {
        Kind::Ordinary => open!("ordinary"),
        Kind::Engine => open!("my_engine_handler"),
        Kind::Poller => open!("poller"),
        Kind::Flagged {
            id: None,
            replaying,
        } => open!("flagged", workflow.replaying = replaying),
        Kind::Flagged {
            id: Some(id),
            replaying,
        } => open!(
            "flagged",
            workflow.instance_id = id,
            workflow.replaying = replaying
        ),
        Kind::Tagged { id, .. } => match (run, parent_id) {
            (None, None) => open!("tagged", workflow.instance_id = id),
            (Some(run), None) => {
                open!("tagged", workflow.instance_id = id, workflow.run_id = run)
            }
            (None, Some(parent_id)) => open!(
                "tagged",
                workflow.instance_id = id,
                workflow.parent_instance_id = parent_id
            ),
            (Some(run), Some(parent_id)) => open!(
                "tagged",
                workflow.instance_id = id,
                workflow.run_id = run,
                workflow.parent_instance_id = parent_id
            ),
        },
    }
}
