//! From the configuration to what sessions are made with.

use std::sync::Arc;

use ring::rand::{SecureRandom, SystemRandom};
use session_proto::session::SharedMemory;
use session_proto::wire::Service;

use super::compression;
use crate::config::Config;
use crate::handshake::IdentityPaths;
use crate::policy::{Lanes, PolicyConfig, ServiceRule, ServiceRules, StandbyConfig};
use crate::transport::{Congestion, InitialWindow, TransportOptions};

/// The files of the configured identity.
pub fn identity_paths(config: &Config) -> IdentityPaths {
    let identity = &config.identity;
    IdentityPaths {
        certificate: identity.certificate.clone(),
        key: identity.key.clone(),
        ca: identity.ca.clone(),
        crl: identity.crl.clone(),
    }
}

/// Limits of every session.
pub(super) fn session_config(config: &Config) -> anyhow::Result<session_proto::session::Config> {
    let mut instance = [0; 16];
    SystemRandom::new()
        .fill(&mut instance)
        .map_err(|_| anyhow::anyhow!("the kernel gives no random bytes"))?;
    Ok(session_proto::session::Config {
        instance,
        software: format!("holdfast {}", env!("CARGO_PKG_VERSION")),
        memory_bytes: config.session.memory_bytes,
        shared_memory: SharedMemory::new(memory_total(&config.session)),
        max_streams: config.accept.as_ref().map_or(4096, |a| a.max_streams),
        rekey_records: config.session.rekey_records,
        rekey_after: config.session.rekey_after,
        compression: compression::of_all(config),
        // Without [accept] nobody is dialled for.
        max_flows: config.accept.as_ref().map_or(0, |a| a.max_flows),
        flow_idle: config.session.flow_idle,
        ..session_proto::session::Config::default()
    })
}

/// Bytes that all sessions may hold: as the operator says, or a part of what the host has.
fn memory_total(session: &crate::config::Session) -> usize {
    let of_host = || {
        let info = nix::sys::sysinfo::sysinfo().ok()?;
        usize::try_from(info.ram_total() / 4).ok()
    };
    session
        .memory_total_bytes
        .or_else(of_host)
        .map_or(usize::MAX, |bytes| bytes.max(session.memory_bytes))
}

/// The lift of initial windows; without it transports start as slowly as the kernel has them start.
pub(super) fn initial_window(config: &Config) -> Option<Arc<InitialWindow>> {
    let listen = config.accept.as_ref().map(|a| a.listen.as_slice());
    let attached = crate::capture::cgroup::own()
        .map_err(anyhow::Error::from)
        .and_then(|own| Ok(InitialWindow::attach(&own, listen.unwrap_or_default())?));
    match attached {
        Ok(window) => Some(Arc::new(window)),
        Err(error) => {
            tracing::warn!(%error, "initial windows stay as they are, so that handovers under load take longer; CAP_BPF and CAP_NET_ADMIN lift them");
            None
        }
    }
}

/// Options of transport sockets.
pub(super) fn transport_options(config: &Config) -> TransportOptions {
    let usual = TransportOptions::default();
    TransportOptions {
        // The kernel waits for so long after each probe, answered or not.
        keepalive_interval: usual.keepalive_interval.min(config.transport.keepalive),
        notsent_lowat: config.transport.notsent_lowat,
        user_timeout: config.transport.user_timeout,
        keepalive_idle: config.transport.keepalive,
        fast_open: config.transport.fast_open,
        congestion: match config.transport.congestion.as_str() {
            "host" => Congestion::Host,
            "auto" => Congestion::Auto,
            name => Congestion::Named(name.to_owned()),
        },
        ..usual
    }
}

/// Further transports on the link in use.
pub(super) fn lanes(configured: crate::config::Lanes) -> Lanes {
    match configured {
        crate::config::Lanes::Bulk(0) => Lanes::Shared,
        crate::config::Lanes::Bulk(n) => Lanes::Bulk(n),
        crate::config::Lanes::PerStream => Lanes::PerStream,
    }
}

/// What streams get. With a lane for each, all have one of their own that no rule names.
pub(super) fn service_rules(config: &Config) -> ServiceRules {
    let rule = |s: &crate::config::Stream| ServiceRule {
        to: s.to.clone(),
        ports: s.ports.clone(),
        cgroups: s.cgroups.clone(),
        service: compression::said(config, s.service),
    };
    ServiceRules {
        rules: config.streams.iter().map(rule).collect(),
        default: compression::said(
            config,
            Service {
                own_lane: config.transport.lanes == crate::config::Lanes::PerStream,
                ..Service::default()
            },
        ),
    }
}

/// Which links are wanted, and what for.
pub(super) fn policy_config(config: &Config) -> PolicyConfig {
    let links = &config.links;
    PolicyConfig {
        prefer: links.prefer.clone(),
        exclude: links.exclude.clone(),
        standby: StandbyConfig {
            metered: links.metered.clone(),
            warm: links.warm.clone(),
            cold: links.cold.clone(),
            never: links.never.clone(),
        },
        manual: None,
    }
}
