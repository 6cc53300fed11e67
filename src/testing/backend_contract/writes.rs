//! The rules of `write`: what each kind of write does, and the order of writes and outcomes.

use std::time::{Duration, SystemTime};

use super::checked::*;
use crate::backend::{Record, StorageBackend, Write};

pub(super) fn an_empty_backend_has_no_records<B: StorageBackend>(backend: &Checked<B>) {
    backend.has_none("unknown", "an unknown key has no record");
    backend.scan_is(&[], "`make` returns an empty backend");
    backend.flush();
}

pub(super) fn put_replaces_any_other_record<B: StorageBackend>(backend: &Checked<B>) {
    for span in 1..=3 {
        backend.put("key", &record(span));
        backend.holds("key", &record(span), "`Put` replaces any other record");
    }
}

pub(super) fn put_if_absent_stores_only_if_there_is_no_record<B: StorageBackend>(
    backend: &Checked<B>,
) {
    let sentence = "`PutIfAbsent` stores its record if there is none";
    let stored = backend.put_if_absent("key", &record(1));
    rule(stored.is_none(), sentence, format_args!("{stored:?}"));
    backend.holds("key", &record(1), sentence);

    let sentence = "`PutIfAbsent` returns the existing record and leaves it unchanged";
    for (before, expected) in [(None, 1), (Some(3), 3)] {
        if let Some(span) = before {
            backend.put("key", &record(span));
        }
        let existing = backend.put_if_absent("key", &record(2));
        let is_expected = existing
            .as_ref()
            .is_some_and(|existing| alike(existing, &record(expected)));
        rule(is_expected, sentence, format_args!("{existing:?}"));
        backend.holds("key", &record(expected), sentence);
    }
}

pub(super) fn remove_removes_one_record<B: StorageBackend>(backend: &Checked<B>) {
    let sentence =
        "`Remove` removes the record of its key and no other, and does nothing if there is none";
    backend.put("kept", &record(1));
    for _ in 0..2 {
        backend.put("removed", &record(2));
        for _ in 0..2 {
            backend.write(&[Write::Remove("removed".to_owned())]);
            backend.has_none("removed", sentence);
            backend.holds("kept", &record(1), sentence);
            backend.scan_is(&["kept"], sentence);
        }
    }
}

pub(super) fn expire_changes_the_expiry_of_an_existing_record<B: StorageBackend>(
    backend: &Checked<B>,
) {
    let expire = |key: &str, at| drop(backend.write(&[Write::Expire(key.to_owned(), at)]));
    expire("key", in_a_month());
    let sentence = "`Expire` does nothing if there is no record";
    backend.has_none("key", sentence);
    backend.scan_is(&[], sentence);

    backend.put("key", &record(1));
    let moved = Record {
        expires_at: in_a_month() + DAY,
        ..record(1)
    };
    expire("key", moved.expires_at);
    backend.holds(
        "key",
        &moved,
        "`Expire` changes the expiry and nothing else",
    );

    let gone = SystemTime::now() - Duration::from_secs(1);
    expire("key", gone);
    backend.loses("key", gone, "`Expire` with a past time ends a record");
    expire("key", in_a_month());
    backend.has_none("key", "`Expire` does not bring back an expired record");
}

pub(super) fn each_write_has_its_outcome<B: StorageBackend>(backend: &Checked<B>) {
    backend.write(&[]);
    let key = || "key".to_owned();
    let existing = backend.write(&[
        Write::PutIfAbsent(key(), record(1)),
        Write::Put("other".to_owned(), record(2)),
        Write::PutIfAbsent(key(), record(3)),
        Write::Expire(key(), in_a_month()),
        Write::PutIfAbsent("other".to_owned(), record(4)),
    ]);
    let exists: Vec<_> = existing.iter().map(Option::is_some).collect();
    rule(
        exists == [false, false, true, false, true],
        "the outcomes are in the order of their writes",
        format_args!("{existing:?}"),
    );
}

pub(super) fn writes_on_one_key_keep_their_order<B: StorageBackend>(backend: &Checked<B>) {
    let key = || "key".to_owned();
    let put = |span| Write::Put(key(), record(span));
    let claim = |span| Write::PutIfAbsent(key(), record(span));
    let past = SystemTime::now() - Duration::from_secs(1);
    let groups: [(&[Write], Option<u64>); 6] = [
        (&[put(1), put(2)], Some(2)),
        (&[put(1), Write::Remove(key())], None),
        (&[put(1), Write::Remove(key()), claim(2)], Some(2)),
        (&[Write::Remove(key()), claim(1), claim(2), put(3)], Some(3)),
        (
            &[Write::Remove(key()), Write::Expire(key(), past), put(1)],
            Some(1),
        ),
        (
            &[
                claim(1),
                put(2),
                claim(3),
                Write::Expire(key(), in_a_month()),
            ],
            Some(2),
        ),
    ];
    let sentence = "the writes of one `write` take effect in their order for each key";
    for (writes, expected) in groups {
        backend.write(&[Write::Remove(key())]);
        backend.write(writes);
        match expected {
            Some(span) => backend.holds("key", &record(span), sentence),
            None => backend.has_none("key", sentence),
        }
    }
    let existing = backend.write(&[put(1), claim(2), put(3), claim(4)]);
    let spans: Vec<_> = existing
        .iter()
        .map(|existing| existing.as_ref().map(span_of))
        .collect();
    rule(
        spans == [None, Some(1), None, Some(3)],
        "a `PutIfAbsent` sees the earlier writes of the same `write`",
        format_args!("the existing records are {existing:?}"),
    );
}

pub(super) fn a_large_group_is_written<B: StorageBackend>(backend: &Checked<B>) {
    let key = |span: u64| format!("key {span:04}");
    let puts: Vec<_> = (1..=2_000)
        .map(|span| Write::Put(key(span), record(span)))
        .collect();
    backend.write(&puts);
    for span in [1, 1_000, 2_000] {
        backend.holds(
            &key(span),
            &record(span),
            "a `write` can have any number of writes",
        );
    }
    let claims: Vec<_> = (1..=2_000)
        .map(|span| Write::PutIfAbsent(key(span), record(1)))
        .collect();
    let existing = backend.write(&claims);
    let right = (1..)
        .zip(&existing)
        .all(|(span, existing)| existing.as_ref().map(span_of) == Some(span));
    rule(
        right,
        "the outcomes are in the order of their writes",
        format_args!("of 2,000 writes"),
    );
}
