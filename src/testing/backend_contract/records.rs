//! The rules of keys and records: any text is a key, a record comes back as it was stored, and expires.

use std::thread;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

use super::checked::*;
use crate::backend::{Record, RootSpan, StorageBackend, Write};

/// The longest key is one byte shorter.
const KEY_BOUND: usize = 4096;

pub(super) fn any_text_is_a_key<B: StorageBackend>(backend: &Checked<B>) {
    let longest = "k".repeat(KEY_BOUND - 1);
    let next_to_it = format!("{}l", "k".repeat(KEY_BOUND - 2));
    let longest_unicode = "ü".repeat(KEY_BOUND / 2 - 1);
    let mut keys = [
        "a",
        "A",
        "a ",
        " a",
        "aa",
        "aaa",
        "a/b",
        "a:b",
        "a:b:c",
        "../a",
        "a\\b",
        "*",
        "a*",
        "a?",
        "[a]",
        "{a}",
        "{}",
        "{a}b",
        "a{",
        "}{",
        "\0",
        "a\0",
        "a\0b",
        "\u{1}",
        "\u{1f}",
        "a\u{1f}",
        "a\u{1f}b",
        "a\u{1f}\u{1f}2",
        "\u{7f}",
        "\n",
        "\r\n",
        "\t",
        "\u{1b}[31m",
        "%s",
        "%00",
        "'; --",
        "\"",
        "$1",
        "\u{feff}",
        "ü",
        "u\u{308}",
        "Ü",
        "\u{200d}",
        "\u{2028}",
        "\u{fffd}",
        "\u{10ffff}",
        &longest,
        &next_to_it,
        &longest_unicode,
    ];
    keys.sort_unstable();
    let sentence = "any text of 1 to 4095 bytes is a key, distinct from any other text";
    for (span, key) in (1..).zip(keys) {
        let existing = backend.put_if_absent(key, &record(span));
        rule(
            existing.is_none(),
            sentence,
            format_args!("{key:?} is taken for another key"),
        );
    }
    backend.scan_is(&keys, sentence);
    let twice_and_none: Vec<_> = keys.into_iter().rev().chain(["none", keys[0]]).collect();
    let many = backend.get_many(&twice_and_none);
    let each: Vec<_> = twice_and_none.iter().map(|key| backend.get(key)).collect();
    let context = |record: &Option<Record>| record.as_ref().map(|record| record.context.clone());
    rule(
        many.iter().map(context).eq(each.iter().map(context)),
        "`get_many` returns for each key what `get` does",
        format_args!("{many:?} for {twice_and_none:?}"),
    );
    for (span, key) in (1..).zip(keys) {
        backend.holds(key, &record(span), sentence);
        backend.write(&[Write::Remove(key.to_owned())]);
        backend.has_none(key, sentence);
    }
    backend.scan_is(&[], sentence);
}

pub(super) fn a_record_comes_back_as_it_was<B: StorageBackend>(backend: &Checked<B>) {
    let member = |n| format!("{n:a>256}={}", "v".repeat(256));
    let longest = (10..42).map(member).collect::<Vec<_>>().join(",");
    let states = [
        "",
        "vendor=1",
        "tenant@vendor=a b,other=!\"#$%&'()*+-./:;<>?@[\\]^_`{|}~",
        // OpenTelemetry's type does not take these keys.
        "a@@b=1,c@longer-than-thirteen=2,d@-e=3,vendor=4,vendor=5",
        &longest,
    ];
    let run_ids = [
        None,
        Some("r"),
        Some("0199a0c4-5b7e-7c3e"),
        Some("run\u{1f}\n\"ü\u{10ffff}"),
    ];
    let longest = "r".repeat(1024);
    let run_ids = run_ids.into_iter().chain([Some(&*longest)]);
    let ids = [
        (u128::MAX, u64::MAX),
        (1, 1),
        (
            0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c,
            0xb7ad_6b71_6920_3331,
        ),
    ];
    let sentence = "a record comes back as it was stored";
    let all = run_ids.flat_map(|run_id| states.iter().map(move |state| (run_id, state)));
    for (number, (run_id, state)) in (0_u32..).zip(all) {
        let (trace, span) = ids[number as usize % ids.len()];
        let flags = TraceFlags::new((number % 4) as u8);
        let resumed = number % 2 == 1;
        let record = Record {
            context: context(trace, span, flags, state, resumed),
            run_id: run_id.map(str::to_owned),
            generation: [1, 2, 1_000_000, u32::MAX][number as usize % 4],
            expires_at: in_a_month(),
            root: (number % 3 == 2).then(|| Box::new(root(number))),
        };

        backend.write(&[Write::Remove("put if absent".to_owned())]);
        backend.put("put", &record);
        backend.put_if_absent("put if absent", &record);
        for key in ["put", "put if absent"] {
            backend.holds(key, &record, sentence);
        }
        let existing = backend.put_if_absent("put", &self::record(1));
        let same = existing
            .as_ref()
            .is_some_and(|existing| alike(existing, &record));
        rule(
            same,
            "the existing record comes back as it was stored",
            format_args!("{existing:?} for {record:?}"),
        );
        let mut visited = Vec::new();
        succeeded(
            "scan",
            backend.0.scan(&mut |_, record| visited.push(record)),
        );
        let same = visited.len() == 2 && visited.iter().all(|visited| alike(visited, &record));
        rule(
            same,
            "`scan` visits a record as it was stored",
            format_args!("{visited:?} for {record:?}"),
        );
    }
}

