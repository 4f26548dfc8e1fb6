//! Running a job: the server for workers, and the steward that opens shards, commits them and ends the job.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use elbo_core::ids::{Epoch, SampleId, ShardId};
use elbo_core::policy::Course;
use elbo_core::sample::Sample;
use elbo_data::manifest::{Manifest, ManifestError};
use elbo_output::layout;
use elbo_output::record::{JobState, RecordError, Timings, Totals};
use elbo_proto::v1;
use elbo_store::checksum::Checksum;
use elbo_store::table::TableError;
use elbo_store::{DiskFault, ObjectVersion, Store, StoreError};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::calibrate::{self, CalibrateError};
use crate::commit::{self, Finishing, Kept, KeptError};
use crate::job::{self, Job};
use crate::ledger::{LedgerError, Mark};
use crate::operations::JobOperations;
use crate::options::{CoordinatorOptions, MaxBad};
use crate::progress::Progress;
use crate::repair;
use crate::scheduler::{Record, Scheduler, Shard, ShardTotals};
use crate::server::{ServeError, Server};
use crate::service::{Shared, to_sample};
use crate::status::{self, Phase};
use crate::telemetry::Use;
use crate::watchdog::StallEvent;
use crate::writer::{WriteError, Writer};

/// How often to look for silent workers and publish the progress.
const TICK: Duration = Duration::from_millis(200);

/// Shards committed at a time: while one is uploaded, another is encoded. Each takes memory for its files.
const COMMITS: usize = 2;

/// Images that workers try to read when they can't read one.
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
    /// The disk is full or read-only.
    #[error("{0}")]
    Disk(#[source] DiskFault),
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
    /// The files of an earlier commit could not be read.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// Confidence could not be written.
    #[error(transparent)]
    Calibrate(Box<CalibrateError>),
    /// The job could not be described to workers.
    #[error("describing the job: {0}")]
    Json(#[from] serde_json::Error),
    /// The server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// Too many samples had to be given up.
    #[error(
        "{quarantined} of {samples} samples are quarantined, more than --max-bad {limit} allows; see why with `elbo report {out}`, fix the cause and run the same command with --retry-quarantined, or raise --max-bad and run it again"
    )]
    TooManyBad {
        /// Samples given up.
        quarantined: u64,
        /// All samples.
        samples: u64,
        /// The limit.
        limit: MaxBad,
        /// The output.
        out: String,
    },
    /// A background task panicked, which is a defect.
    #[error("the coordinator's {0} ended unexpectedly: run the same command again to resume, and report this")]
    Task(&'static str),
}

impl From<CalibrateError> for RunError {
    fn from(error: CalibrateError) -> Self {
        Self::Calibrate(Box::new(error))
    }
}

/// What workers do once a job is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// They leave.
    End,
    /// They wait for another job at the same address.
    AnotherJob,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RunOutcome {
    /// Every sample is in predictions or quarantine.
    Done(Totals),
    /// Stopped on request; the same command resumes.
    Interrupted,
}

/// Why there is no more work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WorkEnd {
    /// Every shard is committed.
    Done,
    /// The coordinator is to stop.
    Stopped,
}

/// A coordinator for one job.
#[derive(Debug)]
pub struct Coordinator {
    shared: Arc<Shared>,
    out: Store,
    manifest: Manifest,
    course: Arc<Course>,
    /// Shards whose quarantined samples are retried, and the epoch of the retry.
    retried: BTreeMap<ShardId, Epoch>,
    max_bad: MaxBad,
    stop: CancellationToken,
}

