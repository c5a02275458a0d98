use super::*;
use proptest::prelude::*;
use std::net::SocketAddr;

fn list(to: &[&str]) -> AllowList {
    AllowList::parse(&[AllowRule {
        peer: "client.example".to_owned(),
        to: to.iter().map(|t| (*t).to_owned()).collect(),
    }])
    .unwrap_or_else(|error| panic!("{error}"))
}

fn check_ip(list: &AllowList, target: &str) -> Result<(), Denied> {
    let addr: SocketAddr = target.parse().unwrap();
    list.check(
        "client.example",
        Protocol::Tcp,
        &Target::Addr(addr),
        addr.ip(),
        addr.port(),
    )
}

fn check_name(list: &AllowList, name: &str, port: u16, ip: &str) -> Result<(), Denied> {
    let target = Target::Name(name.to_owned(), port);
    list.check(
        "client.example",
        Protocol::Tcp,
        &target,
        ip.parse().unwrap(),
        port,
    )
}

#[test]
fn addresses() {
    let everything = &["0.0.0.0/0:*", "[::]/0:*"][..];
    let cases: &[(&[&str], &str, bool)] = &[
        (&["10.0.0.0/8:80"], "10.1.2.3:80", true),
        (&["10.0.0.0/8:80"], "10.1.2.3:81", false),
        (&["10.0.0.0/8:80"], "11.1.2.3:80", false),
        (&["10.0.0.0/8:8000-8999"], "10.1.2.3:8000", true),
        (&["10.0.0.0/8:8000-8999"], "10.1.2.3:8999", true),
        (&["10.0.0.0/8:8000-8999"], "10.1.2.3:9000", false),
        (&["198.51.100.7:*"], "198.51.100.7:1", true),
        (&["198.51.100.7:*"], "198.51.100.7:65535", true),
        (&["198.51.100.7:*"], "198.51.100.8:1", false),
        (&["[2001:db8::]/32:443"], "[2001:db8:1::5]:443", true),
        (&["[2001:db8::/32]:443"], "[2001:db8:1::5]:443", true),
        (&["[2001:db8::]/32:443"], "[2001:db9::5]:443", false),
        (&["[2001:db8::5]:443"], "[2001:db8::5]:443", true),
        (&["[2001:db8::5]:443"], "[2001:db8::6]:443", false),
        // IPv4 in IPv6 clothes.
        (&["10.0.0.0/8:80"], "[::ffff:10.1.2.3]:80", true),
        (&["[::]/0:*"], "[::ffff:10.1.2.3]:80", false),
        (&["[::]/0:*"], "[2002:a00:1::1]:80", true),
        (&["[::]/0:*"], "[2002:7f00:1::1]:80", false),
        (&["[::]/0:*"], "[64:ff9b::7f00:1]:80", false),
        (&["[::]/0:*"], "[64:ff9b::a9fe:a9fe]:80", false),
        (
            &["[::]/0:*", "127.0.0.0/8:80"],
            "[64:ff9b::7f00:1]:80",
            true,
        ),
        (&["127.0.0.0/8:80"], "[64:ff9b::7f00:1]:80", false),
        (&["127.0.0.0/8:80"], "[::ffff:127.0.0.1]:80", true),
        // Wide rules open nothing special,
        (everything, "8.8.8.8:53", true),
        (everything, "[2606:4700::1111]:53", true),
        (everything, "0.0.0.0:80", false),
        (everything, "0.1.2.3:80", false),
        (everything, "127.0.0.1:80", false),
        (everything, "127.255.0.1:80", false),
        (everything, "169.254.1.1:80", false),
        (everything, "169.254.169.254:80", false),
        (everything, "100.100.100.200:80", false),
        (everything, "100.100.100.201:80", true),
        (everything, "224.0.0.1:80", false),
        (everything, "255.255.255.255:80", false),
        (everything, "[::]:80", false),
        (everything, "[::1]:80", false),
        (everything, "[::7f00:1]:80", false),
        (everything, "[fe80::1]:80", false),
        (everything, "[ff02::1]:80", false),
        (everything, "[fd00:ec2::254]:80", false),
        (everything, "[fd00:ec2::255]:80", true),
        (
            &["0.0.0.0/1:*", "128.0.0.0/1:*", "126.0.0.0/7:*"],
            "127.0.0.1:80",
            false,
        ),
        // narrow ones do,
        (&["127.0.0.0/8:5432"], "127.0.0.1:5432", true),
        (&["127.0.0.1:5432"], "127.0.0.1:5432", true),
        (
            &["127.0.0.0/8:5432", "0.0.0.0/0:*"],
            "127.0.0.1:5433",
            false,
        ),
        (&["[::1]:80"], "[::1]:80", true),
        (&["[::]/96:80"], "[::1]:80", false),
        (&["[fe80::]/10:80"], "[fe80::1]:80", true),
        (&["169.254.0.0/16:80"], "169.254.1.1:80", true),
        // and metadata takes a rule for itself.
        (&["169.254.0.0/16:80"], "169.254.169.254:80", false),
        (&["169.254.169.254:80"], "169.254.169.254:80", true),
        (&["100.64.0.0/10:80"], "100.100.100.200:80", false),
        (&["100.100.100.200:80"], "100.100.100.200:80", true),
    ];
    for (rules, target, expected) in cases {
        let result = check_ip(&list(rules), target);
        assert_eq!(
            result.is_ok(),
            *expected,
            "{rules:?} and {target}: {result:?}"
        );
    }
}

