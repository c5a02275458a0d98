//! What this kernel's sockets do differently once they take part in the local bypass: tried on connections of this process
//! to itself. `auto` asks for none of it, `holdfast doctor` prints it.
//!
//! The kernel puts its own functions in place of those of TCP for a socket that takes part (`tcp_bpf_prots` in
//! net/ipv4/tcp_bpf.c), and not all of them do what TCP's do, not even for data that goes by TCP.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use session_ebpf_common::{BYPASS_UNREAD_MAX, FlowKey};
use socket2::SockRef;
use tracing::level_filters::LevelFilter;

use super::super::kernel;
use super::{Bypass, Fields, Tally, TrialError, sys};
use crate::requests::PastTcp as _;

/// Something that an application could notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What does not hold.
    pub what: &'static str,
    /// What was seen instead.
    pub seen: String,
}

/// How long anything may take, at most: only a socket that hangs takes so long.
const PATIENCE: Duration = Duration::from_secs(2);
/// As many bytes as several messages have.
const MUCH: usize = 200_000;

/// What a trial found: nothing, or what was seen instead of what it asks for.
type Found = Result<Option<String>, TrialError>;
type Trial = fn(&Bypass) -> Found;

/// What applications rely on.
const TRIALS: [(&str, Trial); 10] = [
    ("a read that waits is told of a reset", reset_is_told),
    (
        "a read that waits is told that its own end was shut",
        own_shutdown_is_told,
    ),
    ("FIONREAD counts what has come by TCP", unread_is_counted),
    ("urgent data keeps its mark", urgent_is_marked),
    (
        "each send with MSG_ZEROCOPY is reported once",
        zerocopy_is_reported,
    ),
    ("MSG_WAITALL and SO_RCVLOWAT wait", reads_wait),
    ("splice() finds what there is", splice_finds),
    (
        "a send after the other end was closed fails as TCP's does",
        closed_is_told,
    ),
    (
        "bytes keep their order, and come before the end",
        order_is_kept,
    ),
    ("what is not read holds the writer back", writer_is_held),
];

/// The faults of this kernel. Needs the privileges of capture.
pub fn faults() -> Result<Vec<Fault>, TrialError> {
    with(&Fields::of_kernel()?)
}

/// The same, where the places of the fields are known.
pub fn with(fields: &Fields) -> Result<Vec<Fault>, TrialError> {
    faults_in(&TRIALS, &load(fields)?)
}

fn faults_in(trials: &[(&'static str, Trial)], bypass: &Bypass) -> Result<Vec<Fault>, TrialError> {
    let tried = trials.iter().map(|(what, trial)| {
        let seen = trial(bypass)?;
        Ok(seen.map(|seen| Fault { what, seen }))
    });
    tried.filter_map(Result::transpose).collect()
}

/// The program alone, for this process.
fn load(fields: &Fields) -> Result<Bypass, TrialError> {
    let mut ebpf = kernel::load_object(LevelFilter::OFF, Some(fields))?;
    Ok(Bypass::load(&mut ebpf)?)
}

/// Both ends of a connection in the bypass.
struct Pair {
    pub app: TcpStream,
    pub agent: TcpStream,
    pub tally: Tally,
}

impl Pair {
    pub fn new(bypass: &Bypass) -> Result<Self, TrialError> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let app = TcpStream::connect(listener.local_addr()?)?;
        let (agent, from) = listener.accept()?;
        for end in [&app, &agent] {
            end.set_nodelay(true)?;
            end.set_read_timeout(Some(PATIENCE))?;
            end.set_write_timeout(Some(PATIENCE))?;
        }
        let key = FlowKey {
            app_port: from.port().into(),
            agent_port: listener.local_addr()?.port().into(),
            ..FlowKey::default()
        };
        let tally = bypass.join_both(&app, &agent, key)?;
        let tally = tally.ok_or_else(|| io::Error::other("no room in the bypass"))?;
        Ok(Self { app, agent, tally })
    }

    /// What the agent reads now.
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.tally.about_to_read();
        let read = (&self.agent).read(buf)?;
        self.tally.have_read(read);
        Ok(read)
    }
}

/// Resets instead of an end in order.
fn reset(end: TcpStream) -> io::Result<()> {
    SockRef::from(&end).set_linger(Some(Duration::ZERO))
}

