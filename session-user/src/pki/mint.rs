//! Identities by the thousand, for whoever plays a fleet.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{Issuer, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{Folder, Ledger, PkiError, certify};
use crate::handshake::PeerName;

/// A certificate and its key, in memory alone.
pub struct Minted {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// The key.
    pub key: PrivateKeyDer<'static>,
}

/// A CA whose key has been read once. What it issues is written down nowhere, so that it cannot be revoked: it is for
/// tests of load, not for units.
pub struct Mint {
    issuer: Issuer<'static, KeyPair>,
    domain: String,
}

impl Mint {
    /// The CA in the folder `dir`.
    pub fn open(dir: &Path) -> Result<Self, PkiError> {
        let paths = Folder(dir);
        Ok(Self {
            issuer: paths.issuer()?,
            domain: Ledger::load(&paths.ledger())?.trust_domain,
        })
    }

    /// A certificate for `unit`, valid for `validity` from `now` on.
    pub fn issue(
        &self,
        unit: &str,
        validity: Duration,
        now: SystemTime,
    ) -> Result<Minted, PkiError> {
        let unit =
            PeerName::parse(unit, &self.domain).map_err(|e| PkiError::Name(e.to_string()))?;
        let (made, key, _) = certify(&self.issuer, &unit, validity, now)?;
        Ok(Minted {
            certificate: made.der().clone(),
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        })
    }
}
