//! In the steady state nothing is allocated for a record: not where it is written, sealed and sent, not where it is
//! opened, put in order and read, and not for its acknowledgement.

use session_benches::Pair;
use session_benches::counting::{Counting, counted};
use session_proto::seal::Aead;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Long enough that every queue, map and pool has the size that it needs.
const WARM_UP: usize = 4_000;
const RECORDS: usize = 4_000;
const BULK_BYTES: usize = 64 * 1024;
const SMALL_BYTES: usize = 64;

#[test]
fn bulk_allocates_nothing() {
    let mut pair = Pair::new(Aead::Aes128Gcm);
    let data = vec![0x5a; BULK_BYTES];
    pair.deliver(WARM_UP * BULK_BYTES, &data);
    let before = pair.client.session.stats().records_sent;
    counted(|| pair.deliver(RECORDS * BULK_BYTES, &data)).assert_at_most(0);
    let sent = pair.client.session.stats().records_sent - before;
    assert!(sent as usize >= RECORDS, "only {sent} records");
}

#[test]
fn questions_and_answers_allocate_nothing() {
    let mut pair = Pair::new(Aead::Aes128Gcm);
    let data = [0x5a; SMALL_BYTES];
    for _ in 0..WARM_UP {
        pair.ask(&data);
    }
    counted(|| (0..RECORDS).for_each(|_| pair.ask(&data))).assert_at_most(0);
}

/// Thousands of small records in one read: what nobody has taken is joined in buffers of its own, now and then.
#[test]
fn many_small_records_at_once_allocate_a_buffer_now_and_then() {
    let mut pair = Pair::new(Aead::Aes128Gcm);
    let data = [0x5a; SMALL_BYTES];
    pair.deliver(WARM_UP * SMALL_BYTES, &data);
    let all = counted(|| pair.deliver(RECORDS * SMALL_BYTES, &data));
    all.assert_at_most(RECORDS as u64 / 32);
}
