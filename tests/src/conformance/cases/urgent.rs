//! Urgent data: that it does not corrupt the stream, and whether it arrives as such.

use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;

use crate::conformance::sys::PollFlags;

use crate::conformance::client::{Peer, await_unread, wait_for};
use crate::conformance::seen::{pattern, poll_names};
use crate::conformance::stream::{around_mark, put, take};
use crate::conformance::wire::Step;
use crate::conformance::{Case, Seen, sys};

pub const CASES: &[Case] = &[
    Case::new(
        "urgent_sent_stream",
        "sends an urgent byte amid others: the peer's stream is right",
        sent_stream,
    ),
    Case::new(
        "urgent_sent_byte",
        "sends an urgent byte: the peer reads it out of band",
        sent_byte,
    ),
    Case::new(
        "urgent_received_stream",
        "the peer sends an urgent byte amid others: the stream is right",
        received_stream,
    ),
    Case::new(
        "urgent_received_byte",
        "the peer sends an urgent byte: POLLPRI, SIOCATMARK, MSG_OOB",
        received_byte,
    ),
    Case::new(
        "urgent_inline",
        "the same with SO_OOBINLINE: the byte is in the stream",
        inline,
    ),
    Case::new(
        "urgent_sent_mark",
        "sends an urgent byte amid 60,000 others: where the peer finds the mark",
        sent_mark,
    ),
    Case::new(
        "urgent_received_mark",
        "the same from the peer",
        received_mark,
    ),
    Case::new(
        "urgent_twice",
        "the peer sends an urgent byte, and another when the first was read",
        twice,
    ),
    Case::new(
        "urgent_signal",
        "the peer sends an urgent byte: SIGURG",
        signal,
    ),
    Case::new(
        "urgent_none",
        "MSG_OOB and SIOCATMARK without urgent data",
        none,
    ),
];

fn sent_stream(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    put(&socket, b"before")?;
    seen.call("send urgent", sys::send(&socket, b"!", libc::MSG_OOB));
    put(&socket, b"after")?;
    drop(socket);
    // Not in line, so the byte is not among them.
    seen.peer(script.report()?);
    Ok(())
}

fn sent_byte(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadUrgent])?;
    let socket = peer.dial(&script)?;
    put(&socket, b"before")?;
    seen.call("send urgent", sys::send(&socket, b"!", libc::MSG_OOB));
    seen.peer(script.report()?);
    Ok(())
}

fn urgent_peer() -> [Step; 4] {
    [
        Step::Say(b"before".to_vec()),
        Step::SayUrgent(b"!".to_vec()),
        Step::Say(b"after".to_vec()),
        Step::ReadToEnd,
    ]
}

fn received_stream(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&urgent_peer())?;
    let socket = peer.dial(&script)?;
    seen.note("recv", take(&socket, 11));
    Ok(())
}

fn received_byte(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&urgent_peer())?;
    let socket = peer.dial(&script)?;
    let limit = std::time::Duration::from_secs(1);
    // Where there is no mark, there is less to read than is asked for below.
    socket.set_read_timeout(Some(limit))?;
    let events = wait_for(&socket, PollFlags::POLLPRI, limit)?;
    seen.note("poll", poll_names(events));
    let mut byte = [0; 1];
    seen.call("recv urgent", sys::recv(&socket, &mut byte, libc::MSG_OOB));
    seen.note("the byte", char::from(byte[0]));
    // A read ends at the mark.
    let mut bytes = [0; 20];
    seen.call("recv", sys::recv(&socket, &mut bytes, 0));
    seen.call("at the mark", sys::ioctl_int(&socket, sys::SIOCATMARK));
    seen.note("recv", take(&socket, 5));
    seen.call("at the mark", sys::ioctl_int(&socket, sys::SIOCATMARK));
    Ok(())
}

fn inline(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&urgent_peer())?;
    let socket = peer.tcp()?;
    sys::set_option(&socket, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1)?;
    peer.connect(&socket, script.addr())?;
    let whole =
        crate::conformance::peer::wait_until(|| crate::conformance::peer::unread(&socket) >= 11);
    seen.note("all has come", whole);
    socket.set_read_timeout(Some(std::time::Duration::from_secs(1)))?;
    let mut bytes = [0; 20];
    seen.call("recv", sys::recv(&socket, &mut bytes, 0));
    seen.call("at the mark", sys::ioctl_int(&socket, sys::SIOCATMARK));
    seen.note("recv", take(&socket, 5));
    Ok(())
}

/// Bytes before the urgent one and behind it: more than one read, less than a socket holds that nobody reads.
const MANY: usize = 30_000;

fn sent_mark(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadAroundMark])?;
    let socket = peer.dial(&script)?;
    put(&socket, &pattern(0, MANY))?;
    seen.call("send urgent", sys::send(&socket, b"!", libc::MSG_OOB));
    put(&socket, &pattern(0, MANY))?;
    socket.shutdown(std::net::Shutdown::Write)?;
    seen.peer(script.report()?);
    Ok(())
}

fn received_mark(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[
        Step::Send(MANY),
        Step::SayUrgent(b"!".to_vec()),
        Step::Send(MANY),
        Step::ShutdownWrite,
        Step::ReadToEnd,
    ])?;
    let socket = peer.dial(&script)?;
    seen.note("read", around_mark(&socket)?);
    Ok(())
}

fn twice(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[
        Step::Say(b"one".to_vec()),
        Step::SayUrgent(b"1".to_vec()),
        Step::Go,
        Step::Say(b"two".to_vec()),
        Step::SayUrgent(b"2".to_vec()),
        Step::ReadToEnd,
    ])?;
    let socket = peer.dial(&script)?;
    let limit = Duration::from_secs(4);
    socket.set_read_timeout(Some(limit))?;
    for first in [true, false] {
        let events = wait_for(&socket, PollFlags::POLLPRI, limit)?;
        seen.note("poll", poll_names(events));
        let mut byte = [0; 1];
        seen.call("recv urgent", sys::recv(&socket, &mut byte, libc::MSG_OOB));
        seen.note("the byte", char::from(byte[0]));
        seen.note("recv", take(&socket, 3));
        seen.call("at the mark", sys::ioctl_int(&socket, sys::SIOCATMARK));
        if first {
            script.go()?;
        }
    }
    Ok(())
}

fn signal(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Go, Step::SayUrgent(b"!".to_vec()), Step::ReadToEnd])?;
    let mut urgent = SigSet::empty();
    urgent.add(Signal::SIGURG);
    // One that is blocked is kept, though by default it would be ignored.
    urgent.thread_block()?;
    let signals = SignalFd::new(&urgent)?;
    let socket = peer.dial(&script)?;
    sys::own(&socket)?;
    script.go()?;
    let events = wait_for(&signals, PollFlags::POLLIN, Duration::from_secs(4))?;
    seen.note("SIGURG", poll_names(events));
    Ok(())
}

fn none(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(3), Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    await_unread(&socket, 3)?;
    seen.call("at the mark", sys::ioctl_int(&socket, sys::SIOCATMARK));
    let mut byte = [0; 1];
    let read = sys::recv(&socket, &mut byte, libc::MSG_OOB | libc::MSG_DONTWAIT);
    seen.call("recv urgent", read);
    seen.note("recv", take(&socket, 3));
    Ok(())
}
