//! How much more text a narrow link carries when it is packed, and what packing costs where it is of no use.
//!
//! The goal is a part of what the codec by itself makes of the same text, times what the link carries of a plain TCP
//! connection's bytes: headers, records and their tags, the queue, and every flush are in what is missing.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::{Lab, Shape};
use session_proto::wire::Codec;

use super::super::bed::{Bed, BedConfig, own_program};
use super::super::progress::bar;
use super::super::scratch::Scratch;
use super::corpus::Log;
use super::cpu::tree_seconds;
use super::load::{Content, LoadServer, Loaded, Way};
use super::names::{
    AUTO, DIRECT, LOG_DOWN, LOG_UNLIMITED, LOG_UNLIMITED_CPU, LOG_UP, LZ4, NOISE_DOWN,
    NOISE_UNLIMITED, NOISE_UNLIMITED_CPU, NOISE_UP, Name, OFF, OWN_DIRECT, OWN_OFF, OWN_RATIO,
    ZSTD,
};
use super::rows::{Figures, Row};

/// What both narrow links carry, with everything that is in a packet from the IP header on.
const RATE_MBIT: f64 = 10.0;
/// Round-trip time of the narrow links.
const RTT: Duration = Duration::from_millis(20);
/// Transfers over the narrow link take so long at least: they begin plain, and while the rate is not known yet.
const NARROW_MILLIS_MIN: u64 = 10_000;
/// Where nothing is limited, what is compared follows each other so fast, and so often in a pass.
const WIDE_MILLIS: u64 = 1_000;
const WIDE_ROUNDS: usize = 4;
/// Values of `[transport] compression`, and the codec that is to be found there.
const PACKED: [(&str, Codec); 3] = [
    (LZ4, Codec::Lz4),
    (ZSTD, Codec::Zstd),
    // What is best on such a link.
    (AUTO, Codec::Zstd),
];

/// Agents with one value of `compression`, and the application's server.
struct Place {
    bed: Bed,
    server: LoadServer,
    _dir: Scratch,
}

impl Place {
    fn new(compression: &str, shape: Shape) -> anyhow::Result<Self> {
        let dir = Scratch::new()?;
        let mut config = BedConfig::new(own_program()?);
        let said = format!("[transport]\ncompression = \"{compression}\"\n");
        config.client_extra.clone_from(&said);
        config.gateway_extra = said;
        config.shapes = [shape; 2];
        let bed = Bed::new(dir.path(), config)?;
        let bind = || TcpListener::bind((Lab::target(false), 0));
        let server = LoadServer::start(bed.lab.server().run(bind)?)?;
        Ok(Self {
            bed,
            server,
            _dir: dir,
        })
    }

