//! From what was typed to ready objects, one function for each section.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};

use super::source::Source;
use session_proto::limits::LANES_MAX;
use session_proto::wire::{Mode, Packing, Service};
use toml::Spanned;

use super::{
    Accept, Compression, DEFAULT_STATE, Lanes, Peer, Result, Session, Stream, Transport, duration,
    raw, short_duration, size,
};

pub(super) fn address(text: &str) -> std::result::Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("`{text}` is not an address with a port, such as \"192.0.2.1:7843\" or \"[2001:db8::1]:7843\""))
}

pub(super) fn network(text: &str) -> std::result::Result<IpNet, String> {
    let host = || text.parse::<std::net::IpAddr>().map(IpNet::from);
    text.parse().or_else(|_| host()).map_err(|_| {
        format!("`{text}` is not a network, such as \"10.0.0.0/8\" or \"2001:db8::/32\"")
    })
}

pub(super) fn ports(text: &str) -> std::result::Result<RangeInclusive<u16>, String> {
    let expected =
        || format!("`{text}` is not a port or a range of ports, such as \"443\" or \"8000-8999\"");
    let port = |t: &str| t.trim().parse::<u16>().ok().filter(|p| *p > 0);
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let range = port(low).zip(port(high)).filter(|(low, high)| low <= high);
    range.map(|(low, high)| low..=high).ok_or_else(expected)
}

pub(super) fn peers(source: &Source<'_>, raw: &[raw::Peer]) -> Result<Vec<Peer>> {
    let mut out: Vec<Peer> = Vec::new();
    for peer in raw {
        let name = peer.name.get_ref();
        if out.iter().any(|p| p.name == *name) {
            return Err(source.error(
                &peer.name.span(),
                "peer.name",
                format!("`{name}` is given twice"),
            ));
        }
        if name.is_empty() {
            return Err(source.error(
                &peer.name.span(),
                "peer.name",
                "expected the name in the peer's certificate",
            ));
        }
        let addresses = source.all("peer.addresses", peer.addresses.get_ref(), address)?;
        if addresses.is_empty() {
            return Err(source.error(
                &peer.addresses.span(),
                "peer.addresses",
                "expected at least one address",
            ));
        }
        out.push(Peer {
            name: name.clone(),
            addresses,
        });
    }
    Ok(out)
}

pub(super) fn streams(
    source: &Source<'_>,
    raw: &[Spanned<raw::Stream>],
    lanes: Lanes,
) -> Result<Vec<Stream>> {
    raw.iter().map(|one| stream(source, one, lanes)).collect()
}

fn stream(source: &Source<'_>, raw: &Spanned<raw::Stream>, lanes: Lanes) -> Result<Stream> {
    let (line, raw) = (source.line(&raw.span()), raw.get_ref());
    let mode = source.or(
        "stream.links",
        raw.links.as_ref(),
        Mode::Single,
        |text| match text {
            "single" => Ok(Mode::Single),
            "redundant" => Ok(Mode::Redundant),
            "bonded" => Ok(Mode::Bonded),
            other => Err(format!(
                "`{other}` is none of \"single\", \"redundant\" and \"bonded\""
            )),
        },
    )?;
    let unless_said = lanes == Lanes::PerStream;
    let own_lane = source.or(
        "stream.lane",
        raw.lane.as_ref(),
        unless_said,
        |text| match text {
            "shared" => Ok(false),
            "own" if lanes == Lanes::Bulk(0) => {
                Err("a lane of its own needs [transport] lanes".to_owned())
            }
            "own" => Ok(true),
            other => Err(format!("`{other}` is neither \"shared\" nor \"own\"")),
        },
    )?;
    let said = raw.compression.as_ref();
    let said = said.map(|text| source.one("stream.compression", text, compression));
    let packing = said
        .transpose()?
        .map_or(Packing::Unsaid, Compression::packing);
    Ok(Stream {
        to: source.all("stream.to", &raw.to, network)?,
        ports: source.all("stream.ports", &raw.ports, ports)?,
        cgroups: raw.cgroups.clone(),
        service: Service {
            mode,
            own_lane,
            packing,
        },
        line,
    })
}

