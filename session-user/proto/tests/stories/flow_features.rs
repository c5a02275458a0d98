//! What belongs to datagrams beside their bytes, and peers that know no such thing.

use session_proto::session::{DatagramInfo, FlowId, Session};
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
    (net.pair.b.send_datagram_with(now, id, b"back", &asking(0x88))).unwrap();
    net.run();
    assert_eq!(got(&mut net.pair.a), [(id, b"back".to_vec(), asking(0x88))]);
}
