//! The gRPC side of the coordinator: translates between the contract and the scheduler, and makes reports durable before it
//! acknowledges them.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use elbo_core::failure::SampleFailure;
use elbo_core::ids::{Epoch, LeaseId, LeaseKey};
use elbo_core::sample::{Part, Sample};
use elbo_output::record::JobRecord;
use elbo_proto::{FULL_MESSAGE_BYTES, LeaveReason, PROTOCOL, check_size, shortened, v1};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::ledger::{Ledger, LedgerError};
use crate::progress::{Meter, Progress};
use crate::scheduler::{Checked, Heartbeat, LeasedBlock, Record, ReportError, Scheduler};
use crate::status::Phase;
use crate::telemetry::{Telemetry, Use};
use crate::{intake, lease_log, status};

/// The longest time a lease request waits for work.
const LONGEST_POLL: Duration = Duration::from_secs(20);

/// The start of a fingerprint, long enough to tell jobs apart.
pub(crate) fn short(fingerprint: &str) -> &str {
    fingerprint.get(..12).unwrap_or(fingerprint)
}

/// State shared by the service and the steward.
#[derive(Debug)]
pub(crate) struct Shared {
    scheduler: Mutex<Scheduler>,
    meter: Mutex<Meter>,
    pub(crate) ledger: Ledger,
    pub(crate) record: JobRecord,
    job_json: String,
    /// Images with which workers test whether they can read any.
    pub(crate) witnesses: OnceLock<Vec<v1::Sample>>,
    started: Instant,
    heartbeat: Duration,
    /// Signals that work became ready. It wakes one waiting worker, which wakes the next if it leaves some work: a report
    /// must not wake a thousand workers for the work of one. Work that may suit some workers and not others wakes all.
    pub(crate) work: Notify,
    /// Signals that the steward has something to open or commit.
    pub(crate) steward: Notify,
    /// Cancelled when no more leases are granted.
    pub(crate) closing: CancellationToken,
    /// The phase after working, once that is over.
    ending: OnceLock<Phase>,
    pub(crate) progress: watch::Sender<Progress>,
    pub(crate) telemetry: Telemetry,
    /// Fields that every log line of this coordinator has.
    pub(crate) span: tracing::Span,
    /// The first error that ends the job.
    failure: Mutex<Option<LedgerError>>,
}

impl Shared {
    pub(crate) fn new(
        scheduler: Scheduler,
        ledger: Ledger,
        record: JobRecord,
        heartbeat: Duration,
        closing: CancellationToken,
    ) -> Result<Self, serde_json::Error> {
        let job_json = serde_json::to_string(&record.identity)?;
        let (job, epoch) = (short(&record.fingerprint).to_owned(), scheduler.epoch().0);
        Ok(Self {
            telemetry: Telemetry::new(&job, epoch),
            span: tracing::info_span!("coordinator", job, epoch),
            scheduler: Mutex::new(scheduler),
            meter: Mutex::default(),
            ledger,
            record,
            job_json,
            witnesses: OnceLock::new(),
            started: Instant::now(),
            heartbeat,
            work: Notify::new(),
            steward: Notify::new(),
            closing,
            ending: OnceLock::new(),
            progress: watch::Sender::new(Progress::default()),
            failure: Mutex::new(None),
        })
    }

    /// The scheduler. A panic while it was locked leaves it usable, since every event is applied as a whole or refused.
    pub(crate) fn scheduler(&self) -> MutexGuard<'_, Scheduler> {
        self.scheduler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a worker has joined a different job. A worker that names no job has joined this one.
    fn is_other_job(&self, job: &str) -> bool {
        !job.is_empty() && job != short(&self.record.fingerprint)
    }

    /// Time since the coordinator started: the scheduler's clock.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Publishes the current progress.
    pub(crate) fn publish(&self) -> Progress {
        let now = self.now();
        let progress = {
            let mut meter = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
            meter.snapshot(&self.scheduler(), now)
        };
        let progress = Progress { stalled: self.telemetry.stall().map(|stall| stall.sentence), ..progress };
        self.progress.send_replace(progress.clone());
        progress
    }

    /// What this coordinator is doing.
    pub(crate) fn phase(&self) -> Phase {
        self.ending.get().copied().unwrap_or(Phase::Working)
    }

