//! Acknowledgement of space R.

use std::ops::Range;

use super::WireError;
use super::varint::{Reader, VARINT_MAX, put_varint};
use crate::limits::ACK_RANGES_MAX;
use crate::ranges::RangeSet;

/// Which record numbers of space R the sender of this frame holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// Every number below has been received.
    pub cumulative: u64,
    /// Ranges above, ascending, disjoint, not adjacent; at most [`ACK_RANGES_MAX`]. Empty (and
    /// then without allocation) on a transport that keeps order.
    pub ranges: Vec<Range<u64>>,
}

impl Ack {
    /// The state of `received`, lowest ranges first: they free the sender's memory soonest.
    pub fn of(received: &RangeSet) -> Self {
        Self {
            cumulative: received.cumulative(),
            ranges: received.above().take(ACK_RANGES_MAX).collect(),
        }
    }

    /// Cumulative, number of ranges, then for each the gap since the last end and the length.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put_varint(out, self.cumulative);
        put_varint(out, self.ranges.len() as u64);
        let mut last = self.cumulative;
        for range in &self.ranges {
            put_varint(out, range.start - last);
            put_varint(out, range.end - range.start);
            last = range.end;
        }
    }

    pub(super) fn parse(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        const WHAT: &str = "an acknowledgement";
        let cumulative = reader.varint(WHAT)?;
        let count = reader.length(ACK_RANGES_MAX, "the ranges of an acknowledgement")?;
        // Each takes two bytes at least: nothing is allocated for ranges that cannot be there.
        if reader.rest().len() < 2 * count {
            return Err(WireError::Truncated(WHAT));
        }
        let mut ranges = Vec::with_capacity(count);
        let mut last = cumulative;
        for _ in 0..count {
            let gap = reader.varint(WHAT)?;
            let len = reader.varint(WHAT)?;
            if gap == 0 || len == 0 {
                return Err(WireError::Invalid("a range of an acknowledgement"));
            }
            let start = last + gap;
            let end = start + len;
            if end > VARINT_MAX {
                return Err(WireError::Invalid("a range of an acknowledgement"));
            }
            ranges.push(start..end);
            last = end;
        }
        Ok(Self { cumulative, ranges })
    }
}
