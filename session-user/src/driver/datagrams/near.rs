//! The end of the applications that open flows.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use session_proto::session::{DatagramInfo, FlowError, FlowId};
use session_proto::wire::Dscp;

use super::silence::{Place, Silence, is_brief};
use super::{BYTES_PER_TURN, FlowReport, TAKEN_PER_TURN};
use crate::driver::{Driver, Side};
use crate::requests::{AppFlow, FlowInput};

/// The part of the peer's limit on flows that is left free: what goes over UDP may come before the news, by TCP, that
/// another flow has made room for it.
const ROOM_PART: u64 = 16;

/// Flows whose applications are here.
#[derive(Default)]
pub(super) struct Near {
    flows: BTreeMap<FlowId, NearFlow>,
    /// The flow of each conversation, by its number.
    of_app: HashMap<u64, FlowId>,
    silence: Silence,
    /// Whether it was told that the peer takes no (more) flows.
    told_full: bool,
}

struct NearFlow {
    app: Arc<AppFlow>,
    place: Place,
    tx: (u64, u64),
    rx: (u64, u64),
    /// Of these, what the target itself has sent.
    answers: u64,
}

impl Near {
    pub fn reports(&self) -> impl Iterator<Item = FlowReport> {
        self.flows.iter().map(|(&id, flow)| FlowReport {
            id,
            target: flow.app.target.to_string(),
            local: flow.app.app.clone(),
            tx: flow.tx,
            rx: flow.rx,
        })
    }

    fn remove(&mut self, id: FlowId) -> Option<Arc<AppFlow>> {
        let flow = self.flows.remove(&id)?;
        self.of_app.remove(&flow.app.number());
        self.silence.remove(id, flow.place);
        Some(flow.app)
    }

    fn insert(&mut self, id: FlowId, app: &Arc<AppFlow>) {
        let brief = is_brief(&app.target, 0, 0);
        let flow = NearFlow {
            app: Arc::clone(app),
            place: self.silence.insert(id, brief, Instant::now()),
            tx: (0, 0),
            rx: (0, 0),
            answers: 0,
        };
        self.flows.insert(id, flow);
        self.of_app.insert(app.number(), id);
    }

    fn sent(&mut self, id: FlowId, bytes: usize) {
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.tx = (flow.tx.0 + 1, flow.tx.1 + bytes as u64);
            flow.touch(id, &mut self.silence);
        }
    }

    /// A datagram came for an application: whom to give it to. What others than the target have sent is no use of the
    /// flow, and no answer.
    fn came(&mut self, id: FlowId, bytes: usize, info: &DatagramInfo) -> Option<&AppFlow> {
        let flow = self.flows.get_mut(&id)?;
        flow.rx = (flow.rx.0 + 1, flow.rx.1 + bytes as u64);
        if info.source.is_none() {
            flow.answers += 1;
            flow.touch(id, &mut self.silence);
        }
        Some(&flow.app)
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.silence.deadline()
    }
}

impl NearFlow {
    fn touch(&mut self, id: FlowId, silence: &mut Silence) {
        let brief = is_brief(&self.app.target, self.tx.0, self.answers);
        silence.touch(id, &mut self.place, brief, Instant::now());
    }
}

impl Driver {
    /// Takes what applications have sent.
    pub(in crate::driver) fn take_datagrams(&mut self) {
        let Side::Initiator(initiator) = &self.side else {
            return;
        };
        let queue = Arc::clone(&initiator.config.requests);
        let mut bytes = 0;
        for _ in 0..TAKEN_PER_TURN {
            if bytes >= BYTES_PER_TURN {
                break;
            }
            match queue.flows.pop() {
                Some(FlowInput::Datagram(app, data, dscp)) => {
                    bytes += data.len();
                    self.carry(&app, &data, dscp);
                }
                Some(FlowInput::Closed(app)) => self.app_closed(&app),
                None => break,
            }
        }
    }

    /// A datagram goes out on its conversation's flow, which is opened if there is none.
    fn carry(&mut self, app: &Arc<AppFlow>, data: &Bytes, dscp: Dscp) {
        let known = self.datagrams.near.of_app.get(&app.number()).copied();
        let Some(id) = known.or_else(|| self.open_for(app)) else {
            self.datagrams.counters.dropped += 1;
            return;
        };
        let info = DatagramInfo { dscp, source: None };
        match self.send_datagram(id, data, &info) {
            Ok(()) => self.datagrams.near.sent(id, data.len()),
            // Its end waits to be told: the next one opens another flow.
            Err(FlowError::Gone | FlowError::NotOpen | FlowError::TooMany) => {
                self.datagrams.near.remove(id);
                self.datagrams.counters.dropped += 1;
            }
            Err(FlowError::TooLarge) => {
                self.datagrams.counters.dropped += 1;
                app.end().failed(libc::EMSGSIZE);
            }
        }
    }

