//! The counters of a storage as OpenTelemetry metrics.

use std::sync::Arc;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{AsyncInstrument, Meter};

use crate::stats::Stats;
use crate::storage::WorkflowContextStorage;

impl WorkflowContextStorage {
    /// Reports the counters of [`stats`](Self::stats) to a meter, whenever its reader collects.
    ///
    /// | metric | instrument | unit | attribute | counter |
    /// |---|---|---|---|---|
    /// | `workflow.context.instance.count` | up-down counter | `{instance}` | | `stored_instances` |
    /// | `workflow.context.instance.dropped` | counter | `{instance}` | `workflow.context.reason` = `expired` | `expired` |
    /// | | | | `workflow.context.reason` = `evicted` | `evicted` |
    /// | `workflow.context.lookups` | counter | `{lookup}` | `workflow.context.result` = `hit` | `hits` |
    /// | | | | `workflow.context.result` = `miss` | `misses` |
    /// | `workflow.context.id.oversized` | counter | `{id}` | | `oversized` |
    /// | `workflow.context.span.late` | counter | `{span}` | | `late` |
    /// | `workflow.context.span.conflicting` | counter | `{span}` | | `conflicts` |
    /// | `workflow.context.span.replayed` | counter | `{span}` | | `replayed` |
    /// | `workflow.context.span.deferred` | counter | `{span}` | | `deferred` |
    /// | `workflow.context.span.adopted` | counter | `{span}` | | `adopted` |
    /// | `workflow.context.trace.shared` | counter | `{trace}` | | `shared_traces` |
    /// | `workflow.context.panic.caught` | counter | `{panic}` | | `panics` |
    /// | `workflow.context.root.exported` | counter | `{span}` | | `exported_roots` |
    /// | `workflow.context.root.lost` | counter | `{span}` | | `lost_roots` |
    /// | `workflow.context.event.replayed` | counter | `{event}` | | `replayed_events` |
    /// | `workflow.context.backend.record.malformed` | counter | `{record}` | | `malformed` |
    /// | `workflow.context.backend.record.given_back` | counter | `{record}` | | `given_back` |
    /// | `workflow.context.backend.record.expired_at_open` | counter | `{record}` | | `expired_at_open` |
    /// | `workflow.context.backend.refresh.overdue` | counter | `{refresh}` | | `overdue_refreshes` |
    /// | `workflow.context.backend.write.dropped` | counter | `{write}` | | `dropped_writes` |
    /// | `workflow.context.backend.call.failed` | counter | `{call}` | | `backend_errors` |
    /// | `workflow.context.backend.lookup.timed_out` | counter | `{lookup}` | | `lookup_timeouts` |
    ///
    /// Calling this again replaces the meter, so nothing is reported twice. The storage is not kept alive: once its last
    /// handle is dropped, nothing is reported. Two storages need meters of different scopes, since no attribute tells
    /// them apart.
    ///
    /// ```
    /// use opentelemetry::global;
    /// use tracing_workflow_context::WorkflowContextStorage;
    ///
    /// let storage = WorkflowContextStorage::new();
    /// storage.register_metrics(&global::meter("my-worker"));
    /// ```
    pub fn register_metrics(&self, meter: &Meter) {
        let registration = self.shared.registrations.begin();
        let observe = |points: &'static [Point]| {
            let shared = Arc::downgrade(&self.shared);
            move |report: &dyn Fn(u64, &[KeyValue])| {
                if let Some(shared) = shared
                    .upgrade()
                    .filter(|shared| shared.registrations.is_last(registration))
                {
                    let stats = shared.stats();
                    points.iter().for_each(|point| point.report(&stats, report));
                }
            }
        };
        for Instrument {
            name,
            unit,
            description,
            kind,
            points,
        } in &INSTRUMENTS
        {
            let observe = observe(points);
            match kind {
                Kind::Counter => {
                    let observe = move |to: &dyn AsyncInstrument<u64>| {
                        observe(&|value, of| to.observe(value, of))
                    };
                    let counter = meter.u64_observable_counter(*name).with_unit(*unit);
                    counter
                        .with_description(*description)
                        .with_callback(observe)
                        .build();
                }
                Kind::UpDownCounter => {
                    let observe = move |to: &dyn AsyncInstrument<i64>| {
                        observe(&|value, of| {
                            to.observe(i64::try_from(value).unwrap_or(i64::MAX), of)
                        });
                    };
                    let counter = meter.i64_observable_up_down_counter(*name).with_unit(*unit);
                    counter
                        .with_description(*description)
                        .with_callback(observe)
                        .build();
                }
            }
        }
    }
}

struct Instrument {
    name: &'static str,
    unit: &'static str,
    description: &'static str,
    kind: Kind,
    points: &'static [Point],
}

enum Kind {
    Counter,
    UpDownCounter,
}

/// One time series of an instrument.
struct Point {
    attribute: Option<(&'static str, &'static str)>,
    value: fn(&Stats) -> u64,
}

impl Point {
    /// Creates the only time series of an instrument.
    const fn new(value: fn(&Stats) -> u64) -> Self {
        Self {
            attribute: None,
            value,
        }
    }

