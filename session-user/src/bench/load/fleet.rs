//! All units: who makes their identities and connections, tells them what to do, and counts what they say.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant as Deadline, timeout_at};

use super::super::progress::bar;
use super::tally::Tally;
use super::unit::{Share, Told, Unit, What};
use super::{Done, FleetArgs, Word};
use crate::driver::establish::{self, Established};
use crate::handshake::{Identity, IdentityPaths};
use crate::pki::Mint;
use crate::policy;
use crate::transport::{TransportOptions, tune_accepted};

/// Handshakes under way at once: fewer than a gateway takes.
const HANDSHAKES: usize = 64;
/// Time for an order to be carried out by the whole fleet.
const ORDER_LIMIT: Duration = Duration::from_secs(600);
/// Time for one connection, and for one handshake, on a machine that is busy with all the others.
const UNIT_LIMIT: Duration = Duration::from_secs(60);
/// How long certificates are valid.
const VALIDITY: Duration = Duration::from_secs(24 * 3600);

/// What every unit needs to make its session.
struct Makers {
    mint: Mint,
    /// Believes in the CA.
    model: Identity,
    args: FleetArgs,
    /// Handshakes under way.
    turns: Semaphore,
}

/// The units.
pub struct Fleet {
    makers: Arc<Makers>,
    runtime: Handle,
    orders: watch::Sender<Option<Word>>,
    tell: mpsc::UnboundedSender<Told>,
    told: mpsc::UnboundedReceiver<Told>,
    /// Units whose session stands.
    stand: BTreeSet<usize>,
}

impl Fleet {
    /// A fleet whose units have not been made.
    pub fn new(args: &FleetArgs, runtime: Handle) -> anyhow::Result<Self> {
        let file = |name: &str| args.pki.join(name);
        let model = Identity::load(&IdentityPaths {
            certificate: file("client.crt"),
            key: file("client.key"),
            ca: file("ca.crt"),
            crl: None,
        })?;
        let makers = Makers {
            mint: Mint::open(&args.pki)?,
            model,
            args: args.clone(),
            turns: Semaphore::new(HANDSHAKES),
        };
        let (tell, told) = mpsc::unbounded_channel();
        Ok(Self {
            makers: Arc::new(makers),
            runtime,
            orders: watch::channel(None).0,
            tell,
            told,
            stand: BTreeSet::new(),
        })
    }

    /// Does what it is told, within [`ORDER_LIMIT`].
    pub async fn obey(&mut self, word: Word) -> anyhow::Result<Done> {
        let began = Instant::now();
        let awaited = match word {
            Word::Sessions => self.begin(),
            Word::Streams | Word::Check => self.stand.clone(),
        };
        self.orders.send_replace(Some(word));
        let wanted = match word {
            Word::Streams => self.makers.args.streams,
            Word::Sessions | Word::Check => self.makers.args.sessions,
        };
        let shown = bar(word.as_str(), awaited.len() as u64, "units");
        let mut tally = Tally::new(word, awaited, wanted);
        let deadline = Deadline::now() + ORDER_LIMIT;
        while tally.awaited() > 0 {
            let Ok(told) = timeout_at(deadline, self.told.recv()).await else {
                let quiet = tally.awaited();
                tally.trouble(|| format!("{quiet} units had not done it after {ORDER_LIMIT:?}"));
                break;
            };
            let before = tally.awaited();
            tally.hear(told.context("every unit has ended")?, &mut self.stand);
            shown.inc((before - tally.awaited()) as u64);
        }
        // Who has ended meanwhile is not alive, though it had answered.
        while let Ok(told) = self.told.try_recv() {
            tally.hear(told, &mut self.stand);
        }
        shown.finish_and_clear();
        let seconds = began.elapsed().as_secs_f64();
        Ok(Done {
            seconds,
            ..tally.done()
        })
    }

