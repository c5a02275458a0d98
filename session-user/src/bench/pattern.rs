//! The bytes of a measured stream: a pure function of their offset, so that a receiver finds a
//! lost, doubled or misplaced byte without having seen what was sent.

/// Length of the period. A prime, so that no buffer size or record size divides it and a block
/// that is delivered at the wrong place cannot fit by chance. More than a codec remembers, so that
/// nothing shrinks: what is measured is how bytes are carried.
const PERIOD: usize = 131_071;

/// One period of the bytes, twice, so that any run up to a period is one slice.
pub struct Pattern {
    bytes: Vec<u8>,
}

impl Pattern {
    /// Computes the period.
    pub fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            // SplitMix64 (Steele, Lea, Flood 2014): any good mixing serves.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) as u8
        };
        let mut bytes: Vec<u8> = (0..PERIOD).map(|_| next()).collect();
        bytes.extend_from_within(..);
        Self { bytes }
    }

    /// The `len` bytes from `offset` on; at most a period.
    pub fn at(&self, offset: u64, len: usize) -> &[u8] {
        let start = (offset % PERIOD as u64) as usize;
        &self.bytes[start..start + len.min(PERIOD)]
    }

    /// How many bytes of `data`, which was received at `offset`, are wrong.
    pub fn mismatches(&self, mut offset: u64, data: &[u8]) -> u64 {
        let mut wrong = 0;
        for part in data.chunks(PERIOD) {
            let expected = self.at(offset, part.len());
            if part != expected {
                wrong += part.iter().zip(expected).filter(|(a, b)| a != b).count() as u64;
            }
            offset += part.len() as u64;
        }
        wrong
    }
}

impl Default for Pattern {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_shift_and_a_flip() {
        let pattern = Pattern::new();
        let good = pattern.at(1_000_000, 5000).to_vec();
        assert_eq!(pattern.mismatches(1_000_000, &good), 0);
        assert!(pattern.mismatches(1_000_001, &good) > 4000);
        let mut bad = good;
        bad[77] ^= 1;
        assert_eq!(pattern.mismatches(1_000_000, &bad), 1);
    }

    #[test]
    fn spans_periods() {
        let pattern = Pattern::new();
        let mut long = Vec::new();
        while long.len() < 3 * PERIOD {
            let at = long.len() as u64;
            long.extend_from_slice(pattern.at(at, 1000));
        }
        assert_eq!(pattern.mismatches(0, &long), 0);
    }
}
