//! The state that the handle, the layer and the tracers of one storage share.

use std::borrow::Cow;
use std::sync::Arc;

use opentelemetry::trace::{SpanContext, Tracer};
use opentelemetry::{KeyValue, SpanId, TraceId};

use super::remote::LateWinner;
use super::tier::Tier;
use crate::cache::Key;
use crate::clock::Clock;
use crate::context::WorkflowContext;
use crate::decision::Policy;
use crate::error::InvalidInstanceId;
use crate::explain::Explanation;
use crate::explain::author::{Author, Authors};
use crate::explain::trail::{Event, Outcome, SpanNote};
use crate::fields::identity::Identity;
use crate::fields::value::{EndStatus, plain};
use crate::fields::{Fields, Owner, Tag};
use crate::own_spans::Tracers;
use crate::root::open::{OpenRoot, Within};
use crate::root::state::Roots;
#[cfg(feature = "metrics")]
use crate::stats::Registrations;
use crate::stats::{Counters, Stats};
use crate::tracer::handoff::StartNumber;
use crate::tracer::held_parents::HeldParents;
use crate::tracer::layers::Layers;
use crate::tracer::live_ids::LiveIds;
use crate::tracer::replays::Replays;
use crate::tracer::shared_traces::SharedTraces;
use crate::warnings::Warnings;

/// The state of one storage. Nothing in it is locked while foreign code runs.
pub(crate) struct Shared {
    pub(crate) fields: Fields,
    pub(crate) policy: Policy,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) tier: Tier,
    pub(crate) counters: Arc<Counters>,
    /// The span ids of stand-ins, and of real spans beneath which code is replayed.
    pub(crate) stand_ins: LiveIds<SpanId>,
    pub(crate) replays: Replays,
    /// The span ids of real spans that were opened inside a replay through the OpenTelemetry API.
    pub(crate) new_work: LiveIds<SpanId>,
    pub(crate) poller_traces: LiveIds<TraceId>,
    /// The open spans that may be held and were started without the layer, by `Span::context()`.
    pub(crate) started: LiveIds<StartNumber>,
    pub(crate) held_parents: HeldParents,
    pub(crate) layers: Layers,
    pub(crate) shared_traces: SharedTraces,
    pub(crate) warnings: Arc<Warnings>,
    pub(super) authors: Authors,
    pub(crate) tracers: Arc<Tracers>,
    /// Set with durable roots.
    pub(crate) roots: Option<Arc<Roots>>,
    /// Each span remembers its instance's id, not only the hash: for a backend, a root, or the end that its close may be.
    pub(crate) keeps_identities: bool,
    #[cfg(feature = "metrics")]
    pub(crate) registrations: Registrations,
}

impl Shared {
    /// The key of an instance or run, with its hash.
    #[inline]
    pub(crate) fn key<'a>(&self, id: &'a str, run_id: Option<&'a str>) -> Key<'a> {
        self.tier.cache().key(id, run_id)
    }

    /// Shares a tracer with `create_resumed`, as long as it lives.
    pub(crate) fn share_tracer<T>(&self, tracer: T) -> Arc<T>
    where
        T: Tracer + Send + Sync + 'static,
        T::Span: Send + Sync + 'static,
    {
        self.tracers.add(tracer)
    }

    /// Notes an event for `explain`, unless that is switched off.
    #[cold]
    pub(crate) fn note(&self, instance: u64, event: impl FnOnce() -> Event) {
        let cache = self.tier.cache();
        if !cache.trail.is_off() {
            cache.note(instance, event());
        }
    }

    /// Records the context of a span, unless another span was faster.
    pub(crate) fn record(
        &self,
        key: Key<'_>,
        follows: Option<(&WorkflowContext, u32)>,
        context: WorkflowContext,
        author: Author,
        root: Option<Arc<OpenRoot>>,
    ) -> Result<Option<LateWinner>, WorkflowContext> {
        let author = Some(self.authors.number(author));
        self.tier
            .record(key, follows, context, author, root, &self.counters)
    }

    /// Opens a span in the own span of its instance, if that has one.
    #[inline]
    pub(crate) fn enter_root(&self, key: Key<'_>) -> Option<Within> {
        self.roots.as_ref()?;
        Some(self.tier.cache().root_of(key)?.enter())
    }

    /// Notes for `explain` what was decided for a span of the instance with that hash.
    #[inline]
    pub(crate) fn note_decision(
        &self,
        instance: u64,
        span_name: Cow<'static, str>,
        span: &SpanContext,
        natural: &SpanContext,
        outcome: Outcome,
        after_end: bool,
    ) {
        let note = SpanNote {
            after_end,
            span_name,
            span: span.into(),
            natural: natural.into(),
            outcome,
        };
        self.tier.cache().note(instance, Event::Started(note));
    }

