//! Sockets that flows share: all flows of one socket of the peer's application that is not connected.
//!
//! So the application has one address towards all of its targets (RFC 4787, REQ-1), and hears whom it may speak to, also
//! those whom it has not spoken to (REQ-8): a server that answers from another port, or somebody who was told of it.
//! What comes from a target goes back on the target's flow, all else on the flow that the peer has used last, with its
//! source. Nothing is kept of such sources.
//!
//! Two targets may have one address: two names of one host. What comes from there would be either's, so each has another
//! socket there.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use session_proto::session::{DatagramInfo, FlowId};
use session_proto::wire::{Dscp, Target};
use tokio::net::UdpSocket;

use super::calls::{Came, Refusal, receive, refusals, send_now, want_service};
use super::watch::ErrorWatch;
use super::{BYTES_PER_TURN, DATAGRAM_ROOM, TAKEN_PER_TURN};
use crate::dial::{DialError, FlowRoute, FlowSocket, Protocol, Share, open_shared};
use crate::driver::ready::Source;
use crate::driver::{Driver, Name, Side};

/// A socket of the peer's, and the address of ours by which its targets know it: they may see the peer under different
/// ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::driver) struct GroupKey {
    group: u64,
    /// Unspecified, of the targets' family, where the kernel chooses.
    from: IpAddr,
    /// Of several, for targets that have the same address.
    number: u32,
}

#[cfg(test)]
impl GroupKey {
    /// The first socket of a group.
    pub fn of_test(group: u64) -> Self {
        Self {
            group,
            from: IpAddr::from([0, 0, 0, 0]),
            number: 0,
        }
    }
}

/// A socket towards the targets of several flows.
pub(super) struct Group {
    socket: Arc<UdpSocket>,
    source: Source<Name>,
    errors: ErrorWatch,
    /// Where its flows go.
    targets: BTreeMap<FlowId, SocketAddr>,
    /// The same by address. Those to one address have the same target.
    flows: BTreeSet<(SocketAddr, FlowId)>,
    /// The flow that the peer has used last.
    last: FlowId,
    _share: Share,
}

impl Group {
    fn new(opened: FlowSocket, source: Source<Name>) -> Self {
        let (socket, share) = opened.into_parts();
        want_service(&socket);
        let socket = Arc::new(socket);
        Self {
            errors: ErrorWatch::of(&socket),
            socket,
            source,
            targets: BTreeMap::new(),
            flows: BTreeSet::new(),
            last: 0,
            _share: share,
        }
    }

    pub fn source(&self) -> &Source<Name> {
        &self.source
    }

    /// Our address and port.
    pub fn local(&self) -> Option<SocketAddr> {
        self.socket.local_addr().ok()
    }

    fn insert(&mut self, id: FlowId, to: SocketAddr) {
        self.targets.insert(id, to);
        self.flows.insert((to, id));
        self.last = id;
    }

    /// The flow to an address; if there are several, the newest.
    fn flow_to(&self, addr: SocketAddr) -> Option<FlowId> {
        let all = self.flows.range((addr, FlowId::MIN)..=(addr, FlowId::MAX));
        all.map(|(_, id)| *id).next_back()
    }

    /// A flow is over.
    fn remove(&mut self, id: FlowId) {
        if let Some(to) = self.targets.remove(&id) {
            self.flows.remove(&(to, id));
        }
        if self.last == id
            && let Some((&newest, _)) = self.targets.last_key_value()
        {
            self.last = newest;
        }
    }

    /// Sends to the target of a flow. What turns up of earlier datagrams is for `told`.
    fn send(
        &mut self,
        id: FlowId,
        data: &[u8],
        dscp: Dscp,
        told: &mut Vec<Refusal>,
    ) -> io::Result<()> {
        let Some(&to) = self.targets.get(&id) else {
            return Ok(());
        };
        self.last = id;
        let sent = send_now(&self.socket, Some(to), data, dscp);
        match sent {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                // It may be that of an earlier datagram, to somebody else: then it is not said a second time.
                refusals(&self.socket, told);
                send_now(&self.socket, Some(to), data, dscp)
            }
            sent => sent,
        }
    }

    /// What turned up of earlier datagrams is for `told`, as much of it as is read at once. If there is none, the source is
    /// told of the next; whether there may be more.
    fn refused(&mut self, told: &mut Vec<Refusal>) -> bool {
        let mut cx = self.source.context();
        let any = (self.errors.poll_told(&self.socket, &mut cx)).is_ready();
        if any {
            refusals(&self.socket, told);
        }
        any
    }

    /// The next datagram that came, in `room`; none if there is none now: then the source is told of the next one. An
    /// error is of an earlier datagram: [`Group::refused`] knows of which.
    fn receive(&mut self, room: &mut [u8]) -> io::Result<Option<Came>> {
        let mut cx = self.source.context();
        loop {
            match receive(&self.socket, room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.socket.poll_recv_ready(&mut cx).is_pending() {
                        return Ok(None);
                    }
                }
                done => return done.map(Some),
            }
        }
    }
}

