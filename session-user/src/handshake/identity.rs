//! This unit's certificate and key, the CA it trusts, and the CRL.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, TrustAnchor, UnixTime,
};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList,
    RevocationCheckDepth, RevocationOptionsBuilder, UnknownStatusPolicy,
};

use super::error::CertificateFault;
use super::name::{PeerIdentity, PeerName, Usage};
use super::suites;

/// The files of an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityPaths {
    /// Certificate chain, leaf first, PEM.
    pub certificate: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
    /// Certificates of the CA, PEM.
    pub ca: PathBuf,
    /// Certificate revocation list of the CA, PEM.
    pub crl: Option<PathBuf>,
}

/// Why an identity cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct IdentityError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it, and what was expected.
    pub reason: String,
}

/// What was read from the files.
pub(super) struct Material {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
    trust: Arc<Trust>,
    own: PeerIdentity,
}

/// Whom a unit believes.
struct Trust {
    roots: Vec<TrustAnchor<'static>>,
    crls: Vec<CertRevocationList<'static>>,
}

/// A unit's identity. Shared by all sessions; can be read anew while they run.
pub struct Identity {
    /// None for one that is in memory alone.
    paths: Option<IdentityPaths>,
    pub(super) provider: Arc<CryptoProvider>,
    material: RwLock<Arc<Material>>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}

/// The hybrid post-quantum group first, X25519 for peers without it, nothing else; the AEAD that suits this processor first.
pub(super) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = suites::in_order(suites::aes_in_hardware());
    provider.kx_groups = vec![
        aws_lc_rs::kx_group::X25519MLKEM768,
        aws_lc_rs::kx_group::X25519,
    ];
    Arc::new(provider)
}

impl Identity {
    /// Reads and checks the files.
    pub fn load(paths: &IdentityPaths) -> Result<Self, IdentityError> {
        let provider = provider();
        let material = Material::read(paths, &provider)?;
        Ok(Self {
            paths: Some(paths.clone()),
            provider,
            material: RwLock::new(Arc::new(material)),
        })
    }

    /// Another unit with this certificate and key, in memory alone, that believes whom this one believes: what plays a
    /// fleet has one for each unit.
    pub fn of_fellow(
        &self,
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, CertificateFault> {
        let chain = vec![certificate];
        let own = PeerIdentity::of(&chain, Usage::Client).map_err(CertificateFault::Other)?;
        check_pair(&chain, &key, &self.provider).map_err(CertificateFault::Other)?;
        let material = Material {
            chain,
            key,
            trust: Arc::clone(&self.material().trust),
            own,
        };
        Ok(Self {
            paths: None,
            provider: Arc::clone(&self.provider),
            material: RwLock::new(Arc::new(material)),
        })
    }

    /// Reads the files anew; on an error the old contents stay.
    pub fn reload(&self) -> Result<(), IdentityError> {
        let Some(paths) = &self.paths else {
            return Ok(());
        };
        let new = Material::read(paths, &self.provider)?;
        *self
            .material
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        Ok(())
    }

    pub(super) fn material(&self) -> Arc<Material> {
        Arc::clone(&self.material.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Who this unit is.
    pub fn name(&self) -> PeerName {
        self.material().own.name.clone()
    }

    /// When this unit's certificate expires.
    pub fn not_after(&self) -> Option<SystemTime> {
        Some(self.material().own.not_after)
    }

    /// Judges a certificate: issuer, time, revocation.
    pub(super) fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: SystemTime,
        usage: Usage,
    ) -> Result<(), CertificateFault> {
        let material = self.material();
        let cert = EndEntityCert::try_from(leaf).map_err(fault_of)?;
        let crls: Vec<&CertRevocationList<'_>> = material.trust.crls.iter().collect();
        let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|options| {
            options
                .with_depth(RevocationCheckDepth::EndEntity)
                .with_status_policy(UnknownStatusPolicy::Allow)
                .with_expiration_policy(ExpirationPolicy::Ignore)
                .build()
        });
        let since = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let usage = match usage {
            Usage::Server => KeyUsage::server_auth(),
            Usage::Client => KeyUsage::client_auth(),
        };
        let algorithms = self.provider.signature_verification_algorithms.all;
        let time = UnixTime::since_unix_epoch(since);
        cert.verify_for_usage(
            algorithms,
            &material.trust.roots,
            intermediates,
            time,
            usage,
            revocation,
            None,
        )
        .map(|_| ())
        .map_err(fault_of)
    }
}

fn fault_of(error: webpki::Error) -> CertificateFault {
    match error {
        webpki::Error::CertExpired { .. } => CertificateFault::Expired,
        webpki::Error::CertNotValidYet { .. } => CertificateFault::NotYetValid,
        webpki::Error::CertRevoked => CertificateFault::Revoked,
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            CertificateFault::UnknownIssuer
        }
        other => CertificateFault::Other(other.to_string()),
    }
}

impl Material {
    fn read(paths: &IdentityPaths, provider: &CryptoProvider) -> Result<Self, IdentityError> {
        let chain = certificates(&paths.certificate)?;
        let own = PeerIdentity::of(&chain, Usage::Client)
            .map_err(|reason| wrong(&paths.certificate, reason))?;
        let key = PrivateKeyDer::from_pem_slice(&read(&paths.key)?)
            .map_err(|e| wrong(&paths.key, format!("it holds no private key in PEM ({e})")))?;
        check_pair(&chain, &key, provider).map_err(|reason| wrong(&paths.key, reason))?;
        let roots = certificates(&paths.ca)?
            .iter()
            .map(|der| webpki::anchor_from_trusted_cert(der).map(|anchor| anchor.to_owned()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| {
                wrong(
                    &paths.ca,
                    format!("it is not the certificate of a CA ({e})"),
                )
            })?;
        let crls = paths
            .crl
            .as_deref()
            .map(revocations)
            .transpose()?
            .unwrap_or_default();
        Ok(Self {
            chain,
            key,
            trust: Arc::new(Trust { roots, crls }),
            own,
        })
    }
}

fn check_pair(
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
    provider: &CryptoProvider,
) -> Result<(), String> {
    let key = provider
        .key_provider
        .load_private_key(key.clone_key())
        .map_err(|e| format!("the key cannot be used: {e}"))?;
    let certified = rustls::sign::CertifiedKey::new(chain.to_vec(), key);
    certified
        .keys_match()
        .map_err(|_| "the key does not belong to the certificate".to_owned())
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    std::fs::read(path).map_err(|e| wrong(path, format!("it cannot be read: {e}")))
}

fn wrong(path: &Path, reason: String) -> IdentityError {
    IdentityError {
        path: path.to_owned(),
        reason,
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let pem = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.map_err(|e| wrong(path, format!("it is not PEM: {e}")))?;
    if found.is_empty() {
        return Err(wrong(path, "it holds no certificate in PEM".to_owned()));
    }
    Ok(found)
}

fn revocations(path: &Path) -> Result<Vec<CertRevocationList<'static>>, IdentityError> {
    let pem = read(path)?;
    let mut out = Vec::new();
    for der in CertificateRevocationListDer::pem_slice_iter(&pem) {
        let der = der.map_err(|e| wrong(path, format!("it is not PEM: {e}")))?;
        let crl = OwnedCertRevocationList::from_der(&der)
            .map_err(|e| wrong(path, format!("it is not a CRL: {e}")))?;
        out.push(crl.into());
    }
    if out.is_empty() {
        return Err(wrong(
            path,
            "it holds no certificate revocation list in PEM".to_owned(),
        ));
    }
    Ok(out)
}
