//! A TCP socket whose urgent data is seen at its place: which byte of the stream it is, and that it is urgent.
//!
//! With SO_OOBINLINE the urgent byte stays among the others, a read ends before it, and SIOCATMARK says that it is the
//! next one (`tcp_recvmsg_locked` and `tcp_ioctl` of net/ipv4/tcp.c). A read that begins there passes it, and leaves no
//! trace. So the kernel is asked before a read, though not before each, and hardly a record costs a system call more:
//!
//! - A read that was not full has met the end of what there is, or the mark. No other follows it without a new event: the
//!   question before the next one takes the place of the read that would find nothing.
//! - A read that was full may have ended at the mark by chance. The kernel is asked again, and whether there is anything at
//!   all: of an empty socket it says nothing that would hold until the next read. Beside a read of 64 KiB that is little.
//! - EPOLLPRI tells that urgent data has come, so that an event of it is not taken for one of bytes.

use std::ffi::c_int;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd as _;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::BufMut;
use socket2::Socket;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::io::{Interest, Ready};

/// asm-generic/sockios.h.
const SIOCATMARK: libc::Ioctl = 0x8905;
/// How often a read is made that signals keep from passing the mark. Each call has the signal before it delivered.
const ATTEMPTS: u32 = 8;

/// What one read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// So many bytes; none at the end.
    pub bytes: usize,
    /// The first of them is urgent.
    pub urgent: bool,
}

/// A connected TCP socket. Only one task may read it.
#[derive(Debug)]
pub(super) struct MarkedSocket {
    pub(super) fd: Arc<AsyncFd<Socket>>,
    /// What is sent to it may come past TCP, with no marks. There are two queues then, and a short read has emptied one.
    pub(super) past_tcp: bool,
    /// The latest read was full.
    full: bool,
    /// Nobody has read, or written, yet. Both are tried without waiting for the first event: a socket that has just been
    /// connected can be written, and one that was accepted often holds the first bytes.
    unread: bool,
    unwritten: bool,
}

impl MarkedSocket {
    /// Registers a socket that does not block, in the current runtime.
    pub fn new(socket: Socket, past_tcp: bool) -> io::Result<Self> {
        socket.set_out_of_band_inline(true)?;
        Self::prepared(socket, past_tcp)
    }

    /// The same for one that has SO_OOBINLINE already.
    pub fn prepared(socket: Socket, past_tcp: bool) -> io::Result<Self> {
        Ok(Self {
            past_tcp,
            unread: true,
            ..Self::registered(watch(socket)?)
        })
    }

    /// One that [`register`] has registered, and that is connected. Events tell of all that comes: also of what came before
    /// (`ep_insert` of fs/eventpoll.c).
    pub fn registered(fd: AsyncFd<Socket>) -> Self {
        Self {
            fd: Arc::new(fd),
            past_tcp: false,
            full: false,
            unread: false,
            unwritten: true,
        }
    }

    /// Reads what there is, up to the urgent byte or beginning with it. `buf` must have room.
    pub fn try_read(&mut self, buf: &mut impl BufMut) -> io::Result<Taken> {
        if self.past_tcp {
            return self.try_read_unmarked(buf);
        }
        let fd = &*self.fd;
        // What is known before the read is what may be forgotten behind it.
        let mut told = urgent_told(fd);
        let direct = std::mem::take(&mut self.unread);
        // Of a socket with nothing to read no answer would hold until it is read.
        let perhaps_empty = direct || self.full || told.is_some();
        let room = buf.chunk_mut().len();
        let mut taken = None;
        let mut read = |socket: &Socket| {
            if perhaps_empty && ioctl_int(socket, libc::FIONREAD)? == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let urgent = ioctl_int(socket, SIOCATMARK)? != 0;
            let bytes = if urgent {
                receive_past_mark(socket, buf)?
            } else {
                receive(socket, buf)?
            };
            let urgent = urgent && bytes > 0;
            taken = Some(Taken { bytes, urgent });
            let short = bytes > 0 && bytes < room;
            // An event that came before this read, and told of the mark, does not come again.
            if short && urgent_told(fd).is_none() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(())
        };
        let outcome = if direct {
            read(fd.get_ref())
        } else {
            // Readiness goes by WouldBlock, as far as it was known before.
            fd.try_io(Interest::READABLE, read)
        };
        let Some(taken) = taken else {
            let error = outcome
                .err()
                .unwrap_or_else(|| io::ErrorKind::WouldBlock.into());
            if would_block(&error) {
                self.full = false;
                forget(&mut told);
            }
            return Err(error);
        };
        if taken.urgent {
            forget(&mut told);
        }
        self.full = taken.bytes == room;
        Ok(taken)
    }

