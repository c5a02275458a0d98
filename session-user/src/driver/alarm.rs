//! The driver's one timer.
//!
//! Nearly every turn moves the next deadline: what is acknowledged within milliseconds, and comes again with the next
//! record. A timer that is set to an earlier time than the runtime sleeps until has it wake itself through a
//! descriptor at once (tokio's `time::Handle::reregister`); done in each turn that is a system call per record, and another
//! wait that ends at once. So the timer stays where it is when the deadline moves away, and is set anew once it fires.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use tokio::time::{Sleep, sleep_until};

/// Rings at the deadline.
pub(super) struct Alarm {
    /// Not later than the deadline; kept, so that a turn allocates nothing.
    timer: Pin<Box<Sleep>>,
    /// When the timer fires; None: it has, or never was set.
    fires_at: Option<Instant>,
    deadline: Option<Instant>,
}

impl Alarm {
    /// One that never rings.
    pub fn new() -> Self {
        Self {
            timer: Box::pin(sleep_until(now().into())),
            fires_at: None,
            deadline: None,
        }
    }

    /// From now on it rings at `deadline`; never, if there is none. True: it must be polled, or nobody is told.
    #[must_use]
    pub fn set(&mut self, deadline: Option<Instant>) -> bool {
        self.deadline = deadline;
        let Some(at) = deadline else { return false };
        let sooner = self.fires_at.is_none_or(|fires_at| at < fires_at);
        if sooner {
            self.timer.as_mut().reset(at.into());
            self.fires_at = Some(at);
        }
        sooner
    }

    /// Ready at the deadline, once.
    pub fn poll_rings(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.fires_at.is_some() {
            ready!(self.timer.as_mut().poll(cx));
            self.fires_at = None;
            match self.deadline {
                // It is polled in the next round.
                Some(at) if at > now() => _ = self.set(Some(at)),
                Some(_) => return Poll::Ready(()),
                None => {}
            }
        }
        Poll::Pending
    }
}

/// The runtime's time: the host's, but where a test moves it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::time::Duration;
    use tokio::time::timeout;

    const SECOND: Duration = Duration::from_secs(1);

    /// After how many seconds it rings.
    async fn rings_after(alarm: &mut Alarm) -> Option<u64> {
        let began = now();
        let rings = poll_fn(|cx| alarm.poll_rings(cx));
        timeout(1000 * SECOND, rings).await.ok()?;
        Some((now() - began).as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn it_rings_at_its_deadline_and_never_without_one() {
        let mut alarm = Alarm::new();
        assert_eq!(rings_after(&mut alarm).await, None);
        _ = alarm.set(Some(now() + 10 * SECOND));
        assert_eq!(rings_after(&mut alarm).await, Some(10));
        assert_eq!(rings_after(&mut alarm).await, None);
        _ = alarm.set(Some(now()));
        assert_eq!(rings_after(&mut alarm).await, Some(0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_moves_both_ways_and_goes() {
        let mut alarm = Alarm::new();
        _ = alarm.set(Some(now() + 10 * SECOND));
        _ = alarm.set(Some(now() + 20 * SECOND));
        assert_eq!(rings_after(&mut alarm).await, Some(20));
        _ = alarm.set(Some(now() + 20 * SECOND));
        _ = alarm.set(Some(now() + 10 * SECOND));
        assert_eq!(rings_after(&mut alarm).await, Some(10));
        _ = alarm.set(Some(now() + 10 * SECOND));
        _ = alarm.set(None);
        assert_eq!(rings_after(&mut alarm).await, None);
    }

    /// As a driver does that is busy otherwise.
    #[tokio::test(start_paused = true)]
    async fn it_may_be_let_go_of_at_any_time() {
        let mut alarm = Alarm::new();
        let end = now() + 50 * SECOND;
        for _ in 0..40 {
            _ = alarm.set(Some(end));
            let rings = poll_fn(|cx| alarm.poll_rings(cx));
            assert!(timeout(SECOND, rings).await.is_err());
        }
        assert_eq!(rings_after(&mut alarm).await, Some(10));
    }
}
