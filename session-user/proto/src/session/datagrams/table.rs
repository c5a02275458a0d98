//! Which flows there are: opening, closing, idleness.

use bytes::Bytes;

use super::{DatagramInfo, FlowError, FlowEvent, FlowId, FlowState, FlowStats};
use crate::Time;
use crate::limits::{CONTROL_RECORD_BYTES_MAX, FLOW_GAPS_MAX};
use crate::session::event::Violation;
use crate::session::{Role, Session, Transport};
use crate::wire::{Frame, Target, VARINT_MAX, flow_feature};

impl Session {
    /// Opens a flow to `target`, at which the peer has a socket for it. Datagrams may be sent at once:
    /// the first ones carry the target, and no answer is waited for.
    pub fn open_flow(&mut self, now: Time, target: Target) -> Result<FlowId, FlowError> {
        self.open_flow_of(now, target, None)
    }

    /// The same for a socket of this end that is not connected, which `group` tells apart from all others that there
    /// have been in this session, at most [`VARINT_MAX`]: the peer has one socket for all flows of a group, as far as
    /// their targets are of one family, and what others than the targets send there comes with its source
    /// ([`super::DatagramInfo`]). A peer that knows no groups is not told.
    pub fn open_flow_of(
        &mut self,
        now: Time,
        target: Target,
        group: Option<u64>,
    ) -> Result<FlowId, FlowError> {
        self.now = now;
        if !self.is_open() {
            return Err(FlowError::NotOpen);
        }
        let bit = self.role.bit();
        let of = bit as usize;
        // One whose end the peer has not been told of counts there.
        let open = self.datagrams.open[of] + self.datagrams.ends_of[of];
        if open >= self.peer.max_flows {
            return Err(FlowError::TooMany);
        }
        let id = self.datagrams.opened * 2 + bit;
        self.datagrams.opened += 1;
        let group = group.filter(|_| self.peer_knows(flow_feature::GROUPS));
        self.insert_flow(now, id, target, group);
        Ok(id)
    }

    /// Whether the peer has announced a [`flow_feature`].
    pub(super) fn peer_knows(&self, feature: u64) -> bool {
        self.peer.flow_features & feature != 0
    }

    /// Whether datagrams of others than the target may go to `end` in a flow: it has opened it, for a group.
    pub(super) fn may_have_sources(&self, id: FlowId, end: Role) -> bool {
        let flow = self.datagrams.flows.get(&id);
        id & 1 == end.bit() && flow.is_some_and(|flow| flow.group.is_some())
    }

    fn insert_flow(&mut self, now: Time, id: FlowId, target: Target, group: Option<u64>) {
        let state = FlowState {
            target,
            group,
            known: id & 1 != self.role.bit(),
            used: now,
        };
        self.datagrams.flows.insert(id, state);
        self.datagrams.open[(id & 1) as usize] += 1;
        self.datagrams.stats.flows += 1;
        self.datagrams
            .idle_at
            .get_or_insert(now + self.config.flow_idle);
    }

    /// The application's end of a flow is closed, or the socket to its target. The peer is told over the
    /// active transport: call [`Session::prepare`] for it.
    pub fn close_flow(&mut self, id: FlowId) {
        self.end_flow(id, 0);
    }

    /// The target of a flow is not to be reached: `errno` says why, in Linux's generic numbering, such
    /// as 111 for a port that nobody listens at (ICMP port unreachable). The peer gets
    /// [`FlowEvent::FlowFailed`], and the flow is over: what its application sends next opens another.
    pub fn flow_error(&mut self, id: FlowId, errno: u64) {
        self.end_flow(id, errno.clamp(1, VARINT_MAX));
    }

    fn end_flow(&mut self, id: FlowId, errno: u64) {
        if self.remove_flow(id) {
            self.datagrams.ends.push_back((id, errno));
            self.datagrams.ends_of[(id & 1) as usize] += 1;
        }
    }

