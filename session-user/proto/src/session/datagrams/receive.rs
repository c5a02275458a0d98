//! What becomes of a datagram that came, over whatever transport.

use bytes::Bytes;

use super::partial::Joined;
use super::{DatagramInfo, FlowId};
use crate::Time;
use crate::limits::{DATAGRAM_BYTES_WAITING_MAX, DATAGRAMS_WAITING_MAX};
use crate::session::Session;
use crate::session::event::Violation;
use crate::wire::DatagramHeader;

impl Session {
    /// Takes in a DATAGRAM frame; true if its sender is to hear FLOW_OK.
    pub(in crate::session) fn handle_datagram(
        &mut self,
        now: Time,
        header: &DatagramHeader,
        data: Bytes,
    ) -> Result<bool, Violation> {
        let id = header.flow;
        let opening = header.target.as_ref().map(|to| (to, header.group));
        if !self.flow_of(now, id, opening, header.source.is_none())? {
            self.datagrams.stats.stray += 1;
            return Ok(false);
        }
        if header.source.is_some() && !self.may_have_sources(id, self.role) {
            return Err(Violation::protocol(
                "a source in a flow that has no group, or from its opener",
            ));
        }
        let named = header.target.is_some() && id & 1 != self.role.bit();
        let info = DatagramInfo {
            dscp: header.dscp,
            source: header.source,
        };
        let Some(number) = header.number else {
            self.deliver(id, data, info);
            return Ok(named);
        };
        if !self.datagrams.received.is_fresh(number) {
            // The last part of a datagram that was whole counts as well.
            self.datagrams.stats.duplicates += 1;
            return Ok(named);
        }
        let whole = match header.fragment {
            None => Some(data),
            Some(part) => {
                let (joined, lost) = self.datagrams.partials.join(now, id, number, part, &data);
                self.datagrams.stats.incomplete += lost;
                match joined {
                    Joined::Waits => None,
                    Joined::Whole(whole) => Some(whole),
                }
            }
        };
        if let Some(whole) = whole {
            self.datagrams.received.insert(number);
            self.datagrams.partials.forget_number(number);
            self.deliver(id, whole, info);
        }
        Ok(named)
    }

    fn deliver(&mut self, id: FlowId, data: Bytes, info: DatagramInfo) {
        let datagrams = &mut self.datagrams;
        datagrams.stats.received += 1;
        datagrams.waiting_bytes += data.len();
        datagrams.waiting.push_back((id, data, info));
        // Nobody wants the oldest of a conversation that goes on.
        while datagrams.waiting.len() > DATAGRAMS_WAITING_MAX
            || datagrams.waiting_bytes > DATAGRAM_BYTES_WAITING_MAX
        {
            let Some((_, old, _)) = datagrams.waiting.pop_front() else {
                break;
            };
            datagrams.waiting_bytes -= old.len();
            datagrams.stats.overflowed += 1;
        }
    }
}
