//! A private CA: what `holdfast pki init | issue | revoke` do.
//!
//! A folder holds the CA: `ca.crt`, `ca.key` (readable by its owner alone), `crl.pem`, and
//! `issued.toml`, the list of what was issued and revoked, from which the CRL is made. Keys are
//! Ed25519: smaller and cheaper in a handshake than P-256.

mod files;
mod ledger;
mod mint;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, PKCS_ED25519, RevocationReason, RevokedCertParams, SanType, SerialNumber,
    string::Ia5String,
};
use ring::rand::{SecureRandom, SystemRandom};
use time::OffsetDateTime;

use crate::handshake::PeerName;
use ledger::{Entry, Ledger};
pub use mint::{Mint, Minted};

/// Certificates are valid from a little before now: clocks differ.
const BACKDATE: Duration = Duration::from_secs(3600);
/// The CRL says that a newer one comes within this time.
const CRL_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long a CA made by `init` is valid unless said otherwise.
pub const CA_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long a certificate made by `issue` is valid unless said otherwise.
pub const UNIT_VALIDITY: Duration = Duration::from_secs(365 * 24 * 3600);

/// Why the CA could not do it.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file is in the way.
    #[error("{} exists already; nothing was changed (use --force to replace it)", .0.display())]
    Exists(PathBuf),
    /// A file cannot be used.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Not a name that a unit can have.
    #[error("{0}")]
    Name(String),
    /// Nothing by this name or serial was issued here.
    #[error(
        "nothing issued here is called `{0}`: give a unit's name, a serial number, or a certificate file"
    )]
    Unknown(String),
    /// The library could not do it.
    #[error("the certificate could not be made: {0}")]
    Make(#[from] rcgen::Error),
}

/// What was issued.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate's file.
    pub certificate: PathBuf,
    /// The key's file.
    pub key: PathBuf,
    /// The serial number, in hexadecimal.
    pub serial: String,
    /// The identity.
    pub uri: String,
}

/// Makes a CA in `dir` for `domain`.
pub fn init(
    dir: &Path,
    domain: &str,
    validity: Duration,
    now: SystemTime,
    force: bool,
) -> Result<(), PkiError> {
    if !PeerName::domain_is_valid(domain) {
        return Err(PkiError::Name(format!(
            "`{domain}` is not a trust domain: expected lower-case letters, digits, `.`, `-` or `_`, such as fleet.example"
        )));
    }
    let paths = Folder(dir);
    for path in [paths.certificate(), paths.key()] {
        if path.exists() && !force {
            return Err(PkiError::Exists(path));
        }
    }
    files::make_private_dir(dir)?;
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    let mut params = CertificateParams::default();
    // No two CAs of a domain share a name: certificates and CRLs are matched to their issuer by it,
    // and while a CA is replaced by a new one units trust both.
    let (serial_hex, serial) = serial()?;
    params.distinguished_name = name(&format!("{domain} Holdfast CA {}", &serial_hex[..8]));
    params.subject_alt_names = vec![uri_of(&format!("spiffe://{domain}"))?];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = times(now, validity);
    params.serial_number = Some(serial);
    let certificate = params.self_signed(&key)?;
    files::write_key(&paths.key(), &key.serialize_pem())?;
    files::write_public(&paths.certificate(), &certificate.pem())?;
    let ledger = Ledger::new(domain);
    ledger.save(&paths.ledger())?;
    write_crl(paths, &ledger, now)
}

/// Issues a certificate and key for the unit `unit`, into `out`.
pub fn issue(
    dir: &Path,
    unit: &str,
    validity: Duration,
    out: &Path,
    now: SystemTime,
    force: bool,
) -> Result<Issued, PkiError> {
    let paths = Folder(dir);
    let mut ledger = Ledger::load(&paths.ledger())?;
    let name_of_unit =
        PeerName::parse(unit, &ledger.trust_domain).map_err(|e| PkiError::Name(e.to_string()))?;
    if name_of_unit.domain != ledger.trust_domain {
        let reason = format!(
            "`{unit}` is of another trust domain than this CA's, {}",
            ledger.trust_domain
        );
        return Err(PkiError::Name(reason));
    }
    let stem = name_of_unit.name.replace('/', "_");
    let (certificate, key_path) = (
        out.join(format!("{stem}.crt")),
        out.join(format!("{stem}.key")),
    );
    let among_the_cas = out.canonicalize().ok() == dir.canonicalize().ok();
    if stem == "ca" && among_the_cas {
        return Err(PkiError::Name(format!(
            "a unit called `{unit}` would take the place of the CA's own files: give another folder with --out"
        )));
    }
    for path in [&certificate, &key_path] {
        if path.exists() && !force {
            return Err(PkiError::Exists(path.clone()));
        }
    }
    let (made, key, serial_hex) = certify(&paths.issuer()?, &name_of_unit, validity, now)?;
    files::make_private_dir(out)?;
    files::write_key(&key_path, &key.serialize_pem())?;
    files::write_public(&certificate, &made.pem())?;
    ledger.issued.push(Entry {
        name: name_of_unit.name.clone(),
        serial: serial_hex.clone(),
        issued: seconds(now),
        revoked: None,
    });
    ledger.save(&paths.ledger())?;
    Ok(Issued {
        certificate,
        key: key_path,
        serial: serial_hex,
        uri: name_of_unit.uri(),
    })
}

