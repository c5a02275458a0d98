//! Addresses that stand for names, and connections that ask about names.

use std::net::{SocketAddr, UdpSocket};
use std::rc::Rc;

use session_ebpf_common::{DNS_PEER, NAMED_PEER};

use super::harness::*;
use crate::capture::{
    Action, Capture, CaptureConfig, CaptureRule, Protocol, Question, Verdict, reserve,
};

const RESERVED: [&str; 2] = ["198.18.0.0/15", "fd00:1:2:3::/64"];

fn verdict(capture: &Capture, scope: &crate::capture::Scope, to: &str) -> Verdict {
    let question = Question {
        to: to.parse().unwrap(),
        uid: 0,
        protocol: Protocol::Tcp,
    };
    let answer = capture.explain(scope.path(), None, &question).unwrap();
    answer.verdict
}

#[test]
fn questions_and_reserved_addresses_come_to_the_agent() {
    in_netns(async || {
        let refuse = CaptureRule {
            action: Action::Refuse,
            ..rule(&["203.0.113.0/24"], 0)
        };
        let direct = CaptureRule {
            action: Action::Direct,
            ..rule(&["198.18.0.0/16", "10.0.0.0/8"], 0)
        };
        let reserved = RESERVED.map(|net| net.parse().unwrap());
        let rules = reserve(&[refuse, direct, rule(&["192.0.2.0/24"], 3)], &reserved);
        let scope = scope();
        let config = CaptureConfig {
            rules,
            names: true,
            ..CaptureConfig::default()
        };
        let mut capture = Capture::load(&config).unwrap_or_else(|error| panic!("{error}"));
        capture.attach(scope.path()).unwrap();
        let _heard = talk(&mut capture);
        let capture = Rc::new(capture);
        let _reports = serve(Rc::clone(&capture));
        for (to, peer) in [
            // Whatever a rule says of the range.
            ("198.18.0.7:443", NAMED_PEER),
            ("[fd00:1:2:3::7]:443", NAMED_PEER),
            ("198.18.0.7:53", NAMED_PEER),
            // To any resolver, also one on this host; through the peer that would carry it.
            ("127.0.0.53:53", DNS_PEER),
            ("[::1]:53", DNS_PEER),
            ("10.9.0.1:53", DNS_PEER),
            ("198.51.100.1:53", DNS_PEER),
            ("192.0.2.53:53", 3),
            ("192.0.2.53:443", 3),
        ] {
            let said = run(&scope, move || ask(to)).await;
            assert_eq!(said.as_deref(), Ok(captured(to, peer).as_str()), "{to}");
            assert_eq!(verdict(&capture, &scope, to), Verdict::Capture, "{to}");
            // The same over UDP; what is for no peer is in the last queue there.
            let datagram = run(&scope, move || {
                let to: SocketAddr = to.parse().unwrap();
                let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                exchange(&UdpSocket::bind(any)?, to, "hello")
            });
            let expected = answered(to, peer.min(PEERS - 1), "hello", to);
            assert_eq!(datagram.await, Ok(expected), "{to}");
        }
        let refused = run(&scope, move || ask("203.0.113.1:53")).await;
        assert_eq!(refused, Err("ECONNREFUSED".to_owned()));
        assert_eq!(verdict(&capture, &scope, "203.0.113.1:53"), Verdict::Refuse);
        // What was a connection to this host looks like one.
        let local = run(&scope, || {
            let to: SocketAddr = "127.0.0.53:53".parse().unwrap();
            Ok(std::net::TcpStream::connect(to)?
                .local_addr()?
                .ip()
                .to_string())
        });
        assert_eq!(local.await.as_deref(), Ok("127.0.0.1"));
        // Other ports of this host are nobody's business.
        let shut = run(&scope, || ask("127.0.0.53:54")).await;
        assert_eq!(shut, Err("ECONNREFUSED".to_owned()));
        assert_eq!(verdict(&capture, &scope, "127.0.0.53:54"), Verdict::Direct);
    });
}
