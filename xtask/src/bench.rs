//! `bench`: builds, then runs the binary's own measurement.

use std::path::{Path, PathBuf};

use crate::{build, guard, setup, sh};

/// Arguments of `bench`.
#[derive(clap::Args)]
pub struct BenchArgs {
    /// What is measured.
    #[arg(value_enum)]
    what: What,
    /// Other systems beside the plain proxy; several with commas. Everything that is installed, unless said otherwise.
    #[arg(long)]
    through: Option<String>,
    /// Passes; the median of each figure counts.
    #[arg(long)]
    passes: Option<u16>,
    /// Installs the other systems first: from Debian, and shadowsocks from crates.io.
    #[arg(long)]
    install_peers: bool,
    /// With `guard`: writes what is counted to the repository's figures.
    #[arg(long)]
    update: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// Also as a page for a browser, with plots; not of capture.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Answer yes to every question.
    #[arg(long)]
    yes: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// All but capture and guard: about half an hour.
    All,
    /// One bulk stream, and the processor time that it costs.
    Throughput,
    /// Sixteen bulk streams at once.
    Streams,
    /// 64 bytes and their echo.
    Latency,
    /// 1 KiB and its echo by the second, and connections by the second.
    Requests,
    /// From connect() to the first byte of an answer, at a round-trip time of 40 ms.
    FirstByte,
    /// Wake-ups and processor time of idle agents, and the memory of idle streams.
    Idle,
    /// A log over a link of 10 Mbit/s, packed by each codec, and what does not shrink.
    Compression,
    /// One gateway with 10,000 sessions and 100,000 streams, held for five minutes.
    Scale,
    /// Very many new streams of one session at once.
    Burst,
    /// Cuts of the link under a session with 10,000 captured streams.
    Many,
    /// One stream beside 1,000 whose readers are stuck.
    Stuck,
    /// What capture costs: the latency of a connect, and the time of each eBPF program.
    Capture,
    /// Instructions of the core's own work, next to the figures in the repository: fails where one has risen.
    Guard,
}

impl What {
    /// The words of the binary's own measurement.
    const fn words(self) -> &'static [&'static str] {
        match self {
            Self::All => &["perf", "--measure", "all"],
            Self::Throughput => &["perf", "--measure", "throughput"],
            Self::Streams => &["perf", "--measure", "throughput,streams"],
            Self::Latency => &["perf", "--measure", "latency"],
            Self::Requests => &["perf", "--measure", "requests"],
            Self::FirstByte => &["perf", "--measure", "first-byte"],
            Self::Idle => &["perf", "--measure", "idle"],
            Self::Compression => &["perf", "--measure", "compression"],
            Self::Scale => &["perf", "--measure", "scale"],
            Self::Burst => &["perf", "--measure", "burst"],
            Self::Many => &["perf", "--measure", "many"],
            Self::Stuck => &["perf", "--measure", "stuck"],
            Self::Capture => &["capture"],
            Self::Guard => &[],
        }
    }
}

/// Sets up, builds, measures.
pub fn run(root: &Path, args: &BenchArgs) -> anyhow::Result<()> {
    setup::run(args.yes)?;
    if args.what == What::Guard {
        return guard::run(root, args.update, args.json).map(drop);
    }
    if args.install_peers {
        setup::peers(args.yes)?;
    }
    let binary = build::run(root)?;
    let binary = binary.display().to_string();
    let mut command = if sh::is_root() {
        sh::command(root, &binary, &[])
    } else {
        sh::command(root, "sudo", &[&binary])
    };
    command.arg("bench").args(args.what.words());
    if let Some(through) = args.through.as_ref().filter(|_| args.what != What::Capture) {
        command.args(["--through", through]);
    }
    if let Some(html) = args.html.as_ref().filter(|_| args.what != What::Capture) {
        // The measurement runs in the repository.
        command.arg("--html").arg(std::path::absolute(html)?);
    }
    if let Some(passes) = args.passes {
        command.args(["--passes", &passes.to_string()]);
    }
    if args.json {
        command.arg("--json");
    }
    sh::run(&mut command)
}
