//! What the units have said of an order, and which of them live.

use std::collections::BTreeSet;
use std::io;

use super::unit::{Told, What};
use super::{Done, Word};

/// Counts what comes of one order.
pub struct Tally {
    word: Word,
    /// Units that have not carried it out yet.
    awaited: BTreeSet<usize>,
    /// Units whose transport has carried a question and its answer.
    answered: BTreeSet<usize>,
    done: Done,
}

impl Tally {
    /// Of an order to `awaited`, that is to have `wanted` good ones.
    pub fn new(word: Word, awaited: BTreeSet<usize>, wanted: usize) -> Self {
        Self {
            word,
            awaited,
            answered: BTreeSet::new(),
            done: Done {
                wanted,
                ..Done::default()
            },
        }
    }

    /// How many have not carried it out yet.
    pub fn awaited(&self) -> usize {
        self.awaited.len()
    }

    /// Notes something that went wrong. The first of them is told.
    pub fn trouble(&mut self, why: impl FnOnce() -> String) {
        self.done.trouble.get_or_insert_with(why);
    }

    /// Counts what a unit has told; `stand` has the units whose session stands.
    pub fn hear(&mut self, told: Told, stand: &mut BTreeSet<usize>) {
        let Told { unit, what } = told;
        match (what, self.word) {
            (What::Stands, _) => {
                stand.insert(unit);
                self.done.good += 1;
                self.awaited.remove(&unit);
            }
            (What::Opened { streams, refused }, Word::Streams) => {
                self.done.good += streams;
                if let Some(errno) = refused {
                    let error = io::Error::from_raw_os_error(errno);
                    self.trouble(|| format!("a stream: {error}"));
                }
                self.awaited.remove(&unit);
            }
            (What::Asks(streams), Word::Check) => self.done.asked += streams,
            (What::Echoed, Word::Check) => self.done.echoed += 1,
            (What::Lives, Word::Check) => drop(self.answered.insert(unit)),
            (What::Checked, Word::Check) => drop(self.awaited.remove(&unit)),
            // Late answers to an order that is over.
            (
                What::Opened { .. } | What::Asks(_) | What::Echoed | What::Lives | What::Checked,
                _,
            ) => {}
            (What::Failed(why), _) => {
                self.trouble(|| format!("unit {unit}: {why}"));
                self.awaited.remove(&unit);
            }
            (What::Ended(why), _) => {
                self.trouble(|| format!("unit {unit}: {why}"));
                stand.remove(&unit);
                self.answered.remove(&unit);
                self.awaited.remove(&unit);
            }
        }
    }

    /// The result; of a check, how many have answered and have not ended since.
    pub fn done(mut self) -> Done {
        if self.word == Word::Check {
            self.done.good = self.answered.len();
        }
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(word: Word, units: usize, all: Vec<(usize, What)>) -> (Tally, BTreeSet<usize>) {
        let mut stand: BTreeSet<usize> = (0..units).collect();
        let mut tally = Tally::new(word, stand.clone(), units);
        for (unit, what) in all {
            tally.hear(Told { unit, what }, &mut stand);
        }
        (tally, stand)
    }

    #[test]
    fn only_those_that_answered_and_stay_are_alive() {
        let gone = || What::Ended("end of file".to_owned());
        let (tally, stand) = heard(
            Word::Check,
            4,
            vec![
                // One ended long before.
                (0, gone()),
                (1, What::Lives),
                (1, What::Checked),
                // One answers, and ends when it has been counted.
                (2, What::Lives),
                (2, What::Checked),
                (2, gone()),
                // One says nothing.
            ],
        );
        assert_eq!(tally.awaited(), 1);
        assert_eq!(tally.done().good, 1);
        assert_eq!(stand, BTreeSet::from([1, 3]));
    }

    #[test]
    fn echoes_count_though_others_of_the_unit_do_not_come() {
        let (tally, _) = heard(
            Word::Check,
            1,
            vec![
                (0, What::Asks(3)),
                (0, What::Lives),
                (0, What::Echoed),
                (0, What::Echoed),
            ],
        );
        let awaited = tally.awaited();
        let done = tally.done();
        assert_eq!((awaited, done.good, done.asked, done.echoed), (1, 1, 3, 2));
    }

    #[test]
    fn an_answer_to_another_order_is_none_to_this() {
        let opened = What::Opened {
            streams: 9,
            refused: None,
        };
        let (tally, _) = heard(Word::Check, 1, vec![(0, opened)]);
        assert_eq!((tally.awaited(), tally.done().good), (1, 0));
    }
}
