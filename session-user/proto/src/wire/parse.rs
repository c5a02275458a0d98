//! Frames from a peer's bytes.

use super::WireError;
use super::ack::Ack;
use super::datagram::DatagramHeader;
use super::frame::{CRITICAL, FIN, Frame, FrameType, Space, StreamHeader};
use super::packed::PackedHeader;
use super::service::{Route, Service};
use super::target::Target;
use super::varint::Reader;
use crate::limits::{REASON_BYTES_MAX, REAUTH_CHUNK_BYTES_MAX, STREAM_DATA_BYTES_MAX};

impl<'a> Frame<'a> {
    /// Reads the next frame of a record of `space`; `None` for one that is unknown and may be
    /// skipped. Bytes behind the known part of a body are ignored: a later version may add fields.
    pub fn parse(reader: &mut Reader<'a>, space: Space) -> Result<Option<Self>, WireError> {
        let code = reader.u8("a frame")?;
        let len = reader.varint("the length of a frame")?;
        let len = usize::try_from(len).map_err(|_| WireError::Truncated("a frame"))?;
        let mut body = Reader::new(reader.bytes(len, "a frame")?);
        let Some(frame_type) = FrameType::from_code(code) else {
            return if code & CRITICAL == 0 {
                Ok(None)
            } else {
                Err(WireError::UnknownCritical(code))
            };
        };
        if !frame_type.allowed_in(space) {
            return Err(WireError::WrongSpace(frame_type));
        }
        Self::parse_body(frame_type, &mut body).map(Some)
    }

    fn parse_body(frame_type: FrameType, body: &mut Reader<'a>) -> Result<Self, WireError> {
        const WHAT: &str = "the body of a frame";
        Ok(match frame_type {
            FrameType::Ping => Self::Ping {
                token: u64::from_be_bytes(body.array(WHAT)?),
            },
            FrameType::Pong => Self::Pong {
                token: u64::from_be_bytes(body.array(WHAT)?),
            },
            FrameType::Datagram => Self::Datagram {
                header: DatagramHeader::parse(body)?,
                data: DatagramHeader::data(body)?,
            },
            FrameType::FlowOk => Self::FlowOk {
                id: body.varint(WHAT)?,
            },
            FrameType::FlowClosed => Self::FlowClosed {
                id: body.varint(WHAT)?,
                errno: body.varint(WHAT)?,
            },
            FrameType::PathChallenge => Self::PathChallenge {
                data: body.array(WHAT)?,
            },
            FrameType::PathResponse => Self::PathResponse {
                data: body.array(WHAT)?,
            },
            FrameType::Padding => Self::Padding {
                bytes: body.rest().len(),
            },
            FrameType::Urgent => Self::Urgent {
                id: body.varint(WHAT)?,
                offset: body.varint(WHAT)?,
            },
            FrameType::Stream => Self::parse_stream(body)?,
            FrameType::Ack => Self::Ack {
                delay_us: body.varint(WHAT)?,
                ack: Ack::parse(body)?,
            },
            FrameType::MaxData => Self::MaxData {
                max: body.varint(WHAT)?,
            },
            FrameType::MaxStreamData => Self::MaxStreamData {
                id: body.varint(WHAT)?,
                max: body.varint(WHAT)?,
            },
            FrameType::MaxStreams => Self::MaxStreams {
                max: body.varint(WHAT)?,
            },
            FrameType::ResetStream => Self::ResetStream {
                id: body.varint(WHAT)?,
                code: body.varint(WHAT)?,
                final_size: body.varint(WHAT)?,
            },
            FrameType::StopSending => Self::StopSending {
                id: body.varint(WHAT)?,
                code: body.varint(WHAT)?,
            },
            FrameType::Open => Self::Open {
                id: body.varint(WHAT)?,
                target: Target::parse(body)?,
                service: Service::parse(body)?,
            },
            FrameType::OpenOk => Self::OpenOk {
                id: body.varint(WHAT)?,
            },
            FrameType::OpenFailed => Self::OpenFailed {
                id: body.varint(WHAT)?,
                errno: body.varint(WHAT)?,
            },
            FrameType::Packed => {
                let (header, data) = PackedHeader::parse(body)?;
                Self::Packed { header, data }
            }
            FrameType::PackingOver => Self::PackingOver {
                id: body.varint(WHAT)?,
                offset: body.varint(WHAT)?,
            },
            FrameType::Hello => Self::Hello {
                params: body.rest(),
            },
            FrameType::Accept => Self::Accept {
                params: body.rest(),
            },
            FrameType::Resume => {
                let counter = body.varint(WHAT)?;
                let flags = body.u8(WHAT)?;
                Self::Resume {
                    counter,
                    hard: flags & 1 != 0,
                    standby: flags & 2 != 0,
                    ack: Ack::parse(body)?,
                    route: Route::parse(body)?,
                }
            }
            FrameType::Resumed => Self::Resumed {
                ack: Ack::parse(body)?,
            },
            FrameType::TransportStatus => {
                let seq = body.varint(WHAT)?;
                let seen = body.varint(WHAT)?;
                let flags = body.u8(WHAT)?;
                Self::TransportStatus {
                    seq,
                    seen,
                    hard: flags & 1 != 0,
                    standby: flags & 2 != 0,
                }
            }
            FrameType::TransportLost => Self::TransportLost {
                id: body.varint(WHAT)?,
            },
            FrameType::TransportClose => Self::TransportClose {
                code: body.varint(WHAT)?,
            },
            FrameType::Close => Self::parse_close(body)?,
            FrameType::Rekey => Self::Rekey {
                epoch: u32::from_be_bytes(body.array(WHAT)?),
                first: body.varint(WHAT)?,
            },
            FrameType::Reauth => Self::parse_reauth(body)?,
            FrameType::ReauthDone => Self::ReauthDone {
                generation: body.varint(WHAT)?,
            },
        })
    }

