//! What becomes of a connection, and why: the programs' decision, step by step, from the tables that they have.

use std::{
    fmt, fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use session_ebpf_common::{
    DNS_PORT, HANDSHAKES_ADMITTED, NAMED_PEER, NAMES_ON, PortRule, RULE_FAIL_CLOSED, Words, action,
    is_for_many, is_local, is_of_one_link,
};

use super::{
    CaptureError,
    cgroup::cgroup2_root,
    kernel::Kernel,
    namespaces::Reach,
    rule::{Protocol, Question},
};

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes to the agent.
    Capture,
    /// It goes as if there were no agent.
    Direct,
    /// `connect()`, or `sendto()` on a UDP socket, fails with ECONNREFUSED.
    Refuse,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Capture => "capture",
            Self::Direct => "direct",
            Self::Refuse => "refuse",
        })
    }
}

/// The answer to a [`Question`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What becomes of it now.
    pub verdict: Verdict,
    /// Why, in words.
    pub reason: String,
    /// What would become of it if the agent were killed.
    pub agent_dead: Verdict,
    /// Position of the rule that decides, from 0; `None` if none matches or none is asked.
    pub rule: Option<usize>,
    /// Index of the peer that the rule names, if it captures.
    pub peer: Option<u32>,
    /// The rules before it, and why each does not match.
    pub passed: Vec<(usize, String)>,
    /// The attached cgroup that the process is in, the nearest one.
    pub attachment: Option<PathBuf>,
    /// The filter of the command that the process belongs to, as it was typed, and whether it keeps the connection.
    pub filter: Option<(String, bool)>,
    /// Whether the agent listens in its network namespace.
    pub listens: bool,
}

/// Explains one connection of a process in `cgroup`.
pub(super) fn explain(
    kernel: &Kernel,
    (reach, own): (&Reach, bool),
    cgroup: &Path,
    question: &Question,
) -> Result<Explanation, CaptureError> {
    let failed = |error| CaptureError::map("reading the capture rules", error);
    let attached = kernel.attached();
    let attachment = cgroup
        .ancestors()
        .find(|path| attached.iter().any(|held| held == path));
    let asks_names = kernel.asks_names(question, own);
    let exempt = if asks_names { None } else { exempt(question) };
    let entry = match exempt {
        Some(_) => None,
        // No rule is for addresses of this host.
        None if is_local(&words(question.to.ip())) => None,
        None => kernel.tables.decide(question).map_err(failed)?,
    };
    let filter = filter_of(kernel, cgroup, question.to)?;
    let case = Case {
        kernel,
        reach,
        attached: attachment.is_some(),
        exempt,
        asks_names,
        entry,
        left_out: matches!(filter, Some((_, false))),
        question,
    };
    let (verdict, reason) = case.now();
    Ok(Explanation {
        verdict,
        reason,
        agent_dead: case.agent_dead(),
        rule: entry.map(|entry| usize::from(entry.rule)),
        peer: entry.and_then(|entry| (entry.action == action::CAPTURE).then_some(entry.peer)),
        passed: if exempt.is_some() {
            Vec::new()
        } else {
            passed(kernel, entry, question)
        },
        attachment: attachment.map(Path::to_owned),
        filter,
        listens: matches!(reach, Reach::Open { .. }),
    })
}

impl Kernel {
    /// Whether the programs take it because it asks about names. A resolver on the loopback interface is another one in
    /// each network namespace, and asked by the agent in its own alone.
    fn asks_names(&self, question: &Question, own: bool) -> bool {
        let words = words(question.to.ip());
        self.settings().names == NAMES_ON
            && question.to.port() == DNS_PORT
            && !is_of_one_link(&words)
            && (own || !is_local(&words))
    }
}

/// The filter that holds in a cgroup: from the root on, the first that there is, as the programs do. What has no name
/// below the root has no id in the hierarchy either.
fn filter_of(
    kernel: &Kernel,
    cgroup: &Path,
    to: SocketAddr,
) -> Result<Option<(String, bool)>, CaptureError> {
    let root = cgroup2_root()?;
    let mut levels: Vec<&Path> = cgroup
        .ancestors()
        .take_while(|path| *path != root)
        .collect();
    levels.reverse();
    for path in levels.into_iter().filter(|path| path.starts_with(&root)) {
        // One that is gone has no processes, and no filter.
        let Ok(data) = fs::metadata(path) else {
            continue;
        };
        let found = kernel.filters.look(data.ino(), to);
        let found = found.map_err(|error| CaptureError::map("reading a filter", error))?;
        if let Some((filter, keeps)) = found {
            return Ok(Some((filter.to_string(), keeps)));
        }
    }
    Ok(None)
}

/// Why each rule before the one that decides does not match; all of them, if none decides.
fn passed(kernel: &Kernel, entry: Option<PortRule>, question: &Question) -> Vec<(usize, String)> {
    let before = entry.map_or(kernel.rules.len(), |entry| usize::from(entry.rule));
    let rules = kernel.rules.iter().take(before).enumerate();
    rules
        .filter_map(|(position, rule)| Some((position, rule.mismatch(question)?)))
        .collect()
}

