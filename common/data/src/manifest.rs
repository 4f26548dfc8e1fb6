//! The listing of the dataset, stored as Parquet before the first evaluation. A resumed job does not list again.
//!
//! A shard is a row group, and a file has [`SHARDS_PER_PART`] of them, so a coordinator with millions of samples reads only
//! the shards it works on. It keeps a hash per shard in memory, and `job.json` has the hash of these hashes. A changed shard
//! is therefore refused, no matter when it is read.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::{Array, ArrayRef, ListArray, StringArray, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use elbo_core::ids::{SampleId, ShardId};
use elbo_core::sample::{Part, Sample};
use elbo_store::parquet_file::ParquetFile;
use elbo_store::table::{self, Columns, ReadError, Table, TableError};
use elbo_store::{Store, StoreError};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use parquet::errors::ParquetError;
use serde::{Deserialize, Serialize};

use crate::{Account, DatasetError, SampleSink};

/// Directory of the manifest below `--out`.
pub const DIRECTORY: &str = "manifest";

/// Shards in a file of the manifest.
pub const SHARDS_PER_PART: u32 = 64;

/// The metadata key of a file with the hashes of its shards.
const DIGESTS: &str = "elbo.shard_digests";

/// Footers read at a time.
const FOOTERS: usize = 8;

/// The manifest's size and hash.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestRecord {
    /// Samples listed.
    pub samples: u64,
    /// Hash over their identities.
    pub digest: String,
    /// The number of samples for each number of captions.
    pub captions: BTreeMap<usize, u64>,
    /// Samples with a label; `None` in manifests of an older version, which did not count them.
    #[serde(default)]
    pub labelled: Option<u64>,
    /// What the listing passed over.
    #[serde(default, skip_serializing_if = "Account::is_empty")]
    pub passed_over: Account,
}

/// The path of one of the manifest's files.
pub fn part_path(part: u32) -> Path {
    Path::from(format!("{DIRECTORY}/part-{part:05}.parquet"))
}

/// A manifest that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A file is missing.
    #[error("{0} is missing, but job.json refers to it: restore it, or start over with --fresh")]
    Missing(Path),
    /// A file differs from the listing.
    #[error("{0} is not the one that was listed: restore it, or start over with --fresh")]
    Changed(Path),
    /// It was written by an earlier version.
    #[error(
        "{0} was written by an earlier version of elbo: finish the job with that version, or start over with --fresh"
    )]
    Older(Path),
    /// A file can't be decoded.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Writes a manifest while samples are listed. It keeps compressed data in memory: tens of bytes per sample.
pub struct ManifestWriter {
    shard_size: usize,
    pending: Vec<Sample>,
    part: Option<table::Writer<SampleTable>>,
    /// Hashes of the shards in the part.
    digests: Vec<String>,
    parts: Vec<Bytes>,
    /// Hash of all shards' hashes.
    root: blake3::Hasher,
    samples: u64,
    captions: BTreeMap<usize, u64>,
    labelled: u64,
}

impl std::fmt::Debug for ManifestWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManifestWriter").field("samples", &self.samples).finish_non_exhaustive()
    }
}

impl ManifestWriter {
    /// An empty manifest with `shard_size` samples per shard.
    pub fn new(shard_size: u32) -> Self {
        Self {
            shard_size: shard_size.max(1) as usize,
            pending: Vec::new(),
            part: None,
            digests: Vec::new(),
            parts: Vec::new(),
            root: blake3::Hasher::new(),
            samples: 0,
            captions: BTreeMap::new(),
            labelled: 0,
        }
    }

