//! Connections that are reset.

use std::net::Shutdown;
use std::time::Duration;

use crate::conformance::sys::PollFlags;
use socket2::Socket;

use super::options::tcp_state;
use crate::conformance::client::{Peer, Script, await_unread, settled, wait_for};
use crate::conformance::seen::{digest, errno_of, pattern};
use crate::conformance::stream::{drain, end, put, take};
use crate::conformance::wire::Step;
use crate::conformance::{Case, Seen, sys};

pub const CASES: &[Case] = &[
    Case::new(
        "reset_read",
        "the peer resets: poll, then read: ECONNRESET, then the end",
        read,
    ),
    Case::new(
        "reset_write",
        "the peer resets: write: ECONNRESET, then EPIPE",
        write,
    ),
    Case::new(
        "reset_so_error",
        "the peer resets: SO_ERROR takes the error away",
        so_error,
    ),
    Case::new(
        "reset_blocked_read",
        "the peer resets while a read waits",
        blocked_read,
    ),
    Case::new(
        "reset_after_data",
        "the peer sends and resets: what has arrived can be read",
        after_data,
    ),
    Case::new(
        "reset_right_after_data",
        "the peer sends and resets at once: the data can be read all the same",
        right_after_data,
    ),
    Case::new(
        "reset_by_unread",
        "the peer closes with unread data",
        by_unread,
    ),
    Case::new(
        "reset_after_our_end",
        "the peer resets after our direction has ended",
        after_our_end,
    ),
    Case::new(
        "reset_after_their_end",
        "the peer ends its direction, then resets: EPIPE",
        after_their_end,
    ),
    Case::new(
        "reset_state",
        "TCP_INFO, shutdown and AF_UNSPEC after a reset; connects again",
        state,
    ),
    Case::new("reset_ours", "SO_LINGER 0: the peer reads ECONNRESET", ours),
    Case::new(
        "reset_ours_with_data",
        "SO_LINGER 0 with data under way: the peer reads ECONNRESET",
        ours_with_data,
    ),
    Case::new(
        "reset_ours_by_unread",
        "closes with unread data: the peer reads ECONNRESET",
        ours_by_unread,
    ),
    Case::new(
        "reset_ours_by_unspec",
        "AF_UNSPEC on a connection: the peer reads ECONNRESET",
        ours_by_unspec,
    ),
    Case::new(
        "reset_ours_at_exit",
        "a process is killed with unread data: the peer reads ECONNRESET",
        ours_at_exit,
    ),
    Case::new(
        "reset_sigpipe",
        "SIGPIPE ends a process that writes, MSG_NOSIGNAL does not",
        sigpipe,
    ),
];

/// A connection that the peer has read one byte of, so that both ends know that it stands.
fn begun<'a>(peer: &'a Peer, steps: &[Step]) -> anyhow::Result<(Script<'a>, Socket)> {
    let all = [&[Step::Read(1), Step::Say(b"y".to_vec())], steps].concat();
    let script = peer.script(&all)?;
    let socket = peer.dial(&script)?;
    put(&socket, b"x")?;
    anyhow::ensure!(take(&socket, 1).starts_with("1 bytes"), "no answer");
    Ok((script, socket))
}

/// A connection that the peer is about to reset.
fn reset(peer: &Peer) -> anyhow::Result<Socket> {
    let (script, socket) = begun(peer, &[Step::Go, Step::Reset])?;
    script.go()?;
    Ok(socket)
}

fn read(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = reset(peer)?;
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    seen.note("recv", drain(&socket));
    seen.note("recv again", drain(&socket));
    let sent = sys::send(&socket, b"x", libc::MSG_NOSIGNAL);
    seen.call("send", sent);
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    Ok(())
}

fn write(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = reset(peer)?;
    settled(&socket, PollFlags::POLLHUP)?;
    for what in ["send", "send again"] {
        seen.call(what, sys::send(&socket, b"x", libc::MSG_NOSIGNAL));
    }
    seen.note("recv", drain(&socket));
    Ok(())
}

fn so_error(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = reset(peer)?;
    settled(&socket, PollFlags::POLLHUP)?;
    for what in ["SO_ERROR", "SO_ERROR again"] {
        let error = sys::option(&socket, libc::SOL_SOCKET, libc::SO_ERROR)?;
        seen.note(what, errno_of(error));
    }
    seen.note("recv", drain(&socket));
    Ok(())
}

fn blocked_read(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let (script, socket) = begun(peer, &[Step::Go, Step::Reset])?;
    let read = std::thread::scope(|scope| -> anyhow::Result<String> {
        let reader = scope.spawn(|| drain(&socket));
        script.go()?;
        reader.join().map_err(|_| anyhow::anyhow!("a panic"))
    })?;
    seen.note("recv", read);
    Ok(())
}

