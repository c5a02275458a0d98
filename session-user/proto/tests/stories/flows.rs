//! Flows, and the UDP transport under them.

use std::time::Duration;

use bytes::BytesMut;
use session_proto::limits::{DATAGRAM_BYTES_MAX, DATAGRAM_QUEUE_BYTES, PARTIAL_TIME, UDP_RETRY};
use session_proto::seal::Direction;
use session_proto::session::{
    FlowError, FlowEvent, FlowId, PacketFault, Session, UdpPath, UdpTransmit,
};
use session_proto::wire::{DatagramHeader, Frame, RecordHeader, Space};

use crate::net::{A, B, FlowPair, NOWHERE, SERVER};
use crate::pair::{Pair, config, drain, feed, secret, target, write};

const WIFI: UdpPath = UdpPath(1);
const MOBILE: UdpPath = UdpPath(2);

fn got(session: &mut Session) -> Vec<(FlowId, Vec<u8>)> {
    std::iter::from_fn(|| session.poll_datagram())
        .map(|(id, data)| (id, data.to_vec()))
        .collect()
}

fn events(session: &mut Session) -> Vec<FlowEvent> {
    std::iter::from_fn(|| session.poll_flow_event())
        .filter(|e| *e != FlowEvent::ConnectionIdsChanged)
        .collect()
}

#[test]
fn the_first_datagram_waits_for_nothing_and_names_its_target() {
    let mut net = FlowPair::over_tcp();
    let id = net.pair.a.open_flow(net.pair.now, target()).unwrap();
    for data in [&b"one"[..], b"", b"three"] {
        net.pair.a.send_datagram(net.pair.now, id, data).unwrap();
    }
    net.run();
    let opened = FlowEvent::FlowOpened {
        id,
        target: target(),
        group: None,
    };
    assert_eq!(events(&mut net.pair.b), [opened]);
    let all = [b"one".to_vec(), vec![], b"three".to_vec()];
    assert_eq!(got(&mut net.pair.b), all.map(|data| (id, data)));
    // The answer needs no target, nor does what follows.
    net.pair.b.send_datagram(net.pair.now, id, b"back").unwrap();
    net.run();
    assert_eq!(got(&mut net.pair.a), [(id, b"back".to_vec())]);
    let before = net.tcp_bytes;
    net.pair.a.send_datagram(net.pair.now, id, b"four").unwrap();
    net.run();
    assert_eq!(net.tcp_bytes - before, 16 + 16 + 2 + 2 + 4);
    assert_eq!(got(&mut net.pair.b), [(id, b"four".to_vec())]);
}

#[test]
fn a_peer_that_knows_no_flows_gets_none() {
    let mut pair = Pair::open(&config());
    let refused = pair.a.open_flow(pair.now, target());
    assert_eq!(refused, Err(FlowError::TooMany));
}

#[test]
fn flows_are_limited_and_ends_make_room() {
    let mut net = FlowPair::over_tcp();
    let now = net.pair.now;
    let ids: Vec<FlowId> = (0..4)
        .map(|_| net.pair.a.open_flow(now, target()).unwrap())
        .collect();
    assert_eq!(net.pair.a.open_flow(now, target()), Err(FlowError::TooMany));
    net.pair.a.send_datagram(now, ids[0], b"x").unwrap();
    net.run();
    net.pair.a.close_flow(ids[0]);
    // The peer has not been told.
    assert_eq!(net.pair.a.open_flow(now, target()), Err(FlowError::TooMany));
    net.run();
    assert_eq!(net.pair.a.open_flow(now, target()), Ok(8));
    let told = events(&mut net.pair.b);
    assert_eq!(told.last(), Some(&FlowEvent::FlowClosed { id: ids[0] }));
    assert_eq!(
        net.pair.a.send_datagram(now, ids[0], b"x"),
        Err(FlowError::Gone)
    );
    let large = vec![0; DATAGRAM_BYTES_MAX + 1];
    assert_eq!(
        net.pair.a.send_datagram(now, ids[1], &large),
        Err(FlowError::TooLarge)
    );
}

