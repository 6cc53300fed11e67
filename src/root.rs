//! The workflow's own span: a root that is allocated at the first sight of an instance, and exported once, at its end.
//!
//! [`ids`] are the two pieces in the user's provider, [`derived`] the ids that need no store. [`allocate`] asks the pieces for
//! a root. [`open`] is a root until its end is told, and [`close`] what happens then: one process claims the end in the
//! backend, sums up the parts of all, and exports the span; [`abandoned`] does so where nobody tells an end. [`state`] has what they share, and [`summary`] what `explain`
//! tells of a root.

pub(crate) mod abandoned;
pub(crate) mod allocate;
pub(crate) mod close;
#[cfg(feature = "durable-root")]
mod derived;
pub(crate) mod ids;
pub(crate) mod open;
pub(crate) mod state;
pub(crate) mod summary;
