//! The connect hooks: decide whether a connection is captured, and send it to the agent; and the same for UDP sockets.

use aya_ebpf::{
    helpers::{bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_ktime_get_ns},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use aya_log_ebpf::{debug, info, warn};
use session_ebpf_common::{
    AppSocket, DNS_PORT, FlowKey, GATE_ON, HANDSHAKES_ADMITTED, NAME_BYTES, NAMED_PEER,
    NAMES_KNOWN, NAMES_ON, Namespace, Original, Ports, Settings, V6_PORTS, action, counter, gate,
    is_for_many, octets, protocol,
};

use crate::{
    ctx::{
        ALLOW, SockAddr as _, Words, id_of, is_local, is_mapped, is_of_one_link, mapped, refuse,
    },
    maps::{self, SETTINGS},
    multipath,
    rules::{Claim, QUESTION, claim_on, is_left_out},
    taken::{LOOPBACK6, free_slot},
    udp::{self, Fate, Hop},
};

const IPPROTO_TCP: u32 = 6;
pub const IPPROTO_UDP: u32 = 17;
/// MTU of the loopback link, as the kernel has it (`loopback_setup` of drivers/net/loopback.c).
const LOOPBACK_MTU: u32 = 65_536;

/// connect() on an IPv4 socket.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    match decide(&ctx, ctx.addr4()) {
        Outcome::Redirected(target) => {
            ctx.set_addr4(&target.addr);
            ctx.set_port(target.port);
            ALLOW
        }
        Outcome::Direct => ALLOW,
        Outcome::Refused => refuse(),
    }
}

/// connect() on an IPv6 socket, to an IPv6 or a v4-mapped address.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    match decide(&ctx, ctx.addr6()) {
        Outcome::Redirected(target) => {
            ctx.set_addr6(&target.addr);
            ctx.set_port(target.port);
            ALLOW
        }
        Outcome::Direct => ALLOW,
        Outcome::Refused => refuse(),
    }
}

/// Decides about one connect and, if it is captured, stores its destination with the socket.
///
/// Every way out but capture forgets what the socket carried from an earlier connect, so that getpeername never tells
/// a stale destination.
#[inline(always)]
fn decide(ctx: &SockAddrContext, addr: Words) -> Outcome {
    let port = ctx.port();
    // One decision for both: two would double what the verifier walks.
    let bit = match ctx.protocol() {
        IPPROTO_TCP => protocol::TCP,
        IPPROTO_UDP => protocol::UDP,
        _ => return Outcome::Direct,
    };
    let Some(settings) = SETTINGS.get(0) else {
        return Outcome::Direct;
    };
    let claim = match choose(ctx, settings, &addr, port, bit) {
        Choice::Captured(claim) => claim,
        Choice::Direct => {
            forget(ctx, &addr, port);
            return Outcome::Direct;
        }
        Choice::Refused => {
            forget_socket(ctx);
            return Outcome::Refused;
        }
    };
    if bit == protocol::TCP {
        return match way(ctx, settings, &addr) {
            Ok(way) => capture(ctx, settings, &way, claim, addr, port),
            Err(obstacle) => give_up(ctx, claim, obstacle),
        };
    }
    match udp::take(ctx, settings, claim, &addr, port, true) {
        Fate::Captured(hop) => capture_udp(ctx, hop, addr, port),
        Fate::Direct => {
            forget(ctx, &addr, port);
            Outcome::Direct
        }
        Fate::Refused => {
            maps::forget_app_socket(ctx.sock());
            Outcome::Refused
        }
    }
}

/// What the rules say about a connection or a datagram.
pub enum Choice {
    /// It goes where it wants to go.
    Direct,
    /// The call fails with ECONNREFUSED.
    Refused,
    /// It goes to the agent, if that can take it.
    Captured(Claim),
}