    fn begin(&mut self) -> BTreeSet<usize> {
        let units = 0..self.makers.args.sessions;
        for unit in units.clone() {
            let (makers, tell) = (Arc::clone(&self.makers), self.tell.clone());
            let orders = self.orders.subscribe();
            self.runtime.spawn(async move {
                let (what, made) = match makers.establish(unit).await {
                    Ok(made) => (What::Stands, Some(made)),
                    Err(error) => (What::Failed(format!("{error:#}")), None),
                };
                // The fleet ends only with its runtime.
                let _ = tell.send(Told { unit, what });
                if let Some(made) = made {
                    Unit::new(made, makers.share(unit), tell).run(orders).await;
                }
            });
        }
        units.collect()
    }
}

impl Makers {
    async fn establish(&self, number: usize) -> anyhow::Result<Box<Established>> {
        let _turn = self.turns.acquire().await?;
        let minted = self
            .mint
            .issue(&format!("unit-{number}"), VALIDITY, SystemTime::now())?;
        let identity = self.model.of_fellow(minted.certificate, minted.key)?;
        let source = self.args.from[number % self.args.from.len()];
        let connecting = connect(source, self.args.gateway);
        let stream = tokio::time::timeout(UNIT_LIMIT, connecting).await??;
        let options = TransportOptions::default();
        tune_accepted(&stream, &options)?;
        let request = establish::Request {
            identity: Arc::new(identity),
            peer_name: self.args.name.clone(),
            path: policy::Path {
                link: String::new(),
                source,
                remote: self.args.gateway,
            },
            dial_timeout: UNIT_LIMIT,
            segment: None,
            handshake_timeout: UNIT_LIMIT,
            transport: options,
            window: None,
            session: session_proto::session::Config {
                instance: instance(number),
                software: "a fleet".to_owned(),
                ..session_proto::session::Config::default()
            },
            continues: None,
        };
        Ok(Box::new(establish::initiate_over(request, stream).await?))
    }

    /// What unit `number` has of the fleet's streams, targets and questions.
    fn share(&self, number: usize) -> Share {
        let (streams, units) = (self.args.streams, self.args.sessions);
        let targets = &self.args.targets;
        let first = number % targets.len();
        Share {
            number,
            streams: part(streams, number, units),
            asked: questions(self.args.sample.min(streams), streams, number, units),
            targets: targets
                .iter()
                .cycle()
                .skip(first)
                .take(targets.len())
                .copied()
                .collect(),
        }
    }
}

/// How many of `all` are the `number`th's of `units`: as many for each as can be, and the rest spread evenly.
fn part(all: usize, number: usize, units: usize) -> usize {
    (number + 1) * all / units - number * all / units
}

/// How many of `sample` questions, of which no stream gets two, go to unit `number`, whatever it has of the streams.
fn questions(sample: usize, streams: usize, number: usize, units: usize) -> usize {
    let before = |unit: usize| (unit * streams / units) * sample / streams.max(1);
    before(number + 1) - before(number)
}

/// The units of a fleet differ in when they were started, too.
fn instance(number: usize) -> [u8; 16] {
    let mut instance = [0; 16];
    instance[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    instance
}

/// Connects from `source`; its port is chosen when the target is known, so that there are enough.
async fn connect(source: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = match source {
        IpAddr::V4(_) => TcpSocket::new_v4(),
        IpAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(SocketAddr::new(source, 0))?;
    socket.connect(to).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_and_are_even() {
        for (all, units) in [(100_000, 10_000), (1_000, 10_000), (7, 3), (0, 5)] {
            let parts: Vec<usize> = (0..units).map(|n| part(all, n, units)).collect();
            assert_eq!(parts.iter().sum::<usize>(), all);
            assert!(parts.iter().all(|p| p.abs_diff(all / units) <= 1));
        }
    }

    #[test]
    fn only_who_has_streams_is_asked() {
        for (streams, sample) in [(1_500, 1_000), (100_000, 1_000), (7, 7), (0, 0)] {
            let units = 10_000;
            let asked = |n| questions(sample, streams, n, units);
            assert!((0..units).all(|n| asked(n) <= part(streams, n, units)));
            assert_eq!((0..units).map(asked).sum::<usize>(), sample);
        }
    }

    #[test]
    fn no_unit_has_the_instance_of_one_that_said_nothing() {
        assert_ne!(instance(0), [0; 16]);
        assert_ne!(instance(0), instance(1));
    }
}
