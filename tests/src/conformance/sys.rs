//! System calls that no crate of ours wraps, and those where the wrapper hides what an application sees.
//! All `unsafe` of the suite is here.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::WaitStatus;

fn checked(result: libc::c_int) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn length(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// send(2).
pub fn send(fd: impl AsFd, bytes: &[u8], flags: i32) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the buffer is valid for its length.
    length(unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags) })
}

/// recv(2).
pub fn recv(fd: impl AsFd, bytes: &mut [u8], flags: i32) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the buffer is valid for its length.
    length(unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), bytes.len(), flags) })
}

/// recv(2) without a buffer: what MSG_TRUNC discards.
pub fn discard(fd: impl AsFd, bytes: usize) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: with MSG_TRUNC on TCP the kernel writes nothing (tcp(7)).
    length(unsafe { libc::recv(fd, std::ptr::null_mut(), bytes, libc::MSG_TRUNC) })
}

/// connect(2) with an address of these bytes, which need not make sense.
pub fn connect_raw(fd: impl AsFd, address: &[u8]) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let mut storage = [0u8; 128];
    storage[..address.len()].copy_from_slice(address);
    // SAFETY: the storage is valid for the length that is given; the kernel copies it.
    let done = unsafe {
        libc::connect(
            fd,
            storage.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    checked(done).map(|_| ())
}

/// connect(2) with AF_UNSPEC: what was connected is not any more.
pub fn disconnect(fd: impl AsFd) -> io::Result<()> {
    let mut address = [0u8; 16];
    address[..2].copy_from_slice(&(libc::AF_UNSPEC as u16).to_ne_bytes());
    connect_raw(fd, &address)
}

/// getsockopt(2), at most `room` bytes.
pub fn option_bytes(fd: impl AsFd, level: i32, name: i32, room: usize) -> io::Result<Vec<u8>> {
    let fd = fd.as_fd().as_raw_fd();
    let mut value = vec![0u8; room];
    let mut size = room as libc::socklen_t;
    // SAFETY: value and size are valid for writes, and size is what value has room for.
    let done =
        unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &raw mut size) };
    checked(done)?;
    value.truncate(size as usize);
    Ok(value)
}

/// getsockopt(2) of an `int`.
pub fn option(fd: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let bytes = option_bytes(fd, level, name, 4)?;
    let mut word = [0u8; 4];
    word[..bytes.len()].copy_from_slice(&bytes);
    Ok(i32::from_ne_bytes(word))
}

/// setsockopt(2).
pub fn set_option_bytes(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let size = value.len() as libc::socklen_t;
    // SAFETY: the value is valid for its length.
    checked(unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), size) }).map(|_| ())
}

/// setsockopt(2) of an `int`.
pub fn set_option(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_option_bytes(fd, level, name, &value.to_ne_bytes())
}

/// ioctl(2): whether the next byte is the urgent one, or was before it was read out of band.
pub const SIOCATMARK: libc::Ioctl = 0x8905;

/// ioctl(2) that yields an `int`, such as FIONREAD.
pub fn ioctl_int(fd: impl AsFd, request: libc::Ioctl) -> io::Result<i32> {
    let fd = fd.as_fd().as_raw_fd();
    let mut value: libc::c_int = 0;
    // SAFETY: the requests that the suite makes write one int.
    checked(unsafe { libc::ioctl(fd, request, &raw mut value) })?;
    Ok(value)
}

/// fcntl(2) F_SETOWN: this process gets the socket's SIGURG.
pub fn own(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the request takes an int.
    checked(unsafe { libc::fcntl(fd, libc::F_SETOWN, libc::getpid()) }).map(drop)
}

/// sendfile(2) from the file's position.
pub fn sendfile(to: impl AsFd, from: impl AsFd, bytes: usize) -> io::Result<usize> {
    let (to, from) = (to.as_fd().as_raw_fd(), from.as_fd().as_raw_fd());
    // SAFETY: a null offset is allowed, and both descriptors are open.
    length(unsafe { libc::sendfile(to, from, std::ptr::null_mut(), bytes) })
}

/// splice(2), one end of which is a pipe.
pub fn splice(from: impl AsFd, to: impl AsFd, bytes: usize, flags: u32) -> io::Result<usize> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    let none = std::ptr::null_mut();
    // SAFETY: null offsets are allowed, and both descriptors are open.
    length(unsafe { libc::splice(from, none, to, none, bytes, flags) })
}

