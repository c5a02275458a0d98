//! The agent's hold on the eBPF object: loading, attaching, and its maps.

use std::{
    collections::BTreeMap,
    fs::File,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, MapError, RingBuf, SkStorage, SockMap},
    programs::{ProgramError, cgroup_sockopt::CgroupSockoptLink, sock_ops::SockOpsLink},
    util::KernelVersion,
};
use aya_log::EbpfLogger;
use session_ebpf_common::{
    DEVICES_MAX, FlowKey, GATE_ON, NAME_BYTES, NAMES_ON, Namespace, Original, Ports, Settings,
    counter,
};
use tracing::level_filters::LevelFilter;

use super::{
    CaptureError, CaptureRule, Filter,
    bypass::{self, Bypass, Fields},
    filter::Filters,
    kernel_types,
    listeners::Marker,
    pins::{Pinned, Pins},
    policy,
    programs::{self, Links},
    tables::{Tables, again, take},
    udp::{IdMaps, Ids},
};

/// The programs, built by `cargo xtask build`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/session-ebpf"));

/// Handshakes between a captured `connect()` and the agent's accept queue.
pub type Handshakes = HashMap<MapData, FlowKey, Original>;

/// What the programs count, by the numbers of [`counter`].
pub type CountersMap = Array<MapData, u64>;

/// What the programs have counted since they were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Captured connections to IPv4 destinations.
    pub captured4: u64,
    /// Captured connections to IPv6 destinations.
    pub captured6: u64,
    /// Matching connections that found no living agent, or none in their network namespace.
    pub agent_gone: u64,
    /// Matching connections not captured because too many handshakes were in flight.
    pub handshakes_full: u64,
    /// Matching connections for which the kernel had no memory for per-socket state.
    pub no_storage: u64,
    /// Matching connections of sockets bound to a device that could not be unbound.
    pub device_bound: u64,
    /// Connections refused because their rule says so, be it always or while they cannot be captured.
    pub refused: u64,
    /// Connections handed to the agent.
    pub delivered: u64,
    /// Handshakes that ended before they reached the agent.
    pub abandoned: u64,
    /// Connections that reached the agent's ports without a destination.
    pub unknown: u64,
    /// Sockets that could not be put on the cubic congestion control.
    pub no_cubic: u64,
    /// Handshakes in flight now.
    pub in_flight: u64,
    /// Matching connections that found an agent that did not answer.
    pub agent_hung: u64,
    /// SYNs that were held until the target had answered.
    pub held: u64,
    /// Retransmissions of held SYNs.
    pub held_again: u64,
    /// SYNs that could not be held, so that their connections succeeded at once.
    pub not_held: u64,
    /// Captured `connect()`s of UDP sockets and datagrams sent without it, to IPv4 destinations.
    pub udp4: u64,
    /// The same to IPv6 destinations.
    pub udp6: u64,
    /// Matching ones for which no id was left.
    pub udp_full: u64,
    /// Captured datagrams that would have left the host by a link that their application had chosen for each of them.
    pub udp_stray: u64,
    /// UDP conversations now.
    pub udp_flows: u64,
    /// Captured datagrams, and answers to them, that the agent dropped.
    pub udp_dropped: u64,
    /// Messages that applications sent past TCP (`local_bypass`).
    pub bypassed: u64,
    /// Messages of connections with the local bypass that went by TCP, for they would have overtaken others, or been too
    /// small for it, or too much.
    pub not_bypassed: u64,
}

/// Links of one captured cgroup; dropping them detaches.
struct Attachment {
    /// Inode of the cgroup's directory: another one under the same path is another cgroup.
    inode: u64,
    /// What was left out of it, should it be made again.
    filter: Filter,
    _links: Held,
}

/// What keeps the programs attached. Held to be dropped.
enum Held {
    /// This process.
    Here { _links: Links },
    /// Pins, which a process that is killed leaves behind.
    Pinned {
        _pins: Pinned,
        _sockopt: CgroupSockoptLink,
    },
}