/// What a read of the application's says, which began to wait before `then` was done.
fn waiting_read(
    pair: Pair,
    then: impl FnOnce(&TcpStream, TcpStream) -> io::Result<()>,
) -> io::Result<io::Result<usize>> {
    let Pair { app, agent, tally } = pair;
    let (told, tid) = std::sync::mpsc::sync_channel(1);
    thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let _ = told.send(nix::unistd::gettid());
            (&app).read(&mut [0; 16])
        });
        let sleeps = tid.recv().map_or(Ok(()), until_it_sleeps);
        let done = sleeps.and_then(|()| then(&app, agent));
        let read = reading
            .join()
            .map_err(|_| io::Error::other("a thread ended"))?;
        drop(tally);
        done.map(|()| read)
    })
}

/// Returns when a thread of this process waits for something.
fn until_it_sleeps(tid: nix::unistd::Pid) -> io::Result<()> {
    let file = format!("/proc/self/task/{tid}/wchan");
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let state = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat"))?;
        // The name before it may have anything in it.
        let sleeps = state
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('S'));
        // Where the kernel tells, it waits for its socket and not for the channel.
        let place = std::fs::read_to_string(&file).unwrap_or_default();
        if sleeps && !place.contains("futex") {
            return Ok(());
        }
        thread::yield_now();
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn reset_is_told(bypass: &Bypass) -> Found {
    let read = waiting_read(Pair::new(bypass)?, |_, agent| reset(agent))?;
    Ok(unless(errno(&read) == Some(Errno::ECONNRESET), &read))
}

fn own_shutdown_is_told(bypass: &Bypass) -> Found {
    let mut kept = None;
    let read = waiting_read(Pair::new(bypass)?, |app, agent| {
        kept = Some(agent);
        app.shutdown(Shutdown::Read)
    })?;
    Ok(unless(matches!(read, Ok(0)), &read))
}

fn unread_is_counted(bypass: &Bypass) -> Found {
    let pair = Pair::new(bypass)?;
    (&pair.agent).write_all(&[1; 50])?;
    // One read shows that they are there.
    (&pair.app).read_exact(&mut [0; 10])?;
    let counted = sys::unread(&pair.app)?;
    Ok(unless(
        counted == 40,
        &format_args!("{counted} of 40 bytes"),
    ))
}

fn urgent_is_marked(bypass: &Bypass) -> Found {
    let pair = Pair::new(bypass)?;
    let agent = SockRef::from(&pair.agent);
    agent.set_out_of_band_inline(true)?;
    SockRef::from(&pair.app).send_out_of_band(b"!")?;
    (&pair.app).write_all(b"after")?;
    // One byte is read at the mark at most, and the mark lies before it.
    let mut peeked = [0];
    pair.agent.peek(&mut peeked)?;
    let marked = sys::at_mark(&pair.agent)?;
    Ok(unless(marked, &"a byte like any other"))
}

fn zerocopy_is_reported(bypass: &Bypass) -> Found {
    const SENDS: u32 = 3;
    let pair = Pair::new(bypass)?;
    sys::set(&pair.app, libc::SO_ZEROCOPY, 1)?;
    let data = vec![7; MUCH / 4];
    let mut sent = 0;
    for _ in 0..SENDS {
        sent += SockRef::from(&pair.app).send_with_flags(&data, libc::MSG_ZEROCOPY)?;
    }
    let mut buf = vec![0; MUCH];
    while sent > 0 {
        sent = sent.saturating_sub(pair.read(&mut buf)?);
    }
    // All has been read: whatever is to be reported is, as soon as the last acknowledgement has come.
    let (mut reported, end) = (0, Instant::now() + Duration::from_millis(50));
    while reported < SENDS && Instant::now() < end {
        reported += sys::reports(&pair.app)?;
    }
    Ok(unless(
        reported == SENDS,
        &format_args!("{reported} reports of {SENDS} sends"),
    ))
}

