//! Keys of the receiver: garbage never changes them, and epochs may arrive in any order.

use proptest::collection::vec;
use proptest::prelude::*;
use session_proto::limits::{EPOCHS_LIVE_MAX, RECORD_HEADER_BYTES, TAG_BYTES};
use session_proto::seal::{
    Aead, Direction, Epoch, OpenKeys, SealError, SealKeys, Secret, SessionSecret,
};
use session_proto::wire::{RecordHeader, Space};

const AEAD: Aead = Aead::ChaCha20Poly1305;
const PLAIN: &[u8] = b"application bytes";

fn pair() -> (SealKeys, OpenKeys) {
    let secret = SessionSecret::new(AEAD, &Secret::new([7; 32]));
    let direction = Direction::FromResponder;
    (secret.seal_keys(direction), secret.open_keys(direction))
}

fn renewal() -> Secret {
    Secret::new([9; 32])
}

struct Sealed {
    header: [u8; RECORD_HEADER_BYTES],
    epoch: Epoch,
    number: u64,
    bytes: Vec<u8>,
}

fn seal(keys: &SealKeys, number: u64) -> Sealed {
    let header = RecordHeader {
        space: Space::Retained,
        payload_bytes: PLAIN.len() + TAG_BYTES,
        epoch: keys.epoch().0,
        number,
    }
    .encode();
    let mut bytes = PLAIN.to_vec();
    let tag = keys.retained().seal(&header, number, &mut bytes);
    bytes.extend_from_slice(&tag);
    Sealed {
        header,
        epoch: keys.epoch(),
        number,
        bytes,
    }
}

fn open(keys: &mut OpenKeys, record: &Sealed) -> Result<usize, SealError> {
    let mut bytes = record.bytes.clone();
    let got = keys.open(
        record.epoch,
        None,
        &record.header,
        record.number,
        &mut bytes,
    );
    if let Ok(len) = got {
        assert_eq!(&bytes[..len], PLAIN);
    }
    got
}

proptest! {
    #[test]
    fn garbage_changes_no_key(
        epochs in vec((0u16..3, 0u16..8), 1..20),
        transport: Option<u64>,
        garbage in vec(any::<u8>(), 0..64),
        number in 0u64..1 << 62,
    ) {
        let (mut sealer, mut opener) = pair();
        opener.install_generation(AEAD, &renewal());
        for (generation, step) in epochs {
            let epoch = Epoch(u32::from(generation) << 16 | u32::from(step));
            let mut bytes = garbage.clone();
            let got = opener.open(epoch, transport, &[0x80; RECORD_HEADER_BYTES], number, &mut bytes);
            prop_assert!(got.is_err());
            prop_assert_eq!((opener.live(), opener.newest()), (1, Epoch(0)));
        }
        // Everything that could be opened before can be opened now.
        prop_assert_eq!(open(&mut opener, &seal(&sealer, 0)), Ok(PLAIN.len()));
        sealer.ratchet();
        prop_assert_eq!(open(&mut opener, &seal(&sealer, 1)), Ok(PLAIN.len()));
        sealer.advance_generation(AEAD, &renewal());
        prop_assert_eq!(open(&mut opener, &seal(&sealer, 2)), Ok(PLAIN.len()));
    }

    #[test]
    fn a_changed_bit_anywhere_is_noticed(bit in 0usize..(RECORD_HEADER_BYTES + PLAIN.len() + TAG_BYTES) * 8) {
        let (sealer, mut opener) = pair();
        let mut record = seal(&sealer, 3);
        let (at, mask) = (bit / 8, 1 << (bit % 8));
        if at < RECORD_HEADER_BYTES {
            record.header[at] ^= mask;
        } else {
            record.bytes[at - RECORD_HEADER_BYTES] ^= mask;
        }
        prop_assert_eq!(open(&mut opener, &record), Err(SealError::NotAuthentic));
    }
}

