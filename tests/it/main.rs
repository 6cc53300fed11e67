//! The promises of the README and the crate's front page, each tested in one module.
//!
//! | promise | tested in |
//! |---|---|
//! | one instance is one trace; the table "What becomes of a tagged span" | `continuity` |
//! | each relation is continued as configured, or refused | `policy` |
//! | a late id, an engine span without an id: held until the id or the first child | `deferral` |
//! | presets of engines: whose fields and spans count, and whose do not | `engines`, `deferral::engines` |
//! | a replay exports nothing, and new work inside attaches to the recorded span | `replay` |
//! | a new run is a new root, a child workflow continues its parent instance | `runs` |
//! | a trace past `max_age` or `max_spans` is followed by a linked root | `bounds` |
//! | completed, idle and surplus instances are forgotten | `lifecycle` |
//! | memory is bounded in bytes too | `bytes` |
//! | two threads open the first span at once: the first recorded wins | `concurrency` |
//! | store, get, cleanup, `create_resumed`, ids and stats | `explicit_api` |
//! | parsing and injecting strictly by W3C Trace Context level 2 | `propagation` |
//! | `explain` says why a trace is broken | `explain` |
//! | filters, other layers, reload, two subscribers | `stacking` |
//! | ids of any type, size and content; nothing is stored beyond the limit | `hostile` |
//! | hostile headers, values, files, replies and programs of spans | `fuzzed` |
//! | what becomes of the first span of an instance: requests, pollers, many instances in one trace | `first_spans` |
//! | a panic in a sampler, processor or exporter costs one span | `panics` |
//! | docs/SECURITY.md: what a client, a guessed id and a writer of the store can do | `security` |
//! | random sequences of span operations match the documented behaviour | `model` |
//! | workers that share a backend agree; a slow or failing backend costs continuity only | `shared` |
//! | a record in a backend lives as long as its instance is used | `refresh` |
//! | what a backend has lost is given back, and the end of an instance reaches all workers | `given_back` |
//! | clocks that differ, and one that is set forward | `clocks` |
//! | what another version or program has stored is left alone | `upgrade` |
//! | a backend that answers too late or not at all: all workers of a run agree in the end | `misses` |
//! | every `StorageBackend` fulfils the written contract | `store_contract` |
//! | `peek` starts nothing, and replays are hidden from logs by `log_filter` | `logs` |
//! | a span with `workflow.observing` is not moved, and records nothing | `observing` |
//! | what docs/GUIDE.md quotes of `explain`, each symptom provoked | `symptoms` |
//! | the recipes of docs/GUIDE.md: logs, requests, child processes, messages | `recipes` |
//! | feature `durable-root`: a workflow is one root, whole, exported once | `durable_root` |
//! | feature `redb`: contexts survive the process | `restart` |
//! | feature `redis`, `redis-tls`: contexts on a server or Cluster that many machines share | `redis` |
//! | feature `postgres`, `postgres-tls`: contexts in a table that many machines share, behind a pooler too | `postgres` |
//! | agents of dapr-agents in Python share Redis and PostgreSQL (`scripts/dapr-agents`) | `dapr_agents` |
//! | `examples/inspect.rs` shows what is in a store | `inspect` |
//! | feature `metrics`: the counters as OpenTelemetry metrics | `metrics` |
//! | `tracer_provider` decorates a whole provider | `tracer_provider` |
//! | feature `testing`: `TraceForest` draws and asserts | `trace_forest` |
//!
//! Promises about a whole process have binaries of their own: `global` (the process-wide storage and tracer provider),
//! `global_provider` (a decorated tracer provider as the process-wide one),
//! `warnings` (what is logged, and how often), `allocations` and `churn` (counting allocators), and `reentrance` (a
//! global subscriber).

#[path = "../support/mod.rs"]
mod support;

mod bounds;
mod bytes;
mod clocks;
mod concurrency;
mod continuity;
#[cfg(all(feature = "postgres", feature = "redis"))]
mod dapr_agents;
mod deferral;
#[cfg(feature = "durable-root")]
mod durable_root;
mod engines;
mod explain;
mod explicit_api;
mod first_spans;
mod fuzzed;
mod given_back;
mod hostile;
#[cfg(all(feature = "postgres", feature = "redb", feature = "redis"))]
mod inspect;
mod lifecycle;
mod logs;
#[cfg(feature = "metrics")]
mod metrics;
mod misses;
mod model;
mod observing;
mod panics;
mod policy;
#[cfg(feature = "postgres")]
mod postgres;
mod propagation;
mod recipes;
#[cfg(feature = "redis")]
mod redis;
mod refresh;
mod replay;
#[cfg(feature = "redb")]
mod restart;
mod runs;
mod security;
mod shared;
mod stacking;
mod store_contract;
mod symptoms;
mod trace_forest;
mod tracer_provider;
mod upgrade;
