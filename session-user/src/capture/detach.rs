//! Detaching a pinned program at once.
//!
//! A pin that is removed lets go of its link later: when the kernel frees the inode, after a grace period and from a work
//! queue (`bpf_free_inode` in kernel/bpf/inode.c, `bpf_link_put` in kernel/bpf/syscall.c). For as long the programs go on
//! refusing in the name of an agent that is dead, although the next one is ready. BPF_LINK_DETACH (Linux 5.9) is done when
//! it returns. aya has no wrapper for it.

use std::ffi::{CString, c_int, c_long};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Commands of bpf(2): `enum bpf_cmd` of linux/bpf.h.
const BPF_OBJ_GET: c_int = 7;
const BPF_LINK_DETACH: c_int = 34;

/// The part of `union bpf_attr` that BPF_OBJ_GET reads.
#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The part that BPF_LINK_DETACH reads.
#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

/// Detaches the program of the link that is pinned at `pin`, and leaves the pin. Fails with EINVAL where something else is
/// pinned.
pub fn detach(pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let get = ObjGet {
        pathname: path.as_ptr() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    // SAFETY: the kernel reads as many bytes as are said to be there, and a string that ends with NUL; both outlive the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &raw const get, size_of::<ObjGet>()) }?;
    // SAFETY: the kernel has just made it for us, and nobody else knows of it.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    let detach = LinkDetach {
        link_fd: link.as_raw_fd().unsigned_abs(),
    };
    // SAFETY: the kernel reads as many bytes as are said to be there.
    unsafe { bpf(BPF_LINK_DETACH, &raw const detach, size_of::<LinkDetach>()) }.map(drop)
}

/// # Safety
///
/// `attr` must have `bytes` bytes, and what it points to must be what `command` reads.
unsafe fn bpf<T>(command: c_int, attr: *const T, bytes: usize) -> io::Result<c_int> {
    // SAFETY: as the caller promises.
    let result: c_long = unsafe { libc::syscall(libc::SYS_bpf, command, attr, bytes) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(c_int::try_from(result).unwrap_or(c_int::MAX))
}
