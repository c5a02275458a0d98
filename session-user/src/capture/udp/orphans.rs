//! Sockets that are still connected to addresses which stand for IPv6 destinations when the route for these goes.
//!
//! What they send would then take the default route and leave the host as it is. So they are ended first, as `ss -K` does
//! (`SOCK_DESTROY`, sock_diag(7)): their applications get ECONNABORTED, and connect anew. IPv4 needs nothing of the kind,
//! for 127.0.0.0/8 never leaves the host: there a closed port answers.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rtnetlink::sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};
use session_ebpf_common::id_of;

use super::super::gate::words;
use super::tables::Tables;

/// `SOCK_DESTROY` of linux/sock_diag.h.
const SOCK_DESTROY: u16 = 21;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const FLAGS: u16 = 1 | 4;
/// Bytes of `struct nlmsghdr` and `struct inet_diag_req_v2` (linux/inet_diag.h).
const HEADER: usize = 16;
const REQUEST: usize = 56;

/// Ends those of one network namespace.
#[derive(Debug)]
pub struct Orphans {
    netlink: io::Result<Socket>,
    tables: Arc<Tables>,
}

impl Orphans {
    /// For the network namespace that this thread is in, which `tables` are of.
    pub fn open(tables: Arc<Tables>) -> Self {
        Self {
            netlink: connected(),
            tables,
        }
    }

    /// Ends them. Returns how many there were.
    pub fn end(&self) -> io::Result<usize> {
        let ours = |(_, remote): &(SocketAddr, SocketAddr)| {
            matches!(remote.ip(), IpAddr::V6(ip) if ip.to_ipv4_mapped().is_none())
                && id_of(&words(remote.ip())).is_some()
        };
        let mut sockets = self.tables.ends6()?;
        sockets.retain(ours);
        if sockets.is_empty() {
            return Ok(0);
        }
        let netlink = self.netlink.as_ref();
        let netlink = netlink.map_err(|error| io::Error::new(error.kind(), error.to_string()))?;
        for (local, remote) in &sockets {
            netlink.send(&request(*local, *remote), 0)?;
            let (answer, _) = netlink.recv_from_full()?;
            match errno(&answer) {
                // It may be gone already.
                Some(0 | libc::ENOENT) => {}
                Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
                None => return Err(io::Error::other("the kernel's answer is no answer")),
            }
        }
        Ok(sockets.len())
    }
}

/// A socket that belongs to the network namespace of this thread, wherever it is used.
fn connected() -> io::Result<Socket> {
    let mut netlink = Socket::new(NETLINK_SOCK_DIAG)?;
    netlink.bind_auto()?;
    netlink.connect(&NetlinkAddr::new(0, 0))?;
    Ok(netlink)
}

fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + REQUEST);
    out.extend(((HEADER + REQUEST) as u32).to_ne_bytes());
    out.extend(SOCK_DESTROY.to_ne_bytes());
    out.extend(FLAGS.to_ne_bytes());
    // Sequence number and port.
    out.extend([0; 8]);
    // Family, protocol, extensions, padding, states.
    out.extend([libc::AF_INET6 as u8, libc::IPPROTO_UDP as u8, 0, 0]);
    out.extend(u32::MAX.to_ne_bytes());
    // struct inet_diag_sockid: ports, addresses, interface, cookie (any).
    out.extend(local.port().to_be_bytes());
    out.extend(remote.port().to_be_bytes());
    for end in [local, remote] {
        let ip = match end.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        out.extend(ip.octets());
    }
    out.extend([0; 4]);
    out.extend([0xff; 8]);
    out
}

/// The errno in `struct nlmsgerr`; 0 for success.
fn errno(answer: &[u8]) -> Option<i32> {
    let bytes = answer.get(HEADER..HEADER + 4)?;
    let code = i32::from_ne_bytes(bytes.try_into().ok()?);
    Some(code.saturating_neg())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_kernels_layout() {
        let local = "[2001:db8::1]:258".parse().unwrap();
        let remote = "[2001:db8::2]:772".parse().unwrap();
        let bytes = request(local, remote);
        assert_eq!(bytes.len(), HEADER + REQUEST);
        assert_eq!(&bytes[24..28], [1, 2, 3, 4]);
        assert_eq!((bytes[43], bytes[59]), (1, 2));
        assert_eq!(
            &bytes[60..],
            [0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]
        );
    }

    #[test]
    fn answers_that_are_none_are_told_apart() {
        assert_eq!(errno(&[0; 16]), None);
        assert_eq!(errno(&[0; 20]), Some(0));
        let mut denied = [0; 20];
        denied[16..].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(errno(&denied), Some(libc::EPERM));
    }
}