fn compression(text: &str) -> std::result::Result<Compression, String> {
    match text {
        "auto" => Ok(Compression::Auto),
        "lz4" => Ok(Compression::Lz4),
        "zstd" => Ok(Compression::Zstd),
        "off" => Ok(Compression::Off),
        _ => Err(format!(
            "`{text}` is not \"auto\", \"lz4\", \"zstd\" or \"off\""
        )),
    }
}

/// Checks an entry that names targets; it stays as it was written.
fn targets(peer: &str, text: &str) -> std::result::Result<String, String> {
    let rule = crate::dial::AllowRule {
        peer: peer.to_owned(),
        to: vec![text.to_owned()],
    };
    let parsed = crate::dial::AllowList::parse(&[rule]);
    parsed.map(|_| text.to_owned()).map_err(|e| e.to_string())
}

pub(super) fn accept(source: &Source<'_>, raw: &raw::Accept) -> Result<Accept> {
    let listen = source.all("accept.listen", raw.listen.get_ref(), address)?;
    if listen.is_empty() {
        return Err(source.error(
            &raw.listen.span(),
            "accept.listen",
            "expected at least one address",
        ));
    }
    let mut allow = Vec::new();
    for rule in &raw.allow {
        let peer = rule.peer.get_ref();
        let to = source.all("accept.allow.to", &rule.to, |text| targets(peer, text))?;
        allow.push((rule.peer.get_ref().clone(), to));
    }
    let ten = Duration::from_secs(10);
    let loopback = || {
        vec![IpNet::from(Ipv4Net::new_assert(
            Ipv4Addr::new(127, 64, 0, 0),
            10,
        ))]
    };
    let peer_networks = match &raw.peer_networks {
        Some(typed) => source.all("accept.peer_networks", typed, network)?,
        None => loopback(),
    };
    for (position, one) in peer_networks.iter().enumerate() {
        let overlaps = |other: &&IpNet| other.contains(one) || one.contains(*other);
        if let Some(other) = peer_networks[..position].iter().find(overlaps) {
            let span = raw
                .peer_networks
                .as_ref()
                .map_or(0..0, |typed| typed[position].span());
            let what = format!("`{one}` overlaps `{other}`: two units could have one address");
            return Err(source.error(&span, "accept.peer_networks", what));
        }
    }
    Ok(Accept {
        listen,
        state: raw.state.clone().unwrap_or_else(|| DEFAULT_STATE.into()),
        peer_networks,
        proxy_protocol: source.all("accept.proxy_protocol", &raw.proxy_protocol, |text| {
            targets("*", text)
        })?,
        max_sessions: source.within(
            "accept.max_sessions",
            raw.max_sessions.as_ref(),
            1024,
            1..=1 << 20,
        )? as usize,
        max_streams: source.within(
            "accept.max_streams",
            raw.max_streams.as_ref(),
            4096,
            1..=1 << 20,
        )?,
        max_flows: source.within(
            "accept.max_flows",
            raw.max_flows.as_ref(),
            4096,
            0..=1 << 20,
        )?,
        handshake_timeout: source.or(
            "accept.handshake_timeout",
            raw.handshake_timeout.as_ref(),
            ten,
            duration,
        )?,
        dial_timeout: source.or(
            "accept.dial_timeout",
            raw.dial_timeout.as_ref(),
            Duration::from_secs(130),
            duration,
        )?,
        allow,
    })
}

/// `busy_poll`. A processor that is busy for longer, for nothing, is better woken.
pub(super) fn busy_poll(text: &str) -> std::result::Result<Duration, String> {
    let most = Duration::from_millis(1);
    let expected = || format!("`{text}` is neither \"off\" nor at most 1ms, such as \"50us\"");
    match text {
        "off" => Ok(Duration::ZERO),
        time => short_duration(time)
            .filter(|time| *time <= most)
            .ok_or_else(expected),
    }
}

