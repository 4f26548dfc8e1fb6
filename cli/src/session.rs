//! One run of a job on this machine: a coordinator, embedded workers if any, progress, and how it ended.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use elbo_common::fingerprint::JobIdentity;
use elbo_common::model_source::{JobModels, ModelSource, Wanted};
use elbo_common::store::{Location, Store};
use elbo_coordinator::brain::LeasePolicy;
use elbo_coordinator::{Coordinator, Job, JobError, JobOptions, Options, Outcome};
use elbo_net::{Limits, Operator};
use elbo_worker::engine::Problem;
use elbo_worker::problem::ProblemError;
use elbo_worker::{Device, Devices};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::args::{DeviceArgs, HttpArgs, RunArgs};
use crate::failure::{Interrupted, usage};
use crate::job_args::{JobArgs, Takes};
use crate::pilot::{Expedition, Plan};
use crate::progress;
use crate::recorded;
use crate::stop;

/// A job that is done.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Done {
    /// By this run, which did so many evaluations in that time.
    Now(u64, Duration),
    /// By an earlier one.
    Before,
}

/// Embedded workers.
#[derive(Clone, Debug)]
pub(crate) struct Workers {
    /// How many; one for each device where that is not said.
    pub(crate) count: Option<NonZeroUsize>,
    /// What each computes on.
    pub(crate) device: DeviceArgs,
}

/// The devices asked for.
pub(crate) fn devices(args: &DeviceArgs) -> anyhow::Result<Devices> {
    let devices: Devices = args.device.as_deref().map_or(Ok(Devices::default()), str::parse).map_err(usage)?;
    devices.find().map_err(usage)
}

/// The threads of each of `workers` engines.
pub(crate) fn threads(device: &DeviceArgs, workers: usize) -> NonZeroUsize {
    let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let share = NonZeroUsize::new(cores.get() / workers.max(1)).unwrap_or(NonZeroUsize::MIN);
    device.threads.unwrap_or(share)
}

/// Files that are open beside connections: the output's, the manifest's, logs.
const FILES: u64 = 128;

/// Raises the soft limit of open files, usually 1,024, to the hard one: every worker is a connection. How many there can be.
pub(crate) fn allow_connections() -> Limits {
    let limits = Limits::default();
    // Where raising it is refused, fewer workers can connect.
    let files =
        rlimit::increase_nofile_limit(u64::MAX).or_else(|_| rlimit::getrlimit(rlimit::Resource::NOFILE).map(|l| l.0));
    let fit = files.map_or(limits.connections as u64, |files| files.saturating_sub(FILES).max(FILES));
    Limits { connections: limits.connections.min(usize::try_from(fit).unwrap_or(usize::MAX)), ..limits }
}

/// Starts to tell operators how this process is, where they asked for it.
pub(crate) async fn operate(args: HttpArgs) -> anyhow::Result<Operator> {
    let operator = Operator::default();
    if let Some(address) = args.http {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("listening on {address}: choose another address with --http"))?;
        eprintln!("status page on http://{}", listener.local_addr()?);
        // It goes on until the process ends, so that the last state can be seen.
        let serving = operator.clone().serve(listener, CancellationToken::new());
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::warn!(%error, "the HTTP side has stopped");
            }
        });
    }
    Ok(operator)
}

/// The name of this host.
pub(crate) fn host() -> String {
    hostname::get().map_or_else(|_| "unknown".into(), |name| name.to_string_lossy().into_owned())
}

/// A job whose files are here.
#[derive(Clone, Debug)]
pub(crate) struct Identified {
    /// The specification and the hashes of the files it names.
    pub(crate) identity: JobIdentity,
    /// The directories with its models' files.
    pub(crate) models: JobModels,
}

/// Finds or fetches the model of a job, completes its specification and hashes its files.
pub(crate) async fn identify(flags: &JobArgs) -> anyhow::Result<Identified> {
    let shortlist = flags.shortlist_source()?;
    let models = JobModels::find(&flags.model_source()?, shortlist.as_ref(), |note| eprintln!("{note}")).await?;
    let mut spec = flags.to_spec(&Takes::of_model(&models.model)?)?;
    if let Some(out) = &flags.calibration_from {
        spec.calibration = Some(recorded::calibration(out).await?);
    }
    let directories = models.clone();
    let identity = tokio::task::spawn_blocking(move || JobIdentity::new(spec, &directories)).await??;
    Ok(Identified { identity, models })
}

/// The directory of a model, fetched if need be.
pub(crate) async fn resolve(model: &ModelSource, wanted: Wanted) -> anyhow::Result<PathBuf> {
    Ok(model.resolve(wanted, |note| eprintln!("{note}")).await?)
}

/// Takes a job up in an output.
pub(crate) async fn open(job: Identified, out: &str, run: &RunArgs) -> anyhow::Result<Job> {
    let store = Store::create(&Location::parse(out)?)?;
    match Job::open(
        job.identity,
        &job.models.model,
        store,
        JobOptions { fresh: run.fresh, retry_quarantined: run.retry_quarantined },
    )
    .await
    {
        Err(JobError::Policy(error)) => Err(usage(error)),
        opened => Ok(opened?),
    }
}

