//! Which path to use: a pure function of what is known.
//!
//! No clock, no sockets, no memory: the snapshot, the configuration, the path in use, the history
//! of dials and the time go in; an ordered choice, what to do, and the reasons in words come out.
//! The same input gives the same answer. What a change of links costs is the driver's affair; that
//! a link has been good for long enough is the monitor's (its debounce).

mod history;
mod service;
mod standby;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use crate::glob;
use crate::link::{Link, LinkKind, LinkSnapshot, Unusable};

pub use history::PathHistory;
pub use service::{Lanes, ServiceRule, ServiceRules};
pub use standby::{Standby, StandbyConfig};

/// What the operator wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicyConfig {
    /// Link names or patterns, most preferred first. Links that match none come after them, by
    /// the metric of their route and then by name.
    pub prefer: Vec<String>,
    /// Names or patterns of links that are never used, even if preferred too.
    pub exclude: Vec<String>,
    /// What links that are not in use are for.
    pub standby: StandbyConfig,
    /// A link chosen by hand; it comes before all others while it is usable.
    pub manual: Option<String>,
}

/// A way to the peer: a link, the address bound on it, and the peer's address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Path {
    /// The link's name.
    pub link: String,
    /// The local address.
    pub source: IpAddr,
    /// The peer's address and port.
    pub remote: SocketAddr,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Path {
            link,
            source,
            remote,
        } = self;
        write!(f, "{link} ({source} to {remote})")
    }
}

/// A path that can be tried, with the reason for its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The path.
    pub path: Path,
    /// Why it stands where it stands.
    pub reason: String,
    /// What its link is for while another carries.
    pub standby: Standby,
    /// Whether dials over it have failed too often, or it has fallen silent, of late.
    pub demoted: bool,
}

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Go on with the path in use.
    Stay,
    /// Take this path at once; there is none, or the one in use is lost.
    HardHandover {
        /// The new path.
        to: Path,
    },
    /// Move to this better path; the one in use still works, so the handover can be soft.
    Return {
        /// The new path.
        to: Path,
    },
    /// No path exists. Keep the session and wait for the next snapshot.
    Hold,
}

/// The policy's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Every usable path, best first. Where a dial fails the next one is to be tried.
    pub ordered: Vec<Choice>,
    /// Every link that is not among them, with the reason.
    pub rejected: Vec<(String, String)>,
    /// What to do now.
    pub action: Action,
    /// Why, in words.
    pub reason: String,
}

/// Where a path stands; lower comes first. Compared field by field.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    demoted: bool,
    not_manual: bool,
    /// It loses large packets: it works with small ones, at a price.
    narrow: bool,
    /// Index of the first pattern of `prefer` that matches, or their number.
    preference: usize,
    /// Within the same preference the link in use stays.
    not_current: bool,
    metric: u32,
    name: String,
    remote: usize,
}

impl Rank {
    /// What makes one path *more preferred* than another, and so worth a move from a path that
    /// works. A lower metric is not: routes come and go, and each move costs something.
    fn class(&self) -> (bool, bool, bool, usize) {
        (self.demoted, self.not_manual, self.narrow, self.preference)
    }
}

/// Chooses among the links of `snapshot` for a peer that listens on `remotes` (in configured
/// order). `current` is the path in use. See [`Action`] for the answer.
pub fn choose(
    snapshot: &LinkSnapshot,
    config: &PolicyConfig,
    current: Option<&Path>,
    remotes: &[SocketAddr],
    history: &PathHistory,
    now: Instant,
) -> Decision {
    let mut ranked: Vec<(Rank, Choice)> = Vec::new();
    let mut rejected = Vec::new();
    for link in &snapshot.links {
        if let Some(reason) = refuse(link, config, remotes) {
            rejected.push((link.name.clone(), reason));
            continue;
        }
        for (order, &remote) in remotes.iter().enumerate() {
            let Ok(source) = link.usable_for(remote.ip()) else {
                continue;
            };
            let path = Path {
                link: link.name.clone(),
                source,
                remote,
            };
            let rank = rank(link, config, current, (order, remote), history, now);
            let reason = explain(&rank, config);
            let choice = Choice {
                path,
                reason,
                standby: config.standby(link),
                demoted: rank.demoted,
            };
            ranked.push((rank, choice));
        }
    }
    ranked.sort_by(|a, b| a.0.cmp(&b.0));
    let narrow = |path: &Path| history.segment(&path.link, path.remote, now).is_some();
    let own = current.map(|path| Own {
        path,
        narrow: narrow(path),
    });
    let (action, reason) = act(snapshot, config, own, &ranked);
    Decision {
        ordered: ranked.into_iter().map(|(_, choice)| choice).collect(),
        rejected,
        action,
        reason,
    }
}

/// Why the configuration keeps a link from being used, whatever its state.
fn forbid(link: &Link, config: &PolicyConfig) -> Option<String> {
    if config.exclude.iter().any(|p| glob::matches(p, &link.name)) {
        return Some("excluded by the configuration".to_owned());
    }
    if config.standby(link) == Standby::Never && config.manual.as_ref() != Some(&link.name) {
        return Some("used by hand only (`never`)".to_owned());
    }
    // Loopback reaches nobody else; only tests and a relay on the same host name it.
    let named = config.prefer.contains(&link.name) || config.manual.as_ref() == Some(&link.name);
    if link.kind == LinkKind::Loopback && !named {
        return Some("loopback is used only where `prefer` names it".to_owned());
    }
    None
}

