//! The builder: the settings of a storage, their defaults and checks.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use super::WorkflowContextStorage;
use super::lifetimes::Lifetimes;
use super::remote::{Remote, Settings};
use super::shared::Shared;
use super::tier::Tier;
use crate::backend::StorageBackend;
use crate::backend::client::Budgets;
use crate::backend::namespaced::Namespaced;
use crate::cache::Cache;
use crate::cache::entry::Limits;
use crate::clock::{Clock, SystemClock, ticks};
use crate::decision::Policy;
use crate::decision::relation::{Continuation, Relation};
use crate::error::{BuildError, MAX_NAMESPACE_BYTES};
use crate::explain::author::Authors;
use crate::fields::Fields;
use crate::fields::engine::Engine;
use crate::fields::names::FieldNames;
use crate::own_spans::Tracers;
use crate::root::state::{RootSettings, Roots};
use crate::stats::Counters;
use crate::warnings::Warnings;

const IDLE_TTL: Duration = Duration::from_secs(24 * 60 * 60);
const COMPLETED_GRACE: Duration = Duration::from_secs(5 * 60);

/// The settings of a [`WorkflowContextStorage`].
///
/// | setting | default |
/// |---|---|
/// | [`instance_id_fields`](Self::instance_id_fields) | `workflow.instance_id` |
/// | [`run_id_fields`](Self::run_id_fields) | `workflow.run_id` |
/// | [`parent_instance_id_fields`](Self::parent_instance_id_fields) | `workflow.parent_instance_id` |
/// | [`status_fields`](Self::status_fields) | `workflow.status` |
/// | [`replay_field`](Self::replay_field) | `workflow.replaying` |
/// | [`replay_children_field`](Self::replay_children_field) | none |
/// | [`engine`](Self::engine) | none |
/// | [`adopt_spans`](Self::adopt_spans) | none |
/// | [`poller_spans`](Self::poller_spans) | none |
/// | [`completing_spans`](Self::completing_spans) | none |
/// | [`max_instances`](Self::max_instances) | 1,000,000 |
/// | [`max_bytes`](Self::max_bytes) | 256 MiB |
/// | [`max_trace_state`](Self::max_trace_state) | 512 bytes |
/// | [`idle_ttl`](Self::idle_ttl) | 24 hours |
/// | [`completed_grace`](Self::completed_grace) | 5 minutes |
/// | [`max_age`](Self::max_age) | none |
/// | [`max_spans`](Self::max_spans) | none |
/// | [`relation`](Self::relation) | the table at [`Relation`] |
/// | [`backend`](Self::backend) | none |
/// | [`lookup_budget`](Self::lookup_budget) | 50 ms |
/// | [`connect_budget`](Self::connect_budget) | 250 ms |
/// | [`write_through`](Self::write_through) | `false` |
/// | [`resample_on`](Self::resample_on) | no relation |
/// | [`recent_decisions`](Self::recent_decisions) | 1024 |
/// | [`clock`](Self::clock) | the operating system's |
#[derive(Debug)]
#[must_use = "a builder does nothing until build() is called"]
pub struct WorkflowContextStorageBuilder {
    names: FieldNames,
    engines: Vec<Engine>,
    adopted_spans: Vec<Cow<'static, str>>,
    poller_spans: Vec<Cow<'static, str>>,
    completing_spans: Vec<Cow<'static, str>>,
    policy: Policy,
    limits: Limits,
    recent_decisions: usize,
    clock: Option<Arc<dyn Clock>>,
    backend: Option<Arc<dyn StorageBackend>>,
    namespace: String,
    lifetimes: Lifetimes,
    budgets: Budgets,
    write_through: bool,
    has_roots: bool,
    roots: RootSettings,
}