#[test]
fn an_unreachable_port_is_told_and_what_comes_late_opens_nothing() {
    let mut net = FlowPair::over_tcp();
    let id = net.pair.a.open_flow(net.pair.now, target()).unwrap();
    net.pair.a.send_datagram(net.pair.now, id, b"?").unwrap();
    let late = drain(net.pair.now, &mut net.pair.a, net.pair.wires[0].0);
    feed(net.pair.now, &mut net.pair.b, net.pair.wires[0].1, &late).unwrap();
    net.pair.b.flow_error(id, 111);
    net.pair.a.send_datagram(net.pair.now, id, b"?").unwrap();
    net.run();
    let failed = FlowEvent::FlowFailed { id, errno: 111 };
    assert_eq!(events(&mut net.pair.a), [failed]);
    assert_eq!(net.pair.a.flows().count() + net.pair.b.flows().count(), 0);
    assert_eq!(net.pair.b.flow_stats().stray, 1);
    assert_eq!(events(&mut net.pair.b).len(), 1);
}

#[test]
fn an_idle_flow_ends_at_both_ends_and_nothing_wakes_them_afterwards() {
    let mut net = FlowPair::over_tcp();
    let id = net.pair.a.open_flow(net.pair.now, target()).unwrap();
    net.pair.a.send_datagram(net.pair.now, id, b"x").unwrap();
    let begun = net.pair.now;
    net.run();
    // A quarter of the time before: still there.
    net.run_until(begun + Duration::from_secs(135));
    assert_eq!(net.pair.a.flows().count(), 1);
    net.pair.b.send_datagram(net.pair.now, id, b"y").unwrap();
    net.run_until(begun + Duration::from_secs(200));
    assert_eq!(net.pair.b.flows().count(), 1);
    net.run_until(begun + Duration::from_secs(320));
    let closed = FlowEvent::FlowClosed { id };
    assert_eq!(events(&mut net.pair.a), std::slice::from_ref(&closed));
    assert_eq!(events(&mut net.pair.b)[1..], [closed]);
    for session in [&net.pair.a, &net.pair.b] {
        assert_eq!(session.poll_timeout(), None);
    }
}

#[test]
fn udp_is_tried_beside_tcp_and_then_used_alone() {
    let mut net = FlowPair::with_udp();
    let id = net.pair.a.open_flow(net.pair.now, target()).unwrap();
    net.pair.a.send_datagram(net.pair.now, id, b"x").unwrap();
    net.run();
    // It came twice and was delivered once.
    assert_eq!(got(&mut net.pair.b), [(id, b"x".to_vec())]);
    assert_eq!(net.pair.b.flow_stats().duplicates, 1);
    assert!(net.pair.a.udp_status().unwrap().usable);
    assert!(events(&mut net.pair.a).contains(&FlowEvent::UdpUsable(WIFI)));
    net.pair.b.send_datagram(net.pair.now, id, b"y").unwrap();
    net.run();
    assert!(net.pair.b.udp_status().unwrap().usable);
    let (tcp, packets) = (net.tcp_bytes, net.packets);
    net.pair.a.send_datagram(net.pair.now, id, b"a").unwrap();
    net.pair.b.send_datagram(net.pair.now, id, b"b").unwrap();
    net.run();
    assert_eq!(net.tcp_bytes, tcp);
    assert!(net.packets >= packets + 2);
    assert_eq!(got(&mut net.pair.b), [(id, b"a".to_vec())]);
    assert_eq!(
        got(&mut net.pair.a),
        [(id, b"y".to_vec()), (id, b"b".to_vec())]
    );
}

#[test]
fn nothing_is_asked_while_no_flow_is_open() {
    let mut net = FlowPair::with_udp();
    net.run_until(net.pair.now + Duration::from_secs(600));
    assert_eq!(net.packets, 0);
    let id = net.warm_up();
    let before = net.packets;
    // A NAT is kept awake while the flow is open, and only then.
    net.run_until(net.pair.now + Duration::from_secs(100));
    let kept = net.packets - before;
    assert!((8..=16).contains(&kept), "{kept}");
    net.pair.a.close_flow(id);
    net.run();
    let before = net.packets;
    net.run_until(net.pair.now + Duration::from_secs(1000));
    assert_eq!(net.packets, before);
}

