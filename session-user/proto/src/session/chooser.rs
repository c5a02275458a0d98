//! Whether a stream is packed, and by which codec: where that saves time, and no longer.
//!
//! The link holds the stream up if it had to wait for room in a queue. Packed, it moves as fast as the link
//! carries what is left of it, or as the codec packs, whichever is slower; that must be clearly more than the
//! link carries as it is. How far a stream shrinks is only known by packing it: one record is the probe, and
//! where it does not pay, the next one comes a megabyte later, and then after double of it each time.

use std::time::Duration;

use super::config::Compression;
use crate::Time;
use crate::codec::Method;
use crate::limits::{PACK_AGAIN_BYTES, PACK_AGAIN_BYTES_MAX, PACKED_FIRST_BYTES_MIN};

/// A stream that had to wait within this time is held up by the link.
const HELD_UP: Duration = Duration::from_secs(1);
/// One that is packed need not wait any more, so that is no reason to end it; not for so long.
const HELD_UP_LONG_AGO: Duration = Duration::from_secs(10);
/// Ratios are those of the last so many bytes or so.
const RECENT_BYTES: u64 = 256 * 1024;
/// Before so many they say little.
const KNOWN_BYTES: u64 = 32 * 1024;
/// What else is done for each byte on its way, in bytes a second: reading, sealing and writing it.
const PIPELINE: u64 = 1_300_000_000;
/// How many methods there are.
const METHODS: usize = Method::ALL.len();
/// The part of a processor's time that each may take: a shorter text is not worth more of it than this, where a
/// longer one costs little.
const PARTS: [u64; METHODS] = [1, 1, 8];
/// What is taken for granted of text until it is known, in thousandths: see [`Ratio`].
const USUAL: [u64; METHODS] = [2_000, 3_000, 3_250];

/// What one processor of a server of 2023 packs in a second, in bytes, by [`Method::index`]; what the driver measures takes
/// its place.
const USUAL_SPEEDS: [u64; METHODS] = [500_000_000, 350_000_000, 80_000_000];
/// A host that was found slow is believed half of it after this time: a stream that is not packed for that measures nothing.
const SLOW_HALF: Duration = Duration::from_secs(60);

/// How fast this host packs, in bytes a second, by [`Method::index`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Speeds {
    known: [u64; METHODS],
    /// When each was measured last.
    at: [Time; METHODS],
}

impl Default for Speeds {
    fn default() -> Self {
        Self {
            known: USUAL_SPEEDS,
            at: [Time::ZERO; METHODS],
        }
    }
}

impl Speeds {
    /// `bytes` were packed and sealed in `took`.
    pub fn measured(&mut self, now: Time, method: Method, bytes: usize, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let sample = bytes as u64 * 1_000_000 / micros;
        let index = method.index();
        let known = self.believed(now).known[index];
        // Now and then somebody else has the processor: one sample is no slow host.
        self.known[index] = (known * 15 + sample.clamp(1_000_000, 10_000_000_000)) / 16;
        self.at[index] = now;
    }

    /// What is believed at a time.
    pub fn believed(mut self, now: Time) -> Self {
        for (index, known) in self.known.iter_mut().enumerate() {
            let halves = now.since(self.at[index]).as_secs() / SLOW_HALF.as_secs();
            let missing = USUAL_SPEEDS[index].saturating_sub(*known);
            *known += missing - missing.checked_shr(halves.min(64) as u32).unwrap_or(0);
        }
        self
    }

    /// Bytes a second of a stream that shrinks by `ratio`, over a link that carries `rate`.
    fn pace(self, method: Method, rate: u64, ratio: u64) -> u64 {
        let speed = self.known[method.index()];
        let packs = u128::from(speed) * u128::from(PIPELINE) / u128::from(speed + PIPELINE);
        let packs = packs / u128::from(PARTS[method.index()]);
        let carries = u128::from(rate) * u128::from(ratio) / 1_000;
        u64::try_from(packs.min(carries)).unwrap_or(u64::MAX)
    }
}

/// What a stream has become by packing, lately.
#[derive(Clone, Copy, Debug, Default)]
struct Ratio {
    plain: u64,
    packed: u64,
}

