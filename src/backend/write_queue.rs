//! The queue of writes: each key's writes in their order, merged where one write does what several would.
//!
//! A write stays in the queue until the backend has carried it out, so a reader of its key finds it here.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher as _;
use std::time::SystemTime;

use foldhash::fast::RandomState;

use crate::backend::{BackendError, Record, Write, WriteOutcome};

/// The largest number of waiting writes, and of held writes. Beyond it the oldest is dropped and counted.
pub(super) const MAX_WRITES: usize = 64 * 1024;

/// The number of writes for which memory is kept when the queue is empty.
const KEPT: usize = 4096;

/// Called with the record that is stored under a key after a write; returns the writes that follow from it.
pub(crate) type OnWinner = Box<dyn FnOnce(Record) -> Vec<Write> + Send>;

/// Writes that the backend has not carried out yet.
#[derive(Default)]
pub(super) struct WriteQueue {
    /// By the hash of the key, oldest first. Keys with equal hashes share a list, but their writes are not merged.
    writes: HashMap<u64, Vec<Queued>, RandomState>,
    /// The hash of each waiting write, oldest first.
    waiting: VecDeque<u64>,
    /// The hash of each held write, oldest first.
    held: VecDeque<u64>,
    dropped: u64,
    /// Callbacks that will not be called. To be dropped where nothing is locked, since they may own anything.
    discarded: Vec<OnWinner>,
}

struct Queued {
    write: Write,
    on_winner: Option<OnWinner>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    /// Passed to the backend, which may have carried it out: nothing is merged into it.
    InFlight,
    /// To be tried again later: a part of the backend failed to carry out this write, or an earlier one of its key.
    Held,
}

/// The writes of one backend call.
#[derive(Default)]
pub(super) struct Group {
    pub(super) writes: Vec<Write>,
    hashes: Vec<u64>,
}

/// The results of a [`Group`].
#[derive(Default)]
pub(super) struct Settled {
    /// Callbacks, each with the record that it is to be called with.
    pub(super) winners: Vec<(OnWinner, Record)>,
    /// The failures of writes that are now held.
    pub(super) errors: Vec<BackendError>,
}

/// The content of a key after all queued writes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Known {
    Record(Record),
    Gone,
    /// The backend's record, with this expiry.
    Until(SystemTime),
}

impl WriteQueue {
    /// Queues a write, or merges it into the last one of its key.
    pub(super) fn add(&mut self, write: Write, on_winner: Option<OnWinner>) {
        let hash = self.hash(write.key());
        let last = self.last_mut(hash, write.key());
        if let Some(last) = last.filter(|last| last.can_merge(&write)) {
            let discarded = last.merge(write, on_winner);
            self.discarded.extend(discarded);
        } else if self.make_room(State::Waiting, matches!(write, Write::Expire(..))) {
            self.waiting.push_back(hash);
            self.writes.entry(hash).or_default().push(Queued {
                write,
                on_winner,
                state: State::Waiting,
            });
        } else {
            self.discarded.extend(on_winner);
        }
    }

    pub(super) fn known(&self, key: &str) -> Option<Known> {
        let mut writes = self.writes.get(&self.hash(key))?.iter().rev();
        Some(
            match &writes.find(|queued| queued.write.key() == key)?.write {
                Write::Put(_, record) | Write::PutIfAbsent(_, record) => {
                    Known::Record(record.clone())
                }
                Write::Remove(_) => Known::Gone,
                Write::Expire(_, at) => Known::Until(*at),
            },
        )
    }

    /// Puts the `count` oldest waiting writes into a group, without those of keys with a held write, which become held.
    pub(super) fn take_waiting(&mut self, count: usize) -> Group {
        let mut group = Group::default();
        for _ in 0..count {
            let Some(hash) = self.waiting.pop_front() else {
                break;
            };
            match self.oldest(hash, State::Held) {
                Some(_) => self.hold(hash, State::Waiting),
                None => self.send(hash, State::Waiting, &mut group),
            }
        }
        group
    }

    /// Puts the `count` oldest held writes into a group.
    pub(super) fn take_held(&mut self, count: usize) -> Group {
        let mut group = Group::default();
        for _ in 0..count {
            if let Some(hash) = self.held.pop_front() {
                self.send(hash, State::Held, &mut group);
            }
        }
        group
    }

