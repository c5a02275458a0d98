//! A log as services write it, and what the codecs by themselves make of it: what compression is measured with.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::Context;
use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
use session_proto::wire::Codec;
use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer};

/// Bytes until it begins anew: many times what a codec remembers.
const PERIOD: usize = 8 << 20;
/// Most bytes that are asked for at once.
const CHUNK_MAX: usize = 64 * 1024;
/// Bytes that the codecs' own encoders are given at once.
const FED_BYTES: usize = 64 * 1024;
/// Level of Zstandard that its own ratio is of: the one that streams have where time counts. Over a narrow link they search
/// as level 8 does, in tables as small as the window, and may get beyond this ratio there.
const ZSTD_LEVEL: i32 = 1;

/// JSON lines, the same in every process.
pub struct Log {
    bytes: Vec<u8>,
}

impl Log {
    /// Writes the log.
    pub fn new() -> Self {
        let mut writer = Writer::default();
        while writer.text.len() < PERIOD {
            writer.line();
        }
        let mut bytes = writer.text.into_bytes();
        bytes.truncate(PERIOD);
        bytes.extend_from_within(..CHUNK_MAX);
        Self { bytes }
    }

    /// The `len` bytes from `offset` on; at most 64 KiB.
    pub fn at(&self, offset: u64, len: usize) -> &[u8] {
        let start = (offset % PERIOD as u64) as usize;
        &self.bytes[start..start + len.min(CHUNK_MAX)]
    }

    /// How much shorter a codec's own encoder makes it, as one stream that is never flushed: none of ours is in it.
    pub fn own_ratio(&self, codec: Codec) -> anyhow::Result<f64> {
        let text = &self.bytes[..PERIOD];
        let packed = match codec {
            Codec::Lz4 => by_lz4(text)?,
            Codec::Zstd => by_zstd(text)?,
        };
        Ok(PERIOD as f64 / packed as f64)
    }
}

/// The frame format of LZ4 with linked blocks of 64 KiB.
fn by_lz4(text: &[u8]) -> anyhow::Result<usize> {
    let info = FrameInfo::new()
        .block_mode(BlockMode::Linked)
        .block_size(BlockSize::Max64KB);
    let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
    for piece in text.chunks(FED_BYTES) {
        encoder.write_all(piece)?;
    }
    Ok(encoder.finish()?.len())
}

/// One frame of Zstandard with the level's own window.
fn by_zstd(text: &[u8]) -> anyhow::Result<usize> {
    let mut context = CCtx::try_create().context("no memory for Zstandard")?;
    let fails = |code| anyhow::anyhow!("{}", zstd_safe::get_error_name(code));
    let level = CParameter::CompressionLevel(ZSTD_LEVEL);
    context.set_parameter(level).map_err(fails)?;
    let mut room = vec![0; zstd_safe::compress_bound(FED_BYTES) + FED_BYTES];
    let mut total = 0;
    let mut feed = |piece: &[u8], directive| {
        let mut input = InBuffer::around(piece);
        loop {
            let mut output = OutBuffer::around(&mut room[..]);
            let left = context
                .compress_stream2(&mut output, &mut input, directive)
                .map_err(fails)?;
            total += output.pos();
            let fed = input.pos() == piece.len();
            if fed && (left == 0 || directive == ZSTD_EndDirective::ZSTD_e_continue) {
                return anyhow::Ok(());
            }
        }
    };
    for piece in text.chunks(FED_BYTES) {
        feed(piece, ZSTD_EndDirective::ZSTD_e_continue)?;
    }
    feed(&[], ZSTD_EndDirective::ZSTD_e_end)?;
    Ok(total)
}

/// What comes of a seed, line by line.
struct Writer {
    text: String,
    state: u64,
    micros: u64,
}

impl Default for Writer {
    fn default() -> Self {
        Self {
            text: String::with_capacity(PERIOD + 1024),
            state: 0x2545_f491_4f6c_dd1d,
            micros: 0,
        }
    }
}

impl Writer {
    /// xorshift64.
    fn draw(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.draw() >> 20) % limit
    }

    fn pick<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len() as u64) as usize]
    }

    /// A request as a service tells of it: most is as in other lines, and what is not is numbers, a trace id
    /// (hexadecimal) and a session's token (base64url), which no codec makes much shorter.
    fn line(&mut self) {
        const LEVELS: [&str; 8] = [
            "info", "info", "info", "info", "info", "info", "debug", "warn",
        ];
        const SERVICES: [&str; 6] = [
            "orders",
            "payments",
            "catalogue",
            "accounts",
            "shipping",
            "search",
        ];
        const METHODS: [&str; 5] = ["GET", "GET", "GET", "POST", "PUT"];
        const THINGS: [&str; 4] = ["items", "customers", "orders", "baskets"];
        const SAID: [&str; 6] = [
            "request served",
            "request served",
            "request served",
            "cache miss",
            "upstream answered",
            "retried",
        ];
        self.micros += self.below(4_000);
        let (level, service) = (self.pick(&LEVELS), self.pick(&SERVICES));
        let client = [self.below(4), self.below(256), self.below(256)];
        let trace = [self.draw(), self.draw()];
        let session: String = (0..16).map(|_| self.token_letter()).collect();
        let (method, thing) = (self.pick(&METHODS), self.pick(&THINGS));
        let number = self.below(100_000);
        let status = if self.below(16) == 0 { 404 } else { 200 };
        let (bytes, took, said) = (self.below(65_536), self.below(100_000), self.pick(&SAID));
        let [micros, seconds] = [self.micros % 1_000_000, self.micros / 1_000_000];
        // Writing to a String does not fail.
        let _ = writeln!(
            self.text,
            "{{\"ts\":\"2026-03-01T{:02}:{:02}:{:02}.{micros:06}Z\",\"level\":\"{level}\",\"service\":\"{service}\",\
             \"client\":\"10.{}.{}.{}\",\"trace\":\"{:016x}{:016x}\",\"session\":\"{session}\",\"method\":\"{method}\",\
             \"path\":\"/api/v1/{thing}/{number}\",\"status\":{status},\"bytes\":{bytes},\"took_us\":{took},\"msg\":\"{said}\"}}",
            seconds / 3_600 % 24,
            seconds / 60 % 60,
            seconds % 60,
            client[0],
            client[1],
            client[2],
            trace[0],
            trace[1],
        );
    }

    fn token_letter(&mut self) -> char {
        const LETTERS: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        char::from(LETTERS[self.below(64) as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_shrinks_as_logs_do() {
        let log = Log::new();
        let [lz4, zstd] = Codec::ALL.map(|codec| log.own_ratio(codec).unwrap());
        assert!((2.4..2.7).contains(&lz4), "{lz4}");
        assert!((4.0..4.4).contains(&zstd), "{zstd}");
    }

    #[test]
    fn it_goes_on_behind_its_end() {
        let log = Log::new();
        let end = PERIOD as u64;
        assert_eq!(
            log.at(end - 9, 1_000),
            [log.at(end - 9, 9), log.at(0, 991)].concat()
        );
        assert_eq!(log.at(end + 5, 70_000), log.at(5, CHUNK_MAX));
        assert!(log.at(0, 400).contains(&b'\n'));
    }
}