impl Ratio {
    fn add(&mut self, plain: usize, packed: usize) {
        self.plain += plain as u64;
        self.packed += packed as u64;
        if self.plain > RECENT_BYTES {
            self.plain /= 2;
            self.packed /= 2;
        }
    }

    /// Plain bytes for a thousand packed ones.
    fn thousandths(self) -> Option<u64> {
        (self.plain > 0).then(|| self.plain * 1_000 / self.packed.max(1))
    }

    fn is_known(self) -> bool {
        self.plain >= KNOWN_BYTES
    }
}

/// What a decision about one record depends on, beside the stream's past.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question {
    pub now: Time,
    /// What packs the stream.
    pub open: Option<Method>,
    /// Codecs that both ends have.
    pub codecs: u64,
    pub wish: Compression,
    /// The stream begins as HTTP or TLS does, in either direction.
    pub is_web: bool,
    /// Bytes a second that the record's transport carries, if that is known.
    pub rate: Option<u64>,
    pub speeds: Speeds,
    pub offset: u64,
    pub len: usize,
}

/// What one direction of a stream has shown.
#[derive(Clone, Debug, Default)]
pub(super) struct Chooser {
    waited_at: Option<Time>,
    /// No attempt below this offset.
    again_at: u64,
    /// What the last failure put between.
    again_after: u64,
    /// Offset at which the codec in use began.
    began_at: u64,
    ratios: [Ratio; METHODS],
    /// Bytes since a time, for what the application offers.
    since: Time,
    offered: u64,
}

impl Chooser {
    /// There was no room for the stream in a queue.
    pub fn waits(&mut self, now: Time) {
        self.waited_at = Some(now);
    }

    /// What packs the next record; `None`: nothing.
    pub fn choose(&mut self, q: &Question) -> Option<Method> {
        self.count(q);
        if q.codecs == 0 || (q.wish.spares_web && q.is_web) {
            return None;
        }
        match q.open {
            Some(method) => self.go_on(q, method),
            None => self.begin(q),
        }
    }

    fn count(&mut self, q: &Question) {
        if q.now.since(self.since) > 2 * HELD_UP {
            self.since = q.now;
            self.offered = 0;
        }
        self.offered += q.len as u64;
    }

    fn waited_within(&self, now: Time, time: Duration) -> bool {
        self.waited_at.is_some_and(|at| now.since(at) <= time)
    }

    fn begin(&mut self, q: &Question) -> Option<Method> {
        if q.len < PACKED_FIRST_BYTES_MIN {
            return None;
        }
        let best = self.best(q);
        if q.wish.always {
            return best;
        }
        if q.offset < self.again_at {
            return None;
        }
        let rate = q.rate.filter(|_| self.waited_within(q.now, HELD_UP))?;
        best.filter(|method| self.pays(q, *method, rate))
    }

    /// A fifth more, or the processor's time is better spent otherwise.
    fn pays(&self, q: &Question, method: Method, rate: u64) -> bool {
        self.pace(q, method, rate) / 6 >= rate / 5
    }

    fn go_on(&mut self, q: &Question, method: Method) -> Option<Method> {
        let Some(rate) = q.rate.filter(|_| !q.wish.always) else {
            return Some(method);
        };
        if !self.ratios[method.index()].is_known() {
            return Some(method);
        }
        let pace = self.pace(q, method, rate);
        let micros = q.now.since(self.since).as_micros().max(1);
        let idles = q.now.since(self.since) >= HELD_UP
            && u128::from(self.offered) * 2_000_000 / micros < u128::from(rate);
        let free = idles && !self.waited_within(q.now, HELD_UP_LONG_AGO);
        if free {
            // It shrinks as before: the next time that it has to wait it begins again.
            return None;
        }
        let best = self.best(q).filter(|best| *best != method);
        if pace / 21 < rate / 20 {
            // The link may have become faster than the method, not the data other.
            let quicker = best.filter(|best| self.pays(q, *best, rate));
            if quicker.is_none() {
                self.failed(q.offset);
            }
            return quicker;
        }
        if q.offset < self.began_at + PACK_AGAIN_BYTES {
            return Some(method);
        }
        self.again_after = 0;
        // Changing costs the history of 64 KiB.
        let better = best.filter(|best| self.pace(q, *best, rate) / 5 >= pace / 4);
        Some(better.unwrap_or(method))
    }