fn reads_wait(bypass: &Bypass) -> Found {
    let pair = Pair::new(bypass)?;
    let mut all = [0; 100];
    let read = in_two(&pair, || {
        sys::receive(&pair.app, &mut all, libc::MSG_WAITALL)
    })?;
    if !matches!(read, Ok(100)) {
        return Ok(Some(format!("MSG_WAITALL: {read:?} of 100")));
    }
    sys::set(&pair.app, libc::SO_RCVLOWAT, 100)?;
    let read = in_two(&pair, || (&pair.app).read(&mut all))?;
    Ok(unless(
        matches!(read, Ok(100)),
        &format_args!("SO_RCVLOWAT: {read:?} of 100"),
    ))
}

/// What a read says while fifty bytes come, and fifty more once that has had time to see them.
fn in_two<T>(pair: &Pair, read: impl FnOnce() -> T) -> io::Result<T> {
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            (&pair.agent).write_all(&[1; 50])?;
            // A read that does not wait has returned by then; it tells nothing itself, as one that waits must not.
            thread::sleep(Duration::from_millis(10));
            (&pair.agent).write_all(&[2; 50])
        });
        let read = read();
        writing
            .join()
            .map_err(|_| io::Error::other("a thread ended"))??;
        Ok(read)
    })
}

fn splice_finds(bypass: &Bypass) -> Found {
    let pair = Pair::new(bypass)?;
    (&pair.agent).write_all(&[1; 50])?;
    let (from, to) = io::pipe()?;
    let found = sys::splice(&pair.app, &to, 100);
    drop(from);
    Ok(unless(matches!(found, Ok(50)), &found))
}

fn closed_is_told(bypass: &Bypass) -> Found {
    let Pair { app, agent, tally } = Pair::new(bypass)?;
    (&app).write_all(b"not read")?;
    reset(agent)?;
    // The reset is under way: what is sent before it has come goes nowhere.
    let end = Instant::now() + PATIENCE;
    let mut sent = (&app).write(b"more");
    while sent.is_ok() && Instant::now() < end {
        sent = (&app).write(b"more");
    }
    drop(tally);
    let told = matches!(errno(&sent), Some(Errno::ECONNRESET | Errno::EPIPE));
    Ok(unless(told, &sent))
}

fn order_is_kept(bypass: &Bypass) -> Found {
    for seed in 0..20 {
        let pair = Pair::new(bypass)?;
        let all = carry_numbers(&pair, seed)?;
        if let Some(wrong) = first_wrong(&all) {
            return Ok(Some(wrong));
        }
    }
    Ok(None)
}

/// What the agent reads while the application writes numbers.
fn carry_numbers(pair: &Pair, seed: usize) -> io::Result<Vec<u8>> {
    thread::scope(|scope| {
        let writing = scope.spawn(|| write_numbers(&pair.app, seed));
        let mut all = Vec::with_capacity(NUMBERS);
        let mut buf = vec![0; 4096 + seed % 64 * 1000];
        loop {
            match pair.read(&mut buf)? {
                0 => break,
                n => all.extend_from_slice(&buf[..n]),
            }
        }
        writing
            .join()
            .map_err(|_| io::Error::other("a thread ended"))??;
        Ok(all)
    })
}

/// Bytes of one connection of a trial of the order.
const NUMBERS: usize = 160_000;

/// Numbers that follow each other, in small and large messages, and the end.
fn write_numbers(mut to: &TcpStream, seed: usize) -> io::Result<()> {
    let all: Vec<u8> = (0..NUMBERS as u32 / 4).flat_map(u32::to_le_bytes).collect();
    let (mut rest, mut turn) = (&all[..], seed);
    while !rest.is_empty() {
        turn = turn.wrapping_mul(1_103_515_245).wrapping_add(12_345);
        let size = if turn >> 16 & 3 == 0 {
            60_000
        } else {
            1 + (turn >> 8) % 3000
        };
        let (now, later) = rest.split_at(size.min(rest.len()));
        to.write_all(now)?;
        rest = later;
    }
    to.shutdown(Shutdown::Write)
}

/// Where numbers do not follow each other, if they do not.
fn first_wrong(all: &[u8]) -> Option<String> {
    let right = (0..NUMBERS as u32 / 4).flat_map(u32::to_le_bytes);
    if let Some(at) = all
        .iter()
        .zip(right)
        .position(|(seen, right)| *seen != right)
    {
        return Some(format!("another byte at {at}"));
    }
    (all.len() != NUMBERS).then(|| format!("{} of {NUMBERS} bytes", all.len()))
}

