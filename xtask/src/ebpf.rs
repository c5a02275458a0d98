//! Builds and lints the eBPF programs, with whichever toolchain this machine has.
//!
//! Two serve. Debian's `rustc-web` ships a ready-made `core` for the BPF target, so nothing is compiled but the
//! programs. Elsewhere rustup's nightly builds `core` itself and needs `rust-src`. Both link with `bpf-linker`, whose
//! LLVM must be at least as new as the compiler's.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

const TARGET: &str = "bpfel-unknown-none";
const PACKAGE: &str = "session-ebpf";
/// Debian's compiler, beside whatever rustup put on PATH.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
/// First release whose prebuilt `core` and LLVM fit.
const DEBIAN_RUSTC_MIN: (u32, u32) = (1, 96);

/// A toolchain that can compile for BPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Toolchain {
    /// Debian's compiler with a prebuilt `core`.
    Debian,
    /// rustup's nightly with rust-src.
    Nightly,
}

/// Builds the eBPF object in release mode and returns its path. `root` is the workspace's directory.
pub fn build(root: &Path) -> Result<PathBuf> {
    let toolchain = detect()?;
    run(
        toolchain.cargo(root, "build").arg("--release"),
        "building the eBPF programs",
    )?;
    let object = target_dir(root).join(TARGET).join("release").join(PACKAGE);
    if !object.is_file() {
        bail!("cargo succeeded but {} is not there", object.display());
    }
    Ok(object)
}

/// Runs clippy over the eBPF programs and denies warnings. Debian's toolchain needs the package `rust-web-clippy`.
pub fn clippy(root: &Path) -> Result<()> {
    let toolchain = detect()?;
    let mut command = toolchain.cargo(root, "clippy");
    if toolchain == Toolchain::Debian && !Path::new("/usr/bin/clippy-driver").exists() {
        bail!(
            "Debian's clippy is missing: run `cargo xtask setup`, or apt-get install rust-web-clippy"
        );
    }
    command.args(["--release", "--", "-D", "warnings"]);
    run(&mut command, "clippy of the eBPF programs")
}

/// Whether the eBPF programs can be built here; the error says what is missing.
pub fn check_toolchain() -> Result<()> {
    detect().map(drop)
}

fn detect() -> Result<Toolchain> {
    let toolchain = if has_debian() {
        Toolchain::Debian
    } else if has_nightly() {
        Toolchain::Nightly
    } else {
        bail!(
            "no compiler for the eBPF programs: neither Debian's rustc-web {}.{} or later with \
             libstd-rust-web-dev-bpf, nor rustup's nightly with rust-src; run `cargo xtask setup`",
            DEBIAN_RUSTC_MIN.0,
            DEBIAN_RUSTC_MIN.1
        );
    };
    if find_linker().is_none() {
        bail!(
            "bpf-linker is neither on PATH nor in cargo's bin directory; run `cargo xtask setup`"
        );
    }
    Ok(toolchain)
}

fn has_debian() -> bool {
    let version = output(Command::new(DEBIAN_RUSTC).arg("--version"));
    let recent = version
        .as_deref()
        .and_then(parse_version)
        .is_some_and(|version| version >= DEBIAN_RUSTC_MIN);
    let libdir =
        output(Command::new(DEBIAN_RUSTC).args(["--target", TARGET, "--print", "target-libdir"]));
    let prebuilt = libdir.is_some_and(|dir| holds_core(Path::new(dir.trim())));
    recent && prebuilt && Path::new(DEBIAN_CARGO).exists()
}

fn holds_core(libdir: &Path) -> bool {
    let Ok(entries) = libdir.read_dir() else {
        return false;
    };
    entries
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}

fn has_nightly() -> bool {
    let sysroot =
        output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]));
    sysroot.is_some_and(|dir| {
        Path::new(dir.trim())
            .join("lib/rustlib/src/rust/library/core/Cargo.toml")
            .exists()
    })
}

