//! Running a job: the server workers talk to, and the steward that opens, commits and ends.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use elbo_core::ids::{Epoch, SampleId, ShardId};
use elbo_core::policy::Course;
use elbo_core::sample::Sample;
use elbo_data::manifest::{Manifest, ManifestError};
use elbo_net::LimitedListener;
use elbo_output::layout;
use elbo_output::record::{JobState, RecordError, Timings, Totals};
use elbo_proto::v1;
use elbo_store::checksum::Checksum;
use elbo_store::table::TableError;
use elbo_store::{Fault, Seen, Store, StoreError};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use crate::calibrate::{self, CalibrateError};
use crate::commit::{self, Finishing, Kept, KeptError};
use crate::job::{self, Job};
use crate::ledger::{LedgerError, Mark};
use crate::operations::JobOperations;
use crate::options::{MaxBad, Options};
use crate::progress::Progress;
use crate::repair;
use crate::scheduler::{Record, Scheduler, Shard, ShardTotals};
use crate::server::serve;
use crate::service::{Shared, to_sample};
use crate::status;
use crate::telemetry::Use;
use crate::watchdog::StallEvent;
use crate::writer::{WriteError, Writer};

/// How often silent workers are looked for and progress is published.
const TICK: Duration = Duration::from_millis(200);

/// Shards committed at a time: while one is uploaded, another is encoded. Each takes memory for its files.
const COMMITS: usize = 2;

/// Images that workers may try to read when they can't read one.
const WITNESSES: u64 = 16;

/// A job that could not be finished.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The ledger failed.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The output failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk takes no more.
    #[error("{0}")]
    Disk(#[source] Fault),
    /// A file of the output could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// `job.json` could not be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A table could not be read or written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The manifest could not be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// What an earlier commit wrote could not be read.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// Confidence could not be written.
    #[error(transparent)]
    Calibrate(Box<CalibrateError>),
    /// The job could not be described to workers.
    #[error("describing the job: {0}")]
    Json(#[from] serde_json::Error),
    /// The server failed.
    #[error("serving on {address}: {source}")]
    Serve {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: tonic::transport::Error,
    },
    /// Too many samples had to be given up.
    #[error(
        "{quarantined} of {samples} samples are quarantined, more than --max-bad {limit} allows; see why with `elbo report {out}`, mend the cause and run the same command with --retry-quarantined, or raise --max-bad and run it again"
    )]
    TooManyBad {
        /// Samples given up.
        quarantined: u64,
        /// Samples in all.
        samples: u64,
        /// The limit.
        limit: MaxBad,
        /// The output.
        out: String,
    },
    /// A background task ended by a panic, which is a defect.
    #[error("the coordinator's {0} ended unexpectedly: run the same command again to resume, and report this")]
    Task(&'static str),
}

impl From<CalibrateError> for RunError {
    fn from(error: CalibrateError) -> Self {
        Self::Calibrate(Box::new(error))
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Every sample is in predictions or quarantine.
    Done(Totals),
    /// Stopped on request; the same command resumes.
    Interrupted,
}

/// A coordinator for one job.
#[derive(Debug)]
pub struct Coordinator {
    shared: Arc<Shared>,
    out: Store,
    manifest: Manifest,
    course: Arc<Course>,
    /// Shards whose quarantined samples get another try, and since which epoch.
    retried: BTreeMap<ShardId, Epoch>,
    options: Options,
    stop: CancellationToken,
}

impl Coordinator {
    /// A coordinator for an opened job; cancelling `stop` interrupts it.
    pub fn new(job: Job, options: Options, stop: CancellationToken) -> Result<Self, RunError> {
        let Job { out, record, manifest, course, ledger, done, retried } = job;
        let shape = job::shape(&record, &manifest, &course);
        let scheduler = Scheduler::new(shape, ledger.epoch(), options.leases, done, ledger.waste());
        let scheduler = scheduler.with_retried(retried.clone());
        let heartbeat = (options.leases.time_to_live / 10).max(Duration::from_millis(100));
        let shared = Arc::new(Shared::new(scheduler, ledger, record, heartbeat, CancellationToken::new())?);
        shared.publish();
        Ok(Self { shared, out, manifest, course: Arc::new(course), retried, options, stop })
    }

