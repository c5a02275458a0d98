//! System calls of the trials that no library has.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd as _};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use socket2::SockRef;

/// asm-generic/sockios.h.
const SIOCATMARK: libc::Ioctl = 0x8905;

/// Receives with flags, such as MSG_WAITALL.
pub fn receive(socket: &TcpStream, bytes: &mut [u8], flags: i32) -> io::Result<usize> {
    let len = bytes.len();
    // SAFETY: the same bytes; what reads into them writes whole bytes, so they stay initialised.
    let bytes = unsafe {
        std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast::<MaybeUninit<u8>>(), len)
    };
    SockRef::from(socket).recv_with_flags(bytes, flags)
}

/// Sets an option of SOL_SOCKET that is a number.
pub fn set(socket: &TcpStream, name: i32, value: i32) -> io::Result<()> {
    let len = size_of_val(&value) as libc::socklen_t;
    let place = (&raw const value).cast();
    // SAFETY: the value lives during the call, and has that length.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, place, len) };
    checked(done).map(drop)
}

/// How many sends the completions in the error queue speak of: each of `ee_info` to `ee_data` (msg_zerocopy of the
/// kernel's documentation).
pub fn reports(socket: &TcpStream) -> io::Result<u32> {
    let mut none = [0; 1];
    let mut iov = [IoSliceMut::new(&mut none)];
    let mut control = nix::cmsg_space!([u8; 64]);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let told = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags);
    let told = match told {
        Err(Errno::EAGAIN) => return Ok(0),
        told => told?,
    };
    let count = |message| match message {
        ControlMessageOwned::Ipv4RecvErr(error, _) => {
            error.ee_data.wrapping_sub(error.ee_info).wrapping_add(1)
        }
        _ => 0,
    };
    Ok(told.cmsgs()?.map(count).sum())
}

/// FIONREAD: how many bytes can be read.
pub fn unread(socket: &TcpStream) -> io::Result<i32> {
    number(socket, libc::FIONREAD)
}

/// SIOCATMARK: whether the next byte is urgent.
pub fn at_mark(socket: &TcpStream) -> io::Result<bool> {
    number(socket, SIOCATMARK).map(|answer| answer != 0)
}

fn number(socket: &TcpStream, request: libc::Ioctl) -> io::Result<i32> {
    let mut answer: i32 = 0;
    // SAFETY: both requests made here write one int to where `answer` is, and read nothing.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut answer) };
    checked(done)?;
    Ok(answer)
}

/// Moves bytes from a socket to a pipe.
pub fn splice(from: &impl AsFd, to: &impl AsFd, bytes: usize) -> io::Result<usize> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    let none = std::ptr::null_mut;
    // SAFETY: both descriptors are open for the call, and no offsets are given.
    let moved = unsafe { libc::splice(from, none(), to, none(), bytes, 0) };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

fn checked(done: i32) -> io::Result<i32> {
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(done)
}