#[test]
fn a_path_may_be_kept_warm_and_then_the_first_datagram_takes_it_alone() {
    let mut net = FlowPair::with_config(crate::pair::config_of(|c| c.udp_keep_alive_idle = true));
    net.add_udp();
    net.run_until(net.pair.now + Duration::from_secs(100));
    assert!((5..=30).contains(&net.packets), "{}", net.packets);
    assert!(net.pair.a.udp_status().unwrap().usable);
    let before = net.tcp_bytes;
    let id = net.pair.a.open_flow(net.pair.now, target()).unwrap();
    net.pair.a.send_datagram(net.pair.now, id, b"x").unwrap();
    net.run();
    assert_eq!(got(&mut net.pair.b), [(id, b"x".to_vec())]);
    assert_eq!(net.tcp_bytes, before);
}

#[test]
fn where_udp_is_blocked_datagrams_go_over_tcp_and_udp_is_tried_again() {
    let mut net = FlowPair::with_udp();
    net.drop_all = true;
    let id = net.pair.a.open_flow(net.pair.now, target()).unwrap();
    for round in 0..100u8 {
        net.pair
            .a
            .send_datagram(net.pair.now, id, &[round])
            .unwrap();
        net.run_until(net.pair.now + Duration::from_millis(100));
    }
    assert_eq!(got(&mut net.pair.b).len(), 100, "none is lost");
    assert!(events(&mut net.pair.a).contains(&FlowEvent::UdpBlocked(WIFI)));
    // Meanwhile nothing but TCP is used.
    let before = net.packets;
    net.pair.a.send_datagram(net.pair.now, id, b"x").unwrap();
    assert!(net.pair.a.poll_udp(net.pair.now).is_none());
    net.drop_all = false;
    net.run_until(net.pair.now + UDP_RETRY * 2);
    assert_eq!(net.packets, before, "no datagram, no question");
    net.pair.a.send_datagram(net.pair.now, id, b"y").unwrap();
    net.run();
    assert!(net.pair.a.udp_status().unwrap().usable);
}

#[test]
fn another_address_of_the_peer_is_tried_where_the_first_does_not_answer() {
    let mut net = FlowPair::with_udp();
    let path = UdpPath(3);
    let now = net.pair.now;
    net.pair
        .a
        .udp_path_added(now, path, &[NOWHERE, SERVER], 1500);
    net.pair.a.prefer_udp(now, path);
    let id = net.pair.a.open_flow(now, target()).unwrap();
    for _ in 0..30 {
        net.pair.a.send_datagram(net.pair.now, id, b"x").unwrap();
        net.run_until(net.pair.now + Duration::from_millis(100));
    }
    let status = net.pair.a.udp_status().unwrap();
    assert!(status.usable && status.remote == SERVER, "{status:?}");
    assert_eq!(got(&mut net.pair.b).len(), 30);
    // What the kernel finds too large for the link is not sent again.
    net.pair
        .a
        .send_datagram(net.pair.now, id, &[0; 1400])
        .unwrap();
    net.run();
    assert_eq!(net.pair.a.udp_status().unwrap().mtu, 1472);
    net.pair.a.udp_too_large(path, SERVER, 1472);
    assert_eq!(net.pair.a.udp_status().unwrap().mtu, 1200);
}

#[test]
fn a_path_that_falls_silent_is_noticed_and_datagrams_go_over_tcp() {
    let mut net = FlowPair::with_udp();
    let id = net.warm_up();
    got(&mut net.pair.b);
    net.drop_all = true;
    let mut sent = 0;
    for _ in 0..200 {
        net.pair
            .a
            .send_datagram(net.pair.now, id, &[7; 100])
            .unwrap();
        sent += 1;
        net.run_until(net.pair.now + Duration::from_millis(20));
    }
    let lost = sent - got(&mut net.pair.b).len();
    // Until the next question is due, and its answer.
    assert!((1..=18).contains(&lost), "{lost} of {sent} lost");
}

