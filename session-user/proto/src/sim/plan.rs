//! What happens to one stream, and the bytes that it carries.

use std::time::Duration;

use super::Side;
use super::rng::{Rng, mix};
use crate::session::StreamId;
use crate::wire::Service;

/// How the application at one end of a stream behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Habits {
    /// Bytes that it sends.
    pub total: u64,
    /// Most bytes of one write.
    pub chunk: u64,
    /// Pause between writes; zero: as fast as it can.
    pub write_pause: Duration,
    /// Most bytes of one read.
    pub gulp: u64,
    /// Pause between reads; zero: as soon as there is something.
    pub read_pause: Duration,
    /// It aborts the stream once it has sent or read so many bytes in all.
    pub abort_after: Option<u64>,
    /// It sends its end only once it has read the peer's.
    pub end_after_peer: bool,
}

/// What happens to one stream: a pure function of seed and id, so that both ends agree.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamPlan {
    /// By side.
    pub habits: [Habits; 2],
    /// The target refuses with this errno.
    pub refuse: Option<u64>,
    /// Time that the target takes to connect.
    pub connect: Duration,
    /// The opener writes before it is connected.
    pub early: bool,
    /// How its records use the links.
    pub service: Service,
}

impl Habits {
    pub fn draw(rng: &mut Rng, bytes_max: u64) -> Self {
        let total = match rng.below(6) {
            0 => 0,
            1 => rng.below(100),
            _ => rng.log_range(1, bytes_max),
        };
        let chunk = rng.log_range(1, 70_000).max(total / 200).max(1);
        let gulp = rng.log_range(1, 70_000).max(bytes_max / 200).max(1);
        let pause = |rng: &mut Rng| {
            if rng.chance(500) {
                Duration::ZERO
            } else {
                rng.micros(100, 60_000)
            }
        };
        Self {
            total,
            chunk,
            write_pause: pause(rng),
            gulp,
            read_pause: pause(rng),
            abort_after: rng.chance(60).then(|| rng.below(bytes_max)),
            end_after_peer: rng.chance(250),
        }
    }
}

/// Bit of a pattern's seed: most of what is sent consists of few words.
pub(super) const WORDY: u64 = 1 << 63;
const WORDS: [[u8; 8]; 8] = [
    *b"harbour ",
    *b"harvest ",
    *b"lantern ",
    *b"landing ",
    *b"compass ",
    *b"compost ",
    *b"anchor, ",
    *b"anchored",
];

/// The eight bytes around `offset` of what `from` sends on stream `id`: nothing is kept to compare with.
pub(super) fn pattern(seed: u64, id: StreamId, from: Side, offset: u64) -> u64 {
    let stream = seed ^ mix(id * 2 + from as u64);
    let drawn = mix(stream ^ (offset >> 3));
    // Of 8 KiB in a row, a quarter does not shrink.
    if seed & WORDY == 0 || mix(!stream ^ (offset >> 13)) & 3 == 0 {
        return drawn;
    }
    u64::from_be_bytes(WORDS[(drawn & 7) as usize])
}

/// Fills `out` with the pattern from `offset` on.
pub(super) fn fill(seed: u64, id: StreamId, from: Side, offset: u64, out: &mut [u8]) {
    let mut at = offset;
    let mut rest = out;
    while !rest.is_empty() {
        let word = pattern(seed, id, from, at).to_be_bytes();
        let skip = (at & 7) as usize;
        let n = (8 - skip).min(rest.len());
        let (now, later) = rest.split_at_mut(n);
        now.copy_from_slice(&word[skip..skip + n]);
        at += n as u64;
        rest = later;
    }
}

/// Where `data` first differs from the pattern from `offset` on.
pub(super) fn differs(
    seed: u64,
    id: StreamId,
    from: Side,
    offset: u64,
    data: &[u8],
) -> Option<u64> {
    let mut at = offset;
    let mut rest = data;
    while !rest.is_empty() {
        let word = pattern(seed, id, from, at).to_be_bytes();
        let skip = (at & 7) as usize;
        let n = (8 - skip).min(rest.len());
        if let Some(i) = (0..n).find(|&i| rest[i] != word[skip + i]) {
            return Some(at + i as u64);
        }
        at += n as u64;
        rest = &rest[n..];
    }
    None
}
