//! The CA's life: made, issuing, revoking, and never losing what is there.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use super::{CA_VALIDITY, Issued, PkiError, UNIT_VALIDITY, init, issue, revoke};

const DOMAIN: &str = "fleet.example";

fn ca() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), DOMAIN, CA_VALIDITY, SystemTime::now(), true).unwrap();
    dir
}

fn unit(dir: &Path, name: &str) -> Result<Issued, PkiError> {
    issue(dir, name, UNIT_VALIDITY, dir, SystemTime::now(), false)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// The CRL's number, and the serials in it in hexadecimal.
fn crl(dir: &Path) -> (String, Vec<String>) {
    let text = fs::read(dir.join("crl.pem")).unwrap();
    let pem = Pem::iter_from_buffer(&text).next().unwrap().unwrap();
    let (_, crl) = CertificateRevocationList::from_der(&pem.contents).unwrap();
    let serials = crl
        .iter_revoked_certificates()
        .map(|c| c.raw_serial_as_string().replace(':', ""))
        .collect();
    (crl.crl_number().unwrap().to_string(), serials)
}

#[test]
fn a_ca_keeps_its_key_to_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("new/pki");
    init(&folder, DOMAIN, CA_VALIDITY, SystemTime::now(), false).unwrap();
    assert_eq!(mode(&folder), 0o700);
    assert_eq!(mode(&folder.join("ca.key")), 0o600);
    assert_eq!(mode(&folder.join("ca.crt")), 0o644);
    assert_eq!(crl(&folder).1, Vec::<String>::new());
}

#[test]
fn nothing_is_replaced_unless_told_to() {
    let dir = ca();
    let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
    let (key, crt) = (read("ca.key"), read("ca.crt"));
    let again = |force| init(dir.path(), DOMAIN, CA_VALIDITY, SystemTime::now(), force);
    assert!(matches!(again(false), Err(PkiError::Exists(_))));
    assert_eq!((read("ca.key"), read("ca.crt")), (key.clone(), crt));

    let first = unit(dir.path(), "lorry-17").unwrap();
    assert_eq!(mode(&first.key), 0o600);
    let unit_key = read("lorry-17.key");
    assert!(matches!(
        unit(dir.path(), "lorry-17"),
        Err(PkiError::Exists(_))
    ));
    // One file of the two is enough to be in the way.
    fs::remove_file(&first.certificate).unwrap();
    assert!(matches!(
        unit(dir.path(), "lorry-17"),
        Err(PkiError::Exists(_))
    ));
    assert_eq!(read("lorry-17.key"), unit_key);
    let now = SystemTime::now();
    let second = issue(dir.path(), "lorry-17", UNIT_VALIDITY, dir.path(), now, true).unwrap();
    assert_ne!(first.serial, second.serial);
    assert_ne!(read("lorry-17.key"), unit_key);

    again(true).unwrap();
    assert_ne!(read("ca.key"), key);
}

/// `--force` is for a unit's own files: the CA's have names that a unit could have.
#[test]
fn a_unit_cannot_take_the_place_of_the_ca() {
    let dir = ca();
    let key = fs::read(dir.path().join("ca.key")).unwrap();
    let now = SystemTime::now();
    let error = issue(dir.path(), "ca", UNIT_VALIDITY, dir.path(), now, true).unwrap_err();
    assert!(matches!(error, PkiError::Name(_)), "{error}");
    assert_eq!(fs::read(dir.path().join("ca.key")).unwrap(), key);
    // Elsewhere it is a name like any other.
    let out = dir.path().join("out");
    issue(dir.path(), "ca", UNIT_VALIDITY, &out, now, false).unwrap();
}

