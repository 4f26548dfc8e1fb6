//! Delivers results. Unacknowledged results are kept and sent again, also to a restarted coordinator.
//!
//! The backlog is bounded: while the coordinator accepts nothing, computing waits. Reports are bounded too, however much
//! has accumulated.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use elbo_core::ids::LeaseKey;
use elbo_proto::{FULL_MESSAGE_BYTES, v1};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::call_error::{CallError, ClientError};
use crate::client::Client;
use crate::finding::Finding;
use crate::held::Held;

/// Results are gathered this long before they are sent. A crash loses at most this and the work in progress.
const GATHER: Duration = Duration::from_millis(500);

/// Bytes of findings that may wait to be acknowledged: several full reports, so that a device goes on while one is under
/// way.
pub(crate) const BACKLOG: usize = 4 * FULL_MESSAGE_BYTES;

/// The most bytes that a unit takes among the blocks in hand.
const HELD_UNIT: usize = 32;

/// How often in a row a coordinator may not know the worker or its lease just after a join, before a report is dropped. A
/// coordinator that only restarts does not do this so often.
const REJOINS: u32 = 20;

/// A finding with its place in the backlog. Dropping it frees the place.
#[derive(Debug)]
struct Found {
    key: LeaseKey,
    finding: Finding,
    bytes: usize,
    place: Option<OwnedSemaphorePermit>,
}

/// The sending end of the backlog.
#[derive(Debug)]
pub struct Findings {
    /// A finding; or `None` if nothing more comes for a while, so that the gathered findings should be sent now.
    sender: mpsc::UnboundedSender<Option<Found>>,
    room: Arc<Semaphore>,
}

/// The receiving end of the backlog.
#[derive(Debug)]
pub struct Inbox(mpsc::UnboundedReceiver<Option<Found>>);

/// The channel from the engine to the reporter, with room for `bytes` that are not acknowledged.
pub fn backlog(bytes: usize) -> (Findings, Inbox) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (Findings { sender, room: Arc::new(Semaphore::new(bytes)) }, Inbox(receiver))
}

impl Findings {
    /// Hands over a finding about `units` units of a lease; waits until there is room for it.
    pub async fn find(&self, key: LeaseKey, finding: Finding, units: usize) {
        let bytes = finding.bytes();
        let room = (bytes + units * HELD_UNIT).min(BACKLOG) as u32;
        // The semaphore is never closed.
        let place = Arc::clone(&self.room).acquire_many_owned(room).await.ok();
        self.send(Some(Found { key, finding, bytes, place }));
    }

    /// Sends the gathered findings now.
    pub fn flush(&self) {
        self.send(None);
    }

    fn send(&self, told: Option<Found>) {
        if self.sender.send(told).is_err() {
            tracing::debug!("the reporter has stopped");
        }
    }
}

impl Inbox {
    /// The findings to report next: all that come in a short while, until they fill a message; `None` once no more will
    /// come.
    async fn next(&mut self) -> Option<Vec<Found>> {
        let first = loop {
            if let Some(first) = self.0.recv().await? {
                break first;
            }
        };
        let mut bytes = first.bytes;
        let mut gathered = vec![first];
        let deadline = tokio::time::Instant::now() + GATHER;
        while bytes < FULL_MESSAGE_BYTES
            && let Ok(Some(Some(next))) = tokio::time::timeout_at(deadline, self.0.recv()).await
        {
            bytes += next.bytes;
            gathered.push(next);
        }
        Some(gathered)
    }
}

/// Sends findings as they come, until the channel closes and all are acknowledged.
///
/// Joins again if the coordinator does not know the worker.
#[derive(Debug)]
pub struct Reporter {
    /// The coordinator.
    pub client: Client,
    /// The worker's host, for joining again.
    pub host: String,
    /// Its device, for joining again.
    pub device: String,
    /// Findings.
    pub findings: Inbox,
    /// Evaluations acknowledged so far.
    pub acknowledged: Arc<AtomicU64>,
    /// The blocks in hand.
    pub held: Held,
}

/// The findings of one lease, to be delivered.
#[derive(Debug)]
struct Report {
    request: v1::ReportRequest,
    /// Its findings' places in the backlog.
    places: Option<OwnedSemaphorePermit>,
}

impl Reporter {
    /// Runs until every finding is acknowledged and no more will come.
    pub async fn run(mut self) -> Result<(), ClientError> {
        while let Some(gathered) = self.findings.next().await {
            for (key, Report { request, places }) in by_lease(&self.client.worker, gathered) {
                self.deliver(key, request).await?;
                drop(places);
            }
        }
        Ok(())
    }

