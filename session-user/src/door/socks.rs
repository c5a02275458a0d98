//! SOCKS version 5 (RFC 1928): the client says where it wants to go, and hears what became of it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use fast_socks5::server::Socks5ServerProtocol;
use fast_socks5::util::target_addr::TargetAddr;
use fast_socks5::{ReplyError, Socks5Command};
use session_proto::wire::Target;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;

use super::associate::Association;
use super::places::Places;
use super::{Door, NEGOTIATION_TIMEOUT, Unmet, seat};
use crate::requests::{Answer, AppStream};

/// BND.ADDR and BND.PORT: what the target sees is the gateway's, and not known here.
const BOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// A client that says nothing by TCP is asked after this time whether it is still there, then again after each
/// interval; so many questions without an answer end its association.
const ASK_AFTER: Duration = Duration::from_secs(60);
const ASK_EVERY: Duration = Duration::from_secs(15);
const ASK_TIMES: u32 = 4;

static ASSOCIATIONS: Places = Places::new();

/// `ends`: our address and the client's, if it came over a network.
pub(super) async fn serve<S>(
    door: &Door,
    name: String,
    socket: S,
    ends: Option<(SocketAddr, SocketAddr)>,
    permit: OwnedSemaphorePermit,
) -> Result<(), Unmet>
where
    S: AsyncRead + AsyncWrite + AsFd + Unpin + Into<AppStream>,
{
    let negotiation = async {
        let proto = Socks5ServerProtocol::accept_no_auth(socket).await?;
        proto.read_command().await
    };
    let negotiated = tokio::time::timeout(NEGOTIATION_TIMEOUT, negotiation).await;
    let (proto, command, target) = negotiated
        .map_err(|_| Unmet::Timeout)?
        .map_err(|error| Unmet::Protocol(error.to_string()))?;
    if let (Socks5Command::UDPAssociate, Some((ours, client))) = (&command, &ends) {
        drop(permit);
        let asked = match target {
            TargetAddr::Ip(addr) => Some(addr),
            TargetAddr::Domain(..) => None,
        };
        let wrong =
            |error: fast_socks5::server::SocksServerError| Unmet::Protocol(error.to_string());
        let (Some(_place), Ok(association)) = (
            ASSOCIATIONS.take(door.at.to_string(), client.ip()),
            Association::open(*ours, client.ip(), asked).await,
        ) else {
            let said = proto.reply_error(&ReplyError::GeneralFailure).await;
            return said.map_err(wrong);
        };
        let bound = association.bound()?;
        let connection = proto.reply_success(bound).await.map_err(wrong)?;
        notice_death(&connection)?;
        association.keep(door, connection).await;
        return Ok(());
    }
    let answer = match (command, target_of(target)) {
        (Socks5Command::TCPConnect, Some(target)) => door.ask(name, target, permit).await,
        (Socks5Command::TCPConnect, None) => Some(Answer::Refused(libc::EHOSTUNREACH)),
        _ => {
            let said = proto.reply_error(&ReplyError::CommandNotSupported).await;
            return said.map_err(|error| Unmet::Protocol(error.to_string()));
        }
    };
    let said = match answer {
        Some(Answer::Connected(to)) => match proto.reply_success(BOUND).await {
            Ok(socket) => return seat(to, socket.into()),
            Err(error) => Err(error),
        },
        Some(Answer::Refused(errno)) => proto.reply_error(&reply(errno)).await,
        None => proto.reply_error(&ReplyError::GeneralFailure).await,
    };
    said.map_err(|error| Unmet::Protocol(error.to_string()))
}

/// A client that vanishes without a word would keep its association, and a port of ours, for ever.
fn notice_death(connection: &impl AsFd) -> io::Result<()> {
    let asks = TcpKeepalive::new()
        .with_time(ASK_AFTER)
        .with_interval(ASK_EVERY)
        .with_retries(ASK_TIMES);
    SockRef::from(connection).set_tcp_keepalive(&asks)
}

pub(super) fn target_of(target: TargetAddr) -> Option<Target> {
    match target {
        TargetAddr::Ip(addr) => Some(Target::Addr(addr)),
        TargetAddr::Domain(name, port) => Target::of_host(&name, port).ok(),
    }
}

/// RFC 1928, section 6.
fn reply(errno: i32) -> ReplyError {
    match errno {
        libc::ECONNREFUSED => ReplyError::ConnectionRefused,
        libc::ENETUNREACH => ReplyError::NetworkUnreachable,
        libc::EHOSTUNREACH => ReplyError::HostUnreachable,
        libc::EACCES => ReplyError::ConnectionNotAllowed,
        libc::ETIMEDOUT => ReplyError::TtlExpired,
        _ => ReplyError::GeneralFailure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_asks_whether_a_client_is_there() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        notice_death(&client).unwrap();
        let socket = SockRef::from(&client);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), ASK_AFTER);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), ASK_TIMES);
    }
}