    /// Follows the job's progress.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.shared.progress.subscribe()
    }

    /// What operators are told of it.
    pub fn operations(&self) -> Arc<JobOperations> {
        Arc::new(JobOperations::new(Arc::clone(&self.shared), self.stop.clone()))
    }

    /// Serves workers until the job is done, fails or is stopped.
    pub async fn run(self, listener: TcpListener) -> Result<Outcome, RunError> {
        let nothing: Option<std::future::Ready<()>> = None;
        let span = self.shared.span.clone();
        Ok(self.run_in_span(listener, nothing).instrument(span).await?.0)
    }

    /// The same, and once the job is done `next` while workers wait for another job at the same address; with what came of it.
    pub async fn run_before<N: Future>(
        self,
        listener: TcpListener,
        next: N,
    ) -> Result<(Outcome, Option<N::Output>), RunError> {
        let span = self.shared.span.clone();
        self.run_in_span(listener, Some(next)).instrument(span).await
    }

    /// Runs until it ends, or the output's disk takes no more: then all that is acknowledged is on it, and nothing else helps
    /// than to say so.
    async fn run_in_span<N: Future>(
        self,
        listener: TcpListener,
        next: Option<N>,
    ) -> Result<(Outcome, Option<N::Output>), RunError> {
        let out = self.out.clone();
        let ended = tokio::select! {
            ended = self.run_to_end(listener, next) => ended,
            fault = out.broken() => return Err(RunError::Disk(fault)),
        };
        ended.map_err(|error| out.fault().map_or(error, RunError::Disk))
    }

    async fn run_to_end<N: Future>(
        self,
        listener: TcpListener,
        next: Option<N>,
    ) -> Result<(Outcome, Option<N::Output>), RunError> {
        let started = Instant::now();
        let _ = self.shared.witnesses.set(self.witnesses().await?);
        let address = listener.local_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
        let hang_up = CancellationToken::new();
        let door = LimitedListener::new(listener, self.options.limits);
        let serving = serve(Arc::clone(&self.shared), &self.options, door, hang_up.clone());
        let server = AbortOnDropHandle::new(tokio::spawn(serving.in_current_span()));
        let ended = self.steward().await;
        let next = next.filter(|_| matches!(ended, Ok(true)));
        self.shared.is_followed.store(next.is_some(), Ordering::Relaxed);
        // Waiting workers are told to leave; those in the middle of a block get a moment to hand over what they have.
        self.shared.closing.cancel();
        let followed = match next {
            Some(next) => {
                let finished = self.finish(started).await;
                let made = if finished.is_ok() { Some(next.await) } else { None };
                Some((finished, made))
            }
            None => {
                if !matches!(ended, Err(RunError::Ledger(_))) {
                    self.await_departures().await;
                }
                None
            }
        };
        hang_up.cancel();
        let served = server.await.map_err(|_| RunError::Task("server"))?;
        let ended = match self.shared.take_failure() {
            Some(error) => Err(error.into()),
            None => ended,
        };
        let (outcome, made) = match (ended?, followed) {
            (_, Some((finished, made))) => (Outcome::Done(finished?), made),
            (true, None) => (Outcome::Done(self.finish(started).await?), None),
            (false, None) => (Outcome::Interrupted, None),
        };
        self.shared.ledger.close().await?;
        self.shared.publish();
        served.map_err(|source| RunError::Serve { address, source })?;
        Ok((outcome, made))
    }

