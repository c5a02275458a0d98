//! On which machine, when and how rows were measured.

use std::fs;
use std::thread::available_parallelism;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What a reader must know to compare rows, and to measure them again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Kernel release, as `uname -r` tells it.
    pub kernel: String,
    /// Processors that this process may use.
    pub processors: usize,
    /// Their name, as /proc/cpuinfo has it; empty where it has none.
    pub processor: String,
    /// When the measurement began: UTC, RFC 3339.
    pub date: String,
    /// Version of Holdfast.
    pub version: String,
    /// The command line.
    pub command: String,
}

impl Host {
    /// This machine, now. What cannot be read stays empty: a measurement does not fail for it.
    pub fn here() -> Self {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let now = OffsetDateTime::now_utc();
        let now = now.replace_nanosecond(0).unwrap_or(now);
        Self {
            kernel: kernel.trim().to_owned(),
            processors: available_parallelism().map_or(1, usize::from),
            processor: processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            date: now.format(&Rfc3339).unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            command: command(std::env::args()),
        }
    }
}

fn processor(cpuinfo: &str) -> String {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == "model name")
        .map_or_else(String::new, |(_, name)| name.trim().to_owned())
}

/// The program by its name alone: its folder says nothing about the measurement.
fn command(mut args: impl Iterator<Item = String>) -> String {
    let program = args.next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or(&program).to_owned();
    let quoted = args.map(|arg| {
        if arg.is_empty() || arg.contains(char::is_whitespace) {
            format!("'{arg}'")
        } else {
            arg
        }
    });
    std::iter::once(name)
        .chain(quoted)
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_the_first_named() {
        let cpuinfo = "processor\t: 0\nmodel name\t: A Processor @ 2 GHz\nmodel name\t: B\n";
        assert_eq!(processor(cpuinfo), "A Processor @ 2 GHz");
        assert_eq!(processor("processor : 0\n"), "");
    }

    #[test]
    fn the_command_line_can_be_typed_again() {
        let args = ["/usr/bin/holdfast", "bench", "--out", "my rows"];
        assert_eq!(
            command(args.into_iter().map(str::to_owned)),
            "holdfast bench --out 'my rows'"
        );
    }
}
