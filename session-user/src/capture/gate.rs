//! The agent's side of the gate: hears of held SYNs, and sends them on or answers them.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use aya::maps::{MapData, RingBuf};
use session_ebpf_common::{FlowKey, Knock as Told, Newcomer, SYN_BYTES_MAX, knock};
use tokio::io::unix::AsyncFd;

use super::CaptureError;
use super::injector::Injectors;
use super::kernel::{Handshakes, Kernel, socket_addr};
use super::syn::{Refusal, Syn};

/// `BPF_EXIST`: change what is there, add nothing.
const EXISTING: u64 = 2;

/// A connection between an application and the agent, as both of its ends know it. No two are the same, also if they had
/// the same addresses one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hop {
    key: FlowKey,
    called_at: u64,
}

impl Hop {
    /// The hop between two sockets on loopback, which connect() began at that time.
    pub(super) fn between(
        netns_cookie: u64,
        app: SocketAddr,
        agent: SocketAddr,
        called_at: u64,
    ) -> Self {
        Self {
            key: FlowKey {
                netns_cookie,
                app_addr: words(app.ip()),
                agent_addr: words(agent.ip()),
                app_port: app.port().into(),
                agent_port: agent.port().into(),
            },
            called_at,
        }
    }
}

/// An application that waits in connect().
#[derive(Debug)]
pub struct Knock {
    /// Names the connection, should it come to one.
    pub hop: Hop,
    /// Where the application wants to go; v4-mapped destinations are shown as IPv4.
    pub original: SocketAddr,
    /// The application's end of the loopback hop, for logs.
    pub app: SocketAddr,
    /// The peer index of the rule that claimed the connection.
    pub peer: u32,
    /// Id of the application's cgroup.
    pub cgroup: u64,
    syn: Syn,
}

/// What the gate tells.
#[derive(Debug)]
pub enum GateEvent {
    /// An application waits.
    Knock(Box<Knock>),
    /// It waits no more: it closed its socket, or its time is over.
    Gone(Hop),
    /// An application is in a network namespace where nobody listens yet: for [`super::Capture::welcome`], before the
    /// gate is asked again.
    Newcomer(Newcomer),
}

/// Holds the SYNs of captured connections.
pub struct Gate {
    ring: AsyncFd<RingBuf<MapData>>,
    handshakes: Handshakes,
    injectors: Injectors,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

impl Gate {
    pub(super) fn open(kernel: &mut Kernel, injectors: Injectors) -> Result<Self, CaptureError> {
        let (ring, handshakes) = kernel.take_gate()?;
        // SAFETY: the ring keeps its descriptor for its whole life, and the registration owns it.
        let ring = unsafe { AsyncFd::register_with_interest(ring, tokio::io::Interest::READABLE) };
        Ok(Self {
            ring: ring.map_err(|error| CaptureError::Runtime {
                what: "watch the ring of held connections",
                source: error.into_parts().1,
            })?,
            handshakes,
            injectors,
        })
    }

    /// What happens next. Cancel-safe.
    pub async fn next(&mut self) -> io::Result<GateEvent> {
        loop {
            let mut guard = self.ring.readable_mut().await?;
            let Some(told) = guard.get_inner_mut().next() else {
                guard.clear_ready();
                continue;
            };
            match decode(&told) {
                Some(event) => return Ok(event),
                None => tracing::error!("the gate told of something that is no SYN"),
            }
        }
    }

    /// The target is connected: the application's kernel gets its answer from the agent's listener. False if the
    /// application waits no more.
    pub fn admit(&mut self, knock: &Knock) -> io::Result<bool> {
        let filed = self.handshakes.get(&knock.hop.key, 0).ok();
        let Some(mut filed) = filed.filter(|f| f.called_at == knock.hop.called_at) else {
            return Ok(false);
        };
        let key = &knock.hop.key;
        if !self.injectors.listens(key.netns_cookie, key.agent_port) {
            self.refuse(knock, libc::ECONNREFUSED)?;
            return Ok(false);
        }
        // First, so that the application's own retransmissions pass if this one is lost.
        filed.admitted = 1;
        if self.handshakes.insert(key, filed, EXISTING).is_err() {
            return Ok(false);
        }
        self.inject(knock, &knock.syn.whole(), knock.syn.to())?;
        Ok(true)
    }

    /// The target is not connected: the application's kernel sees what it would have seen without us. At a time-out that
    /// is nothing, and its own time runs.
    pub fn refuse(&self, knock: &Knock, errno: i32) -> io::Result<()> {
        match Refusal::from_errno(errno) {
            Some(refusal) => self.inject(knock, &knock.syn.refused(refusal), knock.syn.from()),
            None => Ok(()),
        }
    }

    fn inject(&self, knock: &Knock, packet: &[u8], to: IpAddr) -> io::Result<()> {
        self.injectors.send(knock.hop.key.netns_cookie, packet, to)
    }
}

fn decode(told: &[u8]) -> Option<GateEvent> {
    if told.len() == size_of::<Newcomer>() {
        // SAFETY: the length was just compared, and any bytes are a `Newcomer`; it may not be aligned.
        let newcomer = unsafe { told.as_ptr().cast::<Newcomer>().read_unaligned() };
        return Some(GateEvent::Newcomer(newcomer));
    }
    if told.len() != size_of::<Told>() {
        return None;
    }
    // SAFETY: the ring holds whole `Told`s, whose length was just compared, and any bytes are one; it may not be
    // aligned.
    let told = unsafe { told.as_ptr().cast::<Told>().read_unaligned() };
    let hop = Hop {
        key: told.key,
        called_at: told.original.called_at,
    };
    if told.kind == knock::GONE {
        return Some(GateEvent::Gone(hop));
    }
    let syn = Syn::parse(&told.syn[..(told.len as usize).min(SYN_BYTES_MAX)])?;
    Some(GateEvent::Knock(Box::new(Knock {
        hop,
        original: socket_addr(&told.original),
        app: SocketAddr::new(syn.from(), told.key.app_port as u16),
        peer: told.original.peer,
        cgroup: told.original.cgroup,
        syn,
    })))
}

/// An address as the programs write it.
pub(super) fn words(ip: IpAddr) -> [u32; 4] {
    let octets = match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => Ipv6Addr::octets(&ip),
    };
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(octets.chunks_exact(4)) {
        *word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
    }
    words
}
