//! Rows in a file, one JSON line each: what a long measurement has so far, and what a report is
//! made from.
//!
//! A plan's lines are written with one call when the plan is done, so that whoever interrupts a
//! measurement loses the plan under way at most. The last line may be damaged when the process was
//! killed while writing; it is dropped, and measured again.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::host::Host;
use super::report::{Key, Row};
use crate::stdio::say;

/// A file of rows that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RowFileError {
    /// It cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A line, not the last, is no row.
    #[error("{path}, line {line}: not a row: {source}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A row cannot be written as JSON.
    #[error("a row cannot be written: {0}")]
    Json(serde_json::Error),
}

/// A row, and where it comes from. One line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// What was measured.
    #[serde(flatten)]
    pub row: Row,
    /// On what.
    pub host: Host,
}

/// What a file holds.
#[derive(Debug, Default)]
pub struct Contents {
    /// Its rows, in order.
    pub kept: Vec<Kept>,
    /// Bytes up to the end of the last good line.
    good: u64,
    /// Whether that line lacks its line feed.
    open_line: bool,
}

/// Reads a file of rows. A damaged last line is dropped with a warning on standard error.
pub fn read(path: &Path) -> Result<Contents, RowFileError> {
    let bytes = std::fs::read(path).map_err(|source| io_error(path, source))?;
    let mut contents = Contents::default();
    let lines: Vec<&[u8]> = bytes.split_inclusive(|b| *b == b'\n').collect();
    for (number, line) in lines.iter().enumerate() {
        if line.trim_ascii().is_empty() {
            contents.good += line.len() as u64;
            continue;
        }
        match serde_json::from_slice(line) {
            Ok(kept) => contents.kept.push(kept),
            Err(_) if number + 1 == lines.len() => {
                say(format_args!(
                    "holdfast: {}: the last line is damaged and is left out",
                    path.display()
                ));
                break;
            }
            Err(source) => {
                return Err(RowFileError::Line {
                    path: path.to_owned(),
                    line: number + 1,
                    source,
                });
            }
        }
        contents.good += line.len() as u64;
        contents.open_line = !line.ends_with(b"\n");
    }
    Ok(contents)
}

fn io_error(path: &Path, source: io::Error) -> RowFileError {
    RowFileError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Where finished rows go, and those that are there from before.
#[derive(Debug)]
pub struct RowFile {
    file: File,
    path: PathBuf,
    before: Vec<Kept>,
}

impl RowFile {
    /// Opens or makes the file for appending. What it holds is kept, but for a damaged last line.
    pub fn open(path: &Path) -> Result<Self, RowFileError> {
        let failed = |source| io_error(path, source);
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(failed)?;
        let contents = read(path)?;
        file.set_len(contents.good).map_err(failed)?;
        if contents.open_line {
            file.write_all(b"\n").map_err(failed)?;
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            before: contents.kept,
        })
    }

    /// The newest row from before with this key and so many cuts.
    pub fn find(&self, key: &Key, runs: usize) -> Option<&Kept> {
        self.before
            .iter()
            .rfind(|kept| kept.row.runs == runs && kept.row.key() == *key)
    }

    /// Appends rows; they are on the disk when it returns.
    pub fn append(&mut self, kept: &[Kept]) -> Result<(), RowFileError> {
        let mut lines = Vec::new();
        for one in kept {
            serde_json::to_writer(&mut lines, one).map_err(RowFileError::Json)?;
            lines.push(b'\n');
        }
        self.file
            .write_all(&lines)
            .and_then(|()| self.file.sync_data())
            .map_err(|source| io_error(&self.path, source))
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::row;
    use super::*;

    fn kept(system: &str) -> Kept {
        Kept {
            row: row(system, "cut", "download"),
            host: Host::here(),
        }
    }

    #[test]
    fn rows_come_back_as_they_went() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows");
        let rows = [kept("holdfast"), kept("tcp")];
        RowFile::open(&path)?.append(&rows)?;
        RowFile::open(&path)?.append(&rows[..1])?;
        let read = read(&path)?.kept;
        assert_eq!(read[..2], rows);
        assert_eq!(read.len(), 3);
        Ok(())
    }

    #[test]
    fn a_row_is_found_by_all_its_conditions() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows");
        let one = kept("holdfast");
        let mut newer = one.clone();
        newer.row.bytes_lost = 7;
        RowFile::open(&path)?.append(&[one.clone(), newer.clone()])?;
        let file = RowFile::open(&path)?;
        let (key, runs) = (one.row.key(), one.row.runs);
        assert_eq!(file.find(&key, runs), Some(&newer));
        assert_eq!(file.find(&key, runs + 1), None);
        let others: [fn(&mut Row); 9] = [
            |r| r.system = "tcp".to_owned(),
            |r| r.scenario = "soft".to_owned(),
            |r| r.direction = "upload".to_owned(),
            |r| r.mode = "redundant".to_owned(),
            |r| r.pace = "bulk".to_owned(),
            |r| r.rtt_ms += 1.0,
            |r| r.rate_mbit = Some(50),
            |r| r.rates_mbit = Some([50, 20]),
            |r| r.v6 = true,
        ];
        for change in others {
            let mut other = one.row.clone();
            change(&mut other);
            assert_eq!(file.find(&other.key(), runs), None, "{other:?}");
        }
        Ok(())
    }

    #[test]
    fn a_damaged_last_line_is_dropped_and_written_over() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows");
        RowFile::open(&path)?.append(&[kept("holdfast"), kept("tcp")])?;
        let whole = std::fs::read(&path)?;
        std::fs::write(&path, &whole[..whole.len() - 20])?;
        assert_eq!(read(&path)?.kept.len(), 1);
        RowFile::open(&path)?.append(&[kept("quic")])?;
        let systems: Vec<String> = read(&path)?
            .kept
            .into_iter()
            .map(|k| k.row.system)
            .collect();
        assert_eq!(systems, ["holdfast", "quic"]);
        Ok(())
    }

    #[test]
    fn a_whole_line_without_its_end_is_kept() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows");
        RowFile::open(&path)?.append(&[kept("holdfast")])?;
        let whole = std::fs::read(&path)?;
        std::fs::write(&path, &whole[..whole.len() - 1])?;
        RowFile::open(&path)?.append(&[kept("tcp")])?;
        assert_eq!(read(&path)?.kept.len(), 2);
        Ok(())
    }

    #[test]
    fn damage_in_the_middle_is_an_error() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows");
        std::fs::write(&path, "{\"system\":\n{}\n")?;
        assert!(matches!(
            read(&path),
            Err(RowFileError::Line { line: 1, .. })
        ));
        Ok(())
    }
}
