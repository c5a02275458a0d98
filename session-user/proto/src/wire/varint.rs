//! Variable-length integers (RFC 9000 section 16) and a cursor over borrowed bytes.

use super::WireError;

/// The largest value that a varint can carry.
pub const VARINT_MAX: u64 = (1 << 62) - 1;

/// How many bytes [`put_varint`] writes for `value`.
pub const fn varint_bytes(value: u64) -> usize {
    match value {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        0x4000..=0x3fff_ffff => 4,
        _ => 8,
    }
}

/// Appends `value` in the shortest form. Values above [`VARINT_MAX`] are a bug of the caller.
pub fn put_varint(out: &mut Vec<u8>, value: u64) {
    debug_assert!(value <= VARINT_MAX);
    let len = varint_bytes(value);
    let tagged = value | (u64::from(len.trailing_zeros()) << (len * 8 - 2));
    out.extend_from_slice(&tagged.to_be_bytes()[8 - len..]);
}

/// Reads items from the front of a byte slice.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A reader over all of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What has not been read yet.
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Whether everything has been read.
    pub const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], WireError> {
        let (head, tail) = self
            .rest
            .split_at_checked(len)
            .ok_or(WireError::Truncated(what))?;
        self.rest = tail;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], WireError> {
        let (head, tail) = self
            .rest
            .split_first_chunk()
            .ok_or(WireError::Truncated(what))?;
        self.rest = tail;
        Ok(*head)
    }

    /// The next byte.
    pub fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        self.array::<1>(what).map(|[b]| b)
    }

    /// The next two bytes, big-endian.
    pub fn u16(&mut self, what: &'static str) -> Result<u16, WireError> {
        self.array(what).map(u16::from_be_bytes)
    }

    /// The next varint.
    pub fn varint(&mut self, what: &'static str) -> Result<u64, WireError> {
        let first = *self.rest.first().ok_or(WireError::Truncated(what))?;
        let len = 1usize << (first >> 6);
        let raw = self.bytes(len, what)?;
        let mut value = u64::from(first & 0x3f);
        for &b in &raw[1..] {
            value = (value << 8) | u64::from(b);
        }
        Ok(value)
    }

    /// The next varint as a length that must not exceed `limit`.
    pub fn length(&mut self, limit: usize, what: &'static str) -> Result<usize, WireError> {
        let value = self.varint(what)?;
        let got = usize::try_from(value).unwrap_or(usize::MAX);
        if got > limit {
            return Err(WireError::TooLong { what, got, limit });
        }
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn matches_the_examples_of_rfc_9000() {
        for (hex_bytes, value) in [
            ("c2197c5eff14e88c", 151_288_809_941_952_652),
            ("9d7f3e7d", 494_878_333),
            ("7bbd", 15_293),
            ("25", 37),
        ] {
            let bytes = hex::decode(hex_bytes).unwrap();
            assert_eq!(Reader::new(&bytes).varint("v").unwrap(), value);
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(out, bytes);
        }
    }

    proptest! {
        #[test]
        fn round_trips(value in 0..=VARINT_MAX) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            prop_assert_eq!(out.len(), varint_bytes(value));
            let mut reader = Reader::new(&out);
            prop_assert_eq!(reader.varint("v").unwrap(), value);
            prop_assert!(reader.is_empty());
        }
    }
}
