//! A datagram of a flow, or a part of one: what stands before its bytes.

use std::net::SocketAddr;

use super::WireError;
use super::dscp::Dscp;
use super::frame::FrameType;
use super::target::Target;
use super::varint::{Reader, put_varint};
use crate::limits::DATAGRAM_BYTES_MAX;

/// The target follows: the sender does not know yet that the receiver has the flow.
const TARGET: u8 = 0x01;
/// The datagram's number follows: it may come more than once.
const NUMBERED: u8 = 0x02;
/// This is a part of a datagram; only of a numbered one.
const FRAGMENT: u8 = 0x04;
/// What service is asked for follows; only to a peer that knows it.
const SERVICE: u8 = 0x08;
/// The socket of the opener that the flow belongs to follows; only with a target, and to a peer that knows it.
const GROUP: u8 = 0x10;
/// Who sent the datagram follows, as it was not the flow's target; never from the flow's opener.
const SOURCE: u8 = 0x20;

/// Where a part lies in its datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Of its first byte.
    pub offset: usize,
    /// Bytes of the whole datagram, at most [`DATAGRAM_BYTES_MAX`].
    pub total: usize,
}

/// What precedes the data of a DATAGRAM frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DatagramHeader {
    /// The flow.
    pub flow: u64,
    /// Where the flow goes, as long as its opener does not know that the peer has it.
    pub target: Option<Target>,
    /// Counts the numbered datagrams of one direction of the session.
    pub number: Option<u64>,
    /// The data is a part of the datagram; never without `number`.
    pub fragment: Option<Fragment>,
    /// What the datagram asks of the networks behind its receiver. Not the default only where the peer has announced
    /// [`super::flow_feature::SERVICE`].
    pub dscp: Dscp,
    /// The socket of the opener that the flow belongs to, by a number of its own; none for one that hears its target
    /// alone. Never without `target`, and only where the peer has announced [`super::flow_feature::GROUPS`].
    pub group: Option<u64>,
    /// Who sent it, where that was not the flow's target. Never with `target`, and only in flows with a group.
    pub source: Option<SocketAddr>,
}

impl DatagramHeader {
    /// Most bytes of type, length and header with no more than a number and a part: 1 + 4 + 8 + 1 + 8 + 4 + 4.
    pub const BYTES_MAX: usize = 30;

    /// Bytes of type, length and header in front of `data_bytes` of data, at most.
    pub fn bytes_max(&self) -> usize {
        let mut more = Vec::new();
        if let Some(to) = &self.target {
            to.encode(&mut more);
        }
        self.encode_extensions(&mut more);
        Self::BYTES_MAX + more.len()
    }

    /// Appends a whole frame.
    pub(super) fn encode_frame(&self, data: &[u8], out: &mut Vec<u8>) {
        let mut head = Vec::with_capacity(Self::BYTES_MAX);
        put_varint(&mut head, self.flow);
        let flag = |set: bool, bit| if set { bit } else { 0 };
        head.push(
            flag(self.target.is_some(), TARGET)
                | flag(self.number.is_some(), NUMBERED)
                | flag(self.fragment.is_some(), FRAGMENT)
                | flag(!self.dscp.is_default(), SERVICE)
                | flag(self.group.is_some(), GROUP)
                | flag(self.source.is_some(), SOURCE),
        );
        if let Some(target) = &self.target {
            target.encode(&mut head);
        }
        if let Some(number) = self.number {
            put_varint(&mut head, number);
        }
        if let Some(Fragment { offset, total }) = self.fragment {
            put_varint(&mut head, offset as u64);
            put_varint(&mut head, total as u64);
        }
        self.encode_extensions(&mut head);
        out.push(FrameType::Datagram as u8);
        put_varint(out, (head.len() + data.len()) as u64);
        out.extend_from_slice(&head);
        out.extend_from_slice(data);
    }

    /// What a peer must have announced to know.
    fn encode_extensions(&self, out: &mut Vec<u8>) {
        if !self.dscp.is_default() {
            self.dscp.encode(out);
        }
        if let Some(group) = self.group {
            put_varint(out, group);
        }
        if let Some(source) = self.source {
            Target::Addr(source).encode(out);
        }
    }

    pub(super) fn parse(body: &mut Reader<'_>) -> Result<Self, WireError> {
        const WHAT: &str = "a DATAGRAM frame";
        let flow = body.varint(WHAT)?;
        let flags = body.u8(WHAT)?;
        if !are_valid(flags) {
            return Err(WireError::Invalid("the flags of a DATAGRAM frame"));
        }
        let target = match flags & TARGET {
            0 => None,
            _ => Some(Target::parse(body)?),
        };
        let number = match flags & NUMBERED {
            0 => None,
            _ => Some(body.varint(WHAT)?),
        };
        let fragment = match flags & FRAGMENT {
            0 => None,
            _ => Some(Fragment {
                offset: body.length(DATAGRAM_BYTES_MAX, "a part of a datagram")?,
                total: body.length(DATAGRAM_BYTES_MAX, "a datagram")?,
            }),
        };
        let dscp = match flags & SERVICE {
            0 => Dscp::default(),
            _ => Dscp::parse(body)?,
        };
        let group = match flags & GROUP {
            0 => None,
            _ => Some(body.varint(WHAT)?),
        };
        let source = match flags & SOURCE {
            0 => None,
            _ => Some(address(body)?),
        };
        if let Some(Fragment { offset, total }) = fragment
            && (body.is_empty() || body.rest().len() > total.saturating_sub(offset))
        {
            return Err(WireError::Invalid("a part of a datagram"));
        }
        Ok(Self {
            flow,
            target,
            number,
            fragment,
            dscp,
            group,
            source,
        })
    }

    /// The rest of a frame's body.
    pub(super) fn data<'a>(body: &mut Reader<'a>) -> Result<&'a [u8], WireError> {
        let data = body.rest();
        if data.len() > DATAGRAM_BYTES_MAX {
            return Err(WireError::TooLong {
                what: "a datagram",
                got: data.len(),
                limit: DATAGRAM_BYTES_MAX,
            });
        }
        Ok(data)
    }
}

/// As with STREAM: to ignore a bit could deliver wrong bytes.
fn are_valid(flags: u8) -> bool {
    let known = TARGET | NUMBERED | FRAGMENT | SERVICE | GROUP | SOURCE;
    flags & !known == 0
        && flags & (NUMBERED | FRAGMENT) != FRAGMENT
        && flags & (TARGET | GROUP) != GROUP
        && flags & (TARGET | SOURCE) != TARGET | SOURCE
}

fn address(body: &mut Reader<'_>) -> Result<SocketAddr, WireError> {
    match Target::parse(body)? {
        Target::Addr(addr) => Ok(addr),
        Target::Name(..) => Err(WireError::Invalid("the source of a datagram")),
    }
}
