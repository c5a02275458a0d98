//! Keeps the programs attached when the agent dies, so that fail-closed rules still refuse.
//!
//! ```text
//! BPFFS/holdfast/agent-PID-M/N/cgroup        a symbolic link that names the captured cgroup
//! BPFFS/holdfast/agent-PID-M/N/filter        one whose target is the text of the cgroup's filter, if it has one
//! BPFFS/holdfast/agent-PID-M/N/connect4 ..   its links, each a pinned object
//! ```
//!
//! A link is attached for as long as a process or a pin holds it (`bpf_link_inc` in the kernel's
//! bpf/syscall.c). An agent that ends in order removes its pins. Those of one that was killed stay
//! until the next agent has taken its cgroups over.
//!
//! Whether an agent lives, its folder tells: it holds a lock on that (flock(2)), which the kernel takes from
//! it when it ends. Process ids would not do: an agent in another pid namespace has none here, proc may hide
//! the others' (`hidepid` of proc(5)), and a container's agent has the same one after each restart.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, PinnedLink};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::detach::detach;
use super::{CaptureError, Filter};

const FOLDER: &str = "holdfast";
const AGENT: &str = "agent-";
const CGROUP: &str = "cgroup";
const FILTER: &str = "filter";
/// Folders of killed agents with this process's id that are passed over, and those that others look at just now.
const FOLDERS_MAX: u32 = 1000;

/// Whether a BPF file system is mounted at `bpffs`.
pub fn can_pin(bpffs: &Path) -> bool {
    statfs(bpffs).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// Where this process pins.
#[derive(Debug)]
pub struct Pins {
    folder: Folder,
    number: u64,
}

/// A folder of one agent, locked.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Folder {
    /// The folder at `path`, unless somebody holds it.
    fn lock(path: PathBuf) -> io::Result<Option<Self>> {
        let lock = match Flock::lock(File::open(&path)?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::Error::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(errno.into()),
        };
        // Whoever held it a moment ago may have removed it, and another may have made one of that name.
        let (locked, there) = (lock.metadata()?, fs::metadata(&path)?);
        let same = (locked.dev(), locked.ino()) == (there.dev(), there.ino());
        Ok(same.then_some(Self { path, _lock: lock }))
    }

    /// A new one below `parent` for this process.
    fn make(parent: &Path) -> io::Result<Self> {
        for number in 0..FOLDERS_MAX {
            // The last agent that leaves takes it along.
            fs::create_dir_all(parent)?;
            let path = parent.join(format!("{AGENT}{}-{number}", std::process::id()));
            // Whoever may open a folder could hold it, and have a dead agent seem to live.
            let made = DirBuilder::new().mode(0o700).create(&path);
            match made.and_then(|()| Self::lock(path)) {
                Ok(Some(folder)) => return Ok(folder),
                // One that starts at the same time has taken it for an orphan: that one is its own to remove.
                Ok(None) => {}
                Err(error) if is_about_the_name(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

/// Whether a folder could not be had since there is one, or somebody has removed it again.
fn is_about_the_name(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
    )
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
        let parent = bpffs.join(FOLDER);
        let folder = Folder::make(&parent).map_err(failed("make a folder in", &parent))?;
        Ok(Self { folder, number: 0 })
    }

    /// Pins the links of `cgroup`, each under its name.
    pub fn pin(
        &mut self,
        cgroup: &Path,
        filter: &Filter,
        links: impl IntoIterator<Item = (&'static str, FdLink)>,
    ) -> Result<Pinned, CaptureError> {
        self.number += 1;
        let dir = self.folder.path.join(self.number.to_string());
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
        let _ = fs::remove_dir(&self.folder.path);
        if let Some(parent) = self.folder.path.parent() {
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

/// What agents that were killed have left behind. Nobody else finds it while this is there.
#[derive(Debug, Default)]
pub struct Orphans {
    folders: Vec<Folder>,
}

impl Orphans {
    /// Looks below `bpffs`; finds nothing where no BPF file system is.
    pub fn find(bpffs: &Path) -> Self {
        let is_agents = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with(AGENT)
        };
        let orphan = |path: PathBuf| match Folder::lock(path.clone()) {
            Ok(folder) => folder,
            // Its agent has just ended in order.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(dir = %path.display(), %error, "whether its agent lives cannot be told: its programs stay attached");
                None
            }
        };
        let all = children(&bpffs.join(FOLDER)).filter(is_agents);
        Self {
            folders: all.filter_map(orphan).collect(),
        }
    }

    /// The cgroups that they had captured and that still exist, with their filters.
    pub fn cgroups(&self) -> Vec<(PathBuf, Filter)> {
        self.folders
            .iter()
            .flat_map(|folder| children(&folder.path))
            .filter_map(|held| Some((fs::read_link(held.join(CGROUP)).ok()?, filter_in(&held))))
            .filter(|(cgroup, _)| cgroup.is_dir())
            .collect()
    }

    /// Detaches the programs and removes the pins. Once this returns none of them refuses anything.
    pub fn remove(self) {
        for folder in self.folders {
            for held in children(&folder.path) {
                for pin in children(&held) {
                    if !pin.is_symlink()
                        && let Err(error) = detach(&pin)
                    {
                        tracing::debug!(pin = %pin.display(), %error, "a dead agent's program goes when the kernel finds time");
                    }
                    if let Err(error) = fs::remove_file(&pin) {
                        tracing::warn!(pin = %pin.display(), %error, "a dead agent's program stays attached");
                    }
                }
                // What could not be removed has been told of.
                let _ = fs::remove_dir(&held);
            }
            let _ = fs::remove_dir(&folder.path);
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