    /// Removes the writes that were carried out, and holds those that failed. A write without an outcome counts as
    /// carried out.
    pub(super) fn settle(&mut self, group: &Group, outcomes: Vec<WriteOutcome>) -> Settled {
        let mut settled = Settled::default();
        let outcomes = outcomes
            .into_iter()
            .chain(std::iter::repeat(WriteOutcome::Done));
        for (hash, outcome) in group.hashes.iter().copied().zip(outcomes) {
            let existing = match outcome {
                WriteOutcome::Done => None,
                WriteOutcome::Existing(record) => Some(record),
                WriteOutcome::Failed(error) => {
                    settled.errors.push(error);
                    self.hold(hash, State::InFlight);
                    continue;
                }
            };
            match self.remove(hash, State::InFlight) {
                Some(Queued {
                    write: Write::Put(_, own) | Write::PutIfAbsent(_, own),
                    on_winner: Some(on_winner),
                    ..
                }) => settled.winners.push((on_winner, existing.unwrap_or(own))),
                other => self
                    .discarded
                    .extend(other.and_then(|queued| queued.on_winner)),
            }
        }
        if self.writes.is_empty() {
            self.writes.shrink_to(KEPT);
            self.waiting.shrink_to(KEPT);
            self.held.shrink_to(KEPT);
        }
        settled
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(super) fn take_discarded(&mut self) -> Vec<OnWinner> {
        std::mem::take(&mut self.discarded)
    }

    fn hash(&self, key: &str) -> u64 {
        self.writes.hasher().hash_one(key)
    }

    fn last_mut(&mut self, hash: u64, key: &str) -> Option<&mut Queued> {
        let mut writes = self.writes.get_mut(&hash)?.iter_mut().rev();
        writes.find(|queued| queued.write.key() == key)
    }

    fn oldest(&mut self, hash: u64, state: State) -> Option<&mut Queued> {
        let mut writes = self.writes.get_mut(&hash)?.iter_mut();
        writes.find(|queued| queued.state == state)
    }

    /// Removes the oldest write in this state.
    fn remove(&mut self, hash: u64, state: State) -> Option<Queued> {
        let writes = self.writes.get_mut(&hash)?;
        let oldest = writes.iter().position(|queued| queued.state == state)?;
        let removed = writes.remove(oldest);
        if writes.is_empty() {
            self.writes.remove(&hash);
        }
        Some(removed)
    }

    fn send(&mut self, hash: u64, from: State, group: &mut Group) {
        if let Some(queued) = self.oldest(hash, from) {
            queued.state = State::InFlight;
            group.writes.push(queued.write.clone());
            group.hashes.push(hash);
        }
    }

    fn hold(&mut self, hash: u64, from: State) {
        let is_expire = self
            .oldest(hash, from)
            .is_some_and(|queued| matches!(queued.write, Write::Expire(..)));
        if self.make_room(State::Held, is_expire) {
            self.held.push_back(hash);
            if let Some(queued) = self.oldest(hash, from) {
                queued.state = State::Held;
            }
        } else {
            self.discard(hash, from);
        }
    }

    /// Drops the oldest write in this state if there are too many. Returns `false` if the new one is to be dropped
    /// instead: a missed expiry does the least harm.
    fn make_room(&mut self, state: State, is_expire: bool) -> bool {
        let hashes = match state {
            State::Held => &mut self.held,
            State::Waiting | State::InFlight => &mut self.waiting,
        };
        if hashes.len() < MAX_WRITES {
            return true;
        }
        self.dropped += 1;
        let oldest = if is_expire { None } else { hashes.pop_front() };
        if let Some(hash) = oldest {
            self.discard(hash, state);
        }
        !is_expire
    }

    fn discard(&mut self, hash: u64, state: State) {
        let on_winner = self.remove(hash, state).and_then(|queued| queued.on_winner);
        self.discarded.extend(on_winner);
    }
}

impl Queued {
    /// Returns `true` if one write can do what this and the newer one do. An expiry after a claim moves the record that
    /// the claim finds, and an expiry before a claim that of another record.
    fn can_merge(&self, newer: &Write) -> bool {
        self.state != State::InFlight
            && match (&self.write, newer) {
                (Write::PutIfAbsent(..), Write::Expire(..)) => false,
                (Write::Expire(_, at), Write::PutIfAbsent(_, record)) => is_over(*at, record),
                _ => true,
            }
    }

