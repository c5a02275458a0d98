//! What can be done to packets that travel over the lab's links.

use std::time::Duration;

use anyhow::Context;

use crate::emulator::{Emulator, Hole, Shape};
use crate::nfqueue::forget_connections;
use crate::topology::{Direction, Lab, LinkName};

/// The queue of one direction of a link.
const fn queue(link: LinkName, up: bool) -> u16 {
    (link as u16) * 2 + if up { 0 } else { 1 }
}

impl Lab {
    /// Gives one or both directions of a link a shape. Packets that are under way keep theirs.
    pub fn shape(&self, link: LinkName, direction: Direction, shape: Shape) -> anyhow::Result<()> {
        let emulator = self.emulator()?;
        if direction != Direction::Down {
            emulator.shape(queue(link, true), shape);
        }
        if direction != Direction::Up {
            emulator.shape(queue(link, false), shape);
        }
        Ok(())
    }

    /// Gives every link a round-trip time, half of it each way.
    pub fn round_trip(&self, rtt: Duration) -> anyhow::Result<()> {
        let shape = Shape {
            delay: rtt / 2,
            ..Shape::default()
        };
        LinkName::ALL
            .iter()
            .try_for_each(|&link| self.shape(link, Direction::Both, shape))
    }

    /// Limits a link to `mbit` Mbit/s each way, with nothing else done to its packets; `None` takes
    /// the limit away.
    pub fn rate(&self, link: LinkName, mbit: Option<u32>) -> anyhow::Result<()> {
        let shape = Shape {
            rate_mbit: mbit.map(f64::from),
            ..Shape::default()
        };
        self.shape(link, Direction::Both, shape)
    }

    /// How late packets were let go since the last call (99th percentile; 10 ms: or more). Zero
    /// where no link has a shape.
    pub fn lateness_p99(&self) -> Duration {
        self.emulator
            .get()
            .map_or(Duration::ZERO, Emulator::lateness_p99)
    }

    /// The emulator: packets take the way through it from the first call on.
    fn emulator(&self) -> anyhow::Result<&Emulator> {
        if let Some(emulator) = self.emulator.get() {
            return Ok(emulator);
        }
        let queues = 2 * u16::try_from(LinkName::ALL.len())?;
        let emulator = Emulator::start(queues, |job| self.router().thread(job))
            .context("packets cannot be queued (NFQUEUE)")?;
        for link in LinkName::ALL {
            for (side, up) in [("-i", true), ("-o", false)] {
                let number = queue(link, up).to_string();
                // The mangle table's FORWARD has priority -150. Not nft's `queue`: kernels have
                // its expression less often than this target.
                let rule = [
                    "-w",
                    "-t",
                    "mangle",
                    "-A",
                    "FORWARD",
                    side,
                    link.router_side(),
                    "-j",
                    "NFQUEUE",
                    "--queue-num",
                    &number,
                ];
                self.router().exec("iptables", &rule)?;
                self.router().exec("ip6tables", &rule)?;
            }
        }
        Ok(self.emulator.get_or_init(|| emulator))
    }

    /// Drops what travels over a link in `direction`, without a word to anybody.
    pub fn blackhole(&self, link: LinkName, direction: Direction) -> anyhow::Result<()> {
        self.unblackhole(link)?;
        // Where packets pass the emulator anyway, it does so at once; a change of the firewall makes all
        // of them wait for some 20 ms first.
        if let Some(emulator) = self.emulator.get() {
            if direction != Direction::Down {
                emulator.hole(queue(link, true), Hole::Entry);
            }
            if direction != Direction::Up {
                emulator.hole(queue(link, false), Hole::Exit);
            }
            return Ok(());
        }
        let side = link.router_side();
        // The hole is at the client's end of the link: what has passed it upwards still arrives,
        // what is under way downwards does not.
        let mut rules = format!("table inet hole_{} {{\n", link.name());
        if direction != Direction::Down {
            rules.push_str(&format!(
                "chain up {{ type filter hook forward priority -200; iifname \"{side}\" drop\n}}\n"
            ));
        }
        if direction != Direction::Up {
            rules.push_str(&format!(
                "chain down {{ type filter hook forward priority 0; oifname \"{side}\" drop\n}}\n"
            ));
        }
        rules.push_str("}\n");
        self.router().exec("nft", &[&rules]).map(|_| ())
    }

    /// Ends [`Self::blackhole`].
    pub fn unblackhole(&self, link: LinkName) -> anyhow::Result<()> {
        if let Some(emulator) = self.emulator.get() {
            emulator.hole(queue(link, true), Hole::None);
            emulator.hole(queue(link, false), Hole::None);
            return Ok(());
        }
        let table = format!(
            "table inet hole_{} {{}} ; delete table inet hole_{}",
            link.name(),
            link.name()
        );
        self.router().exec("nft", &[&table]).map(|_| ())
    }

    /// Puts a link behind a NAT as strict as a carrier's: what has no mapping is dropped without a
    /// word. Only IPv4.
    pub fn nat(&self, link: LinkName) -> anyhow::Result<()> {
        let (side, name) = (link.router_side(), link.name());
        let rules = format!(
            "table inet nat_{name} {{\n\
             chain translate {{ type nat hook postrouting priority 100;\n\
             iifname \"{side}\" oifname \"r-srv\" meta nfproto ipv4 masquerade\n}}\n\
             chain strict {{ type filter hook forward priority -30;\n\
             iifname \"{side}\" ct state invalid drop\n}}\n\
             chain silent {{ type filter hook input priority 0;\n\
             iifname \"r-srv\" meta nfproto ipv4 tcp flags & (syn | rst) == 0 drop\n}}\n}}\n"
        );
        // A mapping is made by a SYN, never by a packet out of the middle of a connection.
        self.router()
            .sysctl("net/netfilter/nf_conntrack_tcp_loose", "0")?;
        self.router().exec("nft", &[&rules]).map(|_| ())
    }

    /// Makes the NAT forget all its mappings.
    pub fn forget_mappings(&self) -> anyhow::Result<()> {
        self.router()
            .run(forget_connections)
            .context("the mappings cannot be flushed")
    }
}
