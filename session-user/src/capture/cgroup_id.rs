//! From the id of a cgroup, as eBPF programs see it, to its path.

use std::fs::{File, read_link};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;

use super::cgroup::cgroup2_root;

/// `FILEID_KERNFS` (include/linux/exportfs.h): the handle is the node's 64-bit id, which for a cgroup is
/// what `bpf_get_current_cgroup_id()` returns.
const FILEID_KERNFS: libc::c_int = 0xfe;

/// `struct file_handle` of open_by_handle_at(2), with its bytes.
#[repr(C)]
struct Handle {
    bytes: libc::c_uint,
    kind: libc::c_int,
    id: [u8; 8],
}

/// The path below the root of the hierarchy, without a slash in front, of the cgroup with this id; `None`
/// where it is gone or the agent may not ask (CAP_DAC_READ_SEARCH).
pub(super) fn name_of(id: u64) -> Option<String> {
    let root = cgroup2_root().ok()?;
    let mount = File::open(&root).ok()?;
    let mut handle = Handle {
        bytes: 8,
        kind: FILEID_KERNFS,
        id: id.to_ne_bytes(),
    };
    // SAFETY: the handle is as long as it says and outlives the call; the descriptor is open.
    let fd = unsafe {
        libc::open_by_handle_at(
            mount.as_raw_fd(),
            (&raw mut handle).cast(),
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    let dir = unsafe { File::from_raw_fd(fd) };
    let path: PathBuf = read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).ok()?;
    let below = path.strip_prefix(&root).ok()?;
    Some(below.to_str()?.to_owned())
}
