//! The full handshake: TLS 1.3 with mutual authentication, from a well-kept library.
//!
//! 1. [`Identity`] holds this unit's certificate, key, CA and CRL.
//! 2. [`connect`] or [`accept`] runs TLS over a socket and takes from it not one byte too many.
//! 3. [`Outcome`] is what is left: a secret for our own record layer and who the peer is.
//! 4. A TLS 1.3 client is done before the server has judged its certificate; [`Tail`] stays until
//!    the server's first record opens, so that a refusal still names its reason.
//! 5. [`TlsDriver`] runs the same handshake without a socket, for renewal inside a session.

mod error;
mod identity;
mod io;
mod name;
mod suites;
#[cfg(test)]
mod tests;
mod tls;
mod verify;

pub use error::{CertificateFault, HandshakeError};
pub use identity::{Identity, IdentityError, IdentityPaths};
pub use io::{Tail, accept, connect};
pub use name::{NameError, PeerIdentity, PeerName};
pub use suites::aes_in_hardware;
pub use tls::{Outcome, TlsDriver, TlsState};

use std::time::SystemTime;

/// Whether the certificate that `peer` showed is still good: not expired, not revoked by the CRL
/// as it is now. Asked at every resume, hourly, and when the CRL was read anew.
pub fn check_still_valid(
    identity: &Identity,
    peer: &PeerIdentity,
    now: SystemTime,
) -> Result<(), HandshakeError> {
    let judge = |at| identity.judge(&peer.leaf, &peer.intermediates, at, peer.usage);
    let verdict = match judge(now) {
        // Time is looked at first. An expired certificate may have some grace, a revoked one none.
        Err(CertificateFault::Expired) => match judge(peer.not_after) {
            Ok(()) => Err(CertificateFault::Expired),
            worse => worse,
        },
        verdict => verdict,
    };
    verdict.map_err(HandshakeError::Peer)
}
