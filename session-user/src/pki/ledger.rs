//! What a CA has issued and revoked.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{PkiError, files};

/// The CA's memory, in `issued.toml`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Ledger {
    /// Every unit's identity is `spiffe://` this `/` its name.
    pub trust_domain: String,
    /// Rises with every CRL (RFC 5280 section 5.2.3).
    pub crl_number: u64,
    #[serde(default)]
    pub issued: Vec<Entry>,
}

/// One certificate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    pub name: String,
    /// In hexadecimal.
    pub serial: String,
    /// Seconds since 1970.
    pub issued: i64,
    /// Seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<i64>,
}

impl Ledger {
    pub fn new(domain: &str) -> Self {
        Self {
            trust_domain: domain.to_owned(),
            crl_number: 1,
            issued: Vec::new(),
        }
    }

    pub fn load(path: &Path) -> Result<Self, PkiError> {
        let wrong = |reason| PkiError::File {
            path: path.to_owned(),
            reason,
        };
        let text = std::fs::read_to_string(path).map_err(|e| {
            wrong(format!(
                "{e}; is this a folder that `holdfast pki init` made?"
            ))
        })?;
        toml::from_str(&text)
            .map_err(|e| wrong(format!("it is not the list that `holdfast pki` keeps: {e}")))
    }

    pub fn save(&self, path: &Path) -> Result<(), PkiError> {
        let wrong = |reason| PkiError::File {
            path: path.to_owned(),
            reason,
        };
        let text = toml::to_string(self).map_err(|e| wrong(e.to_string()))?;
        files::write_public(path, &text)
    }
}
