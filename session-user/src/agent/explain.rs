//! What becomes of a connection: the capture's answer, with what the rest of the agent knows.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use session_proto::wire::{Packing, Target};

use super::commands::{Shared, capture_failed};
use super::reports::{mode_word, peer_report};
use super::service_rules;
use crate::capture::{Explanation, NAMED_PEER, Protocol, Question, Survey, Verdict, cgroup};
use crate::control::{
    Asked, ControlError, Credentials, ErrorCode, ExplainReport, NameReport, PassedReport,
    RuleReport, ServiceReport, TARGETS_MAX, TargetReport,
};
use crate::driver::SessionSnapshot;
use crate::names::Decision;

const ELSEWHERE: &str = "this command is in another network namespace than the agent, which listens there as soon as \
                         it hears of a captured process in it";
const ALL_ELSEWHERE: &str = "its processes are in another network namespace than the agent, which listens there as soon \
                             as it hears of them";
const MIXED: &str =
    "its processes are in several network namespaces: what is said is of the agent's own";

/// The number of the network namespace that is asked about, and what is to be known about that. Without a number it is
/// the agent's own: what cannot be read is not claimed to be another.
async fn netns_of(asked: &Asked, folder: &Path, who: Credentials) -> (Option<u64>, Option<String>) {
    if asked.cgroup.is_none() {
        let link = format!("/proc/{}/ns/net", who.pid);
        return (fs::metadata(link).ok().map(|data| data.ino()), None);
    }
    // A cgroup can have many processes. One that cannot be looked at is not claimed to be elsewhere.
    let survey = Survey::of(folder);
    let found = tokio::task::spawn_blocking(move || survey.look().namespaces()).await;
    match found.unwrap_or_default().as_slice() {
        [] => (None, None),
        [one] => (Some(*one), None),
        _ => (None, Some(MIXED.to_owned())),
    }
}

impl Shared {
    /// Answers [`crate::control::Request::Explain`].
    pub(super) async fn explain(
        &self,
        asked: &Asked,
        who: Credentials,
    ) -> Result<ExplainReport, ControlError> {
        let captures = self.capture()?;
        let named = asked.name.as_ref();
        let named = named.and_then(|(name, port)| Some((self.name(name)?, *port)));
        let mut asked_about = asked.targets.clone();
        let report = named.map(|(report, port)| {
            if report.verdict == Verdict::Capture {
                let addresses = report.addresses.iter();
                asked_about = addresses.map(|ip| SocketAddr::new(*ip, port)).collect();
            }
            report
        });
        let empty = asked_about.is_empty() && asked.name.is_none();
        if empty || asked_about.len() > TARGETS_MAX {
            let message = format!("1 to {TARGETS_MAX} addresses can be asked about at once");
            return Err(ControlError::new(ErrorCode::Invalid, message, ""));
        }
        let folder = match &asked.cgroup {
            Some(path) => cgroup::folder(path),
            None => cgroup::of_process(who.pid),
        };
        let failed = |error| capture_failed(super::captures::Error::Capture(error));
        let folder = folder.map_err(failed)?;
        let name = cgroup::below_root(&folder).map_err(failed)?;
        let uid = asked.uid.unwrap_or(who.uid);
        let question = |to: &SocketAddr| Question {
            to: SocketAddr::new(to.ip().to_canonical(), to.port()),
            uid,
            protocol: asked.protocol,
        };
        let questions: Vec<Question> = asked_about.iter().map(question).collect();
        let (netns, note) = netns_of(asked, &folder, who).await;
        let answers = captures.explain(&folder, netns, questions.clone()).await;
        let answers = answers.map_err(capture_failed)?;
        let sessions = self.registry.snapshots().await;
        let targets = questions.iter().zip(&answers);
        let targets =
            targets.map(|(question, answer)| self.target(question, answer, &name, &sessions));
        let first = answers.first();
        Ok(ExplainReport {
            protocol: asked.protocol,
            uid,
            attachment: first.and_then(|answer| answer.attachment.clone()),
            filter: first.and_then(|answer| Some(answer.filter.as_ref()?.0.clone())),
            note: note.or_else(|| {
                let nobody = !first?.listens;
                let all = asked.cgroup.is_some();
                nobody.then(|| if all { ALL_ELSEWHERE } else { ELSEWHERE }.to_owned())
            }),
            targets: targets.collect(),
            name: report,
            cgroup: name,
        })
    }

