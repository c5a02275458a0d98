//! What sockets hear of those whom they have not spoken to.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use session_proto::session::DatagramInfo;
use session_proto::wire::Dscp;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::elsewhere::{Agent, leave};
use super::harness::{
    App, FLOW_IDLE, PATIENCE, ToPeers, ask, capture, disconnect, everything, exchange, hear,
    in_netns, rule,
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
    tokio::task::spawn_local(datagrams.run(ToPeers(queues.clone()), FLOW_IDLE));
    Arc::clone(&queues[1])
}

/// The flow of the next datagram, and its service.
async fn next(queue: &RequestQueue) -> (Arc<AppFlow>, Dscp) {
    let (flow, dscp, _) = next_said(queue).await;
    (flow, dscp)
}

/// The same, and what it says.
async fn next_said(queue: &RequestQueue) -> (Arc<AppFlow>, Dscp, String) {
    loop {
        queue.flows.available().await;
        match queue.flows.pop() {
            Some(FlowInput::Datagram(flow, data, dscp)) => {
                return (flow, dscp, String::from_utf8_lossy(&data).into_owned());
            }
            // Of a network namespace that the agent has left.
            Some(FlowInput::Closed(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// In an application: asks for a service with what a socket sends to `to`.
fn want(socket: &UdpSocket, to: SocketAddr, tos: u32) -> io::Result<()> {
    let options = SockRef::from(socket);
    if to.ip().to_canonical().is_ipv4() {
        options.set_tos_v4(tos)
    } else {
        options.set_tclass_v6(tos)
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
                for tos in [0, 0xb8, 0x10] {
                    want(&socket, addr(to), tos)?;
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

#[test]
fn each_network_namespace_has_its_own_strangers() {
    in_netns(async || {
        let (agent, scope) = Agent::start(&[everything()]);
        let queue = agent.with(queue).await;
        for [to, stranger, known] in FAR {
            // Both have the same address and port. What the first sends over IPv4 is held until the agent is there.
            let start = |name: &'static str, held: bool| {
                App::start(&scope, move || {
                    leave(true)?;
                    if !held || addr(known).is_ipv6() {
                        ask(FAR4)?;
                    }
                    let any = if addr(to).is_ipv4() {
                        "0.0.0.0"
                    } else {
                        "[::]"
                    };
                    let socket = UdpSocket::bind(format!("{any}:4711"))?;
                    want(&socket, addr(to), 0xb8)?;
                    let first = exchange(&socket, addr(to), name)?;
                    let second = exchange(&socket, addr(stranger), name)?;
                    Ok(format!("{first}, {second}"))
                })
            };
            let apps = [start("one", true), start("two", false)];
            let mut groups = Vec::new();
            for _ in 0..4 {
                let (flow, dscp, name) = next_said(&queue).await;
                assert_eq!(dscp, Dscp::of_tos(0xb8), "{to} {name}");
                if flow.target.to_string() == known {
                    assert!(groups.contains(&(name.clone(), flow.group)), "{groups:?}");
                    flow.end().deliver(format!("{name} again").as_bytes());
                } else {
                    groups.push((name.clone(), flow.group));
                    flow.end().deliver_with(name.as_bytes(), &from(known));
                }
            }
            assert_ne!(groups[0].1, groups[1].1, "{to}");
            for (app, name) in apps.into_iter().zip(["one", "two"]) {
                let heard = format!("{name} from {stranger}, {name} again from {stranger}");
                assert_eq!(app.result().await, Ok(heard), "{to}");
            }
        }
    });
}
