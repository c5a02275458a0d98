//! Attaching, detaching, death of the agent, and its log.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    rc::Rc,
    sync::{Arc, Mutex},
    thread,
    time::Instant,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Uid, setuid},
};
use session_ebpf_common::NetnsOfThread;
use tokio::task::LocalSet;
use tracing::{field::Visit, level_filters::LevelFilter, span};

use super::harness::{
    App, HERE4, PATIENCE, ask, capture, captured, direct, direct_server, everything, in_netns,
    quiet, run, scope, serve,
};
use crate::capture::{
    Capture, CaptureConfig, CaptureError, LocalBypass, Scope, kernel::verified,
    kernel_types::netns_of_thread, probe,
};

#[test]
fn detached_cgroups_are_left_alone() {
    in_netns(async || {
        let server = direct_server(HERE4);
        let (mut capture, scope) = capture(&[everything()]);
        assert_eq!(capture.attached(), [scope.path()]);
        let again = capture.attach(scope.path());
        assert!(
            matches!(again, Err(CaptureError::AlreadyAttached { .. })),
            "{again:?}"
        );
        quiet(|| capture.detach(scope.path())).unwrap();
        assert!(capture.attached().is_empty());
        assert_eq!(run(&scope, move || ask(server)).await, Ok(direct(server)));
        let again = capture.detach(scope.path());
        assert!(
            matches!(again, Err(CaptureError::NotAttached { .. })),
            "{again:?}"
        );
        capture.attach(scope.path()).unwrap();
        let _reports = serve(Rc::new(capture));
        assert_eq!(
            run(&scope, move || ask(server)).await,
            Ok(captured(&server.to_string(), 1))
        );
    });
}

#[test]
fn a_removed_cgroup_can_be_detached() {
    in_netns(async || {
        let (mut capture, scope) = capture(&[everything()]);
        let path = scope.path().to_owned();
        scope.remove().unwrap();
        quiet(|| capture.detach(&path)).unwrap();
        assert!(matches!(
            capture.attach(&path),
            Err(CaptureError::MissingCgroup { .. })
        ));
    });
}

#[test]
fn a_cgroup_made_again_is_attached_again() {
    in_netns(async || {
        let (mut capture, parent) = capture(&[]);
        capture.update_rules(&[everything()]).unwrap();
        quiet(|| capture.detach(parent.path())).unwrap();
        let service = Scope::create(parent.path(), "service").unwrap();
        let name = Path::new("/")
            .join(parent.path().file_name().unwrap())
            .join("service");
        capture.attach(&name).unwrap();
        assert_eq!(
            capture.reattach(),
            Vec::<std::path::PathBuf>::new(),
            "it is still the same"
        );
        service.remove().unwrap();
        let service = Scope::create(parent.path(), "service").unwrap();
        assert_eq!(capture.reattach(), [service.path()]);
        let capture = Rc::new(capture);
        let _reports = serve(capture.clone());
        assert_eq!(
            run(&service, || ask("192.0.2.1:80")).await,
            Ok(captured("192.0.2.1:80", 1))
        );
        drop((service, parent));
    });
}

#[test]
fn an_unprivileged_agent_is_told_what_it_lacks() {
    in_netns(async || {
        let scope = scope();
        let result = run(&scope, || {
            // In a thread, because the forked one carries the test's runtime.
            let load = || {
                setuid(Uid::from_raw(65534))?;
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                let _guard = runtime.enter();
                Ok(format!("{:?}", Capture::load(&CaptureConfig::default())))
            };
            thread::spawn(load)
                .join()
                .map_err(|_| io::Error::other("panicked"))?
        });
        let said = result.await.unwrap();
        assert!(said.contains("Privileges"), "{said}");
        assert!(
            said.contains(r#"["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]"#),
            "{said}"
        );
    });
}

/// Whoever may load no program is told of no place in the kernel's memory, though its description is for all to read.
#[test]
fn the_kernel_is_asked_whether_programs_may_read_its_memory() {
    in_netns(async || {
        let scope = scope();
        let asked = || Ok(format!("{}", netns_of_thread() != NetnsOfThread::default()));
        assert_eq!(run(&scope, asked).await, Ok("true".to_owned()));
        let unprivileged = run(&scope, move || {
            setuid(Uid::from_raw(65534))?;
            asked()
        });
        assert_eq!(unprivileged.await, Ok("false".to_owned()));
    });
}

#[test]
fn without_a_runtime_nothing_is_loaded() {
    let error = Capture::load(&CaptureConfig::default()).unwrap_err();
    assert!(matches!(error, CaptureError::Runtime { .. }), "{error}");
}

#[test]
fn nested_cgroups_capture_once() {
    in_netns(async || {
        let (mut capture, outer) = capture(&[everything()]);
        let inner = Scope::create(outer.path(), "inner").unwrap();
        capture.attach(inner.path()).unwrap();
        let capture = Rc::new(capture);
        let _reports = serve(capture.clone());
        for to in ["192.0.2.1:80", "[2001:db8::1]:80"] {
            assert_eq!(run(&inner, move || ask(to)).await, Ok(captured(to, 1)));
        }
        let counters = capture.counters();
        assert_eq!(
            (counters.captured4, counters.captured6, counters.delivered),
            (1, 1, 2),
            "{counters:?}"
        );
        assert_eq!(counters.in_flight, 0, "{counters:?}");
        inner.remove().unwrap();
    });
}

/// An agent in a process of its own, inside the cgroup that it captures. It connects to `to` itself, then serves.
fn agent_inside(scope: &Scope, to: SocketAddr) -> App {
    let path = scope.path().to_owned();
    App::start(scope, move || {
        // In a thread, because the forked one carries the test's runtime.
        thread::spawn(move || live(&path, to))
            .join()
            .map_err(|_| io::Error::other("the agent panicked"))?
    })
}

fn live(path: &Path, to: SocketAddr) -> io::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, async {
        let config = CaptureConfig {
            rules: vec![everything()],
            ..CaptureConfig::default()
        };
        let mut capture = Capture::load(&config).map_err(io::Error::other)?;
        capture.attach(path).map_err(io::Error::other)?;
        let own = ask(to)?;
        if own != direct(to) {
            return Ok(own);
        }
        let mut reports = serve(Rc::new(capture));
        while reports.recv().await.is_some() {}
        Ok("the agent ended".into())
    })
}

