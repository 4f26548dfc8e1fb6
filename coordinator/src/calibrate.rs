//! Computes confidence once every shard is committed. The first pass gathers right and wrong predictions; the second pass
//! rewrites all predictions with their confidence.
//!
//! Both passes read only committed data, and the second pass writes nothing that the first one reads. If interrupted
//! anywhere, they start again and produce the same bytes.

use std::collections::BTreeMap;
use std::pin::{Pin, pin};

use bytes::Bytes;
use elbo_core::audit::Audited;
use elbo_core::calibration::{Calibration, Confidence, Fitter, Outlook, Source};
use elbo_core::ids::{ClassIndex, SampleId, ShardId};
use elbo_core::prediction::Prediction;
use elbo_core::sample::Sample;
use elbo_data::manifest::{Manifest, ManifestError};
use elbo_output::layout;
use elbo_output::predictions::{self};
use elbo_output::record::JobRecord;
use elbo_output::{Output, OutputError};
use elbo_store::StoreError;
use elbo_store::checksum::Checksum;
use elbo_store::table::TableError;
use futures::stream::Peekable;
use futures::{Stream, StreamExt, TryStreamExt};

use crate::commit::{self, Foreign};
use crate::ledger::LedgerError;
use crate::writer::{ATTEMPTS, WriteError, Writer};

/// Enough labels for a calibration. With fewer, an audit is preferred.
const FEW: usize = 30;
/// Shards that are written at the same time. Each takes memory for its files.
const SHARDS: usize = 2;

/// Confidence could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// The predictions can't be read.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The manifest can't be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The ledger failed, or another coordinator has taken it over.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A file of predictions is damaged.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A file of predictions is another job's.
    #[error(transparent)]
    Foreign(#[from] Foreign),
    /// A file of predictions can't be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A background task panicked, which is a defect.
    #[error("the encoder ended unexpectedly: run the same command again to resume, and report this")]
    Task,
}

/// Fits a calibration to labels or an audit, unless the job brings its own, and writes the confidence of every prediction.
/// Does nothing if there is neither. A coordinator that has been replaced writes nothing, since the rows may have changed.
pub(crate) async fn calibrate(
    writer: Writer<'_>,
    manifest: &Manifest,
    record: &mut JobRecord,
) -> Result<(), CalibrateError> {
    let spec = &record.identity.spec;
    record.confidence = None;
    if record.manifest.labelled == Some(0) && spec.audit.is_none() && spec.calibration.is_none() {
        return Ok(());
    }
    record.confidence = find(&Output::new(writer.out), record).await?;
    let Some(Confidence { calibration, .. }) = record.confidence else {
        if spec.abstain_below.is_some() {
            tracing::warn!(
                "--abstain-below had no effect: no image that has a label or was audited could be scored, so it is unknown how \
                 sure the others are; give a larger --audit or --calibration-from, with another --out"
            );
        }
        return Ok(());
    };
    tracing::info!(shards = manifest.shards(), "writing the confidence of every prediction");
    let shards = futures::stream::iter((0..manifest.shards()).map(ShardId));
    let written = shards.map(|shard| write(writer, manifest, record, calibration, shard)).buffer_unordered(SHARDS);
    let written: Vec<_> = written.try_filter_map(|written| std::future::ready(Ok(written))).try_collect().await?;
    Ok(writer.ledger.settle(written).await?)
}

/// The calibration of a job, and its quality.
async fn find(output: &Output, record: &JobRecord) -> Result<Option<Confidence>, CalibrateError> {
    let spec = &record.identity.spec;
    let (mut by_labels, mut by_audit) = (Fitter::default(), Fitter::default());
    let mut audited = pin!(output.audited().peekable());
    let mut rows = output.predictions_and_classes(spec, &record.manifest).await?;
    while let Some((row, classes)) = rows.try_next().await? {
        let Some(best) = row.scores().first().map(|score| score.class) else { continue };
        let outlook = |truth: ClassIndex| Outlook::of(&row, best == truth);
        let label = row.label.as_deref().and_then(|label| classes.with_label(label));
        if let Some(outlook) = label.and_then(outlook) {
            by_labels.add(&row.key, outlook);
        }
        if spec.audit.is_some()
            && let Some(outlook) = reference_class(audited.as_mut(), row.sample).await?.and_then(outlook)
        {
            by_audit.add(&row.key, outlook);
        }
    }
    let (source, fitter) = match by_labels.len() {
        labels if labels < FEW && !by_audit.is_empty() => (Source::Audit, by_audit),
        _ => (Source::Labels, by_labels),
    };
    Ok(fitter.finish(source, spec.calibration))
}

/// The audit's class for a sample, if it was audited. Samples must be requested in the order of the audited ones.
async fn reference_class(
    mut audited: Pin<&mut Peekable<impl Stream<Item = Result<Audited, OutputError>>>>,
    sample: SampleId,
) -> Result<Option<ClassIndex>, OutputError> {
    let is_due = |next: &Result<Audited, OutputError>| next.as_ref().map_or(true, |row| row.sample <= sample);
    while let Some(next) = audited.as_mut().next_if(is_due).await {
        let row = next?;
        if row.sample == sample {
            return Ok(Some(row.reference_class));
        }
    }
    Ok(None)
}

/// Writes a shard's predictions with their confidence, unless they have it already. Returns the file.
async fn write(
    writer: Writer<'_>,
    manifest: &Manifest,
    record: &JobRecord,
    calibration: Calibration,
    shard: ShardId,
) -> Result<Option<(ShardId, Checksum)>, CalibrateError> {
    let path = layout::predictions(shard);
    let spec = &record.identity.spec;
    let samples = if spec.candidates.is_some() { manifest.shard(shard).await? } else { Vec::new() };
    for _ in 0..ATTEMPTS {
        // Look before the rows are read, and before the ledger is written to: see [`crate::writer`].
        let seen = writer.out.look(&path).await?;
        let Some(before) = writer.out.read(&path).await? else { return Ok(None) };
        Foreign::check(&path, &before, record)?;
        let after = encode(before.clone(), samples.clone(), record.clone(), calibration).await?;
        let checksum = Checksum::of(&path, &after);
        if after == before {
            return Ok(Some((shard, checksum)));
        }
        writer.ledger.expect(shard, checksum.clone()).await?;
        if writer.out.replace(&path, after, &seen).await? {
            return Ok(Some((shard, checksum)));
        }
    }
    Err(WriteError::Contended(writer.out.location().below(path.as_ref())).into())
}

/// A file of predictions, with confidence from a calibration.
async fn encode(
    before: Bytes,
    samples: Vec<Sample>,
    record: JobRecord,
    calibration: Calibration,
) -> Result<Bytes, CalibrateError> {
    let encoding = tokio::task::spawn_blocking(move || {
        let spec = &record.identity.spec;
        let captioned: BTreeMap<_, _> = samples.iter().map(|sample| (sample.id, sample)).collect();
        let calibrated = |row: Prediction| match captioned.get(&row.sample) {
            Some(sample) => calibration.apply(row, spec.abstain_below, &sample.classes(&spec.classes)),
            None => calibration.apply(row, spec.abstain_below, &spec.classes),
        };
        let rows: Vec<_> = predictions::decode_predictions(before)?.into_iter().map(calibrated).collect();
        commit::predictions_file(&rows, &record)
    });
    Ok(encoding.await.map_err(|_| CalibrateError::Task)??)
}