#[test]
fn datagrams_of_any_size_go_through_and_the_path_mtu_is_found() {
    let mut net = FlowPair::with_udp();
    let id = net.warm_up();
    got(&mut net.pair.b);
    for size in [0, 1, 1100, 1200, 1500, 9000, DATAGRAM_BYTES_MAX] {
        let data: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        net.pair.a.send_datagram(net.pair.now, id, &data).unwrap();
        net.run();
        assert_eq!(got(&mut net.pair.b), [(id, data)], "{size}");
    }
    assert_eq!(net.pair.a.udp_status().unwrap().mtu, 1472);
    // A smaller path that says nothing: first the large ones vanish, then it is found out.
    net.mtu = 1300;
    for _ in 0..80 {
        net.pair
            .a
            .send_datagram(net.pair.now, id, &[1; 4000])
            .unwrap();
        net.run_until(net.pair.now + Duration::from_millis(100));
    }
    let mtu = net.pair.a.udp_status().unwrap().mtu;
    assert!((1284..=1300).contains(&mtu), "{mtu}");
    assert!(got(&mut net.pair.b).len() > 40);
    assert!(net.pair.b.flow_stats().incomplete > 0);
    net.run_until(net.pair.now + PARTIAL_TIME);
    assert_eq!(net.pair.b.flow_memory_bytes(), 0);
}

#[test]
fn a_path_below_the_base_is_used_as_well() {
    let mut net = FlowPair::with_udp();
    net.mtu = 900;
    let id = net.pair.a.open_flow(net.pair.now, target()).unwrap();
    for _ in 0..40 {
        net.pair
            .a
            .send_datagram(net.pair.now, id, &[1; 1000])
            .unwrap();
        net.run_until(net.pair.now + Duration::from_millis(100));
    }
    let status = net.pair.a.udp_status().unwrap();
    assert!(status.usable && (884..=900).contains(&status.mtu));
    assert_eq!(got(&mut net.pair.b).len(), 40);
}

#[test]
fn a_handover_loses_no_datagram_and_takes_no_round_trip() {
    let mut net = FlowPair::with_udp();
    let id = net.warm_up();
    got(&mut net.pair.a);
    got(&mut net.pair.b);
    // The old link is dead from now on; the new one has never been used.
    net.dead.insert(A);
    net.pair.a.prefer_udp(net.pair.now, MOBILE);
    net.pair.a.send_datagram(net.pair.now, id, b"up").unwrap();
    let first = net.pair.a.poll_udp(net.pair.now).unwrap();
    assert_eq!((first.path, first.to), (MOBILE, SERVER));
    net.put(first);
    net.deliver_one();
    assert_eq!(got(&mut net.pair.b), [(id, b"up".to_vec())]);
    // The answer goes to the address that is not proven yet, within what came from it.
    net.pair.b.send_datagram(net.pair.now, id, b"down").unwrap();
    let all: Vec<UdpTransmit> = std::iter::from_fn(|| net.pair.b.poll_udp(net.pair.now)).collect();
    assert!(all.iter().any(|t| t.to == A) && all.iter().any(|t| t.to == B));
    for transmit in all {
        net.put(transmit);
    }
    net.run();
    assert_eq!(got(&mut net.pair.a), [(id, b"down".to_vec())]);
    assert_eq!(net.pair.b.udp_status().unwrap().remote, B);
    assert_eq!(net.pair.b.flow_stats().moves, 1);
}

