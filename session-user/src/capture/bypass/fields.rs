//! Where fields of the running kernel's sockets are: its own description of its types (BTF) tells.

use std::io;

use super::super::kernel_types::{self, Types};

/// Why fields are not known.
#[derive(Debug, thiserror::Error)]
pub enum FieldsError {
    /// The description cannot be read.
    #[error("the kernel's description of its types cannot be read: {0}")]
    Btf(#[from] io::Error),
    /// It has no such field or constant.
    #[error("this kernel has no {0}")]
    Absent(&'static str),
}

/// What the programs read of a TCP socket, as offsets into `struct tcp_sock` in bytes.
///
/// Each of the kernel's `tcp_sock`, `inet_connection_sock`, `sock` and `sock_common` begins with the next one (`tcp_sk` in
/// include/linux/tcp.h), so an offset into one is an offset into all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields {
    /// `write_seq`: the sequence number behind the last byte that was written.
    pub write_seq: u32,
    /// `icsk_ulp_ops`: the protocol above TCP, such as TLS; a pointer.
    pub ulp: u32,
    /// `sk_flags`, which is `skc_flags`, a word of bits.
    pub flags: u32,
    /// The bit of `SOCK_ZEROCOPY`.
    pub zerocopy: u32,
}

impl Fields {
    /// Reads the description of the running kernel, of some megabytes.
    pub fn of_kernel() -> Result<Self, FieldsError> {
        let btf = kernel_types::read()?;
        let types = Types::of(&btf).ok_or(FieldsError::Absent("description of types"))?;
        let offset = |of, member| {
            let found = types.offset(of, member);
            found.ok_or(FieldsError::Absent(member))
        };
        let zerocopy = "SOCK_ZEROCOPY";
        Ok(Self {
            write_seq: offset("tcp_sock", "write_seq")?,
            ulp: offset("inet_connection_sock", "icsk_ulp_ops")?,
            flags: offset("sock_common", "skc_flags")?,
            zerocopy: (types.constant("sock_flags", zerocopy))
                .ok_or(FieldsError::Absent(zerocopy))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_with_a_description_tells() {
        if kernel_types::read().is_err() {
            eprintln!("NOT RUN: this kernel describes no types");
            return;
        }
        let fields = Fields::of_kernel().unwrap();
        assert!(
            fields.flags < fields.ulp && fields.ulp < fields.write_seq,
            "{fields:?}"
        );
        assert!(fields.zerocopy < 64, "{fields:?}");
    }
}
