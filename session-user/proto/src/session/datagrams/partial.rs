//! Datagrams of which only a part has come.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};

use super::FlowId;
use crate::Time;
use crate::limits::{PARTIAL_BYTES_MAX, PARTIAL_TIME, PARTIALS_MAX};
use crate::ranges::RangeSet;
use crate::wire::Fragment;

#[derive(Debug)]
struct Partial {
    flow: FlowId,
    began: Time,
    data: BytesMut,
    /// Offsets that have come.
    got: RangeSet,
}

/// By the datagrams' numbers.
#[derive(Debug, Default)]
pub(super) struct Partials {
    kept: BTreeMap<u64, Partial>,
    bytes: usize,
}

/// What became of a part.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Joined {
    /// More is missing.
    Waits,
    /// It was the last one.
    Whole(Bytes),
}

impl Partials {
    /// Bytes kept.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A part of datagram `number` came; returns also how many datagrams had to go for it.
    pub fn join(
        &mut self,
        now: Time,
        flow: FlowId,
        number: u64,
        part: Fragment,
        data: &[u8],
    ) -> (Joined, u64) {
        let Fragment { offset, total } = part;
        let mut lost = self.expire(now);
        let fits = |p: &Partial| p.flow == flow && p.data.len() == total;
        if self.kept.get(&number).is_some_and(|p| !fits(p)) {
            // The sender contradicts itself.
            return (Joined::Waits, lost);
        }
        if !self.kept.contains_key(&number) {
            lost += self.make_room(total);
            self.bytes += total;
            let fresh = Partial {
                flow,
                began: now,
                data: BytesMut::zeroed(total),
                got: RangeSet::new(),
            };
            self.kept.insert(number, fresh);
        }
        let Some(partial) = self.kept.get_mut(&number) else {
            return (Joined::Waits, lost);
        };
        // The frame's parser has seen to it that the part lies within the datagram.
        partial.data[offset..offset + data.len()].copy_from_slice(data);
        partial
            .got
            .insert_range(offset as u64..(offset + data.len()) as u64);
        if partial.got.cumulative() < total as u64 {
            return (Joined::Waits, lost);
        }
        let whole = self.take(number).unwrap_or_default();
        (Joined::Whole(whole.freeze()), lost)
    }

    /// Datagram `number` came whole on another way.
    pub fn forget_number(&mut self, number: u64) {
        self.take(number);
    }

    fn take(&mut self, number: u64) -> Option<BytesMut> {
        let partial = self.kept.remove(&number)?;
        self.bytes -= partial.data.len();
        Some(partial.data)
    }

    fn make_room(&mut self, total: usize) -> u64 {
        let mut lost = 0;
        while self.kept.len() >= PARTIALS_MAX || self.bytes + total > PARTIAL_BYTES_MAX {
            let Some((&oldest, _)) = self.kept.iter().min_by_key(|(_, p)| p.began) else {
                break;
            };
            self.take(oldest);
            lost += 1;
        }
        lost
    }

    /// Forgets what has waited for too long; returns how many.
    pub fn expire(&mut self, now: Time) -> u64 {
        let late = |p: &Partial| now >= p.began + PARTIAL_TIME;
        self.forget(late)
    }

    /// Forgets the parts of a flow that is over.
    pub fn forget_flow(&mut self, flow: FlowId) -> u64 {
        self.forget(|p| p.flow == flow)
    }

    fn forget(&mut self, out: impl Fn(&Partial) -> bool) -> u64 {
        let gone: Vec<u64> = (self.kept.iter())
            .filter(|(_, p)| out(p))
            .map(|(&n, _)| n)
            .collect();
        for &number in &gone {
            self.take(number);
        }
        gone.len() as u64
    }

    /// When the oldest has waited for too long.
    pub fn deadline(&self) -> Option<Time> {
        let oldest = self.kept.values().map(|p| p.began).min()?;
        Some(oldest + PARTIAL_TIME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const NOW: Time = Time::ZERO;

    fn part(offset: usize, total: usize) -> Fragment {
        Fragment { offset, total }
    }

    #[test]
    fn parts_come_in_any_order_more_than_once_and_overlap() {
        let mut partials = Partials::default();
        let data: Vec<u8> = (0..100).collect();
        for (from, to) in [(60, 100), (0, 30), (60, 100), (20, 50)] {
            let got = partials.join(NOW, 4, 7, part(from, 100), &data[from..to]);
            assert_eq!(got, (Joined::Waits, 0));
        }
        let got = partials.join(NOW, 4, 7, part(45, 100), &data[45..65]);
        assert_eq!(got, (Joined::Whole(data.into()), 0));
        assert_eq!(partials.bytes(), 0);
    }

    #[test]
    fn what_contradicts_itself_is_left_alone() {
        let mut partials = Partials::default();
        let _ = partials.join(NOW, 4, 7, part(0, 10), &[1; 5]);
        assert_eq!(
            partials.join(NOW, 4, 7, part(5, 11), &[2; 5]),
            (Joined::Waits, 0)
        );
        assert_eq!(
            partials.join(NOW, 6, 7, part(5, 10), &[2; 5]),
            (Joined::Waits, 0)
        );
        let (whole, _) = partials.join(NOW, 4, 7, part(5, 10), &[3; 5]);
        assert_eq!(
            whole,
            Joined::Whole(Bytes::from_static(&[1, 1, 1, 1, 1, 3, 3, 3, 3, 3]))
        );
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_go() {
        let mut partials = Partials::default();
        let mut lost = 0;
        for number in 0..100 {
            let at = NOW + Duration::from_millis(number);
            lost += partials.join(at, 0, number, part(0, 60_000), &[0]).1;
            assert!(partials.bytes() <= PARTIAL_BYTES_MAX);
        }
        assert_eq!((partials.kept.len(), lost), (4, 96));
        assert!(partials.kept.contains_key(&99) && !partials.kept.contains_key(&95));
        let mut small = Partials::default();
        for number in 0..40 {
            let _ = small.join(NOW, 0, number, part(0, 10), &[0]);
        }
        assert_eq!(small.kept.len(), PARTIALS_MAX);
        assert_eq!(small.deadline(), Some(NOW + PARTIAL_TIME));
        assert_eq!(small.expire(NOW + PARTIAL_TIME), PARTIALS_MAX as u64);
        assert_eq!((small.bytes(), small.deadline()), (0, None));
    }
}