    fn target(
        &self,
        question: &Question,
        answer: &Explanation,
        cgroup: &str,
        sessions: &[SessionSnapshot],
    ) -> TargetReport {
        let named = self.named(question, answer);
        let answer = named.as_ref().map_or(answer, |(_, answer)| answer);
        let rule = answer.rule.and_then(|position| self.rule(position));
        let passed = answer.passed.iter().filter_map(|(position, why)| {
            Some(PassedReport {
                number: position + 1,
                line: self.config.captures.get(*position)?.line,
                why: why.clone(),
            })
        });
        let peer = answer.peer.and_then(|index| self.peers.get(index as usize));
        let streams = peer.is_some() && question.protocol == Protocol::Tcp;
        TargetReport {
            address: question.to,
            name: named.as_ref().and_then(|(name, _)| name.clone()),
            verdict: answer.verdict,
            reason: answer.reason.clone(),
            agent_dead: answer.agent_dead,
            rule,
            passed: passed.collect(),
            filter_keeps: answer.filter.as_ref().map(|(_, keeps)| *keeps),
            peer: peer.map(|peer| peer_report(peer, sessions)),
            stream: streams.then(|| self.service(question.to, cgroup)),
        }
    }

    fn rule(&self, position: usize) -> Option<RuleReport> {
        let capture = self.config.captures.get(position)?;
        Some(RuleReport {
            number: position + 1,
            file: self.file.clone(),
            line: capture.line,
            says: capture.rule.to_string(),
        })
    }

    /// What becomes of a name, if any rule is for names.
    fn name(&self, typed: &str) -> Option<NameReport> {
        let names = self.names.as_ref()?;
        let (name, decision) = names.decide(typed);
        let (verdict, rule) = match decision {
            Decision::Capture(rule) => (Verdict::Capture, Some(rule)),
            Decision::Refuse(rule) => (Verdict::Refuse, Some(rule)),
            Decision::Direct(rule) => (Verdict::Direct, rule),
        };
        let addresses = match verdict {
            Verdict::Capture => names.book.answer(&name, Instant::now()),
            _ => None,
        };
        let addresses = addresses.map(|a| vec![IpAddr::V4(a.v4), IpAddr::V6(a.v6)]);
        Some(NameReport {
            name,
            verdict,
            rule: rule.and_then(|position| self.rule(position)),
            addresses: addresses.unwrap_or_default(),
        })
    }

    /// What the agent itself decides about a connection to an address that stands for a name: the programs only know
    /// that it does. With the name, if there is one.
    fn named(
        &self,
        question: &Question,
        answer: &Explanation,
    ) -> Option<(Option<String>, Explanation)> {
        let names = self.names.as_ref()?;
        let (ip, port) = (question.to.ip(), question.to.port());
        if answer.peer != Some(NAMED_PEER) || !names.book.is_reserved(ip) {
            return None;
        }
        let name = names.book.name_of(ip);
        let way = name.as_ref().and_then(|name| {
            let protocol = question.protocol;
            names.rules.way(name, port, protocol)
        });
        let mut told = Explanation {
            rule: way.map(|way| way.rule),
            peer: way.map(|way| way.peer),
            passed: name.as_ref().map_or_else(Vec::new, |name| {
                let rule = way.map(|way| way.rule);
                names.rules.passed(name, port, question.protocol, rule)
            }),
            ..answer.clone()
        };
        if answer.verdict == Verdict::Capture {
            let (verdict, reason) = match (&name, way) {
                (None, _) => (Verdict::Refuse, "its address stands for no name".to_owned()),
                (Some(name), None) => (
                    Verdict::Refuse,
                    format!("no rule captures this port of {name}"),
                ),
                (Some(name), Some(_)) => (
                    Verdict::Capture,
                    format!("it stands for {name}, which the peer resolves"),
                ),
            };
            (told.verdict, told.reason) = (verdict, reason);
        }
        Some((name.map(|name| name.to_string()), told))
    }

    /// How a stream from `cgroup` uses the links, as the driver chooses it.
    fn service(&self, to: SocketAddr, cgroup: &str) -> ServiceReport {
        let rules = service_rules(&self.config);
        let below_root = cgroup.trim_start_matches('/').to_owned();
        let found = rules.find(&Target::Addr(to), || Some(below_root));
        let service = found.map_or(rules.default, |position| rules.rules[position].service);
        let line = found.and_then(|position| Some(self.config.streams.get(position)?.line));
        ServiceReport {
            number: found.map(|position| position + 1),
            line,
            links: mode_word(service.mode).to_owned(),
            own_lane: service.own_lane,
            compression: match service.packing {
                Packing::Unsaid => self.config.transport.compression.packing(),
                packing => packing,
            }
            .name()
            .to_owned(),
        }
    }
}
