//! Python's own test suites, with their servers behind the gateway and their clients captured, and the same without
//! Holdfast for comparison. `tests/python/suites.py` says how one process comes to be in two places.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Deserialize;
use session_lab::Lab;

use crate::{Captures, TestBed, finish};

/// Debian's, which its package of the suites is for.
const PYTHON: &str = "/usr/bin/python3";
/// What one suite may take.
const LIMIT: Duration = Duration::from_secs(150);

/// Some tests of Python's.
#[derive(Clone, Copy, Debug)]
pub struct Suite {
    /// Its name in messages and files.
    pub name: &'static str,
    /// Modules, classes or tests; what begins with `-` is left out wherever it is part of a test's name.
    pub choice: &'static [&'static str],
}

/// What became of a suite's tests.
#[derive(Debug)]
pub struct Run {
    /// Each test by its name; one that did not end is `hung`.
    pub tests: BTreeMap<String, Outcome>,
    /// TCP connections that the tests began to HOST or anywhere else, from the client's side.
    pub connects: u64,
    /// What the agent counted meanwhile; zeros where there was none.
    pub captures: Captures,
    /// How long it took.
    pub took: Duration,
}

/// What became of a test.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// `ok`, `skipped`, `failure`, `error`, `hung`, and what else unittest knows.
    pub verdict: String,
    /// A traceback, or why it was skipped.
    pub detail: String,
    /// Seconds.
    pub took: f64,
}

/// A line of the runner's results.
#[derive(Deserialize)]
struct Line {
    test: Option<String>,
    outcome: Option<String>,
    #[serde(default)]
    detail: String,
    #[serde(default)]
    took: f64,
    connects: Option<u64>,
}

impl Suite {
    /// Runs it in a lab of its own, captured or over a direct route. Its own lab, so that no other process takes a
    /// port that a test has found unused, and what the agent counts is this suite's.
    pub fn run(&self, captured: bool) -> anyhow::Result<Run> {
        let bed = TestBed::with(|c| c.holdfast = captured)?;
        // What is bound there and then connects takes its port along to the client, where it must be free.
        let ports = "net/ipv4/ip_local_port_range";
        bed.bed.lab.server().sysctl(ports, "10000 30000")?;
        let results = bed.path("results");
        let words = self.words(&bed, &results)?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let before = Captures::of(&bed)?;
        let began = Instant::now();
        let output = if captured {
            finish(bed.start_run(&words)?, LIMIT)
        } else {
            let mut command = Command::new(words[0]);
            command
                .args(&words[1..])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            finish(bed.bed.lab.client().spawn(command)?, LIMIT)
        };
        let took = began.elapsed();
        let text = fs::read_to_string(&results).unwrap_or_default();
        let (tests, connects) = parse(&text)?;
        if let Ok(output) = &output {
            ensure!(
                output.status.success() && connects.is_some(),
                "suite {}: {}\n{}",
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(Run {
            tests,
            connects: connects.unwrap_or(0),
            captures: Captures::of(&bed)?.since(before),
            took,
        })
    }

    fn words(&self, bed: &TestBed, results: &Path) -> anyhow::Result<Vec<String>> {
        // What tests call `localhost` is HOST too; the certificates that they use are for that name.
        let hosts = bed.path("hosts");
        let name = nix::unistd::gethostname()?;
        fs::write(
            &hosts,
            format!(
                "{} localhost\n127.0.0.1 {}\n",
                Lab::target(false),
                name.to_string_lossy()
            ),
        )?;
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("python/suites.py");
        let netns = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            bed.bed.lab.server().fd().as_raw_fd()
        );
        let inside = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
        let mut words: Vec<String> = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            inside,
        ]
        .map(str::to_owned)
        .into();
        words.extend([
            hosts.display().to_string(),
            PYTHON.to_owned(),
            "-W".to_owned(),
            "ignore".to_owned(),
            script.display().to_string(),
            netns,
            Lab::target(false).to_string(),
            Lab::target(true).to_string(),
            results.display().to_string(),
        ]);
        words.extend(self.choice.iter().map(|c| (*c).to_owned()));
        Ok(words)
    }
}

/// What the runner wrote, as far as it came.
fn parse(text: &str) -> anyhow::Result<(BTreeMap<String, Outcome>, Option<u64>)> {
    let mut tests = BTreeMap::new();
    let mut connects = None;
    for line in text.lines() {
        let line: Line = serde_json::from_str(line).context("the runner's results")?;
        connects = line.connects.or(connects);
        let Some(test) = line.test else { continue };
        let verdict = line.outcome.unwrap_or_else(|| "hung".to_owned());
        tests.insert(
            test,
            Outcome {
                verdict,
                detail: line.detail,
                took: line.took,
            },
        );
    }
    Ok((tests, connects))
}

/// Tests that did not end in the same way both times: which, natively, captured.
pub fn differences<'a>(
    native: &'a Run,
    captured: &'a Run,
) -> Vec<(&'a str, Option<&'a Outcome>, Option<&'a Outcome>)> {
    let names: std::collections::BTreeSet<&String> =
        native.tests.keys().chain(captured.tests.keys()).collect();
    names
        .into_iter()
        .map(|n| (n.as_str(), native.tests.get(n), captured.tests.get(n)))
        .filter(|(_, n, c)| n.map(|o| &o.verdict) != c.map(|o| &o.verdict))
        .collect()
}
