//! What poll(2) and epoll(7) say, and when.

use std::time::{Duration, Instant};

use crate::conformance::sys::PollFlags;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::Socket;

use crate::conformance::client::{Peer, await_unread, events_now, settled, wait_for};
use crate::conformance::seen::{epoll_names, pattern, poll_names};
use crate::conformance::stream::take;
use crate::conformance::wire::Step;
use crate::conformance::{Case, Seen, sys};

pub const CASES: &[Case] = &[
    Case::new(
        "poll_life",
        "poll through a connection's life: new, connected, data, read, end",
        poll_life,
    ),
    Case::new(
        "epoll_level",
        "level-triggered: an event for as long as there is data",
        level,
    ),
    Case::new(
        "epoll_edge",
        "edge-triggered: an event for each arrival, none without",
        edge,
    ),
    Case::new(
        "epoll_edge_ends",
        "edge-triggered: data, the end, the reset",
        edge_ends,
    ),
    Case::new(
        "epoll_one_shot",
        "EPOLLONESHOT: one event until it is armed again",
        one_shot,
    ),
    Case::new(
        "epoll_connect",
        "edge-triggered: a connect that comes about",
        connecting,
    ),
    Case::new(
        "epoll_refused",
        "edge-triggered: a connect that is refused",
        refused,
    ),
    Case::new(
        "receive_low_water",
        "SO_RCVLOWAT: readable only when so much is there",
        low_water,
    ),
    Case::new(
        "poll_writable_again",
        "not writable while the peer does not read, writable afterwards",
        writable_again,
    ),
    Case::new(
        "receive_timeout",
        "SO_RCVTIMEO: EAGAIN after the time",
        receive_timeout,
    ),
    Case::new(
        "send_timeout",
        "SO_SNDTIMEO: EAGAIN when the peer does not read",
        send_timeout,
    ),
];

const LIMIT: Duration = Duration::from_secs(5);

fn watch(socket: &Socket, flags: EpollFlags) -> anyhow::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(socket, EpollEvent::new(flags, 0))?;
    Ok(epoll)
}

/// One event within `ms` milliseconds.
fn next(epoll: &Epoll, ms: u16) -> anyhow::Result<EpollFlags> {
    let mut events = [EpollEvent::empty()];
    let n = epoll.wait(&mut events, EpollTimeout::from(ms))?;
    let flags = if n == 1 {
        events[0].events()
    } else {
        EpollFlags::empty()
    };
    Ok(flags)
}

/// All events until `wanted` were among them and no more come.
fn all(epoll: &Epoll, wanted: EpollFlags) -> anyhow::Result<String> {
    let deadline = Instant::now() + LIMIT;
    let mut union = EpollFlags::empty();
    loop {
        let flags = next(epoll, 100)?;
        union |= flags;
        if (flags.is_empty() && union.contains(wanted)) || Instant::now() > deadline {
            return Ok(epoll_names(union));
        }
    }
}

fn all_flags() -> EpollFlags {
    EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI
}

fn poll_life(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [Step::Go, Step::Send(3), Step::Go, Step::Close];
    let script = peer.script(&steps)?;
    let socket = peer.tcp()?;
    seen.note("new", settled(&socket, PollFlags::empty())?);
    peer.connect(&socket, script.addr())?;
    seen.note("connected", settled(&socket, PollFlags::POLLOUT)?);
    script.go()?;
    seen.note("data", settled(&socket, PollFlags::POLLIN)?);
    seen.note("recv", take(&socket, 3));
    seen.note("read", settled(&socket, PollFlags::POLLOUT)?);
    script.go()?;
    seen.note("end", settled(&socket, PollFlags::POLLRDHUP)?);
    Ok(())
}

fn level(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(10), Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    await_unread(&socket, 10)?;
    let epoll = watch(&socket, all_flags())?;
    for what in ["10 bytes", "5 bytes", "none"] {
        seen.note(what, epoll_names(next(&epoll, 1000)?));
        if what != "none" {
            seen.note("recv", take(&socket, 5));
        }
    }
    Ok(())
}

fn edge(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [Step::Send(10), Step::Go, Step::Send(10), Step::ReadToEnd];
    let script = peer.script(&steps)?;
    let socket = peer.dial(&script)?;
    await_unread(&socket, 10)?;
    let epoll = watch(&socket, all_flags() | EpollFlags::EPOLLET)?;
    seen.note("at first", all(&epoll, EpollFlags::EPOLLIN)?);
    seen.note("recv", take(&socket, 5));
    seen.note("without an arrival", epoll_names(next(&epoll, 100)?));
    script.go()?;
    seen.note("at an arrival", all(&epoll, EpollFlags::EPOLLIN)?);
    await_unread(&socket, 15)?;
    seen.note("recv", take(&socket, 15));
    Ok(())
}

