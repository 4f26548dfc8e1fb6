//! Checking an output: is every sample of the manifest predicted exactly once, and by its own shard's file?
//!
//! Only what is written is read, a shard at a time: neither model nor images nor the ledger are needed, so an output can be
//! checked anywhere, long after its job.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use object_store::path::Path;
use serde::Serialize;

use crate::ids::ShardId;
use crate::layout;
use crate::manifest::{Manifest, ManifestError, Sample};
use crate::predictions::{self, Outcome, Prediction, Quarantined};
use crate::store::{Store, StoreError};
use crate::table::TableError;

/// Problems spelled out; the rest is counted.
const PROBLEMS_SHOWN: usize = 100;

/// An output that can't be checked at all.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The manifest can't be read.
    #[error("verifying the output: {0}")]
    Manifest(#[from] ManifestError),
    /// The store can't be read.
    #[error("verifying the output: {0}; check that the location can be read and try again")]
    Store(#[from] StoreError),
}

/// What was found. Serialises to what `elbo verify --json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Whether the output is complete and consistent.
    pub ok: bool,
    /// Samples in the manifest.
    pub manifest: u64,
    /// Rows with a prediction (status `ok`).
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
        self.problems.iter().try_for_each(|problem| writeln!(f, "  ! {problem}"))?;
        if self.ok { Ok(()) } else { writeln!(f, "run the job again with the same --out: what is missing is computed") }
    }
}

/// Checks the predictions and quarantine files of `out` against its manifest.
pub async fn verify(out: &Store, manifest: &Manifest, fingerprint: String) -> Result<Verification, VerifyError> {
    let mut check = Check::new(manifest.len());
    for shard in (0..manifest.shards()).map(ShardId) {
        let samples = manifest.shard(shard).await?;
        let (predictions, quarantine) = (layout::predictions(shard), layout::quarantine(shard));
        let rows = match out.read(&predictions).await? {
            Some(bytes) => check.decoded(&predictions, predictions::decode_predictions(bytes)),
            None => {
                check.problem(format!("{predictions} does not exist ({} samples)", samples.len()));
                None
            }
        };
        let quarantined = match out.read(&quarantine).await? {
            Some(bytes) => check.decoded(&quarantine, predictions::decode_quarantine(bytes)),
            None => None,
        };
        check.predictions(&predictions, &samples, rows.as_deref().unwrap_or_default());
        check.quarantine(&quarantine, rows.as_deref().unwrap_or_default(), quarantined.as_deref().unwrap_or_default());
    }
    for directory in [layout::PREDICTIONS, layout::QUARANTINE] {
        let expected: BTreeSet<_> = (0..manifest.shards())
            .map(|k| {
                if directory == layout::PREDICTIONS {
                    layout::predictions(ShardId(k))
                } else {
                    layout::quarantine(ShardId(k))
                }
            })
            .collect();
        for path in out.list(directory).await? {
            if path.extension() == Some("parquet") && !expected.contains(&path) {
                check.stray(&path, out.read(&path).await?);
            }
        }
    }
    Ok(check.finish(fingerprint))
}

/// Counts of everything seen so far.
struct Check {
    /// Rows per sample; two means two or more.
    seen: Vec<u8>,
    predictions: u64,
    quarantined: u64,
    problems: Vec<String>,
    unspoken: usize,
}

impl Check {
    fn new(samples: u64) -> Self {
        Self { seen: vec![0; samples as usize], predictions: 0, quarantined: 0, problems: Vec::new(), unspoken: 0 }
    }

    fn problem(&mut self, problem: String) {
        if self.problems.len() < PROBLEMS_SHOWN { self.problems.push(problem) } else { self.unspoken += 1 }
    }

    fn decoded<T>(&mut self, path: &Path, rows: Result<Vec<T>, TableError>) -> Option<Vec<T>> {
        rows.map_err(|e| self.problem(format!("{path}: {e}"))).ok()
    }

    /// Counts the rows of one predictions file and compares them with the samples it should hold.
    fn predictions(&mut self, path: &Path, samples: &[Sample], rows: &[Prediction]) {
        let own: BTreeMap<_, _> = samples.iter().map(|sample| (sample.id, sample)).collect();
        for row in rows {
            match row.outcome {
                Outcome::Labelled(_) => self.predictions += 1,
                Outcome::Quarantined { .. } => self.quarantined += 1,
            }
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
    fn quarantine(&mut self, path: &Path, rows: &[Prediction], quarantined: &[Quarantined]) {
        let mut predicted: BTreeMap<_, _> =
            rows.iter().filter(|row| row.error().is_some()).map(|row| (row.sample, &row.key)).collect();
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

    /// A file that belongs to no shard: its rows count, since every reader of the directory sees them.
    fn stray(&mut self, path: &Path, bytes: Option<Bytes>) {
        self.problem(format!("{path} belongs to no shard of the manifest"));
        if path.prefix_matches(&Path::from(layout::PREDICTIONS))
            && let Some(rows) = bytes.and_then(|bytes| self.decoded(path, predictions::decode_predictions(bytes)))
        {
            self.predictions(path, &[], &rows);
        }
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
        }
    }
}

#[cfg(test)]
mod tests;
