//! What is sent to a target and received from it, with the service that is asked for.

use std::io::{self, IoSlice, IoSliceMut};
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

/// Sends without waiting, also where tokio has not heard from the socket yet.
pub(super) fn send_now(socket: &UdpSocket, data: &[u8], dscp: Dscp) -> io::Result<()> {
    if dscp.is_default() {
        return SockRef::from(socket).send(data).map(|_| ());
    }
    let (tos, class) = (dscp.tos(), i32::from(dscp.tos()));
    let control = if socket.local_addr()?.is_ipv4() {
        ControlMessage::Ipv4Tos(&tos)
    } else {
        ControlMessage::Ipv6TClass(&class)
    };
    let (data, flags) = ([IoSlice::new(data)], MsgFlags::empty());
    sendmsg::<()>(socket.as_raw_fd(), &data, &[control], flags, None)?;
    Ok(())
}

/// The next datagram, in `room`: its bytes, and the service that it came with.
pub(super) fn receive(socket: &UdpSocket, room: &mut [u8]) -> io::Result<(usize, Dscp)> {
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
        Ok((message.bytes, service.unwrap_or_default()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `from` sends to `to`, which says what came.
    async fn carried(from: &UdpSocket, to: &UdpSocket, dscp: Dscp) -> (Vec<u8>, Dscp) {
        send_now(from, b"hello", dscp).unwrap();
        let mut room = [0; 100];
        loop {
            to.readable().await.unwrap();
            match receive(to, &mut room) {
                Ok((n, dscp)) => return (room[..n].to_vec(), dscp),
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
