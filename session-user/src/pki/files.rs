//! Files of the CA: whole or not at all, and keys for their owner's eyes only.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use x509_parser::pem::Pem;

use super::PkiError;

fn failed(path: &Path, error: &std::io::Error) -> PkiError {
    PkiError::File {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

pub(super) fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|e| failed(path, &e))
}

pub(super) fn make_private_dir(dir: &Path) -> Result<(), PkiError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| failed(dir, &e))
}

pub(super) fn write_key(path: &Path, text: &str) -> Result<(), PkiError> {
    write(path, text, 0o600)
}

pub(super) fn write_public(path: &Path, text: &str) -> Result<(), PkiError> {
    write(path, text, 0o644)
}

/// Writes beside the file and renames, so that a reader (an agent that reads its CRL anew) never
/// sees half of it.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.new", std::process::id()));
    let beside = Path::new(&beside);
    let attempt = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(beside, path)
    };
    attempt().map_err(|e| {
        // What is half written is of no use to anybody.
        let _ = fs::remove_file(beside);
        failed(path, &e)
    })
}

/// The serial number of the first certificate in a PEM file, in hexadecimal.
pub(super) fn serial_in(path: &Path) -> Option<String> {
    let text = fs::read(path).ok()?;
    let pem = Pem::iter_from_buffer(&text).next()?.ok()?;
    let cert = pem.parse_x509().ok()?;
    Some(cert.raw_serial_as_string().replace(':', "").to_lowercase())
}
