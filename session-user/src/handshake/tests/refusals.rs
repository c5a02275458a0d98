//! Every refusal, in words, at both ends.

use std::io::{Read, Write};

use rustls::{ClientConfig, ClientConnection};
use rustls_pki_types::ServerName;

use super::super::verify::Verifier;
use super::super::{CertificateFault, PeerName};
use super::*;

/// Both ends' words.
fn words(ends: (ClientEnd, ServerEnd)) -> (String, String) {
    let text = |end: Result<Outcome, HandshakeError>| end.unwrap_err().to_string();
    (text(ends.0), text(ends.1))
}

fn holds(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no `{part}` in `{text}`");
    }
}

#[test]
fn an_expired_certificate_is_refused_at_either_end() {
    let fleet = Fleet::new();
    let good = fleet.unit("good");
    let old = load(&fleet.issue("old", ago(1000), Duration::from_secs(500)));
    let (client, server) = words(shake(&old, &good, "good"));
    holds(&client, &["refused this unit's", "expired"]);
    holds(
        &server,
        &["peer's certificate is refused", "has expired", "pki issue"],
    );
    let (client, server) = words(shake(&good, &old, "old"));
    holds(&client, &["peer's certificate is refused", "has expired"]);
    holds(&server, &["refused this unit's", "expired"]);
}

#[test]
fn a_certificate_from_the_future_points_to_the_clocks() {
    let fleet = Fleet::new();
    let good = fleet.unit("good");
    // Backdated by an hour, so this one begins in an hour.
    let young = load(&fleet.issue("young", ahead(7200), pki::UNIT_VALIDITY));
    let (client, server) = words(shake(&young, &good, "good"));
    holds(&client, &["refused this unit's", "clocks"]);
    holds(&server, &["not valid yet", "clocks"]);
    let (client, server) = words(shake(&good, &young, "young"));
    holds(&client, &["not valid yet", "clocks"]);
    holds(&server, &["refused this unit's", "clocks"]);
}

#[test]
fn a_revoked_certificate_is_refused_at_either_end() {
    let fleet = Fleet::new();
    let bad = fleet.unit("bad");
    fleet.revoke("bad");
    let good = fleet.unit("good");
    let (client, server) = words(shake(&bad, &good, "good"));
    holds(&client, &["refused this unit's", "revoked"]);
    holds(&server, &["peer's certificate is refused", "revoked"]);
    let (client, server) = words(shake(&good, &bad, "bad"));
    holds(&client, &["peer's certificate is refused", "revoked"]);
    holds(&server, &["refused this unit's", "revoked"]);
}

#[test]
fn another_ca_is_not_ours() {
    let (ours, theirs) = (Fleet::new(), Fleet::new());
    let (near, far) = (ours.unit("a"), theirs.unit("b"));
    let (client, server) = words(shake(&near, &far, "b"));
    holds(
        &client,
        &[
            "peer's certificate is refused",
            "not issued by the configured CA",
        ],
    );
    holds(
        &server,
        &["refused this unit's", "not issued by the configured CA"],
    );
    // A server that trusts both refuses the one that is not of its own.
    let both = std::fs::read_to_string(ours.path().join("ca.crt")).unwrap()
        + &std::fs::read_to_string(theirs.path().join("ca.crt")).unwrap();
    let mut paths = ours.paths("a");
    paths.ca = pem_file(ours.path(), "both.crt", &both);
    let (client, server) = words(shake(&load(&paths), &far, "b"));
    holds(
        &client,
        &["refused this unit's", "not issued by the configured CA"],
    );
    holds(
        &server,
        &[
            "peer's certificate is refused",
            "not issued by the configured CA",
        ],
    );
}

#[test]
fn the_name_must_be_the_one_that_was_dialled() {
    let fleet = Fleet::new();
    let (client, server) = (fleet.unit("a"), fleet.unit("b"));
    let (near, far) = words(shake(&client, &server, "c"));
    holds(
        &near,
        &["fleet.example/b, not for spiffe://fleet.example/c"],
    );
    holds(&far, &["another name than the peer expects"]);
    let (near, _) = words(shake(&client, &server, "spiffe://other.example/b"));
    holds(&near, &["not for spiffe://other.example/b"]);
    let impossible = shake(&client, &server, "no name").0.unwrap_err();
    assert!(
        matches!(impossible, HandshakeError::Identity(_)),
        "{impossible}"
    );
}

