use std::sync::Arc;

use bytes::Bytes;
use elbo_core::failure::FailureStage;
use elbo_core::ids::{ClassIndex, SampleId};
use elbo_core::prediction::{Labelled, Outcome};
use elbo_data::SampleSink;
use elbo_data::manifest::ManifestRecord;
use elbo_data::manifest::{Manifest, ManifestWriter};
use elbo_store::Location;
use object_store::memory::InMemory;

use super::*;
use crate::predictions::{encode_predictions, encode_quarantine};

const SHARD_SIZE: u32 = 4;

fn samples(n: u64) -> Vec<Sample> {
    (0..n)
        .map(|i| Sample {
            id: SampleId(i),
            key: format!("{i}.png"),
            location: format!("/images/{i}.png"),
            part: None,
            size: 1,
            etag: None,
            label: Some("cat".into()),
            candidates: Vec::new(),
            pair: None,
        })
        .collect()
}

fn prediction(sample: &Sample, bad: bool) -> Prediction {
    let labelled =
        Labelled { class: ClassIndex(0), class_name: "cat".into(), confidence: None, margin: None, scores: Vec::new() };
    Prediction {
        sample: sample.id,
        key: sample.key.clone(),
        label: sample.label.clone(),
        evaluations: 1,
        outcome: if bad { Outcome::Quarantined { error: "bad".into() } } else { Outcome::Labelled(labelled) },
    }
}

fn quarantined(sample: &Sample) -> Quarantined {
    let (stage, error) = (FailureStage::Decode, "bad".into());
    Quarantined { sample: sample.id, key: sample.key.clone(), stage, error, attempts: 1 }
}

/// A manifest's files, and its record in job.json.
fn listed(samples: &[Sample]) -> (Vec<(Path, Bytes)>, ManifestRecord) {
    let mut writer = ManifestWriter::new(SHARD_SIZE);
    samples.iter().for_each(|sample| writer.take(sample.clone()).unwrap());
    writer.finish().unwrap()
}

/// An output of ten samples in three shards, with sample 5 quarantined.
async fn output() -> Store {
    let out = Store::from_parts(Arc::new(InMemory::new()), Location::Local("/out".into()));
    let samples = samples(10);
    let (files, _) = listed(&samples);
    for (path, bytes) in files {
        out.write(&path, bytes).await.unwrap();
    }
    for (k, of_shard) in samples.chunks(SHARD_SIZE as usize).enumerate() {
        let rows: Vec<_> = of_shard.iter().map(|s| prediction(s, s.id.0 == 5)).collect();
        write(&out, k as u32, &rows).await;
    }
    write_quarantine(&out, 1, &[quarantined(&samples[5])]).await;
    out
}

async fn write(out: &Store, shard: u32, rows: &[Prediction]) {
    out.write(&layout::predictions(ShardId(shard)), encode_predictions(rows, &[]).unwrap()).await.unwrap();
}

async fn write_quarantine(out: &Store, shard: u32, rows: &[Quarantined]) {
    out.write(&layout::quarantine(ShardId(shard)), encode_quarantine(rows, &[]).unwrap()).await.unwrap();
}

async fn check(out: &Store) -> Verification {
    let manifest = Manifest::open(out, &listed(&samples(10)).1, SHARD_SIZE).await.unwrap();
    verify(out, &manifest, &Expected { fingerprint: "abc".into(), ..Expected::default() }).await.unwrap()
}

fn assert_problem(found: &Verification, text: &str) {
    assert!(!found.ok);
    assert!(found.problems.iter().any(|p| p.contains(text)), "{:?}", found.problems);
}

#[tokio::test]
async fn a_complete_output_is_ok_and_serialises_as_documented() {
    let found = check(&output().await).await;
    let json =
        r#"{"ok":true,"manifest":10,"predictions":9,"quarantined":1,"missing":0,"duplicated":0,"fingerprint":"abc"}"#;
    assert_eq!(serde_json::to_string(&found).unwrap(), json);
    assert!(found.to_string().contains("complete and consistent"));
}

#[tokio::test]
async fn a_missing_or_damaged_shard_counts_all_its_samples_as_missing() {
    let out = output().await;
    out.delete_all(layout::PREDICTIONS).await.unwrap();
    let samples = samples(10);
    for k in [0, 1] {
        let rows: Vec<_> = samples[4 * k..4 * k + 4].iter().map(|s| prediction(s, s.id.0 == 5)).collect();
        write(&out, k as u32, &rows).await;
    }
    let found = check(&out).await;
    assert_eq!(found.missing, 2);
    assert_problem(&found, "shard-00002.parquet does not exist (2 samples)");

    out.write(&layout::predictions(ShardId(2)), Bytes::from_static(b"PAR1")).await.unwrap();
    let found = check(&out).await;
    assert_eq!(found.missing, 2);
    assert_problem(&found, "shard-00002.parquet: reading the predictions");
}

#[tokio::test]
async fn missing_and_duplicate_samples_are_counted() {
    let (out, samples) = (output().await, samples(10));
    let rows: Vec<_> = [0, 1, 1, 1, 3].map(|i: usize| prediction(&samples[i], false)).into();
    write(&out, 0, &rows).await;
    let found = check(&out).await;
    assert_eq!((found.missing, found.duplicated, found.predictions), (1, 1, 10));
    assert!(!found.ok);
}

#[tokio::test]
async fn a_row_of_another_shard_or_of_no_shard_is_a_problem() {
    let (out, samples) = (output().await, samples(20));
    let rows: Vec<_> = [8, 9, 0, 15].map(|i: usize| prediction(&samples[i], false)).into();
    write(&out, 2, &rows).await;
    let found = check(&out).await;
    assert_eq!(found.duplicated, 1);
    assert_problem(&found, "sample 0 (0.png) belongs to another shard");
    assert_problem(&found, "sample 15 (15.png) is not in the manifest");
}

#[tokio::test]
async fn a_file_without_a_shard_is_a_problem_and_its_rows_count() {
    let (out, samples) = (output().await, samples(10));
    write(&out, 7, &[prediction(&samples[3], false)]).await;
    let found = check(&out).await;
    assert_eq!(found.duplicated, 1);
    assert_problem(&found, "shard-00007.parquet belongs to no shard");
}

#[tokio::test]
async fn keys_and_labels_must_agree_with_the_manifest() {
    let (out, samples) = (output().await, samples(10));
    let (mut key, mut label) = (prediction(&samples[8], false), prediction(&samples[9], false));
    key.key = "other.png".into();
    label.label = None;
    write(&out, 2, &[key, label]).await;
    let found = check(&out).await;
    assert_problem(&found, "sample 8 is 'other.png', in the manifest '8.png'");
    assert_problem(&found, "the label of 9.png is none, in the manifest cat");
}

#[tokio::test]
async fn quarantine_files_and_predictions_must_agree() {
    let (out, samples) = (output().await, samples(10));
    write_quarantine(&out, 1, &[quarantined(&samples[6])]).await;
    let found = check(&out).await;
    assert_problem(&found, "6.png is not quarantined in the predictions");
    assert_problem(&found, "5.png is quarantined in the predictions but has no row here");
}
