//! The written contract of a backend, as a suite that anybody can hold their own to.

use std::fmt;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Barrier, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::{SpanId, TraceFlags, TraceId, TraceState};

use crate::backend::{BackendError, Record, StorageBackend, Write, WriteOutcome};
use crate::context::WorkflowContext;

/// How long a backend may take to hide what is over: servers free it by clocks of their own.
const EXPIRY_PATIENCE: Duration = Duration::from_millis(1500);

/// A call that takes longer is taken for one that waits for a lock of the caller's.
const CALL_PATIENCE: Duration = Duration::from_secs(5);

/// A backend may round times to the second.
const ROUNDING: Duration = Duration::from_secs(1);

/// The longest key is a byte shorter.
const KEY_BOUND: usize = 4096;

const THREADS: usize = 8;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Holds a backend to the contract of [`StorageBackend`]. What may be lost when a process or a machine dies is not
/// in it.
///
/// `make` is called once for each of about twenty checks, and answers an empty backend each time. All of them
/// together take a few seconds, since some wait for records to expire.
///
/// ```
/// use tracing_workflow_context::MemoryBackend;
/// use tracing_workflow_context::testing::check_backend;
///
/// check_backend(MemoryBackend::new);
/// ```
///
/// # Panics
///
/// Where a rule is broken, with a sentence that names it.
pub fn check_backend<B: StorageBackend>(make: impl Fn() -> B) {
    let checks: [fn(&Checked<B>); 19] = [
        an_empty_backend_has_nothing,
        put_stores_over_any_other,
        put_if_absent_stores_only_where_nothing_is,
        remove_forgets_one_key,
        expire_moves_the_expiry_of_what_is_there,
        each_write_has_its_answer,
        writes_on_one_key_keep_their_order,
        a_large_group_is_written,
        any_text_is_a_key,
        a_record_comes_back_as_it_was,
        what_is_over_is_not_shown,
        what_will_be_over_is_shown_until_then,
        what_is_over_makes_room,
        scan_shows_every_record_once,
        scan_holds_no_lock_while_its_visitor_runs,
        scan_shows_what_stays_while_others_come_and_go,
        one_of_many_wins_a_race,
        writes_at_once_come_one_after_the_other,
        flush_keeps_everything,
    ];
    for check in checks {
        let backend = Checked(Arc::new(make()));
        check(&backend);
        backend.has_read_nothing_malformed();
    }
}

/// A backend whose failures end the check.
struct Checked<B>(Arc<B>);

impl<B> Clone for Checked<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: StorageBackend> Checked<B> {
    /// The record that each write found.
    #[track_caller]
    fn write(&self, writes: &[Write]) -> Vec<Option<Record>> {
        let outcomes = succeeded("write", self.0.write(writes));
        rule(
            outcomes.len() == writes.len(),
            "`write` returns one outcome for each write",
            format_args!("{} outcomes for {} writes", outcomes.len(), writes.len()),
        );
        let found = |(write, outcome): (&Write, WriteOutcome)| match outcome {
            WriteOutcome::Done => None,
            WriteOutcome::Existing(record) => {
                rule(
                    matches!(write, Write::PutIfAbsent(..)),
                    "`write` finds a record for a `PutIfAbsent` only",
                    format_args!("{record:?} for {write:?}"),
                );
                Some(record)
            }
            WriteOutcome::Failed(error) => succeeded("write", Err(error)),
        };
        writes.iter().zip(outcomes).map(found).collect()
    }

    #[track_caller]
    fn put(&self, key: &str, record: &Record) {
        self.write(&[Write::Put(key.to_owned(), record.clone())]);
    }

    #[track_caller]
    fn put_if_absent(&self, key: &str, record: &Record) -> Option<Record> {
        let put = Write::PutIfAbsent(key.to_owned(), record.clone());
        self.write(&[put]).remove(0)
    }

    #[track_caller]
    fn get(&self, key: &str) -> Option<Record> {
        succeeded("get", self.0.get(key))
    }

    #[track_caller]
    fn flush(&self) {
        succeeded("flush", self.0.flush());
    }