/// Asks the rules; `bit` is one of `protocol::*`.
///
/// What asks about names goes to the agent wherever it was to go, this host included, and the rules say how the agent
/// reaches the resolver; but not at an address of one link, for the agent would have to know the link.
#[inline(always)]
pub fn choose(
    ctx: &SockAddrContext,
    settings: &Settings,
    addr: &Words,
    port: u16,
    bit: u8,
) -> Choice {
    let udp = bit == protocol::UDP;
    // Nobody listens at port 0. Programs attached at two levels run twice: the second sees an id, and leaves it.
    if port == 0 || is_of_one_link(addr) || (udp && (id_of(addr).is_some() || is_for_many(addr))) {
        return Choice::Direct;
    }
    let local = is_local(addr);
    // This host's own resolver is another one in another network namespace, where the agent does not ask.
    let asks = port == DNS_PORT
        && settings.names == NAMES_ON
        && (!local || ctx.netns_cookie() == settings.own_netns);
    // Rules are not asked about what only means something here; and what is bound to loopback reaches nothing, with or
    // without us. But a resolver may be here.
    if !asks && (local || is_bound_to_loopback(ctx)) {
        return Choice::Direct;
    }
    let claim = if local {
        None
    } else {
        claim_on(addr, port, bit)
    };
    let claim = match claim {
        Some(claim) if claim.action != action::DIRECT => claim,
        _ if asks => QUESTION,
        _ => return Choice::Direct,
    };
    if is_agent(settings) || (udp && udp::is_answer(ctx, &claim, addr, port)) {
        return Choice::Direct;
    }
    if claim.action == action::REFUSE {
        maps::count(counter::REFUSED);
        return Choice::Refused;
    }
    // Filters name addresses; what stands for a name must not go anywhere else, and questions go as the rules say.
    let filtered = settings.filters != 0 && !asks && claim.peer != NAMED_PEER;
    if filtered && is_left_out(addr, port) {
        return Choice::Direct;
    }
    Choice::Captured(claim)
}

/// Stores the destination with the socket.
#[inline(always)]
fn capture_udp(ctx: &SockAddrContext, hop: Hop, addr: Words, port: u16) -> Outcome {
    let Some(app) = maps::new_app_socket(ctx.sock()) else {
        warn!(ctx, "no memory for the state of a socket");
        return give_up(ctx, hop.claim, counter::NO_STORAGE);
    };
    let target = Target {
        addr: hop.addr,
        port: hop.port,
    };
    let known = maps::namespace(ctx.netns_cookie());
    // Names of links are known of the agent's own namespace alone.
    let named = known.is_some_and(|here| here.flags & NAMES_KNOWN != 0);
    let bound = ctx.device();
    let device = if bound == 0 {
        app.device
    } else if named {
        bound
    } else {
        0
    };
    if !ctx.unbind_device() {
        info!(
            ctx,
            "a socket stays bound to its device, its owner lacks CAP_NET_RAW"
        );
        return give_up(ctx, hop.claim, counter::DEVICE_BOUND);
    }
    let gate = gate::OPEN;
    *app = app_socket(known, hop.claim, addr, port, &target, gate);
    app.device = device;
    Outcome::Redirected(target)
}

/// Whether the agent itself is calling, whose own connections no rule is for.
#[inline(always)]
fn is_agent(settings: &Settings) -> bool {
    (bpf_get_current_pid_tgid() >> 32) as u32 == settings.agent_tgid
}

/// The agent's listener that a connection is sent to.
struct Target {
    addr: Words,
    port: u16,
}

enum Outcome {
    /// Leave the destination as it is.
    Direct,
    /// Fail the connect.
    Refused,
    /// Go to the agent.
    Redirected(Target),
}

/// Forgets what the socket carried from an earlier connect. Programs attached at two levels run twice: the second sees
/// what the first wrote and leaves it.
#[inline(always)]
fn forget(ctx: &SockAddrContext, addr: &Words, port: u16) {
    let again = maps::app_socket(ctx.sock())
        .is_some_and(|app| app.agent_word == addr[3] && app.agent_port == u32::from(port));
    if !again {
        forget_socket(ctx);
    }
}

/// The same, whichever connect it was.
#[inline(always)]
fn forget_socket(ctx: &SockAddrContext) {
    maps::forget_app_socket(ctx.sock());
    multipath::forget(ctx.sock());
}

/// Whether the application itself has bound the socket to a loopback address. One that was captured before may still
/// have the address that it got then.
#[inline(always)]
fn is_bound_to_loopback(ctx: &SockAddrContext) -> bool {
    maps::app_socket(ctx.sock()).is_none() && ctx.source_is_loopback()
}