impl Driver {
    /// A flow of a group to `target` is there: its socket is opened if it is the first.
    pub(super) fn join_group(
        &mut self,
        id: FlowId,
        group: u64,
        route: &FlowRoute,
        target: &str,
    ) -> Result<GroupKey, DialError> {
        let key = self.socket_for(group, route, target);
        if let Some(known) = self.datagrams.groups.get_mut(&key) {
            if let Some(local) = known.local() {
                route.check(local)?;
            }
            if known.targets.is_empty() {
                self.datagrams.lingering.remove(key);
            }
            known.insert(id, route.to);
            return Ok(key);
        }
        let peer = match &self.side {
            Side::Responder(responder) => responder.caller.name.clone(),
            Side::Initiator(_) => String::new(),
        };
        let opened = self.with_room(|| open_shared(&peer, route))?;
        let mut fresh = Group::new(opened, self.ready.add(Name::Group(key)));
        fresh.insert(id, route.to);
        self.datagrams.groups.insert(key, fresh);
        Ok(key)
    }

    /// The first socket of a group that a flow to `target` can have: where its address has no other target's flow.
    fn socket_for(&self, group: u64, route: &FlowRoute, target: &str) -> GroupKey {
        let from = route.from;
        let nth = |number| GroupKey {
            group,
            from,
            number,
        };
        let taken = |key: &GroupKey| {
            let known = self.datagrams.groups.get(key);
            let flow = known.and_then(|group| group.flow_to(route.to));
            let flow = flow.and_then(|id| self.datagrams.far.get(&id));
            flow.is_some_and(|flow| flow.target() != target)
        };
        // No more than there are sockets.
        let free = (0..u32::MAX).map(nth).find(|key| !taken(key));
        free.unwrap_or(nth(0))
    }

    /// A flow of a group is over: its socket goes some time after the last one.
    pub(super) fn leave_group(&mut self, id: FlowId, key: GroupKey) {
        if let Some(group) = self.datagrams.groups.get_mut(&key) {
            group.remove(id);
            let empty = group.targets.is_empty();
            if empty && let Some(other) = self.datagrams.lingering.add(key, Instant::now()) {
                self.datagrams.groups.remove(&other);
            }
        }
    }

    /// A datagram of the peer goes to its target.
    pub(super) fn deliver_in_group(&mut self, id: FlowId, key: GroupKey, data: &[u8], dscp: Dscp) {
        let mut told = Vec::new();
        if let Some(group) = self.datagrams.groups.get_mut(&key) {
            let sent = group.send(id, data, dscp, &mut told);
            self.delivered_far(id, data.len(), sent);
        }
        self.tell_refusals(key, &told);
    }

    /// Something came to the socket of a group, or the news that nobody is where something was sent.
    pub(in crate::driver) fn group_ready(&mut self, key: GroupKey) {
        let mut scratch = std::mem::take(&mut self.datagrams.scratch);
        scratch.resize(DATAGRAM_ROOM, 0);
        let mut told = Vec::new();
        // Whoever is sent to may refuse without end: a batch in a turn.
        let group = self.datagrams.groups.get_mut(&key);
        let refused = group.is_some_and(|group| group.refused(&mut told));
        let (mut more, mut bytes) = (true, 0);
        for _ in 0..TAKEN_PER_TURN {
            if bytes >= BYTES_PER_TURN {
                break;
            }
            let Some(group) = self.datagrams.groups.get_mut(&key) else {
                break;
            };
            match group.receive(&mut scratch) {
                Ok(Some(came)) => {
                    bytes += came.bytes;
                    self.came_to_group(key, &came, &scratch[..came.bytes]);
                }
                Ok(None) => {
                    more = refused;
                    break;
                }
                Err(error) => tracing::debug!(%error, "a target of several"),
            }
        }
        self.datagrams.scratch = scratch;
        self.tell_refusals(key, &told);
        if let Some(group) = self.datagrams.groups.get(&key)
            && more
        {
            group.source.requeue();
        }
    }