fn writer_is_held(bypass: &Bypass) -> Found {
    let pair = Pair::new(bypass)?;
    let kept = 128 * 1024;
    SockRef::from(&pair.agent).set_recv_buffer_size(kept)?;
    SockRef::from(&pair.app).set_send_buffer_size(kept)?;
    pair.app.set_nonblocking(true)?;
    // Both buffers, which the kernel doubles for its own needs, and what may wait beside them.
    let limit = BYPASS_UNREAD_MAX + 8 * kept as u64;
    let (mut taken, data) = (0, vec![0; MUCH]);
    while taken <= limit {
        match (&pair.app).write(&data) {
            Ok(n) => taken += n as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Some(format!("{taken} bytes were taken")))
}

fn unless(holds: bool, seen: &dyn std::fmt::Debug) -> Option<String> {
    (!holds).then(|| format!("{seen:?}"))
}

fn errno<T>(result: &io::Result<T>) -> Option<Errno> {
    let error = result.as_ref().err()?;
    error.raw_os_error().map(Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::privileges;

    fn trials() -> Option<Bypass> {
        if !privileges::missing().is_empty() {
            eprintln!("NOT RUN: needs the privileges of capture");
            return None;
        }
        let fields = Fields::of_kernel().unwrap();
        Some(load(&fields).unwrap_or_else(|error| panic!("{error}")))
    }

    /// Whatever the kernel's faults are, these are ours to keep.
    #[test]
    fn what_is_ours_holds_on_every_kernel() {
        let Some(bypass) = trials() else { return };
        let ours: [(&str, Trial); 5] = [
            ("read", reads_wait),
            ("splice", splice_finds),
            ("closed", closed_is_told),
            ("order", order_is_kept),
            ("held", writer_is_held),
        ];
        for (name, trial) in ours {
            assert_eq!(trial(&bypass).unwrap(), None, "{name}");
        }
        // The others can be made, whatever they find.
        for fault in faults().unwrap() {
            println!("{}: {}", fault.what, fault.seen);
        }
    }

    #[test]
    fn the_faults_are_told() {
        let Some(bypass) = trials() else { return };
        let tried: [(&str, Trial); 3] = [
            ("first", |_| Ok(Some("another".to_owned()))),
            ("second", |_| Ok(None)),
            ("third", |_| Ok(Some("none".to_owned()))),
        ];
        let told = faults_in(&tried, &bypass).unwrap();
        let told: Vec<_> = told.iter().map(|f| (f.what, &*f.seen)).collect();
        assert_eq!(told, [("first", "another"), ("third", "none")]);
        // One that cannot be made has not been passed.
        let cannot: (&str, Trial) = ("cannot", |_| Err(io::Error::other("no socket").into()));
        assert!(faults_in(&[tried[1], cannot], &bypass).is_err());
    }

    /// All orders of small and large messages, past TCP and by it.
    #[test]
    fn a_thousand_connections_keep_their_order() {
        let Some(bypass) = trials() else { return };
        let (mut by_tcp, mut redirected) = (0, 0);
        for seed in 0..1000 {
            let pair = Pair::new(&bypass).unwrap();
            let before = bypass.state(&pair.app);
            let all = carry_numbers(&pair, seed).unwrap();
            assert_eq!(first_wrong(&all), None, "{seed}");
            // Once it has left, what goes by TCP is not counted any more.
            let after = bypass.state(&pair.app);
            by_tcp += after.by_tcp - before.by_tcp;
            redirected += after.redirected - before.redirected;
        }
        assert!(by_tcp > 0 && redirected > 0, "{by_tcp}, {redirected}");
        println!("{by_tcp} bytes by TCP, {redirected} past it");
    }

    #[test]
    fn a_slot_that_is_left_is_given_again() {
        let Some(bypass) = trials() else { return };
        let first = Pair::new(&bypass).unwrap().tally.slot;
        for _ in 0..3 {
            let pair = Pair::new(&bypass).unwrap();
            assert_eq!(pair.tally.slot, first);
            assert_eq!(first_wrong(&carry_numbers(&pair, 7).unwrap()), None);
        }
    }
}
