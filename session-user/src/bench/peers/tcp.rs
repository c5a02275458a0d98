//! Plain TCP: nothing in between.

use std::time::Duration;

use super::super::scenario::Scenario;
use super::Peer;
use super::site::{Site, Way};

/// The application as it is, with the kernel's TCP.
pub struct Tcp;

impl Peer for Tcp {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn lacks(&self, scenario: Scenario) -> Option<&'static str> {
        match scenario {
            Scenario::Soft => Some("a connection cannot be moved"),
            Scenario::Wake => Some("there is no program that could sleep"),
            _ => None,
        }
    }

    fn survives_a_cut(&self) -> bool {
        false
    }

    /// Without it an application that sends learns of the death of its connection after 15 minutes.
    fn user_timeout(&self) -> Duration {
        Duration::from_secs(5)
    }

    fn start(&self, site: &Site<'_>) -> anyhow::Result<Way> {
        Ok(Way::to(site.server))
    }
}
