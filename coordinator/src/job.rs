//! Taking a job up: a new one is listed and recorded, a known one must be the same job.

use std::collections::BTreeMap;

use elbo_common::dataset::{self, DatasetError, LabelSource, ListOptions, Origin, SampleSink, UnknownLabels};
use elbo_common::fingerprint::JobIdentity;
use elbo_common::ids::{Epoch, SampleId, ShardId};
use elbo_common::job::JobSpec;
use elbo_common::layout;
use elbo_common::manifest::{Manifest, ManifestError, ManifestWriter, Sample};
use elbo_common::policy::{Course, PolicyError};
use elbo_common::record::{JobRecord, JobState, ManifestRecord, RecordError, Versions};
use elbo_common::schedule::{NoiseSchedule, ScheduleError};
use elbo_common::store::preflight::{self, PreflightError};
use elbo_common::store::{Store, StoreError};
use object_store::path::Path;

use crate::brain::ShardTotals;
use crate::calibrate::{self, CalibrateError};
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
    /// The manifest can't be read, or is not the one that was listed.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Labels that are not classes.
    #[error("{}; add the classes, remove those images, or leave labels out with --label-from none", describe_unknown(.0))]
    UnknownLabels(Vec<(String, u64, String)>),
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
    /// There is nothing that would tell how sure a prediction is.
    #[error(
        "--abstain-below needs to know how sure a prediction is, and no image has a label: bring some with --label-from, let \
         the reference score a share of the images too with --audit 1%, or take over what a job with labels found out with \
         --calibration-from"
    )]
    NothingToCalibrate,
    /// Confidence could not be written.
    #[error(transparent)]
    Calibrate(#[from] CalibrateError),
    /// The ledger can't be opened.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

fn describe_unknown(labels: &[(String, u64, String)]) -> String {
    let named: Vec<_> =
        labels.iter().take(5).map(|(label, count, key)| format!("'{label}' ({count} images, such as {key})")).collect();
    let more = labels.len().saturating_sub(5);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("labels that are not among the classes: {}{rest}", named.join(", "))
}

/// How a job is taken up.
#[derive(Clone, Debug, Default)]
pub struct JobOptions {
    /// Discard what an earlier job left in the output.
    pub fresh: bool,
    /// Give the samples that an earlier run quarantined another try.
    pub retry_quarantined: bool,
    /// Origins that lists from the network may name besides their own, for a job that is new.
    pub origins: Vec<Origin>,
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
    /// The course of every sample.
    pub course: Course,
    /// The durable state.
    pub ledger: Ledger,
    /// Shards committed already.
    pub done: BTreeMap<ShardId, ShardTotals>,
    /// Shards whose quarantined samples get another try, and since which epoch.
    pub retried: BTreeMap<ShardId, Epoch>,
}

impl Job {
    /// Takes up the job `identity`, whose model is in the directory `model`, in `out`: lists and records a new one, resumes a known one, refuses a different one.
    pub async fn open(
        identity: JobIdentity,
        model: &std::path::Path,
        out: Store,
        options: JobOptions,
    ) -> Result<Self, JobError> {
        let course = course_of(&identity, model)?;
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
            None => {
                let (files, listed) = list(&identity, &options.origins).await?.finish()?;
                check_confidence(&identity.spec, &listed)?;
                Some((files, listed))
            }
        };
        // From here on any other coordinator of this output is fenced.
        let ledger = Ledger::open(&out).await?;
        let shard_size = identity.spec.shard_size;
        let (record, manifest) = match (known, listed) {
            (Some(record), _) => {
                let manifest = Manifest::open(&out, &record.manifest, shard_size).await?;
                (record, manifest)
            }
            (None, listed) => {
                let (files, listed) = listed.unwrap_or_default();
                for (path, bytes) in files {
                    out.write(&path, bytes).await?;
                }
                let record = new_record(identity, listed);
                record.write(&out).await?;
                let manifest = Manifest::open(&out, &record.manifest, shard_size).await?;
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
        let mut job = Self { out, record, manifest, course, ledger, done, retried: BTreeMap::new() };
        if options.retry_quarantined {
            job.retry_quarantined().await?;
        }
        job.retried = job.ledger.retried().await?;
        if !job.is_done() {
            job.record.confidence = None;
        }
        Ok(job)
    }

    /// Opens the shards with quarantined samples again. `job.json` says so first: were this interrupted in between, the job
    /// would be found done and say so again.
    async fn retry_quarantined(&mut self) -> Result<(), JobError> {
        let mut shards = self.ledger.begun().await?;
        shards.extend(self.done.iter().filter(|(_, totals)| totals.quarantined > 0).map(|(shard, _)| *shard));
        if self.record.state == JobState::Done && !shards.is_empty() {
            self.record.state = JobState::Unfinished;
            (self.record.totals, self.record.confidence) = (None, None);
            self.record.write(&self.out).await?;
        }
        self.done.retain(|shard, _| !shards.contains(shard));
        Ok(self.ledger.retry(shards).await?)
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
            calibrate::calibrate(&self.out, &self.manifest, &self.ledger, &mut self.record).await?;
            self.ledger.hold().await?;
            self.record.state = JobState::Done;
            self.record.totals = Some(totals.of_job(self.ledger.waste()));
            self.record.write(&self.out).await?;
        }
        Ok(self.ledger.close().await?)
    }
}

/// Whether it can be told how sure predictions are, where the job wants to know.
fn check_confidence(spec: &JobSpec, listed: &ManifestRecord) -> Result<(), JobError> {
    let can_tell = listed.labelled != Some(0) || spec.audit.is_some() || spec.calibration.is_some();
    if spec.abstain_below.is_some() && !can_tell { Err(JobError::NothingToCalibrate) } else { Ok(()) }
}

/// The course of a job, from its policy and the schedule in its model's directory.
pub fn course_of(identity: &JobIdentity, model: &std::path::Path) -> Result<Course, JobError> {
    Ok(identity.spec.course(NoiseSchedule::timesteps_of_model(model)?)?)
}

/// Lists a job's images; labels must be classes.
async fn list(identity: &JobIdentity, origins: &[Origin]) -> Result<ManifestWriter, JobError> {
    let spec = &identity.spec;
    let label_from = spec.label_from.as_deref().map(LabelSource::from);
    let mut listing = Listing::new(spec);
    let options = ListOptions { origins, ..list_options(spec, label_from.as_ref()) };
    dataset::list(&spec.images, &options, &mut listing).await?;
    let Listing { mut manifest, chosen, unknown, .. } = listing;
    for sample in chosen.into_iter().flat_map(Chosen::in_order) {
        manifest.take(sample)?;
    }
    let unknown = unknown.into_sorted();
    if unknown.is_empty() { Ok(manifest) } else { Err(JobError::UnknownLabels(unknown)) }
}

/// How a job's images are listed.
pub fn list_options<'a>(spec: &'a JobSpec, label_from: Option<&'a LabelSource>) -> ListOptions<'a> {
    ListOptions {
        label_from,
        candidates: spec.candidates.as_deref(),
        image_column: spec.image_column.as_deref(),
        classes: spec.candidates.is_none().then_some(&spec.classes),
        limit: spec.limit,
        origins: &[],
    }
}

/// A manifest in the making, and the labels that are no class.
struct Listing<'a> {
    spec: &'a JobSpec,
    manifest: ManifestWriter,
    /// Those chosen so far, where the job makes do with some of the samples.
    chosen: Option<Chosen>,
    unknown: UnknownLabels,
}

