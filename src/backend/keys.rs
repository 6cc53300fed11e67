//! The key format: the one place that builds and reads the keys of a backend.
//!
//! | key | record |
//! |---|---|
//! | `{id}` | the latest context of the instance, which a worker finds without knowing runs |
//! | `{id}` U+001F `{run id}` | the latest context of one run |
//! | `{id}` U+001F U+001F `{span id}` `{run id}` | the trace that follows the one of that span, claimed by whoever opens it first |
//!
//! In an id, U+001F is written as U+001E and a space, and U+001E twice. A run id that begins with either gets one more
//! U+001E in front. So no two instances, runs or claims share a key.

use std::borrow::Cow;

use opentelemetry::SpanId;

/// Separates the parts of a key.
const SEPARATOR: char = '\u{1f}';

/// Marks a separator, or itself, inside an id.
const ESCAPE: char = '\u{1e}';

pub(crate) fn instance_key(id: &str) -> String {
    // Nearly always. All bytes, and no end at the first: so the compiler looks at many at once.
    let is_special = |byte| matches!(char::from(byte), SEPARATOR | ESCAPE);
    let any_special = id.bytes().fold(false, |any, byte| any | is_special(byte));
    if !any_special {
        return id.to_owned();
    }
    let mut key = String::with_capacity(id.len() + 8);
    for c in id.chars() {
        match c {
            SEPARATOR => key.extend([ESCAPE, ' ']),
            ESCAPE => key.extend([ESCAPE; 2]),
            c => key.push(c),
        }
    }
    key
}

/// The part of any key that stands for the instance id.
#[cfg(feature = "redis")]
pub(crate) fn instance_part(key: &str) -> &str {
    key.split(SEPARATOR).next().unwrap_or(key)
}

/// The id of which this is the key of the latest run.
pub(crate) fn instance_of(key: &str) -> Option<Cow<'_, str>> {
    if key.contains(SEPARATOR) {
        return None;
    }
    if !key.contains(ESCAPE) {
        return Some(key.into());
    }
    let mut chars = key.chars();
    let unescape = std::iter::from_fn(|| match chars.next()? {
        ESCAPE => match chars.next()? {
            ' ' => Some(SEPARATOR),
            c => Some(c),
        },
        c => Some(c),
    });
    Some(unescape.collect())
}

pub(crate) fn run_key(id: &str, run_id: &str) -> String {
    let escape = if run_id.starts_with([SEPARATOR, ESCAPE]) {
        "\u{1e}"
    } else {
        ""
    };
    format!("{}{SEPARATOR}{escape}{run_id}", instance_key(id))
}

/// What all claim who are to open the trace that follows the one of that span.
pub(crate) fn claim_key(id: &str, run_id: Option<&str>, followed: SpanId) -> String {
    let run_id = run_id.unwrap_or_default();
    format!(
        "{}{SEPARATOR}{SEPARATOR}{followed}{run_id}",
        instance_key(id)
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Hardly anything but what a key gives a meaning.
    fn id() -> impl Strategy<Value = String> {
        "[a \u{1e}\u{1f}]{1,4}"
    }

    proptest! {
        #[test]
        fn no_two_instances_or_runs_or_claims_share_a_key(
            one in (id(), prop::option::of(id()), prop::option::of(1..3_u64)),
            other in (id(), prop::option::of(id()), prop::option::of(1..3_u64)),
        ) {
            let whole = |(id, run_id, followed): &(String, Option<String>, Option<u64>)| match (run_id, followed) {
                (run_id, Some(followed)) => claim_key(id, run_id.as_deref(), SpanId::from(*followed)),
                (Some(run_id), None) => run_key(id, run_id),
                (None, None) => instance_key(id),
            };
            prop_assert_eq!(whole(&one) == whole(&other), one == other);
        }

        #[test]
        fn an_id_is_known_by_the_key_of_its_latest_run_alone(id in id(), run_id in id()) {
            let latest = instance_key(&id);
            prop_assert!(instance_of(&latest).is_some_and(|found| found == id));
            for other in [run_key(&id, &run_id), claim_key(&id, Some(&run_id), SpanId::from(1))] {
                prop_assert_eq!(instance_of(&other), None);
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
