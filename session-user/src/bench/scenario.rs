//! The scenarios, and what Holdfast is waited for in each. What happens to the links is in
//! `disturbance.rs`: it is the same for every system.

use std::time::Duration;

use session_lab::LinkName;

use super::app::{Pace, now_ns};
use super::bed::{Bed, BedConfig};
use crate::control::{Request, SessionReport};

/// A session that has not moved by then has not survived.
const MOVE_LIMIT: Duration = Duration::from_secs(20);
/// How long a half-dead link is watched at least.
const WATCH: Duration = Duration::from_millis(1500);
/// How long a run is in which nothing happens.
const STEADY_RUN: Duration = Duration::from_secs(2);
/// Time for a bulk transfer to find out what the links carry: over both at once, and over one. Slow start
/// is not what is measured.
const STEADY_BEGINS: Duration = Duration::from_secs(3);
const BULK_BEGINS: Duration = Duration::from_millis(1500);

/// What happens to the link in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Scenario {
    /// It is set down; a standby is ready.
    Cut,
    /// It is set down; the other link must be dialled.
    CutCold,
    /// The operator moves the session while it works.
    Soft,
    /// What comes down is dropped, and nobody is told.
    BlackholeDown,
    /// What goes up is dropped, and nobody is told.
    BlackholeUp,
    /// What goes either way is dropped, and nobody is told.
    Blackhole,
    /// 30 % of its packets are lost.
    Loss30,
    /// Large packets vanish: above 1280 bytes, or above 1124.
    Mtu,
    /// Its address is replaced.
    Address,
    /// Its NAT forgets the mappings.
    Nat,
    /// The host sleeps for 30 s, and the NATs forget.
    Wake,
    /// The server's link is lost at the same moment.
    BothMove,
    /// The preferred link comes back.
    Return,
    /// It goes away and comes back, five times in a row.
    Flap,
    /// Both links are away for two seconds.
    Outage,
    /// Nothing happens: what a bulk stream gets out of both links together.
    Steady,
    /// Every one of them.
    All,
}

impl Scenario {
    /// Every one of them, in the order of reports.
    pub const EACH: [Self; 16] = [
        Self::Cut,
        Self::CutCold,
        Self::Soft,
        Self::BlackholeDown,
        Self::BlackholeUp,
        Self::Blackhole,
        Self::Loss30,
        Self::Mtu,
        Self::Address,
        Self::Nat,
        Self::Wake,
        Self::BothMove,
        Self::Return,
        Self::Flap,
        Self::Outage,
        Self::Steady,
    ];

