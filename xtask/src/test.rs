//! All tests, and the simulation alone.

use std::path::Path;
use std::time::Instant;

use anyhow::bail;

use crate::{build, guard, setup, sh};

/// Crates whose tests need nothing but the crate; the system tests come after them.
const UNIT_PACKAGES: [&str; 5] = [
    "session-ebpf-common",
    "session-user",
    "session-benches",
    "session-lab",
    "xtask",
];

/// Arguments of `sim`.
#[derive(clap::Args)]
pub struct SimArgs {
    /// How many seeds.
    #[arg(long, default_value_t = 2000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Answer yes to every question (the simulation needs nothing installed).
    #[arg(long)]
    yes: bool,
    /// One seed alone, with every step.
    #[arg(long)]
    trace: bool,
}

/// Runs the simulator in release mode on all processors.
pub fn sim(root: &Path, args: &SimArgs) -> anyhow::Result<()> {
    let (seeds, from) = (args.seeds.to_string(), args.from.to_string());
    let mut command = sh::command(
        root,
        "cargo",
        &[
            "run",
            "--release",
            "--locked",
            "--package",
            "session-proto",
            "--features",
            "sim",
            "--example",
            "sim",
            "--",
        ],
    );
    if args.trace {
        command.args(["--seed", &from, "--trace"]);
    } else {
        command.args(["--seeds", &seeds, "--from", &from]);
    }
    sh::run(&mut command)
}

/// Everything: set-up, build, unit tests, simulation, system tests.
pub fn run(root: &Path, yes: bool, filter: Option<&str>) -> anyhow::Result<()> {
    setup::run(yes)?;
    build::run(root)?;
    let (mut failed, mut not_compared) = (Vec::new(), None);
    let mut step = |name: &str, done: anyhow::Result<()>, began: Instant| {
        let verdict = if done.is_ok() { "passed" } else { "FAILED" };
        eprintln!(
            "== {name}: {verdict} in {:.0} s",
            began.elapsed().as_secs_f64()
        );
        if let Err(error) = done {
            eprintln!("{error:#}");
            failed.push(name.to_owned());
        }
    };
    if filter.is_none() {
        let began = Instant::now();
        let mut proto = sh::command(
            root,
            "cargo",
            &[
                "test",
                "--locked",
                "--package",
                "session-proto",
                "--features",
                "sim",
            ],
        );
        step("session core, with simulation", sh::run(&mut proto), began);
        for package in UNIT_PACKAGES {
            let began = Instant::now();
            let mut tests = sh::command(root, "cargo", &["test", "--locked", "--package", package]);
            step(package, sh::run(&mut tests), began);
        }
        let began = Instant::now();
        let benches = [
            "bench",
            "--locked",
            "--package",
            "session-benches",
            "--",
            "--test",
        ];
        step(
            "benches compile and run once",
            sh::run(&mut sh::command(root, "cargo", &benches)),
            began,
        );
        let began = Instant::now();
        let counted = guard::run(root, false, false);
        let name = match &counted {
            Ok(Some(_)) => "instructions of the core (NOT COMPARED)",
            Ok(None) | Err(_) => "instructions of the core",
        };
        not_compared = counted.as_ref().ok().cloned().flatten();
        step(name, counted.map(drop), began);
    }
    let began = Instant::now();
    if sh::is_root() {
        // One at a time: each measures or loads a whole lab of its own on few processors.
        let mut system = sh::command(
            root,
            "cargo",
            &["test", "--locked", "--package", "session-tests"],
        );
        system.args(filter).args(["--", "--test-threads=1"]);
        step("system tests", sh::run(&mut system), began);
    } else {
        step(
            "system tests",
            Err(anyhow::anyhow!(
                "NOT RUN: they make network namespaces and need root"
            )),
            began,
        );
    }
    if let Some(why) = not_compared {
        eprintln!("instructions of the core: NOT COMPARED: {why}");
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    eprintln!("all tests passed");
    Ok(())
}