/// How a connection reaches the agent.
struct Way<'a> {
    /// The listeners in its network namespace.
    ports: &'a Ports,
    /// The namespace; None where the agent has only now been told of it.
    known: Option<&'a Namespace>,
}

/// The way to the agent; or what keeps a matching connection from being captured now: the index of the counter that says
/// so.
#[inline(always)]
fn way<'a>(ctx: &SockAddrContext, settings: &'a Settings, addr: &Words) -> Result<Way<'a>, u32> {
    if !maps::agent_lives() {
        debug!(ctx, "no agent lives");
        return Err(counter::AGENT_GONE);
    }
    if maps::agent_hangs() {
        debug!(ctx, "the agent does not answer");
        return Err(counter::AGENT_HUNG);
    }
    if maps::in_flight() >= HANDSHAKES_ADMITTED {
        warn!(ctx, "too many handshakes in flight");
        return Err(counter::HANDSHAKES_FULL);
    }
    let way = way_here(ctx.netns_cookie(), settings);
    // On a host without ::1 the agent has no IPv6 listeners.
    let reachable = |way: &Way<'_>| is_mapped(addr) || way.ports.v6[0] != 0;
    let Some(way) = way.filter(reachable) else {
        debug!(ctx, "no agent listens in this network namespace");
        return Err(counter::AGENT_GONE);
    };
    Ok(way)
}

/// The way to the agent's listeners in a network namespace.
///
/// In one that the agent does not know it opens them now that it is told: where SYNs are held, and the agent may go there,
/// the connection is captured all the same, for its SYN waits until they are there.
#[inline(always)]
fn way_here(netns_cookie: u64, settings: &Settings) -> Option<Way<'_>> {
    let Some(known) = maps::namespace(netns_cookie) else {
        let told = !maps::thread_is_elsewhere(netns_cookie) && maps::tell_newcomer(netns_cookie);
        let waits = told && settings.gate == GATE_ON && settings.usual.v4 != 0;
        return waits.then_some(Way {
            ports: &settings.usual,
            known: None,
        });
    };
    if known.ports.v4 == 0 {
        // SAFETY: the helper takes no arguments and reads a clock.
        if unsafe { bpf_ktime_get_ns() } >= known.retry_at {
            maps::tell_newcomer(netns_cookie);
        }
        return None;
    }
    Some(Way {
        ports: &known.ports,
        known: Some(known),
    })
}

/// A connection that should be captured and cannot be: direct or refused, as its rule says.
#[inline(always)]
fn give_up(ctx: &SockAddrContext, claim: Claim, why: u32) -> Outcome {
    maps::count(why);
    forget_socket(ctx);
    if claim.fail_closed {
        maps::count(counter::REFUSED);
        return Outcome::Refused;
    }
    Outcome::Direct
}

/// Stores the destination with the socket and picks the agent's listener for it.
#[inline(always)]
fn capture(
    ctx: &SockAddrContext,
    settings: &Settings,
    way: &Way<'_>,
    claim: Claim,
    addr: Words,
    port: u16,
) -> Outcome {
    let Some(app) = maps::new_app_socket(ctx.sock()) else {
        warn!(ctx, "no memory for the state of a socket");
        return give_up(ctx, claim, counter::NO_STORAGE);
    };
    // A socket that is captured again has been freed already.
    let before = (app.original.port != 0).then_some((app.device, app.congestion));
    let named = way.known.is_some_and(|here| here.flags & NAMES_KNOWN != 0);
    let device = match before {
        Some((device, _)) => device,
        None if named => ctx.device(),
        None => 0,
    };
    let v4 = is_mapped(&addr);
    let target = if v4 {
        target4(way.ports, addr[3], port)
    } else {
        target6(ctx, way.ports, &addr, port)
    };
    // Replaced meanwhile, and perhaps another namespace's already. What follows is only what the application is told.
    let cookie = ctx.netns_cookie();
    if way.known.is_some_and(|here| !maps::is_of(here, cookie)) {
        return give_up(ctx, claim, counter::AGENT_GONE);
    }
    // After the last thing that can fail: a socket that goes direct keeps its device.
    if !ctx.unbind_device() {
        info!(
            ctx,
            "a socket stays bound to its device, its owner lacks CAP_NET_RAW"
        );
        return give_up(ctx, claim, counter::DEVICE_BOUND);
    }
    // Where there is no listener yet even an early connection has to wait for one.
    let gate = if settings.gate == GATE_ON && (!claim.early || way.known.is_none()) {
        gate::ARMED
    } else {
        gate::OPEN
    };
    *app = app_socket(way.known, claim, addr, port, &target, gate);
    app.device = device;
    app.congestion = before.map_or_else(|| ctx.congestion(), |(_, congestion)| congestion);
    multipath::remember(ctx.sock(), app);
    if !ctx.set_cubic() {
        maps::count(counter::NO_CUBIC);
    }
    maps::count(if v4 {
        counter::CAPTURED4
    } else {
        counter::CAPTURED6
    });
    if v4 {
        debug!(
            ctx,
            "captured {:i}:{} for peer {}",
            u32::from_be(addr[3]),
            port,
            claim.peer
        );
    } else {
        debug!(
            ctx,
            "captured [{:i}]:{} for peer {}",
            octets(&addr),
            port,
            claim.peer
        );
    }
    Outcome::Redirected(target)
}

