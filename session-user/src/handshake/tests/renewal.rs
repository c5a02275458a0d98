//! Renewal inside a session, and certificates that go bad while one stands.

use super::super::{TlsDriver, TlsState, check_still_valid};
use super::*;

const SESSION: [u8; 16] = [7; 16];

/// Moves bytes between the two, `cut` at a time, until neither has any.
fn converse(near: &mut TlsDriver, far: &mut TlsDriver, cut: usize) -> Result<(), HandshakeError> {
    loop {
        let (up, down) = (near.take_output(), far.take_output());
        if up.is_empty() && down.is_empty() {
            return Ok(());
        }
        for piece in up.chunks(cut) {
            far.feed(piece)?;
        }
        for piece in down.chunks(cut) {
            near.feed(piece)?;
        }
    }
}

fn renew(
    client: &Arc<Identity>,
    server: &Arc<Identity>,
    sessions: [[u8; 16]; 2],
    cut: usize,
) -> [Outcome; 2] {
    let mut near = TlsDriver::reauth_client(client, "b", sessions[0]).unwrap();
    let mut far = TlsDriver::reauth_server(server, sessions[1]).unwrap();
    assert_eq!(near.state(), TlsState::Handshaking);
    converse(&mut near, &mut far, cut).unwrap();
    assert_eq!(near.state(), TlsState::Complete);
    assert_eq!(far.state(), TlsState::Complete);
    [near.outcome().unwrap(), far.outcome().unwrap()]
}

#[test]
fn both_ends_renew_to_one_secret_however_the_bytes_are_cut() {
    let fleet = Fleet::new();
    let (client, server) = (fleet.unit("a"), fleet.unit("b"));
    let mut seen = Vec::new();
    for cut in [1, 2, 5, 6, 100, 1 << 16] {
        let [near, far] = renew(&client, &server, [SESSION; 2], cut);
        assert_eq!(near.secret, far.secret);
        assert_eq!(near.peer.name.name, "b");
        assert_eq!(far.peer.name.name, "a");
        assert_eq!(near.group, "X25519MLKEM768");
        assert!(!seen.contains(&near.secret), "a secret came twice");
        seen.push(near.secret);
    }
}

#[test]
fn a_renewal_belongs_to_its_session() {
    let fleet = Fleet::new();
    let (client, server) = (fleet.unit("a"), fleet.unit("b"));
    let [near, far] = renew(&client, &server, [SESSION, [8; 16]], 1000);
    assert_ne!(near.secret, far.secret);
}

/// The same handshake as the beginning of a session gives another secret than as a renewal.
#[test]
fn a_renewal_is_not_a_beginning() {
    let fleet = Fleet::new();
    let (client, server) = (fleet.unit("a"), fleet.unit("b"));
    let mut near = TlsDriver::client(&client, "b").unwrap();
    let mut far = TlsDriver::reauth_server(&server, SESSION).unwrap();
    converse(&mut near, &mut far, 1000).unwrap();
    let (near, far) = (near.outcome().unwrap(), far.outcome().unwrap());
    assert_ne!(near.secret, far.secret);
}

#[test]
fn a_renewal_refuses_whom_a_beginning_would_refuse() {
    let fleet = Fleet::new();
    let client = fleet.unit("a");
    fleet.revoke("a");
    let server = fleet.unit("b");
    let mut near = TlsDriver::reauth_client(&client, "b", SESSION).unwrap();
    let mut far = TlsDriver::reauth_server(&server, SESSION).unwrap();
    let error = converse(&mut near, &mut far, 1000).unwrap_err().to_string();
    assert!(error.contains("revoked"), "{error}");
    assert!(far.outcome().is_err());
    // The alert is there to be sent, and says it to the other end.
    let error = near.feed(&far.take_output()).unwrap_err().to_string();
    assert!(
        error.contains("refused this unit's") && error.contains("revoked"),
        "{error}"
    );
    // Bytes behind a completed handshake are nobody's.
    let (client, server) = (fleet.unit("c"), fleet.unit("b"));
    let mut near = TlsDriver::reauth_client(&client, "b", SESSION).unwrap();
    let mut far = TlsDriver::reauth_server(&server, SESSION).unwrap();
    converse(&mut near, &mut far, 1000).unwrap();
    assert!(far.feed(&[0x80; 40]).is_err());
}

#[test]
fn a_certificate_is_judged_again_while_its_session_stands() {
    let fleet = Fleet::new();
    let client = load(&fleet.issue("a", SystemTime::now(), Duration::from_secs(600)));
    let server = fleet.unit("b");
    let [near, far] = renew(&client, &server, [SESSION; 2], 1000);
    let now = SystemTime::now();
    check_still_valid(&client, &near.peer, now).unwrap();
    check_still_valid(&server, &far.peer, now).unwrap();

    let later = check_still_valid(&server, &far.peer, ahead(700)).unwrap_err();
    assert!(later.is_expired(), "{later}");
    assert!(far.peer.not_after > now && far.peer.not_after < ahead(700));

    fleet.revoke("a");
    check_still_valid(&server, &far.peer, now).unwrap();
    server.reload().unwrap();
    let error = check_still_valid(&server, &far.peer, now).unwrap_err();
    assert!(!error.is_expired());
    assert!(error.to_string().contains("revoked"), "{error}");
    // Revocation outweighs age: the grace of an expired certificate is not for a revoked one.
    let both = check_still_valid(&server, &far.peer, ahead(700)).unwrap_err();
    assert!(both.to_string().contains("revoked"), "{both}");
}
