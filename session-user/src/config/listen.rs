//! `[[listen]]`: doors for applications that are not captured.

use std::path::Path;

use super::sections::{address, network};
use super::source::Source;
use super::{Listen, Peer, Result, raw};
use crate::door::{At, Leads};

pub(super) fn listens(
    source: &Source<'_>,
    raw: &[raw::Listen],
    peers: &[Peer],
) -> Result<Vec<Listen>> {
    let mut out: Vec<Listen> = Vec::new();
    for one in raw {
        let listen = listen(source, one, peers)?;
        if out.iter().any(|other| other.at == listen.at) {
            let what = format!("`{}` is given twice", listen.at);
            return Err(source.error(&one.at.span(), "listen.at", what));
        }
        out.push(listen);
    }
    Ok(out)
}

fn listen(source: &Source<'_>, raw: &raw::Listen, peers: &[Peer]) -> Result<Listen> {
    let udp = source.or(
        "listen.protocol",
        raw.protocol.as_ref(),
        false,
        |text| match text {
            "tcp" => Ok(false),
            "udp" => Ok(true),
            other => Err(format!("`{other}` is neither \"tcp\" nor \"udp\"")),
        },
    )?;
    let at = match source.one("listen.at", &raw.at, at)? {
        At::Tcp(addr) if udp => At::Udp(addr),
        At::Unix(_) if udp => {
            let what = "a Unix socket takes streams only";
            return Err(source.error(&raw.at.span(), "listen.protocol", what));
        }
        at => at,
    };
    if let (Some(serve), true) = (&raw.serve, udp) {
        let what = "a UDP port has `to`; \"socks5\" at a TCP port serves UDP as well";
        return Err(source.error(&serve.span(), "listen.serve", what));
    }
    let leads = match (&raw.to, &raw.serve) {
        (Some(to), None) => Leads::To(source.one("listen.to", to, |text| {
            text.parse()
                .map_err(|error| format!("`{text}` is no target: {error}"))
        })?),
        (None, Some(serve)) => source.one("listen.serve", serve, |text| match text {
            "socks5" => Ok(Leads::Socks5),
            "http" => Ok(Leads::Http),
            other => Err(format!("`{other}` is neither \"socks5\" nor \"http\"")),
        })?,
        (Some(_), Some(serve)) => {
            let what = "a door has either `to` or `serve`, not both";
            return Err(source.error(&serve.span(), "listen.serve", what));
        }
        (None, None) => {
            let what = "expected `to` with a target, or `serve` with \"socks5\" or \"http\"";
            return Err(source.error(&raw.at.span(), "listen.to", what));
        }
    };
    if let (Some(group), At::Tcp(_) | At::Udp(_)) = (&raw.group, &at) {
        let what = "only a Unix socket has a group; `from` says who may use a port";
        return Err(source.error(&group.span(), "listen.group", what));
    }
    if let (Some(from), At::Unix(_)) = (raw.from.first(), &at) {
        let what = "a Unix socket has no addresses; `group` says who may use it";
        return Err(source.error(&from.span(), "listen.from", what));
    }
    Ok(Listen {
        at,
        peer: source.peer("listen.peer", &raw.peer, peers)?,
        leads,
        from: source.all("listen.from", &raw.from, network)?,
        group: raw.group.as_ref().map(|group| group.get_ref().clone()),
    })
}

fn at(text: &str) -> std::result::Result<At, String> {
    if Path::new(text).is_absolute() {
        return Ok(At::Unix(text.into()));
    }
    address(text).map(At::Tcp).map_err(|error| {
        format!("{error}, nor the path of a Unix socket, such as \"/run/app.sock\"")
    })
}
