//! The brain without a network or a clock: by single events, and in whole simulated clusters.

mod backups;
mod events;
mod failures;
mod simulation;

use super::*;
use elbo_common::ensemble::Contenders;
use elbo_common::ids::{LeaseId, PromptIndex, Round};
use elbo_common::noise::{NoiseScope, NoiseSource};
use elbo_common::policy::Policy;
use elbo_common::unit::Unit;

const SHARD_SIZE: u32 = 4;

fn shape(samples: u64, keep_errors: bool) -> JobShape {
    let contenders = Contenders::prompts(70);
    let rounds = Policy::reference(&[3, 1], &[10, 100], 1).unwrap().rounds(1000, Some(&contenders)).unwrap();
    JobShape::new(rounds, contenders, &[(0, samples)].into(), SHARD_SIZE, keep_errors)
}

fn manifest(shard: ShardId, samples: u64) -> Vec<Sample> {
    let first = shard.first_sample(SHARD_SIZE).0;
    (first..samples.min(first + u64::from(SHARD_SIZE)))
        .map(|id| Sample {
            id: SampleId(id),
            key: format!("{id}.png"),
            location: format!("/{id}.png"),
            part: None,
            size: 1,
            etag: None,
            label: None,
            candidates: Vec::new(),
            pair: None,
        })
        .collect()
}

fn open(brain: &mut Brain, shard: ShardId, samples: u64, records: Vec<Record>) {
    let restored = Shard::restore(brain.job(), manifest(shard, samples), &[], records);
    brain.open_shard(shard, restored, Duration::ZERO);
}

fn brain(samples: u64, epoch: u64) -> Brain {
    let policy = LeasePolicy { window: 2, first_block: 300, ..LeasePolicy::default() };
    Brain::new(shape(samples, true), Epoch(epoch), policy, BTreeMap::new(), Waste::default())
}

/// The error of an evaluation, as good as any and the same for everyone.
fn error(sample: SampleId, round: Round, slot: usize, prompt: PromptIndex) -> f32 {
    let mut out = [0.0];
    let key = format!("{sample}/{round}/{slot}");
    NoiseSource::Counter { seed: 1, scope: NoiseScope::Sample }.fill(&key, prompt.0, &mut out);
    out[0].abs() + 0.001 * prompt.0 as f32
}

fn evaluate(unit: &Unit) -> UnitResult {
    let mut result = UnitResult {
        id: unit.id,
        prompts: unit.prompts.iter().map(|p| p.0).collect(),
        slots: unit.slots.len() as u32,
        sum: Vec::new(),
        sum_sq: Vec::new(),
        errors: Vec::new(),
    };
    for prompt in &unit.prompts {
        let mut sums = elbo_common::sums::Sums::default();
        for slot in unit.slots.clone() {
            let error = error(unit.id.sample, unit.id.round, slot, *prompt);
            sums.add(error);
            result.errors.push(error);
        }
        result.sum.push(sums.sum);
        result.sum_sq.push(sums.sum_sq);
    }
    result
}

fn key(epoch: u64, lease: u64) -> LeaseKey {
    LeaseKey { epoch: Epoch(epoch), lease: LeaseId(lease) }
}

/// Lets time pass, listening for workers every second as the steward does: who was given up meanwhile.
fn wait(brain: &mut Brain, from: u64, to: u64) -> (Vec<String>, Vec<SampleFailure>) {
    let (mut silent, mut given_up) = (Vec::new(), Vec::new());
    for second in from..=to {
        let (workers, samples) = brain.expire(Duration::from_secs(second));
        silent.extend(workers);
        given_up.extend(samples);
    }
    (silent, given_up)
}

/// A small deterministic generator, so that a failing seed replays.
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % sides.max(1)
    }
}
