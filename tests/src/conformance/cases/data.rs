//! Bytes: that they arrive as they were sent, however they are sent and read.

use std::io::IoSlice;

use crate::conformance::sys::PollFlags;
use anyhow::Context;

use super::readiness::fill;
use crate::conformance::client::{Peer, await_unread, wait_for};
use crate::conformance::seen::{digest, pattern};
use crate::conformance::stream::{drain, put, take};
use crate::conformance::wire::Step;
use crate::conformance::{Case, Seen, sys};

/// A large transfer.
const LARGE: usize = 64 << 20;

pub const CASES: &[Case] = &[
    Case::new("peek", "MSG_PEEK: the bytes stay", peek),
    Case::new("wait_all", "MSG_WAITALL over two arrivals", wait_all),
    Case::new(
        "wait_all_cut_short",
        "MSG_WAITALL and the end: what there is",
        wait_all_cut_short,
    ),
    Case::new("dont_wait", "MSG_DONTWAIT: EAGAIN, then data", dont_wait),
    Case::new(
        "discard",
        "MSG_TRUNC on TCP: bytes are thrown away",
        discard,
    ),
    Case::new("unread_count", "FIONREAD", unread_count),
    Case::new("unsent_count", "SIOCOUTQ falls to 0", unsent_count),
    Case::new("zero_length", "send and recv of nothing", zero_length),
    Case::new("vectors", "writev and readv", vectors),
    Case::new(
        "many_vectors",
        "sendmsg with 1024 pieces; 1025 are EMSGSIZE",
        many_vectors,
    ),
    Case::new("tiny_writes", "10,000 writes of one byte", tiny_writes),
    Case::new("message_boundaries", "MSG_MORE, then a write without", more),
    Case::new("cork", "TCP_CORK, and pulling it", cork),
    Case::new("large_write", "64 MiB go out", large_write).heavy(),
    Case::new("large_read", "64 MiB come in", large_read).heavy(),
    Case::new(
        "full_duplex",
        "8 MiB go out and come back at the same time",
        full_duplex,
    ),
    Case::new(
        "slow_reader",
        "the peer reads slowly: the sender waits, nothing is lost",
        slow_reader,
    ),
    Case::new(
        "send_until_full",
        "writes until EAGAIN, then the peer reads: all of it arrives",
        send_until_full,
    ),
    Case::new(
        "request_response",
        "1,000 requests and answers",
        request_response,
    ),
];

fn peek(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(10), Step::Close])?;
    let socket = peer.dial(&script)?;
    await_unread(&socket, 10)?;
    for length in [4, 10] {
        let mut bytes = vec![0; length];
        let n = sys::recv(&socket, &mut bytes, libc::MSG_PEEK)?;
        seen.note("peek", digest(&bytes[..n]));
    }
    seen.note("recv", drain(&socket));
    Ok(())
}

fn wait_all(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [Step::Send(40), Step::Go, Step::Send(60), Step::ReadToEnd];
    let script = peer.script(&steps)?;
    let socket = peer.dial(&script)?;
    await_unread(&socket, 40)?;
    let read = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut bytes = [0; 100];
            let n = sys::recv(&socket, &mut bytes, libc::MSG_WAITALL);
            n.map(|n| digest(&bytes[..n]))
        });
        script.go()?;
        reader.join().map_err(|_| anyhow::anyhow!("a panic"))
    })?;
    seen.call("recv", read);
    Ok(())
}

fn wait_all_cut_short(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(40), Step::Close])?;
    let socket = peer.dial(&script)?;
    let mut bytes = [0; 100];
    seen.call("recv", sys::recv(&socket, &mut bytes, libc::MSG_WAITALL));
    seen.call("recv", sys::recv(&socket, &mut bytes, libc::MSG_WAITALL));
    Ok(())
}

fn dont_wait(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Go, Step::Send(5), Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    let mut bytes = [0; 10];
    seen.call("recv", sys::recv(&socket, &mut bytes, libc::MSG_DONTWAIT));
    script.go()?;
    await_unread(&socket, 5)?;
    seen.call("recv", sys::recv(&socket, &mut bytes, libc::MSG_DONTWAIT));
    seen.call("send", sys::send(&socket, b"x", libc::MSG_DONTWAIT));
    Ok(())
}

fn discard(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(100), Step::Close])?;
    let socket = peer.dial(&script)?;
    await_unread(&socket, 100)?;
    seen.call("discard", sys::discard(&socket, 60));
    seen.note("recv", drain(&socket));
    Ok(())
}

fn unread_count(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(1000), Step::Close])?;
    let socket = peer.dial(&script)?;
    wait_for(
        &socket,
        PollFlags::POLLRDHUP,
        std::time::Duration::from_secs(5),
    )?;
    await_unread(&socket, 1000)?;
    seen.call("FIONREAD", sys::ioctl_int(&socket, libc::FIONREAD));
    seen.note("recv", take(&socket, 300));
    seen.call("FIONREAD", sys::ioctl_int(&socket, libc::FIONREAD));
    seen.note("recv", drain(&socket));
    seen.call("FIONREAD", sys::ioctl_int(&socket, libc::FIONREAD));
    Ok(())
}