    #[track_caller]
    fn keys(&self) -> Vec<String> {
        let mut keys = Vec::new();
        let visit = &mut |key: &str, _| keys.push(key.to_owned());
        succeeded("scan", self.0.scan(visit));
        keys.sort_unstable();
        keys
    }

    #[track_caller]
    fn holds(&self, key: &str, expected: &Record, sentence: &str) {
        let found = self.get(key);
        let same = found.as_ref().is_some_and(|found| alike(found, expected));
        rule(
            same,
            sentence,
            format_args!("under {key:?} is {found:?} in place of {expected:?}"),
        );
    }

    #[track_caller]
    fn has_not(&self, key: &str, sentence: &str) {
        let found = self.get(key);
        rule(
            found.is_none(),
            sentence,
            format_args!("under {key:?} is {found:?}"),
        );
    }

    #[track_caller]
    fn shows(&self, expected: &[&str], sentence: &str) {
        let keys = self.keys();
        rule(
            keys == expected,
            sentence,
            format_args!("`scan` shows {keys:?} in place of {expected:?}"),
        );
    }

    /// Waits until the key is gone, for as long as a backend may take for that.
    #[track_caller]
    fn loses(&self, key: &str, expires_at: SystemTime, sentence: &str) {
        let until_then = expires_at.duration_since(SystemTime::now());
        let deadline = Instant::now() + until_then.unwrap_or_default() + EXPIRY_PATIENCE;
        while Instant::now() < deadline && (self.get(key).is_some() || !self.keys().is_empty()) {
            thread::sleep(Duration::from_millis(5));
        }
        self.has_not(key, sentence);
        self.shows(&[], sentence);
    }

    fn has_read_nothing_malformed(&self) {
        let malformed = self.0.malformed();
        rule(
            malformed == 0,
            "`malformed` counts what could not be decoded, and nothing else",
            format_args!("{malformed}, but everything was written by this backend"),
        );
    }
}

fn an_empty_backend_has_nothing<B: StorageBackend>(backend: &Checked<B>) {
    backend.has_not("unknown", "an unknown key has no record");
    backend.shows(&[], "`make` answers an empty backend");
    backend.flush();
}

fn put_stores_over_any_other<B: StorageBackend>(backend: &Checked<B>) {
    for span in 1..=3 {
        backend.put("key", &record(span));
        backend.holds("key", &record(span), "`Put` stores over any other record");
    }
}

fn put_if_absent_stores_only_where_nothing_is<B: StorageBackend>(backend: &Checked<B>) {
    let sentence = "`PutIfAbsent` stores where there is no record, and answers nothing then";
    let stored = backend.put_if_absent("key", &record(1));
    rule(stored.is_none(), sentence, format_args!("{stored:?}"));
    backend.holds("key", &record(1), sentence);

    let sentence = "`PutIfAbsent` answers the record that is there, and leaves it";
    for (before, expected) in [(None, 1), (Some(3), 3)] {
        if let Some(span) = before {
            backend.put("key", &record(span));
        }
        let winner = backend.put_if_absent("key", &record(2));
        let is_expected = winner
            .as_ref()
            .is_some_and(|winner| alike(winner, &record(expected)));
        rule(is_expected, sentence, format_args!("{winner:?}"));
        backend.holds("key", &record(expected), sentence);
    }
}

fn remove_forgets_one_key<B: StorageBackend>(backend: &Checked<B>) {
    let sentence = "`Remove` forgets its key and no other, and does nothing where there is none";
    backend.put("kept", &record(1));
    for _ in 0..2 {
        backend.put("removed", &record(2));
        for _ in 0..2 {
            backend.write(&[Write::Remove("removed".to_owned())]);
            backend.has_not("removed", sentence);
            backend.holds("kept", &record(1), sentence);
            backend.shows(&["kept"], sentence);
        }
    }
}

