//! Helpers for tests: finished spans as trees, and the contract of a backend as a suite of checks.
//!
//! Most tests of a workflow assert that all spans are in one trace, and connected. Collect the spans with an exporter
//! such as `InMemorySpanExporter` of `opentelemetry_sdk`, and arrange them as a [`TraceForest`]. If an assertion fails,
//! its message has the whole drawing.

mod backend_contract;
mod trace_forest;

pub use self::backend_contract::check_backend;
pub use self::trace_forest::TraceForest;
