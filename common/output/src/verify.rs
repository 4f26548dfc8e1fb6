//! Checking an output: is every sample of the manifest predicted exactly once, by its own shard's file, and is every file as
//! it was written?
//!
//! Only what is written is read, a shard at a time: neither model nor images are needed, so an output can be checked anywhere,
//! long after its job. The ledger knows what every file must hash to; without it, the files are checked against what they say
//! of themselves.

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

/// Problems spelled out; the rest is counted.
const PROBLEMS_SHOWN: usize = 100;
/// Damaged shards that are named.
const SHARDS_SHOWN: usize = 100;
/// Shards that are read side by side.
const SHARDS: usize = 4;

/// What was found. Serialises to what `elbo verify --json` prints.
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
    /// What is wrong, for people; the first hundred.
    #[serde(skip)]
    pub problems: Vec<String>,
    /// The shards with something wrong, which can be computed again.
    #[serde(skip)]
    pub shards: BTreeSet<ShardId>,
}

/// The files of committed shards, as the ledger knows them.
pub type Marks = BTreeMap<ShardId, Vec<Checksum>>;

/// What an output must be like.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// The job's fingerprint.
    pub fingerprint: String,
    /// Whether single errors are written.
    pub errors: bool,
    /// Whether samples are audited.
    pub audit: bool,
    /// How sure predictions are, once that is known.
    pub confidence: Option<Confident>,
    /// What committed files hash to; none where the ledger can't be asked.
    pub marks: Option<Marks>,
}

/// What the confidence of predictions follows from.
#[derive(Clone, Debug)]
pub struct Confident {
    /// From errors to confidence.
    pub calibration: Calibration,
    /// What less sure samples are not given a class for.
    pub abstain_below: Option<f64>,
    /// The job's classes.
    pub classes: Classes,
}

impl Expected {
    /// What the output of a job must be like.
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
        writeln!(f, "run the job again with the same --out: what is missing is computed")?;
        let shards: Vec<_> = self.shards.iter().take(SHARDS_SHOWN).map(ToString::to_string).collect();
        let more = if self.shards.len() > SHARDS_SHOWN { " (and more)" } else { "" };
        if !shards.is_empty() {
            writeln!(f, "what is damaged is computed again with --recompute {}{more}", shards.join(","))?;
        }
        Ok(())
    }
}

/// Checks the files of `out` against its manifest, and against what is `expected` of them. Every column is decoded, so that
/// damage shows wherever it is, but never more of a file than some hundred rows are in memory.
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

/// What is checked of a prediction.
#[derive(Debug)]
struct Checked {
    sample: SampleId,
    key: String,
    label: Option<String>,
    quarantined: bool,
    /// Whether it is as sure as it must be.
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

/// What there is of a shard.
#[derive(Debug)]
struct Found {
    predictions: Result<Option<Vec<Checked>>, String>,
    quarantine: Result<Vec<Quarantined>, String>,
    /// What is wrong with whole files.
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
            Some(problem) => Err(problem),
            None => damage(checked(output, path, samples, expected).await)?,
        };
        let path = layout::quarantine(shard);
        let quarantine = match files.remove(&path) {
            Some(problem) => Err(problem),
            None => damage(output.quarantine_at(path).await)?,
        };
        let (quarantine, files) = (quarantine.map(Option::unwrap_or_default), files.into_values().collect());
        Ok(Self { predictions, quarantine, files })
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

/// A file that is wrong is a finding; a store that fails is none.
fn damage<T>(read: Result<T, OutputError>) -> Result<Result<T, String>, OutputError> {
    match read {
        Ok(found) => Ok(Ok(found)),
        Err(error @ OutputError::File { .. }) => Ok(Err(error.to_string())),
        Err(error) => Err(error),
    }
}

/// Counts of everything seen so far.
struct Check {
    /// Rows per sample; two means two or more.
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

    /// How many problems there are so far.
    fn count(&self) -> usize {
        self.problems.len() + self.unspoken
    }

    fn problem(&mut self, problem: String) {
        if self.problems.len() < PROBLEMS_SHOWN { self.problems.push(problem) } else { self.unspoken += 1 }
    }

    fn shard(&mut self, shard: ShardId, samples: &[Sample], found: Found) {
        let before = self.count();
        let (predictions, quarantine) = (layout::predictions(shard), layout::quarantine(shard));
        found.files.into_iter().for_each(|problem| self.problem(problem));
        let mut is_missing = false;
        let rows = match found.predictions {
            Ok(Some(rows)) => rows,
            Ok(None) => {
                is_missing = true;
                self.problem(format!("{predictions} does not exist ({} samples)", samples.len()));
                Vec::new()
            }
            Err(problem) => {
                self.problem(problem);
                Vec::new()
            }
        };
        let quarantined = found.quarantine.unwrap_or_else(|problem| {
            self.problem(problem);
            Vec::new()
        });
        self.predictions(&predictions, samples, &rows);
        self.quarantine(&quarantine, &rows, &quarantined);
        let unsure = rows.iter().filter(|row| !row.is_sure).count();
        if unsure > 0 {
            self.problem(format!("{predictions}: {unsure} rows have another confidence than the job found out"));
        }
        // What is missing is computed anyway.
        if self.count() > before && !is_missing {
            self.shards.insert(shard);
        }
    }

    /// Counts the rows of one predictions file and compares them with the samples it should hold.
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

    /// Compares the rows with status quarantined with the quarantine file of the same shard.
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

    /// Files that belong to no shard: their rows count, since every reader of the directory sees them.
    async fn strays(&mut self, output: &Output, out: &Store, shards: u32) -> Result<(), OutputError> {
        for (directory, of) in layout::TABLES {
            let expected: BTreeSet<_> = (0..shards).map(|shard| of(ShardId(shard))).collect();
            let found = out.list(directory).await?;
            for path in found.into_iter().filter(|p| p.extension() == Some("parquet") && !expected.contains(p)) {
                self.problem(format!("{path} belongs to no shard of the manifest"));
                if directory == layout::PREDICTIONS {
                    match damage(checked(output, path.clone(), &[], &Expected::default()).await)? {
                        Ok(rows) => self.predictions(&path, &[], &rows.unwrap_or_default()),
                        Err(problem) => self.problem(problem),
                    }
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