/// Runs a job with embedded workers, after its pilot of so many images, if it is to have one.
pub(crate) async fn label(
    job: Identified,
    pilot: Option<u64>,
    out: &str,
    workers: &Workers,
    run: &RunArgs,
    operator: &Operator,
) -> anyhow::Result<Done> {
    let devices = devices(&workers.device)?;
    let engines = devices.engines(workers.count.map_or(devices.count(), NonZeroUsize::get));
    let threads = threads(&workers.device, engines.len());
    let stop = stop::on_signal()?;
    // A model that can't be loaded is found out before anything is written. All workers share it.
    let plan = Plan::new(job, pilot, out, run).await?;
    let loading = plan.first().clone();
    let first = engines.first().copied().unwrap_or(Device::Cpu);
    let problem = tokio::task::spawn_blocking(move || Problem::load(&loading.identity, &loading.models, first)).await?;
    let problem = Arc::new(problem.map_err(|e| match e {
        ProblemError::Size { .. } | ProblemError::Policy(_) | ProblemError::Score(_) | ProblemError::Shortlist(_) => {
            usage(e)
        }
        other => other.into(),
    })?);
    let job = plan.open(out, run).await?;
    let expedition = plan.expedition();
    if job.is_done() && expedition.is_none() {
        return already_done(job).await;
    }
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let url = format!("http://{}", listener.local_addr()?);
    // Other users of this machine can reach the loopback address too.
    let token = uuid::Uuid::new_v4().to_string();
    let mut tasks = JoinSet::new();
    let worker = elbo_worker::Options {
        coordinator: url,
        token: Some(token.clone()),
        tls: None,
        name: "embedded".into(),
        host: host(),
        engines,
        threads,
        batch: workers.device.batch,
        patience: Duration::from_secs(60),
        grace: Duration::from_secs(60),
        model: None,
        problem: Some((first, problem)),
        stay: false,
    };
    tasks.spawn(elbo_worker::run(worker, stop.clone()));
    let options = Options {
        leases: LeasePolicy::default(),
        max_bad: run.max_bad(),
        token: Some(token),
        tls: None,
        limits: Limits::default(),
    };
    coordinate(job, expedition, listener, options, run, operator, stop, tasks).await
}

/// Runs a coordinator until its job is done or stopped; ends it when all of some embedded `workers` have failed. Where the job
/// is the pilot of an `expedition`, the one it was for is run next, with the same workers.
#[allow(clippy::too_many_arguments, reason = "each is a part of a run of its own")]
pub(crate) async fn coordinate(
    job: Job,
    expedition: Option<Expedition>,
    listener: TcpListener,
    options: Options,
    run: &RunArgs,
    operator: &Operator,
    stop: CancellationToken,
    mut workers: JoinSet<Result<(), elbo_worker::WorkerError>>,
) -> anyhow::Result<Done> {
    // The coordinator stops when asked to, and when there is nobody left to work.
    let giving_up = stop.child_token();
    let running = async {
        let shift = Shift { options, run, operator, stop: &giving_up };
        let done = match expedition {
            None => shift.work(job, listener).await,
            Some(expedition) => shift.explore(job, expedition, listener).await,
        };
        if done.is_err() {
            // Embedded workers that wait for the job after a pilot would wait long.
            stop.cancel();
        }
        done
    };
    let following = async {
        let embedded = !workers.is_empty();
        let mut failure = None;
        while let Some(ended) = workers.join_next().await {
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => failure = Some(anyhow::Error::from(error)),
                Err(error) => failure = Some(error.into()),
            }
        }
        if embedded {
            giving_up.cancel();
        }
        failure
    };
    let (done, failure) = tokio::join!(running, following);
    done?.ok_or_else(|| failure.unwrap_or_else(|| Interrupted.into()))
}

/// What coordinators that follow each other have in common.
struct Shift<'a> {
    options: Options,
    run: &'a RunArgs,
    operator: &'a Operator,
    stop: &'a CancellationToken,
}

impl Shift<'_> {
    /// Runs a pilot, and then the job that it is for, whose workers wait meanwhile; `None` if that was interrupted.
    async fn explore(&self, pilot: Job, expedition: Expedition, listener: TcpListener) -> anyhow::Result<Option<Done>> {
        if pilot.is_done() {
            pilot.close().await?;
            return self.work(expedition.arrive().await?, listener).await;
        }
        eprintln!("pilot: {} images learn where to look", pilot.manifest.len());
        // Whoever calls while one coordinator follows the other waits in the socket's queue.
        let listener = listener.into_std()?;
        let own = TcpListener::from_std(listener.try_clone()?)?;
        let coordinator = self.coordinator(pilot)?;
        let shown = self.show(&coordinator);
        let ended = coordinator.run_before(own, expedition.arrive()).await;
        shown.abort();
        match ended? {
            (_, Some(job)) => self.work(job?, TcpListener::from_std(listener)?).await,
            (_, None) => Ok(None),
        }
    }

    /// Runs a job; `None` if it was interrupted.
    async fn work(&self, job: Job, listener: TcpListener) -> anyhow::Result<Option<Done>> {
        let coordinator = self.coordinator(job)?;
        let started = Instant::now();
        let watching = coordinator.progress();
        let shown = self.show(&coordinator);
        let outcome = coordinator.run(listener).await;
        shown.abort();
        let _ = shown.await;
        match outcome? {
            Outcome::Done(_) => Ok(Some(Done::Now(watching.borrow().evaluations_here, started.elapsed()))),
            Outcome::Interrupted => Ok(None),
        }
    }

    fn coordinator(&self, job: Job) -> anyhow::Result<Coordinator> {
        let coordinator = Coordinator::new(job, self.options.clone(), self.stop.clone())?;
        self.operator.started(coordinator.operations());
        Ok(coordinator)
    }

    fn show(&self, coordinator: &Coordinator) -> JoinHandle<()> {
        tokio::spawn(progress::show(self.run.progress.unwrap_or_default(), coordinator.progress()))
    }
}

/// A job that needs no more work.
pub(crate) async fn already_done(job: Job) -> anyhow::Result<Done> {
    job.close().await?;
    Ok(Done::Before)
}
