//! Renewal of keys and certificates inside the session, and what follows from an identity that is
//! no longer good.

use std::time::{Duration, Instant, SystemTime};

use session_proto::seal::Secret;
use session_proto::wire::close_code;

use super::{Driver, Side};
use crate::handshake::{HandshakeError, TlsDriver, TlsState, check_still_valid};

/// A renewal that takes longer, while a transport stands, has failed. Its few kilobytes wait behind
/// what the session has queued, which on a slow link can be minutes.
const REAUTH_TIMEOUT: Duration = Duration::from_secs(600);
/// How long after a failed renewal the next is tried.
const REAUTH_RETRY: Duration = Duration::from_secs(60);
/// A certificate is renewed when this part of an hour is left of it, at the latest.
const BEFORE_EXPIRY: Duration = Duration::from_secs(300);
/// Identities are judged again this often (RFC 5280's nextUpdate is the CRL's own affair).
const CHECK_EVERY: Duration = Duration::from_secs(3600);

/// An in-band TLS handshake under way.
pub(super) struct Reauthentication {
    tls: TlsDriver,
    give_up_at: Instant,
    done: bool,
}

/// When identities and keys are to be looked at next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    pub check_at: Instant,
    pub renew_at: Option<Instant>,
}

impl Schedule {
    pub fn new(now: Instant) -> Self {
        Self {
            check_at: now + CHECK_EVERY,
            renew_at: None,
        }
    }
}

impl Driver {
    /// The initiator renews when the keys are old, and before either certificate expires.
    pub(super) fn plan_renewal(&mut self) {
        let now = Instant::now();
        let mut renew_at = self.keys_since + self.common.reauth_after;
        for not_after in [Some(self.peer.not_after), self.common.identity.not_after()]
            .into_iter()
            .flatten()
        {
            let left = not_after
                .duration_since(SystemTime::now())
                .unwrap_or_default();
            // Short-lived certificates: half of what is left, so that a retry still fits.
            let early = left.saturating_sub(BEFORE_EXPIRY).max(left / 2);
            renew_at = renew_at.min(now + early);
        }
        let initiator = matches!(self.side, Side::Initiator(_));
        self.schedule.renew_at = initiator.then_some(renew_at);
    }

    pub(super) fn reauth_deadline(&self) -> Option<Instant> {
        let give_up = self
            .reauth
            .as_ref()
            .filter(|r| !r.done)
            .map(|r| r.give_up_at);
        let renew = self.schedule.renew_at.filter(|_| self.reauth.is_none());
        [give_up, renew, Some(self.schedule.check_at)]
            .into_iter()
            .flatten()
            .min()
    }

    pub(super) fn reauth_tick(&mut self, now: Instant) {
        if now >= self.schedule.check_at {
            self.schedule.check_at = now + CHECK_EVERY;
            self.check_identity();
        }
        let adrift = self.adrift_since.is_some();
        let late = |r: &&mut Reauthentication| !r.done && now >= r.give_up_at;
        if let Some(reauth) = self.reauth.as_mut().filter(late) {
            // An outage is not the renewal's fault: the session is held, and it goes on afterwards.
            reauth.give_up_at = now + REAUTH_TIMEOUT;
            if !adrift {
                self.session.close(
                    self.clock.now(),
                    close_code::REAUTH_FAILED,
                    "the renewal of keys was not completed",
                );
            }
        }
        if self.reauth.is_none() && self.schedule.renew_at.is_some_and(|t| now >= t) {
            self.schedule.renew_at = Some(now + REAUTH_RETRY);
            self.begin_reauth();
        }
    }

    fn begin_reauth(&mut self) {
        let Side::Initiator(initiator) = &self.side else {
            return;
        };
        // A handshake needs the peer; while none is to be had it would only fill the session's memory.
        if self.adrift_since.is_some() || self.session.reauth_begin().is_none() {
            return;
        }
        let name = &initiator.config.peer_name;
        match TlsDriver::reauth_client(&self.common.identity, name, self.session.id()) {
            Ok(tls) => {
                self.reauth = Some(Reauthentication {
                    tls,
                    give_up_at: Instant::now() + REAUTH_TIMEOUT,
                    done: false,
                });
                self.advance_reauth();
            }
            Err(error) => self.reauth_failed(&error),
        }
    }

