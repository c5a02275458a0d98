//! Setting a link up or down by ioctl: a cut must take microseconds, not a fork of `ip`.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// Sets or clears IFF_UP of `link` in the calling thread's namespace (netdevice(7)).
pub(crate) fn set_up(link: &str, up: bool) -> io::Result<()> {
    let socket = UdpSocket::bind(("127.0.0.1", 0))?;
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if link.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the name of the link is too long",
        ));
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(link.bytes()) {
        *slot = byte as libc::c_char;
    }
    ioctl(&socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has just filled in this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let bit = libc::IFF_UP as libc::c_short;
    request.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
    ioctl(&socket, libc::SIOCSIFFLAGS, &mut request)
}

fn ioctl(socket: &UdpSocket, request: libc::Ioctl, argument: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: both requests take a pointer to an ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
