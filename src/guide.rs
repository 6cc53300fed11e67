//! How to use the crate, on one page: docs/GUIDE.md.
//!
#![doc = include_str!("../docs/GUIDE.md")]
