//! Sockets that other processes and descriptors have too.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};

use crate::conformance::client::Peer;
use crate::conformance::seen::shown;
use crate::conformance::stream::{drain, put, take};
use crate::conformance::wire::Step;
use crate::conformance::{Case, Seen, sys};

pub const CASES: &[Case] = &[
    Case::new(
        "fork_both_use_it",
        "fork after connect: child and parent talk over it",
        fork,
    ),
    Case::new(
        "fork_connect_in_child",
        "fork before connect: the child connects, the parent talks",
        fork_before,
    ),
    Case::new(
        "pass_descriptor",
        "passes the descriptor over a Unix socket, and closes its own",
        pass,
    ),
    Case::new(
        "pass_before_connect",
        "connects a descriptor that came over a Unix socket",
        pass_before,
    ),
    Case::new(
        "duplicate",
        "dup and close: the connection ends with the last one",
        duplicate,
    ),
    Case::new(
        "inherit_by_exec",
        "a program that is started has it as its standard input and output",
        exec,
    ),
];

fn fork(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    let child = sys::fork(|| {
        let said = put(&socket, b"child");
        i32::from(said.is_err() || !take(&socket, 5).starts_with("5 bytes"))
    })?;
    seen.note("child", sys::wait(child)?);
    put(&socket, b"parent")?;
    seen.note("echo", take(&socket, 6));
    socket.shutdown(std::net::Shutdown::Write)?;
    seen.note("recv", drain(&socket));
    Ok(())
}

fn fork_before(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    // The count of the child would be lost with it.
    peer.count();
    let to = script.addr().into();
    let child = sys::fork(|| i32::from(socket.connect(&to).is_err()))?;
    seen.note("child", sys::wait(child)?);
    let name = socket.peer_addr()?.as_socket() == Some(script.addr());
    seen.note("getpeername is the target", name);
    put(&socket, b"hello")?;
    seen.note("echo", take(&socket, 5));
    Ok(())
}

/// Sends a descriptor to ourselves, and takes it.
fn through(fd: impl AsFd) -> anyhow::Result<socket2::Socket> {
    let none = SockFlag::SOCK_CLOEXEC;
    let (here, there) = socketpair(AddressFamily::Unix, SockType::Datagram, None, none)?;
    let fds = [fd.as_fd().as_raw_fd()];
    let payload = [std::io::IoSlice::new(b"x")];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(here.as_raw_fd(), &payload, &rights, MsgFlags::empty(), None)?;
    let mut byte = [0; 1];
    let mut slices = [std::io::IoSliceMut::new(&mut byte)];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let message = recvmsg::<()>(
        there.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    let fd = message.cmsgs()?.find_map(|c| match c {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    let fd = fd.context("no descriptor came")?;
    ensure!(fd >= 0, "no descriptor came");
    Ok(sys::owned(fd).into())
}

fn pass(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    let passed = through(&socket)?;
    drop(socket);
    put(&passed, b"hello")?;
    seen.note("echo", take(&passed, 5));
    let name = passed.peer_addr()?.as_socket() == Some(script.addr());
    seen.note("getpeername is the target", name);
    Ok(())
}

fn pass_before(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    let passed = through(&socket)?;
    seen.call("connect", peer.connect(&passed, script.addr()));
    put(&socket, b"hello")?;
    seen.note("echo", take(&socket, 5));
    Ok(())
}

fn duplicate(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Read(5), Step::Say(b"ok".to_vec()), Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    let second = socket.try_clone()?;
    drop(socket);
    put(&second, b"hello")?;
    seen.note("recv", take(&second, 2));
    let name = second.peer_addr().map(|_| "a name");
    seen.note("getpeername", shown(&name));
    drop(second);
    seen.peer(script.report()?);
    Ok(())
}

fn exec(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[
        Step::Say(b"line\n".to_vec()),
        Step::ShutdownWrite,
        Step::ReadToEnd,
    ])?;
    let socket: OwnedFd = peer.dial(&script)?.into();
    let status = Command::new("cat")
        .stdin(Stdio::from(socket.try_clone()?))
        .stdout(Stdio::from(socket))
        .status()?;
    seen.note("cat", status);
    seen.peer(script.report()?);
    Ok(())
}
