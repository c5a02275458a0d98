//! What an operator's mistakes are answered with.

use proptest::prelude::*;

use super::*;
use crate::capture::{Action, Protocols};

const IDENTITY: &str = "[identity]\ncertificate = \"c\"\nkey = \"k\"\nca = \"a\"\n";

fn error(rest: &str) -> String {
    Config::parse(&format!("{IDENTITY}{rest}"), "test.toml")
        .unwrap_err()
        .to_string()
}

#[test]
fn the_example_shows_the_defaults() {
    let example = Config::parse(Config::EXAMPLE, "example.toml").unwrap();
    let least = Config::parse(IDENTITY, "least.toml").unwrap();
    assert_eq!(example.session, least.session);
    assert_eq!(example.transport, least.transport);
    assert_eq!(example.links.debounce, least.links.debounce);
    assert_eq!(example.agent.control, least.agent.control);
    assert_eq!(example.agent.busy_poll, least.agent.busy_poll);
    assert_eq!(example.captures[1].rule.ports, vec![], "all");
    assert_eq!(example.captures[0].rule.uids, vec![0..=0, 1000..=60000]);
    assert_eq!(example.peers[0].addresses.len(), 2);
    assert!(least.accept.is_none());
}

#[test]
fn errors_name_file_line_key_and_what_was_expected() {
    for (rest, expected) in [
        (
            "[session]\nhold = \"soon\"\n",
            "test.toml:6: session.hold: `soon` is not a duration: expected a number with ms",
        ),
        (
            "[session]\nmemory = \"1KiB\"\n",
            "test.toml:6: session.memory: `1KiB` is too little",
        ),
        (
            "[session]\nmemory_total = \"63MiB\"\n",
            "test.toml:6: session.memory_total: `63MiB` is too little: expected at least as much",
        ),
        (
            "[transport]\ncompression = \"gzip\"\n",
            "test.toml:6: transport.compression: `gzip` is not \"auto\", \"lz4\", \"zstd\" or \"off\"",
        ),
        (
            "[[stream]]\ncompression = \"on\"\n",
            "test.toml:6: stream.compression: `on` is not \"auto\", \"lz4\", \"zstd\" or \"off\"",
        ),
        (
            "[[peer]]\nname = \"gw\"\naddresses = [\"192.0.2.1\"]\n",
            "test.toml:7: peer.addresses: `192.0.2.1` is not an address with a port",
        ),
        (
            "[[peer]]\nname = \"gw\"\naddresses = []\n",
            "test.toml:7: peer.addresses: expected at least one address",
        ),
        (
            "[[peer]]\nname = \"gw\"\naddresses = [\"192.0.2.1:1\"]\n[[capture]]\npeer = \"wg\"\nto = [\"10.0.0.0/8\"]\n",
            "test.toml:9: capture.peer: `wg` is no [[peer]]; there is: gw",
        ),
        (
            "[[peer]]\nname = \"gw\"\naddresses = [\"192.0.2.1:1\"]\n[[capture]]\npeer = \"gw\"\nto = [\"10.0.0.0/40\"]\n",
            "test.toml:10: capture.to: `10.0.0.0/40` is not a network",
        ),
        (
            "[[peer]]\nname = \"gw\"\naddresses = [\"192.0.2.1:1\"]\n[[capture]]\npeer = \"gw\"\nto = [\"10.0.0.0/8\"]\nports = [\"9-1\"]\n",
            "test.toml:11: capture.ports: `9-1` is not a port or a range",
        ),
        (
            "[accept]\nlisten = [\"0.0.0.0:1\"]\nmax_sessions = 0\n",
            "test.toml:7: accept.max_sessions: 0 is out of range",
        ),
        (
            "[accept]\nlisten = [\"0.0.0.0:1\"]\n[[accept.allow]]\npeer = \"x\"\nto = [\"10.0.0.0/8\"]\n",
            "test.toml:9: accept.allow.to: ",
        ),
        (
            "[[peer]]\nname = \"gw\"\naddresses = [\"192.0.2.1:1\"]\n[[listen]]\nat = \"127.0.0.1:1\"\npeer = \"gw\"\n",
            "test.toml:9: listen.to: expected `to` with a target, or `serve`",
        ),
        (
            "[[peer]]\nname = \"gw\"\naddresses = [\"192.0.2.1:1\"]\n[[listen]]\nat = \"here\"\npeer = \"gw\"\nserve = \"http\"\n",
            "test.toml:9: listen.at: `here` is not an address with a port",
        ),
        (
            "[[peer]]\nname = \"gw\"\naddresses = [\"192.0.2.1:1\"]\n[[listen]]\nat = \"127.0.0.1:1\"\npeer = \"gw\"\nto = \"db\"\n",
            "test.toml:11: listen.to: `db` is no target: expected HOST:PORT",
        ),
        (
            "[[peer]]\nname = \"gw\"\naddresses = [\"192.0.2.1:1\"]\n[[listen]]\nat = \"127.0.0.1:1\"\npeer = \"gw\"\nserve = \"http\"\ngroup = \"db\"\n",
            "test.toml:12: listen.group: only a Unix socket has a group",
        ),
        ("[agent]\ncolour = \"red\"\n", "test.toml:6: colour"),
        (
            "[agent]\nlocal_bypass = \"yes\"\n",
            "test.toml:6: agent.local_bypass: `yes` is none of \"off\", \"auto\" and \"on\"",
        ),
        (
            "[agent]\nbusy_poll = \"2ms\"\n",
            "test.toml:6: agent.busy_poll: `2ms` is neither \"off\" nor at most 1ms",
        ),
        ("[agent]\nlog = 7\n", "test.toml:6: "),
        ("[agent\n", "test.toml:5: "),
    ] {
        let got = error(rest);
        assert!(
            got.starts_with(expected),
            "for {rest:?}\n     got {got}\nexpected {expected}"
        );
    }
}

