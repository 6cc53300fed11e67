//! What waits to be written: for each key what is left of all its writes, which mostly is one.
//!
//! Spans wait for each other here, and for the writer: nothing in it takes longer when much waits.

mod blocks;

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use self::blocks::Blocks;
use crate::backend::{Record, Write};

/// How many keys wait at most. The oldest is dropped for one more, and counted.
pub(super) const MOST_KEYS: usize = 64 * 1024;

/// Called with what is stored under a key once a write of it is done; returns the writes that follow from that.
pub(crate) type OnWinner = Box<dyn FnOnce(Record) -> Vec<Write> + Send>;

/// Writes that wait, and who wants to know what becomes of them.
#[derive(Default)]
pub(super) struct Waiting {
    writes: Writes,
    /// At the places of the writes.
    claims: Claims,
}

/// What was taken to be written, and how far that has come.
pub(super) struct InFlight {
    writes: Writes,
    done: AtomicUsize,
}

/// Those who want to know what becomes of what is in flight, and is not done yet.
pub(super) type Claims = Blocks<Option<OnWinner>>;

#[derive(Default)]
struct Writes {
    in_order: Blocks<Write>,
    /// Where the last write of each key is, by the hash of the key, counted from the first that there ever was. Of two
    /// keys with one hash the second is not found here, and its writes are not merged; they keep their order.
    places: Places,
    hasher: foldhash::fast::RandomState,
    /// How many have gone from the front.
    gone: usize,
}

/// Many small maps, of which one at a time grows, and never all that there is.
#[derive(Default)]
struct Places(Vec<HashMap<u64, usize, BuildHasherDefault<IsHash>>>);

/// What is known of a key without the backend.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Known {
    Record(Record),
    Gone,
    /// As the backend has it, but until another moment.
    Until(SystemTime),
}

/// What is no longer needed. It may be anybody's code, and is to be dropped where nothing is locked.
pub(super) type Unneeded = (Option<Write>, Option<OnWinner>);

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.writes.in_order.is_empty()
    }

    /// `true` beside what is no longer needed where a key was dropped that was.
    pub(super) fn add(&mut self, write: Write, claim: Option<OnWinner>) -> (Unneeded, bool) {
        let writes = &mut self.writes;
        let hash = writes.hasher.hash_one(write.key());
        let place = writes.place_of(hash, write.key());
        if let Some(place) = place.filter(|place| can_merge(&writes.in_order[*place], &write)) {
            let there = &mut writes.in_order[place];
            return (merge(there, &mut self.claims[place], write, claim), false);
        }
        let is_full = writes.in_order.len() >= MOST_KEYS;
        let mut unneeded = (None, None);
        if is_full {
            // An expiry that is not moved is needed least.
            if let Write::Expire(..) = write {
                return ((Some(write), claim), true);
            }
            unneeded = (writes.drop_oldest(), self.claims.pop_front().flatten());
        }
        let new_place = writes.gone + writes.in_order.len();
        match place {
            Some(_) => drop(writes.places.of(hash).insert(hash, new_place)),
            None => drop(writes.places.of(hash).entry(hash).or_insert(new_place)),
        }
        writes.in_order.push_back(write);
        self.claims.push_back(claim);
        (unneeded, is_full)
    }

    pub(super) fn known(&self, key: &str) -> Option<Known> {
        let place = self
            .writes
            .place_of(self.writes.hasher.hash_one(key), key)?;
        Some(known(&self.writes.in_order[place]))
    }

    /// Takes everything; `emptied` is what gathers from now on.
    pub(super) fn take(&mut self, emptied: Self) -> (InFlight, Claims) {
        let Self { writes, claims } = std::mem::replace(self, emptied);
        let done = AtomicUsize::new(0);
        (InFlight { writes, done }, claims)
    }
}

impl Writes {
    fn drop_oldest(&mut self) -> Option<Write> {
        let write = self.in_order.pop_front()?;
        let hash = self.hasher.hash_one(write.key());
        if self.places.get(hash) == Some(self.gone) {
            self.places.of(hash).remove(&hash);
        }
        self.gone += 1;
        Some(write)
    }

    fn place_of(&self, hash: u64, key: &str) -> Option<usize> {
        let place = self.places.get(hash)? - self.gone;
        (self.in_order[place].key() == key).then_some(place)
    }
}

impl Places {
    const MAPS: usize = 64;

    fn get(&self, hash: u64) -> Option<usize> {
        self.0.get(Self::map_of(hash))?.get(&hash).copied()
    }

    fn of(&mut self, hash: u64) -> &mut HashMap<u64, usize, BuildHasherDefault<IsHash>> {
        if self.0.is_empty() {
            self.0.resize_with(Self::MAPS, HashMap::default);
        }
        &mut self.0[Self::map_of(hash)]
    }

    /// By bits that a map itself makes no use of.
    fn map_of(hash: u64) -> usize {
        (hash >> 40) as usize % Self::MAPS
    }

