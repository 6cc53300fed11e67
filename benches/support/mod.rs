//! The ladder: what one span costs with nothing, with tracing, with OpenTelemetry and with this crate.

use std::collections::HashMap;
use std::sync::Mutex;

use opentelemetry::Context;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing::field::Empty;
use tracing::{Dispatch, dispatcher, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry;
use tracing_workflow_context::{WorkflowContext, WorkflowContextStorage};

/// How many instances are known, where any are.
const INSTANCES: usize = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rung {
    /// No subscriber.
    Nothing,
    /// tracing-subscriber's registry and no layer.
    Registry,
    PlainUntagged,
    OursUntagged,
    PlainTagged,
    /// The first span of an instance.
    OursMiss,
    /// A later one.
    OursHit,
    /// A later one within another of its instance.
    OursNested,
    /// A later one within a span of another trace.
    OursForeign,
    /// The id is recorded within the span.
    PlainRecorded,
    OursRecorded,
    /// What nobody can do better: the parent is there already.
    PlainAttached,
    /// Looked up, extracted and set as the parent for each span.
    ByHand,
}

impl Rung {
    pub(crate) const ALL: [(&'static str, Self); 13] = [
        ("nothing", Self::Nothing),
        ("registry", Self::Registry),
        ("plain-untagged", Self::PlainUntagged),
        ("ours-untagged", Self::OursUntagged),
        ("plain-tagged", Self::PlainTagged),
        ("ours-tagged-miss", Self::OursMiss),
        ("ours-tagged-hit", Self::OursHit),
        ("ours-tagged-nested", Self::OursNested),
        ("ours-tagged-foreign", Self::OursForeign),
        ("plain-recorded", Self::PlainRecorded),
        ("ours-recorded-hit", Self::OursRecorded),
        ("plain-attached", Self::PlainAttached),
        ("by-hand", Self::ByHand),
    ];

    /// Has `measure` repeat the whole life of one span.
    pub(crate) fn climb(self, measure: impl FnOnce(&mut dyn FnMut())) {
        let known = Known::new();
        let mut ids = known.ids.iter().cycle();
        let mut next = || ids.next().expect("endless").as_str();
        match self {
            Self::Nothing => measure(&mut || tagged(next())),
            Self::Registry => run(registry(), || measure(&mut || tagged(next()))),
            Self::PlainUntagged => plain(|| measure(&mut || untagged(next()))),
            Self::OursUntagged => known.ours(|| measure(&mut || untagged(next()))),
            Self::PlainTagged => plain(|| measure(&mut || tagged(next()))),
            Self::OursMiss => known.ours(|| {
                let mut id = known.ids[0].clone();
                measure(&mut || {
                    id = following(std::mem::take(&mut id));
                    tagged(&id);
                });
            }),
            Self::OursHit => known.ours(|| measure(&mut || tagged(next()))),
            Self::OursNested => known.ours(|| {
                let id = next();
                let _outer = info_span!("outer", workflow.instance_id = %id).entered();
                measure(&mut || tagged(id));
            }),
            Self::OursForeign => known.ours(|| {
                let _foreign = remote().attach();
                measure(&mut || tagged(next()));
            }),
            Self::PlainRecorded => plain(|| measure(&mut || recorded(next()))),
            Self::OursRecorded => known.ours(|| measure(&mut || recorded(next()))),
            Self::PlainAttached => plain(|| {
                let _parent = remote().attach();
                measure(&mut || tagged(next()));
            }),
            Self::ByHand => plain(|| {
                let contexts = Mutex::new(known.by_hand());
                measure(&mut || tagged_by_hand(next(), &contexts));
            }),
        }
    }
}

fn untagged(id: &str) {
    info_span!("step", order = %id).in_scope(|| {});
}

fn tagged(id: &str) {
    info_span!("step", workflow.instance_id = %id).in_scope(|| {});
}

fn recorded(id: &str) {
    let span = info_span!("step", workflow.instance_id = Empty).entered();
    span.record("workflow.instance_id", tracing::field::display(id));
}

type Carrier = HashMap<String, String>;

/// What a program without this crate does for each span.
fn tagged_by_hand(id: &str, contexts: &Mutex<HashMap<String, Carrier>>) {
    let stored = contexts
        .lock()
        .unwrap()
        .get(id)
        .map(|carrier| TraceContextPropagator::new().extract(carrier));
    let span = info_span!("step", workflow.instance_id = %id);
    if let Some(parent) = stored {
        span.set_parent(parent).expect("not started");
    }
    span.in_scope(|| {});
}

/// The instances that are known before anything is measured; on every rung, as they leave their mark on the heap.
struct Known {
    ids: Vec<String>,
    storage: WorkflowContextStorage,
}

impl Known {
    fn new() -> Self {
        let ids = (0..INSTANCES).map(|n| format!("00000000-0000-4000-8000-{n:012}"));
        let known = Self {
            ids: ids.collect(),
            storage: WorkflowContextStorage::new(),
        };
        known.ours(|| known.ids.iter().for_each(|id| tagged(id)));
        known
    }

    fn ours(&self, climb: impl FnOnce()) {
        run(registry().with(self.storage.layer(tracer())), climb);
    }

    fn by_hand(&self) -> HashMap<String, Carrier> {
        let carrier = |id: &String| {
            let _span = info_span!("step", workflow.instance_id = %id).entered();
            let mut carrier = Carrier::new();
            let context = WorkflowContext::current().expect("inside a span");
            context.inject(&mut carrier);
            (id.clone(), carrier)
        };
        self.ids.iter().map(carrier).collect()
    }
}

fn plain(climb: impl FnOnce()) {
    let layer = tracing_opentelemetry::layer().with_tracer(tracer());
    run(registry().with(layer), climb);
}

fn run(subscriber: impl Into<Dispatch>, climb: impl FnOnce()) {
    dispatcher::with_default(&subscriber.into(), climb);
}

/// Spans are made and ended, and handed to nobody.
fn tracer() -> SdkTracer {
    SdkTracerProvider::builder().build().tracer("bench")
}

fn remote() -> Context {
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    WorkflowContext::parse(parent, "")
        .expect("well formed")
        .to_otel()
}

/// The id counted up, in place: what a new id costs must not be what is measured.
fn following(id: String) -> String {
    let mut digits = id.into_bytes();
    for digit in digits
        .iter_mut()
        .rev()
        .filter(|digit| digit.is_ascii_digit())
    {
        if *digit < b'9' {
            *digit += 1;
            break;
        }
        *digit = b'0';
    }
    String::from_utf8(digits).expect("digits and hyphens")
}
