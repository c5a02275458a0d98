//! The handshake without a socket: bytes in, bytes out, and an outcome.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection,
};
use rustls_pki_types::ServerName;
use session_proto::seal::Aead;

use super::error::HandshakeError;
use super::identity::Identity;
use super::name::{PeerIdentity, PeerName, Usage, sha256};
use super::suites;
use super::verify::Verifier;

/// ALPN of the protocol's first version.
const ALPN: &[u8] = b"holdfast/1";
/// Exporter label of a full handshake; the context is both certificates' hashes.
const LABEL_SESSION: &[u8] = b"EXPORTER-holdfast-1 session";
/// Exporter label of a renewal; the context is the session's id and both certificates' hashes.
const LABEL_REAUTH: &[u8] = b"EXPORTER-holdfast-1 reauth";
/// Bytes of a whole handshake in one direction, at most. A chain of certificates is a few KiB.
const HANDSHAKE_BYTES_MAX: usize = 64 * 1024;
/// Header of a TLS record (RFC 8446 section 5.1).
pub(super) const TLS_HEADER_BYTES: usize = 5;
/// Longest protected TLS record (RFC 8446 section 5.2).
const TLS_RECORD_BYTES_MAX: usize = 16_384 + 256;

/// What a completed handshake leaves behind.
#[derive(Debug)]
pub struct Outcome {
    /// The exporter's output.
    pub secret: [u8; 32],
    /// The AEAD of the negotiated cipher suite.
    pub aead: Aead,
    /// Who the peer is.
    pub peer: PeerIdentity,
    /// Name of the key exchange group.
    pub group: String,
}

/// How far a handshake has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsState {
    /// Bytes of the peer are awaited.
    Handshaking,
    /// [`TlsDriver::outcome`] can be asked.
    Complete,
}

/// A TLS 1.3 handshake that owns no socket.
pub struct TlsDriver {
    tls: Connection,
    verifier: Arc<Verifier>,
    label: &'static [u8],
    context: Vec<u8>,
    own_leaf: [u8; 32],
    input: Vec<u8>,
    taken: usize,
}

fn is_client(tls: &Connection) -> bool {
    matches!(tls, Connection::Client(_))
}

impl TlsDriver {
    /// The client of a full handshake with the unit called `peer`.
    pub fn client(identity: &Arc<Identity>, peer: &str) -> Result<Self, HandshakeError> {
        Self::make_client(identity, peer, LABEL_SESSION, Vec::new())
    }

    /// The server of a full handshake.
    pub fn server(identity: &Arc<Identity>) -> Result<Self, HandshakeError> {
        Self::make_server(identity, LABEL_SESSION, Vec::new())
    }

    /// The client of a renewal inside `session`.
    pub fn reauth_client(
        identity: &Arc<Identity>,
        peer: &str,
        session: [u8; 16],
    ) -> Result<Self, HandshakeError> {
        Self::make_client(identity, peer, LABEL_REAUTH, session.to_vec())
    }

    /// The server of a renewal inside `session`.
    pub fn reauth_server(
        identity: &Arc<Identity>,
        session: [u8; 16],
    ) -> Result<Self, HandshakeError> {
        Self::make_server(identity, LABEL_REAUTH, session.to_vec())
    }

