//! When bytes arrived: written down by whoever receives, read by whoever judges.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use super::app::now_ns;

/// Whoever watches a file as it grows sees arrivals at most this late, in nanoseconds.
const FLUSH_NS: u64 = 20_000_000;
/// Bytes of the file's end that [`Arrivals::read_tail`] reads: some thousand arrivals.
const TAIL_BYTES: u64 = 64 * 1024;

/// Writes down arrivals as they come: time in nanoseconds and bytes so far, little-endian.
pub struct Recorder {
    out: Option<BufWriter<File>>,
    flushed_ns: u64,
}

impl Recorder {
    /// To a file, or to nowhere.
    pub fn to(path: Option<&Path>) -> io::Result<Self> {
        Ok(Self {
            out: path.map(File::create).transpose()?.map(BufWriter::new),
            flushed_ns: 0,
        })
    }

    /// Bytes have just arrived; `total` with them.
    pub fn note(&mut self, total: u64) -> io::Result<()> {
        let Some(out) = &mut self.out else {
            return Ok(());
        };
        let now = now_ns();
        out.write_all(&now.to_le_bytes())?;
        out.write_all(&total.to_le_bytes())?;
        if now.saturating_sub(self.flushed_ns) > FLUSH_NS {
            self.flushed_ns = now;
            out.flush()?;
        }
        Ok(())
    }
}

/// The arrivals of one direction, in order.
#[derive(Clone, Debug, Default)]
pub struct Arrivals {
    times: Vec<u64>,
    totals: Vec<u64>,
}

impl Arrivals {
    /// Reads what a [`Recorder`] wrote.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read(path)?))
    }

    /// Reads the latest of them, from a file that still grows.
    pub fn read_tail(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        // An arrival takes 16 bytes: begin with a whole one.
        file.seek(SeekFrom::Start(
            length.saturating_sub(TAIL_BYTES).next_multiple_of(16),
        ))?;
        let mut raw = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut raw)?;
        Ok(Self::parse(&raw))
    }

    fn parse(raw: &[u8]) -> Self {
        let mut words = raw
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word));
        let mut out = Self::default();
        while let (Some(time), Some(total)) = (words.next(), words.next()) {
            out.times.push(time);
            out.totals.push(total);
        }
        out
    }

    /// When the first and the last of them came.
    pub fn span(&self) -> Option<(u64, u64)> {
        Some((*self.times.first()?, *self.times.last()?))
    }

    /// The longest time without an arrival in `from..to` (nanoseconds), in milliseconds. A gap counts
    /// with the part of it that lies in the window.
    pub fn longest_gap_ms(&self, from: u64, to: u64) -> f64 {
        let first = self.times.partition_point(|t| *t <= from);
        let last = self.times.partition_point(|t| *t < to);
        let mut longest = 0;
        let mut previous = from;
        for &at in &self.times[first..last.max(first)] {
            longest = longest.max(at - previous);
            previous = at;
        }
        longest = longest.max(to.saturating_sub(previous));
        longest as f64 / 1e6
    }

    /// When the first came after `at`.
    pub fn first_after(&self, at: u64) -> Option<u64> {
        let before = self.times.partition_point(|t| *t <= at);
        self.times.get(before).copied()
    }

    /// Bytes that had arrived at `at`.
    pub fn total_at(&self, at: u64) -> u64 {
        let after = self.times.partition_point(|t| *t <= at);
        after.checked_sub(1).map_or(0, |i| self.totals[i])
    }

    /// Bytes delivered between `from` and each step of `step` nanoseconds up to `to`.
    pub fn series(&self, from: u64, to: u64, step: u64) -> Vec<u64> {
        let start = self.total_at(from);
        let steps = to.saturating_sub(from) / step.max(1);
        (0..=steps)
            .map(|i| self.total_at(from + i * step) - start)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn arrivals(at: &[(u64, u64)]) -> Arrivals {
        Arrivals {
            times: at.iter().map(|a| a.0 * MS).collect(),
            totals: at.iter().map(|a| a.1).collect(),
        }
    }

    #[test]
    fn gaps_are_cut_to_the_window() {
        let a = arrivals(&[(1, 1), (2, 2), (10, 3), (11, 4)]);
        assert!((a.longest_gap_ms(MS, 12 * MS) - 8.0).abs() < 1e-9);
        assert!((a.longest_gap_ms(5 * MS, 12 * MS) - 5.0).abs() < 1e-9);
        assert!((a.longest_gap_ms(11 * MS, 30 * MS) - 19.0).abs() < 1e-9);
        assert!((arrivals(&[]).longest_gap_ms(0, 3 * MS) - 3.0).abs() < 1e-9);
    }

    #[test]
    fn bytes_are_counted_up_to_a_moment() {
        let a = arrivals(&[(1, 100), (2, 250), (10, 400)]);
        assert_eq!(a.total_at(0), 0);
        assert_eq!(a.first_after(2 * MS), Some(10 * MS));
        assert_eq!(a.first_after(10 * MS), None);
        assert_eq!(a.total_at(2 * MS), 250);
        assert_eq!(a.total_at(9 * MS), 250);
        assert_eq!(a.series(MS, 11 * MS, 5 * MS), [0, 150, 300]);
    }

    #[test]
    fn what_is_written_is_read() -> io::Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        let mut recorder = Recorder::to(Some(file.path()))?;
        recorder.note(10)?;
        recorder.note(30)?;
        drop(recorder);
        let a = Arrivals::read(file.path())?;
        assert_eq!(a.total_at(u64::MAX), 30);
        assert_eq!(Arrivals::read_tail(file.path())?.span(), a.span());
        Ok(())
    }
}
