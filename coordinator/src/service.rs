//! The gRPC side of the coordinator: translates between the contract and the brain, and makes reports durable before they
//! are acknowledged.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use elbo_common::ids::{Epoch, LeaseId, LeaseKey};
use elbo_common::manifest::{Part, Sample};
use elbo_common::record::JobRecord;
use elbo_proto::{PROTOCOL, v1};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::brain::{Activity, Brain, Checked, Grant, Heartbeat, Record, ReportError, SampleFailure};
use crate::ledger::{Ledger, LedgerError, failure_from_wire, from_wire};
use crate::progress::{Meter, Progress};

/// Longest a lease request waits for work.
const LONGEST_POLL: Duration = Duration::from_secs(20);

/// What the service and the steward share.
#[derive(Debug)]
pub(crate) struct Shared {
    brain: Mutex<Brain>,
    meter: Mutex<Meter>,
    pub(crate) ledger: Ledger,
    pub(crate) record: JobRecord,
    job_json: String,
    started: Instant,
    heartbeat: Duration,
    /// Work became ready. One waiting worker is woken, and wakes the next if it leaves some: a report must not wake a
    /// thousand workers to find work for one. What may suit some workers and not others wakes all.
    pub(crate) work: Notify,
    /// The steward has something to open or commit.
    pub(crate) steward: Notify,
    /// No more leases: the job is done, or the coordinator stops.
    pub(crate) closing: CancellationToken,
    pub(crate) progress: watch::Sender<Progress>,
    /// The first error that ends the job.
    failure: Mutex<Option<LedgerError>>,
}

impl Shared {
    pub(crate) fn new(
        brain: Brain,
        ledger: Ledger,
        record: JobRecord,
        heartbeat: Duration,
        closing: CancellationToken,
    ) -> Result<Self, serde_json::Error> {
        let job_json = serde_json::to_string(&record.identity)?;
        Ok(Self {
            brain: Mutex::new(brain),
            meter: Mutex::default(),
            ledger,
            record,
            job_json,
            started: Instant::now(),
            heartbeat,
            work: Notify::new(),
            steward: Notify::new(),
            closing,
            progress: watch::Sender::new(Progress::default()),
            failure: Mutex::new(None),
        })
    }

    /// The brain; a panic while it was held leaves it usable, since every event is applied as a whole or refused.
    pub(crate) fn brain(&self) -> MutexGuard<'_, Brain> {
        self.brain.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time since the coordinator started: the brain's clock.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Publishes the current progress.
    pub(crate) fn publish(&self) -> Progress {
        let now = self.now();
        let progress = {
            let mut meter = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
            meter.snapshot(&self.brain(), now)
        };
        self.progress.send_replace(progress.clone());
        progress
    }

    /// Ends the job because the ledger failed.
    pub(crate) fn fail(&self, error: LedgerError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.closing.cancel();
    }

    /// Tells those concerned what an event has led to.
    pub(crate) fn announce(&self, brain: &mut Brain) {
        if brain.has_ready() {
            self.work.notify_one();
        }
        if brain.wants_shard().is_some() || brain.has_finished_shard() {
            self.steward.notify_one();
        }
    }

    pub(crate) fn take_failure(&self) -> Option<LedgerError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Makes a record durable and merges it.
    pub(crate) async fn persist(&self, record: Record, of: Option<(&str, LeaseKey)>) -> Result<(), LedgerError> {
        let shard_size = self.record.identity.spec.shard_size;
        let waste = self.brain().waste();
        self.ledger.append(&record, shard_size, waste).await?;
        let mut brain = self.brain();
        brain.apply(record, of);
        self.announce(&mut brain);
        Ok(())
    }
}

/// Makes a record durable and merges it for a call, which fails if the ledger does; so does the job.
async fn persist(shared: &Shared, record: Record, of: Option<(&str, LeaseKey)>) -> Result<(), Status> {
    shared.persist(record, of).await.map_err(|error| {
        let status = Status::unavailable(error.to_string());
        shared.fail(error);
        status
    })
}

/// Refuses calls without the right bearer token.
#[derive(Clone, Debug)]
pub(crate) struct Token(Option<blake3::Hash>);

impl Token {
    pub(crate) fn new(token: Option<&str>) -> Self {
        Self(token.map(|t| blake3::hash(t.as_bytes())))
    }
}

impl tonic::service::Interceptor for Token {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(expected) = self.0 else { return Ok(request) };
        let given = request.metadata().get("authorization").and_then(|v| v.to_str().ok());
        match given.and_then(|v| v.strip_prefix("Bearer ")) {
            // Hashes compare in constant time.
            Some(token) if blake3::hash(token.as_bytes()) == expected => Ok(request),
            Some(_) => {
                Err(Status::unauthenticated("the token is wrong: use the coordinator's --token-file or ELBO_TOKEN"))
            }
            None => Err(Status::unauthenticated(
                "a token is needed: give the coordinator's with --token-file or ELBO_TOKEN",
            )),
        }
    }
}

