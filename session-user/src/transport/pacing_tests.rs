//! The limit against a link with a queue.

use super::*;

const RATE: f64 = 6_250_000.0;

/// A link with a queue, and a sender that would send twice what the link carries.
struct Model {
    pacing: Pacing,
    now: Instant,
    sent: f64,
    queue: f64,
    base: f64,
    rate: f64,
    /// Packets wait for up to so long for other reasons than a queue, each for another time; what the kernel says of them is
    /// smoothed as RFC 6298 has it.
    jitter: f64,
    smooth: f64,
    deviation: f64,
    noise: u64,
    /// Delivery rates lack more than a segment of each round trip.
    whole_segments: bool,
    /// What is seen a round trip later: delay and delivery rate of each millisecond.
    seen: std::collections::VecDeque<(f64, f64)>,
}

impl Model {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            pacing: Pacing::new(None, now),
            now,
            sent: 0.0,
            queue: 0.0,
            base: 0.040,
            rate: RATE,
            jitter: 0.0,
            smooth: 0.0,
            deviation: 0.0,
            noise: 7,
            whole_segments: false,
            seen: std::collections::VecDeque::new(),
        }
    }

    fn part(&self) -> f64 {
        (self.noise >> 40) as f64 / f64::from(1 << 24)
    }

    /// How long packets of this millisecond wait, smoothed.
    fn wait(&mut self) -> f64 {
        // Knuth's MMIX.
        self.noise = (self.noise.wrapping_mul(6_364_136_223_846_793_005))
            .wrapping_add(1_442_695_040_888_963_407);
        let part = self.part();
        let error = part * self.jitter - self.smooth;
        self.smooth += error / 8.0;
        self.deviation += (error.abs() - self.deviation) / 4.0;
        self.smooth
    }

    /// Lets a millisecond pass; returns the bytes that came through.
    fn step(&mut self) -> f64 {
        let dt = 0.001;
        let wanted = 3.0 * RATE;
        let rate = self.pacing.limit().map_or(wanted, |l| wanted.min(l as f64));
        self.sent += rate * dt;
        let through = (self.queue + rate * dt).min(self.rate * dt);
        self.queue += rate * dt - through;
        self.now += Duration::from_millis(1);
        let sent = self.sent as u64;
        let rtt = self.base + self.queue / self.rate + self.wait();
        self.seen.push_back((rtt, through / dt));
        let news = (self.seen.len() > 40)
            .then(|| self.seen.pop_front())
            .flatten();
        if let Some((rtt, rate)) = news
            && self.pacing.is_due(sent, self.now)
        {
            let missing = if self.whole_segments {
                (1.0 + 0.4 * self.part()) * 1448.0 / rtt
            } else {
                0.0
            };
            let rate = (rate - missing).max(1.0);
            let info = TcpInfo {
                rtt: Duration::from_secs_f64(rtt),
                rttvar: Duration::from_secs_f64(self.deviation),
                min_rtt: Duration::from_secs_f64(self.base.min(0.040)),
                delivery_rate: rate as u64,
                snd_cwnd: 1000,
                snd_mss: 1448,
                ..TcpInfo::default()
            };
            self.pacing.look(&info, sent, self.now);
        }
        through
    }

    /// Mean rate and longest queue (in seconds) over `ms` milliseconds.
    fn run(&mut self, ms: usize) -> (f64, f64) {
        let mut longest: f64 = 0.0;
        let mut bytes = 0.0;
        for _ in 0..ms {
            bytes += self.step();
            longest = longest.max(self.queue / self.rate);
        }
        (bytes / (ms as f64 / 1000.0), longest)
    }
}

#[test]
fn the_queue_stays_short_and_the_link_is_used() {
    let mut model = Model::new();
    model.run(1000);
    let (rate, queue) = model.run(4000);
    assert!(queue < 0.025, "a queue of {queue} s");
    assert!(rate > 0.93 * RATE, "{} of the link", rate / RATE);
}

