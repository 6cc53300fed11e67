//! A queue of writes in their order, merged where one write does what several on its key would.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher as _;
use std::sync::atomic::{
    AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};
use std::time::SystemTime;

use foldhash::fast::RandomState;

use crate::backend::{BackendError, Record, Write};
use crate::tracestate::otel_bytes;

/// The largest number of writes in a queue. Beyond it the oldest is dropped.
pub(super) const MAX_WRITES: usize = 64 * 1024;

/// The largest number of bytes of the writes in a queue, as [`bytes_of`] counts them: half a KiB for each of so many
/// writes, about twice of what they have with ids of usual length and no tracestate.
pub(super) const MAX_BYTES: usize = 32 * 1024 * 1024;

/// A bound of the size of a root, without its links.
const ROOT_BYTES: usize = 512;
const LINK_BYTES: usize = 256;

/// Called with the record that is stored under a key after a write; returns the writes that follow from it.
pub(crate) type OnWinner = Box<dyn FnOnce(Record) -> Vec<FollowUp> + Send>;

/// A write that follows from the result of another one. It is carried out before any that was queued meanwhile.
pub(crate) struct FollowUp {
    pub(crate) write: Write,
    pub(crate) on_winner: Option<OnWinner>,
}

/// Callbacks in the order of their writes.
pub(super) type Callbacks = VecDeque<Option<OnWinner>>;

/// Writes that are still merged, and their callbacks.
#[derive(Default)]
pub(super) struct WriteQueue {
    writes: Writes,
    callbacks: Callbacks,
}

/// Writes that were passed to the backend, or will be. Nothing is merged into them.
pub(super) struct InFlight {
    writes: Writes,
    done: AtomicUsize,
}

#[derive(Default)]
struct Writes {
    in_order: VecDeque<Write>,
    /// The place of the last write of each key, by the hash of the key and counted from the first write that ever was
    /// in the queue. Of two keys with equal hashes only the first is found, and the other's writes are not merged.
    places: HashMap<u64, usize, RandomState>,
    /// The number of writes dropped from the front.
    gone: usize,
    bytes: usize,
}

/// The content of a key after a queue of writes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Known {
    Record(Record),
    Gone,
    /// The backend's record, with this expiry.
    Until(SystemTime),
}

/// Losses of full queues, and of merges.
#[derive(Default)]
pub(super) struct Lost {
    /// The number of writes dropped.
    pub(super) writes: u64,
    /// Callbacks that will not be called. To be dropped where nothing is locked, since they may own anything.
    pub(super) callbacks: Vec<OnWinner>,
}

impl WriteQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.writes.in_order.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.writes.in_order.len()
    }

    pub(super) fn add(&mut self, write: Write, on_winner: Option<OnWinner>, lost: &mut Lost) {
        let writes = &mut self.writes;
        let hash = writes.places.hasher().hash_one(write.key());
        let place = writes.place(hash, write.key());
        if let Some(place) = place.filter(|&place| can_merge(&writes.in_order[place], &write)) {
            let (there, callback) = (&mut writes.in_order[place], &mut self.callbacks[place]);
            writes.bytes -= bytes_of(there);
            lost.callbacks
                .extend(merge(there, callback, write, on_winner));
            writes.bytes += bytes_of(there);
            self.make_room(0, 0, lost);
            return;
        }
        let bytes = bytes_of(&write);
        let is_full = !writes.has_room(1, bytes);
        // A missed expiry does the least harm.
        if bytes > MAX_BYTES || (is_full && matches!(write, Write::Expire(..))) {
            lost.writes += 1;
            lost.callbacks.extend(on_winner);
            return;
        }
        self.make_room(1, bytes, lost);
        let writes = &mut self.writes;
        writes.bytes += bytes;
        // The last write of the key may be gone now.
        let place = writes.place(hash, write.key());
        let new_place = writes.gone + writes.in_order.len();
        match place {
            Some(_) => drop(writes.places.insert(hash, new_place)),
            None => drop(writes.places.entry(hash).or_insert(new_place)),
        }
        writes.in_order.push_back(write);
        self.callbacks.push_back(on_winner);
    }

    /// Drops the oldest writes until there is room for so many more.
    fn make_room(&mut self, more: usize, bytes: usize, lost: &mut Lost) {
        while !self.writes.has_room(more, bytes) && !self.is_empty() {
            self.writes.drop_oldest();
            lost.writes += 1;
            lost.callbacks.extend(self.callbacks.pop_front().flatten());
        }
    }

    pub(super) fn known(&self, key: &str) -> Option<Known> {
        self.writes.known(key, 0)
    }

    pub(super) fn into_in_flight(self) -> (InFlight, Callbacks) {
        let in_flight = InFlight {
            writes: self.writes,
            done: AtomicUsize::new(0),
        };
        (in_flight, self.callbacks)
    }
}

impl InFlight {
    /// Returns the next writes that are not done, `most` at most.
    pub(super) fn next_group(&self, most: usize) -> &[Write] {
        let done = self.done.load(Relaxed);
        let (first, second) = self.writes.in_order.as_slices();
        let rest = match first.get(done..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => second.get(done - first.len()..).unwrap_or_default(),
        };
        &rest[..rest.len().min(most)]
    }

