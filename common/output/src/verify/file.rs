//! One file of a shard: is it whole, is it this job's, and does it speak of the shard's own samples?

use std::collections::{BTreeMap, BTreeSet};

use elbo_core::audit::Audited;
use elbo_core::ids::{SampleId, ShardId};
use elbo_store::checksum::{Checksum, DATA, Data, Hashed};
use elbo_store::parquet_file::ParquetFile;
use elbo_store::table::{self, View};
use elbo_store::{Seen, Store, StoreError};
use futures::TryStreamExt;
use object_store::path::Path;

use super::Expected;
use crate::audit::AuditTable;
use crate::layout;
use crate::predictions::{ErrorRow, Errors};
use crate::record::FINGERPRINT;
use crate::{Output, OutputError};

/// A row that speaks of a sample.
pub(super) trait OfSample {
    /// The sample.
    fn sample(&self) -> SampleId;
}

impl OfSample for ErrorRow {
    fn sample(&self) -> SampleId {
        self.sample
    }
}

impl OfSample for Audited {
    fn sample(&self) -> SampleId {
        self.sample
    }
}

/// What is wrong with the files of a shard as a whole, by path, and with the rows of those that say nothing of whole samples.
/// A file that is damaged is not decoded: nothing of it can be trusted, the decoder's own soundness neither.
pub(super) async fn problems(
    output: &Output,
    out: &Store,
    expected: &Expected,
    shard: ShardId,
    samples: &BTreeSet<SampleId>,
) -> Result<BTreeMap<Path, String>, OutputError> {
    let mut problems = BTreeMap::new();
    let committed = expected.marks.as_ref().and_then(|marks| marks.get(&shard)).filter(|files| !files.is_empty());
    let (predictions, quarantine) = (layout::predictions(shard), layout::quarantine(shard));
    let (errors, audit) = (layout::errors(shard), layout::audit(shard));
    for path in [&predictions, &quarantine, &errors, &audit] {
        let checksums = committed.map(|files| files.iter().filter(|file| file.path == *path).collect::<Vec<_>>());
        let problem = whole(out, path, expected, checksums.as_deref()).await?;
        problems.extend(problem.map(|problem| (path.clone(), problem)));
    }
    for (wanted, path, flag) in [(expected.errors, &errors, "--write-errors"), (expected.audit, &audit, "--audit")] {
        if wanted && !problems.contains_key(path) && out.look(path).await? == Seen::Nothing {
            problems.insert(path.clone(), format!("{path} does not exist, though the job has {flag}"));
        }
    }
    if expected.errors && !problems.contains_key(&errors) {
        let problem = strangers::<Errors>(output, &errors, samples).await?;
        problems.extend(problem.map(|problem| (errors, problem)));
    }
    if expected.audit && !problems.contains_key(&audit) {
        let problem = strangers::<AuditTable>(output, &audit, samples).await?;
        problems.extend(problem.map(|problem| (audit, problem)));
    }
    Ok(problems)
}

/// What is wrong with a file as a whole: it is damaged, missing, or another job's.
async fn whole(
    out: &Store,
    path: &Path,
    expected: &Expected,
    committed: Option<&[&Checksum]>,
) -> Result<Option<String>, OutputError> {
    // Of predictions that are missing, so are all rows, which says it better.
    let is_told = committed.is_some_and(|files| !files.is_empty()) && !path.as_ref().starts_with(layout::PREDICTIONS);
    let missing = || is_told.then(|| format!("{path} is missing"));
    let file = match ParquetFile::find(out, path.clone()).await {
        Ok((file, _)) => file,
        Err(StoreError::Object { source: object_store::Error::NotFound { .. }, .. }) => return Ok(missing()),
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata().await.ok();
    let note = |key| metadata.as_ref().and_then(|metadata| table::note(metadata, key));
    if let Some(other) = note(FINGERPRINT).filter(|other| **other != *expected.fingerprint) {
        return Ok(Some(format!("{path} belongs to another job, with the fingerprint {other}")));
    }
    let data = note(DATA).map(Data::parse);
    let Some(hashed) = Hashed::read(out, path, data.as_ref().and_then(Option::as_ref)).await? else {
        return Ok(missing());
    };
    let damaged = match (committed, data) {
        (Some([]), _) => return Ok(Some(format!("{path} is there, though its shard was committed without it"))),
        (Some(files), _) => !files.contains(&&hashed.whole),
        (None, Some(data)) => !data.is_some_and(|data| hashed.has(&data)),
        // An older version of the program said nothing of its files.
        (None, None) => false,
    };
    Ok(damaged.then(|| format!("{path} is damaged: its bytes are not those that were written")))
}

/// What is wrong with rows that may speak of a shard's samples only.
async fn strangers<V: View<Row: OfSample + Send> + Send + 'static>(
    output: &Output,
    path: &Path,
    samples: &BTreeSet<SampleId>,
) -> Result<Option<String>, OutputError> {
    let mut batches = match super::damage(output.rows::<V>(path.clone()).await)? {
        Ok(Some(batches)) => batches,
        Ok(None) => return Ok(None),
        Err(problem) => return Ok(Some(problem)),
    };
    loop {
        match super::damage(batches.try_next().await)? {
            Ok(None) => return Ok(None),
            Err(problem) => return Ok(Some(problem)),
            Ok(Some(rows)) => {
                if let Some(row) = rows.iter().find(|row| !samples.contains(&row.sample())) {
                    return Ok(Some(format!("{path} speaks of sample {}, which is not of its shard", row.sample())));
                }
            }
        }
    }
}
