//! Datagrams of captured applications arrive with their destinations, and answers with their sources.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::wait::waitpid,
    unistd::{ForkResult, fork},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::harness::{
    HERE4, HERE6, PATIENCE, ToPeers, answered, capture, direct_echo, disconnect, everything,
    exchange, hear, in_netns, run, talk,
};
use crate::capture::{CaptureRule, Native};
use crate::requests::{FlowInput, RequestQueue};

const FAR4: &str = "192.0.2.7:443";
const FAR6: &str = "[2001:db8::7]:443";
const MAPPED: &str = "[::ffff:192.0.2.7]:443";
/// How a destination is written by an application, and as what the agent knows it.
const FAR: [(&str, &str); 3] = [(FAR4, FAR4), (FAR6, FAR6), (MAPPED, FAR4)];

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// A socket that nobody has bound.
fn unbound(to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    Ok(socket.into())
}

/// Everything but the namespace's own networks.
fn elsewhere() -> CaptureRule {
    CaptureRule {
        except: vec![
            "10.9.0.0/24".parse().unwrap(),
            "2001:db8:9::/64".parse().unwrap(),
        ],
        ..everything()
    }
}

#[test]
fn every_socket_reaches_its_destination_and_hears_from_it() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let _heard = talk(&mut capture);
        for (to, known) in FAR {
            let expected = answered(known, 1, "hello", to);
            for bound in [false, true] {
                let unconnected = run(&scope, move || {
                    let to = addr(to);
                    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                    let socket = if bound {
                        UdpSocket::bind(any)?
                    } else {
                        unbound(to)?
                    };
                    exchange(&socket, to, "hello")
                });
                assert_eq!(unconnected.await, Ok(expected.clone()), "{bound}");
            }
            let connected = run(&scope, move || {
                let socket = unbound(addr(to))?;
                socket.connect(addr(to))?;
                assert_eq!(socket.peer_addr()?, addr(to));
                socket.send(b"hello")?;
                hear(&socket)
            });
            assert_eq!(connected.await, Ok(expected));
        }
        let counters = capture.counters();
        assert_eq!((counters.udp4, counters.udp6), (6, 3), "{counters:?}");
        assert_eq!(counters.udp_flows, 9, "{counters:?}");
        assert_eq!(counters.udp_dropped, 0, "{counters:?}");
    });
}

#[test]
fn one_socket_hears_from_each_of_many_destinations() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let _heard = talk(&mut capture);
        for (any, net, known) in [
            ("0.0.0.0:0", "198.51.100.", "198.51.100."),
            ("[::]:0", "[::ffff:198.51.100.", "198.51.100."),
            ("[::]:0", "[2001:db8:5::", "[2001:db8:5::"),
        ] {
            let result = run(&scope, move || {
                let socket = UdpSocket::bind(any)?;
                let close = |net: &str| if net.starts_with('[') { "]" } else { "" };
                for round in 0..3 {
                    for host in 10..49 {
                        let to = format!("{net}{host}{}:{}", close(net), 1000 + host);
                        let known = format!("{known}{host}{}:{}", close(known), 1000 + host);
                        let text = round.to_string();
                        let said = exchange(&socket, addr(&to), &text)?;
                        assert_eq!(said, answered(&known, 1, &text, &to));
                    }
                }
                Ok("all right".into())
            });
            assert_eq!(result.await, Ok("all right".into()), "{net}");
        }
    });
}

#[test]
fn the_largest_datagrams_and_empty_ones() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let mut heard = talk(&mut capture);
        for (to, largest) in [(FAR4, 65_507), (FAR6, 65_507), (MAPPED, 65_507)] {
            let result = run(&scope, move || {
                let socket = unbound(addr(to))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                let sent: Vec<u8> = (0..largest).map(|at| (at % 251) as u8).collect();
                socket.send_to(&sent, addr(to))?;
                let mut buffer = vec![0; 65_535];
                let (len, from) = socket.recv_from(&mut buffer)?;
                assert_eq!((len, from), (largest, addr(to)));
                assert!(buffer[..len] == sent, "the bytes are others");
                let too_large = socket.send_to(&vec![0; largest + 100], addr(to));
                assert_eq!(
                    too_large.map_err(|error| error.raw_os_error()),
                    Err(Some(libc::EMSGSIZE))
                );
                socket.send_to(&[], addr(to))?;
                hear(&socket)
            });
            let said = result.await.unwrap();
            assert!(said.ends_with(&format!(" for 1  from {to}")), "{said}");
            assert_eq!(heard.recv().await.unwrap().data.len(), largest);
            assert_eq!(heard.recv().await.unwrap().data, b"");
        }
    });
}