pub(super) fn session(source: &Source<'_>, raw: &raw::Session) -> Result<Session> {
    let hours = |n: u64| Duration::from_secs(n * 3600);
    // Less would not hold a round trip's worth of data on any link worth having.
    let memory = |text: &str| match size(text)? {
        bytes if bytes < 1 << 20 => Err(format!("`{text}` is too little: expected at least 1MiB")),
        bytes => Ok(bytes),
    };
    let memory_bytes = source.or("session.memory", raw.memory.as_ref(), 64 << 20, memory)?;
    let total = |text: &str| match memory(text)? {
        bytes if bytes < memory_bytes => Err(format!(
            "`{text}` is too little: expected at least as much as one session's `memory`"
        )),
        bytes => Ok(Some(bytes)),
    };
    Ok(Session {
        hold: source.or("session.hold", raw.hold.as_ref(), hours(24), duration)?,
        peer_gone_after: source.or(
            "session.peer_gone_after",
            raw.peer_gone_after.as_ref(),
            Duration::from_secs(30),
            duration,
        )?,
        memory_bytes,
        memory_total_bytes: source.or(
            "session.memory_total",
            raw.memory_total.as_ref(),
            None,
            total,
        )?,
        rekey_records: source.within(
            "session.rekey_records",
            raw.rekey_records.as_ref(),
            1 << 22,
            1 << 10..=1 << 22,
        )?,
        rekey_after: source.or(
            "session.rekey_after",
            raw.rekey_after.as_ref(),
            hours(1),
            duration,
        )?,
        reauth_after: source.or(
            "session.reauth_after",
            raw.reauth_after.as_ref(),
            hours(24),
            duration,
        )?,
        expiry_grace: source.or(
            "session.expiry_grace",
            raw.expiry_grace.as_ref(),
            Duration::from_secs(300),
            duration,
        )?,
        // RFC 4787 REQ-5: two minutes at least, five better.
        flow_idle: source.or(
            "session.flow_idle",
            raw.flow_idle.as_ref(),
            Duration::from_secs(300),
            duration,
        )?,
    })
}

pub(super) fn transport(source: &Source<'_>, raw: &raw::Transport) -> Result<Transport> {
    let lowat = |text: &str| {
        size(text).and_then(|n| u32::try_from(n).map_err(|_| format!("`{text}` is too much")))
    };
    // TCP_KEEPIDLE counts whole seconds, up to 32,767.
    let keepalive = |text: &str| match duration(text)? {
        idle if (1..=32_767).contains(&idle.as_secs()) => Ok(idle),
        _ => Err(format!("`{text}` is not between 1s and 9h")),
    };
    let congestion = |text: &str| match text {
        // TCP_CA_NAME_MAX is 16, with the final zero.
        _ if (1..16).contains(&text.len()) => Ok(text.to_owned()),
        _ => Err(format!(
            "`{text}` is not the name of a congestion control, nor \"auto\" or \"host\""
        )),
    };
    let lanes = match raw.lanes.as_ref().map(|l| (l.get_ref(), l.span())) {
        None => Lanes::Bulk(0),
        Some((raw::Lanes::Count(n), _)) if *n <= LANES_MAX => Lanes::Bulk(*n),
        Some((raw::Lanes::Word(word), _)) if word == "per-stream" => Lanes::PerStream,
        Some((_, span)) => {
            let what = format!("expected 0 to {LANES_MAX}, or \"per-stream\"");
            return Err(source.error(&span, "transport.lanes", &what));
        }
    };
    Ok(Transport {
        lanes,
        fast_open: raw.fast_open.unwrap_or(true),
        udp: raw.udp.unwrap_or(true),
        compression: source.or(
            "transport.compression",
            raw.compression.as_ref(),
            Compression::Auto,
            compression,
        )?,
        user_timeout: source.or(
            "transport.user_timeout",
            raw.user_timeout.as_ref(),
            Duration::from_secs(20),
            duration,
        )?,
        notsent_lowat: source.or(
            "transport.notsent_lowat",
            raw.notsent_lowat.as_ref(),
            128 << 10,
            lowat,
        )?,
        keepalive: source.or(
            "transport.keepalive",
            raw.keepalive.as_ref(),
            Duration::from_secs(60),
            keepalive,
        )?,
        congestion: source.or(
            "transport.congestion",
            raw.congestion.as_ref(),
            "auto".to_owned(),
            congestion,
        )?,
        dial_timeout: source.or(
            "transport.dial_timeout",
            raw.dial_timeout.as_ref(),
            Duration::from_secs(3),
            duration,
        )?,
    })
}
