//! What a case has seen, in lines that are the same in every run that is the same.

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::conformance::sys::PollFlags;
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use serde::{Deserialize, Serialize};
use session_lab::LinkName;
use sha2::{Digest, Sha256};

/// The notes of a case, in the order of what happened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seen(Vec<String>);

impl Seen {
    /// Adds a line.
    pub fn note(&mut self, what: &str, value: impl std::fmt::Display) {
        self.0.push(format!("{what}: {value}"));
    }

    /// Adds the result of a call, and returns what it yielded.
    pub fn call<T: Shown>(&mut self, what: &str, result: io::Result<T>) -> Option<T> {
        self.note(what, shown(&result));
        result.ok()
    }

    /// Adds what the peer program has to say.
    pub fn peer(&mut self, lines: Vec<String>) {
        for line in lines {
            self.0.push(format!("peer: {line}"));
        }
    }

    /// The lines.
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

/// What a call yields, in words.
pub trait Shown {
    /// In words.
    fn show(&self) -> String;
}

impl Shown for () {
    fn show(&self) -> String {
        "ok".to_owned()
    }
}

impl Shown for Vec<u8> {
    fn show(&self) -> String {
        digest(self)
    }
}

macro_rules! shown {
    ($($t:ty),*) => {$(
        impl Shown for $t {
            fn show(&self) -> String {
                self.to_string()
            }
        }
    )*};
}

shown!(usize, u64, i32, bool, String, &str);

/// The value, or the error's name.
pub fn shown<T: Shown>(result: &io::Result<T>) -> String {
    match result {
        Ok(value) => value.show(),
        Err(error) => errno_name(error),
    }
}

/// The kernel's name of an error, such as `ECONNRESET`.
pub fn errno_name(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => errno_of(number),
        None => error.kind().to_string(),
    }
}

/// The kernel's name of an error number; `0` for none.
pub fn errno_of(number: i32) -> String {
    if number == 0 {
        "0".to_owned()
    } else {
        format!("{:?}", Errno::from_raw(number))
    }
}

/// An error of a case in words that do not change: its errno if it has one.
pub fn stopped(error: &anyhow::Error) -> String {
    let io = error.chain().find_map(|e| e.downcast_ref::<io::Error>());
    let errno = error.chain().find_map(|e| e.downcast_ref::<Errno>());
    match (io, errno) {
        (Some(io), _) => errno_name(io),
        (None, Some(errno)) => format!("{errno:?}"),
        (None, None) => error.to_string(),
    }
}

/// Length and the beginning of the SHA-256 of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    finished(bytes.len(), Sha256::new_with_prefix(bytes))
}

/// The same for bytes that were hashed as they came.
pub fn finished(length: usize, hash: Sha256) -> String {
    let hash = hex::encode(&hash.finalize()[..6]);
    format!("{length} bytes {hash}")
}

/// Bytes that do not repeat within 64 KiB: byte by byte what both ends expect at an offset.
pub fn pattern(from: usize, length: usize) -> Vec<u8> {
    (from..from + length)
        .map(|i| {
            let mixed = (i as u32).wrapping_mul(0x9e37_79b1) ^ ((i >> 16) as u32);
            (mixed >> 24) as u8
        })
        .collect()
}

/// The names of poll(2)'s events, in a fixed order.
pub fn poll_names(flags: PollFlags) -> String {
    let all = [
        (PollFlags::POLLIN, "IN"),
        (PollFlags::POLLPRI, "PRI"),
        (PollFlags::POLLOUT, "OUT"),
        (PollFlags::POLLERR, "ERR"),
        (PollFlags::POLLHUP, "HUP"),
        (PollFlags::POLLRDHUP, "RDHUP"),
    ];
    names(&all.map(|(flag, name)| (flags.contains(flag), name)))
}

/// The same for epoll(7).
pub fn epoll_names(flags: EpollFlags) -> String {
    let all = [
        (EpollFlags::EPOLLIN, "IN"),
        (EpollFlags::EPOLLPRI, "PRI"),
        (EpollFlags::EPOLLOUT, "OUT"),
        (EpollFlags::EPOLLERR, "ERR"),
        (EpollFlags::EPOLLHUP, "HUP"),
        (EpollFlags::EPOLLRDHUP, "RDHUP"),
    ];
    names(&all.map(|(flag, name)| (flags.contains(flag), name)))
}

fn names(all: &[(bool, &str)]) -> String {
    let mut out = String::new();
    for (_, name) in all.iter().filter(|(there, _)| *there) {
        let bar = if out.is_empty() { "" } else { "|" };
        let _ = write!(out, "{bar}{name}");
    }
    if out.is_empty() {
        out.push_str("nothing");
    }
    out
}

/// What kind of address it is, for addresses that differ from run to run or from host to host.
pub fn class(addr: IpAddr) -> String {
    if let IpAddr::V6(v6) = addr
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return format!("mapped {}", class(IpAddr::V4(v4)));
    }
    let link = LinkName::ALL
        .into_iter()
        .find(|l| addr == IpAddr::V4(l.client_v4()) || addr == IpAddr::V6(l.client_v6()));
    match (link, addr) {
        (Some(link), _) => format!("the address of {}", link.name()),
        (None, a) if a.is_unspecified() => "unspecified".to_owned(),
        (None, a) if a.is_loopback() => "loopback".to_owned(),
        (None, IpAddr::V6(a)) if is_link_local(a) => "link-local".to_owned(),
        (None, a) => a.to_string(),
    }
}

fn is_link_local(addr: Ipv6Addr) -> bool {
    addr.segments()[0] & 0xffc0 == 0xfe80
}

/// Address family and class, and whether there is a port.
pub fn name_class(addr: SocketAddr) -> String {
    let family = if addr.is_ipv4() {
        "AF_INET"
    } else {
        "AF_INET6"
    };
    let port = if addr.port() == 0 {
        "no port"
    } else {
        "a port"
    };
    format!("{family}, {}, {port}", class(addr.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_the_same_for_the_same() {
        let mut seen = Seen::default();
        seen.call("connect", Ok(()));
        seen.call::<usize>("recv", Err(io::Error::from_raw_os_error(libc::ECONNRESET)));
        seen.note("poll", poll_names(PollFlags::POLLIN | PollFlags::POLLHUP));
        assert_eq!(
            seen.lines(),
            ["connect: ok", "recv: ECONNRESET", "poll: IN|HUP"]
        );
        assert_eq!(poll_names(PollFlags::empty()), "nothing");
    }

    #[test]
    fn classes_tell_links_from_loopback() {
        assert_eq!(
            class("::ffff:127.0.0.1".parse().unwrap()),
            "mapped loopback"
        );
        assert_eq!(class("10.10.1.2".parse().unwrap()), "the address of wifi0");
        assert_eq!(class("fe80::1".parse().unwrap()), "link-local");
        assert_eq!(class("192.0.2.1".parse().unwrap()), "192.0.2.1");
    }

    #[test]
    fn errors_are_named_by_their_errno() {
        let error = anyhow::Error::from(io::Error::from_raw_os_error(libc::EPIPE)).context("x");
        assert_eq!(stopped(&error), "EPIPE");
        assert_eq!(stopped(&anyhow::anyhow!("words")), "words");
    }

    #[test]
    fn the_pattern_can_be_cut_anywhere() {
        let whole = pattern(0, 1000);
        assert_eq!(whole[300..], pattern(300, 700));
        assert_ne!(digest(&whole), digest(&whole[1..]));
    }
}
