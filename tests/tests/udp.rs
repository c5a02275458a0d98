//! UDP through a session: datagrams of doors reach their targets, over UDP where it passes and over TCP where it does
//! not, and the next one after a cut goes over the next link.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use session_lab::{Lab, LinkName};
use session_tests::{TestBed, await_listener, eventually, finish};
use session_user::bench::bed::{BedConfig, Running};
use session_user::control::SessionReport;

/// Nothing in these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// A datagram that is not answered by then is lost.
const LOST: Duration = Duration::from_secs(2);
/// Port of the echo server.
const ECHO: u16 = 7007;
/// What the doors are at, and a door that leads to nobody.
const DOOR: &str = "127.0.0.1:5300";
const TO_NOBODY: &str = "127.0.0.1:5301";
const SOCKS: &str = "127.0.0.1:1080";

fn target(port: u16) -> SocketAddr {
    SocketAddr::new(Lab::target(false), port)
}

fn doors() -> String {
    let mut text = String::new();
    for (at, port) in [(DOOR, ECHO), (TO_NOBODY, 9)] {
        text += &format!(
            "[[listen]]\nat = \"{at}\"\nprotocol = \"udp\"\npeer = \"gateway\"\nto = \"{}\"\n",
            target(port)
        );
    }
    text + &format!("[[listen]]\nat = \"{SOCKS}\"\npeer = \"gateway\"\nserve = \"socks5\"\n")
}

/// Sends back what it gets.
struct Echo {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Echo {
    fn start(lab: &Lab) -> anyhow::Result<Self> {
        let socket = lab.server().run(|| UdpSocket::bind(target(ECHO)))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let mut data = vec![0; 70_000];
            while !told.load(Ordering::Relaxed) {
                if let Ok((n, from)) = socket.recv_from(&mut data) {
                    // Whoever asked may have gone.
                    let _ = socket.send_to(&data[..n], from);
                }
            }
        });
        Ok(Self {
            over,
            thread: Some(thread),
        })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A thread that has panicked has said so.
            let _ = thread.join();
        }
    }
}

struct UdpBed {
    bed: TestBed,
    _echo: Echo,
    client: UdpSocket,
}

