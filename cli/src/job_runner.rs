//! Runs a job on this machine, after its pilot if it has one, with embedded workers or with others; shows progress, and says
//! how it ended.

use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use elbo_coordinator::scheduler::LeasePolicy;
use elbo_coordinator::{Coordinator, Job, Options, Outcome};
use elbo_net::{Limits, Operator};
use elbo_worker::engine::Problem;
use elbo_worker::problem::ProblemError;
use elbo_worker::{Device, WorkerError};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::args::{DeviceArgs, RunArgs};
use crate::failure::{Interrupted, usage};
use crate::pilot::{PilotRun, Plan};
use crate::session::{self, Identified};
use crate::{print, progress, stop};

/// How long embedded workers may take to finish what their devices are at, once their coordinator has ended.
const DEVICES_FINISH: Duration = Duration::from_secs(2);

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

/// Runs a job with embedded workers, after its pilot of so many images, if it is to have one.
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
    // A model that can't be loaded is found out before anything is written. All workers share it.
    let plan = make_plan(job, pilot, out, run, &stop).await?;
    let loading = plan.first().clone();
    let first = engines.first().copied().unwrap_or(Device::Cpu);
    let load = move || async move { Problem::load(&loading.identity, &loading.models, first).map_err(load_error) };
    let problem = Arc::new(stop::unless_stopped(&stop, load).await?);
    let job = open(&plan, out, run, &stop).await?;
    let (job, pilot_run, problem) = match plan.pilot_run() {
        None => (job, None, Some((first, problem))),
        // What was loaded is the pilot's: workers load what they join, and hold no other.
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
    let worker = elbo_worker::Options {
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
        problem,
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
    JobRunner { options, run, operator }.coordinate(job, pilot_run, listener, stop, tasks).await
}

/// A model that can't be loaded, as bad usage where the flags ask for something impossible.
fn load_error(error: ProblemError) -> anyhow::Error {
    match error {
        ProblemError::Size { .. } | ProblemError::Policy(_) | ProblemError::Score(_) | ProblemError::Shortlist(_) => {
            usage(error)
        }
        other => other.into(),
    }
}

/// [`Plan::new`], unless that is interrupted.
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

/// [`Plan::open`], unless that is interrupted.
pub(crate) async fn open(plan: &Plan, out: &str, run: &RunArgs, stop: &CancellationToken) -> anyhow::Result<Job> {
    let (plan, out, run) = (plan.clone(), out.to_owned(), run.clone());
    stop::unless_stopped(stop, move || async move { plan.open(&out, &run).await }).await
}

/// [`PilotRun::arrive`], unless that is interrupted.
async fn arrive(pilot_run: PilotRun, stop: &CancellationToken) -> anyhow::Result<Job> {
    stop::unless_stopped(stop, move || pilot_run.arrive()).await
}

/// What coordinators that follow each other have in common.
#[derive(Debug)]
pub(crate) struct JobRunner<'a> {
    /// How they coordinate.
    pub(crate) options: Options,
    /// How they run.
    pub(crate) run: &'a RunArgs,
    /// Who is told of them.
    pub(crate) operator: &'a Operator,
}

impl JobRunner<'_> {
    /// Runs a coordinator until its job is done or stopped; ends it when all of some embedded `workers` have failed, and them
    /// with it. Where the job is the pilot of a [`PilotRun`], the one it was for is run next, with the same workers.
    pub(crate) async fn coordinate(
        &self,
        job: Job,
        pilot_run: Option<PilotRun>,
        listener: TcpListener,
        stop: CancellationToken,
        mut workers: JoinSet<Result<(), WorkerError>>,
    ) -> anyhow::Result<Done> {
        // The coordinator stops when asked to, and when there is nobody left to work.
        let giving_up = stop.child_token();
        let mut running = pin!(async {
            match pilot_run {
                None => self.work(job, listener, &giving_up).await,
                Some(pilot_run) => self.explore(job, pilot_run, listener, &giving_up).await,
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
        // However it ended, nobody is left whom embedded workers could ask or report to. They would try for a minute.
        stop.cancel();
        let _ = tokio::time::timeout(DEVICES_FINISH, async { while workers.join_next().await.is_some() {} }).await;
        done?.ok_or_else(|| failure.unwrap_or_else(|| Interrupted.into()))
    }

    /// Runs a pilot, and then the job that it is for, whose workers wait meanwhile; `None` if that was interrupted.
    async fn explore(
        &self,
        pilot: Job,
        pilot_run: PilotRun,
        listener: TcpListener,
        stop: &CancellationToken,
    ) -> anyhow::Result<Option<Done>> {
        if pilot.is_done() {
            pilot.close().await?;
            return self.work(arrive(pilot_run, stop).await?, listener, stop).await;
        }
        print::note(format_args!("pilot: {} images learn where to look", pilot.manifest.len()));
        // Whoever calls while one coordinator follows the other waits in the socket's queue.
        let listener = listener.into_std()?;
        let own = TcpListener::from_std(listener.try_clone()?)?;
        let coordinator = self.coordinator(pilot, stop)?;
        let shown = self.show(&coordinator);
        let ended = coordinator.run_before(own, arrive(pilot_run, stop)).await;
        shown.abort();
        match ended? {
            (_, Some(job)) => self.work(job?, TcpListener::from_std(listener)?, stop).await,
            (_, None) => Ok(None),
        }
    }

    /// Runs a job; `None` if it was interrupted.
    async fn work(&self, job: Job, listener: TcpListener, stop: &CancellationToken) -> anyhow::Result<Option<Done>> {
        let coordinator = self.coordinator(job, stop)?;
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

    fn coordinator(&self, job: Job, stop: &CancellationToken) -> anyhow::Result<Coordinator> {
        let coordinator = Coordinator::new(job, self.options.clone(), stop.clone())?;
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
