//! AEADs, secrets and the key of one (direction, space, epoch).

use aws_lc_rs::aead as bulk;
use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce,
    UnboundKey,
};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::SealError;
use crate::limits::TAG_BYTES;

/// Records with more plaintext than this, in bytes, go through AWS-LC, which seals 64 KiB in 0.6 to 0.8 of ring's time, and
/// 64 bytes in 1.3 times as much. Both give the same bytes.
const BULK_BYTES: usize = 4 * 1024;

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

    fn bulk_algorithm(self) -> &'static bulk::Algorithm {
        match self {
            Self::Aes128Gcm => &bulk::AES_128_GCM,
            Self::Aes256Gcm => &bulk::AES_256_GCM,
            Self::ChaCha20Poly1305 => &bulk::CHACHA20_POLY1305,
        }
    }

    /// As the RFCs call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes128Gcm => "AES-128-GCM",
            Self::Aes256Gcm => "AES-256-GCM",
            Self::ChaCha20Poly1305 => "ChaCha20-Poly1305",
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
    /// The same for large records; `None` where there are none.
    bulk: Option<bulk::LessSafeKey>,
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
    /// For records of every size.
    pub(super) fn new(aead: Aead, secret: &Secret, label: &str, context: &[u8]) -> Self {
        Self::expand(aead, secret, label, context, true)
    }

    /// For what is usually small: less to set up, and to keep. A datagram may be large, and only takes its time.
    pub(super) fn of_small(aead: Aead, secret: &Secret, label: &str, context: &[u8]) -> Self {
        Self::expand(aead, secret, label, context, false)
    }

    fn expand(aead: Aead, secret: &Secret, label: &str, context: &[u8], large: bool) -> Self {
        let algorithm = aead.algorithm();
        let key_label = format!("{label} key");
        let mut raw: [u8; 32] = secret.expand(&key_label, context);
        let key = UnboundKey::new(algorithm, &raw[..algorithm.key_len()])
            .expect("the length is the algorithm's own");
        let bulk = large.then(|| {
            let key = bulk::UnboundKey::new(aead.bulk_algorithm(), &raw[..algorithm.key_len()])
                .expect("the length is the algorithm's own");
            bulk::LessSafeKey::new(key)
        });
        raw.zeroize();
        let iv = secret.expand(&format!("{label} iv"), context);
        Self {
            key: LessSafeKey::new(key),
            bulk,
            iv,
        }
    }

    fn nonce(&self, number: u64) -> [u8; NONCE_LEN] {
        let mut nonce = self.iv;
        for (byte, n) in nonce[4..].iter_mut().zip(number.to_be_bytes()) {
            *byte ^= n;
        }
        nonce
    }

    fn bulk(&self, bytes: usize) -> Option<&bulk::LessSafeKey> {
        self.bulk.as_ref().filter(|_| bytes > BULK_BYTES)
    }

    /// Seals `plain` in place and returns the tag. The caller never uses a number twice.
    pub fn seal(&self, header: &[u8], number: u64, plain: &mut [u8]) -> [u8; TAG_BYTES] {
        let fits = "a record is far below the AEAD's limit on length";
        let nonce = self.nonce(number);
        let mut out = [0; TAG_BYTES];
        if let Some(key) = self.bulk(plain.len()) {
            let nonce = bulk::Nonce::assume_unique_for_key(nonce);
            let tag = key.seal_in_place_separate_tag(nonce, bulk::Aad::from(header), plain);
            out.copy_from_slice(tag.expect(fits).as_ref());
        } else {
            let nonce = Nonce::assume_unique_for_key(nonce);
            let tag = (self.key).seal_in_place_separate_tag(nonce, Aad::from(header), plain);
            out.copy_from_slice(tag.expect(fits).as_ref());
        }
        out
    }

    /// Opens ciphertext and tag in place and returns the length of the plaintext at the front.
    pub fn open(&self, header: &[u8], number: u64, sealed: &mut [u8]) -> Result<usize, SealError> {
        let nonce = self.nonce(number);
        let plain = match self.bulk(sealed.len().saturating_sub(TAG_BYTES)) {
            Some(key) => {
                let nonce = bulk::Nonce::assume_unique_for_key(nonce);
                let opened = key.open_in_place(nonce, bulk::Aad::from(header), sealed);
                opened.map_err(|_| SealError::NotAuthentic)?
            }
            None => {
                let nonce = Nonce::assume_unique_for_key(nonce);
                let opened = self.key.open_in_place(nonce, Aad::from(header), sealed);
                opened.map_err(|_| SealError::NotAuthentic)?
            }
        };
        Ok(plain.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AEADS: [Aead; 3] = [Aead::Aes128Gcm, Aead::Aes256Gcm, Aead::ChaCha20Poly1305];

    /// Which of the two did it must not show: the peer's limit may be another.
    #[test]
    fn small_and_large_records_are_sealed_alike() {
        for aead in AEADS {
            let secret = Secret::new([9; 32]);
            let both = RecordKey::new(aead, &secret, "r", &[]);
            let small = RecordKey::of_small(aead, &secret, "r", &[]);
            for bytes in [0, 1, BULK_BYTES, BULK_BYTES + 1, 3 * BULK_BYTES + 7] {
                let plain: Vec<u8> = (0..bytes).map(|n| n as u8).collect();
                let mut sealed = [plain.clone(), plain.clone()];
                let tags = [
                    both.seal(b"header", 5, &mut sealed[0]),
                    small.seal(b"header", 5, &mut sealed[1]),
                ];
                assert_eq!(tags[0], tags[1]);
                assert_eq!(sealed[0], sealed[1]);
                for key in [&both, &small] {
                    let mut record = [&sealed[0][..], &tags[0]].concat();
                    assert_eq!(key.open(b"header", 5, &mut record).unwrap(), bytes);
                    assert_eq!(record[..bytes], plain);
                    let mut other = [&sealed[0][..], &tags[0]].concat();
                    other[bytes / 2] ^= 1;
                    let opened = key.open(b"header", 5, &mut other);
                    assert!(matches!(opened, Err(SealError::NotAuthentic)));
                }
            }
            // Nothing but a tag, and less than one.
            for bytes in [TAG_BYTES, TAG_BYTES - 1, 0] {
                assert!(both.open(b"header", 5, &mut vec![0; bytes]).is_err());
            }
        }
    }
}
