//! A coordinator's answers to operators over HTTP.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use elbo_net::Operations;
use tokio_util::sync::CancellationToken;

use crate::service::{Shared, short};
use crate::status::{self, JobStatus, Phase};

/// A running coordinator, as operators see it.
#[derive(Debug)]
pub struct JobOperations {
    shared: Arc<Shared>,
    /// Cancelled when the coordinator is asked to stop.
    stop: CancellationToken,
}

impl JobOperations {
    pub(crate) fn new(shared: Arc<Shared>, stop: CancellationToken) -> Self {
        Self { shared, stop }
    }

    fn job_status(&self) -> (crate::Progress, JobStatus) {
        let progress = self.shared.publish();
        let reply = status::reply(&progress, self.shared.phase());
        (progress, reply.into())
    }
}

impl Operations for JobOperations {
    fn ready(&self) -> Result<(), String> {
        match self.shared.phase() {
            // Running commits are finished first.
            Phase::Working if self.stop.is_cancelled() => return Err("stopping".into()),
            Phase::Working => self.shared.ledger.check().map_err(|error| error.to_string())?,
            Phase::Stopping => return Err("stopping".into()),
            // Its workers wait while the next job is prepared.
            Phase::Followed => return Err("starting".into()),
        }
        if self.shared.telemetry.serving.load(Ordering::Relaxed) { Ok(()) } else { Err("starting".into()) }
    }

    fn metrics(&self) -> String {
        let progress = self.shared.publish();
        let ready = self.shared.scheduler().ready_evaluations();
        self.shared.telemetry.encode(&progress, ready)
    }

    fn status(&self) -> serde_json::Value {
        // A struct of texts and numbers always serialises.
        serde_json::to_value(self.job_status().1).unwrap_or_default()
    }

    fn page(&self) -> String {
        let (progress, status) = self.job_status();
        let epoch = self.shared.ledger.epoch().0;
        status::page(short(&self.shared.record.fingerprint), epoch, &progress, &status)
    }
}
