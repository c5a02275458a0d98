//! Notices that the host has slept.
//!
//! Connections and NAT mappings end while a host is suspended, and nothing on it tells. A timer on
//! CLOCK_REALTIME with TFD_TIMER_CANCEL_ON_SET (timerfd_create(2)) is cancelled when that clock jumps,
//! which it does at every resume, and costs nothing until then. Whether it was a sleep or somebody who
//! set the clock is told by CLOCK_BOOTTIME, which counts sleep, against CLOCK_MONOTONIC, which does not.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId as Clock, clock_gettime};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::registry::Registry;
use crate::driver::Command;

/// Shorter sleeps end no connection, and two clocks are not read at the same moment.
const SLEEP_MIN: Duration = Duration::from_secs(1);
/// The timer is set this far ahead; what counts is that it is cancelled.
const AHEAD: Duration = Duration::from_secs(30 * 86_400);

/// How long the host has slept since it was started.
fn slept() -> Duration {
    let read = |clock| clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
    read(Clock::CLOCK_BOOTTIME).saturating_sub(read(Clock::CLOCK_MONOTONIC))
}

fn armed() -> nix::Result<TimerFd> {
    let timer = TimerFd::new(
        ClockId::CLOCK_REALTIME,
        TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
    )?;
    arm(&timer)?;
    Ok(timer)
}

fn arm(timer: &TimerFd) -> nix::Result<()> {
    let at = Duration::from(clock_gettime(Clock::CLOCK_REALTIME)?) + AHEAD;
    timer.set(
        Expiration::OneShot(TimeSpec::from_duration(at)),
        TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET,
    )
}

/// Tells every session when the host has slept. Runs until it is aborted.
pub(super) async fn watch(registry: Registry) {
    let waiting = armed().map_err(std::io::Error::from).and_then(|timer| {
        let fd = timer.as_fd().try_clone_to_owned()?;
        // SAFETY: the value owns its descriptor, and nothing gives it another one while it is
        // registered.
        let waiting = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok((timer, waiting?))
    });
    let (timer, waiting) = match waiting {
        Ok(both) => both,
        Err(error) => {
            tracing::warn!(%error, "a suspend of this host will be noticed late; a sleep hook may call `holdfast woke`");
            return std::future::pending().await;
        }
    };
    let mut before = slept();
    loop {
        let Ok(mut ready) = waiting.readable().await else {
            return std::future::pending().await;
        };
        let mut count = [0; 8];
        // ECANCELED: the clock was set. Otherwise it has expired, or there was nothing.
        let read = nix::unistd::read(waiting.get_ref().as_fd(), &mut count);
        ready.clear_ready();
        drop(ready);
        if read == Err(Errno::EAGAIN) {
            continue;
        }
        if let Err(error) = arm(&timer) {
            tracing::warn!(%error, "a further suspend of this host will be noticed late");
            return std::future::pending().await;
        }
        let now = slept();
        let sleep = now.saturating_sub(before);
        before = now;
        if sleep >= SLEEP_MIN {
            tracing::info!(?sleep, "the host has slept");
            registry.tell_all(|| Command::Woke).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_that_is_cancelled_by_a_jump_can_be_armed() {
        // Only a host that sleeps cancels it; but the kernel checks the flags when it is armed.
        let timer = armed().unwrap();
        let mut count = [0; 8];
        assert_eq!(
            nix::unistd::read(timer.as_fd(), &mut count),
            Err(Errno::EAGAIN)
        );
        assert!(slept() < Duration::from_secs(86_400 * 365));
    }
}
