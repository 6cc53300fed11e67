//! What waits to be written: for each key what is left of all its writes, in the order of the first.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use super::backend::{Record, Write};
use super::backing::Queuing;

/// How many keys wait at most. The oldest is dropped for one more, and counted.
pub(super) const MOST_KEYS: usize = 64 * 1024;

/// Among how many of the oldest writes one that is needed less than others is looked for.
const OLDEST: usize = 16;

/// Is told what is stored under a key once it is written.
pub(super) type OnWinner = Box<dyn FnOnce(Record, &Queuing) + Send>;

/// Writes that wait, and who wants to know what becomes of them.
#[derive(Default)]
pub(super) struct Waiting {
    writes: Writes,
    claims: Claims,
}

/// At the places of their writes.
pub(super) type Claims = VecDeque<Option<OnWinner>>;

#[derive(Default)]
pub(super) struct Writes {
    /// `None` in the place of one that was dropped.
    in_order: VecDeque<Option<Write>>,
    /// Where each key's is, counted from the first that there ever was.
    places: HashMap<String, usize, foldhash::fast::RandomState>,
    /// How many have gone from the front.
    gone: usize,
}

/// What was taken to be written, and how far that has come.
#[derive(Default)]
pub(super) struct InFlight {
    writes: Writes,
    done: AtomicUsize,
}

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
        self.writes.places.is_empty()
    }

    /// `true` beside what is no longer needed where a key was dropped that was.
    pub(super) fn add(&mut self, write: Write, claim: Option<OnWinner>) -> (Unneeded, bool) {
        let writes = &mut self.writes;
        if let Some(place) = writes.place_of(write.key()) {
            let claimed = &mut self.claims[place];
            if let Some(there) = &mut writes.in_order[place] {
                return (merge(there, claimed, write, claim), false);
            }
        }
        let mut unneeded = (None, None);
        let is_full = writes.places.len() >= MOST_KEYS;
        if is_full {
            // An expiry that is not moved is needed least.
            if let Write::Expire(..) = write {
                return ((Some(write), claim), true);
            }
            unneeded = self.drop_oldest();
        }
        let place = self.writes.gone + self.writes.in_order.len();
        self.writes.places.insert(write.key().to_owned(), place);
        self.writes.in_order.push_back(Some(write));
        self.claims.push_back(claim);
        (unneeded, is_full)
    }

    fn drop_oldest(&mut self) -> Unneeded {
        let writes = &mut self.writes;
        let mut oldest = writes.in_order.iter().take(OLDEST);
        let expiry = oldest.position(|write| matches!(write, Some(Write::Expire(..))));
        let write = writes.in_order[expiry.unwrap_or(0)].take();
        let claim = self.claims[expiry.unwrap_or(0)].take();
        if let Some(write) = &write {
            writes.places.remove(write.key());
        }
        while let Some(None) = writes.in_order.front() {
            writes.in_order.pop_front();
            self.claims.pop_front();
            writes.gone += 1;
        }
        (write, claim)
    }

    pub(super) fn take(&mut self) -> (InFlight, Claims) {
        let Self { writes, claims } = std::mem::take(self);
        let done = AtomicUsize::new(0);
        (InFlight { writes, done }, claims)
    }

    pub(super) fn known(&self, key: &str) -> Option<Known> {
        let place = self.writes.place_of(key)?;
        known(self.writes.in_order[place].as_ref()?)
    }
}

impl Writes {
    fn place_of(&self, key: &str) -> Option<usize> {
        self.places.get(key).map(|place| place - self.gone)
    }
}

impl InFlight {
    /// The next few, and how many places they take.
    pub(super) fn next_group(&self, most: usize) -> (Vec<Write>, Range<usize>) {
        let start = self.done.load(Ordering::Relaxed);
        let end = self.writes.in_order.len().min(start + most);
        let group = self.writes.in_order.range(start..end);
        (group.flatten().cloned().collect(), start..end)
    }

    /// From now on the backend knows better.
    pub(super) fn are_written(&self, places: Range<usize>) {
        self.done.store(places.end, Ordering::Release);
    }

    /// One for each write that `next_group` answered for these places.
    pub(super) fn claims_of_writes(
        &self,
        places: Range<usize>,
        claims: impl Iterator<Item = Option<OnWinner>>,
    ) -> impl Iterator<Item = Option<OnWinner>> {
        let claims = self.writes.in_order.range(places).zip(claims);
        claims.filter_map(|(write, claim)| write.as_ref().map(|_| claim))
    }

    pub(super) fn known(&self, key: &str) -> Option<Known> {
        let place = self.writes.place_of(key)?;
        if place < self.done.load(Ordering::Acquire) {
            return None;
        }
        known(self.writes.in_order[place].as_ref()?)
    }
}

/// What a key has as soon as that is written.
fn known(write: &Write) -> Option<Known> {
    Some(match write {
        Write::Put(_, record) | Write::PutIfAbsent(_, record) => Known::Record(record.clone()),
        Write::Remove(_) => Known::Gone,
        Write::Expire(_, at) => Known::Until(*at),
    })
}

/// Leaves of two writes on one key what is to be done.
fn merge(
    there: &mut Write,
    claimed: &mut Option<OnWinner>,
    newer: Write,
    claim: Option<OnWinner>,
) -> Unneeded {
    let replacement = match (&mut *there, newer) {
        (Write::PutIfAbsent(_, record) | Write::Put(_, record), Write::Expire(_, at)) => {
            record.expires_at = at;
            return (None, claim);
        }
        // First come is first served, here as well; who comes later is told the same.
        (Write::PutIfAbsent(..) | Write::Put(..), newer @ Write::PutIfAbsent(..)) => {
            *claimed = match (claimed.take(), claim) {
                (Some(first), Some(second)) => Some(Box::new(move |winner, queuing| {
                    first(winner.clone(), queuing);
                    second(winner, queuing);
                })),
                (first, second) => first.or(second),
            };
            return (Some(newer), None);
        }
        (Write::Remove(_), newer @ Write::Expire(..)) => return (Some(newer), claim),
        // Nothing is there any more, whatever it was.
        (Write::Remove(_), Write::PutIfAbsent(key, record)) => Write::Put(key, record),
        (Write::Expire(_, at), Write::PutIfAbsent(key, record))
            if *at <= record.context.recorded_at() =>
        {
            Write::Put(key, record)
        }
        (_, newer) => newer,
    };
    let write = std::mem::replace(there, replacement);
    (Some(write), std::mem::replace(claimed, claim))
}
