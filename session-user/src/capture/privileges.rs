//! Which of the needed capabilities this process holds.

use std::fs;

/// A capability by name and bit, from the kernel's capability.h.
const NEEDED: [(&str, u32); 3] = [("CAP_BPF", 39), ("CAP_NET_ADMIN", 12), ("CAP_PERFMON", 38)];
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_PTRACE: u32 = 19;

/// Capabilities that loading and attaching need and this process lacks. CAP_SYS_ADMIN stands in for CAP_BPF and
/// CAP_PERFMON, as it does in the kernel.
pub fn missing() -> Vec<&'static str> {
    missing_in(held())
}

/// Capabilities that other network namespaces need and this process lacks: setns(2), and proc(5) on /proc/PID/ns of
/// other users' processes.
pub fn missing_for_namespaces() -> Vec<&'static str> {
    let held = held();
    let needed = [
        ("CAP_SYS_ADMIN", CAP_SYS_ADMIN),
        ("CAP_SYS_PTRACE", CAP_SYS_PTRACE),
    ];
    let lacking = needed.iter().filter(|(_, bit)| held & (1 << bit) == 0);
    lacking.map(|(name, _)| *name).collect()
}

/// Whether this thread may find and enter the network namespaces of other processes. One capability without the other is
/// of no use: also of its own user's processes it may not look at those that hold more than it does (proc(5)).
pub fn may_enter_namespaces() -> bool {
    missing_for_namespaces().is_empty()
}

fn held() -> u64 {
    // Capabilities are a thread's (capabilities(7)).
    effective(&fs::read_to_string("/proc/thread-self/status").unwrap_or_default())
}

fn effective(status: &str) -> u64 {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    hex.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0)
}

fn missing_in(held: u64) -> Vec<&'static str> {
    let has = |bit: u32| held & (1 << bit) != 0;
    let implied = |name: &str| name != "CAP_NET_ADMIN" && has(CAP_SYS_ADMIN);
    NEEDED
        .iter()
        .filter(|(name, bit)| !has(*bit) && !implied(name))
        .map(|(name, _)| *name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_and_implications() {
        assert_eq!(missing_in(0), ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]);
        assert_eq!(missing_in(1 << CAP_SYS_ADMIN), ["CAP_NET_ADMIN"]);
        assert_eq!(missing_in(1 << 39 | 1 << 12), ["CAP_PERFMON"]);
        assert!(missing_in(1 << 39 | 1 << 12 | 1 << 38).is_empty());
    }

    #[test]
    fn the_status_file_is_understood() {
        assert_eq!(
            effective("Name:\tx\nCapPrm:\t0\nCapEff:\t000001ffffffffff\n"),
            0x1ff_ffff_ffff
        );
        assert_eq!(effective("nothing"), 0);
    }
}
