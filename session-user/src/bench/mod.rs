//! `holdfast bench`: measures handovers, in a lab of its own or against the running agent.

pub mod app;
mod arrivals;
pub mod bed;
mod capture;
mod cuts;
mod datagrams;
mod disturbance;
mod goals;
mod handover;
mod host;
mod html;
mod keeper;
mod live;
mod measure;
mod output;
mod pattern;
mod peers;
mod ping;
mod programs;
mod progress;
mod proxy;
mod rates;
mod report;
mod rowfile;
mod scenario;
mod stats;
mod text;
mod throughput;
mod window;

use std::path::Path;
use std::process::ExitCode;

/// What can be measured.
#[derive(Debug, clap::Subcommand)]
pub enum Bench {
    /// Cut the link under a running application, again and again, and measure its stalls.
    Handover(handover::HandoverArgs),
    /// Show what `handover --out` has written, without measuring.
    Report(output::ReportArgs),
    /// Bulk throughput, CPU and latency, next to a direct connection and a plain proxy. Needs root.
    Throughput(throughput::ThroughputArgs),
    /// What capture costs: the latency of a connect, and the time of each eBPF program. Needs root.
    Capture(capture::CaptureArgs),
    /// The congestion window of a standby that has idled, by congestion control. Needs root.
    Window(window::WindowArgs),
    /// The server that `handover --target` talks to. Runs until it is ended.
    AppServer(programs::ServerArgs),
    /// The application's client.
    #[command(hide = true)]
    AppClient(programs::ClientArgs),
    /// The application's ping-pong.
    #[command(hide = true)]
    AppPing(ping::PingArgs),
    /// The application that connects again and again.
    #[command(hide = true)]
    AppConnect(capture::ConnectArgs),
    /// The plain proxy.
    #[command(hide = true)]
    AppProxy(proxy::ProxyArgs),
    /// Programs of the systems that `handover --against` measures.
    #[command(subcommand, hide = true)]
    Peer(peers::PeerProgram),
}

/// Measures.
pub fn run(bench: &Bench, control: &Path) -> anyhow::Result<ExitCode> {
    match bench {
        Bench::Handover(args) => handover::run(args, control),
        Bench::Report(args) => output::run(args),
        Bench::AppServer(args) => programs::server(args),
        Bench::AppClient(args) => programs::client(args),
        Bench::AppPing(args) => ping::run(args),
        Bench::AppConnect(args) => capture::app(args),
        Bench::Capture(args) => capture::run(args),
        Bench::AppProxy(args) => proxy::run(args),
        Bench::Peer(program) => peers::run_program(program),
        Bench::Throughput(args) => throughput::run(args),
        Bench::Window(args) => window::run(args),
    }
}

/// A folder for this measurement, removed with it. HOLDFAST_BENCH_KEEP keeps it, to look at the
/// agents' logs.
fn scratch() -> anyhow::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("holdfast-bench-");
    builder.disable_cleanup(std::env::var_os("HOLDFAST_BENCH_KEEP").is_some());
    Ok(builder.tempdir()?)
}
