//! The same application and the same cuts over a plain TCP connection.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use session_lab::{Lab, LinkName};

use super::app::{Direction, Seen, Served, now_ns};
use super::bed::{Bed, BedConfig, own_program};
use super::cuts::{Conditions, Cut, Ends, row};
use super::measure::Plan;
use super::programs::{Client, Server};
use super::progress::progress;
use super::report::Row;

/// The undisturbed time that each cut is compared with.
const CONTROL_WINDOW: Duration = Duration::from_millis(300);
/// `TCP_USER_TIMEOUT` of the plain connection, so that its death is seen.
const PLAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Cuts the link under the plain connection; a row for each direction.
pub fn plain(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let dir = super::scratch()?;
    let config = BedConfig {
        v6: plan.v6,
        holdfast: false,
        shape: plan.shape(),
        ..BedConfig::new(own_program()?)
    };
    let bed = Bed::new(dir.path(), config)?;
    let listen = SocketAddr::new(Lab::target(plan.v6), 0);
    let server = Server::start(listen, dir.path(), |c| bed.lab.server().spawn(c))?;
    let bar = progress("plain TCP", plan.runs);
    let mut rows: HashMap<&'static str, Row> = HashMap::new();
    for _ in 0..plan.runs {
        for (direction, one) in once(&bed, &server, dir.path(), plan)? {
            rows.entry(direction.name())
                .and_modify(|all| all.add(&one))
                .or_insert(one);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Direction::ALL
        .into_iter()
        .filter_map(|d| rows.remove(d.name()))
        .collect())
}

fn once(
    bed: &Bed,
    server: &Server,
    dir: &Path,
    plan: &Plan,
) -> anyhow::Result<Vec<(Direction, Row)>> {
    let mut clients = Vec::new();
    for &direction in &plan.directions {
        let arrivals = dir.join(format!("plain-{}", direction.name()));
        clients.push(Client::start(
            server.addr,
            direction,
            plan.pace,
            PLAIN_TIMEOUT,
            arrivals,
            |c| bed.lab.client().spawn(c),
        )?);
    }
    let control_from = now_ns() + 200_000_000;
    std::thread::sleep(Duration::from_millis(200) + CONTROL_WINDOW);
    let control = (control_from, now_ns());
    let from = now_ns();
    bed.lab.cut(LinkName::Wifi)?;
    let deadline = Instant::now() + PLAIN_TIMEOUT + Duration::from_secs(3);
    while Instant::now() < deadline && !clients.iter_mut().all(Client::ended) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let cuts = [Cut {
        control,
        window: (from, now_ns()),
        handover: None,
    }];
    let conditions = Conditions {
        system: "tcp".to_owned(),
        scenario: plan.scenario.name(),
        mode: plan.mode.name(),
        rtt: plan.rtt,
        rate: plan.rate,
        v6: plan.v6,
        pace: plan.pace,
        seconds: (cuts[0].window.1 - from) as f64 / 1e9,
        repeated: 0,
        lateness: bed.lab.lateness_p99(),
    };
    let mut rows = Vec::new();
    for client in clients {
        let (direction, arrivals) = (client.direction, client.arrivals.clone());
        let seen = client.finish(PLAIN_TIMEOUT + Duration::from_secs(3))?;
        // The server's end may hang for minutes; what the client saw is enough.
        let served = Served {
            direction,
            seen: Seen {
                sent: seen.received,
                ..Seen::default()
            },
            arrivals: None,
        };
        let arrivals = if direction == Direction::Upload {
            dir.join("none")
        } else {
            arrivals
        };
        if direction == Direction::Upload {
            std::fs::write(&arrivals, [])?;
        }
        let ends = Ends {
            direction,
            arrivals: &arrivals,
            seen: &seen,
            served: Some(&served),
        };
        rows.push((direction, row(&conditions, &cuts, &ends)?));
    }
    bed.lab.restore(LinkName::Wifi)?;
    Ok(rows)
}
