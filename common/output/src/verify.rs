//! Checks an output: is every sample of the manifest predicted exactly once, in its own shard's file, and is every file as it
//! was written?
//!
//! Only the output is read, a shard at a time. The model and the images are not needed, so an output can be checked anywhere,
//! long after its job. The ledger holds the checksum of every file; without it, the files are checked against their own
//! checksums.

mod file;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use elbo_core::calibration::Calibration;
use elbo_core::class::Classes;
use elbo_core::ids::{SampleId, ShardId};
use elbo_core::prediction::Prediction;
use elbo_core::sample::Sample;
use elbo_core::text::printable;
use elbo_data::manifest::Manifest;
use elbo_store::Store;
use elbo_store::checksum::Checksum;
use futures::stream::{self, StreamExt, TryStreamExt};
use object_store::path::Path;
use serde::Serialize;

use crate::layout;
use crate::predictions::Quarantined;
use crate::record::{JobRecord, JobState};
use crate::{Output, OutputError};

/// The most problems listed; the rest are counted.
const PROBLEMS_SHOWN: usize = 100;
/// The most damaged shards that are named.
const SHARDS_SHOWN: usize = 100;
/// Shards that are read concurrently.
const SHARDS: usize = 4;

/// The result. Serialised as the output of `elbo verify --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Whether the output is complete and consistent.
    pub ok: bool,
    /// Samples in the manifest.
    pub manifest: u64,
    /// Rows of samples that were scored (status `ok` or `uncertain`).
    pub predictions: u64,
    /// Rows without one (status `quarantined`).
    pub quarantined: u64,
    /// Samples of the manifest without a row.
    pub missing: u64,
    /// Samples of the manifest with more than one row.
    pub duplicated: u64,
    /// The job's fingerprint.
    pub fingerprint: String,
    /// The first hundred problems, for display.
    #[serde(skip)]
    pub problems: Vec<String>,
    /// The shards with problems, which can be computed again.
    #[serde(skip)]
    pub shards: BTreeSet<ShardId>,
}

/// The files of committed shards, according to the ledger.
pub type Marks = BTreeMap<ShardId, Vec<Checksum>>;

/// What an output must satisfy.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// The job's fingerprint.
    pub fingerprint: String,
    /// Whether the errors of evaluations are written.
    pub errors: bool,
    /// Whether samples are audited.
    pub audit: bool,
    /// The calibration of the predictions, if it is known.
    pub confidence: Option<Confident>,
    /// The checksums of committed files; `None` if the ledger is not available.
    pub marks: Option<Marks>,
}

/// What determines the confidence of predictions.
#[derive(Clone, Debug)]
pub struct Confident {
    /// Turns errors into confidence.
    pub calibration: Calibration,
    /// Samples with a lower confidence get no class.
    pub abstain_below: Option<f64>,
    /// The job's classes.
    pub classes: Classes,
}

impl Expected {
    /// The expectations for the output of a job.
    pub fn of(record: &JobRecord, marks: Option<Marks>) -> Self {
        let spec = &record.identity.spec;
        let confidence = record.confidence.as_ref().filter(|_| record.state == JobState::Done);
        Self {
            fingerprint: record.fingerprint.clone(),
            errors: spec.write_errors,
            audit: spec.audit.is_some(),
            confidence: confidence.map(|confidence| Confident {
                calibration: confidence.calibration,
                abstain_below: spec.abstain_below,
                classes: spec.classes.clone(),
            }),
            marks,
        }
    }
}

impl std::fmt::Display for Verification {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = if self.ok { "complete and consistent" } else { "NOT complete and consistent" };
        writeln!(f, "the output is {verdict}")?;
        writeln!(f, "  samples in the manifest  {}", self.manifest)?;
        writeln!(f, "  predicted                {}", self.predictions)?;
        writeln!(f, "  quarantined              {}", self.quarantined)?;
        writeln!(f, "  missing                  {}", self.missing)?;
        writeln!(f, "  duplicated               {}", self.duplicated)?;
        writeln!(f, "  fingerprint              {}", self.fingerprint)?;
        self.problems.iter().try_for_each(|problem| writeln!(f, "  ! {}", printable(problem)))?;
        if self.ok {
            return Ok(());
        }
        writeln!(f, "run the job again with the same --out to compute what is missing")?;
        let shards: Vec<_> = self.shards.iter().take(SHARDS_SHOWN).map(ToString::to_string).collect();
        let more = if self.shards.len() > SHARDS_SHOWN { " (and more)" } else { "" };
        if !shards.is_empty() {
            writeln!(f, "to compute damaged shards again, add --recompute {}{more}", shards.join(","))?;
        }
        Ok(())
    }
}

