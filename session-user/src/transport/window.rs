//! How much a new transport may send before the first answer.
//!
//! A TCP connection starts with ten segments in flight, so what is unacknowledged at a handover, and all
//! that follows, would trickle out over several round trips (RFC 6928 section 2). The kernel lets an
//! eBPF program lift that window when a connection is established. The program is attached to the
//! agent's own cgroup, and looks at transports alone.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use aya::Ebpf;
use aya::maps::{Array, HashMap, MapData};
use aya::programs::{CgroupAttachMode, SockOps};
use session_ebpf_common::{LISTENING_PORTS, Listening, WindowKey};

/// The program, built by `cargo xtask build`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/session-transport"));
const PROGRAM: &str = "transport_ops";

/// The window of a path of which nothing is known: 371 kB, which is 74 Mbit/s at 40 ms. A segment counts
/// however small it is: what 2,000 small writes a second have under way at 40 ms goes out again, and as
/// much follows, before the first answer.
pub const SEGMENTS_UNKNOWN: u32 = 256;
/// Smallest and largest: the kernel's own, and what 200 Mbit/s have under way at 60 ms.
const SEGMENTS: std::ops::RangeInclusive<u32> = 10..=1024;

/// The attached program. Dropping it detaches.
pub struct InitialWindow {
    _program: Ebpf,
    windows: Mutex<HashMap<MapData, WindowKey, u32>>,
}

impl std::fmt::Debug for InitialWindow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InitialWindow")
    }
}

/// Why the windows stay as they are.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// The cgroup could not be opened.
    #[error("the agent's own cgroup cannot be opened: {0}")]
    Cgroup(#[from] std::io::Error),
    /// The object could not be loaded.
    #[error("{0}")]
    Load(#[from] aya::EbpfError),
    /// The program could not be loaded or attached.
    #[error("{0}")]
    Program(#[from] aya::programs::ProgramError),
    /// A map is not as it should be.
    #[error("{0}")]
    Map(#[from] aya::maps::MapError),
    /// The object is another one.
    #[error("the eBPF object lacks {0}: the agent was not built with `cargo xtask build`")]
    Missing(&'static str),
}

impl InitialWindow {
    /// Attaches the program to `cgroup`, the one that this process makes its sockets in. Transports
    /// that are accepted on `listen` have the window of their path, too.
    pub fn attach(cgroup: &Path, listen: &[SocketAddr]) -> Result<Self, WindowError> {
        let mut ebpf = Ebpf::load(OBJECT)?;
        let mut listening = Listening {
            segments: SEGMENTS_UNKNOWN,
            ..Listening::default()
        };
        for (slot, addr) in listening.ports.iter_mut().zip(listen).take(LISTENING_PORTS) {
            *slot = addr.port();
        }
        let program = ebpf.program_mut(PROGRAM);
        let program: &mut SockOps = program.ok_or(WindowError::Missing(PROGRAM))?.try_into()?;
        // It holds its maps from here on; before, they are closed with whoever took them.
        program.load()?;
        let map = ebpf.take_map("LISTENING");
        let map = map.ok_or(WindowError::Missing("LISTENING"))?;
        Array::<MapData, Listening>::try_from(map)?.set(0, listening, 0)?;
        let map = ebpf.take_map("WINDOWS");
        let windows = HashMap::try_from(map.ok_or(WindowError::Missing("WINDOWS"))?)?;
        let program = ebpf.program_mut(PROGRAM);
        let program: &mut SockOps = program.ok_or(WindowError::Missing(PROGRAM))?.try_into()?;
        let dir = std::fs::File::open(cgroup)?;
        // The link lives as long as the object.
        program.attach(dir.as_fd(), CgroupAttachMode::Single)?;
        Ok(Self {
            _program: ebpf,
            windows: Mutex::new(windows),
        })
    }

    /// A transport from `local` is about to be dialled to `remote`. `path`: segments that the path had
    /// under way at its best, if known.
    pub fn before_dial(&self, local: IpAddr, remote: SocketAddr, path: Option<u32>) {
        let segments = path.unwrap_or(SEGMENTS_UNKNOWN);
        self.put(local, remote.ip(), remote.port().into(), segments);
    }

    /// The path between `local` and `remote` had so many segments under way.
    pub fn learnt(&self, local: IpAddr, remote: IpAddr, segments: u32) {
        self.put(local, remote, 0, segments);
    }

    fn put(&self, local: IpAddr, remote: IpAddr, remote_port: u32, segments: u32) {
        let key = WindowKey {
            local: words(local),
            remote: words(remote),
            remote_port,
        };
        let value = segments.clamp(*SEGMENTS.start(), *SEGMENTS.end());
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = windows.insert(key, value, 0) {
            tracing::debug!(%error, "an initial window could not be set");
        }
    }
}

/// An address as the programs have it: network order, IPv4 as v4-mapped.
fn words(ip: IpAddr) -> [u32; 4] {
    let v6: Ipv6Addr = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let bytes = v6.octets();
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*chunk);
    }
    words
}
