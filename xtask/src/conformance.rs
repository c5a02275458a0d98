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
    /// With this `local_bypass` in the client's configuration: off, auto or on.
    #[arg(long, value_name = "SETTING", conflicts_with = "write_docs")]
    local_bypass: Option<String>,
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
    // By env, for sudo hands on no other variables.
    let setting = args.local_bypass.as_ref();
    let setting = setting.map(|on| format!("HOLDFAST_BENCH_LOCAL_BYPASS={on}"));
    let words: Vec<&str> = setting
        .iter()
        .map(String::as_str)
        .chain([&*program])
        .collect();
    let mut command = if sh::is_root() {
        sh::command(root, "env", &words)
    } else {
        sh::command(root, "sudo", &[&["env"], &words[..]].concat())
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
