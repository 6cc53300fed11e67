//! The ladder: what one span costs with nothing, with tracing, with OpenTelemetry and with this crate.

#![allow(dead_code, reason = "not every bench needs all of it")]

use std::collections::HashMap;
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use dashmap::DashMap;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{SpanContext, TraceContextExt as _, Tracer, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::propagation::TraceContextPropagator;
#[cfg(feature = "durable-root")]
use opentelemetry_sdk::trace::Sampler;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing::field::Empty;
use tracing::{Dispatch, dispatcher, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry;
use tracing_workflow_context::{MemoryBackend, WorkflowContext, WorkflowContextStorage};

/// How many instances are known, where nothing else is said.
pub(crate) const INSTANCES: usize = 1_000;

/// More than any span of a bench is old.
const A_YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rung {
    /// No subscriber.
    Nothing,
    /// tracing-subscriber's registry and no layer.
    Registry,
    PlainUntagged,
    OursUntagged,
    /// No life, but one entry and exit of an untagged span that has started, as each poll of a future does it.
    PlainEntered,
    OursEntered,
    PlainTagged,
    /// The first span of an instance.
    OursMiss,
    /// The same, with the storage's file.
    OursMissRedb,
    /// A later one.
    OursHit,
    /// A later one within another of its instance.
    OursNested,
    /// A later one within a span of another trace.
    OursForeign,
    /// A later one with a backend behind memory; with `max_spans` and `max_age`; with a run id; through the OpenTelemetry API.
    OursHitBackend,
    OursHitBounded,
    OursHitRun,
    OursHitApi,
    /// One that is replayed.
    OursReplayed,
    /// With durable roots, and the two pieces in the provider: an untagged span, a later one and the first one of an instance.
    RootedUntagged,
    RootedHit,
    RootedMiss,
    /// The id is recorded within the span.
    PlainRecorded,
    OursRecorded,
    /// What nobody can do better: the parent is there already.
    PlainAttached,
    /// With a link.
    PlainLinked,
    PlainRun,
    PlainApi,
    /// Looked up, extracted and set as the parent for each span.
    ByHand,
    /// The best by hand: the parent's context is kept in a map with a fast hasher, and set for each span.
    ByHandCached,
    /// No span, but a context that is stored for an instance which is new.
    Store,
    StoreRedb,
}

impl Rung {
    pub(crate) const ALL: [(&'static str, Self); 30] = [
        ("nothing", Self::Nothing),
        ("registry", Self::Registry),
        ("plain-untagged", Self::PlainUntagged),
        ("ours-untagged", Self::OursUntagged),
        ("plain-entered", Self::PlainEntered),
        ("ours-entered", Self::OursEntered),
        ("plain-tagged", Self::PlainTagged),
        ("ours-tagged-miss", Self::OursMiss),
        ("ours-tagged-miss-redb", Self::OursMissRedb),
        ("ours-tagged-hit", Self::OursHit),
        ("ours-tagged-nested", Self::OursNested),
        ("ours-tagged-foreign", Self::OursForeign),
        ("ours-hit-backend", Self::OursHitBackend),
        ("ours-hit-bounded", Self::OursHitBounded),
        ("ours-hit-run", Self::OursHitRun),
        ("ours-hit-api", Self::OursHitApi),
        ("ours-replayed", Self::OursReplayed),
        ("rooted-untagged", Self::RootedUntagged),
        ("rooted-tagged-hit", Self::RootedHit),
        ("rooted-tagged-miss", Self::RootedMiss),
        ("plain-recorded", Self::PlainRecorded),
        ("ours-recorded-hit", Self::OursRecorded),
        ("plain-attached", Self::PlainAttached),
        ("plain-linked", Self::PlainLinked),
        ("plain-run", Self::PlainRun),
        ("plain-api", Self::PlainApi),
        ("by-hand", Self::ByHand),
        ("by-hand-cached", Self::ByHandCached),
        ("store", Self::Store),
        ("store-redb", Self::StoreRedb),
    ];

    pub(crate) fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(_, rung)| *rung == self);
        found.map_or("", |(name, _)| name)
    }

    pub(crate) fn has_file(self) -> bool {
        matches!(self, Self::OursMissRedb | Self::StoreRedb)
    }

    pub(crate) fn has_roots(self) -> bool {
        matches!(
            self,
            Self::RootedUntagged | Self::RootedHit | Self::RootedMiss
        )
    }

    fn has_plain_layer(self) -> bool {
        matches!(
            self,
            Self::PlainUntagged
                | Self::PlainEntered
                | Self::PlainTagged
                | Self::PlainRecorded
                | Self::PlainAttached
                | Self::PlainLinked
                | Self::PlainRun
                | Self::PlainApi
                | Self::ByHand
                | Self::ByHandCached
        )
    }
}

/// A rung that is set up. On each of them the instances are known before anything is measured, as they leave their
/// mark on the heap.
pub(crate) struct Stage {
    pub(crate) rung: Rung,
    dispatch: Dispatch,
    storage: WorkflowContextStorage,
    ids: Vec<String>,
    /// The place of the next one.
    next: usize,
    new_id: String,
    by_hand: Mutex<HashMap<String, Carrier>>,
    by_hand_cached: Cached,
    _file: Option<TemporaryFile>,
}

impl Stage {
    pub(crate) fn new(rung: Rung, instances: usize) -> Self {
        let file = rung.has_file().then(TemporaryFile::new);
        let storage = storage(rung, file.as_ref(), instances);
        let ids = (0..instances).map(|n| format!("00000000-0000-4000-8000-{n:012}"));
        let ids: Vec<_> = ids.collect();
        let ours = || Dispatch::new(registry().with(storage.layer(tracer_for(rung, &storage))));
        dispatcher::with_default(&ours(), || ids.iter().for_each(|id| tagged(id)));
        let dispatch = match rung {
            Rung::Nothing => Dispatch::none(),
            Rung::Registry => Dispatch::new(registry()),
            rung if rung.has_plain_layer() => {
                let layer = tracing_opentelemetry::layer().with_tracer(tracer());
                Dispatch::new(registry().with(layer))
            }
            _ => ours(),
        };
        let by_hand = match rung {
            Rung::ByHand => dispatcher::with_default(&dispatch, || carriers(&ids)),
            _ => HashMap::new(),
        };
        let by_hand_cached = match rung {
            Rung::ByHandCached => dispatcher::with_default(&dispatch, || contexts(&ids)),
            _ => Cached::default(),
        };
        Self {
            rung,
            dispatch,
            storage,
            ids,
            next: 0,
            // Which no instance has.
            new_id: format!("10000000-0000-4000-8000-{:012}", 0),
            by_hand: Mutex::new(by_hand),
            by_hand_cached,
            _file: file,
        }
    }

    /// Has `measure` repeat the whole life of one span.
    pub(crate) fn measure(&mut self, measure: impl FnOnce(&mut dyn FnMut())) {
        let (ids, next, new_id) = (&self.ids, &mut self.next, &mut self.new_id);
        let (storage, by_hand, cached) = (&self.storage, &self.by_hand, &self.by_hand_cached);
        let mut id = || {
            *next = if *next + 1 < ids.len() { *next + 1 } else { 0 };
            ids[*next].as_str()
        };
        dispatcher::with_default(&self.dispatch, || match self.rung {
            Rung::PlainUntagged | Rung::OursUntagged | Rung::RootedUntagged => {
                measure(&mut || untagged(id()))
            }
            Rung::PlainEntered | Rung::OursEntered => {
                let span = info_span!("step", order = %id());
                span.in_scope(|| {});
                measure(&mut || span.in_scope(|| {}));
            }
            Rung::PlainRecorded | Rung::OursRecorded => measure(&mut || recorded(id())),
            Rung::OursMiss | Rung::OursMissRedb | Rung::RootedMiss => {
                measure(&mut || {
                    count_up(new_id);
                    tagged(new_id);
                });
                storage.flush().expect("the disk works");
            }
            Rung::Store | Rung::StoreRedb => {
                let context = context();
                measure(&mut || {
                    count_up(new_id);
                    storage.store(new_id, context.clone()).expect("a good id");
                });
                storage.flush().expect("the disk works");
            }
            Rung::OursNested => {
                let id = id();
                let _outer = info_span!("outer", workflow.instance_id = %id).entered();
                measure(&mut || tagged(id));
            }
            Rung::OursForeign | Rung::PlainAttached => {
                let _parent = context().to_otel().attach();
                measure(&mut || tagged(id()));
            }
            Rung::OursHitRun | Rung::PlainRun => measure(&mut || tagged_with_run(id())),
            Rung::OursReplayed => measure(&mut || replayed(id())),
            Rung::PlainLinked => {
                let other = context().to_otel().span().span_context().clone();
                measure(&mut || linked(id(), other.clone()));
            }
            Rung::OursHitApi => {
                let tracer = storage.tracer(tracer());
                measure(&mut || by_api(&tracer, id()));
            }
            Rung::PlainApi => {
                let tracer = tracer();
                measure(&mut || by_api(&tracer, id()));
            }
            Rung::ByHand => measure(&mut || tagged_by_hand(id(), by_hand)),
            Rung::ByHandCached => measure(&mut || tagged_from_cache(id(), cached)),
            Rung::Nothing
            | Rung::Registry
            | Rung::PlainTagged
            | Rung::OursHit
            | Rung::OursHitBackend
            | Rung::OursHitBounded
            | Rung::RootedHit => {
                measure(&mut || tagged(id()));
            }
        });
    }

    /// The same on several threads at once, so often on each; answers the seconds that it took.
    pub(crate) fn crowd(&self, threads: usize, each: usize) -> f64 {
        let ready = Barrier::new(threads);
        let run = |thread: usize| {
            let begin = thread * self.ids.len() / threads;
            let ids = self.ids[begin..].iter().chain(&self.ids[..begin]).cycle();
            let ids = ids.take(each);
            dispatcher::with_default(&self.dispatch, || {
                ready.wait();
                let start = Instant::now();
                match self.rung {
                    Rung::PlainUntagged | Rung::OursUntagged => ids.for_each(|id| untagged(id)),
                    Rung::ByHand => ids.for_each(|id| tagged_by_hand(id, &self.by_hand)),
                    _ => ids.for_each(|id| tagged(id)),
                }
                (start, Instant::now())
            })
        };
        let run = &run;
        let times: Vec<_> = thread::scope(|scope| {
            let threads = (0..threads).map(|thread| scope.spawn(move || run(thread)));
            let threads: Vec<_> = threads.collect();
            let ends = threads.into_iter().map(|thread| thread.join());
            ends.map(|times| times.expect("spans do not panic"))
                .collect()
        });
        let begin = times.iter().map(|(start, _)| *start).min();
        let end = times.iter().map(|(_, end)| *end).max();
        begin
            .zip(end)
            .map_or(0.0, |(begin, end)| (end - begin).as_secs_f64())
    }
}

fn untagged(id: &str) {
    info_span!("step", order = %id).in_scope(|| {});
}

fn tagged(id: &str) {
    info_span!("step", workflow.instance_id = %id).in_scope(|| {});
}

/// Tagged when the instances were recorded without a run, which is the one that asks first.
fn tagged_with_run(id: &str) {
    info_span!("step", workflow.instance_id = %id, workflow.run_id = "run-1").in_scope(|| {});
}

fn replayed(id: &str) {
    info_span!("step", workflow.instance_id = %id, workflow.replaying = true).in_scope(|| {});
}

fn linked(id: &str, other: SpanContext) {
    let span = info_span!("step", workflow.instance_id = %id);
    span.add_link(other);
    span.in_scope(|| {});
}

fn by_api<T: Tracer<Span: Send + Sync + 'static>>(tracer: &T, id: &str) {
    let id = KeyValue::new("workflow.instance_id", id.to_owned());
    let span = tracer.span_builder("step").with_attributes([id]);
    drop(Context::current_with_span(span.start(tracer)).attach());
}

