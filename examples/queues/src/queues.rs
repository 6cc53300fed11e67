//! The same work in each queue.

pub mod apalis;
pub mod awa;
pub mod graphile;
pub mod underway;
