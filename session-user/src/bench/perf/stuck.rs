//! What very many streams whose readers are stuck cost another stream of the same session. They send to a server that
//! never reads, so that the gateway holds what its kernel does not take.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use session_lab::Lab;

use super::super::bed::own_program;
use super::asked::Asked;
use super::crowd::start_echo;
use super::measures::{Group, measure};
use super::names::{ALONE, BESIDE_STUCK, CLIENT, GATEWAY, GOODPUT, HELD_OF_STUCK, WITH_STUCK};
use super::rows::{Figures, Row};
use super::stand::Stand;
use super::systems::System;

/// Streams that nobody reads.
const STUCK: usize = 1_000;
/// The port of the server that never reads.
const MUTE_PORT: u16 = 7100;

/// Measures one stream's goodput alone, and beside the stuck ones; and what each agent
/// holds of these then, of the memory that its session may have.
pub fn rows(passes: u16, millis: u64) -> anyhow::Result<Vec<Row>> {
    let mut alone = Figures::new(BESIDE_STUCK, ALONE);
    let mut beside = Figures::new(BESIDE_STUCK, WITH_STUCK);
    let mut memory = [CLIENT, GATEWAY].map(|agent| Figures::new(HELD_OF_STUCK, agent));
    for _ in 0..passes {
        let mut stand = Stand::new(System::Holdfast)?;
        let mute = SocketAddr::new(Lab::target(false), MUTE_PORT);
        let _mute = start_echo(stand.server_netns(), &[], &[mute])?;
        // The first transfer finds out what the transport carries, and has the agents take what memory that needs.
        let _ = goodput(&mut stand, millis)?;
        alone.values.push(goodput(&mut stand, millis)?);
        let _stuck = stick(&stand, mute)?;
        for (figures, bytes) in memory.iter_mut().zip(stand.held_bytes()?) {
            figures.values.push(bytes as f64 / f64::from(1 << 20));
        }
        beside.values.push(goodput(&mut stand, millis)?);
    }
    let mut rows = vec![beside.row(Some((ALONE, &alone))), alone.row(None)];
    rows.extend(memory.iter().map(|figures| figures.row(None)));
    Ok(rows)
}

fn goodput(stand: &mut Stand, millis: u64) -> anyhow::Result<f64> {
    let seen = measure(stand, Group::Throughput, millis)?;
    Ok(seen.get(&GOODPUT).copied().unwrap_or_default())
}

/// Sends on [`STUCK`] streams until nothing more is taken.
fn stick(stand: &Stand, mute: SocketAddr) -> anyhow::Result<Asked> {
    let mut command = Command::new(own_program()?);
    command.args(["bench", "app-many", "--silent"]);
    command.args(["--server", &mute.to_string()]);
    command.args(["--streams", &STUCK.to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let (mut app, _) = Asked::open(stand.spawn_captured(command)?, STUCK)?;
    app.flood()?;
    Ok(app)
}