/// Two transports: what was sealed last can come first, across steps and a generation.
#[test]
fn epochs_arrive_in_any_order() {
    let (mut sealer, _) = pair();
    let mut records = vec![seal(&sealer, 0)];
    sealer.ratchet();
    records.push(seal(&sealer, 1));
    sealer.ratchet();
    records.push(seal(&sealer, 2));
    sealer.advance_generation(AEAD, &renewal());
    records.push(seal(&sealer, 3));
    let orders: [[usize; 4]; 7] = [
        [0, 1, 2, 3],
        [3, 0, 1, 2],
        [3, 2, 1, 0],
        [0, 3, 2, 1],
        [1, 3, 0, 2],
        [2, 3, 1, 0],
        [3, 1, 2, 0],
    ];
    for order in orders {
        let (_, mut opener) = pair();
        opener.install_generation(AEAD, &renewal());
        for index in order {
            let got = open(&mut opener, &records[index]);
            assert_eq!(got, Ok(PLAIN.len()), "record {index} in order {order:?}");
        }
        assert_eq!(opener.live(), EPOCHS_LIVE_MAX);
        assert_eq!(opener.newest(), Epoch(1 << 16));
    }
}

#[test]
fn a_fifth_epoch_waits_for_one_to_retire() {
    let (mut sealer, mut opener) = pair();
    for number in 0..4 {
        opener.announce(sealer.epoch(), number);
        assert!(open(&mut opener, &seal(&sealer, number)).is_ok());
        sealer.ratchet();
    }
    let fifth = seal(&sealer, 4);
    assert_eq!(
        open(&mut opener, &fifth),
        Err(SealError::Unexpected(fifth.epoch))
    );
    assert!(opener.retire(1));
    assert_eq!(opener.live(), 3);
    assert!(open(&mut opener, &fifth).is_ok());
}

/// REKEY is the last record of its epoch: once it and all before have arrived, the old key goes
/// at once, and the new one must not need it any more.
#[test]
fn the_old_key_goes_with_its_last_record() {
    let (mut sealer, mut opener) = pair();
    let old = seal(&sealer, 0);
    assert!(open(&mut opener, &old).is_ok());
    let next = sealer.next_step().unwrap();
    opener.announce(next, 1);
    assert!(opener.retire(1));
    assert_eq!((opener.live(), opener.newest()), (1, next));
    assert_eq!(open(&mut opener, &old), Err(SealError::Retired(old.epoch)));
    sealer.ratchet();
    assert!(open(&mut opener, &seal(&sealer, 1)).is_ok());
}

#[test]
fn a_generation_that_was_not_agreed_is_refused() {
    let (mut sealer, mut opener) = pair();
    sealer.advance_generation(AEAD, &renewal());
    let record = seal(&sealer, 0);
    assert_eq!(
        open(&mut opener, &record),
        Err(SealError::Unexpected(record.epoch))
    );
    opener.install_generation(AEAD, &Secret::new([8; 32]));
    assert_eq!(open(&mut opener, &record), Err(SealError::NotAuthentic));
    assert_eq!(opener.newest(), Epoch(0));
}

/// The two directions, the two spaces and every transport have keys of their own.
#[test]
fn no_key_opens_for_another() {
    let secret = SessionSecret::new(AEAD, &Secret::new([7; 32]));
    let sealer = secret.seal_keys(Direction::FromInitiator);
    let record = seal(&sealer, 0);
    let mut opener = secret.open_keys(Direction::FromResponder);
    assert_eq!(open(&mut opener, &record), Err(SealError::NotAuthentic));
    let mut opener = secret.open_keys(Direction::FromInitiator);
    for transport in [0, 1, 2] {
        let mut bytes = record.bytes.clone();
        let got = opener.open(record.epoch, Some(transport), &record.header, 0, &mut bytes);
        assert_eq!(got, Err(SealError::NotAuthentic));
    }
    let ours = sealer.transport_key(2);
    let mut bytes = PLAIN.to_vec();
    let tag = ours.seal(&record.header, 0, &mut bytes);
    bytes.extend_from_slice(&tag);
    for (transport, opens) in [(2, true), (3, false), (0, false)] {
        let mut copy = bytes.clone();
        let got = opener.open(Epoch(0), Some(transport), &record.header, 0, &mut copy);
        assert_eq!(got.is_ok(), opens, "transport {transport}");
    }
    assert!(open(&mut opener, &record).is_ok());
}

#[test]
fn secrets_do_not_show_in_logs() {
    let (sealer, opener) = pair();
    let shown = format!(
        "{sealer:?} {opener:?} {:?}",
        SessionSecret::new(AEAD, &renewal()).names()
    );
    assert!(shown.contains("Secret(..)") && shown.contains("RecordKey(..)"));
    let key_like = shown.split(|c: char| !c.is_ascii_digit() && c != ',' && c != ' ');
    assert!(
        key_like
            .filter(|run| run.matches(", ").count() >= 11)
            .count()
            <= 1,
        "more than the session id is shown: {shown}"
    );
}
