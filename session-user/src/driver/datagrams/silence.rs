//! Which of the applications' flows were silent for longest.
//!
//! Most conversations are a question and its answer, and each has a socket of its own, so that their flows would soon
//! take all places. They end early, and go first where there is no place, as in the kernel's connection tracking
//! (`nf_conntrack_udp_timeout`, 30 s, and `early_drop` of nf_conntrack_core.c).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use session_proto::session::FlowId;
use session_proto::wire::Target;

/// A brief flow without a datagram for so long has ended. RFC 4787, REQ-5a, lets ports below 1024 have less than the
/// two minutes that it asks for all others.
const BRIEF_IDLE: Duration = Duration::from_secs(30);
/// An answer may still come within this time.
const ANSWER: Duration = Duration::from_secs(5);
/// A flow's place in the order is no more exact than this, so that a datagram seldom changes it.
const GRAIN: Duration = Duration::from_secs(1);
/// Ports for which [`BRIEF_IDLE`] may hold (RFC 6335, section 6).
const WELL_KNOWN: std::ops::Range<u16> = 0..1024;
/// DNS: a resolver asks for both kinds of addresses at once, and again.
const DNS: u16 = 53;

/// A flow's place in the order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    brief: bool,
    used: Instant,
}

/// Flows in the order of their last datagrams.
#[derive(Debug, Default)]
pub(super) struct Silence {
    brief: BTreeSet<(Instant, FlowId)>,
    lasting: BTreeSet<(Instant, FlowId)>,
}

/// Whether a flow to `target` that has sent and received so many datagrams is a question with its answer.
pub(super) fn is_brief(target: &Target, sent: u64, received: u64) -> bool {
    let port = match target {
        Target::Addr(addr) => addr.port(),
        Target::Name(_, port) => *port,
    };
    port == DNS || (WELL_KNOWN.contains(&port) && sent <= 1 && received <= 1)
}

impl Silence {
    fn row(&mut self, brief: bool) -> &mut BTreeSet<(Instant, FlowId)> {
        if brief {
            &mut self.brief
        } else {
            &mut self.lasting
        }
    }

    /// A new flow.
    pub fn insert(&mut self, id: FlowId, brief: bool, now: Instant) -> Place {
        self.row(brief).insert((now, id));
        Place { brief, used: now }
    }

    /// A datagram went or came.
    pub fn touch(&mut self, id: FlowId, place: &mut Place, brief: bool, now: Instant) {
        if brief != place.brief || now.saturating_duration_since(place.used) >= GRAIN {
            self.remove(id, *place);
            *place = self.insert(id, brief, now);
        }
    }

    /// The flow is over.
    pub fn remove(&mut self, id: FlowId, place: Place) {
        self.row(place.brief).remove(&(place.used, id));
    }

    /// The flow that is missed least: a brief one that waits for no answer, or the one that was silent for longest.
    pub fn longest(&self, now: Instant) -> Option<FlowId> {
        let brief = self.brief.first();
        let done = brief.filter(|(used, _)| now.saturating_duration_since(*used) >= ANSWER);
        let any = [brief, self.lasting.first()];
        let longest = done.or_else(|| any.into_iter().flatten().min());
        longest.map(|(_, id)| *id)
    }

    /// A brief flow that was silent for too long.
    pub fn over(&self, now: Instant) -> Option<FlowId> {
        let late = self.deadline()? <= now;
        self.brief.first().filter(|_| late).map(|(_, id)| *id)
    }

    /// When the next brief flow has been silent for too long.
    pub fn deadline(&self) -> Option<Instant> {
        self.brief.first().map(|(used, _)| *used + BRIEF_IDLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brief_flows_go_first_once_an_answer_is_not_to_be_expected() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut order = Silence::default();
        let mut lasting = order.insert(0, false, at(0));
        let question = order.insert(2, true, at(10));
        assert_eq!(order.longest(at(12)), Some(0));
        assert_eq!(order.longest(at(15)), Some(2));
        order.touch(0, &mut lasting, false, at(12));
        assert_eq!(order.longest(at(12)), Some(2));
        assert_eq!(order.over(at(39)), None);
        assert_eq!(
            (order.over(at(40)), order.deadline()),
            (Some(2), Some(at(40)))
        );
        order.remove(2, question);
        assert_eq!((order.longest(at(60)), order.deadline()), (Some(0), None));
        order.remove(0, lasting);
        assert_eq!(order.longest(at(60)), None);
    }

    #[test]
    fn a_question_that_goes_on_is_a_lasting_flow() {
        let start = Instant::now();
        let mut order = Silence::default();
        let mut place = order.insert(4, true, start);
        order.touch(4, &mut place, false, start);
        assert_eq!(order.deadline(), None);
        let to = |port| Target::Addr(([192, 0, 2, 1], port).into());
        assert!(is_brief(&to(123), 1, 1) && is_brief(&to(53), 4, 4));
        assert!(!is_brief(&to(123), 2, 1) && !is_brief(&to(3478), 1, 1));
    }
}
