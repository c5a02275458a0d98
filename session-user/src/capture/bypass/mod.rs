//! The local bypass, on the agent's side: what applications send comes straight into the agent's sockets, past TCP.
//!
//! The agent takes a connection into it ([`Bypass::join`]) and tells the programs how much it reads ([`Tally`]): they
//! redirect only what keeps the order, and only so much as may wait. What the kernel does to sockets that take part is
//! tried at start ([`probe`]).

mod board;
mod fields;
mod probe;
mod sys;

use std::fmt;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, SkStorage, SockHash},
    programs::{SkMsg, sk_msg::SkMsgLink},
};
use session_ebpf_common::{BYPASS_FLOWS_MAX, BYPASS_NO_SLOT, Bypassed, FlowKey};

use super::{CaptureError, tables::take};
use crate::requests::PastTcp;
use board::Board;
pub(super) use fields::Fields;
pub use probe::faults;

/// The program that redirects.
const PROGRAM: &str = "past_tcp";

/// When the local bypass is used (`local_bypass` of the configuration).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LocalBypass {
    /// Never.
    #[default]
    Off,
    /// Where the kernel shows none of the faults that applications could notice.
    Auto,
    /// Always, with the faults that the kernel has.
    On,
}

impl LocalBypass {
    /// What the programs need for it, if it is to be used; says in the log why not, or with which faults.
    pub(super) fn decide(self) -> Option<Fields> {
        if self == Self::Off {
            return None;
        }
        let fields = Fields::of_kernel();
        let fields = fields.inspect_err(
            |error| tracing::warn!(%error, "the local bypass is off: applications are heard by TCP"),
        );
        let fields = fields.ok()?;
        let faults = match probe::with(&fields) {
            Ok(faults) => faults,
            Err(error) => {
                tracing::warn!(%error, "the local bypass is off: it cannot be tried here");
                return None;
            }
        };
        for fault in &faults {
            tracing::info!(fault = fault.what, seen = %fault.seen, "a fault of this kernel's sockets with the local bypass");
        }
        match (self, faults.len()) {
            (Self::On, faults) => {
                tracing::info!(faults, "the local bypass is on");
                Some(fields)
            }
            (_, 0) => Some(fields),
            (_, faults) => {
                tracing::info!(
                    faults,
                    "the local bypass stays off: applications would notice it"
                );
                None
            }
        }
    }
}

/// Prepares the object for the bypass: the fields' places, and room in its maps.
pub(super) fn prepare<'a>(loader: &mut EbpfLoader<'a>, fields: &'a Fields, on: &'a u8) {
    loader
        .override_global("LOCAL_BYPASS", on, true)
        .override_global("BYPASS_WRITE_SEQ", &fields.write_seq, true)
        .override_global("BYPASS_ULP", &fields.ulp, true)
        .override_global("BYPASS_FLAGS", &fields.flags, true)
        .override_global("BYPASS_ZEROCOPY", &fields.zerocopy, true);
    for map in [
        "BYPASS_APPS",
        "BYPASS_AGENTS",
        "BYPASS_SLOTS",
        "BYPASS_SHARED",
    ] {
        loader.map_max_entries(map, BYPASS_FLOWS_MAX);
    }
}

/// Connections that are heard past TCP.
#[derive(Clone)]
pub(super) struct Bypass(Arc<Shared>);

struct Shared {
    maps: Mutex<Maps>,
    board: Board,
}

struct Maps {
    agents: SockHash<MapData, FlowKey>,
    slots: HashMap<MapData, FlowKey, u32>,
    /// Slots that nobody has.
    free: Vec<u32>,
    apps: SockHash<MapData, FlowKey>,
    states: SkStorage<MapData, Bypassed>,
    _link: SkMsgLink,
}

impl fmt::Debug for Bypass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bypass").finish_non_exhaustive()
    }
}

impl Bypass {
    /// Loads the program of an object that [`prepare`] has prepared.
    pub fn load(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        let apps: SockHash<MapData, FlowKey> = take(ebpf, "BYPASS_APPS")?;
        let link = attach(ebpf, &apps);
        let link = link.map_err(|error| {
            CaptureError::program(format!("loading the eBPF program {PROGRAM}"), error)
        })?;
        let board = match ebpf.take_map("BYPASS_SHARED") {
            Some(Map::Array(read)) => Board::new(&read, BYPASS_FLOWS_MAX),
            _ => Err(std::io::ErrorKind::NotFound.into()),
        };
        let board = board.map_err(|source| CaptureError::Runtime {
            what: "map the eBPF array BYPASS_SHARED",
            source,
        })?;
        let maps = Maps {
            agents: take(ebpf, "BYPASS_AGENTS")?,
            slots: take(ebpf, "BYPASS_SLOTS")?,
            free: (0..board.slots()).rev().collect(),
            apps,
            states: take(ebpf, "BYPASSED")?,
            _link: link,
        };
        let maps = Mutex::new(maps);
        Ok(Self(Arc::new(Shared { maps, board })))
    }