/// A server takes any unit, but only of its own trust domain, whoever signed it.
#[test]
fn a_unit_of_another_trust_domain_is_refused() {
    let fleet = Fleet::new();
    let server = fleet.unit("b");
    let other = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    pki::init(other.path(), "other.example", pki::CA_VALIDITY, now, false).unwrap();
    // The same CA key under another domain.
    for file in ["ca.crt", "ca.key"] {
        std::fs::copy(fleet.path().join(file), other.path().join(file)).unwrap();
    }
    pki::issue(
        other.path(),
        "a",
        pki::UNIT_VALIDITY,
        other.path(),
        now,
        false,
    )
    .unwrap();
    let stranger = Fleet { dir: other };
    let client = load(&stranger.paths("a"));
    let (near, far) = words(shake(&client, &server, "spiffe://fleet.example/b"));
    holds(&near, &["another name than the peer expects"]);
    holds(&far, &["any unit of fleet.example"]);
}

/// A TLS client of somebody else's making. `certificate`: whether it shows a good one.
fn strange_client(fleet: &Fleet, alpn: &[&[u8]], certificate: bool) -> ClientConnection {
    let identity = fleet.unit("strange");
    let material = identity.material();
    let expected = PeerName::parse("b", DOMAIN).unwrap();
    let verifier = Verifier::of_server(Arc::clone(&identity), expected);
    let builder = ClientConfig::builder_with_provider(Arc::clone(&identity.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = if certificate {
        builder
            .with_client_auth_cert(material.chain.clone(), material.key.clone_key())
            .unwrap()
    } else {
        builder.with_no_client_auth()
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    let name = ServerName::try_from("b.example").unwrap();
    ClientConnection::new(Arc::new(config), name).unwrap()
}

/// The server's error against `client`, and what the client made of the server's answer.
fn against(fleet: &Fleet, mut client: ClientConnection) -> (HandshakeError, String) {
    let server = fleet.unit("b");
    block_on(async move {
        let (mut near, far) = duplex(1 << 20);
        let their_end = async {
            loop {
                let mut out = Vec::new();
                while client.wants_write() {
                    client.write_tls(&mut out).unwrap();
                }
                if near.write_all(&out).await.is_err() {
                    return "nobody listens".to_owned();
                }
                let mut input = BytesMut::new();
                if near.read_buf(&mut input).await.unwrap_or(0) == 0 {
                    return "closed without a word".to_owned();
                }
                client.read_tls(&mut &input[..]).unwrap();
                if let Err(error) = client.process_new_packets() {
                    return error.to_string();
                }
                // What it would say as an application; it is not sent before the handshake's end.
                let _ = client.writer().flush();
                let _ = client.reader().read(&mut [0; 16]);
            }
        };
        let (heard, end) = tokio::join!(their_end, server_end(far, server));
        (end.unwrap_err(), heard)
    })
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let fleet = Fleet::new();
    let client = strange_client(&fleet, &[b"holdfast/1"], false);
    let (error, heard) = against(&fleet, client);
    assert!(
        matches!(error, HandshakeError::Peer(CertificateFault::Missing)),
        "{error}"
    );
    holds(&heard, &["CertificateRequired"]);
}

#[test]
fn another_protocol_over_tls_is_refused() {
    let fleet = Fleet::new();
    let client = strange_client(&fleet, &[b"h2", b"http/1.1"], true);
    let (error, heard) = against(&fleet, client);
    assert!(matches!(error, HandshakeError::Alpn), "{error}");
    holds(&heard, &["NoApplicationProtocol"]);
    // One that names no protocol at all completes TLS; it is refused all the same.
    let client = strange_client(&fleet, &[], true);
    let (error, _) = against(&fleet, client);
    assert!(matches!(error, HandshakeError::Alpn), "{error}");
}

/// A ClientHello that offers TLS 1.2 alone: the versions extension of a good one is overwritten.
#[test]
fn tls_12_is_refused() {
    let fleet = Fleet::new();
    let mut client = strange_client(&fleet, &[b"holdfast/1"], true);
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    // supported_versions (43), 3 bytes, list of 2 bytes, TLS 1.3 (RFC 8446 section 4.2.1).
    let versions = [0, 43, 0, 3, 2, 3, 4];
    let at = hello.windows(7).position(|w| w == versions).unwrap();
    hello[at + 6] = 3;
    let server = fleet.unit("b");
    let (error, answer) = block_on(async move {
        let (mut near, far) = duplex(1 << 20);
        let their_end = async {
            near.write_all(&hello).await.unwrap();
            let mut answer = Vec::new();
            near.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let (answer, end) = tokio::join!(their_end, server_end(far, server));
        (end.unwrap_err(), answer)
    });
    assert!(matches!(error, HandshakeError::Protocol(_)), "{error}");
    // An alert record (21), fatal (2), protocol_version (70).
    assert_eq!(answer[0], 21);
    assert_eq!(answer[5..7], [2, 70]);
}

/// What the server makes of these bytes, followed by the end of the connection.
fn from_bytes(server: &Arc<Identity>, bytes: Vec<u8>) -> HandshakeError {
    let server = Arc::clone(server);
    block_on(async move {
        let (mut near, mut far) = duplex(1 << 20);
        near.write_all(&bytes).await.unwrap();
        near.shutdown().await.unwrap();
        let mut input = BytesMut::new();
        accept(&mut far, &mut input, &server).await.unwrap_err()
    })
}

#[test]
fn bytes_that_are_not_tls_are_refused() {
    let fleet = Fleet::new();
    let server = fleet.unit("b");
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"SSH-2.0-OpenSSH_9.2\r\n",
        &[0; 64],
        &[0x80; 64],
        &[0xff; 64],
    ] {
        let error = from_bytes(&server, bytes.to_vec());
        assert!(matches!(error, HandshakeError::Protocol(_)), "{error}");
    }
    // TLS's own type, and rubbish in it.
    let error = from_bytes(&server, [&[22, 3, 1, 0, 4][..], &[0xff; 4]].concat());
    assert!(matches!(error, HandshakeError::Protocol(_)), "{error}");
}

#[test]
fn a_record_or_handshake_beyond_all_sense_is_not_waited_for() {
    let fleet = Fleet::new();
    let server = fleet.unit("b");
    let error = from_bytes(&server, vec![22, 3, 1, 0xff, 0xff]);
    assert!(matches!(error, HandshakeError::TooLong(_)), "{error}");
    // A handshake message of 16 MiB, in records that are each well formed.
    let mut endless = vec![22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff];
    endless.resize(5 + 0x4000, 0);
    for _ in 0..8 {
        endless.extend([22, 3, 1, 0x40, 0]);
        endless.resize(endless.len() + 0x4000, 0);
    }
    let error = from_bytes(&server, endless);
    assert!(
        matches!(
            error,
            HandshakeError::TooLong(_) | HandshakeError::Protocol(_)
        ),
        "{error}"
    );
}

#[test]
fn a_client_that_stops_anywhere_is_a_broken_connection() {
    let fleet = Fleet::new();
    let server = fleet.unit("b");
    let mut hello = Vec::new();
    strange_client(&fleet, &[b"holdfast/1"], true)
        .write_tls(&mut hello)
        .unwrap();
    for len in (0..hello.len()).step_by(97).chain([hello.len()]) {
        let error = from_bytes(&server, hello[..len].to_vec());
        assert!(matches!(error, HandshakeError::Io(_)), "{len}: {error}");
    }
}

#[test]
fn a_silent_peer_is_left_to_the_callers_time_limit() {
    let fleet = Fleet::new();
    let (client, server) = (fleet.unit("a"), fleet.unit("b"));
    block_on(async move {
        let soon = Duration::from_millis(50);
        let (mut near, mut far) = duplex(1 << 20);
        let mut input = BytesMut::new();
        let waiting = accept(&mut far, &mut input, &server);
        assert!(tokio::time::timeout(soon, waiting).await.is_err());
        let waiting = connect(&mut near, &mut input, &client, "b");
        assert!(tokio::time::timeout(soon, waiting).await.is_err());
    });
}
