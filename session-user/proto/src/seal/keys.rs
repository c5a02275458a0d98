//! AEADs, secrets and the key of one (direction, space, epoch).

use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce,
    UnboundKey,
};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::SealError;
use crate::limits::TAG_BYTES;

/// The AEAD of a session: that of the negotiated TLS cipher suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aead {
    /// AEAD_AES_128_GCM (RFC 5116).
    Aes128Gcm,
    /// AEAD_AES_256_GCM (RFC 5116).
    Aes256Gcm,
    /// AEAD_CHACHA20_POLY1305 (RFC 8439).
    ChaCha20Poly1305,
}

impl Aead {
    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes128Gcm => &AES_128_GCM,
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        }
    }
}

/// 32 secret bytes, wiped when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret([u8; 32]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

struct Bytes(usize);

impl KeyType for Bytes {
    fn len(&self) -> usize {
        self.0
    }
}

impl Secret {
    /// Takes 32 bytes of key material.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for export into the next process of the same agent.
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// HKDF-Extract (RFC 5869) with `salt` over this secret.
    pub(super) fn extract(&self, salt: &[u8]) -> Self {
        Self::from_prk(&Salt::new(HKDF_SHA256, salt).extract(&self.0))
    }

    /// HKDF-Expand over `"holdfast1 " label`, a zero byte and `context`.
    pub(super) fn expand<const N: usize>(&self, label: &str, context: &[u8]) -> [u8; N] {
        expand(&Prk::new_less_safe(HKDF_SHA256, &self.0), label, context)
    }

    /// [`Self::expand`] into a further secret.
    pub(super) fn derive(&self, label: &str, context: &[u8]) -> Self {
        Self(self.expand(label, context))
    }

    fn from_prk(prk: &Prk) -> Self {
        Self(expand(prk, "prk", &[]))
    }
}

fn expand<const N: usize>(prk: &Prk, label: &str, context: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    let info: [&[u8]; 4] = [b"holdfast1 ", label.as_bytes(), &[0], context];
    prk.expand(&info, Bytes(N))
        .and_then(|okm| okm.fill(&mut out))
        .expect("HKDF-SHA256 expands to at most 8,160 bytes, and N is at most 32");
    out
}

/// An AEAD key with its IV; the nonce is the IV xor the record's number (RFC 8446 section 5.3).
pub struct RecordKey {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
}

impl std::fmt::Debug for RecordKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RecordKey(..)")
    }
}

impl Drop for RecordKey {
    fn drop(&mut self) {
        // ring keeps its key schedule to itself and does not wipe it: docs/security.md says so.
        self.iv.zeroize();
    }
}

impl RecordKey {
    pub(super) fn new(aead: Aead, secret: &Secret, label: &str, context: &[u8]) -> Self {
        let algorithm = aead.algorithm();
        let key_label = format!("{label} key");
        let mut raw: [u8; 32] = secret.expand(&key_label, context);
        let key = UnboundKey::new(algorithm, &raw[..algorithm.key_len()])
            .expect("the length is the algorithm's own");
        raw.zeroize();
        let iv = secret.expand(&format!("{label} iv"), context);
        Self {
            key: LessSafeKey::new(key),
            iv,
        }
    }

    fn nonce(&self, number: u64) -> Nonce {
        let mut nonce = self.iv;
        for (byte, n) in nonce[4..].iter_mut().zip(number.to_be_bytes()) {
            *byte ^= n;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Seals `plain` in place and returns the tag. The caller never uses a number twice.
    pub fn seal(&self, header: &[u8], number: u64, plain: &mut [u8]) -> [u8; TAG_BYTES] {
        let tag = self
            .key
            .seal_in_place_separate_tag(self.nonce(number), Aad::from(header), plain)
            .expect("a record is far below the AEAD's limit on length");
        let mut out = [0; TAG_BYTES];
        out.copy_from_slice(tag.as_ref());
        out
    }

    /// Opens ciphertext and tag in place and returns the length of the plaintext at the front.
    pub fn open(&self, header: &[u8], number: u64, sealed: &mut [u8]) -> Result<usize, SealError> {
        self.key
            .open_in_place(self.nonce(number), Aad::from(header), sealed)
            .map(|plain| plain.len())
            .map_err(|_| SealError::NotAuthentic)
    }
}
