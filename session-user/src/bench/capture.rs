//! `holdfast bench capture`: what capture costs: the latency of a connect and of a datagram, and the time that each eBPF
//! program takes.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use serde::{Serialize, de::DeserializeOwned};
use session_lab::Lab;

use super::bed::{Bed, BedConfig, own_program};
use super::progress::progress;
use super::scratch::Scratch;
use super::stats::Summary;
use crate::capture::program_names;
use crate::stdio::print_line;

/// Connects before the first that counts.
const WARM_UP: usize = 100;
/// How long an answer to a datagram is waited for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Arguments of `bench capture`.
#[derive(Debug, clap::Args)]
pub struct CaptureArgs {
    /// Passes over all ways to connect; the median of each figure counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    passes: u16,
    /// Connects in each pass.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    connects: u32,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of the hidden `bench app-connect`.
#[derive(Debug, clap::Args)]
pub struct ConnectArgs {
    /// Where to.
    #[arg(long)]
    server: SocketAddr,
    /// How often.
    #[arg(long)]
    connects: usize,
    /// Datagrams instead: connects of UDP sockets, and questions to an echo.
    #[arg(long)]
    udp: bool,
}

/// One figure.
#[derive(Debug, Serialize)]
#[serde(tag = "measure", rename_all = "snake_case")]
enum Row {
    /// From connect() to its return; medians over the passes, in microseconds.
    Connect {
        system: &'static str,
        passes: usize,
        connects: u32,
        p50_us: f64,
        p95_us: f64,
        max_us: f64,
        /// Of the median, to that of a connection which is not captured.
        ratio_to_native: f64,
    },
    /// From sendto() to the echo's answer, in microseconds; only where datagrams are carried.
    Echo {
        system: &'static str,
        datagrams: u32,
        p50_us: f64,
        p95_us: f64,
        max_us: f64,
    },
    /// The kernel's own count (BPF_STATS_RUN_TIME), which includes some 65 ns of counting.
    Program {
        program: String,
        /// What ran meanwhile.
        during: &'static str,
        runs: u64,
        ns_per_run: f64,
    },
}

/// How a connection is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum System {
    Native,
    Holdfast,
    Early,
}

const SYSTEMS: [(System, &str); 3] = [
    (System::Native, "native"),
    (System::Holdfast, "holdfast"),
    (System::Early, "holdfast, connect = \"early\""),
];

