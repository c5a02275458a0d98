//! Connections that end in order.

use std::net::Shutdown;
use std::time::Duration;

use crate::conformance::sys::PollFlags;

use super::options::tcp_state;
use crate::conformance::client::{Peer, await_unread, settled};
use crate::conformance::seen::{errno_name, pattern};
use crate::conformance::stream::{drain, put, take};
use crate::conformance::wire::Step;
use crate::conformance::{Case, Seen, sys};

pub const CASES: &[Case] = &[
    Case::new(
        "end_ours_first",
        "ends its direction, then reads 100 kB and the end",
        ours_first,
    ),
    Case::new(
        "end_theirs_first",
        "the peer ends its direction; 100 kB still go there",
        theirs_first,
    ),
    Case::new(
        "end_after_data",
        "1 MB, then the end: all of it arrives before",
        after_data,
    ),
    Case::new("end_without_data", "the peer closes at once", without_data),
    Case::new("end_read_twice", "the end stays the end", read_twice),
    Case::new("end_both", "both directions end: poll says HUP", both),
    Case::new(
        "end_simultaneous",
        "both ends end at the same time",
        simultaneous,
    ),
    Case::new(
        "end_shutdown_read",
        "shutdown(SHUT_RD): the end at once, and what comes later",
        shutdown_read,
    ),
    Case::new(
        "end_shutdown_both",
        "shutdown(SHUT_RDWR): nothing goes out, the peer sees the end",
        shutdown_both,
    ),
    Case::new(
        "end_shutdown_twice",
        "shutdown again, before and after the peer's end",
        shutdown_twice,
    ),
    Case::new(
        "end_write_to_closed",
        "writes to a peer that has closed: EPIPE in the end",
        write_to_closed,
    ),
    Case::new(
        "end_peer_writes_to_closed",
        "the peer writes to a socket that is closed: EPIPE at its end",
        peer_writes_to_closed,
    ),
    Case::new(
        "end_linger",
        "SO_LINGER with time: close waits until the data is out",
        linger,
    ),
    Case::new(
        "end_close_with_data_under_way",
        "1 MB and close: all of it arrives",
        close_with_data,
    ),
];

fn ours_first(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [Step::ReadToEnd, Step::Go, Step::Send(100_000), Step::Close];
    let script = peer.script(&steps)?;
    let socket = peer.dial(&script)?;
    put(&socket, &pattern(0, 50_000))?;
    seen.call("shutdown", socket.shutdown(Shutdown::Write));
    let sent = sys::send(&socket, b"x", libc::MSG_NOSIGNAL);
    seen.call("send", sent);
    seen.note("poll", settled(&socket, PollFlags::POLLOUT)?);
    script.go()?;
    seen.note("recv", drain(&socket));
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    seen.peer(script.report()?);
    Ok(())
}

fn theirs_first(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [Step::Send(5), Step::ShutdownWrite, Step::ReadToEnd];
    let script = peer.script(&steps)?;
    let socket = peer.dial(&script)?;
    seen.note("poll", settled(&socket, PollFlags::POLLRDHUP)?);
    seen.note("state", tcp_state(&socket)?);
    seen.note("recv", drain(&socket));
    seen.note("poll", settled(&socket, PollFlags::POLLRDHUP)?);
    seen.call("send", put(&socket, &pattern(0, 100_000)));
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

fn after_data(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(1_000_000), Step::Close])?;
    let socket = peer.dial(&script)?;
    seen.note("recv", drain(&socket));
    Ok(())
}

fn without_data(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Close])?;
    let socket = peer.dial(&script)?;
    seen.note("poll", settled(&socket, PollFlags::POLLRDHUP)?);
    seen.note("recv", drain(&socket));
    seen.note("state", tcp_state(&socket)?);
    Ok(())
}