    fn came_to_group(&mut self, key: GroupKey, came: &Came, data: &[u8]) {
        let Some(group) = self.datagrams.groups.get(&key) else {
            return;
        };
        let (id, source) = match group.flow_to(came.from) {
            Some(id) => (id, None),
            None if group.targets.is_empty() => {
                self.datagrams.counters.dropped += 1;
                return;
            }
            None => (group.last, Some(came.from)),
        };
        if source.is_some_and(|source| !self.may_be_heard(source)) {
            self.datagrams.counters.unheard += 1;
            return;
        }
        let dscp = came.dscp;
        self.send_from_far(id, data, &DatagramInfo { dscp, source });
    }

    /// An application hears those whom the rules let its unit speak to.
    fn may_be_heard(&self, source: SocketAddr) -> bool {
        let Side::Responder(responder) = &self.side else {
            return false;
        };
        let (peer, target) = (&responder.caller.name, Target::Addr(source));
        let (ip, port) = (source.ip(), source.port());
        (responder.allow)
            .check(peer, Protocol::Udp, &target, ip, port)
            .is_ok()
    }

    /// The flows whose targets are not to be reached are over.
    fn tell_refusals(&mut self, key: GroupKey, told: &[Refusal]) {
        for refusal in told {
            let group = self.datagrams.groups.get(&key);
            if let Some(id) = group.and_then(|group| group.flow_to(refusal.to)) {
                self.far_error(id, &io::Error::from_raw_os_error(refusal.errno));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::ready::ReadySet;

    fn group() -> Group {
        let route = FlowRoute {
            to: "127.0.0.1:9".parse().unwrap(),
            from: "127.0.0.1".parse().unwrap(),
            here: true,
        };
        let opened = open_shared("lorry", &route).unwrap();
        Group::new(
            opened,
            ReadySet::new().add(Name::Group(GroupKey::of_test(1))),
        )
    }

    /// Waits for what the group has, as the driver does.
    async fn receive(group: &mut Group, told: &mut Vec<Refusal>) -> Option<Came> {
        let mut room = [0; 100];
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while std::time::Instant::now() < deadline {
            group.refused(told);
            match group.receive(&mut room) {
                Ok(Some(came)) => return Some(came),
                _ if !told.is_empty() => return None,
                // A source's waker tells a driver, which there is none of here.
                _ => tokio::time::sleep(std::time::Duration::from_millis(2)).await,
            }
        }
        panic!("nothing came")
    }

    #[tokio::test]
    async fn a_refusal_concerns_the_target_that_refuses_alone() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (there, nobody) = (server.local_addr().unwrap(), gone.local_addr().unwrap());
        drop(gone);
        let mut group = group();
        group.insert(0, there);
        group.insert(2, nobody);
        let mut told = Vec::new();
        let dscp = Dscp::default();
        group.send(2, b"anybody?", dscp, &mut told).unwrap();
        // Whether the news waits already or comes later, the other target gets its datagram.
        group.send(0, b"hello", dscp, &mut told).unwrap();
        if told.is_empty() {
            assert!(receive(&mut group, &mut told).await.is_none());
        }
        let refused = Refusal {
            to: nobody,
            errno: libc::ECONNREFUSED,
        };
        assert_eq!(told, [refused]);
        let mut heard = [0; 10];
        let (n, from) = server.recv_from(&mut heard).await.unwrap();
        assert_eq!((&heard[..n], Some(from)), (&b"hello"[..], group.local()));
        server.send_to(b"back", from).await.unwrap();
        let came = receive(&mut group, &mut Vec::new()).await.unwrap();
        assert_eq!((came.bytes, came.from), (4, there));
    }

    #[tokio::test]
    async fn the_last_flow_that_is_left_carries_what_strangers_say() {
        let mut group = group();
        let targets = ["192.0.2.1:1", "192.0.2.2:1", "192.0.2.1:1"];
        for (id, to) in [0, 2, 4].into_iter().zip(targets) {
            group.insert(id, to.parse().unwrap());
        }
        assert_eq!((group.last, group.flows.len()), (4, 3));
        group.remove(0);
        assert_eq!((group.last, group.flows.len()), (4, 2));
        group.remove(4);
        assert_eq!((group.last, group.flows.len()), (2, 1));
        group.remove(2);
        assert!(group.targets.is_empty() && group.flows.is_empty());
    }

    #[tokio::test]
    async fn a_target_is_that_of_the_newest_flow_that_is_left() {
        let mut group = group();
        let to = "192.0.2.1:1".parse().unwrap();
        for id in [0, 4, 2] {
            group.insert(id, to);
        }
        for left in [4, 2, 0] {
            assert_eq!(group.flow_to(to), Some(left));
            group.remove(left);
        }
        assert_eq!(group.flow_to(to), None);
    }
}
