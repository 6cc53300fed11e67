//! The W3C Trace Context level 2 codec: header text in, ids out, and back.
//!
//! Sections named below are those of <https://www.w3.org/TR/trace-context-2/>. The codec is stricter than
//! `opentelemetry_sdk`'s propagator, which reads ids of any length and with a plus sign, and it keeps the random flag,
//! which that one drops.

use std::array;

use opentelemetry::trace::{SpanId, TraceFlags, TraceId, TraceState};

/// Name of the header with the ids ("Traceparent Header", "Header Name": lower case is recommended).
pub(crate) const TRACEPARENT: &str = "traceparent";

/// Name of the header with the vendors' own entries ("Tracestate Header", "Header Name").
pub(crate) const TRACESTATE: &str = "tracestate";

/// Bytes of a version 00 value, and the fewest of any later version ("Versioning of traceparent").
pub(crate) const TRACEPARENT_LEN: usize = 55;

/// The flags level 2 gives a meaning, sampled (01) and random trace id (02); "Other Flags": all others are set to zero.
const KNOWN_FLAGS: u8 = 0x03;

/// Where the digits of the ids begin, eight by eight: 32 of the trace id and, behind a dash, 16 of the span id.
const DIGITS_AT: [usize; 6] = [3, 11, 19, 27, 36, 44];

/// The one version no value may have ("version").
const FORBIDDEN_VERSION: u8 = 0xff;

/// Most list members in a tracestate ("tracestate Header Field Values").
const MAX_MEMBERS: usize = 32;

/// Longest key of a list member ("Key").
const MAX_KEY_LEN: usize = 256;

/// Longest value of a list member ("Value").
const MAX_VALUE_LEN: usize = 256;

/// Longest tracestate that is looked at, all its headers together.
///
/// The specification has no such bound. 32 of the longest members and their commas make 16,447 bytes; this leaves as
/// much again for blanks and empty members, and keeps the work on a hostile header small whatever its length.
const MAX_TRACESTATE_LEN: usize = 32 * 1024;

/// What a traceparent says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traceparent {
    pub(crate) trace_id: TraceId,
    pub(crate) span_id: SpanId,
    pub(crate) flags: TraceFlags,
}

impl Traceparent {
    /// The value, if both ids are valid; flags without a meaning are dropped.
    #[inline]
    pub(crate) fn new(
        trace_id: TraceId,
        span_id: SpanId,
        flags: TraceFlags,
    ) -> Result<Self, ParseContextError> {
        if trace_id == TraceId::INVALID {
            return Err(ParseContextError::ZeroTraceId);
        }
        if span_id == SpanId::INVALID {
            return Err(ParseContextError::ZeroSpanId);
        }
        Ok(Self {
            trace_id,
            span_id,
            flags: flags & TraceFlags::new(KNOWN_FLAGS),
        })
    }

    /// Reads a header value, of this or of a later version.
    #[inline]
    pub(crate) fn parse(value: &str) -> Result<Self, ParseContextError> {
        // Bytes, not chars: a multi-byte char must not be cut in two, and none is a hex digit.
        let Some((head, extra)) = trim(value.as_bytes()).split_first_chunk::<TRACEPARENT_LEN>()
        else {
            return Err(ParseContextError::Length);
        };
        if [head[2], head[35], head[52]] != [b'-'; 3] {
            return Err(ParseContextError::Delimiter);
        }

        let mut words = [0; DIGITS_AT.len()];
        for (word, at) in words.iter_mut().zip(DIGITS_AT) {
            *word = u64::from_le_bytes(array::from_fn(|i| head[at + i]));
        }
        let (ids, bad_ids) = decode(words);
        // Version and flags have two digits each: the rest of their word is filled up.
        let ends = [head[0], head[1], head[53], head[54], b'0', b'0', b'0', b'0'];
        let ([ends], bad_ends) = decode([u64::from_le_bytes(ends)]);
        if bad_ids || bad_ends {
            return Err(ParseContextError::Digit);
        }

        let [version, flags, ..] = ends.to_le_bytes();
        match (version, extra) {
            (FORBIDDEN_VERSION, _) => return Err(ParseContextError::Version),
            (_, []) => {}
            (0, _) => return Err(ParseContextError::Length),
            (_, [b'-', ..]) => {}
            (_, _) => return Err(ParseContextError::Delimiter),
        }
        // The first byte is the lowest in a word, and the highest in an id.
        let [a, b, c, d, e, f] = ids.map(u64::from);
        let [high, low, span_id] = [a | b << 32, c | d << 32, e | f << 32].map(u64::swap_bytes);
        Self::new(
            TraceId::from(u128::from(high) << 64 | u128::from(low)),
            SpanId::from(span_id),
            TraceFlags::new(flags),
        )
    }