#[test]
fn nobody_but_the_peer_moves_the_address() {
    let mut net = FlowPair::with_udp();
    let id = net.warm_up();
    got(&mut net.pair.a);
    let attacker = "203.0.113.66:6666".parse().unwrap();
    net.pair.a.send_datagram(net.pair.now, id, b"x").unwrap();
    let original = net.pair.a.poll_udp(net.pair.now).unwrap();
    // A copy that comes first, and from elsewhere: it is authentic and has the highest number.
    let copy = BytesMut::from(&original.packet[..]);
    let bytes = copy.len();
    net.pair
        .b
        .handle_udp(net.pair.now, WIFI, attacker, copy)
        .unwrap();
    net.put(original);
    let mut to_attacker = 0;
    for _ in 0..40 {
        net.pair
            .b
            .send_datagram(net.pair.now, id, &[0; 50])
            .unwrap();
        while let Some(transmit) = net.pair.b.poll_udp(net.pair.now) {
            if transmit.to == attacker {
                to_attacker += transmit.packet.len();
            } else {
                net.put(transmit);
            }
        }
        net.run_until(net.pair.now + Duration::from_millis(100));
    }
    assert!(to_attacker > 0 && to_attacker <= 3 * bytes, "{to_attacker}");
    assert_eq!(net.pair.b.udp_status().unwrap().remote, A);
    assert_eq!(got(&mut net.pair.a).len(), 40);
    // Replays and changed bytes do nothing at all.
    net.pair.a.send_datagram(net.pair.now, id, b"y").unwrap();
    let next = net.pair.a.poll_udp(net.pair.now).unwrap();
    let mut changed = BytesMut::from(&next.packet[..]);
    *changed.last_mut().unwrap() ^= 1;
    let b = &mut net.pair.b;
    let refused = b.handle_udp(net.pair.now, WIFI, attacker, changed);
    assert!(matches!(refused, Err(PacketFault::Seal(_))));
    let copy = || BytesMut::from(&next.packet[..]);
    assert_eq!(b.handle_udp(net.pair.now, WIFI, A, copy()), Ok(()));
    let repeated = b.handle_udp(net.pair.now, WIFI, attacker, copy());
    assert_eq!(repeated, Err(PacketFault::Repeated));
    let stranger = b.handle_udp(
        net.pair.now,
        WIFI,
        attacker,
        BytesMut::from(&[0x82; 60][..]),
    );
    assert_eq!(stranger, Err(PacketFault::Unknown));
    assert_eq!(b.udp_status().unwrap().remote, A);
}

#[test]
fn a_nat_that_gives_another_address_is_followed() {
    let mut net = FlowPair::with_udp();
    let id = net.warm_up();
    got(&mut net.pair.b);
    got(&mut net.pair.a);
    net.rebind(A, "198.51.100.9:4000".parse().unwrap());
    // Only the far end speaks: its datagrams go over TCP once UDP is not answered, and that makes this
    // end show its new address.
    let mut sent = 0;
    for _ in 0..100 {
        net.pair
            .b
            .send_datagram(net.pair.now, id, &[3; 80])
            .unwrap();
        sent += 1;
        net.run_until(net.pair.now + Duration::from_millis(20));
    }
    let lost = sent - got(&mut net.pair.a).len();
    assert!(lost <= 18, "{lost} of {sent} lost");
    assert_eq!(
        net.pair.b.udp_status().unwrap().remote,
        "198.51.100.9:4000".parse().unwrap()
    );
    assert!(net.pair.b.udp_status().unwrap().usable);
}

#[test]
fn paths_have_names_of_their_own() {
    let mut net = FlowPair::with_udp();
    let id = net.warm_up();
    net.pair.a.prefer_udp(net.pair.now, MOBILE);
    net.pair.a.send_datagram(net.pair.now, id, b"x").unwrap();
    net.run();
    net.pair.a.prefer_udp(net.pair.now, WIFI);
    net.pair.a.send_datagram(net.pair.now, id, b"x").unwrap();
    net.run();
    let seen = |path: UdpPath| {
        let all = net.sent.iter().filter(|(t, _)| t.path == path);
        let mut ids: Vec<&[u8]> = all
            .filter(|(_, by_a)| *by_a)
            .map(|(t, _)| &t.packet[1..9])
            .collect();
        ids.dedup();
        ids
    };
    let (wifi, mobile) = (seen(WIFI), seen(MOBILE));
    assert_eq!((wifi.len(), mobile.len()), (1, 1));
    assert_ne!(wifi, mobile);
    // Nor do the numbers go on from path to path.
    let number = |path: UdpPath| {
        let mut all = net.sent.iter().filter(|(t, by_a)| *by_a && t.path == path);
        let bytes: [u8; 8] = all.next_back().unwrap().0.packet[13..21]
            .try_into()
            .unwrap();
        u64::from_be_bytes(bytes)
    };
    assert!(number(WIFI).abs_diff(number(MOBILE)) > 1 << 32);
}

