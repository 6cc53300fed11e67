//! The counters of a storage as OpenTelemetry metrics, read through the SDK.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::support::*;
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Meter, MeterProvider as _};
use opentelemetry::trace::{Span as _, Tracer as _};
#[cfg(feature = "durable-root")]
use opentelemetry::trace::{SpanBuilder, TracerProvider as _};
use opentelemetry_sdk::metrics::data::{AggregatedMetrics, Metric, MetricData, Sum};
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
#[cfg(feature = "durable-root")]
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::{info, info_span};
use tracing_workflow_context::backend::{
    BackendError, Record, StorageBackend, Write, WriteOutcome,
};
use tracing_workflow_context::{Stats, WorkflowContextStorage};

/// The documented instruments, and the counter that each time series reads.
const INSTRUMENTS: [(&str, Kind, &str, &[Series]); 21] = [
    (
        COUNT,
        Kind::UpDownCounter,
        "{instance}",
        &[("", |stats| stats.stored_instances)],
    ),
    (
        "workflow.context.instance.dropped",
        Kind::Counter,
        "{instance}",
        &[
            ("workflow.context.reason=evicted", |stats| stats.evicted),
            ("workflow.context.reason=expired", |stats| stats.expired),
        ],
    ),
    (
        "workflow.context.lookups",
        Kind::Counter,
        "{lookup}",
        &[
            ("workflow.context.result=hit", |stats| stats.hits),
            ("workflow.context.result=miss", |stats| stats.misses),
        ],
    ),
    (
        "workflow.context.id.oversized",
        Kind::Counter,
        "{id}",
        &[("", |stats| stats.oversized)],
    ),
    (
        "workflow.context.span.late",
        Kind::Counter,
        "{span}",
        &[("", |stats| stats.late)],
    ),
    (
        "workflow.context.span.conflicting",
        Kind::Counter,
        "{span}",
        &[("", |stats| stats.conflicts)],
    ),
    (
        "workflow.context.span.replayed",
        Kind::Counter,
        "{span}",
        &[("", |stats| stats.replayed)],
    ),
    (
        "workflow.context.span.deferred",
        Kind::Counter,
        "{span}",
        &[("", |stats| stats.deferred)],
    ),
    (
        "workflow.context.span.adopted",
        Kind::Counter,
        "{span}",
        &[("", |stats| stats.adopted)],
    ),
    (
        "workflow.context.trace.shared",
        Kind::Counter,
        "{trace}",
        &[("", |stats| stats.shared_traces)],
    ),
    (
        "workflow.context.panic.caught",
        Kind::Counter,
        "{panic}",
        &[("", |stats| stats.panics)],
    ),
    (
        "workflow.context.root.exported",
        Kind::Counter,
        "{span}",
        &[("", |stats| stats.exported_roots)],
    ),
    (
        "workflow.context.root.lost",
        Kind::Counter,
        "{span}",
        &[("", |stats| stats.lost_roots)],
    ),
    (
        "workflow.context.event.replayed",
        Kind::Counter,
        "{event}",
        &[("", |stats| stats.replayed_events)],
    ),
    (
        "workflow.context.backend.record.malformed",
        Kind::Counter,
        "{record}",
        &[("", |stats| stats.malformed)],
    ),
    (
        "workflow.context.backend.record.given_back",
        Kind::Counter,
        "{record}",
        &[("", |stats| stats.given_back)],
    ),
    (
        "workflow.context.backend.refresh.overdue",
        Kind::Counter,
        "{refresh}",
        &[("", |stats| stats.overdue_refreshes)],
    ),
    (
        "workflow.context.backend.record.expired_at_open",
        Kind::Counter,
        "{record}",
        &[("", |stats| stats.expired_at_open)],
    ),
    (
        "workflow.context.backend.write.dropped",
        Kind::Counter,
        "{write}",
        &[("", |stats| stats.dropped_writes)],
    ),
    (
        "workflow.context.backend.call.failed",
        Kind::Counter,
        "{call}",
        &[("", |stats| stats.backend_errors)],
    ),
    (
        "workflow.context.backend.lookup.timed_out",
        Kind::Counter,
        "{lookup}",
        &[("", |stats| stats.lookup_timeouts)],
    ),
];

