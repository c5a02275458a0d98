//! What a scenario does to the lab's links, whatever runs over them.

use std::time::Duration;

use session_lab::{Direction, Lab, LinkName, Shape};

use super::app::now_ns;
use super::scenario::Scenario;

/// How long a host sleeps in `wake`.
const SLEEP: Duration = Duration::from_secs(30);
/// How long both links are away in `outage`.
const OUTAGE: Duration = Duration::from_secs(2);
/// How often, and how long each time, a flapping link goes away.
const FLAPS: u32 = 5;
const FLAP: Duration = Duration::from_millis(60);

impl Scenario {
    /// Disturbs the links; `shape` is the usual one of the link in use. Returns when (CLOCK_MONOTONIC in
    /// nanoseconds). `soft` and `steady` disturb nothing, and in `wake` the caller freezes what is to sleep.
    pub fn disturb(self, lab: &Lab, shape: Shape, run: usize) -> anyhow::Result<u64> {
        let mut from = now_ns();
        match self {
            Self::Cut | Self::CutCold | Self::All => drop(lab.cut(LinkName::Wifi)?),
            Self::Soft | Self::Steady => {}
            Self::BlackholeDown => lab.blackhole(LinkName::Wifi, Direction::Down)?,
            Self::BlackholeUp => lab.blackhole(LinkName::Wifi, Direction::Up)?,
            Self::Blackhole => lab.blackhole(LinkName::Wifi, Direction::Both)?,
            Self::Loss30 => {
                let lossy = Shape { loss: 0.3, ..shape };
                lab.shape(LinkName::Wifi, Direction::Both, lossy)?;
            }
            Self::Mtu => {
                let mtu = if run.is_multiple_of(2) { 1280 } else { 1124 };
                let narrow = Shape {
                    mtu: Some(mtu),
                    ..shape
                };
                lab.shape(LinkName::Wifi, Direction::Both, narrow)?;
            }
            Self::Address => {
                let last = if run.is_multiple_of(2) { 3 } else { 2 };
                lab.replace_address(LinkName::Wifi, last)?;
            }
            Self::Nat => lab.forget_mappings()?,
            Self::Wake => {
                lab.forget_mappings()?;
                // How long the host is away is what is measured.
                std::thread::sleep(SLEEP);
                from = now_ns();
            }
            Self::BothMove => {
                lab.cut(LinkName::Wifi)?;
                lab.cut_server()?;
            }
            Self::Return => {
                lab.restore(LinkName::Wifi)?;
                // The clock starts when route and address are there.
                from = now_ns();
            }
            Self::Flap => {
                // The pauses are the flapping.
                let pause = || std::thread::sleep(FLAP);
                for _ in 0..FLAPS {
                    lab.cut(LinkName::Wifi)?;
                    pause();
                    lab.restore(LinkName::Wifi)?;
                    pause();
                }
            }
            Self::Outage => {
                lab.cut(LinkName::Lte)?;
                lab.cut(LinkName::Wifi)?;
                // How long no link is there is what is measured.
                std::thread::sleep(OUTAGE);
                lab.restore(LinkName::Lte)?;
                from = now_ns();
            }
        }
        Ok(from)
    }

    /// Makes the links as they were.
    pub fn undo(self, lab: &Lab, shape: Shape) -> anyhow::Result<()> {
        match self {
            Self::Cut | Self::CutCold | Self::All | Self::Outage => lab.restore(LinkName::Wifi),
            Self::BlackholeDown | Self::BlackholeUp | Self::Blackhole => {
                lab.unblackhole(LinkName::Wifi)
            }
            Self::Loss30 | Self::Mtu => lab.shape(LinkName::Wifi, Direction::Both, shape),
            Self::BothMove => {
                lab.restore_server()?;
                lab.restore(LinkName::Wifi)
            }
            Self::Soft
            | Self::Nat
            | Self::Wake
            | Self::Address
            | Self::Return
            | Self::Flap
            | Self::Steady => Ok(()),
        }
    }

    /// Whether no event tells of it: the link looks as before.
    pub fn is_silent(self) -> bool {
        matches!(
            self,
            Self::BlackholeDown
                | Self::BlackholeUp
                | Self::Blackhole
                | Self::Loss30
                | Self::Mtu
                | Self::Nat
                | Self::Wake
        )
    }
}