#[test]
fn names() {
    type Asked<'a> = (&'a str, u16, &'a str);
    let cases: &[(&[&str], Asked<'_>, bool)] = &[
        (
            &["db.internal:5432"],
            ("db.internal", 5432, "10.0.0.9"),
            true,
        ),
        (
            &["db.internal:5432"],
            ("DB.Internal.", 5432, "10.0.0.9"),
            true,
        ),
        (
            &["db.internal:5432"],
            ("db.internal", 5433, "10.0.0.9"),
            false,
        ),
        (
            &["db.internal:5432"],
            ("xdb.internal", 5432, "10.0.0.9"),
            false,
        ),
        (
            &["db.internal:5432"],
            ("db.internal.evil.example", 5432, "10.0.0.9"),
            false,
        ),
        (
            &["*.corp.example:443"],
            ("a.corp.example", 443, "10.0.0.9"),
            true,
        ),
        (
            &["*.corp.example:443"],
            ("a.b.corp.example", 443, "10.0.0.9"),
            true,
        ),
        (
            &["*.corp.example:443"],
            ("corp.example", 443, "10.0.0.9"),
            false,
        ),
        (
            &["*.corp.example:443"],
            ("acorp.example", 443, "10.0.0.9"),
            false,
        ),
        // DNS rebinding: the name is allowed, what it leads to is not.
        (&["*:*"], ("rebind.example", 80, "127.0.0.1"), false),
        (&["*:*"], ("rebind.example", 80, "::ffff:127.0.0.1"), false),
        (&["*:*"], ("rebind.example", 80, "64:ff9b::7f00:1"), false),
        (&["*:*"], ("rebind.example", 80, "169.254.169.254"), false),
        (
            &["*:*", "0.0.0.0/0:*"],
            ("rebind.example", 80, "127.0.0.1"),
            false,
        ),
        (
            &["db.internal:80", "127.0.0.1:80"],
            ("db.internal", 80, "127.0.0.1"),
            true,
        ),
        // The address alone is enough, whatever the name.
        (&["10.0.0.0/8:80"], ("any.example", 80, "10.0.0.9"), true),
        (&["10.0.0.0/8:80"], ("any.example", 80, "11.0.0.9"), false),
    ];
    for (rules, (name, port, ip), expected) in cases {
        let result = check_name(&list(rules), name, *port, ip);
        assert_eq!(
            result.is_ok(),
            *expected,
            "{rules:?}, {name} at {ip}: {result:?}"
        );
    }
    // A name rule is for targets asked for by name, not for an address that says the same.
    assert!(check_ip(&list(&["*:*"]), "10.0.0.9:80").is_err());
}

#[test]
fn names_that_no_rule_can_admit_are_not_resolved() {
    let list = list(&["db.internal:5432", "10.0.0.0/8:80"]);
    let may = |peer, name, port| {
        list.check_before_resolving(peer, Protocol::Tcp, name, port)
            .is_ok()
    };
    assert!(may("client.example", "db.internal", 5432));
    assert!(may("client.example", "any.example", 80));
    assert!(!may("client.example", "any.example", 5432));
    assert!(!may("other.example", "db.internal", 5432));
}

#[test]
fn peers() {
    let rule = |peer: &str, to: &str| AllowRule {
        peer: peer.to_owned(),
        to: vec![to.to_owned()],
    };
    let list = AllowList::parse(&[
        rule("laptop-?.example", "10.0.0.1:22"),
        rule("*.example", "10.0.0.2:80"),
    ])
    .unwrap();
    let may = |peer: &str, target: &str| {
        let addr: SocketAddr = target.parse().unwrap();
        list.check(
            peer,
            Protocol::Tcp,
            &Target::Addr(addr),
            addr.ip(),
            addr.port(),
        )
    };
    assert!(may("laptop-1.example", "10.0.0.1:22").is_ok());
    assert!(may("laptop-1.example", "10.0.0.2:80").is_ok());
    assert!(may("laptop-12.example", "10.0.0.1:22").is_err());
    let stranger = may("laptop-1.test", "10.0.0.2:80").unwrap_err();
    assert_eq!(stranger.why, WhyDenied::NoRuleForPeer);
    let nothing = AllowList::parse(&[]).unwrap();
    let addr: SocketAddr = "10.0.0.2:80".parse().unwrap();
    let denied = nothing.check("a", Protocol::Tcp, &Target::Addr(addr), addr.ip(), 80);
    assert_eq!(denied.unwrap_err().why, WhyDenied::NoRuleForPeer);
}

#[test]
fn denials_say_what_and_why() {
    let list = list(&["0.0.0.0/0:*"]);
    let text = check_name(&list, "rebind.example", 80, "169.254.169.254").unwrap_err();
    assert_eq!(
        text.to_string(),
        "EACCES: peer `client.example` may not reach rebind.example:80 (resolved to 169.254.169.254): \
         169.254.169.254 is in the link-local range 169.254.0.0/16, which only a rule inside that \
         range opens"
    );
}

#[test]
fn rules_that_make_no_sense_are_named() {
    for (text, expected) in [
        ("10.0.0.0/8", "a port is missing"),
        ("", "a port is missing"),
        (":80", "expected an address"),
        ("10.0.0.0/8:", "is not a port"),
        ("10.0.0.0/8:0", "is not a port"),
        ("10.0.0.0/8:+80", "is not a port"),
        ("10.0.0.0/8:65536", "is not a port"),
        ("10.0.0.0/8:http", "is not a port"),
        ("10.0.0.0/8:90-80", "ends before it begins"),
        ("10.0.0.1/8:80", "did you mean 10.0.0.0/8 or 10.0.0.1/32"),
        ("10.0.0.0/33:80", "neither an address nor a range"),
        ("10.0.0:80", "neither an address nor a range"),
        ("2001:db8::1:80", "written in brackets"),
        ("[2001:db8::1:80", "expected an IPv6 address in brackets"),
        ("[10.0.0.1]:80", "expected an IPv6 address in brackets"),
        ("[::ffff:10.0.0.0]/104:80", "write it as IPv4"),
        ("a..b:80", "expected an address"),
        ("bücher.example:80", "expected an address"),
        ("a b:80", "expected an address"),
    ] {
        let error = AllowList::parse(&[AllowRule {
            peer: "p".to_owned(),
            to: vec!["10.0.0.1:1".to_owned(), text.to_owned()],
        }])
        .expect_err(text);
        assert_eq!(error.text, text);
        assert!(
            error.problem.contains(expected),
            "{text}: {}",
            error.problem
        );
    }
}

fn special_v4() -> impl Strategy<Value = Ipv4Addr> {
    prop_oneof![
        any::<[u8; 3]>().prop_map(|[b, c, d]| Ipv4Addr::new(127, b, c, d)),
        any::<[u8; 3]>().prop_map(|[b, c, d]| Ipv4Addr::new(0, b, c, d)),
        any::<[u8; 2]>().prop_map(|[c, d]| Ipv4Addr::new(169, 254, c, d)),
        (224_u8..240, any::<[u8; 3]>()).prop_map(|(a, [b, c, d])| Ipv4Addr::new(a, b, c, d)),
        Just(Ipv4Addr::new(100, 100, 100, 200)),
        Just(Ipv4Addr::BROADCAST),
    ]
}

fn special() -> impl Strategy<Value = IpAddr> {
    let low = any::<u128>();
    prop_oneof![
        special_v4().prop_map(IpAddr::V4),
        special_v4().prop_map(|v4| IpAddr::V6(v4.to_ipv6_mapped())),
        special_v4().prop_map(|v4| (u128::from(u32::from(v4)) | 0x64_ff9b << 96).into_ip()),
        (special_v4(), any::<u64>()).prop_map(|(v4, low)| {
            (0x2002 << 112 | u128::from(u32::from(v4)) << 80 | u128::from(low)).into_ip()
        }),
        low.prop_map(|low| (0xfe80 << 112 | low >> 10).into_ip()),
        low.prop_map(|low| (0xff << 120 | low >> 8).into_ip()),
        Just(IpAddr::V6(Ipv6Addr::LOCALHOST)),
        Just(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        Just("fd00:ec2::254".parse().unwrap()),
    ]
}

trait IntoIp {
    fn into_ip(self) -> IpAddr;
}

impl IntoIp for u128 {
    fn into_ip(self) -> IpAddr {
        IpAddr::V6(self.into())
    }
}

/// A rule wide enough to reach out of any special range.
fn wide_rule() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("*:*".to_owned()),
        // /3 covers 224.0.0.0/4 and 240.0.0.0/4; nothing as wide lies inside a special range.
        (any::<u32>(), 0_u8..4).prop_map(|(ip, len)| {
            let net = ipnet::Ipv4Net::new(ip.into(), len).unwrap().trunc();
            format!("{net}:*")
        }),
        (any::<u128>(), 0_u8..8).prop_map(|(ip, len)| {
            let net = ipnet::Ipv6Net::new(ip.into(), len).unwrap().trunc();
            format!("[{net}]:*")
        }),
    ]
}