/// The service workers talk to.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) shared: Arc<Shared>,
}

fn rejoin() -> Status {
    Status::not_found("this coordinator does not know the worker: join (again)")
}

fn to_block(epoch: Epoch, grant: Grant) -> v1::Block {
    let sample = |s: Sample| v1::Sample {
        id: s.id.0,
        key: s.key,
        location: s.location,
        captions: s.candidates,
        // Both images of a pair see the same noise on the same slots, so that their errors compare.
        noise_key: s.pair.unwrap_or_default(),
        part: s.part.map(|part| match part {
            Part::Member { offset } => v1::sample::Part::Member(v1::Member { offset }),
            Part::Cell { row, column } => v1::sample::Part::Cell(v1::Cell { row, column }),
        }),
        size: s.size,
        etag: s.etag.unwrap_or_default(),
    };
    let samples = grant.samples.into_iter().map(sample).collect();
    let units = grant
        .units
        .into_iter()
        .map(|unit| v1::Unit {
            id: Some(unit.id.into()),
            slot_begin: unit.slots.start as u32,
            slot_end: unit.slots.end as u32,
            prompts: unit.prompts.into_iter().map(|p| p.0).collect(),
        })
        .collect();
    v1::Block { epoch: epoch.0, lease: grant.lease.0, attempt: grant.attempt, samples, units }
}

#[tonic::async_trait]
impl v1::coordinator_server::Coordinator for Service {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinReply>, Status> {
        let join = request.into_inner();
        if join.protocol != PROTOCOL {
            return Err(Status::failed_precondition(format!(
                "the worker speaks protocol {}, this coordinator {PROTOCOL}: run the same version of elbo on both ({} here)",
                join.protocol,
                env!("CARGO_PKG_VERSION")
            )));
        }
        if join.worker.is_empty() {
            return Err(Status::invalid_argument("a worker must have a name"));
        }
        tracing::info!(worker = join.worker, host = join.host, device = join.device, "worker joined");
        let shared = &self.shared;
        let mut brain = shared.brain();
        brain.join(&join.worker, &join.host, &join.device, shared.now());
        for held in join.held {
            let key = LeaseKey { epoch: Epoch(held.epoch), lease: LeaseId(held.lease) };
            let units: Vec<_> = held.units.into_iter().filter_map(|unit| unit.try_into().ok()).collect();
            brain.adopt(&join.worker, key, &units, shared.now());
        }
        shared.announce(&mut brain);
        Ok(Response::new(v1::JoinReply {
            epoch: brain.epoch().0,
            job_json: shared.job_json.clone(),
            heartbeat_ms: shared.heartbeat.as_millis() as u32,
        }))
    }

