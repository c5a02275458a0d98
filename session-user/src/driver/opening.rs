//! Transports whose first bytes go in the SYN (TCP Fast Open, RFC 7413).
//!
//! Where the kernel holds a cookie of the peer's, connect() returns before anything was sent, and proves
//! nothing. The transport gets its preamble, RESUME and records all the same, for they are what goes in
//! the SYN; until the kernel says that the peer's host has answered, it is an attempt in all else: it has
//! the time of a dial, ends as a dial does, and counts as one. A path on which such an attempt does not
//! come up is dialled without next, for there are boxes that drop a SYN with data. The kernel does not
//! remember that by itself (`net.ipv4.tcp_fastopen_blackhole_timeout_sec` is 0 by default), and sends the
//! SYN again, without the data, only after a second.

use std::io::{self, IoSlice};
use std::time::{Duration, Instant};

use session_proto::session::{Handle, Stats};

use super::carrier::{CarrierEnd, Path};
use super::{Driver, Side};
use crate::policy::PathHistory;
use crate::transport::{DialSpec, TransportError, tcp_info};

/// Bytes in a SYN, at most. With IPv6 and TCP headers and all of TCP's options these are 1280, which every
/// path carries: a dial must not fail for its size where it would not have failed before.
const SYN_BYTES: usize = 1180;
/// The kernel sends a SYN again after 1 s (RFC 6298 section 2.1): what comes up later had lost it.
const SYN_AGAIN: Duration = Duration::from_millis(950);

/// What is known of a transport whose SYN has not been answered.
pub(super) struct Opening {
    /// How it was dialled.
    pub spec: DialSpec,
    /// It was not dialled to carry.
    pub standby: bool,
}

impl Driver {
    /// `handle` has just been added, and its SYN goes out with its first bytes.
    pub(super) fn await_opening(&mut self, handle: Handle, opening: Opening) {
        if let Some(carrier) = self.carriers.get_mut(&handle) {
            carrier.must_be_up_by = Some(Instant::now() + opening.spec.timeout);
            let carries = !opening.standby;
            carrier.opening = Some(opening);
            if carries {
                // Where nothing but RESUME is to be sent, no record would show that it is not answered:
                // other paths are tried then, and this one without data, before the SYN's second turn.
                self.session.doubt(self.clock.now(), handle);
            }
        }
    }

    /// Looks whether the SYN of `handle` has been answered by now. True if so.
    pub(super) fn opened(&mut self, handle: Handle) -> bool {
        let Some(carrier) = self.carriers.get_mut(&handle) else {
            return false;
        };
        let Some(info) = carrier.look().filter(|info| !info.is_opening()) else {
            return false;
        };
        let Some(opening) = carrier.opening.take() else {
            return true;
        };
        let now = Instant::now();
        let took = now.saturating_duration_since(carrier.since);
        carrier.since = now;
        let timeout = self.common.resume_timeout;
        carrier.must_be_up_by = carrier.must_be_up_by.map(|_| now + timeout);
        if took >= SYN_AGAIN {
            // The path has just lost a small packet: what is lost next says nothing of size.
            carrier.swallow_at = None;
        }
        let path = carrier.path.clone();
        self.learn_from_kernel(handle);
        tracing::info!(
            link = %path.link,
            remote = %path.remote,
            syn_data = info.syn_data,
            ?took,
            "a transport is open"
        );
        if let Some(history) = self.history() {
            if info.syn_data {
                history.record_fast_open(&path.link, path.remote);
            } else if took >= SYN_AGAIN {
                history.record_unopened(&path.link, path.remote, now);
            }
        }
        if info.syn_data && !opening.standby && self.report.awaits(handle) {
            self.report.remark("RESUME went in the SYN");
        }
        true
    }

    /// What the kernel knows of a connection that is made.
    pub(super) fn learn_from_kernel(&mut self, handle: Handle) {
        let Some(info) = (self.carriers.get(&handle)).and_then(|c| tcp_info(&c.socket).ok()) else {
            return;
        };
        if info.is_opening() {
            return;
        }
        // It has measured its handshake.
        if !info.rtt.is_zero() {
            self.session.assume_rtt(handle, info.rtt);
        }
        let window = info.snd_cwnd as usize * info.snd_mss as usize;
        self.session.assume_window(handle, window);
    }