    /// Writes the value, as version 00, in ASCII.
    #[inline]
    pub(crate) fn write(&self) -> [u8; TRACEPARENT_LEN] {
        let (trace_id, span_id) = (self.trace_id.to_bytes(), self.span_id.to_bytes());
        let byte = |i: usize| if i < 16 { trace_id[i] } else { span_id[i - 16] };
        let word = |w: usize| u32::from_le_bytes(array::from_fn(|i| byte(4 * w + i)));

        let mut out = *b"00-................................-................-00";
        let digits = encode::<6>(array::from_fn(word));
        for (at, digits) in DIGITS_AT.into_iter().zip(digits) {
            out[at..at + 8].copy_from_slice(&digits.to_le_bytes());
        }
        // The flags with a meaning make one digit, and a decimal one.
        out[54] |= self.flags.to_u8() & KNOWN_FLAGS;
        out
    }
}

/// Reads the values of all tracestate headers, in order, as one list ("tracestate Header Field Values").
///
/// `None` if the list is empty, or bad in any place: what is left of it would be a list nobody has sent.
#[inline]
pub(crate) fn parse_tracestate(values: &[&str]) -> Option<TraceState> {
    // Nearly always.
    if values.iter().all(|value| value.is_empty()) {
        return None;
    }
    parse_members(values)
}

fn parse_members(values: &[&str]) -> Option<TraceState> {
    let length = values.iter().fold(0usize, |sum, value| {
        sum.saturating_add(value.len()).saturating_add(1)
    });
    if length > MAX_TRACESTATE_LEN {
        return None;
    }
    let mut members = Vec::new();
    for member in values.iter().flat_map(|value| value.split(',')) {
        let member = member.trim_matches([' ', '\t']);
        if !member.is_empty() {
            push_member(&mut members, member.split_once('=')?)?;
        }
    }
    if members.is_empty() {
        return None;
    }
    // Refuses some keys that level 2 allows: with two `@`, or with more than 13 characters after one.
    TraceState::from_key_value(members).ok()
}

/// Whether a list that came from elsewhere is one that [`parse_tracestate`] would have let through.
pub(crate) fn is_valid_tracestate(state: &TraceState) -> bool {
    let mut members = Vec::new();
    state
        .into_iter()
        .all(|member| push_member(&mut members, member).is_some())
}

/// Adds a list member, unless it is one too many, malformed, or its key is there already.
fn push_member<'a>(
    members: &mut Vec<(&'a str, &'a str)>,
    (key, value): (&'a str, &'a str),
) -> Option<()> {
    let valid = members.len() < MAX_MEMBERS
        && is_valid_key(key)
        && is_valid_value(value)
        && members.iter().all(|(earlier, _)| *earlier != key);
    valid.then(|| members.push((key, value)))
}

/// "Key": `( lcalpha / DIGIT ) 0*255 ( lcalpha / DIGIT / "_" / "-"/ "*" / "/" / "@" )`.
fn is_valid_key(key: &str) -> bool {
    let begins = key.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let is_key_byte = |b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'*' | b'/' | b'@');
    begins && key.len() <= MAX_KEY_LEN && key.bytes().all(is_key_byte)
}

/// "Value": 1 to 256 printable ASCII characters, without comma and equals sign, the last of them no space.
fn is_valid_value(value: &str) -> bool {
    let is_value_byte = |b| matches!(b, b' '..=b'~') && b != b',' && b != b'=';
    let ends = !value.is_empty() && !value.ends_with(' ');
    ends && value.len() <= MAX_VALUE_LEN && value.bytes().all(is_value_byte)
}

/// Without the optional whitespace of HTTP around it, that is spaces and tabs.
fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

// The hex codec takes eight digits at once. They lie in a u64 as in eight lanes of a byte each, the first digit in the
// lowest lane, and no addition or subtraction carries from one good lane into the next. Whole ids go through each step
// together, so that the compiler can put two words into one vector register.

