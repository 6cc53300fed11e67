//! A `tracing` Layer that keeps one durable workflow instance in one OpenTelemetry trace: across tasks, threads,
//! processes, crashes and replays.
//!
//! A durable-workflow engine runs one workflow as many short executions, and hands over its inputs between them, but
//! not the trace context. Each execution therefore begins a trace of its own. With this layer the first span that
//! names an instance is recorded, and every later one of that instance continues its trace, wherever it runs.
//!
//! ```toml
//! [dependencies]
//! opentelemetry = "0.33"
//! opentelemetry_sdk = { version = "0.33", features = ["testing"] } # "testing" for the exporter of this example
//! tracing = "0.1"
//! tracing-subscriber = "0.3"
//! tracing-workflow-context = "0.1"
//! ```
//!
//! ```
//! use opentelemetry::trace::TracerProvider as _;
//! use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
//! use tracing_subscriber::prelude::*;
//! use tracing_workflow_context::WorkflowContextStorage;
//!
//! #[tracing::instrument(fields(workflow.instance_id = %order))]
//! fn charge_card(order: &str) {}
//!
//! #[tracing::instrument(fields(workflow.instance_id = %order))]
//! fn ship(order: &str) {}
//!
//! let exporter = InMemorySpanExporter::default();
//! let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
//!
//! // This layer stands where `tracing_opentelemetry::layer().with_tracer(tracer)` stood.
//! let storage = WorkflowContextStorage::new();
//! let layer = storage.layer(provider.tracer("orders"));
//! tracing_subscriber::registry().with(layer).init();
//!
//! charge_card("order-42");
//! std::thread::spawn(|| ship("order-42")).join().unwrap();
//!
//! let spans = exporter.get_finished_spans()?;
//! assert_eq!(spans[0].span_context.trace_id(), spans[1].span_context.trace_id());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The [`guide`](https://docs.rs/tracing-workflow-context/latest/tracing_workflow_context/guide/index.html) has recipes, tests and
//! symptoms on one page.
//!
//! # How it works
//!
//! The layer wraps the OpenTelemetry layer, and the tracer in it wraps yours. tracing-opentelemetry asks the tracer for a
//! span at the moment when it really starts: only then are its fields and its natural parent known. There the instance
//! is looked up, in memory and then in the backend, one decision is taken (its table is at [`Relation`]), and the first
//! span of an instance is recorded. A span that is entered before anybody knows its instance is held until then.
//!
//! # Concepts
//!
//! - An **instance** is one execution of a workflow from start to end, named by a field of its spans. Ids are compared by
//!   their formatted value: `order`, `%order`, and `?order` without its quotes name the same instance, and so do
//!   `Some(order)` and `?Some(order)`. An empty text and `None`, in whatever form, name none. The calls of the explicit API
//!   read ids by the same rule.
//! - [`WorkflowContextStorage`] keeps one [`WorkflowContext`] for each instance. It is a cheap handle with an
//!   [explicit API](WorkflowContextStorage::store) beside the layer, and there is a
//!   [process-wide default](WorkflowContextStorage::global) with four free functions.
//! - [`WorkflowContextLayer`] is the OpenTelemetry layer, extended. Spans that are made through the OpenTelemetry API
//!   alone go through a [`WorkflowTracer`]; a [`WorkflowTracerProvider`] has such tracers only, and may be the global one.
//! - A [`Relation`] says how a span relates to the stored context, and a [`Continuation`] what is done; the defaults are
//!   in one table, and each can be overridden.
//!
//! # Reserved fields
//!
//! | field | on | meaning |
//! |---|---|---|
//! | `workflow.instance_id` | a span | its instance; of several such fields the first in the order of [`instance_id_fields`](WorkflowContextStorageBuilder::instance_id_fields) counts |
//! | `workflow.run_id` | a span | the run of that instance, for engines that use an id again: each run has a trace of its own |
//! | `workflow.parent_instance_id` | the first span of an instance | the instance that started it, whose trace it continues |
//! | `workflow.replaying` | a span | `true`: the code has run before, and nothing is exported. As the span starts; if it is recorded after the start, for what opens beneath |
//! | `workflow.observing` | a span | `true`: it only looks at the instance, as the handler of a status request does. It stays where it is, with a link to the instance's context, and records, ends and adopts nothing. As the span starts |
//! | `workflow.status` | a span or an event in it | `completed`, `success`, `failed`, `failure`, `error`, `terminated`, `canceled`, `cancelled`, `cancellation`, `timed_out` or `timeout`, in any letter case, alone or as in `Failed { .. }` and `Failed(..)`: the instance is complete |
//! | `workflow.resumed` | written | on the first span in this process whose context another process recorded, and on a resumed agent's |
//! | `workflow.resumed_after` | written | beside it, the seconds since that recording |
//! | `workflow.relation` | written on links | the [`Relation`] that is the reason of the link |
//! | `workflow.generation` | written | on the first span of a second, third, ... trace of an instance |
//! | `agent.name`, `gen_ai.agent.name` | written | on the span of a resumed agent |
//!
//! [Engines](Engine) and [the builder](WorkflowContextStorageBuilder) give the fields that are read other names. A name has
//! one meaning: the builder refuses a second one. An engine's name that is a common word, such as `job.id`, counts only on
//! spans of the engine's own target, and the ids of a job queue get a prefix: `graphile:7`.
//!
//! # What happens when
//!
//! - **A span is nested in its instance's trace already**: it stays where it is. Local nesting always wins.
//! - **A span comes out of another trace**, such as an HTTP request's: it continues the instance's trace, with a link to
//!   where it came from. The first span of an instance keeps the request as its parent.
//! - **A worker has one span around its loop**: name it in
//!   [`poller_spans`](WorkflowContextStorageBuilder::poller_spans). A poller's trace never becomes an instance's. One that
//!   is not named is found out: [`shared_traces`](Stats::shared_traces), a warning, and `explain`.
//! - **The id is recorded late**: a span that declares the field as `Empty`, or as the text `""`, is held until the id is
//!   recorded, over exits and awaits, or until its first child opens, its 129th event, or its close. A run id and a parent
//!   instance id that it declares without a value are waited for as well; a span whose own id is known does not wait. What is
//!   recorded after that only leaves a link, and is counted in [`late`](Stats::late): an id, a run id, a parent instance id,
//!   a second id.
//! - **The engine opens a span around user code without an id**: a span named in an [`Engine`] preset or by
//!   [`adopt_spans`](WorkflowContextStorageBuilder::adopt_spans) is held until its first child, and joins the child's
//!   instance. A child that waits for its own id is held with it, and so is a second span of the engine: all start together,
//!   outermost first, once the instance is known. A span with a run id that was opened elsewhere and is entered in it counts as
//!   a child does; with a backend, any tagged span.
//! - **A span is held**: `tracing::Span::current().context()` and [`WorkflowContext::current`] start it at once, but
//!   `opentelemetry::Context::current()` does not see it yet. Code that injects headers by the latter directly within such
//!   a span, before any child, sends the outer context; and a context attached by hand there is beneath the span
//!   once that starts. The child that starts it sees what was attached, such as baggage. [`WorkflowContext::peek`] starts
//!   nothing, for log formatters. Ordinary spans are never held.
//! - **Only the orchestrator's span has `workflow.replaying`**: spans within it without the field count as replayed until
//!   it records `false`, also beneath a context that is attached by hand, or set by `set_parent`. If the engine's flag flips
//!   in the middle of a turn, set it on each span. Spans of the OpenTelemetry API are judged by their parent there alone.
//! - **`workflow.replaying` is recorded in the body**: it counts from then on. A span that is held for its id and declares
//!   the flag as `Empty` waits for both, in either order. One that has started stays real, whatever it records, and `true`
//!   concerns what opens beneath, until `false`.
//! - **The engine runs code again in a span of its own that is new**: name its flag in
//!   [`replay_children_field`](WorkflowContextStorageBuilder::replay_children_field). That span is exported, and what opens
//!   beneath it is not as long as the flag is `true`. A span beneath with such a flag of its own is judged by that alone.
//! - **A replayed span tells an event**: it is dropped and counted in [`replayed_events`](Stats::replayed_events). After the
//!   replay is over, a warning or an error becomes an event of the next real span beneath, with its own time: at most 16
//!   wait for that, and what is left at the end of the replayed spans is counted too. So are events of the OpenTelemetry API,
//!   which have no level. Layers that log see all of it; [`log_filter`](WorkflowContextStorage::log_filter) hides it from them.
//! - **Two threads open the first span of an instance at once**: the first one recorded wins, the other is linked to it.
//! - **An id is used again**: within the grace after its end it is the finished instance, unless its spans have a
//!   `workflow.run_id`; `explain` shows "joined after its end".
//! - **A timer is longer than [`idle_ttl`](WorkflowContextStorageBuilder::idle_ttl)** (24 hours): without a backend that still
//!   knows the instance, its next span begins a new trace, unlinked.
//! - **An instance is forgotten**, because it was idle, completed, evicted or cleaned up: its next span is recorded anew.
//!   [`stats`](WorkflowContextStorage::stats) counts each cause, and [`explain`](WorkflowContextStorage::explain) names it.
//! - **The process restarts, or another machine continues**: a [backend](WorkflowContextStorageBuilder::backend) still has
//!   the contexts. Without one, hand them over by [`traceparent`](WorkflowContext::traceparent) and
//!   [`parse`](WorkflowContext::parse), or [resume](WorkflowContextStorage::create_resumed).
//! - **Another worker ends the instance**, or removes it: a worker that has it in memory too follows within three quarters of the
//!   [`completed_grace`](WorkflowContextStorageBuilder::completed_grace), 3 minutes 45 seconds by default.
//! - **The backend loses what it had**, by eviction, a failover or an operator: a worker that still has it gives it back as soon
//!   ([`given_back`](Stats::given_back)), and follows one that has recorded the instance anew meanwhile
//!   ([`conflicts`](Stats::conflicts)).
//! - **A newer version, or another program, has stored something else**: it is left alone and counted
//!   ([`malformed`](Stats::malformed)), and the next flush tells that a context has no place.
//! - **The backend does not answer**: a span waits for it no longer than the
//!   [`lookup_budget`](WorkflowContextStorageBuilder::lookup_budget) of 50 ms, or once the
//!   [`connect_budget`](WorkflowContextStorageBuilder::connect_budget) of 250 ms, which `stats` counts in
//!   [`lookup_timeouts`](Stats::lookup_timeouts), and is recorded anew; writes are queued. Once the answer comes, the instance
//!   follows the older record, and a span still open is linked to it ([`conflicts`](Stats::conflicts)). If one node of several
//!   is down, this concerns the instances there only.
//! - **Something has to be told**: each cause is logged as a warning once, then at most once a minute with a number, all under the
//!   target `tracing-workflow-context`.
//! - **A sampler, id generator, span processor or exporter panics** while a span starts or ends: that span is lost, the panic is
//!   caught and counted in [`panics`](Stats::panics), and what is opened beneath continues the parent's trace.
//! - **The layer's filter hides a span**: it is neither recorded nor continued, as if it were not there.
//! - **The sampler drops the first span**: it is recorded as unsampled, and a parent-based sampler drops the rest.
//!
//! # Features
//!
//! None is on by default, and each only adds to the API.
//!
//! - `testing`: [`testing::TraceForest`](https://docs.rs/tracing-workflow-context/latest/tracing_workflow_context/testing/struct.TraceForest.html),
//!   finished spans as trees to look at and to assert on. Adds `opentelemetry_sdk`.
//! - `metrics`: the counters of a storage as OpenTelemetry metrics.
//! - `durable-root`: [a span of its own for each workflow](#the-workflows-own-span). Adds `opentelemetry_sdk` and `sha2`.
//! - `redb`: [`RedbBackend`](https://docs.rs/tracing-workflow-context/latest/tracing_workflow_context/struct.RedbBackend.html),
//!   contexts in a file that survives restarts. Adds `redb`, which needs Rust 1.90.
//! - `redis`: [`RedisBackend`](https://docs.rs/tracing-workflow-context/latest/tracing_workflow_context/struct.RedisBackend.html),
//!   contexts on a Redis or Valkey server that many machines share: a single one, with sentinels, or a Cluster. Adds
//!   `redis` and `serde_json`.
//! - `redis-tls`: the same by TLS. Adds `rustls` and `ring`, which needs a C compiler.
//! - `postgres`: [`PostgresBackend`](https://docs.rs/tracing-workflow-context/latest/tracing_workflow_context/struct.PostgresBackend.html),
//!   contexts in a table of a PostgreSQL database that many machines share, also behind PgBouncer. Adds `tokio-postgres`,
//!   `tokio`, `futures-util` and `serde_json`; the runtime is the backend's own.
//! - `postgres-tls`: the same by TLS. Adds `tokio-postgres-rustls`, `rustls`, `rustls-native-certs` and `ring`.
//!
//! # The workflow's own span
//!
//! With the feature `durable-root`, the root of a trace is not the first step, but a span that lasts as long as the workflow:
//!
//! ```
//! # #[cfg(feature = "durable-root")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use opentelemetry::trace::TracerProvider as _;
//! use opentelemetry_sdk::trace::{InMemorySpanExporter, Sampler, SdkTracerProvider};
//! use tracing_subscriber::prelude::*;
//! use tracing_workflow_context::WorkflowContextStorage;
//!
//! let storage = WorkflowContextStorage::builder().durable_root(true).build()?;
//! let exporter = InMemorySpanExporter::default();
//! let provider = SdkTracerProvider::builder()
//!     .with_id_generator(storage.id_generator())
//!     .with_sampler(storage.sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn))))
//!     .with_simple_exporter(exporter.clone())
//!     .build();
//! tracing_subscriber::registry().with(storage.layer(provider.tracer("orders"))).init();
//!
//! tracing::info_span!("charge", workflow.instance_id = "order-42", workflow.name = "order").in_scope(|| {});
//! tracing::info_span!("ship", workflow.instance_id = "order-42").in_scope(|| {});
//! storage.complete("order-42", "completed")?;
//!
//! let spans = exporter.get_finished_spans()?;
//! assert_eq!(spans[2].name, "order");
//! assert_eq!(spans[0].parent_span_id, spans[2].span_context.span_id());
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "durable-root"))]
//! # fn main() {}
//! ```
//!
//! It is allocated when the instance is first seen, and named by the field `workflow.name`, or else as the first span is.
//! Whether it is sampled is decided then, once. It is exported when the end is told, as soon as no span of the instance is open
//! in that process: by a terminal `workflow.status`, by [`complete`](WorkflowContextStorage::complete) or
//! [`cleanup`](WorkflowContextStorage::cleanup), or by the close of one of the
//! [`completing_spans`](WorkflowContextStorageBuilder::completing_spans). Its attributes are `workflow.instance_id`,
//! `workflow.run_id`, `workflow.status`, `workflow.generation`, and the numbers `workflow.spans` (those of the instance that have
//! ended), `workflow.processes` and `workflow.resumes`, with an event `resumed` for each of the first 32 hand-overs. It has the
//! status of an error if the workflow failed, timed out or was terminated.
//!
//! - With a backend, one process claims the end there: the root is exported exactly once, and at most once if that process
//!   dies between its claim and the export.
//! - A new run or generation ends the root of the one before, with the status `continued`; each is linked to the other.
//! - An instance that memory forgets, and that the backend no longer has, was `abandoned`: its root ends with its last span. That
//!   of an instance whose processes have all died is exported by a process that uses the same backend: four times in an idle time
//!   one of them scans the backend, once it has opened a root itself. Nobody does if that takes longer than seven idle times.
//! - Two processes that open an instance at the same moment may allocate two roots. The loser's is exported as `superseded`,
//!   linked to the winner's. `write_through` and derived ids leave one.
//! - A context stored by a call has no root.
//! - [`exported_roots`](Stats::exported_roots) and [`lost_roots`](Stats::lost_roots) count.
//!
//! A root comes last, when the workflow has ended:
//!
//! | where | until then | what to do |
//! |---|---|---|
//! | Jaeger | the spans stand side by side, with the warning "invalid parent span IDs" | nothing; it goes once the root is there |
//! | Tempo | the search shows `<root span not yet received>` and no name; structural TraceQL operators such as `>>` find nothing | search by `span.workflow.instance_id`, or for `span.workflow.pending` with [`start_marker`](WorkflowContextStorageBuilder::start_marker) |
//! | Phoenix, and any table of root spans alone | the trace is not listed | show all spans, or filter by `workflow.instance_id` |
//! | the Collector's `tail_sampling` | decides `decision_wait` (30 s) after the first span, so no policy sees the root of a longer workflow | decide at the head by the sampler given to [`sampler`](WorkflowContextStorage::sampler), or by what each span has; set `decision_cache.sampled_cache_size`, so that late spans and the root follow the decision |
//!
//! # Limits
//!
//! - A subscriber can have one OpenTelemetry layer, this one included.
//! - An attribute that `OpenTelemetrySpanExt::set_attribute` adds before the span starts tags it only if the span declares
//!   a reserved field; `tracing` itself records declared fields only.
//! - Beside the latest run of an instance, eight older ones are kept for their late spans.
//! - An instance id has at most [`MAX_INSTANCE_ID_BYTES`]; a longer one is counted, and its span is not tagged.