const GATEWAY: &str = "[[peer]]\nname = \"gw\"\naddresses = [\"192.0.2.1:1\"]\n";

#[test]
fn capture_rules_are_read_with_their_place() {
    let text = format!(
        "{IDENTITY}{GATEWAY}[[capture]]\naction = \"refuse\"\nto = [\"10.0.0.0/8\"]\nprotocol = \"udp\"\n\
         uids = [\"7\", \"1000-1999\", \"root\"]\n\
         # And now for the rest.\n[[capture]]\npeer = \"gw\"\nto = [\"::/0\"]\nwhen_agent_dead = \"refuse\"\n\
         [[capture]]\naction = \"direct\"\nto = [\"10.0.0.0/8\"]\n"
    );
    let config = Config::parse(&text, "test.toml").unwrap();
    let actions: Vec<Action> = config.captures.iter().map(|c| c.rule.action).collect();
    let capture = Action::Capture {
        peer: 0,
        fail_closed: true,
        early: false,
    };
    assert_eq!(actions, [Action::Refuse, capture, Action::Direct]);
    let lines: Vec<usize> = config.captures.iter().map(|c| c.line).collect();
    assert_eq!(lines, [8, 14, 18]);
    let refuse = &config.captures[0].rule;
    assert_eq!(refuse.uids, vec![7..=7, 1000..=1999, 0..=0]);
    assert_eq!(refuse.protocols, Protocols::Udp);
    assert_eq!(config.captures[1].rule.protocols, Protocols::Both);
}

#[test]
fn mistakes_in_capture_rules_are_told() {
    let many: Vec<String> = (1..=33).map(|port| format!("\"{port}\"")).collect();
    let many = format!(
        "peer = \"gw\"\nto = [\"10.0.0.0/8\"]\nports = [{}]\n",
        many.join(", ")
    );
    for (rule, expected) in [
        (
            "to = [\"10.0.0.0/8\"]\n",
            "8: capture.peer: what is captured goes through a [[peer]]; there is: gw",
        ),
        (
            "to = [\"10.0.0.0/8\"]\naction = \"drop\"\n",
            "10: capture.action: `drop` is none of \"capture\"",
        ),
        (
            "to = [\"10.0.0.0/8\"]\naction = \"direct\"\npeer = \"gw\"\n",
            "11: capture.peer: action = \"direct\" goes through no peer",
        ),
        (
            "to = [\"10.0.0.0/8\"]\naction = \"refuse\"\nwhen_agent_dead = \"refuse\"\n",
            "11: capture.when_agent_dead: it says what becomes",
        ),
        (
            "peer = \"gw\"\nto = [\"10.0.0.0/8\"]\nprotocol = \"sctp\"\n",
            "11: capture.protocol: `sctp` is neither \"tcp\" nor \"udp\"",
        ),
        (
            "peer = \"gw\"\nto = [\"10.0.0.0/8\"]\nuids = [\"0\",\n\"no-such-user\"]\n",
            "12: capture.uids: `no-such-user` is neither a user id",
        ),
        (
            "peer = \"gw\"\nto = [\"10.0.0.0/8\"]\nuids = [\"1999-1000\"]\n",
            "11: capture.uids: `1999-1000` is neither a user id",
        ),
        (
            "peer = \"gw\"\nto = [\"10.0.0.0/8\"]\nuids = [\"4294967295\"]\n",
            "11: capture.uids: `4294967295` is neither a user id",
        ),
        (
            many.as_str(),
            "8: capture: capture rule 1: with it 33 entries apply to 10.0.0.0/8",
        ),
    ] {
        let got = error(&format!("{GATEWAY}[[capture]]\n{rule}"));
        let expected = format!("test.toml:{expected}");
        assert!(
            got.starts_with(&expected),
            "for {rule:?}\n     got {got}\nexpected {expected}"
        );
    }
}

