//! Commands that ask the agent.

use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use super::exit::{Exit, Failure};
use super::table::{Table, age, bytes};
use crate::control::{
    Client, ClientError, LinkReport, PackedReport, Request, Response, SessionReport, StatusReport,
};
use crate::stdio::print;

pub(super) fn ask(control: &Path, request: &Request) -> Result<Response, Failure> {
    Ok(Client::connect(control)?.call(request)?)
}

pub(super) fn unexpected() -> Failure {
    let error = ClientError::Broken("it is not an answer to what was asked".to_owned());
    Failure::new(
        Exit::Failed,
        error.to_string(),
        "is the command of the same version as the agent?",
    )
}

pub(super) fn json(value: &impl Serialize) -> Result<ExitCode, Failure> {
    let text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
    print(&format!("{text}\n"));
    Ok(ExitCode::SUCCESS)
}

fn done(control: &Path, request: &Request) -> Result<ExitCode, Failure> {
    let Response::Done(words) = ask(control, request)? else {
        return Err(unexpected());
    };
    print(&format!("{words}\n"));
    Ok(ExitCode::SUCCESS)
}

pub fn attach(control: &Path, cgroup: &Path) -> Result<ExitCode, Failure> {
    done(
        control,
        &Request::Attach {
            cgroup: cgroup.to_owned(),
        },
    )
}

pub fn detach(control: &Path, cgroup: &Path) -> Result<ExitCode, Failure> {
    done(
        control,
        &Request::Detach {
            cgroup: cgroup.to_owned(),
        },
    )
}

pub fn handover(control: &Path, link: &str) -> Result<ExitCode, Failure> {
    done(
        control,
        &Request::Handover {
            link: link.to_owned(),
        },
    )
}

pub fn reload(control: &Path) -> Result<ExitCode, Failure> {
    done(control, &Request::Reload)
}

pub fn woke(control: &Path) -> Result<ExitCode, Failure> {
    done(control, &Request::Woke)
}

pub fn status(control: &Path, as_json: bool) -> Result<ExitCode, Failure> {
    let Response::Status(status) = ask(control, &Request::Status)? else {
        return Err(unexpected());
    };
    if as_json {
        return json(&status);
    }
    print(&status_text(&status));
    Ok(ExitCode::SUCCESS)
}