    fn remove_flow(&mut self, id: FlowId) -> bool {
        if self.datagrams.flows.remove(&id).is_none() {
            return false;
        }
        self.datagrams.open[(id & 1) as usize] -= 1;
        self.datagrams.stats.incomplete += self.datagrams.partials.forget_flow(id);
        if !self.datagrams.in_use() {
            self.datagrams.idle_at = None;
        }
        true
    }

    /// The flow that a datagram of the peer is for: opened now if it is new and may be. What comes from others than the
    /// target is no use of it (`in_use`): they would keep it open for as long as they like.
    pub(super) fn flow_of(
        &mut self,
        now: Time,
        id: FlowId,
        opening: Option<(&Target, Option<u64>)>,
        in_use: bool,
    ) -> Result<bool, Violation> {
        if id & 1 == self.role.bit() {
            self.check_own_flow(id)?;
            let Some(flow) = self.datagrams.flows.get_mut(&id) else {
                return Ok(false);
            };
            flow.known = true;
            flow.touch(now, in_use);
            return Ok(true);
        }
        if let Some(flow) = self.datagrams.flows.get_mut(&id) {
            flow.touch(now, in_use);
            return Ok(true);
        }
        let of = (id & 1) as usize;
        let open = self.datagrams.open[of] + self.datagrams.ends_of[of];
        let Some((target, group)) = opening.filter(|_| {
            // What comes late must not open a flow again that is over.
            open < self.config.max_flows && !self.datagrams.seen.contains(id >> 1)
        }) else {
            return Ok(false);
        };
        self.see_flow(id);
        self.insert_flow(now, id, target.clone(), group);
        let target = target.clone();
        let opened = FlowEvent::FlowOpened { id, target, group };
        self.datagrams.events.push_back(opened);
        Ok(true)
    }

    fn check_own_flow(&self, id: FlowId) -> Result<(), Violation> {
        if id >> 1 >= self.datagrams.opened {
            return Err(Violation::protocol(
                "a frame for a flow that was never opened",
            ));
        }
        Ok(())
    }

    /// Ids count without gaps, so there are no more of them than flows whose first datagrams are lost or
    /// under way; a peer that leaves others out loses the lowest.
    fn see_flow(&mut self, id: FlowId) {
        let seen = &mut self.datagrams.seen;
        seen.insert(id >> 1);
        if seen.gaps() > FLOW_GAPS_MAX {
            let lowest = seen.above().next().map_or(0, |r| r.start);
            seen.insert_range(0..lowest);
        }
    }

    pub(in crate::session) fn handle_flow_ok(&mut self, id: FlowId) -> Result<(), Violation> {
        if id & 1 != self.role.bit() {
            return Err(Violation::protocol("FLOW_OK for a flow of the other end"));
        }
        self.check_own_flow(id)?;
        if let Some(flow) = self.datagrams.flows.get_mut(&id) {
            flow.known = true;
        }
        Ok(())
    }

    pub(in crate::session) fn handle_flow_closed(
        &mut self,
        id: FlowId,
        errno: u64,
    ) -> Result<(), Violation> {
        if id & 1 == self.role.bit() {
            self.check_own_flow(id)?;
        } else {
            self.see_flow(id);
        }
        if self.remove_flow(id) {
            self.datagrams.events.push_back(match errno {
                0 => FlowEvent::FlowClosed { id },
                _ => FlowEvent::FlowFailed { id, errno },
            });
        }
        Ok(())
    }

    /// Seals the FLOW_CLOSED that wait. They are in space R: an end that never heard of one would keep
    /// the flow, and send into nothing.
    pub(in crate::session) fn flush_flow_ends(&mut self, now: Time) {
        while !self.datagrams.ends.is_empty() && self.is_open() && self.can_seal_frames() {
            self.rekey_if_due(now);
            let mut payload = Vec::new();
            while payload.len() < CONTROL_RECORD_BYTES_MAX
                && let Some((id, errno)) = self.datagrams.ends.pop_front()
            {
                self.datagrams.ends_of[(id & 1) as usize] -= 1;
                Frame::FlowClosed { id, errno }.encode(&mut payload);
            }
            self.seal_frames(&payload);
        }
    }

