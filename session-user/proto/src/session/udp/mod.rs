//! The UDP transport: packets of space D over any of several paths.
//!
//! The driver has one socket for each link, and names it ([`UdpPath`]). The initiator sends on the path
//! that its driver prefers; the responder answers to the address that it has validated last. Nothing is
//! sent while no flow is open.
//!
//! `transmit` seals packets, `receive` opens them, `migrate` follows the peer's address, `asking` finds
//! out whether a path answers, `mtu` how large its packets may be, `ids` how they are named.

mod asking;
mod ids;
mod migrate;
mod mtu;
mod path;
mod receive;
mod transmit;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

use bytes::Bytes;

use super::{Handle, Role, Session};
use crate::Time;
use crate::limits::{DATAGRAM_BYTES_MAX, UDP_MIN_BYTES, UDP_PATHS_MAX};
use crate::seal::{Challenges, Epoch, RecordKey, Secret};
use crate::session::window::Window;
use crate::wire::ConnectionId;
use ids::Ids;
use path::{Path, Standing};
pub use receive::PacketFault;

/// One of the driver's UDP sockets, by a number of the driver's own: one socket for each link. A socket
/// that is bound anew is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UdpPath(pub u64);

/// A packet to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpTransmit {
    /// From which socket.
    pub path: UdpPath,
    /// To which address.
    pub to: SocketAddr,
    /// The UDP payload. It must not be fragmented on its way (`IP_PMTUDISC_PROBE`).
    pub packet: Bytes,
}

/// What is known of the path that datagrams go over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpStatus {
    /// The socket.
    pub path: UdpPath,
    /// The peer's address.
    pub remote: SocketAddr,
    /// Whether it answers; otherwise datagrams go over TCP, or over both.
    pub usable: bool,
    /// Largest UDP payload that is known to pass, in bytes; what is assumed while none is.
    pub mtu: usize,
    /// The smoothed round-trip time, once it is known.
    pub rtt: Option<std::time::Duration>,
}

/// A socket and an address of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PathKey {
    pub local: UdpPath,
    pub remote: SocketAddr,
}

#[derive(Debug)]
struct Local {
    /// Addresses of the peer, best first; none at a responder.
    remotes: Vec<SocketAddr>,
    link_mtu: usize,
}

/// A key of space D of the peer's, kept for packets to come.
#[derive(Debug)]
struct OpenKey {
    epoch: Epoch,
    key: RecordKey,
    /// Its epoch has been retired: it goes then.
    until: Option<Time>,
}

/// All that a session keeps of the UDP transport.
#[derive(Debug)]
pub(super) struct Udp {
    locals: BTreeMap<UdpPath, Local>,
    paths: BTreeMap<PathKey, Path>,
    /// Initiator: where the driver wants datagrams to go.
    preferred: Option<UdpPath>,
    /// Responder: the address that has proven to be the peer's.
    current: Option<PathKey>,
    ids: Ids,
    next_number: u64,
    received: Window,
    /// One past the highest number of a packet that could move the peer's address.
    moved: u64,
    seal_key: Option<(Epoch, RecordKey)>,
    open_keys: Vec<OpenKey>,
    out: VecDeque<UdpTransmit>,
    out_bytes: usize,
    /// Some path has frames that wait for a packet.
    waits: bool,
    pings: u64,
    /// Since when a path that had answered does not: the session's transports may run over what failed.
    pub doubted: Option<Time>,
    /// The question that the active transport was asked for that.
    pub question: Option<(Handle, u64)>,
    challenges: Challenges,
    /// What the driver was last told of a path.
    told: Option<(UdpPath, bool)>,
}

impl Udp {
    pub fn new(seed: Secret) -> Self {
        Self {
            locals: BTreeMap::new(),
            paths: BTreeMap::new(),
            preferred: None,
            current: None,
            ids: Ids::default(),
            next_number: 0,
            received: Window::default(),
            moved: 0,
            seal_key: None,
            open_keys: Vec::new(),
            out: VecDeque::new(),
            out_bytes: 0,
            waits: false,
            pings: 0,
            doubted: None,
            question: None,
            challenges: Challenges::new(seed),
            told: None,
        }
    }

