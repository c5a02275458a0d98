//! The peer's UDP sockets.

use std::io::{IoSlice, IoSliceMut, Result};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg,
};

use super::peer::{Shared, target};
use super::seen::{digest, pattern};
use super::sys;
use super::wire::{Udp, UdpHow};

/// Between two looks whether the case has ended.
const LOOK: Duration = Duration::from_millis(100);
/// Larger than any datagram.
const DATAGRAM_MAX: usize = 65_536;

/// Opens the sockets; returns their ports, and the first one for sending.
pub(super) fn open(udp: &Udp, shared: &Arc<Shared>) -> anyhow::Result<(Vec<u16>, UdpSocket)> {
    let (mut ports, mut first) = (Vec::new(), None);
    for _ in 0..udp.sockets {
        let socket = UdpSocket::bind((target(udp.v6), 0))?;
        socket.set_read_timeout(Some(LOOK))?;
        let (level, name) = if udp.v6 {
            (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS)
        } else {
            (libc::IPPROTO_IP, libc::IP_RECVTOS)
        };
        sys::set_option(&socket, level, name, 1)?;
        ports.push(socket.local_addr()?.port());
        if first.is_none() {
            first = Some(socket.try_clone()?);
        }
        let stranger = UdpSocket::bind((target(udp.v6), 0))?;
        let (how, shared) = (udp.how, Arc::clone(shared));
        std::thread::spawn(move || {
            while !shared.is_over() {
                // A time-out, or the error of a datagram that nobody wanted.
                let _ = serve_one(&socket, &stranger, how);
            }
        });
    }
    Ok((ports, first.context("no sockets")?))
}

fn serve_one(socket: &UdpSocket, stranger: &UdpSocket, how: UdpHow) -> Result<()> {
    let (bytes, from, service) = receive(socket)?;
    match how {
        UdpHow::Quiet => {}
        UdpHow::Echo => {
            socket.send_to(&bytes, from)?;
        }
        UdpHow::EchoService => send_with(socket, &bytes, from, service)?,
        UdpHow::StrangerFirst => {
            stranger.send_to(&bytes, from)?;
            socket.send_to(&bytes, from)?;
        }
        UdpHow::Grow => {
            let wanted = String::from_utf8_lossy(&bytes).trim().parse().unwrap_or(0);
            socket.send_to(&pattern(0, wanted), from)?;
        }
        UdpHow::Whence => {
            socket.send_to(from.to_string().as_bytes(), from)?;
        }
        UdpHow::NewPort => {
            stranger.send_to(&bytes, from)?;
            // Until nobody asks any more.
            stranger.set_read_timeout(Some(Duration::from_secs(2)))?;
            while let Ok((bytes, from, _)) = receive(stranger) {
                stranger.send_to(&bytes, from)?;
            }
        }
        UdpHow::Describe => {
            let text = format!("{} tos {service}", digest(&bytes));
            socket.send_to(text.as_bytes(), from)?;
        }
    }
    Ok(())
}

/// Sends with a type of service.
fn send_with(socket: &UdpSocket, bytes: &[u8], to: SocketAddr, service: i32) -> Result<()> {
    let octet = service as u8;
    let control = if to.is_ipv4() {
        ControlMessage::Ipv4Tos(&octet)
    } else {
        ControlMessage::Ipv6TClass(&service)
    };
    let (bytes, to) = ([IoSlice::new(bytes)], SockaddrStorage::from(to));
    let flags = MsgFlags::empty();
    sendmsg(socket.as_raw_fd(), &bytes, &[control], flags, Some(&to))?;
    Ok(())
}

fn receive(socket: &UdpSocket) -> Result<(Vec<u8>, SocketAddr, i32)> {
    let mut bytes = vec![0; DATAGRAM_MAX];
    let mut control = nix::cmsg_space!([u8; 64]);
    let (length, from, service) = {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<SockaddrStorage>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::empty(),
        )?;
        let service = message.cmsgs()?.find_map(|c| match c {
            ControlMessageOwned::Ipv4Tos(tos) => Some(i32::from(tos)),
            ControlMessageOwned::Ipv6TClass(class) => Some(class),
            _ => None,
        });
        (message.bytes, message.address, service.unwrap_or(0))
    };
    bytes.truncate(length);
    let from = from
        .and_then(|a| super::world::socket_addr(&a))
        .ok_or_else(|| std::io::Error::other("a datagram without a source"))?;
    Ok((bytes, from, service))
}
