//! The promises of the README and the crate's front page, a module for each.

#[path = "../support/mod.rs"]
mod support;

mod bounds;
mod concurrency;
mod continuity;
mod deferral;
mod explain;
mod explicit_api;
mod hostile;
mod lifecycle;
#[cfg(feature = "metrics")]
mod metrics;
mod model;
mod policy;
mod propagation;
#[cfg(feature = "redis")]
mod redis;
mod replay;
#[cfg(feature = "redb")]
mod restart;
mod runs;
mod shared;
mod stacking;
mod store_contract;
mod trace_forest;
