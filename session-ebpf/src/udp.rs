//! What becomes of UDP: the decision, and the ids that stand for destinations.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{
        bpf_get_current_cgroup_id,
        generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns},
    },
    programs::SockAddrContext,
};
use aya_log_ebpf::warn;
use session_ebpf_common::{
    Assigned, CONNECTED, Conversation, Destination, Opening, Settings, action, counter, id_address,
    opener, port_of, protocol,
};

use crate::{
    connect::{Choice, choose},
    ctx::{SockAddr as _, Words, id_of, is_local, is_mapped},
    maps::{self, CONVERSATIONS, SETTINGS, UDP_DESTINATIONS, UDP_IDS},
    rules::Claim,
};

/// Draws of a random id before a destination is given up: of 8,388,608 ids at most one in 128 is taken.
const DRAWS: u32 = 4;

/// What becomes of a connect() or of a datagram.
pub enum Fate {
    /// It goes where it wants to go.
    Direct,
    /// The call fails with ECONNREFUSED.
    Refused,
    /// It goes to the agent.
    Captured(Hop),
}

/// Where a captured datagram goes.
pub struct Hop {
    /// The address that stands for its destination.
    pub addr: Words,
    /// The agent's port.
    pub port: u16,
    /// The rule that claimed it.
    pub claim: Claim,
}

/// Decides about `addr` and `port`.
#[inline(always)]
pub fn fate(ctx: &SockAddrContext, addr: &Words, port: u16) -> Fate {
    let Some(settings) = SETTINGS.get(0) else {
        return Fate::Direct;
    };
    match choose(ctx, settings, addr, port, protocol::UDP) {
        Choice::Captured(claim) => {
            let connected = is_connected_to(ctx, addr, port);
            take(ctx, settings, claim, addr, port, connected)
        }
        Choice::Direct => Fate::Direct,
        Choice::Refused => Fate::Refused,
    }
}

/// Whether the socket is connected to the very destination that a datagram names: the answer must come from the address
/// that it is connected to. An IPv6 socket that is let go hears from that address alone all the same (`__udp_disconnect`
/// of net/ipv4/udp.c clears the port and the IPv4 address).
#[inline(always)]
fn is_connected_to(ctx: &SockAddrContext, addr: &Words, port: u16) -> bool {
    let Some(app) = maps::app_socket(ctx.sock()) else {
        return false;
    };
    let known = &app.original.addr;
    app.original.port == port
        && known[0] == addr[0]
        && known[1] == addr[1]
        && known[2] == addr[2]
        && known[3] == addr[3]
        && (!is_mapped(addr) || ctx.is_connected())
}

/// Captures it, if that can be. `connected`: by a socket that is, or becomes, connected to it.
#[inline(always)]
pub fn take(
    ctx: &SockAddrContext,
    settings: &Settings,
    claim: Claim,
    addr: &Words,
    port: u16,
    connected: bool,
) -> Fate {
    if let Some(obstacle) = obstacle(ctx, settings, addr) {
        return give_up(claim, obstacle);
    }
    let destination = Destination {
        addr: *addr,
        port: u32::from(port) | if connected { CONNECTED } else { 0 },
        peer: claim.peer,
        // SAFETY: the helper takes no arguments and reads the current task.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        netns_cookie: ctx.netns_cookie(),
    };
    let Some(id) = id_for(&destination) else {
        warn!(ctx, "too many destinations of UDP");
        return give_up(claim, counter::UDP_FULL);
    };
    let v4 = is_mapped(addr);
    maps::count(if v4 { counter::UDP4 } else { counter::UDP6 });
    Fate::Captured(Hop {
        addr: id_address(id, addr),
        port: if v4 {
            settings.udp4_port
        } else {
            settings.udp6_port
        },
        claim,
    })
}

/// Goes direct or is refused, as its rule says.
#[inline(always)]
pub fn give_up(claim: Claim, why: u32) -> Fate {
    maps::count(why);
    if claim.fail_closed {
        maps::count(counter::REFUSED);
        return Fate::Refused;
    }
    Fate::Direct
}

/// What keeps the agent from taking it now: the index of the counter that says so.
#[inline(always)]
fn obstacle(ctx: &SockAddrContext, settings: &Settings, addr: &Words) -> Option<u32> {
    let port = if is_mapped(addr) {
        settings.udp4_port
    } else {
        settings.udp6_port
    };
    if port == 0 || ctx.netns_cookie() != settings.udp_netns || !maps::agent_lives() {
        return Some(counter::AGENT_GONE);
    }
    maps::agent_hangs().then_some(counter::AGENT_HUNG)
}

