//! A link without a standby is dialled when it is needed, and what is to be said goes in the SYN.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use session_lab::{LinkName, Netns, Shape};
use session_tests::{TestBed, begun, endless, program, reader};

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// What the handover says then.
const IN_SYN: &str = "RESUME went in the SYN";

/// A bed whose second link is dialled only when the first is lost, with an application that reads.
struct Cold {
    bed: TestBed,
    reader: std::process::Child,
}

impl Cold {
    fn new(more: &str) -> anyhow::Result<Self> {
        let mut bed = TestBed::with(|c| {
            c.client_extra = format!("cold = [\"lte0\"]\n{more}");
            let shape = Shape {
                delay: Duration::from_millis(20),
                ..Shape::default()
            };
            c.shapes = [shape; 2];
        })?;
        bed.bed.await_link(LinkName::Wifi, LIMIT)?;
        // On a busy machine the other link may have been first, and eases out still.
        bed.bed.wait(LIMIT, |s| s.transports.len() == 1)?;
        let mut reader = reader(&bed, endless(&bed.bed.lab)?)?;
        begun(&mut reader)?;
        Ok(Self { bed, reader })
    }

    /// The first link is lost; returns the handover that follows. Then all is as it was.
    fn cut(&mut self) -> anyhow::Result<Value> {
        let bed = &mut self.bed.bed;
        bed.lab.cut(LinkName::Wifi)?;
        bed.await_link(LinkName::Lte, LIMIT)?;
        bed.lab.restore(LinkName::Wifi)?;
        bed.await_link(LinkName::Wifi, LIMIT)?;
        bed.wait(LIMIT, |s| s.transports.len() == 1)?;
        let mut command = Command::new(program());
        command.arg("--control").arg(bed.client_control());
        command.args(["handovers", "--json"]).stdin(Stdio::null());
        let all: Vec<Value> = serde_json::from_slice(&command.output()?.stdout)?;
        let last = all
            .into_iter()
            .rfind(|h| h["soft"] == false)
            .context("no handover")?;
        ensure!(
            last["to"]["link"] == "lte0" && last["warm"] == false,
            "{last:#}"
        );
        ensure!(self.reader.try_wait()?.is_none(), "the reader has ended");
        println!(
            "resumed after {} ms: {}",
            last["resumed_ms"], last["decision"]
        );
        Ok(last)
    }

    /// Connections whose SYN brought data that was taken, as the client and as the server count them.
    fn fast_opens(&self) -> anyhow::Result<(u64, u64)> {
        let lab = &self.bed.bed.lab;
        Ok((
            counter(lab.client(), "TCPFastOpenActive")?,
            counter(lab.server(), "TCPFastOpenPassive")?,
        ))
    }

    fn server(&self) -> &Netns {
        self.bed.bed.lab.server()
    }
}

impl Drop for Cold {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.reader.kill();
        let _ = self.reader.wait();
    }
}

fn in_syn(handover: &Value) -> bool {
    let decision = handover["decision"].as_str();
    decision.is_some_and(|words| words.contains(IN_SYN))
}

/// One of the kernel's counters of `TcpExt` in a namespace.
fn counter(netns: &Netns, name: &str) -> anyhow::Result<u64> {
    let text = netns.exec("cat", &["/proc/thread-self/net/netstat"])?;
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = lines.next().zip(lines.next()).context("no TcpExt")?;
    let mut pairs = names.split_whitespace().zip(values.split_whitespace());
    let found = pairs.find(|(n, _)| *n == name).context("no such counter")?;
    Ok(found.1.parse()?)
}

#[test]
fn what_is_to_be_said_goes_in_the_syn() -> anyhow::Result<()> {
    let mut cold = Cold::new("")?;
    // The first transport brings the cookie.
    let first = cold.cut()?;
    ensure!(!in_syn(&first), "{first:#}");
    let before = cold.fast_opens()?;
    let second = cold.cut()?;
    ensure!(
        in_syn(&second),
        "{second:#}\n{}",
        cold.bed.bed.log("client")
    );
    let after = cold.fast_opens()?;
    ensure!(
        after.0 > before.0 && after.1 > before.1,
        "{before:?} {after:?}"
    );
    let ms = |h: &Value| h["resumed_ms"].as_f64().context("it did not resume");
    let (first, second) = (ms(&first)?, ms(&second)?);
    // One round trip of 40 ms instead of two.
    ensure!(
        second < first * 0.8,
        "with data in the SYN {second} ms, without {first} ms"
    );
    Ok(())
}

#[test]
fn it_can_be_turned_off() -> anyhow::Result<()> {
    let mut cold = Cold::new("[transport]\nfast_open = false\n")?;
    for _ in 0..2 {
        let handover = cold.cut()?;
        ensure!(!in_syn(&handover), "{handover:#}");
    }
    let attempts = counter(cold.bed.bed.lab.client(), "TCPFastOpenActive")?;
    ensure!(attempts == 0, "{attempts} were made all the same");
    Ok(())
}

#[test]
fn a_peer_whose_host_does_not_allow_it_is_dialled_as_ever() -> anyhow::Result<()> {
    let mut cold = Cold::new("")?;
    cold.server().sysctl("net/ipv4/tcp_fastopen", "1")?;
    for _ in 0..2 {
        let handover = cold.cut()?;
        ensure!(!in_syn(&handover), "{handover:#}");
    }
    // A cookie that is not honoured any more does no harm.
    cold.server().sysctl("net/ipv4/tcp_fastopen", "3")?;
    cold.cut()?;
    let handover = cold.cut()?;
    ensure!(in_syn(&handover), "{handover:#}");
    cold.server().sysctl("net/ipv4/tcp_fastopen", "1")?;
    let handover = cold.cut()?;
    ensure!(!in_syn(&handover), "{handover:#}");
    Ok(())
}

/// A box on the path drops SYNs with data, as some do.
#[test]
fn a_path_that_drops_syns_with_data_is_dialled_without() -> anyhow::Result<()> {
    let mut cold = Cold::new("")?;
    cold.cut()?;
    // The largest SYN without data has 80 bytes.
    let rules = "table inet box { counter dropped {}\n\
                 chain up { type filter hook forward priority -200;\n\
                 iifname \"r-lte\" tcp flags & (syn | ack) == syn meta length > 100 \
                 counter name dropped drop\n}\n}\n";
    cold.bed.bed.lab.router().exec("nft", &[rules])?;
    let dropped = |cold: &Cold| -> anyhow::Result<String> {
        let words = ["list", "counter", "inet", "box", "dropped"];
        cold.bed.bed.lab.router().exec("nft", &words)
    };
    let none = dropped(&cold)?;
    let handover = cold.cut()?;
    let some = dropped(&cold)?;
    ensure!(
        !in_syn(&handover) && some != none,
        "{handover:#}\n{some}\n{}",
        cold.bed.bed.log("client")
    );
    // It is remembered: the next ones have nothing to wait for.
    let again = cold.cut()?;
    ensure!(dropped(&cold)? == some, "it was tried again: {again:#}");
    let ms = |h: &Value| h["resumed_ms"].as_f64().context("it did not resume");
    let (first, second) = (ms(&handover)?, ms(&again)?);
    ensure!(
        second < first / 2.0,
        "{second} ms again, {first} ms at first"
    );
    Ok(())
}
