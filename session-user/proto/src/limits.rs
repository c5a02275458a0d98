//! Every fixed limit of the protocol and the core, in one place, with units at the end of the name.

use std::time::Duration;

/// The only wire version so far.
pub const VERSION: u8 = 1;

/// Longest routing token in a preamble, in bytes: enough for a 256-bit identifier and a checksum.
pub const ROUTING_TOKEN_BYTES_MAX: usize = 64;

/// Bytes of a record's clear header.
pub const RECORD_HEADER_BYTES: usize = 16;

/// Bytes of an AEAD tag; all three AEADs of the protocol have the same.
pub const TAG_BYTES: usize = 16;

/// Largest sealed payload (ciphertext and tag) that this implementation accepts, in bytes. The
/// length field has 24 bits; 256 KiB leaves room for larger records than the 64 KiB sent today.
pub const RECORD_PAYLOAD_BYTES_MAX: usize = 256 * 1024;

/// Smallest `max_record` that a peer may announce, in bytes: a full STREAM frame (22 bytes in front
/// of its data) and the tag, with some room. Senders need not look at the peer's value.
pub const RECORD_PAYLOAD_BYTES_MIN: usize = STREAM_DATA_BYTES_MAX + 64;

/// Most application bytes put into one record. 64 KiB is where the cost per byte stops falling.
pub const STREAM_DATA_BYTES_MAX: usize = 64 * 1024;

/// Most ranges in one ACK, beyond the cumulative number.
pub const ACK_RANGES_MAX: usize = 32;

/// Longest reason text in a CLOSE, in bytes.
pub const REASON_BYTES_MAX: usize = 256;

/// Longest host name in an OPEN, in bytes (RFC 1035 section 2.3.4).
pub const HOST_NAME_BYTES_MAX: usize = 253;

/// Most bytes of one REAUTH frame.
pub const REAUTH_CHUNK_BYTES_MAX: usize = 8 * 1024;

/// Most bytes of one direction of one in-band TLS handshake.
pub const REAUTH_BYTES_MAX: u64 = 64 * 1024;

/// Most bytes of HELLO and ACCEPT parameters.
pub const PARAMS_BYTES_MAX: usize = 1024;

/// Span of record numbers in space R (highest sent minus lowest unacknowledged) that a receiver
/// grants. Bounds its bitmap of received numbers and the sender's list of retained records.
pub const RECORD_WINDOW: u64 = 1 << 16;

/// Part of the peer's record window that application data never uses, so that MAX_*, RESET,
/// REKEY and CLOSE can always be sealed.
pub const RECORD_WINDOW_RESERVE: u64 = 1 << 12;

/// Smallest `record_window` that a peer may announce: as much for data as for the reserve.
pub const RECORD_WINDOW_MIN: u64 = 2 * RECORD_WINDOW_RESERVE;

/// Part of the retained-bytes budget kept for the same frames, in bytes.
pub const RETAIN_RESERVE_BYTES: usize = 256 * 1024;

/// Book-keeping charged to the budget for each retained record, in bytes.
pub const RETAINED_OVERHEAD_BYTES: usize = 96;

/// Bytes of payload in one record of control frames, at most.
pub const CONTROL_RECORD_BYTES_MAX: usize = 4 * 1024;

/// Records in space R after which the sender takes the next epoch's key: far below the 2^24.5
/// full-size records of RFC 8446 section 5.5 for AES-GCM.
pub const REKEY_RECORDS: u64 = 1 << 22;

/// Age after which the sender takes the next epoch's key.
pub const REKEY_AFTER: Duration = Duration::from_secs(3600);

/// Most key epochs alive at once in one direction; a sender stops sealing data rather than exceed it.
pub const EPOCHS_LIVE_MAX: usize = 4;

/// Resume tokens that an acceptor recognises ahead of the highest counter accepted. A dialler that
/// burnt more than this many counters unheard falls back to a full handshake.
pub const RESUME_TOKENS_AHEAD: u64 = 32;

/// Longest time an acknowledgement waits for company.
pub const ACK_DELAY: Duration = Duration::from_millis(5);