impl Coordinator {
    /// A coordinator for an opened job; cancelling `stop` interrupts it.
    pub fn new(job: Job, options: &CoordinatorOptions, stop: CancellationToken) -> Result<Self, RunError> {
        let Job { out, record, manifest, course, ledger, done, retried } = job;
        let shape = job::shape(&record, &manifest, &course);
        let scheduler = Scheduler::new(shape, ledger.epoch(), options.leases, done, ledger.waste());
        let scheduler = scheduler.with_retried(retried.clone());
        let heartbeat = (options.leases.time_to_live / 10).max(Duration::from_millis(100));
        let shared = Arc::new(Shared::new(scheduler, ledger, record, heartbeat, CancellationToken::new())?);
        shared.publish();
        let (course, max_bad) = (Arc::new(course), options.max_bad);
        Ok(Self { shared, out, manifest, course, retried, max_bad, stop })
    }

    /// Follows the job's progress.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.shared.progress.subscribe()
    }

    /// The operators' view of the job.
    pub fn operations(&self) -> Arc<JobOperations> {
        Arc::new(JobOperations::new(Arc::clone(&self.shared), self.stop.clone()))
    }

    /// Works until the job is done, fails or is stopped, with the workers that connect to a server. `then` says what
    /// workers do once the job is done. If no job follows, the server is closed.
    ///
    /// ```no_run
    /// # async fn coordinate(job: elbo_coordinator::Job, options: elbo_coordinator::CoordinatorOptions)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// use elbo_coordinator::{Coordinator, Server, Then};
    /// use tokio_util::sync::CancellationToken;
    ///
    /// let listener = tokio::net::TcpListener::bind("0.0.0.0:7070").await?;
    /// let coordinator = Coordinator::new(job, &options, CancellationToken::new())?;
    /// let outcome = coordinator.run(&mut Server::new(listener, options), Then::End).await?;
    /// println!("{outcome:?}");
    /// # Ok(()) }
    /// ```
    pub async fn run(self, server: &mut Server, then: Then) -> Result<RunOutcome, RunError> {
        let span = self.shared.span.clone();
        let run = async {
            let out = self.out.clone();
            let ended = tokio::select! {
                ended = self.run_to_end(server, then) => ended,
                // Everything acknowledged is on the disk. All that is left is to report that the disk takes no more.
                fault = out.broken() => return Err(RunError::Disk(fault)),
            };
            ended.map_err(|error| out.fault().map_or(error, RunError::Disk))
        };
        run.instrument(span).await
    }

    async fn run_to_end(&self, server: &mut Server, then: Then) -> Result<RunOutcome, RunError> {
        let started = Instant::now();
        let _ = self.shared.witnesses.set(self.witnesses().await?);
        server.serve(&self.shared).await?;
        let ended = self.steward().await;
        let is_followed = then == Then::AnotherJob && matches!(ended, Ok(WorkEnd::Done));
        // Waiting workers are told to leave, or to wait for the next job. Workers in the middle of a block get a moment to
        // hand over their results.
        self.shared.close(if is_followed { Phase::Followed } else { Phase::Stopping });
        let mut served = Ok(());
        if !is_followed {
            // Without a ledger no result can be taken: workers must be free to find the next coordinator at once.
            if !self.shared.has_failed() && !matches!(ended, Err(RunError::Ledger(_))) {
                self.await_departures().await;
            }
            served = server.close().await;
        }
        if let Some(error) = self.shared.take_failure() {
            return Err(error.into());
        }
        let outcome = match ended? {
            WorkEnd::Done => RunOutcome::Done(self.finish(started).await?),
            WorkEnd::Stopped => RunOutcome::Interrupted,
        };
        self.shared.ledger.close().await?;
        self.shared.publish();
        served?;
        Ok(outcome)
    }

    /// Images from all over the dataset, so that they are not all from one directory, archive or bucket.
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

    /// Opens shards as work runs low, commits finished ones, and takes back the leases of silent workers, until all is done
    /// or the coordinator must stop.
    ///
    /// Commits and openings block neither each other nor the workers.
    async fn steward(&self) -> Result<WorkEnd, RunError> {
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
                return Ok(WorkEnd::Done);
            }
            tokio::select! {
                () = shared.steward.notified() => {}
                Some(committed) = commits.next() => committed?,
                Some(opened) = opening.next() => opened?,
                () = self.stop.cancelled() => break,
                () = shared.closing.cancelled() => return Ok(WorkEnd::Stopped),
                _ = tick.tick() => self.tick().await?,
            }
        }
        while let Some(committed) = commits.next().await {
            committed?;
        }
        Ok(WorkEnd::Stopped)
    }

    async fn tick(&self) -> Result<(), RunError> {
        let shared = &self.shared;
        shared.ledger.check()?;
        let (silent, given_up) = shared.scheduler().expire(shared.now());
        if !silent.is_empty() {
            shared.work.notify_waiters();
        }
        if shared.scheduler().has_only_leased() {
            // A waiting worker may get a backup of slow units, which depends on the time.
            shared.work.notify_one();
        }
        for worker in silent {
            tracing::warn!(worker, "worker is silent: its leases go to others");
            shared.telemetry.workers_left.get_or_create(&[("how", "silent")]).inc();
        }
        let seen = status::observe(&shared.publish(), shared.now(), shared.telemetry.slowest());
        match shared.telemetry.look(&seen) {
            Some(StallEvent::Stalled(stall)) => tracing::warn!(part = stall.part.name(), "stalled: {}", stall.sentence),
            Some(StallEvent::Resumed) => tracing::info!("the job makes progress again"),
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
            // The user may have replaced a bad file before the retry.
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

    /// Takes the next finished shard, which counts as being committed from here on.
    fn finishing(&self) -> Option<(Finishing, ShardTotals)> {
        let mut scheduler = self.shared.scheduler();
        let shard = *scheduler.finished_shards().first()?;
        let (manifest, outcomes, totals) = scheduler.finished(shard)?;
        Some((Finishing { shard, manifest, outcomes, kept: Kept::default() }, totals))
    }

    /// Commits a shard: first the files, by atomic puts of content that is a pure function of the job; then the ledger's
    /// mark.
    async fn commit_shard(&self, (mut finishing, totals): (Finishing, ShardTotals)) -> Result<(), RunError> {
        let _under_way = self.shared.telemetry.storage(Use::Commit);
        let shard = finishing.shard;
        let is_retried = self.retried.contains_key(&shard);
        if is_retried {
            finishing.kept = Kept::read(&self.out, shard, &self.shared.record).await?;
        }
        // The quarantine may be from before a retry, or from an earlier coordinator whose write has not arrived yet.
        let had_quarantine = is_retried || self.out.look(&layout::quarantine(shard)).await? != ObjectVersion::Nothing;
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
        let limit = self.max_bad;
        if limit.allows(quarantined, samples) {
            Ok(())
        } else {
            Err(RunError::TooManyBad { quarantined, samples, limit, out: self.out.location().to_string() })
        }
    }

    /// Waits briefly until the workers have left.
    async fn await_departures(&self) {
        let patience = tokio::time::Instant::now() + Duration::from_secs(5);
        while !self.shared.scheduler().is_alone() && tokio::time::Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Writes the results that need all shards: confidence, and `job.json`.
    async fn finish(&self, started: Instant) -> Result<Totals, RunError> {
        let totals = {
            let scheduler = self.shared.scheduler();
            scheduler.totals().of_job(scheduler.waste())
        };
        // Clear again, since late files may have arrived while this job ran.
        repair::clear_late(self.writer()).await?;
        let mut record = self.shared.record.clone();
        calibrate::calibrate(self.writer(), &self.manifest, &mut record).await?;
        record.state = JobState::Done;
        record.totals = Some(totals);
        record.hardware.extend(self.shared.ledger.hardware());
        record.timings =
            Some(Timings { starts: self.shared.ledger.epoch().0, seconds: started.elapsed().as_secs_f64() });
        self.writer().write(vec![record.file(&self.out)?]).await?;
        Ok(totals)
    }

    fn writer(&self) -> Writer<'_> {
        Writer { out: &self.out, ledger: &self.shared.ledger }
    }
}