    /// Creates a time series with an attribute.
    const fn with_attribute(key: &'static str, is: &'static str, value: fn(&Stats) -> u64) -> Self {
        Self {
            attribute: Some((key, is)),
            value,
        }
    }

    fn report(&self, stats: &Stats, report: &dyn Fn(u64, &[KeyValue])) {
        let value = (self.value)(stats);
        match self.attribute {
            Some((key, is)) => report(value, &[KeyValue::new(key, is)]),
            None => report(value, &[]),
        }
    }
}

const REASON: &str = "workflow.context.reason";
const RESULT: &str = "workflow.context.result";

/// The instruments. Counters whose sum means something share one, told apart by an attribute; the others have one each,
/// since a span can be both late and deferred.
static INSTRUMENTS: [Instrument; 21] = [
    Instrument {
        name: "workflow.context.instance.count",
        unit: "{instance}",
        description: "Workflow instances whose trace context is in memory.",
        kind: Kind::UpDownCounter,
        points: &[Point::new(|stats| stats.stored_instances)],
    },
    Instrument {
        name: "workflow.context.instance.dropped",
        unit: "{instance}",
        description: "Workflow instances that were removed from memory: expired, or evicted because there were too many.",
        kind: Kind::Counter,
        points: &[
            Point::with_attribute(REASON, "expired", |stats| stats.expired),
            Point::with_attribute(REASON, "evicted", |stats| stats.evicted),
        ],
    },
    Instrument {
        name: "workflow.context.lookups",
        unit: "{lookup}",
        description: "Lookups of the trace context of a workflow instance.",
        kind: Kind::Counter,
        points: &[
            Point::with_attribute(RESULT, "hit", |stats| stats.hits),
            Point::with_attribute(RESULT, "miss", |stats| stats.misses),
        ],
    },
    Instrument {
        name: "workflow.context.id.oversized",
        unit: "{id}",
        description: "Workflow instance ids that were refused because they are too long.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.oversized)],
    },
    Instrument {
        name: "workflow.context.span.late",
        unit: "{span}",
        description: "Spans that named their workflow instance after they had started.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.late)],
    },
    Instrument {
        name: "workflow.context.span.conflicting",
        unit: "{span}",
        description: "Spans that were to be recorded for their workflow instance, but another span was recorded first.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.conflicts)],
    },
    Instrument {
        name: "workflow.context.span.replayed",
        unit: "{span}",
        description: "Spans that were not exported because they are replays.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.replayed)],
    },
    Instrument {
        name: "workflow.context.span.deferred",
        unit: "{span}",
        description: "Spans whose start was held back until their workflow instance was known.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.deferred)],
    },
    Instrument {
        name: "workflow.context.span.adopted",
        unit: "{span}",
        description: "Spans without an id that joined the workflow instance of their first child.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.adopted)],
    },
    Instrument {
        name: "workflow.context.trace.shared",
        unit: "{trace}",
        description: "Traces that many workflow instances share, which is a sign of a poller that is not named.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.shared_traces)],
    },
    Instrument {
        name: "workflow.context.panic.caught",
        unit: "{panic}",
        description: "Panics of a sampler, id generator, span processor or exporter that were caught.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.panics)],
    },
    Instrument {
        name: "workflow.context.root.exported",
        unit: "{span}",
        description: "Own spans of workflows that were exported.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.exported_roots)],
    },
    Instrument {
        name: "workflow.context.root.lost",
        unit: "{span}",
        description: "Own spans of workflows that nobody can export any more.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.lost_roots)],
    },
    Instrument {
        name: "workflow.context.event.replayed",
        unit: "{event}",
        description: "Events that were dropped with a replayed span.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.replayed_events)],
    },
    Instrument {
        name: "workflow.context.backend.record.malformed",
        unit: "{record}",
        description: "Records of the backend that could not be decoded.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.malformed)],
    },
    Instrument {
        name: "workflow.context.backend.record.given_back",
        unit: "{record}",
        description: "Records that the backend had lost, and that were given back from memory.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.given_back)],
    },
    Instrument {
        name: "workflow.context.backend.refresh.overdue",
        unit: "{refresh}",
        description: "Refreshes of the records of all instances that were due before the last one was over.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.overdue_refreshes)],
    },
    Instrument {
        name: "workflow.context.backend.record.expired_at_open",
        unit: "{record}",
        description: "Records that had expired before the file was opened.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.expired_at_open)],
    },
    Instrument {
        name: "workflow.context.backend.write.dropped",
        unit: "{write}",
        description: "Writes that were dropped: too many were waiting for the backend, or an unreadable value was in their place.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.dropped_writes)],
    },
    Instrument {
        name: "workflow.context.backend.call.failed",
        unit: "{call}",
        description: "Calls to the backend that failed.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.backend_errors)],
    },
    Instrument {
        name: "workflow.context.backend.lookup.timed_out",
        unit: "{lookup}",
        description: "Backend lookups that exceeded the lookup budget.",
        kind: Kind::Counter,
        points: &[Point::new(|stats| stats.lookup_timeouts)],
    },
];