/// Least time between acknowledgements of records that come out of order.
pub const ACK_EVERY: Duration = Duration::from_millis(1);

/// Received bytes in space R after which an acknowledgement goes at once.
pub const ACK_BYTES: usize = 256 * 1024;

/// Received records in space R after which an acknowledgement goes at once.
pub const ACK_RECORDS: u32 = 32;

/// Bytes queued on a transport above which no new data is sealed for it, at most: later data, of any
/// stream, must not wait behind more than this in user space.
pub const TRANSPORT_QUEUE_BYTES: usize = 512 * 1024;

/// The same where the transport is slow: two of the largest records.
pub const TRANSPORT_QUEUE_BYTES_MIN: usize = 128 * 1024;

/// In between it is what the transport sends in this time.
pub const QUEUE_TIME: Duration = Duration::from_millis(10);

/// Buffers that a session keeps to use again and did not need for so long, or for double of it, are given back.
pub const POOL_REST: Duration = Duration::from_secs(5);

/// How long a closing session lingers to have its CLOSE acknowledged.
pub const CLOSE_LINGER: Duration = Duration::from_secs(3);

/// Answers to PINGs that wait for a transport's socket; further PINGs are not answered.
pub const PONGS_QUEUED_MAX: usize = 64;

/// Room for one read of a transport's socket, at most, in bytes: several records of full size.
pub const READ_BYTES_MAX: usize = 4 * STREAM_DATA_BYTES_MAX;

/// Buffers that received pieces came in and may hold on to, for all streams of a session together, at most;
/// beyond it they are copied into buffers of their own. Fewer where so many buffers would be more than the
/// memory for what is received. One that several streams hold on to counts for each.
pub const LOOSE_BUFFERS_MAX: usize = 128;

/// Pieces beyond a gap that a session keeps: as many as there are record numbers in the window.
pub const PIECES_AHEAD_MAX: usize = 1 << 16;

/// Streams that one end of a session unpacks at once, at most, and so the other packs. What their codecs keep
/// is beside the session's budget: see [`crate::codec::UNPACKER_BYTES_MAX`].
pub const PACKED_STREAMS_MAX: usize = 32;

/// A stream that sends nothing for so long, or for double of it, gives back what packs it.
pub const PACKING_IDLE: Duration = Duration::from_secs(5);

/// Smallest piece that is packed: below it the headers are most of a record.
pub const PACKED_BYTES_MIN: usize = 128;

/// Smallest piece that a stream may begin to be packed with.
pub const PACKED_FIRST_BYTES_MIN: usize = 512;

/// After an attempt that did not pay, the next one comes after so many bytes of the stream, and after double
/// of it each further time.
pub const PACK_AGAIN_BYTES: u64 = 1 << 20;
/// See [`PACK_AGAIN_BYTES`].
pub const PACK_AGAIN_BYTES_MAX: u64 = 16 << 20;

/// Most transports of one session at once.
pub const TRANSPORTS_MAX: usize = 16;

/// How much later than the mean an answer may come before a transport counts as silent: what a busy
/// host at either end takes.
pub const SILENCE_MARGIN: Duration = Duration::from_millis(20);

/// The same while the round-trip time is not known.
pub const SILENCE_UNKNOWN_RTT: Duration = Duration::from_millis(500);

/// Bytes that go out on a silent transport and on another one too, at most: more would only keep the
/// other from what it carries if the silence was a mistake.
pub const HEDGE_BYTES_MAX: usize = 512 * 1024;

/// Lanes of one path beside its first transport, at most.
pub const LANES_MAX: u64 = 8;

/// The rate of a transport times this is the size of its records: what comes after one does not wait
/// longer for it.
pub const RECORD_TIME: Duration = Duration::from_millis(1);

/// Application bytes in one record, at least, where there are so many: with what is around them, a segment
/// of a path with an MTU of 1500.
pub const RECORD_DATA_BYTES_MIN: usize = 1380;