fn expire_moves_the_expiry_of_what_is_there<B: StorageBackend>(backend: &Checked<B>) {
    let expire = |key: &str, at| drop(backend.write(&[Write::Expire(key.to_owned(), at)]));
    expire("key", in_a_month());
    let sentence = "`Expire` does nothing where there is no record";
    backend.has_not("key", sentence);
    backend.shows(&[], sentence);

    backend.put("key", &record(1));
    let moved = Record {
        expires_at: in_a_month() + DAY,
        ..record(1)
    };
    expire("key", moved.expires_at);
    backend.holds("key", &moved, "`Expire` moves the expiry and nothing else");

    let gone = SystemTime::now() - Duration::from_secs(1);
    expire("key", gone);
    backend.loses("key", gone, "`Expire` at a past moment ends a record");
    expire("key", in_a_month());
    backend.has_not("key", "`Expire` brings no record back");
}

fn each_write_has_its_answer<B: StorageBackend>(backend: &Checked<B>) {
    backend.write(&[]);
    let key = || "key".to_owned();
    let winners = backend.write(&[
        Write::PutIfAbsent(key(), record(1)),
        Write::Put("other".to_owned(), record(2)),
        Write::PutIfAbsent(key(), record(3)),
        Write::Expire(key(), in_a_month()),
        Write::PutIfAbsent("other".to_owned(), record(4)),
    ]);
    let won: Vec<_> = winners.iter().map(Option::is_some).collect();
    rule(
        won == [false, false, true, false, true],
        "each answer stands at the place of its write",
        format_args!("{winners:?}"),
    );
}

fn writes_on_one_key_keep_their_order<B: StorageBackend>(backend: &Checked<B>) {
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
    let sentence = "the writes of one `write` happen in their order for each key";
    for (writes, expected) in groups {
        backend.write(&[Write::Remove(key())]);
        backend.write(writes);
        match expected {
            Some(span) => backend.holds("key", &record(span), sentence),
            None => backend.has_not("key", sentence),
        }
    }
    let winners = backend.write(&[put(1), claim(2), put(3), claim(4)]);
    let spans: Vec<_> = winners
        .iter()
        .map(|winner| winner.as_ref().map(span_of))
        .collect();
    rule(
        spans == [None, Some(1), None, Some(3)],
        "a `PutIfAbsent` sees what was written before it in the same `write`",
        format_args!("the winners are {winners:?}"),
    );
}

fn a_large_group_is_written<B: StorageBackend>(backend: &Checked<B>) {
    let key = |span: u64| format!("key {span:04}");
    let puts: Vec<_> = (1..=2_000)
        .map(|span| Write::Put(key(span), record(span)))
        .collect();
    backend.write(&puts);
    for span in [1, 1_000, 2_000] {
        backend.holds(
            &key(span),
            &record(span),
            "a `write` can be any number of writes",
        );
    }
    let claims: Vec<_> = (1..=2_000)
        .map(|span| Write::PutIfAbsent(key(span), record(1)))
        .collect();
    let winners = backend.write(&claims);
    let right = (1..)
        .zip(&winners)
        .all(|(span, winner)| winner.as_ref().map(span_of) == Some(span));
    rule(
        right,
        "each answer stands at the place of its write",
        format_args!("of 2,000 writes"),
    );
}

fn any_text_is_a_key<B: StorageBackend>(backend: &Checked<B>) {
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
    let sentence = "any text of 1 to 4095 bytes is a key, and another one than any other text";
    for (span, key) in (1..).zip(keys) {
        let winner = backend.put_if_absent(key, &record(span));
        rule(
            winner.is_none(),
            sentence,
            format_args!("{key:?} is taken for another one"),
        );
    }
    backend.shows(&keys, sentence);
    for (span, key) in (1..).zip(keys) {
        backend.holds(key, &record(span), sentence);
        backend.write(&[Write::Remove(key.to_owned())]);
        backend.has_not(key, sentence);
    }
    backend.shows(&[], sentence);
}

