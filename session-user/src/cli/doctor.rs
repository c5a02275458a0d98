//! `holdfast doctor`: what this kernel, these privileges and this configuration allow.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use serde::Serialize;

use super::exit::{Exit, Failure};
use crate::capture::{Action, CaptureRule};
use crate::config::Config;
use crate::control::Client;
use crate::handshake::Identity;
use crate::stdio::print;

/// A certificate with less left is worth a warning.
const SOON_S: u64 = 7 * 24 * 3600;
/// Descriptors for a thousand streams, each with a socket, and the rest of the agent.
const DESCRIPTORS_MIN: u64 = 4096;
/// What the agent has beside one for each transport, stream and flow.
const DESCRIPTORS_BESIDE: u64 = 300;

/// One finding.
#[derive(Debug, Serialize)]
struct Finding {
    name: String,
    ok: bool,
    detail: String,
    advice: String,
}

impl Finding {
    fn new(name: &str, ok: bool, detail: impl Into<String>, advice: &str) -> Self {
        let advice = if ok { String::new() } else { advice.to_owned() };
        Self {
            name: name.to_owned(),
            ok,
            detail: detail.into(),
            advice,
        }
    }

    /// What works as it is, and would be better otherwise.
    fn advice(name: &str, detail: impl Into<String>, advice: &str) -> Self {
        Self {
            advice: advice.to_owned(),
            ..Self::new(name, true, detail, "")
        }
    }

    fn mark(&self) -> &'static str {
        match (self.ok, self.advice.is_empty()) {
            (true, true) => "ok  ",
            (true, false) => "note",
            (false, _) => "FAIL",
        }
    }
}

pub fn doctor(config: &Path, control: &Path, json: bool) -> Result<ExitCode, Failure> {
    let mut findings: Vec<Finding> = crate::capture::probe()
        .into_iter()
        .map(|c| Finding {
            name: c.name.to_owned(),
            ok: c.ok,
            detail: c.detail,
            advice: c.advice,
        })
        .collect();
    findings.push(descriptors());
    findings.extend(configuration(config));
    findings.extend(reverse_path());
    findings.push(fast_open());
    findings.push(aead(crate::handshake::aes_in_hardware()));
    let running = Client::connect(control);
    let detail = running
        .as_ref()
        .map_or_else(ToString::to_string, |_| "it answers".to_owned());
    findings.push(Finding::new(
        "agent",
        running.is_ok(),
        detail,
        "start it: `systemctl start holdfast` or `holdfast agent`",
    ));
    if json {
        print(&format!(
            "{}\n",
            serde_json::to_string_pretty(&findings).map_err(anyhow::Error::from)?
        ));
    } else {
        for f in &findings {
            print(&format!("{}  {}: {}\n", f.mark(), f.name, f.detail));
            if !f.advice.is_empty() {
                print(&format!("      {}\n", f.advice));
            }
        }
    }
    let bad = findings.iter().filter(|f| !f.ok).count();
    Ok(ExitCode::from(if bad == 0 { 0 } else { Exit::Check as u8 }))
}

/// Whether rules that refuse can outlive an agent that is killed; nothing, if there is none.
fn pinning(config: &Config) -> Option<Finding> {
    let rules = || config.captures.iter().map(|c| &c.rule);
    let must = rules().any(CaptureRule::is_fail_closed);
    let may = rules().any(|rule| rule.action == Action::Refuse);
    let bpffs = &config.agent.bpffs;
    let (name, detail) = ("BPF file system", bpffs.display().to_string());
    match (must, may, crate::capture::can_pin(bpffs)) {
        (false, false, _) => None,
        (_, _, true) => Some(Finding::new(name, true, detail, "")),
        (true, _, false) => Some(Finding::new(
            name,
            false,
            detail,
            "mount it there, for `when_agent_dead = \"refuse\"`: mount -t bpf bpf /sys/fs/bpf",
        )),
        (false, true, false) => Some(Finding::advice(
            name,
            format!("none at {detail}"),
            "without it, rules with action = \"refuse\" end with an agent that is killed: mount -t bpf bpf /sys/fs/bpf",
        )),
    }
}

fn descriptors() -> Finding {
    use nix::sys::resource::{Resource, getrlimit};
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) => Finding::new(
            "open files",
            hard >= DESCRIPTORS_MIN,
            format!(
                "{soft}, which the agent raises to {hard} when it starts: enough for {} transports, streams and flows together",
                hard.saturating_sub(DESCRIPTORS_BESIDE)
            ),
            "set LimitNOFILE=65536 in the agent's unit, or 1048576 at a large gateway: each transport and each stream needs a descriptor",
        ),
        Err(error) => Finding::new("open files", false, error.to_string(), ""),
    }
}

