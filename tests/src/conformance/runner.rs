//! Runs cases natively and captured, and compares.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use session_user::bench::bed::Running;
use session_user::control::{CaptureReport, Client, Request, Response};

use super::client::Outcome;
use super::limits::is_listed;
use super::report::{Guard, Row};
use super::{Case, Family, Seen, cases, world};
use crate::{TestBed, await_listener};

/// What a case may take; a heavy one may take more.
const LIMIT: Duration = Duration::from_secs(12);
const HEAVY_LIMIT: Duration = Duration::from_secs(90);
/// Cases that run at once: most of them wait most of the time.
const AT_ONCE: usize = 8;

/// What became of all cases.
pub struct Results {
    /// Each case in each of its families.
    pub rows: Vec<Row>,
}

impl Results {
    /// What must not be: differences that are not listed, and captures that did not happen.
    pub fn faults(&self) -> Vec<String> {
        self.rows.iter().filter_map(Row::fault).collect()
    }
}

/// How a case runs the second time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Second {
    /// Captured, to be compared with the first.
    Captured,
    /// As the first time, which shows whether the suite itself is sound: all must be the same, and the guard
    /// must say that nothing was captured.
    Native,
}

/// Runs what `wanted` chooses. `program` is this suite's own program: it is the client and the peer.
pub fn run(
    program: &Path,
    second: Second,
    wanted: impl Fn(&Case, Family) -> bool,
    mut told: impl FnMut(&Row),
) -> anyhow::Result<Results> {
    let runs: Vec<Run> = cases::all()
        .flat_map(|case| case.families.iter().map(move |&family| (case, family)))
        .filter(|(case, family)| wanted(case, *family))
        .collect();
    ensure!(!runs.is_empty(), "no case has such a name");
    let world = World::new(program, second)?;
    let mut rows = Vec::new();
    for batch in runs.chunk_by(|(a, _), (b, _)| !a.heavy && !b.heavy) {
        for some in batch.chunks(AT_ONCE) {
            for row in world.compare_all(some)? {
                told(&row);
                rows.push(row);
            }
        }
    }
    Ok(Results { rows })
}

/// As the agents of a bed are told (`bench/bed.rs`).
fn bypass_is_on() -> bool {
    std::env::var("HOLDFAST_BENCH_LOCAL_BYPASS").is_ok_and(|setting| setting == "on")
}