/// The same while the rate is not known.
pub const RECORD_DATA_BYTES_UNKNOWN: usize = 16 * 1024;

/// Bytes queued on a transport in user space above which bonded records go elsewhere.
pub const BOND_QUEUE_BYTES: usize = 64 * 1024;

/// First credit of a stream, at least and at most, in bytes: a request, and the first flight of an answer.
pub const FIRST_WINDOW_MIN: u64 = 4 * 1024;
/// See [`FIRST_WINDOW_MIN`].
pub const FIRST_WINDOW_MAX: u64 = 256 * 1024;

/// Once an application has taken so many bytes of a stream it is taken to read, and the stream's credit grows: less may
/// lie in the buffers of its kernel.
pub const PROVEN_BYTES: u64 = 512 * 1024;

/// Bytes that arrive out of order when the slowest of the bonded transports is used as well, at most;
/// where it would be more, records wait for a faster one.
pub const BOND_REORDER_BYTES: usize = 1 << 20;

/// Credit of one bonded stream: what its receiver may have to hold beyond a gap.
pub const BOND_WINDOW_BYTES: u64 = 4 << 20;

/// Bytes queued in user space on one of two redundant transports above which records wait: two records, and
/// at least so many.
pub const PAIR_QUEUE_BYTES_MIN: usize = 8 * 1024;

/// Bytes queued in user space on the transport that a soft handover moves to above which the old one goes
/// on sending.
pub const EASE_QUEUE_BYTES: usize = 16 * 1024;

/// For so long, at most.
pub const EASE_TIME: Duration = Duration::from_secs(1);

/// While redundant records travel, each of the two transports is asked so often whether it answers: an
/// acknowledgement over the other one says nothing of it.
pub const REDUNDANT_ASK_EVERY: Duration = Duration::from_millis(100);

/// Redundant records wait for so long for a transport whose socket takes nothing: a paced one takes
/// something every few milliseconds.
pub const REDUNDANT_WAIT: Duration = Duration::from_millis(12);

/// Longest datagram of a flow, in bytes: what UDP over IPv4 carries (RFC 768, RFC 791).
pub const DATAGRAM_BYTES_MAX: usize = 65_507;

/// Bytes of the clear header of a packet of space D.
pub const PACKET_HEADER_BYTES: usize = 21;

/// Numbers below the highest one received that are still told apart, for packets of space D and for
/// numbered datagrams.
pub const REPLAY_WINDOW: u64 = 4096;

/// Connection ids that a receiver recognises ahead of the highest counter that it has seen, and behind
/// it.
pub const CONNECTIONS_AHEAD: u64 = 32;

/// Packets of one session that did not open after which no more are tried: the integrity limit of
/// AEAD_CHACHA20_POLY1305 (RFC 9001 section 6.6), below that of AES-GCM.
pub const FORGED_PACKETS_MAX: u64 = 1 << 36;

/// Gaps in the ids of a peer's flows that are remembered; the lowest beyond that are taken for over.
pub const FLOW_GAPS_MAX: usize = 1024;

/// Datagrams of which only a part has come, of one session, at most.
pub const PARTIALS_MAX: usize = 16;

/// Bytes kept for them, at most.
pub const PARTIAL_BYTES_MAX: usize = 256 * 1024;

/// The rest of a datagram is waited for so long.
pub const PARTIAL_TIME: Duration = Duration::from_secs(2);

/// Datagrams that wait for the application's end, and their bytes, at most; then the oldest go.
pub const DATAGRAMS_WAITING_MAX: usize = 1024;
/// See [`DATAGRAMS_WAITING_MAX`].
pub const DATAGRAM_BYTES_WAITING_MAX: usize = 512 * 1024;

/// Bytes of datagrams that wait for a TCP transport above which further ones are dropped, at most.
pub const DATAGRAM_QUEUE_BYTES: usize = 64 * 1024;

/// The same where the transport is slow.
pub const DATAGRAM_QUEUE_BYTES_MIN: usize = 4 * 1024;

/// In between it is what the transport sends in this time: what is late in a conversation is of no use.
pub const DATAGRAM_QUEUE_TIME: Duration = Duration::from_millis(100);