fn mebibytes(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn status_text(status: &StatusReport) -> String {
    let mut out = format!(
        "{}  holdfast {}  pid {}  up {}\ncertificate valid for {}\n",
        status.identity,
        status.version,
        status.pid,
        age(status.uptime_s),
        age(status.certificate_left_s)
    );
    if !status.peers.is_empty() {
        let mut table = Table::new(&["PEER", "STATE", "LINK", "WAITING", "REASON"]);
        for peer in &status.peers {
            let link = peer.link.clone().unwrap_or_default();
            let reason = peer.reason.clone().unwrap_or_default();
            table.row(vec![
                peer.name.clone(),
                peer.state.clone(),
                link,
                peer.waiting.to_string(),
                reason,
            ]);
        }
        out.push_str(&table.render());
    }
    out.push_str(&format!(
        "accepted sessions: {}\n",
        status.accepted_sessions
    ));
    if let Some(memory) = &status.memory {
        out.push_str(&format!(
            "memory: {} of {} unacknowledged, {} of {} granted as windows\n",
            mebibytes(memory.unacknowledged_bytes),
            mebibytes(memory.total_bytes / 2),
            mebibytes(memory.window_bytes),
            mebibytes(memory.total_bytes / 2),
        ));
    }
    for door in &status.doors {
        out.push_str(&format!(
            "door: {} leads to {} through {}\n",
            door.at, door.leads, door.peer
        ));
    }
    match &status.capture {
        None => out.push_str("capture: none configured\n"),
        Some(capture) => {
            out.push_str(&format!(
                "captured: {} over IPv4, {} over IPv6, {} delivered, {} refused, {} while no agent listened\n",
                capture.captured4, capture.captured6, capture.delivered, capture.refused, capture.agent_gone
            ));
            out.push_str(&format!(
                "UDP captured: {} over IPv4, {} over IPv6, {} flows now, {} dropped, {} beyond the limit\n",
                capture.udp4,
                capture.udp6,
                capture.udp_flows,
                capture.udp_dropped + capture.udp_stray,
                capture.udp_full
            ));
            if capture.bypassed + capture.not_bypassed > 0 {
                out.push_str(&format!(
                    "local bypass: {} messages past TCP, {} by TCP\n",
                    capture.bypassed, capture.not_bypassed
                ));
            }
            for cgroup in &capture.cgroups {
                out.push_str(&format!("  {}\n", cgroup.display()));
            }
        }
    }
    out
}

pub fn peers(control: &Path, as_json: bool) -> Result<ExitCode, Failure> {
    let Response::Peers(units) = ask(control, &Request::Peers)? else {
        return Err(unexpected());
    };
    if as_json {
        return json(&units);
    }
    let mut table = Table::new(&["PEER", "CERTIFICATE", "ROLE", "STATE", "SEEN AS"]);
    for unit in units {
        let addresses: Vec<String> = unit.addresses.iter().map(ToString::to_string).collect();
        table.row(vec![
            unit.name,
            unit.certificate,
            unit.role,
            unit.state,
            addresses.join(" "),
        ]);
    }
    print(&table.render());
    Ok(ExitCode::SUCCESS)
}

pub fn links(control: &Path, as_json: bool) -> Result<ExitCode, Failure> {
    let Response::Links(links) = ask(control, &Request::Links)? else {
        return Err(unexpected());
    };
    if as_json {
        return json(&links);
    }
    let mut table = Table::new(&[
        "LINK",
        "KIND",
        "STATE",
        "USE",
        "RTT",
        "STANDBY",
        "IDLE COST",
        "ADDRESSES",
        "WHY",
    ]);
    for link in links {
        let used = match (link.in_use, link.ready) {
            (true, _) => "in use",
            (false, true) => "standby",
            (false, false) => "",
        };
        let rtt = link
            .rtt_ms
            .map(|ms| format!("{ms:.1} ms"))
            .unwrap_or_default();
        let addresses = link.addresses.join(" ");
        let standby = format!("{}: {}", link.standby, link.standby_reason);
        let idle = idle_cost(&link);
        table.row(vec![
            link.name,
            link.kind,
            link.state,
            used.to_owned(),
            rtt,
            standby,
            idle,
            addresses,
            link.reason,
        ]);
    }
    print(&table.render());
    Ok(ExitCode::SUCCESS)
}

/// What a transport on it costs while nothing is sent; nothing where there is none.
fn idle_cost(link: &LinkReport) -> String {
    match (link.keepalive_s, link.idle_bytes_per_hour) {
        (Some(every), Some(hourly)) => format!("{}/h, each {}", bytes(hourly), age(every)),
        _ => String::new(),
    }
}

pub fn sessions(control: &Path, as_json: bool) -> Result<ExitCode, Failure> {
    let Response::Sessions(sessions) = ask(control, &Request::Sessions)? else {
        return Err(unexpected());
    };
    if as_json {
        return json(&sessions);
    }
    for session in &sessions {
        print(&session_text(session));
    }
    if sessions.is_empty() {
        print("no sessions\n");
    }
    Ok(ExitCode::SUCCESS)
}

/// The path of datagrams, where there are any, and the flows.
fn flows_text(s: &SessionReport) -> String {
    let mut out = String::new();
    if let Some(udp) = s.udp.as_ref().filter(|_| s.datagrams.flows_total > 0) {
        let link = if udp.link.is_empty() { "?" } else { &udp.link };
        let state = if udp.usable {
            "usable"
        } else {
            "not answered yet, so TCP carries datagrams too"
        };
        let rtt = udp.rtt_ms.map(|ms| format!("  rtt {ms:.1} ms"));
        out.push_str(&format!(
            "  udp {link}  -> {}  {state}  mtu {}{}\n",
            udp.remote,
            udp.mtu,
            rtt.unwrap_or_default()
        ));
    }
    for flow in &s.flows {
        out.push_str(&format!(
            "  flow {}  {}  {}  tx {} ({})  rx {} ({})\n",
            flow.id,
            flow.local,
            flow.target,
            flow.tx,
            bytes(flow.tx_bytes),
            flow.rx,
            bytes(flow.rx_bytes)
        ));
    }
    out
}

/// How one direction of a stream is packed; nothing, if nothing of it was.
fn packed_text(direction: &str, packed: &PackedReport) -> String {
    let Some(ratio) = packed.ratio else {
        return String::new();
    };
    let codec = packed.codec.as_deref().unwrap_or("not now");
    format!(
        "  {direction} {codec} ({} at {ratio:.2})",
        bytes(packed.bytes)
    )
}

fn session_text(s: &SessionReport) -> String {
    let held = s
        .held_s
        .map(|held| format!(" for {}", age(held)))
        .unwrap_or_default();
    let mut out = format!(
        "{}  peer {}  {}  {}{held}  {}  age {}  in {}  out {}  resent {}  handovers {}\n",
        &s.id[..8.min(s.id.len())],
        s.peer,
        s.role,
        s.state,
        s.aead,
        age(s.age_s),
        bytes(s.bytes_in),
        bytes(s.bytes_out),
        bytes(s.resent_bytes),
        s.handovers_total
    );
    for t in &s.transports {
        let link = if t.link.is_empty() { "?" } else { &t.link };
        let active = match (t.active, t.lane) {
            (true, _) => "active".to_owned(),
            (false, 0) => "standby".to_owned(),
            (false, lane) => format!("lane {lane}"),
        };
        let rtt = t
            .rtt_ms
            .map(|ms| format!("rtt {ms:.1} ms"))
            .unwrap_or_default();
        let window = (t.window_segments).map(|n| {
            format!(
                "  window {n}  {}",
                t.congestion.as_deref().unwrap_or_default()
            )
        });
        let window = window.unwrap_or_default();
        out.push_str(&format!(
            "  transport {link}  {} -> {}  {active}  {rtt}{window}\n",
            t.local, t.remote
        ));
    }
    for stream in &s.streams {
        let (tx, rx) = (bytes(stream.tx), bytes(stream.rx));
        let links = match stream.links.as_str() {
            "single" => String::new(),
            links => format!("  {links}"),
        };
        let lane = if stream.own_lane { "  own lane" } else { "" };
        let packed = packed_text("out", &stream.packed_out) + &packed_text("in", &stream.packed_in);
        out.push_str(&format!(
            "  stream {}  {}  {}{links}{lane}  tx {tx}  rx {rx}{packed}\n",
            stream.id, stream.target, stream.state
        ));
    }
    out.push_str(&flows_text(s));
    if let Some(h) = s.handovers.last() {
        let took = h
            .resumed_ns
            .map(|ns| format!("{:.1} ms", ns.saturating_sub(h.noticed_ns) as f64 / 1e6));
        let took = took.unwrap_or_else(|| "not done".to_owned());
        let kind = if h.soft { "soft" } else { "hard" };
        let replayed = bytes(h.replayed_bytes);
        out.push_str(&format!(
            "  last handover {} -> {}  {kind}  {}  {took}  replayed {replayed}\n",
            h.from, h.to, h.trigger
        ));
    }
    out
}