fn a_record_comes_back_as_it_was<B: StorageBackend>(backend: &Checked<B>) {
    let member = |n| (format!("{n:a>256}"), "v".repeat(256));
    let states = [
        TraceState::NONE,
        state([("vendor".to_owned(), "1".to_owned())]),
        state([
            ("tenant@vendor".to_owned(), "a b".to_owned()),
            (
                "other".to_owned(),
                "!\"#$%&'()*+-./:;<>?@[\\]^_`{|}~".to_owned(),
            ),
        ]),
        state((10..42).map(member)),
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
        };

        backend.write(&[Write::Remove("put if absent".to_owned())]);
        backend.put("put", &record);
        backend.put_if_absent("put if absent", &record);
        for key in ["put", "put if absent"] {
            backend.holds(key, &record, sentence);
        }
        let winner = backend.put_if_absent("put", &self::record(1));
        let same = winner.as_ref().is_some_and(|winner| alike(winner, &record));
        rule(
            same,
            "the winner comes back as it was stored",
            format_args!("{winner:?} for {record:?}"),
        );
        let mut shown = Vec::new();
        succeeded("scan", backend.0.scan(&mut |_, record| shown.push(record)));
        let same = shown.len() == 2 && shown.iter().all(|shown| alike(shown, &record));
        rule(
            same,
            "`scan` shows a record as it was stored",
            format_args!("{shown:?} for {record:?}"),
        );
    }
}

fn what_is_over_is_not_shown<B: StorageBackend>(backend: &Checked<B>) {
    let sentence = "a record is gone when its `expires_at` is past";
    for past in [Duration::from_secs(2), DAY] {
        let over = Record::new(record(1).context, SystemTime::now() - past);
        backend.put("key", &over);
        backend.loses("key", over.expires_at, sentence);

        backend.put_if_absent("key", &over);
        backend.loses("key", over.expires_at, sentence);

        backend.put("key", &record(2));
        backend.put("key", &over);
        backend.loses("key", over.expires_at, sentence);
    }
}

fn what_will_be_over_is_shown_until_then<B: StorageBackend>(backend: &Checked<B>) {
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
    // On a machine that took longer, nothing can be said.
    if SystemTime::now() < soon {
        rule(
            found.0 == [true; 3] && found.1 == keys,
            "a record is there until its `expires_at`",
            format_args!("{found:?} of {keys:?}, before {soon:?}"),
        );
    }
    for key in keys {
        backend.write(&[Write::Expire("other".to_owned(), soon)]);
        let deadline = soon + EXPIRY_PATIENCE;
        while SystemTime::now() < deadline && backend.get(key).is_some() {
            thread::sleep(Duration::from_millis(5));
        }
        backend.has_not(key, "a record is gone when its `expires_at` is past");
    }
    backend.shows(&[], "`scan` does not show what is over");
}

fn what_is_over_makes_room<B: StorageBackend>(backend: &Checked<B>) {
    let over = Record::new(
        record(1).context,
        SystemTime::now() - Duration::from_secs(2),
    );
    backend.put("key", &over);
    backend.loses(
        "key",
        over.expires_at,
        "a record is gone when its `expires_at` is past",
    );
    let sentence = "`PutIfAbsent` stores where the record that was there is over";
    let winner = backend.put_if_absent("key", &record(2));
    rule(
        winner.is_none(),
        sentence,
        format_args!("{winner:?} is answered"),
    );
    backend.holds("key", &record(2), sentence);
    backend.write(&[Write::Expire("key".to_owned(), in_a_month())]);
    backend.holds("key", &record(2), sentence);
}

fn scan_shows_every_record_once<B: StorageBackend>(backend: &Checked<B>) {
    let expected: Vec<_> = (1..=5_000)
        .map(|span| (format!("{span:04}"), span))
        .collect();
    for some in expected.chunks(500) {
        let put = |(key, span): &(String, u64)| Write::Put(key.clone(), record(*span));
        backend.write(&some.iter().map(put).collect::<Vec<_>>());
    }
    let mut shown = Vec::new();
    let visit = &mut |key: &str, record: Record| shown.push((key.to_owned(), span_of(&record)));
    succeeded("scan", backend.0.scan(visit));
    shown.sort();
    rule(
        shown == expected,
        "`scan` shows every record once",
        format_args!("{} of {}", shown.len(), expected.len()),
    );
}

