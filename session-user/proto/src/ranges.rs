//! A set of `u64` as sorted, disjoint, non-adjacent half-open ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// The record numbers or stream offsets received so far.
///
/// Memory is bounded by the number of gaps, which the caller bounds by its window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// Everything below is in the set.
    cumulative: u64,
    /// Start to end, all above `cumulative`.
    above: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The lowest number that is not in the set.
    pub fn cumulative(&self) -> u64 {
        self.cumulative
    }

    /// One past the highest number in the set; 0 if it is empty.
    pub fn end(&self) -> u64 {
        self.above
            .last_key_value()
            .map_or(self.cumulative, |(_, &end)| end)
    }

    /// Whether `value` is in the set.
    pub fn contains(&self, value: u64) -> bool {
        value < self.cumulative
            || self
                .above
                .range(..=value)
                .next_back()
                .is_some_and(|(_, &end)| value < end)
    }

    /// Adds `value`; true if it was new.
    pub fn insert(&mut self, value: u64) -> bool {
        if value == self.cumulative {
            // The path of a transport in order: no tree is touched unless a gap closes.
            self.cumulative += 1;
            self.absorb();
            return true;
        }
        if self.contains(value) {
            return false;
        }
        self.insert_range(value..value + 1);
        true
    }

    /// Adds all of `range`.
    pub fn insert_range(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        if range.start <= self.cumulative {
            self.cumulative = self.cumulative.max(range.end);
            self.absorb();
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&s, &e)) = self.above.range(..=start).next_back()
            && e >= start
        {
            start = s;
            end = end.max(e);
        }
        while let Some((&s, &e)) = self.above.range(start..=end).next() {
            end = end.max(e);
            self.above.remove(&s);
        }
        self.above.insert(start, end);
    }

    /// The ranges above [`Self::cumulative`], lowest first.
    pub fn above(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + '_ {
        self.above.iter().map(|(&s, &e)| s..e)
    }

    /// How many ranges lie above [`Self::cumulative`].
    pub fn gaps(&self) -> usize {
        self.above.len()
    }

    fn absorb(&mut self) {
        while let Some((&s, &e)) = self.above.first_key_value() {
            if s > self.cumulative {
                break;
            }
            self.cumulative = self.cumulative.max(e);
            self.above.remove(&s);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(values in proptest::collection::vec(0u64..200, 0..300)) {
            let mut ranges = RangeSet::new();
            let mut plain = BTreeSet::new();
            for v in values {
                prop_assert_eq!(ranges.insert(v), plain.insert(v));
            }
            for v in 0..201 {
                prop_assert_eq!(ranges.contains(v), plain.contains(&v));
            }
            let first_missing = (0..=200).find(|v| !plain.contains(v)).unwrap();
            prop_assert_eq!(ranges.cumulative(), first_missing);
            let mut last_end = ranges.cumulative();
            for r in ranges.above() {
                prop_assert!(r.start > last_end && r.end > r.start);
                last_end = r.end;
            }
        }

        #[test]
        fn ranges_agree_with_single_values(parts in proptest::collection::vec((0u64..150, 0u64..20), 0..40)) {
            let mut by_range = RangeSet::new();
            let mut by_value = RangeSet::new();
            for (start, len) in parts {
                by_range.insert_range(start..start + len);
                for v in start..start + len {
                    by_value.insert(v);
                }
            }
            prop_assert_eq!(by_range, by_value);
        }
    }
}