#[test]
fn a_path_that_became_longer_is_no_queue_for_ever() {
    let mut model = Model::new();
    model.run(1000);
    model.base = 0.120;
    model.run(3000);
    let (rate, _) = model.run(4000);
    assert!(rate > 0.85 * RATE, "{} of the link", rate / RATE);
}

#[test]
fn a_link_that_became_faster_is_used() {
    let mut model = Model::new();
    model.run(4000);
    model.rate = RATE * 2.0;
    model.run(3000);
    let (rate, _) = model.run(2000);
    assert!(rate > 1.8 * RATE, "{} of the old link", rate / RATE);
}

#[test]
fn what_waits_on_the_way_back_does_not_make_it_slow() {
    let mut model = Model::new();
    model.run(1000);
    // What the peer sends makes a queue now and then, and acknowledgements wait in it.
    for _ in 0..20 {
        model.base = 0.055;
        model.run(100);
        model.base = 0.040;
        model.run(400);
    }
    let (rate, _) = model.run(1000);
    assert!(rate > 0.85 * RATE, "{} of the link", rate / RATE);
}

/// On a slow link few segments are under way, and the kernel's samples are of whole ones: some say much less than is sent.
#[test]
fn samples_of_few_segments_do_not_keep_a_slow_link_slow() {
    for first in 0..20 {
        let mut model = Model::new();
        model.rate = 1_250_000.0;
        model.base = 0.020;
        model.noise = first;
        model.whole_segments = true;
        model.run(1000);
        // The limit is far too low, for whatever reason.
        model.pacing.limit = Some(400_000);
        model.pacing.before_queue = None;
        model.pacing.link_rate = None;
        model.run(6000);
        let (rate, _) = model.run(2000);
        let part = rate / model.rate;
        assert!(part > 0.85, "{part} of the link, noise {first}");
    }
}

/// A delay that comes and goes by itself is about as long as what is taken for a queue.
#[test]
fn a_path_that_jitters_is_used() {
    for jitter_ms in [4.0, 8.0, 12.0, 20.0, 40.0] {
        for first in 0..20 {
            let mut model = Model::new();
            model.jitter = jitter_ms / 1000.0;
            model.noise = first;
            model.run(2000);
            let (rate, queue) = model.run(6000);
            let part = rate / RATE;
            assert!(part > 0.9, "{part} of the link, jitter {jitter_ms} ms");
            assert!(
                queue < 0.025 + model.jitter,
                "a queue of {queue} s, jitter {jitter_ms} ms"
            );
        }
    }
}

#[test]
fn a_link_that_became_slower_is_followed() {
    let mut model = Model::new();
    model.run(1000);
    model.rate = RATE / 5.0;
    model.run(3000);
    let (rate, queue) = model.run(3000);
    assert!(queue < 0.060, "a queue of {queue} s");
    assert!(
        rate > 0.85 * model.rate,
        "{} of the link",
        rate / model.rate
    );
}

#[test]
fn a_path_that_is_known_is_not_overrun() {
    let mut model = Model::new();
    model.pacing = Pacing::new(Some(RATE as u64), model.now);
    let (rate, queue) = model.run(1000);
    assert!(queue < 0.025, "a queue of {queue} s");
    assert!(rate > 0.9 * RATE);
}

#[test]
fn losses_are_counted_over_many_segments() {
    let mut losses = Losses::default();
    let info = |delivered, retransmitted| TcpInfo {
        delivered,
        retransmitted,
        ..TcpInfo::default()
    };
    assert!(!losses.look(&info(100, 50)));
    assert!(losses.look(&info(1000, 50)));
    assert!(losses.look(&info(1100, 50)));
    assert!(!losses.look(&info(2000, 52)));
}

#[test]
fn a_standby_begins_with_what_the_session_had() {
    let mut pacing = Pacing::new(None, Instant::now());
    assert_eq!(pacing.adopt(5_000_000), Some(Paced::at(5_000_000)));
    assert_eq!(pacing.adopt(9_000_000), None);
}

