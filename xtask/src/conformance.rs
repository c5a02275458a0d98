//! `conformance`: builds, then runs the suite in the lab.

use std::path::Path;

use crate::{build, setup, sh};

/// Arguments of `conformance`.
#[derive(clap::Args)]
pub struct ConformanceArgs {
    /// One JSON array of `{case, family, native, holdfast, same, listed}`.
    #[arg(long)]
    json: bool,
    /// Only cases whose names contain this; may be given several times.
    #[arg(long, value_name = "NAME")]
    filter: Vec<String>,
    /// Only in this family: v4, v6 or mapped.
    #[arg(long)]
    family: Option<String>,
    /// Write the table of docs/conformance.md.
    #[arg(long, conflicts_with_all = ["filter", "family"])]
    write_docs: bool,
    /// Answer yes to every question.
    #[arg(long)]
    yes: bool,
}

/// Sets up, builds, compares. Fails if a case differs that docs/limits.md does not list.
pub fn run(root: &Path, args: &ConformanceArgs) -> anyhow::Result<()> {
    setup::run(args.yes)?;
    build::run(root)?;
    let build = [
        "build",
        "--locked",
        "--package",
        "session-tests",
        "--bin",
        "conformance",
    ];
    sh::run(&mut sh::command(root, "cargo", &build))?;
    let program = root.join("target/debug/conformance");
    let program = program.display().to_string();
    let mut command = if sh::is_root() {
        sh::command(root, &program, &[])
    } else {
        sh::command(root, "sudo", &[&program])
    };
    command.arg("run");
    if args.json {
        command.arg("--json");
    }
    for filter in &args.filter {
        command.args(["--filter", filter]);
    }
    if let Some(family) = &args.family {
        command.args(["--family", family]);
    }
    if args.write_docs {
        command.args(["--write-docs", "docs/conformance.md"]);
    }
    sh::run(&mut command)
}
