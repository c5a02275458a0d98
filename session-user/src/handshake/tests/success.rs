//! Handshakes that end well, and bytes around them.

use rustls::crypto::aws_lc_rs::kx_group;
use session_proto::seal::Aead;

use super::super::identity::provider;
use super::super::suites;
use super::*;

#[test]
fn two_units_agree_on_a_secret_and_on_each_other() {
    let fleet = Fleet::new();
    let (client, server) = (fleet.unit("lorry-17"), fleet.unit("gateway"));
    let (near, far) = shake(&client, &server, "gateway");
    let (near, far) = (near.unwrap(), far.unwrap());
    assert_eq!(near.secret, far.secret);
    assert_ne!(near.secret, [0; 32]);
    assert_eq!(near.aead, far.aead);
    let best = if suites::aes_in_hardware() {
        Aead::Aes128Gcm
    } else {
        Aead::ChaCha20Poly1305
    };
    assert_eq!(near.aead, best);
    assert_eq!(near.group, "X25519MLKEM768");
    assert_eq!(far.group, "X25519MLKEM768");
    assert_eq!(near.peer.name.uri(), "spiffe://fleet.example/gateway");
    assert_eq!(far.peer.name.uri(), "spiffe://fleet.example/lorry-17");
    // Another handshake of the same two is another secret.
    let again = shake(&client, &server, "gateway").0.unwrap();
    assert_ne!(again.secret, near.secret);
}

#[test]
fn a_name_may_be_a_whole_spiffe_id() {
    let fleet = Fleet::new();
    let (client, server) = (fleet.unit("a"), fleet.unit("depot/b"));
    for name in ["depot/b", "spiffe://fleet.example/depot/b"] {
        let (near, far) = shake(&client, &server, name);
        assert!(near.is_ok() && far.is_ok(), "{name}");
    }
}

/// ChaCha20-Poly1305, if the processor of one of the two would have to do AES by itself.
#[test]
fn the_aead_suits_both_processors() {
    let fleet = Fleet::new();
    let unit = |name, aes_in_hardware| {
        fleet.unit(name);
        let mut identity = Identity::load(&fleet.paths(name)).unwrap();
        let mut provider = (*provider()).clone();
        provider.cipher_suites = suites::in_order(aes_in_hardware);
        identity.provider = Arc::new(provider);
        Arc::new(identity)
    };
    for (client, server, aead) in [
        (true, true, Aead::Aes128Gcm),
        (true, false, Aead::ChaCha20Poly1305),
        (false, true, Aead::ChaCha20Poly1305),
        (false, false, Aead::ChaCha20Poly1305),
    ] {
        let (near, far) = shake(&unit("a", client), &unit("b", server), "b");
        assert_eq!(
            (near.unwrap().aead, far.unwrap().aead),
            (aead, aead),
            "{client} {server}"
        );
    }
}

/// The others are there for peers that offer nothing better.
#[test]
fn every_aead_can_be_had() {
    let fleet = Fleet::new();
    let server = fleet.unit("b");
    for (suite, aead) in suites::in_order(true).into_iter().zip([
        Aead::Aes128Gcm,
        Aead::Aes256Gcm,
        Aead::ChaCha20Poly1305,
    ]) {
        fleet.unit("a");
        let mut client = Identity::load(&fleet.paths("a")).unwrap();
        let mut only = (*provider()).clone();
        only.cipher_suites = vec![suite];
        client.provider = Arc::new(only);
        let (near, far) = shake(&Arc::new(client), &server, "b");
        assert_eq!((near.unwrap().aead, far.unwrap().aead), (aead, aead));
    }
}

/// A peer built without the post-quantum group is served with X25519.
#[test]
fn plain_x25519_is_accepted_from_a_peer_that_has_nothing_else() {
    let fleet = Fleet::new();
    fleet.unit("a");
    let mut client = Identity::load(&fleet.paths("a")).unwrap();
    let mut plain = (*provider()).clone();
    plain.kx_groups = vec![kx_group::X25519];
    client.provider = Arc::new(plain);
    let (client, server) = (Arc::new(client), fleet.unit("b"));
    let (near, far) = shake(&client, &server, "b");
    assert_eq!(near.unwrap().group, "X25519");
    assert_eq!(far.unwrap().group, "X25519");
    let (near, far) = shake(&server, &client, "a");
    assert_eq!(near.unwrap().group, "X25519");
    assert_eq!(far.unwrap().group, "X25519");
}

/// A responder's first records may come in one segment with its last flight, an initiator's behind
/// its own; not one byte of them is TLS's.
#[test]
fn not_one_byte_too_many_is_taken() {
    let fleet = Fleet::new();
    let (client, server) = (fleet.unit("a"), fleet.unit("b"));
    let mine: Vec<u8> = (0..5_000_u32).map(|i| 0x80 | (i % 128) as u8).collect();
    let sent = mine.clone();
    block_on(async move {
        // Large enough that everything glues together.
        let (mut near, mut far) = duplex(1 << 20);
        let from_client = sent.clone();
        let client_end = async {
            let mut input = BytesMut::new();
            let (_, mut tail) = connect(&mut near, &mut input, &client, "b").await.unwrap();
            near.write_all(&from_client).await.unwrap();
            while input.len() < sent.len() {
                assert_ne!(near.read_buf(&mut input).await.unwrap(), 0);
            }
            assert!(!tail.take_alerts(&mut input).unwrap());
            assert_eq!(input, sent);
        };
        let server_end = async {
            let mut input = BytesMut::new();
            accept(&mut far, &mut input, &server).await.unwrap();
            far.write_all(&mine).await.unwrap();
            while input.len() < mine.len() {
                assert_ne!(far.read_buf(&mut input).await.unwrap(), 0);
            }
            assert_eq!(input, mine);
        };
        tokio::join!(client_end, server_end);
    });
}
