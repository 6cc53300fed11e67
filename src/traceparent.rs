//! The traceparent of W3C Trace Context level 2: header text in, ids out, and back.
//!
//! The sections named below are those of <https://www.w3.org/TR/trace-context-2/>. `opentelemetry_sdk`'s propagator is
//! less strict, since it accepts ids of any length and with a plus sign, and drops the random flag.

use std::array;

use opentelemetry::trace::{SpanId, TraceFlags, TraceId};

/// The name of the header with the ids ("Traceparent Header", "Header Name": lower case is recommended).
pub(crate) const TRACEPARENT: &str = "traceparent";

/// The length of a version 00 value, and the minimum of any later version, in bytes ("Versioning of traceparent").
pub(crate) const TRACEPARENT_LEN: usize = 55;

/// The flags that level 2 defines: sampled (01) and random trace id (02). All others are cleared ("Other Flags").
const KNOWN_FLAGS: u8 = 0x03;

/// The offsets of the ids' digits, in groups of eight: 32 of the trace id and, after a dash, 16 of the span id.
const DIGITS_AT: [usize; 6] = [3, 11, 19, 27, 36, 44];

/// The version that is invalid ("version").
const FORBIDDEN_VERSION: u8 = 0xff;

/// The fields of a traceparent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traceparent {
    pub(crate) trace_id: TraceId,
    pub(crate) span_id: SpanId,
    pub(crate) flags: TraceFlags,
}

impl Traceparent {
    /// Creates a traceparent if both ids are valid. Unknown flags are cleared.
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

    /// Parses a header value of version 00 or a later one.
    #[inline]
    pub(crate) fn parse(value: &str) -> Result<Self, ParseContextError> {
        // Bytes, since slicing a `str` panics within a character; none of several bytes is a hex digit.
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
        // The version and the flags have two digits each; the rest of their word is padding.
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
        // The known flags make one decimal digit.
        out[54] |= self.flags.to_u8() & KNOWN_FLAGS;
        out
    }
}

/// Strips the optional whitespace of HTTP, that is spaces and tabs.
fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

// The hex codec handles eight digits at once, in the eight bytes (lanes) of a u64, with the first digit in the lowest
// lane. No addition or subtraction carries from a valid lane into the next. All words of an id go through each step
// together, so that the compiler can put two words into one vector register.

/// Returns a word with that byte in every lane.
const fn lanes(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// The gap between the digits and the letters in ASCII.
const GAP: u8 = b'a' - (b'9' + 1);

/// Decodes words of eight lower-case hex digits to four bytes each. Returns `true` with them if a lane holds anything
/// else.
fn decode<const N: usize>(words: [u64; N]) -> ([u32; N], bool) {
    let mut values = [0; N];
    let (mut wide, mut misplaced) = (0, 0);
    for (value, digits) in values.iter_mut().zip(words) {
        // Letters have bit 6 set, digits do not. The gap consists of bits of 0x3f, which is 0x40 - 0x01.
        let letters = digits & lanes(0x40);
        let gaps = (letters - (letters >> 6)) & lanes(GAP);
        let nibbles = digits.wrapping_sub(lanes(b'0')).wrapping_sub(gaps);
        // A nibble has four bits, and is ten or more (has bit 4 set when six is added) exactly in the lanes with letters.
        // A lane that borrows is sixteen or more afterwards, so its effect on the next lane cannot hide it.
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

/// Encodes words of four bytes as eight lower-case hex digits each.
fn encode<const N: usize>(words: [u32; N]) -> [u64; N] {
    let mut written = [0; N];
    for (digits, value) in written.iter_mut().zip(words) {
        // The steps of `decode` in reverse.
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

/// The error of parsing a context. No message repeats the input, which may be long and untrusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseContextError {
    /// The carrier has no `traceparent`.
    #[error("no traceparent in the carrier")]
    Missing,
    /// The carrier has more than one `traceparent`, even if they are equal.
    #[error("more than one traceparent in the carrier")]
    Duplicate,
    /// The `traceparent` is shorter than 55 bytes, or longer though its version is 00.
    #[error("traceparent is not 55 bytes long")]
    Length,
    /// A dash is missing at byte 2, 35 or 52, or at byte 55 of a longer value of a later version.
    #[error("traceparent lacks a dash between two fields")]
    Delimiter,
    /// The version, an id, or the flags contain a character other than a lower-case hex digit.
    #[error("traceparent has a character other than a lower-case hex digit")]
    Digit,
    /// The version is `ff`, which is invalid.
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
    fn every_byte_at_every_offset_is_a_digit_or_a_fault() {
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
}