    /// Moves `content` for so long; through the agents if it is `captured`.
    fn load(
        &self,
        captured: bool,
        way: Way,
        content: Content,
        millis: u64,
    ) -> anyhow::Result<Loaded> {
        let mut command = Command::new(own_program()?);
        command.args(["bench", "app-load", "--way", way.name()]);
        command.args(["--server", &self.server.addr()?.to_string()]);
        command.args(["--content", content.name(), "--millis", &millis.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(Stdio::piped());
        let child = if captured {
            self.bed.spawn_captured(command)?
        } else {
            self.bed.lab.client().spawn(command)?
        };
        let output = child.wait_with_output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{} {}: {}",
            content.name(),
            way.name(),
            error.trim()
        );
        serde_json::from_slice(&output.stdout).context("the application printed nothing of use")
    }

    /// Processor time of both agents so far, in seconds.
    fn cpu(&self) -> anyhow::Result<f64> {
        let agents = [&self.bed.client_agent, &self.bed.gateway_agent];
        let of = agents.into_iter().flatten();
        of.map(|agent| tree_seconds(agent.pid())).sum()
    }
}

/// Figures by measure and system.
#[derive(Default)]
struct Table(BTreeMap<(Name, &'static str), Figures>);

impl Table {
    fn note(&mut self, name: Name, system: &'static str, value: f64) {
        let entry = self.0.entry((name, system));
        let figures = entry.or_insert_with(|| Figures::new(name, system));
        figures.values.push(value);
    }

    fn get(&self, name: Name, system: &'static str) -> Option<&Figures> {
        self.0.get(&(name, system))
    }
}

/// Measures the narrow link, and then where the processor is the limit.
pub fn rows(passes: u16, millis: u64) -> anyhow::Result<Vec<Row>> {
    let mut rows = narrow(passes, millis.max(NARROW_MILLIS_MIN))?;
    rows.extend(wide(passes)?);
    Ok(rows)
}

const fn names(way: Way) -> [Name; 2] {
    match way {
        Way::Up => [NOISE_UP, LOG_UP],
        Way::Down => [NOISE_DOWN, LOG_DOWN],
    }
}

fn mb_per_s(loaded: Loaded) -> f64 {
    loaded.bytes as f64 / 1e6 / loaded.seconds
}

fn narrow(passes: u16, millis: u64) -> anyhow::Result<Vec<Row>> {
    let shape = Shape {
        delay: RTT / 2,
        rate_mbit: Some(RATE_MBIT),
        ..Shape::default()
    };
    let off = Place::new(OFF, shape)?;
    let mut packed = Vec::new();
    for (compression, codec) in PACKED {
        packed.push((compression, codec, Place::new(compression, shape)?));
    }
    let rounds = u64::from(passes) * 2 * (packed.len() as u64 + 3);
    let bar = bar("compression", rounds, "transfers");
    let mut table = Table::default();
    let mut run = |place: &Place, way, content, system: &'static str| {
        let loaded = place.load(system != DIRECT, way, content, millis)?;
        let [noise, log] = names(way);
        let measure = if content == Content::Text { log } else { noise };
        table.note(measure, system, mb_per_s(loaded));
        bar.inc(1);
        anyhow::Ok(())
    };
    for _ in 0..passes {
        for way in [Way::Up, Way::Down] {
            run(&off, way, Content::Noise, DIRECT)?;
            run(&off, way, Content::Noise, OFF)?;
            for (compression, _, place) in &packed {
                run(place, way, Content::Text, compression)?;
                if *compression == AUTO {
                    run(place, way, Content::Noise, compression)?;
                }
            }
        }
    }
    bar.finish_and_clear();
    let own = own_rows()?;
    let of = |way| narrow_rows(&table, way, &own);
    let (up, down) = (of(Way::Up), of(Way::Down));
    let rows = own.into_iter().chain(up).chain(down).collect();
    Ok(rows)
}

/// What the codecs by themselves make of the log.
fn own_rows() -> anyhow::Result<Vec<Row>> {
    let log = Log::new();
    let mut rows = Vec::new();
    for codec in Codec::ALL {
        let own = vec![log.own_ratio(codec)?];
        rows.push(Figures::of(OWN_RATIO, codec.name(), own).row(None));
    }
    Ok(rows)
}

fn narrow_rows(table: &Table, way: Way, own: &[Row]) -> Vec<Row> {
    let [noise, log] = names(way);
    let direct = table.get(noise, DIRECT);
    let off = table.get(noise, OFF);
    let mut rows = Vec::new();
    rows.extend(direct.map(|figures| figures.row(None)));
    rows.extend(off.map(|figures| figures.row(direct.map(|d| (DIRECT, d)))));
    let auto = table.get(noise, AUTO);
    rows.extend(auto.map(|figures| figures.row(off.map(|o| (OFF, o)))));
    for (compression, codec) in PACKED {
        let ratio = own.iter().find(|row| row.system == codec.name());
        let (Some(figures), Some(ratio)) = (table.get(log, compression), ratio) else {
            continue;
        };
        for (base, to) in [(direct, OWN_DIRECT), (off, OWN_OFF)] {
            let Some(mut best) = base.cloned() else {
                continue;
            };
            best.values.iter_mut().for_each(|v| *v *= ratio.value);
            rows.push(figures.row(Some((to, &best))));
        }
    }
    rows
}

/// Nothing but the processors limits: noise, which packing cannot help, and text, which it may.
fn wide(passes: u16) -> anyhow::Result<Vec<Row>> {
    const SYSTEMS: [&str; 2] = [OFF, AUTO];
    let places = [
        Place::new(OFF, Shape::default())?,
        Place::new(AUTO, Shape::default())?,
    ];
    let rounds = usize::from(passes) * WIDE_ROUNDS;
    let bar = bar("where nothing is limited", rounds as u64, "rounds");
    let mut table = Table::default();
    for round in 0..rounds {
        for (content, goodput, cost) in [
            (Content::Noise, NOISE_UNLIMITED, NOISE_UNLIMITED_CPU),
            (Content::Text, LOG_UNLIMITED, LOG_UNLIMITED_CPU),
        ] {
            // In turns the other way round: whoever is first may have it better.
            for turn in 0..2 {
                let which = (round + turn) % 2;
                let (place, system) = (&places[which], SYSTEMS[which]);
                let before = place.cpu()?;
                let loaded = place.load(true, Way::Up, content, WIDE_MILLIS)?;
                let used = place.cpu()? - before;
                table.note(goodput, system, mb_per_s(loaded));
                table.note(cost, system, used / (loaded.bytes as f64 / 1e9));
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let rows = table.0.iter().map(|((name, system), figures)| {
        let off = table.get(*name, OFF).filter(|_| *system == AUTO);
        figures.row(off.map(|o| (OFF, o)))
    });
    Ok(rows.collect())
}
