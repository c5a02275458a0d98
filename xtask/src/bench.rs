//! `bench`: builds, then runs the binary's own measurement.

use std::path::Path;

use crate::{build, setup, sh};

/// Arguments of `bench`.
#[derive(clap::Args)]
pub struct BenchArgs {
    /// What is measured.
    #[arg(value_enum)]
    what: What,
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// Answer yes to every question.
    #[arg(long)]
    yes: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    /// Direct, a plain two-hop proxy, and Holdfast, in one run.
    Throughput,
    /// What capture costs: the latency of a connect, and the time of each eBPF program.
    Capture,
}

/// Sets up, builds, measures.
pub fn run(root: &Path, args: &BenchArgs) -> anyhow::Result<()> {
    setup::run(args.yes)?;
    let binary = build::run(root)?;
    let binary = binary.display().to_string();
    let what = match args.what {
        What::Throughput => "throughput",
        What::Capture => "capture",
    };
    let mut command = if sh::is_root() {
        sh::command(root, &binary, &[])
    } else {
        sh::command(root, "sudo", &[&binary])
    };
    command.args(["bench", what]);
    if args.json {
        command.arg("--json");
    }
    sh::run(&mut command)
}
