//! One scenario over one peer: the same cuts as for Holdfast. What is awaited is what can be seen from
//! outside: bytes that arrive.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use session_lab::LinkName;

use super::super::app::{Direction, now_ns};
use super::super::bed::{Bed, BedConfig, own_program};
use super::super::cuts::{Conditions, Cut};
use super::super::measure::{AFTER_MOVE, CONTROL_WINDOW, LATENESS_MAX, Plan};
use super::super::progress::progress;
use super::super::report::Row;
use super::super::scenario::Scenario;
use super::super::scratch::Scratch;
use super::Peer;
use super::attempt::{Attempt, Death, carried};
use super::site::LOOK;

/// A connection on which nothing comes steadily by then has died.
const CAP: Duration = Duration::from_secs(10);
/// What is said of such a connection.
const GIVEN_UP: &str = "nothing came for 10 s: given up";
/// Time for a fresh connection to carry the application's bytes.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Time for a connection to use the preferred link again. A fresh one does so at once.
const BACK_LIMIT: Duration = Duration::from_secs(3);
/// So many attempts in a row may stand on the other link from the beginning.
const VAIN_MAX: usize = 3;
/// How much of the bytes the link must carry for its cut to mean something, in per cent: nearly all,
/// or, of a system that uses both links at once, a good part.
const SHARE_ALONE: u64 = 90;
const SHARE_OF_TWO: u64 = 20;
/// Over so long that is counted.
const COUNTED: Duration = Duration::from_millis(100);

/// How an attempt stands before something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Readiness {
    /// Bytes arrive, over the link that something will happen to.
    Ready,
    /// Bytes arrive over the other link.
    Elsewhere,
    /// Nothing arrives.
    Dead,
}

/// Measures `peer`; a row for each direction. Whenever its connections have died or do not come back
/// to the preferred link, the next cut is that of fresh ones.
pub fn measure(peer: &dyn Peer, plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let dir = Scratch::new()?;
    let mut config = BedConfig {
        v6: plan.v6,
        holdfast: false,
        shapes: plan.shapes(),
        ..BedConfig::new(own_program()?)
    };
    plan.scenario.bed(&mut config);
    let bed = Bed::new(dir.path(), config)?;
    plan.scenario.prepare(&bed)?;
    let returns = plan.scenario == Scenario::Return;
    let moves = peer.survives_a_cut();
    if returns && !moves {
        // Its connections can only begin on the other link.
        bed.lab.cut(LinkName::Wifi)?;
    }
    let bar = progress(&format!("{} {}", peer.name(), plan.label()), plan.runs);
    let mut rows: Vec<(Direction, Row)> = Vec::new();
    let (mut done, mut vain) = (0, 0);
    for number in 0.. {
        if done >= plan.runs {
            break;
        }
        if returns && moves {
            bed.lab.restore(LinkName::Wifi)?;
        }
        let dir = dir.path().join(format!("attempt-{number}"));
        let mut attempt = Attempt::start(peer, &bed, plan, dir)?;
        std::thread::sleep(plan.scenario.begins(plan.pace));
        let mut run = Run {
            bed: &bed,
            plan,
            both_links: peer.uses_both_links(),
            done,
            repeated: 0,
            lateness: Duration::ZERO,
            cuts: Vec::new(),
        };
        let began = now_ns();
        if returns && moves {
            run.leave(&mut attempt)?;
        }
        let dead = run.until_death(&mut attempt, || bar.inc(1))?;
        done += run.cuts.len();
        vain = if run.cuts.is_empty() { vain + 1 } else { 0 };
        ensure!(
            vain < VAIN_MAX,
            "fresh connections do not use the preferred link"
        );
        let conditions = run.conditions(peer.name(), began);
        let more = attempt.finish(&bed.lab, &conditions, &run.cuts, dead)?;
        for (direction, one) in more {
            match rows.iter_mut().find(|(known, _)| *known == direction) {
                Some((_, all)) => all.add(&one),
                None => rows.push((direction, one)),
            }
        }
        if dead.is_some() {
            heal(&bed, plan.scenario)?;
        }
    }
    bar.finish_and_clear();
    Ok(rows.into_iter().map(|(_, row)| row).collect())
}