    fn clear(&mut self) {
        for map in &mut self.0 {
            map.clear();
            // What a backlog took is not kept for good.
            map.shrink_to(2 * KEPT / Self::MAPS);
        }
    }
}

impl InFlight {
    /// The next few that are not done.
    pub(super) fn next_group(&self, most: usize) -> (&[Write], Range<usize>) {
        let start = self.done.load(Ordering::Relaxed);
        let group = self.writes.in_order.slice_from(start, most);
        (group, start..start + group.len())
    }

    /// From now on the backend knows better.
    pub(super) fn are_done(&self, places: Range<usize>) {
        self.done.store(places.end, Ordering::Release);
    }

    pub(super) fn known(&self, key: &str) -> Option<Known> {
        let place = self
            .writes
            .place_of(self.writes.hasher.hash_one(key), key)?;
        let is_done = place < self.done.load(Ordering::Acquire);
        (!is_done).then(|| known(&self.writes.in_order[place]))
    }

    /// What writes can gather in again without asking for memory.
    pub(super) fn into_emptied(self, mut claims: Claims) -> Waiting {
        let mut writes = self.writes;
        writes.in_order.clear(KEPT / blocks::BLOCK);
        writes.places.clear();
        writes.gone = 0;
        claims.clear(KEPT / blocks::BLOCK);
        Waiting { writes, claims }
    }
}

/// For how many writes room is kept.
const KEPT: usize = 4000;

/// What a key has as soon as that is written.
fn known(write: &Write) -> Known {
    match write {
        Write::Put(_, record) | Write::PutIfAbsent(_, record) => Known::Record(record.clone()),
        Write::Remove(_) => Known::Gone,
        Write::Expire(_, at) => Known::Until(*at),
    }
}

/// Whether one write can do what the two do. What a claim finds decides what an expiry after it moves, and an expiry
/// may be that of what a claim after it finds.
fn can_merge(there: &Write, newer: &Write) -> bool {
    match (there, newer) {
        (Write::PutIfAbsent(..), Write::Expire(..)) => false,
        (Write::Expire(_, at), Write::PutIfAbsent(_, record)) => is_over(*at, record),
        _ => true,
    }
}

/// Whether what ends at that moment is over when the other is recorded.
fn is_over(expires_at: SystemTime, recorded: &Record) -> bool {
    expires_at <= recorded.context.recorded_at()
}

/// Leaves of two writes on one key what is to be done.
fn merge(
    there: &mut Write,
    claimed: &mut Option<OnWinner>,
    newer: Write,
    claim: Option<OnWinner>,
) -> Unneeded {
    let replacement = match (&mut *there, newer) {
        (Write::Put(_, record), Write::Expire(_, at)) => {
            record.expires_at = at;
            return (None, claim);
        }
        // Nothing is there any more, whatever it was.
        (
            Write::Put(_, Record { expires_at, .. }) | Write::Expire(_, expires_at),
            Write::PutIfAbsent(key, record),
        ) if is_over(*expires_at, &record) => Write::Put(key, record),
        (Write::Remove(_), Write::PutIfAbsent(key, record)) => Write::Put(key, record),
        // First come is first served, here as well; who comes later is told the same.
        (Write::PutIfAbsent(..) | Write::Put(..), newer @ Write::PutIfAbsent(..)) => {
            *claimed = match (claimed.take(), claim) {
                (Some(first), Some(second)) => Some(Box::new(move |winner| {
                    let mut follow_ups = first(winner.clone());
                    follow_ups.extend(second(winner));
                    follow_ups
                })),
                (first, second) => first.or(second),
            };
            return (Some(newer), None);
        }
        (Write::Remove(_), newer @ Write::Expire(..)) => return (Some(newer), claim),
        (_, newer) => newer,
    };
    let write = std::mem::replace(there, replacement);
    (Some(write), std::mem::replace(claimed, claim))
}

/// Hashes what is a hash.
#[derive(Default)]
struct IsHash(u64);

impl Hasher for IsHash {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn write(&mut self, bytes: &[u8]) {
        let hash = |hash: u64, byte: &u8| hash.rotate_left(8) ^ u64::from(*byte);
        self.0 = bytes.iter().fold(self.0, hash);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::context::WorkflowContext;