    /// Stops granting leases. The first call decides the reason.
    pub(crate) fn close(&self, ending: Phase) {
        let _ = self.ending.set(ending);
        self.closing.cancel();
    }

    /// Why workers get no more leases.
    fn leave_reason(&self) -> LeaveReason {
        match self.phase() {
            Phase::Followed => LeaveReason::NextJob,
            Phase::Working | Phase::Stopping if self.scheduler().is_done() => LeaveReason::Done,
            Phase::Working | Phase::Stopping => LeaveReason::Stopping,
        }
    }

    /// Ends the job because the ledger failed.
    pub(crate) fn fail(&self, error: LedgerError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.close(Phase::Stopping);
    }

    /// Wakes a worker or the steward if an event has left something for them to do.
    pub(crate) fn announce(&self, scheduler: &mut Scheduler) {
        if scheduler.has_ready() {
            self.work.notify_one();
        }
        if scheduler.wants_shard().is_some() || scheduler.has_finished_shard() {
            self.steward.notify_one();
        }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub(crate) fn take_failure(&self) -> Option<LedgerError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Makes a record durable and merges it.
    pub(crate) async fn persist(&self, record: Record, of: Option<(&str, LeaseKey)>) -> Result<(), LedgerError> {
        let shard_size = self.record.identity.spec.shard_size;
        let (waste, hardware) = {
            let scheduler = self.scheduler();
            let computed = of.filter(|_| !record.results.is_empty());
            let hardware = computed.and_then(|(worker, _)| scheduler.hardware(worker)).map(str::to_owned);
            (scheduler.waste(), hardware)
        };
        if let Some(hardware) = hardware {
            self.ledger.note_hardware(&hardware).await?;
        }
        let under_way = self.telemetry.storage(Use::Append);
        self.ledger.append(&record, shard_size, waste).await?;
        drop(under_way);
        let mut scheduler = self.scheduler();
        scheduler.apply(record, of);
        self.announce(&mut scheduler);
        Ok(())
    }
}

/// Makes a record durable and merges it for a call. If the ledger fails, the call and the job fail too.
async fn persist(shared: &Shared, record: Record, of: Option<(&str, LeaseKey)>) -> Result<(), Status> {
    shared.persist(record, of).await.map_err(|error| {
        let status = Status::unavailable(error.to_string());
        shared.fail(error);
        status
    })
}

/// The job that an address currently serves.
#[derive(Clone, Debug)]
pub(crate) struct Current(Arc<RwLock<Arc<Shared>>>);

impl Current {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self(Arc::new(RwLock::new(shared)))
    }

    pub(crate) fn get(&self) -> Arc<Shared> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set(&self, shared: Arc<Shared>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = shared;
    }
}

/// The service for workers.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) current: Current,
}

fn rejoin() -> Status {
    Status::not_found("this coordinator does not know the worker: join (again)")
}

/// A sample as it is sent.
pub(crate) fn to_sample(s: Sample) -> v1::Sample {
    v1::Sample {
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
    }
}

