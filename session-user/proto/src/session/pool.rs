//! Buffers that come back.
//!
//! A record's buffer is shared by reference by whoever holds the record: the sender's memory until the peer acknowledges
//! it, a transport until its socket has taken it. What a transport's bytes are read into is shared by the pieces of streams
//! in it, until applications have taken them. The pool keeps an empty handle on each buffer that it has given out. Once
//! that is the only one left the buffer is free again, whoever was the last to hold it, and nobody has to bring it back.
//! Of those that are free the one that was in use last goes out first: it is the likeliest to be in the processor's cache.

use std::collections::VecDeque;

use bytes::BytesMut;

use crate::Time;
use crate::limits::{POOL_REST, STREAM_DATA_BYTES_MAX};

/// What a buffer has room for beside what was asked for: the headers and the tag of a record.
pub(super) const BESIDE_BYTES: usize = 64;
/// Beside that, the sizes are this power of two and those above it.
const SMALLEST_SHIFT: u32 = 6;
/// The largest holds several of the longest records.
const SIZES: usize = 13;
const _: () = assert!(1 << (SMALLEST_SHIFT as usize + SIZES - 1) == 4 * STREAM_DATA_BYTES_MAX);
/// So much is kept for good, in bytes: an idle session's own questions are not to cost a look after them.
const KEPT_BYTES: usize = 8 * 1024;
/// Whoever needs buffers of this size is not idle.
const LARGE_BYTES: usize = 4 * 1024;
/// How many of the oldest are looked at for one that is free, where none is known. Records are acknowledged in order, nearly:
/// the oldest one is free first.
const LOOKS: usize = 4;
/// How many are looked at for each that is given out, while those before are free: one more, so that all that are free
/// become known.
const SORTED: usize = 2;

/// Buffers of one size.
#[derive(Debug, Default)]
struct Size {
    /// Handles on buffers that are in use, as far as is known, those given out first in front.
    handles: VecDeque<BytesMut>,
    /// On those that are free, in use last behind.
    free: Vec<BytesMut>,
    /// On others that were looked at and in use: some are held for long.
    held: VecDeque<BytesMut>,
    /// How many have been given out since the last [`Pool::rest`].
    taken: usize,
}

impl Size {
    /// A buffer that nobody holds, whose handle is taken out.
    fn free(&mut self, buffer_bytes: usize) -> Option<BytesMut> {
        // This makes the whole buffer the handle's own again.
        let is_free = |handle: &mut BytesMut| handle.try_reclaim(buffer_bytes);
        for _ in 0..SORTED {
            if !self.handles.front_mut().is_some_and(is_free) {
                break;
            }
            self.free.extend(self.handles.pop_front());
        }
        if let Some(latest) = self.free.pop() {
            return Some(latest);
        }
        if let Some(mut oldest) = self.held.pop_front() {
            if is_free(&mut oldest) {
                return Some(oldest);
            }
            self.held.push_back(oldest);
        }
        let looked = LOOKS.min(self.handles.len());
        let free = self.handles.iter_mut().take(looked).position(is_free);
        // Those before it hold no others up.
        let before = free.unwrap_or(looked);
        self.held.extend(self.handles.drain(..before));
        free.and_then(|_| self.handles.pop_front())
    }

    /// Buffers that there is a handle on.
    fn count(&self) -> usize {
        self.handles.len() + self.held.len() + self.free.len()
    }

    /// Lets go of half of those that are free, in use longest ago.
    fn halve(&mut self, buffer_bytes: usize) {
        let mut in_use = std::mem::take(&mut self.held);
        in_use.append(&mut self.handles);
        for mut handle in in_use {
            if handle.try_reclaim(buffer_bytes) {
                self.free.push(handle);
            } else {
                self.handles.push_back(handle);
            }
        }
        self.free.drain(..self.free.len() / 2);
    }
}

/// Bytes of a buffer of the size with this index.
const fn buffer_bytes(index: usize) -> usize {
    (1 << (SMALLEST_SHIFT as usize + index)) + BESIDE_BYTES
}

/// How many bytes may be asked for at most, so that the buffer has no more than `bytes`.
pub(super) const fn room_within(bytes: usize) -> usize {
    match bytes.saturating_sub(BESIDE_BYTES).checked_ilog2() {
        Some(shift) if shift >= SMALLEST_SHIFT => 1 << shift,
        _ => 0,
    }
}

/// Buffers of all sizes.
#[derive(Debug)]
pub(super) struct Pool {
    sizes: [Size; SIZES],
    /// How many bytes it may have a handle on.
    limit: usize,
    /// Bytes of all buffers that it has a handle on.
    bytes: usize,
    /// When to see what has not been needed.
    rest_at: Option<Time>,
}