/// What a captured socket remembers, but for what it had before.
#[inline(always)]
fn app_socket(
    known: Option<&Namespace>,
    claim: Claim,
    addr: Words,
    port: u16,
    target: &Target,
    gate: u32,
) -> AppSocket {
    let v4 = is_mapped(&addr);
    let (source, mtu) = match known {
        Some(_) if is_local(&addr) => (loopback(v4), LOOPBACK_MTU),
        Some(here) if v4 => (here.native.source4, here.native.mtu4),
        Some(here) => (here.native.source6, here.native.mtu6),
        None => ([0; 4], 0),
    };
    AppSocket {
        key: FlowKey {
            netns_cookie: 0,
            app_addr: [0; 4],
            agent_addr: [0; 4],
            app_port: 0,
            agent_port: 0,
        },
        original: Original {
            addr,
            port,
            admitted: 0,
            peer: claim.peer,
            // SAFETY: the helper takes no arguments and reads the current task.
            cgroup: unsafe { bpf_get_current_cgroup_id() },
            // SAFETY: the helper takes no arguments and reads a clock.
            called_at: unsafe { bpf_ktime_get_ns() },
        },
        agent_word: target.addr[3],
        agent_port: u32::from(target.port),
        gate,
        device: 0,
        source,
        mtu,
        fail_closed: u32::from(claim.fail_closed),
        congestion: [0; NAME_BYTES],
    }
}

/// The source address of a connection to this host itself.
#[inline(always)]
fn loopback(v4: bool) -> Words {
    if v4 {
        mapped(0x7f00_0001_u32.to_be())
    } else {
        LOOPBACK6
    }
}

/// Fibonacci hashing: the upper bits of the product depend on all bits of the input.
#[inline(always)]
fn mix(hash: u32, word: u32) -> u32 {
    (hash ^ word).wrapping_mul(0x9e37_79b1)
}

/// An address in 127.0.0.0/9, fixed by the destination, so that each destination has ephemeral ports of its own. The
/// upper half of 127.0.0.0/8 is left to UDP, and 127.0.0.0 to 127.0.0.1 to others.
#[inline(always)]
fn target4(ports: &Ports, addr: u32, port: u16) -> Target {
    let host = mix(mix(addr, u32::from(port)), 0) >> 9;
    let host = if host < 2 { host + 2 } else { host };
    Target {
        addr: mapped((0x7f00_0000 | host).to_be()),
        port: ports.v4,
    }
}

/// A port on `::1`: fixed by the destination, unless a socket with a port of its own cannot have that one.
#[inline(always)]
fn target6(ctx: &SockAddrContext, ports: &Ports, addr: &Words, port: u16) -> Target {
    let mut hash = u32::from(port);
    for word in addr {
        hash = mix(hash, *word);
    }
    let slot = (hash >> 16) as usize & (V6_PORTS - 1);
    let slot = free_slot(ctx, ports, slot, addr, port);
    Target {
        addr: LOOPBACK6,
        port: ports.v6[slot],
    }
}
