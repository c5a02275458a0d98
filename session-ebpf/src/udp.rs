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
    Assigned, CONNECTED, Conversation, DNS_PORT, Destination, GATE_ON, Opening, Settings,
    TELL_AGAIN_NS, action, counter, id_address, opener, port_of, protocol,
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
    let v4 = is_mapped(addr);
    // Resolvers of libc take any error of the first question for a final one. So where it may go direct, it does.
    let waits = v4 && (port != DNS_PORT || claim.fail_closed);
    let agents_port = match way(ctx, settings, v4, waits) {
        Ok(port) => port,
        Err(obstacle) => return give_up(claim, obstacle),
    };
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
    maps::count(if v4 { counter::UDP4 } else { counter::UDP6 });
    Fate::Captured(Hop {
        addr: id_address(id, addr),
        port: agents_port,
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

/// The agent's port for datagrams in the network namespace of this socket; or what keeps it from taking them now: the
/// index of the counter that says so. `waits`: where it does not know the namespace, whether to send it ahead.
#[inline(always)]
fn way(ctx: &SockAddrContext, settings: &Settings, v4: bool, waits: bool) -> Result<u16, u32> {
    if !maps::agent_lives() {
        return Err(counter::AGENT_GONE);
    }
    if maps::agent_hangs() {
        return Err(counter::AGENT_HUNG);
    }
    let cookie = ctx.netns_cookie();
    let Some(here) = maps::namespace(cookie) else {
        return way_ahead(ctx, settings, cookie, waits);
    };
    let (port, listens) = (here.ports.udp(v4), here.ports.v4 != 0);
    if port != 0 && maps::is_of(here, cookie) {
        return Ok(port);
    }
    if !listens {
        maps::ask_again(cookie);
    }
    Err(counter::AGENT_GONE)
}

/// The port that the agent will have in a network namespace that it does not know, if it comes now that it is told: what
/// is sent there meanwhile is kept for it (`fence.rs`). Over IPv4 alone, for without the agent's route no address there
/// stands for an IPv6 destination.
#[inline(always)]
fn way_ahead(
    ctx: &SockAddrContext,
    settings: &Settings,
    cookie: u64,
    waits: bool,
) -> Result<u16, u32> {
    if maps::thread_is_elsewhere(cookie) {
        return Err(counter::AGENT_GONE);
    }
    let Some(stranded) = maps::new_stranded(ctx.sock()) else {
        return Err(counter::NO_STORAGE);
    };
    // SAFETY: the helper takes no arguments and reads a clock.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let told =
        stranded.netns_cookie == cookie && now.saturating_sub(stranded.told_at) <= TELL_AGAIN_NS;
    if !told {
        if !maps::tell_newcomer(cookie) {
            return Err(counter::AGENT_GONE);
        }
        stranded.told_at = now;
        stranded.netns_cookie = cookie;
    }
    let port = settings.usual.udp4;
    if waits && settings.gate == GATE_ON && port != 0 {
        Ok(port)
    } else {
        Err(counter::AGENT_GONE)
    }
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
        let Some(id) = id_of(&id_address(drawn, &destination.addr)) else {
            continue;
        };
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
pub fn destination_of(
    ctx: &SockAddrContext,
    addr: &Words,
    port: u16,
) -> Option<&'static Destination> {
    let id = id_of(addr)?;
    let cookie = ctx.netns_cookie();
    if maps::namespace(cookie)?.ports.udp(is_mapped(addr)) != port {
        return None;
    }
    // SAFETY: the entry is not changed; if it is removed meanwhile, its memory stays for the program's life.
    let destination = unsafe { UDP_DESTINATIONS.get(id) }?;
    (destination.netns_cookie == cookie).then_some(destination)
}
