//! Where a datagram goes: over UDP where that is known to work, over TCP where it is not, over both
//! while it is tried.

use bytes::Bytes;

use super::{DatagramInfo, FlowError, FlowId};
use crate::Time;
use crate::limits::{DATAGRAM_BYTES_MAX, TAG_BYTES};
use crate::session::event::Handle;
use crate::session::udp::PathKey;
use crate::session::{Session, Transport};
use crate::wire::{DatagramHeader, Dscp, Fragment, Frame, flow_feature};

/// The ways that a datagram takes.
#[derive(Debug, Default)]
struct Ways {
    udp: Option<PathKey>,
    /// An address of the peer that is being validated.
    candidate: Option<PathKey>,
    tcp: [Option<Handle>; 2],
}

impl Ways {
    fn count(&self) -> usize {
        let udp = [self.udp, self.candidate];
        udp.iter().flatten().count() + self.tcp.iter().flatten().count()
    }
}

impl Session {
    /// Sends a datagram of a flow, once: nobody hears whether it arrives. Take what goes out with
    /// [`Session::poll_udp`], and with [`Session::prepare`] on the active transport.
    pub fn send_datagram(&mut self, now: Time, id: FlowId, data: &[u8]) -> Result<(), FlowError> {
        self.send_datagram_with(now, id, data, &DatagramInfo::default())
    }

    /// The same, with what belongs to it.
    pub fn send_datagram_with(
        &mut self,
        now: Time,
        id: FlowId,
        data: &[u8],
        info: &DatagramInfo,
    ) -> Result<(), FlowError> {
        self.now = now;
        if !self.is_open() {
            return Err(FlowError::NotOpen);
        }
        if data.len() > DATAGRAM_BYTES_MAX {
            return Err(FlowError::TooLarge);
        }
        let flow = self.datagrams.flows.get_mut(&id).ok_or(FlowError::Gone)?;
        flow.touch(now, info.source.is_none());
        let (target, group) = if flow.known {
            (None, None)
        } else {
            (Some(flow.target.clone()), flow.group)
        };
        self.datagrams.stats.sent += 1;
        let peer = self.role.other();
        if info.source.is_some() && !self.may_have_sources(id, peer) {
            // The peer would take it for the target's.
            self.datagrams.stats.unsent += 1;
            return Ok(());
        }
        let mut header = DatagramHeader {
            flow: id,
            target,
            dscp: if self.peer_knows(flow_feature::SERVICE) {
                info.dscp
            } else {
                Dscp::default()
            },
            group,
            source: info.source,
            ..DatagramHeader::default()
        };
        self.rekey_if_due(now);
        let spent = self.epochs.exhausted(self.config.rekey_records);
        let ways = if spent {
            Ways::default()
        } else {
            self.ways(now, &header, data.len())
        };
        let in_parts = ways.udp.is_some_and(|key| !self.fits(key, &header, data));
        if ways.count() > 1 || in_parts {
            header.number = Some(self.datagrams.numbered);
            self.datagrams.numbered += 1;
        }
        if !self.send_over(now, &ways, header, data) {
            self.datagrams.stats.unsent += 1;
        }
        Ok(())
    }

    fn ways(&mut self, now: Time, header: &DatagramHeader, bytes: usize) -> Ways {
        let mut ways = Ways::default();
        let path = self.path_for_datagram(now);
        ways.udp = path.map(|(key, _)| key);
        let mut sure = path.is_some_and(|(_, sure)| sure);
        if let Some(key) = self.candidate() {
            // The address in use may be one that the peer has left.
            if self.may_emit(key, header.bytes_max() + bytes) {
                ways.candidate = Some(key);
            } else {
                sure = false;
            }
        }
        if !sure {
            ways.tcp = self.datagram_transports();
        }
        ways
    }

    /// The active transport, and while that is silent the one beside it; while it is only in doubt, one
    /// on another path.
    fn datagram_transports(&self) -> [Option<Handle>; 2] {
        let room = |h: &Handle| {
            let found = self.transports.get(h);
            found.is_some_and(|t| t.can_carry() && t.has_datagram_room())
        };
        let hedge = self.hedge.filter(|h| Some(h.from) == self.active);
        let doubtful = self.active.filter(|h| self.is_in_doubt(*h));
        let beside = hedge.map(|h| h.to);
        let beside = beside.or_else(|| self.partner(doubtful?));
        let [active, beside] = [self.active, beside].map(|h| h.filter(room));
        [active, beside.filter(|b| Some(*b) != active)]
    }

