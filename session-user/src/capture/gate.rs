//! The agent's side of the gate: hears of held SYNs, and sends them on or answers them.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use nix::time::{ClockId, clock_gettime};
use session_ebpf_common::{FlowKey, Knock as Told, Newcomer, SYN_BYTES_MAX, counter, knock};
use tokio::io::unix::AsyncFd;

use super::CaptureError;
use super::injector::Injectors;
use super::kernel::{CountersMap, Handshakes, Kernel, socket_addr};
use super::syn::{Refusal, Syn};

/// `BPF_EXIST`: change what is there, add nothing.
const EXISTING: u64 = 2;
/// After so much that was heard the programs are told that this agent does not hang, although there is more: each time is a
/// system call.
const NOTED_AFTER: u32 = 16;

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

impl Hop {
    /// Cookie of the network namespace that it is in.
    pub fn netns(&self) -> u64 {
        self.key.netns_cookie
    }

    /// The connection's addresses, as the programs file them.
    pub(super) fn key(&self) -> FlowKey {
        self.key
    }

    /// How long ago connect() was called.
    pub fn age(&self) -> Duration {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        now.saturating_sub(Duration::from_nanos(self.called_at))
    }
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
    /// An application waits until its network namespace has been opened, or could not be. Its knock comes then.
    Postponed,
}

/// Holds the SYNs of captured connections.
pub struct Gate {
    ring: AsyncFd<RingBuf<MapData>>,
    handshakes: Handshakes,
    counters: CountersMap,
    /// So much was heard since the programs were told that this agent does not hang.
    unnoted: u32,
    injectors: Injectors,
    /// What waits for a namespace to be opened, by its cookie.
    postponed: BTreeMap<u64, HashMap<Hop, Box<Knock>>>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

impl Gate {
    pub(super) fn open(kernel: &mut Kernel, injectors: Injectors) -> Result<Self, CaptureError> {
        let (ring, handshakes, counters) = kernel.take_gate()?;
        // SAFETY: the ring keeps its descriptor for its whole life, and the registration owns it.
        let ring = unsafe { AsyncFd::register_with_interest(ring, tokio::io::Interest::READABLE) };
        Ok(Self {
            ring: ring.map_err(|error| CaptureError::Runtime {
                what: "watch the ring of held connections",
                source: error.into_parts().1,
            })?,
            handshakes,
            counters,
            unnoted: 0,
            injectors,
            postponed: BTreeMap::new(),
        })
    }

    /// What happens next. Cancel-safe; to be asked anew after [`super::Capture::take_in`].
    ///
    /// To be asked again and again: connections that are made more than a second after one that nobody asked for go direct,
    /// or are refused, as their rules say.
    pub async fn next(&mut self) -> io::Result<GateEvent> {
        loop {
            if let Some(knock) = self.due() {
                return Ok(GateEvent::Knock(knock));
            }
            let mut guard = self.ring.readable_mut().await?;
            let Some(told) = guard.get_inner_mut().next() else {
                guard.clear_ready();
                self.note_answered();
                continue;
            };
            let event = decode(&told);
            drop(told);
            self.unnoted += 1;
            // The ring is not asked again before that one's namespace has been opened.
            let pauses = matches!(event, Some(GateEvent::Newcomer(_)));
            if pauses || self.unnoted >= NOTED_AFTER {
                self.note_answered();
            }
            match event {
                Some(event) => return Ok(self.postpone(event)),
                None => tracing::error!("the gate told of something that is no SYN"),
            }
        }
    }

    /// The agent looks at what it was told: it does not hang.
    fn note_answered(&mut self) {
        if std::mem::take(&mut self.unnoted) > 0
            && let Err(error) = self.counters.set(counter::UNANSWERED_SINCE, 0, 0)
        {
            tracing::warn!(%error, "the programs may take this agent to hang");
        }
    }

    /// A knock whose namespace is not being opened any more.
    fn due(&mut self) -> Option<Box<Knock>> {
        loop {
            // There are never many: as many as are opened at once.
            let mut cookies = self.postponed.keys().copied();
            let cookie = cookies.find(|cookie| !self.injectors.is_expected(*cookie))?;
            let waiting = self.postponed.get_mut(&cookie)?;
            let hop = waiting.keys().next().copied();
            if let Some(knock) = hop.and_then(|hop| waiting.remove(&hop)) {
                return Some(knock);
            }
            self.postponed.remove(&cookie);
        }
    }

    /// Keeps a knock back until its namespace has been opened, and forgets it if its application gives up meanwhile.
    fn postpone(&mut self, event: GateEvent) -> GateEvent {
        match event {
            GateEvent::Knock(knock) if self.injectors.is_expected(knock.hop.netns()) => {
                let waiting = self.postponed.entry(knock.hop.netns()).or_default();
                waiting.insert(knock.hop, knock);
                GateEvent::Postponed
            }
            GateEvent::Gone(hop) => {
                let waiting = self.postponed.get_mut(&hop.netns());
                match waiting.and_then(|waiting| waiting.remove(&hop)) {
                    Some(_) => GateEvent::Postponed,
                    None => GateEvent::Gone(hop),
                }
            }
            event => event,
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
            if let Err(error) = self.refuse(knock, libc::ECONNREFUSED) {
                // Its retransmission is answered by its own port, or held until its time is over.
                tracing::debug!(%error, app = %knock.app, "an application cannot be told that the agent is not there");
            }
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