/// Measures and prints.
pub fn run(args: &CaptureArgs) -> anyhow::Result<ExitCode> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "it makes network namespaces: it needs root"
    );
    let (usual, early) = (Scratch::new()?, Scratch::new()?);
    let bed = Bed::new(usual.path(), BedConfig::new(own_program()?))?;
    let early_bed = Bed::new(
        early.path(),
        BedConfig {
            capture_extra: String::from("connect = \"early\"\n"),
            ..BedConfig::new(own_program()?)
        },
    )?;
    let (server, early_server) = (accepting(&bed)?, accepting(&early_bed)?);
    // The kernel counts for as long as this is held.
    let _counting = enable_stats(Stats::RunTime).context("the kernel counts no run times")?;
    let before = run_times();
    let bar = progress("capture", usize::from(args.passes) * SYSTEMS.len());
    let mut seen: [Vec<Summary>; 3] = Default::default();
    for _ in 0..args.passes {
        for (index, (system, _)) in SYSTEMS.iter().enumerate() {
            seen[index].push(match system {
                System::Native => connects(&bed, server, args.connects, false)?,
                System::Holdfast => connects(&bed, server, args.connects, true)?,
                System::Early => connects(&early_bed, early_server, args.connects, true)?,
            });
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let after = run_times();
    let programs = since(&before, &after, "connects");
    let echoes = echoes(&bed, args.connects)?;
    let datagrams = run_times();
    let datagrams = since(&after, &datagrams, "datagrams").collect::<Vec<_>>();
    let native = median(&seen[0], |s| s.p50);
    let connects = SYSTEMS.iter().zip(&seen).map(|((_, name), passes)| {
        let p50 = median(passes, |s| s.p50);
        Row::Connect {
            system: name,
            passes: passes.len(),
            connects: args.connects,
            p50_us: p50,
            p95_us: median(passes, |s| s.p95),
            max_us: median(passes, |s| s.max),
            ratio_to_native: p50 / native.max(1e-9),
        }
    });
    let rows = connects.chain(programs).chain(echoes).chain(datagrams);
    print(&rows.collect::<Vec<_>>(), args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// A server in the lab that accepts and closes.
fn accepting(bed: &Bed) -> anyhow::Result<SocketAddr> {
    let target = Lab::target(false);
    let listener = bed
        .lab
        .server()
        .run(move || TcpListener::bind((target, 0)))?;
    let addr = listener.local_addr()?;
    // It ends with this process.
    std::thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(drop));
    Ok(addr)
}

/// A server in the lab that sends back what it gets.
fn echoing(bed: &Bed) -> anyhow::Result<SocketAddr> {
    let target = Lab::target(false);
    let socket = bed.lab.server().run(move || UdpSocket::bind((target, 0)))?;
    let addr = socket.local_addr()?;
    // It ends with this process.
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            // A datagram may be lost.
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    Ok(addr)
}

/// Connects of UDP sockets and questions to an echo, native and captured; a row for each that is answered.
fn echoes(bed: &Bed, count: u32) -> anyhow::Result<Vec<Row>> {
    let to = echoing(bed)?;
    let mut rows = Vec::new();
    for (system, captured) in [("native", false), ("holdfast", true)] {
        let seen: Option<Summary> = applied(bed, to, count, captured, &["--udp"])?;
        rows.extend(seen.map(|seen| Row::Echo {
            system,
            datagrams: count,
            p50_us: seen.p50,
            p95_us: seen.p95,
            max_us: seen.max,
        }));
    }
    Ok(rows)
}

fn connects(bed: &Bed, to: SocketAddr, count: u32, captured: bool) -> anyhow::Result<Summary> {
    applied(bed, to, count, captured, &[])
}

/// Runs the measured application, and returns what it prints.
fn applied<T: DeserializeOwned>(
    bed: &Bed,
    to: SocketAddr,
    count: u32,
    captured: bool,
    how: &[&str],
) -> anyhow::Result<T> {
    let mut command = Command::new(own_program()?);
    command
        .args(["bench", "app-connect"])
        .args(["--server", &to.to_string()])
        .args(["--connects", &count.to_string()])
        .args(how)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let child = if captured {
        bed.spawn_captured(command)
    } else {
        bed.lab.client().spawn(command)
    };
    let output = child?.wait_with_output()?;
    ensure!(output.status.success(), "the connects failed");
    serde_json::from_slice(&output.stdout).context("the connects printed nothing of use")
}

/// Connects again and again, and prints how long it took.
pub fn app(args: &ConnectArgs) -> anyhow::Result<ExitCode> {
    if args.udp {
        print_line(serde_json::to_string(&app_udp(args)?)?);
        return Ok(ExitCode::SUCCESS);
    }
    let mut times = Vec::with_capacity(args.connects);
    for _ in 0..args.connects + WARM_UP {
        let began = Instant::now();
        let socket = TcpStream::connect(args.server)?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
        drop(socket);
    }
    print_line(serde_json::to_string(&Summary::of(&times[WARM_UP..]))?);
    Ok(ExitCode::SUCCESS)
}

/// Connects UDP sockets, then asks an echo; how long it took to answer, if it does.
fn app_udp(args: &ConnectArgs) -> anyhow::Result<Option<Summary>> {
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    for _ in 0..args.connects {
        UdpSocket::bind(any)?.connect(args.server)?;
    }
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    let mut buffer = [0; 64];
    let mut times = Vec::with_capacity(args.connects);
    let mut answered = true;
    for number in 0..args.connects + WARM_UP {
        let began = Instant::now();
        socket.send_to(&number.to_be_bytes(), args.server)?;
        // Without an answer to the first ones there is nobody who carries datagrams; what sending costs is seen all the
        // same.
        if answered {
            answered = socket.recv_from(&mut buffer).is_ok() || number > WARM_UP;
            times.push(began.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(answered.then(|| Summary::of(&times[WARM_UP.min(times.len())..])))
}

/// Runs and nanoseconds of each of our programs, over all agents of this host.
fn run_times() -> BTreeMap<String, (u64, u64)> {
    let names: Vec<&str> = program_names().collect();
    let mut out: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for program in loaded_programs() {
        // One that is unloaded meanwhile is none of those measured.
        let Ok(program) = program else { continue };
        let name = program.name_as_str().unwrap_or_default().to_owned();
        if names.contains(&name.as_str()) {
            let (runs, ns) = out.entry(name).or_default();
            *runs += program.run_count();
            *ns += program.run_time().as_nanos() as u64;
        }
    }
    out
}

fn since<'a>(
    before: &'a BTreeMap<String, (u64, u64)>,
    after: &'a BTreeMap<String, (u64, u64)>,
    during: &'static str,
) -> impl Iterator<Item = Row> + use<'a> {
    after.iter().filter_map(move |(name, (runs, ns))| {
        let (runs_then, ns_then) = before.get(name).copied().unwrap_or_default();
        let runs = runs.saturating_sub(runs_then);
        (runs > 0).then(|| Row::Program {
            program: name.clone(),
            during,
            runs,
            ns_per_run: ns.saturating_sub(ns_then) as f64 / runs as f64,
        })
    })
}

fn median(passes: &[Summary], get: fn(&Summary) -> f64) -> f64 {
    let values: Vec<f64> = passes.iter().map(get).collect();
    Summary::of(&values).p50
}

fn print(rows: &[Row], json: bool) -> anyhow::Result<()> {
    if json {
        print_line(serde_json::to_string_pretty(rows)?);
        return Ok(());
    }
    for row in rows {
        match row {
            Row::Connect {
                system,
                p50_us,
                p95_us,
                ratio_to_native,
                ..
            } => print_line(format_args!(
                "connect  {system:<28} p50 {p50_us:>7.0} us  p95 {p95_us:>7.0} us  {ratio_to_native:>5.2} of native"
            )),
            Row::Echo {
                system,
                p50_us,
                p95_us,
                ..
            } => print_line(format_args!(
                "echo     {system:<28} p50 {p50_us:>7.0} us  p95 {p95_us:>7.0} us"
            )),
            Row::Program {
                program,
                during,
                runs,
                ns_per_run,
            } => print_line(format_args!(
                "program  {program:<13} {during:<14} {ns_per_run:>7.0} ns a run, {runs} runs"
            )),
        }
    }
    Ok(())
}
