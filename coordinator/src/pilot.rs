//! The pilot of a race: a small job that runs first and learns, without labels, which timesteps the race should use.
//!
//! It scores some of the job's samples, chosen by the job's seed, over all timesteps. It is an ordinary job in a directory
//! of the race's output, with workers and a ledger, so it can be interrupted and resumed. The learned timesteps are written
//! beside it and become part of the race's specification.

use bytes::Bytes;
use elbo_core::ensemble::Contenders;
use elbo_core::policy::pilot::Pilot;
use elbo_core::policy::{Policy, PolicyError, Timesteps};
use elbo_core::schedule::ScheduleError;
use elbo_hub::fingerprint::JobIdentity;
use elbo_output::layout;
use elbo_output::recorded;
use elbo_output::{Output, OutputError};
use elbo_store::{Store, StoreError};
use object_store::path::Path;

/// An invalid or failed pilot.
#[derive(Debug, thiserror::Error)]
pub enum PilotError {
    /// The job is not a race that a pilot can help.
    #[error(
        "--pilot is for --policy race without other timesteps: leave --pilot out, or --candidates, --timesteps-from and any flag for \
         another policy than race"
    )]
    NoRace,
    /// The model has no schedule.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The pilot's policy does not fit model and classes.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The pilot's output can't be read.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Its timesteps can't be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another process writes the same file.
    #[error(
        "{0} was changed by something else: let one coordinator work on the output, then run the same command again"
    )]
    Contended(String),
    /// Its timesteps are damaged.
    #[error(
        "{location}/{file} can't be understood ({source}): delete it, and the timesteps are learned again from the pilot"
    )]
    Format {
        /// The race's output.
        location: String,
        /// The file.
        file: &'static str,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// The pilot of a job: `samples` of its samples, over all timesteps.
pub fn identity(of: &JobIdentity, model: &std::path::Path, samples: u64) -> Result<JobIdentity, PilotError> {
    let (_, _, contenders) = race(of)?;
    let mut identity = of.clone();
    let spec = &mut identity.spec;
    spec.hierarchy = None;
    let most = spec.shortlist.as_ref().map_or(contenders.len() as u32, |shortlist| shortlist.keep);
    spec.policy = Pilot::policy(most, elbo_hub::model_config::timesteps(model)?)?;
    spec.subset = Some(samples);
    (spec.write_errors, spec.audit) = (true, None);
    (spec.calibration, spec.abstain_below) = (None, None);
    Ok(identity)
}

/// The timesteps that an earlier pilot of the job in an output has learned.
pub async fn known(out: &Store) -> Result<Option<Timesteps>, PilotError> {
    let Some(bytes) = out.read(&Path::from(layout::PILOT_TIMESTEPS)).await? else { return Ok(None) };
    let learned = serde_json::from_slice(&bytes);
    learned.map(Some).map_err(|source| format_error(out, layout::PILOT_TIMESTEPS, source))
}

/// Learns the timesteps of the race `of` from the finished pilot in `pilot`, and writes them to the race's output `out`.
pub async fn learn(pilot: &Store, of: &JobIdentity, model: &std::path::Path, out: &Store) -> Result<Pilot, PilotError> {
    let (risk, max_slots, contenders) = race(of)?;
    let (_, scored) = recorded::read(&Output::new(pilot), contenders.prompt_count()).await?;
    let learned = Pilot::learn(&scored, &contenders, elbo_hub::model_config::timesteps(model)?, risk)?;
    Policy::race(risk, max_slots, learned.timesteps())?;
    let write = async |file: &'static str, json: Result<Vec<u8>, serde_json::Error>| {
        let json = Bytes::from(json.map_err(|source| format_error(out, file, source))?);
        let path = Path::from(file);
        let seen = out.look(&path).await?;
        if out.replace(&path, json, &seen).await? {
            Ok(())
        } else {
            Err(PilotError::Contended(out.location().below(file)))
        }
    };
    write(layout::PILOT_FINDINGS, serde_json::to_vec_pretty(&learned)).await?;
    write(layout::PILOT_TIMESTEPS, serde_json::to_vec(&learned.timesteps())).await?;
    Ok(learned)
}

/// The job with the timesteps that its pilot has learned.
pub fn with_timesteps(mut identity: JobIdentity, learned: Timesteps) -> JobIdentity {
    if let Policy::Race { timesteps, .. } = &mut identity.spec.policy {
        *timesteps = learned;
    }
    identity
}

/// Risk, slots and contenders of a job that is a race with even timesteps.
fn race(identity: &JobIdentity) -> Result<(f64, u32, Contenders), PilotError> {
    match (&identity.spec.policy, identity.spec.contenders()) {
        (Policy::Race { risk, max_slots, timesteps }, Some(contenders)) if timesteps.is_even() => {
            // A pilot compares the classes themselves, without their groups.
            Ok((*risk, *max_slots, contenders.without_groups()))
        }
        _ => Err(PilotError::NoRace),
    }
}

fn format_error(out: &Store, file: &'static str, source: serde_json::Error) -> PilotError {
    PilotError::Format { location: out.location().to_string(), file, source }
}
