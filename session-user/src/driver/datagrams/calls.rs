//! What is sent to a target and received from it, with the service that is asked for.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;

use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg,
};
use session_proto::wire::Dscp;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// Has `socket` tell which service datagrams come with. Where it cannot, they come with none.
pub(super) fn want_service(socket: &UdpSocket) {
    let v4 = socket.local_addr().is_ok_and(|addr| addr.is_ipv4());
    let asked = if v4 {
        SockRef::from(socket).set_recv_tos_v4(true)
    } else {
        SockRef::from(socket).set_recv_tclass_v6(true)
    };
    if let Err(error) = asked {
        tracing::debug!(%error, "the service of answers is not known");
    }
}

/// Refusals that are read at once, at most. The kernel keeps no more than a socket may hold; but new ones may come.
const REFUSALS_MAX: usize = 256;

/// Sends without waiting, also where tokio has not heard from the socket yet; to where it is connected without `to`.
pub(super) fn send_now(
    socket: &UdpSocket,
    to: Option<SocketAddr>,
    data: &[u8],
    dscp: Dscp,
) -> io::Result<()> {
    if dscp.is_default() {
        let socket = SockRef::from(socket);
        let sent = match to {
            Some(to) => socket.send_to(data, &to.into()),
            None => socket.send(data),
        };
        return sent.map(|_| ());
    }
    let (tos, class) = (dscp.tos(), i32::from(dscp.tos()));
    let control = if socket.local_addr()?.is_ipv4() {
        ControlMessage::Ipv4Tos(&tos)
    } else {
        ControlMessage::Ipv6TClass(&class)
    };
    let (data, flags) = ([IoSlice::new(data)], MsgFlags::empty());
    let to = to.map(SockaddrStorage::from);
    sendmsg(socket.as_raw_fd(), &data, &[control], flags, to.as_ref())?;
    Ok(())
}

/// A datagram that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Came {
    /// How many there are of it.
    pub bytes: usize,
    /// Who sent it.
    pub from: SocketAddr,
    /// The service that it came with.
    pub dscp: Dscp,
}

/// The next datagram, in `room`.
pub(super) fn receive(socket: &UdpSocket, room: &mut [u8]) -> io::Result<Came> {
    socket.try_io(Interest::READABLE, || {
        let mut control = cmsg_space!(libc::c_int);
        let mut slices = [IoSliceMut::new(room)];
        let (fd, flags) = (socket.as_raw_fd(), MsgFlags::empty());
        let message = recvmsg::<SockaddrStorage>(fd, &mut slices, Some(&mut control), flags)?;
        let service = message.cmsgs()?.find_map(|part| match part {
            ControlMessageOwned::Ipv4Tos(tos) => Some(Dscp::of_tos(tos)),
            // Only eight bits of it are used (RFC 3542, section 6.5).
            ControlMessageOwned::Ipv6TClass(class) => Some(Dscp::of_tos(class as u8)),
            _ => None,
        });
        Ok(Came {
            bytes: message.bytes,
            from: socket_addr(message.address)?,
            dscp: service.unwrap_or_default(),
        })
    })
}

fn socket_addr(addr: Option<SockaddrStorage>) -> io::Result<SocketAddr> {
    let v4 = addr.and_then(|addr| Some(SocketAddr::from(*addr.as_sockaddr_in()?)));
    let v6 = addr.and_then(|addr| Some(SocketAddr::from(*addr.as_sockaddr_in6()?)));
    // Without what is only of use on this host.
    let known = v4
        .or(v6)
        .map(|addr| SocketAddr::new(addr.ip(), addr.port()));
    known.ok_or_else(|| io::Error::other("a datagram without an address"))
}

/// What a router or a host said of a datagram that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Where the datagram was to go.
    pub to: SocketAddr,
    /// What became of it.
    pub errno: i32,
}

/// Takes what waits in the socket's error queue (`IP_RECVERR` of ip(7)), and with it the socket's own error, which is
/// that of one of them (`sock_dequeue_err_skb` of net/core/skbuff.c).
pub(super) fn refusals(socket: &UdpSocket, told: &mut Vec<Refusal>) {
    for _ in 0..REFUSALS_MAX {
        match refusal(socket) {
            Ok(refusal) => told.extend(refusal),
            Err(_) => return,
        }
    }
}

