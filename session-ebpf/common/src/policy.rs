//! The compiled capture rules, as the kernel holds them, and what they mean.
//!
//! The programs and the agent evaluate them with the same functions, so that what the agent explains is what the kernel
//! does.

/// Entries that one capture policy can hold: a rule takes one for each of its port ranges times its uid ranges.
pub const POLICY_RULES_MAX: usize = 32;
/// Slots for capture policies; the agent uses half of them at a time, so that an update never rewrites a live one.
pub const POLICY_SLOTS: u32 = 2048;
/// CIDR prefixes per address family.
pub const PREFIXES_MAX: u32 = 65_536;

/// [`PortRule::flags`]: refuse the connection when it cannot be captured, instead of letting it go direct.
pub const RULE_FAIL_CLOSED: u32 = 1;
/// [`PortRule::flags`]: the connection succeeds before the target has answered.
pub const RULE_EARLY: u32 = 2;

/// [`PortRule::peer`] of what goes to an address that stands for a name: the agent finds out which peer that is.
pub const NAMED_PEER: u32 = u32::MAX - 2;
/// The peer of questions about names: the agent itself.
pub const DNS_PEER: u32 = u32::MAX - 1;
/// The port of questions about names (RFC 1035, 4.2).
pub const DNS_PORT: u16 = 53;

/// What is done with a connection: [`PortRule::action`].
pub mod action {
    /// It goes where it wants to go.
    pub const DIRECT: u8 = 0;
    /// It goes to the agent.
    pub const CAPTURE: u8 = 1;
    /// It fails with ECONNREFUSED.
    pub const REFUSE: u8 = 2;
}

/// Bits of [`PortRule::protocols`].
pub mod protocol {
    /// TCP.
    pub const TCP: u8 = 1;
    /// UDP.
    pub const UDP: u8 = 2;
}

/// One port range and uid range of a rule, and what is done with what falls into both.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortRule {
    /// First port of the range.
    pub first: u16,
    /// Last port of the range, included.
    pub last: u16,
    /// Index of the configured peer that carries the connection.
    pub peer: u32,
    /// `RULE_*` bits.
    pub flags: u32,
    /// First real user id of the range, of the initial user namespace.
    pub uid_first: u32,
    /// Last user id of the range, included.
    pub uid_last: u32,
    /// Position of the rule in the configuration, from 0.
    pub rule: u16,
    /// `protocol::*` bits.
    pub protocols: u8,
    /// `action::*`.
    pub action: u8,
}

impl PortRule {
    /// Whether it holds for `port`, the user `uid` and one bit of [`protocol`].
    ///
    /// A single comparison of what the differences have in common, their sign: a branch for each of them would multiply
    /// the paths that the verifier walks, one factor for each entry.
    #[inline(always)]
    pub fn holds(&self, port: u16, uid: u32, protocol: u8) -> bool {
        let (port, uid) = (i64::from(port), i64::from(uid));
        let ports = (port - i64::from(self.first)) | (i64::from(self.last) - port);
        let uids = (uid - i64::from(self.uid_first)) | (i64::from(self.uid_last) - uid);
        let protocols = i64::from(self.protocols & protocol) - 1;
        (ports | uids | protocols) >= 0
    }
}

/// What a matching prefix means: the first entry that holds decides; none means "go direct".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Policy {
    /// How many of `rules` are in use.
    pub count: u32,
    /// The entries in order of precedence.
    pub rules: [PortRule; POLICY_RULES_MAX],
}

impl Policy {
    /// The entry that decides.
    ///
    /// Copied out of the map: a pointer would be a different one for each position, and the verifier would walk through
    /// the rest of a program once for each.
    #[inline(always)]
    pub fn decide(&self, port: u16, uid: u32, protocol: u8) -> Option<PortRule> {
        for position in 0..POLICY_RULES_MAX {
            if position as u32 >= self.count {
                break;
            }
            let rule = &self.rules[position];
            if rule.holds(port, uid, protocol) {
                return Some(rule.copied());
            }
        }
        None
    }
}

impl PortRule {
    #[inline(always)]
    fn copied(&self) -> Self {
        /// Reads one field.
        macro_rules! read {
            ($field:ident) => {
                // SAFETY: a reference is valid for reads. Volatile, or the compiler moves the loads behind the loop.
                unsafe { (&raw const self.$field).read_volatile() }
            };
        }
        Self {
            first: read!(first),
            last: read!(last),
            peer: read!(peer),
            flags: read!(flags),
            uid_first: read!(uid_first),
            uid_last: read!(uid_last),
            rule: read!(rule),
            protocols: read!(protocols),
            action: read!(action),
        }
    }
}
