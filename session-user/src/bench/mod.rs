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
mod load;
mod measure;
mod output;
mod pattern;
mod peers;
mod perf;
mod ping;
mod programs;
mod progress;
mod proxy;
mod rates;
mod report;
mod rowfile;
mod scenario;
mod scratch;
mod stats;
mod text;
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
    /// Throughput, CPU, latency and connections through Holdfast and through other systems. Needs root.
    Perf(perf::PerfArgs),
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
    /// The application that sends on several connections.
    #[command(hide = true)]
    AppStreams(perf::StreamsArgs),
    /// The application that connects, asks and goes.
    #[command(hide = true)]
    AppConnects(perf::ConnectsArgs),
    /// The application that asks on new connections.
    #[command(hide = true)]
    AppFirstByte(perf::FirstByteArgs),
    /// The application that holds idle connections.
    #[command(hide = true)]
    AppHold(perf::HoldArgs),
    /// The application that moves text or noise.
    #[command(hide = true)]
    AppLoad(perf::LoadArgs),
    /// A fleet of units with sessions of their own.
    #[command(hide = true)]
    AppSessions(load::FleetArgs),
    /// Servers for very many connections.
    #[command(hide = true)]
    AppEcho(load::EchoArgs),
    /// The application that has very many connections.
    #[command(hide = true)]
    AppMany(load::ManyArgs),
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
        Bench::AppStreams(args) => perf::app_streams(args),
        Bench::AppConnects(args) => perf::app_connects(args),
        Bench::AppFirstByte(args) => perf::app_first_byte(args),
        Bench::AppHold(args) => perf::app_hold(args),
        Bench::AppLoad(args) => perf::app_load(args),
        Bench::AppSessions(args) => load::app_sessions(args),
        Bench::AppEcho(args) => load::app_echo(args),
        Bench::AppMany(args) => load::app_many(args),
        Bench::Perf(args) => perf::run(args),
        Bench::AppProxy(args) => proxy::run(args),
        Bench::Peer(program) => peers::run_program(program),
        Bench::Window(args) => window::run(args),
    }
}