/// The loaded object.
pub struct Kernel {
    ebpf: Ebpf,
    counters: CountersMap,
    settings: (Array<MapData, Settings>, Settings),
    /// Network namespaces by cookie.
    namespaces: HashMap<MapData, u64, Namespace>,
    /// The socket by which the programs know that this process lives.
    agent_socket: SockMap<MapData>,
    /// Names of links by index.
    devices: HashMap<MapData, u32, [u8; NAME_BYTES]>,
    /// The rules as the programs have them now, uncompiled.
    pub(super) rules: Vec<CaptureRule>,
    pub(super) tables: Tables,
    pub(super) filters: Filters,
    attached: BTreeMap<PathBuf, Attachment>,
    /// Behind `attached`, so that what is pinned goes first.
    pub(super) pins: Option<Pins>,
    agent: Option<SockOpsLink>,
    /// Whether SYNs are held.
    gate: bool,
    ids: Option<Ids>,
    /// What applications send comes past TCP, where that is on.
    pub(super) bypass: Option<Bypass>,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("attached", &self.attached())
            .finish_non_exhaustive()
    }
}

impl Kernel {
    /// Loads maps and programs. With `gate` SYNs are held; with `pins` what is attached outlives this process if it is
    /// killed. `usual`: the ports that are tried first in other network namespaces; none where they cannot be entered.
    pub fn load(
        usual: Ports,
        gate: bool,
        log: LevelFilter,
        pins: Option<Pins>,
        bypass: Option<&Fields>,
    ) -> Result<Self, CaptureError> {
        let mut ebpf = load_object(log, bypass)?;
        programs::load(&mut ebpf)?;
        let bypass = bypass.map(|_| Bypass::load(&mut ebpf)).transpose()?;
        let settings = Settings {
            own_netns: 0,
            agent_tgid: std::process::id(),
            udp_mark: 0,
            gate: if gate { GATE_ON } else { 0 },
            filters: 0,
            names: 0,
            usual,
            padding: [0; 3],
        };
        let mut kernel = Self {
            ids: Some(ids(&mut ebpf)?),
            bypass,
            counters: again(&ebpf, "COUNTERS")?,
            settings: (take(&mut ebpf, "SETTINGS")?, settings),
            namespaces: take(&mut ebpf, "NAMESPACES")?,
            agent_socket: take(&mut ebpf, "AGENT")?,
            devices: take(&mut ebpf, "DEVICES")?,
            rules: Vec::new(),
            tables: Tables::new(&mut ebpf)?,
            filters: Filters::new(&mut ebpf)?,
            attached: BTreeMap::new(),
            pins,
            agent: None,
            gate,
            ebpf,
        };
        kernel.tell_settings()?;
        Ok(kernel)
    }

    /// What the programs have been told.
    pub(super) fn settings(&self) -> &Settings {
        &self.settings.1
    }

    /// Tells the programs their settings, with the number of filters as it is now.
    fn tell_settings(&mut self) -> Result<(), CaptureError> {
        let (map, settings) = &mut self.settings;
        settings.filters = self.filters.len();
        map.set(0, *settings, 0)
            .map_err(|error| CaptureError::map("writing the eBPF settings", error))
    }

    /// The programs take this agent to live for as long as `marker` listens.
    pub fn show_life(&mut self, marker: &Marker) -> Result<(), CaptureError> {
        let shown = self.agent_socket.set(0, marker, 0);
        shown.map_err(|error| CaptureError::map("showing the programs that the agent lives", error))
    }

    /// Tells the programs of a network namespace, in place of what they knew of it.
    pub fn set_namespace(&mut self, cookie: u64, entry: &Namespace) -> Result<(), CaptureError> {
        let entry = Namespace { cookie, ..*entry };
        let told = self.namespaces.insert(cookie, entry, 0);
        told.map_err(|error| CaptureError::map("writing a network namespace", error))
    }

    /// The programs know nothing of a network namespace any more.
    pub fn forget_namespace(&mut self, cookie: u64) {
        // What they do not know is forgotten already.
        let _ = self.namespaces.remove(&cookie);
    }

    /// The reader of the programs' log messages. Can be had once.
    pub fn logger<T: tracing_log::log::Log>(
        &mut self,
        to: T,
    ) -> Result<EbpfLogger<T>, CaptureError> {
        EbpfLogger::init_with_logger(&mut self.ebpf, to).map_err(|error| CaptureError::Kernel {
            what: "opening the log buffer of the eBPF programs".into(),
            detail: error.to_string(),
        })
    }

    /// What the gate needs: the ring of held SYNs, the filed handshakes, and the counters. Can be had once.
    pub fn take_gate(
        &mut self,
    ) -> Result<(RingBuf<MapData>, Handshakes, CountersMap), CaptureError> {
        Ok((
            take(&mut self.ebpf, "KNOCKS")?,
            take(&mut self.ebpf, "HANDSHAKES")?,
            again(&self.ebpf, "COUNTERS")?,
        ))
    }

