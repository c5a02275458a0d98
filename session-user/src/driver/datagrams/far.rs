//! The end of the targets: a connected UDP socket for each flow of the peer, but for those that share one (`groups`).

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;

use session_proto::session::{DatagramInfo, FlowId};
use session_proto::wire::{Dscp, Target};
use tokio::net::UdpSocket;

use super::calls::{Came, receive, send_now, want_service};
use super::groups::{Group, GroupKey};
use super::waiting::Queue;
use super::watch::ErrorWatch;
use super::{BYTES_PER_TURN, DATAGRAM_ROOM, FlowReport, TAKEN_PER_TURN};
use crate::dial::{
    AllowList, Caller, DialError, FlowOpened, FlowSocket, Share, open_flow, resolve_flow,
};
use crate::driver::ready::Source;
use crate::driver::{ChoreId, Driver, Internal, Name, Side};

/// A flow that the peer opened.
pub(super) struct FarFlow {
    target: String,
    end: End,
    tx: (u64, u64),
    rx: (u64, u64),
}

enum End {
    /// The target's name is being resolved.
    Resolving {
        name: Target,
        task: ChoreId,
        queue: Queue,
        group: Option<u64>,
    },
    Open(Open),
    /// It shares a socket.
    Grouped(GroupKey),
}

/// A socket that is connected with the target.
struct Open {
    socket: Arc<UdpSocket>,
    source: Source<Name>,
    errors: ErrorWatch,
    _share: Share,
}

impl Open {
    fn new(opened: FlowSocket, source: Source<Name>) -> Self {
        let (socket, share) = opened.into_parts();
        want_service(&socket);
        let socket = Arc::new(socket);
        Self {
            errors: ErrorWatch::of(&socket),
            socket,
            source,
            _share: share,
        }
    }