fn scan_holds_no_lock_while_its_visitor_runs<B: StorageBackend>(backend: &Checked<B>) {
    for span in 1..=50 {
        backend.put(&span.to_string(), &record(span));
    }
    let mut shown = 0;
    let visit = &mut |key: &str, found: Record| {
        shown += 1;
        let (backend, key) = (backend.clone(), key.to_owned());
        let (done, is_done) = channel();
        // On a thread of its own, so that a lock that is held is found and not waited for.
        let uses = thread::spawn(move || {
            backend.holds(&key, &found, "a visitor may use the backend");
            backend.put(&key, &record(1_000));
            backend.write(&[Write::Remove(key.clone())]);
            backend.put_if_absent(&key, &found);
            let _ = done.send(());
        });
        let waited = is_done.recv_timeout(CALL_PATIENCE);
        rule(
            waited != Err(RecvTimeoutError::Timeout),
            "`scan` holds no lock while `visit` runs",
            format_args!("another thread could not use the backend meanwhile"),
        );
        if let Err(panic) = uses.join() {
            std::panic::resume_unwind(panic);
        }
    };
    succeeded("scan", backend.0.scan(visit));
    rule(
        shown == 50,
        "`scan` shows every record once",
        format_args!("{shown} of 50"),
    );
    rule(
        backend.keys().len() == 50,
        "a visitor may use the backend",
        format_args!("some are lost"),
    );
}

fn scan_shows_what_stays_while_others_come_and_go<B: StorageBackend>(backend: &Checked<B>) {
    let staying: Vec<_> = (1_000..3_000).map(|span| span.to_string()).collect();
    let puts = staying.iter().map(|key| Write::Put(key.clone(), record(1)));
    backend.write(&puts.collect::<Vec<_>>());
    at_once(4, |thread| {
        for round in 0..10 {
            let passing: Vec<_> = (0..20)
                .map(|n| format!("{round}{n} passing {thread}"))
                .collect();
            let put = |key: &String| Write::Put(key.clone(), record(2));
            backend.write(&passing.iter().map(put).collect::<Vec<_>>());
            let mut shown = backend.keys();
            shown.retain(|key| !key.contains("passing"));
            rule(
                shown == staying,
                "`scan` shows once every record that is there all the while",
                format_args!(
                    "{} of {}, while others come and go",
                    shown.len(),
                    staying.len()
                ),
            );
            let remove = |key| Write::Remove(key);
            backend.write(&passing.into_iter().map(remove).collect::<Vec<_>>());
        }
    });
}

fn one_of_many_wins_a_race<B: StorageBackend>(backend: &Checked<B>) {
    let keys: Vec<_> = (0..200).map(|n| format!("key {n}")).collect();
    let sentence = "of many that put if absent at once one wins, and all others are told who";
    let claims = at_once(THREADS, |thread| {
        let mut winners = vec![None; keys.len()];
        for group in 0..20 {
            let places: Vec<_> = (0..10).map(|n| group * 10 + n).collect();
            let claim =
                |&at: &usize| Write::PutIfAbsent(keys[at].clone(), record(thread as u64 + 1));
            let answers = backend.write(&places.iter().map(claim).collect::<Vec<_>>());
            for (at, answer) in places.into_iter().zip(answers) {
                winners[at] = answer;
            }
        }
        winners
    });
    for (at, key) in keys.iter().enumerate() {
        let winner = backend.get(key).as_ref().map(span_of);
        let stored: Vec<_> = (1..)
            .zip(&claims)
            .filter(|(_, claims)| claims[at].is_none())
            .collect();
        rule(
            stored.len() == 1 && winner == Some(stored[0].0),
            sentence,
            format_args!(
                "{} threads have won {key:?}, which holds {winner:?}",
                stored.len()
            ),
        );
        let told = claims
            .iter()
            .filter_map(|claims| claims[at].as_ref().map(span_of));
        for told in told {
            rule(
                Some(told) == winner,
                sentence,
                format_args!("{told} was named for {key:?}, which holds {winner:?}"),
            );
        }
    }
}