/// A grant as it is sent.
pub(crate) fn to_block(epoch: Epoch, grant: LeasedBlock) -> v1::Block {
    let samples = grant.samples.into_iter().map(to_sample).collect();
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
        intake::check_names(&join)?;
        tracing::info!(
            worker = join.worker,
            host = join.host,
            device = join.device,
            hardware = join.hardware,
            version = join.version,
            "worker joined"
        );
        let shared = &self.current.get();
        let job = short(&shared.record.fingerprint).to_owned();
        let reply = |epoch: Epoch| v1::JoinReply {
            epoch: epoch.0,
            heartbeat_ms: shared.heartbeat.as_millis() as u32,
            job: job.clone(),
            witnesses: shared.witnesses.get().cloned().unwrap_or_default(),
        };
        if !join.job.is_empty() && join.job != job {
            // Its blocks are of another job.
            return Ok(Response::new(reply(shared.scheduler().epoch())));
        }
        shared.telemetry.workers_joined.inc();
        let mut scheduler = shared.scheduler();
        scheduler.join(&join.worker, &join.host, &join.device, shared.now());
        scheduler.is_of(&join.worker, &join.process);
        scheduler.computes_with(&join.worker, &join.hardware);
        for held in join.held {
            let key = LeaseKey { epoch: Epoch(held.epoch), lease: LeaseId(held.lease) };
            let units: Vec<_> = held.units.into_iter().filter_map(|unit| unit.try_into().ok()).collect();
            scheduler.adopt(&join.worker, key, &units, shared.now());
        }
        shared.announce(&mut scheduler);
        Ok(Response::new(reply(scheduler.epoch())))
    }

    async fn describe(&self, request: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeReply>, Status> {
        let v1::DescribeRequest { job: asked, offset } = request.into_inner();
        let shared = self.current.get();
        let job = short(&shared.record.fingerprint).to_owned();
        if asked != job {
            return Ok(Response::new(v1::DescribeReply { job, ..v1::DescribeReply::default() }));
        }
        let whole = shared.job_json.as_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(whole.len());
        let end = whole.len().min(start.saturating_add(FULL_MESSAGE_BYTES));
        Ok(Response::new(v1::DescribeReply { job, part: whole[start..end].to_vec(), total: whole.len() as u64 }))
    }

    async fn lease(&self, request: Request<v1::LeaseRequest>) -> Result<Response<v1::LeaseReply>, Status> {
        use v1::lease_reply::Outcome;
        let v1::LeaseRequest { worker, evaluations_per_second, wait_ms, held, job } = request.into_inner();
        let shared = &self.current.get();
        if shared.is_other_job(&job) {
            return Err(rejoin());
        }
        {
            let mut scheduler = shared.scheduler();
            let held: Vec<_> = held.iter().map(LeaseKey::from).collect();
            if scheduler.keep_only(&worker, &held) {
                shared.announce(&mut scheduler);
            }
        }
        let wait = Duration::from_millis(u64::from(wait_ms)).min(LONGEST_POLL);
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            // Register before looking, so that no change in between is missed.
            let work = shared.work.notified();
            if shared.closing.is_cancelled() {
                let leave = Outcome::Leave(shared.leave_reason().into());
                return Ok(Response::new(v1::LeaseReply { outcome: Some(leave) }));
            }
            {
                let mut scheduler = shared.scheduler();
                if !scheduler.knows(&worker) {
                    return Err(rejoin());
                }
                if let Some(grant) = scheduler.grant(&worker, evaluations_per_second, shared.now()) {
                    shared.announce(&mut scheduler);
                    let block = to_block(scheduler.epoch(), grant);
                    shared.telemetry.leases_granted.inc();
                    // Log this before unlocking the scheduler, so that later acknowledgements are logged after this grant.
                    lease_log::granted(&worker, &block);
                    drop(scheduler);
                    tracing::debug!(worker, lease = block.lease, units = block.units.len(), "leased");
                    let reply = v1::LeaseReply { outcome: Some(Outcome::Block(block)) };
                    check_size("a block", &reply).map_err(|error| Status::failed_precondition(error.to_string()))?;
                    return Ok(Response::new(reply));
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
        let v1::ReportRequest { worker, epoch, lease, results, failures, again, job } = request.into_inner();
        let key = LeaseKey { epoch: Epoch(epoch), lease: LeaseId(lease) };
        let shared = &self.current.get();
        let reports = |outcome| shared.telemetry.reports.get_or_create(&[("outcome", outcome)]).inc();
        // An unknown worker must join first. Its results are accepted once it says who it is.
        if shared.is_other_job(&job) || !shared.scheduler().knows(&worker) {
            return Err(rejoin());
        }
        let refused = |reason: String| {
            reports("refused");
            tracing::warn!(worker, epoch, lease, error = reason, "report refused");
            Status::invalid_argument(reason)
        };
        let record = intake::record(epoch, results, failures).map_err(refused)?;
        let checked = shared.scheduler().check(&worker, key, record, again, shared.now());
        let Checked { record, duplicates, postponed, outdated, .. } = match checked {
            Ok(checked) => checked,
            Err(error @ ReportError::NotOpen(_)) => {
                // A report that outlived its coordinator: the steward opens the shard now.
                shared.steward.notify_one();
                reports("early");
                return Err(Status::unavailable(format!("{error} yet: send the report again")));
            }
            Err(error @ ReportError::Replaced(_)) => {
                reports("early");
                return Err(Status::unavailable(error.to_string()));
            }
            Err(error @ ReportError::Unclaimed(_)) => {
                reports("early");
                return Err(Status::not_found(error.to_string()));
            }
            Err(error) => return Err(refused(error.to_string())),
        };
        for SampleFailure { sample, error, .. } in &postponed {
            tracing::warn!(worker, %sample, error, "a worker could not read an image: another worker tries before it is quarantined");
        }
        for SampleFailure { sample, error, .. } in &outdated {
            tracing::info!(worker, %sample, error, "a failure from before the retry: the sample is tried again");
        }
        let accepted = (record.results.len() + record.failures.len() + postponed.len() + outdated.len()) as u32;
        let units = lease_log::units(&record);
        persist(shared, record, Some((&worker, key))).await?;
        if !postponed.is_empty() || !outdated.is_empty() {
            // Other workers try them.
            shared.work.notify_waiters();
        }
        lease_log::acknowledged(&worker, epoch, lease, units);
        reports("accepted");
        let results = |outcome, count: u32| {
            shared.telemetry.results.get_or_create(&[("outcome", outcome)]).inc_by(u64::from(count));
        };
        results("accepted", accepted);
        results("duplicate", duplicates);
        Ok(Response::new(v1::ReportReply { accepted, duplicates }))
    }

    async fn heartbeat(&self, request: Request<v1::HeartbeatRequest>) -> Result<Response<v1::HeartbeatReply>, Status> {
        let beat = request.into_inner();
        let shared = self.current.get();
        if shared.is_other_job(&beat.job) {
            return Err(rejoin());
        }
        let mut scheduler = shared.scheduler();
        let sign = Heartbeat {
            // At most the job's own number, so that the sum over many workers does not overflow.
            unreported: beat.unreported_evaluations.min(scheduler.job().planned_evaluations()),
            held: beat.held.iter().map(LeaseKey::from).collect(),
            activity: beat.activity().into(),
            quiet: Duration::from_millis(beat.quiet_ms),
        };
        let unwanted = scheduler.heartbeat(&beat.worker, sign, shared.now()).ok_or_else(rejoin)?;
        let unwanted = unwanted.into_iter().map(v1::HeldLease::from).collect();
        Ok(Response::new(v1::HeartbeatReply { epoch: scheduler.epoch().0, unwanted }))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseReply>, Status> {
        let v1::ReleaseRequest { worker, epoch, leases, error, leaving, reason } = request.into_inner();
        let error = shortened(error);
        let reason = shortened(reason);
        let shared = &self.current.get();
        let returned = |how| shared.telemetry.leases_returned.get_or_create(&[("how", how)]).inc();
        let mut given_up: Vec<SampleFailure> = Vec::new();
        {
            let mut scheduler = shared.scheduler();
            for lease in leases {
                let key = LeaseKey { epoch: Epoch(epoch), lease: LeaseId(lease) };
                // A lease that has ended can't be handed back, nor can another worker's lease.
                if !scheduler.holds(&worker, key) {
                    tracing::warn!(worker, epoch, lease, "the worker handed back a lease that it does not hold");
                    continue;
                }
                returned(if error.is_empty() { "released" } else { "failed" });
                if error.is_empty() {
                    scheduler.release(&worker, &[key]);
                } else {
                    tracing::warn!(worker, epoch, lease, error, "block failed");
                    given_up.extend(scheduler.fail(&worker, key, &error));
                }
            }
            if leaving && scheduler.knows(&worker) {
                tracing::info!(worker, reason, "worker left");
                shared.telemetry.workers_left.get_or_create(&[("how", "by itself")]).inc();
                scheduler.leave(&worker);
            }
        }
        if !given_up.is_empty() {
            persist(shared, Record { results: Vec::new(), failures: given_up }, None).await?;
        }
        if !error.is_empty() {
            // Any worker except the one it failed on may take a failed block.
            shared.work.notify_waiters();
        }
        shared.announce(&mut shared.scheduler());
        Ok(Response::new(v1::ReleaseReply {}))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        let shared = self.current.get();
        let progress = shared.publish();
        Ok(Response::new(status::reply(&progress, shared.phase())))
    }
}
