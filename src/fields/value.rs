//! The rules by which the value of a field becomes an id, a truth or a status.

use std::borrow::Cow;

use opentelemetry::Value;

use crate::error::MAX_INSTANCE_ID_BYTES;

/// The values of `workflow.status` after which an instance does no more work, in any letter case.
const TERMINAL: [&str; 6] = [
    "completed",
    "failed",
    "terminated",
    "canceled",
    "cancelled",
    "timed_out",
];

/// Formats a value as an id: a string in its `Debug` form loses its quotes.
pub(super) fn printed(value: &Value) -> Cow<'_, str> {
    match value {
        Value::String(text) => unquoted(text.as_str()),
        other => Cow::Owned(other.to_string()),
    }
}

/// Undoes `{:?}` of a string; any other text is left unchanged.
///
/// Ids are compared by their formatted value, and an attribute does not show whether it was formatted by `%` or `?`.
#[inline]
pub(super) fn unquoted(text: &str) -> Cow<'_, str> {
    if !text.starts_with('"') {
        return Cow::Borrowed(text);
    }
    // The longest escape of one byte is six characters, `\u{7f}`: a longer text is oversized in any case.
    const LONGEST: usize = 6 * MAX_INSTANCE_ID_BYTES + 2;
    let inner = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
    let Some(inner) = inner.filter(|_| text.len() <= LONGEST) else {
        return Cow::Borrowed(text);
    };
    if !inner.contains(['"', '\\']) {
        return Cow::Borrowed(inner);
    }
    unescaped(inner).map_or(Cow::Borrowed(text), Cow::Owned)
}

/// Returns `None` if the text has a quote or a backslash that `str::escape_debug` would not have written.
fn unescaped(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        out.push(match c {
            '"' => return None,
            '\\' => match chars.next()? {
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                '0' => '\0',
                c @ ('\\' | '"' | '\'') => c,
                'u' => {
                    let (code, rest) = chars.as_str().strip_prefix('{')?.split_once('}')?;
                    chars = rest.chars();
                    char::from_u32(u32::from_str_radix(code, 16).ok()?)?
                }
                _ => return None,
            },
            c => c,
        });
    }
    Some(out)
}

pub(super) fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(truth) => Some(*truth),
        Value::String(text) => match unquoted(text.as_str()) {
            text if text.eq_ignore_ascii_case("true") => Some(true),
            text if text.eq_ignore_ascii_case("false") => Some(false),
            _ => None,
        },
        _ => None,
    }
}

pub(super) fn is_terminal(value: &Value) -> bool {
    let Value::String(text) = value else {
        return false;
    };
    let status = unquoted(text.as_str());
    TERMINAL.iter().any(|t| status.eq_ignore_ascii_case(t))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_debug_form_of_a_string_is_unquoted() {
        for text in [
            "",
            "a",
            "ü\n\t\"quoted\"\\",
            "\0\u{7f}\u{200b}",
            "'",
            "\u{10ffff}",
        ] {
            assert_eq!(unquoted(&format!("{text:?}")), text);
        }
        for text in [
            "\"",
            "\"a",
            "a\"",
            "\"a\"b\"",
            "\"\\x\"",
            "\"\\\"",
            "\"\\u{110000}\"",
        ] {
            assert_eq!(unquoted(text), text);
        }
    }
}
