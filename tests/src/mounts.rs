//! A BPF file system for agents that pin, whatever the host has mounted.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};
use tempfile::TempDir;

/// A mount namespace with a BPF file system, which the kernel takes away with its only process.
pub struct Mounts {
    holder: Child,
    dir: TempDir,
}

impl Mounts {
    /// Makes one.
    pub fn new() -> anyhow::Result<Self> {
        Self::over(&[])
    }

    /// Makes one in which some files stand in the place of the host's: which, and where.
    pub fn over(files: &[(&Path, &Path)]) -> anyhow::Result<Self> {
        let bind = |(file, place): &(&Path, &Path)| {
            format!(
                "mount --bind '{}' '{}' && ",
                file.display(),
                place.display()
            )
        };
        let binds: String = files.iter().map(bind).collect();
        let script =
            format!("mount -t bpf bpf /sys/fs/bpf && {binds}echo ready && exec sleep 1000");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .stdout(Stdio::piped());
        let mut holder = command.spawn()?;
        let out = holder.stdout.take().context("no output")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        let this = Self {
            holder,
            dir: tempfile::tempdir()?,
        };
        ensure!(
            line == "ready\n",
            "no BPF file system, or a file, can be mounted"
        );
        Ok(this)
    }

    /// A program that runs `real` inside.
    pub fn inside(&self, real: &Path) -> anyhow::Result<PathBuf> {
        let path = self.dir.path().join("holdfast");
        let script = format!(
            "#!/bin/sh\nexec nsenter --mount=/proc/{}/ns/mnt '{}' \"$@\"\n",
            self.holder.id(),
            real.display()
        );
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// Its path, for `nsenter --mount`.
    pub fn path(&self) -> String {
        format!("/proc/{}/ns/mnt", self.holder.id())
    }

    /// How much is pinned.
    pub fn pinned(&self) -> usize {
        let process = Path::new("/proc").join(self.holder.id().to_string());
        count(&process.join("root").join("sys/fs/bpf/holdfast"))
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        // It has no other end.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Files below `dir`.
fn count(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| match e.file_type() {
            Ok(kind) if kind.is_dir() => count(&e.path()),
            _ => 1,
        })
        .sum()
}
