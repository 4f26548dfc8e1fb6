//! Checks committed files: shards whose files are gone, damaged or another job's are computed again.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use elbo_core::ids::{SampleId, ShardId};
use elbo_core::sample::Sample;
use elbo_data::manifest::Manifest;
use elbo_output::layout;
use elbo_output::predictions;
use elbo_output::record::{FINGERPRINT, JobRecord};
use elbo_store::checksum::Checksum;
use elbo_store::table::{TableError, note_of};
use elbo_store::{Store, StoreError};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;

use crate::job_error::JobError;
use crate::ledger::Mark;
use crate::scheduler::{JobShape, ShardTotals};
use crate::writer::{WriteError, Writer};

/// Shards that are checked at the same time.
const SHARDS: usize = 4;

/// The shards whose files differ from those that were committed. Compares sizes, which needs only a listing; if `thorough`,
/// compares every byte.
pub(crate) async fn damaged(
    out: &Store,
    done: &BTreeMap<ShardId, Mark>,
    thorough: bool,
) -> Result<BTreeSet<ShardId>, StoreError> {
    let mut present = BTreeMap::new();
    for (directory, _) in layout::TABLES {
        present.extend(out.sizes(directory).await?);
    }
    let mut damaged = BTreeSet::new();
    let mut sound = Vec::new();
    for (shard, mark) in done {
        if looks_sound(*shard, mark, &present) {
            sound.push((*shard, mark.clone()));
        } else {
            damaged.insert(*shard);
        }
    }
    if thorough {
        let differs = |(shard, mark)| async move { Ok::<_, StoreError>((shard, !is_whole(out, &mark).await?)) };
        let mut looked_at = futures::stream::iter(sound).map(differs).buffer_unordered(SHARDS);
        while let Some((shard, differs)) = looked_at.try_next().await? {
            if differs {
                damaged.insert(shard);
            }
        }
    }
    Ok(damaged)
}

/// Whether exactly the committed files of a shard are there, with the right sizes.
fn looks_sound(shard: ShardId, mark: &Mark, present: &BTreeMap<Path, u64>) -> bool {
    if mark.files.is_empty() {
        // An older version committed it, without checksums of its files.
        return present.contains_key(&layout::predictions(shard));
    }
    layout::TABLES.iter().all(|(_, of)| {
        let path = of(shard);
        let mut committed = mark.files.iter().filter(|file| file.path == path).peekable();
        match present.get(&path) {
            Some(size) => committed.any(|file| file.size == *size),
            None => committed.peek().is_none(),
        }
    })
}

