//! What a stream asks of the links, and what a transport is for.

use super::WireError;
use super::packed::Codec;
use super::varint::{Reader, put_varint};

/// How the records of a stream use the links. Each end follows it for what it sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// One link at a time.
    #[default]
    Single,
    /// Two links at once: the receiver takes whichever copy comes first.
    Redundant,
    /// Spread over all links by what each carries.
    Bonded,
}

/// What the opener of a stream wants done with its bytes before they are sealed, at both ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Whatever each end does with streams of which nothing is said.
    #[default]
    Unsaid,
    /// They go as they are.
    Off,
    /// By the better codec, where that saves time; not what begins as HTTP or TLS does.
    Auto,
    /// By this codec alone, where that saves time, and whatever they are.
    Only(Codec),
}

impl Packing {
    /// As operators know it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unsaid => "",
            Self::Off => "off",
            Self::Auto => "auto",
            Self::Only(codec) => codec.name(),
        }
    }

    const fn bits(self) -> u8 {
        match self {
            Self::Unsaid => 0,
            Self::Off => 1,
            Self::Auto => 2,
            Self::Only(codec) => 2 + codec.code(),
        }
    }

    /// What is not known is as if nothing was said: a wish, of which no byte depends.
    fn of(bits: u8) -> Self {
        let mut known = [Self::Off, Self::Auto]
            .into_iter()
            .chain(Codec::ALL.map(Self::Only));
        known.find(|p| p.bits() == bits).unwrap_or_default()
    }
}

/// What the opener of a stream asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Service {
    /// How its records use the links.
    pub mode: Mode,
    /// It has a transport to itself, or with few others, where the dialler keeps several on a link.
    pub own_lane: bool,
    /// How its bytes are packed.
    pub packing: Packing,
}

const MODE: u8 = 0x03;
const OWN_LANE: u8 = 0x04;
const PACKING: u8 = 0x38;
const PACKING_SHIFT: u32 = 3;

impl Service {
    /// Nothing for the default: earlier units know no such field.
    pub(super) fn encode(self, out: &mut Vec<u8>) {
        if self != Self::default() {
            let lane = if self.own_lane { OWN_LANE } else { 0 };
            out.push(self.mode as u8 | lane | self.packing.bits() << PACKING_SHIFT);
        }
    }

    /// A mode that is not known is served as a single one: no byte is lost by that.
    pub(super) fn parse(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        if reader.is_empty() {
            return Ok(Self::default());
        }
        let bits = reader.u8("the service of a stream")?;
        Ok(Self {
            mode: match bits & MODE {
                1 => Mode::Redundant,
                2 => Mode::Bonded,
                _ => Mode::Single,
            },
            own_lane: bits & OWN_LANE != 0,
            packing: Packing::of((bits & PACKING) >> PACKING_SHIFT),
        })
    }
}

/// Where a transport runs, as its dialler numbers it: what shares a path fails together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Route {
    /// The path: `link * 256 + address`, with the dialler's own numbers of its links and of the peer's
    /// addresses. That of the full handshake is 0.
    pub path: u64,
    /// 0 for the first transport of a path; others stand beside it.
    pub lane: u64,
}

impl Route {
    /// How little two routes have in common: 0 for the same path, more for another address of the
    /// peer, most for another link as well.
    pub const fn distance(self, other: Self) -> u8 {
        let link = self.path >> 8 != other.path >> 8;
        let address = self.path & 0xff != other.path & 0xff;
        (link as u8) * 2 + address as u8
    }

    pub(super) fn encode(self, out: &mut Vec<u8>) {
        if self != Self::default() {
            put_varint(out, self.path);
            put_varint(out, self.lane);
        }
    }

    pub(super) fn parse(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        if reader.is_empty() {
            return Ok(Self::default());
        }
        Ok(Self {
            path: reader.varint("the path of a transport")?,
            lane: reader.varint("the lane of a transport")?,
        })
    }
}
