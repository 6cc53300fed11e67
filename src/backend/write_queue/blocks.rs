//! A queue in blocks, which never moves what is in it: none of its calls takes longer when it is long.

use std::collections::VecDeque;
use std::ops::{Index, IndexMut};

/// What is in a block.
pub(super) const BLOCK: usize = 1000;

#[derive(Debug)]
pub(in crate::backend) struct Blocks<T> {
    /// All but the first and the last are full; none of them ever grows or wraps around.
    blocks: VecDeque<VecDeque<T>>,
    /// How many have gone from the first block.
    gone: usize,
    len: usize,
    /// Emptied ones, to be used again.
    spare: Vec<VecDeque<T>>,
}

impl<T> Default for Blocks<T> {
    fn default() -> Self {
        Self {
            blocks: VecDeque::new(),
            gone: 0,
            len: 0,
            spare: Vec::new(),
        }
    }
}

impl<T> Blocks<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn push_back(&mut self, value: T) {
        let end = self.gone + self.len;
        if end == self.blocks.len() * BLOCK {
            let block = self.spare.pop();
            self.blocks
                .push_back(block.unwrap_or_else(|| VecDeque::with_capacity(BLOCK)));
        }
        if let Some(block) = self.blocks.back_mut() {
            block.push_back(value);
            self.len += 1;
        }
    }

    pub(in crate::backend) fn pop_front(&mut self) -> Option<T> {
        let value = self.blocks.front_mut()?.pop_front()?;
        self.gone += 1;
        self.len -= 1;
        if self.gone == BLOCK {
            self.gone = 0;
            self.blocks.pop_front();
        }
        Some(value)
    }

    /// From that place on, at most so many, and no more than there are in one block.
    pub(super) fn slice_from(&self, start: usize, most: usize) -> &[T] {
        let Some((block, at)) = self.place(start) else {
            return &[];
        };
        // A block has not wrapped around.
        let (block, _) = self.blocks[block].as_slices();
        &block[at..block.len().min(at + most)]
    }

    /// Drops what is in it, and keeps at most so many blocks for later.
    pub(super) fn clear(&mut self, kept: usize) {
        while let Some(mut block) = self.blocks.pop_front() {
            if self.spare.len() < kept {
                block.clear();
                self.spare.push(block);
            }
        }
        self.spare.truncate(kept);
        (self.gone, self.len) = (0, 0);
    }

    /// The block, and the place in it.
    fn place(&self, at: usize) -> Option<(usize, usize)> {
        if at >= self.len {
            return None;
        }
        let from_block = at + self.gone;
        let gone = if from_block < BLOCK { self.gone } else { 0 };
        Some((from_block / BLOCK, from_block % BLOCK - gone))
    }
}

impl<T> Index<usize> for Blocks<T> {
    type Output = T;

    fn index(&self, at: usize) -> &T {
        &self.slice_from(at, 1)[0]
    }
}

impl<T> IndexMut<usize> for Blocks<T> {
    fn index_mut(&mut self, at: usize) -> &mut T {
        let (block, at) = self.place(at).expect("the caller asks for what is there");
        &mut self.blocks[block][at]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn it_does_what_a_queue_does(steps in prop::collection::vec((0..4_u8, 1..1500_usize), 1..12)) {
            let (mut blocks, mut model) = (Blocks::default(), VecDeque::new());
            let mut next = 0..;
            for (kind, count) in steps {
                match kind {
                    0 | 1 => for number in next.by_ref().take(count) {
                        blocks.push_back(number);
                        model.push_back(number);
                    },
                    2 => for _ in 0..count {
                        prop_assert_eq!(blocks.pop_front(), model.pop_front());
                    },
                    _ if count < 300 => {
                        blocks.clear(2);
                        model.clear();
                    }
                    _ => {}
                }
                prop_assert_eq!((blocks.len(), blocks.is_empty()), (model.len(), model.is_empty()));
                prop_assert!(blocks.blocks.iter().all(|block| block.capacity() == BLOCK));
                let (mut start, mut seen) = (0, Vec::new());
                loop {
                    let slice = blocks.slice_from(start, count);
                    if slice.is_empty() {
                        break;
                    }
                    prop_assert!(slice.len() <= count);
                    seen.extend_from_slice(slice);
                    start += slice.len();
                }
                prop_assert_eq!(&seen, &Vec::from(model.clone()));
                for at in (0..model.len()).step_by(97) {
                    prop_assert_eq!(blocks[at], model[at]);
                    blocks[at] += 0;
                }
            }
        }
    }
}