    /// What the programs stored with accepted sockets. Can be had once.
    pub fn take_accepted(&mut self) -> Result<SkStorage<MapData, Original>, CaptureError> {
        take(&mut self.ebpf, "ACCEPTED")
    }

    /// The ids of UDP destinations. Can be had once.
    pub fn take_ids(&mut self) -> Result<Ids, CaptureError> {
        let taken = || MapError::InvalidName {
            name: "UDP_IDS".to_owned(),
        };
        let ids = self.ids.take().ok_or_else(taken);
        ids.map_err(|error| CaptureError::map("opening the ids of UDP destinations", error))
    }

    /// The ring of datagrams that wait for the agent to come to their network namespace. Can be had once.
    pub fn take_held(&mut self) -> Result<RingBuf<MapData>, CaptureError> {
        take(&mut self.ebpf, "HELD_DATAGRAMS")
    }

    /// Tells the programs which network namespace is the agent's own, by its cookie, and the mark of captured datagrams.
    pub fn set_own(&mut self, netns_cookie: u64, mark: u32) -> Result<(), CaptureError> {
        let settings = &mut self.settings.1;
        (settings.own_netns, settings.udp_mark) = (netns_cookie, mark);
        self.tell_settings()
    }

    /// Compiles rules and gives them to the programs. Nothing changes if they do not compile.
    pub fn set_rules(&mut self, rules: &[CaptureRule]) -> Result<(), CaptureError> {
        let compiled = policy::compile(rules)?;
        self.tables
            .apply(compiled)
            .map_err(|error| CaptureError::map("writing the capture rules", error))?;
        self.rules = rules.to_vec();
        Ok(())
    }

    /// Attaches the agent's side, in the cgroup in which the listeners were made. The root is allowed: the program looks
    /// at nothing but established connections on the agent's own ports.
    pub fn attach_agent(&mut self, cgroup: &Path) -> Result<(), CaptureError> {
        let dir = open(cgroup)?;
        let link = programs::attach_agent(&mut self.ebpf, &dir);
        self.agent = Some(link.map_err(attach_failed(cgroup))?);
        Ok(())
    }

    /// Attaches the applications' side to a cgroup; replaces an attachment to one of the same path that is gone.
    pub fn attach(&mut self, cgroup: &Path, filter: &Filter) -> Result<(), CaptureError> {
        let dir = open(cgroup)?;
        let inode = inode(&dir);
        if self
            .attached
            .get(cgroup)
            .is_some_and(|attachment| Some(attachment.inode) == inode)
        {
            return Err(CaptureError::AlreadyAttached {
                path: cgroup.to_owned(),
            });
        }
        let inode = inode.unwrap_or(0);
        if !filter.is_empty() {
            self.filters.insert(inode, filter)?;
        }
        let told = self.tell_settings();
        let held = told.and_then(|()| self.hold(cgroup, &dir, filter));
        let attachment = held.map(|links| Attachment {
            inode,
            filter: filter.clone(),
            _links: links,
        });
        match attachment {
            Ok(attachment) => {
                if let Some(gone) = self.attached.insert(cgroup.to_owned(), attachment) {
                    self.forget_filter(gone.inode);
                }
                Ok(())
            }
            Err(error) => {
                self.forget_filter(inode);
                Err(error)
            }
        }
    }

    /// Attaches the programs of the applications' side.
    fn hold(&mut self, cgroup: &Path, dir: &File, filter: &Filter) -> Result<Held, CaptureError> {
        let links = programs::attach(&mut self.ebpf, dir, self.gate);
        let links = links.map_err(attach_failed(cgroup))?;
        Ok(match &mut self.pins {
            None => Held::Here { _links: links },
            Some(pins) => Held::Pinned {
                _pins: pins.pin(cgroup, filter, links.first)?,
                _sockopt: links.sockopt,
            },
        })
    }

