//! `[[capture]]`: which connections are captured, and what becomes of others.

use std::ops::RangeInclusive;

use ipnet::IpNet;
use nix::unistd::User;
use toml::Spanned;

use super::sections::{network, ports};
use super::source::Source;
use super::{Capture, Peer, Result, raw};
use crate::capture::{self, Action, CaptureRule, LocalBypass, Protocols};

/// The highest user id: the one above it means "none" (chown(2)).
const UID_MAX: u32 = u32::MAX - 1;

pub(super) fn captures(
    source: &Source<'_>,
    raw: &[Spanned<raw::Capture>],
    peers: &[Peer],
) -> Result<Vec<Capture>> {
    let captures: Vec<Capture> = raw
        .iter()
        .map(|one| capture(source, one, peers))
        .collect::<Result<_>>()?;
    let rules: Vec<CaptureRule> = captures.iter().map(|c| c.rule.clone()).collect();
    capture::check(&rules).map_err(|error| {
        let at = error.rule().map_or(raw.last(), |rule| raw.get(rule - 1));
        let span = at.map_or(0..0, Spanned::span);
        source.error(&span, "capture", error.to_string())
    })?;
    Ok(captures)
}

fn capture(
    source: &Source<'_>,
    spanned: &Spanned<raw::Capture>,
    peers: &[Peer],
) -> Result<Capture> {
    let raw = spanned.get_ref();
    let action = action(source, spanned, peers)?;
    let (to, names) = destinations(source, spanned)?;
    let mut ports = source.all("capture.ports", &raw.ports, ports)?;
    // Port 0 is none that anybody connects to.
    if ports.contains(&(1..=u16::MAX)) {
        ports.clear();
    }
    let protocols = source.or(
        "capture.protocol",
        raw.protocol.as_ref(),
        Protocols::Both,
        |text| match text {
            "tcp" => Ok(Protocols::Tcp),
            "udp" => Ok(Protocols::Udp),
            other => Err(format!(
                "`{other}` is neither \"tcp\" nor \"udp\"; leave it out for both"
            )),
        },
    )?;
    Ok(Capture {
        rule: CaptureRule {
            to,
            names,
            except: source.all("capture.except", &raw.except, network)?,
            ports,
            protocols,
            uids: source.all("capture.uids", &raw.uids, uids)?,
            action,
        },
        line: source.line(&spanned.span()),
    })
}

/// Networks or names.
fn destinations(
    source: &Source<'_>,
    spanned: &Spanned<raw::Capture>,
) -> Result<(Vec<IpNet>, Vec<String>)> {
    let raw = spanned.get_ref();
    let (key, typed) = match (&raw.to, &raw.names) {
        (Some(to), None) => ("capture.to", to),
        (None, Some(names)) => ("capture.names", names),
        (Some(_), Some(names)) => {
            let what = "a rule is for networks or for names: give the names a rule of their own";
            return Err(source.error(&names.span(), "capture.names", what));
        }
        (None, None) => {
            let what = "expected `to` with networks, or `names`";
            return Err(source.error(&spanned.span(), "capture.to", what));
        }
    };
    if typed.get_ref().is_empty() {
        let what = match raw.names {
            Some(_) => "expected at least one name, such as \"*.corp.example\"",
            None => "expected at least one network",
        };
        return Err(source.error(&typed.span(), key, what));
    }
    if raw.names.is_none() {
        return Ok((source.all(key, typed.get_ref(), network)?, Vec::new()));
    }
    allowed_with_names(source, raw)?;
    Ok((Vec::new(), source.all(key, typed.get_ref(), pattern)?))
}

/// What a rule for names may not have beside them: it decides when a name is asked for, before anybody connects.
fn allowed_with_names(source: &Source<'_>, raw: &raw::Capture) -> Result<()> {
    let wrong = |text: Option<&raw::Text>, key: &str, what: &str| match text {
        Some(text) => Err(source.error(&text.span(), key, what)),
        None => Ok(()),
    };
    wrong(
        raw.except.first(),
        "capture.except",
        "it is for networks; put a rule with action = \"direct\" for the other names before this one",
    )?;
    wrong(
        raw.uids.first(),
        "capture.uids",
        "whoever asks for a name, the answer is the same: a rule for names is for all users",
    )?;
    if raw
        .action
        .as_ref()
        .is_some_and(|a| a.get_ref() != "capture")
    {
        let what = "a name is refused or let go when it is asked for, for every port and protocol: leave it out";
        wrong(raw.ports.first(), "capture.ports", what)?;
        wrong(raw.protocol.as_ref(), "capture.protocol", what)?;
    }
    let direct = |text: &&raw::Text| text.get_ref() == "direct";
    wrong(
        raw.when_agent_dead.as_ref().filter(direct),
        "capture.when_agent_dead",
        "names are captured because nobody but the peer knows them: without the agent they are always refused",
    )
}

