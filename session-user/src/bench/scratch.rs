//! The folder of a measurement, and what others left behind that were killed.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Context;
use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

/// How its name begins.
const PREFIX: &str = "holdfast-bench-";
/// The file in it that is locked as long as the process lives (flock(2)).
const LOCK: &str = "in-use";

/// A folder that is removed with this value.
pub struct Scratch {
    dir: TempDir,
    /// None where the folder is kept. Last: nobody else takes it for stale while it is removed.
    _lock: Option<Flock<File>>,
}

impl Scratch {
    /// A new folder; those of measurements that were killed are removed first. HOLDFAST_BENCH_KEEP keeps it, to look at
    /// the agents' logs.
    pub fn new() -> anyhow::Result<Self> {
        let keep = std::env::var_os("HOLDFAST_BENCH_KEEP").is_some();
        Self::within(&std::env::temp_dir(), keep)
    }

    fn within(parent: &Path, keep: bool) -> anyhow::Result<Self> {
        remove_stale(parent);
        let mut builder = tempfile::Builder::new();
        builder.prefix(PREFIX).disable_cleanup(keep);
        let dir = builder.tempdir_in(parent)?;
        let lock = if keep { None } else { Some(lock(dir.path())?) };
        Ok(Self { dir, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Locks the folder. The file has its name only when it is locked: a folder without one is not judged.
fn lock(dir: &Path) -> anyhow::Result<Flock<File>> {
    let unlocked = dir.join("not-in-use-yet");
    let file = File::create_new(&unlocked)?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("{} cannot be locked", unlocked.display()))?;
    fs::rename(&unlocked, dir.join(LOCK))?;
    Ok(lock)
}

/// Removes this user's folders whose process is gone: SIGKILL leaves the folder, and takes the lock.
fn remove_stale(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let named = entry.file_name().to_string_lossy().starts_with(PREFIX);
        // Not through a link, which somebody else may have made.
        let mine = |m: fs::Metadata| m.is_dir() && m.uid() == nix::unistd::geteuid().as_raw();
        if !named || !entry.metadata().is_ok_and(mine) {
            continue;
        }
        let Ok(file) = File::open(entry.path().join(LOCK)) else {
            continue;
        };
        if let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            // What cannot be removed is there the next time.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_when_its_process_has_gone_without_it() -> anyhow::Result<()> {
        let parent = tempfile::tempdir()?;
        let count = || fs::read_dir(parent.path()).map(Iterator::count);
        // As SIGKILL leaves it.
        let killed = Scratch::within(parent.path(), true)?;
        drop(lock(killed.path())?);
        let kept = Scratch::within(parent.path(), true)?;
        assert!(!killed.path().exists());
        // One that is used, one that is kept, and one that is only called so.
        let used = Scratch::within(parent.path(), false)?;
        fs::create_dir(parent.path().join("another"))?;
        fs::write(parent.path().join("another").join(LOCK), "")?;
        remove_stale(parent.path());
        assert!(used.path().exists() && kept.path().exists());
        assert_eq!(count()?, 3);
        drop(used);
        assert_eq!(count()?, 2);
        Ok(())
    }
}
