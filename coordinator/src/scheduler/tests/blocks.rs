//! Tests of the size of blocks as they are sent.

use elbo_core::failure::{FailureStage, SampleFailure};
use elbo_proto::{FULL_MESSAGE_BYTES, MAX_MESSAGE_BYTES};
use prost::Message;

use super::*;

/// A job that evaluates this many prompts, or captions per sample, on one slot, as a contrastive model does.
fn once(prompts: usize, captions: usize, samples: u64) -> JobShape {
    let contenders = Contenders::prompts(prompts);
    let of_job = (captions == 0).then_some(&contenders);
    let course = Course::new(&Policy::exhaustive(&[1], 1).unwrap(), None, 1000, of_job).unwrap();
    JobShape::new(course, contenders, &[(captions, samples)].into(), samples as u32, false)
}

/// A scheduler with one shard of these samples and a fast worker.
fn fast(job: JobShape, manifest: Vec<Sample>, policy: LeasePolicy) -> Scheduler {
    let mut scheduler = Scheduler::new(job, Epoch(2), policy, BTreeMap::new(), Waste::default());
    let shard = Shard::restore(scheduler.job(), manifest, &[], vec![]);
    scheduler.open_shard(ShardId(0), shard, Duration::ZERO);
    scheduler.join("w", "host", "cuda", Duration::ZERO);
    scheduler
}

fn samples(count: u64, captions: &[String]) -> Vec<Sample> {
    let sample = manifest(ShardId(0), 1).remove(0);
    (0..count).map(|id| Sample { id: SampleId(id), candidates: captions.to_vec(), ..sample.clone() }).collect()
}

/// All blocks, with their sizes.
fn blocks(scheduler: &mut Scheduler) -> Vec<(usize, LeasedBlock)> {
    let mut blocks = Vec::new();
    while let Some(grant) = scheduler.grant("w", 1e9, Duration::ZERO) {
        blocks.push((crate::service::to_block(scheduler.epoch(), grant.clone()).encoded_len(), grant));
    }
    blocks
}

fn units(blocks: &[(usize, LeasedBlock)]) -> Vec<UnitId> {
    let mut units: Vec<_> = blocks.iter().flat_map(|(_, grant)| grant.units.iter().map(|unit| unit.id)).collect();
    units.sort_unstable();
    units
}

#[test]
fn a_block_fits_a_message_however_many_classes_there_are() {
    for classes in [21_841, 40_000, 100_000_usize] {
        let count = 3_000_000 / classes as u64;
        let mut scheduler = fast(once(classes, 0, count), samples(count, &[]), LeasePolicy::default());
        let blocks = blocks(&mut scheduler);
        let sizes: Vec<_> = blocks.iter().map(|(size, _)| *size).collect();
        assert!(sizes.iter().all(|size| *size <= FULL_MESSAGE_BYTES), "{classes}: {sizes:?}");
        let (_, full) = sizes.split_last().unwrap();
        assert!(!full.is_empty() && full.iter().all(|size| *size > FULL_MESSAGE_BYTES / 2), "{classes}: {sizes:?}");
        let all = units(&blocks);
        assert!(all.len() == count as usize * classes.div_ceil(64) && all.windows(2).all(|two| two[0] != two[1]));
    }
}

#[test]
fn a_block_fits_a_message_however_long_the_captions_are() {
    let captions: Vec<_> = (0..1_000).map(|i| format!("{i} {}", "x".repeat(2_000))).collect();
    let mut scheduler = fast(once(1, 1_000, 8), samples(8, &captions), LeasePolicy::default());
    let blocks = blocks(&mut scheduler);
    assert!(blocks.iter().all(|(size, grant)| *size < 8 << 20 && !grant.samples.is_empty()));
    assert_eq!(units(&blocks).len(), 8 * 16);
    // A long list of captions is sent once with all its units, not once for each.
    assert!(blocks.len() <= 8, "{}", blocks.len());
}

#[test]
fn a_sample_that_fits_no_message_is_quarantined_with_the_reason() {
    let captions = ["short".to_owned(), "x".repeat(MAX_MESSAGE_BYTES / 2)];
    let mut manifest = samples(2, &captions);
    manifest[0].candidates = vec!["short".into(), "short too".into()];
    let mut scheduler = fast(once(1, 2, 2), manifest, LeasePolicy::default());
    let blocks = blocks(&mut scheduler);
    assert_eq!(units(&blocks).iter().map(|unit| unit.sample.0).collect::<Vec<_>>(), [0]);
    assert_eq!(scheduler.totals().quarantined, 1);
    let failures = vec![SampleFailure { sample: SampleId(0), stage: FailureStage::Read, error: "gone".into() }];
    scheduler.apply(Record { results: vec![], failures }, None);
    let (_, ended, totals) = scheduler.finished(ShardId(0)).unwrap();
    let SampleOutcome::Quarantined(failure) = &ended[1].outcome else { panic!("{:?}", ended[1].sample) };
    assert!(failure.error.contains("fewer or shorter captions"), "{}", failure.error);
    assert_eq!((totals.samples, totals.quarantined), (2, 2));
}

#[test]
fn retried_blocks_are_no_larger_than_first_blocks() {
    let policy = LeasePolicy { block_bytes: 10_000, ..LeasePolicy::default() };
    let mut scheduler = fast(once(6_400, 0, 4), samples(4, &[]), policy);
    let all: Vec<_> = (0..4).flat_map(|id| elbo_core::unit::Cut::new(1, 6_400).ids(SampleId(id), Round(0))).collect();
    // A worker says that it holds everything, and that it can't compute it.
    scheduler.adopt("w", key(1, 7), &all, Duration::ZERO);
    assert!(scheduler.holds("w", key(1, 7)));
    assert!(scheduler.fail("w", key(1, 7), "out of memory").is_empty());
    let blocks = blocks(&mut scheduler);
    assert!(blocks.iter().all(|(size, grant)| *size <= 10_500 && grant.attempt == 1), "{}", blocks.len());
    assert_eq!(units(&blocks), all);
}

#[test]
fn a_sample_without_captions_is_quarantined_and_gets_no_class() {
    let captions = ["a cat".to_owned(), "a dog".to_owned()];
    let mut manifest = samples(2, &captions);
    manifest[1].candidates = Vec::new();
    let mut scheduler = fast(once(0, 2, 2), manifest, LeasePolicy::default());
    assert_eq!(units(&blocks(&mut scheduler)).iter().map(|unit| unit.sample.0).collect::<Vec<_>>(), [0]);
    let failures = vec![SampleFailure { sample: SampleId(0), stage: FailureStage::Read, error: "gone".into() }];
    scheduler.apply(Record { results: vec![], failures }, None);
    let (_, ended, totals) = scheduler.finished(ShardId(0)).unwrap();
    let SampleOutcome::Quarantined(failure) = &ended[1].outcome else { panic!("{:?}", ended[1]) };
    assert_eq!((failure.stage, totals.quarantined), (FailureStage::Read, 2));
    assert!(failure.error.contains("no caption"), "{}", failure.error);
}