    fn end_shard(&mut self) -> Result<(), TableError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let digest = digest_of(&self.pending);
        let mut part = match self.part.take() {
            Some(part) => part,
            None => table::Writer::new()?,
        };
        part.group(&self.pending)?;
        self.pending.clear();
        self.root.update(digest.as_bytes());
        self.digests.push(digest.to_hex().to_string());
        self.part = Some(part);
        if self.digests.len() == SHARDS_PER_PART as usize { self.end_part() } else { Ok(()) }
    }

    fn end_part(&mut self) -> Result<(), TableError> {
        if let Some(mut part) = self.part.take() {
            part.note(DIGESTS, std::mem::take(&mut self.digests).join(" "));
            self.parts.push(part.finish()?);
        }
        Ok(())
    }

    /// The manifest's files, and their record for `job.json`.
    pub fn finish(mut self) -> Result<(Vec<(Path, Bytes)>, ManifestRecord), TableError> {
        self.end_shard()?;
        self.end_part()?;
        let digest = self.root.finalize().to_hex().to_string();
        let (labelled, passed_over) = (Some(self.labelled), Account::default());
        let record = ManifestRecord { samples: self.samples, digest, captions: self.captions, labelled, passed_over };
        Ok(((0..).map(part_path).zip(self.parts).collect(), record))
    }
}

impl SampleSink for ManifestWriter {
    fn take(&mut self, sample: Sample) -> Result<(), DatasetError> {
        self.samples += 1;
        self.labelled += u64::from(sample.label.is_some());
        *self.captions.entry(sample.candidates.len()).or_default() += 1;
        self.pending.push(sample);
        if self.pending.len() == self.shard_size { Ok(self.end_shard()?) } else { Ok(()) }
    }

    fn clear(&mut self) {
        *self = Self::new(self.shard_size as u32);
    }
}

fn unread(error: ReadError) -> ManifestError {
    match error {
        ReadError::Store(error) => error.into(),
        ReadError::Table(error) => error.into(),
    }
}

/// A stored listing, read shard by shard.
#[derive(Debug)]
pub struct Manifest {
    store: Store,
    record: ManifestRecord,
    shard_size: u32,
    digests: Vec<blake3::Hash>,
    /// The file read last, since shards are mostly read in order.
    recent: Mutex<Option<(u32, Arc<OpenPart>)>>,
}

#[derive(Debug)]
struct OpenPart {
    file: ParquetFile,
    metadata: ArrowReaderMetadata,
}

impl OpenPart {
    async fn open(store: &Store, index: u32) -> Result<Self, ManifestError> {
        let path = part_path(index);
        let (file, _) = ParquetFile::find(store, path.clone()).await.map_err(|error| match error {
            StoreError::Object { source: object_store::Error::NotFound { .. }, .. } => {
                ManifestError::Missing(path.clone())
            }
            error => error.into(),
        })?;
        let metadata = file.metadata().await.map_err(|e| unread(table::unread::<SampleTable>(e)))?;
        Ok(Self { file, metadata })
    }

    /// The hashes of its shards.
    fn digests(&self, path: &Path) -> Result<Vec<blake3::Hash>, ManifestError> {
        let metadata = self.metadata.metadata().file_metadata().key_value_metadata();
        let noted = metadata.and_then(|pairs| pairs.iter().find(|pair| pair.key == DIGESTS)?.value.as_deref());
        let noted = noted.ok_or_else(|| ManifestError::Older(path.clone()))?;
        let digests: Result<Vec<_>, _> = noted.split_whitespace().map(blake3::Hash::from_hex).collect();
        let digests = digests.map_err(|_| ManifestError::Changed(path.clone()))?;
        if digests.len() == self.metadata.metadata().num_row_groups() {
            Ok(digests)
        } else {
            Err(ManifestError::Changed(path.clone()))
        }
    }
}

impl Manifest {
    /// Opens the manifest in `store` that `record` describes, with `shard_size` samples per shard. Reads only the footers of
    /// its files.
    pub async fn open(store: &Store, record: &ManifestRecord, shard_size: u32) -> Result<Self, ManifestError> {
        let shards = record.samples.div_ceil(u64::from(shard_size.max(1))) as u32;
        let digests = |index| async move { OpenPart::open(store, index).await?.digests(&part_path(index)) };
        let footers = futures::stream::iter(0..shards.div_ceil(SHARDS_PER_PART)).map(digests).buffered(FOOTERS);
        let digests = footers.try_concat().await?;
        let mut root = blake3::Hasher::new();
        digests.iter().for_each(|digest| _ = root.update(digest.as_bytes()));
        if root.finalize().to_hex().as_str() != record.digest {
            return Err(ManifestError::Changed(DIRECTORY.into()));
        }
        let (store, record) = (store.clone(), record.clone());
        Ok(Self { store, record, shard_size: shard_size.max(1), digests, recent: Mutex::default() })
    }