#[test]
fn one_of_a_pair_finds_more_though_it_waits_for_the_other() {
    let now = Instant::now();
    let mut pacing = Pacing::new(Some(1_000_000), now);
    let mut told = pacing.pair(1_000_000);
    for round in 1..60 {
        let info = TcpInfo {
            rtt: Duration::from_millis(40),
            min_rtt: Duration::from_millis(40),
            delivery_rate: told.limit - told.limit / 20,
            app_limited: true,
            ..TcpInfo::default()
        };
        pacing.look(
            &info,
            round * 100_000,
            now + Duration::from_millis(40) * round as u32,
        );
        told = pacing.pair(pacing.limit().unwrap_or_default());
    }
    assert!(told.limit > 4_000_000, "{told:?}");
}

#[test]
fn an_idle_transport_is_left_alone() {
    let now = Instant::now();
    let pacing = Pacing::new(None, now);
    assert!(!pacing.is_due(1000, now + Duration::from_secs(60)));
    assert_eq!(Paced::at(1_000_000_000).unsent, 4_000_000);
    assert_eq!(Paced::at(LIMIT_MIN).unsent, 16 * 1024);
}

#[test]
fn the_socket_is_told_whatever_limit_holds() {
    let start = Instant::now();
    let mut pacing = Pacing::new(None, start);
    let mut told = None;
    for round in 1..400_u32 {
        // Queues of all lengths, of our making and not, while the application has pauses.
        let queue = Duration::from_millis(u64::from(round * 7 % 50));
        let info = TcpInfo {
            rtt: Duration::from_millis(40) + queue,
            min_rtt: Duration::from_millis(40),
            delivery_rate: u64::from(1 + round * 13 % 11) * 500_000,
            snd_cwnd: 20 + round * 17 % 400,
            snd_mss: 1448,
            app_limited: round.is_multiple_of(5),
            ..TcpInfo::default()
        };
        let now = start + Duration::from_millis(100) * round;
        let paced = pacing.look(&info, u64::from(round) * 100_000, now);
        told = paced.map(|paced| paced.limit).or(told);
        assert_eq!(told, pacing.limit(), "round {round}");
    }
    assert!(told.is_some());
}

/// Answers to a transfer the other way: 16 KiB in more than a second, in segments of 80 bytes, behind its queue.
#[test]
fn what_hardly_sends_says_nothing_of_the_link() {
    let mut now = Instant::now();
    let mut pacing = Pacing::new(Some(1_150_000), now);
    let mut sent = 0;
    for round in 0..40 {
        now += Duration::from_millis(1600);
        sent += 16 * 1024;
        assert!(pacing.is_due(sent, now));
        let info = TcpInfo {
            rtt: Duration::from_millis(if round % 3 == 0 { 20 } else { 70 }),
            min_rtt: Duration::from_millis(20),
            delivery_rate: 290_000,
            snd_cwnd: 10,
            snd_mss: 1448,
            ..TcpInfo::default()
        };
        pacing.look(&info, sent, now);
    }
    assert_eq!(pacing.limit(), Some(1_150_000));
    assert_eq!(pacing.rate(), None);
}

/// A first window overruns the queue. What is left of it comes through at the link's rate, while the kernel still has the
/// rate of the handshake.
#[test]
fn a_burst_that_was_lost_in_part_is_no_slow_link() {
    let mut now = Instant::now();
    let mut pacing = Pacing::new(None, now);
    let mut info = TcpInfo {
        rtt: Duration::from_millis(32),
        min_rtt: Duration::from_millis(20),
        delivery_rate: 60_307,
        app_limited: true,
        snd_cwnd: 263,
        snd_mss: 1448,
        delivered: 5,
        ..TcpInfo::default()
    };
    now += Duration::from_millis(30);
    pacing.look(&info, 60_000, now);
    info.app_limited = false;
    info.rtt = Duration::from_millis(50);
    info.snd_cwnd = 5;
    info.delivered += 60;
    now += Duration::from_millis(100);
    pacing.look(&info, 260_000, now);
    let limit = pacing.limit().unwrap();
    assert!((300_000..1_250_000).contains(&limit), "{limit}");
}
