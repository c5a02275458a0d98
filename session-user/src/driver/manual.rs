//! The operator's choice of a link.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Driver, Side};

impl Driver {
    /// The operator names a link; `auto` gives the choice back to the policy.
    pub(super) fn manual_handover(
        &mut self,
        link: &str,
        reply: oneshot::Sender<Result<String, String>>,
    ) {
        let answer = self.try_manual_handover(link);
        // Whoever asked may have gone; what was asked is done all the same.
        let _ = reply.send(answer);
    }

    fn try_manual_handover(&mut self, link: &str) -> Result<String, String> {
        let Side::Initiator(initiator) = &mut self.side else {
            return Err("the peer chooses the link of this session: ask it there".to_owned());
        };
        let done = if link == "auto" {
            initiator.config.policy.manual = None;
            "the policy chooses the link".to_owned()
        } else {
            let snapshot = Arc::clone(&initiator.config.links.borrow());
            let Some(found) = snapshot.link(link) else {
                return Err(format!("there is no link {link}"));
            };
            let remotes = &initiator.config.remotes;
            let against: Vec<String> = remotes
                .iter()
                .filter_map(|r| found.usable_for(r.ip()).err())
                .map(|e| e.to_string())
                .collect();
            if against.len() == remotes.len() {
                return Err(format!("{link} cannot be used: {}", against.join("; ")));
            }
            initiator.config.policy.manual = Some(link.to_owned());
            format!(
                "moving to {link}; `holdfast handover auto` gives the choice back to the policy"
            )
        };
        initiator.forgive();
        initiator.retry_at = None;
        self.decide();
        Ok(done)
    }
}