    async fn lease(&self, request: Request<v1::LeaseRequest>) -> Result<Response<v1::LeaseReply>, Status> {
        use v1::lease_reply::Outcome;
        let v1::LeaseRequest { worker, evaluations_per_second, wait_ms, held } = request.into_inner();
        let shared = &self.shared;
        {
            let mut brain = shared.brain();
            let held: Vec<_> = held.iter().map(LeaseKey::from).collect();
            if brain.keep_only(&worker, &held) {
                shared.announce(&mut brain);
            }
        }
        let wait = Duration::from_millis(u64::from(wait_ms)).min(LONGEST_POLL);
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            // Registered before looking, so that a change in between is not missed.
            let work = shared.work.notified();
            if shared.closing.is_cancelled() {
                let leave = v1::Leave { done: shared.brain().is_done() };
                return Ok(Response::new(v1::LeaseReply { outcome: Some(Outcome::Leave(leave)) }));
            }
            {
                let mut brain = shared.brain();
                if !brain.knows(&worker) {
                    return Err(rejoin());
                }
                if let Some(grant) = brain.grant(&worker, evaluations_per_second, shared.now()) {
                    shared.announce(&mut brain);
                    let block = to_block(brain.epoch(), grant);
                    drop(brain);
                    tracing::debug!(worker, lease = block.lease, units = block.units.len(), "leased");
                    return Ok(Response::new(v1::LeaseReply { outcome: Some(Outcome::Block(block)) }));
                }
            }
            tokio::select! {
                () = work => {}
                () = shared.closing.cancelled() => {}
                () = tokio::time::sleep_until(deadline) => {
                    return Ok(Response::new(v1::LeaseReply { outcome: Some(Outcome::Idle(v1::Idle {})) }));
                }
            }
        }
    }

    async fn report(&self, request: Request<v1::ReportRequest>) -> Result<Response<v1::ReportReply>, Status> {
        let v1::ReportRequest { worker, epoch, lease, results, failures, again } = request.into_inner();
        let key = LeaseKey { epoch: Epoch(epoch), lease: LeaseId(lease) };
        let results = results.into_iter().map(from_wire).collect::<Option<Vec<_>>>();
        let results = results.ok_or_else(|| Status::invalid_argument("a result names no unit of this contract"))?;
        let record = Record { results, failures: failures.into_iter().map(failure_from_wire).collect() };
        let shared = &self.shared;
        let checked = shared.brain().check(&worker, key, record, again, shared.now());
        let Checked { record, duplicates } = match checked {
            Ok(checked) => checked,
            Err(error @ ReportError::NotOpen(_)) => {
                // A report that outlived a coordinator: the steward opens the shard now.
                shared.steward.notify_one();
                return Err(Status::unavailable(format!("{error} yet: send the report again")));
            }
            Err(error @ ReportError::Replaced(_)) => return Err(Status::unavailable(error.to_string())),
            Err(error) => {
                tracing::warn!(worker, lease, %error, "report refused");
                return Err(Status::invalid_argument(error.to_string()));
            }
        };
        let accepted = (record.results.len() + record.failures.len()) as u32;
        persist(shared, record, Some((&worker, key))).await?;
        Ok(Response::new(v1::ReportReply { accepted, duplicates }))
    }

    async fn heartbeat(&self, request: Request<v1::HeartbeatRequest>) -> Result<Response<v1::HeartbeatReply>, Status> {
        let beat = request.into_inner();
        let activity = match beat.activity() {
            v1::Activity::Unspecified => Activity::Unknown,
            v1::Activity::Loading => Activity::Loading,
            v1::Activity::Waiting => Activity::Waiting,
            v1::Activity::Preparing => Activity::Preparing,
            v1::Activity::Computing => Activity::Computing,
        };
        let sign = Heartbeat {
            unreported: beat.unreported_evaluations,
            held: beat.held.iter().map(LeaseKey::from).collect(),
            activity,
            quiet: Duration::from_millis(beat.quiet_ms),
        };
        let mut brain = self.shared.brain();
        let unwanted = brain.heartbeat(&beat.worker, sign, self.shared.now()).ok_or_else(rejoin)?;
        let unwanted = unwanted.into_iter().map(v1::HeldLease::from).collect();
        Ok(Response::new(v1::HeartbeatReply { epoch: brain.epoch().0, unwanted }))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseReply>, Status> {
        let v1::ReleaseRequest { worker, epoch, leases, error, leaving, reason } = request.into_inner();
        let shared = &self.shared;
        let mut given_up: Vec<SampleFailure> = Vec::new();
        {
            let mut brain = shared.brain();
            for lease in leases {
                let key = LeaseKey { epoch: Epoch(epoch), lease: LeaseId(lease) };
                if error.is_empty() {
                    brain.release(&worker, &[key]);
                } else {
                    tracing::warn!(worker, lease = %key, error, "block failed");
                    given_up.extend(brain.fail(&worker, key, &error));
                }
            }
            if leaving {
                tracing::info!(worker, reason, "worker left");
                brain.leave(&worker);
            }
        }
        if !given_up.is_empty() {
            persist(shared, Record { results: Vec::new(), failures: given_up }, None).await?;
        }
        if !error.is_empty() {
            // A block that failed is for anyone but the worker it failed on.
            shared.work.notify_waiters();
        }
        shared.announce(&mut shared.brain());
        Ok(Response::new(v1::ReleaseReply {}))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        let progress = self.shared.publish();
        let state = match (progress.done, self.shared.closing.is_cancelled(), progress.workers.is_empty()) {
            (true, _, _) => "done",
            (false, true, _) => "stopping",
            (false, false, true) => "waiting for workers",
            (false, false, false) => "running",
        };
        let workers = progress.workers.iter().map(|w| v1::WorkerStatus {
            worker: w.worker.clone(),
            host: w.host.clone(),
            device: w.device.clone(),
            leases: w.leases,
            evaluations: w.evaluations,
            evaluations_per_second: w.rate,
            activity: v1::Activity::Unspecified.into(),
        });
        Ok(Response::new(v1::StatusReply {
            state: state.into(),
            shards_done: progress.shards_done,
            shards_active: progress.shards_active,
            shards_pending: progress.shards_pending,
            samples: progress.samples,
            samples_done: progress.samples_done,
            samples_quarantined: progress.samples_quarantined,
            evaluations: progress.evaluations,
            evaluations_per_second: progress.rate.unwrap_or(0.0),
            eta_seconds: progress.eta().map(|eta| eta.as_secs_f64()),
            workers: workers.collect(),
            stalled: String::new(),
        }))
    }
}