const COUNT: &str = "workflow.context.instance.count";

/// The attributes, and the counter.
type Series = (&'static str, fn(&Stats) -> u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    UpDownCounter,
}

#[test]
fn every_counter_is_reported_by_the_documented_instrument() {
    let busy = Busy::new();
    let metrics = Metrics::new();
    busy.worker.storage.register_metrics(&metrics.meter());

    let stats = busy.worker.storage.stats();
    assert_are_all_and_differ(&stats);
    let mut collected = metrics.collect();
    for (name, kind, unit, series) in INSTRUMENTS {
        let at = collected.iter().position(|reported| reported.name == name);
        let reported = collected.remove(at.unwrap_or_else(|| panic!("{name} is missing")));
        assert_eq!((reported.kind, &*reported.unit), (kind, unit), "{name}");
        assert!(
            reported.description.ends_with('.'),
            "{name} has no description"
        );
        let values = series
            .iter()
            .map(|(of, value)| ((*of).to_owned(), value(&stats)));
        assert_eq!(reported.values, values.collect(), "{name}");
    }
    assert!(collected.is_empty(), "undocumented: {collected:?}");
}

/// Asserts that every counter has a different, nonzero value; otherwise a swapped or missing one would go unnoticed. Those of
/// workflows' own spans and of refreshes need another set-up, and are counted by tests of their own.
fn assert_are_all_and_differ(stats: &Stats) {
    let of_others = |name: &str| {
        let others = [".root.", ".given_back", ".refresh."];
        others.iter().any(|part| name.contains(part))
    };
    let series: Vec<_> = INSTRUMENTS
        .iter()
        .filter(|(name, ..)| !of_others(name))
        .flat_map(|(_, _, _, series)| *series)
        .collect();
    let values: BTreeSet<_> = series.iter().map(|(_, value)| value(stats)).collect();
    assert_eq!(values.len(), series.len(), "{stats:?}");
    assert!(!values.contains(&0), "{stats:?}");
    assert_eq!(
        format!("{stats:?}").matches(':').count(),
        series.len() + 4,
        "{stats:?}"
    );
}

#[cfg(feature = "durable-root")]
#[test]
fn the_own_spans_of_workflows_are_counted() {
    let metrics = Metrics::new();
    let storage = WorkflowContextStorage::builder().durable_root(true);
    let storage = storage.build().unwrap();
    storage.register_metrics(&metrics.meter());
    let provider = SdkTracerProvider::builder()
        .with_id_generator(storage.id_generator())
        .with_sampler(storage.sampler(Sampler::AlwaysOn))
        .build();
    let tracer = storage.tracer(provider.tracer("test"));
    for id in 0..3 {
        let tag = KeyValue::new("workflow.instance_id", id);
        drop(tracer.build(SpanBuilder::from_name("order").with_attributes([tag])));
    }
    storage.complete("0", "completed").unwrap();
    storage.complete("1", "completed").unwrap();
    // No tracer is left to export the third.
    drop((tracer, provider));
    storage.complete("2", "completed").unwrap();
    assert_eq!(metrics.values("workflow.context.root.exported"), [2]);
    assert_eq!(metrics.values("workflow.context.root.lost"), [1]);
}

