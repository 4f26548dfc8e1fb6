//! A worker without a model: it leases, waits as long as the evaluations would take, and reports the oracle's errors.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use elbo_core::ids::LeaseKey;
use elbo_proto::v1;
use elbo_proto::v1::lease_reply::Outcome;
use elbo_worker::client::Client;
use elbo_worker::held::Held;
use elbo_worker::{CallError, ClientError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::oracle;

/// Blocks that a worker holds, like a real one: one being computed, one waiting.
const BLOCKS: usize = 2;

/// How long results are gathered, as in the real worker.
const GATHER: Duration = Duration::from_millis(500);

/// Concurrent reports of a worker that answers immediately.
const REPORTS: usize = 8;

/// How a worker behaves.
#[derive(Clone, Copy, Debug)]
pub struct Behaviour {
    /// Evaluations per second that it announces.
    pub rate: f64,
    /// How many times longer it takes than announced; 0 for a worker that answers immediately, with one unit per report.
    pub slowness: f64,
    /// When it dies without notice.
    pub dies_after: Option<Duration>,
}

/// The counts of all workers of a phase.
#[derive(Debug, Default)]
pub struct Tally {
    /// Blocks leased.
    pub leases: AtomicU64,
    /// Reports acknowledged.
    pub reports: AtomicU64,
    /// Units that were new to the coordinator.
    pub units: AtomicU64,
    /// Units that the coordinator already had.
    pub duplicates: AtomicU64,
    /// Evaluations acknowledged.
    pub evaluations: AtomicU64,
    /// Calls that were refused.
    pub refused: AtomicU64,
    lease_seconds: Mutex<Vec<f32>>,
    report_seconds: Mutex<Vec<f32>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tally {
    /// Takes the times that workers waited for a block, in seconds.
    pub fn take_lease_seconds(&self) -> Vec<f32> {
        std::mem::take(&mut lock(&self.lease_seconds))
    }

    /// Takes the times until reports were acknowledged, in seconds.
    pub fn take_report_seconds(&self) -> Vec<f32> {
        std::mem::take(&mut lock(&self.report_seconds))
    }
}

/// A simulated worker.
#[derive(Clone, Debug)]
pub struct Simulated {
    client: Client,
    behaviour: Behaviour,
    tally: Arc<Tally>,
    held: Held,
}

impl Simulated {
    /// A worker called `name` for the coordinator at `address`.
    pub fn new(address: &str, name: String, behaviour: Behaviour, tally: Arc<Tally>) -> Result<Self, ClientError> {
        let client = Client::new(address, None, None, name, Duration::from_secs(120))?;
        Ok(Self { client, behaviour, tally, held: Held::default() })
    }

    /// Works until `stop` is cancelled, then leaves; `false` if it died before that.
    pub async fn run(self, stop: CancellationToken) -> bool {
        let Ok(joined) = self.join().await else { return false };
        let heartbeat = Duration::from_millis(u64::from(joined.heartbeat_ms.max(50)));
        let (blocks, inbox) = mpsc::channel(BLOCKS);
        let death = async {
            match self.behaviour.dies_after {
                Some(after) => tokio::time::sleep(after).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.lease(blocks) => {}
            () = self.compute(inbox) => {}
            () = self.beat(heartbeat) => {}
            () = death => return false,
            () = stop.cancelled() => {}
        }
        self.client.leave("").await;
        true
    }

    async fn join(&self) -> Result<v1::JoinReply, CallError> {
        self.client.join("simulated", "none", self.held.blocks()).await
    }

    async fn beat(&self, every: Duration) {
        loop {
            tokio::time::sleep(every).await;
            if let Err(CallError::Rejoin) = self.client.heartbeat(self.sign()).await {
                let _ = self.join().await;
            }
        }
    }

    fn sign(&self) -> v1::HeartbeatRequest {
        let activity = if self.held.is_empty() { v1::Activity::Waiting } else { v1::Activity::Computing };
        v1::HeartbeatRequest { held: self.held.leases(), activity: activity.into(), ..v1::HeartbeatRequest::default() }
    }

    async fn lease(&self, blocks: mpsc::Sender<(v1::Block, OwnedSemaphorePermit)>) {
        let places = Arc::new(Semaphore::new(BLOCKS));
        // A real worker does not know its rate until it has finished a block.
        let known = self.behaviour.slowness == 0.0;
        let mut leased = 0;
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            let rate = if known || leased >= BLOCKS { self.behaviour.rate } else { 0.0 };
            let asked = Instant::now();
            match self.client.lease(rate, self.held.leases()).await {
                Ok(v1::LeaseReply { outcome: Some(Outcome::Block(block)) }) => {
                    lock(&self.tally.lease_seconds).push(asked.elapsed().as_secs_f32());
                    self.tally.leases.fetch_add(1, Ordering::Relaxed);
                    leased += 1;
                    self.held.add(&block);
                    if blocks.send((block, place)).await.is_err() {
                        return;
                    }
                }
                Ok(v1::LeaseReply { outcome: Some(Outcome::Leave(_)) }) => return,
                Ok(_) => {}
                Err(CallError::Rejoin) => drop(self.join().await),
                Err(_) => {
                    self.tally.refused.fetch_add(1, Ordering::Relaxed);
                    return;
                }
            }
        }
    }

    async fn compute(&self, mut blocks: mpsc::Receiver<(v1::Block, OwnedSemaphorePermit)>) {
        let at_once = self.behaviour.slowness == 0.0;
        // Dropped with the worker: a dead worker's reports are not delivered.
        let mut reports = JoinSet::new();
        let mut clock = Instant::now();
        while let Some((block, place)) = blocks.recv().await {
            let key = block.key();
            let (mut results, mut gathering) = (Vec::new(), None);
            clock = clock.max(Instant::now());
            for unit in &block.units {
                if !at_once {
                    clock += self.time_for(oracle::evaluations(unit));
                    tokio::time::sleep_until(clock).await;
                }
                results.push(oracle::evaluate(unit));
                let since = *gathering.get_or_insert_with(Instant::now);
                if at_once || since.elapsed() >= GATHER {
                    self.send(key, std::mem::take(&mut results), &mut reports).await;
                    gathering = None;
                }
            }
            if !results.is_empty() {
                self.send(key, results, &mut reports).await;
            }
            drop(place);
        }
    }

    fn time_for(&self, evaluations: u64) -> Duration {
        Duration::try_from_secs_f64(evaluations as f64 * self.behaviour.slowness / self.behaviour.rate)
            .unwrap_or(Duration::MAX / 4)
    }

    async fn send(&self, key: LeaseKey, results: Vec<v1::UnitResult>, reports: &mut JoinSet<()>) {
        while reports.len() >= REPORTS {
            reports.join_next().await;
        }
        while reports.try_join_next().is_some() {}
        let this = self.clone();
        reports.spawn(async move { this.deliver(key, results).await });
    }

    async fn deliver(&self, key: LeaseKey, results: Vec<v1::UnitResult>) {
        let tally = &self.tally;
        let evaluations: u64 = results.iter().map(|r| u64::from(r.slots) * r.prompts.len() as u64).sum();
        let mut report = v1::ReportRequest {
            worker: self.client.worker.clone(),
            epoch: key.epoch.0,
            lease: key.lease.0,
            results,
            ..v1::ReportRequest::default()
        };
        let asked = Instant::now();
        loop {
            match self.client.report(&mut report).await {
                Ok(reply) => {
                    lock(&tally.report_seconds).push(asked.elapsed().as_secs_f32());
                    tally.reports.fetch_add(1, Ordering::Relaxed);
                    tally.units.fetch_add(u64::from(reply.accepted), Ordering::Relaxed);
                    tally.duplicates.fetch_add(u64::from(reply.duplicates), Ordering::Relaxed);
                    tally.evaluations.fetch_add(evaluations, Ordering::Relaxed);
                    break;
                }
                Err(CallError::Rejoin) if self.join().await.is_ok() => {}
                Err(_) => {
                    tally.refused.fetch_add(1, Ordering::Relaxed);
                    break;
                }
            }
        }
        self.held.acknowledge(key, &report);
    }

    /// Waits for one block, returns it and leaves. Returns how long the block took.
    pub async fn first_lease(&self) -> Result<Duration, CallError> {
        let asked = Instant::now();
        self.join().await?;
        loop {
            if let Some(Outcome::Block(_)) = self.client.lease(0.0, self.held.leases()).await?.outcome {
                let waited = asked.elapsed();
                self.client.leave("").await;
                return Ok(waited);
            }
        }
    }
}
