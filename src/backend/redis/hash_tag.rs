//! The key on the server: the part that stands for the instance in a hash tag, so that all keys of an instance are in
//! one hash slot.
//!
//! | key of the storage | key on the server |
//! |---|---|
//! | `order-42` | `{prefix}{order-42}` |
//! | `order-42` U+001F `run` | `{prefix}{order-42}` U+001F `run` |
//! | `}a` | `{prefix}{` U+001E `}a}` |
//!
//! An instance part that begins with a closing brace would make an empty tag, which is none. U+001E goes in front of
//! it, and in front of a part in which only U+001E precedes the brace, so that no two keys become one.

use crate::backend::keys;

const ESCAPE: char = '\u{1e}';

pub(super) fn to_server(prefix: &str, key: &str) -> String {
    let instance = keys::instance_part(key);
    let rest = &key[instance.len()..];
    let escape = if needs_escape(instance) { "\u{1e}" } else { "" };
    format!("{prefix}{{{escape}{instance}}}{rest}")
}

/// Returns the key that [`to_server`] made this one from, or `None` if it made no such key.
pub(super) fn from_server(prefix: &str, on_server: &[u8]) -> Option<String> {
    let key = std::str::from_utf8(on_server).ok()?;
    let key = key.strip_prefix(prefix)?.strip_prefix('{')?;
    let tag = keys::instance_part(key);
    let rest = &key[tag.len()..];
    let escaped = tag.strip_suffix('}')?;
    let instance = match needs_escape(escaped) {
        true => escaped.strip_prefix(ESCAPE)?,
        false => escaped,
    };
    Some(format!("{instance}{rest}"))
}

fn needs_escape(instance: &str) -> bool {
    instance.trim_start_matches(ESCAPE).starts_with('}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_key_comes_back_from_the_server(key in "[a{}\u{1e}\u{1f}]{1,6}") {
            let on_server = to_server("p{x:", &key);
            prop_assert_eq!(from_server("p{x:", on_server.as_bytes()), Some(key));
        }

        #[test]
        fn another_key_on_the_server_is_none_or_comes_from_one_key(on_server in "p\\{[a{}\u{1e}\u{1f}]{0,6}") {
            if let Some(key) = from_server("p", on_server.as_bytes()) {
                prop_assert_eq!(to_server("p", &key), on_server);
            }
        }
    }
}