#[test]
fn what_is_given_back_and_what_is_overdue_are_counted() {
    let metrics = Metrics::new();
    let (backend, clock) = (ControlledBackend::new(), ManualClock::new());
    let storage = patient(backend.clone()).clock(clock.clone());
    let storage = storage.build().unwrap();
    storage.register_metrics(&metrics.meter());
    storage.store("order-42", context(8)).unwrap();
    storage.flush().unwrap();
    // Neither the record nor an answer is there.
    backend.set(Call::GetMany, Behaviour::Blocks);
    clock.advance(HOUR);
    backend.await_blocked(Call::GetMany);
    clock.advance(HOUR);
    backend.set(Call::GetMany, Behaviour::Fails);
    wait_until("it is overdue", || {
        metrics.values("workflow.context.backend.refresh.overdue") == [1]
    });
    assert_eq!(
        metrics.values("workflow.context.backend.record.given_back"),
        [0]
    );
    let lost = Write::Remove("order-42".to_owned());
    backend.write(&[lost]).unwrap();
    backend.set(Call::GetMany, Behaviour::Works);
    wait_until("it is given back", || {
        metrics.values("workflow.context.backend.record.given_back") == [1]
    });
    let stats = storage.stats();
    assert_eq!((stats.given_back, stats.overdue_refreshes), (1, 1));
    assert!(stats.backend_errors > 0);
}

#[test]
fn counters_are_read_at_the_time_of_collection() {
    let metrics = Metrics::new();
    let storage = WorkflowContextStorage::new();
    storage.register_metrics(&metrics.meter());
    let count_and_lookups = || {
        (
            metrics.values(COUNT),
            metrics.values("workflow.context.lookups"),
        )
    };

    assert_eq!(count_and_lookups(), (vec![0], vec![0, 0]));
    for id in ["a", "b"] {
        storage.store(id, context(8)).unwrap();
        storage.get(id).unwrap();
    }
    assert_eq!(count_and_lookups(), (vec![2], vec![2, 0]));
    storage.cleanup("a").unwrap();
    storage.get("a").unwrap();
    assert_eq!(count_and_lookups(), (vec![1], vec![2, 1]));
}

#[test]
fn a_storage_is_not_kept_alive_and_a_dropped_one_reports_nothing() {
    let metrics = Metrics::new();
    let storage = WorkflowContextStorage::new();
    storage.register_metrics(&metrics.meter());
    let tracer = storage.tracer(Worker::new().tracer());

    drop(storage);
    assert_eq!(metrics.values(COUNT), [0], "its tracer still lives");
    drop(tracer);
    assert!(
        metrics
            .collect()
            .iter()
            .all(|reported| reported.values.is_empty())
    );
}

#[test]
fn registering_again_does_not_double_the_counters() {
    let metrics = Metrics::new();
    let storage = WorkflowContextStorage::new();
    storage.store("a", context(8)).unwrap();
    for scope in ["test", "test", "another"] {
        storage.register_metrics(&metrics.provider.meter(scope));
        assert_eq!(metrics.values(COUNT), [1]);
    }
}

#[test]
fn counters_are_reported_to_the_latest_meter() {
    let [first, second] = [Metrics::new(), Metrics::new()];
    let storage = WorkflowContextStorage::new();
    storage.register_metrics(&first.meter());
    storage.register_metrics(&second.meter());

    assert!(first.values(COUNT).is_empty());
    assert_eq!(second.values(COUNT), [0]);
}

/// The collected data of one metric.
#[derive(Debug)]
struct Reported {
    name: String,
    kind: Kind,
    unit: String,
    description: String,
    /// By the attributes.
    values: BTreeMap<String, u64>,
}

impl Reported {
    fn of(metric: &Metric) -> Self {
        let (kind, values) = match metric.data() {
            AggregatedMetrics::U64(MetricData::Sum(sum)) => read(sum),
            AggregatedMetrics::I64(MetricData::Sum(sum)) => read(sum),
            data => panic!("{} is no sum: {data:?}", metric.name()),
        };
        let [name, unit, description] =
            [metric.name(), metric.unit(), metric.description()].map(str::to_owned);
        Self {
            name,
            kind,
            unit,
            description,
            values,
        }
    }
}

fn read<T: Copy + Debug + TryInto<u64, Error: Debug>>(
    sum: &Sum<T>,
) -> (Kind, BTreeMap<String, u64>) {
    let kind = if sum.is_monotonic() {
        Kind::Counter
    } else {
        Kind::UpDownCounter
    };
    let values = sum.data_points().map(|point| {
        let attributes = point
            .attributes()
            .map(|KeyValue { key, value, .. }| format!("{key}={value}"));
        (
            attributes.collect::<Vec<_>>().join(","),
            point.value().try_into().unwrap(),
        )
    });
    (kind, values.collect())
}