fn unsent_count(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    put(&socket, b"hello")?;
    seen.note("echo", take(&socket, 5));
    let gone = crate::conformance::peer::wait_until(|| {
        sys::ioctl_int(&socket, libc::TIOCOUTQ).is_ok_and(|n| n == 0)
    });
    seen.note("SIOCOUTQ falls to 0", gone);
    Ok(())
}

fn zero_length(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    seen.call("send", sys::send(&socket, b"", 0));
    seen.call("recv", sys::recv(&socket, &mut [], libc::MSG_DONTWAIT));
    put(&socket, b"hello")?;
    await_unread(&socket, 5)?;
    seen.call("recv", sys::recv(&socket, &mut [], 0));
    seen.note("echo", take(&socket, 5));
    Ok(())
}

fn vectors(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    use std::io::{Read, Write};
    let script = peer.script(&[Step::Echo])?;
    let mut socket = peer.dial(&script)?;
    let pieces = [&b"one"[..], b"", b"three", b"seven!!"].map(IoSlice::new);
    seen.call("writev", socket.write_vectored(&pieces));
    await_unread(&socket, 15)?;
    let (mut one, mut two) = ([0; 4], [0; 20]);
    let mut slices = [
        std::io::IoSliceMut::new(&mut one),
        std::io::IoSliceMut::new(&mut two),
    ];
    seen.call("readv", socket.read_vectored(&mut slices));
    seen.note("first", digest(&one));
    seen.note("second", digest(&two[..11]));
    Ok(())
}

fn many_vectors(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    let bytes = pattern(0, 1025 * 7);
    let pieces: Vec<IoSlice<'_>> = bytes.chunks(7).map(IoSlice::new).collect();
    let sent = socket.send_vectored_with_flags(&pieces[..1024], libc::MSG_NOSIGNAL);
    seen.call("sendmsg", sent);
    let sent = socket.send_vectored_with_flags(&pieces, libc::MSG_NOSIGNAL);
    seen.call("sendmsg of one more", sent);
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

fn tiny_writes(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd, Step::Send(3), Step::Close])?;
    let socket = peer.dial(&script)?;
    socket.set_tcp_nodelay(true)?;
    for byte in pattern(0, 10_000) {
        let n = sys::send(&socket, &[byte], 0)?;
        anyhow::ensure!(n == 1, "a byte was not taken");
    }
    socket.shutdown(std::net::Shutdown::Write)?;
    seen.note("recv", drain(&socket));
    seen.peer(script.report()?);
    Ok(())
}

fn more(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    for piece in [b"one ", b"two "] {
        seen.call("send", sys::send(&socket, piece, libc::MSG_MORE));
    }
    seen.call("send", sys::send(&socket, b"end", 0));
    seen.note("echo", take(&socket, 11));
    Ok(())
}

fn cork(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    sys::set_option(&socket, libc::IPPROTO_TCP, libc::TCP_CORK, 1)?;
    for piece in [b"one ", b"two "] {
        put(&socket, piece)?;
    }
    let echoed = wait_for(
        &socket,
        PollFlags::POLLIN,
        std::time::Duration::from_millis(50),
    )?;
    seen.note("corked", crate::conformance::seen::poll_names(echoed));
    sys::set_option(&socket, libc::IPPROTO_TCP, libc::TCP_CORK, 0)?;
    seen.note("echo", take(&socket, 8));
    Ok(())
}

fn large_write(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::ReadToEnd])?;
    let socket = peer.dial(&script)?;
    seen.call("send", put(&socket, &pattern(0, LARGE)));
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

fn large_read(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Send(LARGE), Step::Close])?;
    let socket = peer.dial(&script)?;
    seen.note("recv", drain(&socket));
    Ok(())
}

fn full_duplex(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    let read = std::thread::scope(|scope| -> anyhow::Result<String> {
        let reader = scope.spawn(|| drain(&socket));
        put(&socket, &pattern(0, 8 << 20))?;
        socket.shutdown(std::net::Shutdown::Write)?;
        reader.join().ok().context("a panic")
    })?;
    seen.note("echo", read);
    Ok(())
}

fn slow_reader(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let mut tcp = peer.plain(&[Step::ReadSlowly(65_536, 2)]);
    tcp.receive_buffer = Some(65_536);
    let script = peer.serve(tcp)?;
    let socket = peer.dial(&script)?;
    seen.call("send", put(&socket, &pattern(0, 8 << 20)));
    drop(socket);
    seen.peer(script.report()?);
    Ok(())
}

fn send_until_full(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let mut tcp = peer.plain(&[Step::Go, Step::ReadToEnd]);
    tcp.receive_buffer = Some(65_536);
    let script = peer.serve(tcp)?;
    let socket = peer.dial(&script)?;
    let total = fill(&socket)?;
    seen.call("send", sys::send(&socket, b"x", libc::MSG_DONTWAIT));
    // Back-pressure reaches the application: not everything fits.
    seen.note("at most 64 MiB", total < 64 << 20);
    script.go()?;
    drop(socket);
    let expected = format!("read {}, then the end", digest(&pattern(0, total)));
    seen.note("all of it arrived", script.report()? == [expected]);
    Ok(())
}

fn request_response(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    let mut right = 0;
    for number in 0..1000 {
        let request = pattern(number * 100, 100);
        put(&socket, &request)?;
        right += usize::from(take(&socket, 100) == digest(&request));
    }
    seen.note("right answers", right);
    Ok(())
}
