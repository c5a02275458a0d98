//! Notices that a captured cgroup was made anew: a service manager that restarts a service removes
//! its cgroup and makes another one under the same path.
//!
//! inotify(7) tells of new folders, also in cgroupfs. Every ancestor of a captured cgroup is
//! watched, because a slice may go and come back together with the service in it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// The watch. Its descriptor is in the task's reactor for as long as it lives.
pub(super) struct CgroupWatch {
    inotify: AsyncFd<Descriptor>,
}

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl CgroupWatch {
    /// A watch of nothing yet. Needs a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // SAFETY: an `Inotify` keeps its descriptor for its whole life, and the registration owns it.
        let registered = unsafe { AsyncFd::register(Descriptor(inotify)) };
        Ok(Self {
            inotify: registered?,
        })
    }

    /// Watches every folder in which one of `cgroups` or a part of its path can be made anew.
    /// Folders that are gone are passed over: the making of them is what is waited for.
    pub fn look_after<'a>(&self, cgroups: impl IntoIterator<Item = &'a PathBuf>) -> io::Result<()> {
        let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ONLYDIR;
        for cgroup in cgroups {
            for folder in cgroup.ancestors().skip(1) {
                // Watching the same folder twice is one watch.
                match self.inotify.get_ref().0.add_watch(folder, flags) {
                    Ok(_) | Err(Errno::ENOENT) => {}
                    Err(errno) => return Err(errno.into()),
                }
                if is_mount_point(folder) {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Returns when something was made in one of the folders. Cancel-safe.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            match self.inotify.get_ref().0.read_events() {
                // What it was does not matter: the caller looks at all of them.
                Ok(_) => return Ok(()),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Where cgroup2 is mounted nothing above can bring a cgroup back.
fn is_mount_point(folder: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| std::fs::metadata(path).map(|m| m.dev()).ok();
    let above = folder.parent().and_then(device);
    above.is_none() || device(folder).is_some_and(|d| Some(d) != above)
}
