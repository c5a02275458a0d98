//! Format, lints, dependencies.

use std::path::Path;

use crate::{ebpf, sh};

/// `cargo fmt --check` on every crate.
pub fn fmt(root: &Path) -> anyhow::Result<()> {
    sh::run(&mut sh::command(
        root,
        "cargo",
        &["fmt", "--all", "--check"],
    ))
}

/// clippy, with warnings as errors, on every crate. The agent embeds the eBPF object, so that is
/// built first.
pub fn lint(root: &Path) -> anyhow::Result<()> {
    ebpf::build(root)?;
    ebpf::clippy(root)?;
    let arguments = [
        "clippy",
        "--locked",
        "--workspace",
        "--exclude",
        "session-ebpf",
        "--all-targets",
        "--features",
        "session-proto/sim",
        "--",
        "-D",
        "warnings",
    ];
    sh::run(&mut sh::command(root, "cargo", &arguments))
}

/// cargo-deny without the network; advisories only where their database can be had.
pub fn deny(root: &Path) -> anyhow::Result<()> {
    // cargo-deny looks at every target's dependencies, of which a build fetches only this one's.
    sh::run(&mut sh::command(root, "cargo", &["fetch", "--locked"]))?;
    sh::run(&mut sh::command(
        root,
        "cargo",
        &["deny", "--offline", "check", "bans", "licenses", "sources"],
    ))?;
    let (reached, _) = sh::output(&mut sh::command(root, "cargo", &["deny", "fetch", "db"]))?;
    if !reached {
        eprintln!("advisories: NOT RUN, their database cannot be reached");
        return Ok(());
    }
    sh::run(&mut sh::command(
        root,
        "cargo",
        &["deny", "check", "advisories"],
    ))
}
