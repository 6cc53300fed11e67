//! The rules by which the value of a field becomes an id, a truth or a status.

use std::borrow::Cow;

use opentelemetry::Value;

use crate::error::MAX_INSTANCE_ID_BYTES;

/// The end of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndStatus {
    Completed,
    Failed,
    TimedOut,
    Terminated,
    Canceled,
    /// Nobody told an end, and it is forgotten.
    Abandoned,
    /// Another run or generation follows.
    Continued,
    /// Another process had recorded it first.
    Superseded,
}

/// The words that end an instance, in any letter case: those of the engines, and those by which their SDKs' results are
/// called. A status is terminal if it is such a word, or the `Debug` form of a struct or variant of that name, such as
/// `Failed { .. }` and `Failed(..)`.
const TERMINAL: [(&str, EndStatus); 11] = [
    ("completed", EndStatus::Completed),
    ("failed", EndStatus::Failed),
    ("terminated", EndStatus::Terminated),
    ("canceled", EndStatus::Canceled),
    ("cancelled", EndStatus::Canceled),
    ("timed_out", EndStatus::TimedOut),
    ("success", EndStatus::Completed),
    ("failure", EndStatus::Failed),
    ("error", EndStatus::Failed),
    ("timeout", EndStatus::TimedOut),
    ("cancellation", EndStatus::Canceled),
];

/// The longest text that is read as the `Debug` form of an id. The longest escape of one byte is six characters,
/// `\u{7f}`; the rest is for quotes and `Some()`. A longer text is oversized in any case.
pub(super) const LONGEST_TEXT: usize = 6 * MAX_INSTANCE_ID_BYTES + 64;

/// Formats a value as an id; empty if it is none.
#[inline]
pub(super) fn printed(value: &Value) -> Cow<'_, str> {
    match value {
        Value::String(text) => plain(text.as_str()),
        other => Cow::Owned(other.to_string()),
    }
}

/// Undoes `{:?}` of strings and options, as often as it was done: quotes and `Some( )` are removed, and `None` is empty.
/// Any other text is left unchanged.
///
/// Ids are compared by their formatted value, and an attribute does not show whether it was text, or formatted by `%` or
/// `?`. So the text alone decides. The result is unchanged if it is read again: an id that was listed is found.
#[inline]
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    match is_plain(text) {
        true => Cow::Borrowed(text),
        false => undebugged(text),
    }
}

/// Returns `true` for a text that [`plain`] certainly leaves unchanged.
#[inline]
pub(crate) fn is_plain(text: &str) -> bool {
    !matches!(text.as_bytes(), [b'"' | b'S' | b'N', ..])
}

#[inline(never)]
fn undebugged(mut text: &str) -> Cow<'_, str> {
    if text.len() > LONGEST_TEXT {
        return Cow::Borrowed(text);
    }
    loop {
        match undebugged_once(text) {
            None => return Cow::Borrowed(text),
            Some(Cow::Borrowed(inner)) => text = inner,
            // Each level of escapes doubles the length, so there are few.
            Some(Cow::Owned(inner)) => return Cow::Owned(undebugged(&inner).into_owned()),
        }
    }
}

/// Returns `None` for a text that is not the `Debug` form of a string or an option.
fn undebugged_once(text: &str) -> Option<Cow<'_, str>> {
    let within = |before, after| text.strip_prefix(before)?.strip_suffix(after);
    if text == "None" {
        return Some(Cow::Borrowed(""));
    }
    if let Some(inner) = within("Some(", ")") {
        return Some(Cow::Borrowed(inner));
    }
    let inner = within("\"", "\"")?;
    if inner.contains(['"', '\\']) {
        unescaped(inner).map(Cow::Owned)
    } else {
        Some(Cow::Borrowed(inner))
    }
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
        Value::String(text) => match plain(text.as_str()) {
            text if text.eq_ignore_ascii_case("true") => Some(true),
            text if text.eq_ignore_ascii_case("false") => Some(false),
            _ => None,
        },
        _ => None,
    }
}

impl EndStatus {
    /// Reads a terminal status from the value of a field.
    pub(super) fn read(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) => Self::parse(text.as_str()),
            _ => None,
        }
    }

    /// Reads a terminal status. Returns `None` for any other text.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let status = plain(text);
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let (word, rest) = status.split_at(status.find(|c| !is_word(c)).unwrap_or(status.len()));
        let is_debug = |open, close| rest.starts_with(open) && rest.ends_with(close);
        let is_alone = rest.is_empty() || is_debug(" {", "}") || is_debug("(", ")");
        let mut known = TERMINAL.iter().filter(|_| is_alone);
        let found = known.find(|(known, _)| word.eq_ignore_ascii_case(known));
        found.map(|(_, status)| *status)
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Terminated => "terminated",
            Self::Canceled => "canceled",
            Self::Abandoned => "abandoned",
            Self::Continued => "continued",
            Self::Superseded => "superseded",
        }
    }

    /// Returns `true` if somebody has told this end, which no process concluded.
    pub(crate) fn is_told(self) -> bool {
        !matches!(self, Self::Abandoned | Self::Continued | Self::Superseded)
    }

    /// Returns `true` if the span status of an instance that ended so is an error.
    pub(crate) fn is_error(self) -> bool {
        matches!(self, Self::Failed | Self::TimedOut | Self::Terminated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_debug_forms_of_strings_and_options_are_undone() {
        for text in [
            "",
            "a",
            "ü\n\t\"quoted\"\\",
            "\0\u{7f}\u{200b}",
            "'",
            "\u{10ffff}",
        ] {
            let forms = [
                format!("{text:?}"),
                format!("{:?}", Some(text)),
                format!("{:?}", format!("{text:?}")),
                format!("{:?}", Some(Some(format!("{text:?}")))),
            ];
            for form in forms {
                assert_eq!(plain(&form), text, "{form}");
            }
        }
        for text in [
            "\"",
            "\"a",
            "a\"",
            "\"a\"b\"",
            "\"\\x\"",
            "\"\\\"",
            "\"\\u{110000}\"",
            "Some",
            "Some(",
            "Some(a",
            "Something(a)",
            "Nonesuch",
            "none",
        ] {
            assert_eq!(plain(text), text);
        }
        for text in ["None", "\"None\"", "Some(None)", "Some(\"\")"] {
            assert_eq!(plain(text), "");
        }
    }

    #[test]
    fn deeply_nested_text_is_undone_without_recursion() {
        let nested = "Some(".repeat(1_000) + "a" + &")".repeat(1_000);
        assert_eq!(plain(&nested), "a");
        let nested = "Some(".repeat(1_000_000) + "a" + &")".repeat(1_000_000);
        assert_eq!(plain(&nested), nested);
    }
}