/// Whether the files of a shard have the bytes that were committed.
async fn is_whole(out: &Store, mark: &Mark) -> Result<bool, StoreError> {
    let paths: BTreeSet<_> = mark.files.iter().map(|file| &file.path).collect();
    for path in paths {
        let found = Checksum::read(out, path).await?;
        if !found.is_some_and(|found| mark.files.contains(&found)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Deletes files that discarded jobs have written since, from directories where every reader would see them: files that are
/// not known to be this job's, and whose fingerprint is of a discarded job. A late put to a path without a file can't be
/// prevented, only recognised by its fingerprint, so this runs when a job is opened and again when it ends.
pub(crate) async fn clear_late(Writer { out, ledger }: Writer<'_>) -> Result<(), WriteError> {
    let discarded = ledger.discarded().await?;
    if discarded.is_empty() {
        return Ok(());
    }
    let done = ledger.done().await?;
    let own: BTreeSet<&Path> = done.values().flat_map(|mark| &mark.files).map(|file| &file.path).collect();
    let mut late = Vec::new();
    for (directory, _) in layout::TABLES {
        for path in out.list(directory).await?.into_iter().filter(|path| !own.contains(path)) {
            let Some(bytes) = out.read(&path).await? else { continue };
            if note_of(&bytes, FINGERPRINT).is_some_and(|fingerprint| discarded.contains(&fingerprint)) {
                late.push(path);
            }
        }
    }
    if !late.is_empty() {
        // A coordinator that has taken over may have started over with the same settings: its files have the same
        // fingerprint.
        ledger.hold().await?;
    }
    for path in late {
        tracing::warn!(%path, "deleted: it belongs to a job that --fresh has discarded");
        out.delete(&path).await?;
    }
    Ok(())
}

/// Finds the fingerprint of another job that has predictions in an output.
pub(crate) async fn stranger(out: &Store, known: &BTreeSet<String>) -> Result<Option<String>, StoreError> {
    for path in out.list(layout::PREDICTIONS).await? {
        let Some(bytes) = out.read(&path).await? else { continue };
        let of = note_of(&bytes, FINGERPRINT);
        if let Some(other) = of.filter(|other| !known.contains(other)) {
            return Ok(Some(other));
        }
    }
    Ok(None)
}

/// The shards of a job whose files are whole and its own, for a ledger that was lost.
pub(crate) async fn adopt(
    out: &Store,
    record: &JobRecord,
    manifest: &Manifest,
    shape: &JobShape,
) -> Result<BTreeMap<ShardId, Mark>, JobError> {
    let present: BTreeSet<_> = out.list(layout::PREDICTIONS).await?.into_iter().collect();
    let shards = (0..manifest.shards()).map(ShardId).filter(|shard| present.contains(&layout::predictions(*shard)));
    let of_shard = |shard| async move {
        let samples = manifest.shard(shard).await?;
        Ok::<_, JobError>((shard, mark_of(out, record, shape, shard, &samples).await?))
    };
    let marks = futures::stream::iter(shards).map(of_shard).buffered(SHARDS);
    marks.try_filter_map(|(shard, mark)| async move { Ok(mark.map(|mark| (shard, mark))) }).try_collect().await
}

/// Rebuilds the mark of a committed shard; `None` if a file is missing, damaged or not this job's.
async fn mark_of(
    out: &Store,
    record: &JobRecord,
    shape: &JobShape,
    shard: ShardId,
    samples: &[Sample],
) -> Result<Option<Mark>, StoreError> {
    let mut files = BTreeMap::new();
    for (_, of) in layout::TABLES {
        let path = of(shard);
        if let Some(bytes) = out.read(&path).await? {
            if note_of(&bytes, FINGERPRINT).as_ref() != Some(&record.fingerprint) {
                return Ok(None);
            }
            files.insert(path, bytes);
        }
    }
    let Some((quarantined, evaluations)) = count(&files, record, shard, samples) else { return Ok(None) };
    let planned: u64 = samples.iter().map(|sample| shape.planned_of(sample.candidates.len())).sum();
    let spared = planned.saturating_sub(evaluations);
    let totals = ShardTotals { samples: samples.len() as u64, quarantined, evaluations, spared };
    let files = files.iter().map(|(path, bytes)| Checksum::of(path, bytes)).collect();
    Ok(Some(Mark { totals, files }))
}

/// The number of quarantined samples and the evaluations in a shard's files; `None` if a file is missing or damaged, or the
/// files contradict each other.
fn count(files: &BTreeMap<Path, Bytes>, job: &JobRecord, shard: ShardId, samples: &[Sample]) -> Option<(u64, u64)> {
    let spec = &job.identity.spec;
    let rows = decoded(files.get(&layout::predictions(shard)), true, predictions::decode_predictions)?;
    let keys = samples.iter().map(|sample| (sample.id, &sample.key));
    if !rows.iter().map(|row| (row.sample, &row.key)).eq(keys) {
        return None;
    }
    let given_up: BTreeSet<_> = rows.iter().filter(|row| row.error().is_some()).map(|row| row.sample).collect();
    let quarantine =
        decoded(files.get(&layout::quarantine(shard)), !given_up.is_empty(), predictions::decode_quarantine)?;
    let errors = decoded(files.get(&layout::errors(shard)), spec.write_errors, predictions::decode_errors)?;
    let audited = decoded(files.get(&layout::audit(shard)), spec.audit.is_some(), elbo_output::audit::decode)?;
    let own: BTreeSet<SampleId> = samples.iter().map(|sample| sample.id).collect();
    let agree = quarantine.iter().map(|row| row.sample).eq(given_up.iter().copied())
        && errors.iter().all(|row| own.contains(&row.sample))
        && audited.iter().all(|row| own.contains(&row.sample));
    let of_rows = rows.iter().map(|row| u64::from(row.evaluations));
    let of_audits = audited.iter().map(|row| u64::from(row.reference_evaluations));
    agree.then(|| (given_up.len() as u64, of_rows.chain(of_audits).sum()))
}

/// The rows of a file; empty if it is missing and not `wanted`. `None` if it is damaged, or missing though wanted.
fn decoded<R>(file: Option<&Bytes>, wanted: bool, decode: fn(Bytes) -> Result<Vec<R>, TableError>) -> Option<Vec<R>> {
    match file {
        Some(bytes) => decode(bytes.clone()).ok(),
        None => (!wanted).then(Vec::new),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use elbo_store::Location;
    use object_store::memory::InMemory;

    use super::*;
    use crate::ledger::{Ledger, LedgerError};

    fn quarantine(fingerprint: &str) -> Bytes {
        predictions::encode_quarantine(&[], &[(FINGERPRINT.to_owned(), fingerprint.to_owned())]).unwrap()
    }

    #[tokio::test]
    async fn only_files_of_discarded_jobs_are_deleted_and_only_by_the_holder_of_the_ledger() {
        let out = Store::from_parts(Arc::new(InMemory::new()), Location::parse("memory:///").unwrap());
        let first = Ledger::open(&out).await.unwrap();
        first.begin("old", BTreeMap::new()).await.unwrap();
        first.discard([]).await.unwrap();
        // The job starts over with the same settings: the files of both have the same fingerprint, and only the ledger
        // knows whose they are.
        first.begin("old", BTreeMap::new()).await.unwrap();
        let paths = [0, 1, 2].map(|shard| layout::quarantine(ShardId(shard)));
        let files = [quarantine("old"), quarantine("old"), quarantine("another")];
        for (path, bytes) in paths.iter().zip(&files) {
            out.write(path, bytes.clone()).await.unwrap();
        }
        let mark = Mark { files: vec![Checksum::of(&paths[0], &files[0])], ..Mark::default() };
        first.commit(ShardId(0), mark, Default::default()).await.unwrap();

        let second = Ledger::open(&out).await.unwrap();
        let replaced = clear_late(Writer { out: &out, ledger: &first }).await;
        assert!(matches!(replaced, Err(WriteError::Ledger(LedgerError::Fenced))), "{replaced:?}");
        assert_eq!(out.list("quarantine").await.unwrap().len(), 3);
        clear_late(Writer { out: &out, ledger: &second }).await.unwrap();
        assert_eq!(out.list("quarantine").await.unwrap(), [paths[0].clone(), paths[2].clone()]);
    }
}
