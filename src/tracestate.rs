//! The tracestate of W3C Trace Context level 2: header text in, a list of members out, and back.
//!
//! The sections named below are those of <https://www.w3.org/TR/trace-context-2/>.

use opentelemetry::trace::TraceState;

/// The name of the header with vendor-specific entries ("Tracestate Header", "Header Name").
pub(crate) const TRACESTATE: &str = "tracestate";

/// The maximum number of list members in a tracestate ("tracestate Header Field Values").
const MAX_MEMBERS: usize = 32;

/// The maximum length of a list member's key ("Key").
const MAX_KEY_LEN: usize = 256;

/// The maximum length of a list member's value ("Value").
const MAX_VALUE_LEN: usize = 256;

/// The length from which on a member is dropped before others ("tracestate Limits").
const LONG_MEMBER: usize = 128;

/// The maximum length of a tracestate that is parsed, all its headers together.
///
/// The specification has no such bound. 32 members of maximum length and their commas make 16,447 bytes; this leaves as
/// much again for blanks and empty members, and bounds the work on a hostile header.
const MAX_TRACESTATE_LEN: usize = 32 * 1024;

/// A valid tracestate, which is not empty.
///
/// OpenTelemetry's type refuses some keys that level 2 allows: with two `@`, with more than 13 characters after one, or with
/// another sign right after one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tracestate {
    /// The members that OpenTelemetry's type takes: nearly always all of them.
    otel: TraceState,
    /// The header with all members, if that type refuses one.
    whole: Option<Box<str>>,
}

impl Tracestate {
    /// Parses the values of all tracestate headers, in order, as one list ("tracestate Header Field Values").
    ///
    /// A key that is there twice stays: its sender broke a rule, but only vendors of the key can tell which value they mean
    /// ("Mutating the tracestate Field").
    ///
    /// `None` if the list is empty or any part of it is invalid: a part of a list was sent by nobody.
    #[inline]
    pub(crate) fn parse(values: &[&str]) -> Option<Self> {
        // The common case.
        if values.iter().all(|value| value.is_empty()) {
            return None;
        }
        Self::parse_members(values)
    }

    fn parse_members(values: &[&str]) -> Option<Self> {
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
                let member = member.split_once('=')?;
                if members.len() == MAX_MEMBERS || !is_valid_member(member) {
                    return None;
                }
                members.push(member);
            }
        }
        Self::from_members(&members)
    }

    /// Copies the tracestate of a span context; `None` if it is empty, or [`parse`](Self::parse) would refuse it.
    pub(crate) fn from_otel(otel: &TraceState) -> Option<Self> {
        let mut members = otel.into_iter();
        members.next()?;
        // The type holds 32 members at most.
        otel.into_iter().all(is_valid_member).then(|| Self {
            otel: otel.clone(),
            whole: None,
        })
    }

    /// `None` if there are no members.
    fn from_members(members: &[(&str, &str)]) -> Option<Self> {
        if members.is_empty() {
            return None;
        }
        if let Ok(otel) = TraceState::from_key_value(members.iter().copied()) {
            return Some(Self { otel, whole: None });
        }
        let is_taken = |member: &(&str, &str)| TraceState::from_key_value([*member]).is_ok();
        let taken = members.iter().copied().filter(is_taken);
        let texts = members.iter().map(|(key, value)| format!("{key}={value}"));
        Some(Self {
            otel: TraceState::from_key_value(taken).unwrap_or_default(),
            whole: Some(texts.collect::<Vec<_>>().join(",").into()),
        })
    }

    /// Returns the members that OpenTelemetry's type takes.
    pub(crate) fn otel(&self) -> &TraceState {
        &self.otel
    }

    /// Returns `true` if OpenTelemetry's type refuses a member.
    pub(crate) fn exceeds_otel(&self) -> bool {
        self.whole.is_some()
    }

    /// Returns the value of a header with all members, without blanks around them.
    pub(crate) fn header(&self) -> String {
        match &self.whole {
            Some(whole) => whole.to_string(),
            None => self.otel.header(),
        }
    }

    fn members(&self) -> impl Iterator<Item = (&str, &str)> {
        let whole = self.whole.iter().flat_map(|whole| whole.split(','));
        let otel = self.whole.is_none().then(|| self.otel.into_iter());
        whole
            .filter_map(|member| member.split_once('='))
            .chain(otel.into_iter().flatten())
    }

    /// Returns about how many bytes it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        let whole = self.whole.as_ref().map_or(0, |whole| whole.len());
        size_of_val(&self.whole) + whole + otel_bytes(&self.otel)
    }

    /// Returns `true` if a header of that many bytes has room for it.
    pub(crate) fn fits(&self, most: usize) -> bool {
        is_short(self.members(), most)
    }

    /// Returns it without its long members, and without the last ones, as far as a header of that many bytes needs it
    /// ("tracestate Limits"); `None` if nothing is left.
    #[inline(never)]
    pub(crate) fn shortened(&self, most: usize) -> Option<Self> {
        let mut members: Vec<_> = self.members().collect();
        if !is_short(members.iter().copied(), most) {
            members.retain(|member| length(member) <= LONG_MEMBER);
        }
        while !is_short(members.iter().copied(), most) {
            members.pop();
        }
        Self::from_members(&members)
    }
}

fn length((key, value): &(&str, &str)) -> usize {
    key.len() + 1 + value.len()
}

fn is_short<'a>(members: impl Iterator<Item = (&'a str, &'a str)>, most: usize) -> bool {
    // A comma follows each member but the last.
    let lengths = members.map(|member| length(&member) + 1);
    lengths.sum::<usize>() <= most.saturating_add(1)
}

fn is_valid_member((key, value): (&str, &str)) -> bool {
    is_valid_key(key) && is_valid_value(value)
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

/// Returns about how many bytes OpenTelemetry's type takes in memory: two strings and a place in the list for each member.
pub(crate) fn otel_bytes(state: &TraceState) -> usize {
    state
        .into_iter()
        .fold(64, |sum, (key, value)| sum + 48 + key.len() + value.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tracestate_of_a_span_context_is_held_to_the_same_rules() {
        let state = |members: &[(&str, &str)]| {
            TraceState::from_key_value(members.iter().copied()).expect("lax enough")
        };
        assert_eq!(Tracestate::from_otel(&TraceState::NONE), None);
        for good in [&[("a", "1"), ("t@v", " 2")], &[("a", "1"), ("a", "2")]] {
            let kept = Tracestate::from_otel(&state(good)).expect("valid");
            assert_eq!(kept.header(), state(good).header());
            assert_eq!(Tracestate::parse(&[&kept.header()]), Some(kept));
        }
        for bad in [("a", ""), ("", "1"), ("a", "1 "), ("a", "ü"), ("a", "\t1")] {
            assert_eq!(Tracestate::from_otel(&state(&[bad])), None, "{bad:?}");
        }
    }
}
