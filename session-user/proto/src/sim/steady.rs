//! A conversation over UDP that goes on while things go wrong: as long as one link works and both ends
//! have a transport on it, it is never interrupted for long, whatever swallows packets without a word.

use std::time::Duration;

use super::flow_plan::FlowAct;
use super::world::{Happening, World};
use super::{Mutation, Side};
use crate::Time;
use crate::session::FlowId;

/// As with streams: most of it is what a path that is slow, or blocks UDP, takes to show it.
const GAP_MAX: Duration = Duration::from_secs(3);

/// Bytes of its datagrams: what takes a slow link long to carry would interrupt it as well.
const BYTES_MAX: usize = 1_000;

/// The conversation, as its opener sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steady {
    id: FlowId,
    /// When the last answer came.
    heard: Time,
}

impl World<'_> {
    /// The initiator begins it, as soon as it can.
    pub fn converse(&mut self) {
        let Some(pause) = self.flows.plan.as_ref().and_then(|p| p.steady) else {
            return;
        };
        let open = self.session(Side::Initiator).is_some_and(|s| s.is_open());
        let left = self.script.calm_at.since(self.now).as_nanos() / pause.as_nanos();
        if self.calm || left == 0 {
            return;
        }
        let left = u64::try_from(left).unwrap_or(u64::MAX);
        // Each of its datagrams is answered, as those of a proof are.
        let begun = if open {
            self.begin_flow(Side::Initiator, left, pause, 1000, true)
        } else {
            None
        };
        let Some(id) = begun else {
            let again = Happening::Flow(FlowAct::Converse);
            return self.after(Duration::from_millis(50), again);
        };
        if let Some(app) = self.flows.apps.get_mut(&id) {
            app.most = BYTES_MAX;
        }
        self.flows.steady = Some(Steady {
            id,
            heard: self.now,
        });
    }

    /// The initiator got an answer on flow `id`.
    pub fn heard_steady(&mut self, id: FlowId) {
        let deaf = self.mutation == Some(Mutation::DeafConversation);
        let now = self.now;
        if let Some(steady) = self.flows.steady.as_mut().filter(|s| s.id == id && !deaf) {
            steady.heard = now;
        }
    }

    /// It goes on while the safe link stands.
    pub fn check_steady(&mut self) {
        let (Some(steady), Some(since)) = (self.flows.steady, self.live.since()) else {
            return;
        };
        let app = self.flows.apps.get(&steady.id);
        if self.calm || app.is_none_or(|app| app.is_ending()) {
            self.flows.steady = None;
            return;
        }
        let gap = self.now.since(steady.heard.max(since));
        let longest = &mut self.check.tally.longest_gap;
        *longest = (*longest).max(gap);
        if gap > GAP_MAX {
            let status =
                [0, 1].map(|i| self.hosts[i].session.as_ref().and_then(|s| s.udp_status()));
            self.fail(format!(
                "a conversation is interrupted for {gap:?}, though one link works: {status:?}, {}",
                self.describe()
            ));
        }
    }
}