    /// Whether UDP has failed since the active transport, which is `handle`, last answered: both may run
    /// over the same link.
    fn is_in_doubt(&self, handle: Handle) -> bool {
        self.udp.doubted.is_some_and(|at| {
            let transport = self.transports.get(&handle);
            let unheard = |t: &Transport| t.pulse.has_not_answered_since(at);
            self.active == Some(handle) && transport.is_some_and(unheard)
        })
    }

    fn fits(&self, key: PathKey, header: &DatagramHeader, data: &[u8]) -> bool {
        header.bytes_max() + data.len() <= self.packet_room(key)
    }

    fn send_over(&mut self, now: Time, ways: &Ways, header: DatagramHeader, data: &[u8]) -> bool {
        let mut sent = false;
        if let Some(key) = ways.udp {
            sent |= self.send_parts(now, key, header.clone(), data);
        }
        if let Some(key) = ways.candidate {
            sent |= self.send_whole(now, key, header.clone(), data);
        }
        self.datagrams.stats.sent_udp += u64::from(sent);
        let mut frame = Vec::new();
        if ways.tcp.iter().any(Option::is_some) {
            Frame::Datagram { header, data }.encode(&mut frame);
        }
        let frame = Bytes::from(frame);
        let fits = (frame.len() + TAG_BYTES) as u64 <= self.peer.max_record;
        let mut over_tcp = false;
        for handle in ways.tcp.into_iter().flatten().filter(|_| fits) {
            if let Some(transport) = self.transports.get_mut(&handle) {
                transport.push_datagram(frame.clone());
                over_tcp = true;
                self.ask_for_datagram(now, handle);
            }
        }
        self.datagrams.stats.sent_tcp += u64::from(over_tcp);
        sent | over_tcp
    }

    /// A datagram goes over `handle`, and nothing else that goes with it is ever acknowledged.
    fn ask_for_datagram(&mut self, now: Time, handle: Handle) {
        let Some(pulse) = self.transports.get(&handle).map(|t| &t.pulse) else {
            return;
        };
        if self.is_in_doubt(handle) {
            if pulse.may_be_asked() {
                let token = self.ask(now, handle);
                self.udp.question = Some((handle, token));
            }
        } else if pulse.is_unheard(now)
            && (self.active == Some(handle) || self.hedge.is_some_and(|h| h.to == handle))
        {
            self.ask(now, handle);
        }
    }

    fn send_whole(&mut self, now: Time, key: PathKey, header: DatagramHeader, data: &[u8]) -> bool {
        let bytes = header.bytes_max() + data.len();
        self.emit(now, key, &Frame::Datagram { header, data }, bytes)
    }

    /// Over one path, in as many packets as it takes. What is lost of one is lost of all.
    fn send_parts(
        &mut self,
        now: Time,
        key: PathKey,
        mut header: DatagramHeader,
        data: &[u8],
    ) -> bool {
        if self.fits(key, &header, data) {
            return self.send_whole(now, key, header, data);
        }
        let room = self.packet_room(key).saturating_sub(header.bytes_max());
        if room == 0 {
            return false;
        }
        let total = data.len();
        let mut all = true;
        for (index, part) in data.chunks(room).enumerate() {
            let offset = index * room;
            header.fragment = Some(Fragment { offset, total });
            all &= self.send_whole(now, key, header.clone(), part);
            self.datagrams.stats.fragments += 1;
        }
        self.want_larger_packets(now, key);
        all
    }

    /// What waits for a transport that is lost goes on over another.
    pub(in crate::session) fn move_datagrams(&mut self, lost: &mut Transport) {
        let Some(active) = self.active.and_then(|h| self.transports.get_mut(&h)) else {
            return;
        };
        for frame in lost.take_datagrams() {
            if active.has_datagram_room() {
                active.push_datagram(frame);
            } else {
                self.datagrams.stats.unsent += 1;
            }
        }
    }
}