fn recorded(id: &str) {
    let span = info_span!("step", workflow.instance_id = Empty).entered();
    span.record("workflow.instance_id", tracing::field::display(id));
}

type Carrier = HashMap<String, String>;

type Cached = DashMap<String, Context, foldhash::fast::RandomState>;

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

/// What a program does that keeps the contexts of its instances as well as it can: it looks up, and sets the parent.
fn tagged_from_cache(id: &str, contexts: &Cached) {
    let parent = contexts.get(id).map(|context| context.clone());
    let span = info_span!("step", workflow.instance_id = %id);
    if let Some(parent) = parent {
        span.set_parent(parent).expect("not started");
    }
    span.in_scope(|| {});
}

/// What that program has stored.
fn contexts(ids: &[String]) -> Cached {
    let context = |id: &String| {
        let _span = info_span!("step", workflow.instance_id = %id).entered();
        let context = WorkflowContext::current().expect("inside a span");
        (id.clone(), context.to_otel())
    };
    ids.iter().map(context).collect()
}

/// What the program without it has stored.
fn carriers(ids: &[String]) -> HashMap<String, Carrier> {
    let carrier = |id: &String| {
        let _span = info_span!("step", workflow.instance_id = %id).entered();
        let mut carrier = Carrier::new();
        let context = WorkflowContext::current().expect("inside a span");
        context.inject(&mut carrier);
        (id.clone(), carrier)
    };
    ids.iter().map(carrier).collect()
}

