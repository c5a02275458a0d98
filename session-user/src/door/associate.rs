//! UDP ASSOCIATE of SOCKS5 (RFC 1928, sections 4, 6 and 7): a client's datagrams say where they go, each by itself.
//!
//! The association has a port of its own and ends with the client's connection.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use fast_socks5::util::target_addr::TargetAddr;
use fast_socks5::{new_udp_header, parse_udp_request};
use session_proto::wire::Target;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::UdpSocket;
use tokio::time::MissedTickBehavior;

use super::Door;
use super::datagrams::{Conversations, Heard, send_now};
use super::socks::target_of;
use crate::requests::{AppFlow, FlowEnd};

/// Targets of one association at once.
const TARGETS_MAX: usize = 256;
/// Largest datagram of a client with its header, in bytes.
const DATAGRAM_ROOM: usize = 64 * 1024;

/// An association whose client has not said anything.
pub(super) struct Association {
    socket: Arc<UdpSocket>,
    /// Whose datagrams are taken.
    client: IpAddr,
    /// From which port; 0: the one that sends first.
    port: u16,
}

/// A target of an association.
struct Named {
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    /// What stands before each of its answers.
    header: Vec<u8>,
    heard: Arc<Heard>,
}

impl FlowEnd for Named {
    fn deliver(&self, data: &[u8]) {
        self.heard.note();
        let answer = [&self.header[..], data].concat();
        if let Err(error) = send_now(&self.socket, self.client, &answer) {
            tracing::debug!(client = %self.client, %error, "a datagram is dropped");
        }
    }

    fn failed(&self, _errno: i32) {
        // SOCKS5 has no word for it; the driver has told the log.
    }
}

impl Association {
    /// Opens a port beside the door, at `ours`, the address at which the client has found it. `asked`: DST.ADDR and
    /// DST.PORT, from which the client says that it will send; often all zeros, and wrong behind a NAT, which changes
    /// ports as well: the port is believed if the address is the client's.
    pub async fn open(
        ours: SocketAddr,
        client: IpAddr,
        asked: Option<SocketAddr>,
    ) -> std::io::Result<Self> {
        let client = client.to_canonical();
        let asked = asked.filter(|addr| addr.ip().to_canonical() == client);
        // With the link of an IPv6 address that is only good there.
        let mut beside = ours;
        beside.set_port(0);
        Ok(Self {
            socket: Arc::new(UdpSocket::bind(beside).await?),
            client,
            port: asked.map_or(0, |addr| addr.port()),
        })
    }

    /// BND.ADDR and BND.PORT.
    pub fn bound(&self) -> std::io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Carries datagrams until the client's connection ends.
    pub async fn keep(mut self, door: &Door, mut connection: impl AsyncRead + Unpin) {
        let requests = Arc::clone(&door.requests);
        let mut open = Conversations::new(TARGETS_MAX, door.flow_idle, requests);
        let mut look = tokio::time::interval(open.look_every());
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut room = vec![0; DATAGRAM_ROOM];
        let mut byte = [0; 64];
        loop {
            tokio::select! {
                received = self.socket.recv_from(&mut room) => match received {
                    Ok((n, from)) => self.take(from, &room[..n], door, &mut open).await,
                    Err(error) => tracing::debug!(client = %self.client, %error, "receiving datagrams"),
                },
                read = connection.read(&mut byte) => match read {
                    // Nothing is to be said there, and nothing comes of it.
                    Ok(n) if n > 0 => {}
                    Ok(_) | Err(_) => return,
                },
                _ = look.tick(), if !open.is_empty() => open.forget_silent(),
            }
        }
    }

    async fn take(
        &mut self,
        from: SocketAddr,
        data: &[u8],
        door: &Door,
        open: &mut Conversations<Target>,
    ) {
        let known = from.ip().to_canonical() == self.client;
        if !known || (self.port != 0 && self.port != from.port()) {
            return;
        }
        // What is put in parts is dropped, as section 7 allows.
        let Ok((0, target, data)) = parse_udp_request(data).await else {
            return;
        };
        let Some(header) = header_of(&target) else {
            return;
        };
        // An address that stands for no name leads nowhere, which SOCKS5 cannot tell.
        let Some(target) = target_of(target).and_then(|target| door.meant(target).ok()) else {
            return;
        };
        self.port = from.port();
        let begin = |heard: &Arc<Heard>| {
            let end = Named {
                socket: Arc::clone(&self.socket),
                client: from,
                header,
                heard: Arc::clone(heard),
            };
            AppFlow::new(target.clone(), from.to_string(), None, Box::new(end))
        };
        open.send(&target.clone(), Bytes::copy_from_slice(data), begin);
    }
}

/// Answers say where they come from as the client has called it.
fn header_of(target: &TargetAddr) -> Option<Vec<u8>> {
    match target {
        TargetAddr::Ip(addr) => new_udp_header(*addr).ok(),
        TargetAddr::Domain(name, port) => new_udp_header((name.as_str(), *port)).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_is_believed_if_the_address_is() {
        let ours = "127.0.0.1:1080".parse().unwrap();
        let client = "127.0.0.5".parse().unwrap();
        for (asked, port) in [
            (None, 0),
            (Some("0.0.0.0:4000"), 0),
            (Some("10.0.0.5:4000"), 0),
            (Some("127.0.0.5:4000"), 4000),
            (Some("[::ffff:127.0.0.5]:4000"), 4000),
        ] {
            let asked = asked.map(|addr: &str| addr.parse().unwrap());
            let association = Association::open(ours, client, asked).await.unwrap();
            assert_eq!(association.port, port, "{asked:?}");
            let bound = association.bound().unwrap();
            assert!(bound.ip() == ours.ip() && bound.port() != 1080);
        }
    }
}
