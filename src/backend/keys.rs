//! The key format: builds and reads all keys of a backend.
//!
//! | key | record |
//! |---|---|
//! | `{id}` | the latest context of the instance, found without knowing its runs |
//! | `{id}` U+001F `{run id}` | the latest context of one run |
//! | `{id}` U+001F U+001F `{span id}` `{run id}` | the trace that follows the one of that span, claimed by the first worker that opens it |
//! | `{id}` U+001F U+001F U+001F `{span id}` `{part}` | a part of the instance's own span, which has that span id |
//! | `{id}` U+001F U+001F U+001F U+001F | the end of the instance, or that a call has removed it, where the expiry does not tell that |
//! | U+001F `sweep` | who looks for abandoned instances; no id is empty |
//!
//! In an instance id, U+001F is escaped as U+001E and a space, U+001D as U+001E and a hyphen, and U+001E as two of it. A run id
//! that begins with U+001F or U+001E gets one U+001E in front. With a namespace, that, escaped as an instance id is, and U+001D
//! come before all this. So no two instances, runs or claims share a key, of the same namespace or of two.

use std::borrow::Cow;

use opentelemetry::SpanId;

/// Separates the parts of a key.
const SEPARATOR: char = '\u{1f}';

/// Ends a namespace.
const NAMESPACE_END: char = '\u{1d}';

/// Begins an escaped separator, or an escaped escape.
const ESCAPE: char = '\u{1e}';

/// Returns the key of an instance's latest context.
pub(crate) fn instance_key(id: &str) -> String {
    // Fast path: nearly every id is its own key. A fold over all bytes is vectorized, a search that ends early is not.
    let is_special = |byte| matches!(char::from(byte), NAMESPACE_END..=SEPARATOR);
    let any_special = id.bytes().fold(false, |any, byte| any | is_special(byte));
    if !any_special {
        return id.to_owned();
    }
    let mut key = String::with_capacity(id.len() + 8);
    for c in id.chars() {
        match c {
            SEPARATOR => key.extend([ESCAPE, ' ']),
            NAMESPACE_END => key.extend([ESCAPE, '-']),
            ESCAPE => key.extend([ESCAPE; 2]),
            c => key.push(c),
        }
    }
    key
}

/// Returns the beginning of all keys of a namespace.
pub(crate) fn namespace_prefix(namespace: &str) -> String {
    format!("{}{NAMESPACE_END}", instance_key(namespace))
}

/// Returns the part of any key that stands for the instance id, with its namespace.
#[cfg(any(feature = "postgres", feature = "redis"))]
pub(crate) fn instance_part(key: &str) -> &str {
    key.split(SEPARATOR).next().unwrap_or(key)
}

/// The key by whose first writer a sweep is claimed.
pub(crate) const SWEEP_KEY: &str = "\u{1f}sweep";

/// Returns the instance id if the key is that of an instance's latest context, and of no namespace.
pub(crate) fn instance_of(key: &str) -> Option<Cow<'_, str>> {
    (!key.contains([SEPARATOR, NAMESPACE_END])).then(|| unescaped(key))
}

/// Returns the instance id if the key, as [`StorageBackend::scan`](super::StorageBackend::scan) shows it, is that of an
/// instance's latest context in that namespace; an empty one is none.
///
/// # Examples
///
/// ```
/// use tracing_workflow_context::backend::instance_of_key;
///
/// assert_eq!(instance_of_key("", "order-42").as_deref(), Some("order-42"));
/// // A run of it.
/// assert_eq!(instance_of_key("", "order-42\u{1f}run 1"), None);
/// ```
#[must_use]
pub fn instance_of_key<'a>(namespace: &str, key: &'a str) -> Option<Cow<'a, str>> {
    instance_of(match namespace {
        "" => key,
        _ => key.strip_prefix(&*namespace_prefix(namespace))?,
    })
}

/// Returns the instance id as it was before it was escaped.
fn unescaped(part: &str) -> Cow<'_, str> {
    if !part.contains(ESCAPE) {
        return part.into();
    }
    let mut chars = part.chars();
    let unescape = std::iter::from_fn(|| match chars.next()? {
        ESCAPE => match chars.next()? {
            ' ' => Some(SEPARATOR),
            '-' => Some(NAMESPACE_END),
            c => Some(c),
        },
        c => Some(c),
    });
    unescape.collect()
}