fn read_twice(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(5), Step::Close])?;
    let socket = peer.dial(&script)?;
    seen.note("recv", drain(&socket));
    for flags in [0, 0, libc::MSG_PEEK, libc::MSG_DONTWAIT] {
        seen.call("recv again", sys::recv(&socket, &mut [0; 5], flags));
    }
    Ok(())
}

fn both(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd, Step::Close])?;
    let socket = peer.dial(&script)?;
    seen.call("shutdown", socket.shutdown(Shutdown::Write));
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    seen.note("recv", drain(&socket));
    let sent = sys::send(&socket, b"x", libc::MSG_NOSIGNAL);
    seen.call("send", sent);
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    Ok(())
}

fn simultaneous(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [
        Step::Read(1),
        Step::Go,
        Step::ShutdownWrite,
        Step::ReadToEnd,
    ];
    let script = peer.script(&steps)?;
    let socket = peer.dial(&script)?;
    put(&socket, b"x")?;
    script.go()?;
    seen.call("shutdown", socket.shutdown(Shutdown::Write));
    seen.note("recv", drain(&socket));
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    seen.peer(script.report()?);
    Ok(())
}

fn shutdown_read(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [
        Step::Read(1),
        Step::Go,
        Step::Send(10),
        Step::Read(1),
        Step::Close,
    ];
    let script = peer.script(&steps)?;
    let socket = peer.dial(&script)?;
    put(&socket, b"x")?;
    seen.call("shutdown", socket.shutdown(Shutdown::Read));
    seen.note("poll", settled(&socket, PollFlags::POLLIN)?);
    seen.call("recv", sys::recv(&socket, &mut [0; 5], 0));
    script.go()?;
    await_unread(&socket, 10)?;
    seen.note("recv what came later", take(&socket, 10));
    seen.call("recv", sys::recv(&socket, &mut [0; 5], 0));
    seen.call("send", put(&socket, b"y"));
    seen.peer(script.report()?);
    Ok(())
}

fn shutdown_both(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd, Step::Close])?;
    let socket = peer.dial(&script)?;
    put(&socket, b"hello")?;
    seen.call("shutdown", socket.shutdown(Shutdown::Both));
    let sent = sys::send(&socket, b"x", libc::MSG_NOSIGNAL);
    seen.call("send", sent);
    seen.call("recv", sys::recv(&socket, &mut [0; 5], 0));
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    seen.peer(script.report()?);
    Ok(())
}

fn shutdown_twice(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [Step::ReadToEnd, Step::Go, Step::Close];
    let script = peer.script(&steps)?;
    let socket = peer.dial(&script)?;
    for _ in 0..2 {
        seen.call("shutdown", socket.shutdown(Shutdown::Write));
    }
    script.go()?;
    seen.note("recv", drain(&socket));
    // Its state is that of a connection that both ends have ended.
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    seen.call("shutdown", socket.shutdown(Shutdown::Both));
    Ok(())
}

/// Sends until it fails; says how.
fn send_until_error(socket: &socket2::Socket) -> String {
    loop {
        if let Err(error) = sys::send(socket, &[7; 100], libc::MSG_NOSIGNAL) {
            return errno_name(&error);
        }
        // Gives the answer to what was sent time to come.
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn write_to_closed(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Read(1), Step::Close])?;
    let socket = peer.dial(&script)?;
    put(&socket, b"x")?;
    seen.note("recv", drain(&socket));
    seen.note("send", send_until_error(&socket));
    seen.note("poll", settled(&socket, PollFlags::POLLHUP)?);
    seen.note("recv", drain(&socket));
    Ok(())
}

fn peer_writes_to_closed(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [Step::ReadToEnd, Step::SendUntilError];
    let script = peer.script(&steps)?;
    let socket = peer.dial(&script)?;
    put(&socket, b"hello")?;
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

fn linger(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    socket.set_linger(Some(Duration::from_secs(5)))?;
    put(&socket, &pattern(0, 300_000))?;
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

fn close_with_data(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    put(&socket, &pattern(0, 1_000_000))?;
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}