    /// The SYN of a transport on `path` was not answered, or answered with no: a dial has failed.
    pub(super) fn opening_failed(
        &mut self,
        path: &Path,
        opening: &Opening,
        was_active: bool,
        end: &CarrierEnd,
        before: &Stats,
    ) {
        if was_active {
            self.moved(before);
        }
        let error = opening.error(end);
        tracing::info!(link = %path.link, remote = %path.remote, %error, "a dial failed");
        if let Some(history) = self.history() {
            // Whatever the reason: each such attempt uses up one of the names that the peer expects.
            history.record_unopened(&path.link, path.remote, Instant::now());
        }
        self.path_failed(&path.link, path.remote, error.is_refused(), opening.standby);
    }

    /// `handle` has stayed silent. If nobody has even answered its SYN, a dial has failed.
    pub(super) fn note_unopened(&mut self, handle: Handle) {
        let Some(path) = (self.carriers.get(&handle))
            .filter(|c| c.opening.is_some())
            .map(|c| c.path.clone())
        else {
            return;
        };
        if self.opened(handle) {
            return;
        }
        if let Some(history) = self.history() {
            history.record_unopened(&path.link, path.remote, Instant::now());
        }
    }

    pub(super) fn history(&mut self) -> Option<&mut PathHistory> {
        match &mut self.side {
            Side::Initiator(initiator) => Some(&mut initiator.history),
            Side::Responder(_) => None,
        }
    }
}

impl Opening {
    /// The same error as a dial's.
    fn error(&self, end: &CarrierEnd) -> TransportError {
        let error = match end {
            CarrierEnd::Late => return TransportError::timeout(&self.spec),
            CarrierEnd::Io(error) => match error.raw_os_error() {
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => io::Error::new(error.kind(), error.to_string()),
            },
            other => io::Error::other(other.to_string()),
        };
        TransportError::of(&self.spec, error)
    }
}

/// Whether `end` says that a connection had been made: what breaks then proves nothing about the peer.
pub(super) fn had_opened(end: &CarrierEnd) -> bool {
    let broken = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::ECONNRESET | libc::EPIPE));
    match end {
        CarrierEnd::Io(error) => broken(error),
        CarrierEnd::Late => false,
        CarrierEnd::Eof | CarrierEnd::Fault(_) | CarrierEnd::Swallowed => true,
    }
}

/// The beginning of `slices` that goes in a SYN.
pub(super) fn in_syn(slices: &[IoSlice<'_>]) -> Vec<u8> {
    let bytes = slices.iter().flat_map(|slice| slice.iter().copied());
    bytes.take(SYN_BYTES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opening() -> Opening {
        Opening {
            spec: DialSpec {
                device: Some("lte0".to_owned()),
                source: None,
                remote: "192.0.2.1:7843".parse().unwrap(),
                timeout: Duration::from_secs(3),
                segment: None,
                fast_open: true,
            },
            standby: false,
        }
    }

    fn end(errno: i32) -> CarrierEnd {
        CarrierEnd::Io(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn an_attempt_ends_with_the_errors_of_a_dial() {
        let opening = opening();
        let error = |e: &CarrierEnd| opening.error(e);
        assert!(error(&end(libc::ECONNREFUSED)).is_refused());
        assert!(matches!(
            error(&CarrierEnd::Late),
            TransportError::Timeout { after, .. } if after == Duration::from_secs(3)
        ));
        for errno in [libc::EHOSTUNREACH, libc::ENETUNREACH] {
            let error = error(&end(errno));
            assert!(matches!(error, TransportError::Link { .. }), "{error}");
        }
        // Without an errno, too.
        let other = CarrierEnd::Io(io::Error::other("other"));
        assert!(matches!(error(&other), TransportError::Io { .. }));
    }

    #[test]
    fn what_breaks_after_an_answer_is_no_failed_dial() {
        assert!(had_opened(&end(libc::ECONNRESET)) && had_opened(&CarrierEnd::Eof));
        assert!(!had_opened(&end(libc::ECONNREFUSED)) && !had_opened(&CarrierEnd::Late));
    }

    #[test]
    fn a_syn_takes_what_every_path_carries() {
        let slices = [IoSlice::new(&[1; 600]), IoSlice::new(&[2; 9000])];
        let bytes = in_syn(&slices);
        assert_eq!(bytes.len(), SYN_BYTES);
        assert!(bytes[..600].iter().all(|b| *b == 1) && bytes[600..].iter().all(|b| *b == 2));
        assert_eq!(in_syn(&slices[..1]).len(), 600);
    }
}