proptest! {
    #[test]
    fn wide_rules_never_open_a_special_range(
        ip in special(),
        port in 1_u16..,
        rules in proptest::collection::vec(wide_rule(), 1..8),
    ) {
        let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
        let list = list(&rules);
        let address = Target::Addr(SocketAddr::new(ip, port));
        let name = Target::Name("any.example".to_owned(), port);
        prop_assert!(list.check("client.example", Protocol::Tcp, &address, ip, port).is_err());
        prop_assert!(list.check("client.example", Protocol::Tcp, &name, ip, port).is_err());
    }

    #[test]
    fn a_rule_for_the_address_itself_opens_it(ip in special_v4(), port in 1_u16..) {
        let list = list(&[&format!("{ip}:{port}")]);
        let target = SocketAddr::from((ip, port)).to_string();
        prop_assert!(check_ip(&list, &target).is_ok());
    }

    #[test]
    fn no_rule_text_panics(peer in ".{0,20}", to in ".{0,40}") {
        let _ = AllowList::parse(&[AllowRule { peer, to: vec![to] }]);
    }

    #[test]
    fn no_rule_like_text_panics(to in "[\\[\\]:./*0-9a-f-]{0,40}") {
        let _ = AllowList::parse(&[AllowRule { peer: "p".to_owned(), to: vec![to] }]);
    }
}

#[test]
fn a_rule_may_be_for_one_protocol() {
    let list = list(&["10.0.0.0/8:53/udp", "10.0.0.0/8:80/tcp", "10.0.0.0/8:443"]);
    let may = |protocol, target: &str| {
        let addr: SocketAddr = target.parse().unwrap();
        let target = Target::Addr(addr);
        let checked = list.check("client.example", protocol, &target, addr.ip(), addr.port());
        checked.is_ok()
    };
    for (port, tcp, udp) in [(53, false, true), (80, true, false), (443, true, true)] {
        let target = format!("10.1.2.3:{port}");
        assert_eq!(may(Protocol::Tcp, &target), tcp, "{target}");
        assert_eq!(may(Protocol::Udp, &target), udp, "{target}");
    }
    let before = |protocol| list.check_before_resolving("client.example", protocol, "a", 53);
    assert!(before(Protocol::Udp).is_ok() && before(Protocol::Tcp).is_err());
    let wrong = AllowList::parse(&[AllowRule {
        peer: "*".to_owned(),
        to: vec!["10.0.0.0/8:53/sctp".to_owned()],
    }]);
    assert!(wrong.unwrap_err().problem.contains("sctp"));
}