    fn make_client(
        identity: &Arc<Identity>,
        peer: &str,
        label: &'static [u8],
        context: Vec<u8>,
    ) -> Result<Self, HandshakeError> {
        let expected = PeerName::parse(peer, &identity.name().domain)
            .map_err(|e| HandshakeError::Identity(e.to_string()))?;
        let verifier = Arc::new(Verifier::of_server(Arc::clone(identity), expected));
        let material = identity.material();
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&identity.provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as _)
            .with_client_auth_cert(material.chain.clone(), material.key.clone_key())
            .map_err(unusable)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        // The name is never sent; ours is checked by the verifier.
        let name = ServerName::try_from("holdfast.invalid")
            .map_err(|e| HandshakeError::Protocol(e.to_string()))?;
        let tls = ClientConnection::new(Arc::new(config), name).map_err(unusable)?;
        Ok(Self::new(
            tls.into(),
            verifier,
            label,
            context,
            sha256(&material.chain[0]),
        ))
    }

    fn make_server(
        identity: &Arc<Identity>,
        label: &'static [u8],
        context: Vec<u8>,
    ) -> Result<Self, HandshakeError> {
        let verifier = Arc::new(Verifier::of_client(Arc::clone(identity)));
        let material = identity.material();
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&identity.provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(Arc::clone(&verifier) as _)
            .with_single_cert(material.chain.clone(), material.key.clone_key())
            .map_err(unusable)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.ignore_client_order = suites::insists(&identity.provider);
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.max_early_data_size = 0;
        let tls = ServerConnection::new(Arc::new(config)).map_err(unusable)?;
        Ok(Self::new(
            tls.into(),
            verifier,
            label,
            context,
            sha256(&material.chain[0]),
        ))
    }

    fn new(
        tls: Connection,
        verifier: Arc<Verifier>,
        label: &'static [u8],
        context: Vec<u8>,
        own_leaf: [u8; 32],
    ) -> Self {
        Self {
            tls,
            verifier,
            label,
            context,
            own_leaf,
            input: Vec::new(),
            taken: 0,
        }
    }

    /// How far it has come.
    pub fn state(&self) -> TlsState {
        if self.tls.is_handshaking() {
            TlsState::Handshaking
        } else {
            TlsState::Complete
        }
    }

    /// Takes bytes of the peer, cut anywhere. On an error, [`Self::take_output`] still has the alert.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        self.input.extend_from_slice(bytes);
        while let Some(len) = record_bytes(&self.input)? {
            let record: Vec<u8> = self.input.drain(..len).collect();
            self.feed_record(&record)?;
        }
        Ok(())
    }

    /// Takes exactly one TLS record.
    pub(super) fn feed_record(&mut self, record: &[u8]) -> Result<(), HandshakeError> {
        self.taken += record.len();
        if self.taken > HANDSHAKE_BYTES_MAX {
            return Err(HandshakeError::TooLong(HANDSHAKE_BYTES_MAX));
        }
        let mut rest = record;
        while !rest.is_empty() {
            if self.tls.read_tls(&mut rest)? == 0 {
                return Err(HandshakeError::Protocol(
                    "bytes behind the end of the handshake".to_owned(),
                ));
            }
            self.tls
                .process_new_packets()
                .map_err(|e| HandshakeError::of(e, self.verifier.fault()))?;
        }
        Ok(())
    }

    /// Bytes for the peer.
    pub fn take_output(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        while self.tls.wants_write() {
            // Writing into memory does not fail.
            if self.tls.write_tls(&mut out).is_err() {
                break;
            }
        }
        out
    }

    /// What came out; only in [`TlsState::Complete`].
    pub fn outcome(&self) -> Result<Outcome, HandshakeError> {
        if self.tls.alpn_protocol() != Some(ALPN) {
            return Err(HandshakeError::Alpn);
        }
        let chain = self
            .tls
            .peer_certificates()
            .ok_or(HandshakeError::Peer(super::CertificateFault::Missing))?;
        let usage = if is_client(&self.tls) {
            Usage::Server
        } else {
            Usage::Client
        };
        let peer = PeerIdentity::of(chain, usage)
            .map_err(|e| HandshakeError::Peer(super::CertificateFault::Nameless(e)))?;
        let (client, server) = if is_client(&self.tls) {
            (self.own_leaf, peer.fingerprint)
        } else {
            (peer.fingerprint, self.own_leaf)
        };
        let context = [&self.context[..], &client, &server].concat();
        let secret = self
            .tls
            .export_keying_material([0; 32], self.label, Some(&context))
            .map_err(|e| HandshakeError::Protocol(e.to_string()))?;
        let group = self
            .tls
            .negotiated_key_exchange_group()
            .map_or_else(String::new, |g| format!("{:?}", g.name()));
        Ok(Outcome {
            secret,
            aead: self.aead()?,
            peer,
            group,
        })
    }

    fn aead(&self) -> Result<Aead, HandshakeError> {
        match self.tls.negotiated_cipher_suite().map(|s| s.suite()) {
            Some(CipherSuite::TLS13_AES_128_GCM_SHA256) => Ok(Aead::Aes128Gcm),
            Some(CipherSuite::TLS13_AES_256_GCM_SHA384) => Ok(Aead::Aes256Gcm),
            Some(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256) => Ok(Aead::ChaCha20Poly1305),
            other => Err(HandshakeError::Protocol(format!(
                "unexpected cipher suite {other:?}"
            ))),
        }
    }
}

fn unusable(error: rustls::Error) -> HandshakeError {
    HandshakeError::Identity(error.to_string())
}

/// Whether `byte` begins a TLS record; our own begin with 0x80 or 0x81.
pub(super) const fn begins_tls(byte: u8) -> bool {
    matches!(byte, 20..=24)
}

/// The length of the TLS record at the front of `input`, once all of it is there.
pub(super) fn record_bytes(input: &[u8]) -> Result<Option<usize>, HandshakeError> {
    let Some(&first) = input.first() else {
        return Ok(None);
    };
    if !begins_tls(first) {
        return Err(HandshakeError::Protocol(
            "these are not the bytes of TLS".to_owned(),
        ));
    }
    let Some(header) = input.first_chunk::<TLS_HEADER_BYTES>() else {
        return Ok(None);
    };
    let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
    if len > TLS_RECORD_BYTES_MAX {
        return Err(HandshakeError::TooLong(TLS_RECORD_BYTES_MAX));
    }
    let total = TLS_HEADER_BYTES + len;
    Ok((input.len() >= total).then_some(total))
}
