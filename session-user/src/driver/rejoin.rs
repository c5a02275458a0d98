//! A full handshake with a peer that says that it does not know the session.

use std::sync::Arc;
use std::time::Instant;

use super::carrier::Path;
use super::establish::{self, EstablishError, Established};
use super::{Driver, Ended, Internal, Side};
use crate::policy;

impl Driver {
    /// "Unknown session" is a hint that anybody on the path could send. A full handshake tells.
    pub(super) fn rejoin(&mut self, path: &Path) {
        let internal = self.internal_tx.clone();
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        if initiator.rejoining.is_some() {
            return;
        }
        let config = &initiator.config;
        tracing::warn!(peer = %config.peer_name, "the peer does not know the session: asking it in a full handshake");
        let request = establish::Request {
            identity: Arc::clone(&self.common.identity),
            peer_name: config.peer_name.clone(),
            path: policy::Path {
                link: path.link.clone(),
                source: path.local.ip(),
                remote: path.remote,
            },
            dial_timeout: config.dial_timeout,
            segment: initiator
                .history
                .segment(&path.link, path.remote, Instant::now()),
            handshake_timeout: config.handshake_timeout,
            transport: self.common.transport.clone(),
            window: self.common.window.clone(),
            session: config.session.clone(),
            continues: Some((self.session.id(), self.session.next_counter())),
        };
        let task = tokio::spawn(async move {
            let path = request.path.clone();
            let result = establish::initiate(request).await.map(Box::new);
            // The driver may have ended meanwhile; then the new session ends here.
            let _ = internal.send(Box::new(Internal::Rejoined { path, result }));
        });
        initiator.rejoining = Some(task.abort_handle());
    }

    pub(super) fn rejoined(
        &mut self,
        path: &policy::Path,
        result: Result<Box<Established>, EstablishError>,
    ) {
        let Side::Initiator(initiator) = &mut self.side else {
            return;
        };
        initiator.rejoining = None;
        match result {
            Ok(new) if new.session.peer().continued == Some(true) => {
                tracing::info!("the peer still holds the session: resuming it");
                tokio::spawn(new.decline());
                self.decide();
            }
            Ok(new) => {
                tracing::error!(peer = %initiator.config.peer_name, "the peer no longer knows the session: its streams are reset");
                self.ended.get_or_insert(Ended::Replaced(new));
            }
            Err(error) => {
                tracing::warn!(%error, "the full handshake failed");
                self.path_failed(&path.link, path.remote, error.is_refused(), false);
            }
        }
    }
}
