//! Finds the eBPF objects, so that the agent can embed them.
//!
//! They are built for another target by another toolchain (`cargo xtask build`); a build script that started a
//! second cargo would deadlock on the target directory or hide its errors.

use std::{env, fs, path::PathBuf, process::ExitCode};

const FOLDER: &str = "target/ebpf/bpfel-unknown-none/release";
/// The programs of the capture, and those of the agent's own transports.
const OBJECTS: [&str; 2] = ["session-ebpf", "session-transport"];

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed=HOLDFAST_EBPF_OBJECTS");
    let folder = env::var_os("HOLDFAST_EBPF_OBJECTS").map_or_else(default_folder, PathBuf::from);
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    for name in OBJECTS {
        let object = folder.join(name);
        println!("cargo::rerun-if-changed={}", object.display());
        if let Err(error) = fs::copy(&object, out.join(name)) {
            println!(
                "cargo::error=cannot read the eBPF object {}: {error}; run `cargo xtask build`, which builds it \
                 first, or set HOLDFAST_EBPF_OBJECTS to a folder with those that are built",
                object.display()
            );
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn default_folder() -> PathBuf {
    PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default())
        .join("..")
        .join(FOLDER)
}
