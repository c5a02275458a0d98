//! Messages of the eBPF programs, passed on to the agent's log.

use aya_log::EbpfLogger;
use tokio::{io::unix::AsyncFd, task::JoinHandle};
use tracing_log::log as facade;

use super::{CaptureError, kernel::Kernel};

/// Drains the programs' ring buffer until it is dropped. The buffer holds 128 KiB; what does not fit is lost, capture
/// goes on.
#[derive(Debug)]
pub struct LogTask {
    task: JoinHandle<()>,
}

impl LogTask {
    /// Starts draining on the current tokio runtime.
    pub fn start(kernel: &mut Kernel) -> Result<Self, CaptureError> {
        let logger = kernel.logger(ToTracing)?;
        // SAFETY: the logger keeps the descriptor of its ring buffer for its whole life, and the registration owns it.
        let logger =
            unsafe { AsyncFd::register_with_interest(logger, tokio::io::Interest::READABLE) };
        let logger = logger.map_err(|error| CaptureError::Runtime {
            what: "watch the log buffer of the eBPF programs",
            source: error.into_parts().1,
        })?;
        Ok(Self {
            task: tokio::spawn(drain(logger)),
        })
    }
}

impl Drop for LogTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn drain(mut logger: AsyncFd<EbpfLogger<ToTracing>>) {
    // An error means that the runtime is shutting down.
    while let Ok(mut guard) = logger.readable_mut().await {
        guard.get_inner_mut().flush();
        guard.clear_ready();
    }
}

/// Gives the records of aya-log to tracing.
#[derive(Clone, Copy, Debug)]
pub struct ToTracing;

impl facade::Log for ToTracing {
    fn enabled(&self, _: &facade::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &facade::Record<'_>) {
        const TARGET: &str = "holdfast::ebpf";
        let place = record.target();
        let message = record.args();
        match record.level() {
            facade::Level::Error => tracing::error!(target: TARGET, place, "{message}"),
            facade::Level::Warn => tracing::warn!(target: TARGET, place, "{message}"),
            facade::Level::Info => tracing::info!(target: TARGET, place, "{message}"),
            facade::Level::Debug => tracing::debug!(target: TARGET, place, "{message}"),
            facade::Level::Trace => tracing::trace!(target: TARGET, place, "{message}"),
        }
    }

    fn flush(&self) {}
}