    /// Images from all over the dataset, so that no directory, archive or bucket stands for all.
    async fn witnesses(&self) -> Result<Vec<v1::Sample>, RunError> {
        let samples = self.manifest.len();
        let count = WITNESSES.min(samples);
        let mut chosen: BTreeMap<ShardId, Vec<u64>> = BTreeMap::new();
        for id in (0..count).map(|n| (2 * n + 1) * samples / (2 * count)) {
            chosen.entry(SampleId(id).shard(self.shared.record.identity.spec.shard_size)).or_default().push(id);
        }
        let mut witnesses = Vec::new();
        for (shard, ids) in chosen {
            let of_shard = self.manifest.shard(shard).await?.into_iter();
            let chosen = of_shard.filter(|sample| ids.contains(&sample.id.0));
            witnesses.extend(chosen.map(|sample| to_sample(Sample { candidates: Vec::new(), ..sample })));
        }
        Ok(witnesses)
    }

    /// Opens shards as work runs low, commits finished ones, takes silent workers' leases back. `true` when all is done.
    ///
    /// Neither a commit nor an opening keeps the others waiting, nor the workers.
    async fn steward(&self) -> Result<bool, RunError> {
        let mut commits = FuturesUnordered::new();
        let mut opening = FuturesUnordered::new();
        let mut tick = tokio::time::interval(TICK);
        let shared = &self.shared;
        loop {
            if commits.len() < COMMITS
                && let Some(finishing) = self.finishing()
            {
                let span = tracing::trace_span!(target: "elbo::trace", "commit", shard = %finishing.0.shard);
                commits.push(self.commit_shard(finishing).instrument(span));
                continue;
            }
            if opening.is_empty()
                && let Some(shard) = self.shared.scheduler().wants_shard()
            {
                let span = tracing::trace_span!(target: "elbo::trace", "open", %shard);
                opening.push(self.open_shard(shard).instrument(span));
            }
            self.check_quarantine()?;
            if shared.scheduler().is_done() {
                return Ok(true);
            }
            tokio::select! {
                () = shared.steward.notified() => {}
                Some(committed) = commits.next() => committed?,
                Some(opened) = opening.next() => opened?,
                () = self.stop.cancelled() => break,
                () = shared.closing.cancelled() => return Ok(false),
                _ = tick.tick() => self.tick().await?,
            }
        }
        while let Some(committed) = commits.next().await {
            committed?;
        }
        Ok(false)
    }

    async fn tick(&self) -> Result<(), RunError> {
        let shared = &self.shared;
        shared.ledger.check()?;
        let (silent, given_up) = shared.scheduler().expire(shared.now());
        if !silent.is_empty() {
            shared.work.notify_waiters();
        }
        if shared.scheduler().has_only_leased() {
            // One that waits may be given a second lease on what is slow, which depends on the time.
            shared.work.notify_one();
        }
        for worker in silent {
            tracing::warn!(worker, "worker gave no sign of life: its leases go to others");
            shared.telemetry.workers_left.get_or_create(&[("how", "silent")]).inc();
        }
        let seen = status::observe(&shared.publish(), shared.now(), shared.telemetry.slowest());
        match shared.telemetry.look(&seen) {
            Some(StallEvent::Stalled(stall)) => tracing::warn!(part = stall.part.name(), "stalled: {}", stall.sentence),
            Some(StallEvent::Resumed) => tracing::info!("the job gets on again"),
            None => {}
        }
        if !given_up.is_empty() {
            shared.persist(Record { results: Vec::new(), failures: given_up }, None).await?;
        }
        Ok(())
    }

    async fn open_shard(&self, shard: ShardId) -> Result<(), RunError> {
        let _under_way = self.shared.telemetry.storage(Use::Open);
        let mut samples = self.manifest.shard(shard).await?;
        let retried = self.retried.get(&shard).copied();
        let records = self.shared.ledger.records(shard, retried).await?;
        let kept = match retried {
            Some(_) => Kept::read(&self.out, shard, &self.shared.record).await?.evaluations(),
            None => Vec::new(),
        };
        if retried.is_some() {
            // Who asks for another try may have put a sound file in the place of a bad one.
            for sample in samples.iter_mut().filter(|sample| sample.part.is_none()) {
                (sample.size, sample.etag) = (0, None);
            }
        }
        tracing::debug!(%shard, samples = samples.len(), records = records.len(), "shard opened");
        let job = Arc::clone(self.shared.scheduler().job());
        let restoring = tokio::task::spawn_blocking(move || Shard::restore(&job, samples, &kept, records));
        let restored = restoring.await.map_err(|_| RunError::Task("reader"))?;
        let mut scheduler = self.shared.scheduler();
        scheduler.open_shard(shard, restored, self.shared.now());
        self.shared.announce(&mut scheduler);
        Ok(())
    }