impl<'a> Listing<'a> {
    fn new(spec: &'a JobSpec) -> Self {
        let chosen = spec.subset.map(|count| Chosen::new(spec.seed, count as usize));
        Self { spec, manifest: ManifestWriter::new(spec.shard_size), chosen, unknown: UnknownLabels::default() }
    }
}

impl SampleSink for Listing<'_> {
    fn take(&mut self, sample: Sample) -> Result<(), DatasetError> {
        // Where images bring captions, labels are captions: the listing saw to that.
        if self.spec.candidates.is_none() {
            self.unknown.note(&sample, &self.spec.classes);
        }
        match &mut self.chosen {
            Some(chosen) => {
                chosen.offer(sample);
                Ok(())
            }
            None => self.manifest.take(sample),
        }
    }

    fn clear(&mut self) {
        *self = Self::new(self.spec);
    }
}

/// The samples whose keys have the lowest hashes: as good as random, always the same, and no more of them in memory than asked
/// for.
struct Chosen {
    seed: u64,
    count: usize,
    /// By hash.
    samples: BTreeMap<[u8; 16], Sample>,
}

impl Chosen {
    fn new(seed: u64, count: usize) -> Self {
        Self { seed, count, samples: BTreeMap::new() }
    }

    fn offer(&mut self, sample: Sample) {
        let mut hash = [0; 16];
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"subset").update(&self.seed.to_le_bytes()).update(sample.key.as_bytes());
        hasher.finalize_xof().fill(&mut hash);
        self.samples.insert(hash, sample);
        if self.samples.len() > self.count {
            self.samples.pop_last();
        }
    }

    /// The chosen samples in the order of the listing, with positions of their own.
    fn in_order(self) -> impl Iterator<Item = Sample> {
        let mut samples: Vec<_> = self.samples.into_values().collect();
        samples.sort_by_key(|sample| sample.id);
        samples.into_iter().zip(0..).map(|(sample, id)| Sample { id: SampleId(id), ..sample })
    }
}

fn new_record(identity: JobIdentity, manifest: ManifestRecord) -> JobRecord {
    JobRecord {
        state: JobState::Unfinished,
        fingerprint: identity.fingerprint(&manifest.digest),
        identity,
        manifest,
        versions: Versions { elbo: env!("CARGO_PKG_VERSION").into(), protocol: elbo_proto::PROTOCOL },
        totals: None,
        timings: None,
        confidence: None,
    }
}

/// Removes an earlier job from an output: `job.json` first, so that an interruption leaves no half-deleted job behind.
pub async fn discard(out: &Store) -> Result<(), StoreError> {
    for prefix in [
        layout::JOB,
        layout::LEDGER,
        layout::PREDICTIONS,
        layout::ERRORS,
        layout::AUDIT,
        layout::QUARANTINE,
        layout::MANIFEST,
        layout::PILOT,
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
