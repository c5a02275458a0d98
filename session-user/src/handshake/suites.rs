//! Which AEAD a session gets: the TLS cipher suite says, and the processors of both ends decide.

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{CipherSuite, SupportedCipherSuite};

/// Whether this processor is known to have instructions for AES and for the multiplication in GCM. Without them, AES-GCM is several
/// times slower than ChaCha20-Poly1305, and what a cache remembers may tell of its keys.
pub fn aes_in_hardware() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has = std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    let has = std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let has = false;
    has
}

/// The suites that the protocol has, the best one first. The one that all implementations have (RFC 8446 section 9.1) is the
/// fastest where there is hardware for AES.
pub(super) fn in_order(aes_in_hardware: bool) -> Vec<SupportedCipherSuite> {
    let aes = [
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
    ];
    let mut suites = aes.to_vec();
    let at = if aes_in_hardware { aes.len() } else { 0 };
    suites.insert(at, aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256);
    suites
}

/// Whether a server has to insist on its own order. The end without hardware for AES is the slower one, so that its wish
/// counts: a client's is heeded anyway.
pub(super) fn insists(provider: &CryptoProvider) -> bool {
    let first = provider.cipher_suites.first().map(|suite| suite.suite());
    first == Some(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256)
}
