//! Opening a job: a new one is listed and recorded; a known one must have the same settings.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use elbo_core::draw::Draw;
use elbo_core::ensemble::Contenders;
use elbo_core::ids::{Epoch, SampleId, ShardId};
use elbo_core::job::JobSpec;
use elbo_core::policy::Course;
use elbo_core::sample::Sample;
use elbo_data::manifest::ManifestRecord;
use elbo_data::manifest::{Manifest, ManifestWriter};
use elbo_data::{self, Account, DatasetError, LabelSource, ListOptions, Origin, SampleSink, UnknownLabels};
use elbo_hub::fingerprint::JobIdentity;
use elbo_output::layout;
use elbo_output::record::{JobRecord, JobState, RecordError, Versions};
use elbo_store::Store;
use elbo_store::preflight::{self};
use object_store::path::Path;

use crate::calibrate::{self};
use crate::job_error::JobError;
use crate::ledger::Ledger;
use crate::repair;
use crate::scheduler::{JobShape, ShardTotals};
use crate::writer::Writer;

/// How to open a job.
#[derive(Clone, Debug, Default)]
pub struct JobOptions {
    /// Discard the results of an earlier job in the output.
    pub fresh: bool,
    /// Retry the samples that an earlier run quarantined.
    pub retry_quarantined: bool,
    /// Compute these shards again, whatever their state.
    pub recompute: Vec<ShardId>,
    /// For a new job: origins that lists from the network may name, in addition to their own.
    pub origins: Vec<Origin>,
    /// Fail if the listing passes over anything.
    pub strict: bool,
}

/// A job that is ready to run.
#[derive(Debug)]
pub struct Job {
    /// The output.
    pub out: Store,
    /// The content of `job.json`.
    pub record: JobRecord,
    /// The dataset.
    pub manifest: Manifest,
    /// The course of every sample.
    pub course: Course,
    /// The durable state.
    pub ledger: Ledger,
    /// The committed shards.
    pub done: BTreeMap<ShardId, ShardTotals>,
    /// Shards whose quarantined samples are retried, with the epoch of the retry.
    pub retried: BTreeMap<ShardId, Epoch>,
}

impl Job {
    /// Opens the job `identity`, whose model is in the directory `model`, in `out`. A new job is listed and recorded, a
    /// known one is resumed, and a different one is refused.
    pub async fn open(
        identity: JobIdentity,
        model: &std::path::Path,
        out: Store,
        options: JobOptions,
    ) -> Result<Self, JobError> {
        let course = course_of(&identity, model)?;
        preflight::check(&out).await?;
        // A refused job lists nothing and fences no coordinator.
        let found = if options.fresh { None } else { known(&out, &identity).await? };
        let listed = match &found {
            Some(record) => {
                check_account(&record.manifest, options.strict)?;
                None
            }
            None => Some(list_all(&identity, &options).await?),
        };
        // From here on any other coordinator of this output is fenced.
        let ledger = Ledger::open(&out).await?;
        if options.fresh {
            clear(&out, &ledger).await?;
        }
        out.sweep(&[&layout::WRITTEN[..], &[""]].concat());
        // Another coordinator may have changed it since, so read it again.
        let (record, manifest) = match known(&out, &identity).await? {
            Some(record) => {
                let manifest = Manifest::open(&out, &record.manifest, identity.spec.shard_size).await?;
                adopt_ledger(&out, &ledger, &record, &manifest, &course).await?;
                (record, manifest)
            }
            None => {
                let listed = match listed {
                    Some(listed) => listed,
                    None => list_all(&identity, &options).await?,
                };
                begin(&out, &ledger, identity, listed).await?
            }
        };
        let mut job = Self { out, record, manifest, course, ledger, done: BTreeMap::new(), retried: BTreeMap::new() };
        if job.record.identity.spec.subset.is_none() {
            for passed in job.record.manifest.passed_over.passed_over() {
                tracing::warn!("passed over by the listing of the images, {passed}");
            }
        }
        job.repair(options.recompute).await?;
        if options.retry_quarantined {
            job.retry_quarantined().await?;
        }
        job.retried = job.ledger.retried().await?;
        if !job.is_done() {
            job.record.confidence = None;
        }
        Ok(job)
    }

    /// Reopens shards whose files are missing or damaged, and those that are `named`. If the job is done, every byte is
    /// checked.
    async fn repair(&mut self, named: Vec<ShardId>) -> Result<(), JobError> {
        if let Some(shard) = named.iter().find(|shard| shard.0 >= self.manifest.shards()) {
            return Err(JobError::NoSuchShard(*shard, self.manifest.shards().saturating_sub(1)));
        }
        let is_done = self.record.state == JobState::Done;
        repair::clear_late(self.writer()).await?;
        let mut marks = self.ledger.done().await?;
        let damaged = repair::damaged(&self.out, &marks, is_done).await?;
        for shard in &damaged {
            tracing::warn!(%shard, "files of the shard are missing or damaged: it is computed again");
        }
        let again: BTreeSet<ShardId> = damaged.into_iter().chain(named).collect();
        if !again.is_empty() {
            self.reopen().await?;
            let again = again.iter().map(|shard| (*shard, marks.remove(shard).unwrap_or_default().totals)).collect();
            self.ledger.reopen(&again).await?;
        }
        self.done = marks.into_iter().map(|(shard, mark)| (shard, mark.totals)).collect();
        Ok(())
    }

