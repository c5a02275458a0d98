//! The eBPF programs and the release binary.

use std::path::{Path, PathBuf};

use crate::{ebpf, sh};

/// Builds both; returns the binary.
pub fn run(root: &Path) -> anyhow::Result<PathBuf> {
    eprintln!("building the eBPF programs");
    ebpf::build(root)?;
    sh::run(&mut sh::command(
        root,
        "cargo",
        &[
            "build",
            "--release",
            "--locked",
            "--package",
            "session-user",
        ],
    ))?;
    Ok(root.join("target/release/holdfast"))
}