/// Why no rule is asked about a destination, if that is so.
fn exempt(question: &Question) -> Option<&'static str> {
    let udp = question.protocol == Protocol::Udp;
    if question.to.port() == 0 {
        return Some("nobody listens at port 0");
    }
    let words = words(question.to.ip());
    if is_local(&words) {
        return Some("loopback is never captured");
    }
    if udp && is_for_many(&words) {
        return Some("multicast and broadcast are never captured");
    }
    is_of_one_link(&words).then_some("an address of one link is never captured")
}

/// The address as the programs see it.
fn words(ip: IpAddr) -> Words {
    let ip = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut words = Words::default();
    for (word, bytes) in words.iter_mut().zip(ip.octets().chunks_exact(4)) {
        *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    words
}

/// What the programs see of a connection.
struct Case<'a> {
    kernel: &'a Kernel,
    reach: &'a Reach,
    attached: bool,
    exempt: Option<&'static str>,
    /// Whether it is a connection to a resolver, of which the agent takes all.
    asks_names: bool,
    entry: Option<PortRule>,
    left_out: bool,
    question: &'a Question,
}

impl Case<'_> {
    /// The steps of `redirect` in the programs' connect.rs, and of `fate` in their udp.rs, in their order.
    fn now(&self) -> (Verdict, String) {
        let direct = |why: &str| (Verdict::Direct, why.to_owned());
        if !self.attached {
            return direct("its cgroup is not captured");
        }
        if let Some(why) = self.exempt {
            return direct(why);
        }
        if self.asks_names
            && self
                .entry
                .is_none_or(|entry| entry.action == action::DIRECT)
        {
            return match self.obstacle(false) {
                None => (
                    Verdict::Capture,
                    "it asks about names, which the agent answers or hands on".to_owned(),
                ),
                Some(why) => direct(&why),
            };
        }
        let Some(entry) = self.entry else {
            return direct("no rule matches");
        };
        match entry.action {
            action::CAPTURE => self.captured(entry),
            action::REFUSE => (Verdict::Refuse, "its rule refuses it".to_owned()),
            _ => direct("its rule lets it go"),
        }
    }

    fn captured(&self, entry: PortRule) -> (Verdict, String) {
        let direct = |why: &str| (Verdict::Direct, why.to_owned());
        if self.left_out && !self.asks_names && entry.peer != NAMED_PEER {
            return direct("its rule captures it, but the filter of its command leaves it out");
        }
        let closed = entry.flags & RULE_FAIL_CLOSED != 0;
        match self.obstacle(closed) {
            None => (Verdict::Capture, self.captures().to_owned()),
            Some(why) if closed => (
                Verdict::Refuse,
                format!("{why}, and its rule refuses what cannot be captured"),
            ),
            Some(why) => direct(&why),
        }
    }

    fn captures(&self) -> &'static str {
        match self.reach {
            Reach::New { .. } => {
                "its rule captures it; it waits for the agent to listen in its network namespace"
            }
            _ => "its rule captures it",
        }
    }

    /// What keeps the agent from taking connections now. `closed`: whether they are refused then.
    fn obstacle(&self, closed: bool) -> Option<String> {
        let v4 = matches!(self.question.to.ip().to_canonical(), IpAddr::V4(_));
        if self.question.protocol == Protocol::Udp {
            return self.udp_obstacle(v4, closed);
        }
        let crowded = self.kernel.counters().in_flight >= HANDSHAKES_ADMITTED;
        match self.reach {
            _ if crowded => Some("too many handshakes with the agent are under way".to_owned()),
            Reach::Open { v6: false, .. } if !v4 => {
                Some("there is no IPv6 on loopback, so no IPv6 is captured".to_owned())
            }
            Reach::New { held: false } => {
                Some("the agent does not listen in its network namespace yet".to_owned())
            }
            Reach::Never(why) => Some(why.clone()),
            Reach::Open { .. } | Reach::New { .. } => None,
        }
    }

    /// The same for UDP: the steps of `way` in the programs' udp.rs.
    fn udp_obstacle(&self, v4: bool, closed: bool) -> Option<String> {
        let waits = v4 && (closed || self.question.to.port() != DNS_PORT);
        let takes = |(udp4, udp6): (bool, bool)| if v4 { udp4 } else { udp6 };
        match self.reach {
            Reach::Open { udp, .. } if takes(*udp) => None,
            Reach::Open { .. } if v4 => {
                Some("the agent takes no UDP in its network namespace".to_owned())
            }
            Reach::Open { .. } => {
                Some("the agent takes no UDP over IPv6 in its network namespace".to_owned())
            }
            Reach::New { held: true } if waits => None,
            Reach::New { .. } => {
                Some("the agent has no socket in its network namespace yet".to_owned())
            }
            Reach::Never(why) => Some(why.clone()),
        }
    }

    /// Without pins the programs end with the agent, and everything goes direct.
    fn agent_dead(&self) -> Verdict {
        let asked = self.attached && self.exempt.is_none() && self.kernel.pins.is_some();
        let Some(entry) = self.entry.filter(|_| asked) else {
            return Verdict::Direct;
        };
        let kept = !self.left_out || entry.peer == NAMED_PEER;
        let captured = entry.action == action::CAPTURE && kept;
        let closed = captured && entry.flags & RULE_FAIL_CLOSED != 0;
        if closed || entry.action == action::REFUSE {
            Verdict::Refuse
        } else {
            Verdict::Direct
        }
    }
}
