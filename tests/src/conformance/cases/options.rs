//! setsockopt(2), and what getsockopt(2) says after connect.

use socket2::Socket;

use crate::conformance::client::Peer;
use crate::conformance::seen::shown;
use crate::conformance::stream::{put, take};
use crate::conformance::wire::Step;
use crate::conformance::{Case, Seen, sys};

/// TCP_INFO's first byte is tcpi_state; the kernel's numbers.
const STATES: [&str; 13] = [
    "none",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "NEW_SYN_RECV",
];

pub const CASES: &[Case] = &[
    Case::new("option_nodelay", "TCP_NODELAY", |p, s| {
        set_before(p, s, &[("TCP_NODELAY", TCP, libc::TCP_NODELAY, 1)])
    }),
    Case::new(
        "option_keepalive",
        "SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT",
        |p, s| {
            let all = [
                ("SO_KEEPALIVE", SOCKET, libc::SO_KEEPALIVE, 1),
                ("TCP_KEEPIDLE", TCP, libc::TCP_KEEPIDLE, 33),
                ("TCP_KEEPINTVL", TCP, libc::TCP_KEEPINTVL, 11),
                ("TCP_KEEPCNT", TCP, libc::TCP_KEEPCNT, 5),
            ];
            set_before(p, s, &all)
        },
    ),
    Case::new("option_buffers", "SO_SNDBUF, SO_RCVBUF", |p, s| {
        let all = [
            ("SO_SNDBUF", SOCKET, libc::SO_SNDBUF, 50_000),
            ("SO_RCVBUF", SOCKET, libc::SO_RCVBUF, 60_000),
        ];
        set_before(p, s, &all)
    }),
    Case::new("option_user_timeout", "TCP_USER_TIMEOUT", |p, s| {
        set_before(
            p,
            s,
            &[("TCP_USER_TIMEOUT", TCP, libc::TCP_USER_TIMEOUT, 7000)],
        )
    }),
    Case::new("option_not_sent_lowat", "TCP_NOTSENT_LOWAT", |p, s| {
        set_before(
            p,
            s,
            &[("TCP_NOTSENT_LOWAT", TCP, libc::TCP_NOTSENT_LOWAT, 16_384)],
        )
    }),
    Case::new("option_quick_ack", "TCP_QUICKACK", |p, s| {
        set_after(p, s, &[("TCP_QUICKACK", TCP, libc::TCP_QUICKACK, 1)])
    }),
    Case::new("option_priority_mark", "SO_PRIORITY, SO_MARK", |p, s| {
        let all = [
            ("SO_PRIORITY", SOCKET, libc::SO_PRIORITY, 4),
            ("SO_MARK", SOCKET, libc::SO_MARK, 77),
        ];
        set_before(p, s, &all)
    }),
    Case::new(
        "option_service_ttl",
        "IP_TOS and IP_TTL, or IPV6_TCLASS and IPV6_UNICAST_HOPS",
        service_ttl,
    ),
    Case::new("option_linger_read_back", "SO_LINGER", linger),
    Case::new(
        "option_timeouts_read_back",
        "SO_RCVTIMEO, SO_SNDTIMEO",
        timeouts,
    ),
    Case::new(
        "option_congestion_default",
        "TCP_CONGESTION of a connection where nobody has set it",
        congestion_default,
    ),
    Case::new(
        "option_congestion_set",
        "TCP_CONGESTION set before connect",
        congestion_set,
    ),
    Case::new("option_segment", "TCP_MAXSEG of a connection", segment),
    Case::new("option_mtu", "IP_MTU or IPV6_MTU of a connection", mtu),
    Case::new(
        "option_all_later",
        "all that can be set after connect",
        |p, s| {
            let all = [
                ("TCP_NODELAY", TCP, libc::TCP_NODELAY, 1),
                ("SO_KEEPALIVE", SOCKET, libc::SO_KEEPALIVE, 1),
                ("TCP_KEEPIDLE", TCP, libc::TCP_KEEPIDLE, 44),
                ("TCP_USER_TIMEOUT", TCP, libc::TCP_USER_TIMEOUT, 9000),
                ("SO_RCVLOWAT", SOCKET, libc::SO_RCVLOWAT, 1),
                ("SO_OOBINLINE", SOCKET, libc::SO_OOBINLINE, 1),
                ("TCP_CORK", TCP, libc::TCP_CORK, 0),
            ];
            set_after(p, s, &all)
        },
    ),
    Case::new(
        "option_states",
        "TCP_INFO's state through a connection's life",
        states,
    ),
];

const TCP: i32 = libc::IPPROTO_TCP;
const SOCKET: i32 = libc::SOL_SOCKET;

