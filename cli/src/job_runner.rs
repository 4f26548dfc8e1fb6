//! Runs a job on this machine, after its pilot if it has one, with embedded or remote workers. Shows progress and returns how
//! the job ended.

use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use elbo_coordinator::scheduler::LeasePolicy;
use elbo_coordinator::{Coordinator, CoordinatorOptions, Job, RunOutcome, Server, Then};
use elbo_core::schedule::ScheduleError;
use elbo_net::{Limits, Operator};
use elbo_worker::loaded_job::{LoadError, LoadedJob};
use elbo_worker::{Device, WorkerError};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::args::{DeviceArgs, RunArgs};
use crate::failure::{Interrupted, bad_policy, bad_setting, usage};
use crate::pilot::{PilotRun, Plan};
use crate::session::{self, Identified};
use crate::{print, progress, stop};

/// How long embedded workers may take to finish their devices' current work after their coordinator has ended.
const DEVICES_FINISH: Duration = Duration::from_secs(2);

/// A job that is done.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Done {
    /// By this run, with its number of evaluations and its time.
    Now(u64, Duration),
    /// By an earlier run.
    Before,
}

/// Embedded workers.
#[derive(Clone, Debug)]
pub(crate) struct Workers {
    /// How many; one per device if `None`.
    pub(crate) count: Option<NonZeroUsize>,
    /// The devices they compute on.
    pub(crate) device: DeviceArgs,
}

/// Runs a job with embedded workers, after its pilot of `pilot` images, if any.
pub(crate) async fn label(
    job: Identified,
    pilot: Option<u64>,
    out: &str,
    workers: &Workers,
    run: &RunArgs,
    operator: &Operator,
) -> anyhow::Result<Done> {
    let devices = session::devices(&workers.device)?;
    let engines = devices.engines(workers.count.map_or(devices.count(), NonZeroUsize::get));
    let threads = session::threads(&workers.device, engines.len());
    let stop = stop::on_signal()?;
    // Load the model before anything is written, so that a broken one fails early. All workers share it.
    let plan = make_plan(job, pilot, out, run, &stop).await?;
    let loading = plan.first().clone();
    let first = engines.first().copied().unwrap_or(Device::Cpu);
    let load = move || async move { LoadedJob::load(&loading.identity, &loading.models, first).map_err(load_error) };
    let loaded = Arc::new(stop::unless_stopped(&stop, load).await?);
    let job = open(&plan, out, run, &stop).await?;
    let (job, pilot_run, loaded) = match plan.pilot_run() {
        None => (job, None, Some((first, loaded))),
        // What is loaded is the pilot's. Workers load the job they join, so this one is dropped.
        Some(pilot_run) if job.is_done() => {
            job.close().await?;
            (arrive(pilot_run, &stop).await?, None, None)
        }
        Some(pilot_run) => (job, Some(pilot_run), None),
    };
    if job.is_done() && pilot_run.is_none() {
        return already_done(job).await;
    }
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let url = format!("http://{}", listener.local_addr()?);
    // Other users of this machine can reach the loopback address too.
    let token = uuid::Uuid::new_v4().to_string();
    let mut tasks = JoinSet::new();
    let worker = elbo_worker::WorkerOptions {
        coordinator: url,
        token: Some(token.clone()),
        tls: None,
        name: "embedded".into(),
        host: session::host(),
        engines,
        threads,
        batch: workers.device.batch,
        decode_memory: workers.device.decode_bytes(),
        patience: Duration::from_secs(60),
        grace: Duration::from_secs(60),
        model: None,
        loaded,
        stay: false,
    };
    tasks.spawn(elbo_worker::run(worker, stop.clone()));
    let options = CoordinatorOptions {
        leases: LeasePolicy::default(),
        max_bad: run.max_bad(),
        token: Some(token),
        tls: None,
        limits: Limits::default(),
    };
    JobRunner { options, run, operator }.coordinate(job, pilot_run, listener, stop, tasks).await
}

/// Turns a failure to load the model into bad usage if the flags ask for something impossible.
fn load_error(error: LoadError) -> anyhow::Error {
    match error {
        LoadError::Size { .. } | LoadError::Shortlist(_) => usage(error),
        LoadError::Policy(error) => bad_policy(error),
        LoadError::Score(error) => bad_setting(&["loss"], error),
        LoadError::Schedule(error @ (ScheduleError::Shift(_) | ScheduleError::NoFlow)) => {
            bad_setting(&["timestep-shift"], error)
        }
        other => other.into(),
    }
}