    /// Names of the links of the agent's network namespace, by their index: told to applications that ask.
    pub fn set_devices(&mut self, devices: &BTreeMap<u32, String>) -> Result<(), CaptureError> {
        let failed = |error| CaptureError::map("writing the names of links", error);
        let known: Vec<u32> = self.devices.keys().filter_map(Result::ok).collect();
        for index in known.iter().filter(|index| !devices.contains_key(index)) {
            // It is in the list of a moment ago.
            let _ = self.devices.remove(index);
        }
        for (index, name) in devices.iter().take(DEVICES_MAX as usize) {
            let mut bytes = [0; NAME_BYTES];
            // The last byte stays zero.
            for (to, from) in bytes[..NAME_BYTES - 1].iter_mut().zip(name.bytes()) {
                *to = from;
            }
            self.devices.insert(index, bytes, 0).map_err(failed)?;
        }
        Ok(())
    }

    /// Whether questions about names go to the agent.
    pub fn set_names(&mut self, on: bool) -> Result<(), CaptureError> {
        self.settings.1.names = if on { NAMES_ON } else { 0 };
        self.tell_settings()
    }

    /// Removes the filter of a cgroup that is not captured any more.
    fn forget_filter(&mut self, cgroup: u64) {
        self.filters.remove(cgroup);
        if let Err(error) = self.tell_settings() {
            tracing::warn!(%error, "the programs go on looking for filters that are no more");
        }
    }

    /// Attaches again where another cgroup now has the path of an attached one.
    pub fn reattach(&mut self) -> Vec<PathBuf> {
        let mut paths = self.attached();
        let filter = |kernel: &Self, path: &PathBuf| {
            let attachment = kernel.attached.get(path);
            attachment.map_or_else(Filter::default, |a| a.filter.clone())
        };
        paths.retain(|path| match self.attach(path, &filter(self, path)) {
            Ok(()) => true,
            Err(CaptureError::AlreadyAttached { .. }) => false,
            Err(error) => {
                tracing::debug!(%error, "not attached again");
                false
            }
        });
        paths
    }

    /// Detaches from a cgroup.
    pub fn detach(&mut self, cgroup: &Path) -> Result<(), CaptureError> {
        let removed = self.attached.remove(cgroup);
        let removed = removed.ok_or_else(|| CaptureError::NotAttached {
            path: cgroup.to_owned(),
        })?;
        let inode = removed.inode;
        drop(removed);
        self.forget_filter(inode);
        Ok(())
    }

    /// The attached cgroups.
    pub fn attached(&self) -> Vec<PathBuf> {
        self.attached.keys().cloned().collect()
    }

    /// All counters.
    pub fn counters(&self) -> Counters {
        let get = |index| self.counters.get(&index, 0).unwrap_or_default();
        Counters {
            captured4: get(counter::CAPTURED4),
            captured6: get(counter::CAPTURED6),
            agent_gone: get(counter::AGENT_GONE),
            handshakes_full: get(counter::HANDSHAKES_FULL),
            no_storage: get(counter::NO_STORAGE),
            device_bound: get(counter::DEVICE_BOUND),
            refused: get(counter::REFUSED),
            delivered: get(counter::DELIVERED),
            abandoned: get(counter::ABANDONED),
            unknown: get(counter::UNKNOWN),
            no_cubic: get(counter::NO_CUBIC),
            in_flight: get(counter::IN_FLIGHT),
            agent_hung: get(counter::AGENT_HUNG),
            held: get(counter::HELD),
            held_again: get(counter::HELD_AGAIN),
            not_held: get(counter::NOT_HELD),
            udp4: get(counter::UDP4),
            udp6: get(counter::UDP6),
            udp_full: get(counter::UDP_FULL),
            udp_stray: get(counter::UDP_STRAY),
            bypassed: get(counter::BYPASSED),
            not_bypassed: get(counter::NOT_BYPASSED),
            // The agent counts these itself.
            udp_flows: 0,
            udp_dropped: 0,
        }
    }
}

/// Instructions that the verifier walked through to accept each program.
#[cfg(test)]
pub fn verified(kernel: &Kernel) -> Vec<(String, u32)> {
    let count =
        |program: &aya::programs::Program| program.info().ok()?.verified_instruction_count();
    kernel
        .ebpf
        .programs()
        .map(|(name, program)| (name.to_owned(), count(program).unwrap_or(u32::MAX)))
        .collect()
}

/// What the programs have been told.
#[cfg(test)]
pub fn settings(kernel: &Kernel) -> &Settings {
    &kernel.settings.1
}

/// Pretends that so many handshakes are in flight.
#[cfg(test)]
pub fn pretend_in_flight(kernel: &mut Kernel, count: u64) {
    kernel
        .counters
        .set(counter::IN_FLIGHT, count, 0)
        .expect("the counter");
}