#[test]
fn a_peek_tells_the_source_and_leaves_the_datagram() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let _heard = talk(&mut capture);
        let result = run(&scope, || {
            let socket = unbound(addr(FAR4))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send_to(b"x", addr(FAR4))?;
            let mut buffer = [0; 100];
            let (_, from) = socket.peek_from(&mut buffer)?;
            assert_eq!(from, addr(FAR4));
            hear(&socket)
        });
        assert_eq!(result.await, Ok(answered(FAR4, 1, "x", FAR4)));
    });
}

#[test]
fn names_are_those_of_the_network() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let _heard = talk(&mut capture);
        let native = Native {
            v4: Some((HERE4.parse().unwrap(), 1400)),
            v6: Some((HERE6.parse().unwrap(), 1400)),
            ..Native::default()
        };
        capture.set_native(&native).unwrap();
        for (to, here) in [(FAR4, HERE4), (FAR6, HERE6)] {
            let result = run(&scope, move || {
                let socket = unbound(addr(to))?;
                socket.connect(addr(to))?;
                assert_eq!(socket.peer_addr()?, addr(to));
                assert_eq!(socket.local_addr()?.ip().to_string(), here);
                mtu(&socket, to).map(|mtu| mtu.to_string())
            });
            assert_eq!(result.await, Ok("1400".into()), "{to}");
        }
    });
}

/// `IP_MTU`, `IPV6_MTU`.
fn mtu(socket: &UdpSocket, to: &str) -> io::Result<i32> {
    let (level, name) = match addr(to) {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let (mut value, mut len) = (0_i32, 4);
    // SAFETY: a live descriptor, and pointers to an int and to its length, both of which outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

#[test]
fn a_socket_may_be_connected_again_and_let_go() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[elsewhere()]);
        let _heard = talk(&mut capture);
        for (far, other, near) in [
            (FAR4, "192.0.2.9:53", direct_echo(HERE4)),
            (FAR6, "[2001:db8::9]:53", direct_echo(HERE6)),
        ] {
            let result = run(&scope, move || {
                let socket = unbound(addr(far))?;
                for to in [addr(far), addr(other), near, addr(far), addr(other)] {
                    if to == near {
                        // Otherwise Linux keeps the source address, here as natively.
                        disconnect(&socket)?;
                    }
                    socket.connect(to)?;
                    assert_eq!(socket.peer_addr()?, to);
                    socket.send(b"x")?;
                    let said = hear(&socket)?;
                    assert_eq!(said.starts_with("direct"), to == near, "{said}");
                    assert!(said.ends_with(&format!(" from {to}")), "{said}");
                }
                disconnect(&socket)?;
                assert!(socket.peer_addr().is_err());
                if far.starts_with('[') {
                    // Linux forgets the port of the last peer but not its IPv6 address: it goes on hearing only that.
                    return exchange(&socket, addr(other), "z");
                }
                exchange(&socket, near, "y")?;
                exchange(&socket, addr(other), "z")
            });
            let said = result.await.unwrap();
            assert_eq!(said, answered(other, 1, "z", other));
        }
    });
}