/// Checks the files of `out` against its manifest and against `expected`. Every column is decoded, so that damage shows
/// wherever it is, but only a few hundred rows of a file are in memory at a time.
pub async fn verify(out: &Store, manifest: &Manifest, expected: &Expected) -> Result<Verification, OutputError> {
    let output = &Output::new(out);
    let mut check = Check::new(manifest.len());
    let of_shard = |shard| async move {
        let samples = manifest.shard(shard).await?;
        let found = Found::read(output, out, expected, shard, &samples).await?;
        Ok::<_, OutputError>((shard, samples, found))
    };
    let mut shards = std::pin::pin!(stream::iter((0..manifest.shards()).map(ShardId)).map(of_shard).buffered(SHARDS));
    while let Some((shard, samples, found)) = shards.try_next().await? {
        check.shard(shard, &samples, found);
    }
    check.strays(output, out, manifest.shards()).await?;
    Ok(check.finish(expected.fingerprint.clone()))
}

/// The checked parts of a prediction.
#[derive(Debug)]
struct Checked {
    sample: SampleId,
    key: String,
    label: Option<String>,
    quarantined: bool,
    /// Whether its confidence is the expected one.
    is_sure: bool,
}

impl Checked {
    fn new(row: Prediction, sample: Option<&Sample>, expected: &Expected) -> Self {
        let is_sure = expected.confidence.as_ref().is_none_or(|confident| {
            let classes = sample.map_or(Cow::Borrowed(&confident.classes), |sample| sample.classes(&confident.classes));
            confident.calibration.apply(row.clone(), confident.abstain_below, &classes) == row
        });
        let quarantined = row.error().is_some();
        Self { sample: row.sample, key: row.key, label: row.label, quarantined, is_sure }
    }
}

/// The content of a file.
#[derive(Debug)]
enum Content<Row> {
    Missing,
    Sound(Vec<Row>),
    Damaged(String),
}

impl<Row> Content<Row> {
    fn of(read: Result<Option<Vec<Row>>, OutputError>) -> Result<Self, OutputError> {
        match read {
            Ok(Some(rows)) => Ok(Self::Sound(rows)),
            Ok(None) => Ok(Self::Missing),
            Err(error) => damage(error).map(Self::Damaged),
        }
    }
}

/// The problem of a file that can't be read. A failure of the store is an error, not a finding.
fn damage(error: OutputError) -> Result<String, OutputError> {
    if let OutputError::File { .. } = error { Ok(error.to_string()) } else { Err(error) }
}

/// The content of a shard's files.
#[derive(Debug)]
struct Found {
    predictions: Content<Checked>,
    quarantine: Content<Quarantined>,
    /// Problems with whole files.
    files: Vec<String>,
}

impl Found {
    async fn read(
        output: &Output,
        out: &Store,
        expected: &Expected,
        shard: ShardId,
        samples: &[Sample],
    ) -> Result<Self, OutputError> {
        let own = samples.iter().map(|sample| sample.id).collect();
        let mut files = file::problems(output, out, expected, shard, &own).await?;
        let path = layout::predictions(shard);
        let predictions = match files.remove(&path) {
            Some(problem) => Content::Damaged(problem),
            None => Content::of(checked(output, path, samples, expected).await)?,
        };
        let path = layout::quarantine(shard);
        let quarantine = match files.remove(&path) {
            Some(problem) => Content::Damaged(problem),
            None => Content::of(output.quarantine_at(path).await)?,
        };
        Ok(Self { predictions, quarantine, files: files.into_values().collect() })
    }
}

/// The rows of a predictions file, without their scores.
async fn checked(
    output: &Output,
    path: Path,
    samples: &[Sample],
    expected: &Expected,
) -> Result<Option<Vec<Checked>>, OutputError> {
    let Some(mut batches) = output.predictions_at(path).await? else { return Ok(None) };
    let own: BTreeMap<_, _> = samples.iter().map(|sample| (sample.id, sample)).collect();
    let mut rows = Vec::new();
    while let Some(batch) = batches.try_next().await? {
        rows.extend(batch.into_iter().map(|row| {
            let sample = own.get(&row.sample).copied();
            Checked::new(row, sample, expected)
        }));
    }
    Ok(Some(rows))
}

/// Counts and problems so far.
struct Check {
    /// Rows per sample; 2 means two or more.
    seen: Vec<u8>,
    predictions: u64,
    quarantined: u64,
    problems: Vec<String>,
    unspoken: usize,
    /// Shards with problems.
    shards: BTreeSet<ShardId>,
}

impl Check {
    fn new(samples: u64) -> Self {
        Self {
            seen: vec![0; samples as usize],
            predictions: 0,
            quarantined: 0,
            problems: Vec::new(),
            unspoken: 0,
            shards: BTreeSet::new(),
        }
    }

    /// The number of problems so far.
    fn count(&self) -> usize {
        self.problems.len() + self.unspoken
    }

    fn problem(&mut self, problem: String) {
        if self.problems.len() < PROBLEMS_SHOWN { self.problems.push(problem) } else { self.unspoken += 1 }
    }

    /// The rows of a file, if it can be read.
    fn rows<Row>(&mut self, content: Content<Row>) -> Vec<Row> {
        match content {
            Content::Sound(rows) => rows,
            Content::Missing => Vec::new(),
            Content::Damaged(problem) => {
                self.problem(problem);
                Vec::new()
            }
        }
    }

