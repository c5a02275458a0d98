//! Files of an identity that cannot be used, and what is said of them.

use super::*;

fn error_of(paths: &IdentityPaths) -> String {
    Identity::load(paths).unwrap_err().to_string()
}

fn says(text: &str, path: &Path, parts: &[&str]) {
    assert!(text.starts_with(&path.display().to_string()), "{text}");
    for part in parts {
        assert!(text.contains(part), "no `{part}` in `{text}`");
    }
}

#[test]
fn every_file_is_named_with_what_is_wrong_with_it() {
    let fleet = Fleet::new();
    fleet.unit("a");
    fleet.unit("b");
    let good = fleet.paths("a");
    let nowhere = fleet.path().join("nowhere");
    let empty = pem_file(fleet.path(), "empty", "");
    let broken = pem_file(
        fleet.path(),
        "broken",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    );

    let with = |change: &dyn Fn(&mut IdentityPaths)| {
        let mut paths = good.clone();
        change(&mut paths);
        error_of(&paths)
    };
    says(
        &with(&|p| p.certificate.clone_from(&nowhere)),
        &nowhere,
        &["cannot be read", "No such file"],
    );
    says(
        &with(&|p| p.certificate.clone_from(&empty)),
        &empty,
        &["no certificate in PEM"],
    );
    says(
        &with(&|p| p.certificate.clone_from(&broken)),
        &broken,
        &["cannot be parsed"],
    );
    says(
        &with(&|p| p.key.clone_from(&nowhere)),
        &nowhere,
        &["cannot be read"],
    );
    says(
        &with(&|p| p.key.clone_from(&empty)),
        &empty,
        &["no private key in PEM"],
    );
    let other = fleet.path().join("b.key");
    says(
        &with(&|p| p.key.clone_from(&other)),
        &other,
        &["does not belong to the certificate"],
    );
    says(
        &with(&|p| p.ca.clone_from(&empty)),
        &empty,
        &["no certificate in PEM"],
    );
    says(
        &with(&|p| p.ca.clone_from(&broken)),
        &broken,
        &["not the certificate of a CA"],
    );
    says(
        &with(&|p| p.crl = Some(nowhere.clone())),
        &nowhere,
        &["cannot be read"],
    );
    says(
        &with(&|p| p.crl = Some(p.ca.clone())),
        &good.ca,
        &["no certificate revocation list"],
    );
    // The CA's own certificate says who vouches, not who somebody is.
    let ca = fleet.path().join("ca.crt");
    says(
        &with(&|p| {
            p.certificate.clone_from(&ca);
            p.key = fleet.path().join("ca.key");
        }),
        &ca,
        &["not a unit's name"],
    );
}

#[test]
fn a_crl_is_optional() {
    let fleet = Fleet::new();
    fleet.unit("a");
    let mut paths = fleet.paths("a");
    paths.crl = None;
    let server = load(&paths);
    let client = fleet.unit("c");
    fleet.revoke("c");
    // Without a list nobody is revoked.
    let (near, far) = shake(&client, &server, "a");
    assert!(near.is_ok() && far.is_ok());
}

#[test]
fn a_reload_that_fails_keeps_what_was_there() {
    let fleet = Fleet::new();
    let server = fleet.unit("b");
    let client = fleet.unit("a");
    let paths = fleet.paths("b");
    let crl = std::fs::read_to_string(fleet.path().join("crl.pem")).unwrap();
    std::fs::write(&paths.certificate, "nonsense").unwrap();
    let error = server.reload().unwrap_err().to_string();
    says(&error, &paths.certificate, &["no certificate in PEM"]);
    assert_eq!(server.name().name, "b");
    let (near, far) = shake(&client, &server, "b");
    assert!(near.is_ok() && far.is_ok());
    // And one that works takes the new certificate.
    let before = server.not_after();
    fleet.issue("b", ahead(60), pki::UNIT_VALIDITY);
    pem_file(fleet.path(), "crl.pem", &crl);
    server.reload().unwrap();
    assert!(server.not_after() > before);
}