    /// Marks the next writes as done. From now on, only the backend knows of them.
    pub(super) fn mark_done(&self, count: usize) {
        self.done.fetch_add(count, Release);
    }

    pub(super) fn known(&self, key: &str) -> Option<Known> {
        self.writes.known(key, self.done.load(Acquire))
    }
}

impl Writes {
    /// Returns the index of the last write of a key.
    fn place(&self, hash: u64, key: &str) -> Option<usize> {
        let place = self.places.get(&hash)? - self.gone;
        (self.in_order[place].key() == key).then_some(place)
    }

    /// Returns the content of a key after its last write, if that is at or behind the index `from`.
    fn known(&self, key: &str, from: usize) -> Option<Known> {
        let place = self.place(self.places.hasher().hash_one(key), key)?;
        (place >= from).then(|| match &self.in_order[place] {
            Write::Put(_, record) | Write::PutIfAbsent(_, record) => Known::Record(record.clone()),
            Write::Remove(_) => Known::Gone,
            Write::Expire(_, at) => Known::Until(*at),
        })
    }

    fn has_room(&self, more: usize, bytes: usize) -> bool {
        self.in_order.len() + more <= MAX_WRITES && self.bytes + bytes <= MAX_BYTES
    }

    fn drop_oldest(&mut self) {
        let Some(write) = self.in_order.pop_front() else {
            return;
        };
        self.bytes -= bytes_of(&write);
        let hash = self.places.hasher().hash_one(write.key());
        if self.places.get(&hash) == Some(&self.gone) {
            self.places.remove(&hash);
        }
        self.gone += 1;
    }
}

/// Returns about how many bytes a write takes, with what it points to and its place in the queue.
#[inline]
fn bytes_of(write: &Write) -> usize {
    let of_record = match write {
        Write::PutIfAbsent(_, record) | Write::Put(_, record) => {
            record.context.trace_state_bytes()
                + record.run_id.as_ref().map_or(0, String::len)
                + record.root.as_ref().map_or(0, |root| {
                    let links = root
                        .links
                        .iter()
                        .map(|(link, _)| LINK_BYTES + otel_bytes(link.trace_state()));
                    ROOT_BYTES + root.name.len() + links.sum::<usize>()
                })
        }
        Write::Expire(..) | Write::Remove(_) => 0,
    };
    size_of::<Write>() + size_of::<(u64, usize)>() + write.key().len() + of_record
}

/// The number of bytes of a write that weigh as much as one more message: the channel is bounded in bytes as well.
const BYTES_OF_WEIGHT: usize = 1024;

/// Returns the weight of a write on its way to the queue, in messages.
#[inline]
pub(super) fn weight(write: &Write) -> usize {
    1 + bytes_of(write) / BYTES_OF_WEIGHT
}

/// Returns the cause of dropped writes if the backend has not failed: it is too slow.
pub(super) fn overflow() -> BackendError {
    let message =
        format!("more than {MAX_WRITES} writes or {MAX_BYTES} bytes waited for the backend");
    BackendError::new(message, None)
}

/// Returns `true` if one write can do what two on one key do. An expiry after a claim moves the record that the claim
/// finds, and an expiry before a claim that of another record.
fn can_merge(there: &Write, newer: &Write) -> bool {
    match (there, newer) {
        (Write::PutIfAbsent(..), Write::Expire(..)) => false,
        (Write::Expire(_, at), Write::PutIfAbsent(_, record)) => is_over(*at, record),
        _ => true,
    }
}

/// Makes the write that is there do what both do. Returns the callback that will not be called.
fn merge(
    there: &mut Write,
    callback: &mut Option<OnWinner>,
    newer: Write,
    on_winner: Option<OnWinner>,
) -> Option<OnWinner> {
    *there = match (&mut *there, newer) {
        (Write::Put(_, record), Write::Expire(_, at)) => {
            record.expires_at = at;
            return on_winner;
        }
        (Write::Remove(_), Write::Expire(..)) => return on_winner,
        // The claim finds nothing.
        (
            Write::Put(_, Record { expires_at, .. }) | Write::Expire(_, expires_at),
            Write::PutIfAbsent(key, record),
        ) if is_over(*expires_at, &record) => Write::Put(key, record),
        (Write::Remove(_), Write::PutIfAbsent(key, record)) => Write::Put(key, record),
        // The first claim wins, and both callbacks are told its winner.
        (Write::PutIfAbsent(..) | Write::Put(..), Write::PutIfAbsent(..)) => {
            *callback = both(callback.take(), on_winner);
            return None;
        }
        (_, newer) => newer,
    };
    std::mem::replace(callback, on_winner)
}

/// Returns `true` if a record with this expiry is gone when the other one is recorded.
fn is_over(expires_at: SystemTime, recorded: &Record) -> bool {
    expires_at <= recorded.context.recorded_at()
}

