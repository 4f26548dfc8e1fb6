//! What the brain must know of a job.

use std::collections::BTreeMap;
use std::sync::Arc;

use elbo_common::ensemble::Contenders;
use elbo_common::policy::{RoundSlots, costs};

use super::active::PROMPT_BYTES;
use super::sample::SlotError;

/// What the brain must know of a job.
#[derive(Clone, Debug)]
pub struct JobShape {
    rounds: Vec<RoundSlots>,
    /// What competes for a sample without captions of its own.
    contenders: Arc<Contenders>,
    samples: u64,
    shard_size: u32,
    keep_errors: bool,
    planned: u64,
    /// Evaluations of a sample without captions of its own.
    planned_each: u64,
    /// Bytes that a sample with the most prompts takes between its first evaluation and its commit, at most.
    sample_bytes: u64,
}

impl JobShape {
    /// The shape of a job with shards of `shard_size`, in which `contenders` compete for every sample without captions of
    /// its own; `samples` counts the samples by their number of captions, and `keep_errors` says whether single errors are
    /// kept.
    pub fn new(
        rounds: Vec<RoundSlots>,
        contenders: Contenders,
        samples: &BTreeMap<usize, u64>,
        shard_size: u32,
        keep_errors: bool,
    ) -> Self {
        let contenders = Arc::new(contenders);
        let (planned_each, sample_bytes) = (evaluations(&rounds, &contenders), 0);
        let mut job =
            Self { rounds, contenders, samples: 0, shard_size, keep_errors, planned: 0, planned_each, sample_bytes };
        for (captions, count) in samples {
            job.samples += count;
            let (planned, prompts) = (job.planned_of(*captions), job.prompts_of(*captions));
            job.planned += count * planned;
            let errors = if keep_errors { planned * size_of::<SlotError>() as u64 } else { 0 };
            let bytes = (prompts * PROMPT_BYTES) as u64 + errors;
            job.sample_bytes = job.sample_bytes.max(bytes);
        }
        job
    }

    /// The rounds of every sample.
    pub fn rounds(&self) -> &[RoundSlots] {
        &self.rounds
    }

    /// Samples in the manifest.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Samples in a shard.
    pub fn shard_size(&self) -> u32 {
        self.shard_size
    }

    /// Whether every single error is kept.
    pub(super) fn keeps_errors(&self) -> bool {
        self.keep_errors
    }

    /// What competes for a sample with so many captions of its own.
    pub(super) fn contenders_of(&self, captions: usize) -> Arc<Contenders> {
        if captions == 0 { Arc::clone(&self.contenders) } else { Arc::new(Contenders::prompts(captions)) }
    }

    /// How many prompts a sample with so many captions of its own has.
    pub(super) fn prompts_of(&self, captions: usize) -> usize {
        if captions == 0 { self.contenders.prompt_count() } else { captions }
    }

    /// The evaluations of a sample with so many captions that is not given up, or the most there can be.
    pub(super) fn planned_of(&self, captions: usize) -> u64 {
        if captions == 0 { self.planned_each } else { evaluations(&self.rounds, &Contenders::prompts(captions)) }
    }

    /// Bytes that a shard takes at most, with every sample begun and none written.
    pub(super) fn shard_bytes(&self) -> u64 {
        self.sample_bytes * u64::from(self.shard_size)
    }

    /// How many shards the job has.
    pub fn shards(&self) -> u32 {
        self.samples.div_ceil(u64::from(self.shard_size.max(1))) as u32
    }

    /// The evaluations of all samples if none is given up; the most there can be where classes have unequally many prompts.
    pub fn planned_evaluations(&self) -> u64 {
        self.planned
    }
}

fn evaluations(rounds: &[RoundSlots], contenders: &Contenders) -> u64 {
    costs(rounds, contenders).iter().map(|c| c.evaluations).sum()
}
