//! The dataset as listed, persisted as Parquet before the first evaluation; a resume never lists again.
//!
//! A shard is a row group, so that a coordinator over millions of samples decodes only the shards it works on. What stays
//! in memory is the compressed file.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, StringArray, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use parquet::errors::ParquetError;
use serde::{Deserialize, Serialize};

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
}

/// A persisted listing.
#[derive(Clone, Debug)]
pub struct Manifest {
    bytes: Bytes,
    metadata: ArrowReaderMetadata,
    shard_size: u32,
    len: u64,
    digest: String,
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
        let mut manifest = Self { bytes, metadata, shard_size, len, digest: String::new() };
        manifest.digest = manifest.compute_digest()?;
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

    /// The BLAKE3 hash, in hexadecimal, of the samples' identities (key, etag, size, label) in order.
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

    fn compute_digest(&self) -> Result<String, TableError> {
        let mut hasher = blake3::Hasher::new();
        for shard in 0..self.shards() {
            for sample in self.shard(ShardId(shard))? {
                hash_identity(&mut hasher, &sample);
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

/// Every field is preceded by its length (or absence), so that no two different lists of samples hash the same bytes.
fn hash_identity(hasher: &mut blake3::Hasher, sample: &Sample) {
    let mut field = |value: Option<&str>| {
        hasher.update(&value.map_or(u64::MAX, |v| v.len() as u64).to_le_bytes());
        hasher.update(value.unwrap_or_default().as_bytes());
    };
    field(Some(&sample.key));
    field(sample.etag.as_deref());
    field(sample.label.as_deref());
    hasher.update(&sample.size.to_le_bytes());
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
        ])
    }

    fn read(columns: &Columns<'_>, rows: &mut Vec<Self>) -> Result<(), TableError> {
        let id: &UInt64Array = columns.required("sample_id")?;
        let key: &StringArray = columns.required("key")?;
        let location: &StringArray = columns.required("location")?;
        let size: &UInt64Array = columns.required("size")?;
        let etag: &StringArray = columns.nullable("etag")?;
        let label: &StringArray = columns.nullable("label")?;
        let text = |column: &StringArray, i| column.is_valid(i).then(|| column.value(i).to_owned());
        rows.extend((0..columns.len()).map(|i| Self {
            id: SampleId(id.value(i)),
            key: key.value(i).to_owned(),
            location: location.value(i).to_owned(),
            size: size.value(i),
            etag: text(etag, i),
            label: text(label, i),
        }));
        Ok(())
    }
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
