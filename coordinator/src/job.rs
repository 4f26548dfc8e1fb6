//! Taking a job up: a new one is listed and recorded, a known one must be the same job.

use std::collections::BTreeMap;

use bytes::Bytes;
use elbo_common::dataset::{self, LabelSource, ListOptions};
use elbo_common::fingerprint::JobIdentity;
use elbo_common::ids::ShardId;
use elbo_common::layout;
use elbo_common::manifest::Manifest;
use elbo_common::policy::{PolicyError, RoundSlots};
use elbo_common::record::{JobRecord, JobState, ManifestRecord, RecordError, Versions};
use elbo_common::schedule::{NoiseSchedule, ScheduleError};
use elbo_common::store::preflight::{self, PreflightError};
use elbo_common::store::{Store, StoreError};
use object_store::path::Path;

use crate::brain::ShardTotals;
use crate::ledger::{Ledger, LedgerError};

/// A job that can't be taken up.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The output belongs to another job.
    #[error("{location} holds the results of a different job:\n  {}\nuse another --out, restore the old settings, or discard the old results with --fresh", .differences.join("\n  "))]
    Different {
        /// The output.
        location: String,
        /// What differs, a line each.
        differences: Vec<String>,
    },
    /// The manifest is gone or not the one recorded.
    #[error("{location}/manifest is {problem}, though job.json speaks of it: restore it, or start over with --fresh")]
    Manifest {
        /// The output.
        location: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Labels that are not classes.
    #[error("{}; add the classes, remove those images, or leave out their labels", describe_unknown(.0))]
    UnknownLabels(Vec<(String, usize, String)>),
    /// The scheduler's configuration is missing or can't be used.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The policy does not fit model and classes.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The dataset can't be listed.
    #[error(transparent)]
    Dataset(#[from] dataset::DatasetError),
    /// The manifest can't be written or parsed.
    #[error(transparent)]
    Table(#[from] elbo_common::table::TableError),
    /// `job.json` can't be read or written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The output is on a store that can't hold a job.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// The output can't be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The ledger can't be opened.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

fn describe_unknown(labels: &[(String, usize, String)]) -> String {
    let named: Vec<_> =
        labels.iter().take(5).map(|(label, count, key)| format!("'{label}' ({count} images, such as {key})")).collect();
    let more = labels.len().saturating_sub(5);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("labels that are not among the classes: {}{rest}", named.join(", "))
}

/// How a job is taken up.
#[derive(Clone, Copy, Debug, Default)]
pub struct JobOptions {
    /// Discard what an earlier job left in the output.
    pub fresh: bool,
}

/// A job that is ready to run.
#[derive(Debug)]
pub struct Job {
    /// Where results go.
    pub out: Store,
    /// What is recorded in `job.json`.
    pub record: JobRecord,
    /// The dataset.
    pub manifest: Manifest,
    /// The rounds of every sample.
    pub rounds: Vec<RoundSlots>,
    /// The durable state.
    pub ledger: Ledger,
    /// Shards committed already.
    pub done: BTreeMap<ShardId, ShardTotals>,
}

impl Job {
    /// Takes up the job `identity`, whose model is in the directory `model`, in `out`: lists and records a new one, resumes a known one, refuses a different one.
    pub async fn open(
        identity: JobIdentity,
        model: &std::path::Path,
        out: Store,
        options: JobOptions,
    ) -> Result<Self, JobError> {
        let rounds = rounds_of(&identity, model)?;
        preflight::check(&out).await?;
        if options.fresh {
            discard(&out).await?;
        }
        let known = JobRecord::read(&out).await?;
        if let Some(record) = &known {
            let differences = identity.differences(&record.identity);
            if !differences.is_empty() {
                return Err(JobError::Different { location: out.location().to_string(), differences });
            }
        }
        let listed = match known {
            Some(_) => None,
            None => Some(list(&identity).await?),
        };
        // From here on any other coordinator of this output is fenced.
        let ledger = Ledger::open(&out).await?;
        let shard_size = identity.spec.shard_size;
        let (record, manifest) = match (known, listed) {
            (Some(record), _) => {
                let manifest = read_manifest(&out, &record, shard_size).await?;
                (record, manifest)
            }
            (None, listed) => {
                let bytes = Manifest::write_bytes(&listed.unwrap_or_default(), shard_size)?;
                let manifest = Manifest::parse(bytes.clone(), shard_size)?;
                out.write(&layout::manifest(), bytes).await?;
                let record = new_record(identity, &manifest);
                record.write(&out).await?;
                (record, manifest)
            }
        };
        match ledger.fingerprint().await? {
            None => ledger.set_fingerprint(&record.fingerprint).await?,
            Some(found) if found == record.fingerprint => {}
            Some(_) => {
                return Err(JobError::Different {
                    location: out.location().to_string(),
                    differences: vec!["the ledger was begun by a job with another fingerprint".into()],
                });
            }
        }
        // A shard whose predictions somebody deleted is computed again.
        let present = out.list(layout::PREDICTIONS).await?;
        let mut done = ledger.done().await?;
        done.retain(|shard, _| present.contains(&layout::predictions(*shard)));
        Ok(Self { out, record, manifest, rounds, ledger, done })
    }

    /// Whether every shard is committed.
    pub fn is_done(&self) -> bool {
        self.done.len() as u32 == self.manifest.shards()
    }

    /// Closes a job that needs no work, after writing down its totals if the last coordinator died before it could.
    pub async fn close(mut self) -> Result<(), JobError> {
        if self.is_done() && self.record.state != JobState::Done {
            let mut totals = ShardTotals::default();
            self.done.values().for_each(|shard| totals.add(*shard));
            self.record.state = JobState::Done;
            self.record.totals = Some(totals.into());
            self.record.write(&self.out).await?;
        }
        Ok(self.ledger.close().await?)
    }
}

/// The rounds of a job, from its policy and the schedule in its model's directory.
pub fn rounds_of(identity: &JobIdentity, model: &std::path::Path) -> Result<Vec<RoundSlots>, JobError> {
    Ok(identity.spec.rounds(NoiseSchedule::timesteps_of_model(model)?)?)
}

async fn list(identity: &JobIdentity) -> Result<Vec<elbo_common::manifest::Sample>, JobError> {
    let spec = &identity.spec;
    let label_from = spec.label_from.as_deref().map(LabelSource::from);
    let (candidates, limit) = (spec.candidates.as_deref(), spec.limit);
    let samples =
        dataset::list(&spec.images, &ListOptions { label_from: label_from.as_ref(), candidates, limit }).await?;
    if spec.candidates.is_some() {
        // Labels are captions: the listing saw to that.
        return Ok(samples);
    }
    let unknown = dataset::unknown_labels(&samples, &spec.classes);
    if unknown.is_empty() { Ok(samples) } else { Err(JobError::UnknownLabels(unknown)) }
}

async fn read_manifest(out: &Store, record: &JobRecord, shard_size: u32) -> Result<Manifest, JobError> {
    let wrong = |problem| JobError::Manifest { location: out.location().to_string(), problem };
    let bytes: Bytes = out.read(&layout::manifest()).await?.ok_or_else(|| wrong("missing"))?;
    let manifest = Manifest::parse(bytes, shard_size)?;
    if manifest.digest() == record.manifest.digest { Ok(manifest) } else { Err(wrong("not the one that was listed")) }
}

fn new_record(identity: JobIdentity, manifest: &Manifest) -> JobRecord {
    let digest = manifest.digest().to_owned();
    JobRecord {
        state: JobState::Unfinished,
        fingerprint: identity.fingerprint(&digest),
        identity,
        manifest: ManifestRecord { samples: manifest.len(), digest },
        versions: Versions { elbo: env!("CARGO_PKG_VERSION").into(), protocol: elbo_proto::PROTOCOL },
        totals: None,
        timings: None,
    }
}

/// Removes an earlier job from an output: `job.json` first, so that an interruption leaves no half-deleted job behind.
async fn discard(out: &Store) -> Result<(), StoreError> {
    for prefix in [
        layout::JOB,
        layout::LEDGER,
        layout::PREDICTIONS,
        layout::ERRORS,
        layout::QUARANTINE,
        "manifest",
        "report.html",
    ] {
        if prefix.contains('.') {
            out.delete(&Path::from(prefix)).await?;
        } else {
            out.delete_all(prefix).await?;
        }
    }
    Ok(())
}