    /// The next datagram of the target, in `room`; none if there is none now: then the source is told of the next one,
    /// and of an error.
    fn receive(&mut self, room: &mut [u8]) -> io::Result<Option<Came>> {
        let mut cx = self.source.context();
        if let Poll::Ready(error) = self.errors.poll(&self.socket, &mut cx) {
            return Err(error);
        }
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

impl FarFlow {
    /// Where it goes, as the peer has named it.
    pub fn target(&self) -> &str {
        &self.target
    }

    pub fn source(&self) -> Option<&Source<Name>> {
        match &self.end {
            End::Resolving { .. } | End::Grouped(_) => None,
            End::Open(open) => Some(&open.source),
        }
    }

    pub fn report(&self, id: FlowId, groups: &BTreeMap<GroupKey, Group>) -> FlowReport {
        let local = match &self.end {
            End::Resolving { .. } => None,
            End::Open(open) => open.socket.local_addr().ok(),
            End::Grouped(key) => groups.get(key).and_then(Group::local),
        };
        FlowReport {
            id,
            target: self.target.clone(),
            local: local.map(|addr| addr.to_string()).unwrap_or_default(),
            tx: self.tx,
            rx: self.rx,
        }
    }
}

impl Driver {
    /// The peer opened a flow.
    pub(super) fn flow_opened(&mut self, id: FlowId, target: Target, group: Option<u64>) {
        let Side::Responder(responder) = &mut self.side else {
            return self.far_unwanted(id, &target);
        };
        let callers = responder.for_whom();
        if let Target::Addr(addr) = target {
            let opened = self.open_far(id, &callers, &target, &[addr], group);
            return self.begin_far(id, target.to_string(), opened);
        }
        let (caller, allow) = callers;
        let timeout = responder.dial_timeout;
        let name = target.clone();
        let task = self.begin(async move {
            let addresses = resolve_flow(&caller.name, &name, &allow, timeout).await;
            Some(Internal::Flow { id, addresses })
        });
        let resolving = End::Resolving {
            name: target.clone(),
            task,
            queue: Queue::default(),
            group,
        };
        self.insert_far(id, target.to_string(), resolving);
    }

    /// What a flow of `caller` has towards `target`, whose addresses are known.
    fn open_far(
        &mut self,
        id: FlowId,
        (caller, allow): &(Arc<Caller>, Arc<AllowList>),
        target: &Target,
        addresses: &[SocketAddr],
        group: Option<u64>,
    ) -> Result<End, DialError> {
        let links = self.side.links();
        let is_own = |ip| links.links.iter().any(|link| link.holds(ip));
        let shared = group.is_some();
        let opened =
            self.with_room(|| open_flow(caller, is_own, target, allow, addresses, shared))?;
        self.end_of(id, opened, group, &target.to_string())
    }

    fn far_unwanted(&mut self, id: FlowId, target: &Target) {
        if let Some(untold) = self.tell_of_end("any", libc::EACCES) {
            let peer = &self.peer.name;
            tracing::warn!(%peer, %target, untold, "this unit dials for nobody: the peer's flow is refused");
        }
        let errno = libc::EACCES.unsigned_abs();
        self.session.flow_error(id, errno.into());
    }

    fn insert_far(&mut self, id: FlowId, target: String, end: End) {
        let flow = FarFlow {
            target,
            end,
            tx: (0, 0),
            rx: (0, 0),
        };
        self.datagrams.far.insert(id, flow);
    }

    fn begin_far(&mut self, id: FlowId, target: String, opened: Result<End, DialError>) {
        match opened {
            Ok(end) => self.insert_far(id, target, end),
            Err(error) => self.far_refused(id, &target, &error),
        }
    }

    fn end_of(
        &mut self,
        id: FlowId,
        opened: FlowOpened,
        group: Option<u64>,
        target: &str,
    ) -> Result<End, DialError> {
        match opened {
            FlowOpened::Own(socket) => {
                let source = self.ready.add(Name::Flow(id));
                Ok(End::Open(Open::new(socket, source)))
            }
            FlowOpened::Shared(route) => {
                let group = group.unwrap_or_default();
                let joined = self.join_group(id, group, &route, target);
                joined.map(End::Grouped)
            }
        }
    }

    fn far_refused(&mut self, id: FlowId, target: &str, error: &DialError) {
        if let Some(untold) = self.tell_of_end(target, error.errno()) {
            let peer = &self.peer.name;
            if matches!(error, DialError::Denied(_)) {
                tracing::warn!(flow = id, untold, "{error}");
            } else {
                tracing::info!(%peer, flow = id, untold, %error, "a target has no flow");
            }
        }
        self.far_failed(id, error.errno());
    }

    /// The flow ends with its target's error.
    fn far_failed(&mut self, id: FlowId, errno: i32) {
        self.drop_far(id);
        self.datagrams.counters.failed += 1;
        self.session.flow_error(id, errno.unsigned_abs().into());
    }

    /// The name of a flow's target is resolved, or not.
    pub(in crate::driver) fn far_resolved(
        &mut self,
        id: FlowId,
        addresses: Result<Vec<SocketAddr>, DialError>,
    ) {
        let (Some(flow), Side::Responder(responder)) = (self.datagrams.far.get(&id), &self.side)
        else {
            return;
        };
        let End::Resolving { name, group, .. } = &flow.end else {
            return;
        };
        let (name, group, callers) = (name.clone(), *group, responder.for_whom());
        let opened =
            addresses.and_then(|addresses| self.open_far(id, &callers, &name, &addresses, group));
        let end = match opened {
            Ok(end) => end,
            Err(error) => return self.far_refused(id, &name.to_string(), &error),
        };
        let Some(flow) = self.datagrams.far.get_mut(&id) else {
            return;
        };
        let End::Resolving { queue, .. } = std::mem::replace(&mut flow.end, end) else {
            return;
        };
        let (waiting, closed) = self.datagrams.waiting.release(queue);
        for (data, dscp) in waiting {
            self.deliver_far(id, &data, dscp);
        }
        if closed {
            self.drop_far(id);
        }
    }

    /// A datagram of the peer goes to its target.
    pub(super) fn deliver_far(&mut self, id: FlowId, data: &[u8], dscp: Dscp) {
        let Some(flow) = self.datagrams.far.get_mut(&id) else {
            self.datagrams.counters.dropped += 1;
            return;
        };
        let sent = match &mut flow.end {
            End::Open(open) => send_now(&open.socket, None, data, dscp),
            End::Grouped(key) => {
                let key = *key;
                return self.deliver_in_group(id, key, data, dscp);
            }
            End::Resolving { queue, .. } => {
                if !self.datagrams.waiting.push(queue, data, dscp) {
                    self.datagrams.counters.dropped += 1;
                }
                return;
            }
        };
        self.delivered_far(id, data.len(), sent);
    }

    /// What became of a datagram that was sent to its target.
    pub(super) fn delivered_far(&mut self, id: FlowId, bytes: usize, sent: io::Result<()>) {
        match sent {
            Ok(()) => {
                if let Some(flow) = self.datagrams.far.get_mut(&id) {
                    flow.rx = (flow.rx.0 + 1, flow.rx.1 + bytes as u64);
                }
            }
            Err(error) => {
                self.datagrams.counters.dropped += 1;
                self.far_error(id, &error);
            }
        }
    }

    /// A datagram that came goes to the peer.
    pub(super) fn send_from_far(&mut self, id: FlowId, data: &[u8], info: &DatagramInfo) {
        if let Some(flow) = self.datagrams.far.get_mut(&id) {
            flow.tx = (flow.tx.0 + 1, flow.tx.1 + data.len() as u64);
        }
        if let Err(error) = self.send_datagram(id, data, info) {
            tracing::debug!(flow = id, %error, "a datagram is dropped");
            self.datagrams.counters.dropped += 1;
        }
    }

    /// What the kernel said of a target's socket: of this datagram, or by ICMP of an earlier one.
    pub(super) fn far_error(&mut self, id: FlowId, error: &io::Error) {
        let Some(errno) = error.raw_os_error().filter(|errno| is_final(*errno)) else {
            tracing::debug!(flow = id, %error, "a datagram is dropped");
            return;
        };
        let flow = self.datagrams.far.get(&id);
        if let Some(target) = flow.map(|flow| flow.target.clone())
            && let Some(untold) = self.tell_of_end(&target, errno)
        {
            let peer = &self.peer.name;
            tracing::info!(%peer, flow = id, %target, untold, %error, "a flow has failed");
        }
        self.far_failed(id, errno);
    }

    /// Something came from a target, or the news that nobody is there.
    pub(in crate::driver) fn far_ready(&mut self, id: FlowId) {
        let mut scratch = std::mem::take(&mut self.datagrams.scratch);
        scratch.resize(DATAGRAM_ROOM, 0);
        let (mut more, mut bytes) = (true, 0);
        for _ in 0..TAKEN_PER_TURN {
            if bytes >= BYTES_PER_TURN {
                break;
            }
            let Some(flow) = self.datagrams.far.get_mut(&id) else {
                break;
            };
            let End::Open(open) = &mut flow.end else {
                break;
            };
            match open.receive(&mut scratch) {
                Ok(Some(came)) => {
                    bytes += came.bytes;
                    let info = DatagramInfo {
                        dscp: came.dscp,
                        source: None,
                    };
                    self.send_from_far(id, &scratch[..came.bytes], &info);
                }
                Ok(None) => {
                    more = false;
                    break;
                }
                Err(error) => self.far_error(id, &error),
            }
        }
        self.datagrams.scratch = scratch;
        if let Some(flow) = self.datagrams.far.get(&id)
            && let Some(source) = flow.source()
            && more
        {
            source.requeue();
        }
    }

    /// The peer closed the flow, or it was idle for too long. What waits for its target's name still goes there.
    pub(super) fn far_over(&mut self, id: FlowId) {
        let Some(flow) = self.datagrams.far.get_mut(&id) else {
            return;
        };
        if let End::Resolving { queue, .. } = &mut flow.end
            && self.datagrams.waiting.close(queue)
        {
            return;
        }
        self.drop_far(id);
    }

    fn drop_far(&mut self, id: FlowId) {
        let flow = self.datagrams.far.remove(&id);
        match flow.map(|flow| flow.end) {
            Some(End::Resolving { task, queue, .. }) => {
                self.chores.give_up(task);
                self.datagrams.waiting.release(queue);
            }
            Some(End::Grouped(key)) => self.leave_group(id, key),
            Some(End::Open(_)) | None => {}
        }
    }
}

/// Whether an error says that the target is not to be reached, as an application with a connected socket would hear
/// it; others are of one datagram.
fn is_final(errno: i32) -> bool {
    matches!(
        errno,
        libc::ECONNREFUSED
            | libc::EHOSTUNREACH
            | libc::ENETUNREACH
            | libc::ENETDOWN
            | libc::EHOSTDOWN
            | libc::ENOPROTOOPT
            | libc::EPROTO
            | libc::EACCES
    )
}