// In the library only: examples and benches print.
#![warn(clippy::print_stdout)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod backend;
mod cache;
mod caught;
mod clock;
mod context;
mod decision;
mod error;
mod explain;
mod fields;
// The blocks of the page need these features.
#[cfg(any(
    not(doctest),
    all(feature = "durable-root", feature = "redb", feature = "testing")
))]
pub mod guide;
mod layer;
mod lock;
#[cfg(feature = "metrics")]
mod metrics;
mod own_spans;
mod peek;
mod root;
mod scoped;
mod stats;
mod storage;
#[cfg(feature = "testing")]
pub mod testing;
mod traceparent;
mod tracer;
mod tracestate;
mod warnings;

#[cfg(any(feature = "postgres", feature = "redis"))]
pub use backend::form::Form;
pub use backend::memory::MemoryBackend;
#[cfg(feature = "postgres")]
pub use backend::postgres::PostgresBackend;
#[cfg(feature = "redb")]
pub use backend::redb::{OpenError, RedbBackend, RedbSync};
#[cfg(feature = "redis")]
pub use backend::redis::RedisBackend;
#[cfg(any(feature = "postgres", feature = "redis"))]
pub use backend::url::ConnectError;
pub use clock::Clock;
pub use context::WorkflowContext;
pub use decision::relation::{Continuation, Relation};
pub use error::{
    BuildError, CreateResumedError, InvalidInstanceId, MAX_INSTANCE_ID_BYTES, StorageError,
};
pub use explain::{Absence, Explanation};
pub use fields::engine::Engine;
pub use layer::WorkflowContextLayer;
#[cfg(feature = "durable-root")]
pub use root::ids::{WorkflowIdGenerator, WorkflowSampler};
pub use stats::Stats;
pub use storage::WorkflowContextStorage;
pub use storage::builder::WorkflowContextStorageBuilder;
pub use storage::global::{
    cleanup_workflow_context, get_context_storage_stats, get_workflow_context,
    store_workflow_context,
};
pub use traceparent::ParseContextError;
pub use tracer::{WorkflowSpan, WorkflowTracer, WorkflowTracerProvider};
pub use tracing_opentelemetry;
pub use tracing_opentelemetry::OpenTelemetrySpanExt;

#[cfg(all(doctest, feature = "testing"))]
#[doc = include_str!("../README.md")]
struct ReadMeDoctests;

#[cfg(doctest)]
#[doc = include_str!("../docs/ENGINES.md")]
struct EnginesDoctests;
