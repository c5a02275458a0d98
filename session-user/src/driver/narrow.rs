//! Paths that let small packets through and lose large ones without a word: somebody's MTU is smaller
//! than the link's, and the ICMP message that would say so never comes (RFC 2923 section 2.1).
//!
//! A connection is made on such a path, pings are answered, and the first full segment is sent again and
//! again. What helps is a connection with smaller segments: the peer hears of the limit in the SYN and
//! keeps to it as well. The path is remembered for it (see [`crate::policy::PathHistory`]).

use std::time::{Duration, Instant};

use session_proto::session::Handle;

use super::carrier::{Carrier, CarrierEnd};
use super::{Driver, Side};
use crate::policy;
use crate::transport::TcpInfo;

/// A dialled transport is looked at so long after it was connected, unless it is answered, and again
/// and again.
const LOOK_FIRST: Duration = Duration::from_millis(300);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// What was sent on it has arrived, and nothing comes back for this long, or for eight round trips.
const ANSWER_MAX: Duration = Duration::from_millis(1500);
/// For so long size is not thought of again where small packets vanished, too: dials that give up early
/// would only use up the peer's patience.
const CLEARED_FOR: Duration = Duration::from_secs(60);
/// Less than this never vanishes for its size.
const SMALL_BYTES: u64 = 1000;
/// Times in a row that a segment is sent again: twice for a path that was left, because a path that
/// loses packets at random does the like; once where there is no other path.
pub(super) const RETRIED_LONG: u8 = 2;
const RETRIED: u8 = 1;

impl Driver {
    /// When a transport that is added now is looked at first: where this end dials, unless size has been
    /// ruled out.
    pub(super) fn first_look(&self) -> Option<Instant> {
        let now = Instant::now();
        match &self.side {
            Side::Initiator(i) if i.size_cleared_until.is_none_or(|until| now >= until) => {
                Some(now + LOOK_FIRST)
            }
            _ => None,
        }
    }

    /// A transport falls silent: what the kernel says from here on counts.
    pub(super) fn note_silence(&mut self, handle: Handle) {
        if let Some(carrier) = self.carriers.get_mut(&handle)
            && let Some(info) = carrier.look()
        {
            carrier.at_silence = (info.out_of_order, carrier.bytes_in);
        }
    }

    /// The path of a silent transport is dialled again: with smaller segments, if it looks like that.
    pub(super) fn judge_silent(&mut self, path: &policy::Path) {
        let silent = self.session.active().filter(|h| self.session.is_silent(*h));
        if let Some(handle) = silent
            && self.current_path().as_ref() == Some(path)
        {
            self.judge(handle, RETRIED);
        }
    }

    /// A transport that has stood is silent. Where the peer got what was behind the oldest segment, or
    /// this end got what was behind one of the peer's, and neither goes on, size decides what passes.
    pub(super) fn judge(&mut self, handle: Handle, retried: u8) {
        let Some(carrier) = self.carriers.get_mut(&handle) else {
            return;
        };
        let Some(info) = carrier.look() else { return };
        let up = info.sacked > 0 && info.retransmits >= retried;
        let (out_of_order, bytes_in) = carrier.at_silence;
        let down = info.out_of_order > out_of_order && carrier.bytes_in == bytes_in;
        if up || down {
            self.narrow(handle);
        }
    }

    /// Gives up dialled transports that got no answer because what was sent on them is too large.
    pub(super) fn drop_swallowed(&mut self, now: Instant) {
        let due = |at: &mut Instant| now >= *at;
        let mut swallowed = Vec::new();
        for (&handle, carrier) in &mut self.carriers {
            if carrier.swallow_at.take_if(due).is_none() {
                continue;
            }
            // A SYN is small: that nobody answers it says nothing of size.
            let info = carrier.look().filter(|info| !info.is_opening());
            if info.is_some_and(|info| swallows(carrier, &info)) {
                swallowed.push(handle);
            } else {
                carrier.swallow_at = Some(now + LOOK_AGAIN);
            }
        }
        for handle in swallowed {
            self.narrow(handle);
            let active = self.session.active() == Some(handle);
            let again = self.current_path().filter(|_| active);
            if let (Some(path), Side::Initiator(initiator)) = (again, &mut self.side) {
                initiator.pending.push_front(path);
            }
            self.carrier_failed(handle, &CarrierEnd::Swallowed);
        }
    }

    /// The next transport on the path of `handle` has smaller segments than that one.
    fn narrow(&mut self, handle: Handle) {
        let links = self.side.links();
        let (Side::Initiator(initiator), Some(carrier)) =
            (&mut self.side, self.carriers.get(&handle))
        else {
            return;
        };
        let (path, now) = (&carrier.path, Instant::now());
        // The path may have been found out by another transport meanwhile.
        if initiator.history.segment(&path.link, path.remote, now) != carrier.segment {
            return;
        }
        let mtu = links.link(&path.link).map_or(0, |link| link.mtu);
        let next = (initiator.history).record_swallowed(&path.link, path.remote, mtu, now);
        if next.is_none() {
            initiator.size_cleared_until = Some(now + CLEARED_FOR);
        }
        let words = match next {
            Some(bytes) => format!(
                "large packets vanish on {}: its next transport has segments of at most {bytes} bytes",
                path.link
            ),
            None => format!("small packets vanish on {} as well", path.link),
        };
        tracing::warn!(remote = %path.remote, "{words}");
        self.report.remark(&words);
    }
}

/// Whether `carrier`, which was dialled and got no answer, sent what the path does not let through; or
/// its answer is of that sort.
fn swallows(carrier: &Carrier, info: &TcpInfo) -> bool {
    if carrier.bytes_out < SMALL_BYTES && info.out_of_order == 0 {
        return false;
    }
    if info.unacked > 0 {
        return carrier.bytes_in == 0 && info.retransmits >= RETRIED_LONG;
    }
    let patience = ANSWER_MAX.max(info.rtt * 8);
    info.out_of_order > 0 || carrier.since.elapsed() >= patience
}
