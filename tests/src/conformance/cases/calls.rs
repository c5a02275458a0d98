//! System calls that move bytes without the application touching them, and io_uring.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;

use crate::conformance::sys::PollFlags;
use anyhow::Context;
use io_uring::{IoUring, opcode, types};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use socket2::{SockAddr, Socket};

use crate::conformance::client::{Peer, await_unread, wait_for};
use crate::conformance::seen::{digest, pattern};
use crate::conformance::stream::{drain, take};
use crate::conformance::wire::Step;
use crate::conformance::{Case, Seen, peer, sys};

pub const CASES: &[Case] = &[
    Case::new("sendfile", "sendfile of 1 MB", sendfile),
    Case::new(
        "splice_out",
        "splice from a pipe into the socket",
        splice_out,
    ),
    Case::new(
        "splice_in",
        "splice from the socket into a pipe, to the end",
        splice_in,
    ),
    Case::new("zero_copy", "MSG_ZEROCOPY and its completion", zero_copy),
    Case::new("uring", "io_uring: connect, send, recv", uring),
    Case::new(
        "uring_refused",
        "io_uring: a connect that is refused",
        uring_refused,
    ),
    Case::new(
        "receive_message",
        "recvmsg: no address, no flags",
        receive_message,
    ),
    Case::new(
        "send_to_connected",
        "sendto with another address on a connection: ignored",
        send_to_connected,
    ),
];

fn scratch(bytes: &[u8]) -> anyhow::Result<File> {
    let mut file = tempfile::tempfile()?;
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

fn sendfile(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    let file = scratch(&pattern(0, 1_000_000))?;
    let mut left = 1_000_000;
    while left > 0 {
        let n = sys::sendfile(&socket, &file, left)?;
        anyhow::ensure!(n > 0, "the file ended early");
        left -= n;
    }
    seen.call("sendfile at the end", sys::sendfile(&socket, &file, 1));
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

fn splice_out(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    let (out, into) = nix::unistd::pipe()?;
    let mut into = File::from(into);
    let writer = std::thread::spawn(move || into.write_all(&pattern(0, 300_000)));
    let mut total = 0;
    loop {
        match sys::splice(&out, &socket, 1 << 16, libc::SPLICE_F_MOVE)? {
            0 => break,
            n => total += n,
        }
    }
    writer.join().ok().context("a panic")??;
    seen.note("spliced", total);
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

fn splice_in(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(300_000), Step::Close])?;
    let socket = peer.dial(&script)?;
    let (out, into) = nix::unistd::pipe()?;
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        File::from(out).read_to_end(&mut all).map(|_| all)
    });
    let mut total = 0;
    loop {
        match sys::splice(&socket, &into, 1 << 16, libc::SPLICE_F_MOVE)? {
            0 => break,
            n => total += n,
        }
    }
    drop(into);
    seen.note("spliced", total);
    seen.note("bytes", digest(&reader.join().ok().context("a panic")??));
    seen.note("recv", drain(&socket));
    Ok(())
}

/// The range of sends that a completion on the error queue speaks of.
fn completion(socket: &Socket) -> anyhow::Result<String> {
    // It shows as POLLERR, which is always told.
    let limit = std::time::Duration::from_secs(5);
    wait_for(socket, PollFlags::empty(), limit)?;
    let error = error_message(socket)?;
    Ok(format!(
        "origin {}, errno {}, {} to {}",
        error.ee_origin, error.ee_errno, error.ee_info, error.ee_data
    ))
}

/// What the error queue says of a datagram.
pub fn queued_error(socket: &Socket) -> anyhow::Result<String> {
    let error = error_message(socket)?;
    let errno = crate::conformance::seen::errno_of(error.ee_errno.cast_signed());
    Ok(format!(
        "origin {}, type {}, code {}, {errno}",
        error.ee_origin, error.ee_type, error.ee_code
    ))
}

fn error_message(socket: &Socket) -> anyhow::Result<libc::sock_extended_err> {
    let mut control = nix::cmsg_space!([u8; 128]);
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut [],
        Some(&mut control),
        MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT,
    )?;
    let error = message.cmsgs()?.find_map(|c| match c {
        ControlMessageOwned::Ipv4RecvErr(e, _) | ControlMessageOwned::Ipv6RecvErr(e, _) => Some(e),
        _ => None,
    });
    error.context("nothing on the error queue")
}

fn zero_copy(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Read(100_000), Step::Say(b"got it".to_vec())])?;
    let socket = peer.dial(&script)?;
    sys::set_option(&socket, libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1)?;
    let bytes = pattern(0, 100_000);
    let sent = sys::send(&socket, &bytes, libc::MSG_ZEROCOPY)?;
    seen.note("send", sent);
    sys::send(&socket, &bytes[sent..], 0)?;
    seen.note("completion", completion(&socket)?);
    seen.note("recv", take(&socket, 6));
    seen.peer(script.report()?);
    Ok(())
}

fn uring(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    let mut ring = IoUring::new(8)?;
    connect(peer, seen, &mut ring, &socket, &script.addr().into());
    let fd = types::Fd(socket.as_raw_fd());
    let (out, mut back) = (*b"hello", [0u8; 5]);
    let entry = opcode::Send::new(fd, out.as_ptr(), 5).build();
    seen.call("send", sys::uring(&mut ring, &entry));
    await_unread(&socket, 5)?;
    let entry = opcode::Recv::new(fd, back.as_mut_ptr(), 5).build();
    seen.call("recv", sys::uring(&mut ring, &entry));
    seen.note("echo", digest(&back));
    Ok(())
}

fn connect(peer: &Peer, seen: &mut Seen, ring: &mut IoUring, socket: &Socket, to: &SockAddr) {
    peer.count();
    let fd = types::Fd(socket.as_raw_fd());
    let entry = opcode::Connect::new(fd, to.as_ptr().cast(), to.len()).build();
    seen.call("connect", sys::uring(ring, &entry));
}

fn uring_refused(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    let mut ring = IoUring::new(8)?;
    connect(peer, seen, &mut ring, &socket, &peer.closed_port().into());
    Ok(())
}

fn receive_message(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(5), Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    await_unread(&socket, 5)?;
    let mut bytes = [0; 10];
    let mut slices = [std::io::IoSliceMut::new(&mut bytes)];
    let mut control = nix::cmsg_space!([u8; 128]);
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    seen.note("bytes", message.bytes);
    seen.note("flags", message.flags.bits());
    let named = message
        .address
        .and_then(|a| crate::conformance::world::socket_addr(&a));
    seen.note("address", named.is_some());
    seen.note("control messages", message.cmsgs()?.count());
    Ok(())
}

fn send_to_connected(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    let elsewhere = SockAddr::from(peer.closed_port());
    let sent = socket.send_to_with_flags(b"hello", &elsewhere, libc::MSG_NOSIGNAL);
    seen.call("sendto", sent);
    seen.note("echo", take(&socket, 5));
    let gone = peer::wait_until(|| peer::unread(&socket) == 0);
    seen.note("nothing is left", gone);
    Ok(())
}
