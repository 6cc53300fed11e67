//! The key on the server: the part that stands for the instance in a hash tag, so that all keys of an instance are in
//! one hash slot.
//!
//! | key of the storage | key on the server |
//! |---|---|
//! | `order-42` | `{prefix}{order-42}` |
//! | `order-42` U+001F `run` | `{prefix}{order-42}` U+001F `run` |
//! | `a{b}` | `{prefix}{a` U+001E `<b` U+001E `>}` |
//!
//! A brace of the instance part is escaped as U+001E and `<` or `>`, and U+001E as U+001E and `=`. A [prefix](clean_prefix) has no
//! U+001F. So the last opening brace before the first U+001F ends the prefix, and no two keys become one, whatever their
//! prefixes are.

use crate::backend::keys;

const ESCAPE: char = '\u{1e}';

/// Returns a prefix in which U+001F, which ends the instance part, is escaped: as in an instance id.
pub(super) fn clean_prefix(prefix: &str) -> String {
    keys::instance_key(prefix)
}

pub(super) fn to_server(prefix: &str, key: &str) -> String {
    let instance = keys::instance_part(key);
    let rest = &key[instance.len()..];
    // Nearly every id is its own tag.
    if !instance.contains([ESCAPE, '{', '}']) {
        return format!("{prefix}{{{instance}}}{rest}");
    }
    let mut on_server = format!("{prefix}{{");
    for c in instance.chars() {
        match c {
            '{' => on_server.extend([ESCAPE, '<']),
            '}' => on_server.extend([ESCAPE, '>']),
            ESCAPE => on_server.extend([ESCAPE, '=']),
            c => on_server.push(c),
        }
    }
    on_server.push('}');
    on_server.push_str(rest);
    on_server
}

/// Returns the key that [`to_server`] made this one from, or `None` if it made no such key.
pub(super) fn from_server(prefix: &str, on_server: &[u8]) -> Option<String> {
    let key = std::str::from_utf8(on_server).ok()?;
    let key = key.strip_prefix(prefix)?.strip_prefix('{')?;
    let tag = keys::instance_part(key);
    let rest = &key[tag.len()..];
    let mut instance = String::with_capacity(key.len());
    let mut chars = tag.strip_suffix('}')?.chars();
    while let Some(c) = chars.next() {
        instance.push(match c {
            ESCAPE => match chars.next()? {
                '<' => '{',
                '>' => '}',
                '=' => ESCAPE,
                _ => return None,
            },
            '{' | '}' => return None,
            c => c,
        });
    }
    instance.push_str(rest);
    Some(instance)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Short texts, mostly of characters with a meaning in keys.
    fn text() -> impl Strategy<Value = String> {
        "[a:<>={}\u{1d}\u{1e}\u{1f}]{0,4}"
    }

    /// A prefix, a namespace, an instance id and a run id.
    type Parts = (String, Option<String>, String, Option<String>);

    fn parts() -> impl Strategy<Value = Parts> {
        // Prefixes that begin alike are those that could meet.
        let prefix = prop_oneof![text(), "w\\{[a{}\u{1e}\u{1f}]{0,3}\\}:?"];
        let some = || text().prop_filter("ids are not empty", |id| !id.is_empty());
        (
            prefix,
            prop::option::of(some()),
            some(),
            prop::option::of(some()),
        )
    }

    fn whole((prefix, namespace, id, run_id): &Parts) -> String {
        let namespace = namespace.as_deref().map(keys::namespace_prefix);
        let key = match run_id {
            Some(run_id) => keys::run_key(id, run_id),
            None => keys::instance_key(id),
        };
        let key = namespace.unwrap_or_default() + &key;
        to_server(&clean_prefix(prefix), &key)
    }

    /// Returns the part of a key that chooses its slot, as Redis Cluster does.
    fn hashed(key: &str) -> &str {
        let tag = key
            .split_once('{')
            .and_then(|(_, rest)| rest.split_once('}'));
        tag.map(|(tag, _)| tag)
            .filter(|tag| !tag.is_empty())
            .unwrap_or(key)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn no_two_prefixes_namespaces_ids_and_runs_share_a_key(one in parts(), other in parts()) {
            prop_assert_eq!(whole(&one) == whole(&other), one == other);
        }

        #[test]
        fn a_key_of_one_prefix_is_none_of_another(one in parts(), prefix in text()) {
            let key = whole(&one);
            let found = from_server(&clean_prefix(&prefix), key.as_bytes());
            prop_assert_eq!(found.is_some(), prefix == one.0, "{:?}", found);
        }

        #[test]
        fn all_keys_of_an_instance_are_in_one_slot(one in parts(), run_id in text()) {
            let mut one = one;
            one.0.retain(|c| c != '{');
            let run = (one.0.clone(), one.1.clone(), one.2.clone(), Some(run_id));
            let (one, run) = (whole(&one), whole(&run));
            prop_assert_eq!(hashed(&one), hashed(&run));
        }

        #[test]
        fn a_key_comes_back_from_the_server(key in "[a<{}\u{1e}\u{1f}]{1,6}") {
            let on_server = to_server("p{x:", &key);
            prop_assert_eq!(from_server("p{x:", on_server.as_bytes()), Some(key));
        }

        #[test]
        fn another_key_on_the_server_is_none_or_comes_from_one_key(on_server in "p\\{[a<>={}\u{1e}\u{1f}]{0,6}") {
            if let Some(key) = from_server("p", on_server.as_bytes()) {
                prop_assert_eq!(to_server("p", &key), on_server);
            }
        }
    }

    #[test]
    fn an_id_with_braces_meets_no_other_prefix() {
        let own = to_server("wf:{tenant-b}:", "order-1");
        assert_eq!(own, "wf:{tenant-b}:{order-1}");
        assert_ne!(to_server("wf:", "tenant-b}:{order-1"), own);
    }
}