    fn best(&self, q: &Question) -> Option<Method> {
        let all = Method::ALL.into_iter();
        let there = all.filter(|method| q.codecs & method.codec().bit() != 0);
        // Where the rate is not known, the link is taken for a usual one.
        let rate = q.rate.unwrap_or(12_500_000);
        there.max_by_key(|method| self.pace(q, *method, rate))
    }

    fn pace(&self, q: &Question, method: Method, rate: u64) -> u64 {
        q.speeds.pace(method, rate, self.expected(method))
    }

    fn known(&self, method: Method) -> Option<u64> {
        let ratio = self.ratios[method.index()];
        ratio.thousandths().filter(|_| ratio.is_known())
    }

    /// In thousandths: what was seen, or what another method lets expect.
    fn expected(&self, method: Method) -> u64 {
        let usual = |method: Method| USUAL[method.index()];
        let others = Method::ALL.into_iter().filter(|other| *other != method);
        let guess = |other: Method| Some(self.known(other)? * usual(method) / usual(other));
        let seen = self.known(method);
        seen.or_else(|| others.rev().find_map(guess))
            .unwrap_or_else(|| usual(method))
    }

    /// A record of `plain` bytes became `packed`; `fresh`: the first of its method.
    pub fn packed(
        &mut self,
        method: Method,
        offset: u64,
        fresh: bool,
        plain: usize,
        packed: usize,
    ) {
        let ratio = &mut self.ratios[method.index()];
        if fresh {
            *ratio = Ratio::default();
            self.began_at = offset;
        }
        ratio.add(plain, packed);
    }

    /// Packing did not pay at `offset`.
    pub fn failed(&mut self, offset: u64) {
        self.again_after = (self.again_after * 2).clamp(PACK_AGAIN_BYTES, PACK_AGAIN_BYTES_MAX);
        self.again_at = offset + self.again_after;
        // What comes then may be of another kind.
        self.ratios = Default::default();
    }

