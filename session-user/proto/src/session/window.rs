//! Which numbers have come, of a sequence in which some never will: a sliding window (RFC 6479).

use crate::limits::REPLAY_WINDOW;

const BITS: u64 = 64;
/// One more than the window needs, so that a block can be cleared while all of it is still known.
const BLOCKS: u64 = REPLAY_WINDOW / BITS + 1;

/// The numbers received of the [`REPLAY_WINDOW`] below the highest one. Those below count as received.
#[derive(Clone, Debug)]
pub(super) struct Window {
    blocks: [u64; BLOCKS as usize],
    /// One past the highest.
    end: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            blocks: [0; BLOCKS as usize],
            end: 0,
        }
    }
}

impl Window {
    /// Whether `number` has not come, and is not so old that nobody knows.
    pub fn is_fresh(&self, number: u64) -> bool {
        if number >= self.end {
            return true;
        }
        let (block, bit) = place(number);
        self.end - number <= REPLAY_WINDOW && self.blocks[block] & bit == 0
    }

    /// `number` has come; true if it was fresh.
    pub fn insert(&mut self, number: u64) -> bool {
        if !self.is_fresh(number) {
            return false;
        }
        if number >= self.end {
            let last = self.end.saturating_sub(1) / BITS;
            let blocks = number / BITS - last;
            for ahead in 1..=blocks.min(BLOCKS) {
                self.blocks[((last + ahead) % BLOCKS) as usize] = 0;
            }
            self.end = number + 1;
        }
        let (block, bit) = place(number);
        self.blocks[block] |= bit;
        true
    }
}

fn place(number: u64) -> (usize, u64) {
    ((number / BITS % BLOCKS) as usize, 1 << (number % BITS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(steps in proptest::collection::vec((0u64..3, 0u64..9000), 1..400)) {
            let (mut window, mut plain, mut highest) = (Window::default(), BTreeSet::new(), 0u64);
            for (kind, distance) in steps {
                let number = match kind {
                    0 => highest.saturating_sub(distance),
                    1 => highest + distance % 70,
                    _ => highest + distance,
                };
                let known = plain.is_empty() || number + REPLAY_WINDOW > highest;
                let fresh = known && !plain.contains(&number);
                prop_assert_eq!(window.is_fresh(number), fresh);
                prop_assert_eq!(window.insert(number), fresh);
                if fresh {
                    plain.insert(number);
                    highest = highest.max(number);
                }
            }
        }
    }
}