    /// When a flow may be over, or a part of a datagram has waited for too long.
    pub(in crate::session) fn datagram_deadline(&self) -> Option<Time> {
        let deadlines = [self.datagrams.idle_at, self.datagrams.partials.deadline()];
        deadlines.into_iter().flatten().min()
    }

    pub(in crate::session) fn check_datagrams(&mut self, now: Time) {
        self.datagrams.stats.incomplete += self.datagrams.partials.expire(now);
        if self.datagrams.idle_at.is_none_or(|at| at > now) {
            return;
        }
        let idle = self.config.flow_idle;
        let over: Vec<FlowId> = (self.datagrams.flows.iter())
            .filter(|(_, f)| now >= f.used + idle)
            .map(|(&id, _)| id)
            .collect();
        for id in over {
            self.end_flow(id, 0);
            let closed = FlowEvent::FlowClosed { id };
            self.datagrams.events.push_back(closed);
        }
        let oldest = self.datagrams.flows.values().map(|f| f.used).min();
        self.datagrams.idle_at = oldest.map(|used| used + idle);
    }

    /// The next event of flows and of the UDP transport, oldest first.
    #[must_use]
    pub fn poll_flow_event(&mut self) -> Option<FlowEvent> {
        self.datagrams.events.pop_front()
    }

    /// The next datagram that came. Its flow may have ended since, if it was not taken before
    /// [`Session::poll_flow_event`].
    #[must_use]
    pub fn poll_datagram(&mut self) -> Option<(FlowId, Bytes)> {
        let (id, data, _) = self.poll_datagram_info()?;
        Some((id, data))
    }

    /// The same, with what belongs to it.
    #[must_use]
    pub fn poll_datagram_info(&mut self) -> Option<(FlowId, Bytes, DatagramInfo)> {
        let next = self.datagrams.waiting.pop_front()?;
        self.datagrams.waiting_bytes -= next.1.len();
        Some(next)
    }

    /// Open flows.
    pub fn flows(&self) -> impl Iterator<Item = FlowId> + '_ {
        self.datagrams.flows.keys().copied()
    }

    /// Where a flow goes.
    pub fn flow_target(&self, id: FlowId) -> Option<&Target> {
        self.datagrams.flows.get(&id).map(|f| &f.target)
    }

    /// Flows that the peer lets this end have open at once.
    pub fn flows_max(&self) -> u64 {
        self.peer.max_flows
    }

    /// Counters of flows and of the UDP transport.
    pub fn flow_stats(&self) -> FlowStats {
        self.datagrams.stats
    }

    /// Bytes of datagrams that wait for the application's end, for their other parts, for the driver to
    /// send them over UDP, or for a transport. Apart from [`Session::memory_bytes`]; at most
    /// [`DATAGRAM_BYTES_WAITING_MAX`], [`PARTIAL_BYTES_MAX`] and [`UDP_QUEUE_BYTES`] together, and
    /// [`DATAGRAM_QUEUE_BYTES`] and one datagram more for each transport.
    ///
    /// [`DATAGRAM_BYTES_WAITING_MAX`]: crate::limits::DATAGRAM_BYTES_WAITING_MAX
    /// [`PARTIAL_BYTES_MAX`]: crate::limits::PARTIAL_BYTES_MAX
    /// [`UDP_QUEUE_BYTES`]: crate::limits::UDP_QUEUE_BYTES
    /// [`DATAGRAM_QUEUE_BYTES`]: crate::limits::DATAGRAM_QUEUE_BYTES
    pub fn flow_memory_bytes(&self) -> usize {
        let transports = self.transports.values().map(Transport::datagram_bytes);
        self.datagrams.bytes() + self.udp.queued_bytes() + transports.sum::<usize>()
    }
}
