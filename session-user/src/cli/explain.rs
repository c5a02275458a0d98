//! `holdfast explain`: what becomes of a connection, and why.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::unistd::User;
use serde::Serialize;

use super::exit::{Exit, Failure};
use super::remote::{ask, json, unexpected};
use crate::capture::{Protocol, Verdict};
use crate::control::{
    Asked, ExplainReport, NameReport, PeerReport, Request, Response, ServiceReport, TARGETS_MAX,
    TargetReport,
};
use crate::stdio::print;

/// What is asked about.
#[derive(Debug, clap::Args)]
pub struct Question {
    /// Where the connection goes: HOST:PORT, an IPv6 address in brackets. A name that no rule captures is resolved as this host does.
    #[arg(value_name = "HOST:PORT")]
    target: Target,
    /// Of a process in this cgroup; without it, in the one that this command is in.
    #[arg(long, value_name = "CGROUP")]
    cgroup: Option<PathBuf>,
    /// Of this user, by id or name; without it, of the one who asks.
    #[arg(long, value_name = "USER", value_parser = uid)]
    uid: Option<u32>,
    /// Over this.
    #[arg(long, value_name = "tcp|udp", value_parser = protocol, default_value = "tcp")]
    protocol: Protocol,
}

/// A host and a port, as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    text: String,
    host: String,
    port: u16,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is not HOST:PORT, such as 198.51.100.7:443, [2001:db8::1]:443 or www.example.com:443"
            )
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let host = match bracketed {
            Some(host) => host.parse::<std::net::Ipv6Addr>().ok().map(|_| host),
            None => (!host.is_empty() && !host.contains([':', '[', ']'])).then_some(host),
        };
        let port = port.parse::<u16>().ok().filter(|port| *port > 0);
        let (host, port) = host.zip(port).ok_or_else(wrong)?;
        Ok(Self {
            text: text.to_owned(),
            host: host.to_owned(),
            port,
        })
    }
}

fn uid(text: &str) -> Result<u32, String> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    let user = User::from_name(text).map_err(|error| error.to_string())?;
    let user = user.ok_or_else(|| format!("`{text}` is no user of this host"))?;
    Ok(user.uid.as_raw())
}

