//! One run of a job on this machine: a coordinator, embedded workers if any, progress, and how it ended.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use elbo_common::fingerprint::JobIdentity;
use elbo_common::model_source::{JobModels, ModelSource, Wanted};
use elbo_common::store::{Location, Store};
use elbo_coordinator::brain::LeasePolicy;
use elbo_coordinator::{Coordinator, Job, JobError, JobOptions, MaxBad, Options, Outcome};
use elbo_worker::Devices;
use elbo_worker::engine::Problem;
use elbo_worker::problem::ProblemError;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::args::{DeviceArgs, RunArgs, TokenArgs};
use crate::failure::{Interrupted, usage};
use crate::job_args::{JobArgs, Takes};
use crate::progress;
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
    args.device.as_deref().map_or(Ok(Devices::default()), str::parse).map_err(usage)
}

/// The threads of each of `workers` engines.
pub(crate) fn threads(device: &DeviceArgs, workers: usize) -> NonZeroUsize {
    let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let share = NonZeroUsize::new(cores.get() / workers.max(1)).unwrap_or(NonZeroUsize::MIN);
    device.threads.unwrap_or(share)
}

/// The content of a token file, or of ELBO_TOKEN.
pub(crate) fn read_token(args: &TokenArgs) -> anyhow::Result<Option<String>> {
    let token = match &args.token_file {
        Some(path) => std::fs::read_to_string(path)
            .map(Some)
            .map_err(|e| anyhow::anyhow!("reading the token file {}: {e}", path.display()))?,
        None => std::env::var("ELBO_TOKEN").ok(),
    };
    let token = token.map(|t| t.trim().to_owned());
    if token.as_deref() == Some("") {
        return Err(usage("the token is empty: write a secret into the token file, or unset ELBO_TOKEN"));
    }
    Ok(token)
}

/// Raises the soft limit of open files, usually 1,024, to the hard one: every worker is a connection.
pub(crate) fn allow_connections() {
    // Where that is refused, fewer workers can connect.
    let _ = rlimit::increase_nofile_limit(u64::MAX);
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
    let spec = flags.to_spec(&Takes::of_model(&models.model)?)?;
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

/// Runs a job with embedded workers.
pub(crate) async fn label(job: Identified, out: &str, workers: &Workers, run: &RunArgs) -> anyhow::Result<Done> {
    let devices = devices(&workers.device)?;
    let engines = devices.engines(workers.count.map_or(devices.count(), NonZeroUsize::get));
    let threads = threads(&workers.device, engines.len());
    let stop = stop::on_signal()?;
    // A model that can't be loaded is found out before anything is written. All workers share it.
    let loading = job.clone();
    let problem = tokio::task::spawn_blocking(move || Problem::load(&loading.identity, &loading.models)).await?;
    let problem = Arc::new(problem.map_err(|e| match e {
        ProblemError::Size { .. } | ProblemError::Policy(_) | ProblemError::Score(_) | ProblemError::Shortlist(_) => {
            usage(e)
        }
        other => other.into(),
    })?);
    let job = open(job, out, run).await?;
    if job.is_done() {
        return already_done(job).await;
    }
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let url = format!("http://{}", listener.local_addr()?);
    // Other users of this machine can reach the loopback address too.
    let token = uuid::Uuid::new_v4().to_string();
    let mut tasks = JoinSet::new();
    let options = elbo_worker::Options {
        coordinator: url,
        token: Some(token.clone()),
        name: "embedded".into(),
        host: host(),
        engines,
        threads,
        batch: workers.device.batch,
        patience: Duration::from_secs(60),
        grace: Duration::from_secs(60),
        model: None,
        problem: Some(problem),
        stay: false,
    };
    tasks.spawn(elbo_worker::run(options, stop.clone()));
    coordinate(job, listener, Some(token), LeasePolicy::default(), run, stop, tasks).await
}

/// Runs a job's coordinator until it is done or stopped; ends it when all of some embedded `workers` have failed.
pub(crate) async fn coordinate(
    job: Job,
    listener: TcpListener,
    token: Option<String>,
    leases: LeasePolicy,
    run: &RunArgs,
    stop: CancellationToken,
    mut workers: JoinSet<Result<(), elbo_worker::WorkerError>>,
) -> anyhow::Result<Done> {
    // The coordinator stops when asked to, and when there is nobody left to work.
    let giving_up = stop.child_token();
    let coordinator = Coordinator::new(
        job,
        Options { leases, max_bad: run.max_bad.unwrap_or(MaxBad::Percent(10.0)), token },
        giving_up.clone(),
    )?;
    let started = Instant::now();
    let before = coordinator.progress().borrow().evaluations;
    let watching = coordinator.progress();
    let bar = tokio::spawn(progress::show(run.progress.unwrap_or_default(), coordinator.progress()));
    let running = coordinator.run(listener);
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
    let (outcome, failure) = tokio::join!(running, following);
    bar.abort();
    let _ = bar.await;
    match outcome? {
        Outcome::Done(_) => Ok(Done::Now(watching.borrow().evaluations.saturating_sub(before), started.elapsed())),
        Outcome::Interrupted => Err(failure.unwrap_or_else(|| Interrupted.into())),
    }
}

/// A job that needs no more work.
pub(crate) async fn already_done(job: Job) -> anyhow::Result<Done> {
    job.close().await?;
    Ok(Done::Before)
}