/// A meter provider of the SDK with a manual reader.
struct Metrics {
    provider: SdkMeterProvider,
    exporter: InMemoryMetricExporter,
}

impl Metrics {
    fn new() -> Self {
        let exporter = InMemoryMetricExporter::default();
        let reader =
            PeriodicReader::builder(exporter.clone()).with_interval(Duration::from_secs(1 << 30));
        let provider = SdkMeterProvider::builder()
            .with_reader(reader.build())
            .build();
        Self { provider, exporter }
    }

    fn meter(&self) -> Meter {
        self.provider.meter("test")
    }

    fn collect(&self) -> Vec<Reported> {
        self.exporter.reset();
        self.provider.force_flush().unwrap();
        let finished = self.exporter.get_finished_metrics().unwrap();
        let scopes = finished
            .iter()
            .flat_map(|finished| finished.scope_metrics());
        scopes
            .flat_map(|scope| scope.metrics())
            .map(Reported::of)
            .collect()
    }

    /// Returns all values that are reported under that name.
    fn values(&self, name: &str) -> Vec<u64> {
        let named = self
            .collect()
            .into_iter()
            .filter(|reported| reported.name == name);
        named
            .flat_map(|reported| reported.values.into_values())
            .collect()
    }
}

/// A worker on which everything that is counted has happened, each a different number of times.
struct Busy {
    worker: Worker,
    backend: Arc<TroubledBackend>,
}

impl Busy {
    fn new() -> Self {
        const HOUR: Duration = Duration::from_secs(60 * 60);
        // Longer than any successful lookup takes.
        const BUDGET: Duration = Duration::from_secs(3);
        let clock = ManualClock::new();
        let backend = Arc::new(TroubledBackend::default());
        let builder = WorkflowContextStorage::builder()
            .clock(clock.clone())
            .backend(Shared(backend.clone()))
            .lookup_budget(BUDGET)
            .adopt_spans(["engine"])
            .max_instances(20)
            .idle_ttl(HOUR);
        let storage = builder.build().unwrap();
        let racing = storage.clone();
        let sampler = Hooked(move |name: &str| {
            if name == "beaten" {
                racing.store("contended", context(8)).unwrap();
            }
            assert_ne!(name, "panics", "the sampler's own panic");
        });
        let worker = Worker::with_sampler(storage, true, sampler);
        let storage = &worker.storage;

        worker.run(|| {
            for number in 0..11 {
                let child = || info_span!("child", workflow.instance_id = number).in_scope(|| {});
                info_span!("engine").in_scope(child);
            }
            info_span!("engine").in_scope(|| {});
            for poll in 0..2 {
                let _poll = info_span!("poll").entered();
                for number in 0..17 {
                    let id = format!("polled {poll} {number}");
                    info_span!("step", workflow.instance_id = id).in_scope(|| {});
                }
            }
            for _ in 0..3 {
                info_span!("beaten", workflow.instance_id = "contended").in_scope(|| {});
                storage.cleanup("contended").unwrap();
            }
            for _ in 0..13 {
                info_span!("panics").in_scope(|| {});
            }
            for events in [0, 1, 1, 1, 2, 2] {
                let span = info_span!(
                    "replay",
                    workflow.instance_id = "replayed",
                    workflow.replaying = true
                );
                span.in_scope(|| (0..events).for_each(|_| info!("again")));
            }
        });
        let tracer = storage.tracer(worker.tracer());
        for _ in 0..4 {
            let late = KeyValue::new("workflow.instance_id", "late");
            tracer.start("late").set_attribute(late);
        }
        for _ in 0..5 {
            storage.get(&"x".repeat(2_000)).unwrap_err();
        }
        for id in storage.instance_ids() {
            storage.cleanup(&id).unwrap();
        }
        let store = |id: usize| storage.store(&id.to_string(), context(8)).unwrap();
        (0..9).for_each(store);
        clock.advance(2 * HOUR);
        assert_eq!(storage.stats().expired, 9);
        // The backend accepts no write, and the queue overflows.
        let mut ids = 0..;
        while storage.stats().dropped_writes < 50 {
            ids.by_ref().take(100).for_each(store);
        }
        let last = (ids.start - 1).to_string();
        for _ in 0..30 {
            assert!(storage.get(&last).unwrap().is_some());
            assert!(storage.get("unknown").unwrap().is_none());
        }
        assert!(storage.get(UNANSWERED).unwrap().is_none());
        Self { worker, backend }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.backend.release();
    }
}

