//! Where the kernel keeps what the programs have no helper for, such as the cookie of a thread's network namespace: it is in
//! its own description of its types (BTF; the kernel's Documentation/bpf/btf.rst).

use std::fs;
use std::io;

use aya::programs::{ProgramError, ProgramType};
use aya::sys::{BpfHelper, SyscallError, is_helper_supported};
use aya::util::KernelVersion;
use session_ebpf_common::NetnsOfThread;

use super::programs::ATTEMPTS;

/// The description.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
/// `BTF_KIND_STRUCT`, `BTF_KIND_UNION` and `BTF_KIND_ENUM`.
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
/// Bytes of `struct btf_type`, and of `struct btf_member`.
const TYPE: usize = 12;
const MEMBER: usize = 12;
/// And of `struct btf_enum`.
const CONSTANT: usize = 8;
/// Nameless structures inside of each other, at most.
const NESTED_MAX: u32 = 4;

/// The way from a thread to its network namespace's cookie. Not known where the kernel does not describe itself, or lets
/// nobody read its memory.
pub fn netns_of_thread() -> NetnsOfThread {
    // Since when namespaces have a cookie from the start.
    let new = KernelVersion::current().is_ok_and(|v| v >= KernelVersion::new(5, 15, 0));
    let needed = [
        BpfHelper::BPF_FUNC_get_current_task,
        BpfHelper::BPF_FUNC_probe_read_kernel,
    ];
    if !new || !needed.into_iter().all(programs_have) {
        return NetnsOfThread::default();
    }
    let found = read().ok().and_then(|btf| find(&btf));
    if found.is_none() {
        tracing::debug!("the kernel does not say where the network namespaces of threads are");
    }
    found.unwrap_or_default()
}

/// Whether the verifier lets a hook call a helper. It forbids reading the kernel's memory where the kernel is locked down
/// (`bpf_base_func_proto` in kernel/bpf/helpers.c; kernel_lockdown(7)), which it need not tell in any file.
fn programs_have(helper: BpfHelper) -> bool {
    for _ in 0..ATTEMPTS {
        match is_helper_supported(ProgramType::CgroupSockAddr, helper) {
            Ok(supported) => return supported,
            Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
                if io_error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::debug!(%error, "the kernel does not say which helpers programs have");
                return false;
            }
        }
    }
    false
}

/// The description of the running kernel, of some megabytes.
pub fn read() -> io::Result<Vec<u8>> {
    fs::read(VMLINUX)
}

fn find(btf: &[u8]) -> Option<NetnsOfThread> {
    let types = Types::of(btf)?;
    Some(NetnsOfThread {
        nsproxy: types.offset("task_struct", "nsproxy")?,
        net: types.offset("nsproxy", "net_ns")?,
        cookie: types.offset("net", "net_cookie")?,
    })
}

/// The types, and the names in them.
#[derive(Debug)]
pub struct Types<'a> {
    types: &'a [u8],
    names: &'a [u8],
}

/// One type (`struct btf_type`).
struct Type<'a> {
    name: u32,
    kind: u32,
    /// Offsets of its members are of bits, with a bit field's size in the upper byte (`kind_flag`).
    has_bit_fields: bool,
    /// What belongs to it.
    more: &'a [u8],
}

impl<'a> Types<'a> {
    /// Reads the header (`struct btf_header`). None if it is not one.
    pub fn of(btf: &'a [u8]) -> Option<Self> {
        let magic = u16::from_ne_bytes(btf.get(..2)?.try_into().ok()?);
        if magic != MAGIC {
            return None;
        }
        let body = btf.get(word(btf, 4)? as usize..)?;
        let part = |at| {
            let (from, len) = (word(btf, at)? as usize, word(btf, at + 4)? as usize);
            body.get(from..from.checked_add(len)?)
        };
        Some(Self {
            types: part(8)?,
            names: part(16)?,
        })
    }

    /// All types, up to one of a kind that is not known. The first has the number 1.
    fn all(&self) -> impl Iterator<Item = Type<'a>> + use<'a> {
        let mut rest = self.types;
        std::iter::from_fn(move || {
            let (head, tail) = rest.split_at_checked(TYPE)?;
            let info = word(head, 4)?;
            let (kind, count) = (info >> 24 & 0x1f, info as usize & 0xffff);
            let (more, next) = tail.split_at_checked(size_after(kind, count)?)?;
            rest = next;
            Some(Type {
                name: word(head, 0)?,
                kind,
                has_bit_fields: info >> 31 != 0,
                more,
            })
        })
    }

    /// Where a structure has a member, in whole bytes; it may stand in a nameless structure or union inside of it.
    pub fn offset(&self, of: &str, member: &str) -> Option<u32> {
        // A name may be that of several structures.
        let named = |one: &Type<'_>| one.kind == STRUCT && self.is_named(one.name, of);
        let mut structures = self.all().filter(named);
        Some(structures.find_map(|one| self.bits_of(&one, member, NESTED_MAX))? / 8)
    }

