//! What the lab's links carry at most.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

/// The links' rates in Mbit/s: that of wifi0, then that of lte0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rates {
    each: [u32; 2],
}

/// What was typed is no rate of links.
#[derive(Debug, thiserror::Error)]
#[error("expected Mbit/s of both links, as in `50`, or of each, as in `20,30`")]
pub struct RatesError;

impl Rates {
    /// One for each link.
    pub const fn new(each: [u32; 2]) -> Self {
        Self { each }
    }

    /// The same for both.
    pub const fn both(rate: u32) -> Self {
        Self::new([rate, rate])
    }

    /// In the order of the links.
    pub const fn each(self) -> [u32; 2] {
        self.each
    }

    /// What both carry together.
    pub fn sum(self) -> f64 {
        self.each.map(f64::from).iter().sum()
    }

    /// For a row: the first, and all of them where they are not one.
    pub fn fields(self) -> (u32, Option<[u32; 2]>) {
        let [first, second] = self.each;
        (first, (first != second).then_some(self.each))
    }
}

impl FromStr for Rates {
    type Err = RatesError;

    fn from_str(text: &str) -> Result<Self, RatesError> {
        let rate = |word: &str| {
            let rate: Result<NonZeroU32, _> = word.trim().parse();
            rate.map(NonZeroU32::get).map_err(|_| RatesError)
        };
        match text.split_once(',') {
            None => Ok(Self::both(rate(text)?)),
            Some((first, second)) => Ok(Self::new([rate(first)?, rate(second)?])),
        }
    }
}

/// For people: `50`, or `20 + 30`.
impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fields() {
            (one, None) => write!(f, "{one}"),
            (_, Some([first, second])) => write!(f, "{first} + {second}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rate_is_both_links() -> Result<(), RatesError> {
        assert_eq!("50".parse::<Rates>()?, Rates::both(50));
        assert_eq!("20,30".parse::<Rates>()?, Rates::new([20, 30]));
        assert_eq!(Rates::both(50).to_string(), "50");
        assert_eq!(Rates::new([20, 30]).to_string(), "20 + 30");
        assert_eq!(Rates::new([20, 30]).fields(), (20, Some([20, 30])));
        assert_eq!(Rates::both(50).fields(), (50, None));
        Ok(())
    }

    #[test]
    fn what_is_no_rate_is_refused() {
        for text in ["", "0", "20,", "20,30,40", "20,0", "x"] {
            assert!(text.parse::<Rates>().is_err(), "{text}");
        }
    }
}