pub(super) fn an_expired_record_is_gone<B: StorageBackend>(backend: &Checked<B>) {
    let sentence = "a record is gone once its `expires_at` has passed";
    for past in [Duration::from_secs(2), DAY] {
        let expired = Record::new(record(1).context, SystemTime::now() - past);
        backend.put("key", &expired);
        backend.loses("key", expired.expires_at, sentence);

        backend.put_if_absent("key", &expired);
        backend.loses("key", expired.expires_at, sentence);

        backend.put("key", &record(2));
        backend.put("key", &expired);
        backend.loses("key", expired.expires_at, sentence);
    }
}

pub(super) fn a_record_exists_until_it_expires<B: StorageBackend>(backend: &Checked<B>) {
    let soon = SystemTime::now() + Duration::from_millis(700);
    let moved = Write::Expire("moved".to_owned(), soon);
    backend.write(&[
        Write::Put("put".to_owned(), Record::new(record(1).context, soon)),
        Write::PutIfAbsent("claimed".to_owned(), Record::new(record(2).context, soon)),
        Write::Put("moved".to_owned(), record(3)),
        moved,
    ]);
    let keys = ["claimed", "moved", "put"];
    let found = (keys.map(|key| backend.get(key).is_some()), backend.keys());
    // On a machine that took longer, this cannot be checked.
    if SystemTime::now() < soon {
        rule(
            found.0 == [true; 3] && found.1 == keys,
            "a record exists until its `expires_at`",
            format_args!("{found:?} of {keys:?}, before {soon:?}"),
        );
    }
    for key in keys {
        backend.write(&[Write::Expire("other".to_owned(), soon)]);
        let deadline = soon + EXPIRY_PATIENCE;
        while SystemTime::now() < deadline && backend.get(key).is_some() {
            thread::sleep(Duration::from_millis(5));
        }
        backend.has_none(key, "a record is gone once its `expires_at` has passed");
    }
    backend.scan_is(&[], "`scan` does not visit expired records");
}

pub(super) fn an_expired_record_can_be_replaced<B: StorageBackend>(backend: &Checked<B>) {
    let expired = Record::new(
        record(1).context,
        SystemTime::now() - Duration::from_secs(2),
    );
    backend.put("key", &expired);
    backend.loses(
        "key",
        expired.expires_at,
        "a record is gone once its `expires_at` has passed",
    );
    let sentence = "`PutIfAbsent` stores its record over an expired one";
    let existing = backend.put_if_absent("key", &record(2));
    rule(
        existing.is_none(),
        sentence,
        format_args!("{existing:?} is returned"),
    );
    backend.holds("key", &record(2), sentence);
    backend.write(&[Write::Expire("key".to_owned(), in_a_month())]);
    backend.holds("key", &record(2), sentence);
}

/// A root with a parent and links, or without.
fn root(number: u32) -> RootSpan {
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let link = SpanContext::new(
        TraceId::from(7),
        SpanId::from(8),
        TraceFlags::SAMPLED,
        true,
        TraceState::NONE,
    );
    let links = vec![(link, "new_run".to_owned()); number as usize % 4 / 2];
    RootSpan {
        parent_span_id: (number % 2 == 0).then(|| SpanId::from(9)),
        last_end: at(1_800_000_100),
        spans: u64::from(number),
        links,
        ..RootSpan::new(SpanId::from(5), "order \u{1f}\"42\"", at(1_800_000_000))
    }
}