    async fn deliver(&self, key: LeaseKey, mut report: v1::ReportRequest) -> Result<(), ClientError> {
        let evaluations: u64 = report.results.iter().map(|r| u64::from(r.slots) * r.prompts.len() as u64).sum();
        let dropped = |reason: &str| {
            tracing::error!(
                epoch = key.epoch.0,
                lease = key.lease.0,
                reason,
                "the coordinator refused a report: it is dropped"
            );
        };
        let mut rejoins = 0;
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
                Err(CallError::Rejoin) if rejoins == REJOINS => {
                    dropped("it still does not know the worker or its lease after many joins");
                    break;
                }
                Err(CallError::Rejoin) => match self.client.join(&self.host, &self.device, self.held.blocks()).await {
                    Err(CallError::Fatal(error)) => return Err(error),
                    Err(CallError::OtherJob) => {
                        tracing::warn!("the coordinator has another job: results of the previous job are dropped");
                        break;
                    }
                    _ => rejoins += 1,
                },
                // Only a join gets this answer.
                Err(CallError::OtherJob) => break,
                Err(CallError::Rejected(reason)) => {
                    dropped(&reason);
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

fn by_lease(worker: &str, findings: Vec<Found>) -> BTreeMap<LeaseKey, Report> {
    let mut reports = BTreeMap::new();
    for Found { key, finding, bytes: _, place } in findings {
        let report = reports.entry(key).or_insert_with(|| Report {
            request: v1::ReportRequest {
                worker: worker.to_owned(),
                epoch: key.epoch.0,
                lease: key.lease.0,
                ..v1::ReportRequest::default()
            },
            places: None,
        });
        match finding {
            Finding::Unit(result) => report.request.results.push(result),
            Finding::Bad(failure) => report.request.failures.push(failure),
        }
        match (&mut report.places, place) {
            (Some(places), Some(place)) => places.merge(place),
            (places @ None, place) => *places = place,
            (Some(_), None) => {}
        }
    }
    reports
}

#[cfg(test)]
mod tests {
    use elbo_proto::bytes_of;

    use super::*;
    use elbo_core::failure::{FailureStage, SampleFailure};
    use elbo_core::ids::{Epoch, LeaseId};
    use elbo_proto::MAX_MESSAGE_BYTES;

    fn key(lease: u64) -> LeaseKey {
        LeaseKey { epoch: Epoch(1), lease: LeaseId(lease) }
    }

    /// The result of a unit of 21,841 classes on one slot.
    fn unit(sample: u64, prompts: u32) -> Finding {
        let first = 64 * prompts;
        Finding::Unit(v1::UnitResult {
            id: Some(v1::UnitId { sample, prompts, ..v1::UnitId::default() }),
            prompts: (first..21_841.min(first + 64)).collect(),
            slots: 1,
            sum: vec![0.5; 64],
            sum_sq: vec![0.25; 64],
            errors: Vec::new(),
        })
    }

    /// The reporter accepts nothing while its coordinator's storage stalls; then everything comes at once.
    #[tokio::test]
    async fn after_a_stall_reports_are_bounded_and_nothing_is_lost() {
        const UNITS: u64 = 342;
        const SAMPLES: u64 = 200;
        let (findings, mut inbox) = backlog(BACKLOG);
        let computing = tokio::spawn(async move {
            for sample in 0..SAMPLES {
                for prompts in 0..UNITS {
                    findings.find(key(sample / 100), unit(sample, prompts as u32), 1).await;
                }
            }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!computing.is_finished(), "computing waits for the reporter");
        let waiting = inbox.0.len();
        assert!(waiting * (64 * 16) < BACKLOG, "{waiting} units");
        let (mut units, mut largest) = (0, 0);
        while let Some(gathered) = inbox.next().await {
            for Report { request, places } in by_lease("w", gathered).into_values() {
                units += request.results.len() as u64;
                largest = largest.max(bytes_of(&request));
                drop(places);
            }
        }
        assert_eq!(units, UNITS * SAMPLES);
        assert!((FULL_MESSAGE_BYTES / 2..2 * FULL_MESSAGE_BYTES).contains(&largest), "{largest}");
        assert!(2 * FULL_MESSAGE_BYTES < MAX_MESSAGE_BYTES && computing.await.is_ok());
    }

    #[tokio::test]
    async fn findings_do_not_wait_for_a_reporter_that_is_gone() {
        let (findings, inbox) = backlog(4_000);
        findings.find(key(1), unit(0, 0), 1).await;
        findings.find(key(1), unit(0, 1), 1).await;
        drop(inbox);
        let many = async {
            for sample in 0..100 {
                findings.find(key(1), unit(sample, 0), 1).await;
            }
        };
        assert!(tokio::time::timeout(Duration::from_secs(60), many).await.is_ok());
    }

    #[tokio::test]
    async fn long_failures_are_shortened_and_flushed_findings_go_at_once() {
        let (findings, mut inbox) = backlog(BACKLOG);
        let bad = SampleFailure {
            sample: elbo_core::ids::SampleId(7),
            stage: FailureStage::Read,
            error: "x".repeat(1 << 20),
        };
        findings.find(key(2), bad.into(), 1_500).await;
        findings.flush();
        findings.find(key(3), unit(0, 0), 1).await;
        let gathered = inbox.next().await.unwrap_or_default();
        assert_eq!(gathered.len(), 1, "later findings are not waited for");
        let reports = by_lease("w", gathered);
        let report = &reports[&key(2)];
        assert!(bytes_of(&report.request) < 5_000);
        let places = report.places.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        assert!(places > 1_500 * HELD_UNIT, "its units in hand count too: {places}");
    }
}