/// `rustc 1.96.0 (...)` as (1, 96).
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_whitespace().nth(1)?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

impl Toolchain {
    /// A cargo command for the eBPF package, free of what the calling cargo left in the environment.
    fn cargo(self, root: &Path, verb: &str) -> Command {
        let mut command = match self {
            Self::Debian => {
                let mut command = Command::new(DEBIAN_CARGO);
                // The driver in /usr/bin, not one of rustup's on PATH; aya-ebpf needs unstable features.
                command
                    .env("RUSTC", DEBIAN_RUSTC)
                    .env("RUSTC_BOOTSTRAP", "1");
                command.arg(verb);
                command
            }
            Self::Nightly => {
                let mut command = Command::new("rustup");
                command.args(["run", "nightly", "cargo", verb, "-Z", "build-std=core"]);
                command.env_remove("RUSTC");
                command
            }
        };
        // cargo sets these for what it runs; with another compiler they are wrong, or force a rebuild each time.
        for name in [
            "CARGO",
            "RUSTUP_TOOLCHAIN",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTDOC",
            "CARGO_ENCODED_RUSTFLAGS",
        ] {
            command.env_remove(name);
        }
        for name in [
            "CARGO_MANIFEST_DIR",
            "CARGO_MANIFEST_PATH",
            "CARGO_PKG_NAME",
            "CARGO_TARGET_DIR",
            "CARGO_BUILD_TARGET",
        ] {
            command.env_remove(name);
        }
        command.current_dir(root).env("PATH", search_path(self));
        command.env("RUSTFLAGS", "-C linker=bpf-linker -C link-arg=--btf");
        // BTF is made from debug information: with line tables alone the maps would have no types.
        command
            .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
        command
            .args(["--package", PACKAGE, "--target", TARGET, "--target-dir"])
            .arg(target_dir(root));
        command
    }
}

/// Its own directory: another compiler shares nothing with the host's builds, and a build may run inside another.
fn target_dir(root: &Path) -> PathBuf {
    root.join("target").join("ebpf")
}

/// PATH with bpf-linker's folder; for Debian's cargo with /usr/bin before it, so that `cargo clippy` finds the driver
/// of its own version.
fn search_path(toolchain: Toolchain) -> OsString {
    let mut folders = Vec::new();
    if toolchain == Toolchain::Debian {
        folders.push(PathBuf::from("/usr/bin"));
    }
    folders.extend(find_linker().and_then(|linker| linker.parent().map(Path::to_owned)));
    folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    env::join_paths(folders).unwrap_or_default()
}

/// bpf-linker, on PATH or where `cargo install` puts it.
fn find_linker() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let folders = env::split_paths(&path).chain(cargo_home.map(|home| home.join("bin")));
    folders
        .map(|folder| folder.join("bpf-linker"))
        .find(|file| file.is_file())
}

fn run(command: &mut Command, what: &str) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("{what}: cannot start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{what} failed ({status}); the compiler's messages are above");
    }
    Ok(())
}

fn output(command: &mut Command) -> Option<String> {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare() {
        assert_eq!(
            parse_version("rustc 1.96.0 (ac68faa20 2026-05-25)"),
            Some((1, 96))
        );
        assert!(parse_version("rustc 1.100.0-nightly") > Some(DEBIAN_RUSTC_MIN));
        assert!(parse_version("rustc 1.63.0") < Some(DEBIAN_RUSTC_MIN));
        assert_eq!(parse_version("sh: not found"), None);
    }

    #[test]
    fn the_command_leaves_nothing_of_the_calling_cargo() {
        let command = Toolchain::Debian.cargo(Path::new("/w"), "build");
        let cleared: Vec<_> = command
            .get_envs()
            .filter(|(_, value)| value.is_none())
            .map(|(name, _)| name)
            .collect();
        assert!(cleared.contains(&"RUSTUP_TOOLCHAIN".as_ref()));
        assert!(command.get_args().any(|arg| arg == "/w/target/ebpf"));
    }
}
