//! Memory of a process outside of the kernel.

use std::fs;

use anyhow::Context;

/// What a process has of its own, in KiB.
#[derive(Clone, Copy, Debug)]
pub struct Resident {
    /// Anonymous pages that are in memory (proc_pid_status(5), `RssAnon`).
    pub kib: f64,
}

/// Reads it.
pub fn resident(pid: u32) -> anyhow::Result<Resident> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let word = line.and_then(|l| l.split_whitespace().next());
    let kib = word.context("the kernel tells no RssAnon")?.parse()?;
    Ok(Resident { kib })
}