impl Pool {
    /// A pool that has handles on at most `limit` bytes of buffers, those in use included.
    pub fn new(limit: usize) -> Self {
        Self {
            sizes: Default::default(),
            limit,
            bytes: 0,
            rest_at: None,
        }
    }

    /// An empty buffer for a record whose frames carry `bytes`.
    pub fn take(&mut self, now: Time, bytes: usize) -> BytesMut {
        let shift = bytes.next_power_of_two().trailing_zeros();
        let index = shift.saturating_sub(SMALLEST_SHIFT) as usize;
        let Some(size) = self.sizes.get_mut(index) else {
            self.rest_later(now);
            return BytesMut::with_capacity(bytes + BESIDE_BYTES);
        };
        size.taken += 1;
        let buffer_bytes = buffer_bytes(index);
        if self.bytes + buffer_bytes > KEPT_BYTES {
            self.rest_at.get_or_insert(now + POOL_REST);
        }
        if let Some(mut buffer) = size.free(buffer_bytes) {
            size.handles.push_back(buffer.split_off(buffer.capacity()));
            return buffer;
        }
        let mut buffer = BytesMut::with_capacity(buffer_bytes);
        if self.bytes + buffer_bytes <= self.limit {
            self.bytes += buffer_bytes;
        } else if size
            .held
            .pop_front()
            .or_else(|| size.handles.pop_front())
            .is_none()
        {
            // Other sizes have it all, until the next rest.
            return buffer;
        }
        size.handles.push_back(buffer.split_off(buffer.capacity()));
        // Here, so that buffers that come back never need any.
        size.free.reserve(size.count() - size.free.len());
        buffer
    }

    /// Makes room in `input` for a read of `bytes`, of which there may be less if half of a record is in it. True if it is
    /// in another buffer: the one that it had is left to those who hold parts of it.
    pub fn make_room(&mut self, now: Time, input: &mut BytesMut, bytes: usize) -> bool {
        if input.try_reclaim(bytes) {
            return false;
        }
        if input.is_empty() {
            // It may be free with this.
            *input = BytesMut::new();
        }
        let begun = std::mem::take(input);
        // Half of it at least is free then.
        let mut room = self.take(now, bytes.max(begun.len() + bytes / 2));
        room.extend_from_slice(&begun);
        *input = room;
        true
    }

    /// Who holds parts of buffers is to look at them, when the pool rests.
    pub fn rest_later(&mut self, now: Time) {
        self.rest_at.get_or_insert(now + POOL_REST);
    }

    /// When [`Self::rest`] is due.
    pub fn rest_at(&self) -> Option<Time> {
        self.rest_at
    }