#[test]
fn an_agent_inside_the_captured_cgroup_and_its_death() {
    in_netns(async || {
        let server = direct_server(HERE4);
        let scope = scope();
        let agent = agent_inside(&scope, server);
        let pid = agent.pid();
        // The agent has no way to say that it is ready but to capture.
        let start = Instant::now();
        while run(&scope, move || ask(server)).await != Ok(captured(&server.to_string(), 1)) {
            assert!(
                start.elapsed() < PATIENCE,
                "the agent never captured: {:?}",
                agent.result().await
            );
        }
        kill(pid, Signal::SIGKILL).unwrap();
        let end = agent.result().await.unwrap_err();
        assert!(end.contains("SIGKILL"), "{end}");
        assert_eq!(run(&scope, move || ask(server)).await, Ok(direct(server)));
    });
}

/// Keeps what is logged under the target of the eBPF programs.
#[derive(Clone, Default)]
struct Keep(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Keep {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        if event.metadata().target() == "holdfast::ebpf" {
            let mut text = Text(String::new());
            event.record(&mut text);
            self.0
                .lock()
                .unwrap()
                .push(format!("{} {}", event.metadata().level(), text.0));
        }
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[test]
fn messages_of_the_programs_reach_the_log() {
    in_netns(async || {
        let kept = Keep::default();
        let _guard = tracing::subscriber::set_default(kept.clone());
        let (capture, scope) = capture(&[everything()]);
        let _reports = serve(Rc::new(capture));
        run(&scope, || ask("192.0.2.77:80")).await.unwrap();
        let start = Instant::now();
        run(&scope, || ask("[2001:db8::77]:81")).await.unwrap();
        let wanted = [
            "DEBUG captured 192.0.2.77:80 for peer 1",
            "DEBUG captured [2001:db8::77]:81 for peer 1",
        ];
        while !wanted
            .iter()
            .all(|wanted| kept.0.lock().unwrap().iter().any(|line| line == wanted))
        {
            assert!(
                start.elapsed() < PATIENCE,
                "only {:?}",
                kept.0.lock().unwrap()
            );
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn messages_below_the_level_are_never_made() {
    in_netns(async || {
        let kept = Keep::default();
        let _guard = tracing::subscriber::set_default(kept.clone());
        let (capture, scope) = capture(&[]);
        quiet(|| drop(capture));
        let mut capture = Capture::load(&CaptureConfig {
            rules: vec![everything()],
            ..CaptureConfig::default()
        })
        .unwrap();
        capture.attach(scope.path()).unwrap();
        capture.close();
        // Would be said at debug level; the default is warn.
        run(&scope, || ask("192.0.2.77:80")).await.unwrap_err();
        assert_eq!(capture.counters().agent_gone, 1);
        tokio::task::yield_now().await;
        assert_eq!(*kept.0.lock().unwrap(), Vec::<String>::new());
    });
}

#[test]
fn the_verifier_has_room_to_spare() {
    in_netns(async || {
        // At the level that compiles all messages in. Other kernels prune less well than this one: connect6, which decides
        // about connections, datagrams and questions about names, walks a tenth of what is allowed.
        let config = CaptureConfig {
            log: LevelFilter::TRACE,
            bypass: LocalBypass::On,
            ..CaptureConfig::default()
        };
        let capture = Capture::load(&config).unwrap();
        assert!(capture.kernel.bypass.is_some(), "it has code of its own");
        for (name, count) in verified(&capture.kernel) {
            assert!(
                count < 150_000,
                "{name}: the verifier walked {count} of at most 1,000,000 instructions"
            );
        }
    });
}

#[test]
fn the_probe_finds_everything_here() {
    let checks = probe();
    assert_eq!(checks.len(), 9);
    for check in checks {
        assert!(check.ok, "{check:?}");
        assert!(
            !check.detail.is_empty() && check.advice.is_empty(),
            "{check:?}"
        );
    }
}