    /// Its name, as on the command line.
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map_or_else(String::new, |v| v.get_name().to_owned())
    }

    /// The bed that it needs.
    pub fn bed(self, config: &mut BedConfig) {
        match self {
            Self::CutCold => config.client_extra.push_str("cold = [\"lte0\"]\n"),
            Self::BothMove => config.second_gateway = true,
            _ => {}
        }
    }

    /// What is done once, when the session stands.
    pub fn prepare(self, bed: &Bed) -> anyhow::Result<()> {
        match self {
            Self::Nat => bed.lab.nat(LinkName::Wifi),
            Self::Wake => LinkName::ALL.iter().try_for_each(|&l| bed.lab.nat(l)),
            _ => Ok(()),
        }?;
        if matches!(self, Self::Nat | Self::Wake) {
            // What stands already has no mapping: begin anew behind the NAT.
            bed.lab.cut(LinkName::Wifi)?;
            bed.lab.cut(LinkName::Lte)?;
            bed.lab.restore(LinkName::Lte)?;
            bed.lab.restore(LinkName::Wifi)?;
        }
        Ok(())
    }

    /// Whether redundant and bonded streams see it otherwise than those with one link at a time.
    pub fn differs_by_mode(self) -> bool {
        matches!(
            self,
            Self::Cut | Self::BlackholeDown | Self::BlackholeUp | Self::Blackhole | Self::Return
        )
    }

    /// Whether nothing happens.
    pub fn is_steady(self) -> bool {
        self == Self::Steady
    }

    /// How long the application runs before the first run.
    pub fn begins(self, pace: Pace) -> Duration {
        match pace {
            _ if self.is_steady() => STEADY_BEGINS,
            Pace::Bulk => BULK_BEGINS,
            Pace::PerMillisecond(_) => Duration::ZERO,
        }
    }

    /// How long to watch what follows, whatever the system.
    pub fn watch(self) -> Duration {
        match self {
            Self::Steady => STEADY_RUN,
            // Small packets may all get through at first; and a host that slept has much to do.
            Self::Loss30 | Self::Mtu | Self::Flap | Self::Wake => WATCH,
            _ => Duration::ZERO,
        }
    }

    /// Whether a standby stands on the other link before anything happens.
    pub fn warm(self) -> bool {
        self != Self::CutCold
    }

    /// Whether the handover that follows leaves a link that works.
    pub fn is_soft(self) -> bool {
        matches!(self, Self::Soft | Self::Return)
    }

    /// Whether links are cut in between, to make everything as it was.
    pub fn cuts_between(self) -> bool {
        self.is_silent() || self == Self::Return
    }

    /// Waits until all is as it should be before something happens.
    pub fn ready(self, bed: &mut Bed) -> anyhow::Result<()> {
        bed.await_link(LinkName::Wifi, MOVE_LIMIT)?;
        if self.warm() {
            bed.await_standby(LinkName::Lte, MOVE_LIMIT)?;
        }
        if self == Self::CutCold {
            // What was of use after the last cut is parted with a little later.
            let none =
                |s: &SessionReport| s.transports.iter().all(|t| t.link != LinkName::Lte.name());
            bed.wait(MOVE_LIMIT, none)?;
        }
        if self == Self::Return {
            bed.lab.cut(LinkName::Wifi)?;
            bed.await_link(LinkName::Lte, MOVE_LIMIT)?;
        }
        if self == Self::BothMove {
            let all = |s: &SessionReport| s.transports.iter().filter(|t| t.up).count() >= 3;
            bed.wait(MOVE_LIMIT, all)?;
        }
        Ok(())
    }

    /// Lets it happen; returns when (CLOCK_MONOTONIC in nanoseconds).
    pub fn strike(self, bed: &mut Bed, run: usize) -> anyhow::Result<u64> {
        match self {
            Self::Soft => {
                let from = now_ns();
                bed.command(&Request::Handover {
                    link: LinkName::Lte.name().to_owned(),
                })?;
                Ok(from)
            }
            Self::Wake => {
                bed.freeze(true)?;
                let from = self.disturb(&bed.lab, bed.shape(LinkName::Wifi), run)?;
                bed.freeze(false)?;
                bed.command(&Request::Woke)?;
                Ok(from)
            }
            _ => self.disturb(&bed.lab, bed.shape(LinkName::Wifi), run),
        }
    }

    /// Waits until it has led to what it must lead to.
    pub fn settle(self, bed: &mut Bed) -> anyhow::Result<()> {
        std::thread::sleep(self.watch());
        match self {
            Self::Return => bed.await_link(LinkName::Wifi, MOVE_LIMIT),
            Self::Flap | Self::Wake | Self::Outage | Self::Address => bed.await_session(),
            Self::Loss30 | Self::Mtu | Self::Steady => Ok(()),
            _ => bed.await_link(LinkName::Lte, MOVE_LIMIT),
        }
    }

    /// Makes everything as it was.
    pub fn heal(self, bed: &mut Bed) -> anyhow::Result<()> {
        if self == Self::Soft {
            return bed.command(&Request::Handover {
                link: "auto".to_owned(),
            });
        }
        self.undo(&bed.lab, bed.shape(LinkName::Wifi))?;
        if self.is_silent() {
            // A path that fell silent is left alone for a while, unless its link goes and comes back.
            bed.lab.cut(LinkName::Wifi)?;
            bed.await_link(LinkName::Lte, MOVE_LIMIT)?;
            bed.lab.restore(LinkName::Wifi)?;
        }
        Ok(())
    }
}
