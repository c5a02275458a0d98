//! A cgroup for captured programs, gone when the test is.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};

const PREFIX: &str = "holdfast-lab-";
/// Attempts to remove a cgroup whose last process is still being reaped, 10 ms apart.
const REMOVE_ATTEMPTS: u32 = 200;

/// The root of cgroup2, wherever it is mounted.
pub fn cgroup2_root() -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let found = mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        right
            .starts_with("cgroup2 ")
            .then(|| left.split(' ').nth(4))
            .flatten()
    });
    found
        .map(PathBuf::from)
        .context("no cgroup2 is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup/unified)")
}

/// A cgroup of this process's own. Dropping it removes it.
pub struct TestCgroup {
    path: PathBuf,
}

impl TestCgroup {
    /// Makes one, and removes those of processes that are no more.
    pub fn new() -> anyhow::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let root = cgroup2_root()?;
        remove_stale(&root);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&path)
            .with_context(|| format!("{} cannot be made: are you root?", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has `command` enter the cgroup before it becomes its program: a socket belongs to the
    /// cgroup that it was made in.
    pub fn enter(&self, command: &mut Command) -> anyhow::Result<()> {
        let procs = fs::OpenOptions::new()
            .write(true)
            .open(self.path.join("cgroup.procs"))?;
        // SAFETY: between fork and exec only write(2) is called, on a descriptor opened before.
        unsafe {
            command.pre_exec(move || io::Write::write_all(&mut &procs, b"0"));
        }
        Ok(())
    }

    /// Ends every process in it, and waits until they are gone.
    pub fn kill(&self) -> anyhow::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")?;
        for _ in 0..REMOVE_ATTEMPTS {
            if fs::read_to_string(self.path.join("cgroup.events"))?.contains("populated 0") {
                return Ok(());
            }
            // The file can be polled for changes, but not by its content.
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("{} does not become empty", self.path.display())
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        // Its own error is that of the removal below.
        let _ = self.kill();
        for _ in 0..REMOVE_ATTEMPTS {
            match fs::remove_dir(&self.path) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    // Its processes have ended, and the kernel has yet to let go of them.
                    std::thread::sleep(Duration::from_millis(10))
                }
                _ => return,
            }
        }
    }
}

fn remove_stale(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next())
            .map(str::to_owned);
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Whoever is still in it keeps it; then it is not stale.
            let _ = fs::remove_dir(entry.path());
        }
    }
}