#[test]
fn datagrams_do_not_wait_behind_streams_nor_without_bound() {
    let mut net = FlowPair::over_tcp();
    let stream = net.pair.stream();
    let id = net.pair.a.open_flow(net.pair.now, target()).unwrap();
    write(net.pair.now, &mut net.pair.a, stream, &vec![1; 100_000]);
    net.pair.a.send_datagram(net.pair.now, id, b"now").unwrap();
    let (on_a, on_b) = net.pair.wires[0];
    let bytes = drain(net.pair.now, &mut net.pair.a, on_a);
    // The first record of all is the datagram's.
    let records = crate::pair::records(&bytes);
    feed(net.pair.now, &mut net.pair.b, on_b, records[0].1).unwrap();
    assert_eq!(got(&mut net.pair.b), [(id, b"now".to_vec())]);
    for _ in 0..100 {
        net.pair
            .a
            .send_datagram(net.pair.now, id, &[0; 10_000])
            .unwrap();
    }
    let stats = net.pair.a.flow_stats();
    let kept = DATAGRAM_QUEUE_BYTES / 10_000 + 1;
    assert_eq!(stats.unsent, 100 - kept as u64);
    // What waits for a transport that dies goes over the next one.
    net.pair.a.transport_lost(on_a);
    net.pair.b.transport_lost(on_b);
    net.pair.wires.clear();
    assert_eq!(net.pair.a.active(), None);
    net.pair
        .a
        .send_datagram(net.pair.now, id, b"nowhere")
        .unwrap();
    assert_eq!(net.pair.a.flow_stats().unsent, stats.unsent + 1);
}

#[test]
fn an_end_of_a_session_leaves_no_flow() {
    let mut net = FlowPair::with_udp();
    let id = net.warm_up();
    net.pair.b.close(net.pair.now, 0, "over");
    net.run();
    for session in [&mut net.pair.a, &mut net.pair.b] {
        assert_eq!(session.flows().count(), 0);
        assert_eq!(
            session.send_datagram(net.pair.now, id, b"x"),
            Err(FlowError::NotOpen)
        );
        let late = session.handle_udp(net.pair.now, WIFI, A, BytesMut::from(&[0x82; 60][..]));
        assert_eq!(late, Err(PacketFault::Closed));
    }
}

#[test]
fn keys_change_under_flows() {
    let mut net = FlowPair::with_config(crate::pair::config_of(|c| c.rekey_records = 20));
    net.add_udp();
    let id = net.warm_up();
    got(&mut net.pair.b);
    for round in 0..200u8 {
        net.pair
            .a
            .send_datagram(net.pair.now, id, &[round])
            .unwrap();
        net.run_until(net.pair.now + Duration::from_millis(20));
    }
    assert_eq!(got(&mut net.pair.b).len(), 200);
    assert!(net.pair.a.stats().rekeys >= 9);
    assert_eq!(net.pair.b.flow_stats().packets_refused, 0);
}

#[test]
fn a_frame_for_a_flow_that_was_never_opened_ends_the_session() {
    let flow = 1;
    let mut strays = 0;
    for (frame, ends) in [
        (Frame::FlowOk { id: flow }, true),
        // The target of one of the peer's flows is missing: it came late, and is dropped.
        (
            Frame::Datagram {
                header: DatagramHeader {
                    flow: 0,
                    ..DatagramHeader::default()
                },
                data: b"x",
            },
            false,
        ),
        // The opener of a flow says that another has sent it.
        (
            Frame::Datagram {
                header: DatagramHeader {
                    flow: 2,
                    source: Some(NOWHERE),
                    ..DatagramHeader::default()
                },
                data: b"x",
            },
            true,
        ),
    ] {
        let mut net = FlowPair::over_tcp();
        let now = net.pair.now;
        let mut open = || net.pair.a.open_flow(now, target()).unwrap();
        assert_eq!([open(), open()], [0, 2]);
        net.pair.a.send_datagram(now, 2, b"known").unwrap();
        net.run();
        let (_, on_b) = net.pair.wires[0];
        let keys = secret().seal_keys(Direction::FromInitiator);
        let mut plain = Vec::new();
        frame.encode(&mut plain);
        let header = RecordHeader {
            space: Space::Unretained,
            payload_bytes: plain.len() + 16,
            epoch: 0,
            number: 1000,
        }
        .encode();
        let tag = keys.transport_key(0).seal(&header, 1000, &mut plain);
        let record = [&header[..], &plain, &tag].concat();
        feed(net.pair.now, &mut net.pair.b, on_b, &record).unwrap();
        assert_eq!(net.pair.b.is_ending(), ends, "{frame:?}");
        strays += net.pair.b.flow_stats().stray;
    }
    assert_eq!(strays, 1);
}