#[test]
fn names_are_checked_and_made_into_files() {
    let dir = ca();
    for bad in [
        "",
        "a b",
        "../x",
        "a//b",
        ".",
        "x/..",
        "é",
        "a\n",
        "spiffe://",
    ] {
        let error = unit(dir.path(), bad).unwrap_err();
        assert!(matches!(error, PkiError::Name(_)), "{bad:?}: {error}");
    }
    let error = unit(dir.path(), "spiffe://other.example/x").unwrap_err();
    assert!(
        error.to_string().contains("another trust domain"),
        "{error}"
    );
    let issued = unit(dir.path(), "depot/lorry-17").unwrap();
    assert_eq!(issued.uri, "spiffe://fleet.example/depot/lorry-17");
    assert_eq!(issued.certificate, dir.path().join("depot_lorry-17.crt"));
    let whole = unit(dir.path(), "spiffe://fleet.example/x").unwrap();
    assert_eq!(whole.uri, "spiffe://fleet.example/x");
    for bad in ["", "Fleet", "a b", "a/b"] {
        let made = init(
            &dir.path().join("c"),
            bad,
            CA_VALIDITY,
            SystemTime::now(),
            false,
        );
        assert!(matches!(made, Err(PkiError::Name(_))), "{bad:?}");
    }
}

#[test]
fn a_unit_is_revoked_by_name_serial_or_file() {
    let dir = ca();
    let now = SystemTime::now();
    let [a, b, c] = ["a", "b", "c"].map(|name| unit(dir.path(), name).unwrap());
    let kept = unit(dir.path(), "kept").unwrap();
    let renewed = issue(dir.path(), "a", UNIT_VALIDITY, dir.path(), now, true).unwrap();
    // By name: every certificate of the unit.
    let mut both = revoke(dir.path(), "a", now).unwrap();
    both.sort();
    let mut expected = [a.serial, renewed.serial];
    expected.sort();
    assert_eq!(both, expected);
    // As other tools print serials.
    let colons: Vec<String> = b
        .serial
        .as_bytes()
        .chunks(2)
        .map(|p| String::from_utf8_lossy(p).to_uppercase())
        .collect();
    assert_eq!(
        revoke(dir.path(), &colons.join(":"), now).unwrap(),
        [b.serial]
    );
    let file = c.certificate.display().to_string();
    assert_eq!(revoke(dir.path(), &file, now).unwrap(), [c.serial]);

    let (number, serials) = crl(dir.path());
    assert_eq!(number, "4");
    assert_eq!(serials.len(), 4);
    assert!(!serials.contains(&kept.serial));
    // Again is fine, and makes a newer list.
    assert_eq!(revoke(dir.path(), "a", now).unwrap(), Vec::<String>::new());
    assert_eq!(crl(dir.path()), ("5".to_owned(), serials));
}

#[test]
fn what_was_never_issued_cannot_be_revoked() {
    let dir = ca();
    let before = crl(dir.path());
    let error = revoke(dir.path(), "ghost", SystemTime::now()).unwrap_err();
    assert!(error.to_string().contains("`ghost`"), "{error}");
    // A certificate of another CA is not this one's to revoke.
    let other = ca();
    let stranger = unit(other.path(), "stranger").unwrap();
    let file = stranger.certificate.display().to_string();
    let error = revoke(dir.path(), &file, SystemTime::now()).unwrap_err();
    assert!(matches!(error, PkiError::Unknown(_)), "{error}");
    assert_eq!(crl(dir.path()), before);
}

#[test]
fn a_folder_that_is_no_ca_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = unit(dir.path(), "a").unwrap_err().to_string();
    assert!(
        error.contains("issued.toml") && error.contains("pki init"),
        "{error}"
    );
    let dir = ca();
    fs::write(dir.path().join("issued.toml"), "trust_domain = 7").unwrap();
    let error = unit(dir.path(), "a").unwrap_err().to_string();
    assert!(error.contains("issued.toml"), "{error}");
    let dir = ca();
    fs::write(dir.path().join("ca.key"), "nonsense").unwrap();
    let error = unit(dir.path(), "a").unwrap_err();
    assert!(matches!(error, PkiError::Make(_)), "{error}");
    assert!(!dir.path().join("a.crt").exists());
}

#[test]
fn validity_is_what_was_asked_for() {
    let dir = ca();
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    let issued = issue(dir.path(), "a", hour, dir.path(), now, false).unwrap();
    let text = fs::read(&issued.certificate).unwrap();
    let pem = Pem::iter_from_buffer(&text).next().unwrap().unwrap();
    let cert = pem.parse_x509().unwrap();
    let validity = cert.validity();
    let since = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let left = validity.not_after.timestamp() - i64::try_from(since).unwrap();
    assert!((3599..=3601).contains(&left), "{left}");
    assert!(validity.not_before.timestamp() <= i64::try_from(since).unwrap());
}