impl Default for WorkflowContextStorageBuilder {
    fn default() -> Self {
        Self {
            names: FieldNames::default(),
            engines: Vec::new(),
            adopted_spans: Vec::new(),
            poller_spans: Vec::new(),
            completing_spans: Vec::new(),
            policy: Policy::default(),
            limits: Limits {
                max_instances: 1_000_000,
                max_bytes: 256 << 20,
                max_trace_state: 512,
                idle_ttl: ticks(IDLE_TTL),
                completed_grace: ticks(COMPLETED_GRACE),
            },
            recent_decisions: 1024,
            clock: None,
            backend: None,
            namespace: String::new(),
            lifetimes: Lifetimes {
                idle: IDLE_TTL,
                completed: COMPLETED_GRACE,
            },
            budgets: Budgets {
                lookup: Duration::from_millis(50),
                connect: Duration::from_millis(250),
            },
            write_through: false,
            has_roots: false,
            roots: RootSettings::default(),
        }
    }
}

impl WorkflowContextStorageBuilder {
    /// Sets the fields that name an instance. Of several on one span the first in this order that has a value counts.
    ///
    /// By default, `workflow.instance_id`; the names given replace it.
    pub fn instance_id_fields<I>(mut self, names: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<Cow<'static, str>>,
    {
        self.names.instance_ids = names.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the fields that name the run of an instance. Those of an [`engine`](Self::engine) are read beside them.
    ///
    /// By default, `workflow.run_id`; the names given replace it, and without a name none is read.
    pub fn run_id_fields<I>(mut self, names: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<Cow<'static, str>>,
    {
        self.names.run_ids = names.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the fields that name the instance that started this one, whose trace the first span continues.
    ///
    /// By default, `workflow.parent_instance_id`; the names given replace it, and without a name none is read.
    pub fn parent_instance_id_fields<I>(mut self, names: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<Cow<'static, str>>,
    {
        self.names.parent_instance_ids = names.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the fields, of spans and of events in them, that tell the end of an instance by a terminal status. Those of an
    /// [`engine`](Self::engine) are read beside them.
    ///
    /// By default, `workflow.status`; the names given replace it, and without a name none is read.
    pub fn status_fields<I>(mut self, names: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<Cow<'static, str>>,
    {
        self.names.statuses = names.into_iter().map(Into::into).collect();
        self
    }

    /// Adds the fields and the spans of an engine. May be called for several. A field that is named in the builder too counts
    /// as that setting says: on every span, its value as it is.
    ///
    /// By default, no engine's.
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engines.push(engine);
        self
    }

    /// Adds the names of spans that a home-made engine opens around user code without an instance id: each is held until
    /// its first child opens, and joins the child's instance if that names one.
    ///
    /// By default, none. May be called several times.
    pub fn adopt_spans<I>(mut self, names: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<Cow<'static, str>>,
    {
        self.adopted_spans.extend(names.into_iter().map(Into::into));
        self
    }

    /// Adds the names of spans in which a process waits for work, each as `name` or `target::name`: the span around the
    /// loop of a worker, or one around each poll. As long as such a span lives, its trace never becomes an instance's: a
    /// first span inside it is a new root ([`Relation::Polled`]), and a later one continues the stored trace without a
    /// link to the poller. Other spans inside it stay as they are.
    ///
    /// The name is that under which the span is exported. By default, none. May be called several times.
    pub fn poller_spans<I>(mut self, names: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<Cow<'static, str>>,
    {
        self.poller_spans.extend(names.into_iter().map(Into::into));
        self
    }

    /// Adds the names of spans whose close is the end of their instance, each as `name` or `target::name`: the span that an
    /// engine keeps open around a whole workflow. The status is `failed` if the span's is an error, else `completed`.
    ///
    /// By default, none: the end is told by a terminal `workflow.status`, or by
    /// [`complete`](WorkflowContextStorage::complete). May be called several times.
    pub fn completing_spans<I>(mut self, names: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<Cow<'static, str>>,
    {
        self.completing_spans
            .extend(names.into_iter().map(Into::into));
        self
    }

    /// Adds a field that says whether a span is a replay, beside `workflow.replaying`. Where the span itself is new, and what
    /// it runs is a replay, it is [`replay_children_field`](Self::replay_children_field).
    ///
    /// By default, none.
    pub fn replay_field(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.names.replaying.push(name.into());
        self
    }

    /// Adds a field that says whether what opens beneath a span is a replay, while the span itself is real: for engines that
    /// run the code again inside a new span, and tell on that span when it has caught up. As long as the field is `true`,
    /// from the creation of the span or by `record`, nothing that opens beneath is exported; from `false` on all is. A span
    /// beneath that has such a flag itself is real as well, and its own flag counts for what it opens.
    ///
    /// Its name must be one that is always recorded on the same span: where the `false` is missed, real spans are lost. By
    /// default, none. May be called several times.
    pub fn replay_children_field(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.names.replaying_children.push(name.into());
        self
    }

    /// Sets the most instances that memory holds. One more evicts another: a completed one, else an expired one, else
    /// nearly the least recently used: of 16 picked at random, the one whose last use is longest ago.
    ///
    /// By default, one million.
    pub fn max_instances(mut self, instances: usize) -> Self {
        self.limits.max_instances = instances;
        self
    }

    /// Sets the most bytes that the instances in memory take, as far as they can be counted: an instance counts as 176 bytes, with
    /// the length of an id of more than 38 bytes, and with what its runs, tracestates and own span take. More evict others, as more
    /// than [`max_instances`](Self::max_instances) do.
    ///
    /// By default, 256 MiB.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.limits.max_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self
    }

    /// Sets the most bytes of a tracestate that is kept with an instance, from a span, a call or the backend. Of a longer one,
    /// members of more than 128 bytes are dropped first, then members from the end, as W3C Trace Context asks
    /// ("tracestate Limits"). Zero keeps none.
    ///
    /// By default, 512: as many as W3C Trace Context asks to propagate at least.
    pub fn max_trace_state(mut self, bytes: usize) -> Self {
        self.limits.max_trace_state = bytes;
        self
    }

    /// Sets the time for which an instance is kept after its last use by a span or a call; exact within 50 ms from 100 ms
    /// on.
    ///
    /// A workflow with a longer timer is torn in two: set this to more than the longest one. Records in a backend live as
    /// long, and are extended while their instances are used: at the latest when a third of this time is left, so that a
    /// second is short, but works. By default, 24 hours.
    pub fn idle_ttl(mut self, ttl: Duration) -> Self {
        self.limits.idle_ttl = ticks(ttl);
        self.lifetimes.idle = ttl;
        self
    }

    /// Sets the time for which an instance is kept after a terminal `workflow.status`, so that a late span finds its trace.
    /// Late spans do not extend it. As exact as [`idle_ttl`](Self::idle_ttl).
    ///
    /// Other workers on the same backend, which may have the instance in memory too, learn of its end or
    /// [removal](WorkflowContextStorage::cleanup) when they compare their memory with the backend, once in half of this time: at
    /// the latest three quarters of it after the end has reached the backend, so 3 minutes 45 seconds by default, as long as the
    /// backend answers. That is 7.5 seconds for a grace of less than 10 seconds, and three eighths of
    /// [`idle_ttl`](Self::idle_ttl) where that is less. If one of them extends the record in the very moment of the end, the
    /// worker that has ended it takes that back when it compares next, and the others learn of the end after that. All workers
    /// need the same settings of both. An instance whose record has no more than this time left has ended.
    ///
    /// By default, 5 minutes. Zero forgets an instance at once.
    pub fn completed_grace(mut self, grace: Duration) -> Self {
        self.limits.completed_grace = ticks(grace);
        self.lifetimes.completed = grace;
        self
    }

    /// Sets the age from which on a trace no longer grows: the next span outside of it is a new root, linked to the old
    /// one, and becomes the recorded context.
    ///
    /// By default, traces have no age limit.
    pub fn max_age(mut self, age: Duration) -> Self {
        self.policy.bounds.max_age = Some(age);
        self
    }

    /// Sets the most spans of a trace that this process recorded or placed in it; past them as with
    /// [`max_age`](Self::max_age). Spans that are nested locally are not counted.
    ///
    /// By default, traces have no size limit.
    pub fn max_spans(mut self, spans: u64) -> Self {
        self.policy.bounds.max_spans = Some(spans);
        self
    }

    /// Sets what is done with the spans of one relation, in place of the default in the table at [`Relation`].
    pub fn relation(mut self, relation: Relation, continuation: Continuation) -> Self {
        self.policy.relations.set(relation, continuation);
        self
    }

    /// Lets the sampler decide anew for the spans of a relation: [`Relation::Resumed`], [`Relation::NewRun`] or
    /// [`Relation::Expired`]. May be called for several.
    ///
    /// A parent-based sampler decides anew for a root only, so such a span becomes the root of a new trace, linked to
    /// the stored one, and the recorded context. By default, the stored flag is inherited: an unsampled instance stays
    /// in its trace, and is not exported. For a new root whose predecessor was sampled the sampler always decides:
    /// OpenTelemetry offers no way around that.
    pub fn resample_on(mut self, relation: Relation) -> Self {
        self.policy.relations.resample(relation);
        self
    }

    /// Sets the backend that keeps contexts beyond memory: a file that survives restarts, a server that many machines share.
    ///
    /// Memory comes first. A miss asks the backend within [`lookup_budget`](Self::lookup_budget); recorded contexts are
    /// written in groups by a thread of the storage's own.
    /// [`flush`](WorkflowContextStorage::flush) is the barrier before work is handed to another worker. A backend
    /// that fails or is too slow costs continuity, is counted, and harms nothing else.
    ///
    /// By default, there is none.
    pub fn backend(mut self, backend: impl StorageBackend) -> Self {
        self.backend = Some(Arc::new(backend));
        self
    }

    /// Sets the longest time that the start of a span, or a call of `get`, waits for the backend. Zero never asks it.
    ///
    /// An answer that comes later is not lost: the instance follows it, and the span that was recorded meanwhile is linked
    /// to it. After three lookups in a row without an answer, the backend is asked only now and then until it answers again.
    ///
    /// By default, 50 milliseconds.
    pub fn lookup_budget(mut self, budget: Duration) -> Self {
        self.budgets.lookup = budget;
        self
    }

    /// Sets the longest time that the start of a span, or a call of `get`, waits while the storage connects to its backend
    /// for the first time, which it does in the background from [`build`](Self::build) on. Once one has waited that long
    /// in vain, [`lookup_budget`](Self::lookup_budget) counts for all others.
    ///
    /// By default, 250 milliseconds. A value below the lookup budget changes nothing.
    pub fn connect_budget(mut self, budget: Duration) -> Self {
        self.budgets.connect = budget;
        self
    }

    /// Makes the recording of a new instance wait until the backend has it, within the lookup budget: for code that hands
    /// work over at once, and cannot call [`flush`](WorkflowContextStorage::flush).
    ///
    /// By default, it does not wait.
    pub fn write_through(mut self, write_through: bool) -> Self {
        self.write_through = write_through;
        self
    }

    /// Gives each workflow a span of its own: the root of its trace, from the first sight of the instance to its terminal
    /// status, exported once by the process that sees the end, whatever has crashed meanwhile. All spans of the instance are its
    /// children.
    ///
    /// The tracer provider needs two pieces, [`id_generator`](WorkflowContextStorage::id_generator) and
    /// [`sampler`](WorkflowContextStorage::sampler). If one is missing when the first instance is seen, this is off, and a
    /// warning says which.
    ///
    /// By default, a workflow has no span of its own.
    #[cfg(feature = "durable-root")]
    #[cfg_attr(docsrs, doc(cfg(feature = "durable-root")))]
    pub fn durable_root(mut self, durable_root: bool) -> Self {
        self.has_roots = durable_root;
        self
    }

    /// Makes a workflow visible from its first second: with its own span a child of no length is exported at once, named
    /// `{name} started`, with `workflow.pending = true`. Needs [`durable_root`](Self::durable_root).
    ///
    /// By default, the first thing that is seen is the first step.
    #[cfg(feature = "durable-root")]
    #[cfg_attr(docsrs, doc(cfg(feature = "durable-root")))]
    pub fn start_marker(mut self, start_marker: bool) -> Self {
        self.roots.start_marker = start_marker;
        self
    }

    /// Derives the trace id of a workflow without a natural parent, and the id of its own span, from its
    /// [`namespace`](Self::namespace), instance id and run id, so that workers that share no store meet in one trace with one
    /// root. Needs [`durable_root`](Self::durable_root). A stored trace, and that of a natural parent, is never replaced.
    ///
    /// The ids are taken from the SHA-256 of five parts, each preceded by its length as eight bytes, little-endian: the text
    /// `tracing-workflow-context 1`, the namespace, the instance id, the run id or nothing, and the number of the trace among
    /// those of its run, in decimal digits. The trace id is the first 16 bytes of the digest, the span id the next 8; of zeros
    /// alone, the last byte becomes 1. Whoever chooses instance ids also chooses trace ids, and can guess them.
    ///
    /// | namespace | instance id | run id | trace id | span id |
    /// |---|---|---|---|---|
    /// | | `order-42` | | `9827dd640397b7caa6b5637812189ecf` | `3cfca49b60245104` |
    /// | `orders` | `order-42` | | `c5fc75afbef42b3e85204c05940dabfe` | `b03bd634f4249522` |
    /// | `orders` | `order-42` | `run-1` | `f8be9cfa3cade70b2bd94474a151b09c` | `f155701b2bfd8784` |
    ///
    /// By default, trace ids are the provider's.
    #[cfg(feature = "durable-root")]
    #[cfg_attr(docsrs, doc(cfg(feature = "durable-root")))]
    pub fn derived_trace_ids(mut self, derived: bool) -> Self {
        self.roots.derived_trace_ids = derived;
        self
    }

    /// Sets the namespace, which is part of every key in the backend and of derived trace ids: services or tenants whose instance
    /// ids may be equal do not meet, on the same backend or without one. At most 256 bytes.
    ///
    /// By default, it is empty.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// Sets how many recent decisions, over all instances, [`explain`](WorkflowContextStorage::explain) can show; zero
    /// switches it off. From 256 on they are kept in groups of 128 or more, those of one instance all in one group, so
    /// that a busy one leaves room for the others.
    ///
    /// By default, 1024, which take about 150 KiB, and more where they name a second id.
    pub fn recent_decisions(mut self, decisions: usize) -> Self {
        self.recent_decisions = decisions;
        self
    }

    /// Sets the clock; for tests.
    ///
    /// By default, the operating system's clock.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = Some(clock);
        self
    }

    /// Builds the storage.
    ///
    /// # Errors
    ///
    /// [`BuildError`] for settings that contradict themselves, each with a sentence that says why.
    pub fn build(self) -> Result<WorkflowContextStorage, BuildError> {
        self.names.check(&self.engines)?;
        let names = [
            ("adopt_spans", &self.adopted_spans),
            ("poller_spans", &self.poller_spans),
            ("completing_spans", &self.completing_spans),
        ];
        for (setting, names) in names {
            if names.iter().any(|name| name.is_empty()) {
                return Err(BuildError::EmptyName { setting });
            }
        }
        if self.policy.bounds.max_age == Some(Duration::ZERO) {
            return Err(BuildError::Zero { setting: "max_age" });
        }
        if self.policy.bounds.max_spans == Some(0) {
            return Err(BuildError::Zero {
                setting: "max_spans",
            });
        }
        if self.limits.max_instances == 0 {
            return Err(BuildError::Zero {
                setting: "max_instances",
            });
        }
        if self.limits.max_bytes == 0 {
            return Err(BuildError::Zero {
                setting: "max_bytes",
            });
        }
        if self.limits.idle_ttl == 0 {
            return Err(BuildError::Zero {
                setting: "idle_ttl",
            });
        }
        if self.namespace.len() > MAX_NAMESPACE_BYTES {
            return Err(BuildError::NamespaceTooLong {
                length: self.namespace.len(),
            });
        }
        self.check_relations()?;
        self.finish().map_err(|error| BuildError::NoThread {
            error: error.to_string(),
        })
    }

    /// Fails only where there is a backend, and no thread to use it.
    fn finish(self) -> std::io::Result<WorkflowContextStorage> {
        let mut fields = Fields::new(self.names);
        self.engines
            .into_iter()
            .for_each(|engine| fields.add_engine(engine));
        self.adopted_spans
            .into_iter()
            .for_each(|name| fields.add_engine_span(name));
        self.poller_spans
            .into_iter()
            .for_each(|name| fields.add_poller(name));
        self.completing_spans
            .into_iter()
            .for_each(|name| fields.add_completing(name));
        let warnings = Warnings::new(self.clock.is_none());
        let time = self.clock.clone();
        let clock = self.clock.unwrap_or_else(|| Arc::new(SystemClock));
        let (tracers, counters) = (Arc::new(Tracers::default()), Arc::new(Counters::default()));
        #[cfg(feature = "durable-root")]
        let roots = RootSettings {
            namespace: self.namespace.clone(),
            ..self.roots
        };
        #[cfg(not(feature = "durable-root"))]
        let roots = self.roots;
        let roots = self.has_roots.then(|| {
            let (tracers, counters) = (tracers.clone(), counters.clone());
            Roots::new(roots, clock.clone(), tracers, counters, warnings.clone())
        });
        let cache = Cache::new(self.limits, time, self.recent_decisions, roots.clone());
        let settings = Settings {
            lifetimes: self.lifetimes,
            budgets: self.budgets,
            write_through: self.write_through,
        };
        let remote = self.backend.map(|backend| {
            let backend = Namespaced::wrap(backend, &self.namespace);
            let (cache, clock) = (cache.clone(), clock.clone());
            let (roots, warnings) = (roots.as_ref(), warnings.clone());
            let counters = counters.clone();
            Remote::new(backend, cache, clock, settings, roots, warnings, counters)
        });
        let keeps_identities = remote.is_some() || roots.is_some() || fields.has_completing();
        Ok(WorkflowContextStorage {
            shared: Arc::new(Shared {
                fields,
                policy: self.policy,
                clock,
                tier: Tier::new(cache, remote.transpose()?),
                counters,
                stand_ins: Default::default(),
                replays: Default::default(),
                new_work: Default::default(),
                poller_traces: Default::default(),
                started: Default::default(),
                held_parents: Default::default(),
                layers: Default::default(),
                shared_traces: Default::default(),
                warnings,
                authors: Authors::default(),
                tracers,
                keeps_identities,
                roots,
                #[cfg(feature = "metrics")]
                registrations: Default::default(),
            }),
        })
    }

    fn check_relations(&self) -> Result<(), BuildError> {
        let relations = &self.policy.relations;
        let late = relations.get(Relation::Late);
        if !matches!(late, Continuation::Keep | Continuation::Link) {
            return Err(BuildError::ImpossibleRelation {
                relation: Relation::Late,
                continuation: late,
                why: "the parent of a span that has started can no longer change, only Keep and Link are left",
            });
        }
        let observed = relations.get(Relation::Observed);
        if !matches!(observed, Continuation::Keep | Continuation::Link) {
            return Err(BuildError::ImpossibleRelation {
                relation: Relation::Observed,
                continuation: observed,
                why: "a span that only looks at an instance keeps its parent, only Keep and Link are left",
            });
        }
        for relation in [Relation::First, Relation::Polled] {
            let continuation = relations.get(relation);
            if !matches!(
                continuation,
                Continuation::Keep | Continuation::NewRoot | Continuation::NewRootAndLink
            ) {
                return Err(BuildError::ImpossibleRelation {
                    relation,
                    continuation,
                    why: "nothing is stored for the first span of an instance, only Keep, NewRoot and NewRootAndLink are left",
                });
            }
        }
        let within_a_trace = [
            Relation::First,
            Relation::Polled,
            Relation::Orphan,
            Relation::SameTrace,
            Relation::Foreign,
            Relation::Child,
            Relation::Late,
            Relation::Observed,
        ];
        match within_a_trace
            .into_iter()
            .find(|relation| relations.resamples(*relation))
        {
            Some(relation) => Err(BuildError::ImpossibleResampling { relation }),
            None => Ok(()),
        }
    }
}

impl Default for WorkflowContextStorage {
    fn default() -> Self {
        Self::new()
    }
}

impl WorkflowContextStorage {
    /// Creates a storage in memory, with every setting at its default.
    #[must_use]
    pub fn new() -> Self {
        let storage = WorkflowContextStorageBuilder::default().finish();
        storage.expect("only a backend can fail, and the default has none")
    }

    /// Starts a builder, for settings other than the defaults; they are tabulated at [`WorkflowContextStorageBuilder`].
    #[must_use = "a builder does nothing until build() is called"]
    pub fn builder() -> WorkflowContextStorageBuilder {
        WorkflowContextStorageBuilder::default()
    }
}
