//! Which links have a transport ready before it is needed.

use super::PolicyConfig;
use crate::glob;
use crate::link::{Link, LinkKind};

/// What a link that is not in use is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standby {
    /// A transport over it is open, authenticated and idle.
    Warm,
    /// It is dialled when it is needed.
    Cold,
    /// It does not stand in for another link; only a choice by hand uses it.
    Never,
}

impl std::fmt::Display for Standby {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Warm => "warm",
            Self::Cold => "cold",
            Self::Never => "never",
        })
    }
}

/// Patterns of link names, as configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StandbyConfig {
    /// Links that cost money by volume, beside cellular ones: cold unless named in `warm`.
    pub metered: Vec<String>,
    /// Links that are [`Standby::Warm`].
    pub warm: Vec<String>,
    /// Links that are [`Standby::Cold`].
    pub cold: Vec<String>,
    /// Links that are [`Standby::Never`].
    pub never: Vec<String>,
}

impl PolicyConfig {
    /// What `link` is for while it is not in use. Where several lists name it, the one that costs
    /// less counts.
    pub fn standby(&self, link: &Link) -> Standby {
        self.standby_and_reason(link).0
    }

    /// The same, with the reason in words.
    pub fn standby_and_reason(&self, link: &Link) -> (Standby, &'static str) {
        let named = |patterns: &[String]| patterns.iter().any(|p| glob::matches(p, &link.name));
        let config = &self.standby;
        if named(&config.never) {
            (Standby::Never, "`never` names it")
        } else if named(&config.cold) {
            (Standby::Cold, "`cold` names it")
        } else if named(&config.warm) {
            (Standby::Warm, "`warm` names it")
        } else if named(&config.metered) {
            (Standby::Cold, "`metered` names it")
        } else if link.kind == LinkKind::Wwan {
            (Standby::Cold, "cellular links cost by volume")
        } else {
            (Standby::Warm, "it costs nothing by volume")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::LinkState;
    use std::time::Instant;

    fn link(name: &str, kind: LinkKind) -> Link {
        Link {
            index: 1,
            name: name.to_owned(),
            kind,
            admin_up: true,
            carrier: true,
            addresses: Vec::new(),
            routes: Vec::new(),
            mtu: 1500,
            state: LinkState::Usable,
            since: Instant::now(),
        }
    }

    #[test]
    fn what_costs_by_volume_is_cold_and_lists_say_otherwise() {
        let lists = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let config = PolicyConfig {
            standby: StandbyConfig {
                metered: lists(&["sat*"]),
                warm: lists(&["wwan1", "both"]),
                cold: lists(&["eth9", "both", "least"]),
                never: lists(&["least"]),
            },
            ..PolicyConfig::default()
        };
        for (name, kind, expected) in [
            ("eth0", LinkKind::Ethernet, Standby::Warm),
            ("wlan0", LinkKind::Wifi, Standby::Warm),
            ("wwan0", LinkKind::Wwan, Standby::Cold),
            ("wwan1", LinkKind::Wwan, Standby::Warm),
            ("sat0", LinkKind::Ethernet, Standby::Cold),
            ("eth9", LinkKind::Ethernet, Standby::Cold),
            ("both", LinkKind::Ethernet, Standby::Cold),
            ("least", LinkKind::Ethernet, Standby::Never),
        ] {
            assert_eq!(config.standby(&link(name, kind)), expected, "{name}");
        }
    }
}