/// Why a link cannot be used for any of `remotes`.
fn refuse(link: &Link, config: &PolicyConfig, remotes: &[SocketAddr]) -> Option<String> {
    if let Some(reason) = forbid(link, config) {
        return Some(reason);
    }
    let mut first = None;
    for remote in remotes {
        match link.usable_for(remote.ip()) {
            Ok(_) => return None,
            Err(reason) => first = first.or(Some(reason)),
        }
    }
    Some(first.map_or_else(
        || "the peer has no address".to_owned(),
        |reason: Unusable| reason.to_string(),
    ))
}

/// Index of the first pattern of `prefer` that matches the link, or the number of patterns.
fn preference(link: &str, config: &PolicyConfig) -> usize {
    let matching = |pattern: &String| glob::matches(pattern, link);
    let found = config.prefer.iter().position(matching);
    found.unwrap_or(config.prefer.len())
}

fn rank(
    link: &Link,
    config: &PolicyConfig,
    current: Option<&Path>,
    (order, remote): (usize, SocketAddr),
    history: &PathHistory,
    now: Instant,
) -> Rank {
    Rank {
        demoted: history.demoted_until(&link.name, remote, now).is_some(),
        not_manual: config.manual.as_ref() != Some(&link.name),
        narrow: history.segment(&link.name, remote, now).is_some(),
        preference: preference(&link.name, config),
        not_current: current.is_none_or(|path| path.link != link.name),
        metric: link.route_to(remote.ip()).map_or(0, |route| route.metric),
        name: link.name.clone(),
        remote: order,
    }
}

fn explain(rank: &Rank, config: &PolicyConfig) -> String {
    let place = if !rank.not_manual {
        "chosen by hand".to_owned()
    } else if let Some(pattern) = config.prefer.get(rank.preference) {
        format!("preference {} ({pattern})", rank.preference + 1)
    } else {
        format!("not listed; metric {}", rank.metric)
    };
    let used = if rank.not_current { "" } else { ", in use" };
    let demoted = if rank.demoted {
        ", put last because it failed of late"
    } else {
        ""
    };
    let narrow = if rank.narrow {
        ", put behind others because it loses large packets"
    } else {
        ""
    };
    format!("{place}{used}{demoted}{narrow}")
}

/// The path in use.
#[derive(Clone, Copy)]
struct Own<'a> {
    path: &'a Path,
    narrow: bool,
}

/// What to do, given the paths in order.
fn act(
    snapshot: &LinkSnapshot,
    config: &PolicyConfig,
    own: Option<Own<'_>>,
    ranked: &[(Rank, Choice)],
) -> (Action, String) {
    let best = ranked.first();
    let Some(Own {
        path: current,
        narrow,
    }) = own
    else {
        return match best {
            Some((_, choice)) => hard(choice, "no path is in use"),
            None => (Action::Hold, "no link can reach the peer".to_owned()),
        };
    };
    if let Some(loss) = loss_of(snapshot, current) {
        return match best {
            Some((_, choice)) => hard(choice, &loss),
            None => (
                Action::Hold,
                format!("{loss}, and no other link can reach the peer"),
            ),
        };
    }
    let forbidden = (snapshot.link(&current.link)).and_then(|link| forbid(link, config));
    if let Some(why) = forbidden {
        let why = format!("{} is {why}", current.link);
        return match best {
            Some((_, choice)) => soft(choice, &why),
            None => (
                Action::Hold,
                format!("{why}, and no other link can reach the peer"),
            ),
        };
    }
    // A path in use proves itself by its traffic, so a failed dial over it does not demote it.
    let not_manual = config.manual.as_ref() != Some(&current.link);
    let own = (false, not_manual, narrow, preference(&current.link, config));
    match best {
        Some((rank, choice)) if choice.path.link != current.link && rank.class() < own => {
            soft(choice, &format!("more preferred than {}", current.link))
        }
        _ => (Action::Stay, stay_reason(config, current, ranked)),
    }
}

fn stay_reason(config: &PolicyConfig, current: &Path, ranked: &[(Rank, Choice)]) -> String {
    let link = &current.link;
    match &config.manual {
        Some(manual) if manual == link => format!("{link} was chosen by hand"),
        Some(manual) => format!("{manual} was chosen by hand but is not usable; {link} works"),
        None if ranked.iter().all(|(_, c)| c.path.link == *link) => {
            format!("{link} works and is the only one that does")
        }
        None => format!("{link} works and none that is more preferred does"),
    }
}

/// Why the path in use cannot go on, if so. Settling does not end a path that is in use: it says
/// that the link has just come back, and a loss before that has been told already.
fn loss_of(snapshot: &LinkSnapshot, current: &Path) -> Option<String> {
    let name = &current.link;
    let Some(link) = snapshot.link(name) else {
        return Some(format!("{name} is gone"));
    };
    match link.usable_for(current.remote.ip()) {
        Ok(_) | Err(Unusable::Settling(_)) if link.holds(current.source) => None,
        Ok(_) | Err(Unusable::Settling(_)) => {
            Some(format!("{name} lost its address {}", current.source))
        }
        Err(reason) => Some(reason.to_string()),
    }
}

fn hard(choice: &Choice, why: &str) -> (Action, String) {
    let to = choice.path.clone();
    let reason = format!("{why}; taking {} ({})", to.link, choice.reason);
    (Action::HardHandover { to }, reason)
}

fn soft(choice: &Choice, why: &str) -> (Action, String) {
    let to = choice.path.clone();
    let reason = format!("{} is usable: {why} ({})", to.link, choice.reason);
    (Action::Return { to }, reason)
}

#[cfg(test)]
mod tests;
