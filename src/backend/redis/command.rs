//! The commands that read and change records, and the meaning of their replies.

use std::time::{Duration, SystemTime};

use redis::{Cmd, ToRedisArgs, Value, cmd};

use crate::backend::{Record, form};

/// The content of a value.
pub(super) enum Found {
    Nothing,
    Malformed,
    Record(Record),
}

/// The most bytes of a value that are read: more than a record has with as many links as its form has room for.
const MAX_VALUE: usize = 256 * 1024;

/// Reads the reply to [`read_value`], in either form. Nothing is also found in an empty value.
pub(super) fn found(value: &Value) -> Found {
    let record = match value {
        Value::BulkString(bytes) if bytes.is_empty() => return Found::Nothing,
        Value::BulkString(bytes) if bytes.len() <= MAX_VALUE => form::decode(bytes),
        // The error of a key that holds no string, or a long value.
        _ => None,
    };
    record.map_or(Found::Malformed, Found::Record)
}

/// Reads the replies to [`read`].
pub(super) fn found_at(value: &Value, expiry: &Value) -> Found {
    match (found(value), expiry) {
        (Found::Nothing, Value::Int(NO_KEY)) => Found::Nothing,
        (Found::Nothing, _) => Found::Malformed,
        (found, _) => found,
    }
}

/// Creates a command on a key, which every command but `SCAN` has as its first argument.
pub(super) fn on_key(name: &str, key: impl ToRedisArgs, arguments: &[u64]) -> Cmd {
    let mut command = cmd(name);
    command.arg(key).arg(arguments);
    command
}

/// Creates the two commands whose replies make a record.
pub(super) fn read(key: impl ToRedisArgs + Copy) -> [Cmd; 2] {
    [read_value(key), lifetime(key)]
}

/// Creates the command that reads a value, but no more than tells that it is too long: anybody may have put it there.
pub(super) fn read_value(key: impl ToRedisArgs) -> Cmd {
    on_key("GETRANGE", key, &[0, MAX_VALUE as u64])
}

/// Creates the command that asks how long a key is still to live.
pub(super) fn lifetime(key: impl ToRedisArgs) -> Cmd {
    on_key("PTTL", key, &[])
}

/// Creates the command that sets a key, which is to live for so long: for a millisecond at least, since the server refuses 0.
pub(super) fn set(key: &str, value: Vec<u8>, left: Duration) -> Cmd {
    let mut set = cmd("SET");
    set.arg(key).arg(value);
    set.arg("PX").arg(milliseconds(left).max(1));
    set
}

/// Creates the command that sets a key without a value, and replies with nil if it finds one.
pub(super) fn set_if_absent(key: &str, value: Vec<u8>, left: Duration) -> Cmd {
    let mut set = set(key, value, left);
    set.arg("NX");
    set
}

/// Creates the command that lets a key live for so long; with 0, it is removed.
pub(super) fn expire(key: &str, left: Duration) -> Cmd {
    on_key("PEXPIRE", key, &[milliseconds(left)])
}

/// Creates the command that waits until so many replicas have all writes of this connection, and replies with their number.
pub(super) fn wait(replicas: u32, timeout: Duration) -> Cmd {
    let mut wait = cmd("WAIT");
    // 0 would be no limit.
    wait.arg(replicas).arg(milliseconds(timeout).max(1));
    wait
}

/// The reply to `PTTL` for a key that is not there.
const NO_KEY: i64 = -2;

/// Reads the reply to `PTTL`. Returns `None` for a key without an expiry.
pub(super) fn expiry(reply: &Value, now: SystemTime) -> Option<SystemTime> {
    match *reply {
        Value::Int(ms @ 0..) => now.checked_add(Duration::from_millis(ms as u64)),
        _ => None,
    }
}

/// Milliseconds, at most a thousand years: the server adds them to its time, which must not overflow.
fn milliseconds(left: Duration) -> u64 {
    const LONGEST: u128 = 1000 * 365 * 24 * 60 * 60 * 1000;
    left.as_millis().min(LONGEST) as u64
}

/// Creates the command for one page of the keys that begin with `prefix`.
pub(super) fn scan(cursor: &[u8], prefix: &str, count: usize) -> Cmd {
    let mut scan = cmd("SCAN");
    scan.arg(cursor).arg("MATCH");
    scan.arg(format!("{}*", escape_pattern(prefix)));
    scan.arg("COUNT").arg(count);
    scan
}

/// Reads the next cursor and the keys of a reply to `SCAN`.
pub(super) fn scanned(reply: Value) -> Option<(Vec<u8>, Vec<Vec<u8>>)> {
    fn bytes(value: Value) -> Option<Vec<u8>> {
        match value {
            Value::BulkString(bytes) => Some(bytes),
            _ => None,
        }
    }
    let Value::Array(parts) = reply else {
        return None;
    };
    let [cursor, Value::Array(keys)] = <[Value; 2]>::try_from(parts).ok()? else {
        return None;
    };
    Some((
        bytes(cursor)?,
        keys.into_iter().map(bytes).collect::<Option<_>>()?,
    ))
}

/// Escapes a text for the glob patterns of `SCAN`.
fn escape_pattern(text: &str) -> String {
    let mut pattern = String::new();
    for letter in text.chars() {
        if matches!(letter, '*' | '?' | '[' | ']' | '\\') {
            pattern.push('\\');
        }
        pattern.push(letter);
    }
    pattern
}
