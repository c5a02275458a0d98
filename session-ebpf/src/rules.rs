//! Which rule claims a destination.

use aya_ebpf::{helpers::bpf_get_current_uid_gid, maps::lpm_trie::Key};
use session_ebpf_common::{RULE_FAIL_CLOSED, Words, is_mapped, octets};

use crate::maps::{POLICIES, PREFIXES4, PREFIXES6};

/// What the rule says that decides about a connection.
#[derive(Clone, Copy)]
pub struct Claim {
    /// `action::*`.
    pub action: u8,
    /// Index of the peer, if it is to be captured.
    pub peer: u32,
    /// Whether it is refused while it cannot be captured.
    pub fail_closed: bool,
}

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
    })
}
