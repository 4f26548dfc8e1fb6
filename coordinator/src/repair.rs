//! What became of committed files since: those that are gone, damaged or another job's are computed again.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use elbo_common::audit;
use elbo_common::checksum::Checksum;
use elbo_common::ids::{SampleId, ShardId};
use elbo_common::layout;
use elbo_common::manifest::{Manifest, Sample};
use elbo_common::predictions;
use elbo_common::record::{FINGERPRINT, JobRecord};
use elbo_common::store::{Store, StoreError};
use elbo_common::table::{TableError, note_of};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;

use crate::brain::{JobShape, ShardTotals};
use crate::job::JobError;
use crate::ledger::Mark;

/// Shards that are looked at side by side.
const SHARDS: usize = 4;

/// The shards whose files are not those that were committed. Sizes are compared, which needs no more than a listing; if
/// `thorough`, every byte is.
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

/// Whether the files of a shard are there, of the right sizes, and no others.
fn looks_sound(shard: ShardId, mark: &Mark, present: &BTreeMap<Path, u64>) -> bool {
    if mark.files.is_empty() {
        // An older version committed it, and said nothing of its files.
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

/// Deletes what discarded jobs have written since, where every reader of the directories would see it: files that are not
/// known to be this job's and say that they are of one of those.
pub(crate) async fn clear_late(
    out: &Store,
    done: &BTreeMap<ShardId, Mark>,
    discarded: &BTreeSet<String>,
) -> Result<(), StoreError> {
    if discarded.is_empty() {
        return Ok(());
    }
    let own: BTreeSet<&Path> = done.values().flat_map(|mark| &mark.files).map(|file| &file.path).collect();
    for (directory, _) in layout::TABLES {
        for path in out.list(directory).await?.into_iter().filter(|path| !own.contains(path)) {
            let Some(bytes) = out.read(&path).await? else { continue };
            if note_of(&bytes, FINGERPRINT).is_some_and(|fingerprint| discarded.contains(&fingerprint)) {
                tracing::warn!(%path, "deleted: it is of a job that --fresh has discarded");
                out.delete(&path).await?;
            }
        }
    }
    Ok(())
}

/// Finds the fingerprint of some other job whose predictions are in an output.
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

/// What a committed shard's mark must have been; `None` where something is missing, damaged or not this job's.
async fn mark_of(
    out: &Store,
    record: &JobRecord,
    shape: &JobShape,
    shard: ShardId,
    samples: &[Sample],
) -> Result<Option<Mark>, StoreError> {
    let spec = &record.identity.spec;
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
    let own: BTreeSet<_> = samples.iter().map(|sample| sample.id).collect();
    let Some(Ok(rows)) = files.get(&layout::predictions(shard)).cloned().map(predictions::decode_predictions) else {
        return Ok(None);
    };
    let keys = samples.iter().map(|sample| (sample.id, &sample.key));
    if !rows.iter().map(|row| (row.sample, &row.key)).eq(keys) {
        return Ok(None);
    }
    let quarantined = rows.iter().filter(|row| row.error().is_some()).count() as u64;
    let (mut evaluations, mut is_whole) = (rows.iter().map(|row| u64::from(row.evaluations)).sum::<u64>(), true);
    let mut check = |path: &Path, wanted: bool, samples: &dyn Fn(Bytes) -> Result<Vec<SampleId>, TableError>| {
        is_whole &= match files.get(path).cloned().map(samples) {
            Some(samples) => samples.is_ok_and(|samples| samples.iter().all(|sample| own.contains(sample))),
            None => !wanted,
        };
    };
    check(&layout::errors(shard), spec.write_errors, &|bytes| {
        Ok(predictions::decode_errors(bytes)?.into_iter().map(|row| row.sample).collect())
    });
    check(&layout::quarantine(shard), quarantined > 0, &|bytes| {
        let rows = predictions::decode_quarantine(bytes)?;
        // As many as in the predictions.
        let of = rows.into_iter().map(|row| row.sample).collect::<Vec<_>>();
        Ok(if of.len() as u64 == quarantined { of } else { vec![SampleId(u64::MAX)] })
    });
    check(&layout::audit(shard), spec.audit.is_some(), &|bytes| {
        Ok(audit::decode(bytes)?.into_iter().map(|row| row.sample).collect())
    });
    if !is_whole {
        return Ok(None);
    }
    if let Some(audited) = files.get(&layout::audit(shard)).cloned().and_then(|bytes| audit::decode(bytes).ok()) {
        evaluations += audited.iter().map(|row| u64::from(row.reference_evaluations)).sum::<u64>();
    }
    let planned: u64 = samples.iter().map(|sample| shape.planned_of(sample.candidates.len())).sum();
    let spared = planned.saturating_sub(evaluations);
    let totals = ShardTotals { samples: rows.len() as u64, quarantined, evaluations, spared };
    let files = files.iter().map(|(path, bytes)| Checksum::of(path, bytes)).collect();
    Ok(Some(Mark { totals, files }))
}