    /// Reads until there is nothing, whatever is urgent.
    fn try_read_unmarked(&mut self, buf: &mut impl BufMut) -> io::Result<Taken> {
        let mut read = |socket: &Socket| receive_past_mark(socket, buf);
        let bytes = if std::mem::take(&mut self.unread) {
            read(self.fd.get_ref())?
        } else {
            // WouldBlock ends the readiness, and what waits already brings it back no more.
            self.fd.try_io(Interest::READABLE, read)?
        };
        Ok(Taken {
            bytes,
            urgent: false,
        })
    }

    /// As [`tokio::net::TcpStream::try_write_vectored`].
    pub fn try_write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.write(|socket| match slices {
            // What is said is short for the most part, and the kernel has less to do for one slice.
            [one] => socket.send_with_flags(one, libc::MSG_NOSIGNAL),
            several => socket.send_vectored_with_flags(several, libc::MSG_NOSIGNAL),
        })
    }

    /// Writes a byte as urgent data.
    pub fn try_write_urgent(&mut self, byte: u8) -> io::Result<usize> {
        let flags = libc::MSG_OOB | libc::MSG_NOSIGNAL;
        self.write(|socket| socket.send_with_flags(&[byte], flags))
    }

    fn write(&mut self, write: impl FnOnce(&Socket) -> io::Result<usize>) -> io::Result<usize> {
        if std::mem::take(&mut self.unwritten) {
            return write(self.fd.get_ref());
        }
        self.fd.try_io(Interest::WRITABLE, write)
    }

    /// As [`tokio::net::TcpStream::poll_read_ready`].
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unread {
            return Poll::Ready(Ok(()));
        }
        self.fd.poll_read_ready(cx).map_ok(drop)
    }

    /// As [`tokio::net::TcpStream::poll_write_ready`].
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unwritten {
            return Poll::Ready(Ok(()));
        }
        self.fd.poll_write_ready(cx).map_ok(drop)
    }
}

/// Registers a socket that does not block in the current runtime, for all that a [`MarkedSocket`] is to be told.
pub(crate) fn register(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    socket.set_out_of_band_inline(true)?;
    watch(socket)
}

fn watch(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
    // SAFETY: a `Socket` keeps its descriptor for its whole life, and the registration owns it.
    Ok(unsafe { AsyncFd::register_with_interest(socket, interest) }?)
}

fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// Whether an event has told of urgent data since that was last forgotten.
fn urgent_told(fd: &AsyncFd<Socket>) -> Option<AsyncFdReadyGuard<'_, Socket>> {
    // Without a lock. It is said of a socket too whose other end has ended its direction.
    fd.try_io(Interest::PRIORITY, |_| Ok(())).ok()?;
    let ready = pin!(fd.ready(Interest::PRIORITY));
    match ready.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(told)) => told.ready().is_priority().then_some(told),
        Poll::Ready(Err(_)) | Poll::Pending => None,
    }
}

/// The mark has been passed, or there is none; one of which an event has told meanwhile is not forgotten.
fn forget(told: &mut Option<AsyncFdReadyGuard<'_, Socket>>) {
    if let Some(told) = told {
        told.clear_ready_matching(Ready::PRIORITY);
    }
}