    fn open_for(&mut self, app: &Arc<AppFlow>) -> Option<FlowId> {
        self.make_room();
        let (now, target) = (self.clock.now(), app.target.clone());
        match self.session.open_flow_of(now, target, app.group) {
            Ok(id) => {
                tracing::debug!(flow = id, app = %app.app, target = %app.target, "a flow is opened");
                let near = &mut self.datagrams.near;
                near.insert(id, app);
                near.told_full = false;
                Some(id)
            }
            Err(error) => {
                if !std::mem::replace(&mut self.datagrams.near.told_full, true) {
                    let peer = &self.peer.name;
                    tracing::warn!(%peer, %error, app = %app.app, target = %app.target, "datagrams are dropped: no flow can be opened");
                }
                None
            }
        }
    }

    /// Where the peer takes no more flows, the one that was silent for longest goes.
    fn make_room(&mut self) {
        let most = self.session.flows_max();
        let most = most - most / ROOM_PART;
        let near = &self.datagrams.near;
        if most == 0 || (near.flows.len() as u64) < most {
            return;
        }
        if let Some(id) = near.silence.longest(Instant::now()) {
            self.end_near(id);
            // Until its end is sealed, its place is not free.
            self.flush();
        }
    }

    /// Ends the flows that were a question and its answer.
    pub(in crate::driver) fn end_brief_flows(&mut self, now: Instant) {
        while let Some(id) = self.datagrams.near.silence.over(now) {
            self.end_near(id);
        }
    }

    /// What the flow's application sends next opens another.
    fn end_near(&mut self, id: FlowId) {
        self.datagrams.near.remove(id);
        self.session.close_flow(id);
    }

    fn app_closed(&mut self, app: &AppFlow) {
        let Some(id) = self.datagrams.near.of_app.get(&app.number()).copied() else {
            return;
        };
        self.end_near(id);
    }

    /// A datagram came from a target; false if no application here has the flow.
    pub(super) fn deliver_near(&mut self, id: FlowId, data: &[u8], info: &DatagramInfo) -> bool {
        let Some(app) = self.datagrams.near.came(id, data.len(), info) else {
            return false;
        };
        app.end().deliver_with(data, info);
        true
    }

    /// The flow is over; what its application sends next opens another.
    pub(super) fn near_over(&mut self, id: FlowId, errno: Option<u64>) {
        let Some(app) = self.datagrams.near.remove(id) else {
            return;
        };
        if let Some(errno) = errno {
            self.datagrams.counters.failed += 1;
            let errno = i32::try_from(errno).unwrap_or(libc::EHOSTUNREACH);
            if let Some(untold) = self.tell_of_end(&app.target.to_string(), errno) {
                let error = std::io::Error::from_raw_os_error(errno);
                tracing::info!(flow = id, app = %app.app, target = %app.target, untold, %error, "a flow has failed");
            }
            app.end().failed(errno);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requests::Nobody;
    use session_proto::wire::Target;

    #[test]
    fn what_strangers_send_makes_no_question_a_lasting_flow() {
        let target = Target::Addr("192.0.2.1:123".parse().unwrap());
        let app = AppFlow::new(target, "ntp".to_owned(), None, Box::new(Nobody));
        let mut near = Near::default();
        near.insert(0, &Arc::new(app));
        near.sent(0, 1);
        let (asked, stranger) = (near.deadline(), "192.0.2.9:9".parse().ok());
        assert!(asked.is_some());
        let mut came = |source| {
            let info = DatagramInfo {
                source,
                ..DatagramInfo::default()
            };
            assert!(near.came(0, 10, &info).is_some());
            near.deadline()
        };
        for _ in 0..5 {
            assert_eq!(came(stranger), asked);
        }
        assert_eq!(came(None), asked);
        // Now it is a conversation.
        assert_eq!(came(None), None);
        assert_eq!(near.reports().next().unwrap().rx, (7, 70));
    }
}