/// A name or a pattern of names, in lower case and without the dot at its end.
fn pattern(text: &str) -> std::result::Result<String, String> {
    let plain = text.strip_suffix('.').unwrap_or(text);
    let fits = |label: &str| {
        let of_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'*' | b'?');
        (1..=63).contains(&label.len()) && label.bytes().all(of_name)
    };
    if plain.len() > 253 || !plain.split('.').all(fits) {
        return Err(format!(
            "`{text}` is not a name, such as \"db.corp.example\", nor a pattern, such as \"*.corp.example\""
        ));
    }
    Ok(plain.to_ascii_lowercase())
}

/// What is done, with what belongs to it: a peer and `when_agent_dead` to a capture, and to nothing else.
fn action(source: &Source<'_>, spanned: &Spanned<raw::Capture>, peers: &[Peer]) -> Result<Action> {
    let raw = spanned.get_ref();
    let word = raw.action.as_ref().map_or("capture", |a| a.get_ref());
    let other = match word {
        "capture" => None,
        "direct" => Some(Action::Direct),
        "refuse" => Some(Action::Refuse),
        other => {
            let message = format!("`{other}` is none of \"capture\", \"direct\" and \"refuse\"");
            let span = raw.action.as_ref().map_or(0..0, Spanned::span);
            return Err(source.error(&span, "capture.action", message));
        }
    };
    let Some(other) = other else {
        return captured(source, spanned, peers);
    };
    if let Some(peer) = &raw.peer {
        let message = format!("action = \"{word}\" goes through no peer: leave it out");
        return Err(source.error(&peer.span(), "capture.peer", message));
    }
    if let Some(connect) = &raw.connect {
        let message = format!(
            "it says when the connection of a captured application succeeds, and action = \"{word}\" captures none: leave it out"
        );
        return Err(source.error(&connect.span(), "capture.connect", message));
    }
    if let Some(dead) = &raw.when_agent_dead {
        let message = format!(
            "it says what becomes of what the agent would have taken, and action = \"{word}\" needs no agent: leave it out"
        );
        return Err(source.error(&dead.span(), "capture.when_agent_dead", message));
    }
    Ok(other)
}

fn captured(
    source: &Source<'_>,
    spanned: &Spanned<raw::Capture>,
    peers: &[Peer],
) -> Result<Action> {
    let raw = spanned.get_ref();
    let Some(peer) = &raw.peer else {
        let names: Vec<&str> = peers.iter().map(|p| p.name.as_str()).collect();
        let message = format!(
            "what is captured goes through a [[peer]]; there is: {}",
            names.join(", ")
        );
        return Err(source.error(&spanned.span(), "capture.peer", message));
    };
    let peer = source.peer("capture.peer", peer, peers)?;
    let fail_closed = source.or(
        "capture.when_agent_dead",
        raw.when_agent_dead.as_ref(),
        raw.names.is_some(),
        |text| match text {
            "direct" => Ok(false),
            "refuse" => Ok(true),
            other => Err(format!("`{other}` is neither \"direct\" nor \"refuse\"")),
        },
    )?;
    let early = source.or(
        "capture.connect",
        raw.connect.as_ref(),
        false,
        |text| match text {
            "target" => Ok(false),
            "early" => Ok(true),
            other => Err(format!("`{other}` is neither \"target\" nor \"early\"")),
        },
    )?;
    Ok(Action::Capture {
        peer: peer as u32,
        fail_closed,
        early,
    })
}

/// `local_bypass`.
pub(super) fn local_bypass(text: &str) -> std::result::Result<LocalBypass, String> {
    match text {
        "off" => Ok(LocalBypass::Off),
        "auto" => Ok(LocalBypass::Auto),
        "on" => Ok(LocalBypass::On),
        other => Err(format!("`{other}` is none of \"off\", \"auto\" and \"on\"")),
    }
}

/// `"1000"`, `"1000-1999"` or a user's name, which is looked up now: a rule does not follow a user who is renamed.
fn uids(text: &str) -> std::result::Result<RangeInclusive<u32>, String> {
    let expected = || {
        format!(
            "`{text}` is neither a user id, such as \"1000\", nor a range of them, such as \"1000-1999\", nor the name \
             of a user of this host"
        )
    };
    let number = |t: &str| t.parse::<u32>().ok().filter(|uid| *uid <= UID_MAX);
    let digits = |t: &str| !t.is_empty() && t.bytes().all(|byte| byte.is_ascii_digit());
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    // Names may have a hyphen in them; what has nothing but digits around it is a range.
    if digits(low) && digits(high) {
        let range = number(low)
            .zip(number(high))
            .filter(|(low, high)| low <= high);
        return range.map(|(low, high)| low..=high).ok_or_else(expected);
    }
    let user = User::from_name(text).map_err(|error| format!("`{text}`: {error}"))?;
    let uid = user.ok_or_else(expected)?.uid.as_raw();
    Ok(uid..=uid)
}
