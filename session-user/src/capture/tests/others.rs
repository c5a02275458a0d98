//! What sockets hear of those whom they have not spoken to.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use session_proto::session::DatagramInfo;
use session_proto::wire::Dscp;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::harness::{
    App, PATIENCE, ToPeers, capture, disconnect, everything, exchange, hear, in_netns, rule,
};
use crate::capture::{Action, Capture, CaptureRule};
use crate::requests::{AppFlow, FlowInput, RequestQueue};

const FAR4: &str = "192.0.2.7:443";
/// A destination, somebody else who is reached through the same peer, as the application writes both, and the latter as
/// the peer knows him.
const FAR: [[&str; 3]; 3] = [
    [FAR4, "192.0.2.9:69", "192.0.2.9:69"],
    ["[2001:db8::7]:443", "[2001:db8::9]:69", "[2001:db8::9]:69"],
    [
        "[::ffff:192.0.2.7]:443",
        "[::ffff:192.0.2.9]:69",
        "192.0.2.9:69",
    ],
];

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn unbound(to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    Ok(socket.into())
}

fn from(source: &str) -> DatagramInfo {
    DatagramInfo {
        source: Some(addr(source)),
        ..DatagramInfo::default()
    }
}

/// Runs captured datagrams; the queue of the peer of [`everything`].
fn queue(capture: &mut Capture) -> Arc<RequestQueue> {
    let queues: Vec<Arc<RequestQueue>> = (0..3).map(|_| Arc::default()).collect();
    let datagrams = capture.take_datagrams().expect("not taken yet");
    tokio::task::spawn_local(datagrams.run(ToPeers(queues.clone())));
    Arc::clone(&queues[1])
}

/// The flow of the next datagram, and its service.
async fn next(queue: &RequestQueue) -> (Arc<AppFlow>, Dscp) {
    queue.flows.available().await;
    match queue.flows.pop() {
        Some(FlowInput::Datagram(flow, _, dscp)) => (flow, dscp),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_stranger_is_heard_and_can_be_answered() {
    in_netns(async || {
        let direct = CaptureRule {
            action: Action::Direct,
            ..rule(&["203.0.113.0/24"], 0)
        };
        let (mut capture, scope) = capture(&[direct, rule(&["198.18.0.0/15"], 2), everything()]);
        let queue = queue(&mut capture);
        for [to, stranger, known] in FAR {
            let app = App::start(&scope, move || {
                let socket = unbound(addr(to))?;
                let first = exchange(&socket, addr(to), "who")?;
                let second = exchange(&socket, addr(stranger), "and you")?;
                Ok(format!("{first}, {second}"))
            });
            let (flow, _) = next(&queue).await;
            assert!(flow.group.is_some(), "{to}");
            // Who is not reached through this peer, or is of this host, cannot have said anything to it.
            for nobody in [
                "203.0.113.1:69",
                "198.18.0.1:69",
                "127.0.0.1:69",
                "127.128.0.1:69",
                "192.0.2.9:0",
                "[::1]:69",
                "[fe80::1]:69",
            ] {
                flow.end().deliver_with(b"nobody", &from(nobody));
            }
            flow.end().deliver_with(b"I", &from(known));
            let (answer, _) = next(&queue).await;
            assert_eq!(
                (&*answer.target.to_string(), answer.group),
                (known, flow.group)
            );
            answer.end().deliver(b"I again");
            let heard = format!("I from {stranger}, I again from {stranger}");
            assert_eq!(app.result().await, Ok(heard));
        }
    });
}

#[test]
fn a_connected_socket_hears_its_target_alone_however_it_speaks_to_it() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let queue = queue(&mut capture);
        for [to, stranger, known] in FAR {
            let app = App::start(&scope, move || {
                let socket = unbound(addr(to))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                socket.connect(addr(to))?;
                socket.send(b"who")?;
                let first = hear(&socket)?;
                let second = exchange(&socket, addr(to), "who")?;
                // Let go, it is one that is not connected.
                disconnect(&socket)?;
                let third = exchange(&socket, addr(to), "who")?;
                Ok(format!("{first}, {second}, {third}"))
            });
            let (flow, _) = next(&queue).await;
            assert_eq!(flow.group, None, "{to}");
            flow.end().deliver_with(b"nobody", &from(known));
            flow.end().deliver(b"first");
            let (again, _) = next(&queue).await;
            assert_eq!(again.number(), flow.number(), "{to}");
            again.end().deliver(b"second");
            let (other, _) = next(&queue).await;
            // An IPv6 socket goes on hearing from the address alone that it was connected to.
            assert_eq!(other.group.is_none(), addr(known).is_ipv6(), "{to}");
            other.end().deliver(b"third");
            let heard = format!("first from {to}, second from {to}, third from {to}");
            assert_eq!(app.result().await, Ok(heard), "{stranger}");
        }
    });
}

#[test]
fn the_service_of_each_datagram_is_known() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let queue = queue(&mut capture);
        for [to, ..] in FAR {
            let app = App::start(&scope, move || {
                let socket = unbound(addr(to))?;
                let options = SockRef::from(&socket);
                for tos in [0, 0xb8, 0x10] {
                    if addr(to).ip().to_canonical().is_ipv4() {
                        options.set_tos_v4(tos)?;
                    } else {
                        options.set_tclass_v6(tos)?;
                    }
                    exchange(&socket, addr(to), "hello")?;
                }
                Ok(String::new())
            });
            for tos in [0, 0xb8, 0x10] {
                let (flow, dscp) = next(&queue).await;
                assert_eq!(dscp, Dscp::of_tos(tos), "{to}");
                let info = DatagramInfo { dscp, source: None };
                flow.end().deliver_with(b"back", &info);
            }
            assert_eq!(app.result().await, Ok(String::new()));
        }
    });
}
