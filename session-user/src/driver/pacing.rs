//! How fast the session's transports send: limits that follow what their paths carry, and the congestion
//! control for what they do.

use std::time::{Duration, Instant};

use session_proto::session::Handle;
use socket2::SockRef;
use tokio::net::TcpStream;

use super::Driver;
use super::carrier::{Carrier, Path};
use crate::transport::{Congestion, Paced, Pacing, TransportOptions, pace};

/// When to see whether a transport in bulk rests.
const REST_LOOK: Duration = Duration::from_millis(30);
/// Paths whose rate is remembered.
const RATES_MAX: usize = 64;

impl Driver {
    /// A new transport starts at the rate that its path had when it was last used, or at what the session
    /// sends now: more would only overrun a queue that nobody has seen yet.
    pub(super) fn first_pacing(&self, socket: &TcpStream, path: &Path) -> Pacing {
        let pacing = Pacing::new(self.known_rate(path), Instant::now());
        if let Some(limit) = pacing.limit() {
            tell_pace(socket, Paced::at(limit), &self.common.transport);
        }
        pacing
    }

    fn known_rate(&self, path: &Path) -> Option<u64> {
        let key = (path.local.ip(), path.remote.ip());
        self.rates.get(&key).copied().or(self.session_rate)
    }

    /// `handle` has taken more. Looks at how it is doing, if it is time.
    pub(super) fn pace(&mut self, handle: Handle) {
        let now = Instant::now();
        let auto = self.common.transport.congestion == Congestion::Auto;
        let Some(carrier) = self.carriers.get_mut(&handle) else {
            return;
        };
        if !carrier.pacing.is_due(carrier.bytes_out, now) {
            return;
        }
        let Some(info) = carrier.look() else { return };
        let window = info.snd_cwnd as usize * info.snd_mss as usize;
        self.session.assume_window(handle, window);
        let paced = carrier.pacing.look(&info, carrier.bytes_out, now);
        tracing::trace!(
            link = %carrier.path.link,
            rtt = ?info.rtt,
            min_rtt = ?info.min_rtt,
            delivery_rate = info.delivery_rate,
            app_limited = info.app_limited,
            cwnd = info.snd_cwnd,
            unacked = info.unacked,
            notsent = info.notsent,
            queued = self.session.queued_bytes(handle),
            pacing = ?carrier.pacing,
            "a transport's rate"
        );
        let lossy = carrier.losses.look(&info);
        let in_bulk = auto && !lossy;
        carrier.set_bulk(in_bulk);
        if carrier.in_bulk {
            // Until it rests.
            carrier.watch_at.get_or_insert(now + REST_LOOK);
        }
        let Some(paced) = paced else { return };
        let key = (carrier.path.local.ip(), carrier.path.remote.ip());
        let rate = carrier.pacing.rate();
        if let Some(rate) = rate
            && (self.rates.len() < RATES_MAX || self.rates.contains_key(&key))
        {
            self.rates.insert(key, rate);
        }
        if !self.pace_pair(handle)
            && let Some(carrier) = self.carriers.get_mut(&handle)
        {
            carrier.pacing.part();
            let socket = &carrier.socket;
            tell_pace(socket, paced, &self.common.transport);
        }
        if self.carrying == Some(handle) {
            self.session_rate = rate;
            self.prepare_standbys();
        }
    }

    /// Where redundant records go over `handle` and another one, neither may lag: both go at the pace of the
    /// slower one, and a little below what its link carries, so that no queue stands in front of either.
    /// One that is far slower does not count. False: there is no such pair.
    fn pace_pair(&mut self, handle: Handle) -> bool {
        let Some(pair) = self.session.pair().filter(|pair| pair.contains(&handle)) else {
            return false;
        };
        let limits = pair.map(|h| self.carriers.get(&h).and_then(|c| c.pacing.limit()));
        let [Some(one), Some(two)] = limits else {
            return false;
        };
        let common = one.min(two);
        if common < one.max(two) / 2 {
            return false;
        }
        for handle in pair {
            let told = (self.carriers.get_mut(&handle)).map(|c| c.pacing.pair(common));
            if let (Some(paced), Some(carrier)) = (told, self.carriers.get(&handle)) {
                tell_pace(&carrier.socket, paced, &self.common.transport);
            }
        }
        true
    }

    /// Redundant streams may go over other transports now, or none may be left.
    pub(super) fn follow_pair(&mut self) {
        let pair = self.session.pair();
        if pair == self.paired {
            return;
        }
        let before = std::mem::replace(&mut self.paired, pair);
        for handle in before.into_iter().flatten() {
            if let Some(carrier) = self.carriers.get_mut(&handle) {
                carrier.pacing.part();
                if let Some(limit) = carrier.pacing.limit() {
                    tell_pace(&carrier.socket, Paced::at(limit), &self.common.transport);
                }
            }
        }
        if let Some([one, _]) = pair {
            self.pace_pair(one);
        }
    }

    /// What a silent transport may have swallowed goes out on a standby all at once: it must not overrun
    /// its link's queue just then.
    fn prepare_standbys(&mut self) {
        let idle = |h: &Handle| self.carrying != Some(*h);
        let unprepared: Vec<Handle> = (self.carriers.iter())
            .filter(|(h, c)| idle(h) && c.pacing.limit().is_none())
            .map(|(&h, _)| h)
            .collect();
        for handle in unprepared {
            self.adopt_rate(handle);
        }
    }

    /// An idle transport, or one that has just begun to carry, begins at the rate of its path or of the
    /// session.
    pub(super) fn adopt_rate(&mut self, handle: Handle) {
        let known = (self.carriers.get(&handle)).and_then(|c| self.known_rate(&c.path));
        let Some(carrier) = self.carriers.get_mut(&handle) else {
            return;
        };
        let adopted = known.and_then(|rate| carrier.pacing.adopt(rate));
        if let (Some(paced), Some(carrier)) = (adopted, self.carriers.get(&handle)) {
            tell_pace(&carrier.socket, paced, &self.common.transport);
        }
    }
}

impl Carrier {
    /// In bulk cubic, which under a limit that keeps the queue short has nothing to lose; bbr otherwise,
    /// whose window outlives idleness, but which all but stops every 10 s to measure a round trip.
    pub(super) fn set_bulk(&mut self, in_bulk: bool) {
        if self.in_bulk == in_bulk {
            return;
        }
        self.in_bulk = in_bulk;
        let name = if in_bulk {
            Congestion::BULK
        } else {
            Congestion::IDLE
        };
        if let Err(error) = SockRef::from(&self.socket).set_tcp_congestion(name.as_bytes()) {
            tracing::debug!(%error, name, "a transport's congestion control could not be changed");
        }
    }
}

fn tell_pace(socket: &TcpStream, paced: Paced, options: &TransportOptions) {
    if let Err(error) = pace(socket, paced, options) {
        tracing::debug!(%error, "a transport's rate could not be limited");
    }
}
