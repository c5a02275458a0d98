//! Keeps the programs attached when the agent dies, so that fail-closed rules still refuse.
//!
//! ```text
//! BPFFS/holdfast/agent-PID/N/cgroup        a symbolic link that names the captured cgroup
//! BPFFS/holdfast/agent-PID/N/filter        one whose target is the text of the cgroup's filter, if it has one
//! BPFFS/holdfast/agent-PID/N/connect4 ..   its links, each a pinned object
//! ```
//!
//! A link is attached for as long as a process or a pin holds it (`bpf_link_inc` in the kernel's
//! bpf/syscall.c). An agent that ends in order removes its pins. Those of one that was killed stay
//! until the next agent has taken its cgroups over.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, PinnedLink};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{CaptureError, Filter};

const FOLDER: &str = "holdfast";
const AGENT: &str = "agent-";
const CGROUP: &str = "cgroup";
const FILTER: &str = "filter";

/// Whether a BPF file system is mounted at `bpffs`.
pub fn can_pin(bpffs: &Path) -> bool {
    statfs(bpffs).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// Where this process pins.
#[derive(Debug)]
pub struct Pins {
    dir: PathBuf,
    number: u64,
}

/// The pinned links of one cgroup. Dropping it removes the pins and lets go of the links.
#[derive(Debug)]
pub struct Pinned {
    dir: PathBuf,
    links: Vec<PinnedLink>,
}

impl Pins {
    /// Prepares pinning below `bpffs`, where a BPF file system must be mounted.
    pub fn open(bpffs: &Path) -> Result<Self, CaptureError> {
        if !can_pin(bpffs) {
            return Err(CaptureError::NoBpffs {
                path: bpffs.to_owned(),
            });
        }
        let dir = bpffs
            .join(FOLDER)
            .join(format!("{AGENT}{}", std::process::id()));
        fs::create_dir_all(&dir).map_err(failed("create", &dir))?;
        Ok(Self { dir, number: 0 })
    }

    /// Pins the links of `cgroup`, each under its name.
    pub fn pin(
        &mut self,
        cgroup: &Path,
        filter: &Filter,
        links: impl IntoIterator<Item = (&'static str, FdLink)>,
    ) -> Result<Pinned, CaptureError> {
        self.number += 1;
        let dir = self.dir.join(self.number.to_string());
        fs::create_dir(&dir).map_err(failed("create", &dir))?;
        let mut pinned = Pinned {
            dir,
            links: Vec::new(),
        };
        let name = pinned.dir.join(CGROUP);
        symlink(cgroup, &name).map_err(failed("create", &name))?;
        if !filter.is_empty() {
            let name = pinned.dir.join(FILTER);
            symlink(filter.to_string(), &name).map_err(failed("create", &name))?;
        }
        for (name, link) in links {
            let path = pinned.dir.join(name);
            let link = link.pin(&path).map_err(|error| CaptureError::Cgroup {
                what: "pin",
                path,
                source: io::Error::other(error),
            })?;
            pinned.links.push(link);
        }
        Ok(pinned)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // Fails where something is still pinned, which keeps the folder, as it should.
        let _ = fs::remove_dir(&self.dir);
        if let Some(parent) = self.dir.parent() {
            let _ = fs::remove_dir(parent);
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for link in self.links.drain(..) {
            if let Err(error) = link.unpin() {
                tracing::warn!(dir = %self.dir.display(), %error, "a program stays attached");
            }
        }
        // The folder goes with what is in it; nothing in it matters without the links.
        let _ = fs::remove_file(self.dir.join(CGROUP));
        let _ = fs::remove_file(self.dir.join(FILTER));
        let _ = fs::remove_dir(&self.dir);
    }
}

/// What agents that were killed have left behind.
#[derive(Debug, Default)]
pub struct Orphans {
    folders: Vec<PathBuf>,
}

impl Orphans {
    /// Looks below `bpffs`; finds nothing where no BPF file system is.
    pub fn find(bpffs: &Path) -> Self {
        let dead = |name: &str| {
            name.strip_prefix(AGENT)
                .is_some_and(|pid| !Path::new("/proc").join(pid).exists())
        };
        let folders = children(&bpffs.join(FOLDER))
            .filter(|path| path.file_name().is_some_and(|n| dead(&n.to_string_lossy())))
            .collect();
        Self { folders }
    }

    /// The cgroups that they had captured and that still exist, with their filters.
    pub fn cgroups(&self) -> Vec<(PathBuf, Filter)> {
        self.folders
            .iter()
            .flat_map(|folder| children(folder))
            .filter_map(|held| Some((fs::read_link(held.join(CGROUP)).ok()?, filter_in(&held))))
            .filter(|(cgroup, _)| cgroup.is_dir())
            .collect()
    }

    /// Removes the pins: the kernel lets go of the programs.
    pub fn remove(self) {
        for folder in self.folders {
            for held in children(&folder) {
                for pin in children(&held) {
                    if let Err(error) = fs::remove_file(&pin) {
                        tracing::warn!(pin = %pin.display(), %error, "a dead agent's program stays attached");
                    }
                }
                // What could not be removed has been told of.
                let _ = fs::remove_dir(&held);
            }
            let _ = fs::remove_dir(&folder);
        }
    }
}

/// The filter that is kept in a folder; none where there is none, or one that cannot be read.
fn filter_in(held: &Path) -> Filter {
    let text = fs::read_link(held.join(FILTER)).unwrap_or_default();
    let filter = text.to_string_lossy().parse();
    filter.unwrap_or_else(|error| {
        tracing::warn!(dir = %held.display(), %error, "a filter cannot be read: what it left out is captured");
        Filter::default()
    })
}

fn children(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> CaptureError + 'a {
    move |source| CaptureError::Cgroup {
        what,
        path: path.to_owned(),
        source,
    }
}
