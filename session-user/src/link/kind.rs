//! Which sort of interface a link is.

use std::fs;
use std::path::Path;

use super::message::LinkFacts;
use super::model::LinkKind;

// linux/if_arp.h
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_PPP: u16 = 512;
const ARPHRD_TUNNEL: u16 = 768;
const ARPHRD_TUNNEL6: u16 = 769;
const ARPHRD_LOOPBACK: u16 = 772;
const ARPHRD_SIT: u16 = 776;
const ARPHRD_IPGRE: u16 = 778;
const ARPHRD_IEEE80211: u16 = 801;
const ARPHRD_IEEE80211_RADIOTAP: u16 = 803;
const ARPHRD_IP6GRE: u16 = 823;
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_NONE: u16 = 0xfffe;

/// Judges by what the kernel said in the link's message, then by sysfs.
pub(super) fn of(facts: &LinkFacts, name: &str) -> LinkKind {
    match facts.kind.as_deref() {
        Some("wwan" | "rmnet") => return LinkKind::Wwan,
        Some(
            "tun" | "wireguard" | "gre" | "gretap" | "ip6gre" | "ipip" | "ip6tnl" | "sit" | "vti"
            | "vti6" | "xfrm" | "geneve" | "vxlan",
        ) => return LinkKind::Tunnel,
        _ => {}
    }
    match facts.hardware {
        ARPHRD_LOOPBACK => LinkKind::Loopback,
        ARPHRD_IEEE80211..=ARPHRD_IEEE80211_RADIOTAP => LinkKind::Wifi,
        ARPHRD_ETHER | ARPHRD_NONE | ARPHRD_RAWIP | ARPHRD_PPP => {
            from_sysfs(facts.index, name).unwrap_or(match facts.hardware {
                ARPHRD_ETHER => LinkKind::Ethernet,
                // PPP is a modem more often than a tunnel, but PPPoE is neither.
                ARPHRD_PPP => LinkKind::Other,
                _ => LinkKind::Tunnel,
            })
        }
        ARPHRD_TUNNEL | ARPHRD_TUNNEL6 | ARPHRD_SIT | ARPHRD_IPGRE | ARPHRD_IP6GRE => {
            LinkKind::Tunnel
        }
        _ => LinkKind::Other,
    }
}

/// A Wi-Fi or cellular device looks like Ethernet in netlink; sysfs tells. sysfs shows the
/// namespace of whoever mounted it, hence the check that it speaks of the same interface.
fn from_sysfs(index: u32, name: &str) -> Option<LinkKind> {
    let folder = Path::new("/sys/class/net").join(name);
    let shown: u32 = read(&folder.join("ifindex"))?.trim().parse().ok()?;
    if shown != index {
        return None;
    }
    let uevent = read(&folder.join("uevent")).unwrap_or_default();
    let devtype = uevent
        .lines()
        .find_map(|line| line.strip_prefix("DEVTYPE="));
    match devtype {
        Some("wlan") => Some(LinkKind::Wifi),
        Some("wwan") => Some(LinkKind::Wwan),
        _ if folder.join("wireless").exists() || folder.join("phy80211").exists() => {
            Some(LinkKind::Wifi)
        }
        _ => None,
    }
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judged_by_kind_then_by_hardware() {
        for (kind, hardware, expected) in [
            (None, 772, LinkKind::Loopback),
            (Some("veth"), 1, LinkKind::Ethernet),
            (Some("wireguard"), 0xfffe, LinkKind::Tunnel),
            (Some("tun"), 1, LinkKind::Tunnel),
            (Some("wwan"), 519, LinkKind::Wwan),
            (None, 801, LinkKind::Wifi),
            (None, 280, LinkKind::Other),
        ] {
            let facts = LinkFacts {
                index: 1_000_000,
                name: None,
                hardware,
                flags: 0,
                operstate: None,
                mtu: None,
                kind: kind.map(str::to_owned),
            };
            assert_eq!(of(&facts, "none-such"), expected, "{kind:?} {hardware}");
        }
    }
}