/// The next of them; none for one that a connected socket without `IP_RECVERR` would not be told of.
fn refusal(socket: &UdpSocket) -> io::Result<Option<Refusal>> {
    // The start of the datagram, of which nothing is needed.
    let mut room = [0; 8];
    let mut slices = [IoSliceMut::new(&mut room)];
    let mut control = cmsg_space!([u8; 128]);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let fd = socket.as_raw_fd();
    let message = recvmsg::<SockaddrStorage>(fd, &mut slices, Some(&mut control), flags)?;
    let error = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::Ipv4RecvErr(error, _) => Some(error),
        ControlMessageOwned::Ipv6RecvErr(error, _) => Some(error),
        _ => None,
    });
    let Some(error) = error.filter(is_hard) else {
        return Ok(None);
    };
    let to = socket_addr(message.address)?;
    let errno = error.ee_errno as i32;
    Ok(Some(Refusal { to, errno }))
}

/// Whether a connected socket that has not asked for all errors would be told of it: whoever says it means the
/// destination, and not the way there, which may soon be another (`icmp_err_convert` of net/ipv4/icmp.c, `tab_unreach` of
/// net/ipv6/icmp.c, `__udp4_lib_err` of net/ipv4/udp.c).
fn is_hard(error: &libc::sock_extended_err) -> bool {
    match (error.ee_origin, error.ee_type, error.ee_code) {
        // Destination unreachable: nobody has the protocol or the port, the network or the host is unknown, alone or
        // closed to us. Not that there is no way there just now, or none for this service, or not for so large a packet.
        (libc::SO_EE_ORIGIN_ICMP, 3, code) => matches!(code, 2 | 3 | 6..=10 | 13..=15),
        // Parameter problem.
        (libc::SO_EE_ORIGIN_ICMP, 12, _) => true,
        // Destination unreachable, but for no route, beyond the scope of the source, no neighbour.
        (libc::SO_EE_ORIGIN_ICMP6, 1, code) => !matches!(code, 0 | 2 | 3),
        // Parameter problem.
        (libc::SO_EE_ORIGIN_ICMP6, 4, _) => true,
        // Time exceeded, a packet that is too big; and what does not come from the network.
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_the_way_is_no_refusal() {
        let hard = |origin, of, code| {
            is_hard(&libc::sock_extended_err {
                ee_errno: 0,
                ee_origin: origin,
                ee_type: of,
                ee_code: code,
                ee_pad: 0,
                ee_info: 0,
                ee_data: 0,
            })
        };
        let codes = |origin, of| (0..20).filter(|code| hard(origin, of, *code)).collect();
        let (v4, v6) = (libc::SO_EE_ORIGIN_ICMP, libc::SO_EE_ORIGIN_ICMP6);
        let unreachable: Vec<u8> = codes(v4, 3);
        assert_eq!(unreachable, [2, 3, 6, 7, 8, 9, 10, 13, 14, 15]);
        let unreachable: Vec<u8> = codes(v6, 1);
        assert_eq!(
            unreachable,
            [1].into_iter().chain(4..20).collect::<Vec<u8>>()
        );
        assert!(hard(v4, 12, 0) && hard(v6, 4, 0));
        // Time exceeded; too big; of this host itself.
        assert!(!hard(v4, 11, 0) && !hard(v6, 3, 0) && !hard(v6, 2, 0));
        assert!(!hard(libc::SO_EE_ORIGIN_LOCAL, 3, 3));
    }

    /// `from` sends to `to`, which says what came.
    async fn carried(from: &UdpSocket, to: &UdpSocket, dscp: Dscp) -> (Vec<u8>, Dscp) {
        send_now(from, None, b"hello", dscp).unwrap();
        let mut room = [0; 100];
        loop {
            to.readable().await.unwrap();
            match receive(to, &mut room) {
                Ok(came) => {
                    assert_eq!(came.from, from.local_addr().unwrap());
                    return (room[..came.bytes].to_vec(), came.dscp);
                }
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
    }

    #[tokio::test]
    async fn the_service_goes_and_comes_with_each_datagram() {
        for loopback in ["127.0.0.1:0", "[::1]:0"] {
            let a = UdpSocket::bind(loopback).await.unwrap();
            let b = UdpSocket::bind(loopback).await.unwrap();
            a.connect(b.local_addr().unwrap()).await.unwrap();
            b.connect(a.local_addr().unwrap()).await.unwrap();
            want_service(&b);
            for tos in [0xb8, 0, 0x10] {
                let dscp = Dscp::of_tos(tos);
                let came = carried(&a, &b, dscp).await;
                assert_eq!(came, (b"hello".to_vec(), dscp), "{loopback}");
            }
        }
    }
}