/// Spans are made and ended, and handed to nobody.
fn tracer() -> SdkTracer {
    SdkTracerProvider::builder().build().tracer("bench")
}

fn context() -> WorkflowContext {
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    WorkflowContext::parse(parent, "").expect("well formed")
}

/// A tracer of a provider with the two pieces of durable roots, if the rung has those.
fn tracer_for(rung: Rung, storage: &WorkflowContextStorage) -> SdkTracer {
    #[cfg(feature = "durable-root")]
    if rung.has_roots() {
        let sampler = Sampler::ParentBased(Box::new(Sampler::AlwaysOn));
        return SdkTracerProvider::builder()
            .with_id_generator(storage.id_generator())
            .with_sampler(storage.sampler(sampler))
            .build()
            .tracer("bench");
    }
    assert!(!rung.has_roots(), "needs the feature durable-root");
    let _ = storage;
    tracer()
}

fn storage(rung: Rung, file: Option<&TemporaryFile>, instances: usize) -> WorkflowContextStorage {
    // The default, but where that is too few.
    let most = instances.saturating_mul(2).max(1_000_000);
    let builder = WorkflowContextStorage::builder()
        .max_instances(most)
        .max_bytes(u64::MAX);
    let builder = match rung {
        Rung::OursHitBackend => builder.backend(MemoryBackend::new()),
        Rung::OursHitBounded => builder.max_spans(u64::MAX).max_age(A_YEAR),
        _ => builder,
    };
    #[cfg(feature = "durable-root")]
    let builder = builder.durable_root(rung.has_roots());
    #[cfg(not(feature = "durable-root"))]
    let _ = rung;
    #[cfg(feature = "redb")]
    let builder = match file {
        Some(file) => {
            let backend = tracing_workflow_context::RedbBackend::open(&file.0);
            builder.backend(backend.expect("a new file"))
        }
        None => builder,
    };
    assert!(
        file.is_none() || cfg!(feature = "redb"),
        "a rung with a file needs the feature redb"
    );
    builder.build().expect("good settings")
}

/// The id counted up, in place: what a new id costs must not be what is measured.
fn count_up(id: &mut String) {
    let mut digits = std::mem::take(id).into_bytes();
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
    *id = String::from_utf8(digits).expect("digits and hyphens");
}

/// Gone when it is dropped.
struct TemporaryFile(std::path::PathBuf);

impl TemporaryFile {
    fn new() -> Self {
        static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("workflow-context-ladder-{}-{count}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
