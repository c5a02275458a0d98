//! What the kernel knows of a connection, and the options that no library has.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use socket2::Socket;
use tokio::net::TcpStream;

/// The part of `struct tcp_info` (include/uapi/linux/tcp.h) that Holdfast reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// One of the kernel's `TCP_*` states (net/tcp_states.h).
    pub state: u8,
    /// The SYN carried data, and the peer took it (TCP Fast Open).
    pub syn_data: bool,
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Its mean deviation.
    pub rttvar: Duration,
    /// The shortest round trip of late (`net.ipv4.tcp_min_rtt_wlen`); zero while none is known.
    pub min_rtt: Duration,
    /// Segments in flight.
    pub unacked: u32,
    /// Segments that the peer holds beyond one that is missing.
    pub sacked: u32,
    /// Segments that came beyond one that is missing, since the connection was made.
    pub out_of_order: u32,
    /// How often in a row the oldest segment was sent again because its time had run out.
    pub retransmits: u8,
    /// Congestion window, in segments.
    pub snd_cwnd: u32,
    /// Maximum segment size, in bytes.
    pub snd_mss: u32,
    /// Segments that the peer's TCP has acknowledged, out of order too.
    pub delivered: u32,
    /// How long ago an acknowledgement last came, of whatever, to a tick of the kernel's clock (1 to 10 ms).
    pub last_ack: Duration,
    /// How long ago a segment with data last went out, to a tick of the kernel's clock.
    pub last_sent: Duration,
    /// Segments sent again since the connection was made.
    pub retransmitted: u32,
    /// Bytes in the socket's buffer that have not been sent.
    pub notsent: u32,
    /// Rate at which data was delivered lately, in bytes a second.
    pub delivery_rate: u64,
    /// That rate is the application's, which had no more to send.
    pub app_limited: bool,
}

impl TcpInfo {
    /// `TCP_SYN_SENT`.
    const SYN_SENT: u8 = 2;
    /// `TCPI_OPT_SYN_DATA` (linux/tcp.h).
    const SYN_DATA: u8 = 32;

    /// This end has asked for the connection, or will with its first bytes, and nobody has answered.
    pub fn is_opening(&self) -> bool {
        self.state == Self::SYN_SENT
    }
}

/// Asks the kernel about `stream`.
pub fn tcp_info(stream: &TcpStream) -> io::Result<TcpInfo> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: `info` is valid for `len` bytes of writes, and the descriptor is open for the call.
    let result = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: byte 7 is within the structure, and was zeroed or written by the kernel.
    let flags = unsafe { info.as_ptr().cast::<u8>().add(7).read() };
    // SAFETY: every byte was zeroed or written by the kernel, and all fields are plain integers.
    let info = unsafe { info.assume_init() };
    Ok(TcpInfo {
        state: info.tcpi_state,
        syn_data: info.tcpi_options & TcpInfo::SYN_DATA != 0,
        rtt: Duration::from_micros(info.tcpi_rtt.into()),
        rttvar: Duration::from_micros(info.tcpi_rttvar.into()),
        // All ones until there is one.
        min_rtt: Some(info.tcpi_min_rtt)
            .filter(|us| *us != u32::MAX)
            .map_or(Duration::ZERO, |us| Duration::from_micros(us.into())),
        unacked: info.tcpi_unacked,
        sacked: info.tcpi_sacked,
        out_of_order: info.tcpi_rcv_ooopack,
        retransmits: info.tcpi_retransmits,
        snd_cwnd: info.tcpi_snd_cwnd,
        snd_mss: info.tcpi_snd_mss,
        delivered: info.tcpi_delivered,
        last_ack: Duration::from_millis(info.tcpi_last_ack_recv.into()),
        last_sent: Duration::from_millis(info.tcpi_last_data_sent.into()),
        retransmitted: info.tcpi_total_retrans,
        notsent: info.tcpi_notsent_bytes,
        delivery_rate: info.tcpi_delivery_rate,
        // A bit field that libc has no name for: `tcpi_delivery_rate_app_limited`.
        app_limited: flags & 1 != 0,
    })
}

/// `IP_BIND_ADDRESS_NO_PORT` (ip(7)), for either family.
pub(super) fn bind_address_no_port(socket: &Socket) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// `TCP_FASTOPEN_CONNECT` (linux/tcp.h; Linux 4.11): with a cookie of the peer's, connect() returns at once
/// and the first write goes in the SYN; without one, the SYN asks for it and all else is as usual. An
/// error where `net.ipv4.tcp_fastopen` lacks bit 1.
pub(super) fn fast_open_connect(socket: &Socket) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)
}

/// `TCP_FASTOPEN` (tcp(7)) of a listener: connections that may be open on the strength of a cookie, before
/// the third packet of the handshake; 0: none. Without bit 2 of `net.ipv4.tcp_fastopen` it has no effect.
pub(super) fn fast_open_queue(listener: &Socket, length: libc::c_int) -> io::Result<()> {
    set_int(listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, length)
}

/// Lets the kernel cut packets that are larger than the link (ip(7), ipv6(7)), as it does by default for IPv4.
pub(super) fn let_fragment(socket: &impl AsFd, v6: bool) -> io::Result<()> {
    use libc::{IP_MTU_DISCOVER, IP_PMTUDISC_DONT, IPPROTO_IP, IPPROTO_IPV6};
    if v6 {
        set_int(socket, IPPROTO_IPV6, libc::IPV6_DONTFRAG, 0)?;
        let dont = libc::IPV6_PMTUDISC_DONT;
        set_int(socket, IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, dont)?;
    }
    set_int(socket, IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
}

fn set_int(
    socket: &impl AsFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the value is a c_int that lives through the call, and the length is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `SO_MAX_PACING_RATE` (socket(7)): bytes a second that the kernel lets out at most, whatever its
/// congestion control would like.
pub(super) fn max_pacing_rate(stream: &TcpStream, bytes_per_s: u64) -> io::Result<()> {
    // SAFETY: the value is a u64 that lives through the call, and the length is its size.
    let result = unsafe {
        libc::setsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const bytes_per_s).cast(),
            size_of::<u64>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
