//! The state that the roots of a storage share, and the knowledge that one process has of a root.

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, SystemTime};

use opentelemetry::SpanId;
use opentelemetry::trace::SpanContext;

use crate::backend::RootSpan;
use crate::backend::client::Client;
use crate::clock::Clock;
use crate::context::WorkflowContext;
use crate::fields::value::EndStatus;
use crate::lock::lock;
use crate::own_spans::Tracers;
use crate::stats::Counters;
use crate::warnings::Warnings;

/// The most forgotten roots that wait to be looked at.
pub(super) const MAX_DUE: usize = 64 * 1024;

/// The number of roots at which it is worth a warning that none has ended.
const MANY_OPEN: u64 = 256;

/// The settings of durable roots.
#[derive(Clone, Debug, Default)]
pub(crate) struct RootSettings {
    pub(crate) start_marker: bool,
    #[cfg(feature = "durable-root")]
    pub(crate) derived_trace_ids: bool,
    #[cfg(feature = "durable-root")]
    pub(crate) namespace: String,
}

/// The state that all roots of a storage share.
pub(crate) struct Roots {
    pub(super) own: Weak<Self>,
    pub(super) settings: RootSettings,
    /// Set once a line in the set-up of the provider was found missing: that line.
    pub(super) missing: OnceLock<&'static str>,
    /// The number of roots that were opened here.
    pub(super) opened: AtomicU64,
    /// Somebody has told the end of an instance.
    pub(super) knows_an_end: AtomicBool,
    /// Tells this storage's claims from those of other processes.
    pub(super) token: SpanId,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) tracers: Arc<Tracers>,
    pub(super) counters: Arc<Counters>,
    pub(super) warnings: Arc<Warnings>,
    pub(super) backing: OnceLock<Backing>,
    pub(super) due: Mutex<Vec<Due>>,
    /// A thread works on what is due.
    pub(super) is_working: AtomicBool,
    /// The tick at which to sweep again.
    pub(super) next_sweep: AtomicU32,
}

/// The backend in which the roots of all processes meet.
pub(super) struct Backing {
    pub(super) client: Weak<Client>,
    pub(super) idle: Duration,
    pub(super) completed: Duration,
}

/// A root that has ids, and is not recorded yet.
#[derive(Clone)]
pub(crate) struct Allocated {
    pub(crate) context: WorkflowContext,
    pub(crate) span: RootSpan,
}

impl Roots {
    pub(crate) fn new(
        settings: RootSettings,
        clock: Arc<dyn Clock>,
        tracers: Arc<Tracers>,
        counters: Arc<Counters>,
        warnings: Arc<Warnings>,
    ) -> Arc<Self> {
        let token = RandomState::new().hash_one(std::process::id()).max(1);
        let roots = Arc::new_cyclic(|own| Self {
            own: own.clone(),
            settings,
            missing: OnceLock::new(),
            opened: AtomicU64::new(0),
            knows_an_end: AtomicBool::new(false),
            token: SpanId::from(token),
            clock,
            tracers,
            counters,
            warnings,
            backing: OnceLock::new(),
            due: Mutex::default(),
            is_working: AtomicBool::new(false),
            next_sweep: AtomicU32::new(0),
        });
        let weak = Arc::downgrade(&roots);
        crate::clock::subscribe(weak);
        roots
    }

    /// Lets the roots be claimed in a backend, whose records live that long.
    pub(crate) fn claim_in(&self, client: &Arc<Client>, idle: Duration, completed: Duration) {
        let client = Arc::downgrade(client);
        let backing = Backing {
            client,
            idle,
            completed,
        };
        let _ = self.backing.set(backing);
    }

    pub(crate) fn now(&self) -> SystemTime {
        self.clock.now()
    }

    /// Returns the line that was found missing in the set-up of the provider: there are no roots then.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        self.missing.get().copied()
    }

    /// Counts a root that was opened here. That many without one end are a sign that nobody tells it.
    pub(super) fn count_opened(&self) {
        let opened = self.opened.fetch_add(1, Relaxed) + 1;
        if opened == MANY_OPEN {
            self.warn_without_end(opened);
        }
    }

    /// Warns that instances were begun or abandoned, unless somebody has told the end of one.
    pub(super) fn warn_without_end(&self, count: u64) {
        if !self.knows_an_end.load(Relaxed) {
            self.warnings.nobody_tells_the_end(count);
        }
    }

    pub(crate) fn has_start_marker(&self) -> bool {
        self.settings.start_marker
    }

    pub(super) fn client(&self) -> Option<Arc<Client>> {
        self.backing.get()?.client.upgrade()
    }

    /// Counts a panic of a sampler, id generator, processor or exporter.
    #[cold]
    pub(super) fn count_panic(&self, when: &str) {
        self.counters.panics.add();
        self.warnings.panicked(when);
    }

    /// Adds a root that memory has forgotten.
    pub(super) fn add_due(&self, due: Due) {
        let mut all = lock(&self.due);
        if all.len() < MAX_DUE {
            all.push(due);
        } else {
            drop(all);
            self.counters.lost_roots.add();
        }
    }
}

/// The part of this process in a root.
pub(crate) struct Part {
    pub(super) roots: Arc<Roots>,
    pub(super) id: Box<str>,
    pub(super) run_id: Option<Box<str>>,
    pub(super) generation: u32,
    /// Its trace id, flags and tracestate are the root's.
    pub(super) context: WorkflowContext,
    pub(super) span: RootSpan,
    pub(super) progress: Mutex<Progress>,
}

impl Part {
    pub(super) fn new(
        roots: &Arc<Roots>,
        id: &str,
        run_id: Option<&str>,
        generation: u32,
        context: WorkflowContext,
        span: RootSpan,
        stage: Stage,
    ) -> Self {
        let progress = Progress {
            stage,
            first_seen: roots.clock.now(),
            last_end: span.started_at,
            spans: 0,
            open: 0,
            place: Place::None,
            ending: None,
            links: Vec::new(),
        };
        Self {
            roots: roots.clone(),
            id: id.into(),
            run_id: run_id.map(Box::from),
            generation,
            context,
            span,
            progress: Mutex::new(progress),
        }
    }
}

pub(super) struct Progress {
    pub(super) stage: Stage,
    /// The time when this process first saw the instance.
    pub(super) first_seen: SystemTime,
    /// The end of the last span that has ended here.
    pub(super) last_end: SystemTime,
    /// The number of spans that have ended here.
    pub(super) spans: u64,
    /// The number of spans that are open here.
    pub(super) open: u32,
    pub(super) place: Place,
    pub(super) ending: Option<Ending>,
    /// Links to traces that follow this one.
    pub(super) links: Vec<(SpanContext, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Allocated, and not recorded yet.
    New,
    Open,
    /// Its end is being claimed.
    Closing,
    Closed,
}

/// The place of this process among those that have spans of the instance, each of which keeps its part in the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    None,
    Asked,
    Taken(u32),
    /// There are too many processes.
    NoneLeft,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Ending {
    pub(super) status: EndStatus,
    /// Nothing of the instance has happened after it, as far as this process knows.
    pub(super) at: SystemTime,
}

/// A root that memory has forgotten, to be looked at again.
pub(super) struct Due {
    pub(super) part: Arc<Part>,
    pub(super) at: SystemTime,
}

impl Due {
    pub(super) fn new(part: Arc<Part>) -> Self {
        let at = SystemTime::UNIX_EPOCH;
        Self { part, at }
    }
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roots")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