    /// How much larger a record may be for what `method` makes of it, in thousandths.
    pub fn shrinks_by(&self, method: Method) -> u64 {
        let seen = self.ratios[method.index()].thousandths();
        seen.unwrap_or(1_000).clamp(1_000, 16_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Codec;

    const MS: u64 = 1_000_000;

    fn at(ms: u64) -> Time {
        Time::from_nanos(ms * MS)
    }

    fn question(rate: u64) -> Question {
        Question {
            now: at(1_000),
            open: None,
            codecs: Compression::AUTO.codecs,
            wish: Compression::AUTO,
            is_web: false,
            rate: Some(rate),
            speeds: Speeds::default(),
            offset: 0,
            len: 8_192,
        }
    }

    fn held_up() -> Chooser {
        let mut chooser = Chooser::default();
        chooser.waits(at(900));
        chooser
    }

    #[test]
    fn only_what_the_link_holds_up_is_packed() {
        assert_eq!(Chooser::default().choose(&question(1_250_000)), None);
        assert_eq!(
            held_up().choose(&question(1_250_000)),
            Some(Method::ZstdThorough)
        );
        let small = Question {
            len: 100,
            ..question(1_250_000)
        };
        assert_eq!(held_up().choose(&small), None);
    }

    #[test]
    fn the_codec_fits_the_link_and_the_host() {
        // 20 Mbit/s, 100 Mbit/s, 2 Gbit/s, and what no codec keeps up with.
        let slow = question(2_500_000);
        assert_eq!(held_up().choose(&slow), Some(Method::ZstdThorough));
        assert_eq!(held_up().choose(&question(12_500_000)), Some(Method::Zstd));
        assert_eq!(held_up().choose(&question(250_000_000)), Some(Method::Lz4));
        assert_eq!(held_up().choose(&question(500_000_000)), None);
        let mut slow = question(12_500_000);
        for _ in 0..200 {
            slow.speeds.measured(
                slow.now,
                Method::ZstdThorough,
                65_536,
                Duration::from_millis(20),
            );
            slow.speeds
                .measured(slow.now, Method::Zstd, 65_536, Duration::from_millis(5));
            slow.speeds
                .measured(slow.now, Method::Lz4, 65_536, Duration::from_millis(4));
        }
        assert_eq!(held_up().choose(&slow), Some(Method::Lz4));
        slow.rate = Some(25_000_000);
        assert_eq!(held_up().choose(&slow), None);
        // It was busy, and nothing has been measured since.
        let later = slow.now + 10 * SLOW_HALF;
        slow.speeds = slow.speeds.believed(later);
        assert!(held_up().choose(&slow).is_some());
    }

    #[test]
    fn what_did_not_pay_is_tried_again_later_and_later() {
        let mut chooser = held_up();
        let mut q = question(1_250_000);
        let mut tries = Vec::new();
        while q.offset < 64 << 20 {
            chooser.waits(q.now);
            if chooser.choose(&q).is_some() {
                tries.push(q.offset >> 20);
                chooser.failed(q.offset);
            }
            q.offset += q.len as u64;
        }
        assert_eq!(tries, [0, 1, 3, 7, 15, 31, 47, 63]);
    }

    #[test]
    fn it_ends_when_the_data_shrinks_no_more() {
        let mut chooser = held_up();
        let mut q = question(1_250_000);
        let codec = chooser.choose(&q).unwrap();
        chooser.packed(codec, 0, true, 8_192, 2_000);
        q.open = Some(codec);
        let mut records = 0;
        while chooser.choose(&q) == Some(codec) {
            chooser.packed(codec, q.offset, false, 8_192, 8_100);
            q.offset += 8_192;
            records += 1;
            assert!(records < 200);
        }
        assert_eq!(chooser.choose(&Question { open: None, ..q }), None);
    }

    #[test]
    fn a_stream_that_need_not_wait_any_more_stays_packed() {
        let mut chooser = held_up();
        let mut q = question(1_250_000);
        let codec = chooser.choose(&q).unwrap();
        q.open = Some(codec);
        chooser.packed(codec, 0, true, 65_536, 16_000);
        // As fast as the link alone would carry it: packed it never waits.
        for ms in (1_010..40_000).step_by(10) {
            q.now = at(ms);
            q.offset += 8_192;
            assert_eq!(chooser.choose(&q), Some(codec), "{ms}");
            chooser.packed(codec, q.offset, false, 8_192, 2_000);
        }
        // A tenth of that needs no codec.
        let mut packed = true;
        for ms in (40_000..60_000).step_by(100) {
            q.now = at(ms);
            q.offset += 8_192;
            packed = chooser.choose(&q).is_some();
            if !packed {
                break;
            }
        }
        assert!(!packed);
        // When it has to wait again it is packed again, at once.
        q.open = None;
        chooser.waits(q.now);
        assert_eq!(chooser.choose(&q), Some(codec));
    }

    #[test]
    fn the_web_is_spared_unless_the_operator_says_otherwise() {
        let web = Question {
            is_web: true,
            ..question(1_250_000)
        };
        assert_eq!(held_up().choose(&web), None);
        let wish = Compression::only(Codec::Lz4);
        let forced = Question {
            wish,
            codecs: wish.codecs,
            ..web
        };
        assert_eq!(held_up().choose(&forced), Some(Method::Lz4));
    }

    #[test]
    fn a_link_that_has_become_faster_gets_a_quicker_method_at_once() {
        let mut chooser = held_up();
        let mut q = question(1_250_000);
        assert_eq!(chooser.choose(&q), Some(Method::ZstdThorough));
        chooser.packed(Method::ZstdThorough, 0, true, 65_536, 16_000);
        (q.open, q.offset) = (Some(Method::ZstdThorough), 65_536);
        assert_eq!(chooser.choose(&q), q.open);
        q.rate = Some(12_500_000);
        assert_eq!(chooser.choose(&q), Some(Method::Zstd));
        // Not where the data shrinks no more.
        for _ in 0..40 {
            chooser.packed(Method::ZstdThorough, q.offset, false, 65_536, 65_000);
        }
        assert_eq!(chooser.choose(&q), None);
    }
}