    /// The next finished shard, which is being committed from here on.
    fn finishing(&self) -> Option<(Finishing, ShardTotals)> {
        let mut scheduler = self.shared.scheduler();
        let shard = *scheduler.finished_shards().first()?;
        let (manifest, outcomes, totals) = scheduler.finished(shard)?;
        Some((Finishing { shard, manifest, outcomes, kept: Kept::default() }, totals))
    }

    /// The commit rule: files first, by atomic puts of content that is a pure function of the job; then the ledger's mark.
    async fn commit_shard(&self, (mut finishing, totals): (Finishing, ShardTotals)) -> Result<(), RunError> {
        let _under_way = self.shared.telemetry.storage(Use::Commit);
        let shard = finishing.shard;
        let is_retried = self.retried.contains_key(&shard);
        if is_retried {
            finishing.kept = Kept::read(&self.out, shard, &self.shared.record).await?;
        }
        // Of an earlier try, or one that a coordinator before this has written and that has not arrived yet.
        let had_quarantine = is_retried || self.out.look(&layout::quarantine(shard)).await? != Seen::Nothing;
        let (shared, course) = (Arc::clone(&self.shared), Arc::clone(&self.course));
        let encode = move || {
            let files = commit::files(&finishing, had_quarantine, &shared.record, course.slots())?;
            let checksums = files.iter().map(|(path, bytes)| Checksum::of(path, bytes)).collect();
            Ok::<(_, Vec<Checksum>), TableError>((files, checksums))
        };
        let encoding = tokio::task::spawn_blocking(encode).await;
        let (files, checksums) = encoding.map_err(|_| RunError::Task("encoder"))??;
        self.writer().write(files).await?;
        let waste = self.shared.scheduler().waste();
        self.shared.ledger.commit(shard, Mark { totals, files: checksums }, waste).await?;
        self.shared.scheduler().close_shard(shard);
        tracing::info!(%shard, samples = totals.samples, quarantined = totals.quarantined, "shard committed");
        Ok(())
    }

    fn check_quarantine(&self) -> Result<(), RunError> {
        let (quarantined, samples) = (self.shared.scheduler().totals().quarantined, self.manifest.len());
        let limit = self.options.max_bad;
        if limit.allows(quarantined, samples) {
            Ok(())
        } else {
            Err(RunError::TooManyBad { quarantined, samples, limit, out: self.out.location().to_string() })
        }
    }

    /// Waits, but not for long, until workers have left.
    async fn await_departures(&self) {
        let patience = tokio::time::Instant::now() + Duration::from_secs(5);
        while !self.shared.scheduler().is_alone() && tokio::time::Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn finish(&self, started: Instant) -> Result<Totals, RunError> {
        let totals = {
            let scheduler = self.shared.scheduler();
            scheduler.totals().of_job(scheduler.waste())
        };
        // Once more, for what has arrived while this job ran.
        repair::clear_late(self.writer()).await?;
        let mut record = self.shared.record.clone();
        calibrate::calibrate(self.writer(), &self.manifest, &mut record).await?;
        record.state = JobState::Done;
        record.totals = Some(totals);
        record.timings =
            Some(Timings { starts: self.shared.ledger.epoch().0, seconds: started.elapsed().as_secs_f64() });
        self.writer().write(vec![record.file(&self.out)?]).await?;
        Ok(totals)
    }

    fn writer(&self) -> Writer<'_> {
        Writer { out: &self.out, ledger: &self.shared.ledger }
    }
}