fn writes_at_once_come_one_after_the_other<B: StorageBackend>(backend: &Checked<B>) {
    let sentence = "concurrent writes on one key behave as if they came one after the other";
    // Of what each thread claims after it has removed it, the last one is still there.
    at_once(THREADS, |thread| {
        for round in 0..20 {
            let mine = record(thread as u64 * 1_000 + round + 1);
            backend.put("shared", &mine);
            let found = backend.get("shared");
            rule(
                found.is_some(),
                sentence,
                format_args!("nothing is there after a put"),
            );
            let own = format!("own {thread}");
            backend.write(&[Write::Remove(own.clone())]);
            let winner = backend.put_if_absent(&own, &mine);
            rule(
                winner.is_none(),
                sentence,
                format_args!("{winner:?} after a removal"),
            );
            backend.holds(&own, &mine, sentence);
        }
    });
    let last: Vec<_> = (0..THREADS as u64)
        .map(|thread| thread * 1_000 + 20)
        .collect();
    let found = backend.get("shared").as_ref().map(span_of);
    rule(
        found.is_some_and(|found| last.contains(&found)),
        sentence,
        format_args!("{found:?} is none of the last puts {last:?}"),
    );
}

fn flush_keeps_everything<B: StorageBackend>(backend: &Checked<B>) {
    let sentence = "`flush` keeps everything";
    backend.flush();
    backend.put("key", &record(1));
    backend.flush();
    backend.flush();
    backend.holds("key", &record(1), sentence);
    at_once(4, |thread| {
        for round in 0..5 {
            let key = format!("key {thread} {round}");
            backend.put(&key, &record(2));
            backend.flush();
            backend.holds(&key, &record(2), sentence);
        }
    });
    let shown = backend.keys().len();
    rule(shown == 21, sentence, format_args!("{shown} of 21"));
}

/// A record that is told from others by its span id.
fn record(span: u64) -> Record {
    let flags = TraceFlags::SAMPLED;
    let context = context(7, span, flags, &TraceState::NONE, false);
    Record::new(context, in_a_month())
}

fn span_of(record: &Record) -> u64 {
    u64::from_be_bytes(record.context.span_id().to_bytes())
}

fn context(
    trace: u128,
    span: u64,
    flags: TraceFlags,
    state: &TraceState,
    resumed: bool,
) -> WorkflowContext {
    let (trace, span) = (TraceId::from(trace), SpanId::from(span));
    WorkflowContext::from_parts(trace, span, flags, state, beginning(), resumed)
        .expect("no id is zero")
}

fn state(members: impl IntoIterator<Item = (String, String)>) -> TraceState {
    TraceState::from_key_value(members).expect("valid members")
}

/// The same moment each time, so that a record can be made again to be compared with.
fn beginning() -> SystemTime {
    static BEGINNING: OnceLock<SystemTime> = OnceLock::new();
    *BEGINNING.get_or_init(SystemTime::now)
}

fn in_a_month() -> SystemTime {
    beginning() + 30 * DAY
}

/// Alike in all, but times may be rounded.
fn alike(found: &Record, expected: &Record) -> bool {
    let near = |one: SystemTime, other: SystemTime| {
        let apart = one.duration_since(other);
        apart.unwrap_or_else(|error| error.duration()) <= ROUNDING
    };
    let exact = |record: &Record| {
        let context = &record.context;
        let carried = (
            context.traceparent(),
            context.tracestate(),
            context.is_resumed(),
        );
        (carried, record.run_id.clone(), record.generation)
    };
    exact(found) == exact(expected)
        && near(found.context.recorded_at(), expected.context.recorded_at())
        && near(found.expires_at, expected.expires_at)
}

#[track_caller]
fn succeeded<R>(call: &str, result: Result<R, BackendError>) -> R {
    result.unwrap_or_else(|error| {
        panic!("this backend breaks the contract of StorageBackend: it must work while it is checked: `{call}` fails: {error}")
    })
}

#[track_caller]
fn rule(kept: bool, sentence: &str, found: fmt::Arguments<'_>) {
    assert!(
        kept,
        "this backend breaks the contract of StorageBackend: {sentence}: {found}"
    );
}

/// Runs on several threads that begin together, each with its number from 0.
fn at_once<R: Send>(threads: usize, run: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let (start, run) = (&Barrier::new(threads), &run);
    thread::scope(|scope| {
        let start_one = |thread| {
            scope.spawn(move || {
                start.wait();
                run(thread)
            })
        };
        let threads: Vec<_> = (0..threads).map(start_one).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, R>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}