#[test]
fn a_connected_socket_may_send_elsewhere() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[elsewhere()]);
        let mut heard = talk(&mut capture);
        for (far, other, here) in [
            (FAR4, "192.0.2.9:53", HERE4),
            (FAR6, "[2001:db8::9]:53", HERE6),
        ] {
            let near = UdpSocket::bind((here, 0)).unwrap();
            near.set_read_timeout(Some(PATIENCE)).unwrap();
            let to_near = near.local_addr().unwrap();
            let result = run(&scope, move || {
                let socket = unbound(addr(far))?;
                socket.connect(addr(far))?;
                // Goes there, and its answer is not for this socket.
                socket.send_to(b"elsewhere", addr(other))?;
                // Goes there from an address by which it can be answered.
                socket.send_to(b"near", to_near)?;
                socket.send_to(b"past connect", addr(far))?;
                hear(&socket)
            });
            assert_eq!(result.await, Ok(answered(far, 1, "past connect", far)));
            assert_eq!(heard.recv().await.unwrap().target, other);
            assert_eq!(heard.recv().await.unwrap().target, far);
            let mut buffer = [0; 100];
            let (len, from) = near.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], b"near");
            assert!(!from.ip().is_loopback(), "{from}");
        }
    });
}

#[test]
fn a_socket_bound_to_a_device_is_freed_from_it() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let _heard = talk(&mut capture);
        for (to, known) in FAR {
            let expected = answered(known, 1, "hello", to);
            for connected in [false, true] {
                let result = run(&scope, move || {
                    let socket = unbound(addr(to))?;
                    socket2::SockRef::from(&socket).bind_device(Some(b"d0"))?;
                    if connected {
                        socket.connect(addr(to))?;
                    }
                    exchange(&socket, addr(to), "hello")
                });
                assert_eq!(result.await, Ok(expected.clone()), "{connected}");
            }
        }
    });
}

#[test]
fn a_socket_is_shared_by_fork() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let _heard = talk(&mut capture);
        let result = run(&scope, || {
            let socket = unbound(addr(FAR4))?;
            socket.connect(addr(FAR4))?;
            // SAFETY: this process has a single thread.
            match unsafe { fork() }? {
                ForkResult::Parent { child } => {
                    waitpid(child, None)?;
                    hear(&socket)
                }
                ForkResult::Child => {
                    let right = socket.peer_addr().is_ok_and(|peer| peer == addr(FAR4));
                    let _ = socket.send(if right { b"child" } else { b"wrong" });
                    // SAFETY: ends the process without running the parent's exit handlers.
                    unsafe { libc::_exit(0) }
                }
            }
        });
        assert_eq!(result.await, Ok(answered(FAR4, 1, "child", FAR4)));
    });
}

#[test]
fn a_flow_without_datagrams_ends_when_the_operator_says() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let queue = Arc::new(RequestQueue::default());
        let ways = ToPeers(vec![Arc::clone(&queue)]);
        let datagrams = capture.take_datagrams().expect("not taken yet");
        tokio::task::spawn_local(datagrams.run(ways, Duration::from_millis(100)));
        let sent = run(&scope, || {
            unbound(addr(FAR4))?.send_to(b"hello", addr(FAR4))?;
            Ok(String::new())
        });
        sent.await.unwrap();
        let mut came = Vec::new();
        while came.len() < 2 {
            queue.flows.available().await;
            came.extend(queue.flows.pop());
        }
        let [FlowInput::Datagram(sent, ..), FlowInput::Closed(ended)] = &came[..] else {
            panic!("{came:?}")
        };
        assert!(Arc::ptr_eq(sent, ended));
        assert_eq!(capture.counters().udp_flows, 0);
    });
}

#[test]
fn segments_of_one_call_arrive_each_by_itself() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let mut heard = talk(&mut capture);
        for to in [FAR4, FAR6] {
            let sent = run(&scope, move || {
                let socket = unbound(addr(to))?;
                let size: libc::c_int = 100;
                // SAFETY: a live descriptor, and a pointer to an int with its length.
                let result = unsafe {
                    libc::setsockopt(
                        socket.as_raw_fd(),
                        libc::SOL_UDP,
                        libc::UDP_SEGMENT,
                        (&raw const size).cast(),
                        4,
                    )
                };
                assert_eq!(result, 0);
                let data: Vec<u8> = (0..950).map(|at| (at / 100) as u8).collect();
                socket.send_to(&data, addr(to))?;
                Ok(String::new())
            });
            sent.await.unwrap();
            for index in 0..10 {
                let len = if index == 9 { 50 } else { 100 };
                assert_eq!(heard.recv().await.unwrap().data, vec![index; len]);
            }
        }
    });
}