#[test]
fn unknown_keys_and_missing_sections_are_told() {
    assert!(error("[agent]\ncolour = \"red\"\n").contains("unknown field `colour`"));
    let missing = Config::parse("[agent]\n", "x.toml")
        .unwrap_err()
        .to_string();
    assert!(missing.contains("missing field `identity`"), "{missing}");
    let absent = Config::load(Path::new("/nonexistent/holdfast.toml"))
        .unwrap_err()
        .to_string();
    assert!(
        absent.contains("/nonexistent/holdfast.toml") && absent.contains("config example"),
        "{absent}"
    );
}

proptest! {
    #[test]
    fn nothing_typed_makes_it_panic(text in "\\PC{0,200}", cut in 0usize..2000) {
        let _ = Config::parse(&text, "t");
        let whole = Config::EXAMPLE;
        let cut = (0..=cut.min(whole.len())).rev().find(|i| whole.is_char_boundary(*i)).unwrap_or(0);
        let _ = Config::parse(&format!("{}{text}", &whole[..cut]), "t");
    }
}

#[test]
fn rules_for_names_are_read_and_their_mistakes_told() {
    let text = format!(
        "{IDENTITY}{GATEWAY}[[capture]]\npeer = \"gw\"\nnames = [\"*.Corp.example.\", \"corp.example\"]\nports = [\"443\"]\n\
         [[capture]]\naction = \"refuse\"\nnames = [\"ads.*\"]\n"
    );
    let config = Config::parse(&text, "test.toml").unwrap();
    let rule = &config.captures[0].rule;
    assert_eq!(rule.names, ["*.corp.example", "corp.example"]);
    assert!(rule.is_fail_closed() && rule.to.is_empty());
    assert_eq!(
        rule.to_string(),
        "capture names *.corp.example, corp.example ports 443"
    );
    assert_eq!(config.dns.range4.to_string(), "198.18.0.0/15");
    assert_eq!((config.dns.range6, config.dns.ttl.as_secs()), (None, 60));
    for (rest, expected) in [
        (
            "[[capture]]\npeer = \"gw\"\n",
            "8: capture.to: expected `to` with networks, or `names`",
        ),
        (
            "[[capture]]\npeer = \"gw\"\nto = [\"10.0.0.0/8\"]\nnames = [\"a\"]\n",
            "11: capture.names: a rule is for networks or for names",
        ),
        (
            "[[capture]]\npeer = \"gw\"\nnames = []\n",
            "10: capture.names: expected at least one name",
        ),
        (
            "[[capture]]\npeer = \"gw\"\nnames = [\"a b\"]\n",
            "10: capture.names: `a b` is not a name",
        ),
        (
            "[[capture]]\npeer = \"gw\"\nnames = [\"a..b\"]\n",
            "10: capture.names: `a..b` is not a name",
        ),
        (
            "[[capture]]\npeer = \"gw\"\nnames = [\"a\"]\nexcept = [\"10.0.0.0/8\"]\n",
            "11: capture.except: it is for networks",
        ),
        (
            "[[capture]]\npeer = \"gw\"\nnames = [\"a\"]\nuids = [\"7\"]\n",
            "11: capture.uids: whoever asks",
        ),
        (
            "[[capture]]\naction = \"direct\"\nnames = [\"a\"]\nports = [\"7\"]\n",
            "11: capture.ports: a name is refused or let go",
        ),
        (
            "[[capture]]\npeer = \"gw\"\nnames = [\"a\"]\nwhen_agent_dead = \"direct\"\n",
            "11: capture.when_agent_dead: names are captured because",
        ),
        (
            "[dns]\nrange4 = \"10.0.0.0/25\"\n",
            "9: dns.range4: `10.0.0.0/25` is not a network",
        ),
        ("[dns]\nrange4 = \"127.0.0.0/8\"\n", "9: dns.range4: "),
        ("[dns]\nrange6 = \"fe80::/64\"\n", "9: dns.range6: "),
        ("[dns]\nttl = \"2h\"\n", "9: dns.ttl: `2h` is not between"),
        (
            "[dns]\nlisten = [\"0.0.0.0:53\"]\n",
            "9: dns.listen: `0.0.0.0:53` is no address of this host",
        ),
        ("[dns]\nfrom = [\"10.0.0.0/8\"]\n", "9: dns.from: "),
    ] {
        let got = error(&format!("{GATEWAY}{rest}"));
        let expected = format!("test.toml:{expected}");
        assert!(
            got.starts_with(&expected),
            "for {rest:?}\n     got {got}\nexpected {expected}"
        );
    }
}

#[test]
fn busy_poll_is_a_short_time_or_off() {
    let busy_poll = |typed: &str| {
        let text = format!("{IDENTITY}[agent]\n{typed}\n");
        Config::parse(&text, "test.toml").unwrap().agent.busy_poll
    };
    assert_eq!(busy_poll(""), Duration::from_micros(100));
    for (typed, expected) in [("off", 0), ("0us", 0), ("40us", 40), ("1ms", 1000)] {
        let typed = format!("busy_poll = \"{typed}\"");
        assert_eq!(
            busy_poll(&typed),
            Duration::from_micros(expected),
            "{typed}"
        );
    }
}