    /// Seconds since some moment.
    fn time(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    fn record(span: u64, now: u64) -> Record {
        let parent = format!("00-0af7651916cd43dd8448eb211c80319c-{span:016x}-01");
        let context = WorkflowContext::parse(&parent, "").expect("well formed");
        Record::new(context.with_recorded_at(time(now)), time(now + 100))
    }

    fn span_of(record: &Record) -> u64 {
        u64::from_be_bytes(record.context.span_id().to_bytes())
    }

    /// What a backend does.
    #[derive(Clone, Debug, Default)]
    struct Model(BTreeMap<String, Record>);

    impl Model {
        fn write(&mut self, write: &Write, now: u64) {
            let key = write.key().to_owned();
            let live = self
                .0
                .get(&key)
                .cloned()
                .filter(|there| there.expires_at > time(now));
            match write {
                Write::Put(_, record) => drop(self.0.insert(key, record.clone())),
                Write::Remove(_) => drop(self.0.remove(&key)),
                Write::Expire(_, at) => {
                    if let Some(mut record) = live {
                        record.expires_at = *at;
                        self.0.insert(key, record);
                    }
                }
                Write::PutIfAbsent(..) if live.is_some() => {}
                Write::PutIfAbsent(_, record) => drop(self.0.insert(key, record.clone())),
            }
        }

        fn live(&self, now: u64) -> BTreeMap<&str, (u64, SystemTime)> {
            let live = self
                .0
                .iter()
                .filter(|(_, record)| record.expires_at > time(now));
            live.map(|(key, record)| (&**key, (span_of(record), record.expires_at)))
                .collect()
        }
    }

    fn write(kind: usize, key: usize, span: u64, now: u64) -> Write {
        let key = ["a", "b", "c"][key].to_owned();
        match kind {
            0 => Write::Put(key, record(span, now)),
            1 | 2 => Write::PutIfAbsent(key, record(span, now)),
            3 => Write::Remove(key),
            // An end at once, or a longer life.
            4 => Write::Expire(key, time(now)),
            _ => Write::Expire(key, time(now + 200)),
        }
    }

    proptest! {
        #[test]
        fn what_is_left_of_many_writes_does_the_same(
            before in prop::collection::vec((0..6_usize, 0..3_usize), 0..4),
            writes in prop::collection::vec((0..6_usize, 0..3_usize), 1..12),
        ) {
            let mut one_by_one = Model::default();
            for (span, (kind, key)) in (1..).zip(before) {
                one_by_one.write(&write(kind, key, span, 0), 0);
            }
            let mut merged = one_by_one.clone();
            let mut waiting = Waiting::default();
            let mut now = 1;
            for (span, (kind, key)) in (100..).zip(&writes) {
                now += 1;
                let write = write(*kind, *key, span, now);
                // Only what memory still has is kept longer.
                if *kind == 5 && !one_by_one.live(now).contains_key(write.key()) {
                    continue;
                }
                one_by_one.write(&write, now);
                waiting.add(write, None);
            }
            let claimed_before = writes.iter().filter(|(kind, _)| [1, 2].contains(kind)).count() > 1;
            for key in ["a", "b", "c"] {
                let live = one_by_one.live(now).get(key).copied();
                match waiting.known(key) {
                    // As far as anybody can know, a claim is won.
                    Some(Known::Record(record)) if merged.live(now).is_empty() && !claimed_before => {
                        let known = (record.expires_at > time(now)).then(|| (span_of(&record), record.expires_at));
                        prop_assert_eq!(known, live);
                    }
                    Some(Known::Gone) => prop_assert_eq!(live, None),
                    Some(Known::Until(at)) if at <= time(now) => prop_assert_eq!(live, None),
                    _ => {}
                }
            }
            let (in_flight, _) = waiting.take(Waiting::default());
            for write in in_flight.next_group(100).0 {
                merged.write(write, now);
            }
            prop_assert_eq!(merged.live(now), one_by_one.live(now));
        }
    }

    #[test]
    fn the_oldest_go_first_and_expiries_before_all() {
        let mut waiting = Waiting::default();
        for n in 0..MOST_KEYS {
            let (_, dropped) = waiting.add(Write::Remove(n.to_string()), None);
            assert!(!dropped);
        }
        let (unneeded, dropped) = waiting.add(Write::Expire("late".into(), time(1)), None);
        assert!(dropped && unneeded.0 == Some(Write::Expire("late".into(), time(1))));
        for n in 0..10 {
            let (unneeded, dropped) = waiting.add(Write::Remove(format!("more {n}")), None);
            assert!(dropped && unneeded.0 == Some(Write::Remove(n.to_string())));
            assert_eq!(waiting.known(&n.to_string()), None);
            assert_eq!(waiting.known(&(n + 1).to_string()), Some(Known::Gone));
            assert_eq!(waiting.known(&format!("more {n}")), Some(Known::Gone));
        }
        let (_, dropped) = waiting.add(Write::Remove("20".into()), None);
        assert!(!dropped, "it waits already");
        let (in_flight, claims) = waiting.take(Waiting::default());
        let (group, places) = in_flight.next_group(3);
        assert_eq!(
            group.iter().map(Write::key).collect::<Vec<_>>(),
            ["10", "11", "12"]
        );
        in_flight.are_done(places);
        assert_eq!(in_flight.known("12"), None);
        assert_eq!(in_flight.known("13"), Some(Known::Gone));
        assert_eq!(in_flight.next_group(1).0[0].key(), "13");
        assert!(in_flight.into_emptied(claims).is_empty());
    }
}
