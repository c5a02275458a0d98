//! Who a certificate is for: a trust domain and a name, in the form of a SPIFFE ID.

use std::fmt;
use std::time::{Duration, SystemTime};

use ring::digest;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// A unit's identity: it outlives its certificates.
///
/// The certificate carries it as a URI subject alternative name, `spiffe://DOMAIN/NAME`
/// (SPIFFE-ID specification, section 2), so that SVIDs made elsewhere serve as they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerName {
    /// Who vouches, such as `fleet.example`.
    pub domain: String,
    /// The unit, such as `lorry-17`; may contain slashes.
    pub name: String,
}

/// Why text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a unit's name: expected letters, digits, `.`, `-`, `_` or `/`, or spiffe://DOMAIN/NAME"
)]
pub struct NameError(pub String);

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Units of one trust domain only meet each other, so the name alone tells them apart.
        f.write_str(&self.name)
    }
}

impl PeerName {
    /// From a name alone (then in `domain`), or from a whole SPIFFE ID.
    pub fn parse(text: &str, domain: &str) -> Result<Self, NameError> {
        let (domain, name) = match text.strip_prefix("spiffe://") {
            Some(id) => id
                .split_once('/')
                .ok_or_else(|| NameError(text.to_owned()))?,
            None => (domain, text),
        };
        if !Self::domain_is_valid(domain) || !Self::name_is_valid(name) {
            return Err(NameError(text.to_owned()));
        }
        Ok(Self {
            domain: domain.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Whether `domain` can be a trust domain (SPIFFE-ID section 2.1).
    pub fn domain_is_valid(domain: &str) -> bool {
        let allowed =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
        !domain.is_empty() && domain.len() <= 255 && domain.chars().all(allowed)
    }

    /// Whether `name` can be a path (SPIFFE-ID section 2.2).
    pub fn name_is_valid(name: &str) -> bool {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let segment = |s: &str| !s.is_empty() && s != "." && s != ".." && s.chars().all(allowed);
        name.len() <= 1024 && name.split('/').all(segment)
    }

    /// The SPIFFE ID.
    pub fn uri(&self) -> String {
        format!("spiffe://{}/{}", self.domain, self.name)
    }
}

/// What a certificate is used for in a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Usage {
    Server,
    Client,
}

/// What a peer's certificate says, and the certificate, to judge it again later.
#[derive(Clone, Debug)]
pub struct PeerIdentity {
    /// Who it is.
    pub name: PeerName,
    /// Its serial number, in hexadecimal.
    pub serial: String,
    /// When it expires.
    pub not_after: SystemTime,
    /// SHA-256 of the certificate.
    pub fingerprint: [u8; 32],
    pub(super) leaf: CertificateDer<'static>,
    pub(super) intermediates: Vec<CertificateDer<'static>>,
    pub(super) usage: Usage,
}

impl PeerIdentity {
    pub(super) fn of(chain: &[CertificateDer<'_>], usage: Usage) -> Result<Self, String> {
        let (leaf, intermediates) = chain.split_first().ok_or("there is no certificate")?;
        let (_, cert) =
            X509Certificate::from_der(leaf).map_err(|e| format!("it cannot be parsed: {e}"))?;
        let not_after = u64::try_from(cert.validity().not_after.timestamp()).unwrap_or(0);
        Ok(Self {
            name: name_of(&cert)?,
            serial: cert.raw_serial_as_string().replace(':', ""),
            not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(not_after),
            fingerprint: sha256(leaf),
            leaf: leaf.clone().into_owned(),
            intermediates: intermediates
                .iter()
                .map(|c| c.clone().into_owned())
                .collect(),
            usage,
        })
    }
}

/// The one SPIFFE ID among the subject alternative names (X509-SVID section 2: exactly one URI).
fn name_of(cert: &X509Certificate<'_>) -> Result<PeerName, String> {
    let names = cert
        .subject_alternative_name()
        .map_err(|e| format!("its names cannot be parsed: {e}"))?;
    let names = names.ok_or("it has no subject alternative name")?;
    let mut uris = names.value.general_names.iter().filter_map(|n| match n {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let uri = uris
        .next()
        .ok_or("it has no URI name (spiffe://DOMAIN/NAME)")?;
    if uris.next().is_some() {
        return Err("it has more than one URI name".to_owned());
    }
    if !uri.starts_with("spiffe://") {
        return Err(format!("its name `{uri}` is not spiffe://DOMAIN/NAME"));
    }
    PeerName::parse(uri, "").map_err(|e| e.to_string())
}

/// SHA-256.
pub(super) fn sha256(data: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, data).as_ref());
    out
}
