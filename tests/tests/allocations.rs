//! Two agents in this process, whose allocations are counted while an application's bytes go through them.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, raise};
use session_benches::counting::{Counted, Counting, Watch};
use session_benches::samples;
use session_lab::{Lab, LabConfig, LinkName, Netns};
use session_tests::eventually;
use session_user::agent::{self, Workers};
use session_user::config::Config;
use session_user::pki;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Nothing takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);
const PORT: u16 = 7100;
const DOOR: u16 = 8000;
const SMALL_BYTES: usize = 64;
const BULK_BYTES: usize = 64 * 1024;
/// Questions before the count, and in it.
const QUESTIONS: usize = 3_000;
/// Writes of [`BULK_BYTES`] in each round: 128 MiB.
const WRITES: usize = 2_000;
/// Rounds of them, at most, until one allocates hardly anything. What is on its way at once depends on how the host schedules,
/// and each record more than ever before takes a buffer and its handle.
const ROUNDS: usize = 8;
/// Allocations of such a round, at most: a hundredth of one for each record at each agent.
const FEW: u64 = WRITES as u64 * 2 / 100;

/// One agent, on threads of its own with the whole of it.
fn start(netns: &Netns, file: PathBuf, watch: &'static Watch) -> anyhow::Result<JoinHandle<()>> {
    let config = Config::load(&file)?;
    let job = move || {
        watch.join();
        let workers = Workers::start(1, || watch.join()).expect("a thread can be started");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be made");
        runtime
            .block_on(agent::run(&file, config, workers))
            .expect("the agent ends in order");
    };
    Ok(netns.thread(job)?)
}

fn identity(dir: &Path, unit: &str) -> String {
    let dir = dir.display();
    format!(
        "[identity]\ncertificate = \"{dir}/{unit}.crt\"\nkey = \"{dir}/{unit}.key\"\nca = \"{dir}/ca.crt\"\n\
         crl = \"{dir}/crl.pem\"\n[agent]\ncontrol = \"{dir}/{unit}.sock\"\n"
    )
}

/// Writes what both agents need; returns their configurations.
fn prepare(dir: &Path, target: SocketAddr) -> anyhow::Result<[PathBuf; 2]> {
    let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
    pki::init(dir, "bench.example", hour, now, true)?;
    for unit in ["client", "gateway"] {
        pki::issue(dir, unit, hour, dir, now, true)?;
    }
    let gateway = format!(
        "{}[accept]\nlisten = [\"0.0.0.0:{PORT}\"]\nstate = \"{}/state\"\n[[accept.allow]]\npeer = \"client\"\nto = [\"{target}\"]\n",
        identity(dir, "gateway"),
        dir.display(),
    );
    let client = format!(
        "{}[[peer]]\nname = \"gateway\"\naddresses = [\"{}:{PORT}\"]\n[links]\nprefer = [\"{}\"]\n\
         [[listen]]\nat = \"127.0.0.1:{DOOR}\"\npeer = \"gateway\"\nto = \"{target}\"\n",
        identity(dir, "client"),
        Lab::gateway(false),
        LinkName::ALL[0].name(),
    );
    let files = [dir.join("client.toml"), dir.join("gateway.toml")];
    std::fs::write(&files[0], client)?;
    std::fs::write(&files[1], gateway)?;
    Ok(files)
}

/// A connection's first byte says whether its bytes come back or are counted.
fn serve(mut socket: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; BULK_BYTES];
    socket.set_nodelay(true)?;
    socket.read_exact(&mut buffer[..1])?;
    let echoes = buffer[0] == b'e';
    let mut total = 0_u64;
    loop {
        match socket.read(&mut buffer)? {
            0 => break,
            bytes if echoes => socket.write_all(&buffer[..bytes])?,
            bytes => total += bytes as u64,
        }
    }
    socket.write_all(&total.to_le_bytes())
}

fn connect(kind: u8) -> anyhow::Result<TcpStream> {
    let mut socket = TcpStream::connect(("127.0.0.1", DOOR))?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.set_write_timeout(Some(LIMIT))?;
    socket.write_all(&[kind])?;
    Ok(socket)
}

fn first_answer() -> anyhow::Result<()> {
    let mut socket = connect(b'e')?;
    socket.write_all(b"?")?;
    socket.read_exact(&mut [0])?;
    Ok(())
}

/// Asks and waits for each answer.
fn ask(watch: &'static Watch) -> anyhow::Result<Counted> {
    let mut socket = connect(b'e')?;
    let mut answer = [0; SMALL_BYTES];
    let mut questions = || {
        for number in 0..QUESTIONS {
            let question = [number as u8; SMALL_BYTES];
            socket.write_all(&question)?;
            socket.read_exact(&mut answer)?;
            ensure!(answer == question, "another answer than was asked for");
        }
        Ok(())
    };
    questions()?;
    let mut done = Ok(());
    let counted = watch.during(|| done = questions());
    done.map(|()| counted)
}

/// Sends as fast as it goes.
fn send(watch: &'static Watch) -> anyhow::Result<Counted> {
    let mut socket = connect(b's')?;
    // What shrinks would be packed, and what unpacks it makes a buffer of its own for each piece.
    let data = samples::random(64 * BULK_BYTES);
    let mut pieces = data.chunks(BULK_BYTES).cycle();
    let mut sent = 0;
    let mut least: Option<Counted> = None;
    for _ in 0..ROUNDS {
        let mut done = Ok(());
        let counted = watch.during(|| {
            let mut pieces = pieces.by_ref().take(WRITES);
            done = pieces.try_for_each(|piece| socket.write_all(piece));
        });
        done?;
        sent += WRITES * BULK_BYTES;
        eprintln!("allocations: {} for {WRITES} writes", counted.count);
        if least
            .as_ref()
            .is_none_or(|least| counted.count < least.count)
        {
            least = Some(counted);
        }
        if least.as_ref().is_some_and(|least| least.count <= FEW) {
            break;
        }
    }
    socket.shutdown(Shutdown::Write)?;
    let mut total = [0; 8];
    socket.read_exact(&mut total)?;
    ensure!(
        u64::from_le_bytes(total) == sent as u64,
        "bytes are missing"
    );
    least.context("no round at all")
}

#[test]
fn agents_allocate_nothing_for_a_record() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("holdfast-alloc-")
        .tempdir()?;
    let lab = Lab::new(&LabConfig::default())?;
    let watch = Watch::new();
    let target = SocketAddr::new(Lab::target(false), 7000);
    let [client, gateway] = prepare(dir.path(), target)?;
    let listener = lab.server().run(move || TcpListener::bind(target))?;
    // It ends with the process.
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            std::thread::spawn(move || serve(socket));
        }
    });
    let agents = [
        start(lab.server(), gateway, watch)?,
        start(lab.client(), client, watch)?,
    ];
    eventually("an answer comes through both agents", LIMIT, || {
        let ended = agents.iter().any(JoinHandle::is_finished);
        ended || lab.client().run(|| first_answer().is_ok())
    })?;
    let asked = lab.client().run(move || ask(watch))?;
    let sent = lab.client().run(move || send(watch))?;
    eprintln!("allocations: {} for {QUESTIONS} questions", asked.count);
    sent.assert_at_most(FEW);
    asked.assert_at_most(QUESTIONS as u64 / 10);
    // Both have handlers for it: this ends them in order.
    raise(Signal::SIGTERM)?;
    for agent in agents {
        ensure!(agent.join().is_ok(), "an agent failed");
    }
    Ok(())
}
