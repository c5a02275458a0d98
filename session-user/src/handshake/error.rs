//! Why a handshake failed, and which of the two ends refused.

use rustls::{AlertDescription, CertificateError};

/// What is wrong with a certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateFault {
    /// None was shown.
    #[error("no certificate was shown")]
    Missing,
    /// It comes from another CA.
    #[error("it was not issued by the configured CA")]
    UnknownIssuer,
    /// Its time is over.
    #[error("it has expired: issue a new one with `holdfast pki issue`")]
    Expired,
    /// Its time has not come.
    #[error("it is not valid yet: check the clocks of both hosts")]
    NotYetValid,
    /// An alert does not tell the two apart.
    #[error(
        "it has expired or is not valid yet: issue a new one, or check the clocks of both hosts"
    )]
    OutOfTime,
    /// The CRL names it.
    #[error("it has been revoked")]
    Revoked,
    /// It is another unit's.
    #[error(
        "it is for {got}, not for {expected}: check the peer's address, or its name in the configuration"
    )]
    WrongName {
        /// The configured name.
        expected: String,
        /// The certificate's name.
        got: String,
    },
    /// The other end expected another name.
    #[error("it is for another name than the peer expects")]
    NameRefused,
    /// It does not say who it is for in a form that Holdfast knows.
    #[error("it names no unit: {0}")]
    Nameless(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// A handshake that failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// We do not accept the peer.
    #[error("the peer's certificate is refused: {0}")]
    Peer(CertificateFault),
    /// The peer does not accept us.
    #[error("the peer refused this unit's certificate: {0}")]
    Ours(CertificateFault),
    /// The peer speaks another protocol over TLS.
    #[error("the peer speaks TLS, but not the protocol holdfast/1")]
    Alpn,
    /// The bytes are not those of a TLS 1.3 handshake.
    #[error("the TLS handshake failed: {0}")]
    Protocol(String),
    /// The handshake is longer than any that makes sense.
    #[error("the TLS handshake is longer than {0} bytes")]
    TooLong(usize),
    /// The connection broke.
    #[error("the connection broke during the TLS handshake: {0}")]
    Io(#[from] std::io::Error),
    /// This unit's own files cannot be used.
    #[error("this unit's identity cannot be used: {0}")]
    Identity(String),
}

impl HandshakeError {
    /// Whether the peer's certificate is only too old, and nothing worse.
    pub fn is_expired(&self) -> bool {
        matches!(self, Self::Peer(CertificateFault::Expired))
    }

    /// From TLS, with what our own verifier has to say in detail.
    pub(super) fn of(error: rustls::Error, detail: Option<CertificateFault>) -> Self {
        match error {
            rustls::Error::InvalidCertificate(error) => {
                Self::Peer(detail.unwrap_or_else(|| fault_of(&error)))
            }
            rustls::Error::NoCertificatesPresented => Self::Peer(CertificateFault::Missing),
            rustls::Error::NoApplicationProtocol => Self::Alpn,
            rustls::Error::AlertReceived(alert) => Self::of_alert(alert),
            other => Self::Protocol(other.to_string()),
        }
    }

    fn of_alert(alert: AlertDescription) -> Self {
        Self::Ours(match alert {
            AlertDescription::CertificateRequired => CertificateFault::Missing,
            AlertDescription::UnknownCA => CertificateFault::UnknownIssuer,
            AlertDescription::CertificateExpired => CertificateFault::OutOfTime,
            AlertDescription::CertificateRevoked => CertificateFault::Revoked,
            AlertDescription::AccessDenied => CertificateFault::NameRefused,
            AlertDescription::NoApplicationProtocol => return Self::Alpn,
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::DecryptError => CertificateFault::Other(format!("alert {alert:?}")),
            other => return Self::Protocol(format!("the peer sent alert {other:?}")),
        })
    }
}

fn fault_of(error: &CertificateError) -> CertificateFault {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            CertificateFault::Expired
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            CertificateFault::NotYetValid
        }
        CertificateError::Revoked => CertificateFault::Revoked,
        CertificateError::UnknownIssuer => CertificateFault::UnknownIssuer,
        other => CertificateFault::Other(format!("{other:?}")),
    }
}

/// What TLS tells the other end about `fault`: the alert follows from it.
pub(super) fn as_tls(fault: &CertificateFault) -> rustls::Error {
    rustls::Error::InvalidCertificate(match fault {
        CertificateFault::Missing => return rustls::Error::NoCertificatesPresented,
        CertificateFault::UnknownIssuer => CertificateError::UnknownIssuer,
        CertificateFault::Expired | CertificateFault::OutOfTime => CertificateError::Expired,
        CertificateFault::NotYetValid => CertificateError::NotValidYet,
        CertificateFault::Revoked => CertificateError::Revoked,
        // Alert access_denied: "a valid certificate was received, but [...] the sender decided not
        // to proceed" (RFC 8446 section 6.2).
        CertificateFault::WrongName { .. }
        | CertificateFault::NameRefused
        | CertificateFault::Nameless(_) => CertificateError::ApplicationVerificationFailure,
        CertificateFault::Other(_) => CertificateError::BadEncoding,
    })
}