    fn bits_of(&self, of: &Type<'_>, name: &str, depth: u32) -> Option<u32> {
        of.more.chunks_exact(MEMBER).find_map(|one| {
            let (named, kind, at) = (word(one, 0)?, word(one, 4)?, word(one, 8)?);
            let bits = if of.has_bit_fields {
                at & 0x00ff_ffff
            } else {
                at
            };
            if self.is_named(named, name) {
                return Some(bits);
            }
            let nested = self.is_named(named, "") && depth > 0;
            let inner = nested.then(|| self.all().nth((kind as usize).checked_sub(1)?));
            let inner = inner
                .flatten()
                .filter(|i| [STRUCT, UNION].contains(&i.kind));
            bits.checked_add(self.bits_of(&inner?, name, depth - 1)?)
        })
    }

    /// The value of an enumeration's constant.
    pub fn constant(&self, of: &str, name: &str) -> Option<u32> {
        let named = |one: &Type<'_>| one.kind == ENUM && self.is_named(one.name, of);
        let mut enumerations = self.all().filter(named);
        enumerations.find_map(|one| {
            let mut all = one.more.chunks_exact(CONSTANT);
            let found = all.find(|one| word(one, 0).is_some_and(|at| self.is_named(at, name)));
            word(found?, 4)
        })
    }

    fn is_named(&self, at: u32, name: &str) -> bool {
        let there = self.names.get(at as usize..);
        let rest = there.and_then(|there| there.strip_prefix(name.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    }
}

/// Bytes behind a `struct btf_type` that belong to it; none for a kind that came later.
fn size_after(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        // Pointers, forward declarations, typedefs, qualifiers, functions, floats, tags of types.
        2 | 7..=12 | 16 | 18 => 0,
        // Integers, variables, tags of declarations.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        // Structures, unions, sections, enumerations of 64 bits.
        4 | 5 | 15 | 19 => count * 12,
        // Enumerations, parameters.
        6 | 13 => count * 8,
        _ => return None,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(word.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A description with an integer, a nameless union, two structures of one name and an enumeration, as the kernel writes
    /// it.
    fn described() -> Vec<u8> {
        let names = b"\0int\0net\0other\0net_cookie\0inside\0flags\0FIRST\0SECOND\0";
        let at = |name: &str| {
            let name = format!("\0{name}\0");
            let found = names.windows(name.len()).position(|w| w == name.as_bytes());
            found.unwrap() as u32 + 1
        };
        let structure = |count| STRUCT << 24 | count;
        let types: Vec<u32> = [
            &[at("int"), 1 << 24, 4, 32][..],
            &[0, UNION << 24 | 2, 4, at("int"), 1, 0, at("inside"), 1, 32],
            &[at("net"), structure(1), 4, at("other"), 1, 0],
            &[
                at("net"),
                structure(3),
                16,
                at("other"),
                1,
                0,
                at("net_cookie"),
                1,
                64,
                0,
                2,
                128,
            ],
            &[
                at("flags"),
                ENUM << 24 | 2,
                4,
                at("FIRST"),
                7,
                at("SECOND"),
                9,
            ],
        ]
        .concat();
        let types_len = types.len() as u32 * 4;
        let head = [24, 0, types_len, types_len, names.len() as u32];
        let mut out = MAGIC.to_ne_bytes().to_vec();
        out.extend([1, 0]);
        out.extend(
            head.iter()
                .chain(&types)
                .flat_map(|word| word.to_ne_bytes()),
        );
        out.extend(names);
        out
    }

    #[test]
    fn a_member_is_found_in_the_structure_that_has_it() {
        let btf = described();
        let types = Types::of(&btf).unwrap();
        assert_eq!(types.offset("net", "net_cookie"), Some(8));
        assert_eq!(types.offset("net", "other"), Some(0));
        assert_eq!(types.offset("net", "inside"), Some(20));
        assert_eq!(types.offset("net", "cookie"), None);
        assert_eq!(types.offset("ne", "other"), None);
        assert_eq!(types.constant("flags", "SECOND"), Some(9));
        assert_eq!(types.constant("flags", "THIRD"), None);
        assert_eq!(types.constant("net", "SECOND"), None);
    }

    #[test]
    fn what_is_cut_off_or_is_none_is_not_known() {
        let btf = described();
        for len in 0..btf.len() {
            let known = Types::of(&btf[..len]).and_then(|t| t.offset("net", "inside"));
            assert_eq!(known, None, "{len}");
        }
        for at in 0..btf.len() {
            let mut changed = btf.clone();
            changed[at] = 0xff;
            // Whatever it says, it is read or it is not.
            let _ = Types::of(&changed)
                .map(|t| (t.offset("net", "inside"), t.constant("flags", "SECOND")));
        }
        assert_eq!(find(b""), None);
    }
}