    /// Number of samples.
    pub fn len(&self) -> u64 {
        self.record.samples
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of shards.
    pub fn shards(&self) -> u32 {
        self.digests.len() as u32
    }

    /// The number of samples for each number of captions.
    pub fn caption_counts(&self) -> &BTreeMap<usize, u64> {
        &self.record.captions
    }

    /// The ids of a shard's samples; empty if there is no such shard.
    pub fn ids(&self, shard: ShardId) -> Range<u64> {
        let first = shard.first_sample(self.shard_size).0.min(self.len());
        first..(first + u64::from(self.shard_size)).min(self.len())
    }

    /// The samples of a shard; empty if there is no such shard.
    pub async fn shard(&self, shard: ShardId) -> Result<Vec<Sample>, ManifestError> {
        let Some(digest) = self.digests.get(shard.0 as usize) else { return Ok(Vec::new()) };
        let index = shard.0 / SHARDS_PER_PART;
        let (part, path) = (self.part(index).await?, part_path(index));
        let group = (shard.0 % SHARDS_PER_PART) as usize;
        let samples = table::groups::<SampleTable>(&part.file, &part.metadata, vec![group]).await;
        let samples: Vec<Sample> = samples.map_err(unread)?;
        let listed = samples.iter().map(|sample| sample.id.0).eq(self.ids(shard)) && digest_of(&samples) == *digest;
        if listed { Ok(samples) } else { Err(ManifestError::Changed(path)) }
    }

    async fn part(&self, index: u32) -> Result<Arc<OpenPart>, ManifestError> {
        if let Some((_, part)) = self.recent().as_ref().filter(|(recent, _)| *recent == index) {
            return Ok(Arc::clone(part));
        }
        let part = Arc::new(OpenPart::open(&self.store, index).await?);
        *self.recent() = Some((index, Arc::clone(&part)));
        Ok(part)
    }

    fn recent(&self) -> std::sync::MutexGuard<'_, Option<(u32, Arc<OpenPart>)>> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The hash of the samples' identities (key, etag, size, label, captions, pair) in order; the images' locations are not part
/// of it.
fn digest_of(samples: &[Sample]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    samples.iter().for_each(|sample| hash_identity(&mut hasher, sample));
    hasher.finalize()
}

/// Every field is preceded by its length (or absence), so that no two different lists of samples hash the same bytes.
fn hash_identity(hasher: &mut blake3::Hasher, sample: &Sample) {
    for text in [Some(sample.key.as_str()), sample.etag.as_deref(), sample.label.as_deref()] {
        hash_field(hasher, text);
    }
    hasher.update(&sample.size.to_le_bytes());
    if sample.candidates.is_empty() && sample.pair.is_none() {
        return;
    }
    // No key is this long, so the following bytes can't be confused with the next sample.
    hasher.update(&(u64::MAX - 1).to_le_bytes());
    hasher.update(&(sample.candidates.len() as u64).to_le_bytes());
    for text in sample.candidates.iter().map(|caption| Some(caption.as_str())).chain([sample.pair.as_deref()]) {
        hash_field(hasher, text);
    }
}

/// A text after its length, or the mark of its absence.
fn hash_field(hasher: &mut blake3::Hasher, text: Option<&str>) {
    hasher.update(&text.map_or(u64::MAX, |t| t.len() as u64).to_le_bytes());
    hasher.update(text.unwrap_or_default().as_bytes());
}

/// The table in a file of the manifest.
#[derive(Debug)]
struct SampleTable;

impl Table for SampleTable {
    type Row = Sample;

    const NAME: &'static str = "manifest";

    fn schema() -> Schema {
        Schema::new(vec![
            Field::new("sample_id", DataType::UInt64, false),
            Field::new("key", DataType::Utf8, false),
            Field::new("location", DataType::Utf8, false),
            Field::new("size", DataType::UInt64, false),
            Field::new("etag", DataType::Utf8, true),
            Field::new("label", DataType::Utf8, true),
            Field::new_list("candidates", caption(), true),
            Field::new("pair", DataType::Utf8, true),
            Field::new("offset", DataType::UInt64, true),
            Field::new("row", DataType::UInt64, true),
            Field::new("column", DataType::Utf8, true),
        ])
    }

    fn columns(rows: &[Sample]) -> Result<Vec<ArrayRef>, ParquetError> {
        Ok(vec![
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.id.0))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.key))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.location))),
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.size))),
            Arc::new(StringArray::from_iter(rows.iter().map(|r| r.etag.as_ref()))),
            Arc::new(StringArray::from_iter(rows.iter().map(|r| r.label.as_ref()))),
            Arc::new(caption_lists(rows)),
            Arc::new(StringArray::from_iter(rows.iter().map(|r| r.pair.as_ref()))),
            Arc::new(UInt64Array::from_iter(rows.iter().map(|r| match r.part {
                Some(Part::Member { offset }) => Some(offset),
                _ => None,
            }))),
            Arc::new(UInt64Array::from_iter(rows.iter().map(|r| r.cell().map(|(row, _)| row)))),
            Arc::new(StringArray::from_iter(rows.iter().map(|r| r.cell().map(|(_, column)| column)))),
        ])
    }

    fn read(columns: &Columns<'_>, rows: &mut Vec<Sample>) -> Result<(), TableError> {
        let id: &UInt64Array = columns.required("sample_id")?;
        let key: &StringArray = columns.required("key")?;
        let location: &StringArray = columns.required("location")?;
        let size: &UInt64Array = columns.required("size")?;
        let etag: &StringArray = columns.nullable("etag")?;
        let label: &StringArray = columns.nullable("label")?;
        let candidates: &ListArray = columns.nullable("candidates")?;
        let pair: &StringArray = columns.nullable("pair")?;
        let offset: &UInt64Array = columns.nullable("offset")?;
        let row: &UInt64Array = columns.nullable("row")?;
        let column: &StringArray = columns.nullable("column")?;
        let text = |column: &StringArray, i| column.is_valid(i).then(|| column.value(i).to_owned());
        for i in 0..columns.rows() {
            rows.push(Sample {
                id: SampleId(id.value(i)),
                key: key.value(i).to_owned(),
                location: location.value(i).to_owned(),
                part: match text(column, i) {
                    Some(column) if row.is_valid(i) => Some(Part::Cell { row: row.value(i), column }),
                    _ => offset.is_valid(i).then(|| Part::Member { offset: offset.value(i) }),
                },
                size: size.value(i),
                etag: text(etag, i),
                label: text(label, i),
                candidates: if candidates.is_valid(i) {
                    let values = candidates.value(i);
                    let captions: &StringArray = columns.inner("candidates", &values)?;
                    captions.iter().flatten().map(str::to_owned).collect()
                } else {
                    Vec::new()
                },
                pair: text(pair, i),
            });
        }
        Ok(())
    }
}

/// The list's item; `element` is the name the Parquet specification gives it.
fn caption() -> Field {
    Field::new("element", DataType::Utf8, true)
}

/// The captions column; null if a sample has no captions.
fn caption_lists(rows: &[Sample]) -> ListArray {
    let mut lists = ListBuilder::new(StringBuilder::new()).with_field(caption());
    for row in rows {
        row.candidates.iter().for_each(|caption| lists.values().append_value(caption));
        lists.append(!row.candidates.is_empty());
    }
    lists.finish()
}

#[cfg(test)]
mod tests;
