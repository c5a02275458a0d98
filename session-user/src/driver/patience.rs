//! How long a transport waits: for what it sent not long, and for nothing in particular as long as keep-alives take.

use std::time::{Duration, Instant};

use super::carrier::Carrier;
use crate::transport::{TransportOptions, be_patient};

/// How often it is seen whether all that was sent is acknowledged. Once for each time that a transport was busy costs
/// nothing.
const LOOK_AFTER: Duration = Duration::from_secs(1);

impl Carrier {
    /// It is about to send something, which is to be acknowledged in time.
    pub fn lose_patience(&mut self, options: &TransportOptions) {
        if self.impatient_until.is_none() {
            // A socket that refuses has failed, as the write will say.
            let _ = be_patient(&self.socket, false, options);
            self.impatient_until = Some(Instant::now() + LOOK_AFTER);
        }
    }

    /// It is patient again if it has waited for a while, and all that it was to send is sent and acknowledged.
    pub fn calm_down(&mut self, now: Instant, options: &TransportOptions) {
        if self.impatient_until.take_if(|at| now >= *at).is_none() {
            return;
        }
        if self
            .look()
            .is_some_and(|info| info.unacked > 0 || info.notsent > 0)
        {
            self.impatient_until = Some(now + LOOK_AFTER);
        } else {
            let _ = be_patient(&self.socket, true, options);
        }
    }
}
