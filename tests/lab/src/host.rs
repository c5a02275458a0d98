//! What Holdfast must never change: routes, rules, firewall, resolver, sysctls.

use std::collections::BTreeMap;
use std::process::{Command, Output};

use crate::netns::Netns;

/// A host's network configuration, as its own tools print it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostState {
    parts: BTreeMap<String, String>,
}

const COMMANDS: [&str; 6] = [
    "ip rule show",
    "ip -6 rule show",
    "ip route show table all",
    "ip -6 route show table all",
    "nft list ruleset",
    "cat /etc/resolv.conf",
];

impl HostState {
    /// Of the namespace that this thread is in.
    pub fn here() -> Self {
        Self::by(|command| command.output())
    }

    /// Of `netns`.
    pub fn of(netns: &Netns) -> Self {
        Self::by(|command| {
            let mut inside = Command::new(command.get_program());
            inside.args(command.get_args());
            netns.output(inside)
        })
    }

    fn by(run: impl Fn(&mut Command) -> std::io::Result<Output>) -> Self {
        let mut parts = BTreeMap::new();
        let sysctls = "grep -r . /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/*/rp_filter /proc/sys/net/ipv6/conf/*/forwarding";
        for line in COMMANDS {
            let mut words = line.split(' ');
            let mut command = Command::new(words.next().unwrap_or_default());
            command.args(words);
            parts.insert(line.to_owned(), said(run(&mut command)));
        }
        let mut shell = Command::new("sh");
        shell.args(["-c", sysctls]);
        parts.insert("sysctls".to_owned(), said(run(&mut shell)));
        Self { parts }
    }

    /// The same without the lines that begin with `start`, and whether there were any.
    pub fn without(&self, start: &str) -> (Self, bool) {
        let mut parts = self.parts.clone();
        for text in parts.values_mut() {
            let kept: Vec<&str> = text.lines().filter(|l| !l.starts_with(start)).collect();
            *text = kept.join("\n");
        }
        let rest = Self { parts };
        let had = rest != *self;
        (rest, had)
    }

    /// What differs, for people; empty if nothing does.
    pub fn differences(&self, other: &Self) -> String {
        let mut out = String::new();
        for (name, text) in &self.parts {
            let now = other.parts.get(name).map_or("", String::as_str);
            if text != now {
                out.push_str(&format!("{name}:\n--- before\n{text}\n--- after\n{now}\n"));
            }
        }
        out
    }
}

/// Lifetimes and counters run by themselves; everything else counts.
fn said(output: std::io::Result<Output>) -> String {
    match output {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            let mut lines: Vec<String> = text.lines().map(without_timers).collect();
            lines.sort();
            lines.join("\n")
        }
        Err(error) => format!("not to be had: {error}"),
    }
}

fn without_timers(line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        if matches!(word, "expires" | "packets" | "bytes") {
            words.next();
        } else {
            kept.push(word);
        }
    }
    kept.join(" ")
}
