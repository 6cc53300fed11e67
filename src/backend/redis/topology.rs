//! The topology of a Cluster as its servers report it: the replies to `CLUSTER SLOTS`, redirections, and the hash slot of
//! a key.

use redis::Value;

pub(super) const SLOTS: u16 = 16 * 1024;

/// A range of slots, and the address of their master.
pub(super) struct SlotRange {
    pub(super) first: u16,
    pub(super) last: u16,
    pub(super) host: String,
    pub(super) port: u16,
}

/// Reads the reply to `CLUSTER SLOTS`, without replicas. `asked` is the host that has replied. Returns `None` if the reply
/// is malformed or has no range.
pub(super) fn slot_ranges(reply: Value, asked: &str) -> Option<Vec<SlotRange>> {
    let Value::Array(ranges) = reply else {
        return None;
    };
    let ranges: Vec<_> = ranges
        .into_iter()
        .map(|range| slot_range(range, asked))
        .collect::<Option<_>>()?;
    (!ranges.is_empty()).then_some(ranges)
}

fn slot_range(range: Value, asked: &str) -> Option<SlotRange> {
    let Value::Array(range) = range else {
        return None;
    };
    let mut parts = range.into_iter();
    let first = number(parts.next()?)?;
    let last = number(parts.next()?)?;
    let Value::Array(master) = parts.next()? else {
        return None;
    };
    let mut master = master.into_iter();
    let host = match master.next()? {
        Value::BulkString(host) => String::from_utf8(host).ok()?,
        Value::SimpleString(host) => host,
        Value::Nil => String::new(),
        _ => return None,
    };
    let port = number(master.next()?)?;
    (first <= last && last < SLOTS).then_some(SlotRange {
        first,
        last,
        host: known_host(&host, asked).to_owned(),
        port,
    })
}

fn number(value: Value) -> Option<u16> {
    match value {
        Value::Int(number) => u16::try_from(number).ok(),
        _ => None,
    }
}

/// Replaces the host of a server that does not know its own name by the one under which it was asked.
fn known_host<'a>(host: &'a str, asked: &'a str) -> &'a str {
    match host {
        "" | "?" => asked,
        host => host,
    }
}

/// Reads the slot and the address of a `MOVED` or `ASK` error, as in `3999 127.0.0.1:6381`. `asked` is the host that has
/// replied.
pub(super) fn redirection<'a>(detail: &'a str, asked: &'a str) -> Option<(u16, &'a str, u16)> {
    let (slot, address) = detail.split_once(' ')?;
    let (host, port) = address.trim_end().rsplit_once(':')?;
    let slot = slot.parse().ok().filter(|slot| *slot < SLOTS)?;
    Some((slot, known_host(host, asked), port.parse().ok()?))
}

/// Returns the hash slot of a key: that of the text between its first opening brace and the next closing one, if it is
/// not empty, else of the whole key.
pub(super) fn slot(key: &[u8]) -> u16 {
    let tag = || {
        let start = key.iter().position(|&byte| byte == b'{')? + 1;
        let length = key[start..].iter().position(|&byte| byte == b'}')?;
        (length > 0).then(|| &key[start..start + length])
    };
    crc16(tag().unwrap_or(key)) % SLOTS
}

/// CRC-16/XMODEM.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, &byte| {
        (0..8).fold(crc ^ (u16::from(byte) << 8), |crc, _| match crc >> 15 {
            0 => crc << 1,
            _ => (crc << 1) ^ 0x1021,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_server() {
        // From `CLUSTER KEYSLOT`.
        for (key, expected) in [
            ("123456789", 0x31c3),
            ("", 0),
            ("foo", 12182),
            ("{foo}bar", 12182),
            ("a{foo}{bar}", 12182),
            ("foo{}{bar}", 8363),
        ] {
            assert_eq!(slot(key.as_bytes()), expected % SLOTS, "{key:?}");
        }
    }

    #[test]
    fn a_malformed_list_of_slots_is_none() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let range = |first, last, host: Value, port| {
            let master = Value::Array(vec![host, Value::Int(port), text("id")]);
            Value::Array(vec![Value::Int(first), Value::Int(last), master])
        };
        let wrong = [
            Value::Nil,
            Value::Array(Vec::new()),
            Value::Array(vec![Value::Array(Vec::new())]),
            Value::Array(vec![Value::Array(vec![Value::Int(0), Value::Int(1)])]),
            Value::Array(vec![range(2, 1, text("host"), 1)]),
            Value::Array(vec![range(0, 16384, text("host"), 1)]),
            Value::Array(vec![range(-1, 1, text("host"), 1)]),
            Value::Array(vec![range(0, 1, text("host"), 65536)]),
            Value::Array(vec![range(0, 1, Value::Int(1), 1)]),
            Value::Array(vec![range(0, 1, Value::BulkString(vec![255]), 1)]),
        ];
        for reply in wrong {
            assert!(slot_ranges(reply.clone(), "").is_none(), "{reply:?}");
        }
        let hosts = [text("host"), text("?"), text(""), Value::Nil]
            .map(|host| slot_ranges(Value::Array(vec![range(0, 16383, host, 1)]), "asked"));
        let hosts = hosts.map(|ranges| ranges.expect("a range").remove(0).host);
        assert_eq!(hosts, ["host", "asked", "asked", "asked"]);
    }

    #[test]
    fn a_malformed_redirection_is_none() {
        for (detail, expected) in [
            ("3999 127.0.0.1:6381", Some((3999, "127.0.0.1", 6381))),
            ("16383 ::1:6381", Some((16383, "::1", 6381))),
            ("0 :6381", Some((0, "asked", 6381))),
            ("0 ?:6381", Some((0, "asked", 6381))),
            ("16384 host:6381", None),
            ("-1 host:6381", None),
            ("0 host:65536", None),
            ("0 host", None),
            ("0", None),
            ("", None),
        ] {
            assert_eq!(redirection(detail, "asked"), expected, "{detail:?}");
        }
    }
}
