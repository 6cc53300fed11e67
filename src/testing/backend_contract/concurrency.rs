//! The rules of `scan` and `flush`, and of calls from several threads.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::checked::*;
use crate::backend::{Record, StorageBackend, Write};

/// A call that takes longer is assumed to wait for a lock that its caller holds.
const CALL_PATIENCE: Duration = Duration::from_secs(5);

const THREADS: usize = 8;

pub(super) fn scan_visits_every_record_once<B: StorageBackend>(backend: &Checked<B>) {
    let expected: Vec<_> = (1..=5_000)
        .map(|span| (format!("{span:04}"), span))
        .collect();
    for some in expected.chunks(500) {
        let put = |(key, span): &(String, u64)| Write::Put(key.clone(), record(*span));
        backend.write(&some.iter().map(put).collect::<Vec<_>>());
    }
    let mut visited = Vec::new();
    let visit = &mut |key: &str, record: Record| visited.push((key.to_owned(), span_of(&record)));
    succeeded("scan", backend.0.scan(visit));
    visited.sort();
    rule(
        visited == expected,
        "`scan` visits every record once",
        format_args!("{} of {}", visited.len(), expected.len()),
    );
}

pub(super) fn scan_holds_no_lock_while_visit_runs<B: StorageBackend>(backend: &Checked<B>) {
    for span in 1..=50 {
        backend.put(&span.to_string(), &record(span));
    }
    let mut visited = 0;
    let visit = &mut |key: &str, found: Record| {
        visited += 1;
        let (backend, key) = (backend.clone(), key.to_owned());
        let (done, is_done) = channel();
        // On another thread, so that a lock that is held is detected instead of waited for.
        let uses = thread::spawn(move || {
            backend.holds(&key, &found, "`visit` may use the backend");
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
        visited == 50,
        "`scan` visits every record once",
        format_args!("{visited} of 50"),
    );
    rule(
        backend.keys().len() == 50,
        "`visit` may use the backend",
        format_args!("some records are lost"),
    );
}

pub(super) fn scan_visits_every_record_that_stays_while_others_come_and_go<B: StorageBackend>(
    backend: &Checked<B>,
) {
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
            let mut visited = backend.keys();
            visited.retain(|key| !key.contains("passing"));
            rule(
                visited == staying,
                "`scan` visits once every record that exists during the whole scan",
                format_args!(
                    "{} of {}, while others come and go",
                    visited.len(),
                    staying.len()
                ),
            );
            let remove = |key| Write::Remove(key);
            backend.write(&passing.into_iter().map(remove).collect::<Vec<_>>());
        }
    });
}

pub(super) fn one_of_concurrent_claims_wins<B: StorageBackend>(backend: &Checked<B>) {
    let keys: Vec<_> = (0..200).map(|n| format!("key {n}")).collect();
    let sentence =
        "of concurrent `PutIfAbsent`s on one key one stores its record, and the others return it";
    let claims = at_once(THREADS, |thread| {
        let mut found = vec![None; keys.len()];
        for group in 0..20 {
            let places: Vec<_> = (0..10).map(|n| group * 10 + n).collect();
            let claim =
                |&at: &usize| Write::PutIfAbsent(keys[at].clone(), record(thread as u64 + 1));
            let existing = backend.write(&places.iter().map(claim).collect::<Vec<_>>());
            for (at, existing) in places.into_iter().zip(existing) {
                found[at] = existing;
            }
        }
        found
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
                "{} threads have stored {key:?}, which has {winner:?}",
                stored.len()
            ),
        );
        let returned = claims
            .iter()
            .filter_map(|claims| claims[at].as_ref().map(span_of));
        for returned in returned {
            rule(
                Some(returned) == winner,
                sentence,
                format_args!("{returned} was returned for {key:?}, which has {winner:?}"),
            );
        }
    }
}

pub(super) fn concurrent_writes_are_atomic<B: StorageBackend>(backend: &Checked<B>) {
    let sentence = "concurrent writes on one key behave as if they came one after the other";
    // Each thread removes and claims a key of its own, and all put the same one.
    at_once(THREADS, |thread| {
        for round in 0..20 {
            let mine = record(thread as u64 * 1_000 + round + 1);
            backend.put("shared", &mine);
            let found = backend.get("shared");
            rule(
                found.is_some(),
                sentence,
                format_args!("there is no record after a put"),
            );
            let own = format!("own {thread}");
            backend.write(&[Write::Remove(own.clone())]);
            let existing = backend.put_if_absent(&own, &mine);
            rule(
                existing.is_none(),
                sentence,
                format_args!("{existing:?} after a removal"),
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
        format_args!("{found:?} is not one of the last puts {last:?}"),
    );
}

pub(super) fn flush_loses_nothing<B: StorageBackend>(backend: &Checked<B>) {
    let sentence = "`flush` loses nothing";
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
    let visited = backend.keys().len();
    rule(visited == 21, sentence, format_args!("{visited} of 21"));
}