    /// The agent's end of a connection may be heard past TCP from now on. Whoever reads it must tell the tally of every
    /// byte, from the first one on. None where there is no room: it is then heard by TCP alone.
    pub fn join(&self, socket: &impl AsRawFd, key: FlowKey) -> Option<Tally> {
        match self.0.join(socket, key) {
            Ok(Some(slot)) => Some(Tally {
                shared: Arc::clone(&self.0),
                key,
                slot,
            }),
            not => {
                tracing::debug!(why = ?not.err(), "a connection is heard by TCP alone");
                self.0.leave(&key);
                None
            }
        }
    }
}

fn attach(
    ebpf: &mut Ebpf,
    apps: &SockHash<MapData, FlowKey>,
) -> Result<SkMsgLink, aya::programs::ProgramError> {
    let program = ebpf.program_mut(PROGRAM);
    let program = program.ok_or_else(|| aya::programs::ProgramError::InvalidName {
        name: PROGRAM.to_owned(),
    })?;
    let program: &mut SkMsg = program.try_into()?;
    program.load()?;
    let id = program.attach(apps.fd())?;
    program.take_link(id)
}

impl Shared {
    /// Takes an application's socket out: it is one of TCP alone again.
    fn leave(&self, key: &FlowKey) {
        // One that is closed has gone by itself.
        let _ = self.maps().apps.remove(key);
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, socket: &impl AsRawFd, key: FlowKey) -> Result<Option<u32>, MapError> {
        let mut maps = self.maps();
        let Some(slot) = maps.free.pop() else {
            return Ok(None);
        };
        self.board.set(slot, 0);
        let agents = &mut maps.agents;
        let joined = agents.insert(key, socket.as_raw_fd(), 0);
        // The slot last: what the program finds by it is ready.
        match joined.and_then(|()| maps.slots.insert(key, slot, 0)) {
            Ok(()) => Ok(Some(slot)),
            Err(error) => {
                maps.free.push(slot);
                Err(error)
            }
        }
    }
}

/// Counts what is read of one connection. To be dropped behind its socket: the next connection gets its slot.
pub struct Tally {
    shared: Arc<Shared>,
    key: FlowKey,
    slot: u32,
}

impl PastTcp for Tally {
    /// Before, for an application that is to wait for an answer is read first: then its socket is TCP's own again.
    fn about_to_read(&self) {
        if self.shared.board.take_left(self.slot) {
            self.shared.leave(&self.key);
        }
    }

    fn have_read(&self, bytes: usize) {
        self.shared.board.add(self.slot, bytes as u64);
    }
}

impl fmt::Debug for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tally")
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        self.shared.leave(&self.key);
        let mut maps = self.shared.maps();
        // Whoever sends now finds no socket there: the kernel took it out when it was closed.
        let _ = maps.slots.remove(&self.key);
        maps.free.push(self.slot);
    }
}

/// A connection whose both ends this process has, for trials.
impl Bypass {
    /// Puts `app` into the bypass as the programs would, though something has been sent: one byte goes through.
    fn join_both(
        &self,
        app: &TcpStream,
        agent: &TcpStream,
        key: FlowKey,
    ) -> Result<Option<Tally>, TrialError> {
        use std::io::{Read as _, Write as _};
        let Some(tally) = self.join(agent, key) else {
            return Ok(None);
        };
        {
            let mut maps = self.0.maps();
            let state = Bypassed {
                key,
                slot: BYPASS_NO_SLOT,
                ..Bypassed::default()
            };
            maps.states.insert(app, state, 0)?;
            maps.apps.insert(key, app.as_raw_fd(), 0)?;
        }
        // This byte goes by TCP, for nobody has read what was sent before: and then the program knows how much that was.
        let mut byte = [0];
        (&*app).write_all(&byte)?;
        (&*agent).read_exact(&mut byte)?;
        let state = self.0.maps().states.get(app, 0)?;
        self.0.board.set(tally.slot, state.by_tcp.wrapping_add(1));
        Ok(Some(tally))
    }
}

#[cfg(test)]
impl Bypass {
    /// What the programs keep with an application's socket.
    fn state(&self, app: &TcpStream) -> Bypassed {
        self.0.maps().states.get(app, 0).expect("it has joined")
    }
}

/// Why the bypass could not be tried.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// A socket failed.
    #[error("a socket on loopback failed: {0}")]
    Socket(#[from] std::io::Error),
    /// A map refused it.
    #[error("the kernel takes no socket: {0}")]
    Map(#[from] MapError),
    /// It could not be loaded.
    #[error(transparent)]
    Load(#[from] CaptureError),
    /// The kernel does not tell where what is needed is.
    #[error(transparent)]
    Fields(#[from] fields::FieldsError),
}
