//! Links that are lost: transports on them end at once, without waiting for TCP to find out.

use session_proto::session::Handle;

use super::carrier::Path;
use super::handover::Move;
use super::{Driver, Side};
use crate::link::{ChangeKind, Link, LinkSnapshot, LinkState};
use crate::trace::Trigger;

impl Driver {
    /// Drops transports whose link or address is gone, then asks the policy. The loss of the link
    /// in use leads straight to a standby or to the next dial: no timer is in between.
    pub(super) fn links_changed(&mut self) {
        let Some((snapshot, since)) = self.side.new_links() else {
            return;
        };
        if let Side::Initiator(initiator) = &mut self.side {
            // A link that came back deserves an attempt now, not after a backoff from its bad days.
            for gained in gained_since(&snapshot, since) {
                initiator.history.forget_link(gained);
                initiator.forgive();
                initiator.retry_at = None;
            }
            initiator.history.forget_other_mtu(|name| {
                let link = snapshot.link(name);
                link.map(|link| link.mtu)
            });
            initiator.abandon_attempts_if(|path| !link_stands(&snapshot, &path.link));
        }
        self.drop_lost(&snapshot, since);
        self.tend_udp();
        self.decide();
    }

    fn drop_lost(&mut self, snapshot: &LinkSnapshot, since: u64) {
        let active = self.session.active();
        let dials = matches!(self.side, Side::Initiator(_));
        let mut gone: Vec<(Handle, Path)> = self
            .carriers
            .iter()
            .filter(|(_, c)| !stands(snapshot, &c.path, dials))
            .map(|(&h, c)| (h, c.path.clone()))
            .collect();
        // The active one last: what takes over from it must not be one that is lost as well.
        gone.sort_by_key(|(h, _)| active == Some(*h));
        for (handle, path) in gone {
            tracing::info!(link = %path.link, "the link is lost");
            let before = self.session.stats();
            self.drop_carrier(handle, "the link is lost");
            if active == Some(handle) {
                if let Side::Initiator(initiator) = &mut self.side {
                    initiator.retry_at = None;
                }
                let lost = snapshot
                    .changes_since(since)
                    .find(|c| c.link == path.link && c.kind == ChangeKind::Lost);
                let noticed = lost.map_or(snapshot.read_at, |c| c.at);
                let (trigger, why) = loss(snapshot, &path);
                let cause = Move::hard(&path, trigger, why, noticed);
                self.report.begin(cause.decided_now());
                self.moved(&before);
            }
        }
    }

    /// The host has slept, or lost its sense of time in another way: transports may be gone without
    /// a word.
    pub(super) fn woke(&mut self) {
        tracing::info!("the host has slept: asking on every transport");
        self.report.woke();
        if let Side::Initiator(initiator) = &mut self.side {
            initiator.forgive();
            initiator.history = crate::policy::PathHistory::default();
            initiator.retry_at = None;
        }
        self.session.doubt_all(self.clock.now());
        self.check_identity();
        self.decide();
    }
}

fn gained_since(snapshot: &LinkSnapshot, since: u64) -> impl Iterator<Item = &str> {
    snapshot
        .changes_since(since)
        .filter(|c| c.kind == ChangeKind::Gained)
        .map(|c| c.link.as_str())
}

fn link_stands(snapshot: &LinkSnapshot, name: &str) -> bool {
    snapshot
        .link(name)
        .is_some_and(|link| link.state != LinkState::Unusable)
}

/// Whether a transport's link still has what the transport is bound to. One that the peer dialled
/// is bound to no device and needs no route of that device's own.
pub(super) fn stands(snapshot: &LinkSnapshot, path: &Path, dialled: bool) -> bool {
    let has_all = |link: &Link| {
        let carries = link.admin_up && link.carrier;
        carries && (!dialled || link.state != LinkState::Unusable) && link.holds(path.local.ip())
    };
    path.link.is_empty() || snapshot.link(&path.link).is_some_and(has_all)
}

/// What is missing of a path that does not stand.
fn loss(snapshot: &LinkSnapshot, path: &Path) -> (Trigger, &'static str) {
    let carries = |link: &Link| link.admin_up && link.carrier;
    match snapshot.link(&path.link).filter(|link| carries(link)) {
        Some(link) if !link.holds(path.local.ip()) => {
            (Trigger::AddressLost, "the link lost its address")
        }
        Some(_) => (Trigger::LinkLost, "the link lost its route"),
        None => (Trigger::LinkLost, "the link was lost"),
    }
}

/// The link that holds a local address; empty where none does, as with an address of the host's
/// that no interface has.
pub(super) fn link_of(snapshot: &LinkSnapshot, local: std::net::IpAddr) -> String {
    let holder = snapshot.links.iter().find(|link| link.holds(local));
    holder.map(|link| link.name.clone()).unwrap_or_default()
}