fn both(first: Option<OnWinner>, second: Option<OnWinner>) -> Option<OnWinner> {
    match (first, second) {
        (Some(first), Some(second)) => Some(Box::new(move |winner| {
            let mut follow_ups = first(winner.clone());
            follow_ups.extend(second(winner));
            follow_ups
        })),
        (first, second) => first.or(second),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::context::WorkflowContext;

    /// A moment of the test, in seconds.
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

    /// A backend by its contract.
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
            // Expired at once, or extended.
            4 => Write::Expire(key, time(now)),
            _ => Write::Expire(key, time(now + 200)),
        }
    }

    proptest! {
        #[test]
        fn merged_writes_do_what_the_single_ones_do(
            before in prop::collection::vec((0..6_usize, 0..3_usize), 0..4),
            writes in prop::collection::vec((0..6_usize, 0..3_usize), 1..12),
        ) {
            let mut one_by_one = Model::default();
            for (span, (kind, key)) in (1..).zip(before) {
                one_by_one.write(&write(kind, key, span, 0), 0);
            }
            let mut merged = one_by_one.clone();
            let mut queue = WriteQueue::default();
            let mut now = 1;
            for (span, (kind, key)) in (100..).zip(&writes) {
                now += 1;
                let write = write(*kind, *key, span, now);
                // The storage extends only records that it still has.
                if *kind == 5 && !one_by_one.live(now).contains_key(write.key()) {
                    continue;
                }
                one_by_one.write(&write, now);
                queue.add(write, None, &mut Lost::default());
            }
            let claimed_before = writes.iter().filter(|(kind, _)| [1, 2].contains(kind)).count() > 1;
            for key in ["a", "b", "c"] {
                let live = one_by_one.live(now).get(key).copied();
                match queue.known(key) {
                    // Exact only where no claim can have found another record.
                    Some(Known::Record(record)) if merged.live(now).is_empty() && !claimed_before => {
                        let known = (record.expires_at > time(now)).then(|| (span_of(&record), record.expires_at));
                        prop_assert_eq!(known, live);
                    }
                    Some(Known::Gone) => prop_assert_eq!(live, None),
                    Some(Known::Until(at)) if at <= time(now) => prop_assert_eq!(live, None),
                    _ => {}
                }
            }
            for write in queue.into_in_flight().0.next_group(100) {
                merged.write(write, now);
            }
            prop_assert_eq!(merged.live(now), one_by_one.live(now));
        }
    }

    #[test]
    fn the_oldest_go_first_and_expiries_before_all() {
        let (mut queue, mut lost) = (WriteQueue::default(), Lost::default());
        let key = |n: usize| Write::Remove(n.to_string());
        for n in 0..MAX_WRITES {
            queue.add(key(n), None, &mut lost);
        }
        assert_eq!(lost.writes, 0);
        queue.add(Write::Expire("late".into(), time(1)), None, &mut lost);
        assert_eq!((lost.writes, queue.known("late")), (1, None));
        assert_eq!(queue.known("0"), Some(Known::Gone));
        for n in 0..10 {
            queue.add(Write::Remove(format!("more {n}")), None, &mut lost);
            assert_eq!(lost.writes, n as u64 + 2);
            assert_eq!(queue.known(&n.to_string()), None);
            assert_eq!(queue.known(&(n + 1).to_string()), Some(Known::Gone));
            assert_eq!(queue.known(&format!("more {n}")), Some(Known::Gone));
        }
        queue.add(key(20), None, &mut lost);
        assert_eq!(lost.writes, 11, "it waits already");
        let (in_flight, callbacks) = queue.into_in_flight();
        assert_eq!(callbacks.len(), MAX_WRITES);
        assert_eq!(in_flight.next_group(3), [key(10), key(11), key(12)]);
        in_flight.mark_done(3);
        assert_eq!(in_flight.known("12"), None);
        assert_eq!(in_flight.known("13"), Some(Known::Gone));
        assert_eq!(in_flight.next_group(1), [key(13)]);
        let mut rest = 0;
        loop {
            let group = in_flight.next_group(1000).len();
            in_flight.mark_done(group);
            rest += group;
            if group == 0 {
                break;
            }
        }
        assert_eq!(rest, MAX_WRITES - 3);
    }

    #[test]
    fn a_callback_is_discarded_only_with_its_write() {
        let (mut queue, mut lost) = (WriteQueue::default(), Lost::default());
        let on_winner = || -> Option<OnWinner> { Some(Box::new(|_| Vec::new())) };
        let claim = |span| Write::PutIfAbsent("a".into(), record(span, 0));
        let remove = Write::Remove("a".into());
        let writes = [(claim(1), 0), (claim(2), 0), (remove, 1), (claim(3), 1)];
        for (write, discarded) in writes {
            let on_winner = on_winner().filter(|_| !matches!(write, Write::Remove(_)));
            queue.add(write, on_winner, &mut lost);
            assert_eq!(lost.callbacks.len(), discarded);
        }
        let (in_flight, callbacks) = queue.into_in_flight();
        assert_eq!(
            in_flight.next_group(9),
            [Write::Put("a".into(), record(3, 0))]
        );
        assert!(callbacks.len() == 1 && callbacks[0].is_some());
    }
}