/// The same byte in every lane.
const fn lanes(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// How much higher `a` is than it would be if the letters came right after the digits in ASCII.
const GAP: u8 = b'a' - (b'9' + 1);

/// The bytes that words of eight lower-case hex digits stand for, and whether there is anything else among the digits.
fn decode<const N: usize>(words: [u64; N]) -> ([u32; N], bool) {
    let mut values = [0; N];
    let (mut wide, mut misplaced) = (0, 0);
    for (value, digits) in values.iter_mut().zip(words) {
        // Letters have bit 6, digits do not. The gap is made of bits of 0x3f, which is 0x40 - 0x01.
        let letters = digits & lanes(0x40);
        let gaps = (letters - (letters >> 6)) & lanes(GAP);
        let nibbles = digits.wrapping_sub(lanes(b'0')).wrapping_sub(gaps);
        // A nibble has four bits, and is ten or more (has bit 4 when six is added) just where the letters are. A lane
        // that has to borrow is not below sixteen afterwards, so what it does to the next one cannot hide it.
        wide |= nibbles;
        misplaced |= nibbles.wrapping_add(lanes(6)) ^ (letters >> 2);
        // Close the gaps between the nibbles, in the order of memory: .a.b.c.d -> ab..cd.. -> abcd.
        let pairs = (nibbles << 4 | nibbles >> 8) & 0x00ff_00ff_00ff_00ff;
        let quads = (pairs | pairs >> 8) & 0x0000_ffff_0000_ffff;
        *value = (quads | quads >> 16) as u32;
    }
    let faults = (wide & lanes(0xf0)) | (misplaced & lanes(0x10));
    (values, faults != 0)
}

/// Words of four bytes each, as eight lower-case hex digits each.
fn encode<const N: usize>(words: [u32; N]) -> [u64; N] {
    let mut written = [0; N];
    for (digits, value) in written.iter_mut().zip(words) {
        // The steps of `decode`, backwards.
        let value = u64::from(value);
        let quads = (value | value << 16) & 0x0000_ffff_0000_ffff;
        let pairs = (quads | quads << 8) & 0x00ff_00ff_00ff_00ff;
        let nibbles = (pairs >> 4 | pairs << 8) & lanes(0x0f);
        let letters = (nibbles + lanes(6)) & lanes(0x10);
        let gaps = ((letters << 2) - (letters >> 4)) & lanes(GAP);
        *digits = nibbles + lanes(b'0') + gaps;
    }
    written
}

/// Why a context could not be read. None of it repeats the input, which may be long and somebody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseContextError {
    /// The carrier has no `traceparent`.
    #[error("no traceparent in the carrier")]
    Missing,
    /// The carrier has two `traceparent`s or more, even if all are alike.
    #[error("more than one traceparent in the carrier")]
    Duplicate,
    /// The `traceparent` is shorter than 55 bytes, or longer though its version is 00.
    #[error("traceparent is not 55 bytes long")]
    Length,
    /// A dash is not where it must be: at byte 2, 35 and 52, and at byte 55 of a later version that is longer.
    #[error("traceparent has no dash where one must be")]
    Delimiter,
    /// Something other than a lower-case hex digit stands in the version, an id, or the flags.
    #[error("traceparent has a character that is no lower-case hex digit")]
    Digit,
    /// The version is `ff`, which no `traceparent` may have.
    #[error("traceparent has the forbidden version ff")]
    Version,
    /// The trace id is all zeros.
    #[error("the trace id is zero")]
    ZeroTraceId,
    /// The span id, which a `traceparent` calls parent id, is all zeros.
    #[error("the span id is zero")]
    ZeroSpanId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_in_every_place_is_a_digit_or_a_fault() {
        for at in 0..8 {
            for byte in 0..=u8::MAX {
                let mut digits = *b"09afb7c3";
                digits[at] = byte;
                let ([value], fault) = decode([u64::from_le_bytes(digits)]);
                if matches!(byte, b'0'..=b'9' | b'a'..=b'f') {
                    let text = std::str::from_utf8(&digits).expect("ASCII");
                    let expected = u32::from_str_radix(text, 16).expect("hex digits");
                    assert_eq!((value.swap_bytes(), fault), (expected, false), "{text}");
                } else {
                    assert!(fault, "byte {byte:#04x} at {at}");
                }
            }
        }
    }

    #[test]
    fn every_byte_is_written_as_the_standard_library_writes_it() {
        for byte in 0..=u8::MAX {
            let bytes = [byte, !byte, byte.reverse_bits(), byte ^ 0x5a];
            let expected = format!("{:08x}", u32::from_be_bytes(bytes));
            let [digits] = encode([u32::from_le_bytes(bytes)]);
            assert_eq!(digits.to_le_bytes(), expected.as_bytes());
        }
    }

    #[test]
    fn a_tracestate_from_elsewhere_is_held_to_the_same_rules() {
        let state = |members: &[(&str, &str)]| {
            TraceState::from_key_value(members.iter().copied()).expect("lax enough")
        };
        assert!(is_valid_tracestate(&TraceState::NONE));
        assert!(is_valid_tracestate(&state(&[("a", "1"), ("t@v", " 2")])));
        for bad in [("a", ""), ("", "1"), ("a", "1 "), ("a", "ü"), ("a", "\t1")] {
            assert!(!is_valid_tracestate(&state(&[bad])), "{bad:?}");
        }
        assert!(!is_valid_tracestate(&state(&[("a", "1"), ("a", "2")])));
    }
}
