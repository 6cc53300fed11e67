//! A hash table that keeps its values side by side, so that one can be found by its index as well.

use hashbrown::HashTable;

/// Values found by hash, or by index: the indices are `0..len`, without a gap.
///
/// A removal moves the last value to the index of the removed one. A walk from the end therefore misses no value while
/// others are removed, and a sample is picked without a search. A table entry has four bytes, and the values grow by an
/// eighth: a table of the values themselves is half empty. `indexmap` has the same design (docs/design.md says why not).
pub(super) struct Slots<T> {
    places: HashTable<u32>,
    values: Vec<T>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            places: HashTable::new(),
            values: Vec::new(),
        }
    }
}

impl<T> Slots<T> {
    /// The capacity below which it does not shrink.
    const ROOM: usize = 8;

    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    pub(super) fn get(&self, place: usize) -> Option<&T> {
        self.values.get(place)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, place: usize) -> Option<&mut T> {
        self.values.get_mut(place)
    }

    /// Returns the index of the value with that hash that `is` the one wanted.
    #[inline]
    pub(super) fn find(&self, hash: u64, is: impl Fn(&T) -> bool) -> Option<usize> {
        let is = |place: &u32| self.values.get(*place as usize).is_some_and(&is);
        self.places.find(hash, is).map(|place| *place as usize)
    }

    /// Adds a value that is not in the table yet.
    #[inline]
    pub(super) fn insert(&mut self, hash: u64, value: T, hash_of: impl Fn(&T) -> u64) {
        if self.values.len() == self.values.capacity() {
            self.grow();
        }
        let place = self.values.len();
        self.values.push(value);
        let values = &self.values;
        let rehash = |place: &u32| values.get(*place as usize).map_or(0, &hash_of);
        self.places.insert_unique(hash, place as u32, rehash);
    }

    #[cold]
    fn grow(&mut self) {
        // By itself, a Vec doubles.
        let more = (self.values.len() / 8).max(Self::ROOM / 2);
        self.values.reserve_exact(more);
    }

    /// Removes the value at an index, which has that hash.
    #[inline]
    pub(super) fn remove(&mut self, hash: u64, place: usize, hash_of: impl Fn(&T) -> u64) {
        let is_here = |entry: &u32| *entry as usize == place;
        if let Ok(entry) = self.places.find_entry(hash, is_here) {
            entry.remove();
        }
        // `swap_remove` moves the removed value out, which costs as much as the rest of the removal.
        let moved = self.values.pop();
        if let (Some(moved), Some(removed)) = (moved, self.values.get_mut(place)) {
            *removed = moved;
            let hash = hash_of(removed);
            let last = self.values.len();
            let was_last = |entry: &u32| *entry as usize == last;
            if let Some(entry) = self.places.find_mut(hash, was_last) {
                *entry = place as u32;
            }
        }
        let capacity = self.values.capacity();
        if self.values.len() < capacity / 2 && capacity > Self::ROOM {
            self.shrink(hash_of);
        }
    }

    #[cold]
    fn shrink(&mut self, hash_of: impl Fn(&T) -> u64) {
        let enough = self.values.len() + (self.values.len() / 8).max(Self::ROOM / 2);
        self.values.shrink_to(enough);
        let values = &self.values;
        let rehash = |place: &u32| values.get(*place as usize).map_or(0, &hash_of);
        self.places.shrink_to(enough, rehash);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Few hashes for many keys: most values share theirs with others.
    fn hash_of(value: &(u8, u32)) -> u64 {
        u64::from(value.0 % 7) << 57 | u64::from(value.0 % 5)
    }

    fn find(slots: &Slots<(u8, u32)>, key: u8) -> Option<usize> {
        slots.find(hash_of(&(key, 0)), |value| value.0 == key)
    }

    /// Every value is at one place, and found there.
    fn assert_holds(slots: &Slots<(u8, u32)>, model: &BTreeMap<u8, u32>) {
        let places = (0..slots.len()).map(|place| *slots.get(place).expect("no gaps"));
        assert_eq!(&places.collect::<BTreeMap<_, _>>(), model);
        assert_eq!(
            (slots.len(), slots.places.len()),
            (model.len(), model.len())
        );
        for (place, value) in slots.values.iter().enumerate() {
            assert_eq!(find(slots, value.0), Some(place));
        }
    }

    proptest! {
        #[test]
        fn it_holds_what_a_map_does(
            steps in prop::collection::vec((any::<bool>(), any::<u8>(), any::<u32>()), 0..600),
        ) {
            let (mut slots, mut model) = (Slots::default(), BTreeMap::new());
            for (store, key, value) in steps {
                match find(&slots, key) {
                    Some(place) if store => {
                        *slots.get_mut(place).expect("just found") = (key, value);
                        model.insert(key, value);
                    }
                    Some(place) => {
                        prop_assert_eq!(slots.get(place).copied(), model.remove_entry(&key));
                        slots.remove(hash_of(&(key, 0)), place, hash_of);
                    }
                    None => {
                        prop_assert!(!model.contains_key(&key));
                        slots.insert(hash_of(&(key, 0)), (key, value), hash_of);
                        model.insert(key, value);
                    }
                }
            }
            assert_holds(&slots, &model);
        }
    }

    #[test]
    fn a_walk_from_the_end_meets_every_value_that_stays() {
        for removed in 0..100_u8 {
            for at in 0..100 {
                let mut slots = Slots::default();
                (0..100).for_each(|key| slots.insert(hash_of(&(key, 0)), (key, 0), hash_of));
                let mut seen = Vec::new();
                for place in (0..100).rev() {
                    if place == at {
                        let place = find(&slots, removed).expect("not removed before");
                        slots.remove(hash_of(&(removed, 0)), place, hash_of);
                    }
                    seen.extend(slots.get(place).map(|value| value.0));
                }
                assert!((0..100).all(|key| key == removed || seen.contains(&key)));
            }
        }
    }

    #[test]
    fn memory_is_close_to_what_is_needed_and_given_back() {
        let mut slots = Slots::default();
        let hash_of = |value: &u64| value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for value in 0..4_096 {
            slots.insert(hash_of(&value), value, hash_of);
            let (len, capacity) = (slots.len(), slots.values.capacity());
            assert!(capacity <= len + (len / 8).max(8), "{capacity} for {len}");
        }
        for value in 0..4_096 {
            let place = slots.find(hash_of(&value), |v| *v == value);
            slots.remove(hash_of(&value), place.expect("not removed before"), hash_of);
            let (len, capacity) = (slots.len(), slots.values.capacity());
            assert!(capacity <= 2 * len + 8, "{capacity} for {len}");
            assert!(slots.places.capacity() <= 4 * len + 32);
        }
        assert_eq!(slots.find(hash_of(&1), |_| true), None);
    }
}
