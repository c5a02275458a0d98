//! The path MTU, found without ICMP (DPLPMTUD, RFC 8899): padded PINGs are the probes.

use crate::Time;
use crate::limits::{
    MTU_DOUBT_AFTER, MTU_RAISE_AFTER, MTU_STEP_BYTES, MTU_TRIES_MAX, UDP_BASE_BYTES, UDP_MIN_BYTES,
};

/// A size that is being tried.
#[derive(Debug)]
struct Probe {
    size: usize,
    /// One for each time that it went out.
    tokens: Vec<u64>,
    due: Time,
}

/// What is known of one path; sizes are bytes of UDP payload.
#[derive(Debug)]
pub(super) struct Mtu {
    /// What the link takes.
    link: usize,
    /// The largest size that is known to pass; 0: none is.
    confirmed: usize,
    /// The smallest that is known not to; one more than `link` while none is.
    ceiling: usize,
    /// Somebody has use for more.
    wanted: bool,
    probe: Option<Probe>,
    /// Larger sizes are tried again then.
    raise_at: Option<Time>,
    /// Since when packets above the base have gone out of which nothing shows that they arrive.
    large_since: Option<Time>,
}

impl Mtu {
    pub fn new(link: usize) -> Self {
        Self {
            link,
            confirmed: 0,
            ceiling: link + 1,
            wanted: false,
            probe: None,
            raise_at: None,
            large_since: None,
        }
    }

    /// What a packet may have.
    pub fn current(&self) -> usize {
        match self.confirmed {
            0 => self.base(),
            known => known,
        }
    }

    fn base(&self) -> usize {
        self.link.min(UDP_BASE_BYTES)
    }

    fn floor(&self) -> usize {
        self.link.min(UDP_MIN_BYTES)
    }

    /// The size of the PING with which a path is tried for the `nth` time, while nothing is known: the
    /// base, and now and then less. Afterwards its size does not matter.
    pub fn first_size(&self, nth: u32) -> usize {
        match (self.confirmed, nth) {
            (0, 2 | 4) => self.floor(),
            (0, _) => self.base(),
            _ => 0,
        }
    }

    /// A packet of `size` arrived.
    pub fn passes(&mut self, size: usize) {
        if size > self.confirmed && size >= self.floor() {
            self.confirmed = size.min(self.link);
            // What was less than the base was tried because the base did not pass.
            if size < self.base() {
                self.ceiling = self.ceiling.min(self.base());
            } else if self.ceiling <= size {
                self.ceiling = size + 1;
            }
        }
        if size > self.base() {
            self.large_since = None;
        }
    }

    /// A packet of `size` goes out, and nothing in it will tell whether it arrives.
    pub fn sends(&mut self, now: Time, size: usize) {
        // Of a probe for more, its own answer will tell.
        if size > self.base() && size <= self.confirmed {
            self.large_since.get_or_insert(now);
        }
    }

    /// A datagram did not fit.
    pub fn want(&mut self) {
        self.wanted = true;
    }

    /// Something that had `size` was not answered, and something small was.
    pub fn doubts(&mut self, now: Time, size: usize) {
        if size > self.floor() && size <= self.confirmed {
            self.large_since = Some(Time::from_nanos(
                now.as_nanos()
                    .saturating_sub(MTU_DOUBT_AFTER.as_nanos() as u64),
            ));
        }
    }

    /// The size to be probed now, if one is.
    pub fn next(&mut self, now: Time) -> Option<usize> {
        if self.confirmed == 0 || self.probe.is_some() {
            return None;
        }
        if self
            .large_since
            .is_some_and(|at| now.since(at) >= MTU_DOUBT_AFTER)
        {
            return Some(self.confirmed);
        }
        if self.raise_at.is_some_and(|at| now >= at) {
            self.raise_at = None;
            self.ceiling = self.link + 1;
        }
        if !self.wanted {
            return None;
        }
        // What the link takes is what most paths take.
        let size = if self.ceiling > self.link {
            self.link
        } else {
            self.confirmed.midpoint(self.ceiling)
        };
        let rest = self.ceiling - self.confirmed;
        (size > self.confirmed && (rest > MTU_STEP_BYTES || self.ceiling > self.link))
            .then_some(size)
    }

    /// A probe of `size` goes out.
    pub fn probes(&mut self, size: usize, token: u64, due: Time) {
        match self.probe.as_mut().filter(|p| p.size == size) {
            Some(probe) => {
                probe.tokens.push(token);
                probe.due = due;
            }
            None => {
                let tokens = vec![token];
                self.probe = Some(Probe { size, tokens, due });
            }
        }
    }

    /// A probe was answered; its size.
    pub fn answers(&mut self, token: u64) -> Option<usize> {
        let probe = self.probe.take_if(|p| p.tokens.contains(&token))?;
        self.large_since = None;
        self.passes(probe.size);
        Some(probe.size)
    }

