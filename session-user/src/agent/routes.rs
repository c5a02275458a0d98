//! Where what is captured goes: to a peer, to the agent's own answers to questions about names, or nowhere.

use std::any::Any;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use session_proto::wire::Target;

use crate::capture::{CaptureRule, Captured, DNS_PEER, DNS_PORT, FlowWay, FlowWays, Protocol};
use crate::config::Config;
use crate::names::{
    Answers, Book, BookError, Conversation, Decision, Lease, Listening, NameRules, Place, Ranges,
    Resolver, Way,
};
use crate::requests::{AppEnd, FlowQueue, RequestQueue, StreamRequest, Supply};

/// Where this host says which resolvers it asks.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What the agent knows of names.
#[derive(Clone, Debug)]
pub(super) struct Names {
    pub rules: Arc<NameRules>,
    pub book: Arc<Book>,
    pub resolver: Resolver,
}

impl Names {
    /// Opened if any rule is for names, or if the agent is to answer questions at a port; `unit` is this unit's SPIFFE ID.
    pub fn open(config: &Config, unit: &str) -> Result<Option<Self>, BookError> {
        let rules: Vec<CaptureRule> = config.captures.iter().map(|c| c.rule.clone()).collect();
        let rules = Arc::new(NameRules::new(&rules));
        if rules.is_empty() && config.dns.listen.is_empty() {
            return Ok(None);
        }
        let v6 = config.dns.range6.unwrap_or_else(|| Ranges::own6(unit));
        let ranges = Ranges {
            v4: config.dns.range4,
            v6,
        };
        let book = Arc::new(Book::open(&config.dns.state, ranges, config.dns.ttl)?);
        // Where there is no ::1 the capture takes no IPv6.
        let ipv6 = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
        let answers = Answers::new(Arc::clone(&rules), Arc::clone(&book), ipv6);
        Ok(Some(Self {
            rules,
            book,
            resolver: Resolver::new(answers),
        }))
    }

    /// Answers at the configured places.
    pub fn listen(&self, config: &Config) -> anyhow::Result<Listening> {
        let places = config.dns.listen.iter().map(|at| Place {
            at: *at,
            from: config.dns.from.clone(),
            upstream: config.dns.upstream.clone(),
            resolv_conf: Path::new(RESOLV_CONF).to_owned(),
        });
        Ok(Listening::open(places, &self.resolver)?)
    }

    /// Networks whose addresses stand for names, if any name can be captured.
    pub fn reserved(&self) -> Option<[IpNet; 2]> {
        (!self.rules.is_empty()).then(|| self.book.ranges().networks())
    }

    /// What becomes of a name as an operator types it, and its name as rules have it.
    pub fn decide(&self, typed: &str) -> (String, Decision) {
        let name = typed
            .strip_suffix('.')
            .unwrap_or(typed)
            .to_ascii_lowercase();
        let decision = self.rules.decide(&name);
        (name, decision)
    }
}

/// Where one captured connection or conversation goes.
#[derive(Debug)]
pub(super) enum Route {
    /// To a peer, whose queue this is.
    Peer {
        queue: Arc<RequestQueue>,
        target: Target,
        /// Whether it was captured to be held, but need not wait for its target.
        early: bool,
    },
    /// It asks about names.
    Question { resolver: SocketAddr, way: Way },
}

impl Route {
    /// Whether it need not wait for its target, although it was held.
    pub fn early(&self) -> bool {
        matches!(self, Self::Peer { early: true, .. })
    }
}

/// The ways there are.
#[derive(Clone, Debug)]
pub(super) struct Routes {
    queues: Vec<Arc<RequestQueue>>,
    names: Option<Names>,
    /// Datagrams with questions: those to each peer's resolvers, and last those to this host's.
    questions: Vec<Arc<FlowQueue>>,
}

impl Routes {
    /// To the peers with these queues.
    pub fn new(queues: Vec<Arc<RequestQueue>>, names: Option<Names>) -> Self {
        Self {
            questions: (0..=queues.len()).map(|_| Arc::default()).collect(),
            queues,
            names,
        }
    }

    /// What answers questions that come as datagrams, if any name can be captured.
    pub fn answering(&self) -> Vec<impl Future<Output = ()> + Send + use<>> {
        let Some(names) = &self.names else {
            return Vec::new();
        };
        let peers = self.queues.iter().map(|queue| Way::Peer(Arc::clone(queue)));
        let ways = peers.chain([Way::Direct]);
        let each = ways.zip(&self.questions);
        each.map(|(way, queue)| {
            names
                .resolver
                .clone()
                .serve_datagrams(Arc::clone(queue), way)
        })
        .collect()
    }

