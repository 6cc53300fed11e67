//! The two stored forms of a [`Record`] on a server that other programs use too. Either is read, whichever is written.

use super::{codec, json, keys};
use crate::backend::Record;

/// The form of the values that a backend on a server writes. It reads both forms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// A compact form of this crate, in most cases shorter than 64 bytes.
    #[default]
    Binary,
    /// The JSON object of dapr-agents, about 280 bytes, for workers in other languages.
    ///
    /// `traceparent` and `tracestate` (or null) are those of the headers. dapr-agents also writes `instance_id`,
    /// `resumed` and `debug_info`; this crate adds `run_id`, `generation`, `recorded_at` and `expires_at` (in seconds
    /// since 1970). Only `traceparent` is required when reading. The expiry that the server has overrides `expires_at`;
    /// with neither, a context expires 24 hours after it is read.
    Json,
}

impl Form {
    pub(super) fn encode(self, key: &str, record: &Record) -> Vec<u8> {
        match self {
            Self::Binary => codec::encode(record),
            Self::Json => json::encode(keys::instance_part(key), record),
        }
    }
}

/// The forms without a server between, for the targets in `fuzz/`. No other build has them.
#[cfg(fuzzing)]
#[doc(hidden)]
impl Form {
    /// Encodes the record of a key.
    pub fn encode_value(self, key: &str, record: &Record) -> Vec<u8> {
        self.encode(key, record)
    }

    /// Decodes a value in either form.
    pub fn decode_value(value: &[u8]) -> Option<Record> {
        decode(value)
    }
}

/// Decodes a record in either form. Returns `None` for anything else.
pub(super) fn decode(bytes: &[u8]) -> Option<Record> {
    match bytes.first() {
        Some(b'{') => json::decode(bytes),
        _ => codec::decode(bytes),
    }
}