    /// Bytes of packets that wait for the driver.
    pub fn queued_bytes(&self) -> usize {
        self.out_bytes
    }

    /// Paths on which nothing was tried yet go behind those that answer, and blocked ones last: the
    /// one among them that may be tried again first.
    fn best_of(&self, local: UdpPath) -> Option<PathKey> {
        let remotes = &self.locals.get(&local)?.remotes;
        let rank = |key: &PathKey| match self.paths.get(key).map(|p| p.standing) {
            Some(Standing::Usable | Standing::Tried) => (0, Time::ZERO),
            Some(Standing::Blocked { until }) => (2, until),
            Some(Standing::Idle) | None => (1, Time::ZERO),
        };
        let keys = remotes.iter().map(|&remote| PathKey { local, remote });
        keys.filter(|k| self.paths.contains_key(k)).min_by_key(rank)
    }
}

/// What a link with `mtu` leaves for UDP's payload to `remote`.
fn payload_of(mtu: usize, remote: SocketAddr) -> usize {
    let headers = if remote.is_ipv4() { 28 } else { 48 };
    mtu.saturating_sub(headers).min(DATAGRAM_BYTES_MAX)
}

impl Session {
    /// The driver has a UDP socket on a link whose MTU is `link_mtu` bytes. An initiator names the
    /// peer's addresses, best first; a responder none: it hears them from the peer.
    pub fn udp_path_added(
        &mut self,
        now: Time,
        path: UdpPath,
        remotes: &[SocketAddr],
        link_mtu: usize,
    ) {
        self.now = now;
        if self.udp.locals.len() >= UDP_PATHS_MAX {
            return;
        }
        let remotes = match self.role {
            Role::Initiator => remotes.to_vec(),
            Role::Responder => Vec::new(),
        };
        for &remote in &remotes {
            let link = payload_of(link_mtu, remote);
            // A link that carries next to nothing is left to TCP.
            if link >= UDP_MIN_BYTES {
                let key = PathKey {
                    local: path,
                    remote,
                };
                self.udp.paths.insert(key, Path::new(link, true));
            }
        }
        self.udp.locals.insert(path, Local { remotes, link_mtu });
        self.recognise_ids();
        self.wake_udp(now);
    }

    /// The socket is closed, or its link gone.
    pub fn udp_path_removed(&mut self, path: UdpPath) {
        self.udp.locals.remove(&path);
        self.udp.paths.retain(|key, _| key.local != path);
        self.udp.preferred.take_if(|p| *p == path);
        self.udp.current.take_if(|key| key.local == path);
        self.udp.out.retain(|t| t.path != path);
        self.udp.out_bytes = self.udp.out.iter().map(|t| t.packet.len()).sum();
    }

    /// Initiator: datagrams go out on `path` from now on, the next one at once; until the peer has
    /// answered there they go over the active transport as well.
    pub fn prefer_udp(&mut self, now: Time, path: UdpPath) {
        self.now = now;
        let known = self.udp.locals.contains_key(&path);
        if self.role == Role::Responder || !known || self.udp.preferred == Some(path) {
            return;
        }
        self.udp.preferred = Some(path);
        for (key, state) in &mut self.udp.paths {
            if key.local == path {
                state.begin_again();
            }
        }
        self.wake_udp(now);
    }

    /// Where datagrams go over UDP, if they do.
    pub(super) fn udp_path(&self) -> Option<PathKey> {
        match self.role {
            Role::Initiator => self.udp.best_of(self.udp.preferred?),
            Role::Responder => self.udp.current,
        }
    }

    /// The path that datagrams go over, and how it does.
    pub fn udp_status(&self) -> Option<UdpStatus> {
        let key = self.udp_path()?;
        let path = self.udp.paths.get(&key)?;
        Some(UdpStatus {
            path: key.local,
            remote: key.remote,
            usable: path.standing == Standing::Usable,
            mtu: path.mtu.current(),
            rtt: path.rtt(),
        })
    }

    /// The names under which the peer's packets may come: a driver that serves several sessions on one
    /// socket finds this one by them ([`crate::wire::PacketHeader::parse`]).
    pub fn connection_ids(&self) -> impl Iterator<Item = ConnectionId> + '_ {
        self.udp.ids.known()
    }
}
