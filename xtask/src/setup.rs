//! Installs what is missing: Debian's packages, bpf-linker, cargo-deny.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::{ebpf, sh};

/// To compile eBPF without rustup's nightly.
const EBPF_PACKAGES: [&str; 6] = [
    "rustc-web",
    "cargo-web",
    "libstd-rust-web-dev-bpf",
    "llvm-22-dev",
    "libpolly-22-dev",
    "rust-web-clippy",
];
/// To build C code of dependencies, and for the lab.
const BASE_PACKAGES: [&str; 9] = [
    "build-essential",
    "cmake",
    "pkg-config",
    "iproute2",
    "iptables",
    "nftables",
    "util-linux",
    "procps",
    "ca-certificates",
];
/// Real programs that the system tests run, and what `bench guard` counts with.
const TEST_PACKAGES: [&str; 16] = [
    "nginx-light",
    "curl",
    "openssh-server",
    "openssh-client",
    "postgresql",
    "postgresql-contrib",
    "redis-server",
    "redis-tools",
    "passwd",
    "openssl",
    "dnsmasq-base",
    "bind9-dnsutils",
    "iperf3",
    "mosh",
    "python3",
    "valgrind",
];
/// The suites of Debian's own Python, where no other version is found.
const PYTHON_SUITES: &str = "libpython3.11-testsuite";
/// Systems that `holdfast bench` measures beside Holdfast.
const PEER_PACKAGES: [&str; 5] = [
    "wireguard-go",
    "wireguard-tools",
    "openvpn",
    "stunnel4",
    "haproxy",
];
/// The one of them that Debian does not have, as a crate.
const SHADOWSOCKS: &str = "shadowsocks-rust";
const BPF_LINKER: &str = "0.13.0";
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// Looks, asks, installs.
pub fn run(yes: bool) -> anyhow::Result<()> {
    let suites = python_suites();
    let mut packages: Vec<&str> = BASE_PACKAGES
        .iter()
        .chain(&TEST_PACKAGES)
        .copied()
        .chain([suites.as_str()])
        .filter(|p| !installed(p))
        .collect();
    // nginx in any flavour serves.
    if sh::find("nginx").is_some() || Path::new("/usr/sbin/nginx").exists() {
        packages.retain(|p| *p != "nginx-light");
    }
    if ebpf::check_toolchain().is_err() {
        packages.extend(EBPF_PACKAGES.iter().filter(|p| !installed(p)));
    }
    install_asked(yes, &packages)?;
    if sh::find("bpf-linker").is_none() {
        ask(
            yes,
            &format!("install with cargo: bpf-linker {BPF_LINKER} (about a minute)"),
        )?;
        let mut cargo = Command::new("cargo");
        cargo.args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked"]);
        if Path::new(LLVM_PREFIX).exists() {
            cargo
                .args(["--no-default-features", "--features", "llvm-22"])
                .env("LLVM_PREFIX", LLVM_PREFIX);
        }
        sh::run(&mut cargo)?;
    }
    if sh::find("cargo-deny").is_none() {
        ask(yes, "install with cargo: cargo-deny (some minutes)")?;
        sh::run(Command::new("cargo").args(["install", "cargo-deny", "--locked"]))?;
    }
    ebpf::check_toolchain().context("the eBPF programs cannot be built here")?;
    eprintln!("setup: everything is there");
    Ok(())
}

/// The same for what the bench's peers need, which nothing else does.
pub fn peers(yes: bool) -> anyhow::Result<()> {
    let packages: Vec<&str> = PEER_PACKAGES
        .into_iter()
        .filter(|p| !installed(p))
        .collect();
    install_asked(yes, &packages)?;
    if sh::find("ssserver").is_none() {
        ask(
            yes,
            &format!("install with cargo: {SHADOWSOCKS} (some minutes)"),
        )?;
        sh::run(Command::new("cargo").args(["install", SHADOWSOCKS, "--locked"]))?;
    }
    Ok(())
}

/// The package of the test suites of the Python that is there: `python3` leads to, say, `python3.11`.
fn python_suites() -> String {
    let python = std::fs::read_link("/usr/bin/python3").ok();
    let name = python.as_deref().and_then(|p| p.file_name()?.to_str());
    name.map_or_else(|| PYTHON_SUITES.to_owned(), |n| format!("lib{n}-testsuite"))
}

fn installed(package: &str) -> bool {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Status}", package])
        .stderr(Stdio::null())
        .output();
    output.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("install ok installed"))
}

fn ask(yes: bool, what: &str) -> anyhow::Result<()> {
    eprintln!("setup: to {what}");
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        bail!("there is nobody to ask: run it with --yes, or install this yourself");
    }
    eprint!("go on? [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        bail!("not installed, as you said")
    }
}

/// Installs what is missing, if anything is, once that was agreed to.
fn install_asked(yes: bool, packages: &[&str]) -> anyhow::Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    ask(
        yes,
        &format!("install with apt-get: {}", packages.join(" ")),
    )?;
    install(packages)
}

/// Installs without letting Debian start the servers: the tests start their own.
fn install(packages: &[&str]) -> anyhow::Result<()> {
    let policy = Path::new("/usr/sbin/policy-rc.d");
    let ours = !policy.exists();
    let script = "printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d";
    if ours {
        sh::run(&mut privileged("sh", &["-c", script]))?;
    }
    let done = sh::run(&mut privileged("apt-get", &["update"])).and_then(|()| {
        let mut arguments = vec!["install", "-y", "--no-install-recommends"];
        arguments.extend(packages);
        sh::run(&mut privileged("apt-get", &arguments))
    });
    if ours {
        sh::run(&mut privileged("rm", &["-f", "/usr/sbin/policy-rc.d"]))?;
    }
    done
}

fn privileged(program: &str, arguments: &[&str]) -> Command {
    let mut command = if sh::is_root() {
        Command::new(program)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg("--preserve-env=DEBIAN_FRONTEND").arg(program);
        sudo
    };
    command
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    command
}