/// The key whose lookup times out.
const UNANSWERED: &str = "unanswered";

/// A backend that blocks writes until it is released, and fails a few times.
#[derive(Debug, Default)]
struct TroubledBackend {
    lookups: AtomicU64,
    released: Mutex<bool>,
    release: Condvar,
}

impl TroubledBackend {
    fn release(&self) {
        *self.released.lock().unwrap() = true;
        self.release.notify_all();
    }

    fn wait_for_release(&self) {
        let released = self.released.lock().unwrap();
        drop(self.release.wait_while(released, |released| !*released));
    }
}

#[derive(Debug)]
struct Shared(Arc<TroubledBackend>);

impl StorageBackend for Shared {
    fn write(&self, writes: &[Write]) -> Result<Vec<WriteOutcome>, BackendError> {
        self.0.wait_for_release();
        Ok(vec![WriteOutcome::Done; writes.len()])
    }

    fn get(&self, key: &str) -> Result<Option<Record>, BackendError> {
        if key == UNANSWERED {
            self.0.wait_for_release();
        }
        // Never two in a row, which would open the circuit.
        match self.0.lookups.fetch_add(1, Ordering::Relaxed) {
            lookup if lookup < 16 && lookup % 2 == 0 => Err(BackendError::new("in trouble", None)),
            _ => Ok(None),
        }
    }

    fn scan(&self, _: &mut dyn FnMut(&str, Record)) -> Result<(), BackendError> {
        Ok(())
    }

    fn flush(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn malformed(&self) -> u64 {
        10
    }

    fn expired_at_open(&self) -> u64 {
        30
    }
}

/// The names that Prometheus gives the instruments: unit annotations in braces are left out, counters end in `_total`.
fn prometheus_names() -> BTreeSet<String> {
    let name = |(name, kind, ..): &(&str, Kind, &str, &[Series])| {
        let total = if *kind == Kind::Counter { "_total" } else { "" };
        name.replace('.', "_") + total
    };
    INSTRUMENTS.iter().map(name).collect()
}

/// Returns the names of metrics, and of labels, in queries.
fn named_in(queries: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = queries.split(|c| !is_part(c));
    let named = words.filter(|word| word.starts_with("workflow_context_"));
    named.map(str::to_owned).collect()
}

#[test]
fn the_dashboard_and_the_alerts_use_the_names_that_are_exported() {
    let labels = ["workflow_context_reason", "workflow_context_result"].map(str::to_owned);
    let known: BTreeSet<_> = prometheus_names().into_iter().chain(labels).collect();

    let dashboard = include_str!("../../docs/dashboards/grafana.json");
    let json: serde_json::Value = serde_json::from_str(dashboard).expect("valid JSON");
    let panels = json["panels"].as_array().expect("panels");
    let targets = (panels.iter()).flat_map(|panel| panel["targets"].as_array().expect("targets"));
    let queries: Vec<_> = targets
        .map(|target| target["expr"].as_str().expect("a query"))
        .collect();
    assert_eq!(
        named_in(&queries.join("\n")),
        known,
        "the dashboard shows everything"
    );

    let alerts = named_in(include_str!("../../docs/dashboards/alerts.yml"));
    let unknown: Vec<_> = alerts.difference(&known).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    assert!(alerts.len() > 5);
}
