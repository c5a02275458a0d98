//! Messages as bytes, good and bad.

use rtnetlink::packet_core::{NLM_F_DUMP_INTR, NLM_F_REPLACE, NLMSG_ERROR, Parseable as _};
use rtnetlink::packet_route::link::LinkMessage;

use super::message::*;
use libc::{RTM_DELLINK, RTM_NEWLINK, RTM_NEWROUTE};
use proptest::prelude::*;

const AF_INET: u8 = 2;
/// `struct nlmsghdr` (linux/netlink.h).
const HEADER: usize = 16;

fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&7_u32.to_ne_bytes());
    bytes.extend_from_slice(&9_u32.to_ne_bytes());
    bytes.extend_from_slice(body);
    bytes.resize(align(bytes.len()), 0);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(align(bytes.len()), 0);
    bytes
}

fn only(bytes: &[u8]) -> Option<News> {
    let all: Vec<_> = messages(bytes).collect();
    assert_eq!(all.len(), 1);
    all[0].news.clone()
}

fn link_body(family: u8) -> Vec<u8> {
    let mut body = vec![family, 0, 1, 0];
    body.extend_from_slice(&3_u32.to_ne_bytes());
    body.extend_from_slice(&0x1_0041_u32.to_ne_bytes());
    body.extend_from_slice(&[0; 4]);
    body.extend(attribute(3, b"wifi0\0"));
    body.extend(attribute(4, &1500_u32.to_ne_bytes()));
    body.extend(attribute(16, &[6]));
    body.extend(attribute(18, &attribute(1, b"veth\0")));
    body.extend(attribute(4000, b"from a kernel of tomorrow"));
    body
}

#[test]
fn a_link_is_read_past_unknown_attributes() {
    let Some(News::Link(link)) = only(&message(RTM_NEWLINK, 0, &link_body(0))) else {
        panic!("not a link");
    };
    assert_eq!((link.index, link.flags), (3, 0x1_0041));
    assert_eq!(link.name.as_deref(), Some("wifi0"));
    assert_eq!(link.kind.as_deref(), Some("veth"));
    assert_eq!((link.mtu, link.operstate), (Some(1500), Some(6)));
}

/// The library refuses a whole link for one attribute; a kernel of tomorrow may send such a one.
#[test]
fn a_link_is_read_past_an_attribute_that_the_library_refuses() {
    const IFLA_GROUP: u16 = 27;
    let mut body = link_body(0);
    let at = 16;
    body.splice(at..at, attribute(IFLA_GROUP, &[1, 2, 3]));
    assert!(LinkMessage::parse(&body[..]).is_err());
    let Some(News::Link(link)) = only(&message(RTM_NEWLINK, 0, &body)) else {
        panic!("not a link");
    };
    assert_eq!(link.name.as_deref(), Some("wifi0"));
    assert_eq!((link.index, link.operstate), (3, Some(6)));
}

#[test]
fn leaving_a_bridge_is_not_the_end_of_a_link() {
    let bytes = message(RTM_DELLINK, 0, &link_body(7));
    assert_eq!(only(&bytes), Some(News::Other));
}

#[test]
fn a_route_with_several_next_hops_is_one_fact_for_each() {
    let mut hop = vec![0, 0, 0, 0];
    hop.extend_from_slice(&4_u32.to_ne_bytes());
    hop.extend(attribute(5, &[10, 0, 0, 1]));
    let length = hop.len() as u16;
    hop[..2].copy_from_slice(&length.to_ne_bytes());
    let mut second = hop.clone();
    second[4] = 5;
    let mut body = vec![AF_INET, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
    body.extend(attribute(6, &100_u32.to_ne_bytes()));
    body.extend(attribute(9, &[hop, second].concat()));
    let Some(News::Routes { hops, replace }) = only(&message(RTM_NEWROUTE, NLM_F_REPLACE, &body))
    else {
        panic!("not a route");
    };
    assert!(replace);
    assert_eq!(hops.iter().map(|h| h.index).collect::<Vec<_>>(), [4, 5]);
    assert!(hops.iter().all(|h| h.metric == 100
        && h.dst.to_string() == "0.0.0.0/0"
        && h.gateway == Some("10.0.0.1".parse().unwrap())));
}

#[test]
fn a_truncated_message_says_so_and_ends_the_datagram() {
    let whole = message(RTM_NEWLINK, 0, &link_body(0));
    for cut in 1..whole.len() {
        let all: Vec<_> = messages(&whole[..cut]).collect();
        assert_eq!(all.len(), 1, "cut at {cut}");
        assert_eq!(all[0].news, None, "cut at {cut}");
    }
}

#[test]
fn an_answer_carries_seq_port_and_errno() {
    let body = (-16_i32).to_ne_bytes();
    let bytes = message(NLMSG_ERROR, NLM_F_DUMP_INTR, &body);
    let all: Vec<_> = messages(&bytes).collect();
    assert_eq!((all[0].seq, all[0].port, all[0].interrupted), (7, 9, true));
    assert_eq!(all[0].news, Some(News::Refused(16)));
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let count = messages(&bytes).count();
        prop_assert!(count <= bytes.len() / HEADER + 1);
    }

    #[test]
    fn no_body_panics(kind in 16_u16..26, body in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(messages(&message(kind, 0, &body)).count() >= 1);
    }
}