type Setting = (&'static str, i32, i32, i32);

/// The state that TCP_INFO tells.
pub fn tcp_state(socket: &Socket) -> anyhow::Result<&'static str> {
    let info = sys::option_bytes(socket, TCP, libc::TCP_INFO, 8)?;
    let state = usize::from(*info.first().unwrap_or(&0));
    Ok(STATES.get(state).unwrap_or(&"unknown"))
}

fn set_before(peer: &Peer, seen: &mut Seen, all: &[Setting]) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    set(seen, &socket, all);
    seen.call("connect", peer.connect(&socket, script.addr()));
    get(seen, &socket, all);
    hello(seen, &socket)
}

fn set_after(peer: &Peer, seen: &mut Seen, all: &[Setting]) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    set(seen, &socket, all);
    get(seen, &socket, all);
    hello(seen, &socket)
}

fn set(seen: &mut Seen, socket: &Socket, all: &[Setting]) {
    for &(what, level, name, value) in all {
        let set = sys::set_option(socket, level, name, value);
        seen.call(&format!("set {what}"), set);
    }
}

fn get(seen: &mut Seen, socket: &Socket, all: &[Setting]) {
    for &(what, level, name, _) in all {
        seen.call(what, sys::option(socket, level, name));
    }
}

fn hello(seen: &mut Seen, socket: &Socket) -> anyhow::Result<()> {
    put(socket, b"hello")?;
    seen.note("echo", take(socket, 5));
    Ok(())
}

fn service_ttl(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let v4 = [
        ("IP_TOS", libc::IPPROTO_IP, libc::IP_TOS, 0x10),
        ("IP_TTL", libc::IPPROTO_IP, libc::IP_TTL, 77),
    ];
    let v6 = [
        ("IPV6_TCLASS", libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x10),
        (
            "IPV6_UNICAST_HOPS",
            libc::IPPROTO_IPV6,
            libc::IPV6_UNICAST_HOPS,
            77,
        ),
    ];
    set_before(peer, seen, if peer.socket6() { &v6 } else { &v4 })
}

fn linger(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    let value = std::time::Duration::from_secs(3);
    socket.set_linger(Some(value))?;
    peer.connect(&socket, script.addr())?;
    seen.note("SO_LINGER", socket.linger()? == Some(value));
    Ok(())
}

fn timeouts(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    let value = Some(std::time::Duration::from_secs(3));
    socket.set_read_timeout(value)?;
    socket.set_write_timeout(value)?;
    peer.connect(&socket, script.addr())?;
    seen.note("SO_RCVTIMEO", socket.read_timeout()? == value);
    seen.note("SO_SNDTIMEO", socket.write_timeout()? == value);
    Ok(())
}

fn congestion(socket: &Socket) -> String {
    let name = sys::option_bytes(socket, TCP, libc::TCP_CONGESTION, 16);
    let text = name.map(|n| {
        let end = n.iter().position(|b| *b == 0).unwrap_or(n.len());
        String::from_utf8_lossy(&n[..end]).into_owned()
    });
    shown(&text)
}

fn congestion_default(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    let before = congestion(&socket);
    peer.connect(&socket, script.addr())?;
    seen.note("stays what it was", congestion(&socket) == before);
    Ok(())
}

fn congestion_set(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.tcp()?;
    let set = sys::set_option_bytes(&socket, TCP, libc::TCP_CONGESTION, b"reno");
    seen.call("set TCP_CONGESTION", set);
    peer.connect(&socket, script.addr())?;
    seen.note("TCP_CONGESTION", congestion(&socket));
    Ok(())
}

fn segment(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    seen.call("TCP_MAXSEG", sys::option(&socket, TCP, libc::TCP_MAXSEG));
    Ok(())
}

fn mtu(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let script = peer.script(&[Step::Echo])?;
    let socket = peer.dial(&script)?;
    let mtu = if peer.v6() {
        sys::option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU)
    } else {
        sys::option(&socket, libc::IPPROTO_IP, libc::IP_MTU)
    };
    seen.call("MTU", mtu);
    Ok(())
}

fn states(peer: &Peer, seen: &mut Seen) -> anyhow::Result<()> {
    let steps = [Step::Read(1), Step::ShutdownWrite, Step::ReadToEnd];
    let script = peer.script(&steps)?;
    let socket = peer.tcp()?;
    seen.note("new", tcp_state(&socket)?);
    peer.connect(&socket, script.addr())?;
    seen.note("connected", tcp_state(&socket)?);
    put(&socket, b"x")?;
    seen.note("recv", take(&socket, 1));
    seen.note("the peer has ended", tcp_state(&socket)?);
    socket.shutdown(std::net::Shutdown::Write)?;
    seen.peer(script.report()?);
    Ok(())
}