fn edge_ends(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [
        Step::Go,
        Step::Send(3),
        Step::Go,
        Step::ShutdownWrite,
        Step::Go,
        Step::Reset,
    ];
    let script = peer.script(&steps)?;
    let socket = peer.dial(&script)?;
    let epoll = watch(&socket, all_flags() | EpollFlags::EPOLLET)?;
    for (what, wanted) in [
        ("connected", EpollFlags::EPOLLOUT),
        ("data", EpollFlags::EPOLLIN),
        ("end", EpollFlags::EPOLLRDHUP),
        ("reset", EpollFlags::EPOLLHUP),
    ] {
        seen.note(what, all(&epoll, wanted)?);
        script.go()?;
    }
    Ok(())
}

fn one_shot(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(3), Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    await_unread(&socket, 3)?;
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
    let epoll = watch(&socket, flags)?;
    seen.note("first", epoll_names(next(&epoll, 1000)?));
    seen.note("second", epoll_names(next(&epoll, 50)?));
    epoll.modify(&socket, &mut EpollEvent::new(flags, 0))?;
    seen.note("armed again", epoll_names(next(&epoll, 1000)?));
    Ok(())
}

fn connecting(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    socket.set_nonblocking(true)?;
    seen.call("connect", peer.connect(&socket, script.addr()));
    let epoll = watch(&socket, all_flags() | EpollFlags::EPOLLET)?;
    seen.note("events", all(&epoll, EpollFlags::EPOLLOUT)?);
    Ok(())
}

fn refused(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let socket = peer.tcp()?;
    socket.set_nonblocking(true)?;
    seen.call("connect", peer.connect(&socket, peer.closed_port()));
    let epoll = watch(&socket, all_flags() | EpollFlags::EPOLLET)?;
    seen.note("events", all(&epoll, EpollFlags::EPOLLOUT)?);
    seen.call("recv", sys::recv(&socket, &mut [0; 1], 0));
    Ok(())
}

fn low_water(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [Step::Send(50), Step::Go, Step::Send(50), Step::ReadToEnd];
    let script = peer.script(&steps)?;
    let socket = peer.dial(&script)?;
    sys::set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 100)?;
    await_unread(&socket, 50)?;
    let now = events_now(&socket, PollFlags::POLLIN)?;
    seen.note("50 bytes", poll_names(now));
    script.go()?;
    let then = wait_for(&socket, PollFlags::POLLIN, LIMIT)?;
    seen.note("100 bytes", poll_names(then));
    seen.call("recv", sys::recv(&socket, &mut [0; 200], 0));
    Ok(())
}

/// Writes until the kernel takes no more; returns how much it took.
pub fn fill(socket: &Socket) -> anyhow::Result<usize> {
    socket.set_nonblocking(true)?;
    let mut total = 0;
    let mut quiet_since = Instant::now();
    loop {
        let chunk = pattern(total, 16_384);
        match sys::send(socket, &chunk, libc::MSG_NOSIGNAL) {
            Ok(n) => {
                total += n;
                quiet_since = Instant::now();
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                // What the network takes may make room again for a moment.
                if quiet_since.elapsed() > Duration::from_millis(300) {
                    return Ok(total);
                }
                // Until it has been quiet for so long: nothing tells that no more room will come.
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn writable_again(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let mut tcp = peer.plain(&[Step::Go, Step::ReadToEnd]);
    tcp.receive_buffer = Some(65_536);
    let script = peer.serve(tcp)?;
    let socket = peer.dial(&script)?;
    let total = fill(&socket)?;
    let now = events_now(&socket, PollFlags::POLLOUT)?;
    seen.note("full", poll_names(now));
    script.go()?;
    let then = wait_for(&socket, PollFlags::POLLOUT, LIMIT)?;
    seen.note("drained", poll_names(then));
    socket.set_nonblocking(false)?;
    drop(socket);
    // How much fits is the network's affair; that all of it arrives is not.
    let expected = format!("read {}, then the end", pattern_digest(total));
    seen.note("all of it arrived", script.report()? == [expected]);
    Ok(())
}

fn pattern_digest(total: usize) -> String {
    crate::conformance::seen::digest(&pattern(0, total))
}

fn receive_timeout(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Go, Step::Send(5), Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    let limit = Duration::from_millis(150);
    socket.set_read_timeout(Some(limit))?;
    let began = Instant::now();
    seen.call("recv", sys::recv(&socket, &mut [0; 5], 0));
    seen.note("it took its time", began.elapsed() > limit * 9 / 10);
    socket.set_read_timeout(Some(LIMIT))?;
    script.go()?;
    seen.note("recv", take(&socket, 5));
    Ok(())
}

fn send_timeout(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let mut tcp = peer.plain(&[Step::Go, Step::ReadToEnd]);
    tcp.receive_buffer = Some(65_536);
    let script = peer.serve(tcp)?;
    let socket = peer.dial(&script)?;
    socket.set_write_timeout(Some(Duration::from_millis(300)))?;
    let mut total = 0;
    let error = loop {
        match sys::send(&socket, &pattern(total, 65_536), libc::MSG_NOSIGNAL) {
            Ok(n) => total += n,
            Err(error) => break error,
        }
    };
    seen.note("send", crate::conformance::seen::errno_name(&error));
    script.go()?;
    drop(socket);
    let expected = format!("read {}, then the end", pattern_digest(total));
    seen.note("all of it arrived", script.report()? == [expected]);
    Ok(())
}
