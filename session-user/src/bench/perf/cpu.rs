//! Processor time of programs and what they started.

use std::fs;

use anyhow::Context;

/// Kernel clock ticks in a second (USER_HZ), of all architectures that Linux has today.
const TICKS_PER_SECOND: f64 = 100.0;
/// Generations of children that are followed.
const DEPTH_MAX: usize = 8;

/// User and system time of a process and of its children that live, in seconds.
pub fn tree_seconds(pid: u32) -> anyhow::Result<f64> {
    let all: Vec<Stat> = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        // One that has ended meanwhile counts for nothing.
        .filter_map(Stat::of)
        .collect();
    let root = all.iter().find(|stat| stat.pid == pid);
    let mut ticks = root.context("the program has ended")?.ticks;
    let mut parents = vec![pid];
    for _ in 0..DEPTH_MAX {
        let children = all.iter().filter(|stat| parents.contains(&stat.parent));
        let (pids, more): (Vec<u32>, Vec<f64>) = children.map(|s| (s.pid, s.ticks)).unzip();
        ticks += more.iter().sum::<f64>();
        parents = pids;
    }
    Ok(ticks / TICKS_PER_SECOND)
}

/// What is of interest of proc_pid_stat(5).
struct Stat {
    pid: u32,
    /// Field 4.
    parent: u32,
    /// Fields 14 and 15.
    ticks: f64,
}

impl Stat {
    fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before it may have anything in it.
        let fields: Vec<&str> = text.rsplit(')').next()?.split_whitespace().collect();
        let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
        Some(Self {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            ticks: ticks(11)? + ticks(12)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_counts_with_its_parent() {
        // It spends its time, and then waits under the same number.
        let script =
            "(i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; exec sleep 60) & echo $!; wait";
        let mut parent = std::process::Command::new("sh")
            .args(["-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(parent.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while tree_seconds(parent.id()).unwrap() < 0.05 {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
        let alone = Stat::of(parent.id()).unwrap().ticks / TICKS_PER_SECOND;
        assert!(alone < 0.05, "{alone}");
        for pid in [line.trim().parse().unwrap(), parent.id() as i32] {
            let pid = nix::unistd::Pid::from_raw(pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        parent.wait().unwrap();
    }
}