    /// Marks a done job as unfinished in `job.json`. This must come first: if a later step were interrupted, the job would
    /// still be found done.
    async fn reopen(&mut self) -> Result<(), JobError> {
        if self.record.state == JobState::Done {
            self.record.state = JobState::Unfinished;
            (self.record.totals, self.record.confidence) = (None, None);
            self.writer().write(vec![self.record.file(&self.out)?]).await?;
        }
        Ok(())
    }

    fn writer(&self) -> Writer<'_> {
        Writer { out: &self.out, ledger: &self.ledger }
    }

    /// Reopens the shards with quarantined samples.
    async fn retry_quarantined(&mut self) -> Result<(), JobError> {
        let mut shards = self.ledger.begun().await?;
        shards.extend(self.done.iter().filter(|(_, totals)| totals.quarantined > 0).map(|(shard, _)| *shard));
        if !shards.is_empty() {
            self.reopen().await?;
        }
        self.done.retain(|shard, _| !shards.contains(shard));
        Ok(self.ledger.retry(shards).await?)
    }

    /// Whether every shard is committed.
    pub fn is_done(&self) -> bool {
        self.done.len() as u32 == self.manifest.shards()
    }

    /// Closes a job that needs no work. First writes its totals if the last coordinator died before it could.
    pub async fn close(mut self) -> Result<(), JobError> {
        if self.is_done() && self.record.state != JobState::Done {
            let mut totals = ShardTotals::default();
            self.done.values().for_each(|shard| totals.add(*shard));
            let writer = Writer { out: &self.out, ledger: &self.ledger };
            calibrate::calibrate(writer, &self.manifest, &mut self.record).await?;
            self.record.state = JobState::Done;
            self.record.totals = Some(totals.of_job(self.ledger.waste()));
            self.record.hardware.extend(self.ledger.hardware());
            writer.write(vec![self.record.file(&self.out)?]).await?;
        }
        Ok(self.ledger.close().await?)
    }
}

/// The record of the job in an output, which must be the same job.
async fn known(out: &Store, identity: &JobIdentity) -> Result<Option<JobRecord>, JobError> {
    let Some(record) = JobRecord::read(out).await? else { return Ok(None) };
    let differences = identity.differences(&record.identity);
    if differences.is_empty() {
        Ok(Some(record))
    } else {
        Err(JobError::Different { location: out.location().to_string(), differences })
    }
}

/// Records a new job in an output.
async fn begin(
    out: &Store,
    ledger: &Ledger,
    identity: JobIdentity,
    (files, listed): Listed,
) -> Result<(JobRecord, Manifest), JobError> {
    let shard_size = identity.spec.shard_size;
    let record = new_record(identity, listed);
    let mut known = ledger.discarded().await?;
    known.insert(record.fingerprint.clone());
    if let Some(fingerprint) = repair::stranger(out, &known).await? {
        return Err(JobError::Stranger { location: out.location().to_string(), fingerprint });
    }
    let of_ledger = ledger.fingerprint().await?;
    if of_ledger.is_some_and(|found| found != record.fingerprint) {
        return Err(other_ledger(out));
    }
    let writer = Writer { out, ledger };
    writer.write(files).await?;
    writer.write(vec![record.file(out)?]).await?;
    // This is last, so that a job that fails to begin does not block another job.
    ledger.begin(&record.fingerprint, BTreeMap::new()).await?;
    let manifest = Manifest::open(out, &record.manifest, shard_size).await?;
    Ok((record, manifest))
}

/// Checks that the ledger belongs to the job. If the ledger was lost, a new one starts with the shards whose files are
/// there and whole.
async fn adopt_ledger(
    out: &Store,
    ledger: &Ledger,
    record: &JobRecord,
    manifest: &Manifest,
    course: &Course,
) -> Result<(), JobError> {
    match ledger.fingerprint().await? {
        Some(found) if found == record.fingerprint => Ok(()),
        Some(_) => Err(other_ledger(out)),
        None => {
            let shape = shape(record, manifest, course);
            let kept = repair::adopt(out, record, manifest, &shape).await?;
            if !kept.is_empty() {
                tracing::warn!(
                    "the ledger is gone: {} of {} shards are kept, since their files are whole; the others are computed again",
                    kept.len(),
                    manifest.shards()
                );
            }
            Ok(ledger.begin(&record.fingerprint, kept).await?)
        }
    }
}

fn other_ledger(out: &Store) -> JobError {
    JobError::Different {
        location: out.location().to_string(),
        differences: vec!["the ledger was begun by a job with another fingerprint".into()],
    }
}

