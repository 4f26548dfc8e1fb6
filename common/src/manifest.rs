//! The dataset as listed, persisted as Parquet before the first evaluation; a resume never lists again.
//!
//! A shard is a row group, so that a coordinator over millions of samples decodes only the shards it works on. What stays
//! in memory is the compressed file.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::{Array, ArrayRef, ListArray, StringArray, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use parquet::errors::ParquetError;
use serde::{Deserialize, Serialize};

use crate::class::Classes;
use crate::ids::{SampleId, ShardId};
use crate::table::{self, Columns, Row, TableError};

/// One image of the dataset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Its position in the manifest.
    pub id: SampleId,
    /// Its path relative to the source; with the etag, its identity.
    pub key: String,
    /// Where a worker reads it: an absolute local path or a URL.
    pub location: String,
    /// Size in bytes.
    pub size: u64,
    /// The store's entity tag.
    pub etag: Option<String>,
    /// The label, where the dataset brings one.
    pub label: Option<String>,
    /// Captions of its own, which are its classes; none where it is judged by the job's.
    pub candidates: Vec<String>,
    /// Names the sample with the same captions that it is paired with.
    pub pair: Option<String>,
}

impl Sample {
    /// The classes it is judged by: its own captions, or else the job's.
    pub fn classes<'a>(&self, of_job: &'a Classes) -> Cow<'a, Classes> {
        match &self.candidates[..] {
            [] => Cow::Borrowed(of_job),
            captions => Cow::Owned(Classes::of_captions(captions)),
        }
    }
}

/// A persisted listing.
#[derive(Clone, Debug)]
pub struct Manifest {
    bytes: Bytes,
    metadata: ArrowReaderMetadata,
    shard_size: u32,
    len: u64,
    digest: String,
    caption_counts: BTreeMap<usize, u64>,
}

impl Manifest {
    /// The samples as a manifest file, `shard_size` to a shard. Their ids must be their positions.
    pub fn write_bytes(samples: &[Sample], shard_size: u32) -> Result<Bytes, TableError> {
        table::encode(samples, shard_size.max(1) as usize, &[])
    }

    /// Opens a manifest file written for shards of `shard_size` samples.
    pub fn parse(bytes: Bytes, shard_size: u32) -> Result<Self, TableError> {
        let manifest = Self::open(bytes)?;
        // A single shard may be shorter than the job's shards.
        let fits = match manifest.shards() {
            0 => true,
            1 => manifest.len <= u64::from(shard_size),
            _ => manifest.shard_size == shard_size,
        };
        if fits {
            Ok(Self { shard_size, ..manifest })
        } else {
            Err(wrong(format!("its shards hold {} samples, not {shard_size}", manifest.shard_size)))
        }
    }

    /// Opens a manifest file, taking the size of shards from the file.
    pub fn open(bytes: Bytes) -> Result<Self, TableError> {
        let metadata = table::metadata::<Sample>(&bytes)?;
        let sizes: Vec<_> = metadata.metadata().row_groups().iter().map(|g| g.num_rows() as u64).collect();
        let (shard_size, len) = (sizes.first().copied().unwrap_or(1), sizes.iter().sum());
        let last = sizes.last().copied().unwrap_or_default();
        let shard_size = u32::try_from(shard_size).map_err(|_| wrong(format!("a shard of {shard_size} samples")))?;
        if last > u64::from(shard_size) || sizes.iter().rev().skip(1).any(|&size| size != u64::from(shard_size)) {
            return Err(wrong("its shards differ in size"));
        }
        let (digest, caption_counts) = (String::new(), BTreeMap::new());
        let mut manifest = Self { bytes, metadata, shard_size, len, digest, caption_counts };
        manifest.survey()?;
        Ok(manifest)
    }

    /// How many samples there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many shards there are.
    pub fn shards(&self) -> u32 {
        self.metadata.metadata().num_row_groups() as u32
    }

    /// How many samples have so many captions of their own.
    pub fn caption_counts(&self) -> &BTreeMap<usize, u64> {
        &self.caption_counts
    }

    /// The BLAKE3 hash, in hexadecimal, of the samples' identities (key, etag, size, label, captions, pair) in order.
    ///
    /// Where the images lie is not part of it, nor how the samples are cut into shards.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The ids of a shard's samples; empty where there is no such shard.
    pub fn ids(&self, shard: ShardId) -> Range<u64> {
        let first = shard.first_sample(self.shard_size).0.min(self.len);
        first..(first + u64::from(self.shard_size)).min(self.len)
    }

