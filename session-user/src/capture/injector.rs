//! Sends packets into network namespaces: held SYNs to the agent's own listeners, and answers to applications.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use session_ebpf_common::Ports;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Raw sockets, which send packets as they are given.
#[derive(Debug)]
pub struct Injector {
    v4: Socket,
    /// None on a host without IPv6.
    v6: Option<Socket>,
}

impl Injector {
    /// Needs CAP_NET_RAW.
    pub fn open() -> io::Result<Self> {
        let raw = |domain| {
            // IPPROTO_RAW: the headers are in what is sent, and nothing is received (raw(7)).
            let protocol = Some(Protocol::from(libc::IPPROTO_RAW));
            Socket::new(domain, Type::RAW.cloexec().nonblocking(), protocol)
        };
        Ok(Self {
            v4: raw(Domain::IPV4)?,
            v6: match raw(Domain::IPV6) {
                Ok(socket) => Some(socket),
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
                Err(error) => return Err(error),
            },
        })
    }

    pub fn send(&self, packet: &[u8], to: IpAddr) -> io::Result<()> {
        let socket = match to {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => self.v6.as_ref().ok_or(io::ErrorKind::Unsupported)?,
        };
        socket.send_to(packet, &SockAddr::from(SocketAddr::new(to, 0)))?;
        Ok(())
    }
}

/// An open network namespace, as the gate needs it.
#[derive(Debug)]
struct Post {
    ports: Ports,
    injector: Arc<Injector>,
}

/// Where packets can be sent, and where they soon can.
#[derive(Debug, Default)]
struct Posts {
    open: BTreeMap<u64, Post>,
    expected: BTreeSet<u64>,
}

/// The injectors of all open network namespaces, by their cookies. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Injectors(Arc<Mutex<Posts>>);

impl Injectors {
    fn posts(&self) -> MutexGuard<'_, Posts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A namespace was opened, with these listeners.
    pub fn add(&self, netns_cookie: u64, ports: Ports, injector: Arc<Injector>) {
        let post = Post { ports, injector };
        self.posts().open.insert(netns_cookie, post);
    }

    /// A namespace was closed.
    pub fn remove(&self, netns_cookie: u64) {
        self.posts().open.remove(&netns_cookie);
    }

    /// A namespace is being opened: its held SYNs wait for that.
    pub fn expect(&self, netns_cookie: u64) {
        self.posts().expected.insert(netns_cookie);
    }

    /// It is open, or will not be.
    pub fn forget_expected(&self, netns_cookie: u64) {
        self.posts().expected.remove(&netns_cookie);
    }

    /// Whether a namespace is being opened.
    pub fn is_expected(&self, netns_cookie: u64) -> bool {
        self.posts().expected.contains(&netns_cookie)
    }

    /// Whether the agent listens at `port` there. A SYN is held before the agent has opened its listeners, and then its
    /// port may turn out to be somebody else's.
    pub fn listens(&self, netns_cookie: u64, port: u32) -> bool {
        self.posts().open.get(&netns_cookie).is_some_and(|post| {
            u32::from(post.ports.v4) == port
                || post.ports.v6.iter().any(|own| u32::from(*own) == port)
        })
    }

    /// Sends a packet in a namespace.
    pub fn send(&self, netns_cookie: u64, packet: &[u8], to: IpAddr) -> io::Result<()> {
        match self.posts().open.get(&netns_cookie) {
            Some(post) => post.injector.send(packet, to),
            None => Err(io::Error::other("its network namespace is not open")),
        }
    }
}