fn protocol(text: &str) -> Result<Protocol, String> {
    match text {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        _ => Err("expected tcp or udp".to_owned()),
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Explained<'a> {
    /// As typed.
    target: &'a str,
    /// Whether it is a name that this host has resolved.
    resolved: bool,
    #[serde(flatten)]
    report: &'a ExplainReport,
}

pub fn explain(control: &Path, question: Question, as_json: bool) -> Result<ExitCode, Failure> {
    let target = question.target;
    let literal = target.host.parse().ok();
    let about = |name, targets| {
        let asked = Asked {
            name,
            targets,
            protocol: question.protocol,
            cgroup: question.cgroup.clone(),
            uid: question.uid,
        };
        match ask(control, &Request::Explain(asked))? {
            Response::Explained(report) => Ok(report),
            _ => Err(unexpected()),
        }
    };
    let mut report = match literal {
        Some(ip) => about(None, vec![SocketAddr::new(ip, target.port)])?,
        None => about(Some((target.host.clone(), target.port)), Vec::new())?,
    };
    let verdict = report.name.as_ref().map(|name| name.verdict);
    let resolved = literal.is_none() && matches!(verdict, None | Some(Verdict::Direct));
    if resolved {
        let name = report.name.take();
        report = about(None, resolve(&target)?)?;
        report.name = name;
    }
    if as_json {
        return json(&Explained {
            target: &target.text,
            resolved,
            report: &report,
        });
    }
    if let Some(name) = &report.name {
        print(&name_text(name));
    }
    if resolved {
        let found: Vec<String> = report
            .targets
            .iter()
            .map(|t| t.address.ip().to_string())
            .collect();
        print(&format!(
            "{} was resolved by this host to {}; an application may be told otherwise\n\n",
            target.host,
            found.join(", ")
        ));
    }
    let texts: Vec<String> = report.targets.iter().map(|t| text(&report, t)).collect();
    print(&texts.join("\n"));
    if let Some(note) = &report.note {
        print(&format!("\nnote: {note}\n"));
    }
    Ok(ExitCode::SUCCESS)
}

/// The host's resolver says each address once for each type of socket.
fn resolve(target: &Target) -> Result<Vec<SocketAddr>, Failure> {
    let failed = |error: String| {
        let advice = "give its address instead";
        Failure::new(Exit::Failed, format!("{}: {error}", target.host), advice)
    };
    let found = (target.host.as_str(), target.port).to_socket_addrs();
    let mut addresses = Vec::new();
    for address in found.map_err(|error| failed(error.to_string()))? {
        if !addresses.contains(&address) && addresses.len() < TARGETS_MAX {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        return Err(failed("it has no address".to_owned()));
    }
    Ok(addresses)
}

/// What becomes of a question about a name.
fn name_text(name: &NameReport) -> String {
    let mut out = format!("name {}\n", name.name);
    let mut line = |key: &str, value: String| out.push_str(&format!("  {key:<10}{value}\n"));
    let addresses: Vec<String> = name.addresses.iter().map(ToString::to_string).collect();
    let verdict = match name.verdict {
        Verdict::Capture => format!("capture: it is answered with {}", addresses.join(", ")),
        Verdict::Refuse => "refuse: it is said not to exist".to_owned(),
        Verdict::Direct => "direct: its question goes to the resolver that it is for".to_owned(),
    };
    line("verdict", verdict);
    match &name.rule {
        Some(rule) => {
            let place = format!("{}:{}", rule.file.display(), rule.line);
            line("rule", format!("{}  {}  ({place})", rule.number, rule.says));
        }
        None => line("rule", "none".to_owned()),
    }
    out.push('\n');
    out
}

fn text(report: &ExplainReport, t: &TargetReport) -> String {
    let mut out = format!(
        "{} {}, uid {}, cgroup {}\n",
        report.protocol, t.address, report.uid, report.cgroup
    );
    let mut line = |key: &str, value: String| out.push_str(&format!("  {key:<10}{value}\n"));
    if let Some(name) = &t.name {
        line("name", name.clone());
    }
    line("verdict", format!("{}: {}", t.verdict, t.reason));
    match &t.rule {
        Some(rule) => {
            let place = format!("{}:{}", rule.file.display(), rule.line);
            line("rule", format!("{}  {}  ({place})", rule.number, rule.says));
        }
        None => line("rule", "none".to_owned()),
    }
    for passed in &t.passed {
        let place = format!("line {}", passed.line);
        line(
            "  not",
            format!("{}  {}  ({place})", passed.number, passed.why),
        );
    }
    let attachment = report.attachment.as_ref();
    line(
        "cgroup",
        attachment.map_or("not captured".to_owned(), |path| {
            format!("captured by the attachment to {}", path.display())
        }),
    );
    if let Some(filter) = &report.filter {
        let keeps = match t.filter_keeps {
            Some(false) => "leaves it out",
            _ => "keeps it",
        };
        line("filter", format!("{filter}  {keeps}"));
    }
    line("no agent", if_dead(t).to_owned());
    if let Some(peer) = &t.peer {
        line("peer", peer_text(peer));
    }
    if let Some(stream) = &t.stream {
        line("stream", stream_text(stream));
    }
    out
}

fn if_dead(t: &TargetReport) -> &'static str {
    match t.agent_dead {
        Verdict::Refuse => "refuse: the programs outlive an agent that is killed",
        Verdict::Direct | Verdict::Capture => "direct",
    }
}

fn peer_text(peer: &PeerReport) -> String {
    let link = peer.link.as_ref().map(|link| format!(" over {link}"));
    let reason = peer.reason.as_ref().map(|reason| format!(": {reason}"));
    format!(
        "{}, {}{}{}",
        peer.name,
        peer.state,
        link.unwrap_or_default(),
        reason.unwrap_or_default()
    )
}

fn stream_text(stream: &ServiceReport) -> String {
    let lane = if stream.own_lane { "own" } else { "shared" };
    let rule = match (stream.number, stream.line) {
        (Some(number), Some(at)) => format!("by [[stream]] {number}, line {at}"),
        _ => "by default".to_owned(),
    };
    format!(
        "links {}, lane {lane}, compression {}  ({rule})",
        stream.links, stream.compression
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read() {
        let read = |text: &str| text.parse::<Target>().map(|t| (t.host, t.port));
        let good = |host: &str, port| Ok((host.to_owned(), port));
        assert_eq!(read("198.51.100.7:443"), good("198.51.100.7", 443));
        assert_eq!(read("[2001:db8::1]:443"), good("2001:db8::1", 443));
        assert_eq!(read("db.internal:5432"), good("db.internal", 5432));
        for wrong in [
            "",
            "x",
            ":1",
            "x:0",
            "x:http",
            "2001:db8::1:443",
            "[x]:1",
            "[::1]",
            "x:70000",
        ] {
            let said = read(wrong).unwrap_err();
            assert!(said.contains("is not HOST:PORT"), "{said}");
        }
    }

    #[test]
    fn what_is_told_reads_like_this() {
        let report: ExplainReport = serde_json::from_value(serde_json::json!({
            "protocol": "tcp", "uid": 1000, "cgroup": "/app.slice", "attachment": "/sys/fs/cgroup/app.slice",
            "filter": "--only 198.51.100.0/24", "note": null,
            "targets": [{
                "address": "198.51.100.7:443", "verdict": "capture", "reason": "its rule captures it",
                "agent_dead": "direct",
                "rule": {"number": 2, "file": "/etc/h.toml", "line": 14, "says": "capture to 0.0.0.0/0"},
                "passed": [{"number": 1, "line": 9, "why": "port 443 is not in 22"}],
                "filter_keeps": true,
                "peer": {"name": "gateway", "state": "up", "link": "wlan0", "reason": null, "waiting": 0},
                "stream": {"number": null, "line": null, "links": "single", "own_lane": false, "compression": "auto"},
            }],
        }))
        .unwrap();
        assert_eq!(
            text(&report, &report.targets[0]),
            "tcp 198.51.100.7:443, uid 1000, cgroup /app.slice\n\
             \x20 verdict   capture: its rule captures it\n\
             \x20 rule      2  capture to 0.0.0.0/0  (/etc/h.toml:14)\n\
             \x20   not     1  port 443 is not in 22  (line 9)\n\
             \x20 cgroup    captured by the attachment to /sys/fs/cgroup/app.slice\n\
             \x20 filter    --only 198.51.100.0/24  keeps it\n\
             \x20 no agent  direct\n\
             \x20 peer      gateway, up over wlan0\n\
             \x20 stream    links single, lane shared, compression auto  (by default)\n"
        );
    }
}
