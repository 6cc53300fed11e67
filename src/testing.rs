//! Helpers for tests: finished spans as trees, and the contract of a backend as a suite.
//!
//! A test of a workflow mostly asks one thing: did everything land in one trace, connected? Collect the spans with
//! any exporter that hands them back, such as `InMemorySpanExporter` of `opentelemetry_sdk`, and ask a
//! [`TraceForest`]. Where an assertion fails, its message holds the whole drawing.

mod backend_contract;
mod trace_forest;

pub use self::backend_contract::check_backend;
pub use self::trace_forest::TraceForest;