    /// When a probe that is under way counts as lost.
    pub fn due(&self) -> Option<Time> {
        self.probe.as_ref().map(|p| p.due)
    }

    /// The probe was not answered in time: its size, if it is to be tried once more.
    pub fn missed(&mut self, now: Time) -> Option<usize> {
        let probe = self.probe.as_ref()?;
        if (probe.tokens.len() as u32) < MTU_TRIES_MAX {
            return Some(probe.size);
        }
        let size = probe.size;
        self.too_large(size);
        self.raise_at = Some(now + MTU_RAISE_AFTER);
        None
    }

    /// `size` does not pass: a probe showed it, or the kernel says so.
    pub fn too_large(&mut self, size: usize) {
        self.probe = None;
        self.ceiling = self.ceiling.min(size);
        if size <= self.confirmed {
            // A black hole: what passed does not pass any more.
            self.large_since = None;
            self.confirmed = match size {
                _ if size > self.base() => self.base(),
                _ => self.floor(),
            };
            self.ceiling = self.ceiling.max(self.confirmed + 1);
        }
    }

    /// Nothing is being sent any more.
    pub fn rest(&mut self) {
        self.probe = None;
        self.large_since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Searches on a path that takes `path` bytes; with the number of probes.
    fn search(link: usize, path: usize) -> (usize, u32) {
        let mut mtu = Mtu::new(link);
        let base = mtu.first_size(0);
        assert_eq!(mtu.current(), base);
        mtu.passes(if base <= path {
            base
        } else {
            mtu.first_size(2)
        });
        mtu.want();
        let (mut now, mut probes) = (Time::ZERO, 0);
        let mut again = None;
        while let Some(size) = again.take().or_else(|| mtu.next(now)) {
            probes += 1;
            assert!(probes < 60 && size <= link);
            now = now + Duration::from_millis(100);
            mtu.probes(size, probes, now);
            if size <= path {
                assert_eq!(mtu.answers(u64::from(probes as u32)), Some(size));
            } else {
                again = mtu.missed(now);
            }
        }
        (mtu.current(), probes as u32)
    }

    #[test]
    fn the_search_ends_close_below_what_the_path_takes() {
        for (link, path) in [(1472, 1472), (8972, 8972), (1472, 1400), (8972, 1452)] {
            let (found, _) = search(link, path);
            assert!(
                found <= path && path - found < MTU_STEP_BYTES,
                "{link} {path}: {found}"
            );
        }
        assert_eq!(search(1472, 1472), (1472, 1));
        let (small, _) = search(1472, 900);
        assert!((884..=900).contains(&small), "{small}");
        assert_eq!(search(1100, 1100), (1100, 0), "the link's own base");
    }

    #[test]
    fn a_black_hole_leads_back_to_the_base_and_then_up_again() {
        let mut mtu = Mtu::new(1472);
        mtu.passes(1200);
        mtu.want();
        let now = Time::ZERO;
        let size = mtu.next(now).unwrap();
        mtu.probes(size, 1, now);
        mtu.answers(1);
        assert_eq!(mtu.current(), 1472);
        mtu.sends(now, 1472);
        assert_eq!(mtu.next(now), None);
        let later = now + MTU_DOUBT_AFTER;
        assert_eq!(mtu.next(later), Some(1472));
        for token in 2..=4 {
            mtu.probes(1472, token, later);
            assert_eq!(mtu.missed(later), (token < 4).then_some(1472));
        }
        assert_eq!(mtu.current(), 1200);
        assert_eq!(mtu.next(later), Some(1336));
        mtu.probes(1336, 5, later);
        mtu.answers(5);
        while let Some(size) = mtu.next(later) {
            mtu.too_large(size);
        }
        assert_eq!(mtu.current(), 1336);
    }

    #[test]
    fn larger_sizes_are_tried_again_after_a_while() {
        let mut mtu = Mtu::new(1472);
        mtu.passes(1200);
        mtu.want();
        let now = Time::ZERO;
        for token in 0..3 {
            mtu.sends(now, 1472);
            mtu.probes(1472, token, now);
            let _ = mtu.missed(now);
        }
        assert_eq!(mtu.next(now + MTU_DOUBT_AFTER * 2), Some(1336));
        while let Some(size) = mtu.next(now) {
            mtu.too_large(size);
        }
        assert_eq!(mtu.next(now + MTU_RAISE_AFTER), Some(1472));
    }

    #[test]
    fn what_the_kernel_refuses_is_not_tried_again_at_once() {
        let mut mtu = Mtu::new(1472);
        mtu.passes(1472);
        mtu.too_large(1472);
        assert_eq!(mtu.current(), 1200);
        mtu.too_large(1200);
        assert_eq!(mtu.current(), 548);
    }
}