    pub(super) fn reauth_data(&mut self, data: &[u8]) {
        if self.reauth.is_none() {
            match TlsDriver::reauth_server(&self.common.identity, self.session.id()) {
                Ok(tls) => {
                    let give_up_at = Instant::now() + REAUTH_TIMEOUT;
                    self.reauth = Some(Reauthentication {
                        tls,
                        give_up_at,
                        done: false,
                    });
                }
                Err(error) => return self.reauth_failed(&error),
            }
        }
        let Some(reauth) = &mut self.reauth else {
            return;
        };
        let fed = reauth.tls.feed(data);
        self.advance_reauth();
        if let Err(error) = fed {
            self.reauth_failed(&error);
        }
    }

    /// Sends what TLS has to say, and hands its outcome to the core.
    fn advance_reauth(&mut self) {
        let Some(reauth) = &mut self.reauth else {
            return;
        };
        let output = reauth.tls.take_output();
        if !output.is_empty() {
            self.session.reauth_send(&output);
        }
        if reauth.done || reauth.tls.state() != TlsState::Complete {
            return;
        }
        reauth.done = true;
        match reauth.tls.outcome() {
            Ok(outcome) if outcome.peer.name == self.peer.name => {
                self.peer = outcome.peer.clone();
                let secret = Secret::new(outcome.secret);
                self.session
                    .reauth_complete(self.clock.now(), outcome.aead, secret);
            }
            Ok(outcome) => {
                let name = &outcome.peer.name;
                tracing::error!(was = %self.peer.name, is = %name, "the peer's name changed in a renewal");
                self.session.close(
                    self.clock.now(),
                    close_code::REAUTH_FAILED,
                    "the identity changed in a renewal",
                );
            }
            Err(error) => self.reauth_failed(&error),
        }
    }

    fn reauth_failed(&mut self, error: &HandshakeError) {
        tracing::error!(peer = %self.peer.name, %error, "keys and certificates could not be renewed");
        self.session.close(
            self.clock.now(),
            close_code::REAUTH_FAILED,
            &error.to_string(),
        );
    }

    pub(super) fn reauthenticated(&mut self, generation: u16) {
        tracing::info!(peer = %self.peer.name, generation, "keys and certificates are renewed");
        self.reauth = None;
        self.keys_since = Instant::now();
        self.plan_renewal();
    }

    /// Whether the peer's certificate is still good: asked at every resume, hourly, and when the
    /// CRL was read anew.
    pub(super) fn check_peer(&self) -> Result<(), HandshakeError> {
        // Renewal may be late by the grace; revocation has none.
        let now = SystemTime::now();
        match check_still_valid(&self.common.identity, &self.peer, now) {
            Err(error) if error.is_expired() => {
                let grace_over = now >= self.peer.not_after + self.common.expiry_grace;
                if grace_over { Err(error) } else { Ok(()) }
            }
            other => other,
        }
    }

    pub(super) fn check_identity(&mut self) {
        if let Err(error) = self.check_peer() {
            self.close_for_identity(&error);
        } else if self.peer.not_after < SystemTime::now() + CHECK_EVERY {
            // Look again when the grace ends, not an hour later.
            let end = self.peer.not_after + self.common.expiry_grace;
            let left = end.duration_since(SystemTime::now()).unwrap_or_default();
            self.schedule.check_at = self
                .schedule
                .check_at
                .min(Instant::now() + left + Duration::from_secs(1));
        }
    }

    pub(super) fn close_for_identity(&mut self, error: &HandshakeError) {
        let code = if error.is_expired() {
            close_code::CERTIFICATE_EXPIRED
        } else {
            close_code::CERTIFICATE_REVOKED
        };
        tracing::error!(peer = %self.peer.name, %error, "the session is closed");
        self.session
            .close(self.clock.now(), code, &error.to_string());
    }
}
