//! Checks one file of a shard: is it whole, does it belong to this job, and does it have only the shard's own samples?

use std::collections::{BTreeMap, BTreeSet};

use elbo_core::audit::Audited;
use elbo_core::ids::{SampleId, ShardId};
use elbo_store::checksum::{Checksum, DATA, Data, Hashed};
use elbo_store::parquet_file::ParquetFile;
use elbo_store::table::{self, View};
use elbo_store::{ObjectVersion, Store, StoreError};
use futures::TryStreamExt;
use object_store::path::Path;

use super::{Expected, damage};
use crate::audit::AuditTable;
use crate::layout;
use crate::predictions::{ErrorRow, Errors};
use crate::record::FINGERPRINT;
use crate::{Output, OutputError};

/// A row that belongs to a sample.
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

/// The problems of a shard's files, by path. It checks the files as a whole, and the rows of errors and audits. A damaged file
/// is not decoded, since neither its content nor the decoder's behaviour on it can be trusted.
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
        if wanted && !problems.contains_key(path) && out.look(path).await? == ObjectVersion::Nothing {
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

/// The problem of a file as a whole: it is damaged, missing, or from another job.
async fn whole(
    out: &Store,
    path: &Path,
    expected: &Expected,
    committed: Option<&[&Checksum]>,
) -> Result<Option<String>, OutputError> {
    // If predictions are missing, all their rows are reported as missing, which says more.
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
        // Older versions of the program wrote no checksum.
        (None, None) => false,
    };
    Ok(damaged.then(|| format!("{path} is damaged: its bytes are not those that were written")))
}

/// The problem of a file with rows of samples that are not in its shard.
async fn strangers<V: View<Row: OfSample + Send> + Send + 'static>(
    output: &Output,
    path: &Path,
    samples: &BTreeSet<SampleId>,
) -> Result<Option<String>, OutputError> {
    let look = async {
        let Some(mut batches) = output.rows::<V>(path.clone()).await? else { return Ok(None) };
        while let Some(rows) = batches.try_next().await? {
            if let Some(row) = rows.iter().find(|row| !samples.contains(&row.sample())) {
                return Ok(Some(format!("{path} has a row of sample {}, which is not in its shard", row.sample())));
            }
        }
        Ok(None)
    };
    match look.await {
        Err(error) => damage(error).map(Some),
        found => found,
    }
}