    fn parse_stream(body: &mut Reader<'a>) -> Result<Self, WireError> {
        const WHAT: &str = "a STREAM frame";
        let (id, offset) = (body.varint(WHAT)?, body.varint(WHAT)?);
        let flags = body.u8(WHAT)?;
        // What a later version means by the others would change what the data is.
        if flags & !FIN != 0 {
            return Err(WireError::Invalid("the flags of a STREAM frame"));
        }
        let data = body.rest();
        if data.len() > 4 * STREAM_DATA_BYTES_MAX {
            return Err(WireError::TooLong {
                what: "stream data",
                got: data.len(),
                limit: 4 * STREAM_DATA_BYTES_MAX,
            });
        }
        Ok(Self::Stream {
            header: StreamHeader {
                id,
                offset,
                fin: flags & FIN != 0,
            },
            data,
        })
    }

    fn parse_close(body: &mut Reader<'a>) -> Result<Self, WireError> {
        let code = body.varint("a CLOSE frame")?;
        let reason = body.rest();
        if reason.len() > REASON_BYTES_MAX {
            return Err(WireError::TooLong {
                what: "the reason of a CLOSE",
                got: reason.len(),
                limit: REASON_BYTES_MAX,
            });
        }
        Ok(Self::Close { code, reason })
    }

    fn parse_reauth(body: &mut Reader<'a>) -> Result<Self, WireError> {
        let (generation, offset) = (
            body.varint("a REAUTH frame")?,
            body.varint("a REAUTH frame")?,
        );
        let data = body.rest();
        if data.len() > REAUTH_CHUNK_BYTES_MAX {
            return Err(WireError::TooLong {
                what: "a REAUTH frame",
                got: data.len(),
                limit: REAUTH_CHUNK_BYTES_MAX,
            });
        }
        Ok(Self::Reauth {
            generation,
            offset,
            data,
        })
    }
}