/// Returns the key of a run's latest context.
pub(crate) fn run_key(id: &str, run_id: &str) -> String {
    let escape = if run_id.starts_with([SEPARATOR, ESCAPE]) {
        "\u{1e}"
    } else {
        ""
    };
    format!("{}{SEPARATOR}{escape}{run_id}", instance_key(id))
}

/// Returns the key that workers claim to open the trace that follows the one of the span `followed`.
pub(crate) fn claim_key(id: &str, run_id: Option<&str>, followed: SpanId) -> String {
    let run_id = run_id.unwrap_or_default();
    format!(
        "{}{SEPARATOR}{SEPARATOR}{followed}{run_id}",
        instance_key(id)
    )
}

/// Returns the key of a part of the root with that span id, by whose first writer it is claimed: its end, or the part of one
/// process.
pub(crate) fn root_key(id: &str, root: SpanId, part: impl std::fmt::Display) -> String {
    let instance = instance_key(id);
    format!("{instance}{SEPARATOR}{SEPARATOR}{SEPARATOR}{root}{part}")
}

/// Returns the key under which the end of an instance is told to other processes.
pub(crate) fn ended_key(id: &str) -> String {
    let instance = instance_key(id);
    format!("{instance}{SEPARATOR}{SEPARATOR}{SEPARATOR}{SEPARATOR}")
}

/// Returns the instance id, the root's span id and the place if the key is that of one process's part of a root, and of no
/// namespace.
pub(crate) fn root_part(key: &str) -> Option<(Cow<'_, str>, SpanId, u32)> {
    let (id, rest) = key.split_once(SEPARATOR)?;
    let rest = rest.strip_prefix("\u{1f}\u{1f}")?;
    let (root, place) = rest.split_at_checked(16)?;
    let root = SpanId::from_hex(root).ok()?;
    let is_known = !id.contains(NAMESPACE_END);
    is_known.then_some((unescaped(id), root, place.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Short ids, mostly of characters with a meaning in keys.
    fn id() -> impl Strategy<Value = String> {
        "[a \\- \u{1d}\u{1e}\u{1f}]{1,4}"
    }

    proptest! {
        #[test]
        fn no_two_instances_or_runs_or_claims_share_a_key(
            one in (prop::option::of(id()), id(), prop::option::of(id()), prop::option::of(1..3_u64)),
            other in (prop::option::of(id()), id(), prop::option::of(id()), prop::option::of(1..3_u64)),
        ) {
            type Parts = (Option<String>, String, Option<String>, Option<u64>);
            let whole = |(namespace, id, run_id, followed): &Parts| {
                let prefix = namespace.as_deref().map(namespace_prefix).unwrap_or_default();
                let key = match (run_id, followed) {
                    (run_id, Some(followed)) => claim_key(id, run_id.as_deref(), SpanId::from(*followed)),
                    (Some(run_id), None) => run_key(id, run_id),
                    (None, None) => instance_key(id),
                };
                prefix + &key
            };
            prop_assert_eq!(whole(&one) == whole(&other), one == other);
        }

        #[test]
        fn an_id_is_known_by_the_key_of_its_latest_run_alone(id in id(), run_id in id()) {
            let latest = instance_key(&id);
            prop_assert!(instance_of(&latest).is_some_and(|found| found == id));
            let root = root_key(&id, SpanId::from(1), 2);
            prop_assert_eq!(root_part(&root), Some(((&*id).into(), SpanId::from(1), 2)));
            let end = root_key(&id, SpanId::from(1), "end");
            prop_assert_eq!(root_part(&end), None);
            prop_assert_ne!(&root, &claim_key(&id, Some(&run_id), SpanId::from(1)));
            prop_assert_ne!(&root, &run_key(&id, &run_id));
            prop_assert_eq!(instance_of(&root), None);
            for other in [run_key(&id, &run_id), claim_key(&id, Some(&run_id), SpanId::from(1))] {
                prop_assert_eq!(instance_of(&other), None);
                prop_assert_eq!(root_part(&other), None);
            }
        }
    }

    #[test]
    fn a_usual_id_is_its_own_key_and_the_longest_keys_are_keys() {
        assert_eq!(instance_key("order-42"), "order-42");
        let longest = "\u{1f}".repeat(crate::MAX_INSTANCE_ID_BYTES);
        assert!(claim_key(&longest, Some(&longest), SpanId::from(1)).len() < 4096);
    }
}