    /// The samples of a shard; none where there is no such shard.
    pub fn shard(&self, shard: ShardId) -> Result<Vec<Sample>, TableError> {
        if shard.0 >= self.shards() {
            return Ok(Vec::new());
        }
        let samples: Vec<Sample> = table::decode_groups(&self.bytes, &self.metadata, vec![shard.0 as usize])?;
        if samples.iter().map(|sample| sample.id.0).eq(self.ids(shard)) {
            Ok(samples)
        } else {
            Err(wrong(format!("the sample ids of shard {shard} are not their positions")))
        }
    }

    /// Looks at every sample once.
    fn survey(&mut self) -> Result<(), TableError> {
        let mut hasher = blake3::Hasher::new();
        for shard in 0..self.shards() {
            for sample in self.shard(ShardId(shard))? {
                hash_identity(&mut hasher, &sample);
                *self.caption_counts.entry(sample.candidates.len()).or_default() += 1;
            }
        }
        self.digest = hasher.finalize().to_hex().to_string();
        Ok(())
    }
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
    // No key is so long: what follows can't be taken for the next sample.
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

fn wrong(problem: impl Into<String>) -> TableError {
    TableError::Rows { table: Sample::TABLE, problem: problem.into() }
}

impl Row for Sample {
    const TABLE: &'static str = "manifest";

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
        ])
    }

    fn columns(rows: &[Self]) -> Result<Vec<ArrayRef>, ParquetError> {
        Ok(vec![
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.id.0))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.key))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.location))),
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.size))),
            Arc::new(StringArray::from_iter(rows.iter().map(|r| r.etag.as_ref()))),
            Arc::new(StringArray::from_iter(rows.iter().map(|r| r.label.as_ref()))),
            Arc::new(caption_lists(rows)),
            Arc::new(StringArray::from_iter(rows.iter().map(|r| r.pair.as_ref()))),
        ])
    }

    fn read(columns: &Columns<'_>, rows: &mut Vec<Self>) -> Result<(), TableError> {
        let id: &UInt64Array = columns.required("sample_id")?;
        let key: &StringArray = columns.required("key")?;
        let location: &StringArray = columns.required("location")?;
        let size: &UInt64Array = columns.required("size")?;
        let etag: &StringArray = columns.nullable("etag")?;
        let label: &StringArray = columns.nullable("label")?;
        // Manifests of earlier versions have neither of these.
        let candidates: Option<&ListArray> = columns.optional("candidates")?;
        let pair: Option<&StringArray> = columns.optional("pair")?;
        let text = |column: &StringArray, i| column.is_valid(i).then(|| column.value(i).to_owned());
        for i in 0..columns.len() {
            rows.push(Self {
                id: SampleId(id.value(i)),
                key: key.value(i).to_owned(),
                location: location.value(i).to_owned(),
                size: size.value(i),
                etag: text(etag, i),
                label: text(label, i),
                candidates: match candidates.filter(|lists| lists.is_valid(i)) {
                    Some(lists) => {
                        let values = lists.value(i);
                        let captions: &StringArray = columns.inner("candidates", &values)?;
                        captions.iter().flatten().map(str::to_owned).collect()
                    }
                    None => Vec::new(),
                },
                pair: pair.and_then(|pair| text(pair, i)),
            });
        }
        Ok(())
    }
}

/// The list's item; `element` is the name the Parquet specification gives it.
fn caption() -> Field {
    Field::new("element", DataType::Utf8, true)
}

