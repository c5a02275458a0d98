//! What an operator's mistakes are answered with.

use proptest::prelude::*;

use super::*;

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
    assert_eq!(example.captures[0].ports, vec![1..=65535]);
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
