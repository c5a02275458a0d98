//! UDP sockets: one on each link where this end dials, the unit's own where it accepts.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use session_proto::session::UdpPath;

use super::Inbound;
use crate::driver::carrier::Path;
use crate::driver::links::{link_of, stands};
use crate::driver::ready::Source;
use crate::driver::{Driver, Name, Side};
use crate::glob;
use crate::link::{Link, LinkSnapshot};
use crate::transport::PacketSocket;

/// Sockets of one session at once; addresses of ours at which a peer may meet a session.
const LOCALS_MAX: usize = 16;
/// A link whose MTU is not known is taken for Ethernet.
const MTU_USUAL: usize = 1500;

/// What a [`UdpPath`] of the session is.
pub(super) struct Local {
    /// Its link; empty where none holds its address.
    pub link: String,
    pub ip: IpAddr,
    mtu: usize,
    /// The peer's addresses that it reaches; none at an acceptor.
    remotes: Vec<SocketAddr>,
    pub socket: Which,
}

impl Local {
    /// Whether it is as `want` has it.
    fn is(&self, want: &Wanted) -> bool {
        self.covers(want) && self.remotes.len() == want.remotes.len()
    }

    /// Whether it reaches all that `want` names.
    fn covers(&self, want: &Wanted) -> bool {
        (&self.link, self.ip, self.mtu) == (&want.link, want.ip, want.mtu)
            && want.remotes.iter().all(|to| self.remotes.contains(to))
    }
}

/// Whose socket it is.
pub(super) enum Which {
    /// The session's own.
    Own(PacketSocket, Source<Name>),
    /// The unit's, by its index; the session sends from [`Local::ip`].
    Shared(Arc<PacketSocket>, usize),
}

/// A socket that should be there.
struct Wanted {
    link: String,
    ip: IpAddr,
    mtu: usize,
    remotes: Vec<SocketAddr>,
}

impl Driver {
    /// Opens and closes UDP sockets as the links have it.
    pub(in crate::driver) fn tend_udp(&mut self) {
        match &self.side {
            Side::Initiator(initiator) if initiator.config.udp => self.tend_own_sockets(),
            Side::Initiator(_) => {}
            Side::Responder(_) => self.tend_shared_sockets(),
        }
    }

    fn tend_own_sockets(&mut self) {
        let links = self.side.links();
        let Side::Initiator(initiator) = &self.side else {
            return;
        };
        let config = &initiator.config;
        let wanted = wanted(&links, &config.policy.exclude, &config.remotes);
        let locals = &self.datagrams.locals;
        let gone: Vec<UdpPath> = (locals.iter())
            .filter(|(_, local)| !wanted.iter().any(|want| local.is(want)))
            .filter(|(_, local)| !self.serves_carrier(&links, local))
            .map(|(&path, _)| path)
            .collect();
        for path in gone {
            self.datagrams.locals.remove(&path);
            self.session.udp_path_removed(path);
        }
        for want in wanted {
            let have = |local: &Local| local.is(&want) || local.covers(&want);
            if self.datagrams.locals.values().any(have) {
                continue;
            }
            if self.datagrams.locals.len() >= LOCALS_MAX {
                break;
            }
            self.add_own_socket(want);
        }
    }

    /// Whether TCP goes on from the socket's address, though nothing new would be dialled from it: another address is
    /// preferred now, or the link settles.
    fn serves_carrier(&self, links: &LinkSnapshot, local: &Local) -> bool {
        let mtu = links.link(&local.link).map(mtu_of);
        let served = |path: &Path| {
            (&path.link, path.local.ip()) == (&local.link, local.ip)
                && local.remotes.contains(&path.remote)
                && stands(links, path, true)
        };
        mtu == Some(local.mtu) && self.carriers.values().any(|c| served(&c.path))
    }

    fn add_own_socket(&mut self, want: Wanted) {
        let socket = match PacketSocket::on_link(&want.link, want.ip) {
            Ok(socket) => socket,
            Err(error) => {
                let told = self.datagrams.unbound.contains(&want.link);
                if !told && self.datagrams.unbound.len() < LOCALS_MAX {
                    tracing::warn!(link = %want.link, %error, "no UDP socket on a link: datagrams go over TCP there");
                    self.datagrams.unbound.push(want.link);
                }
                return;
            }
        };
        let path = self.next_path();
        let source = self.ready.add(Name::Udp(path));
        let now = self.clock.now();
        self.session
            .udp_path_added(now, path, &want.remotes, want.mtu);
        let local = Local {
            link: want.link,
            ip: want.ip,
            mtu: want.mtu,
            remotes: want.remotes,
            socket: Which::Own(socket, source),
        };
        self.datagrams.locals.insert(path, local);
    }

    fn next_path(&mut self) -> UdpPath {
        let path = UdpPath(self.datagrams.made);
        self.datagrams.made += 1;
        path
    }

    /// Datagrams prefer the path that TCP has, or that is dialled because that one is lost or silent.
    pub(in crate::driver) fn follow_udp(&mut self) {
        let Side::Initiator(initiator) = &self.side else {
            return;
        };
        let active = self.session.active();
        let works = |h| !self.session.is_silent(h);
        let beside = || {
            let mut others = self.carriers.keys().copied();
            others.find(|&h| Some(h) != active && self.session.is_up(h) && works(h))
        };
        let carrying = active.filter(|&h| works(h)).or_else(beside);
        let carrier = carrying.and_then(|h| self.carriers.get(&h));
        let (link, ip) = match (carrier, &initiator.attempt) {
            (Some(carrier), _) => (&carrier.path.link, carrier.path.local.ip()),
            (None, Some(attempt)) => (&attempt.path.link, attempt.path.source),
            (None, None) => return,
        };
        let same = |local: &Local| local.link == *link && local.ip == ip;
        // Another address of the link does as well, if there is no socket at that one.
        let near = |local: &Local| local.link == *link && local.ip.is_ipv4() == ip.is_ipv4();
        let locals = &self.datagrams.locals;
        let found = locals.iter().find(|(_, local)| same(local));
        let found = found.or_else(|| locals.iter().find(|(_, local)| near(local)));
        if let Some((&path, _)) = found {
            self.session.prefer_udp(self.clock.now(), path);
        }
    }

