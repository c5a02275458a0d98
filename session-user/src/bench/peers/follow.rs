//! Programs that act on the kernel's news of a link, for peers that do not do so themselves: one
//! keeps a route on the best link, one keeps MPTCP's endpoints those of the links that work.
//!
//! They watch as Holdfast itself does, so that every system has the same news at the same time, and
//! they speak to an `ip` that runs already: a fork would cost milliseconds.

use std::io::Write;
use std::net::IpAddr;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::Context;

use crate::link::{Link, LinkMonitor, LinkSnapshot, MonitorConfig};
use crate::stdio::print_line;

/// Arguments of both.
#[derive(Debug, clap::Args)]
pub struct FollowArgs {
    /// The links, best first.
    #[arg(long, value_delimiter = ',')]
    links: Vec<String>,
    /// The address to reach over them.
    #[arg(long)]
    to: IpAddr,
}

/// An `ip` that takes commands.
struct Ip {
    process: Child,
    commands: ChildStdin,
}

impl Ip {
    fn start() -> anyhow::Result<Self> {
        // An entry that the kernel has removed by itself is no reason to end.
        let mut process = Command::new("ip")
            .args(["-force", "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("`ip` cannot be started")?;
        let commands = process.stdin.take().context("`ip` takes no commands")?;
        Ok(Self { process, commands })
    }

    fn tell(&mut self, lines: &[String]) -> anyhow::Result<()> {
        let mut text = lines.join("\n");
        text.push('\n');
        self.commands
            .write_all(text.as_bytes())
            .context("`ip` has ended")
    }
}

impl Drop for Ip {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The best of the wanted links that reaches `to`.
pub fn best<'a>(
    snapshot: &'a LinkSnapshot,
    wanted: &[String],
    to: IpAddr,
) -> Option<(&'a Link, IpAddr)> {
    wanted.iter().find_map(|name| {
        let link = snapshot.link(name)?;
        Some((link, link.usable_for(to).ok()?))
    })
}

/// Keeps the route to `to` on the best link. The first line says that it does.
pub fn route(args: &FollowArgs) -> anyhow::Result<()> {
    let family = if args.to.is_ipv6() { "-6 " } else { "" };
    let mut now = String::new();
    follow(args, |snapshot| {
        let next = best(snapshot, &args.links, args.to)
            .and_then(|(link, _)| {
                let gateway = link.route_to(args.to)?.gateway?;
                let name = &link.name;
                Some(format!(
                    "{family}route replace {} via {gateway} dev {name}",
                    args.to
                ))
            })
            // Without a link there is nothing to do: the kernel has removed the route.
            .unwrap_or_default();
        if next == now {
            return Vec::new();
        }
        now.clone_from(&next);
        if next.is_empty() {
            Vec::new()
        } else {
            vec![next]
        }
    })
}

/// Keeps an MPTCP endpoint for each link that works. The first line says that it does.
pub fn endpoints(args: &FollowArgs) -> anyhow::Result<()> {
    let mut known: Vec<Option<IpAddr>> = vec![None; args.links.len()];
    follow(args, |snapshot| {
        let mut lines = Vec::new();
        for (number, (name, known)) in args.links.iter().zip(&mut known).enumerate() {
            let id = number + 1;
            let link = snapshot.link(name);
            let address = link.and_then(|link| link.usable_for(args.to).ok());
            if let Some(old) = known.take_if(|old| Some(*old) != address) {
                // A connection's first subflow always has number 0.
                lines.push(format!("mptcp endpoint delete id 0 {old}"));
                lines.push(format!("mptcp endpoint delete id {id}"));
            }
            if let (None, Some(new)) = (*known, address) {
                lines.push(format!(
                    "mptcp endpoint add {new} id {id} dev {name} subflow"
                ));
                *known = Some(new);
            }
        }
        lines
    })
}

/// Tells `ip` what `lines` says of every snapshot, until the links can no longer be watched.
fn follow(
    args: &FollowArgs,
    mut lines: impl FnMut(&LinkSnapshot) -> Vec<String>,
) -> anyhow::Result<()> {
    anyhow::ensure!(!args.links.is_empty(), "no link is given");
    let mut monitor = LinkMonitor::start(&MonitorConfig::default())?;
    let mut ip = Ip::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let mut snapshot = monitor.snapshot();
    let mut ready = false;
    loop {
        let orders = lines(&snapshot);
        if !orders.is_empty() {
            ip.tell(&orders)?;
        }
        if !ready && best(&snapshot, &args.links, args.to).is_some() {
            print_line("ready");
            ready = true;
        }
        snapshot = runtime.block_on(monitor.changed())?;
    }
}
