//! The programs by name: loading them, and attaching them to a cgroup.

use std::fs::File;

use aya::{
    Ebpf,
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSockAddr, CgroupSockopt,
        ProgramError, SockOps, cgroup_sockopt::CgroupSockoptLink, links::FdLink,
        sock_ops::SockOpsLink,
    },
};

use super::CaptureError;

/// Programs attached to every captured cgroup, in the order in which they are let go: what the connect and sendmsg hooks
/// redirect must find the rest in place.
const APP_SIDE: [(&str, Kind); 15] = [
    ("connect4", Kind::SockAddr),
    ("connect6", Kind::SockAddr),
    ("sendmsg4", Kind::SockAddr),
    ("sendmsg6", Kind::SockAddr),
    ("bind4", Kind::SockAddr),
    ("bind6", Kind::SockAddr),
    ("recvmsg4", Kind::SockAddr),
    ("recvmsg6", Kind::SockAddr),
    ("getpeername4", Kind::SockAddr),
    ("getpeername6", Kind::SockAddr),
    ("getsockname4", Kind::SockAddr),
    ("getsockname6", Kind::SockAddr),
    (HOLD_SYN, Kind::Egress),
    ("fence_udp", Kind::Egress),
    ("app_ops", Kind::SockOps),
];
/// Holds SYNs: attached only where there is somebody to let them through.
const HOLD_SYN: &str = "hold_syn";
/// Tells applications the values of the link, not of the loopback hop.
const GETSOCKOPT: &str = "getsockopt";
/// Program attached to the agent's own cgroup.
const AGENT_OPS: &str = "agent_ops";

/// aya passes the mode on as flags of BPF_LINK_CREATE, which knows none; links may always be several.
const MODE: CgroupAttachMode = CgroupAttachMode::Single;

/// Names of all programs.
pub fn names() -> impl Iterator<Item = &'static str> {
    let app_side = APP_SIDE.into_iter().map(|(name, _)| name);
    app_side.chain([GETSOCKOPT, AGENT_OPS])
}

/// Types of programs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    SockAddr,
    Egress,
    SockOps,
}

/// How often a program is given to the verifier, which gives up when a signal comes meanwhile (EAGAIN of `bpf_check` in
/// kernel/bpf/verifier.c). As libbpf has it (`PROG_LOAD_ATTEMPTS`).
pub(super) const ATTEMPTS: u32 = 5;

/// Loads all programs; attaches none.
pub fn load(ebpf: &mut Ebpf) -> Result<(), CaptureError> {
    for name in names() {
        let mut loaded = load_one(ebpf, name);
        for _ in 1..ATTEMPTS {
            if !loaded.as_ref().is_err_and(was_interrupted) {
                break;
            }
            loaded = load_one(ebpf, name);
        }
        loaded.map_err(|error| {
            CaptureError::program(format!("loading the eBPF program {name}"), error)
        })?;
    }
    Ok(())
}

fn load_one(ebpf: &mut Ebpf, name: &str) -> Result<(), ProgramError> {
    let kind = APP_SIDE.iter().find(|(known, _)| *known == name);
    match kind.map(|(_, kind)| kind) {
        None if name == GETSOCKOPT => program(ebpf, name).and_then(CgroupSockopt::load),
        Some(Kind::SockAddr) => program(ebpf, name).and_then(CgroupSockAddr::load),
        Some(Kind::Egress) => program(ebpf, name).and_then(CgroupSkb::load),
        Some(Kind::SockOps) | None => program(ebpf, name).and_then(SockOps::load),
    }
}

fn was_interrupted(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EAGAIN))
}

/// The applications' side of one cgroup, attached. Dropping it lets go.
pub struct Links {
    /// In the order in which they are to be let go.
    pub first: Vec<(&'static str, FdLink)>,
    /// aya can pin no such link. Nothing is lost by it: what it tells is of connections that end with this process.
    pub sockopt: CgroupSockoptLink,
}

/// Attaches the applications' side to a cgroup; `gate`: whether SYNs are held.
pub fn attach(ebpf: &mut Ebpf, dir: &File, gate: bool) -> Result<Links, ProgramError> {
    let program: &mut CgroupSockopt = program(ebpf, GETSOCKOPT)?;
    let id = program.attach(dir, MODE)?;
    let sockopt = program.take_link(id)?;
    let mut first = Vec::with_capacity(APP_SIDE.len());
    for (name, kind) in APP_SIDE.into_iter().rev() {
        if name == HOLD_SYN && !gate {
            continue;
        }
        // A kernel that makes no such links (before 5.7) cannot run the programs either.
        first.extend(link(ebpf, name, kind, dir)?.map(|link| (name, link)));
    }
    first.reverse();
    Ok(Links { first, sockopt })
}

fn link(
    ebpf: &mut Ebpf,
    name: &str,
    kind: Kind,
    dir: &File,
) -> Result<Option<FdLink>, ProgramError> {
    let link = match kind {
        Kind::SockAddr => {
            let program: &mut CgroupSockAddr = program(ebpf, name)?;
            let id = program.attach(dir, MODE)?;
            FdLink::try_from(program.take_link(id)?)
        }
        Kind::Egress => {
            let program: &mut CgroupSkb = program(ebpf, name)?;
            let id = program.attach(dir, CgroupSkbAttachType::Egress, MODE)?;
            FdLink::try_from(program.take_link(id)?)
        }
        Kind::SockOps => FdLink::try_from(sock_ops(ebpf, name, dir)?),
    };
    Ok(link.ok())
}

/// Attaches the agent's side to the agent's own cgroup.
pub fn attach_agent(ebpf: &mut Ebpf, dir: &File) -> Result<SockOpsLink, ProgramError> {
    sock_ops(ebpf, AGENT_OPS, dir)
}

fn sock_ops(ebpf: &mut Ebpf, name: &str, dir: &File) -> Result<SockOpsLink, ProgramError> {
    let program: &mut SockOps = program(ebpf, name)?;
    let id = program.attach(dir, MODE)?;
    program.take_link(id)
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, ProgramError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or_else(|| ProgramError::InvalidName {
            name: name.to_owned(),
        })?
        .try_into()
}