/// The shape of a job.
pub(crate) fn shape(record: &JobRecord, manifest: &Manifest, course: &Course) -> JobShape {
    let spec = &record.identity.spec;
    // If every sample has its own captions, there are no other contenders.
    let contenders = spec.contenders().unwrap_or_else(|| Contenders::prompts(0));
    JobShape::new(course.clone(), contenders, manifest.caption_counts(), spec.shard_size, spec.write_errors)
        .with_audit(spec.audit.clone(), spec.seed)
}

/// The files of a manifest, and its record in `job.json`.
type Listed = (Vec<(Path, Bytes)>, ManifestRecord);

/// Lists a job's images, and checks the listing against the options.
async fn list_all(identity: &JobIdentity, options: &JobOptions) -> Result<Listed, JobError> {
    let (manifest, passed_over) = list(identity, &options.origins).await?;
    let (files, listed) = manifest.finish()?;
    let listed = ManifestRecord { passed_over, ..listed };
    check_account(&listed, options.strict)?;
    check_confidence(&identity.spec, &listed)?;
    Ok((files, listed))
}

/// With `strict`, fails if anything was passed over.
fn check_account(listed: &ManifestRecord, strict: bool) -> Result<(), JobError> {
    if strict && !listed.passed_over.is_empty() {
        return Err(JobError::PassedOver(listed.passed_over.clone()));
    }
    Ok(())
}

/// With `abstain_below`, fails if there is nothing to compute confidence from.
fn check_confidence(spec: &JobSpec, listed: &ManifestRecord) -> Result<(), JobError> {
    let can_tell = listed.labelled != Some(0) || spec.audit.is_some() || spec.calibration.is_some();
    if spec.abstain_below.is_some() && !can_tell { Err(JobError::NothingToCalibrate) } else { Ok(()) }
}

/// The course of a job, from its policy and the schedule in its model's directory.
pub fn course_of(identity: &JobIdentity, model: &std::path::Path) -> Result<Course, JobError> {
    Ok(identity.spec.course(elbo_hub::model_config::timesteps(model)?)?)
}

/// Lists a job's images; labels must be classes.
async fn list(identity: &JobIdentity, origins: &[Origin]) -> Result<(ManifestWriter, Account), JobError> {
    let spec = &identity.spec;
    let label_from = spec.label_from.as_deref().map(LabelSource::from);
    let mut listing = Listing::new(spec);
    let options = ListOptions { origins, ..list_options(spec, label_from.as_ref()) };
    let listed = elbo_data::list(&spec.images, &options, &mut listing).await?;
    let Listing { mut manifest, chosen, unknown, .. } = listing;
    for sample in chosen.into_iter().flat_map(Chosen::in_order) {
        manifest.take(sample)?;
    }
    let unknown = unknown.into_sorted();
    if unknown.is_empty() { Ok((manifest, listed.passed_over)) } else { Err(JobError::UnknownLabels(unknown)) }
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

/// A manifest under construction, and the labels that are not classes.
struct Listing<'a> {
    spec: &'a JobSpec,
    manifest: ManifestWriter,
    /// The samples chosen so far, if the job uses only some.
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
        // If images have captions, labels are captions, which the listing has checked.
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

/// The samples with the lowest draws. Holds no more of them in memory than are needed.
struct Chosen {
    seed: u64,
    count: usize,
    samples: BTreeMap<Draw, Sample>,
}

impl Chosen {
    fn new(seed: u64, count: usize) -> Self {
        Self { seed, count, samples: BTreeMap::new() }
    }

    fn offer(&mut self, sample: Sample) {
        self.samples.insert(Draw::new("subset", Some(self.seed), &sample.key), sample);
        if self.samples.len() > self.count {
            self.samples.pop_last();
        }
    }

    /// The chosen samples in the order of the listing, with new positions.
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
        hardware: BTreeSet::new(),
        totals: None,
        timings: None,
        confidence: None,
    }
}

/// Discards the job in an output, and fences its coordinator.
pub async fn discard(out: &Store) -> Result<(), JobError> {
    let ledger = Ledger::open(out).await?;
    clear(out, &ledger).await?;
    Ok(ledger.close().await?)
}

/// Removes an earlier job from an output whose ledger this coordinator holds. The ledger's entries go first, then
/// `job.json`, so that an interruption leaves no half-deleted job. The ledger itself stays, since it fences other
/// coordinators.
async fn clear(out: &Store, ledger: &Ledger) -> Result<(), JobError> {
    let left = match JobRecord::read(out).await {
        Ok(record) => record.map(|record| record.fingerprint),
        // An unreadable record is discarded too.
        Err(RecordError::Format { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    ledger.discard(left).await?;
    out.delete(&Path::from(layout::JOB)).await?;
    out.delete(&Path::from("report.html")).await?;
    for directory in layout::WRITTEN {
        out.delete_all(directory).await?;
    }
    // The pilot's ledger stays too, since it fences other coordinators of the pilot.
    let ledger_of_pilot = Path::from(layout::PILOT).join(layout::LEDGER);
    let of_pilot = out.list(layout::PILOT).await?;
    Ok(out.delete_each(of_pilot.into_iter().filter(|path| !path.prefix_matches(&ledger_of_pilot))).await?)
}