    /// Returns the name of a span of the instance with that hash, if the trail still tells it.
    pub(crate) fn span_name(&self, instance: u64, span: &SpanContext) -> Option<Cow<'static, str>> {
        self.tier.cache().trail.span_name(instance, span)
    }

    /// Counts a panic of a sampler, id generator or processor.
    #[cold]
    pub(crate) fn count_panic_at_start(&self) {
        self.counters.panics.add();
        self.warnings.panicked("a span was started");
    }

    /// Counts a panic of a processor or exporter.
    #[cold]
    pub(crate) fn count_panic_at_end(&self) {
        self.counters.panics.add();
        self.warnings.panicked("a span ended");
    }

    pub(crate) fn complete(&self, identity: &Identity, status: EndStatus) {
        let (id, run_id) = (&identity.instance_id, identity.run_id.as_deref());
        self.tier.complete(self.key(id, run_id), status);
    }

    /// Reads the reserved fields from attributes; an id that is too long is counted.
    #[inline]
    pub(crate) fn tag_of<'a>(&self, attributes: &'a [KeyValue], owner: Owner<'_>) -> Tag<'a> {
        let tag = self.fields.tag_of(attributes, owner);
        if let Some(id) = &tag.oversized {
            self.counters.oversized.add();
            self.warnings.oversized(id);
        }
        if let (Some(id), [_, ..]) = (&tag.instance_id, &tag.outranked[..]) {
            self.note_outranked(id, &tag.outranked);
        }
        tag
    }

    /// Notes the ids of other fields of the same span, which do not count, for themselves and for the one that does.
    #[cold]
    fn note_outranked(&self, id: &str, outranked: &[Cow<'_, str>]) {
        let hash = |id: &str| self.tier.cache().hash(id);
        for other in outranked.iter().filter(|other| *other != id) {
            self.note(hash(id), || Event::Outranks((**other).into()));
            self.note(hash(other), || Event::Outranked(id.into()));
        }
    }

    /// Reads and checks an id that a call was given, as those of spans are; one that is too long is counted.
    #[inline]
    pub(super) fn read_id<'a>(&self, id: &'a str) -> Result<Cow<'a, str>, InvalidInstanceId> {
        let id = plain(id);
        match InvalidInstanceId::check(&id) {
            Ok(()) => Ok(id),
            Err(error) => Err(self.count_invalid(error)),
        }
    }

    #[cold]
    fn count_invalid(&self, error: InvalidInstanceId) -> InvalidInstanceId {
        if let InvalidInstanceId::TooLong { .. } = error {
            self.counters.oversized.add();
        }
        error
    }

    pub(super) fn explain(&self, id: &str) -> Explanation {
        let explanation = (self.tier.cache()).explain(&plain(id), self.clock.now(), &self.authors);
        let is_shared = |trace| self.shared_traces.contains(trace);
        let explanation = explanation.with_shared_trace(is_shared);
        let missing = self.roots.as_ref().and_then(|roots| roots.missing());
        let explanation = explanation.with_missing_for_roots(missing);
        let client = self.tier.remote().map(|remote| remote.client());
        explanation.with_backend_down(client.is_some_and(|client| client.is_down()))
    }

    pub(crate) fn stats(&self) -> Stats {
        let counters = &self.counters;
        let cache = self.tier.cache();
        let client = self.tier.remote().map(|remote| remote.client());
        let (hits, misses) = cache.hits_and_misses();
        Stats {
            stored_instances: cache.len() as u64,
            hits,
            misses,
            late: counters.late.get(),
            expired: cache.expired.get(),
            evicted: cache.evicted.get(),
            oversized: counters.oversized.get(),
            malformed: client.map_or(0, |client| client.malformed()),
            expired_at_open: client.map_or(0, |client| client.expired_at_open()),
            dropped_writes: client.map_or(0, |client| client.dropped_writes()),
            backend_errors: client.map_or(0, |client| client.errors()),
            lookup_timeouts: client.map_or(0, |client| client.lookup_timeouts()),
            conflicts: counters.conflicts.get(),
            given_back: counters.given_back.get(),
            overdue_refreshes: counters.overdue_refreshes.get(),
            replayed: counters.replayed.get(),
            replayed_events: counters.replayed_events.get(),
            deferred: counters.deferred.get(),
            adopted: counters.adopted.get(),
            shared_traces: counters.shared_traces.get(),
            panics: counters.panics.get(),
            exported_roots: counters.exported_roots.get(),
            lost_roots: counters.lost_roots.get(),
        }
    }
}