/// A certificate for `unit` with a key of its own, and its serial number in hexadecimal.
fn certify(
    issuer: &Issuer<'static, KeyPair>,
    unit: &PeerName,
    validity: Duration,
    now: SystemTime,
) -> Result<(Certificate, KeyPair, String), PkiError> {
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    let (serial_hex, serial) = serial()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = name(&unit.name);
    params.subject_alt_names = vec![uri_of(&unit.uri())?];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    (params.not_before, params.not_after) = times(now, validity);
    params.serial_number = Some(serial);
    Ok((params.signed_by(&key, issuer)?, key, serial_hex))
}

/// Revokes every certificate of a unit, one by its serial number, or the one in a file; returns
/// the serial numbers that were not revoked before.
pub fn revoke(dir: &Path, what: &str, now: SystemTime) -> Result<Vec<String>, PkiError> {
    let paths = Folder(dir);
    let mut ledger = Ledger::load(&paths.ledger())?;
    let wanted =
        files::serial_in(Path::new(what)).unwrap_or_else(|| what.replace(':', "").to_lowercase());
    let mut found = false;
    let mut newly = Vec::new();
    for entry in ledger
        .issued
        .iter_mut()
        .filter(|e| e.name == what || e.serial == wanted)
    {
        found = true;
        if entry.revoked.is_none() {
            entry.revoked = Some(seconds(now));
            newly.push(entry.serial.clone());
        }
    }
    if !found {
        return Err(PkiError::Unknown(what.to_owned()));
    }
    ledger.crl_number += 1;
    ledger.save(&paths.ledger())?;
    write_crl(paths, &ledger, now)?;
    Ok(newly)
}

/// The files of a CA.
#[derive(Clone, Copy)]
struct Folder<'a>(&'a Path);

impl Folder<'_> {
    fn certificate(self) -> PathBuf {
        self.0.join("ca.crt")
    }

    fn key(self) -> PathBuf {
        self.0.join("ca.key")
    }

    fn crl(self) -> PathBuf {
        self.0.join("crl.pem")
    }

    fn ledger(self) -> PathBuf {
        self.0.join("issued.toml")
    }

    fn issuer(self) -> Result<Issuer<'static, KeyPair>, PkiError> {
        let key = KeyPair::from_pem(&files::read(&self.key())?)?;
        Ok(Issuer::from_ca_cert_pem(
            &files::read(&self.certificate())?,
            key,
        )?)
    }
}

fn write_crl(paths: Folder<'_>, ledger: &Ledger, now: SystemTime) -> Result<(), PkiError> {
    let revoked_certs = ledger
        .issued
        .iter()
        .filter_map(|entry| Some((entry, entry.revoked?)))
        .map(|(entry, at)| RevokedCertParams {
            serial_number: SerialNumber::from(hex::decode(&entry.serial).unwrap_or_default()),
            revocation_time: OffsetDateTime::from_unix_timestamp(at)
                .unwrap_or(OffsetDateTime::UNIX_EPOCH),
            reason_code: Some(RevocationReason::Unspecified),
            invalidity_date: None,
        })
        .collect();
    let params = CertificateRevocationListParams {
        this_update: OffsetDateTime::from(now),
        next_update: OffsetDateTime::from(now + CRL_LIFETIME),
        crl_number: SerialNumber::from(ledger.crl_number),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let crl = params.signed_by(&paths.issuer()?)?;
    files::write_public(&paths.crl(), &crl.pem()?)
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn uri_of(uri: &str) -> Result<SanType, PkiError> {
    Ok(SanType::URI(Ia5String::try_from(uri)?))
}

/// 16 random bytes whose first bit is clear (RFC 5280 section 4.1.2.2: positive, at most 20 bytes).
fn serial() -> Result<(String, SerialNumber), PkiError> {
    let mut bytes = [0; 16];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| rcgen::Error::RingUnspecified)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok((hex::encode(bytes), SerialNumber::from(bytes.to_vec())))
}

fn times(now: SystemTime, validity: Duration) -> (OffsetDateTime, OffsetDateTime) {
    (
        OffsetDateTime::from(now - BACKDATE.min(validity)),
        OffsetDateTime::from(now + validity),
    )
}

fn seconds(now: SystemTime) -> i64 {
    OffsetDateTime::from(now).unix_timestamp()
}
