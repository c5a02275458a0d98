//! Which rule claims a destination, and whether the filter of a command leaves it out.

use aya_ebpf::{
    helpers::{bpf_get_current_uid_gid, generated::bpf_get_current_ancestor_cgroup_id},
    maps::lpm_trie::Key,
};
use session_ebpf_common::{
    DNS_PEER, FILTER_LEVELS, RULE_EARLY, RULE_FAIL_CLOSED, Words, action, is_mapped, octets,
};

use crate::maps::{FILTERED4, FILTERED6, FILTERS, POLICIES, PREFIXES4, PREFIXES6};

/// What the rule says that decides about a connection.
#[derive(Clone, Copy)]
pub struct Claim {
    /// `action::*`.
    pub action: u8,
    /// Index of the peer, if it is to be captured.
    pub peer: u32,
    /// Whether it is refused while it cannot be captured.
    pub fail_closed: bool,
    /// Whether it succeeds before the target has answered.
    pub early: bool,
}

/// Of what asks about names, where no rule captures what goes to that resolver. Without the agent it goes direct.
pub const QUESTION: Claim = Claim {
    action: action::CAPTURE,
    peer: DNS_PEER,
    fail_closed: false,
    early: false,
};

/// What the rule says that decides about a destination, if there is one; `protocol` is one bit of `protocol::*`. The
/// user is the calling task's real one.
#[inline(always)]
pub fn claim_on(addr: &Words, port: u16, protocol: u8) -> Option<Claim> {
    let index = if is_mapped(addr) {
        *PREFIXES4.get(Key::new(32, addr[3].to_ne_bytes()))?
    } else {
        *PREFIXES6.get(Key::new(128, octets(addr)))?
    };
    let uid = bpf_get_current_uid_gid() as u32;
    let rule = POLICIES.get(index)?.decide(port, uid, protocol)?;
    Some(Claim {
        action: rule.action,
        peer: rule.peer,
        fail_closed: rule.flags & RULE_FAIL_CLOSED != 0,
        early: rule.flags & RULE_EARLY != 0,
    })
}

/// Whether the filter of the command that is calling leaves a destination out of what is captured.
#[inline(always)]
pub fn is_left_out(addr: &Words, port: u16) -> bool {
    let Some(number) = filter() else {
        return false;
    };
    let policy = if is_mapped(addr) {
        let mut key = [0_u8; 8];
        key[..4].copy_from_slice(&number.to_be_bytes());
        key[4..].copy_from_slice(&addr[3].to_ne_bytes());
        FILTERED4.get(Key::new(64, key))
    } else {
        let mut key = [0_u8; 20];
        key[..4].copy_from_slice(&number.to_be_bytes());
        key[4..].copy_from_slice(&octets(addr));
        FILTERED6.get(Key::new(160, key))
    };
    policy.is_some_and(|policy| !policy.keeps(port))
}

/// The number of the filter that holds for the calling task: that of its cgroup, or of one around it. The level of a
/// scope differs between hosts, and within a cgroup namespace the agent cannot know it.
#[inline(always)]
fn filter() -> Option<u32> {
    for level in 1..=FILTER_LEVELS {
        // SAFETY: the helper reads the current task; 0 stands for a level that it has not.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return None;
        }
        // SAFETY: the value is one aligned word, copied at once.
        if let Some(number) = unsafe { FILTERS.get(id) } {
            return Some(*number);
        }
    }
    None
}
