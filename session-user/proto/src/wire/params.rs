//! Parameters of a session, in HELLO and ACCEPT: a list of (id, length, value), unknown ids skipped.

use super::WireError;
use super::varint::{Reader, put_varint};
use crate::limits::{PARAMS_BYTES_MAX, RECORD_PAYLOAD_BYTES_MIN, RECORD_WINDOW_MIN};

const INSTANCE: u64 = 0x01;
const INITIAL_MAX_DATA: u64 = 0x02;
const INITIAL_MAX_STREAM_DATA: u64 = 0x03;
const INITIAL_MAX_STREAMS: u64 = 0x04;
const RECORD_WINDOW: u64 = 0x05;
const MAX_RECORD: u64 = 0x06;
const CONTINUES: u64 = 0x07;
const CONTINUES_COUNTER: u64 = 0x08;
const CONTINUED: u64 = 0x09;
const SOFTWARE: u64 = 0x0a;
const MAX_FLOWS: u64 = 0x0b;
const FLOW_FEATURES: u64 = 0x0c;
const CODECS: u64 = 0x0d;

/// What a unit knows of datagrams beyond the first version of flows: bits of [`Params::flow_features`].
pub mod flow_feature {
    /// The service that a datagram asks for.
    pub const SERVICE: u64 = 0x01;
    /// The socket that a flow belongs to, and datagrams from others than its target.
    pub const GROUPS: u64 = 0x02;
    /// All that there are.
    pub const ALL: u64 = SERVICE | GROUPS;
}

/// What one unit tells the other when a session begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Params {
    /// Drawn at random at each start of the agent: a new one means that older sessions are gone.
    pub instance: [u8; 16],
    /// Bytes that the peer may send on all streams together, at first.
    pub initial_max_data: u64,
    /// Bytes that the peer may send on each stream, at first.
    pub initial_max_stream_data: u64,
    /// Streams that the peer may open, at first.
    pub initial_max_streams: u64,
    /// Span of unacknowledged record numbers that the peer may use in space R.
    pub record_window: u64,
    /// Largest sealed payload that the peer may send, in bytes.
    pub max_record: u64,
    /// Flows that the peer may have open at once; 0 for a unit that knows none.
    pub max_flows: u64,
    /// What of [`flow_feature`] may be sent to it; other bits are ignored.
    pub flow_features: u64,
    /// Codecs that this unit unpacks: a set of [`super::Codec::bit`]. Empty for a unit that knows none.
    pub codecs: u64,
    /// Streams that the peer may send packed at once.
    pub packed_streams: u64,
    /// In HELLO: a session that the initiator still holds and whose resume was refused, with the
    /// counter that it will dial with next.
    pub continues: Option<([u8; 16], u64)>,
    /// In ACCEPT: whether the responder still holds the session named in HELLO.
    pub continued: Option<bool>,
    /// Name and version of the software, for people.
    pub software: String,
}

impl Params {
    /// Appends the list.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut put = |id: u64, value: &[u8]| {
            put_varint(out, id);
            put_varint(out, value.len() as u64);
            out.extend_from_slice(value);
        };
        put(INSTANCE, &self.instance);
        for (id, number) in [
            (INITIAL_MAX_DATA, self.initial_max_data),
            (INITIAL_MAX_STREAM_DATA, self.initial_max_stream_data),
            (INITIAL_MAX_STREAMS, self.initial_max_streams),
            (RECORD_WINDOW, self.record_window),
            (MAX_RECORD, self.max_record),
        ] {
            put(id, &varint(number));
        }
        if self.max_flows > 0 {
            put(MAX_FLOWS, &varint(self.max_flows));
        }
        if self.flow_features > 0 {
            put(FLOW_FEATURES, &varint(self.flow_features));
        }
        if self.codecs > 0 {
            let mut value = varint(self.codecs);
            put_varint(&mut value, self.packed_streams);
            put(CODECS, &value);
        }
        if let Some((session, counter)) = self.continues {
            put(CONTINUES, &session);
            put(CONTINUES_COUNTER, &varint(counter));
        }
        if let Some(known) = self.continued {
            put(CONTINUED, &[u8::from(known)]);
        }
        let software = &self.software.as_bytes()[..self.software.len().min(64)];
        put(SOFTWARE, software);
    }

    /// Parses a whole list. The limits and the instance must be present.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() > PARAMS_BYTES_MAX {
            return Err(WireError::TooLong {
                what: "the parameters",
                got: bytes.len(),
                limit: PARAMS_BYTES_MAX,
            });
        }
        let mut out = Self::default();
        let (mut continues, mut counter) = (None, None);
        let mut seen = 0u64;
        let mut reader = Reader::new(bytes);
        while !reader.is_empty() {
            let id = reader.varint("a parameter")?;
            let len = reader.length(PARAMS_BYTES_MAX, "a parameter")?;
            let mut value = Reader::new(reader.bytes(len, "a parameter")?);
            if id < 64 {
                if seen & (1 << id) != 0 {
                    return Err(WireError::Invalid("a parameter that is given twice"));
                }
                seen |= 1 << id;
            }
            match id {
                INSTANCE => out.instance = value.array("the instance")?,
                INITIAL_MAX_DATA => out.initial_max_data = value.varint("a limit")?,
                INITIAL_MAX_STREAM_DATA => out.initial_max_stream_data = value.varint("a limit")?,
                INITIAL_MAX_STREAMS => out.initial_max_streams = value.varint("a limit")?,
                RECORD_WINDOW => out.record_window = value.varint("a limit")?,
                MAX_RECORD => out.max_record = value.varint("a limit")?,
                MAX_FLOWS => out.max_flows = value.varint("a limit")?,
                FLOW_FEATURES => out.flow_features = value.varint("what is known of flows")?,
                CODECS => {
                    out.codecs = value.varint("the codecs")?;
                    out.packed_streams = value.varint("a limit")?;
                }
                CONTINUES => continues = Some(value.array("a session id")?),
                CONTINUES_COUNTER => counter = Some(value.varint("a counter")?),
                CONTINUED => out.continued = Some(value.u8("an answer")? != 0),
                SOFTWARE => out.software = printable(value.rest()),
                _ => {}
            }
        }
        let required = [
            INSTANCE,
            INITIAL_MAX_DATA,
            INITIAL_MAX_STREAM_DATA,
            INITIAL_MAX_STREAMS,
            RECORD_WINDOW,
            MAX_RECORD,
        ];
        if required.iter().any(|id| seen & (1 << id) == 0) {
            return Err(WireError::Invalid("the parameters (one is missing)"));
        }
        if continues.is_some() != counter.is_some() {
            return Err(WireError::Invalid("the session to continue"));
        }
        out.continues = continues.zip(counter);
        if out.codecs == 0 {
            out.packed_streams = 0;
        }
        // Below these, one full record or the control frames' reserve would not fit, and a
        // session would stall without a word.
        if out.max_record < RECORD_PAYLOAD_BYTES_MIN as u64 {
            return Err(WireError::Invalid("the largest record"));
        }
        if out.record_window < RECORD_WINDOW_MIN {
            return Err(WireError::Invalid("the record window"));
        }
        Ok(out)
    }
}

fn varint(value: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(8);
    put_varint(&mut out, value);
    out
}

/// Text from the peer as it may be shown on a terminal.
fn printable(raw: &[u8]) -> String {
    raw.iter()
        .take(64)
        .map(|&b| {
            if b.is_ascii_graphic() || b == b' ' {
                b as char
            } else {
                '?'
            }
        })
        .collect()
}
