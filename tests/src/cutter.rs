//! Cuts the preferred link again and again while a program runs.

use std::time::Duration;

use anyhow::Context;
use session_lab::LinkName;
use session_user::bench::bed::Bed;

/// Time for a session to move.
const MOVE_LIMIT: Duration = Duration::from_secs(20);

/// Whoever cuts. Each cut is hard: the session runs on the link that goes.
pub struct Cutter {
    cuts: usize,
    /// Time between the return to the link and the next cut.
    pub calm: Duration,
}

impl Default for Cutter {
    fn default() -> Self {
        Self {
            cuts: 0,
            calm: Duration::from_millis(150),
        }
    }
}

impl Cutter {
    /// Cuts until `done` says that the program has ended; returns how many cuts there were.
    pub fn until(
        &mut self,
        bed: &mut Bed,
        mut done: impl FnMut() -> bool,
    ) -> anyhow::Result<usize> {
        while !done() {
            self.once(bed)?;
        }
        Ok(self.cuts)
    }

    /// One cut: the session moves to the other link, and comes back.
    pub fn once(&mut self, bed: &mut Bed) -> anyhow::Result<()> {
        bed.await_link(LinkName::Wifi, MOVE_LIMIT)?;
        std::thread::sleep(self.calm);
        bed.lab.cut(LinkName::Wifi)?;
        let moved = bed.wait(MOVE_LIMIT, |s| {
            s.transports
                .iter()
                .any(|t| t.active && t.up && t.link == LinkName::Lte.name())
        });
        moved.with_context(|| format!("the session does not move\n{}", bed.last_words()))?;
        self.cuts += 1;
        bed.lab.restore(LinkName::Wifi)
    }

    /// How many cuts there were.
    pub fn cuts(&self) -> usize {
        self.cuts
    }
}