    /// Lets go of what has not been needed since the last rest, if it is time; true if nothing large was needed. Of the
    /// buffers of a size that was, half of those that are free go: what was needed once is not kept for ever.
    pub fn rest(&mut self, now: Time) -> bool {
        if self.rest_at.is_none_or(|at| now < at) {
            return false;
        }
        self.bytes = 0;
        let mut large = false;
        for (index, size) in self.sizes.iter_mut().enumerate() {
            if std::mem::take(&mut size.taken) == 0 {
                *size = Size::default();
                continue;
            }
            large |= buffer_bytes(index) > LARGE_BYTES;
            size.halve(buffer_bytes(index));
            self.bytes += size.count() * buffer_bytes(index);
        }
        self.rest_at = (self.bytes > KEPT_BYTES).then(|| now + POOL_REST);
        !large
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: usize = STREAM_DATA_BYTES_MAX;
    const LIMIT: usize = 4 << 20;
    const LARGE_BUFFER: usize = LARGE + BESIDE_BYTES;

    /// Where a buffer begins.
    fn place(buffer: &BytesMut) -> usize {
        buffer.as_ptr() as usize
    }

    #[test]
    fn a_buffer_comes_back_when_nobody_holds_it() {
        let mut pool = Pool::new(LIMIT);
        let mut first = pool.take(Time::ZERO, 1000);
        first.extend_from_slice(&[7; 1000]);
        let at = place(&first);
        let first = first.freeze();
        let shared = first.clone();
        drop(first);
        assert_ne!(place(&pool.take(Time::ZERO, 1000)), at);
        drop(shared);
        let again = [(); 2].map(|()| pool.take(Time::ZERO, 600));
        assert!(again.iter().any(|b| place(b) == at && b.is_empty()));
        assert!(again.iter().all(|b| b.capacity() >= 1000));
    }

    #[test]
    fn a_buffer_has_no_more_than_is_left_for_it() {
        let buffer = |room| Pool::new(LIMIT).take(Time::ZERO, room).capacity();
        for left in (0..300).chain([LARGE, LARGE + 63, LARGE_BUFFER, 2 * LARGE]) {
            let room = room_within(left);
            assert!(room == 0 || buffer(room) <= left, "{left}");
            assert!(buffer(room + 1) > left, "{left}");
        }
    }

    #[test]
    fn room_for_reads_is_made_without_losing_a_byte_and_comes_back() {
        let mut pool = Pool::new(LIMIT);
        let mut input = BytesMut::new();
        let mut places = std::collections::BTreeSet::new();
        for round in 0..50_u8 {
            pool.make_room(Time::ZERO, &mut input, LARGE);
            assert!(input.capacity() - input.len() >= LARGE / 2);
            places.insert(place(&input));
            input.extend_from_slice(&[round; 1000]);
            // Nearly all of it goes to an application, which has taken it before the next round.
            let taken = input.split_to(input.len() - 10).freeze();
            pool.make_room(Time::ZERO, &mut input, LARGE);
            assert_eq!(input[..], [round; 10]);
            assert!(taken.ends_with(&[round; 10]));
            places.insert(place(&input));
        }
        assert!(places.len() <= 4, "{}", places.len());
        // A record that is larger than the room is not cut.
        input.resize(3 * LARGE, 1);
        pool.make_room(Time::ZERO, &mut input, LARGE);
        assert!(input.len() == 3 * LARGE && input.capacity() >= 3 * LARGE + LARGE / 2);
    }

    #[test]
    fn the_one_that_was_in_use_last_goes_out_first_whatever_is_held() {
        for held in 0..3 {
            let mut pool = Pool::new(LIMIT);
            let take = |pool: &mut Pool| pool.take(Time::ZERO, LARGE);
            let mut many: VecDeque<BytesMut> = (0..20).map(|_| take(&mut pool)).collect();
            let held: Vec<BytesMut> = many.drain(..held).collect();
            // What was held when there was too little stands in front again.
            pool.rest(Time::ZERO + POOL_REST);
            many.drain(..12);
            let mut used = std::collections::BTreeSet::new();
            for round in 0..200 {
                many.push_back(take(&mut pool));
                if round >= 100 {
                    used.insert(many.back().map(place));
                }
                many.pop_front();
            }
            assert!(used.len() <= 10, "{} of 20", used.len());
            assert_eq!(pool.bytes, 20 * LARGE_BUFFER);
            drop(held);
        }
    }

    #[test]
    fn one_that_is_held_for_long_holds_no_other_up() {
        let mut pool = Pool::new(LIMIT);
        let held: Vec<BytesMut> = (0..=LOOKS).map(|_| pool.take(Time::ZERO, 100)).collect();
        for _ in 0..LOOKS {
            pool.take(Time::ZERO, 100);
        }
        let kept = pool.bytes;
        for _ in 0..100 {
            pool.take(Time::ZERO, 100);
        }
        assert!(
            pool.bytes <= kept + LOOKS * buffer_bytes(1),
            "{} bytes",
            pool.bytes
        );
        drop(held);
    }

    #[test]
    fn memory_is_bounded_whatever_is_held() {
        let mut pool = Pool::new(LIMIT);
        let held: Vec<BytesMut> = (0..300).map(|_| pool.take(Time::ZERO, LARGE)).collect();
        assert!(pool.bytes <= LIMIT);
        let handles = pool.sizes.iter().map(Size::count).sum::<usize>();
        assert!(handles <= LIMIT / LARGE);
        // Small ones still go out while the large have it all, and so do those that are too large to keep.
        assert!(pool.take(Time::ZERO, 50).capacity() >= 50);
        assert!(pool.take(Time::ZERO, 1 << 20).capacity() >= 1 << 20);
        drop(held);
    }

    #[test]
    fn what_is_not_needed_is_let_go() {
        let mut pool = Pool::new(LIMIT);
        let mut many: Vec<BytesMut> = (0..20).map(|_| pool.take(Time::ZERO, LARGE)).collect();
        many.truncate(3);
        let mut now = Time::ZERO;
        // Three are in use, and half of the others goes with each rest.
        for left in [12, 8, 6] {
            now = now + POOL_REST;
            assert!(!pool.rest(now));
            assert_eq!(pool.bytes, left * LARGE_BUFFER);
            drop(pool.take(now, LARGE));
        }
        now = now + POOL_REST;
        pool.rest(now);
        now = now + POOL_REST;
        assert!(pool.rest(now));
        assert_eq!((pool.bytes, pool.rest_at()), (0, None));
        drop(many);
    }

    #[test]
    fn an_idle_session_s_own_records_wake_nobody() {
        let mut pool = Pool::new(LIMIT);
        for _ in 0..100 {
            drop(pool.take(Time::ZERO, 20));
        }
        assert_eq!(pool.rest_at(), None);
        drop(pool.take(Time::ZERO, LARGE));
        let at = pool.rest_at().expect("much is kept");
        assert!(!pool.rest(at));
        let at = pool.rest_at().expect("it was needed just before");
        drop(pool.take(at, 20));
        assert!(pool.rest(at));
        assert_eq!(pool.rest_at(), None);
    }
}
