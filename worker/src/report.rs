//! Delivering results: what is not acknowledged is kept and sent again, to a restarted coordinator too.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use elbo_proto::v1;
use tokio::sync::mpsc;

use crate::client::{CallError, Client, ClientError};
use crate::engine::UnitErrors;
use crate::prepare::BadSample;

/// Results are gathered this long before they are sent: a crash loses no more than this and what is being computed.
const GATHER: Duration = Duration::from_millis(500);

/// The lease something was computed under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LeaseKey {
    /// Epoch of the coordinator that granted it.
    pub epoch: u64,
    /// Its id.
    pub lease: u64,
}

/// The leases a worker has not had fully acknowledged, with how much of each is outstanding.
#[derive(Clone, Debug, Default)]
pub struct Held(Arc<Mutex<BTreeMap<LeaseKey, usize>>>);

impl Held {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<LeaseKey, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more thing of a lease is outstanding: its computation, or a finding.
    pub fn add(&self, key: LeaseKey) {
        *self.lock().entry(key).or_default() += 1;
    }

    /// So many things of a lease are done.
    pub fn remove(&self, key: LeaseKey, count: usize) {
        let mut held = self.lock();
        if let Some(outstanding) = held.get_mut(&key) {
            *outstanding = outstanding.saturating_sub(count);
            if *outstanding == 0 {
                held.remove(&key);
            }
        }
    }

    /// The leases as the coordinator wants to know them.
    pub fn list(&self) -> Vec<v1::HeldLease> {
        self.lock().keys().map(|k| v1::HeldLease { epoch: k.epoch, lease: k.lease }).collect()
    }
}

/// Something to report.
#[derive(Debug)]
pub enum Finding {
    /// A unit is finished.
    Unit(UnitErrors),
    /// A sample is beyond help.
    Bad(BadSample),
}

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
    pub findings: mpsc::UnboundedReceiver<(LeaseKey, Finding)>,
    /// Evaluations acknowledged so far.
    pub acknowledged: Arc<AtomicU64>,
    /// What is not acknowledged yet.
    pub held: Held,
}

impl Reporter {
    /// Runs until every finding is acknowledged and no more will come.
    pub async fn run(mut self) -> Result<(), ClientError> {
        while let Some(first) = self.findings.recv().await {
            let mut gathered = vec![first];
            let deadline = tokio::time::Instant::now() + GATHER;
            while let Ok(Some(next)) = tokio::time::timeout_at(deadline, self.findings.recv()).await {
                gathered.push(next);
            }
            for (key, report) in by_lease(&self.client.worker, gathered) {
                self.deliver(key, report).await?;
            }
        }
        Ok(())
    }

    async fn deliver(&self, key: LeaseKey, report: v1::ReportRequest) -> Result<(), ClientError> {
        let evaluations: u64 = report.results.iter().map(|r| u64::from(r.slots) * r.prompts.len() as u64).sum();
        loop {
            match self.client.report(&report).await {
                Ok(reply) => {
                    tracing::debug!(
                        epoch = key.epoch,
                        lease = key.lease,
                        reply.accepted,
                        reply.duplicates,
                        "acknowledged"
                    );
                    break;
                }
                Err(CallError::Rejoin) => match self.client.join(&self.host, &self.device).await {
                    Err(CallError::Fatal(error)) => return Err(error),
                    _ => continue,
                },
                Err(CallError::Rejected(reason)) => {
                    tracing::error!(
                        epoch = key.epoch,
                        lease = key.lease,
                        reason,
                        "the coordinator refused a report: it is dropped"
                    );
                    break;
                }
                Err(CallError::Fatal(error)) => return Err(error),
            }
        }
        self.acknowledged.fetch_add(evaluations, Ordering::Relaxed);
        self.held.remove(key, report.results.len() + report.failures.len());
        Ok(())
    }
}

fn by_lease(worker: &str, findings: Vec<(LeaseKey, Finding)>) -> BTreeMap<LeaseKey, v1::ReportRequest> {
    let mut reports = BTreeMap::new();
    for (key, finding) in findings {
        let report = reports.entry(key).or_insert_with(|| v1::ReportRequest {
            worker: worker.to_owned(),
            epoch: key.epoch,
            lease: key.lease,
            results: Vec::new(),
            failures: Vec::new(),
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
    let id = v1::UnitId {
        sample: unit.id.sample.0,
        round: u32::from(unit.id.round.0),
        slots: u32::from(unit.id.slots),
        prompts: u32::from(unit.id.prompts),
    };
    v1::UnitResult {
        id: Some(id),
        prompts: unit.prompts.iter().map(|p| p.0).collect(),
        slots: unit.slots.len() as u32,
        sum: sums.iter().map(|s| s.sum).collect(),
        sum_sq: sums.iter().map(|s| s.sum_sq).collect(),
        errors,
    }
}