impl UdpBed {
    fn new() -> anyhow::Result<Self> {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut BedConfig)) -> anyhow::Result<Self> {
        let bed = TestBed::with(|c| {
            c.client_extra = doors();
            change(c);
        })?;
        let echo = Echo::start(&bed.bed.lab)?;
        let client = bed
            .bed
            .lab
            .client()
            .run(|| UdpSocket::bind("127.0.0.1:0"))?;
        client.set_read_timeout(Some(LOST))?;
        Ok(Self {
            bed,
            _echo: echo,
            client,
        })
    }

    fn asks(&self, data: &[u8]) -> io::Result<bool> {
        self.client.send_to(data, DOOR)?;
        let mut answer = vec![0; 70_000];
        loop {
            match self.client.recv_from(&mut answer) {
                Ok((n, _)) if answer[..n] == *data => return Ok(true),
                // An answer to an earlier question that took its time.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// Every one of `count` datagrams comes back.
    fn all_come_back(&self, count: u32, what: &str) -> anyhow::Result<()> {
        for number in 0..count {
            let data = format!("{what} {number}");
            let came = self.asks(data.as_bytes())?;
            ensure!(came, "`{data}` is lost\n{}", self.bed.bed.last_words());
        }
        Ok(())
    }

    fn session(&self) -> anyhow::Result<SessionReport> {
        self.bed.bed.session().context("no session")
    }

    /// Datagrams go over UDP on `link`.
    fn await_udp(&self, link: LinkName) -> anyhow::Result<()> {
        let what = format!("UDP on {}\n{}", link.name(), self.bed.bed.last_words());
        eventually(&what, LIMIT, || {
            // Paths are asked by datagrams.
            self.asks(b"are you there?").is_ok()
                && self.session().is_ok_and(|s| {
                    let udp = s.udp.as_ref();
                    udp.is_some_and(|udp| udp.usable && udp.link == link.name())
                })
        })
    }
}

#[test]
fn datagrams_of_any_size_go_over_udp() -> anyhow::Result<()> {
    let bed = UdpBed::new()?;
    bed.all_come_back(1, "the first one")?;
    bed.await_udp(LinkName::Wifi)?;
    let before = bed.session()?.datagrams;
    bed.all_come_back(100, "datagram")?;
    for size in [0, 1, 1200, 1472, 9000, 65_507] {
        let came = bed.asks(&vec![0x5a; size])?;
        ensure!(came, "{size} bytes are lost\n{}", bed.bed.bed.last_words());
    }
    let session = bed.session()?;
    let after = session.datagrams;
    ensure!(
        after.sent_tcp == before.sent_tcp && after.sent_udp >= before.sent_udp + 106,
        "they did not go over UDP: {before:?}, then {after:?}"
    );
    ensure!(session.flows.len() == 1, "{:?}", session.flows);
    let far = bed.bed.bed.gateway_session().context("no session there")?;
    ensure!(
        far.flows.len() == 1 && far.flows[0].rx == session.flows[0].tx,
        "{:?}, and there {:?}",
        session.flows,
        far.flows
    );
    Ok(())
}

#[test]
fn a_port_that_nobody_has_ends_the_flow() -> anyhow::Result<()> {
    let bed = UdpBed::new()?;
    for flows in 1..=2 {
        // The client's socket hears nothing of it: the door's has no connection that could be refused.
        bed.client.send_to(b"anybody?", TO_NOBODY)?;
        eventually("the flow has failed", LIMIT, || {
            let session = bed.session();
            session.is_ok_and(|s| s.datagrams.failed == flows && s.flows.is_empty())
        })?;
    }
    let log = bed.bed.bed.log("client");
    ensure!(
        log.contains("a flow has failed") && log.contains("Connection refused"),
        "{log}"
    );
    bed.all_come_back(10, "others go on")
}

#[test]
fn a_rule_for_tcp_opens_no_flow() -> anyhow::Result<()> {
    let bed = TestBed::with(|c| {
        c.client_extra = doors();
        c.allow = vec![format!("{}/32:*/tcp", Lab::target(false))];
    })?;
    let _echo = Echo::start(&bed.bed.lab)?;
    let client = bed
        .bed
        .lab
        .client()
        .run(|| UdpSocket::bind("127.0.0.1:0"))?;
    client.send_to(b"may I?", DOOR)?;
    eventually("the gateway says no", LIMIT, || {
        bed.bed.log("gateway").contains("EACCES")
    })?;
    let gateway = bed.bed.gateway_session().context("no session")?;
    ensure!(gateway.flows.is_empty(), "{:?}", gateway.flows);
    Ok(())
}

#[test]
fn where_udp_is_blocked_datagrams_go_over_tcp() -> anyhow::Result<()> {
    let bed = UdpBed::new()?;
    let rules = "table inet no_udp {\nchain drops {\ntype filter hook forward priority 0;\nmeta l4proto udp drop\n}\n}";
    bed.bed.bed.lab.router().exec("nft", &[rules])?;
    bed.all_come_back(200, "blocked from the start")?;
    eventually("UDP is given up", LIMIT, || {
        bed.asks(b"and now?").is_ok_and(|came| came)
            && bed
                .session()
                .is_ok_and(|s| s.udp.is_some_and(|udp| !udp.usable))
    })?;
    let before = bed.session()?.datagrams;
    ensure!(before.sent_tcp >= 200, "{before:?}");
    bed.all_come_back(20, "over TCP alone")?;
    ensure!(bed.asks(&vec![1; 30_000])?, "a large one is lost");
    let unblock = "delete table inet no_udp";
    bed.bed.bed.lab.router().exec("nft", &[unblock])?;
    bed.await_udp(LinkName::Wifi)?;
    // Blocked later, a path is noticed by the first question that is not answered. What went before that is lost.
    bed.bed.bed.lab.router().exec("nft", &[rules])?;
    eventually("TCP takes over", LIMIT, || {
        bed.asks(b"still there?").is_ok_and(|came| came)
    })?;
    Ok(())
}

#[test]
fn after_a_cut_the_next_datagram_goes_over_the_next_link() -> anyhow::Result<()> {
    let mut bed = UdpBed::new()?;
    bed.await_udp(LinkName::Wifi)?;
    for cut in 0..5 {
        bed.bed.bed.await_standby(LinkName::Lte, LIMIT)?;
        bed.bed.bed.lab.cut(LinkName::Wifi)?;
        // What is sent before the agent hears of the cut is lost, and nothing more.
        let first = format!("cut {cut}");
        let came = bed.asks(first.as_bytes())? || bed.asks(first.as_bytes())?;
        ensure!(came, "`{first}` is lost\n{}", bed.bed.bed.last_words());
        bed.await_udp(LinkName::Lte)?;
        let before = bed.session()?.datagrams;
        bed.all_come_back(20, &first)?;
        let session = bed.session()?;
        let udp = session.udp.context("no path")?;
        ensure!(
            udp.usable && udp.link == LinkName::Lte.name(),
            "{udp:?} after a cut"
        );
        let after = session.datagrams;
        ensure!(
            after.sent_udp >= before.sent_udp + 20,
            "{before:?}, then {after:?}"
        );
        bed.bed.bed.lab.restore(LinkName::Wifi)?;
        bed.bed.bed.await_link(LinkName::Wifi, LIMIT)?;
        bed.all_come_back(20, &format!("return {cut}"))?;
        bed.await_udp(LinkName::Wifi)?;
    }
    let session = bed.session()?;
    ensure!(
        session.datagrams.flows_total == 1,
        "a handover opens no flow: {session:?}"
    );
    Ok(())
}

#[test]
fn flows_work_again_after_the_gateway_is_started_anew() -> anyhow::Result<()> {
    let mut bed = UdpBed::new()?;
    bed.await_udp(LinkName::Wifi)?;
    let first = bed.session()?.id;
    bed.bed.bed.gateway_agent = None;
    // Somebody else takes the port meanwhile.
    let gateway = SocketAddr::from(([0, 0, 0, 0], 7843));
    let taken = (bed.bed.bed.lab.server()).run(move || UdpSocket::bind(gateway))?;
    bed.bed.bed.start_gateway()?;
    let another = |s: &SessionReport| s.id != first && s.transports.iter().any(|t| t.up);
    bed.bed.bed.wait(LIMIT, another)?;
    eventually("an echo over TCP", LIMIT, || {
        bed.asks(b"again?").is_ok_and(|came| came)
    })?;
    bed.all_come_back(20, "over TCP")?;
    let log = bed.bed.bed.log("gateway");
    ensure!(log.contains("no UDP there"), "{log}");
    drop(taken);
    let second = bed.session()?.id;
    bed.bed.bed.gateway_agent = None;
    bed.bed.bed.start_gateway()?;
    let another = |s: &SessionReport| s.id != second && s.transports.iter().any(|t| t.up);
    bed.bed.bed.wait(LIMIT, another)?;
    bed.await_udp(LinkName::Wifi)?;
    bed.all_come_back(20, "over UDP again")
}

/// A program that speaks TCP and UDP with one port: how much arrives depends on the machine, that most of it does is ours.
#[test]
fn iperf3_measures_through_doors() -> anyhow::Result<()> {
    const PORT: u16 = 5201;
    let text: String = ["tcp", "udp"]
        .map(|protocol| {
            format!(
                "[[listen]]\nat = \"127.0.0.1:{PORT}\"\nprotocol = \"{protocol}\"\npeer = \"gateway\"\nto = \"{}\"\n",
                target(PORT)
            )
        })
        .concat();
    let bed = TestBed::with(|c| c.client_extra = text)?;
    let mut server = Command::new("iperf3");
    let ip = Lab::target(false).to_string();
    server.args(["-s", "-B", &ip, "-p", &PORT.to_string()]);
    server.stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Running::new(bed.bed.lab.server().spawn(server)?, "iperf3 server");
    await_listener(bed.bed.lab.server(), target(PORT))?;
    for direction in [&[][..], &["-R"]] {
        let mut client = Command::new("iperf3");
        let port = PORT.to_string();
        client.args(["-c", "127.0.0.1", "-p", &port, "-u", "-b", "10M", "-t", "2"]);
        client.args(["-l", "1200", "-J"]).args(direction);
        client.stdin(Stdio::null()).stdout(Stdio::piped());
        let output = finish(bed.bed.lab.client().spawn(client)?, LIMIT)?;
        let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(output.status.success(), "{:#}", said["error"]);
        let sum = &said["end"]["sum"];
        let (lost, packets) = (&sum["lost_packets"], &sum["packets"]);
        eprintln!(
            "iperf3 {direction:?}: {lost} of {packets} lost, {} bits/s",
            sum["bits_per_second"]
        );
        let (lost, packets) = (
            lost.as_u64().context("lost")?,
            packets.as_u64().context("all")?,
        );
        ensure!(
            packets > 100 && lost * 5 < packets,
            "{lost} of {packets} lost"
        );
    }
    Ok(())
}

/// A client's association: its connection, and where its datagrams go.
fn associate(lab: &Lab) -> anyhow::Result<(TcpStream, SocketAddr)> {
    let mut connection = lab.client().run(|| TcpStream::connect(SOCKS))?;
    connection.set_read_timeout(Some(LIMIT))?;
    // RFC 1928: version 5, one method, "no authentication"; then UDP ASSOCIATE from wherever.
    connection.write_all(&[5, 1, 0])?;
    let mut method = [0; 2];
    connection.read_exact(&mut method)?;
    connection.write_all(&[5, 3, 0, 1, 0, 0, 0, 0, 0, 0])?;
    let mut reply = [0; 10];
    connection.read_exact(&mut reply)?;
    ensure!(
        method == [5, 0] && reply[..4] == [5, 0, 0, 1],
        "{method:?} {reply:?}"
    );
    let ip = [reply[4], reply[5], reply[6], reply[7]];
    let port = u16::from_be_bytes([reply[8], reply[9]]);
    Ok((connection, SocketAddr::from((ip, port))))
}

#[test]
fn a_client_of_socks5_names_the_targets_of_its_datagrams() -> anyhow::Result<()> {
    let bed = UdpBed::new()?;
    let (connection, at) = associate(&bed.bed.bed.lab)?;
    let SocketAddr::V4(to) = target(ECHO) else {
        unreachable!("the target is IPv4")
    };
    let header = |fragment: u8| {
        let port = to.port().to_be_bytes();
        [&[0, 0, fragment, 1], &to.ip().octets()[..], &port].concat()
    };
    // A fragment, and bytes that are nothing at all: both are dropped.
    bed.client
        .send_to(&[header(1), b"half".to_vec()].concat(), at)?;
    bed.client.send_to(b"\x00", at)?;
    let whole = [header(0), b"whole".to_vec()].concat();
    bed.client.send_to(&whole, at)?;
    let mut answer = [0; 100];
    let (n, from) = bed.client.recv_from(&mut answer)?;
    ensure!(
        (&answer[..n], from) == (&whole[..], at),
        "{:?} from {from}",
        &answer[..n]
    );
    let stranger = (bed.bed.bed.lab.client()).run(|| UdpSocket::bind("127.0.0.2:0"))?;
    // To the target that is known, and to another one.
    let mut elsewhere = whole.clone();
    elsewhere[9] ^= 1;
    stranger.send_to(&whole, at)?;
    stranger.send_to(&elsewhere, at)?;
    let again = [header(0), b"again".to_vec()].concat();
    bed.client.send_to(&again, at)?;
    let (n, _) = bed.client.recv_from(&mut answer)?;
    ensure!(answer[..n] == again, "{:?}", &answer[..n]);
    // What the stranger sent was there before.
    let flows = bed.session()?.flows;
    ensure!(
        flows.len() == 1 && flows[0].tx == 2,
        "a stranger uses the association: {flows:?}"
    );
    drop(connection);
    eventually("the flow ends with the connection", LIMIT, || {
        bed.session().is_ok_and(|s| s.flows.is_empty())
    })
}

#[test]
fn more_conversations_than_the_peer_takes_go_on_with_the_latest() -> anyhow::Result<()> {
    const FLOWS: usize = 32;
    let bed = UdpBed::with(|c| c.accept_extra = format!("max_flows = {FLOWS}\n"))?;
    bed.await_udp(LinkName::Wifi)?;
    for number in 0..4 * FLOWS {
        let socket = (bed.bed.bed.lab.client()).run(|| UdpSocket::bind("127.0.0.1:0"))?;
        socket.set_read_timeout(Some(LOST))?;
        let question = format!("question {number}");
        socket.send_to(question.as_bytes(), DOOR)?;
        let mut answer = [0; 100];
        let (n, _) = (socket.recv_from(&mut answer))
            .with_context(|| format!("{question}\n{}", bed.bed.bed.last_words()))?;
        ensure!(answer[..n] == *question.as_bytes());
    }
    let session = bed.session()?;
    ensure!(
        session.flows.len() == FLOWS - FLOWS / 16 && session.datagrams.dropped == 0,
        "{} flows, {:?}",
        session.flows.len(),
        session.datagrams
    );
    // The first conversation was ended to make room, and is opened again.
    bed.all_come_back(10, "the first again")
}

#[test]
fn udp_stays_with_tcp_at_an_address_that_is_deprecated() -> anyhow::Result<()> {
    let bed = UdpBed::new()?;
    bed.await_udp(LinkName::Wifi)?;
    let link = LinkName::Wifi.name();
    let client = bed.bed.bed.lab.client();
    client.ip(&["addr", "add", "10.10.1.77/24", "dev", link])?;
    let deprecated = ["preferred_lft", "0", "valid_lft", "forever"];
    let change = ["addr", "change", "10.10.1.2/24", "dev", link];
    client.ip(&[&change[..], &deprecated].concat())?;
    eventually("the agent has a socket at the new address", LIMIT, || {
        let sockets = client.exec("ss", &["-Hunap", "src", "10.10.1.77"]);
        sockets.is_ok_and(|sockets| sockets.contains("10.10.1.77"))
    })?;
    let before = bed.session()?;
    bed.all_come_back(20, "from the old address")?;
    let after = bed.session()?;
    ensure!(
        after.udp.as_ref().is_some_and(|udp| udp.usable),
        "{:?}",
        after.udp
    );
    ensure!(
        after.datagrams.sent_tcp == before.datagrams.sent_tcp,
        "{before:?}, then {after:?}"
    );
    Ok(())
}