/// Whether the programs know of a network namespace.
#[cfg(test)]
pub fn knows_namespace(kernel: &Kernel, cookie: u64) -> bool {
    kernel.namespaces.get(&cookie, 0).is_ok()
}

/// Handshakes that are filed now, counted in the map itself.
#[cfg(test)]
pub fn handshakes_filed(kernel: &Kernel) -> usize {
    let map = kernel.ebpf.map("HANDSHAKES").expect("the map");
    let map: aya::maps::HashMap<_, session_ebpf_common::FlowKey, Original> =
        map.try_into().expect("its type");
    map.keys().count()
}

/// The programs' tables of UDP destinations. They are opened once more for what gives ids up, and the counters, which are
/// shared, too.
fn ids(ebpf: &mut Ebpf) -> Result<Ids, CaptureError> {
    let same = IdMaps {
        ids: again(ebpf, "UDP_IDS")?,
        destinations: again(ebpf, "UDP_DESTINATIONS")?,
    };
    let maps = IdMaps {
        ids: take(ebpf, "UDP_IDS")?,
        destinations: take(ebpf, "UDP_DESTINATIONS")?,
    };
    Ok(Ids::new(maps, same, again(ebpf, "COUNTERS")?))
}

/// Creates the maps; loads no program yet.
pub(super) fn load_object(log: LevelFilter, bypass: Option<&Fields>) -> Result<Ebpf, CaptureError> {
    let level = level(log);
    let (set_retval, mptcp) = (u8::from(has_set_retval()), u8::from(has_mptcp()));
    let netns_of_thread = kernel_types::netns_of_thread();
    let mut loader = EbpfLoader::new();
    if let Some(fields) = bypass {
        bypass::prepare(&mut loader, fields, &1);
    }
    loader
        .override_global(aya_log::LEVEL, &level, true)
        .override_global("HAS_SET_RETVAL", &set_retval, true)
        .override_global("HAS_MPTCP", &mptcp, true)
        .override_global("NETNS_OF_THREAD", &netns_of_thread, true)
        .load(OBJECT)
        .map_err(|error| CaptureError::ebpf("creating the eBPF maps", error))
}

/// Whether a refusal can have its own errno: `bpf_set_retval`, Linux 5.18.
pub fn has_set_retval() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(5, 18, 0))
}

/// Whether the programs can go from a subflow of Multipath TCP to its socket: `bpf_skc_to_mptcp_sock`, Linux 5.19, with
/// CONFIG_MPTCP.
fn has_mptcp() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(5, 19, 0))
        && Path::new("/proc/sys/net/mptcp").exists()
}

/// The level as the programs know it: errors are 1, everything is 5, nothing is 0.
fn level(filter: LevelFilter) -> u8 {
    match filter {
        LevelFilter::OFF => 0,
        LevelFilter::ERROR => aya_log::Level::Error as u8,
        LevelFilter::WARN => aya_log::Level::Warn as u8,
        LevelFilter::INFO => aya_log::Level::Info as u8,
        LevelFilter::DEBUG => aya_log::Level::Debug as u8,
        _ => aya_log::Level::Trace as u8,
    }
}

/// Loads everything and lets go of it again: what `doctor` asks.
pub fn try_load() -> Result<(), CaptureError> {
    programs::load(&mut load_object(LevelFilter::OFF, None)?)
}

fn attach_failed(cgroup: &Path) -> impl Fn(ProgramError) -> CaptureError + '_ {
    move |error| {
        CaptureError::program(
            format!("attaching to the cgroup {}", cgroup.display()),
            error,
        )
    }
}

fn open(cgroup: &Path) -> Result<File, CaptureError> {
    File::open(cgroup).map_err(|source| CaptureError::Cgroup {
        what: "open",
        path: cgroup.to_owned(),
        source,
    })
}

/// For a cgroup's folder this is also the cgroup's id, as the programs see it.
fn inode(dir: &File) -> Option<u64> {
    dir.metadata().ok().map(|data| data.ino())
}

/// Where a connection was to go.
pub fn socket_addr(original: &Original) -> SocketAddr {
    let mut bytes = [0_u8; 16];
    for (chunk, word) in bytes.chunks_exact_mut(4).zip(original.addr) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    let addr = Ipv6Addr::from(bytes);
    let addr = addr.to_ipv4_mapped().map_or(IpAddr::V6(addr), IpAddr::V4);
    SocketAddr::new(addr, original.port)
}