    /// Makes this write do what both do. Returns the callback that will not be called, if any.
    fn merge(&mut self, newer: Write, on_winner: Option<OnWinner>) -> Option<OnWinner> {
        self.write = match (&mut self.write, newer) {
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
                self.on_winner = both(self.on_winner.take(), on_winner);
                return None;
            }
            (_, newer) => newer,
        };
        std::mem::replace(&mut self.on_winner, on_winner)
    }
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
                queue.add(write, None);
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
            for write in queue.take_waiting(100).writes {
                merged.write(&write, now);
            }
            prop_assert_eq!(merged.live(now), one_by_one.live(now));
        }
    }

    #[test]
    fn the_oldest_go_first_and_expiries_before_all() {
        let mut queue = WriteQueue::default();
        for n in 0..MAX_WRITES {
            queue.add(Write::Remove(n.to_string()), None);
            assert_eq!(queue.dropped(), 0);
        }
        queue.add(Write::Expire("late".into(), time(1)), None);
        assert_eq!((queue.dropped(), queue.known("late")), (1, None));
        assert_eq!(queue.known("0"), Some(Known::Gone));
        for n in 0..10 {
            queue.add(Write::Remove(format!("more {n}")), None);
            assert_eq!(queue.dropped(), n + 2);
            assert_eq!(queue.known(&n.to_string()), None);
            assert_eq!(queue.known(&(n + 1).to_string()), Some(Known::Gone));
            assert_eq!(queue.known(&format!("more {n}")), Some(Known::Gone));
        }
        queue.add(Write::Remove("20".into()), None);
        assert_eq!(queue.dropped(), 11, "it waits already");
        let group = queue.take_waiting(3);
        let keys: Vec<_> = group.writes.iter().map(Write::key).collect();
        assert_eq!(keys, ["10", "11", "12"]);
        assert_eq!(queue.known("12"), Some(Known::Gone), "not done yet");
        queue.settle(&group, vec![WriteOutcome::Done; 3]);
        assert_eq!(queue.known("12"), None);
        assert_eq!(queue.known("13"), Some(Known::Gone));
        assert_eq!(queue.take_waiting(1).writes[0].key(), "13");
    }

    /// A part of the backend fails again and again; each key's writes stay in their order all the while.
    #[test]
    fn held_writes_go_before_later_ones_of_their_key() {
        let mut queue = WriteQueue::default();
        let failed = || WriteOutcome::Failed(BackendError::new("away", None).partial());
        let put = |key: &str, span| Write::Put(key.to_owned(), record(span, 0));
        let claim = |key: &str, span| Write::PutIfAbsent(key.to_owned(), record(span, 0));
        queue.add(claim("a", 1), None);
        queue.add(Write::Expire("a".into(), time(7)), None);
        queue.add(put("b", 2), None);
        let group = queue.take_waiting(10);
        assert_eq!(group.writes.len(), 3);
        queue.add(put("a", 3), None);
        assert_eq!(queue.take_waiting(0).writes, []);
        let settled = queue.settle(&group, vec![failed(), failed(), WriteOutcome::Done]);
        assert_eq!((settled.errors.len(), queue.held()), (2, 2));
        // The waiting one is held behind the others.
        queue.add(put("c", 4), None);
        assert_eq!(queue.take_waiting(10).writes, [put("c", 4)]);
        assert_eq!((queue.held(), queue.waiting()), (3, 0));
        // A newer one is merged into the last that is held.
        queue.add(put("a", 5), None);
        assert_eq!((queue.held(), queue.waiting()), (3, 0));
        assert_eq!(queue.known("a"), Some(Known::Record(record(5, 0))));

        let first = queue.take_held(1);
        assert_eq!(first.writes, [claim("a", 1)]);
        queue.settle(&first, vec![failed()]);
        let all = queue.take_held(3);
        let expire = Write::Expire("a".into(), time(7));
        assert_eq!(all.writes, [claim("a", 1), expire, put("a", 5)]);
        queue.settle(&all, Vec::new());
        assert_eq!(queue.known("a"), None);
        assert_eq!((queue.held(), queue.waiting()), (0, 0));
    }
}