/// Bytes of packets that wait for a driver that takes none; then the oldest go.
pub const UDP_QUEUE_BYTES: usize = 512 * 1024;

/// UDP payload that a path is taken to carry until it is known (RFC 8899 section 5.1.2, RFC 9000
/// section 14), in bytes.
pub const UDP_BASE_BYTES: usize = 1200;

/// What is tried where that does not pass: 576 bytes (RFC 791) without the headers of IPv4 and UDP.
pub const UDP_MIN_BYTES: usize = 548;

/// PINGs in a row that are not answered after which UDP counts as blocked on a path.
pub const UDP_TRIES_MAX: u32 = 5;

/// A path that carries a datagram now and then is asked so often whether it answers.
pub const UDP_ASK_EVERY: Duration = Duration::from_millis(200);

/// One that carries them steadily is asked four times in a round trip, within these bounds: the shorter
/// time is less than [`UDP_SILENCE_MARGIN`], so that the answer to the next question excuses one that is
/// lost.
pub const UDP_ASK_STEADY_MIN: Duration = Duration::from_millis(10);
/// See [`UDP_ASK_STEADY_MIN`].
pub const UDP_ASK_STEADY_MAX: Duration = Duration::from_millis(100);

/// Every second datagram asks, at most.
pub const UDP_ASK_DATAGRAMS: u32 = 2;

/// Questions that are under way on one path that answers, at most.
pub const UDP_ASKED_MAX: usize = 16;

/// How much later than the mean an answer may come before datagrams take other ways too. A packet waits
/// neither for an acknowledgement's company nor in a queue of ours, and a wrong guess costs a few copies.
pub const UDP_SILENCE_MARGIN: Duration = Duration::from_millis(15);

/// A path from which nothing was heard for so long may have been forgotten by a NAT: datagrams go over
/// TCP as well until it answers.
pub const UDP_STALE: Duration = Duration::from_secs(30);

/// A blocked path is tried again after this time, and after double of it each further time.
pub const UDP_RETRY: Duration = Duration::from_secs(5);
/// See [`UDP_RETRY`].
pub const UDP_RETRY_MAX: Duration = Duration::from_secs(300);

/// Waiting for an answer on a path whose round-trip time is not known.
pub const UDP_UNKNOWN_RTT: Duration = Duration::from_millis(300);

/// Most bytes of answers and questions that wait for a packet on one path.
pub const UDP_FRAMES_BYTES_MAX: usize = 512;

/// Bytes sent to an address that is not validated, for each byte received from it (RFC 9000 section 8).
pub const UDP_AMPLIFICATION: u64 = 3;

/// Addresses of the peer that are being validated at once; and PATH_CHALLENGEs to each.
pub const UDP_CANDIDATES_MAX: usize = 4;
/// See [`UDP_CANDIDATES_MAX`].
pub const CHALLENGE_TRIES_MAX: u32 = 4;

/// Paths of the UDP transport that a driver may name.
pub const UDP_PATHS_MAX: usize = 64;

/// Probes of one size before it is taken not to pass (MAX_PROBES of RFC 8899 section 5.1.2).
pub const MTU_TRIES_MAX: u32 = 3;

/// The search for the path MTU ends when it is known to this many bytes.
pub const MTU_STEP_BYTES: usize = 16;

/// After this time larger sizes are tried again (PMTU_RAISE_TIMER of RFC 8899 section 5.1.1).
pub const MTU_RAISE_AFTER: Duration = Duration::from_secs(600);

/// Where large packets go out and nothing has shown for so long that they arrive, one is probed.
pub const MTU_DOUBT_AFTER: Duration = Duration::from_secs(1);

/// Keys of space D outlive their epoch by this time: packets are overtaken by what travels over TCP.
pub const OLD_PACKETS_TIME: Duration = Duration::from_secs(3);

/// Tokens of PINGs from here on are the session's own; those below are the driver's.
pub const OWN_PING_TOKENS: u64 = 1 << 61;
