//! Development tasks: `cargo xtask setup | build | test | demo | lab | sim | bench | conformance |
//! fmt | lint | deny | tidy`. Each prints what it runs.

mod bench;
mod build;
mod checks;
mod conformance;
mod demo;
mod ebpf;
mod guard;
mod lab;
mod setup;
mod sh;
mod test;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask", about = "Development tasks of Holdfast")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing to build and test.
    Setup {
        /// Answer yes to every question.
        #[arg(long)]
        yes: bool,
        /// Also what `holdfast bench handover --against` measures beside Holdfast.
        #[arg(long)]
        peers: bool,
    },
    /// Build the eBPF programs and the release binary.
    Build,
    /// Run all tests.
    Test {
        /// Answer yes to every question.
        #[arg(long)]
        yes: bool,
        /// Only system tests whose names contain this.
        filter: Option<String>,
    },
    /// Show a transfer that survives link cuts, next to a plain one that does not.
    Demo {
        /// Answer yes to every question.
        #[arg(long)]
        yes: bool,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Run a command (a shell if none is given) in the two-link lab.
    Lab(lab::LabArgs),
    /// Simulate the session core.
    Sim(test::SimArgs),
    /// Measure.
    Bench(bench::BenchArgs),
    /// Compare what applications see of sockets natively and through Holdfast.
    Conformance(conformance::ConformanceArgs),
    /// Check the format.
    Fmt,
    /// Run clippy on every crate, the eBPF programs too.
    Lint,
    /// Check licences, bans and sources of dependencies.
    Deny,
    /// Check the repository's own rules.
    Tidy,
}

/// The workspace.
fn root() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest
        .parent()
        .map_or_else(|| manifest.clone(), PathBuf::from)
}

fn main() -> ExitCode {
    let root = root();
    let done = match Cli::parse().task {
        Task::Setup { yes, peers: false } => setup::run(yes),
        Task::Setup { yes, peers: true } => setup::run(yes).and_then(|()| setup::peers(yes)),
        Task::Build => build::run(&root).map(|_| ()),
        Task::Test { yes, filter } => test::run(&root, yes, filter.as_deref()),
        Task::Demo { yes, json } => demo::run(&root, yes, json),
        Task::Lab(args) => lab::run(&args),
        Task::Sim(args) => test::sim(&root, &args),
        Task::Bench(args) => bench::run(&root, &args),
        Task::Conformance(args) => conformance::run(&root, &args),
        Task::Fmt => checks::fmt(&root),
        Task::Lint => checks::lint(&root),
        Task::Deny => checks::deny(&root),
        Task::Tidy => tidy::run(&root),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