/// poll(2)'s events, POLLRDHUP among them, which nix does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollFlags(libc::c_short);

impl PollFlags {
    /// Data to read, or the end.
    pub const POLLIN: Self = Self(libc::POLLIN);
    /// Urgent data.
    pub const POLLPRI: Self = Self(libc::POLLPRI);
    /// Room to write.
    pub const POLLOUT: Self = Self(libc::POLLOUT);
    /// An error.
    pub const POLLERR: Self = Self(libc::POLLERR);
    /// Both directions have ended.
    pub const POLLHUP: Self = Self(libc::POLLHUP);
    /// The peer has ended its direction.
    pub const POLLRDHUP: Self = Self(libc::POLLRDHUP);

    /// None.
    pub const fn empty() -> Self {
        Self(0)
    }

    /// Whether all of `other` are among them.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for PollFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// poll(2) of one descriptor.
pub fn poll(fd: impl AsFd, interest: PollFlags, limit: Duration) -> io::Result<PollFlags> {
    let mut entry = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events: interest.0,
        revents: 0,
    };
    let ms = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one entry, valid for reads and writes.
    checked(unsafe { libc::poll(&raw mut entry, 1, ms) })?;
    Ok(PollFlags(entry.revents))
}

/// Runs `job` in a forked child, whose exit status is what it returns.
///
/// The caller must have one thread only: every case is a process of its own.
pub fn fork(job: impl FnOnce() -> i32) -> io::Result<nix::unistd::Pid> {
    // SAFETY: this process has one thread, so the child finds no lock held.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(child),
        nix::unistd::ForkResult::Child => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).unwrap_or(101);
            // SAFETY: _exit(2) runs nothing of the parent's that waits for its exit.
            unsafe { libc::_exit(status) }
        }
    }
}

/// Waits for a child; says how it ended.
pub fn wait(child: nix::unistd::Pid) -> io::Result<String> {
    Ok(match nix::sys::wait::waitpid(child, None)? {
        WaitStatus::Exited(_, code) => format!("exit {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("killed by {signal}"),
        other => format!("{other:?}"),
    })
}

/// Gives SIGPIPE back the meaning that Rust's start-up takes from it.
pub fn sigpipe_kills() -> io::Result<()> {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default disposition runs no code of ours.
    unsafe { sigaction(Signal::SIGPIPE, &action) }?;
    Ok(())
}

extern "C" fn nothing(_: libc::c_int) {}

/// Has SIGALRM interrupt what this process waits for, once, after so many milliseconds.
pub fn interrupt_after(ms: i64) -> io::Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGALRM, &action) }?;
    let timer = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 0,
        },
        it_value: libc::timeval {
            tv_sec: ms / 1000,
            tv_usec: ms % 1000 * 1000,
        },
    };
    // SAFETY: the timer is valid for reads, and no old value is asked for.
    let done =
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    checked(done).map(|_| ())
}

/// Submits one operation to a ring and waits for its result.
///
/// What the operation points to lives as long as the caller's borrow of it, because this returns only when
/// the kernel is done with it.
pub fn uring(ring: &mut io_uring::IoUring, entry: &io_uring::squeue::Entry) -> io::Result<usize> {
    // SAFETY: the callers' buffers and descriptors outlive this call, and nothing is left in flight by it.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let done = ring.completion().next().map(|c| c.result());
    match done {
        Some(n) if n >= 0 => Ok(n as usize),
        Some(n) => Err(io::Error::from_raw_os_error(-n)),
        None => Err(io::Error::other("no completion")),
    }
}

/// Takes a descriptor over that recvmsg(2) has just made for us.
pub fn owned(fd: std::os::fd::RawFd) -> std::os::fd::OwnedFd {
    // SAFETY: SCM_RIGHTS makes a new descriptor, which nobody else knows.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}

/// The bytes that a receive call has written.
pub fn filled(bytes: &[std::mem::MaybeUninit<u8>]) -> Vec<u8> {
    // SAFETY: callers pass what the kernel says that it has written.
    bytes.iter().map(|b| unsafe { b.assume_init() }).collect()
}