    /// Where goes what was to go to `original` and was claimed for `peer`, and what keeps its address while it lives.
    /// An error is the errno that the application is to see.
    pub fn find(
        &self,
        original: SocketAddr,
        peer: u32,
        protocol: Protocol,
    ) -> Result<(Route, Option<Lease>), i32> {
        let names = self.names.as_ref().filter(|names| !names.rules.is_empty());
        let Some(names) = names else {
            return Ok((self.to_peer(peer, Target::Addr(original), false)?, None));
        };
        if names.book.is_reserved(original.ip()) {
            return self.to_name(names, original, protocol);
        }
        if peer != DNS_PEER && original.port() != DNS_PORT {
            return Ok((self.to_peer(peer, Target::Addr(original), false)?, None));
        }
        let way = if peer == DNS_PEER {
            Way::Direct
        } else {
            Way::Peer(self.queue(peer)?)
        };
        let resolver = original;
        Ok((Route::Question { resolver, way }, None))
    }

    /// To what an address stands for. Nothing else: it is no address of anybody.
    fn to_name(
        &self,
        names: &Names,
        original: SocketAddr,
        protocol: Protocol,
    ) -> Result<(Route, Option<Lease>), i32> {
        let Some((name, lease)) = names.book.lease(original.ip(), Instant::now()) else {
            tracing::warn!(%original, "a connection is refused: its address stands for no name");
            return Err(libc::EHOSTUNREACH);
        };
        let Some(way) = names.rules.way(&name, original.port(), protocol) else {
            tracing::warn!(%name, port = original.port(), %protocol, "a connection is refused: no rule captures it");
            return Err(libc::ECONNREFUSED);
        };
        let target = Target::Name(name.to_string(), original.port());
        Ok((self.to_peer(way.peer, target, way.early)?, Some(lease)))
    }

    fn to_peer(&self, peer: u32, target: Target, early: bool) -> Result<Route, i32> {
        Ok(Route::Peer {
            queue: self.queue(peer)?,
            target,
            early,
        })
    }

    fn queue(&self, peer: u32) -> Result<Arc<RequestQueue>, i32> {
        self.queues.get(peer as usize).cloned().ok_or_else(|| {
            tracing::error!(
                peer,
                "a captured connection names a peer that is not configured"
            );
            libc::EHOSTUNREACH
        })
    }

    /// Asks for what a route leads to. A request that nobody takes is dropped, which whoever waits for it sees.
    pub fn ask(&self, route: Route, app: AppEnd, cgroup: u64, supply: Supply) {
        match route {
            Route::Peer { queue, target, .. } => {
                let request = StreamRequest {
                    target,
                    app,
                    cgroup: Some(cgroup),
                    supply,
                };
                if let Err(request) = queue.push(request) {
                    tracing::warn!(target = %request.target, "too many connections wait for the peer: one is refused");
                }
            }
            Route::Question { resolver, way } => {
                if let Some(names) = &self.names {
                    names.resolver.serve(Conversation {
                        resolver,
                        way,
                        app,
                        cgroup,
                        supply,
                    });
                }
            }
        }
    }

    /// Sends a connection on that was made before its target has answered. A socket that nobody can take is dropped,
    /// which resets it.
    pub fn dispatch(&self, captured: Captured) {
        let Ok((route, lease)) = self.find(captured.original, captured.peer, Protocol::Tcp) else {
            return;
        };
        let (app, cgroup) = (captured.app.into(), captured.cgroup);
        let socket = captured.into_stream().keeping(lease);
        self.ask(route, app, cgroup, Supply::Connected(socket));
    }
}

impl FlowWays for Routes {
    fn find(&self, original: SocketAddr, peer: u32) -> Result<FlowWay, i32> {
        let (route, lease) = Self::find(self, original, peer, Protocol::Udp)?;
        let kept = lease.map(|lease| Box::new(lease) as Box<dyn Any + Send + Sync>);
        let (queue, target) = match route {
            Route::Peer { queue, target, .. } => (Arc::clone(&queue.flows), target),
            Route::Question { resolver, .. } => {
                // Those of no peer are the last.
                let peers = self.queues.len();
                let queue = self.questions.get((peer as usize).min(peers));
                let queue = queue.ok_or(libc::EHOSTUNREACH)?;
                (Arc::clone(queue), Target::Addr(resolver))
            }
        };
        Ok(FlowWay {
            queue,
            target,
            kept,
        })
    }
}