/// The id of a destination, drawn at its first use.
#[inline(always)]
fn id_for(destination: &Destination) -> Option<u32> {
    // SAFETY: the helper takes no arguments and reads a clock.
    let used_at = unsafe { bpf_ktime_get_coarse_ns() };
    if let Some(assigned) = UDP_IDS.get_ptr_mut(destination) {
        // SAFETY: a map value is valid for the program's life; two that write the time write the same.
        unsafe {
            (&raw mut (*assigned).used_at).write_volatile(used_at);
            return Some((*assigned).id);
        }
    }
    for _ in 0..DRAWS {
        // SAFETY: the helper takes no arguments.
        let drawn = unsafe { bpf_get_prandom_u32() };
        let id = id_of(&id_address(drawn, &destination.addr))?;
        if UDP_DESTINATIONS
            .insert(id, destination, BPF_NOEXIST.into())
            .is_err()
        {
            continue;
        }
        let assigned = Assigned {
            used_at,
            id,
            pad: 0,
        };
        if UDP_IDS
            .insert(destination, assigned, BPF_NOEXIST.into())
            .is_ok()
        {
            maps::count(counter::UDP_IDS);
            return Some(id);
        }
        // Another thread was first, or there is no room.
        let _ = UDP_DESTINATIONS.remove(id);
        // SAFETY: one field is copied at once, which nobody changes.
        return unsafe { UDP_IDS.get(destination) }.map(|assigned| assigned.id);
    }
    None
}

/// The conversation of a socket that its application has bound.
///
/// By its port and not by the socket, since a server may answer from another socket of the same port: one of several
/// workers, or one that it has connected to who asked.
#[inline(always)]
fn conversation(ctx: &SockAddrContext, remote: &Words, remote_port: u16) -> Conversation {
    Conversation {
        netns_cookie: ctx.netns_cookie(),
        remote: *remote,
        remote_port,
        local_port: ctx.local_port(),
        pad: 0,
    }
}

/// Whether a bound socket answers one who spoke to it first, and not through us. Otherwise it is noted that this end
/// began, also where it then goes direct for want of an agent.
///
/// Who speaks first can be forged. So where the rule has nothing go direct, only what has a port of its own choice counts
/// as a server: clients have one of the kernel's.
#[inline(always)]
pub fn is_answer(ctx: &SockAddrContext, claim: &Claim, addr: &Words, port: u16) -> bool {
    let Some(by) = maps::bound_by(ctx.sock()) else {
        return false;
    };
    let first = began(&conversation(ctx, addr, port), opener::OURS);
    let strict = claim.fail_closed || claim.action == action::REFUSE;
    first == opener::THEIRS && (!strict || by == port_of::APPLICATION)
}

/// A datagram came in from `addr` and `port`, which is a destination of ours if it is an answer through us.
#[inline(always)]
pub fn note_heard(ctx: &SockAddrContext, addr: &Words, port: u16, answer: bool) {
    if is_local(addr) {
        return;
    }
    // Programs attached at two levels run twice: what the first has noted of an answer, the second leaves.
    if maps::bound_by(ctx.sock()).is_some() {
        let by = if answer { opener::OURS } else { opener::THEIRS };
        began(&conversation(ctx, addr, port), by);
    }
}

/// Who began a conversation: `by`, if it is new, or so old that it does not count any more.
#[inline(always)]
fn began(conversation: &Conversation, by: u32) -> u32 {
    // SAFETY: the helper takes no arguments and reads a clock.
    let used_at = unsafe { bpf_ktime_get_coarse_ns() };
    if let Some(known) = CONVERSATIONS.get_ptr_mut(conversation) {
        // SAFETY: a map value is valid for the program's life, and its words are aligned; two that write the time write
        // the same.
        unsafe {
            let opening = known.read_volatile();
            if opening.counts(used_at) {
                (&raw mut (*known).used_at).write_volatile(used_at);
                return opening.by;
            }
        }
    }
    let opening = Opening {
        used_at,
        by,
        pad: 0,
    };
    // Two threads that are first at once: either is as right.
    let _ = CONVERSATIONS.insert(conversation, opening, BPF_ANY.into());
    by
}

/// The destination that an address of ours stands for.
#[inline(always)]
pub fn destination_of(addr: &Words, port: u16) -> Option<&'static Destination> {
    let settings = SETTINGS.get(0)?;
    let ours = if is_mapped(addr) {
        settings.udp4_port
    } else {
        settings.udp6_port
    };
    if port != ours {
        return None;
    }
    // SAFETY: the entry is not changed; if it is removed meanwhile, its memory stays for the program's life.
    unsafe { UDP_DESTINATIONS.get(id_of(addr)?) }
}