    fn shard(&mut self, shard: ShardId, samples: &[Sample], found: Found) {
        let before = self.count();
        let (predictions, quarantine) = (layout::predictions(shard), layout::quarantine(shard));
        found.files.into_iter().for_each(|problem| self.problem(problem));
        let is_missing = matches!(found.predictions, Content::Missing);
        if is_missing {
            self.problem(format!("{predictions} does not exist ({} samples)", samples.len()));
        }
        let (rows, quarantined) = (self.rows(found.predictions), self.rows(found.quarantine));
        self.predictions(&predictions, samples, &rows);
        self.quarantine(&quarantine, &rows, &quarantined);
        let unsure = rows.iter().filter(|row| !row.is_sure).count();
        if unsure > 0 {
            self.problem(format!(
                "{predictions}: {unsure} rows have another confidence than the job's calibration gives"
            ));
        }
        // Missing shards are computed again anyway.
        if self.count() > before && !is_missing {
            self.shards.insert(shard);
        }
    }

    /// Counts the rows of a predictions file and compares them with the shard's samples.
    fn predictions(&mut self, path: &Path, samples: &[Sample], rows: &[Checked]) {
        let own: BTreeMap<_, _> = samples.iter().map(|sample| (sample.id, sample)).collect();
        for row in rows {
            let count = if row.quarantined { &mut self.quarantined } else { &mut self.predictions };
            *count += 1;
            let id = row.sample;
            match self.seen.get_mut(id.0 as usize) {
                Some(count) => *count = (*count + 1).min(2),
                None => self.problem(format!("{path}: sample {id} ({}) is not in the manifest", row.key)),
            }
            match own.get(&id) {
                None => self.problem(format!("{path}: sample {id} ({}) belongs to another shard", row.key)),
                Some(sample) if sample.key != row.key => {
                    self.problem(format!("{path}: sample {id} is '{}', in the manifest '{}'", row.key, sample.key));
                }
                Some(sample) if sample.label != row.label => {
                    let name = |label: &Option<String>| label.clone().unwrap_or_else(|| "none".into());
                    let (here, there) = (name(&row.label), name(&sample.label));
                    self.problem(format!("{path}: the label of {} is {here}, in the manifest {there}", row.key));
                }
                Some(_) => {}
            }
        }
    }

    /// Compares the quarantined rows with the quarantine file of the same shard.
    fn quarantine(&mut self, path: &Path, rows: &[Checked], quarantined: &[Quarantined]) {
        let mut predicted: BTreeMap<_, _> =
            rows.iter().filter(|row| row.quarantined).map(|row| (row.sample, &row.key)).collect();
        for row in quarantined {
            match predicted.remove(&row.sample) {
                Some(key) if *key == row.key => {}
                Some(key) => {
                    self.problem(format!("{path}: sample {} is '{}', predicted as '{key}'", row.sample, row.key))
                }
                None => {
                    self.problem(format!("{path}: {} is not quarantined in the predictions, or twice here", row.key))
                }
            }
        }
        for key in predicted.into_values() {
            self.problem(format!("{path}: {key} is quarantined in the predictions but has no row here"));
        }
    }

    /// Checks files that belong to no shard. Their rows count, since every reader of the directory sees them.
    async fn strays(&mut self, output: &Output, out: &Store, shards: u32) -> Result<(), OutputError> {
        for (directory, of) in layout::TABLES {
            let expected: BTreeSet<_> = (0..shards).map(|shard| of(ShardId(shard))).collect();
            let found = out.list(directory).await?;
            for path in found.into_iter().filter(|p| p.extension() == Some("parquet") && !expected.contains(p)) {
                self.problem(format!("{path} belongs to no shard of the manifest"));
                if directory == layout::PREDICTIONS {
                    let content = checked(output, path.clone(), &[], &Expected::default()).await;
                    let rows = self.rows(Content::of(content)?);
                    self.predictions(&path, &[], &rows);
                }
            }
        }
        Ok(())
    }

    fn finish(mut self, fingerprint: String) -> Verification {
        let count = |n: u8| self.seen.iter().filter(|&&seen| seen == n).count() as u64;
        let (missing, duplicated) = (count(0), count(2));
        let ok = missing == 0 && duplicated == 0 && self.problems.is_empty();
        for (count, name) in [(missing, "have no row"), (duplicated, "have several rows")] {
            if count > 0 {
                self.problems.push(format!("{count} samples of the manifest {name}"));
            }
        }
        if self.unspoken > 0 {
            self.problems.push(format!("and {} more problems", self.unspoken));
        }
        Verification {
            ok,
            manifest: self.seen.len() as u64,
            predictions: self.predictions,
            quarantined: self.quarantined,
            missing,
            duplicated,
            fingerprint,
            problems: self.problems,
            shards: self.shards,
        }
    }
}

#[cfg(test)]
mod tests;
