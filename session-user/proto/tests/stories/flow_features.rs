//! What belongs to datagrams beside their bytes, and peers that know no such thing.

use session_proto::session::{Config, DatagramInfo, FlowEvent, FlowId, Session};
use session_proto::wire::Dscp;

use crate::net::FlowPair;
use crate::pair::{config_of, target};

fn got(session: &mut Session) -> Vec<(FlowId, Vec<u8>, DatagramInfo)> {
    std::iter::from_fn(|| session.poll_datagram_info())
        .map(|(id, data, info)| (id, data.to_vec(), info))
        .collect()
}

fn asking(tos: u8) -> DatagramInfo {
    DatagramInfo {
        dscp: Dscp::of_tos(tos),
        source: None,
    }
}

/// `a` sends each of `infos` on a flow of its own, in parts where it takes some; what `b` gets of them.
fn carried(mut net: FlowPair, infos: &[DatagramInfo], bytes: usize) -> Vec<DatagramInfo> {
    let id = net.pair.a.open_flow(net.pair.now, target()).unwrap();
    for info in infos {
        let (now, data) = (net.pair.now, vec![7; bytes]);
        (net.pair.a.send_datagram_with(now, id, &data, info)).unwrap();
        net.run();
    }
    let got = got(&mut net.pair.b);
    assert!(got.iter().all(|(_, data, _)| *data == vec![7; bytes]));
    got.into_iter().map(|(_, _, info)| info).collect()
}

#[test]
fn each_datagram_brings_the_service_that_it_asks_for() {
    let infos = [asking(0), asking(0xb8), asking(0x10), asking(0)];
    for bytes in [0, 100, 5_000] {
        assert_eq!(carried(FlowPair::over_tcp(), &infos, bytes), infos);
        assert_eq!(carried(FlowPair::with_udp(), &infos, bytes), infos);
    }
}

#[test]
fn a_peer_that_knows_no_service_gets_the_datagram_without() {
    let net = FlowPair::with_config(config_of(|c| c.flow_features = 0));
    let infos = [asking(0xb8), asking(0)];
    assert_eq!(carried(net, &infos, 100), [asking(0); 2]);
}

#[test]
fn answers_bring_a_service_too() {
    let mut net = FlowPair::with_udp();
    let id = net.warm_up();
    got(&mut net.pair.a);
    let now = net.pair.now;
    (net.pair
        .b
        .send_datagram_with(now, id, b"back", &asking(0x88)))
    .unwrap();
    net.run();
    assert_eq!(got(&mut net.pair.a), [(id, b"back".to_vec(), asking(0x88))]);
}

/// Somebody whom the opener of a flow has not spoken to.
fn stranger() -> DatagramInfo {
    DatagramInfo {
        source: Some("198.51.100.9:69".parse().unwrap()),
        ..asking(0x10)
    }
}

fn opened(session: &mut Session) -> Vec<(FlowId, Option<u64>)> {
    std::iter::from_fn(|| session.poll_flow_event())
        .filter_map(|event| match event {
            FlowEvent::FlowOpened { id, group, .. } => Some((id, group)),
            _ => None,
        })
        .collect()
}

#[test]
fn flows_of_one_socket_say_so_and_strangers_are_told_apart_from_the_target() {
    for make in [FlowPair::over_tcp, FlowPair::with_udp] {
        let mut net = make();
        let now = net.pair.now;
        let mut open = |group| net.pair.a.open_flow_of(now, target(), group).unwrap();
        let flows = [open(Some(7)), open(Some(7)), open(None), open(Some(8))];
        for id in flows {
            net.pair.a.send_datagram(now, id, b"?").unwrap();
        }
        net.run();
        let groups = [Some(7), Some(7), None, Some(8)];
        assert_eq!(
            opened(&mut net.pair.b),
            std::array::from_fn::<_, 4, _>(|n| (flows[n], groups[n]))
        );
        let (now, infos) = (net.pair.now, [stranger(), asking(0)]);
        for (info, bytes) in infos.iter().zip([5_000, 1]) {
            let data = vec![1; bytes];
            (net.pair.b.send_datagram_with(now, flows[0], &data, info)).unwrap();
        }
        net.run();
        let mut came = got(&mut net.pair.a);
        // What goes in parts may come last.
        came.sort_by_key(|(_, data, _)| std::cmp::Reverse(data.len()));
        let came: Vec<_> = came.into_iter().map(|(id, _, info)| (id, info)).collect();
        assert_eq!(came, infos.map(|info| (flows[0], info)));
    }
}

#[test]
fn a_stranger_is_not_taken_for_the_target_of_a_flow_without_a_group() {
    for group in [None, Some(7)] {
        // Who is told of no group by an old unit, and who is told of none as the socket is connected.
        let old = |c: &mut Config| c.flow_features *= u64::from(group.is_none());
        let mut net = FlowPair::with_config(config_of(old));
        let now = net.pair.now;
        let id = net.pair.a.open_flow_of(now, target(), group).unwrap();
        net.pair.a.send_datagram(now, id, b"?").unwrap();
        net.run();
        assert_eq!(opened(&mut net.pair.b), [(id, None)]);
        let before = net.pair.b.flow_stats().unsent;
        (net.pair.b.send_datagram_with(now, id, b"!", &stranger())).unwrap();
        // Nor does the opener speak for others.
        (net.pair.a.send_datagram_with(now, id, b"!", &stranger())).unwrap();
        net.run();
        assert_eq!(net.pair.b.flow_stats().unsent, before + 1);
        assert_eq!(got(&mut net.pair.a).len(), 0);
        assert_eq!(got(&mut net.pair.b).len(), 1);
    }
}

#[test]
fn what_strangers_send_keeps_no_flow_open() {
    for make in [FlowPair::over_tcp, FlowPair::with_udp] {
        let mut net = make();
        let group = Some(7);
        let id = (net.pair.a.open_flow_of(net.pair.now, target(), group)).unwrap();
        net.pair.a.send_datagram(net.pair.now, id, b"?").unwrap();
        net.run();
        assert_eq!(opened(&mut net.pair.b), [(id, group)]);
        // Once in a minute, for as long as a silent flow lasts and a minute longer.
        for _ in 0..4 {
            let now = net.pair.now;
            // The last time it is gone.
            let _ = net.pair.b.send_datagram_with(now, id, b"!", &stranger());
            net.run_until(now + std::time::Duration::from_secs(60));
        }
        assert_eq!(net.pair.a.flows().count(), 0);
        assert_eq!(net.pair.b.flows().count(), 0);
        assert!(!got(&mut net.pair.a).is_empty());
    }
}