fn ioctl_int(socket: &Socket, request: libc::Ioctl) -> io::Result<c_int> {
    let mut answer: c_int = 0;
    // SAFETY: both requests made here write one int to where `answer` is, and read nothing.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut answer) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}

/// As [`receive`], where the next byte may be urgent. A signal for this thread keeps a read from passing the mark, and has
/// it say that there is nothing (`tcp_recvmsg_locked`).
fn receive_past_mark(socket: &Socket, buf: &mut impl BufMut) -> io::Result<usize> {
    let mut received = receive(socket, buf);
    for _ in 1..ATTEMPTS {
        let nothing = received.as_ref().is_err_and(would_block);
        if !nothing || ioctl_int(socket, SIOCATMARK)? == 0 {
            break;
        }
        received = receive(socket, buf);
    }
    received
}

/// As [`tokio::net::TcpStream::try_read_buf`], whatever events have said.
fn receive(socket: &Socket, buf: &mut impl BufMut) -> io::Result<usize> {
    // SAFETY: nothing that is not initialised is read from it, or written to it.
    let room = unsafe { buf.chunk_mut().as_uninit_slice_mut() };
    let bytes = socket.recv(room)?;
    // SAFETY: the kernel has written so many bytes to the front of the room.
    unsafe { buf.advance_mut(bytes) };
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::io::Write as _;
    use std::net::TcpStream as StdStream;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    use tokio::net::TcpListener;

    const ROOM: usize = 4096;

    /// Two ends of a connection; the far one blocks.
    async fn connection() -> (StdStream, MarkedSocket) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let far = StdStream::connect(addr).unwrap();
        far.set_nodelay(true).unwrap();
        let (near, _) = listener.accept().await.unwrap();
        let near = Socket::from(near.into_std().unwrap());
        (far, MarkedSocket::new(near, false).unwrap())
    }

    async fn read(near: &mut MarkedSocket, room: usize) -> (Vec<u8>, bool) {
        let mut bytes = vec![0; room];
        loop {
            poll_fn(|cx| near.poll_read_ready(cx)).await.unwrap();
            match near.try_read(&mut &mut bytes[..]) {
                Ok(taken) => {
                    bytes.truncate(taken.bytes);
                    return (bytes, taken.urgent);
                }
                Err(error) => assert!(would_block(&error), "{error}"),
            }
        }
    }

    /// Reads to the end: how many bytes came, and which were urgent.
    async fn read_all(near: &mut MarkedSocket) -> (usize, Vec<usize>) {
        let (mut all, mut marks) = (0, Vec::new());
        loop {
            let (bytes, urgent) = read(near, ROOM).await;
            if bytes.is_empty() {
                return (all, marks);
            }
            if urgent {
                assert_eq!(bytes[0], b'!');
                marks.push(all);
            }
            all += bytes.len();
        }
    }

    fn urgent(far: &StdStream) {
        let sent = socket2::SockRef::from(far).send_out_of_band(b"!").unwrap();
        assert_eq!(sent, 1);
    }

    /// Whoever is first: the bytes, their reader or the news of them.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_urgent_byte_is_seen_at_its_place() {
        let places = [
            0,
            1,
            6,
            ROOM - 1,
            ROOM,
            ROOM + 1,
            2 * ROOM,
            3 * ROOM,
            3 * ROOM / 2,
            3 * ROOM + 7,
        ];
        for before in places.repeat(25) {
            let (mut far, mut near) = connection().await;
            let sending = std::thread::spawn(move || {
                far.write_all(&vec![b'x'; before]).unwrap();
                urgent(&far);
                far.write_all(b"after").unwrap();
            });
            let (all, marks) = read_all(&mut near).await;
            sending.join().unwrap();
            assert_eq!((all, marks), (before + 6, vec![before]));
        }
    }

    #[tokio::test]
    async fn one_that_was_there_before_anybody_read_is_seen() {
        for before in [0, ROOM] {
            let (mut far, mut near) = connection().await;
            far.write_all(&vec![b'x'; before]).unwrap();
            urgent(&far);
            far.write_all(b"after").unwrap();
            drop(far);
            let (all, marks) = read_all(&mut near).await;
            assert_eq!((all, marks), (before + 6, vec![before]));
        }
    }

    #[tokio::test]
    async fn each_of_several_is_seen_by_who_keeps_up() {
        let (mut far, mut near) = connection().await;
        for _ in 0..50 {
            far.write_all(b"before").unwrap();
            urgent(&far);
            let mut seen = (0, Vec::new());
            while seen.0 < 7 {
                let (bytes, urgent) = read(&mut near, ROOM).await;
                if urgent {
                    seen.1.push(seen.0);
                }
                seen.0 += bytes.len();
            }
            assert_eq!(seen, (7, vec![6]));
        }
    }

    /// The event that told of the first bytes is heard before the urgent one comes, and says nothing of that.
    #[tokio::test]
    async fn what_is_written_as_urgent_is_urgent() {
        let (far, mut near) = connection().await;
        far.set_nonblocking(true).unwrap();
        let mut far = MarkedSocket::new(Socket::from(far), false).unwrap();
        let before = [IoSlice::new(b"be"), IoSlice::new(b"fore")];
        assert_eq!(near.try_write_vectored(&before).unwrap(), 6);
        poll_fn(|cx| near.poll_write_ready(cx)).await.unwrap();
        assert_eq!(near.try_write_urgent(b'!').unwrap(), 1);
        assert_eq!(
            near.try_write_vectored(&[IoSlice::new(b"after")]).unwrap(),
            5
        );
        drop(near);
        assert_eq!(read_all(&mut far).await, (12, vec![6]));
    }

    #[tokio::test]
    async fn a_short_read_is_followed_by_none_until_more_comes() {
        let (mut far, mut near) = connection().await;
        for _ in 0..20 {
            far.write_all(b"some").unwrap();
            assert_eq!(read(&mut near, ROOM).await, (b"some".to_vec(), false));
        }
        let mut more = [0; 8];
        // All events of it have been heard by now, or say what is not so.
        loop {
            let error = near.try_read(&mut &mut more[..]).unwrap_err();
            assert!(would_block(&error), "{error}");
            let waits = poll_fn(|cx| Poll::Ready(near.poll_read_ready(cx).is_pending())).await;
            if waits {
                break;
            }
        }
        far.write_all(b"more").unwrap();
        assert_eq!(read(&mut near, ROOM).await, (b"more".to_vec(), false));
        drop(far);
        assert_eq!(read(&mut near, ROOM).await, (Vec::new(), false));
    }

    /// Sends signals to a thread until it is dropped.
    struct Signals {
        stop: Arc<AtomicBool>,
        sender: Option<std::thread::JoinHandle<()>>,
    }

    impl Signals {
        /// One every some microseconds: so many that some come in the middle of a read, and few enough that it gets on.
        fn to_this_thread() -> Self {
            let nothing = SigHandler::Handler(nothing);
            let action = SigAction::new(nothing, SaFlags::SA_RESTART, SigSet::empty());
            // SAFETY: the handler does nothing, which any thread may do at any time.
            unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
            let (process, thread) = (std::process::id(), nix::unistd::gettid());
            let stop = Arc::new(AtomicBool::new(false));
            let stopped = Arc::clone(&stop);
            let sender = std::thread::spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    // Not made up for where this thread had no processor: many at once leave none of the reads alone.
                    let next = Instant::now() + Duration::from_micros(20);
                    while Instant::now() < next {
                        std::hint::spin_loop();
                    }
                    // SAFETY: the call takes numbers alone, and the thread waits for this one before it ends.
                    unsafe {
                        libc::syscall(libc::SYS_tgkill, process, thread.as_raw(), libc::SIGUSR1)
                    };
                }
            });
            Self {
                stop,
                sender: Some(sender),
            }
        }
    }

    impl Drop for Signals {
        fn drop(&mut self) {
            self.stop.store(true, Ordering::Relaxed);
            let ended = self.sender.take().map(std::thread::JoinHandle::join);
            assert!(ended.is_some_and(|ended| ended.is_ok()) || std::thread::panicking());
        }
    }

    extern "C" fn nothing(_: c_int) {}

    /// A read that a signal keeps from passing the mark says that there is nothing; whoever believed it would wait for ever.
    #[tokio::test]
    async fn signals_hide_no_urgent_byte() {
        for past_tcp in [true, false] {
            let (far, mut near) = connection().await;
            near.past_tcp = past_tcp;
            let _signals = Signals::to_this_thread();
            for round in 0..20_000 {
                urgent(&far);
                while ioctl_int(near.fd.get_ref(), libc::FIONREAD).unwrap() == 0 {
                    std::hint::spin_loop();
                }
                poll_fn(|cx| near.poll_read_ready(cx)).await.unwrap();
                let taken = near.try_read(&mut &mut [0; 8][..]);
                let taken = taken.unwrap_or_else(|error| panic!("{past_tcp}, {round}: {error}"));
                let urgent = !past_tcp;
                assert_eq!(taken, Taken { bytes: 1, urgent }, "{round}");
            }
        }
    }
}