    /// Addresses of ours that are gone are no paths any more. One is always known, so that the session knows the names
    /// under which packets come.
    fn tend_shared_sockets(&mut self) {
        let links = self.side.links();
        let lost = |local: &Local| {
            let link = links.link(&local.link);
            !local.link.is_empty() && !link.is_some_and(|l| l.holds(local.ip))
        };
        let locals = &self.datagrams.locals;
        let gone: Vec<UdpPath> = (locals.iter())
            .filter(|(_, local)| lost(local))
            .map(|(&path, _)| path)
            .collect();
        for path in gone {
            self.datagrams.locals.remove(&path);
            self.session.udp_path_removed(path);
        }
        let first = self.carriers.values().map(|c| c.path.local).next();
        if self.datagrams.locals.is_empty()
            && let Some(local) = first
            && let Some(index) = self.socket_at(local)
        {
            self.add_shared(index, local.ip());
        }
    }

    /// An address of ours that cannot be sent from is no path, until something comes there again.
    pub(super) fn drop_shared(&mut self, path: UdpPath) {
        let local = self.datagrams.locals.get(&path);
        if local.is_some_and(|local| matches!(local.socket, Which::Shared(..))) {
            self.datagrams.locals.remove(&path);
            self.session.udp_path_removed(path);
            self.tend_shared_sockets();
        }
    }

    /// The unit's UDP socket that is beside the listener of a transport.
    fn socket_at(&self, local: SocketAddr) -> Option<usize> {
        let listening = self.datagrams.listening.as_ref()?;
        let fits = |at: SocketAddr| {
            let here = at.ip() == local.ip() || at.ip().is_unspecified();
            at.port() == local.port() && here && at.is_ipv4() == local.is_ipv4()
        };
        let mut sockets = listening.sockets.iter();
        let beside = sockets.position(|socket| fits(socket.local_addr()));
        // Another one does as well: what matters is that the session has a path.
        beside.or((!listening.sockets.is_empty()).then_some(0))
    }

    /// The session's path on which `inbound` came.
    pub(super) fn path_of(&mut self, inbound: &Inbound) -> Option<UdpPath> {
        let same = |local: &Local| {
            matches!(local.socket, Which::Shared(_, index) if index == inbound.socket)
                && local.ip == inbound.to
        };
        let mut locals = self.datagrams.locals.iter();
        if let Some((&path, _)) = locals.find(|(_, local)| same(local)) {
            return Some(path);
        }
        if self.datagrams.locals.len() >= LOCALS_MAX {
            let used = self.session.udp_status().map(|status| status.path);
            let mut others = self.datagrams.locals.keys().copied();
            let oldest = others.find(|path| Some(*path) != used)?;
            self.datagrams.locals.remove(&oldest);
            self.session.udp_path_removed(oldest);
        }
        self.add_shared(inbound.socket, inbound.to)
    }

    fn add_shared(&mut self, index: usize, ip: IpAddr) -> Option<UdpPath> {
        let listening = self.datagrams.listening.as_ref()?;
        let socket = Arc::clone(listening.sockets.get(index)?);
        let links = self.side.links();
        let link = link_of(&links, ip);
        let mtu = links.link(&link).map_or(MTU_USUAL, mtu_of);
        let path = self.next_path();
        let local = Local {
            link,
            ip,
            mtu,
            remotes: Vec::new(),
            socket: Which::Shared(socket, index),
        };
        self.datagrams.locals.insert(path, local);
        let now = self.clock.now();
        self.session.udp_path_added(now, path, &[], mtu);
        Some(path)
    }

    /// The name of the link of a path of the session.
    pub(super) fn link_of_path(&self, path: UdpPath) -> &str {
        let local = self.datagrams.locals.get(&path);
        local.map_or("", |local| local.link.as_str())
    }

    /// Whoever takes packets in is to know under which names they come for this session.
    pub(super) fn tell_connections(&mut self) {
        if self.datagrams.listening.is_some() {
            let ids = self.session.connection_ids().collect();
            self.common.tokens.set_connections(self.session.id(), ids);
        }
    }
}

fn mtu_of(link: &Link) -> usize {
    link.mtu as usize
}

/// A socket for each address from which a link that may be used reaches any of the peer's.
fn wanted(links: &LinkSnapshot, exclude: &[String], remotes: &[SocketAddr]) -> Vec<Wanted> {
    let mut out: Vec<Wanted> = Vec::new();
    let excluded = |link: &Link| exclude.iter().any(|p| glob::matches(p, &link.name));
    for link in links.links.iter().filter(|link| !excluded(link)) {
        for &remote in remotes {
            let Ok(ip) = link.usable_for(remote.ip()) else {
                continue;
            };
            match out.iter_mut().find(|w| w.link == link.name && w.ip == ip) {
                Some(known) => known.remotes.push(remote),
                None => out.push(Wanted {
                    link: link.name.clone(),
                    ip,
                    mtu: mtu_of(link),
                    remotes: vec![remote],
                }),
            }
        }
    }
    out
}