fn configuration(path: &Path) -> Vec<Finding> {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => {
            return vec![Finding::new(
                "configuration",
                false,
                error.to_string(),
                "`holdfast config example` shows every key",
            )];
        }
    };
    let mut out = vec![Finding::new(
        "configuration",
        true,
        path.display().to_string(),
        "",
    )];
    out.extend(pinning(&config));
    out.push(
        match Identity::load(&crate::agent::identity_paths(&config)) {
            Err(error) => Finding::new(
                "identity",
                false,
                error.to_string(),
                "`holdfast pki issue` makes one",
            ),
            Ok(identity) => {
                let left = identity
                    .not_after()
                    .and_then(|t| t.duration_since(SystemTime::now()).ok());
                let left = left.unwrap_or_default().as_secs();
                let detail = format!(
                    "{}, valid for {}",
                    identity.name().uri(),
                    super::table::age(left)
                );
                Finding::new(
                    "identity",
                    left > SOON_S,
                    detail,
                    "issue a new certificate: `holdfast pki issue`",
                )
            }
        },
    );
    let key = &config.identity.key;
    if let Ok(found) = fs::metadata(key) {
        let mode = found.permissions().mode() & 0o777;
        let detail = format!("{} has mode {mode:04o}", key.display());
        out.push(Finding::new(
            "key file",
            mode & 0o077 == 0,
            detail,
            "others can read it: chmod 600",
        ));
    }
    out
}

/// A link whose replies the kernel drops because its routes prefer another one.
fn reverse_path() -> Vec<Finding> {
    let all = rp_filter("all");
    let mut out = Vec::new();
    for entry in fs::read_dir("/proc/sys/net/ipv4/conf")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if matches!(name.as_str(), "all" | "default" | "lo") {
            continue;
        }
        let strict = all.max(rp_filter(&name)) == 1;
        let default_route = has_default_route(&name);
        if strict && !default_route {
            let detail = format!("{name} filters strictly and has no default route of its own");
            let advice = "give the link a default route with a higher metric, as NetworkManager does, or set rp_filter to 2";
            out.push(Finding::new("reverse path", false, detail, advice));
        }
    }
    if out.is_empty() {
        out.push(Finding::new(
            "reverse path",
            true,
            "no link loses its replies to strict filtering",
            "",
        ));
    }
    out
}

/// Without it transports are made in the usual way, so it is never a failure.
fn fast_open() -> Finding {
    let text = fs::read_to_string("/proc/sys/net/ipv4/tcp_fastopen").unwrap_or_default();
    fast_open_of(text.trim().parse().unwrap_or(0))
}

/// The same from the sysctl's value: bit 1 for dialling, bit 2 for accepting (tcp(7)).
fn fast_open_of(bits: u32) -> Finding {
    let name = "TCP Fast Open";
    let lacking = match (bits & 1 != 0, bits & 2 != 0) {
        (true, true) => {
            return Finding::new(
                name,
                true,
                "transports may be dialled and accepted with it",
                "",
            );
        }
        (true, false) => "not for transports that are accepted",
        (false, true) => "not for transports that are dialled",
        (false, false) => "turned off",
    };
    let advice = "without it at both ends, a handover onto a link without a standby takes a round trip more: sysctl -w net.ipv4.tcp_fastopen=3";
    Finding::advice(
        name,
        format!("{lacking} (net.ipv4.tcp_fastopen is {bits})"),
        advice,
    )
}

/// Both are safe, so that it is never a failure.
fn aead(aes_in_hardware: bool) -> Finding {
    let detail = if aes_in_hardware {
        "AES-128-GCM, for which the processor has instructions, unless a peer's has none"
    } else {
        "ChaCha20-Poly1305, as the processor is not known to have instructions for AES"
    };
    Finding::new("AEAD", true, detail, "")
}

fn rp_filter(name: &str) -> u8 {
    let text =
        fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn has_default_route(link: &str) -> bool {
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    routes
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>())
        .any(|f| f.len() > 7 && f[0] == link && f[1] == "00000000")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_open_is_advice_and_never_a_failure() {
        for (bits, mark) in [
            (0, "note"),
            (1, "note"),
            (2, "note"),
            (3, "ok  "),
            (0x403, "ok  "),
        ] {
            let finding = fast_open_of(bits);
            assert!(finding.ok && finding.mark() == mark, "{bits}: {finding:?}");
            assert_eq!(finding.advice.contains("tcp_fastopen=3"), mark == "note");
        }
        assert_eq!(Finding::new("it", false, "", "do this").mark(), "FAIL");
    }
}