/// [`Plan::new`], unless it is interrupted.
pub(crate) async fn make_plan(
    job: Identified,
    pilot: Option<u64>,
    out: &str,
    run: &RunArgs,
    stop: &CancellationToken,
) -> anyhow::Result<Plan> {
    let (out, run) = (out.to_owned(), run.clone());
    stop::unless_stopped(stop, move || async move { Plan::new(job, pilot, &out, &run).await }).await
}

/// [`Plan::open`], unless it is interrupted.
pub(crate) async fn open(plan: &Plan, out: &str, run: &RunArgs, stop: &CancellationToken) -> anyhow::Result<Job> {
    let (plan, out, run) = (plan.clone(), out.to_owned(), run.clone());
    stop::unless_stopped(stop, move || async move { plan.open(&out, &run).await }).await
}

/// [`PilotRun::arrive`], unless it is interrupted.
async fn arrive(pilot_run: PilotRun, stop: &CancellationToken) -> anyhow::Result<Job> {
    stop::unless_stopped(stop, move || pilot_run.arrive()).await
}

/// The settings that successive coordinators share.
#[derive(Debug)]
pub(crate) struct JobRunner<'a> {
    /// How they coordinate.
    pub(crate) options: CoordinatorOptions,
    /// How they run.
    pub(crate) run: &'a RunArgs,
    /// The operator's HTTP server, which shows them.
    pub(crate) operator: &'a Operator,
}

impl JobRunner<'_> {
    /// Runs a coordinator until its job is done or stopped, or until all embedded `workers` have failed; ends the workers
    /// too. If the job is the pilot of a [`PilotRun`], then runs the main job with the same workers.
    pub(crate) async fn coordinate(
        &self,
        job: Job,
        pilot_run: Option<PilotRun>,
        listener: TcpListener,
        stop: CancellationToken,
        mut workers: JoinSet<Result<(), WorkerError>>,
    ) -> anyhow::Result<Done> {
        // The coordinator stops when asked to, and when no worker is left.
        let giving_up = stop.child_token();
        let mut server = Server::new(listener, self.options.clone());
        let mut running = pin!(async {
            match pilot_run {
                None => self.work(job, &mut server, Then::End, &giving_up).await,
                Some(pilot_run) => self.explore(job, pilot_run, &mut server, &giving_up).await,
            }
        });
        let mut failure = None;
        let done = loop {
            tokio::select! {
                done = &mut running => break done,
                Some(ended) = workers.join_next() => {
                    match ended {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => failure = Some(anyhow::Error::from(error)),
                        Err(error) => failure = Some(error.into()),
                    }
                    if workers.is_empty() {
                        giving_up.cancel();
                    }
                }
            }
        };
        // The coordinator has ended, so embedded workers can't reach it. They would retry for a minute.
        stop.cancel();
        let _ = tokio::time::timeout(DEVICES_FINISH, async { while workers.join_next().await.is_some() {} }).await;
        done?.ok_or_else(|| failure.unwrap_or_else(|| Interrupted.into()))
    }

    /// Runs a pilot and then its main job; the workers wait in between. `None` if interrupted.
    async fn explore(
        &self,
        pilot: Job,
        pilot_run: PilotRun,
        server: &mut Server,
        stop: &CancellationToken,
    ) -> anyhow::Result<Option<Done>> {
        if pilot.is_done() {
            pilot.close().await?;
        } else {
            print::note(format_args!("pilot: {} images to learn which timesteps to use", pilot.manifest.len()));
            if self.work(pilot, server, Then::AnotherJob, stop).await?.is_none() {
                return Ok(None);
            }
        }
        self.work(arrive(pilot_run, stop).await?, server, Then::End, stop).await
    }

    /// Runs a job; `None` if interrupted.
    async fn work(
        &self,
        job: Job,
        server: &mut Server,
        then: Then,
        stop: &CancellationToken,
    ) -> anyhow::Result<Option<Done>> {
        let coordinator = Coordinator::new(job, &self.options, stop.clone())?;
        self.operator.started(coordinator.operations());
        let started = Instant::now();
        let watching = coordinator.progress();
        let shown = tokio::spawn(progress::show(self.run.progress.unwrap_or_default(), coordinator.progress()));
        let outcome = coordinator.run(server, then).await;
        shown.abort();
        let _ = shown.await;
        match outcome? {
            RunOutcome::Done(_) => Ok(Some(Done::Now(watching.borrow().evaluations_here, started.elapsed()))),
            RunOutcome::Interrupted => Ok(None),
        }
    }
}

/// A job that needs no more work.
pub(crate) async fn already_done(job: Job) -> anyhow::Result<Done> {
    job.close().await?;
    Ok(Done::Before)
}