fn after_data(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let (script, socket) = begun(peer, &[Step::Send(1000), Step::Go, Step::Reset])?;
    await_unread(&socket, 1000)?;
    script.go()?;
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    seen.note("recv", drain(&socket));
    Ok(())
}

fn right_after_data(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let whole = format!("{}, then ECONNRESET", digest(&pattern(0, 1000)));
    let mut all = 0;
    // Whether one may overtake the other is a matter of the moment.
    for _ in 0..20 {
        let script = peer.script(&[Step::Read(1), Step::Send(1000), Step::Reset])?;
        let socket = peer.dial(&script)?;
        put(&socket, b"x")?;
        wait_for(&socket, PollFlags::empty(), Duration::from_secs(4))?;
        all += usize::from(drain(&socket) == whole);
    }
    seen.note("20 times all of it", all == 20);
    Ok(())
}

fn by_unread(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let (_script, socket) = begun(peer, &[Step::AwaitUnread(1000), Step::Close])?;
    put(&socket, &pattern(0, 1000))?;
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    seen.note("recv", drain(&socket));
    Ok(())
}

fn after_our_end(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let (_script, socket) = begun(peer, &[Step::ReadToEnd, Step::Reset])?;
    seen.call("shutdown", socket.shutdown(Shutdown::Write));
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    seen.note("recv", drain(&socket));
    Ok(())
}

fn after_their_end(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let (script, socket) = begun(peer, &[Step::ShutdownWrite, Step::Go, Step::Reset])?;
    seen.note("recv", drain(&socket));
    script.go()?;
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    let error = sys::option(&socket, libc::SOL_SOCKET, libc::SO_ERROR)?;
    seen.note("SO_ERROR", errno_of(error));
    let sent = sys::send(&socket, b"x", libc::MSG_NOSIGNAL);
    seen.call("send", sent);
    Ok(())
}

fn state(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = reset(peer)?;
    settled(&socket, PollFlags::POLLHUP)?;
    seen.note("state", tcp_state(&socket)?);
    seen.call("shutdown", socket.shutdown(Shutdown::Both));
    seen.call("AF_UNSPEC", sys::disconnect(&socket));
    let script = peer.script(&[Step::Echo])?;
    seen.call("connect", peer.connect(&socket, script.addr()));
    let error = sys::option(&socket, libc::SOL_SOCKET, libc::SO_ERROR)?;
    seen.note("SO_ERROR", errno_of(error));
    Ok(())
}

fn ours(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let (script, socket) = begun(peer, &[Step::ReadToEnd])?;
    socket.set_linger(Some(Duration::ZERO))?;
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

/// How the peer's last read ended: how much came before depends on the moment.
fn peers_end(seen: &mut Seen, script: &Script<'_>) -> anyhow::Result<()> {
    let lines = script.report()?;
    let last = lines.last().map_or("", String::as_str);
    seen.note("peer's end", last.rsplit(", then ").next().unwrap_or(""));
    Ok(())
}

fn ours_with_data(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let (script, socket) = begun(peer, &[Step::ReadSlowly(10_000, 1)])?;
    put(&socket, &pattern(0, 1_000_000))?;
    socket.set_linger(Some(Duration::ZERO))?;
    drop(socket);
    peers_end(seen, &script)
}

fn ours_by_unread(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let (script, socket) = begun(peer, &[Step::Send(1000), Step::ReadToEnd])?;
    await_unread(&socket, 1000)?;
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

fn ours_by_unspec(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let (script, socket) = begun(peer, &[Step::ReadToEnd])?;
    seen.call("AF_UNSPEC", sys::disconnect(&socket));
    seen.peer(script.report()?);
    Ok(())
}

fn ours_at_exit(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let (script, socket) = begun(peer, &[Step::Send(1000), Step::ReadToEnd])?;
    await_unread(&socket, 1000)?;
    let child = sys::fork(|| {
        loop {
            std::thread::park();
        }
    })?;
    // Now only the child has it.
    drop(socket);
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
    seen.note("the child", sys::wait(child)?);
    seen.peer(script.report()?);
    Ok(())
}

fn sigpipe(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = reset(peer)?;
    settled(&socket, PollFlags::POLLHUP)?;
    seen.note("recv", end(&socket));
    let sent = sys::send(&socket, b"x", libc::MSG_NOSIGNAL);
    seen.call("send without a signal", sent);
    let child = sys::fork(|| {
        let ready = sys::sigpipe_kills();
        let sent = sys::send(&socket, b"x", 0);
        i32::from(ready.is_err() || sent.is_err())
    })?;
    seen.note("the child that writes", sys::wait(child)?);
    Ok(())
}