type Run = (&'static Case, Family);

/// Counts of an agent's programs.
#[derive(Clone, Copy)]
struct Captured {
    /// Connections over TCP.
    connects: u64,
    /// Connects of UDP sockets, and datagrams without.
    datagrams: u64,
}

/// The lab with two agents and the peer program.
struct World {
    /// First, so that it ends before its namespace.
    _peer: Running,
    bed: TestBed,
    program: PathBuf,
    second: Second,
    link_local: String,
    /// The client's agent has the local bypass, whatever the kernel's faults.
    bypass: bool,
}

impl World {
    fn new(program: &Path, second: Second) -> anyhow::Result<Self> {
        let bed = TestBed::with(world::configure)?;
        let lab = &bed.bed.lab;
        world::furnish(lab)?;
        let mut command = Command::new(program);
        command
            .args(["peer", "--control", &world::control().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = lab
            .server()
            .spawn(command)
            .context("the peer program cannot be started")?;
        let peer = Running::new(child, "peer program");
        await_listener(lab.client(), world::control())?;
        let link_local = world::link_local(lab)?.to_string();
        Ok(Self {
            _peer: peer,
            bed,
            program: program.to_owned(),
            second,
            link_local,
            bypass: bypass_is_on(),
        })
    }

    /// Some at once. Their captured connects are counted together; if the sum is not what it should be, or
    /// one of them hung, each runs again alone, to know whose fault it is.
    fn compare_all(&self, runs: &[Run]) -> anyhow::Result<Vec<Row>> {
        let before = self.captured()?;
        let rows = std::thread::scope(|scope| {
            let started: Vec<_> = runs
                .iter()
                .map(|&(case, family)| scope.spawn(move || self.compare(case, family)))
                .collect();
            started
                .into_iter()
                .map(|s| s.join().unwrap_or_else(|_| bail!("a comparison panicked")))
                .collect::<anyhow::Result<Vec<Row>>>()
        })?;
        let now = self.captured()?;
        let captured = now.connects - before.connects;
        let expected: Option<u64> = rows.iter().map(|r| r.guard.expected).sum();
        // How many there are of a conversation is the kernel's affair: one for each case says that it was captured.
        let udp = runs
            .iter()
            .filter(|(case, _)| case.has_captured_datagrams());
        let no_datagrams = now.datagrams - before.datagrams < udp.count() as u64;
        if runs.len() == 1 || (expected == Some(captured) && !no_datagrams) {
            return Ok(rows
                .into_iter()
                .map(|mut row| {
                    row.guard.no_datagrams = no_datagrams;
                    row.guard.captured = if runs.len() == 1 {
                        captured
                    } else {
                        row.guard.expected.unwrap_or(0)
                    };
                    row
                })
                .collect());
        }
        let alone = runs.iter().map(|&run| self.compare_all(&[run]));
        Ok(alone.collect::<anyhow::Result<Vec<_>>>()?.concat())
    }

    /// One case in one family, both ways; who captured it is not known yet.
    fn compare(&self, case: &Case, family: Family) -> anyhow::Result<Row> {
        let began = Instant::now();
        let limit = if case.heavy { HEAVY_LIMIT } else { LIMIT };
        let (native, holdfast) = if case.heavy {
            let native = ended(self.start(case, family, false)?, limit)?;
            (native, ended(self.start(case, family, true)?, limit)?)
        } else {
            let native = self.start(case, family, false)?;
            let holdfast = self.start(case, family, true)?;
            (ended(native, limit)?, ended(holdfast, limit)?)
        };
        let guard = Guard {
            expected: holdfast.connects,
            captured: 0,
            no_datagrams: false,
        };
        Ok(Row {
            case: case.name.to_owned(),
            family,
            same: native.seen == holdfast.seen,
            listed: is_listed(case.name, family, self.bypass),
            broken: native.connects.is_none(),
            native: native.seen,
            holdfast: holdfast.seen,
            guard,
            took: began.elapsed(),
        })
    }

    /// What the agent's programs have captured.
    fn captured(&self) -> anyhow::Result<Captured> {
        let control = self.bed.bed.client_control();
        let answer = Client::connect(&control)?.call(&Request::Status)?;
        let Response::Status(status) = answer else {
            bail!("the agent answers something else");
        };
        let capture: CaptureReport = status.capture.context("the agent captures nothing")?;
        Ok(Captured {
            connects: capture.captured4 + capture.captured6,
            datagrams: capture.udp4 + capture.udp6,
        })
    }

    fn start(&self, case: &Case, family: Family, captured: bool) -> anyhow::Result<Child> {
        let mut command = Command::new(&self.program);
        command
            .args(["client", "--case", case.name, "--family", family.name()])
            .args(["--control", &world::control().to_string()])
            .args(["--link-local", &self.link_local])
            // In a group of its own, so that what it forks ends with it.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let child = if captured && self.second == Second::Captured {
            self.bed.bed.spawn_captured(command)
        } else {
            self.bed.bed.lab.client().spawn(command)
        };
        child.with_context(|| format!("case `{}` cannot be started", case.name))
    }
}

/// How a case's process ended.
struct Ended {
    seen: Seen,
    /// Its captured connects, unless it did not come to tell them.
    connects: Option<u64>,
}

impl Ended {
    fn in_disorder(how: String) -> Self {
        let mut seen = Seen::default();
        seen.note("no orderly end", how);
        Self {
            seen,
            connects: None,
        }
    }
}

/// Waits for a case's process, and ends it and all that it started when it takes too long.
fn ended(mut child: Child, limit: Duration) -> anyhow::Result<Ended> {
    let group = Pid::from_raw(i32::try_from(child.id())?);
    let mut out = child.stdout.take().context("no output")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        // What came before an error is what there is.
        let _ = out.read_to_string(&mut text);
        text
    });
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            break None;
        }
        // A child can be waited for, but not for a limited time.
        std::thread::sleep(Duration::from_millis(2));
    };
    // Whatever it has forked ends too, or the reader would wait for it.
    let _ = killpg(group, Signal::SIGKILL);
    let Some(status) = status else {
        child.wait()?;
        let limit = limit.as_secs();
        return Ok(Ended::in_disorder(format!("hung for {limit} s")));
    };
    let text = reader.join().unwrap_or_default();
    Ok(match serde_json::from_str::<Outcome>(&text) {
        Ok(outcome) if status.success() => Ended {
            seen: outcome.seen,
            connects: Some(outcome.connects),
        },
        _ => Ended::in_disorder(status.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Child {
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .process_group(0)
            .stdout(Stdio::piped());
        command.spawn().unwrap()
    }

    #[test]
    fn a_case_that_hangs_is_ended_with_all_that_it_has_started() {
        let child = shell("sleep 1000 & sleep 1000");
        let group = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let ended = ended(child, Duration::from_millis(300)).unwrap();
        assert_eq!(ended.connects, None);
        assert!(ended.seen.lines()[0].contains("hung"), "{:?}", ended.seen);
        // Until whoever inherits the orphan has reaped it.
        let gone = || killpg(group, None) == Err(nix::errno::Errno::ESRCH);
        crate::eventually("the group is gone", Duration::from_secs(10), gone).unwrap();
    }

    #[test]
    fn a_case_that_crashes_says_nothing() {
        let words = r#"{"seen":["a: b"],"connects":1}"#;
        let orderly = ended(shell(&format!("echo '{words}'")), LIMIT).unwrap();
        assert_eq!(orderly.connects, Some(1));
        assert_eq!(orderly.seen.lines(), ["a: b"]);
        for script in [&format!("echo '{words}'; kill -9 $$"), "echo nonsense"] {
            let ended = ended(shell(script), LIMIT).unwrap();
            assert_eq!(ended.connects, None);
            assert!(ended.seen.lines()[0].starts_with("no orderly end"));
        }
    }
}
