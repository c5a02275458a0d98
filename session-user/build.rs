//! Finds the eBPF object, so that the agent can embed it.
//!
//! The object is built for another target by another toolchain (`cargo xtask build`); a build script that started a
//! second cargo would deadlock on the target directory or hide its errors.

use std::{env, fs, path::PathBuf, process::ExitCode};

const OBJECT: &str = "target/ebpf/bpfel-unknown-none/release/session-ebpf";

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed=HOLDFAST_EBPF_OBJECT");
    let object = env::var_os("HOLDFAST_EBPF_OBJECT").map_or_else(default_object, PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("session-ebpf");
    match fs::copy(&object, &out) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            println!(
                "cargo::error=cannot read the eBPF object {}: {error}; run `cargo xtask build`, which builds it first, \
                 or set HOLDFAST_EBPF_OBJECT to one that is built",
                object.display()
            );
            ExitCode::FAILURE
        }
    }
}

fn default_object() -> PathBuf {
    PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default())
        .join("..")
        .join(OBJECT)
}
