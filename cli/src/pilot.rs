//! `--pilot N`: a small job before a race, which learns the timesteps for it.

use elbo_coordinator::job::discard;
use elbo_coordinator::pilot::{self, PilotError};
use elbo_coordinator::{Job, JobError, JobOptions};
use elbo_output::layout;
use elbo_output::record::JobRecord;
use elbo_store::{Location, Store};

use crate::args::RunArgs;
use crate::failure::{bad_policy, usage};
use crate::print;
use crate::session::{self, Identified};

/// The jobs to run in an output, one after the other.
#[derive(Clone, Debug)]
pub(crate) enum Plan {
    /// The job itself: it has no pilot, or its pilot is already done.
    Job(Box<Identified>),
    /// The pilot first.
    Pilot(Box<PilotRun>),
}

/// A pilot and its main job.
#[derive(Clone, Debug)]
pub(crate) struct PilotRun {
    /// The small job.
    pub(crate) pilot: Identified,
    /// The main job.
    then: Identified,
    /// The output of both.
    out: String,
}

impl Plan {
    /// The jobs to run in an output for a job with a pilot of `images` images, if any.
    pub(crate) async fn new(job: Identified, images: Option<u64>, out: &str, run: &RunArgs) -> anyhow::Result<Self> {
        let Some(images) = images else { return Ok(Self::Job(Box::new(job))) };
        let identity = pilot::identity(&job.identity, &job.models.model, images).map_err(as_usage)?;
        let pilot = Identified { identity, ..job.clone() };
        let pilot_run = Self::Pilot(Box::new(PilotRun { pilot, then: job.clone(), out: out.to_owned() }));
        if run.fresh {
            return Ok(pilot_run);
        }
        let store = Store::create(&Location::parse(out)?)?;
        if let Some(learned) = pilot::known(&store).await? {
            pilot_run.check_known(&store, out).await?;
            let identity = pilot::with_timesteps(job.identity, learned);
            return Ok(Self::Job(Box::new(Identified { identity, ..job })));
        }
        if JobRecord::read(&store).await?.is_some() {
            return Err(usage(format!(
                "{out} holds a job that was started without a pilot: leave out --pilot to resume it, use another \
                 --out, or discard it with --fresh"
            )));
        }
        Ok(pilot_run)
    }

    /// Refuses timesteps that another job's pilot has learned. If the main job has a record, that record is checked instead.
    async fn check_known(&self, store: &Store, out: &str) -> anyhow::Result<()> {
        if JobRecord::read(store).await?.is_some() {
            return Ok(());
        }
        let learned_by = Store::create(&Location::parse(&directory(out))?)?;
        let Some(record) = JobRecord::read(&learned_by).await? else { return Ok(()) };
        let differences = self.first().identity.differences(&record.identity);
        if differences.is_empty() {
            return Ok(());
        }
        Err(JobError::Different { location: learned_by.location().to_string(), differences }.into())
    }

    /// The job to run first.
    pub(crate) fn first(&self) -> &Identified {
        match self {
            Self::Job(job) => job,
            Self::Pilot(pilot_run) => &pilot_run.pilot,
        }
    }

    /// Opens the job to run first.
    pub(crate) async fn open(&self, out: &str, run: &RunArgs) -> anyhow::Result<Job> {
        match self {
            Self::Job(job) => session::open(job.as_ref().clone(), out, run).await,
            Self::Pilot(pilot_run) => {
                if run.fresh {
                    // Discard now: discarding when the main job is opened would also discard the pilot's timesteps.
                    discard(&Store::create(&Location::parse(out)?)?).await?;
                }
                // `--recompute` is for the main job, which has no shards yet.
                let run = RunArgs { recompute: Vec::new(), ..run.clone() };
                session::open(pilot_run.pilot.clone(), &directory(out), &run).await
            }
        }
    }

    /// The pilot, if one must run.
    pub(crate) fn pilot_run(self) -> Option<PilotRun> {
        match self {
            Self::Job(_) => None,
            Self::Pilot(pilot_run) => Some(*pilot_run),
        }
    }
}

impl PilotRun {
    /// Learns from the finished pilot and opens the main job.
    pub(crate) async fn arrive(self) -> anyhow::Result<Job> {
        let Self { then, out, .. } = self;
        let store = Store::create(&Location::parse(&out)?)?;
        let errors = Store::open(&Location::parse(&directory(&out))?)?;
        let model = then.models.model.clone();
        let learned = pilot::learn(&errors, &then.identity, &model, &store).await?;
        print::note(&learned);
        let identity = pilot::with_timesteps(then.identity, learned.timesteps());
        let options = JobOptions { origins: then.origins, strict: then.strict, ..JobOptions::default() };
        Ok(Job::open(identity, &model, store, options).await?)
    }
}

/// Directory of the pilot's own output.
fn directory(out: &str) -> String {
    format!("{}/{}", out.trim_end_matches('/'), layout::PILOT)
}

fn as_usage(error: PilotError) -> anyhow::Error {
    match error {
        PilotError::NoRace => usage(error),
        PilotError::Policy(error) => bad_policy(error),
        other => other.into(),
    }
}
