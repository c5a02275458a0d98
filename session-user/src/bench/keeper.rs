//! Rows are kept as soon as they are there, and those that are there are not measured again.

use std::path::Path;

use super::host::Host;
use super::measure::Plan;
use super::progress::Plans;
use super::report::Row;
use super::rowfile::{Kept, RowFile, RowFileError};

/// Where the rows of this measurement go.
pub struct Keeper {
    file: Option<RowFile>,
    resume: bool,
    host: Host,
}

impl Keeper {
    /// To a file, if one is named; with `resume`, rows that it has are taken from it.
    pub fn new(out: Option<&Path>, resume: bool) -> Result<Self, RowFileError> {
        Ok(Self {
            file: out.map(RowFile::open).transpose()?,
            resume,
            host: Host::here(),
        })
    }

    /// The plan's rows of `system`: from the file where it has them, measured and kept otherwise.
    pub fn rows(
        &mut self,
        system: &str,
        plan: &Plan,
        progress: &mut Plans,
        measure: impl FnOnce(&Plan) -> anyhow::Result<Vec<Row>>,
    ) -> anyhow::Result<Vec<Kept>> {
        let label = format!("{system} {}", plan.label());
        let mut missing = plan.clone();
        let mut rows = Vec::new();
        missing
            .directions
            .retain(|direction| match self.before(system, plan, *direction) {
                Some(kept) => {
                    rows.push(kept.clone());
                    false
                }
                None => true,
            });
        if missing.directions.is_empty() {
            progress.skip(&label, plan.runs);
            return Ok(rows);
        }
        progress.begin(&label, plan.runs);
        rows.extend(self.keep(measure(&missing)?)?);
        Ok(rows)
    }

    fn before(&self, system: &str, plan: &Plan, direction: super::app::Direction) -> Option<&Kept> {
        let file = self.file.as_ref().filter(|_| self.resume)?;
        file.find(&plan.key(system, direction), plan.runs)
    }

    /// Keeps what has just been measured.
    pub fn keep(&mut self, rows: Vec<Row>) -> Result<Vec<Kept>, RowFileError> {
        let kept: Vec<Kept> = rows
            .into_iter()
            .map(|row| Kept {
                row,
                host: self.host.clone(),
            })
            .collect();
        if let Some(file) = &mut self.file {
            file.append(&kept)?;
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::app::{Direction, Pace};
    use super::super::measure::Mode;
    use super::super::report::tests::row;
    use super::super::scenario::Scenario;
    use super::*;

    fn plan() -> Plan {
        Plan {
            scenario: Scenario::Cut,
            runs: 5,
            v6: false,
            rtt: Duration::from_millis(40),
            rates: None,
            directions: vec![Direction::Download, Direction::Upload],
            mode: Mode::Single,
            pace: Pace::PerMillisecond(1000),
        }
    }

    fn measured(plan: &Plan) -> Vec<Row> {
        plan.directions
            .iter()
            .map(|d| row("holdfast", "cut", d.name()))
            .collect()
    }

    #[test]
    fn what_is_there_is_not_measured_again() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("rows");
        let plan = plan();
        let one = Plan {
            directions: vec![Direction::Upload],
            ..plan.clone()
        };
        let mut progress = Plans::new([5; 5]);
        let mut asked = Vec::new();
        for (wanted, resume) in [(&one, true), (&plan, true), (&plan, true), (&plan, false)] {
            let mut keeper = Keeper::new(Some(&path), resume)?;
            let rows = keeper.rows("holdfast", wanted, &mut progress, |missing| {
                asked.push(missing.directions.clone());
                Ok(measured(missing))
            })?;
            assert_eq!(rows.len(), wanted.directions.len());
        }
        assert_eq!(
            asked,
            [
                vec![Direction::Upload],
                vec![Direction::Download],
                plan.directions.clone()
            ]
        );
        Ok(())
    }

    #[test]
    fn without_a_file_everything_is_measured() -> anyhow::Result<()> {
        let mut progress = Plans::new([5]);
        let mut keeper = Keeper::new(None, false)?;
        let rows = keeper.rows("holdfast", &plan(), &mut progress, |p| Ok(measured(p)))?;
        assert_eq!(rows.len(), 2);
        Ok(())
    }
}