/// Makes everything as it was before it happened.
fn heal(bed: &Bed, scenario: Scenario) -> anyhow::Result<()> {
    scenario.undo(&bed.lab, bed.shape(LinkName::Wifi))?;
    if scenario.is_silent() {
        // The link goes and comes back, as for Holdfast: whoever left it is told that it is there.
        bed.lab.cut(LinkName::Wifi)?;
        bed.lab.restore(LinkName::Wifi)?;
    }
    if scenario == Scenario::Return {
        bed.lab.cut(LinkName::Wifi)?;
    }
    Ok(())
}

/// The cuts of one attempt.
struct Run<'a> {
    bed: &'a Bed,
    plan: &'a Plan,
    /// Whether the peer uses both links at once.
    both_links: bool,
    /// Cuts of the attempts before.
    done: usize,
    repeated: usize,
    lateness: Duration,
    cuts: Vec<Cut>,
}

impl Run<'_> {
    /// Lets the connections move to the other link, so that the preferred one can come back.
    fn leave(&self, attempt: &mut Attempt) -> anyhow::Result<()> {
        let stands = self.readiness(attempt, true)?;
        ensure!(
            stands == Readiness::Ready,
            "a fresh connection carries nothing"
        );
        self.bed.lab.cut(LinkName::Wifi).map(|_| ())
    }

    /// Lets it happen until there are enough cuts, the attempt has died (and of what), or its
    /// connections stay on the other link.
    fn until_death(
        &mut self,
        attempt: &mut Attempt,
        mut counted: impl FnMut(),
    ) -> anyhow::Result<Option<Death>> {
        while self.done + self.cuts.len() < self.plan.runs {
            let fresh = self.cuts.len() + self.repeated == 0;
            match self.readiness(attempt, fresh)? {
                Readiness::Ready => {}
                Readiness::Dead if fresh => bail!("a fresh connection carries nothing"),
                Readiness::Elsewhere => return Ok(None),
                Readiness::Dead => return Ok(Some(self.death())),
            }
            let (cut, late, dead) = self.cut_once(attempt)?;
            // As for Holdfast; but a death is not made good by another try.
            if late > LATENESS_MAX && !dead && self.repeated < self.plan.runs {
                self.repeated += 1;
            } else {
                self.lateness = self.lateness.max(late);
                self.cuts.push(cut);
                counted();
            }
            if dead {
                return Ok(Some(self.death()));
            }
            heal(self.bed, self.plan.scenario)?;
        }
        Ok(None)
    }

    /// The connections have died of the latest cut.
    fn death(&self) -> Death {
        Death {
            why: GIVEN_UP,
            run: self.done + self.cuts.len(),
        }
    }

    /// Waits until bytes arrive over the link that something will happen to.
    fn readiness(&self, attempt: &mut Attempt, fresh: bool) -> anyhow::Result<Readiness> {
        // What is looked at begins after what was done to the links last.
        std::thread::sleep(CONTROL_WINDOW + self.plan.rtt);
        let began = Instant::now();
        let limit = if fresh { START_LIMIT } else { CAP };
        let mut steady_since = None;
        while began.elapsed() < limit {
            if attempt.has_lost_one() {
                return Ok(Readiness::Dead);
            }
            if !attempt.is_steady(CONTROL_WINDOW, self.plan.rtt) {
                attempt.check()?;
                steady_since = None;
                std::thread::sleep(LOOK);
                continue;
            }
            if self.is_on_its_link()? {
                return Ok(Readiness::Ready);
            }
            let since = *steady_since.get_or_insert_with(Instant::now);
            if since.elapsed() > BACK_LIMIT {
                return Ok(Readiness::Elsewhere);
            }
        }
        Ok(Readiness::Dead)
    }

    /// Whether a good part of the bytes takes the link that something will happen to.
    fn is_on_its_link(&self) -> anyhow::Result<bool> {
        if matches!(self.plan.scenario, Scenario::Return | Scenario::Steady) {
            // The other link is down, or it does not matter.
            return Ok(true);
        }
        let count = || -> anyhow::Result<[u64; 2]> {
            let [wifi, lte] = LinkName::ALL.map(|link| carried(&self.bed.lab, link));
            Ok([wifi?, lte?])
        };
        let before = count()?;
        // A rate is what is measured.
        std::thread::sleep(COUNTED);
        let after = count()?;
        let wifi = after[0].saturating_sub(before[0]);
        let lte = after[1].saturating_sub(before[1]);
        let share = if self.both_links {
            SHARE_OF_TWO
        } else {
            SHARE_ALONE
        };
        Ok(wifi > 0 && wifi * 100 >= (wifi + lte) * share)
    }

    /// Takes a control, strikes, waits until bytes arrive steadily again. Returns how late the
    /// emulator was, and whether the connections have died.
    fn cut_once(&self, attempt: &mut Attempt) -> anyhow::Result<(Cut, Duration, bool)> {
        let (plan, lab) = (self.plan, &self.bed.lab);
        let run = self.done + self.cuts.len() + self.repeated;
        // The cut must not keep step with the application's clock or anybody's timers.
        let offset = Duration::from_micros(20_000 + (run as u64 * 7_919) % 50_000);
        std::thread::sleep(offset + plan.rtt * 4);
        lab.lateness_p99();
        let control_from = now_ns();
        std::thread::sleep(CONTROL_WINDOW);
        let control = (control_from, now_ns());
        let asleep = plan.scenario == Scenario::Wake;
        if asleep {
            attempt.freeze(true)?;
        }
        let disturbed = plan
            .scenario
            .disturb(lab, self.bed.shape(LinkName::Wifi), run);
        if asleep {
            attempt.freeze(false)?;
        }
        let from = disturbed?;
        let alive = self.settle(attempt, from);
        let window = (from, now_ns());
        ensure!(window.1 > from, "the clock stands still");
        let cut = Cut {
            control,
            window,
            handover: None,
        };
        Ok((cut, lab.lateness_p99(), !alive))
    }

    /// Waits until bytes arrive steadily again; `false` if they do not within [`CAP`].
    fn settle(&self, attempt: &mut Attempt, from: u64) -> bool {
        let scenario = self.plan.scenario;
        let lossy = matches!(scenario, Scenario::Loss30 | Scenario::Mtu);
        std::thread::sleep(scenario.watch());
        if scenario.is_steady() {
            return !attempt.has_lost_one();
        }
        let window = AFTER_MOVE + self.plan.rtt * 4;
        std::thread::sleep(window);
        let cap = from + CAP.as_nanos() as u64;
        while !attempt.is_steady(window, self.plan.rtt) {
            if attempt.has_ended() {
                return false;
            }
            let now = now_ns();
            if now > cap {
                // A lossy link may never be steady; that is no death while something comes.
                let lately = now - CAP.as_nanos() as u64 / 2;
                return lossy && attempt.has_arrivals_since(lately);
            }
            std::thread::sleep(LOOK);
        }
        !attempt.has_lost_one()
    }

    fn conditions(&self, system: &str, began: u64) -> Conditions {
        Conditions {
            system: system.to_owned(),
            scenario: self.plan.scenario.name(),
            mode: "single".to_owned(),
            rtt: self.plan.rtt,
            rates: self.plan.rates,
            v6: self.plan.v6,
            soft: self.plan.scenario.is_soft(),
            steady: self.plan.scenario.is_steady(),
            pace: self.plan.pace,
            seconds: (now_ns() - began) as f64 / 1e9,
            uncounted: Vec::new(),
            repeated: self.repeated,
            lateness: self.lateness,
        }
    }
}
