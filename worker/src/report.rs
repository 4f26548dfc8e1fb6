//! Delivering results: what is not acknowledged is kept and sent again, to a restarted coordinator too.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use elbo_common::ids::LeaseKey;
use elbo_proto::v1;
use tokio::sync::mpsc;

use crate::client::{CallError, Client, ClientError};
use crate::engine::UnitErrors;
use crate::held::Held;
use crate::prepare::BadSample;

/// Results are gathered this long before they are sent: a crash loses no more than this and what is being computed.
const GATHER: Duration = Duration::from_millis(500);

/// Something to report.
#[derive(Debug)]
pub enum Finding {
    /// A unit is finished.
    Unit(UnitErrors),
    /// A sample is beyond help.
    Bad(BadSample),
}

/// What a reporter is told: something found under a lease, or that nothing more will come for a while, so that what there is
/// should be sent now.
pub type Told = Option<(LeaseKey, Finding)>;

/// Sends findings as they come until the channel closes and all is acknowledged.
///
/// Rejoining is the worker's business: here it is only waited for.
#[derive(Debug)]
pub struct Reporter {
    /// The coordinator.
    pub client: Client,
    /// Who this worker is, for joining again.
    pub host: String,
    /// Its device, likewise.
    pub device: String,
    /// Findings.
    pub findings: mpsc::UnboundedReceiver<Told>,
    /// Evaluations acknowledged so far.
    pub acknowledged: Arc<AtomicU64>,
    /// The blocks in hand.
    pub held: Held,
}

impl Reporter {
    /// Runs until every finding is acknowledged and no more will come.
    pub async fn run(mut self) -> Result<(), ClientError> {
        while let Some(first) = self.findings.recv().await {
            let Some(first) = first else { continue };
            let mut gathered = vec![first];
            let deadline = tokio::time::Instant::now() + GATHER;
            while let Ok(Some(Some(next))) = tokio::time::timeout_at(deadline, self.findings.recv()).await {
                gathered.push(next);
            }
            for (key, report) in by_lease(&self.client.worker, gathered) {
                self.deliver(key, report).await?;
            }
        }
        Ok(())
    }

    async fn deliver(&self, key: LeaseKey, mut report: v1::ReportRequest) -> Result<(), ClientError> {
        let evaluations: u64 = report.results.iter().map(|r| u64::from(r.slots) * r.prompts.len() as u64).sum();
        loop {
            match self.client.report(&mut report).await {
                Ok(reply) => {
                    tracing::debug!(
                        epoch = key.epoch.0,
                        lease = key.lease.0,
                        reply.accepted,
                        reply.duplicates,
                        "acknowledged"
                    );
                    break;
                }
                Err(CallError::Rejoin) => match self.client.join(&self.host, &self.device, self.held.blocks()).await {
                    Err(CallError::Fatal(error)) => return Err(error),
                    Err(CallError::OtherJob) => {
                        tracing::warn!("the coordinator has another job: what was found for the one before is dropped");
                        break;
                    }
                    _ => continue,
                },
                // Only a join is answered so.
                Err(CallError::OtherJob) => break,
                Err(CallError::Rejected(reason)) => {
                    tracing::error!(
                        epoch = key.epoch.0,
                        lease = key.lease.0,
                        reason,
                        "the coordinator refused a report: it is dropped"
                    );
                    break;
                }
                Err(CallError::Fatal(error)) => return Err(error),
            }
        }
        self.acknowledged.fetch_add(evaluations, Ordering::Relaxed);
        self.held.acknowledge(key, &report);
        Ok(())
    }
}

fn by_lease(worker: &str, findings: Vec<(LeaseKey, Finding)>) -> BTreeMap<LeaseKey, v1::ReportRequest> {
    let mut reports = BTreeMap::new();
    for (key, finding) in findings {
        let report = reports.entry(key).or_insert_with(|| v1::ReportRequest {
            worker: worker.to_owned(),
            epoch: key.epoch.0,
            lease: key.lease.0,
            ..v1::ReportRequest::default()
        });
        match finding {
            Finding::Unit(unit) => report.results.push(unit_result(unit)),
            Finding::Bad(BadSample { sample, stage, error }) => {
                report.failures.push(v1::SampleFailure { sample: sample.0, stage: stage.to_owned(), error });
            }
        }
    }
    reports
}

fn unit_result(finished: UnitErrors) -> v1::UnitResult {
    let UnitErrors { unit, sums, errors } = finished;
    v1::UnitResult {
        id: Some(unit.id.into()),
        prompts: unit.prompts.iter().map(|p| p.0).collect(),
        slots: unit.slots.len() as u32,
        sum: sums.iter().map(|s| s.sum).collect(),
        sum_sq: sums.iter().map(|s| s.sum_sq).collect(),
        errors,
    }
}