/// Null where a sample has no captions of its own.
fn caption_lists(rows: &[Sample]) -> ListArray {
    let mut lists = ListBuilder::new(StringBuilder::new()).with_field(caption());
    for row in rows {
        row.candidates.iter().for_each(|caption| lists.values().append_value(caption));
        lists.append(!row.candidates.is_empty());
    }
    lists.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(n: u64) -> Vec<Sample> {
        (0..n)
            .map(|i| Sample {
                id: SampleId(i),
                key: format!("cat/{i:04}.png"),
                location: format!("/images/cat/{i:04}.png"),
                size: 100 + i,
                etag: (i % 2 == 0).then(|| format!("tag{i}")),
                label: (i % 3 == 0).then(|| "cat".to_owned()),
                candidates: (0..i % 3).map(|k| format!("caption {k}")).collect(),
                pair: (i % 4 == 0).then(|| format!("pair {}", i / 8)),
            })
            .collect()
    }

    fn manifest(samples: &[Sample], shard_size: u32) -> Manifest {
        Manifest::parse(Manifest::write_bytes(samples, shard_size).unwrap(), shard_size).unwrap()
    }

    #[test]
    fn every_shard_holds_its_own_samples() {
        let all = samples(25);
        let manifest = manifest(&all, 10);
        assert_eq!((manifest.len(), manifest.shards()), (25, 3));
        let read: Vec<_> = (0..3).map(|k| manifest.shard(ShardId(k)).unwrap()).collect();
        assert_eq!(read.iter().map(Vec::len).collect::<Vec<_>>(), [10, 10, 5]);
        assert_eq!(read.concat(), all);
        assert_eq!(manifest.ids(ShardId(2)), 20..25);
        assert_eq!(manifest.shard(ShardId(3)).unwrap(), []);
    }

    #[test]
    fn a_shard_larger_than_a_decoder_batch_is_one_row_group() {
        let all = samples(5000);
        let manifest = manifest(&all, 4000);
        assert_eq!(manifest.shards(), 2);
        assert_eq!(manifest.shard(ShardId(0)).unwrap(), all[..4000]);
    }

    #[test]
    fn equal_samples_give_equal_bytes() {
        assert_eq!(Manifest::write_bytes(&samples(25), 10).unwrap(), Manifest::write_bytes(&samples(25), 10).unwrap());
    }

    #[test]
    fn the_digest_covers_identity_and_neither_location_nor_shards() {
        let all = samples(25);
        let digest = manifest(&all, 10).digest().to_owned();
        assert_eq!(digest.len(), 64);
        assert_eq!(manifest(&all, 7).digest(), digest);
        let changed = |change: fn(&mut Sample)| {
            let mut all = all.clone();
            change(&mut all[3]);
            manifest(&all, 10).digest() == digest
        };
        assert!(changed(|s| s.location = "/elsewhere".into()));
        assert!(!changed(|s| s.key = "cat/x.png".into()));
        assert!(!changed(|s| s.etag = Some(String::new())));
        assert!(!changed(|s| s.size += 1));
        assert!(!changed(|s| s.label = None));
        assert!(!changed(|s| s.candidates = vec!["a".into()]));
        assert!(!changed(|s| s.pair = Some("p".into())));
        assert!(!changed(|s| (s.candidates, s.pair) = (vec!["p".into()], None)));
    }

    #[test]
    fn samples_are_counted_by_their_captions() {
        assert_eq!(manifest(&samples(25), 10).caption_counts(), &[(0, 9), (1, 8), (2, 8)].into());
    }

    /// A row as it was before samples could bring captions.
    struct Older(Sample);

    impl Row for Older {
        const TABLE: &'static str = "manifest";

        fn schema() -> Schema {
            let fields = Sample::schema().fields;
            Schema::new(
                fields
                    .iter()
                    .filter(|f| !["candidates", "pair"].contains(&f.name().as_str()))
                    .cloned()
                    .collect::<Vec<_>>(),
            )
        }

        fn columns(rows: &[Self]) -> Result<Vec<ArrayRef>, ParquetError> {
            let samples: Vec<_> = rows.iter().map(|row| row.0.clone()).collect();
            Ok(Sample::columns(&samples)?.into_iter().take(6).collect())
        }

        fn read(_: &Columns<'_>, _: &mut Vec<Self>) -> Result<(), TableError> {
            unreachable!("only written")
        }
    }

    #[test]
    fn a_manifest_without_captions_and_pairs_is_that_of_samples_without_them() {
        let mut plain = samples(25);
        plain.iter_mut().for_each(|s| (s.candidates, s.pair) = (Vec::new(), None));
        let rows: Vec<_> = plain.iter().cloned().map(Older).collect();
        let older = Manifest::parse(table::encode(&rows, 10, &[]).unwrap(), 10).unwrap();
        assert_eq!(older.shard(ShardId(1)).unwrap(), plain[10..20]);
        assert_eq!(manifest(&plain, 10).digest(), older.digest());
    }

    #[test]
    fn a_manifest_of_another_job_is_refused() {
        let error = |bytes, size| Manifest::parse(bytes, size).unwrap_err().to_string();
        let bytes = Manifest::write_bytes(&samples(25), 10).unwrap();
        assert!(error(bytes, 20).contains("its shards hold 10 samples, not 20"));
        let mut moved = samples(25);
        moved[11].id = SampleId(3);
        let bytes = Manifest::write_bytes(&moved, 10).unwrap();
        assert!(error(bytes, 10).contains("shard 1 are not their positions"));
        assert!(error(Bytes::from_static(b"no"), 10).contains("reading the manifest"));
        assert_eq!(Manifest::parse(Manifest::write_bytes(&[], 10).unwrap(), 10).unwrap().shards(), 0);
    }
}
