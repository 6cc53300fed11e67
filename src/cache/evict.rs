//! Eviction: which instance is removed when there are too many.

use super::entry::Rank;
use super::shards::Shards;
use crate::explain::trail::Event;

/// The number of entries among which the victim is chosen, including the one just inserted, which stays. The least
/// recently used of 16 random entries is on average among the oldest sixteenth of all.
const CANDIDATES: usize = 17;

/// The number of candidates from one shard that has more. Fuller shards, which keep their entries for longer, lose more.
const PER_SHARD: usize = 6;

struct Candidate {
    rank: Rank,
    shard: usize,
    index: usize,
}

/// The most evictions for one insertion: the largest entry takes about as much as so many of the smallest.
const MAX_EVICTIONS: usize = 64;

/// Removes instances other than the one that was just inserted, as long as there are too many, and reports each with its hash
/// and the reason. More than one make up for other threads' insertions that found no victim, and for a large entry.
#[cold]
pub(super) fn make_room(
    shards: &Shards,
    now: u32,
    hash: u64,
    inserted: &str,
    report: impl Fn(u64, Event),
) {
    for _ in 0..MAX_EVICTIONS {
        if !shards.are_too_many() {
            return;
        }
        if let Some((hash, event)) = evict(shards, now, hash, inserted) {
            report(hash, event);
        }
    }
}

/// Removes one instance other than the one that was just inserted. Returns its hash and the reason.
fn evict(shards: &Shards, now: u32, hash: u64, inserted: &str) -> Option<(u64, Event)> {
    // A candidate that was used or removed since it was chosen is kept, and another one is chosen.
    for attempt in 0..4 {
        let victim = choose(shards, now, hash, inserted, attempt)?;
        let removed = shards.remove_at(victim.shard, victim.index, |entry| {
            entry.rank(now, &shards.limits) <= victim.rank && entry.id != *inserted
        });
        if let Some((hash, expiry)) = removed {
            let event = match victim.rank {
                Rank::Expired => expiry,
                Rank::Completed | Rank::Used(_) => Event::Evicted,
            };
            return Some((hash, event));
        }
    }
    None
}

/// Chooses the lowest-ranked of a few entries, from the shard of the one just inserted and those after it.
fn choose(
    shards: &Shards,
    now: u32,
    hash: u64,
    inserted: &str,
    attempt: usize,
) -> Option<Candidate> {
    let own = shards.shard_of(hash);
    let mut best: Option<Candidate> = None;
    let mut seen = 0;
    for shard in (own..shards.count()).chain(0..own) {
        let table = &shards.lock_nth(shard)?.table;
        let samples = match CANDIDATES - seen {
            left if table.len() <= left => table.len(),
            left => left.min(PER_SHARD),
        };
        for nth in 0..samples {
            let index = match samples == table.len() {
                true => nth,
                false => scattered(hash, attempt * CANDIDATES + nth, table.len()),
            };
            seen += 1;
            let Some(entry) = table.get(index) else {
                continue;
            };
            if shard == own && entry.id == *inserted {
                continue;
            }
            let rank = entry.rank(now, &shards.limits);
            if best.as_ref().is_none_or(|best| rank < best.rank) {
                best = Some(Candidate { rank, shard, index });
            }
        }
        if seen >= CANDIDATES {
            break;
        }
    }
    best
}

/// Returns the `nth` of a sequence of numbers below a limit, evenly spread: a pattern in the order in which instances
/// were inserted and used must not coincide with one in the order in which they are sampled.
fn scattered(seed: u64, nth: usize, limit: usize) -> usize {
    // Multiples of the golden ratio leave no large gaps; the seed is a hash.
    let fraction = seed
        .wrapping_add(nth as u64)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((u128::from(fraction) * limit as u128) >> 64) as usize
}
