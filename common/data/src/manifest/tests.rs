use std::sync::Arc;

use elbo_store::Location;
use object_store::memory::InMemory;

use super::*;

fn samples(n: u64) -> Vec<Sample> {
    let part = |i| match i % 3 {
        0 => None,
        1 => Some(Part::Member { offset: i * 512 }),
        _ => Some(Part::Cell { row: i, column: "image.bytes".into() }),
    };
    (0..n)
        .map(|i| Sample {
            id: SampleId(i),
            key: format!("cat/{i:04}.png"),
            location: format!("/images/cat/{i:04}.png"),
            part: part(i),
            size: 100 + i,
            etag: (i % 2 == 0).then(|| format!("tag{i}")),
            label: (i % 3 == 0).then(|| "cat".to_owned()),
            candidates: (0..i % 3).map(|k| format!("caption {k}")).collect(),
            pair: (i % 4 == 0).then(|| format!("pair {}", i / 8)),
        })
        .collect()
}

fn store() -> Store {
    Store::from_parts(Arc::new(InMemory::new()), Location::parse("memory:///").unwrap())
}

/// Writes a manifest and returns its record.
async fn written(out: &Store, samples: &[Sample], shard_size: u32) -> ManifestRecord {
    let mut writer = ManifestWriter::new(shard_size);
    samples.iter().for_each(|sample| writer.take(sample.clone()).unwrap());
    let (files, record) = writer.finish().unwrap();
    for (path, bytes) in files {
        out.write(&path, bytes).await.unwrap();
    }
    record
}

async fn digest(samples: &[Sample]) -> String {
    written(&store(), samples, 10).await.digest
}

#[tokio::test]
async fn every_shard_holds_its_own_samples() {
    let (all, out) = (samples(25), store());
    let record = written(&out, &all, 10).await;
    let manifest = Manifest::open(&out, &record, 10).await.unwrap();
    assert_eq!((manifest.len(), manifest.shards()), (25, 3));
    let mut read = Vec::new();
    for (k, count) in [10, 10, 5].into_iter().enumerate() {
        let shard = manifest.shard(ShardId(k as u32)).await.unwrap();
        assert_eq!(shard.len(), count);
        read.extend(shard);
    }
    assert_eq!(read, all);
    assert_eq!(manifest.ids(ShardId(2)), 20..25);
    assert_eq!(manifest.shard(ShardId(3)).await.unwrap(), []);
}

#[tokio::test]
async fn many_shards_take_several_files_and_a_large_one_is_one_row_group() {
    let (all, out) = (samples(200), store());
    let record = written(&out, &all, 3).await;
    assert_eq!(out.list(DIRECTORY).await.unwrap(), [part_path(0), part_path(1)]);
    let manifest = Manifest::open(&out, &record, 3).await.unwrap();
    assert_eq!(manifest.shards(), 67);
    // Back and forth between the files.
    for shard in [66, 0, 65, 63, 64] {
        let first = 3 * shard as usize;
        let read = manifest.shard(ShardId(shard)).await.unwrap();
        assert_eq!(read, all[first..(first + 3).min(200)]);
    }
    let (all, out) = (samples(5000), store());
    let record = written(&out, &all, 4000).await;
    let manifest = Manifest::open(&out, &record, 4000).await.unwrap();
    assert_eq!(manifest.shard(ShardId(0)).await.unwrap(), all[..4000]);
}

#[tokio::test]
async fn equal_samples_give_equal_bytes() {
    let (one, other) = (store(), store());
    for out in [&one, &other] {
        written(out, &samples(25), 10).await;
    }
    let read = async |out: &Store| out.read(&part_path(0)).await.unwrap().unwrap();
    assert_eq!(read(&one).await, read(&other).await);
}

#[tokio::test]
async fn the_digest_covers_identity_and_not_the_location() {
    let all = samples(25);
    let before = digest(&all).await;
    assert_eq!(before.len(), 64);
    let same = async |change: fn(&mut Sample)| {
        let mut all = all.clone();
        change(&mut all[3]);
        digest(&all).await == before
    };
    assert!(same(|s| s.location = "/elsewhere".into()).await);
    assert!(!same(|s| s.key = "cat/x.png".into()).await);
    assert!(!same(|s| s.etag = Some(String::new())).await);
    assert!(!same(|s| s.size += 1).await);
    assert!(!same(|s| s.label = None).await);
    assert!(!same(|s| s.candidates = vec!["a".into()]).await);
    assert!(!same(|s| s.pair = Some("p".into())).await);
    assert!(!same(|s| (s.candidates, s.pair) = (vec!["p".into()], None)).await);
}

#[tokio::test]
async fn samples_are_counted_by_their_captions() {
    let record = written(&store(), &samples(25), 10).await;
    assert_eq!(record.captions, [(0, 9), (1, 8), (2, 8)].into());
}

#[tokio::test]
async fn a_manifest_that_is_not_the_one_listed_is_refused() {
    let (all, out) = (samples(25), store());
    let record = written(&out, &all, 10).await;
    let open = async || Manifest::open(&out, &record, 10).await;

    // Other samples, in a valid file.
    let mut others = all.clone();
    others[12].key = "cat/other.png".into();
    written(&out, &others, 10).await;
    assert!(matches!(open().await, Err(ManifestError::Changed(_))));

    // The right hashes with other samples, which is detected when the shard is read.
    let mut forged = table::Writer::<SampleTable>::new().unwrap();
    others.chunks(10).for_each(|rows| forged.group(rows).unwrap());
    let digests: Vec<_> = all.chunks(10).map(|rows| digest_of(rows).to_hex().to_string()).collect();
    forged.note(DIGESTS, digests.join(" "));
    out.write(&part_path(0), forged.finish().unwrap()).await.unwrap();
    let manifest = open().await.unwrap();
    assert_eq!(manifest.shard(ShardId(0)).await.unwrap(), all[..10]);
    assert!(matches!(manifest.shard(ShardId(1)).await, Err(ManifestError::Changed(_))));

    // No hashes, as written by earlier versions.
    out.write(&part_path(0), table::encode::<SampleTable>(&all, 10, &[]).unwrap()).await.unwrap();
    assert!(open().await.unwrap_err().to_string().contains("earlier version"));

    out.write(&part_path(0), Bytes::from_static(b"no table")).await.unwrap();
    assert!(matches!(open().await, Err(ManifestError::Table(TableError::Decode { .. }))));
    out.delete(&part_path(0)).await.unwrap();
    assert!(open().await.unwrap_err().to_string().contains("manifest/part-00000.parquet is missing"));
}
